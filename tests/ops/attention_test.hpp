#include "support/attention_problem.hpp"

using namespace blackmamba;
using namespace test::attention_problem;

TEST_CASE_TEMPLATE("attention: equals its definition at every size and type", T, STORAGE_TYPES) {
  for (std::int64_t length : test::sizes({0, 1, 2, 17, 63, 64, 65, 130}))
    check_against_definition<T>(batch_of(2, length, 2, 1, 16));
  for (std::int64_t head_dim : test::sizes({2, 6, 30, 32, 64, 80, 96, 128, 254, 256}))
    check_against_definition<T>(batch_of(1, 67, 1, 1, head_dim));
  for (auto [heads, kv_heads] : {std::pair{3, 3}, {4, 2}, {6, 1}})
    check_against_definition<T>(batch_of(2, 33, heads, kv_heads, 10));
  check_against_definition<T>(batch_of(0, 7, 2, 1, 4));
  check_against_definition<T>(batch_of(1, 70, 2, 2, 8, 0));  // no rotary positions
  check_against_definition<T>(batch_of(1, 70, 2, 2, 8, 500000));
  check_against_definition<T>(packed_of({0, 1, 64, 0, 65, 3, 0}, 4, 2, 8));
  check_against_definition<T>(packed_of({}, 4, 2, 8));
}

TEST_CASE("attention: equals its definition on 10,000 random small problems, on a device on 1,000") {
  // There a problem takes as long as its memory does to come and go.
  std::uint64_t const problems = test::trials(std::is_same_v<test::test_space, space::device> ? 1000 : 10000);
  for (std::uint64_t trial = 0; trial < problems; ++trial) {
    std::uint64_t draw = 0;
    auto const pick = [&](std::int64_t low, std::int64_t high) {
      return test::random_integer(trial, draw++, low, high);
    };
    shape s;
    s.packed = pick(0, 1) == 1;
    std::int64_t const length = pick(0, 11);
    for (std::int64_t n = pick(0, 4); n > 0; --n) s.lengths.push_back(s.packed ? pick(0, 8) : length);
    if (trial % 50 == 0) s.lengths = {pick(60, 70)};
    s.kv_heads = pick(1, 3);
    s.heads = s.kv_heads * pick(1, 3);
    s.head_dim = 2 * pick(1, 20);
    s.base = pick(0, 3) == 0 ? 0 : 10000;
    check_against_definition<float>(s, 10 * trial);
  }
}

TEST_CASE("attention: gradients equal central differences") {
  for (shape const& s : {batch_of(2, 4, 2, 1, 4), packed_of({3, 0, 1, 3}, 4, 2, 4, 100), batch_of(1, 3, 1, 1, 2, 0)}) {
    auto const x = random_tensors(s);
    auto const d_y = test::random_normal(s.q_size(), 4);
    auto const g = run_backward<double>(s, x, run<double>(s, x), d_y);
    auto const loss = [&](tensors const& moved) { return test::weighted_sum(reference(s, moved).y, d_y); };
    test::check_gradient([&](test::values const& v) { return loss({v, x.k, x.v}); }, x.q, g.q, s.text() + ": d_q");
    test::check_gradient([&](test::values const& v) { return loss({x.q, v, x.v}); }, x.k, g.k, s.text() + ": d_k");
    test::check_gradient([&](test::values const& v) { return loss({x.q, x.k, v}); }, x.v, g.v, s.text() + ": d_v");
  }
}

TEST_CASE_TEMPLATE("attention: takes and gives slices of one projection", T, float, bfloat16) {
  auto const s = batch_of(2, 70, 4, 2, 6);
  std::int64_t const width = (s.heads + 2 * s.kv_heads) * s.head_dim, k_at = s.heads * s.head_dim;
  std::int64_t const v_at = k_at + s.kv_heads * s.head_dim;
  auto const x = rounded<T>(random_tensors(s));
  auto const d_y = test::rounded<T>(test::random_normal(s.q_size(), 4));
  test::values all;
  for (std::int64_t r = 0; r < s.tokens(); ++r)
    for (auto const* part : {&x.q, &x.k, &x.v}) {
      std::int64_t const w = static_cast<std::int64_t>(part->size()) / s.tokens();
      all.insert(all.end(), part->begin() + r * w, part->begin() + (r + 1) * w);
    }
  auto const qkv = test::upload<T>(all, s.batch(), s.length(), width);
  auto const q = heads_of(qkv, 0, s.heads, s.head_dim);
  auto const k = heads_of(qkv, k_at, s.kv_heads, s.head_dim), v = heads_of(qkv, v_at, s.kv_heads, s.head_dim);
  auto const wide = test::upload<T>(test::values(at(s.tokens() * (k_at + 3)), 7), s.batch(), s.length(), k_at + 3);
  auto const y = heads_of(wide, 3, s.heads, s.head_dim);
  auto lse = test::poisoned<accum_t<T>>(s.batch(), s.heads, s.length());
  attention::forward(make_policy(), {.q = q, .k = k, .v = v}, y, {.lse = lse});
  auto const expected = run<T>(s, x);
  auto const found = test::download(wide);
  for (std::int64_t r = 0; r < s.tokens(); ++r)
    for (std::int64_t i = 0; i < k_at + 3; ++i)
      REQUIRE(found[at(r * (k_at + 3) + i)] == (i < 3 ? 7.0 : expected.y[at(r * k_at + i - 3)]));

  auto const dy = upload_q<T>(s, d_y);
  auto d_qkv = test::poisoned<T>(s.batch(), s.length(), width);
  attention::backward<test_policy, T>(make_policy(), {.q = q, .k = k, .v = v, .y = y, .lse = lse, .d_y = dy},
                                      {.d_q = heads_of(d_qkv, 0, s.heads, s.head_dim),
                                       .d_k = heads_of(d_qkv, k_at, s.kv_heads, s.head_dim),
                                       .d_v = heads_of(d_qkv, v_at, s.kv_heads, s.head_dim)});
  auto const g = run_backward<T>(s, x, expected, d_y);
  auto const d_found = test::download(d_qkv);
  for (std::int64_t r = 0; r < s.tokens(); ++r)
    for (std::int64_t i = 0; i < width; ++i)
      REQUIRE(d_found[at(r * width + i)] == (i < k_at   ? g.q[at(r * k_at + i)]
                                             : i < v_at ? g.k[at(r * (v_at - k_at) + i - k_at)]
                                                        : g.v[at(r * (v_at - k_at) + i - v_at)]));
}

TEST_CASE_TEMPLATE("attention: packed sequences give the bits that each gives alone", T, float, double, half) {
  auto const s = packed_of({5, 0, 64, 1, 130, 33}, 4, 2, 20);
  auto const x = rounded<T>(random_tensors(s));
  auto const d_y = test::rounded<T>(test::random_normal(s.q_size(), 4));
  auto const together = run<T>(s, x);
  auto const g = run_backward<T>(s, x, together, d_y);
  for (std::int64_t n = 0; n < s.count(); ++n) {
    auto const alone_shape = one_of(s, n);
    auto const alone_x = one_of(x, s, n);
    auto const alone = run<T>(alone_shape, alone_x);
    test::check_equal(one_of(together.y, s, s.heads * s.head_dim, n), alone.y, "y");
    auto const alone_g = run_backward<T>(alone_shape, alone_x, alone, one_of(d_y, s, s.heads * s.head_dim, n));
    test::check_equal(one_of(g.q, s, s.heads * s.head_dim, n), alone_g.q, "d_q");
    test::check_equal(one_of(g.k, s, s.kv_heads * s.head_dim, n), alone_g.k, "d_k");
    test::check_equal(one_of(g.v, s, s.kv_heads * s.head_dim, n), alone_g.v, "d_v");
  }
}

TEST_CASE("attention: permuting the batch permutes the results") {
  auto const s = batch_of(3, 71, 4, 2, 12);
  auto const x = random_tensors(s);
  auto const rotate = [&](test::values v) {
    std::rotate(v.begin(), v.begin() + static_cast<std::int64_t>(v.size()) / 3, v.end());
    return v;
  };
  tensors const moved{rotate(x.q), rotate(x.k), rotate(x.v)};
  auto const d_y = test::random_normal(s.q_size(), 4);
  auto const straight = run<float>(s, x), permuted = run<float>(s, moved);
  test::check_equal(permuted.y, rotate(straight.y), "y");
  test::check_equal(permuted.lse, rotate(straight.lse), "lse");
  auto const g = run_backward<float>(s, x, straight, d_y), h = run_backward<float>(s, moved, permuted, rotate(d_y));
  test::check_equal(h.q, rotate(g.q), "d_q");
  test::check_equal(h.k, rotate(g.k), "d_k");
  test::check_equal(h.v, rotate(g.v), "d_v");
}

TEST_CASE("attention: the future does not touch the past") {
  auto const s = batch_of(1, 100, 2, 1, 16);
  auto x = random_tensors(s);
  auto const before = run<float>(s, x);
  std::int64_t const cut = 37;
  for (auto* part : {&x.q, &x.k, &x.v})
    for (std::size_t i = part->size() * at(cut) / 100; i < part->size(); ++i) (*part)[i] = 5 - (*part)[i];
  auto const after = run<float>(s, x);
  test::check_equal(rows_of(after.y, s, 32, 0, cut), rows_of(before.y, s, 32, 0, cut), "y");
  CHECK(rows_of(after.y, s, 32, cut, 1) != rows_of(before.y, s, 32, cut, 1));
  // No gradient flows to tokens behind those that the loss looks at.
  auto d_y = test::random_normal(s.q_size(), 4);
  std::fill(d_y.begin() + cut * 32, d_y.end(), 0.0);
  auto const g = run_backward<float>(s, x, after, d_y);
  for (auto const* part : {&g.q, &g.k, &g.v})
    for (std::size_t i = part->size() * at(cut) / 100; i < part->size(); ++i) REQUIRE((*part)[i] == 0);
}

TEST_CASE("attention: rotary positions enter scores by their difference alone") {
  // One token repeated: every score is that of its distance, so that without values' differences y is v.
  auto const s = batch_of(1, 200, 1, 1, 8);
  auto const one = random_tensors(with_length(s, 1));
  tensors x;
  for (std::int64_t i = 0; i < s.length(); ++i) {
    x.q.insert(x.q.end(), one.q.begin(), one.q.end());
    x.k.insert(x.k.end(), one.k.begin(), one.k.end());
    x.v.insert(x.v.end(), one.v.begin(), one.v.end());
  }
  auto const y = run<double>(s, x);
  test::check_close(y.y, x.v, 1e-14, "y");
  // exp(lse_i) - exp(lse_{i-1}) is the weight of the key at distance i from its query.
  auto const query = turned(one.q, 0, 8, 0, s.base);
  for (std::int64_t i = 1; i < s.length(); ++i) {
    double score = 0;
    auto const key = turned(one.k, 0, 8, -i, s.base);
    for (std::size_t d = 0; d < 8; ++d) score += query[d] * key[d];
    CHECK(std::exp(y.lse[at(i)]) - std::exp(y.lse[at(i - 1)]) ==
          doctest::Approx(std::exp(score / std::sqrt(8.0))).epsilon(1e-10));
  }
}

TEST_CASE_TEMPLATE("attention: survives scores of any size", T, float, double) {
  auto const s = batch_of(1, 80, 1, 1, 16);
  auto x = random_tensors(s);
  for (double size : {1e-4, 30.0, 1e4}) {
    auto big = x;
    for (auto& q : big.q) q *= size;
    big = rounded<T>(big);
    auto const expected = reference(s, big);
    auto const actual = run<T>(s, big);
    for (double y : actual.y) REQUIRE(std::isfinite(y));
    // A score is wrong by its own rounding: weights by that much, relatively.
    test::check_close(actual.y, expected.y, bound<T>(s) * std::max(1.0, 4 * size), "y");
    test::check_close(actual.lse, expected.lse, bound<T>(s), "lse");
  }
}

TEST_CASE_TEMPLATE("attention: a prompt in pieces gives the bits of the whole, and steps give the same results", T,
                   STORAGE_TYPES) {
  auto const s = batch_of(2, 150, 4, 2, 20);
  auto const x = rounded<T>(random_tensors(s));
  cache_tensors<T> whole(s, 160), pieces(s, 160), steps(s, 160);
  auto const y = prefill<T>(s, x, whole);
  test::check_close(y.y, reference(s, x).y, 8 * bound<T>(s), "y");  // keys are rounded once more, into the cache
  test::check_equal(test::download(whole.length), {150, 150}, "length");

  std::int64_t first = 0;
  for (std::int64_t count : {1, 70, 0, 9, 64, 6}) {
    auto const part = with_length(s, count);
    auto const part_y = prefill<T>(part, part_of(x, s, first, count), pieces);
    test::check_equal(part_y.y, rows_of(y.y, s, s.heads * s.head_dim, first, count), "y of a piece");
    first += count;
  }
  REQUIRE(first == s.length());
  auto const held = [&](tensor<test::test_space, T, dyn, dyn, dyn, dyn> const& c) {
    return rows_of(test::download(c), batch_of(2, 160, 0, 0, 0), s.kv_heads * s.head_dim, 0, s.length());
  };
  test::check_equal(held(pieces.key), held(whole.key), "keys");
  test::check_equal(held(pieces.value), held(whole.value), "values");
  test::check_equal(test::download(pieces.length), {150, 150}, "length");

  auto const one = with_length(s, 1);
  for (std::int64_t i = 0; i < s.length(); ++i) {
    auto const step_y = step<T>(one, part_of(x, s, i, 1), steps);
    test::check_close(step_y, rows_of(y.y, s, s.heads * s.head_dim, i, 1), 2 * bound<T>(s), "y of a step");
  }
  test::check_equal(held(steps.key), held(whole.key), "keys");
  test::check_equal(held(steps.value), held(whole.value), "values");
  test::check_equal(test::download(steps.length), {150, 150}, "length");
}

TEST_CASE("attention: steps of sequences of different lengths, over several chunks of the cache") {
  // Prompts are packed, with one row of the cache for each; then every sequence goes on by steps.
  std::vector<std::int64_t> const lengths{0, 300, 127, 128, 1};
  auto const all = packed_of({3, 303, 130, 131, 4}, 6, 2, 32);
  auto const x = random_tensors(all);
  auto const expected = reference(all, x).y;
  cache_tensors<float> cache(all, 303);
  auto const prompt = packed_of(lengths, 6, 2, 32);
  std::int64_t const q_width = 6 * 32, kv_width = 2 * 32;
  auto const select = [&](auto first, auto count) {  // rows [first(s), + count(s)) of each sequence
    tensors t;
    std::int64_t row = 0;
    for (std::size_t n = 0; n < lengths.size(); ++n) {
      auto const take = [&](test::values const& from, test::values& to, std::int64_t width) {
        to.insert(to.end(), from.begin() + (row + first(n)) * width,
                  from.begin() + (row + first(n) + count(n)) * width);
      };
      take(x.q, t.q, q_width);
      take(x.k, t.k, kv_width);
      take(x.v, t.v, kv_width);
      row += all.lengths[n];
    }
    return t;
  };
  prefill<float>(prompt, select([](auto) { return 0; }, [&](auto n) { return lengths[n]; }), cache);
  for (std::int64_t i = 0; i < 3; ++i) {
    auto const token = select([&](auto n) { return lengths[n] + i; }, [](auto) { return 1; });
    auto const y = step<float>(batch_of(5, 1, 6, 2, 32), token, cache);
    std::int64_t row = 0;
    for (std::size_t n = 0; n < lengths.size(); ++n) {
      auto const from = (row + lengths[n] + i) * q_width;
      test::check_close(
          {y.begin() + static_cast<std::int64_t>(n) * q_width, y.begin() + static_cast<std::int64_t>(n + 1) * q_width},
          {expected.begin() + from, expected.begin() + from + q_width}, bound<float>(all),
          "sequence " + std::to_string(n));
      row += all.lengths[n];
    }
  }
}

TEST_CASE_TEMPLATE("attention: steps at many head dimensions and shares of key/value heads", T, STORAGE_TYPES) {
  for (auto [heads, kv_heads, head_dim] :
       {std::array{6, 1, 64}, {12, 2, 80}, {3, 3, 128}, {5, 1, 256}, {8, 2, 96}, {2, 1, 30}, {16, 16, 32}}) {
    auto const s = batch_of(2, 131, heads, kv_heads, head_dim);
    auto const x = rounded<T>(random_tensors(s));
    auto const expected = rows_of(reference(s, x).y, s, s.heads * s.head_dim, 130, 1);
    test::values first;
    for (int run = 0; run < 2; ++run) {
      cache_tensors<T> cache(s, 140);
      prefill<T>(with_length(s, 130), part_of(x, s, 0, 130), cache);
      auto const y = step<T>(with_length(s, 1), part_of(x, s, 130, 1), cache);
      test::check_close(y, expected, 8 * bound<T>(s), s.text());
      if (run == 0) first = y;
      test::check_equal(y, first, "the same again");
    }
  }
}

TEST_CASE_TEMPLATE("attention: a step over caches from empty to long", T, STORAGE_TYPES) {
  std::vector<std::int64_t> const held{4999, 0, 63, 64, 65, 1000};
  std::int64_t const batch = 6, heads = 16, kv_heads = 8, head_dim = 16, capacity = 5000, share = heads / kv_heads;
  auto const values_of = [](std::int64_t n, std::uint64_t seed) {
    return test::rounded<T>(test::random_normal(n, seed));
  };
  auto const keys = values_of(batch * capacity * kv_heads * head_dim, 1),
             values = values_of(batch * capacity * kv_heads * head_dim, 2);
  auto const q = values_of(batch * heads * head_dim, 3), k = values_of(batch * kv_heads * head_dim, 4),
             v = values_of(batch * kv_heads * head_dim, 5);
  test::values expected(q.size());
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t h = 0; h < heads; ++h) {
      test::values score;
      auto const row = [&](test::values const& cache, test::values const& token, std::int64_t j) {
        std::int64_t const kv = h / share;
        return j < held[at(b)] ? &cache[at(((b * capacity + j) * kv_heads + kv) * head_dim)]
                               : &token[at((b * kv_heads + kv) * head_dim)];
      };
      for (std::int64_t j = 0; j <= held[at(b)]; ++j) {
        double dot = 0;
        for (std::int64_t d = 0; d < head_dim; ++d) dot += q[at((b * heads + h) * head_dim + d)] * row(keys, k, j)[d];
        score.push_back(std::exp(dot / 4));
      }
      double const total = std::accumulate(score.begin(), score.end(), 0.0);
      for (std::int64_t j = 0; j <= held[at(b)]; ++j)
        for (std::int64_t d = 0; d < head_dim; ++d)
          expected[at((b * heads + h) * head_dim + d)] += score[at(j)] / total * row(values, v, j)[d];
    }
  auto const key = test::upload<T>(keys, batch, capacity, kv_heads, head_dim);
  auto const value = test::upload<T>(values, batch, capacity, kv_heads, head_dim);
  auto const length = test::upload<std::int32_t>(test::values(held.begin(), held.end()), batch);
  auto const q_tensor = test::upload<T>(q, batch, heads, head_dim),
             k_tensor = test::upload<T>(k, batch, kv_heads, head_dim),
             v_tensor = test::upload<T>(v, batch, kv_heads, head_dim);
  auto y = test::poisoned<T>(batch, heads, head_dim);
  attention::step(make_policy(), {.q = q_tensor, .k = k_tensor, .v = v_tensor, .rotary_base = 0},
                  {.key = key, .value = value, .length = length}, y.as_view());
  test::check_close(test::download(y), expected, test::tolerance<T>(4 * 5000), "y");
  test::check_equal(test::download(length), {5000, 1, 64, 65, 66, 1001}, "length");
}

TEST_CASE_TEMPLATE("attention: slices of a projection, aligned for vectors or not", T, bfloat16, half) {
  // Wide heads: the paths that copy 16 bytes at a time, and those that cannot.
  for (std::int64_t shift : {0, 1, 8})
    for (std::int64_t head_dim : {32, 64, 128}) {
      auto const s = batch_of(1, 150, 2, 1, head_dim);
      std::int64_t const width = 4 * head_dim + shift;
      auto const x = rounded<T>(random_tensors(s));
      test::values all;
      for (std::int64_t r = 0; r < s.tokens(); ++r) {
        all.insert(all.end(), at(shift), 0.0);
        for (auto const* part : {&x.q, &x.k, &x.v}) {
          std::int64_t const w = static_cast<std::int64_t>(part->size()) / s.tokens();
          all.insert(all.end(), part->begin() + r * w, part->begin() + (r + 1) * w);
        }
      }
      auto const qkv = test::upload<T>(all, s.batch(), s.length(), width);
      auto const q = heads_of(qkv, shift, 2, head_dim), k = heads_of(qkv, shift + 2 * head_dim, 1, head_dim),
                 v = heads_of(qkv, shift + 3 * head_dim, 1, head_dim);
      auto y = test::poisoned<T>(1, 150, 2, head_dim);
      auto lse = test::poisoned<float>(1, 2, 150);
      attention::forward(make_policy(), {.q = q, .k = k, .v = v}, y, {.lse = lse});
      auto const expected = run<T>(s, x);
      test::check_equal(test::download(y), expected.y, "y");
      auto const d_y = test::rounded<T>(test::random_normal(s.q_size(), 4));
      auto const d_y_tensor = upload_q<T>(s, d_y);
      auto const d = test::poisoned<T>(s.batch(), s.length(), width);
      attention::backward<test_policy, T>(make_policy(),
                                          {.q = q, .k = k, .v = v, .y = y, .lse = lse, .d_y = d_y_tensor},
                                          {.d_q = heads_of(d, shift, 2, head_dim),
                                           .d_k = heads_of(d, shift + 2 * head_dim, 1, head_dim),
                                           .d_v = heads_of(d, shift + 3 * head_dim, 1, head_dim)});
      auto const g = run_backward<T>(s, x, expected, d_y);
      auto const found = test::download(d);
      for (std::int64_t r = 0; r < s.tokens(); ++r)
        for (std::int64_t i = 0; i < 4 * head_dim; ++i)
          REQUIRE(found[at(r * width + shift + i)] == (i < 2 * head_dim   ? g.q[at(r * 2 * head_dim + i)]
                                                       : i < 3 * head_dim ? g.k[at(r * head_dim + i - 2 * head_dim)]
                                                                          : g.v[at(r * head_dim + i - 3 * head_dim)]));
    }
}

template <class P>
void check_thread_counts() {
  if constexpr (requires(P p) { p.threads; })
    for (shape const& s :
         {batch_of(3, 200, 4, 4, 24), batch_of(1, 260, 2, 1, 40), packed_of({100, 3, 150}, 4, 2, 16)}) {
      auto const x = random_tensors(s);
      auto const d_y = test::random_normal(s.q_size(), 4);
      auto const forward = run<float>(s, x);
      auto const backward = run_backward<float>(s, x, forward, d_y);
      auto const first = with_length(batch_of(s.count(), 1, s.heads, s.kv_heads, s.head_dim), 1);
      auto const token = random_tensors(first, 9);
      test::values step_y;
      for (int threads : {1, 2, 5, 16}) {
        P policy = make_policy();
        policy.threads = threads;
        auto const again = run<float>(s, x, policy);
        test::check_equal(again.y, forward.y, "y");
        test::check_equal(again.lse, forward.lse, "lse");
        // With few threads backward goes over the scores once, with many twice.
        auto const g = run_backward<float>(s, x, forward, d_y, policy);
        test::check_equal(g.q, backward.q, "d_q");
        test::check_equal(g.k, backward.k, "d_k");
        test::check_equal(g.v, backward.v, "d_v");
        cache_tensors<float> cache(s, 300);
        test::check_equal(prefill<float>(s, x, cache, policy).y, forward.y, "y with a cache");
        auto const y = step<float>(first, token, cache, policy);
        if (threads == 1) step_y = y;
        test::check_equal(y, step_y, "step");
      }
    }
}
TEST_CASE("attention: the same bits for any number of threads") { check_thread_counts<test_policy>(); }

TEST_CASE("attention: scratch is what scratch_bytes says") {
  auto const s = packed_of({70, 3, 20}, 4, 2, 12);
  auto const x = random_tensors(s);
  auto const check = [&](std::size_t bytes, auto&& call) {
    arena<test::test_space> memory(bytes);
    test_policy policy = make_policy();
    policy.workspace = &memory;
    call(policy);
    CHECK(memory.peak() == bytes);
    CHECK(memory.used() == 0);
  };
  auto const y = run<float>(s, x);
  cache_tensors<float> cache(s, 300);
  check(attention::scratch_bytes<float, test::test_space>(1, 93, 2, 12, true, false),
        [&](test_policy const& p) { test::check_equal(run<float>(s, x, p).y, y.y, "y"); });
  check(attention::scratch_bytes<float, test::test_space>(1, 93, 2, 12, true, true),
        [&](test_policy const& p) { test::check_equal(prefill<float>(s, x, cache, p).y, y.y, "y"); });
  auto const g = run_backward<float>(s, x, y, x.q);
  check(attention::backward_scratch_bytes<float, test::test_space>(1, 93, 4, 2, 12, 3, true),
        [&](test_policy const& p) { test::check_equal(run_backward<float>(s, x, y, x.q, p).q, g.q, "d_q"); });
  auto const one = batch_of(3, 1, 4, 2, 12);
  check(attention::step_scratch_bytes<float, test::test_space>(3, 4, 2, 12, 300),
        [&](test_policy const& p) { CHECK(step<float>(one, random_tensors(one), cache, p).size() == 144); });
}

TEST_CASE("attention: shapes that disagree are named") {
  auto const q = test::upload<float>(test::values(48), 1, 3, 4, 4);
  auto const k = test::upload<float>(test::values(24), 1, 3, 2, 4);
  auto const odd = test::upload<float>(test::values(36), 1, 3, 3, 4);
  auto const k_long = test::upload<float>(test::values(32), 1, 4, 2, 4);
  auto y = test::poisoned<float>(1, 3, 4, 4);
  auto const message = [&](auto const& in, attention::results<test_policy, float> const& keep = {}) {
    return test::message_of<shape_error>([&] { attention::forward(make_policy(), in, y.as_view(), keep); });
  };
  using inputs = attention::inputs<test_policy, float>;
  CHECK(message(inputs{.q = k, .k = k, .v = k}) == "attention: q: got (1, 3, 2, 4), expected (1, 3, 4, 4)");
  CHECK(message(inputs{.q = q, .k = k_long, .v = k}) == "attention: k: got (1, 4, 2, 4), expected (1, 3, 2, 4)");
  CHECK(message(inputs{.q = q, .k = k, .v = k_long}) == "attention: v: got (1, 4, 2, 4), expected (1, 3, 2, 4)");
  CHECK(message(inputs{.q = q, .k = odd, .v = odd}) ==
        "attention: k: got 3 key/value heads, expected a divisor of the 4 query heads");
  auto const lse = test::poisoned<float>(1, 4, 2);
  CHECK(message(inputs{.q = q, .k = k, .v = k}, {.lse = lse}) == "attention: lse: got (1, 4, 2), expected (1, 4, 3)");
  auto const held = test::poisoned<float>(2, 9, 2, 4);
  auto const length = zeros<std::int32_t>(make_policy(), 2);
  CHECK(message(inputs{.q = q, .k = k, .v = k}, {.cache = {.key = held, .value = held, .length = length}}) ==
        "attention: cache.key: got (2, 9, 2, 4), expected (1, any, 2, 4)");
  auto const offsets = test::upload<std::int64_t>(test::values{0, 3}, 2);
  auto y2 = test::poisoned<float>(2, 3, 4, 4);
  auto const q2 = test::poisoned<float>(2, 3, 4, 4);
  CHECK(test::message_of<shape_error>([&] {
          attention::forward(make_policy(), {.q = q2, .k = q2, .v = q2, .cu_seqlens = offsets}, y2);
        }) == "attention: cu_seqlens: got a batch of 2 rows, expected one row of packed sequences");
  auto const none = test::upload<std::int64_t>(test::values{0}, 1);
  CHECK(message(inputs{.q = q, .k = k, .v = k, .cu_seqlens = none}, {}) ==
        "attention: cu_seqlens: got no sequences, expected some for 3 steps");
  auto y3 = test::poisoned<float>(1, 3, 4, 3);
  CHECK(test::message_of<shape_error>([&] { attention::forward(make_policy(), {.q = y3, .k = y3, .v = y3}, y3); }) ==
        "attention: head dimension: got 3, expected an even number from 2 to 256");
  auto d_q = test::poisoned<float>(1, 3, 4, 4);
  auto d_k = test::poisoned<float>(1, 3, 2, 4);
  CHECK(test::message_of<shape_error>([&] {
          attention::backward(make_policy(), {.q = q, .k = k, .v = k, .y = q, .lse = lse, .d_y = q},
                              {.d_q = d_q, .d_k = d_k, .d_v = d_k});
        }) == "attention.backward: lse: got (1, 4, 2), expected (1, 4, 3)");
  auto const step_k = test::poisoned<float>(2, 2, 4);
  auto step_y = test::poisoned<float>(2, 4, 4);
  CHECK(test::message_of<shape_error>([&] {
          attention::step(make_policy(), {.q = step_k, .k = step_k, .v = step_k},
                          {.key = held, .value = held, .length = length}, step_y);
        }) == "attention.step: q: got (2, 2, 4), expected (2, 4, 4)");
  CHECK(test::message_of<value_error>([&] {
          attention::forward(make_policy(), {.q = q, .k = k, .v = k, .rotary_base = -1}, y);
        }) == "attention: rotary_base: got -1.000000, expected a positive number, or 0 for none");
}

TEST_CASE_TEMPLATE("attention: no length passes the capacity, and no other sequence notices", T, float, bfloat16) {
  auto const prompt = packed_of({5, 66, 68, 70}, 4, 2, 16), more = packed_of({4, 4, 4, 4}, 4, 2, 16);
  auto const one = batch_of(4, 1, 4, 2, 16);
  auto const x = random_tensors(more, 7), token = random_tensors(one, 8);
  cache_tensors<T> roomy(prompt, 80), full(prompt, 70);
  for (auto const* cache : {&roomy, &full}) prefill<T>(prompt, random_tensors(prompt), *cache);
  auto const check_held = [&](std::array<std::int64_t, 4> const& lengths) {
    test::check_equal(test::download(full.length), test::values(lengths.begin(), lengths.end()), "length");
    for (std::int64_t s = 0; s < 4; ++s)
      for (auto part : {&cache_tensors<T>::key, &cache_tensors<T>::value}) {
        auto const held = [&](cache_tensors<T> const& cache) {
          auto const all = test::download(cache.*part);
          auto const begin = all.begin() + s * cache.key.extent(1) * 2 * 16;
          return test::values(begin, begin + lengths[at(s)] * 2 * 16);
        };
        test::check_equal(held(full), held(roomy), "keys and values");
      }
  };
  if constexpr (std::is_same_v<test_policy, device::cpu>) {
    CHECK_THROWS_AS(prefill<T>(more, x, full), value_error);
    CHECK_THROWS_AS(step<T>(one, token, full), value_error);
    check_held({5, 66, 68, 70});
  } else {  // the third sequence's last two tokens, and the fourth's, are dropped
    auto const first = [](test::values v, std::int64_t count) {
      v.resize(at(count * 4 * 16));
      return v;
    };
    test::check_equal(first(prefill<T>(more, x, full).y, 10), first(prefill<T>(more, x, roomy).y, 10), "y");
    check_held({9, 70, 70, 70});
    test::check_equal(first(step<T>(one, token, full), 1), first(step<T>(one, token, roomy), 1), "y of a step");
    check_held({10, 70, 70, 70});
  }
}

// What lies in the policy's memory is looked at where that is the host's.
TEST_CASE("attention: values that make no sense are named") {
  if constexpr (std::is_same_v<test_policy, device::cpu>) {
    auto const s = batch_of(2, 3, 2, 1, 4);
    auto const x = random_tensors(s);
    cache_tensors<float> cache(s, 7);
    prefill<float>(s, x, cache);
    prefill<float>(s, x, cache);
    auto const keys = test::download(cache.length);
    CHECK(test::message_of<value_error>([&] { prefill<float>(s, x, cache); }) ==
          "attention: cache: sequence 0 holds 6 tokens and gets 3, which exceeds the capacity 7");
    test::check_equal(test::download(cache.length), {6, 6}, "length");
    auto const one = with_length(s, 1);
    step<float>(one, part_of(x, s, 0, 1), cache);
    CHECK(test::message_of<value_error>([&] { step<float>(one, part_of(x, s, 0, 1), cache); }) ==
          "attention.step: cache: sequence 0 holds 7 tokens and gets 1, which exceeds the capacity 7");
    test::check_equal(test::download(cache.length), {7, 7}, "length");

    auto const q = test::upload<float>(test::values(12), 1, 3, 2, 2);
    auto y = test::poisoned<float>(1, 3, 2, 2);
    for (auto const& [offsets, at_index] : {std::pair{test::values{1, 3}, "1 at index 0"},
                                            {{0, 2}, "2 at index 1"},
                                            {{0, 2, 1, 3}, "1 at index 2"},
                                            {{0, 4, 3}, "3 at index 2"}}) {
      auto const cu = test::upload<std::int64_t>(offsets, static_cast<std::int64_t>(offsets.size()));
      CHECK(test::message_of<value_error>([&] {
              attention::forward(make_policy(), {.q = q, .k = q, .v = q, .cu_seqlens = cu}, y);
            }) == std::string("attention: cu_seqlens: got ") + at_index + ", expected offsets that rise from 0 to 3");
    }
  }
}
