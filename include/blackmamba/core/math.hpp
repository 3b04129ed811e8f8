#pragma once
#include <blackmamba/core/config.hpp>

#include <cmath>

#if BLACKMAMBA_CUDA
#include <blackmamba/core/cuda/exponential_cuda.cuh>
#endif

#if BLACKMAMBA_CUDA  // with simd packs, these templates are host functions alone, as is meant
#pragma nv_diagnostic push
#pragma nv_diag_suppress 20011, 20014
#endif

/// Mathematics on one value, written once: T is float or double on any device, or a simd pack on the host. Elementary
/// functions of packs are found by argument-dependent lookup (core/cpu/simd.hpp).
namespace blackmamba::math {

// clang-format off
BLACKMAMBA_HD BLACKMAMBA_INLINE float  exp(float x)    { return std::exp(x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE double exp(double x)   { return std::exp(x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE float  exp2(float x)   { return std::exp2(x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE double exp2(double x)  { return std::exp2(x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE float  log(float x)    { return std::log(x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE double log(double x)   { return std::log(x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE float  log1p(float x)  { return std::log1p(x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE double log1p(double x) { return std::log1p(x); }
/// log(1 + x) for x in [0, 1].
BLACKMAMBA_HD BLACKMAMBA_INLINE float  log1p_unit(float x)  { return std::log1p(x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE double log1p_unit(double x) { return std::log1p(x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE float  sqrt(float x)   { return std::sqrt(x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE double sqrt(double x)  { return std::sqrt(x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE float  erf(float x)    { return std::erf(x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE double erf(double x)   { return std::erf(x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE float  abs(float x)    { return std::fabs(x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE double abs(double x)   { return std::fabs(x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE float  fma(float a, float b, float c)    { return std::fma(a, b, c); }
BLACKMAMBA_HD BLACKMAMBA_INLINE double fma(double a, double b, double c) { return std::fma(a, b, c); }
BLACKMAMBA_HD BLACKMAMBA_INLINE float  max(float a, float b)   { return a > b ? a : b; }
BLACKMAMBA_HD BLACKMAMBA_INLINE double max(double a, double b) { return a > b ? a : b; }
BLACKMAMBA_HD BLACKMAMBA_INLINE float  min(float a, float b)   { return a < b ? a : b; }
BLACKMAMBA_HD BLACKMAMBA_INLINE double min(double a, double b) { return a < b ? a : b; }
BLACKMAMBA_HD BLACKMAMBA_INLINE float  select(bool c, float a, float b)   { return c ? a : b; }
BLACKMAMBA_HD BLACKMAMBA_INLINE double select(bool c, double a, double b) { return c ? a : b; }
// clang-format on

/// Phi(x) = (1 + erf(x / sqrt 2)) / 2, the normal distribution function, without cancellation in its left tail.
BLACKMAMBA_HD BLACKMAMBA_INLINE double normal_cdf(double x) { return 0.5 * std::erfc(-0.70710678118654752440 * x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE float normal_cdf(float x) {
#if defined(__CUDA_ARCH__)
  // Phi(-a) = e^(-a^2 / 2) t P(t) with t = 1 / (1 + 0.345 a), where P is the polynomial of degree 8 whose relative
  // error over 0 <= a <= 15 is smallest: 0.44 roundings. With those of the arithmetic below they stay below 10 (a^2
  // comes with its rounding error, which the exponential would enlarge). About half the cost of normcdff.
  float const a = std::fabs(x) > 15 ? 15.0f : std::fabs(x);  // beyond, Phi(-a) is 0
  float const t = cuda::reciprocal(std::fma(a, 0.345f, 1.0f));
  float p = -0.0279358607f;
  p = std::fma(p, t, 0.143249005f);
  p = std::fma(p, t, -0.267256707f);
  p = std::fma(p, t, 0.183044627f);
  p = std::fma(p, t, -0.0349610932f);
  p = std::fma(p, t, 0.110771589f);
  p = std::fma(p, t, 0.117476754f);
  p = std::fma(p, t, 0.137990832f);
  p = std::fma(p, t, 0.137620866f);
  float const square = a * a, rest = std::fma(a, a, -square), e = std::exp(-0.5f * square);
  float const tail = p * t * std::fma(e, -0.5f * rest, e);
  return x < 0 ? tail : 1.0f - tail;
#else
  return static_cast<float>(normal_cdf(static_cast<double>(x)));  // in float, the rounding of x / sqrt 2 would show
#endif
}
/// phi(x) = e^(-x^2 / 2) / sqrt(2 pi), the normal density.
BLACKMAMBA_HD BLACKMAMBA_INLINE double normal_pdf(double x) { return 0.39894228040143267794 * std::exp(-0.5 * x * x); }
BLACKMAMBA_HD BLACKMAMBA_INLINE float normal_pdf(float x) { return 0.39894228040143267794f * std::exp(-0.5f * x * x); }

/// a / b for b >= 1. In float on a device, within two units in the last place (0 beyond b = 2^126): a division that
/// rounds correctly costs more there than everything else that an activation does.
BLACKMAMBA_HD_WHERE_DEFINED template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE T ratio(T a, T b) {
  return a / b;
}
BLACKMAMBA_HD BLACKMAMBA_INLINE float ratio(float a, float b) {
#if defined(__CUDA_ARCH__)
  return a * cuda::reciprocal(b);
#else
  return a / b;
#endif
}

/// 1 / (1 + e^-x)
BLACKMAMBA_HD_WHERE_DEFINED template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE T sigmoid(T x) {
  return ratio(T(1), T(1) + exp(-x));
}

/// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|): neither overflow nor loss of small values.
BLACKMAMBA_HD_WHERE_DEFINED template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE T softplus(T x) {
  return max(x, T(0)) + log1p_unit(exp(-abs(x)));
}
/// d softplus / dx = sigmoid(x)
BLACKMAMBA_HD_WHERE_DEFINED template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE T softplus_derivative(T x) {
  return sigmoid(x);
}

/// x sigmoid(x), also called swish.
BLACKMAMBA_HD_WHERE_DEFINED template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE T silu(T x) {
  return ratio(x, T(1) + exp(-x));
}
/// d silu / dx = s (1 + x (1 - s)), s = sigmoid(x)
BLACKMAMBA_HD_WHERE_DEFINED template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE T silu_derivative(T x) {
  auto const s = sigmoid(x);
  return s * (T(1) + x * (T(1) - s));
}

/// x Phi(x): GELU without approximation.
BLACKMAMBA_HD_WHERE_DEFINED template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE T gelu(T x) {
  return x * normal_cdf(x);
}
/// d gelu / dx = Phi(x) + x phi(x)
BLACKMAMBA_HD_WHERE_DEFINED template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE T gelu_derivative(T x) {
  return normal_cdf(x) + x * normal_pdf(x);
}

}  // namespace blackmamba::math

#if BLACKMAMBA_CUDA
#pragma nv_diagnostic pop
#endif
