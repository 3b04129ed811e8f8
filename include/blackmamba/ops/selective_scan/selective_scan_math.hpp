#pragma once
#include <blackmamba/core/config.hpp>
#include <blackmamba/core/math.hpp>

// nvcc: with simd packs, these templates are host functions alone; that is meant.
#if BLACKMAMBA_CUDA
#pragma nv_diagnostic push
#pragma nv_diag_suppress 20011, 20014
#endif

/// The recurrence on one state of one channel and its derivatives: V is float or double on any device, or a simd pack
/// on the host (then without local variables, which nvcc takes for device code). Decays are powers of two, exp(dt A) =
/// 2^(dt rate), which saves a product for each of them.
namespace blackmamba::selective_scan_math {

inline constexpr double log2_e = 1.44269504088896340736;
inline constexpr double ln_2 = 0.69314718055994530942;

/// The exponents that powers of two are taken of: beyond, they are 2^-126 or 2^127.9.
inline constexpr double least_exponent = -126, largest_exponent = 127.9;
BLACKMAMBA_HD_WHERE_DEFINED template <class V>
BLACKMAMBA_HD BLACKMAMBA_INLINE V clamp_exponent(V x) {
  using math::max, math::min;
  return min(V(largest_exponent), max(V(least_exponent), x));  // in this order NaN stays NaN
}

/// With `power`, 2^x for exponents in range: softplus(x) = log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)
BLACKMAMBA_HD_WHERE_DEFINED template <class V, class Power>
BLACKMAMBA_HD BLACKMAMBA_INLINE V softplus(V x, Power const& power) {
  using math::abs, math::log1p_unit, math::max;
  return max(V(0), x) + log1p_unit(power(max(V(least_exponent), abs(x) * V(-log2_e))));
}
/// sigmoid(x) = 1 / (1 + e^-x), the derivative of softplus; silu(x) = x sigmoid(x)
BLACKMAMBA_HD_WHERE_DEFINED template <class V, class Power>
BLACKMAMBA_HD BLACKMAMBA_INLINE V sigmoid(V x, Power const& power) {
  return V(1) / (V(1) + power(clamp_exponent(x * V(-log2_e))));
}
/// d silu / dx, given s = sigmoid(x)
BLACKMAMBA_HD_WHERE_DEFINED template <class V>
BLACKMAMBA_HD BLACKMAMBA_INLINE V silu_derivative(V x, V s) {
  using math::fma;
  return fma(x * s, V(1) - s, s);
}

/// A itself: as given, or -e^a where its logarithm is.
BLACKMAMBA_HD_WHERE_DEFINED template <class V, class Power>
BLACKMAMBA_HD BLACKMAMBA_INLINE V natural_rate(V a, bool is_log, Power const& power) {
  return is_log ? -power(clamp_exponent(a * V(log2_e))) : a;
}
/// dA / da, given A.
BLACKMAMBA_HD_WHERE_DEFINED template <class V>
BLACKMAMBA_HD BLACKMAMBA_INLINE V natural_rate_derivative(V A, bool is_log) {
  return is_log ? A : V(1);
}
/// A log2(e).
BLACKMAMBA_HD_WHERE_DEFINED template <class V, class Power>
BLACKMAMBA_HD BLACKMAMBA_INLINE V rate(V a, bool is_log, Power const& power) {
  return natural_rate(a, is_log, power) * V(log2_e);
}

/// h_t = exp(dt A) h_{t-1} + dt u B
BLACKMAMBA_HD_WHERE_DEFINED template <class V>
BLACKMAMBA_HD BLACKMAMBA_INLINE V advance(V decay, V h, V drive) {
  using math::fma;
  return fma(decay, h, drive);
}

/// What one state adds to gradients.
/// @param g          gradient of h_t
/// @param d_exponent gradient of dt A: that of h_{t-1} by way of h_t, exp(dt A) g, times h_{t-1}
/// @param d_dt_u     gradient of dt u; a sum over states
/// @param d_dt       log2(e) times the gradient of dt by way of the decay; a sum over states
/// @param d_A        a sum over steps
BLACKMAMBA_HD_WHERE_DEFINED template <class V>
BLACKMAMBA_HD BLACKMAMBA_INLINE void add_adjoint(V g, V d_exponent, V dt, V rate, V b, V& d_dt_u, V& d_dt, V& d_A) {
  using math::fma;
  d_dt_u = fma(g, b, d_dt_u);
  d_dt = fma(d_exponent, rate, d_dt);
  d_A = fma(d_exponent, dt, d_A);
}

}  // namespace blackmamba::selective_scan_math

#if BLACKMAMBA_CUDA
#pragma nv_diagnostic pop
#endif
