// Device memory handed to a host operator: the space is part of a view's type.
#include <blackmamba/ops/rms_norm/rms_norm.hpp>

#ifdef CORRECTED
using memory = blackmamba::space::host;
#else
using memory = blackmamba::space::device;
#endif

void normalise(blackmamba::view<memory, float, -1, -1> x, blackmamba::view<memory, float, -1> weight,
               blackmamba::view<blackmamba::space::host, float, -1, -1> y) {
  blackmamba::rms_norm::forward(blackmamba::device::cpu{}, {.x = x, .weight = weight}, y);
}

// expected-error: cannot convert
// expected-error: inputs<
