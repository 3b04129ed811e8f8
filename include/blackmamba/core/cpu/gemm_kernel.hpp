#pragma once
#include <blackmamba/core/config.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/core/cpu/simd_lanes.hpp>
#include <blackmamba/core/numeric.hpp>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

/// The innermost parts of a dense product: a tile of C in registers, and the packing of operands into the order in
/// which that tile reads them (Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008). A is
/// float or double, T any storage type.
namespace blackmamba::cpu::detail {

/// Rows of a register tile, and the packs that each row has at most: 8 x 3 accumulators fit 32 registers, 4 x 3 fit 16.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int register_rows = 8;
#else
inline constexpr int register_rows = 4;
#endif
inline constexpr int register_packs = 3;

/// Calls body(integral_constant<int, 0>), ..., (N - 1): a loop whose indices are constants, so that what they index can
/// live in registers.
template <int N, int First = 0, class Body>
BLACKMAMBA_INLINE void unrolled(Body const& body) {
  if constexpr (First < N) {
    body(std::integral_constant<int, First>{});
    unrolled<N, First + 1>(body);
  }
}

/// How the left operand of a register tile lies in memory: each row for itself with the depth contiguous, or
/// `register_rows` rows interleaved.
enum class left_order { rows, interleaved };

/// out (rows, Packs * W) = initial + left (rows, depth) right (depth, Packs * W), or out += it.
///
/// @param left_stride  between rows (left_order::rows)
/// @param rows         1 .. register_rows; the last row is read again in place of those that are missing
/// @param initial      one row, or null for zeros
/// Every element is summed in the order of the depth, wherever in C its tile lies.
template <class A, int Packs, left_order Order>
void register_tile(std::int64_t depth, A const* left, std::int64_t left_stride, int rows, A const* right,
                   std::int64_t right_stride, A const* initial, A* out, std::int64_t out_stride, bool add) {
  using V = simd::pack<A>;
  A const* row[register_rows];
  V sum[std::size_t{register_rows}][std::size_t{Packs}];
  unrolled<register_rows>([&](auto i) {
    row[i] = Order == left_order::rows ? left + std::min<int>(i, rows - 1) * left_stride : left + i;
    unrolled<Packs>([&](auto q) { sum[i][q] = initial ? V::load(initial + q * V::lanes) : V(0); });
  });
  constexpr int step = Order == left_order::rows ? 1 : register_rows;
  for (std::int64_t p = 0; p < depth; ++p) {
    V b[std::size_t{Packs}];
    unrolled<Packs>([&](auto q) { b[q] = V::load(right + q * V::lanes); });
    unrolled<register_rows>([&](auto i) {
      V const a = row[i][p * step];
      unrolled<Packs>([&](auto q) { sum[i][q] = fma(a, b[q], sum[i][q]); });
    });
    right += right_stride;
  }
  unrolled<register_rows>([&](auto i) {
    if (i >= rows) return;
    A* const c = out + i * out_stride;
    unrolled<Packs>([&](auto q) {
      V const s = add ? V::load(c + q * V::lanes) + sum[i][q] : sum[i][q];
      s.store(c + q * V::lanes);
    });
  });
}

template <int N, int Distance>
struct even_blocks {
  static constexpr int at(int i) { return (i & Distance) ? N + i - Distance : i; }
};
template <int N, int Distance>
struct odd_blocks {
  static constexpr int at(int i) { return (i & Distance) ? N + i : i + Distance; }
};
/// Exchanges blocks of Distance lanes between two packs: a keeps its blocks of even index and gets b's, b keeps those
/// of odd index and gets a's.
template <int Distance, class A, int N>
BLACKMAMBA_INLINE void exchange_blocks(simd::pack<A, N>& a, simd::pack<A, N>& b) {
  auto const even = simd::detail::shuffle<even_blocks<N, Distance>>(a, b);
  b = simd::detail::shuffle<odd_blocks<N, Distance>>(a, b);
  a = even;
}

/// Transposes a square of W packs of W lanes in registers: log2(W) exchanges of ever smaller blocks.
template <int Distance, class A>
BLACKMAMBA_INLINE void transpose_square(simd::pack<A> (&x)[simd::pack<A>::size]) {
  unrolled<simd::pack<A>::lanes>([&](auto i) {
    if constexpr ((i & Distance) == 0) exchange_blocks<Distance>(x[i], x[i + Distance]);
  });
  if constexpr (Distance > 1) transpose_square<Distance / 2>(x);
}
template <class A>
BLACKMAMBA_INLINE void transpose_square(simd::pack<A> (&x)[simd::pack<A>::size]) {
  transpose_square<simd::pack<A>::lanes / 2>(x);
}

/// Copies n values, widened.
template <class A, class T>
BLACKMAMBA_INLINE void copy_widened(T const* from, std::int64_t n, A* to) {
  using V = simd::pack<A>;
  std::int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) V::load(from + i).store(to + i);
  for (; i < n; ++i) to[i] = convert<A>(from[i]);
}

/// A (rows, depth) as stored -> widened rows of left_order::rows with a stride of `to_stride`.
template <class A, class T>
void pack_left_rows(T const* a, std::int64_t lda, std::int64_t rows, std::int64_t depth, A* to,
                    std::int64_t to_stride) {
  for (std::int64_t i = 0; i < rows; ++i) copy_widened(a + i * lda, depth, to + i * to_stride);
}

/// A stored as (depth, rows) -> left_order::interleaved: (rows / register_rows, depth, register_rows), the last strip
/// filled with zeros.
template <class A, class T>
void pack_left_interleaved(T const* a, std::int64_t lda, std::int64_t rows, std::int64_t depth, A* to) {
  using V = simd::pack<A, register_rows>;
  for (std::int64_t i = 0; i < rows; i += register_rows, to += depth * register_rows)
    if (i + register_rows <= rows) {
      for (std::int64_t p = 0; p < depth; ++p) V::load(a + p * lda + i).store(to + p * register_rows);
    } else {
      for (std::int64_t p = 0; p < depth; ++p)
        for (int t = 0; t < register_rows; ++t)
          to[p * register_rows + t] = i + t < rows ? convert<A>(a[p * lda + i + t]) : A(0);
    }
}

/// B (depth, cols), cols at most `width`, as stored -> (depth, width), filled with zeros.
template <class A, class T>
void pack_right_rows(T const* b, std::int64_t ldb, std::int64_t cols, std::int64_t depth, A* to, std::int64_t width) {
  for (std::int64_t p = 0; p < depth; ++p) {
    copy_widened(b + p * ldb, cols, to + p * width);
    for (std::int64_t j = cols; j < width; ++j) to[p * width + j] = 0;
  }
}

/// B stored as (cols, depth), cols at most `width` -> (depth, width), filled with zeros.
template <class A, class T>
void pack_right_transposed(T const* b, std::int64_t ldb, std::int64_t cols, std::int64_t depth, A* to,
                           std::int64_t width) {
  using V = simd::pack<A>;
  for (std::int64_t j = 0; j < width; j += V::lanes)
    for (std::int64_t p = 0; p < depth; p += V::lanes) {
      V square[V::size];
      int const deep = static_cast<int>(std::min<std::int64_t>(V::lanes, depth - p));
      if (deep == V::lanes && j + V::lanes <= cols) {
        unrolled<V::lanes>([&](auto t) { square[t] = V::load(b + (j + t) * ldb + p); });
      } else {
        for (int t = 0; t < V::lanes; ++t) square[t] = j + t < cols ? V::load(b + (j + t) * ldb + p, deep) : V(0);
      }
      transpose_square(square);
      A* const column = to + p * width + j;
      if (deep == V::lanes)
        unrolled<V::lanes>([&](auto t) { square[t].store(column + t * width); });
      else
        for (int t = 0; t < deep; ++t) square[t].store(column + t * width);
    }
}

/// out (rows, cols) = tile, or out += it, rounded to the type of out.
template <class A, class T>
void store_tile(A const* tile, std::int64_t tile_stride, std::int64_t rows, std::int64_t cols, T* out,
                std::int64_t out_stride, bool add) {
  using V = simd::pack<A>;
  for (std::int64_t i = 0; i < rows; ++i, tile += tile_stride, out += out_stride) {
    std::int64_t j = 0;
    for (; j + V::lanes <= cols; j += V::lanes) {
      V const s = V::load(tile + j);
      (add ? V::load(out + j) + s : s).store(out + j);
    }
    for (; j < cols; ++j) out[j] = convert<T>(add ? convert<A>(out[j]) + tile[j] : tile[j]);
  }
}

}  // namespace blackmamba::cpu::detail
