#pragma once
#include <blackmamba/core/cuda/depth_parts_cuda.cuh>
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/product_cuda.cuh>
#include <blackmamba/core/numeric.hpp>

#include <cstddef>
#include <cstdint>

/// Products of any types, strides and alignments, with and without groups, on the arithmetic units: what nothing faster
/// takes. Instantiated once for each (A, B, C) that is asked for; transposes are run-time values.
namespace blackmamba::cuda::detail {

/// A tile of C is 64 x 64, each thread's part of it 4 x 4, the depth is taken in steps of 16.
inline constexpr int simple_tile = 64, simple_depth = 16;

/// Rows of shared memory are padded so that threads that store along the depth meet in few banks, and stay aligned.
template <class A>
using simple_stage = A[simple_depth][simple_tile + 4];

template <class A>
struct alignas(16) quad {
  A v[4];
};

/// One operand's next step of the depth, on its way from memory to shared memory.
template <class A, class T>
struct simple_loader {
  T const* from;             // of the tile's first row (or column) and the depth's beginning
  std::int64_t stride;       // between stored rows
  bool along;                // whether the depth is what lies contiguous
  std::int64_t rows, depth;  // how much there is
  A next[4];

  __device__ __forceinline__ int row(int i) const { return along ? threadIdx.x / 16 + 16 * i : threadIdx.x % 64; }
  __device__ __forceinline__ int step(int i) const { return along ? threadIdx.x % 16 : threadIdx.x / 64 + 4 * i; }
  __device__ __forceinline__ void load(std::int64_t at) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      std::int64_t const p = at + step(i);
      next[i] = row(i) < rows && p < depth ? convert<A>(from[along ? row(i) * stride + p : p * stride + row(i)]) : A(0);
    }
  }
  __device__ __forceinline__ void store(simple_stage<A>& to) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[step(i)][row(i)] = next[i];
  }
};

/// Part `part` of the depth where it is cut (only without groups): its sums go to partial (parts, m, n).
template <class TA, class TB, class TC>
__global__ void __launch_bounds__(256)
    simple_product_tiles(product<TA, TB, TC> x, std::int64_t tiles, std::int64_t part_depth, accum_t<TC>* partial) {
  using A = accum_t<TC>;
  __shared__ alignas(16) simple_stage<A> left, right;
  std::int64_t const part = partial ? blockIdx.x / tiles : 0;
  product_tile t;
  if (!find_tile<simple_tile, simple_tile>(x, blockIdx.x - part * tiles, t)) return;
  if (partial) {
    t.depth = part * part_depth;
    t.depth_end = t.depth + part_depth < x.k ? t.depth + part_depth : x.k;
  }
  std::int64_t const depth = t.depth_end - t.depth;
  if (x.groups.by == grouping::depth && depth <= 0) return;

  bool const a_along = x.ta == transpose::no, b_along = x.tb == transpose::yes;
  TB const* const b = x.b + (x.groups.by == grouping::rows ? t.group * x.groups.b_apart : 0);
  simple_loader<A, TA> a_loader{a_along ? x.a + t.row * x.lda + t.depth : x.a + t.depth * x.lda + t.row, x.lda, a_along,
                                t.row_end - t.row, depth};
  simple_loader<A, TB> b_loader{b_along ? b + t.column * x.ldb + t.depth : b + t.depth * x.ldb + t.column, x.ldb,
                                b_along, x.n - t.column, depth};
  int const i0 = static_cast<int>(threadIdx.x) / 16 * 4, j0 = static_cast<int>(threadIdx.x) % 16 * 4;
  A sum[4][4] = {};
  a_loader.load(0);
  b_loader.load(0);
  for (std::int64_t p = 0; p < depth; p += simple_depth) {
    a_loader.store(left);
    b_loader.store(right);
    __syncthreads();
    if (p + simple_depth < depth) {
      a_loader.load(p + simple_depth);
      b_loader.load(p + simple_depth);
    }
#pragma unroll
    for (int q = 0; q < simple_depth; ++q) {
      auto const u = *reinterpret_cast<quad<A> const*>(&left[q][i0]);
      auto const v = *reinterpret_cast<quad<A> const*>(&right[q][j0]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += u.v[i] * v.v[j];
    }
    __syncthreads();
  }

  TC* const c = x.c + (x.groups.by == grouping::depth ? t.group * x.groups.c_apart : 0);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    std::int64_t const column = t.column + j0 + j;
    if (column >= x.n) break;
    A const bias = x.bias && !partial ? x.bias[t.group * x.groups.bias_apart + column] : A(0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      std::int64_t const r = t.row + i0 + i;
      if (r >= t.row_end) break;
      if (partial) {
        partial[(part * x.m + r) * x.n + column] = sum[i][j];
        continue;
      }
      TC* const to = c + r * x.ldc + column;
      *to = convert<TC>(sum[i][j] + bias + (x.mode == update::accumulate ? convert<A>(*to) : A(0)));
    }
  }
}

/// A product with few tiles and a great depth is cut along the depth, as far as the workspace holds the parts' sums.
template <class TA, class TB, class TC>
void simple_product(char const* op, device::cuda const& policy, product<TA, TB, TC> const& x, void* workspace,
                    std::size_t workspace_bytes) {
  using A = accum_t<TC>;
  std::int64_t const tiles = most_tiles<simple_tile, simple_tile>(x);
  std::int64_t parts = 1;
  if (x.groups.by == grouping::none) parts = parts_of_depth<A>(x.k, 128, tiles, x.m * x.n, workspace_bytes);
  if (parts < 2) {
    launch(op, policy, {blocks_for(tiles, 1), 256}, simple_product_tiles<TA, TB, TC>, x, tiles, x.k,
           static_cast<A*>(nullptr));
    return;
  }
  std::int64_t const depth = ((x.k + parts - 1) / parts + simple_depth - 1) / simple_depth * simple_depth;
  parts = (x.k + depth - 1) / depth;
  auto* const partial = static_cast<A*>(workspace);
  launch(op, policy, {blocks_for(tiles * parts, 1), 256}, simple_product_tiles<TA, TB, TC>, x, tiles, depth, partial);
  add_parts_of(op, policy, x, partial, parts);
}

}  // namespace blackmamba::cuda::detail
