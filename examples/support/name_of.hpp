#pragma once
#include <string>

/// A type as source text has it, "blackmamba::linear", out of the compiler's name for this very function.
template <class Type>
std::string name_of() {
  std::string const function = __PRETTY_FUNCTION__;  // "... [with Type = blackmamba::linear; ...]"
  auto const at = function.find("Type = ") + 7;
  return function.substr(at, function.find_first_of(";]", at) - at);
}
