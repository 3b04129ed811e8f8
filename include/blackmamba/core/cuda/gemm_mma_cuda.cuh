#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/product_cuda.cuh>
#include <blackmamba/core/cuda/tensor_core_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/core/numeric.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

/// Products of 16-bit operands on the tensor cores of sm_80 and later, with and without groups. Instantiated once for
/// each element type, result type and layout that is asked for.
///
/// One block of eight warps on each multiprocessor walks over the tiles (128 x 256, a warp's part 64 x 64). The steps
/// of the depth, 64 each, of all its tiles are one stream through a ring of stages in shared memory: copies for the
/// next tile are under way while a tile's result is stored. An element of C is summed in ascending order of the depth.
namespace blackmamba::cuda::detail {

namespace mma {

inline constexpr int rows = 128, columns = 256, depth = 64, threads = 256;
inline constexpr int stage_bytes = (rows + columns) * depth * 2;
inline constexpr int most_stages = 4;
/// Columns of C that a tile has: gated units take two columns of the product for one.
template <class Result>
inline constexpr int result_columns = is_gated<Result> ? columns / 2 : columns;

/// An operand's tile in shared memory, in 16-byte chunks that are permuted within 128 bytes so that the eight rows of a
/// matrix lie in different banks. Along: the depth lies contiguous, a row is 64 deep; else a row is a step of the
/// depth.
template <int Extent, bool Along>
struct operand_tile {
  static constexpr int chunks = Along ? depth / 8 : Extent / 8;  // of a row
  static constexpr int copies = Extent * depth / 8 / threads;    // by each thread
  static constexpr int rows_apart = threads / chunks;            // between a thread's copies

  __device__ __forceinline__ static std::uint32_t offset(int row, int chunk) {
    return static_cast<std::uint32_t>(row * chunks + (chunk ^ (row & 7))) * 16;
  }
  /// Starts the copies of [from, from + Extent) x [p, p + depth), with zeros from `end` and p_end on. `unit`: the bytes
  /// that rows are aligned to, 16 to 2.
  template <class T>
  __device__ __forceinline__ static void copy(std::uint32_t to, T const* x, std::int64_t stride, int unit,
                                              std::int64_t from, std::int64_t end, std::int64_t p, std::int64_t p_end) {
    int const chunk = static_cast<int>(threadIdx.x) % chunks, row = static_cast<int>(threadIdx.x) / chunks;
    // The stored matrix has rows from `first` on and columns from `column` on.
    std::int64_t const first = (Along ? from : p) + row, column = (Along ? p : from) + chunk * 8;
    std::int64_t const rows_left = (Along ? end : p_end) - first, columns_left = (Along ? p_end : end) - column;
    int const bytes = columns_left >= 8 ? 16 : columns_left > 0 ? static_cast<int>(columns_left) * 2 : 0;
    T const* const source = x + first * stride + column;
    if (unit == 16) {
#pragma unroll
      for (int i = 0; i < copies; ++i) {
        bool const inside = i * rows_apart < rows_left && bytes > 0;
        copy_async(to + offset(row + i * rows_apart, chunk), inside ? source + i * rows_apart * stride : x,
                   inside ? bytes : 0);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < copies; ++i)
        copy_pieces(to + offset(row + i * rows_apart, chunk), x, source + i * rows_apart * stride, unit,
                    i * rows_apart < rows_left ? bytes : 0);
    }
  }
  /// Of gated units, `half` rows after each other: 32 rows of gates and 32 of what they gate in turns.
  template <class T>
  __device__ __forceinline__ static void copy_gated(std::uint32_t to, T const* x, std::int64_t stride, int unit,
                                                    std::int64_t from, std::int64_t half, std::int64_t p,
                                                    std::int64_t p_end) {
    static_assert(Along && rows_apart == 32);
    int const chunk = static_cast<int>(threadIdx.x) % chunks, row = static_cast<int>(threadIdx.x) / chunks;
    std::int64_t const column = p + chunk * 8, columns_left = p_end - column;
    int const bytes = columns_left >= 8 ? 16 : columns_left > 0 ? static_cast<int>(columns_left) * 2 : 0;
#pragma unroll 1
    for (int i = 0; i < copies; ++i) {
      std::int64_t const first = from + i / 2 * 32 + row;
      T const* const source = x + (first + i % 2 * half) * stride + column;
      bool const inside = first < half && bytes > 0;
      if (unit == 16)
        copy_async(to + offset(row + i * 32, chunk), inside ? source : x, inside ? bytes : 0);
      else
        copy_pieces(to + offset(row + i * 32, chunk), x, source, unit, inside ? bytes : 0);
    }
  }

 private:
  template <class T>
  __device__ __forceinline__ static void copy_pieces(std::uint32_t to, T const* x, T const* source, int unit,
                                                     int bytes) {
#pragma unroll 1
    for (int i = 0; i < 8; i += unit / 2) {
      int const valid = min(max(bytes - 2 * i, 0), unit);
      T const* const from = valid > 0 ? source + i : x;
      if (unit == 8) {
        copy_async<8>(to + 2 * i, from, valid);
      } else if (unit == 4) {
        copy_async<4>(to + 2 * i, from, valid);
      } else {
        std::uint16_t const bits = valid > 0 ? from->bits : std::uint16_t{0};
        asm volatile("st.shared.b16 [%0], %1;" ::"r"(to + 2 * i), "h"(bits) : "memory");
      }
    }
  }
};

/// Where a block is in its stream: tile and step of the depth. `every`: how many blocks share the tiles.
template <int Rows, int Columns>
struct cursor {
  std::int64_t index, every, p;
  product_tile tile;
  bool valid;

  template <class Product>
  __device__ __forceinline__ cursor(Product const& x, std::int64_t first, std::int64_t blocks)
      : index(first), every(blocks) {
    find(x);
  }
  template <class Product>
  __device__ __forceinline__ void find(Product const& x) {
    // A tile without depth has nothing to add.
    do valid = find_tile<Rows, Columns>(x, index, tile);
    while (valid && tile.depth >= tile.depth_end && (index += every, true));
    p = tile.depth;
  }
  template <class Product>
  __device__ __forceinline__ void next_tile(Product const& x) {
    index += every;
    find(x);
  }
  template <class Product>
  __device__ __forceinline__ void step(Product const& x) {
    p += depth;
    if (p >= tile.depth_end) next_tile(x);
  }
};

}  // namespace mma

/// Stores 16 rows and 64 columns of a warp's result: sum[First + j] is the fragment of columns 8 j on. Whole: all of
/// them lie in C, whose rows take the widest stores; what C holds is then read in one go. Adds: there is code for
/// `accumulate`.
template <bool Whole, bool Adds, int First, class TC, int Tiles>
__device__ __forceinline__ void store_columns(float (&sum)[Tiles][4], TC* c, std::int64_t ldc, std::int64_t rows_left,
                                              std::int64_t columns_left, float const* bias, bool accumulate) {
  int const lane = static_cast<int>(threadIdx.x) % 32, r = lane / 4, pair = lane % 4 * 2;
  if (bias)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float const add = Whole || 8 * j + pair + e < columns_left ? bias[8 * j + pair + e] : 0.0f;
        sum[First + j][e] += add;
        sum[First + j][2 + e] += add;
      }
  if (Adds && accumulate) {
    constexpr int together = sizeof(TC) == 2 ? 2 : 16;  // pairs on their way: registers are scarce
#pragma unroll
    for (int first = 0; first < 16; first += together) {
      pack<float, 2> held[together];
#pragma unroll
      for (int i = 0; i < together; ++i) {
        int const row = r + (first + i) / 8 * 8, column = (first + i) % 8 * 8 + pair;
        TC const* const from = c + row * ldc + column;
        if constexpr (Whole)
          held[i] = load_pack<2>(from);
        else
          held[i] = load_some<2>(from, row < rows_left ? columns_left - column : 0);
      }
#pragma unroll
      for (int i = 0; i < together; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) sum[First + (first + i) % 8][(first + i) / 8 * 2 + e] += held[i][e];
    }
  }
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    bool const inside = Whole || r + 8 * high < rows_left;
    TC* const row = c + (r + 8 * high) * ldc;
    if constexpr (sizeof(TC) == 2) {
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        std::uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          w[i] = packed_pair<TC>(sum[First + j + i][2 * high], sum[First + j + i][2 * high + 1]);
        transpose_in_quad(w);
        int const column = 8 * (j + lane % 4);
        if constexpr (Whole) {
          *reinterpret_cast<uint4*>(row + column) = make_uint4(w[0], w[1], w[2], w[3]);
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (inside && column + i < columns_left)
              row[column + i].bits = static_cast<std::uint16_t>(w[i / 2] >> 16 * (i % 2));
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        int const column = 8 * j + pair;
        float const low = sum[First + j][2 * high], next = sum[First + j][2 * high + 1];
        if constexpr (Whole) {
          *reinterpret_cast<float2*>(row + column) = make_float2(low, next);
        } else {
          if (inside && column < columns_left) row[column] = low;
          if (inside && column + 1 < columns_left) row[column + 1] = next;
        }
      }
    }
  }
}

/// Stores a warp's 16 rows of a result: sum[j] is the fragment of columns 8 j on. `wide`: rows of C take the widest
/// stores.
template <bool Adds, int First = 0, class TC, int Tiles>
__device__ __forceinline__ void store_fragments(float (&sum)[Tiles][4], TC* c, std::int64_t ldc, std::int64_t rows_left,
                                                std::int64_t columns_left, float const* bias, bool accumulate,
                                                bool wide) {
  if constexpr (First < Tiles) {
    if (rows_left <= 0 || columns_left <= 0) return;
    if (wide && rows_left >= 16 && columns_left >= 64)
      store_columns<true, Adds, First>(sum, c, ldc, rows_left, columns_left, bias, accumulate);
    else
      store_columns<false, Adds, First>(sum, c, ldc, rows_left, columns_left, bias, accumulate);
    store_fragments<Adds, First + 8>(sum, c + 64, ldc, rows_left, columns_left - 64, bias ? bias + 64 : nullptr,
                                     accumulate, wide);
  }
}

/// Stores 16 rows of a warp's gated units: sum[j] has the fragment of gates 8 j on, sum[4 + j] of what they gate.
/// `wide`: two columns of C, and of `both`, lie in a word.
template <class T, class Function>
__device__ __forceinline__ void store_gated(float (&sum)[8][4], product<T, T, T, gated_units<Function, T>> const& x,
                                            std::int64_t row, std::int64_t rows_left, std::int64_t column,
                                            float const* bias, bool wide) {
  int const lane = static_cast<int>(threadIdx.x) % 32, r = lane / 4;
  auto const& both = x.result;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    std::int64_t const at = column + 8 * j + lane % 4 * 2, left = x.n - at;
    auto const store = [&](T* to, std::uint32_t w) {
      if (wide && left >= 2) {
        *reinterpret_cast<std::uint32_t*>(to) = w;
      } else {
        to[0].bits = static_cast<std::uint16_t>(w);
        if (left >= 2) to[1].bits = static_cast<std::uint16_t>(w >> 16);
      }
    };
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      if (left <= 0 || r + 8 * high >= rows_left) continue;
      std::int64_t const to = row + r + 8 * high;
      float value[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          value[half][e] = sum[4 * half + j][2 * high + e] + (bias && e < left ? bias[half * x.n + at + e] : 0.0f);
      std::uint32_t const gate = packed_pair<T>(value[0][0], value[0][1]),
                          up = packed_pair<T>(value[1][0], value[1][1]);
      if (both.both) {
        store(both.both + to * both.both_stride + at, gate);
        store(both.both + to * both.both_stride + x.n + at, up);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e)
        value[0][e] = Function::of(convert<float>(convert<T>(value[0][e])), convert<float>(convert<T>(value[1][e])));
      store(x.c + to * x.ldc + at, packed_pair<T>(value[0][0], value[0][1]));
    }
  }
}

/// AlongA, AlongB: whether the depth is what lies contiguous in A and B. Result: as_is or gated_units.
template <class T, class TC, bool AlongA, bool AlongB, class Result>
__global__ void __launch_bounds__(mma::threads, 1)
    mma_product(product<T, T, TC, Result> x, int stages, int a_unit, int b_unit, bool wide) {
  using a_tile = mma::operand_tile<mma::rows, AlongA>;
  using b_tile = mma::operand_tile<mma::columns, AlongB>;
  constexpr std::uint32_t a_bytes = mma::rows * mma::depth * 2;
  extern __shared__ __align__(128) unsigned char mma_memory[];
  std::uint32_t const memory = shared_address(mma_memory);
  int const lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int const warp_row = warp % 2 * 64, warp_column = warp / 2 * 64;

  mma::cursor<mma::rows, mma::result_columns<Result>> ahead(x, blockIdx.x, gridDim.x);
  auto now = ahead;
  int write = 0, read = 0;
  auto const fetch = [&] {
    if (ahead.valid) {
      std::uint32_t const stage = memory + static_cast<std::uint32_t>(write * mma::stage_bytes);
      auto const& t = ahead.tile;
      T const* const b = x.b + (x.groups.by == grouping::rows ? t.group * x.groups.b_apart : 0);
      a_tile::copy(stage, x.a, x.lda, a_unit, t.row, t.row_end, ahead.p, t.depth_end);
      if constexpr (is_gated<Result>)
        b_tile::copy_gated(stage + a_bytes, b, x.ldb, b_unit, t.column, x.n, ahead.p, t.depth_end);
      else
        b_tile::copy(stage + a_bytes, b, x.ldb, b_unit, t.column, x.n, ahead.p, t.depth_end);
      ahead.step(x);
    }
    commit_copies();  // an empty group where nothing is left: the count of groups stays one for each step
    write = write + 1 == stages ? 0 : write + 1;
  };
  for (int s = 0; s + 1 < stages; ++s) fetch();

  while (now.valid) {
    product_tile const t = now.tile;
    float sum[4][8][4] = {};
    for (std::int64_t p = t.depth; p < t.depth_end; p += mma::depth) {
      if (stages == 4)
        wait_for_copies<2>();
      else if (stages == 3)
        wait_for_copies<1>();
      else
        wait_for_copies<0>();
      __syncthreads();
      fetch();
      std::uint32_t const a = memory + static_cast<std::uint32_t>(read * mma::stage_bytes), b = a + a_bytes;
#pragma unroll
      for (int q = 0; q < mma::depth; q += 16) {
        std::uint32_t u[4][4], v[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int const r = warp_row + 16 * i;
          if constexpr (AlongA)
            load_matrices<false>(u[i], a + a_tile::offset(r + lane % 16, q / 8 + lane / 16));
          else
            load_matrices<true>(u[i], a + a_tile::offset(q + lane % 8 + lane / 16 * 8, r / 8 + lane / 8 % 2));
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          int const n = warp_column + 16 * j;
          if constexpr (AlongB)
            load_matrices<false>(v[j], b + b_tile::offset(n + lane % 8 + lane / 16 * 8, q / 8 + lane / 8 % 2));
          else
            load_matrices<true>(v[j], b + b_tile::offset(q + lane % 16, n / 8 + lane / 16));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            multiply_matrices<T>(sum[i][j], u[i], v[j / 2][j % 2 * 2], v[j / 2][j % 2 * 2 + 1]);
      }
      read = read + 1 == stages ? 0 : read + 1;
    }
    if constexpr (is_gated<Result>) {
      float const* const bias = x.bias ? x.bias + t.group * x.groups.bias_apart : nullptr;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        std::int64_t const row = t.row + warp_row + 16 * i;
        store_gated(sum[i], x, row, t.row_end - row, t.column + warp_column / 2, bias, wide);
      }
    } else {
      std::int64_t const column = t.column + warp_column;
      TC* const c = x.c + (x.groups.by == grouping::depth ? t.group * x.groups.c_apart : 0);
      float const* const bias = x.bias ? x.bias + t.group * x.groups.bias_apart + column : nullptr;
      if (column < x.n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          std::int64_t const row = t.row + warp_row + 16 * i;
          store_fragments<true>(sum[i], c + row * x.ldc + column, x.ldc, t.row_end - row, x.n - column, bias,
                                x.mode == update::accumulate, wide);
        }
    }
    now.next_tile(x);
  }
  wait_for_copies<0>();
}

/// Bytes, at most 16, that all of an operand's rows are aligned to.
template <class T>
int row_alignment(T const* x, std::int64_t stride, std::int64_t apart) {
  auto const together = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(x)) |
                        static_cast<std::uint64_t>(stride) * sizeof(T) | static_cast<std::uint64_t>(apart) * sizeof(T);
  int bytes = 16;
  while (together % static_cast<unsigned>(bytes) != 0) bytes /= 2;
  return bytes;
}
/// Whether C takes the widest stores of store_fragments.
template <class TC>
bool stores_wide(TC const* c, std::int64_t stride, std::int64_t apart) {
  constexpr std::int64_t width = sizeof(TC) == 2 ? 8 : 2;
  return reinterpret_cast<std::uintptr_t>(c) % (width * sizeof(TC)) == 0 && stride % width == 0 && apart % width == 0;
}

/// Enqueues the product where there is a depth and the device has the instructions. False elsewhere.
template <bool AlongA, bool AlongB, class T, class TC, class Result>
bool mma_product_if_possible(char const* op, device::cuda const& policy, product<T, T, TC, Result> const& x) {
  auto const& device = properties();
  int const stages = std::min(mma::most_stages, device.shared_bytes_per_block / mma::stage_bytes);
  if (x.k <= 0 || device.major < 8 || stages < 2) return false;
  std::int64_t const tiles = most_tiles<mma::rows, mma::result_columns<Result>>(x);
  bool wide = stores_wide(x.c, x.ldc, x.groups.c_apart);
  if constexpr (is_gated<Result>)
    wide = row_alignment(x.c, x.ldc, 0) >= 4 && row_alignment(x.result.both, x.result.both_stride, x.n) >= 4;
  auto const blocks = static_cast<unsigned>(std::min<std::int64_t>(tiles, device.multiprocessors));
  launch(op, policy, {blocks, mma::threads, static_cast<std::size_t>(stages * mma::stage_bytes)},
         mma_product<T, TC, AlongA, AlongB, Result>, x, stages, row_alignment(x.a, x.lda, 0),
         row_alignment(x.b, x.ldb, x.groups.b_apart), wide);
  return true;
}

}  // namespace blackmamba::cuda::detail
