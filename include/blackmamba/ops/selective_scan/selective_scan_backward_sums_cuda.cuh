#pragma once
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/core/numeric.hpp>

#include <cstdint>

/// How the backward pass of the selective scan sums over the lanes of a warp: over channels for d_B and d_C, over
/// states for what a channel has one of.
namespace blackmamba::cuda::detail {

/// Sums each of v over the lanes that differ in the bits Begin to End / 2, in the same order everywhere. Each lane is
/// left with the sums of some, in the first elements of v: spread_count of them from spread_first on, the same ones in
/// lanes for which spread_writes tells one from its twins.
template <int Begin, int End, int Count, class A, int Size>
__device__ __forceinline__ void spread_sums(A (&v)[Size], int lane) {
  if constexpr (Begin < End) {
    if constexpr (Count > 1) {
      bool const upper = (lane & Begin) != 0;
#pragma unroll
      for (int i = 0; i < Count / 2; ++i) {
        A const given = upper ? v[i] : v[i + Count / 2], kept = upper ? v[i + Count / 2] : v[i];
        v[i] = kept + __shfl_xor_sync(0xffffffffu, given, Begin);
      }
      spread_sums<2 * Begin, End, Count / 2>(v, lane);
    } else {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], Begin);
      spread_sums<2 * Begin, End, 1>(v, lane);
    }
  }
}
template <int Begin, int End, int Count>
inline constexpr int spread_count = Begin<End && Count> 1 ? spread_count<2 * Begin, End, Count / 2> : Count;
template <int Begin, int Count>
inline constexpr int spread_count<Begin, Begin, Count> = Count;
template <int Begin, int End, int Count>
__device__ __forceinline__ int spread_first(int lane) {
  if constexpr (Begin < End && Count > 1)
    return ((lane & Begin) != 0 ? Count / 2 : 0) + spread_first<2 * Begin, End, Count / 2>(lane);
  else
    return 0;
}
template <int Begin, int End, int Count>
__device__ __forceinline__ bool spread_writes(int lane) {
  if constexpr (Begin < End)
    return (Count > 1 || (lane & Begin) == 0) && spread_writes<2 * Begin, End, (Count > 1 ? Count / 2 : 1)>(lane);
  else
    return true;
}

/// Sums of sixteen values of each lane, four states by four steps, over the eight lanes that hold the same states, by
/// way of shared memory: half the instructions of spread_sums. A lane is left with one state at two steps. Between put
/// and take, and between take and the next put, stands a __syncwarp.
template <class A>
struct state_sums {
  static constexpr int row = 144, elements = 4 * row;  ///< padded so that lanes which access at once meet in no bank
  static __device__ __forceinline__ void put(A* to, A const (&v)[16], int lane) {
#pragma unroll
    for (int n = 0; n < 4; ++n)
      store_pack<4>(to + n * row + lane * 4, pack<A, 4>{v[4 * n], v[4 * n + 1], v[4 * n + 2], v[4 * n + 3]});
  }
  /// Whose sums take returns: the state, and the first of both steps.
  static __device__ __forceinline__ int state(int lane) { return lane / 2 % 4 * 4 + lane / 8; }
  static __device__ __forceinline__ int step(int lane) { return lane % 2 * 2; }
  static __device__ __forceinline__ pack<A, 2> take(A const* from, int lane) {
    A const* const p = from + lane / 8 * row + lane / 2 % 4 * 4 + lane % 2 * 2;
    pack<A, 2> x[8];
#pragma unroll
    for (int g = 0; g < 8; ++g) x[g] = load_pack<2>(p + g * 16);
#pragma unroll
    for (int half = 4; half > 0; half /= 2)
#pragma unroll
      for (int g = 0; g < half; ++g) x[g][0] += x[g + half][0], x[g][1] += x[g + half][1];
    return x[0];
  }
};

}  // namespace blackmamba::cuda::detail
