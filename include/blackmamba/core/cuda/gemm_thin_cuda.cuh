#pragma once
#include <blackmamba/core/cuda/depth_parts_cuda.cuh>
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/product_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/core/numeric.hpp>

#include <cstddef>
#include <cstdint>
#include <type_traits>

/// Products of any types that have one extent of at most 64, as the gradients of a router have them: reading the large
/// operand, or writing the large result, is all there is to do. Instantiated once for each (A, B, C) that is asked for.
namespace blackmamba::cuda::detail {

namespace thin {

inline constexpr std::int64_t most = 64;   // of the small extent
inline constexpr int columns = 256;        // of a block: eight for each lane of a warp
inline constexpr int rows_together = 4;    // of a warp, in a product of small depth
inline constexpr int rows_of_block = 256;  // in a product of small depth
inline constexpr int sums_together = 8;    // rows of C, in a product of few rows

/// Eight elements of a row, of which `left` exist. Whole: all do, and the row is aligned; without a branch, so that
/// loads of several rows are under way together.
template <bool Whole, class T>
__device__ __forceinline__ pack<accum_t<T>, 8> load_columns(T const* p, std::int64_t left) {
  if constexpr (Whole)
    return load_pack<8>(p);
  else
    return load_some<8>(p, left);
}

}  // namespace thin

/// C = A B + bias, or C += it, of small depth: a block keeps 256 columns of B, each warp goes over rows of A, four at a
/// time. Both as stored.
template <class TA, class TB, class TC>
__global__ void __launch_bounds__(256) shallow_product(product<TA, TB, TC> x, std::int64_t across, bool wide) {
  using A = accum_t<TC>;
  extern __shared__ __align__(16) unsigned char shallow_memory[];
  A* const right = reinterpret_cast<A*>(shallow_memory);  // (k, columns)
  std::int64_t const down = blockIdx.x / across, column = (blockIdx.x - down * across) * thin::columns;
  int const depth = static_cast<int>(x.k);
  for (int i = static_cast<int>(threadIdx.x); i < depth * thin::columns; i += 256) {
    std::int64_t const p = i / thin::columns, j = column + i % thin::columns;
    right[i] = j < x.n ? convert<A>(x.b[p * x.ldb + j]) : A(0);
  }
  __syncthreads();
  int const lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  std::int64_t const begin = down * thin::rows_of_block;
  std::int64_t const end = begin + thin::rows_of_block < x.m ? begin + thin::rows_of_block : x.m;
  std::int64_t const first = column + lane * 8, left = x.n - first;
  if (left <= 0) return;
  pack<A, 8> initial = {};
  if (x.bias) initial = load_some<8>(x.bias + first, left);
  auto const run = [&]<bool Whole>(std::bool_constant<Whole>) {
    for (std::int64_t row = begin + warp * thin::rows_together; row < end; row += 8 * thin::rows_together) {
      pack<A, 8> sum[thin::rows_together];
      TA const* from[thin::rows_together];
      TC* to[thin::rows_together];
#pragma unroll
      for (int i = 0; i < thin::rows_together; ++i) {
        std::int64_t const r = row + i < end ? row + i : row;
        from[i] = x.a + r * x.lda;
        to[i] = x.c + r * x.ldc + first;
        sum[i] = initial;
      }
      if (x.mode == update::accumulate) {
#pragma unroll
        for (int i = 0; i < thin::rows_together; ++i) {
          auto const held = thin::load_columns<Whole>(to[i], left);
#pragma unroll
          for (int j = 0; j < 8; ++j) sum[i][j] += held[j];
        }
      }
#pragma unroll 2
      for (int p = 0; p < depth; ++p) {
        A const* const b = right + p * thin::columns + lane * 8;
#pragma unroll
        for (int i = 0; i < thin::rows_together; ++i) {
          A const a = convert<A>(from[i][p]);
#pragma unroll
          for (int j = 0; j < 8; ++j) sum[i][j] += a * b[j];
        }
      }
#pragma unroll
      for (int i = 0; i < thin::rows_together; ++i) {
        if (row + i >= end) continue;
        if constexpr (Whole)
          store_pack(to[i], sum[i]);
        else
          store_some(to[i], sum[i], left);
      }
    }
  };
  if (wide && left >= 8)
    run(std::true_type{});
  else
    run(std::false_type{});
}

/// Part of the depth of A^T B with few rows: a block has eight rows of C and 256 columns; its eight warps take the
/// depth in turns, and their sums are added in order. A and B as stored.
template <class TA, class TB, class A>
__global__ void __launch_bounds__(256, 2)
    flat_product(TA const* a, std::int64_t lda, TB const* b, std::int64_t ldb, std::int64_t m, std::int64_t n,
                 std::int64_t k, std::int64_t part_depth, std::int64_t across, std::int64_t down, bool wide,
                 A* partial) {
  constexpr int rows = thin::sums_together;
  __shared__ A total[rows][thin::columns];
  std::int64_t const strip = blockIdx.x % across, block_row = blockIdx.x / across % down;
  std::int64_t const part = blockIdx.x / across / down;
  std::int64_t const first_row = block_row * rows, column = strip * thin::columns;
  int const lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  std::int64_t const begin = part * part_depth, end = begin + part_depth < k ? begin + part_depth : k;
  std::int64_t const left = n - column - lane * 8;
  TB const* const from = b + column + lane * 8;
  A sum[rows][8] = {};
  auto const run = [&]<bool Whole>(std::bool_constant<Whole>) {
    // Rows beyond C repeat the last one, and are not stored.
    int at[rows];
#pragma unroll
    for (int i = 0; i < rows; ++i) at[i] = static_cast<int>(first_row + i < m ? first_row + i : m - 1);
#pragma unroll 4
    for (std::int64_t p = begin + warp; p < end; p += 8) {
      auto const v = thin::load_columns<Whole>(from + p * ldb, left);
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        A const u = convert<A>(a[p * lda + at[i]]);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] += u * convert<A>(v[j]);
      }
    }
  };
  if (wide && left >= 8)
    run(std::true_type{});
  else if (left > 0)
    run(std::false_type{});
  for (int w = 0; w < 8; ++w) {
    if (warp == w)
#pragma unroll
      for (int i = 0; i < rows; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          A& to = total[i][lane * 8 + j];
          to = w == 0 ? sum[i][j] : to + sum[i][j];
        }
    __syncthreads();
  }
  for (int i = static_cast<int>(threadIdx.x); i < rows * thin::columns; i += 256) {
    std::int64_t const row = first_row + i / thin::columns, j = column + i % thin::columns;
    if (row < m && j < n) partial[(part * m + row) * n + j] = total[i / thin::columns][i % thin::columns];
  }
}

/// Enqueues A B of small depth and many rows, both operands as stored. False elsewhere.
template <class TA, class TB, class TC>
bool shallow_product_if_possible(char const* op, device::cuda const& policy, product<TA, TB, TC> const& x) {
  std::size_t const shared = static_cast<std::size_t>(x.k) * thin::columns * sizeof(accum_t<TC>);
  if (x.groups.by != grouping::none || x.k <= 0 || x.k > thin::most || x.m < 512 ||
      shared > static_cast<std::size_t>(properties().shared_bytes_per_block))
    return false;
  std::int64_t const across = (x.n + thin::columns - 1) / thin::columns;
  std::int64_t const down = (x.m + thin::rows_of_block - 1) / thin::rows_of_block;
  constexpr std::int64_t width = 16 / sizeof(TC);
  bool const wide = reinterpret_cast<std::uintptr_t>(x.c) % 16 == 0 && x.ldc % width == 0;
  launch(op, policy, {blocks_for(down * across, 1), 256, shared}, shallow_product<TA, TB, TC>, x, across, wide);
  return true;
}

/// Enqueues A^T B of few rows and great depth, both operands as stored. False elsewhere.
template <class TA, class TB, class TC>
bool flat_product_if_possible(char const* op, device::cuda const& policy, product<TA, TB, TC> const& x, void* workspace,
                              std::size_t workspace_bytes) {
  using A = accum_t<TC>;
  if (x.groups.by != grouping::none || x.m > thin::most || x.k < 1024) return false;
  std::int64_t const across = (x.n + thin::columns - 1) / thin::columns;
  std::int64_t const down = (x.m + thin::sums_together - 1) / thin::sums_together;
  std::int64_t parts = parts_of_depth<A>(x.k, 64, across * down, x.m * x.n, workspace_bytes);
  if (parts < 1) return false;
  std::int64_t const depth = (x.k + parts - 1) / parts;
  parts = (x.k + depth - 1) / depth;
  constexpr std::int64_t width = 16 / sizeof(TB);
  bool const wide = reinterpret_cast<std::uintptr_t>(x.b) % 16 == 0 && x.ldb % width == 0;
  auto* const partial = static_cast<A*>(workspace);
  launch(op, policy, {blocks_for(parts * across * down, 1), 256}, flat_product<TA, TB, A>, x.a, x.lda, x.b, x.ldb, x.m,
         x.n, x.k, depth, across, down, wide, partial);
  add_parts_of(op, policy, x, partial, parts);
  return true;
}

}  // namespace blackmamba::cuda::detail
