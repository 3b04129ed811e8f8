#pragma once

#include <cmath>

/// The special function unit's 2^x and 1 / x for floats: one instruction each, no branch. Each is off by at most two
/// units in the last place (2^x by 2^-22.5 of the result, 1 / x by one unit); subnormal numbers are taken for zeros and
/// become zeros, infinities and NaN come out as they should. In double, the functions of the standard library.
namespace blackmamba::cuda {

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double power_of_two(double x) { return ::exp2(x); }

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }

}  // namespace blackmamba::cuda
