#pragma once
#include <blackmamba/core/config.hpp>
#include <blackmamba/core/cuda/exponential_cuda.cuh>

#include <cmath>

/// The elementary functions of the recurrence on the device. Decays are most of what a scan computes: one instruction
/// of the special function unit each in float.
namespace blackmamba::cuda::detail {

/// A product that no sum absorbs. Compilers contract a b + c where they like, here so and there otherwise; a state must
/// come out the same wherever in a loop its step falls.
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double times(double a, double b) { return __dmul_rn(a, b); }

/// log(1 + x) for x in [0, 1], to a relative error of 2e-7: a polynomial, for the special function unit is what bounds
/// a scan, and its logarithm loses the digits of small x.
__device__ __forceinline__ float log1p_unit(float x) {
  float p = -3.243819345e-3f;
  p = fmaf(p, x, 1.985109411e-2f);
  p = fmaf(p, x, -5.696006492e-2f);
  p = fmaf(p, x, 1.060385481e-1f);
  p = fmaf(p, x, -1.530581415e-1f);
  p = fmaf(p, x, 1.967606097e-1f);
  p = fmaf(p, x, -2.495416850e-1f);
  p = fmaf(p, x, 3.332996666e-1f);
  p = fmaf(p, x, -4.999990165e-1f);
  p = fmaf(p, x, 1.0f);
  return times(p, x);
}
__device__ __forceinline__ double log1p_unit(double x) { return ::log1p(x); }

/// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)
template <class A>
__device__ __forceinline__ A scan_softplus(A x) {
  A positive, size;
  if constexpr (sizeof(A) == 4)
    positive = fmaxf(x, 0.0f), size = fabsf(x);
  else
    positive = ::fmax(x, 0.0), size = ::fabs(x);
  // NaN comes by way of the second term.
  return positive + log1p_unit(power_of_two(times(A(-1.44269504088896340736), size)));
}
/// 1 / (1 + e^-x)
template <class A>
__device__ __forceinline__ A scan_sigmoid(A x) {
  return reciprocal(A(1) + power_of_two(times(A(-1.44269504088896340736), x)));
}
/// A log2(e), of A as given or of its logarithm.
template <class A>
__device__ __forceinline__ A scan_rate(A a, bool is_log) {
  if constexpr (sizeof(A) == 4)
    return (is_log ? -expf(a) : a) * 1.44269504088896340736f;
  else
    return (is_log ? -::exp(a) : a) * 1.44269504088896340736;
}

}  // namespace blackmamba::cuda::detail
