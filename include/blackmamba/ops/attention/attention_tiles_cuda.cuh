#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
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

__device__ __forceinline__ std::uint32_t shared_address(void const* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
/// 16 bytes to shared memory, in the background; zeros where not wanted.
__device__ __forceinline__ void copy_async(void* to, void const* from, bool wanted) {
  int const bytes = wanted ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

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
      copy_async(piece, wanted ? from + row * stride + column : from, wanted);
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

/// Four 8x8 matrices of 16-bit elements: lanes 8i .. 8i + 7 name the rows of matrix i.
__device__ __forceinline__ void load_matrices(std::uint32_t (&x)[4], void const* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&x)[4], void const* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}
/// Rows [row, row + 16) and columns [column, column + 16) of a tile as the left operand of a product.
template <int HeadDim, class T>
__device__ __forceinline__ void load_left(std::uint32_t (&x)[4], T const* tile, int row, int column) {
  int const lane = static_cast<int>(threadIdx.x % 32);
  load_matrices(x, tile + (row + lane % 16) * row_pitch<HeadDim> + column + lane / 16 * 8);
}
/// The right operands of two products whose 8 columns each are the tile's rows [row, row + 8) and [row + 8, row + 16),
/// summed over the tile's columns [column, column + 16).
template <int HeadDim, class T>
__device__ __forceinline__ void load_right_rows(std::uint32_t (&x)[4], T const* tile, int row, int column) {
  int const lane = static_cast<int>(threadIdx.x % 32);
  load_matrices(x, tile + (row + lane / 16 * 8 + lane % 8) * row_pitch<HeadDim> + column + lane / 8 % 2 * 8);
}
/// The right operands of two products whose columns are the tile's, [column, column + 8) and [column + 8, column + 16),
/// summed over the tile's rows [row, row + 16).
template <int HeadDim, class T>
__device__ __forceinline__ void load_right_columns(std::uint32_t (&x)[4], T const* tile, int row, int column) {
  int const lane = static_cast<int>(threadIdx.x % 32);
  load_matrices_transposed(x, tile + (row + lane % 16) * row_pitch<HeadDim> + column + lane / 16 * 8);
}

/// sum (16, 8) += a (16, 16) b (16, 8). Lane l holds of `sum` the columns 2 (l % 4) + {0, 1} of the rows l / 4 and
/// l / 4 + 8.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], std::uint32_t const (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1) {
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// Two values rounded to T in one word, the first in the low half.
template <class T>
__device__ __forceinline__ std::uint32_t pack_pair(float low, float high) {
  std::uint32_t x;
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
/// Two neighbouring products' results as the left operand of the next one.
template <class T>
__device__ __forceinline__ void as_left(std::uint32_t (&a)[4], float const (&left)[4], float const (&right)[4]) {
  a[0] = pack_pair<T>(left[0], left[1]);
  a[1] = pack_pair<T>(left[2], left[3]);
  a[2] = pack_pair<T>(right[0], right[1]);
  a[3] = pack_pair<T>(right[2], right[3]);
}
/// 2^x to 2 units in the last place; 0 for -infinity.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
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
