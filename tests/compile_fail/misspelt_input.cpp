// A field of an argument aggregate that does not exist is an error at the call.
#include <blackmamba/ops/rms_norm/rms_norm.hpp>

void normalise(blackmamba::view<blackmamba::space::host, float, -1, -1> x,
               blackmamba::view<blackmamba::space::host, float, -1> gain) {
#ifdef CORRECTED
  blackmamba::rms_norm::forward(blackmamba::device::cpu{}, {.x = x, .weight = gain}, x);
#else
  blackmamba::rms_norm::forward(blackmamba::device::cpu{}, {.x = x, .gain = gain}, x);
#endif
}

// expected-error: inputs<
