#pragma once
#include <initializer_list>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace blackmamba {

/// Base of every exception that the library throws. The message names what, where, got and expected.
class error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Shapes, strides or lengths that disagree. Thrown by contract files before any work is done.
class shape_error : public error {
  using error::error;
};

/// A value outside its domain: a probability above one, an unknown token, a non-finite loss.
class value_error : public error {
  using error::error;
};

/// A workspace that is too small; names the bytes asked for and the size.
class workspace_error : public error {
  using error::error;
};

/// A CUDA call that failed; names the operator. Errors of a kernel that is already running may be reported by a later
/// operator (cuda::synchronise_each_launch finds the right one).
class cuda_error : public error {
  using error::error;
};

/// A file that can't be read or written, or does not hold what it should.
class file_error : public error {
  using error::error;
};

namespace detail {

/// "(2, 16, 64)"; an extent that may be any: "(any, 64)"
template <class Range>
std::string shape_text(Range const& extents) {
  std::string text = "(";
  bool first = true;
  for (auto e : extents) {
    if (!first) text += ", ";
    text += e < 0 ? "any" : std::to_string(e);
    first = false;
  }
  return text + ")";
}

[[noreturn]] inline void throw_shape_error(std::string_view op, std::string_view argument, std::string_view got,
                                           std::string_view expected) {
  std::string text;
  text.append(op).append(": ").append(argument).append(": got ").append(got).append(", expected ").append(expected);
  throw shape_error(text);
}

}  // namespace detail

/// Throws shape_error "<op>: <argument>: got (…), expected (…)" unless view.extent(i) == expected[i] for all i.
/// @param expected one extent for each dimension; -1 accepts any
template <class View>
void check_shape(std::string_view op, std::string_view argument, View const& view,
                 std::initializer_list<std::int64_t> expected) {
  bool same = static_cast<int>(expected.size()) == View::rank;
  int i = 0;
  for (auto e : expected) {
    if (!same) break;
    same = e < 0 || view.extent(i) == e;
    ++i;
  }
  if (!same)
    detail::throw_shape_error(op, argument, detail::shape_text(view.extents()), detail::shape_text(expected));
}

/// As check_shape, but an absent view passes.
template <class View>
void check_optional_shape(std::string_view op, std::string_view argument, View const& view,
                          std::initializer_list<std::int64_t> expected) {
  if (view.present()) check_shape(op, argument, view, expected);
}

/// Throws shape_error "<op>: <argument>: got <got>, expected <expected>" unless the condition holds.
inline void check_that(bool condition, std::string_view op, std::string_view argument, std::string_view got,
                       std::string_view expected) {
  if (!condition) detail::throw_shape_error(op, argument, got, expected);
}

}  // namespace blackmamba
