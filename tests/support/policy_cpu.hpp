#pragma once
#include <blackmamba/core/policy.hpp>

/// The policy that a test body is compiled against; the build includes one such file before the body.
using test_policy = blackmamba::device::cpu;
inline test_policy make_policy() { return {}; }
