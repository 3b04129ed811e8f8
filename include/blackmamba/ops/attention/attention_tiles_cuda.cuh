#pragma once
#include <blackmamba/core/cuda/copy_async_cuda.cuh>
#include <blackmamba/core/cuda/exponential_cuda.cuh>
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/tensor_core_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/view.hpp>
#include <blackmamba/ops/attention/attention_math.hpp>

#include <cstdint>

/// What attention's kernels share: which tile of which sequence a block works on, tiles of 16-bit elements in shared
/// memory, and products of them by mma.sync (sm_80 and later).
namespace blackmamba::attention_cuda {

/// A (B, L, H, dh) tensor: elements from one head's row to the next in each dimension.
template <class T>
struct heads_view {
  T* data = nullptr;
  std::int64_t batch = 0, row = 0, head = 0;

  __device__ __forceinline__ T* at(std::int64_t b, std::int64_t i, int h) const {
    return data + b * batch + i * row + h * head;
  }
};
template <class T, class View>
heads_view<T> heads_of(View const& x) {
  return {x.data(), x.stride(0), x.stride(1), x.stride(2)};
}

/// Part of one sequence: its rows [begin, begin + rows), of `length`.
struct tile {
  std::int64_t sequence = 0;  ///< row of the cache
  std::int64_t batch = 0;     ///< row of the tensors
  std::int64_t first = 0;     ///< the sequence's first row in that row
  std::int64_t length = 0;    ///< rows of the sequence
  std::int64_t begin = 0;
  int rows = 0;  ///< 0: nothing to do
};

/// The sequences of a call, cut into tiles that start at each sequence's own beginning.
struct sequence_map {
  std::int64_t const* offsets = nullptr;  ///< (S + 1), or null: the rows of the batch
  std::int64_t count = 0;                 ///< sequences
  std::int64_t length = 0;                ///< of a row of the batch

  /// As many numbers as find() is asked for. Packed sequences: some of them stand for nothing.
  std::int64_t tiles(std::int64_t size) const {
    return offsets ? length / size + count : (length + size - 1) / size * count;
  }
  /// The sequence that a row of the packed tensor belongs to.
  __device__ __forceinline__ std::int64_t sequence_of(std::int64_t row) const {
    std::int64_t low = 0, high = count - 1;
    while (low < high) {  // the last that begins at or before the row is the one: empty ones begin earlier or there
      std::int64_t const middle = (low + high + 1) / 2;
      if (offsets[middle] <= row)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
  /// Tile number n, the last tiles of the sequences first: under the causal mask they have the most to do.
  template <int Size>
  __device__ __forceinline__ tile find(std::int64_t n) const {
    tile t;
    std::int64_t number;
    if (offsets) {
      n = length / Size + count - 1 - n;
      std::int64_t low = 0, high = count - 1;
      while (low < high) {
        std::int64_t const middle = (low + high + 1) / 2;
        if (offsets[middle] / Size + middle <= n)
          low = middle;
        else
          high = middle - 1;
      }
      t.sequence = low;
      t.first = offsets[low];
      t.length = offsets[low + 1] - t.first;
      number = n - (t.first / Size + low);
    } else {
      t.sequence = t.batch = n % count;
      t.length = length;
      number = (length + Size - 1) / Size - 1 - n / count;
    }
    t.begin = number * Size;
    std::int64_t const left = t.length - t.begin;
    t.rows = static_cast<int>(left < 0 ? 0 : left < Size ? left : Size);
    return t;
  }
};

// ---- 16-bit tiles in shared memory ----

/// Rows lie HeadDim + 8 elements apart: an odd number of 16-byte pieces, so that eight rows' pieces lie in eight
/// different groups of banks.
template <int HeadDim>
inline constexpr int row_pitch = HeadDim + 8;

/// Rows [0, count) of one head into a tile of Rows rows, in the background where they are aligned; zeros elsewhere.
/// Vectorised: 16-byte pieces, for which dh and the strides are multiples of 8 and the data is aligned.
template <int HeadDim, int Rows, int Threads, class T>
__device__ __forceinline__ void load_tile(T* to, T const* from, std::int64_t stride, int count, int head_dim,
                                          bool vectorised) {
  constexpr int pieces = HeadDim / 8;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < Rows * pieces; i += Threads) {
    int const row = i / pieces, column = i % pieces * 8;
    T* const piece = to + row * row_pitch<HeadDim> + column;
    if (vectorised) {
      bool const wanted = row < count && column < head_dim;
      cuda::copy_async(cuda::shared_address(piece), wanted ? from + row * stride + column : from, wanted ? 16 : 0);
    } else {
      union {
        uint4 word;
        T element[8];
      } x;
      x.word = make_uint4(0, 0, 0, 0);
      if (row < count)
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (column + j < head_dim) x.element[j] = from[row * stride + column + j];
      *reinterpret_cast<uint4*>(piece) = x.word;
    }
  }
}

/// The pair (m, m + half) of a row, turned by the angles of its position and rounded to T.
template <class T>
__device__ __forceinline__ void turn_pair(T first, T second, accum_t<T> cosine, accum_t<T> sine, T& to_first,
                                          T& to_second) {
  auto const turned = attention_math::rotate<accum_t<T>>({widen(first), widen(second)}, cosine, sine);
  to_first = convert<T>(turned.first);
  to_second = convert<T>(turned.second);
}

/// As load_tile, turned: angles is the first row's (cosines, then sines), rows dh apart.
template <int HeadDim, int Rows, int Threads, class T>
__device__ __forceinline__ void load_tile_turned(T* to, T const* from, std::int64_t stride, int count, int head_dim,
                                                 bool vectorised, float const* angles) {
  int const half = head_dim / 2;
  if (vectorised && half % 8 == 0) {
    int const pieces = half / 8;
    for (int i = static_cast<int>(threadIdx.x); i < Rows * pieces; i += Threads) {
      int const row = i / pieces, column = i % pieces * 8;
      union piece {
        uint4 word;
        T element[8];
      } a, b;
      a.word = b.word = make_uint4(0, 0, 0, 0);
      if (row < count) {
        T const* const source = from + row * stride + column;
        float const* const turn = angles + std::int64_t{row} * head_dim + column;
        a.word = *reinterpret_cast<uint4 const*>(source);
        b.word = *reinterpret_cast<uint4 const*>(source + half);
        auto const cosine = cuda::load_pack<8>(turn), sine = cuda::load_pack<8>(turn + half);
#pragma unroll
        for (int j = 0; j < 8; ++j)
          turn_pair(a.element[j], b.element[j], cosine[j], sine[j], a.element[j], b.element[j]);
      }
      T* const target = to + row * row_pitch<HeadDim> + column;
      *reinterpret_cast<uint4*>(target) = a.word;
      *reinterpret_cast<uint4*>(target + half) = b.word;
    }
    int const rest = (HeadDim - head_dim) / 8;
    for (int i = static_cast<int>(threadIdx.x); i < Rows * rest; i += Threads)
      *reinterpret_cast<uint4*>(to + i / rest * row_pitch<HeadDim> + head_dim + i % rest * 8) = make_uint4(0, 0, 0, 0);
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < Rows * half; i += Threads) {
      int const row = i / half, m = i % half;
      T a = convert<T>(0.0f), b = a;
      if (row < count)
        turn_pair(from[row * stride + m], from[row * stride + m + half], angles[std::int64_t{row} * head_dim + m],
                  angles[std::int64_t{row} * head_dim + half + m], a, b);
      to[row * row_pitch<HeadDim> + m] = a;
      to[row * row_pitch<HeadDim> + m + half] = b;
    }
    int const rest = HeadDim - head_dim;
    for (int i = static_cast<int>(threadIdx.x); i < Rows * rest; i += Threads)
      to[i / rest * row_pitch<HeadDim> + head_dim + i % rest] = convert<T>(0.0f);
  }
}

/// Rows [row, row + 16) and columns [column, column + 16) of a tile as the left operand of a product.
template <int HeadDim, class T>
__device__ __forceinline__ void load_left(std::uint32_t (&x)[4], T const* tile, int row, int column) {
  int const lane = static_cast<int>(threadIdx.x % 32);
  cuda::load_matrices<false>(
      x, cuda::shared_address(tile + (row + lane % 16) * row_pitch<HeadDim> + column + lane / 16 * 8));
}
/// The right operands of two products whose 8 columns each are the tile's rows [row, row + 8) and [row + 8, row + 16),
/// summed over the tile's columns [column, column + 16).
template <int HeadDim, class T>
__device__ __forceinline__ void load_right_rows(std::uint32_t (&x)[4], T const* tile, int row, int column) {
  int const lane = static_cast<int>(threadIdx.x % 32);
  cuda::load_matrices<false>(x, cuda::shared_address(tile + (row + lane / 16 * 8 + lane % 8) * row_pitch<HeadDim> +
                                                     column + lane / 8 % 2 * 8));
}
/// The right operands of two products whose columns are the tile's, [column, column + 8) and [column + 8, column + 16),
/// summed over the tile's rows [row, row + 16).
template <int HeadDim, class T>
__device__ __forceinline__ void load_right_columns(std::uint32_t (&x)[4], T const* tile, int row, int column) {
  int const lane = static_cast<int>(threadIdx.x % 32);
  cuda::load_matrices<true>(
      x, cuda::shared_address(tile + (row + lane % 16) * row_pitch<HeadDim> + column + lane / 16 * 8));
}

/// Columns 16 pair to 16 pair + 15 of sums += left right, for each group of 16 rows.
template <class T, int Groups, int Columns>
__device__ __forceinline__ void multiply_pair(float (&sums)[Groups][Columns][4], std::uint32_t const (&left)[Groups][4],
                                              std::uint32_t const (&right)[4], int pair) {
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    cuda::multiply_matrices<T>(sums[g][2 * pair], left[g], right[0], right[1]);
    cuda::multiply_matrices<T>(sums[g][2 * pair + 1], left[g], right[2], right[3]);
  }
}
/// Two neighbouring products' results as the left operand of the next one.
template <class T>
__device__ __forceinline__ void as_left(std::uint32_t (&a)[4], float const (&left)[4], float const (&right)[4]) {
  a[0] = cuda::packed_pair<T>(left[0], left[1]);
  a[1] = cuda::packed_pair<T>(left[2], left[3]);
  a[2] = cuda::packed_pair<T>(right[0], right[1]);
  a[3] = cuda::packed_pair<T>(right[2], right[3]);
}

// ---- sums on their way out: rows in shared memory, `pitch` apart ----

/// Rows [0, count) times `factor`, turned back by the angles where there are any, to memory.
template <int Threads, class A, class T>
__device__ __forceinline__ void write_turned_back(A const* sums, int pitch, int count, int head_dim, A factor,
                                                  A const* angles, T* to, std::int64_t stride) {
  int const half = head_dim / 2;
  for (int i = static_cast<int>(threadIdx.x); i < count * half; i += Threads) {
    int const row = i / half, m = i % half;
    A a = sums[row * pitch + m] * factor, b = sums[row * pitch + m + half] * factor;
    if (angles) {
      A const cosine = angles[std::int64_t{row} * head_dim + m], sine = angles[std::int64_t{row} * head_dim + half + m];
      auto const turned = attention_math::rotate<A>({a, b}, cosine, -sine);
      a = turned.first;
      b = turned.second;
    }
    to[row * stride + m] = convert<T>(a);
    to[row * stride + m + half] = convert<T>(b);
  }
}

}  // namespace blackmamba::attention_cuda
