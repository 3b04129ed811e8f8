// A policy that no backend was written for: one sentence says so, and no other device is taken in its place.
#include <blackmamba/ops/rms_norm/rms_norm.hpp>

struct elsewhere {
  using memory_space = blackmamba::space::host;
  blackmamba::arena<memory_space>* workspace = nullptr;
};
static_assert(blackmamba::device_policy<elsewhere>);
static_assert(!blackmamba::implemented_on<blackmamba::rms_norm, elsewhere>);

#ifdef CORRECTED
using policy = blackmamba::device::cpu;
#else
using policy = elsewhere;
#endif

void normalise(blackmamba::view<blackmamba::space::host, float, -1, -1> x,
               blackmamba::view<blackmamba::space::host, float, -1> weight) {
  blackmamba::rms_norm::forward(policy{}, {.x = x, .weight = weight}, x);
}

// expected-error: blackmamba: this operator has no implementation under this device policy; include
// expected-error: include the operator's sibling file for that device, or specialise blackmamba::backend<Op, Policy>
