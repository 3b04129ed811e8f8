#pragma once
#include <blackmamba/core/config.hpp>

#include <cmath>

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

/// 1 / (1 + e^-x)
template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE T sigmoid(T x) {
  return T(1) / (T(1) + exp(-x));
}

/// log(1 + e^x), with x itself above 20, where float can't tell the two apart.
template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE T softplus(T x) {
  return select(x > T(20), x, log1p(exp(min(x, T(20)))));
}
/// d softplus / dx = sigmoid(x)
template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE T softplus_derivative(T x) {
  return sigmoid(x);
}

/// x sigmoid(x), also called swish.
template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE T silu(T x) {
  return x / (T(1) + exp(-x));
}
/// d silu / dx = s (1 + x (1 - s)), s = sigmoid(x)
template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE T silu_derivative(T x) {
  T const s = sigmoid(x);
  return s * (T(1) + x * (T(1) - s));
}

/// x Phi(x) with the normal distribution function Phi(x) = (1 + erf(x / sqrt 2)) / 2: GELU without approximation.
template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE T gelu(T x) {
  return T(0.5) * x * (T(1) + erf(x * T(0.70710678118654752440)));
}
/// d gelu / dx = Phi(x) + x phi(x)
template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE T gelu_derivative(T x) {
  T const cdf = T(0.5) * (T(1) + erf(x * T(0.70710678118654752440)));
  T const pdf = T(0.39894228040143267794) * exp(T(-0.5) * x * x);
  return cdf + x * pdf;
}

}  // namespace blackmamba::math
