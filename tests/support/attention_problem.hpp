#pragma once
#include "support/support.hpp"

#include <blackmamba/ops/attention/attention.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>

/// Problems for the attention operator: shapes and values, the definition in double, and the operator run on them.
namespace test::attention_problem {

using namespace blackmamba;

/// A problem: sizes, and the lengths of the sequences (one for each row of the batch, unless packed into one row).
struct shape {
  std::vector<std::int64_t> lengths;
  std::int64_t heads = 1, kv_heads = 1, head_dim = 2;
  double base = 10000;
  bool packed = false;

  std::int64_t tokens() const { return std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0}); }
  std::int64_t count() const { return static_cast<std::int64_t>(lengths.size()); }
  std::int64_t batch() const { return packed ? 1 : count(); }
  std::int64_t length() const { return packed ? tokens() : lengths.empty() ? 0 : lengths[0]; }
  std::int64_t q_size() const { return tokens() * heads * head_dim; }
  std::int64_t kv_size() const { return tokens() * kv_heads * head_dim; }
  std::vector<double> offsets() const {
    std::vector<double> o{0};
    for (auto n : lengths) o.push_back(o.back() + static_cast<double>(n));
    return o;
  }
  std::string text() const {
    std::string t = packed ? "packed" : "batch";
    for (auto n : lengths) t.append(" ").append(std::to_string(n));
    return t + ", heads " + std::to_string(heads) + "/" + std::to_string(kv_heads) + ", head dimension " +
           std::to_string(head_dim);
  }
};

/// Rows of the batch that are all equally long.
inline shape batch_of(std::int64_t batch, std::int64_t length, std::int64_t heads, std::int64_t kv_heads,
                      std::int64_t head_dim, double base = 10000) {
  return {std::vector<std::int64_t>(static_cast<std::size_t>(batch), length), heads, kv_heads, head_dim, base};
}
inline shape packed_of(std::vector<std::int64_t> lengths, std::int64_t heads, std::int64_t kv_heads,
                       std::int64_t head_dim, double base = 10000) {
  return {std::move(lengths), heads, kv_heads, head_dim, base, true};
}

inline std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }
inline float float_base(shape const& s) { return static_cast<float>(s.base); }

struct tensors {
  test::values q, k, v;
};
inline tensors random_tensors(shape const& s, std::uint64_t seed = 1) {
  return {test::random_normal(s.q_size(), seed), test::random_normal(s.kv_size(), seed + 1),
          test::random_normal(s.kv_size(), seed + 2)};
}
template <class T>
tensors rounded(tensors const& x) {
  return {test::rounded<T>(x.q), test::rounded<T>(x.k), test::rounded<T>(x.v)};
}

/// One head's row turned to its position, by complex multiplication.
inline test::values turned(test::values const& x, std::int64_t row, std::int64_t head_dim, std::int64_t position,
                           double base) {
  test::values r(x.begin() + row * head_dim, x.begin() + (row + 1) * head_dim);
  std::int64_t const half = head_dim / 2;
  for (std::int64_t m = 0; base != 0 && m < half; ++m) {
    double const angle =
        static_cast<double>(position) * std::pow(base, -2.0 * static_cast<double>(m) / static_cast<double>(head_dim));
    double const a = r[at(m)], b = r[at(m + half)];
    r[at(m)] = a * std::cos(angle) - b * std::sin(angle);
    r[at(m + half)] = a * std::sin(angle) + b * std::cos(angle);
  }
  return r;
}

struct result {
  test::values y, lse;
};

/// The definition, in double. lse in the operator's order (B, Hq, L).
inline result reference(shape const& s, tensors const& x) {
  result r{test::values(x.q.size()), test::values(at(s.tokens() * s.heads))};
  std::int64_t first = 0;
  double const scale = 1 / std::sqrt(static_cast<double>(s.head_dim));
  for (std::size_t n = 0; n < s.lengths.size(); ++n) {
    for (std::int64_t h = 0; h < s.heads; ++h) {
      std::int64_t const kv = h * s.kv_heads / s.heads;
      std::vector<test::values> keys;
      for (std::int64_t i = 0; i < s.lengths[n]; ++i) {
        keys.push_back(turned(x.k, (first + i) * s.kv_heads + kv, s.head_dim, i, s.base));
        auto const query = turned(x.q, (first + i) * s.heads + h, s.head_dim, i, s.base);
        test::values score;
        for (auto const& key : keys) {
          double dot = 0;
          for (std::int64_t d = 0; d < s.head_dim; ++d) dot += query[at(d)] * key[at(d)];
          score.push_back(dot * scale);
        }
        double const top = *std::max_element(score.begin(), score.end());
        double total = 0;
        for (double e : score) total += std::exp(e - top);
        for (std::int64_t j = 0; j <= i; ++j) {
          double const p = std::exp(score[at(j)] - top) / total;
          for (std::int64_t d = 0; d < s.head_dim; ++d)
            r.y[at(((first + i) * s.heads + h) * s.head_dim + d)] +=
                p * x.v[at(((first + j) * s.kv_heads + kv) * s.head_dim + d)];
        }
        auto const row =
            s.packed ? h * s.length() + first + i : (static_cast<std::int64_t>(n) * s.heads + h) * s.length() + i;
        r.lse[at(row)] = top + std::log(total);
      }
    }
    first += s.lengths[n];
  }
  return r;
}

template <class T>
auto upload_q(shape const& s, test::values const& q) {
  return test::upload<T>(q, s.batch(), s.length(), s.heads, s.head_dim);
}
template <class T>
auto upload_kv(shape const& s, test::values const& k) {
  return test::upload<T>(k, s.batch(), s.length(), s.kv_heads, s.head_dim);
}
inline auto upload_offsets(shape const& s) { return test::upload<std::int64_t>(s.offsets(), s.count() + 1); }
template <class Tensor>
in<test_policy, std::int64_t, dyn> offsets_of(shape const& s, Tensor const& offsets) {
  if (s.packed) return offsets;
  return {};
}

template <class T>
result run(shape const& s, tensors const& x, test_policy policy = make_policy()) {
  auto const q = upload_q<T>(s, x.q);
  auto const k = upload_kv<T>(s, x.k), v = upload_kv<T>(s, x.v);
  auto const offsets = upload_offsets(s);
  auto y = test::poisoned<T>(s.batch(), s.length(), s.heads, s.head_dim);
  auto lse = test::poisoned<accum_t<T>>(s.batch(), s.heads, s.length());
  attention::forward(policy,
                     {.q = q, .k = k, .v = v, .cu_seqlens = offsets_of(s, offsets), .rotary_base = float_base(s)}, y,
                     {.lse = lse});
  return {test::download(y), test::download(lse)};
}

template <class T>
tensors run_backward(shape const& s, tensors const& x, result const& forward, test::values const& d_y,
                     test_policy policy = make_policy()) {
  auto const q = upload_q<T>(s, x.q), y = upload_q<T>(s, forward.y), dy = upload_q<T>(s, d_y);
  auto const k = upload_kv<T>(s, x.k), v = upload_kv<T>(s, x.v);
  auto const lse = test::upload<accum_t<T>>(forward.lse, s.batch(), s.heads, s.length());
  auto const offsets = upload_offsets(s);
  auto d_q = test::poisoned<T>(s.batch(), s.length(), s.heads, s.head_dim);
  auto d_k = test::poisoned<T>(s.batch(), s.length(), s.kv_heads, s.head_dim);
  auto d_v = test::poisoned<T>(s.batch(), s.length(), s.kv_heads, s.head_dim);
  attention::backward<test_policy, T>(policy,
                                      {.q = q,
                                       .k = k,
                                       .v = v,
                                       .y = y,
                                       .lse = lse,
                                       .d_y = dy,
                                       .cu_seqlens = offsets_of(s, offsets),
                                       .rotary_base = float_base(s)},
                                      {.d_q = d_q, .d_k = d_k, .d_v = d_v});
  return {test::download(d_q), test::download(d_k), test::download(d_v)};
}

/// The gradients' definition, in double; forward.lse in the operator's order.
inline tensors reference_gradients(shape const& s, tensors const& x, result const& forward, test::values const& d_y) {
  tensors g{test::values(x.q.size()), test::values(x.k.size()), test::values(x.v.size())};
  double const scale = 1 / std::sqrt(static_cast<double>(s.head_dim));
  std::int64_t first = 0;
  for (std::size_t n = 0; n < s.lengths.size(); ++n) {
    for (std::int64_t h = 0; h < s.heads; ++h) {
      std::int64_t const kv = h * s.kv_heads / s.heads;
      std::vector<test::values> d_key(at(s.lengths[n]), test::values(at(s.head_dim)));
      for (std::int64_t i = 0; i < s.lengths[n]; ++i) {
        std::int64_t const q_row = (first + i) * s.heads + h;
        auto const query = turned(x.q, q_row, s.head_dim, i, s.base);
        test::values d_query(at(s.head_dim));
        auto const lse = forward.lse[at(s.packed ? h * s.length() + first + i
                                                 : (static_cast<std::int64_t>(n) * s.heads + h) * s.length() + i)];
        double delta = 0;
        for (std::int64_t d = 0; d < s.head_dim; ++d)
          delta += d_y[at(q_row * s.head_dim + d)] * forward.y[at(q_row * s.head_dim + d)];
        for (std::int64_t j = 0; j <= i; ++j) {
          std::int64_t const kv_row = (first + j) * s.kv_heads + kv;
          auto const key = turned(x.k, kv_row, s.head_dim, j, s.base);
          double dot = 0, d_p = 0;
          for (std::int64_t d = 0; d < s.head_dim; ++d) {
            dot += query[at(d)] * key[at(d)];
            d_p += d_y[at(q_row * s.head_dim + d)] * x.v[at(kv_row * s.head_dim + d)];
          }
          double const p = std::exp(dot * scale - lse), d_s = p * (d_p - delta) * scale;
          for (std::int64_t d = 0; d < s.head_dim; ++d) {
            g.v[at(kv_row * s.head_dim + d)] += p * d_y[at(q_row * s.head_dim + d)];
            d_query[at(d)] += d_s * key[at(d)];
            d_key[at(j)][at(d)] += d_s * query[at(d)];
          }
        }
        auto const back = turned(d_query, 0, s.head_dim, -i, s.base);
        for (std::int64_t d = 0; d < s.head_dim; ++d) g.q[at(q_row * s.head_dim + d)] = back[at(d)];
      }
      for (std::int64_t j = 0; j < s.lengths[n]; ++j) {
        auto const back = turned(d_key[at(j)], 0, s.head_dim, -j, s.base);
        for (std::int64_t d = 0; d < s.head_dim; ++d)
          g.k[at(((first + j) * s.kv_heads + kv) * s.head_dim + d)] += back[at(d)];
      }
    }
    first += s.lengths[n];
  }
  return g;
}

/// The rounding of operands where products take them in T (16-bit types on a device); 0 elsewhere.
template <class T>
constexpr double operand_rounding() {
  bool const rounded = std::is_same_v<test::test_space, space::device> && sizeof(T) == 2;
  return rounded ? test::unit_roundoff<T>() / 2 : 0;
}
/// Bound for a result of attention over up to `keys` keys. A score of size sqrt(dh) may be off by its rounding, and
/// weights follow it; inputs are of order one.
///
/// Rounded operands: with u = operand_rounding, a score sums dh products / sqrt(dh) whose two rotated factors are each
/// off by up to u, at random: its error has spread sqrt(2/3) u, and is below 4 u. A weight is off by that, by its
/// shift's (lse) and by its own rounding, u; a result adds up weights that are one in sum: 6 u covers them.
template <class T>
double bound(shape const& s) {
  std::int64_t longest = 1;
  for (auto n : s.lengths) longest = std::max(longest, n);
  return test::tolerance<T>(4 * (longest + s.head_dim)) + 6 * operand_rounding<T>();
}
template <class T>
double lse_bound(shape const& s) {
  return bound<accum_t<T>>(s) + 4 * operand_rounding<T>();
}

/// As check_close, where errors count against a size of at least one: gradients of order one may cancel, even to zero,
/// and so may the score of a single key, its lse.
inline void check_close_at_one(test::values actual, test::values expected, double tolerance, std::string const& what) {
  actual.push_back(1);
  expected.push_back(1);
  test::check_close(actual, expected, tolerance, what);
}

template <class T>
void check_against_definition(shape const& s, std::uint64_t seed = 1) {
  auto const x = rounded<T>(random_tensors(s, seed));
  auto const d_y = test::rounded<T>(test::random_normal(s.q_size(), seed + 3));
  auto const expected = reference(s, x);
  auto const actual = run<T>(s, x);
  test::check_close(actual.y, expected.y, bound<T>(s), s.text() + ": y");
  check_close_at_one(actual.lse, expected.lse, lse_bound<T>(s), s.text() + ": lse");
  // The definition of the gradients gets what forward really returned, rounding of y included.
  auto const d_expected = reference_gradients(s, x, actual, d_y);
  auto const d_actual = run_backward<T>(s, x, actual, d_y);
  check_close_at_one(d_actual.v, d_expected.v, 4 * bound<T>(s), s.text() + ": d_v");
  check_close_at_one(d_actual.q, d_expected.q, 4 * bound<T>(s), s.text() + ": d_q");
  check_close_at_one(d_actual.k, d_expected.k, 4 * bound<T>(s), s.text() + ": d_k");
}

/// The cache of a problem's sequences, each with room for `capacity` tokens.
template <class T>
struct cache_tensors {
  tensor<test::test_space, T, dyn, dyn, dyn, dyn> key, value;
  tensor<test::test_space, std::int32_t, dyn> length;

  cache_tensors(shape const& s, std::int64_t capacity)
      : key(test::poisoned<T>(s.count(), capacity, s.kv_heads, s.head_dim)),
        value(test::poisoned<T>(s.count(), capacity, s.kv_heads, s.head_dim)),
        length(zeros<std::int32_t>(make_policy(), s.count())) {}
  operator attention::cache<test_policy, T>() const { return {.key = key, .value = value, .length = length}; }
};

/// Forward with a cache; x are the tokens that are new.
template <class T>
result prefill(shape const& s, tensors const& x, cache_tensors<T> const& cache, test_policy policy = make_policy()) {
  auto const q = upload_q<T>(s, x.q);
  auto const k = upload_kv<T>(s, x.k), v = upload_kv<T>(s, x.v);
  auto const offsets = upload_offsets(s);
  auto y = test::poisoned<T>(s.batch(), s.length(), s.heads, s.head_dim);
  auto lse = test::poisoned<accum_t<T>>(s.batch(), s.heads, s.length());
  attention::forward(policy,
                     {.q = q, .k = k, .v = v, .cu_seqlens = offsets_of(s, offsets), .rotary_base = float_base(s)}, y,
                     {.lse = lse, .cache = cache});
  return {test::download(y), test::download(lse)};
}

/// One token for each sequence; x is that token, s.lengths are 1.
template <class T>
test::values step(shape const& s, tensors const& x, cache_tensors<T> const& cache, test_policy policy = make_policy()) {
  auto const q = test::upload<T>(x.q, s.count(), s.heads, s.head_dim);
  auto const k = test::upload<T>(x.k, s.count(), s.kv_heads, s.head_dim);
  auto const v = test::upload<T>(x.v, s.count(), s.kv_heads, s.head_dim);
  auto y = test::poisoned<T>(s.count(), s.heads, s.head_dim);
  attention::step(policy, {.q = q, .k = k, .v = v, .rotary_base = float_base(s)},
                  attention::cache<test_policy, T>(cache), y);
  return test::download(y);
}

/// Rows [first, first + count) of each sequence of a batch, from values (B, L, width).
inline test::values rows_of(test::values const& x, shape const& s, std::int64_t width, std::int64_t first,
                            std::int64_t count) {
  test::values r;
  for (std::int64_t b = 0; b < s.batch(); ++b)
    for (std::int64_t i = (b * s.length() + first) * width; i < (b * s.length() + first + count) * width; ++i)
      r.push_back(x[at(i)]);
  return r;
}
/// The same part of queries, keys and values.
inline tensors part_of(tensors const& x, shape const& s, std::int64_t first, std::int64_t count) {
  return {rows_of(x.q, s, s.heads * s.head_dim, first, count), rows_of(x.k, s, s.kv_heads * s.head_dim, first, count),
          rows_of(x.v, s, s.kv_heads * s.head_dim, first, count)};
}
inline shape with_length(shape s, std::int64_t length) {
  for (auto& n : s.lengths) n = length;
  return s;
}
/// One sequence of a packed problem, as a batch of one; and its values.
inline shape one_of(shape s, std::int64_t sequence) {
  s.lengths = {s.lengths[at(sequence)]};
  s.packed = false;
  return s;
}
inline test::values one_of(test::values const& x, shape const& s, std::int64_t width, std::int64_t sequence) {
  auto const first = std::accumulate(s.lengths.begin(), s.lengths.begin() + sequence, std::int64_t{0});
  return {x.begin() + first * width, x.begin() + (first + s.lengths[at(sequence)]) * width};
}
inline tensors one_of(tensors const& x, shape const& s, std::int64_t sequence) {
  return {one_of(x.q, s, s.heads * s.head_dim, sequence), one_of(x.k, s, s.kv_heads * s.head_dim, sequence),
          one_of(x.v, s, s.kv_heads * s.head_dim, sequence)};
}

/// A slice of a (B, L, width) tensor as heads (B, L, heads, dh).
template <class Tensor>
auto heads_of(Tensor const& x, std::int64_t first, std::int64_t heads, std::int64_t head_dim) {
  using T = typename Tensor::element_type;
  return view<test::test_space, T, dyn, dyn, dyn, dyn>(x.data() + first, {x.extent(0), x.extent(1), heads, head_dim},
                                                       {x.stride(0), x.stride(1), head_dim, 1});
}

}  // namespace test::attention_problem
