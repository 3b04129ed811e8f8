// A type that is no device policy is turned away at the call, before any of the operator is looked at.
#include <blackmamba/ops/rms_norm/rms_norm.hpp>

struct no_policy {
  int threads = 1;
};

#ifdef CORRECTED
using policy = blackmamba::device::cpu;
#else
using policy = no_policy;
#endif

void normalise(blackmamba::view<blackmamba::space::host, float, -1, -1> x,
               blackmamba::view<blackmamba::space::host, float, -1> weight) {
  blackmamba::rms_norm::forward(policy{}, {.x = x, .weight = weight}, x);
}

// expected-error: no matching function for call to
// expected-error: constraints not satisfied
