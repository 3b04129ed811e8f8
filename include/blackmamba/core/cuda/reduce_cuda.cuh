#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/view.hpp>

#include <cstdint>

/// Reductions in a fixed order: the same bits in every run.
namespace blackmamba::cuda {

/// Reduces over Width neighbouring lanes of a warp (a power of two); every lane gets the result.
template <int Width = 32, class T, class F>
__device__ __forceinline__ T warp_reduce(T x, F combine) {
#pragma unroll
  for (int distance = Width / 2; distance > 0; distance /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}
template <int Width = 32, class T>
__device__ __forceinline__ T warp_sum(T x) {
  return warp_reduce<Width>(x, [](T a, T b) { return a + b; });
}
template <int Width = 32, class T>
__device__ __forceinline__ T warp_max(T x) {
  return warp_reduce<Width>(x, [](T a, T b) { return a > b ? a : b; });
}

/// The sum over this lane of the warp and all before it; the lanes of a warp follow each other along threadIdx.x.
template <class T>
__device__ __forceinline__ T warp_prefix_sum(T x) {
  unsigned const lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned distance = 1; distance < 32; distance *= 2) {
    T const before = __shfl_up_sync(0xffffffffu, x, distance);
    if (lane >= distance) x += before;
  }
  return x;
}

/// Reduces over a block of Threads threads (a multiple of 32); every thread gets the result. `memory` holds one element
/// for each warp and may be used again after the call without a barrier of the caller's.
template <int Threads, class T, class F>
__device__ __forceinline__ T block_reduce(T x, T* memory, F combine) {
  constexpr int warps = Threads / 32;
  static_assert(Threads % 32 == 0 && warps <= 32, "blackmamba: block_reduce: whole warps, at most 32");
  x = warp_reduce(x, combine);
  if constexpr (warps == 1) return x;
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = memory[0];
#pragma unroll
  for (int w = 1; w < warps; ++w) sum = combine(sum, memory[w]);
  __syncthreads();
  return sum;
}
template <int Threads, class T>
__device__ __forceinline__ T block_sum(T x, T* memory) {
  return block_reduce<Threads>(x, memory, [](T a, T b) { return a + b; });
}

namespace detail {

/// Each block sums 32 columns; 32 threads share the rows of a column, and their sums are added as a tree.
template <class T, class A>
__global__ void __launch_bounds__(1024) column_sums(T const* x, std::int64_t rows, std::int64_t columns,
                                                    std::int64_t row_stride, A* sums) {
  __shared__ A part[32][33];
  std::int64_t const column = std::int64_t{blockIdx.x} * 32 + threadIdx.x;
  A sum = 0;
  if (column < columns)
    for (std::int64_t r = threadIdx.y; r < rows; r += 32) sum += convert<A>(x[r * row_stride + column]);
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  A total = part[threadIdx.x][threadIdx.y];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
  std::int64_t const mine = std::int64_t{blockIdx.x} * 32 + threadIdx.y;
  if (threadIdx.x == 0 && mine < columns) sums[mine] += total;
}

}  // namespace detail

/// sums[j] += sum over i of x[i, j], in one launch, without scratch memory.
template <class T, class A>
void add_column_sums(char const* op, device::cuda const& policy, std::int64_t rows, std::int64_t columns, T const* x,
                     std::int64_t row_stride, A* sums) {
  if (rows > 0)
    launch(op, policy, {blocks_for(columns, 32), dim3(32, 32)}, detail::column_sums<std::remove_const_t<T>, A>, x, rows,
           columns, row_stride, sums);
}

}  // namespace blackmamba::cuda
