#pragma once
#include <blackmamba/core/policy.hpp>

/// The policy that a test body is compiled against; the build includes one such file before the body.
using test_policy = blackmamba::device::cpu;
inline test_policy make_policy() { return {}; }
/// The storage types that whole networks are trained in: a network costs a compiler more than all of its operators.
#define TRAINED_TYPES float, double, blackmamba::bfloat16, blackmamba::half
