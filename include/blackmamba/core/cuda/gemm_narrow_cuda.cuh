#pragma once
#include <blackmamba/core/cuda/gemm_mma_cuda.cuh>
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/product_cuda.cuh>
#include <blackmamba/core/cuda/tensor_core_cuda.cuh>
#include <blackmamba/core/numeric.hpp>

#include <cstddef>
#include <cstdint>
#include <type_traits>

/// C = A B^T of 16-bit operands where one of A and B has few rows: reading the other one is all there is to do. A
/// decoding step streams its weights past a few tokens (with groups: those of the experts that have any), a router its
/// tokens past a few weights.
///
/// The rows of both operands go from memory to matrix fragments directly: a lane reads 16 bytes of a row, which hold
/// its elements for two products of depth 16. That takes the depth in another order than stored, the same in both
/// operands. Instantiated once for each element type, result type and number of fragments across.
namespace blackmamba::cuda::detail {

namespace narrow {

inline constexpr int tile = 16;     // rows of the operand that has many
inline constexpr int depth = 32;    // of a step
inline constexpr int unrolled = 4;  // steps whose loads are under way together

__device__ __forceinline__ uint4 load_chunk(void const* p, bool inside) {
  return inside ? __ldg(static_cast<uint4 const*>(p)) : make_uint4(0, 0, 0, 0);
}
/// Of an operand that is read once.
__device__ __forceinline__ uint4 stream_chunk(void const* p, bool inside) {
  return inside ? __ldcs(static_cast<uint4 const*>(p)) : make_uint4(0, 0, 0, 0);
}

/// sum[j] (16, 8) += rows of `many` times rows [8 j, 8 j + 8) of `few`, over the steps first, first + every, ... of the
/// depth, of which each row has `steps`; k is a multiple of 8.
template <class T, int Across>
__device__ __forceinline__ void add_steps(float (&sum)[Across][4], T const* many, std::int64_t many_stride,
                                          std::int64_t many_rows, T const* few, std::int64_t few_stride,
                                          std::int64_t few_rows, std::int64_t k, int first, int every) {
  int const lane = static_cast<int>(threadIdx.x) % 32, r = lane / 4, at = lane % 4 * 8;
  bool const low = r < many_rows, high = r + 8 < many_rows;
  T const* const low_row = many + (low ? r : 0) * many_stride + at;
  T const* const high_row = many + (high ? r + 8 : 0) * many_stride + at;
  for (std::int64_t p = std::int64_t{first} * depth; p < k; p += std::int64_t{every} * depth * unrolled) {
    uint4 a[unrolled][2], b[unrolled][Across];
#pragma unroll
    for (int u = 0; u < unrolled; ++u) {
      std::int64_t const q = p + u * every * depth;
      bool const inside = q + at < k;
      a[u][0] = stream_chunk(low_row + q, inside && low);
      a[u][1] = stream_chunk(high_row + q, inside && high);
#pragma unroll
      for (int j = 0; j < Across; ++j) {
        bool const there = inside && 8 * j + r < few_rows;
        b[u][j] = load_chunk(few + (there ? (8 * j + r) * few_stride + at + q : 0), there);
      }
    }
#pragma unroll
    for (int u = 0; u < unrolled; ++u)
#pragma unroll
      for (int j = 0; j < Across; ++j) {
        if (8 * j >= few_rows) break;
        std::uint32_t const front[4] = {a[u][0].x, a[u][1].x, a[u][0].y, a[u][1].y};
        std::uint32_t const back[4] = {a[u][0].z, a[u][1].z, a[u][0].w, a[u][1].w};
        multiply_matrices<T>(sum[j], front, b[u][j].x, b[u][j].y);
        multiply_matrices<T>(sum[j], back, b[u][j].z, b[u][j].w);
      }
  }
}

}  // namespace narrow

/// Few rows of A (of each group), many of B: a block has 16 rows of B, its eight warps share the depth, and their sums
/// are added in order. More rows of A than 8 Across go by turns.
template <class T, class TC, int Across>
__global__ void __launch_bounds__(256) narrow_rows_product(product<T, T, TC> x, unsigned tiles) {
  constexpr int warps = 8, few = 8 * Across;
  __shared__ float part[warps][narrow::tile][few + 1];
  int const lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  std::int64_t const group = blockIdx.x / tiles, column = std::int64_t{blockIdx.x % tiles} * narrow::tile;
  bool const grouped = x.groups.by == grouping::rows;
  std::int64_t const begin = grouped ? x.groups.offsets[group] : 0, end = grouped ? x.groups.offsets[group + 1] : x.m;
  T const* const b = x.b + (grouped ? group * x.groups.b_apart : 0) + column * x.ldb;
  float const* const bias = x.bias ? x.bias + (grouped ? group * x.groups.bias_apart : 0) : nullptr;
  for (std::int64_t row = begin; row < end; row += few) {
    float sum[Across][4] = {};
    narrow::add_steps<T, Across>(sum, b, x.ldb, x.n - column, x.a + row * x.lda, x.lda, end - row, x.k, warp, warps);
#pragma unroll
    for (int j = 0; j < Across; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) part[warp][lane / 4 + e / 2 * 8][8 * j + lane % 4 * 2 + e % 2] = sum[j][e];
    __syncthreads();
    int const i = static_cast<int>(threadIdx.x) % narrow::tile, j = static_cast<int>(threadIdx.x) / narrow::tile;
    if (j < few && row + j < end && column + i < x.n) {
      float total = bias ? bias[column + i] : 0.0f;
#pragma unroll
      for (int w = 0; w < warps; ++w) total += part[w][i][j];
      TC* const c = x.c + (row + j) * x.ldc + column + i;
      *c = convert<TC>(x.mode == update::accumulate ? total + convert<float>(*c) : total);
    }
    __syncthreads();
  }
}

/// Many rows of A, at most 8 Across of B: each of a block's four warps has 16 rows of A.
template <class T, class TC, int Across>
__global__ void __launch_bounds__(128) narrow_columns_product(product<T, T, TC> x, bool wide) {
  std::int64_t const row = (std::int64_t{blockIdx.x} * 4 + threadIdx.x / 32) * narrow::tile;
  if (row >= x.m) return;
  float sum[Across][4] = {};
  narrow::add_steps<T, Across>(sum, x.a + row * x.lda, x.lda, x.m - row, x.b, x.ldb, x.n, x.k, 0, 1);
  int const lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < Across; ++j)
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      std::int64_t const r = row + lane / 4 + 8 * high;
      int const column = 8 * j + lane % 4 * 2;
      if (r >= x.m || column >= x.n) continue;
      TC* const c = x.c + r * x.ldc + column;
      float v[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        v[e] = sum[j][2 * high + e];
        if (column + e >= x.n) continue;
        if (x.bias) v[e] += x.bias[column + e];
        if (x.mode == update::accumulate) v[e] += convert<float>(c[e]);
      }
      if (wide && column + 1 < x.n) {
        if constexpr (sizeof(TC) == 2)
          *reinterpret_cast<std::uint32_t*>(c) = packed_pair<TC>(v[0], v[1]);
        else
          *reinterpret_cast<float2*>(c) = make_float2(v[0], v[1]);
      } else {
        c[0] = convert<TC>(v[0]);
        if (column + 1 < x.n) c[1] = convert<TC>(v[1]);
      }
    }
}

/// Enqueues C = A B^T where it is narrow and aligned. False elsewhere.
template <class T, class TC>
bool narrow_product(char const* op, device::cuda const& policy, product<T, T, TC> const& x) {
  if (x.k <= 0 || x.k % 8 != 0 || row_alignment(x.a, x.lda, 0) < 16 ||
      row_alignment(x.b, x.ldb, x.groups.b_apart) < 16 || properties().major < 8)
    return false;
  bool const grouped = x.groups.by == grouping::rows;
  // However the rows fall on the groups, weights are read at most twice as often as if every group had sixteen.
  if (x.m <= (grouped ? 16 * x.groups.count : 16)) {
    std::int64_t const tiles = (x.n + narrow::tile - 1) / narrow::tile;
    grid const shape{blocks_for(x.groups.count * tiles, 1), 256};
    auto* const kernel = x.m <= 8 ? narrow_rows_product<T, TC, 1> : narrow_rows_product<T, TC, 2>;
    launch(op, policy, shape, kernel, x, static_cast<unsigned>(tiles));
    return true;
  }
  if (!grouped && x.n <= 64 && x.m >= 1024) {
    bool const wide = reinterpret_cast<std::uintptr_t>(x.c) % (2 * sizeof(TC)) == 0 && x.ldc % 2 == 0;
    auto* const kernel = x.n <= 8 ? narrow_columns_product<T, TC, 1> : narrow_columns_product<T, TC, 8>;
    launch(op, policy, {blocks_for(x.m, 4 * narrow::tile), 128}, kernel, x, wide);
    return true;
  }
  return false;
}

}  // namespace blackmamba::cuda::detail
