#pragma once
#include <blackmamba/core/cuda/gemm_mma_cuda.cuh>
#include <blackmamba/core/cuda/product_cuda.cuh>
#include <blackmamba/core/cuda/tensor_map_cuda.cuh>
#include <blackmamba/core/cuda/warpgroup_cuda.cuh>
#include <blackmamba/core/numeric.hpp>

#include <cstdint>
#include <type_traits>
#include <utility>

/// How a tile's sums leave a warpgroup of gemm_wgmma_cuda.cuh. Floats at once, by the copy engine. Results of 16 bits
/// are rounded, which halves the registers that they take, and leave piece by piece while the next tile is multiplied:
/// what they are to become is computed then, too, in issue slots that the tensor cores leave free.
namespace blackmamba::cuda::detail::wgmma {

inline constexpr int buffer_bytes = 2048, buffers = 2;  // of each warp, for results on their way out

/// The descriptions of matrices, and the product for all else. by_engine: the copy engine stores C (and `both` of gated
/// units); wide: where the engine does not, rows of C (those of tokens) take 16 bytes at a time.
template <class T, class TC, class Result>
struct arguments {
  CUtensorMap a, b, c, both;
  product<T, T, TC, Result> x;
  bool wide, by_engine;
};

/// What those that multiply have to know of a tile; no steps: there are no more tiles. Written before the tile's first
/// stage is announced, read before that stage is free: twice as many notes as stages suffice.
struct alignas(16) note {
  int row, row_end, column, group, steps, unused[3];
};

/// Has the copy engine store a warp's 16 rows of floats, or add them to C, through two buffers of 2048 bytes: `to` is
/// the next one's address, both_buffers the sum of both.
template <int Tiles>
__device__ __forceinline__ void copy_out(float (&sum)[Tiles][4], CUtensorMap const& map, std::uint32_t& to,
                                         std::uint32_t both_buffers, int row, int column, int group, int columns_left,
                                         bool add) {
  constexpr int wide = 32;  // columns of a buffer
  int const lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 8 * Tiles / wide; ++i) {
    if (i * wide >= columns_left) break;
    if (lane == 0) wait_for_copies_out<buffers - 1>();
    __syncwarp();
    int const r = lane / 4, chunk = lane % 4 / 2;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        int const at = (r + 8 * high) * 128 + ((2 * j + chunk) ^ r) * 16 + lane % 2 * 8;
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + at), "f"(sum[4 * i + j][2 * high]),
                     "f"(sum[4 * i + j][2 * high + 1])
                     : "memory");
      }
    publish_shared_writes();
    __syncwarp();
    if (lane == 0) {
      if (add)
        add_box_out(&map, to, column + i * wide, row, group);
      else
        copy_box_out(&map, to, column + i * wide, row, group);
      commit_copies_out();
    }
    to = both_buffers - to;
  }
}

/// The values of a word of packed_pair.
template <class T>
__device__ __forceinline__ void unpack_pair(std::uint32_t word, float& low, float& high) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
  } else {
    asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}\n"
        : "=f"(low), "=f"(high)
        : "r"(word));
  }
}

/// A warp's part of shared memory holds 16 rows of 64 columns, of 128 bytes whose chunks are permuted as the copy
/// engine has them. The address of a lane's part of columns 16 q to 16 q + 15, for store_matrices and load_matrices:
/// what they store are two fragments, rows up to 8 and from 8 on of each.
__device__ __forceinline__ std::uint32_t staged_part(std::uint32_t buffer, int q) {
  int const lane = static_cast<int>(threadIdx.x) % 32, r = lane % 16, chunk = 2 * q + lane / 16;
  return buffer + static_cast<std::uint32_t>(r * 128 + (chunk ^ (r & 7)) * 16);
}
/// A lane's eight columns of row r of those, as far as there are so many left, to `to`. wide: 16 bytes at once.
template <class T>
__device__ __forceinline__ void store_staged(std::uint32_t buffer, int r, T* to, int left, bool wide) {
  int const chunk = static_cast<int>(threadIdx.x) % 8;
  std::uint32_t const from = buffer + static_cast<std::uint32_t>(r * 128 + (chunk ^ (r & 7)) * 16);
  if (wide && left >= 8) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    *reinterpret_cast<uint4*>(to) = v;
  } else {
#pragma unroll 1
    for (int e = 0; e < 8 && e < left; ++e) {
      std::uint16_t bits;
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(from + 2 * e) : "memory");
      to[e].bits = bits;
    }
  }
}
/// Of words[i][k], pair p's: w[k] = words[2 p + k / 2][k % 2]. p in [First, Last): registers have no index that is not
/// known when compiled.
template <int First, int Last, int Fragments>
__device__ __forceinline__ void select_pair(std::uint32_t const (&words)[Fragments][2], int p, std::uint32_t (&w)[4]) {
  if constexpr (Last - First == 1) {
#pragma unroll
    for (int k = 0; k < 4; ++k) w[k] = words[2 * First + k / 2][k % 2];
  } else {
    constexpr int middle = (First + Last) / 2;
    if (p < middle)
      select_pair<First, middle>(words, p, w);
    else
      select_pair<middle, Last>(words, p, w);
  }
}

/// A warp's 16 rows of a tile's result of 16 bits, on their way out in units of 64 columns, each through one of two
/// buffers in shared memory. A slice of that is done in each step of the next tile: short ones, for while a warpgroup
/// is at its slice it does not feed the tensor cores, and more than half of a step's time does not stay hidden.
template <int Fragments, class T, class Result>
class departure {
 public:
  __device__ __forceinline__ departure(arguments<T, T, Result> const& args, std::uint32_t memory)
      : args_(args), buffer_(memory), both_buffers_(2 * memory + buffer_bytes) {}

  /// The sums of a tile whose predecessor is gone. `row`: the warp's first one.
  __device__ __forceinline__ void take(float (&sum)[Fragments][4], note const& t, int row) {
    auto const& x = args_.x;
    int const lane = static_cast<int>(threadIdx.x) % 32;
    row_ = row;
    rows_left_ = t.row_end - row;
    column_ = t.column;
    columns_left_ = static_cast<int>(x.n) - t.column;
    next_ = 0;
    end_ = rows_left_ > 0 ? slices() : 0;
    if (x.bias) {
      float const* const bias = x.bias + t.group * x.groups.bias_apart + t.column;
#pragma unroll
      for (int j = 0; j < Fragments; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          bool const up = is_gated<Result> && j >= Fragments / 2;
          int const column = 8 * (up ? j - Fragments / 2 : j) + lane % 4 * 2 + e;
          float const plus = column < columns_left_ ? bias[column + (up ? x.n : 0)] : 0.0f;
          sum[j][e] += plus;
          sum[j][2 + e] += plus;
        }
    }
#pragma unroll
    for (int j = 0; j < Fragments; ++j) {
      word_[j][0] = packed_pair<T>(sum[j][0], sum[j][1]);
      word_[j][1] = packed_pair<T>(sum[j][2], sum[j][3]);
    }
    if constexpr (goes_to_tokens<Result>) {
      token_ = 0;
      gate_ = 0;
      if (lane % 16 < rows_left_) {
        token_ = x.result.source[row + lane % 16];
        gate_ = x.result.gate[token_ * x.result.gate_apart];
      }
    }
    if constexpr (is_gated<Result>)
      if (x.result.both && end_ > 0) {
        // The first unit of both at once: the buffers are free, and the next tile has no time for all of it.
#pragma unroll
        for (int up = 0; up < 2; ++up) {
          begin_buffer();
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            auto const& w = word_[up * Fragments / 2 + 2 * q];
            auto const& next = word_[up * Fragments / 2 + 2 * q + 1];
            std::uint32_t const four[4] = {w[0], w[1], next[0], next[1]};
            store_matrices(staged_part(buffer_, q), four);
          }
          end_buffer(0, up);
        }
      }
  }
  /// The next slice, if there is one.
  __device__ __forceinline__ void advance() {
    if (next_ < end_) slice(next_++);
  }
  /// All slices that are left.
  __device__ __forceinline__ void finish() {
#pragma unroll 1
    while (next_ < end_) slice(next_++);
  }

 private:
  /// What a buffer becomes: rows of C, gates, what they gate, rows of tokens.
  static constexpr int to_c = 2, to_tokens = 3;  // 0 and 1: the halves of `both`
  static constexpr int units = is_gated<Result> ? Fragments / 16 : Fragments / 8;

  __device__ __forceinline__ int slices() const {
    if constexpr (is_gated<Result>) return (args_.x.result.both ? 4 * (units - 1) : 0) + 8 * units;
    if constexpr (goes_to_tokens<Result>) return (args_.x.c ? 2 * units : 0) + 5 * units;
    return 4 * units;
  }
  __device__ __forceinline__ void slice(int i) {
    if constexpr (is_gated<Result>) {
      if (args_.x.result.both) {
        i -= 4 * (units - 1);
        if (i < 0) return store_both(i + 4 * (units - 1));
      }
      store_gated_units(i);
    } else if constexpr (goes_to_tokens<Result>) {
      if (args_.x.c) {
        i -= 2 * units;
        if (i < 0) return store_half(i + 2 * units);
      }
      store_weighted(i);
    } else {
      if (64 * (i / 4) >= columns_left_) return;
      std::uint32_t w[4];
      select_pair<0, Fragments / 2>(word_, i, w);
      if (i % 4 == 0) begin_buffer();
      store_matrices(staged_part(buffer_, i % 4), w);
      if (i % 4 == 3) end_buffer(i / 4, to_c);
    }
  }
  /// Columns 32 i to 32 i + 31, as they are.
  __device__ __forceinline__ void store_half(int i) {
    if (64 * (i / 2) >= columns_left_) return;
    if (i % 2 == 0) begin_buffer();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      std::uint32_t w[4];
      select_pair<0, Fragments / 2>(word_, 2 * i + k, w);
      store_matrices(staged_part(buffer_, i % 2 * 2 + k), w);
    }
    if (i % 2 == 1) end_buffer(i / 2, to_c);
  }
  /// Of the second unit of gates, then of what they gate, 32 columns.
  __device__ __forceinline__ void store_both(int i) {
    if (64 >= columns_left_) return;
    if (i % 2 == 0) begin_buffer();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      std::uint32_t w[4];
      select_pair<0, Fragments / 2>(word_, Fragments / 4 * (i / 2) + 4 + i % 2 * 2 + k, w);
      store_matrices(staged_part(buffer_, i % 2 * 2 + k), w);
    }
    if (i % 2 == 1) end_buffer(1, i / 2);
  }
  /// Fragment j of C.
  __device__ __forceinline__ void store_gated_units(int j) {
    if (64 * (j / 8) >= columns_left_) return;
    std::uint32_t w[4];
    select_gated<0, Fragments / 2>(j, w);
    std::uint32_t result[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float g[2], u[2];
      unpack_pair<T>(w[k], g[0], g[1]);
      unpack_pair<T>(w[2 + k], u[0], u[1]);
      result[k] = packed_pair<T>(Result::function::of(g[0], u[0]), Result::function::of(g[1], u[1]));
    }
    if (j % 8 == 0) begin_buffer();
    int const r = static_cast<int>(threadIdx.x) % 16;
    store_two_matrices(buffer_ + static_cast<std::uint32_t>(r * 128 + (j % 8 ^ (r & 7)) * 16), result);
    if (j % 8 == 7) end_buffer(j / 8, to_c);
  }
  template <int First, int Last>
  __device__ __forceinline__ void select_gated(int j, std::uint32_t (&w)[4]) {
    if constexpr (Last - First == 1) {
#pragma unroll
      for (int k = 0; k < 4; ++k) w[k] = word_[First + k / 2 * (Fragments / 2)][k % 2];
    } else {
      constexpr int middle = (First + Last) / 2;
      if (j < middle)
        select_gated<First, middle>(j, w);
      else
        select_gated<middle, Last>(j, w);
    }
  }
  /// Of each unit, four parts times the rows' gates, and their way out.
  __device__ __forceinline__ void store_weighted(int i) {
    int const unit = i / 5, q = i - 5 * unit;
    if (64 * unit >= columns_left_) return;
    if (q == 4) return end_buffer(unit, to_tokens);
    std::uint32_t w[4];
    select_pair<0, Fragments / 2>(word_, 4 * unit + q, w);
    int const lane = static_cast<int>(threadIdx.x) % 32;
    float const low = __shfl_sync(0xffffffffu, gate_, lane / 4);
    float const high = __shfl_sync(0xffffffffu, gate_, lane / 4 + 8);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float v[2];
      unpack_pair<T>(w[k], v[0], v[1]);
      w[k] = packed_pair<T>(v[0] * (k % 2 ? high : low), v[1] * (k % 2 ? high : low));
    }
    if (q == 0) begin_buffer();
    store_matrices(staged_part(buffer_, q), w);
  }

  /// Waits until the buffer may be written: what left it before has been read.
  __device__ __forceinline__ void begin_buffer() {
    if (threadIdx.x % 32 == 0) wait_for_copies_out<buffers - 1>();
    __syncwarp();
  }
  /// The buffer's columns are unit `unit` of the tile's part of the matrix. By the engine where they are whole rows of
  /// one matrix; else by the threads.
  __device__ __forceinline__ void end_buffer(int unit, int what) {
    if (args_.by_engine && rows_left_ >= 16 && what != to_tokens) {
      publish_shared_writes();
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
        if (what == to_c)
          copy_box_out(&args_.c, buffer_, column_ + 64 * unit, row_, 0);
        else
          copy_box_out(&args_.both, buffer_, column_ + 64 * unit, row_, what);
        commit_copies_out();
      }
    } else {
      store_rows(unit, what);
    }
    buffer_ = both_buffers_ - buffer_;
  }
  __device__ __forceinline__ void store_rows(int unit, int what) {
    auto const& x = args_.x;
    int const lane = static_cast<int>(threadIdx.x) % 32, chunk = lane % 8;
    int const column = column_ + 64 * unit + 8 * chunk, left = columns_left_ - 64 * unit - 8 * chunk;
    __syncwarp();
    if constexpr (goes_to_tokens<Result>)
      if (what == to_tokens) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int const r = 4 * i + lane / 8, token = __shfl_sync(0xffffffffu, token_, r);
          T* const to = x.result.y + token * x.result.y_stride + column;
          if (r < rows_left_) store_staged(buffer_, r, to, left, args_.wide);
        }
        // A group without copies: their number goes on with the buffers'.
        if (lane == 0) commit_copies_out();
        return;
      }
    T* rows = x.c;
    std::int64_t stride = x.ldc;
    if constexpr (is_gated<Result>)
      if (what != to_c) {
        rows = x.result.both + what * x.n;
        stride = x.result.both_stride;
      }
    rows += row_ * stride + column;
#pragma unroll 1
    for (int r = lane / 8; r < rows_left_ && r < 16; r += 4)
      store_staged(buffer_, r, rows + r * stride, left, args_.wide);
    __syncwarp();
    if (lane == 0) commit_copies_out();
  }

  arguments<T, T, Result> const& args_;
  std::uint32_t buffer_, both_buffers_;  // an address, and the sum of both
  std::uint32_t word_[Fragments][2];
  int row_ = 0, rows_left_ = 0, column_ = 0, columns_left_ = 0, next_ = 0, end_ = 0;
  int token_ = 0;  // of row lane % 16
  float gate_ = 0;
};

/// Nothing waits.
template <int Fragments, class T, class TC, class Result>
class no_departure {
 public:
  __device__ __forceinline__ no_departure(arguments<T, TC, Result> const& args, std::uint32_t memory)
      : args_(args), buffer_(memory), both_buffers_(2 * memory + buffer_bytes) {}
  __device__ __forceinline__ void take(float (&sum)[Fragments][4], note const& t, int row) {
    auto const& x = args_.x;
    int const rows_left = t.row_end - row, columns_left = static_cast<int>(x.n) - t.column;
    int const lane = static_cast<int>(threadIdx.x) % 32, group = x.groups.by == grouping::depth ? t.group : 0;
    float const* const bias = x.bias ? x.bias + t.group * x.groups.bias_apart + t.column : nullptr;
    if (args_.by_engine && rows_left >= 16) {
      if (bias)
#pragma unroll
        for (int j = 0; j < Fragments; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            int const column = 8 * j + lane % 4 * 2 + e;
            float const plus = column < columns_left ? bias[column] : 0.0f;
            sum[j][e] += plus;
            sum[j][2 + e] += plus;
          }
      copy_out(sum, args_.c, buffer_, both_buffers_, row, t.column, group, columns_left, x.mode == update::accumulate);
    } else {
      TC* const c = x.c + group * x.groups.c_apart + row * x.ldc + t.column;
      store_fragments<true>(sum, c, x.ldc, rows_left, columns_left, bias, x.mode == update::accumulate, args_.wide);
    }
  }
  __device__ __forceinline__ void advance() {}
  __device__ __forceinline__ void finish() {}

 private:
  arguments<T, TC, Result> const& args_;
  std::uint32_t buffer_, both_buffers_;
};

}  // namespace blackmamba::cuda::detail::wgmma
