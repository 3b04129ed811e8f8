#pragma once
#include <blackmamba/core/math.hpp>

// nvcc: with simd packs, these templates are host functions alone, as is meant; locals are auto because nvcc accepts
// no named vector type in a function that is also for the device.
#if BLACKMAMBA_CUDA
#pragma nv_diagnostic push
#pragma nv_diag_suppress 20011, 20013, 20014, 20015
#endif

/// One parameter (T is float or double, on any device), or one in each lane (T is a simd pack, on the host).
namespace blackmamba::math {

/// What a gradient is multiplied with so that the norm of all does not exceed max_norm, where that is not 0.
BLACKMAMBA_HD inline double adamw_clip(double norm, double max_norm) {
  return max_norm > 0 && norm > max_norm ? max_norm / norm : 1;
}

/// What is the same for all parameters of a segment.
template <class T>
struct adamw_factors {
  T clip;
  T beta1, rest1;       // 1 - beta1
  T beta2, rest2;       // 1 - beta2
  T step_size;          // eta / (1 - beta1^t)
  T second_correction;  // 1 / sqrt(1 - beta2^t)
  T eps;
  T decay;  // eta weight_decay
};

/// With m' = m / c1 and v' = v / c2, eta m' / (sqrt(v') + eps) is (eta / c1) m / (sqrt(v) / sqrt(c2) + eps).
BLACKMAMBA_HD_WHERE_DEFINED template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE void adamw_update(T& parameter, T& first_moment, T& second_moment, T gradient,
                                                  adamw_factors<T> const& f) {
  auto const g = gradient * f.clip;
  first_moment = fma(first_moment, f.beta1, g * f.rest1);
  second_moment = fma(second_moment, f.beta2, g * g * f.rest2);
  parameter -=
      fma(parameter, f.decay, first_moment * f.step_size / fma(sqrt(second_moment), f.second_correction, f.eps));
}

}  // namespace blackmamba::math

#if BLACKMAMBA_CUDA
#pragma nv_diagnostic pop
#endif
