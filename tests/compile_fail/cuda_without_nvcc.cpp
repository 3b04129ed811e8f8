// device::cuda where the compiler is no CUDA compiler: one sentence says what to do.
#include <blackmamba/ops/rms_norm/rms_norm.hpp>

#ifdef CORRECTED
using policy = blackmamba::device::cpu;
#else
using policy = blackmamba::device::cuda;
#endif

void normalise(blackmamba::view<policy::memory_space, float, -1, -1> x,
               blackmamba::view<policy::memory_space, float, -1> weight) {
  blackmamba::rms_norm::forward(policy{}, {.x = x, .weight = weight}, x);
}

// expected-error: blackmamba: device::cuda: this file is not compiled as CUDA; compile it with nvcc
