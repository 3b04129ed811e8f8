#pragma once
#include <blackmamba/ops/attention/attention_tiles_cpu.hpp>

#include <cmath>
#include <limits>

/// What one thread does in attention on the host: the results of one tile of queries, the gradients of one tile of
/// queries or keys, one chunk of a step. Each object owns the memory of its tiles and is used for tile after tile.
namespace blackmamba::attention_tiles {

/// Scores leave the product in units of log 2: queries carry this factor.
template <class A>
A query_factor(std::int64_t head_dim) {
  return static_cast<A>(attention_math::log2_e / std::sqrt(static_cast<double>(head_dim)));
}

/// The causal mask between a tile of queries and a tile of `keys` keys: query i sees the keys up to i + ahead.
struct causal {
  std::int64_t ahead, keys;
  /// Number of keys in the tile that query i sees.
  std::int64_t seen_by(std::int64_t i) const { return std::clamp<std::int64_t>(ahead + i + 1, 0, keys); }
  /// First query that sees key j.
  std::int64_t first_seeing(std::int64_t j) const { return std::max<std::int64_t>(j - ahead, 0); }
};

/// A tile of queries against all keys that they see: scores are held transposed, (keys, queries), so that the softmax
/// over keys runs down the lanes.
template <class A>
class forward_tile {
  using V = simd::pack<A>;

 public:
  explicit forward_tile(std::int64_t head_dim)
      : head_dim_(head_dim),
        ld_(whole_packs<A>(head_dim)),
        memory_(head_dim * tile + 3 * tile * ld_ + tile * tile + 3 * tile),
        queries_(memory_.take(head_dim * tile)),
        keys_(memory_.take(tile * ld_)),
        values_(memory_.take(tile * ld_)),
        sums_(memory_.take(tile * ld_)),
        scores_(memory_.take(tile * tile)),
        maximum_(memory_.take(tile)),
        total_(memory_.take(tile)),
        factor_(memory_.take(tile)) {}

  /// Queries [first, first + rows) of q, the first of them at `position`, against keys [0, position + rows).
  template <class T>
  void run(head_rows<T> const& q, head_rows<T> const& k, head_rows<T> const& v, std::int64_t first, std::int64_t rows,
           std::int64_t position) {
    load_tile(q, first, rows, head_dim_, query_factor<A>(head_dim_), keys_);
    transpose_tile(keys_, rows, head_dim_, queries_);
    std::int64_t const columns = whole_packs<A>(rows);
    std::fill_n(maximum_, columns, -std::numeric_limits<A>::infinity());
    std::fill_n(total_, columns, A(0));
    std::fill_n(sums_, whole_blocks(rows) * ld_, A(0));
    for (std::int64_t key = 0; key < position + rows; key += tile) {
      causal const mask{position - key, std::min(tile, position + rows - key)};
      load_tile(k, key, mask.keys, head_dim_, A(1), keys_);
      load_tile(v, key, mask.keys, head_dim_, A(1), values_);
      score_product<A>(columns, head_dim_, keys_, ld_, queries_, scores_, [&](std::int64_t i) {
        return range{0, mask.seen_by(i + block_lanes<A> - 1)};
      });
      for (std::int64_t i = 0; i < columns; i += V::lanes) add_keys(mask, i);
      weighted_rows<start::scaled_sum, true, A>(rows, ld_, scores_, values_, ld_, sums_, ld_, factor_,
                                                [&](std::int64_t i) {
                                                  return range{0, mask.seen_by(i + block_rows - 1)};
                                                });
    }
  }

  /// The results: rows of y, and lse where it is not null.
  template <class T>
  void write(std::int64_t rows, T* y, std::int64_t stride, A* lse) const {
    for (std::int64_t r = 0; r < rows; ++r) {
      rotate_row<false, A>(sums_ + r * ld_, head_dim_, nullptr, A(1) / total_[r], y + r * stride);
      if (lse) lse[r] = attention_math::running_softmax<A>{maximum_[r], total_[r]}.log_sum();
    }
  }

 private:
  /// Moves the softmax of one pack of queries, from i on, over the keys of a tile: scores become weights, and factor_
  /// tells what earlier sums are worth. Keys that a query does not see get weight zero.
  void add_keys(causal const& mask, std::int64_t i) {
    std::int64_t const all_see = mask.seen_by(i), any_sees = mask.seen_by(i + V::lanes - 1);
    V const limit = lane_numbers<V>() + V(mask.ahead + i);
    V const before = V::load(maximum_ + i);
    V top = before;
    for (std::int64_t j = 0; j < all_see; ++j) top = max(top, V::load(scores_ + j * tile + i));
    for (std::int64_t j = all_see; j < any_sees; ++j) {
      V const s = select(V(j) <= limit, V::load(scores_ + j * tile + i), V(-std::numeric_limits<A>::infinity()));
      s.store(scores_ + j * tile + i);
      top = max(top, s);
    }
    V const factor = attention_math::rescaling(before, top);
    V total = V::load(total_ + i) * factor;
    for (std::int64_t j = 0; j < any_sees; ++j) {
      V const weight = exp2(V::load(scores_ + j * tile + i) - top);
      total += weight;
      weight.store(scores_ + j * tile + i);
    }
    for (std::int64_t j = any_sees; j < mask.keys; ++j) V(0).store(scores_ + j * tile + i);
    top.store(maximum_ + i);
    total.store(total_ + i);
    factor.store(factor_ + i);
  }

  std::int64_t head_dim_, ld_;
  tile_memory<A> memory_;
  A *queries_, *keys_, *values_, *sums_, *scores_, *maximum_, *total_, *factor_;
};

/// d_q of a tile of queries: a sum over all keys that they see. Scores (keys, queries), as in forward_tile.
template <class A>
class query_gradient_tile {
  using V = simd::pack<A>;

 public:
  explicit query_gradient_tile(std::int64_t head_dim)
      : head_dim_(head_dim),
        ld_(whole_packs<A>(head_dim)),
        memory_(2 * head_dim * tile + 3 * tile * ld_ + 2 * tile * tile + 2 * tile),
        queries_(memory_.take(head_dim * tile)),
        d_y_(memory_.take(head_dim * tile)),
        keys_(memory_.take(tile * ld_)),
        values_(memory_.take(tile * ld_)),
        sums_(memory_.take(tile * ld_)),
        scores_(memory_.take(tile * tile)),
        d_scores_(memory_.take(tile * tile)),
        lse_(memory_.take(tile)),
        delta_(memory_.take(tile)) {}

  template <class T>
  void run(head_rows<T> const& q, head_rows<T> const& k, head_rows<T> const& v, head_rows<T> const& d_y, A const* lse,
           A const* delta, std::int64_t first, std::int64_t rows) {
    load_tile(q, first, rows, head_dim_, query_factor<A>(head_dim_), keys_);
    transpose_tile(keys_, rows, head_dim_, queries_);
    load_tile(d_y, first, rows, head_dim_, A(1), keys_);
    transpose_tile(keys_, rows, head_dim_, d_y_);
    std::int64_t const columns = whole_packs<A>(rows);
    for (std::int64_t i = 0; i < columns; ++i) {
      lse_[i] = i < rows ? lse[first + i] * static_cast<A>(attention_math::log2_e) : A(0);
      delta_[i] = i < rows ? delta[first + i] : A(0);
    }
    std::fill_n(sums_, whole_blocks(rows) * ld_, A(0));
    for (std::int64_t key = 0; key < first + rows; key += tile) {
      causal const mask{first - key, std::min(tile, first + rows - key)};
      load_tile(k, key, mask.keys, head_dim_, A(1), keys_);
      load_tile(v, key, mask.keys, head_dim_, A(1), values_);
      auto const wanted = [&](std::int64_t i) { return range{0, mask.seen_by(i + block_lanes<A> - 1)}; };
      score_product<A>(columns, head_dim_, keys_, ld_, queries_, scores_, wanted);
      score_product<A>(columns, head_dim_, values_, ld_, d_y_, d_scores_, wanted);
      for (std::int64_t i = 0; i < columns; i += V::lanes) {
        V const limit = lane_numbers<V>() + V(mask.ahead + i), lse_i = V::load(lse_ + i), delta_i = V::load(delta_ + i);
        std::int64_t const any_sees = mask.seen_by(i + V::lanes - 1);
        for (std::int64_t j = 0; j < any_sees; ++j) {
          V const weight = exp2(V::load(scores_ + j * tile + i) - lse_i);
          V const d_score = weight * (V::load(d_scores_ + j * tile + i) - delta_i);
          select(V(j) <= limit, d_score, V(0)).store(scores_ + j * tile + i);
        }
        for (std::int64_t j = any_sees; j < mask.keys; ++j) V(0).store(scores_ + j * tile + i);
      }
      weighted_rows<start::sum, true, A>(rows, ld_, scores_, keys_, ld_, sums_, ld_, nullptr, [&](std::int64_t i) {
        return range{0, mask.seen_by(i + block_rows - 1)};
      });
    }
  }

  /// The sums, rows of whole_packs(dh).
  A const* sums() const { return sums_; }

 private:
  std::int64_t head_dim_, ld_;
  tile_memory<A> memory_;
  A *queries_, *d_y_, *keys_, *values_, *sums_, *scores_, *d_scores_, *lse_, *delta_;
};

/// d_k and d_v of a tile of keys: sums over all queries that see them; where wanted, with what the keys give to d_q,
/// in the same arithmetic as in query_gradient_tile. Scores (queries, keys).
template <class A>
class key_gradient_tile {
  using V = simd::pack<A>;

 public:
  explicit key_gradient_tile(std::int64_t head_dim)
      : head_dim_(head_dim),
        ld_(whole_packs<A>(head_dim)),
        memory_(2 * head_dim * tile + 5 * tile * ld_ + 2 * tile * tile + tile),
        keys_(memory_.take(tile * ld_)),
        transposed_keys_(memory_.take(head_dim * tile)),
        transposed_values_(memory_.take(head_dim * tile)),
        queries_(memory_.take(tile * ld_)),
        d_y_(memory_.take(tile * ld_)),
        d_k_(memory_.take(tile * ld_)),
        d_v_(memory_.take(tile * ld_)),
        scores_(memory_.take(tile * tile)),
        d_scores_(memory_.take(tile * tile)),
        lse_(memory_.take(tile)) {}

  /// Starts on the keys [first, first + rows).
  template <class T>
  void begin(head_rows<T> const& k, head_rows<T> const& v, std::int64_t first, std::int64_t rows) {
    first_ = first;
    rows_ = rows;
    load_tile(v, first, rows, head_dim_, A(1), keys_);
    transpose_tile(keys_, rows, head_dim_, transposed_values_);
    load_tile(k, first, rows, head_dim_, A(1), keys_);
    transpose_tile(keys_, rows, head_dim_, transposed_keys_);
    std::fill_n(d_k_, whole_blocks(rows) * ld_, A(0));
    std::fill_n(d_v_, whole_blocks(rows) * ld_, A(0));
  }

  /// Adds what reaches the keys from the queries [query, query + count) of one head. Where d_q is not null, adds what
  /// reaches these queries: to rows of whole_packs(dh), as many as whole blocks have.
  template <class T>
  void add(head_rows<T> const& q, head_rows<T> const& d_y, A const* lse, A const* delta, std::int64_t query,
           std::int64_t count, A* d_q) {
    std::int64_t const columns = whole_packs<A>(rows_);
    causal const mask{query - first_, rows_};
    load_tile(q, query, count, head_dim_, query_factor<A>(head_dim_), queries_);
    load_tile(d_y, query, count, head_dim_, A(1), d_y_);
    for (std::int64_t i = 0; i < count; ++i) lse_[i] = lse[query + i] * static_cast<A>(attention_math::log2_e);
    auto const wanted = [&](std::int64_t j) { return range{mask.first_seeing(j), count}; };
    score_product<A>(columns, head_dim_, queries_, ld_, transposed_keys_, scores_, wanted);
    score_product<A>(columns, head_dim_, d_y_, ld_, transposed_values_, d_scores_, wanted);
    for (std::int64_t i = 0; i < count; ++i) {
      V const lse_i = lse_[i], delta_i = delta[query + i];
      for (std::int64_t j = 0; j < columns; j += V::lanes) {
        A *const score = scores_ + i * tile + j, *const d_score = d_scores_ + i * tile + j;
        if (j > mask.ahead + i) {
          V(0).store(score);
          V(0).store(d_score);
          continue;
        }
        auto const seen = lane_numbers<V>() <= V(mask.ahead + i - j);
        V const weight = select(seen, exp2(V::load(score) - lse_i), V(0));
        weight.store(score);
        select(seen, weight * (V::load(d_score) - delta_i), V(0)).store(d_score);
      }
    }
    weighted_rows<start::sum, true, A>(rows_, ld_, scores_, d_y_, ld_, d_v_, ld_, nullptr, wanted);
    weighted_rows<start::sum, true, A>(rows_, ld_, d_scores_, queries_, ld_, d_k_, ld_, nullptr, wanted);
    if (d_q)
      weighted_rows<start::sum, false, A>(count, ld_, d_scores_, keys_, ld_, d_q, ld_, nullptr, [&](std::int64_t i) {
        return range{0, mask.seen_by(i + block_rows - 1)};
      });
  }

  /// The tile's rows of d_k, turned back by the angles of k, and of d_v.
  template <class T>
  void write(A const* angles, T* d_k, std::int64_t d_k_stride, T* d_v, std::int64_t d_v_stride) const {
    for (std::int64_t r = 0; r < rows_; ++r) {
      rotate_row<true>(d_k_ + r * ld_, head_dim_, angles ? angles + (first_ + r) * head_dim_ : nullptr,
                       static_cast<A>(attention_math::ln_2), d_k + (first_ + r) * d_k_stride);
      rotate_row<false, A>(d_v_ + r * ld_, head_dim_, nullptr, A(1), d_v + (first_ + r) * d_v_stride);
    }
  }

 private:
  std::int64_t head_dim_, ld_, first_ = 0, rows_ = 0;
  tile_memory<A> memory_;
  A *keys_, *transposed_keys_, *transposed_values_, *queries_, *d_y_, *d_k_, *d_v_, *scores_, *d_scores_, *lse_;
};

/// Rows of d_q from their sums, rows of whole_packs(dh): scaled, and turned back by the angles of q (null: not turned).
template <class A, class T>
void write_query_gradient(A const* sums, std::int64_t rows, std::int64_t head_dim, A const* angles, T* d_q,
                          std::int64_t stride) {
  A const factor = static_cast<A>(1 / std::sqrt(static_cast<double>(head_dim)));
  for (std::int64_t r = 0; r < rows; ++r)
    rotate_row<true>(sums + r * whole_packs<A>(head_dim), head_dim, angles ? angles + r * head_dim : nullptr, factor,
                     d_q + r * stride);
}

/// One query of every head against a chunk of keys. The chunk's keys and values are read once, in the order in which
/// they lie in the cache: all heads of a position, then the next position. What a head gets is a partial sum: dh
/// weighted values, maximum, total.
template <class A>
class step_work {
  using V = simd::pack<A>;
  /// Positions that are worked on together, and packs of a row: what is loaded for one serves the others.
  static constexpr std::int64_t group = 8, packs = 4;
  template <std::int64_t N>
  using indices = std::make_integer_sequence<std::int64_t, N>;

 public:
  /// `share` query heads read one key/value head.
  step_work(std::int64_t heads, std::int64_t share, std::int64_t head_dim, std::int64_t chunk)
      : heads_(heads),
        share_(share),
        head_dim_(head_dim),
        ld_(whole_packs<A>(head_dim)),
        chunk_(whole_packs<A>(chunk)),
        memory_(heads * (2 * ld_ + chunk_)),
        queries_(memory_.take(heads * ld_)),
        sums_(memory_.take(heads * ld_)),
        scores_(memory_.take(heads * chunk_)) {}

  /// q (Hq, dh); k, v (keys, Hkv, dh); partial, one row of dh + 2 for each head.
  template <class T>
  void run(host_view<T const, dyn, dyn> q, A const* angles, host_view<T const, dyn, dyn, dyn> k,
           host_view<T const, dyn, dyn, dyn> v, host_view<A, dyn, dyn> partial) {
    std::int64_t const keys = k.extent(0);
    for (std::int64_t h = 0; h < heads_; ++h)
      rotate_row<false>(q.row(h), head_dim_, angles, query_factor<A>(head_dim_), queries_ + h * ld_);
    for (std::int64_t j = 0; j < keys; j += group)
      for (std::int64_t h = 0; h < heads_; ++h) {
        A const* const query = queries_ + h * ld_;
        A* const score = scores_ + h * chunk_ + j;
        if (j + group <= keys)
          dots(query, k.row(j, h / share_), k.stride(0), score, indices<group>{});
        else
          for (std::int64_t i = 0; j + i < keys; ++i)
            dots(query, k.row(j + i, h / share_), k.stride(0), score + i, indices<1>{});
      }
    for (std::int64_t h = 0; h < heads_; ++h) {
      auto const state = weigh(scores_ + h * chunk_, keys);
      partial(h, head_dim_) = state.maximum;
      partial(h, head_dim_ + 1) = state.sum;
    }
    std::fill_n(sums_, heads_ * ld_, A(0));
    for (std::int64_t j = 0; j < keys; j += group)
      for (std::int64_t h = 0; h < heads_; ++h)
        add_values(scores_ + h * chunk_ + j, v.row(j, h / share_), v.stride(0), std::min(group, keys - j),
                   sums_ + h * ld_);
    for (std::int64_t h = 0; h < heads_; ++h) std::copy_n(sums_ + h * ld_, head_dim_, partial.row(h));
  }

 private:
  /// Products of the query with one key for each index.
  template <class T, std::int64_t... I>
  void dots(A const* q, T const* k, std::int64_t stride, A* scores, std::integer_sequence<std::int64_t, I...>) const {
    V sum[] = {V((static_cast<void>(I), 0))...};
    simd::for_packs<V::lanes>(head_dim_, [&](std::int64_t d, auto lanes) {
      V const x = simd::load<V>(q + d, lanes);
      ((sum[I] = fma(x, simd::load<V>(k + I * stride + d, lanes), sum[I])), ...);
    });
    ((scores[I] = simd::sum(sum[I])), ...);
  }
  /// Scores become weights relative to their maximum.
  static attention_math::running_softmax<A> weigh(A* scores, std::int64_t keys) {
    V top = -std::numeric_limits<A>::infinity(), total = 0;
    std::fill(scores + keys, scores + whole_packs<A>(keys), -std::numeric_limits<A>::infinity());
    for (std::int64_t j = 0; j < keys; j += V::lanes) top = max(top, V::load(scores + j));
    A const maximum = simd::max_lane(top);
    for (std::int64_t j = 0; j < keys; j += V::lanes) {
      V const weight = exp2(V::load(scores + j) - V(maximum));
      total += weight;
      weight.store(scores + j);
    }
    return {maximum, simd::sum(total)};
  }
  /// sums += the weighted values of the given keys.
  template <class T>
  void add_values(A const* weights, T const* v, std::int64_t stride, std::int64_t keys, A* sums) const {
    std::int64_t d = 0;
    for (; d + packs * V::lanes <= head_dim_; d += packs * V::lanes)
      add_packs(weights, v + d, stride, keys, sums + d, indices<packs>{});
    simd::for_packs<V::lanes>(head_dim_ - d, [&](std::int64_t i, auto lanes) {
      V sum = V::load(sums + d + i);
      for (std::int64_t j = 0; j < keys; ++j)
        sum = fma(V(weights[j]), simd::load<V>(v + j * stride + d + i, lanes), sum);
      sum.store(sums + d + i);
    });
  }
  template <class T, std::int64_t... I>
  static void add_packs(A const* weights, T const* v, std::int64_t stride, std::int64_t keys, A* sums,
                        std::integer_sequence<std::int64_t, I...>) {
    V sum[] = {V::load(sums + I * V::lanes)...};
    for (std::int64_t j = 0; j < keys; ++j) {
      V const w = weights[j];
      ((sum[I] = fma(w, V::load(v + j * stride + I * V::lanes), sum[I])), ...);
    }
    (sum[I].store(sums + I * V::lanes), ...);
  }

  std::int64_t heads_, share_, head_dim_, ld_, chunk_;
  tile_memory<A> memory_;
  A *queries_, *sums_, *scores_;
};

/// y (dh) from the partial sums of `chunks` chunks, in order; a row of dh + 2 every `stride` elements.
template <class A, class T>
void combine_chunks(A const* partial, std::int64_t stride, std::int64_t chunks, std::int64_t head_dim, T* y) {
  using V = simd::pack<A>;
  A maximum = -std::numeric_limits<A>::infinity(), total = 0;
  for (std::int64_t c = 0; c < chunks; ++c) maximum = std::max(maximum, partial[c * stride + head_dim]);
  for (std::int64_t c = 0; c < chunks; ++c)
    total += partial[c * stride + head_dim + 1] * attention_math::rescaling(partial[c * stride + head_dim], maximum);
  simd::for_packs<V::lanes>(head_dim, [&](std::int64_t d, auto lanes) {
    V sum = 0;
    for (std::int64_t c = 0; c < chunks; ++c)
      sum = fma(V(attention_math::rescaling(partial[c * stride + head_dim], maximum)),
                simd::load<V>(partial + c * stride + d, lanes), sum);
    simd::store(sum / V(total), y + d, lanes);
  });
}

}  // namespace blackmamba::attention_tiles
