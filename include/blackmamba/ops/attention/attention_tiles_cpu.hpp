#pragma once
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/core/memory.hpp>
#include <blackmamba/core/tensor.hpp>
#include <blackmamba/ops/attention/attention_math.hpp>

#include <algorithm>
#include <cstdint>
#include <utility>

/// What attention on the host is made of: tiles of rows in the computing type, and small products between them that
/// stay in registers and the first-level cache.
namespace blackmamba::attention_tiles {

/// Rows of queries and of keys that are worked on at a time.
inline constexpr std::int64_t tile = 64;

/// A product keeps block_rows x 2 packs of results in registers: 16 of the 32 registers of AVX-512, 8 of the 16
/// elsewhere.
inline constexpr int block_rows = simd::register_bytes == 64 ? 8 : 4;
template <class A>
inline constexpr int block_lanes = 2 * simd::width<A>;

template <class A>
constexpr std::int64_t whole_packs(std::int64_t n) {
  return (n + simd::width<A> - 1) / simd::width<A> * simd::width<A>;
}
constexpr std::int64_t whole_blocks(std::int64_t rows) { return (rows + block_rows - 1) / block_rows * block_rows; }

/// What a product does with the results' memory: sets it, adds to it, or multiplies its rows by factors and adds.
enum class start { zero, sum, scaled_sum };

/// c (block_rows, packs) from a (block_rows, depth) b (depth, packs); with Transposed, a is stored (depth,
/// block_rows). `factor` holds one number for each row, for start::scaled_sum. The index sequences 0, 1, ...
/// block_rows * packs - 1 and 0, ... packs - 1 unroll every loop over the results, so that these live in registers at
/// any level of optimisation.
template <bool Transposed, start Start, class A, std::size_t... I, std::size_t... P>
BLACKMAMBA_INLINE void product_block(std::int64_t depth, A const* a, std::int64_t lda, A const* b, std::int64_t ldb,
                                     A* c, std::int64_t ldc, A const* factor, std::index_sequence<I...>,
                                     std::index_sequence<P...>) {
  using V = simd::pack<A>;
  constexpr auto row = [](std::size_t i) { return static_cast<std::int64_t>(i / sizeof...(P)); };
  constexpr auto lane = [](std::size_t i) { return static_cast<std::int64_t>(i % sizeof...(P)) * V::lanes; };
  V sum[sizeof...(I)];
  if constexpr (Start == start::zero)
    ((sum[I] = 0), ...);
  else if constexpr (Start == start::sum)
    ((sum[I] = V::load(c + row(I) * ldc + lane(I))), ...);
  else
    ((sum[I] = V::load(c + row(I) * ldc + lane(I)) * V(factor[row(I)])), ...);
  for (std::int64_t k = 0; k < depth; ++k) {
    A const* const column = Transposed ? a + k * lda : a + k;
    V const x[] = {V::load(b + k * ldb + lane(P))...};
    ((sum[I] = fma(V(column[Transposed ? row(I) : row(I) * lda]), x[I % sizeof...(P)], sum[I])), ...);
  }
  (sum[I].store(c + row(I) * ldc + lane(I)), ...);
}
template <bool Transposed, start Start, std::size_t Packs, class A>
BLACKMAMBA_INLINE void product_block(std::int64_t depth, A const* a, std::int64_t lda, A const* b, std::int64_t ldb,
                                     A* c, std::int64_t ldc, A const* factor) {
  product_block<Transposed, Start>(depth, a, lda, b, ldb, c, ldc, factor,
                                   std::make_index_sequence<block_rows * Packs>{}, std::make_index_sequence<Packs>{});
}

struct range {
  std::int64_t begin, end;
};

/// Scores: c (rows, columns) = a (rows, depth) b (depth, columns). For the columns from `at` on, rows_at(at) tells the
/// rows that are wanted; more may be written, up to a whole block. `columns` counts whole packs.
template <class A, class RowsAt>
void score_product(std::int64_t columns, std::int64_t depth, A const* a, std::int64_t lda, A const* b, A* c,
                   RowsAt&& rows_at) {
  constexpr std::int64_t lanes = simd::width<A>;
  for (std::int64_t at = 0; at < columns; at += 2 * lanes) {
    range const rows = rows_at(at);
    for (std::int64_t r = rows.begin / block_rows * block_rows; r < rows.end; r += block_rows)
      if (at + 2 * lanes <= columns)
        product_block<false, start::zero, 2>(depth, a + r * lda, lda, b + at, tile, c + r * tile + at, tile,
                                             static_cast<A const*>(nullptr));
      else
        product_block<false, start::zero, 1>(depth, a + r * lda, lda, b + at, tile, c + r * tile + at, tile,
                                             static_cast<A const*>(nullptr));
  }
}

/// Weighted sums of rows: c (rows, columns) (Start) weights b, with the rows of b (depth, columns). The weights are
/// stored (rows, depth), or (depth, rows) where they are Transposed, with row stride `tile`. For the results from row
/// r on, depth_at(r) tells the rows of b that have a weight. Whole blocks of rows are written.
template <start Start, bool Transposed, class A, class DepthAt>
void weighted_rows(std::int64_t rows, std::int64_t columns, A const* weights, A const* b, std::int64_t ldb, A* c,
                   std::int64_t ldc, A const* factor, DepthAt&& depth_at) {
  constexpr std::int64_t lanes = simd::width<A>;
  for (std::int64_t at = 0; at < columns; at += 2 * lanes)
    for (std::int64_t r = 0; r < rows; r += block_rows) {
      range const d = depth_at(r);
      A const* const w = Transposed ? weights + d.begin * tile + r : weights + r * tile + d.begin;
      A const* const x = b + d.begin * ldb + at;
      std::int64_t const depth = std::max<std::int64_t>(d.end - d.begin, 0);
      if (at + 2 * lanes <= columns)
        product_block<Transposed, Start, 2>(depth, w, tile, x, ldb, c + r * ldc + at, ldc,
                                            factor ? factor + r : nullptr);
      else
        product_block<Transposed, Start, 1>(depth, w, tile, x, ldb, c + r * ldc + at, ldc,
                                            factor ? factor + r : nullptr);
    }
}

/// One head's row of dh elements times `factor`, turned by the angles (dh/2 cosines, then dh/2 sines; null: not
/// turned). Inverse turns back. x and y may be the same.
template <bool Inverse, class A, class From, class To>
BLACKMAMBA_INLINE void rotate_row(From const* x, std::int64_t head_dim, A const* angles, A factor, To* y) {
  using V = simd::pack<A>;
  if (!angles) {
    simd::for_packs<V::lanes>(head_dim, [&](std::int64_t i, auto lanes) {
      simd::store(simd::load<V>(x + i, lanes) * V(factor), y + i, lanes);
    });
    return;
  }
  std::int64_t const half = head_dim / 2;
  simd::for_packs<V::lanes>(half, [&](std::int64_t i, auto lanes) {
    V const sine = simd::load<V>(angles + half + i, lanes);
    auto const turned = attention_math::rotate<V>({simd::load<V>(x + i, lanes), simd::load<V>(x + half + i, lanes)},
                                                  simd::load<V>(angles + i, lanes), Inverse ? -sine : sine);
    simd::store(turned.first * V(factor), y + i, lanes);
    simd::store(turned.second * V(factor), y + half + i, lanes);
  });
}

/// Rows of one head: where the first lies, how far apart they are, and the angles that turn them (null: none).
template <class T>
struct head_rows {
  T const* data;
  std::int64_t stride;
  accum_t<T> const* angles = nullptr;
};

/// Copies `rows` rows, turned and multiplied by `factor`, to a tile with row stride ld = whole_packs(dh); what
/// completes the last block of rows, and the columns past dh, become zero.
template <class T>
void load_tile(head_rows<T> const& from, std::int64_t first, std::int64_t rows, std::int64_t head_dim,
               accum_t<T> factor, accum_t<T>* to) {
  using A = accum_t<T>;
  std::int64_t const ld = whole_packs<A>(head_dim);
  for (std::int64_t r = 0; r < rows; ++r) {
    A* const row = to + r * ld;
    rotate_row<false>(from.data + (first + r) * from.stride, head_dim,
                      from.angles ? from.angles + (first + r) * head_dim : nullptr, factor, row);
    std::fill(row + head_dim, row + ld, A(0));
  }
  std::fill(to + rows * ld, to + whole_blocks(rows) * ld, A(0));
}

/// to (dh, tile) = rows (rows, dh)^T; the columns that complete the last pack become zero.
template <class A>
void transpose_tile(A const* from, std::int64_t rows, std::int64_t head_dim, A* to) {
  std::int64_t const ld = whole_packs<A>(head_dim), columns = whole_packs<A>(rows);
  for (std::int64_t d = 0; d < head_dim; ++d) {
    for (std::int64_t r = 0; r < rows; ++r) to[d * tile + r] = from[r * ld + d];
    for (std::int64_t r = rows; r < columns; ++r) to[d * tile + r] = 0;
  }
}

/// 0, 1, 2, …
template <class V>
BLACKMAMBA_INLINE V lane_numbers() {
  typename V::value_type n[V::size];
  for (int i = 0; i < V::lanes; ++i) n[i] = static_cast<typename V::value_type>(i);
  return V::load(n);
}

/// Memory for tiles, taken piece by piece.
template <class A>
class tile_memory {
 public:
  explicit tile_memory(std::int64_t elements) : memory_(elements) {}
  A* take(std::int64_t elements) {
    A* const p = memory_.data() + used_;
    used_ += elements;
    return p;
  }

 private:
  tensor<space::host, A, dyn> memory_;
  std::int64_t used_ = 0;
};

}  // namespace blackmamba::attention_tiles
