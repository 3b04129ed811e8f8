#pragma once
#include <blackmamba/core/cuda/gemm_mma_cuda.cuh>
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/product_cuda.cuh>
#include <blackmamba/core/cuda/tensor_core_cuda.cuh>
#include <blackmamba/core/numeric.hpp>

#include <cstddef>
#include <cstdint>
#include <type_traits>

/// C = A B^T of 16-bit operands where A or B has few rows: reading the other is all there is to do. A decoding step
/// streams its weights past a few tokens (with groups: those of the experts that have any); a router has few outputs.
///
/// The rows of both operands go from memory to matrix fragments directly: a lane reads 16 bytes of a row, which hold
/// its elements for two products of depth 16. That takes the depth in another order than stored, the same in both
/// operands. Instantiated once for each element type, result type and number of fragments across.
namespace blackmamba::cuda::detail {

namespace narrow {

inline constexpr int tile = 16;     // rows of the operand that has many
inline constexpr int depth = 32;    // of a step
inline constexpr int unrolled = 4;  // steps whose loads are under way together: the usual number
template <class Result>
inline constexpr int result_columns = is_gated<Result> ? tile / 2 : tile;  // of C, for a tile

/// 16 bytes at p, or zeros. Volatile: loads stay ahead of the products in the program, so that they are under way
/// together.
__device__ __forceinline__ uint4 load_chunk(void const* p, bool inside) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred inside;\nsetp.ne.b32 inside, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@inside ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"(static_cast<int>(inside)));
  return v;
}
/// Of an operand that is read once.
__device__ __forceinline__ uint4 stream_chunk(void const* p, bool inside) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred inside;\nsetp.ne.b32 inside, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@inside ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"(static_cast<int>(inside)));
  return v;
}

/// Eight rows of the operand that has many, as far as there are so many left.
template <class T>
struct eight_rows {
  T const* first;
  std::int64_t left;
};

/// sum[j] (16, 8) += eight rows and eight more times rows [8 j, 8 j + 8) of `few`, over the steps first,
/// first + every, ... of the depth; k is a multiple of 8.
template <class T, int Across, int Unrolled = unrolled>
__device__ __forceinline__ void add_steps(float (&sum)[Across][4], eight_rows<T> front_rows, eight_rows<T> back_rows,
                                          std::int64_t many_stride, T const* few, std::int64_t few_stride,
                                          std::int64_t few_rows, std::int64_t k, int first, int every) {
  int const lane = static_cast<int>(threadIdx.x) % 32, r = lane / 4, at = lane % 4 * 8;
  bool const low = r < front_rows.left, high = r < back_rows.left;
  T const* const low_row = front_rows.first + (low ? r : 0) * many_stride + at;
  T const* const high_row = (high ? back_rows.first + r * many_stride : front_rows.first) + at;
  for (std::int64_t p = std::int64_t{first} * depth; p < k; p += std::int64_t{every} * depth * Unrolled) {
    uint4 a[Unrolled][2], b[Unrolled][Across];
#pragma unroll
    for (int u = 0; u < Unrolled; ++u) {
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
    for (int u = 0; u < Unrolled; ++u)
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

/// Partial sums of a block's eight warps, which share the depth.
struct parts {
  static constexpr int warps = 8;
  float part[warps][tile][8 + 1];
};
/// Sixteen rows, of which `left` exist, times eight of `few`, by a block of 256 threads. A barrier stands at the end.
template <class T>
__device__ __forceinline__ void sixteen_rows_by_few(parts& to, T const* many, std::int64_t many_stride,
                                                    std::int64_t left, T const* few, std::int64_t few_stride,
                                                    std::int64_t few_rows, std::int64_t k) {
  int const lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  float sum[1][4] = {};
  add_steps<T, 1, 6>(sum, {many, left}, {many + 8 * many_stride, left - 8}, many_stride, few, few_stride, few_rows, k,
                     warp, parts::warps);
#pragma unroll
  for (int e = 0; e < 4; ++e) to.part[warp][lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2] = sum[0][e];
  __syncthreads();
}
/// Element (i, j) of the product: the warps' parts in order, from `first` on.
__device__ __forceinline__ float total(parts const& of, int i, int j, float first) {
#pragma unroll
  for (int w = 0; w < parts::warps; ++w) first += of.part[w][i][j];
  return first;
}

}  // namespace narrow

/// Many rows of A, at most eight of B: a block has 16 rows of A, which it reads once.
template <class T, class TC>
__global__ void __launch_bounds__(256) narrow_columns_product(product<T, T, TC> x) {
  __shared__ narrow::parts parts;
  wait_for_launch_ahead();
  let_next_launch_begin();
  std::int64_t const row = std::int64_t{blockIdx.x} * narrow::tile, left = x.m - row;
  narrow::sixteen_rows_by_few<T>(parts, x.a + row * x.lda, x.lda, left, x.b, x.ldb, x.n, x.k);
  int const i = static_cast<int>(threadIdx.x) / 8, j = static_cast<int>(threadIdx.x) % 8;
  if (i >= narrow::tile || i >= left || j >= x.n) return;
  float const s = narrow::total(parts, i, j, x.bias ? x.bias[j] : 0.0f);
  TC* const c = x.c + (row + i) * x.ldc + j;
  *c = convert<TC>(x.mode == update::accumulate ? s + convert<float>(*c) : s);
}

/// Few rows of A (of each group), many of B: a block has 16 rows of B, its eight warps share the depth, and their sums
/// are added in order. More rows of A than 8 Across go by turns. Result: as_is or gated_units.
template <class T, class TC, int Across, class Result>
__global__ void __launch_bounds__(256) narrow_rows_product(product<T, T, TC, Result> x, unsigned tiles) {
  constexpr int warps = 8, few = 8 * Across, columns = narrow::result_columns<Result>;
  __shared__ float part[warps][narrow::tile][few + 1];
  int const lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  std::int64_t const group = blockIdx.x / tiles, column = std::int64_t{blockIdx.x % tiles} * columns;
  bool const grouped = x.groups.by == grouping::rows;
  std::int64_t const begin = grouped ? x.groups.offsets[group] : 0, end = grouped ? x.groups.offsets[group + 1] : x.m;
  T const* const b = x.b + (grouped ? group * x.groups.b_apart : 0) + column * x.ldb;
  float const* const bias = x.bias ? x.bias + (grouped ? group * x.groups.bias_apart : 0) : nullptr;
  std::int64_t const left = x.n - column;
  narrow::eight_rows<T> const front{b, left};
  narrow::eight_rows<T> const back =
      is_gated<Result> ? narrow::eight_rows<T>{b + x.n * x.ldb, left} : narrow::eight_rows<T>{b + 8 * x.ldb, left - 8};
  for (std::int64_t row = begin; row < end; row += few) {
    float sum[Across][4] = {};
    narrow::add_steps<T, Across>(sum, front, back, x.ldb, x.a + row * x.lda, x.lda, end - row, x.k, warp, warps);
#pragma unroll
    for (int j = 0; j < Across; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) part[warp][lane / 4 + e / 2 * 8][8 * j + lane % 4 * 2 + e % 2] = sum[j][e];
    __syncthreads();
    int const i = static_cast<int>(threadIdx.x) % columns, j = static_cast<int>(threadIdx.x) / columns;
    if (j < few && row + j < end && i < left) {
      auto const total = [&](int of, std::int64_t bias_at) {
        float s = bias ? bias[bias_at] : 0.0f;
#pragma unroll
        for (int w = 0; w < warps; ++w) s += part[w][of][j];
        return s;
      };
      TC* const c = x.c + (row + j) * x.ldc + column + i;
      if constexpr (is_gated<Result>) {
        T const gate = convert<T>(total(i, column + i)), up = convert<T>(total(8 + i, x.n + column + i));
        if (x.result.both) {
          T* const both = x.result.both + (row + j) * x.result.both_stride + column + i;
          both[0] = gate;
          both[x.n] = up;
        }
        *c = convert<TC>(Result::function::of(convert<float>(gate), convert<float>(up)));
      } else {
        float const s = total(i, column + i);
        *c = convert<TC>(x.mode == update::accumulate ? s + convert<float>(*c) : s);
      }
    }
    __syncthreads();
  }
}

/// Enqueues C = A B^T where it is narrow and aligned. False elsewhere.
template <class T, class TC, class Result>
bool narrow_product(char const* op, device::cuda const& policy, product<T, T, TC, Result> const& x) {
  if (x.groups.by == grouping::depth || x.k <= 0 || x.k % 8 != 0 || row_alignment(x.a, x.lda, 0) < 16 ||
      row_alignment(x.b, x.ldb, x.groups.b_apart) < 16 || properties().major < 8)
    return false;
  bool const grouped = x.groups.by == grouping::rows;
  // However the rows fall on the groups, weights are read at most twice as often as if every group had sixteen.
  if (x.m <= (grouped ? 16 * x.groups.count : 8)) {
    constexpr int columns = narrow::result_columns<Result>;
    std::int64_t const tiles = (x.n + columns - 1) / columns;
    grid const shape{blocks_for(x.groups.count * tiles, 1), 256};
    auto* const kernel = x.m <= 8 ? narrow_rows_product<T, TC, 1, Result> : narrow_rows_product<T, TC, 2, Result>;
    launch(op, policy, shape, kernel, x, static_cast<unsigned>(tiles));
    return true;
  }
  if constexpr (std::is_same_v<Result, as_is>)
    if (!grouped && x.n <= 8) {
      launch(op, policy, {blocks_for(x.m, narrow::tile), 256}, narrow_columns_product<T, TC>, x);
      return true;
    }
  return false;
}

}  // namespace blackmamba::cuda::detail
