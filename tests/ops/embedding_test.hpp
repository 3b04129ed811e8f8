#include "support/support.hpp"

#include <blackmamba/ops/embedding/embedding.hpp>

#include <map>

using namespace blackmamba;

namespace {

test::values random_tokens(std::int64_t n, std::int64_t vocabulary, std::uint64_t seed = 1) {
  test::values v;
  for (std::int64_t i = 0; i < n; ++i)
    v.push_back(static_cast<double>(test::random_integer(seed, static_cast<std::uint64_t>(i), 0, vocabulary - 1)));
  return v;
}
std::size_t row_of(double token) { return static_cast<std::size_t>(token); }

template <class T>
test::values run(test::values const& token, test::values const& table, std::int64_t vocabulary, std::int64_t width,
                 test_policy policy = make_policy()) {
  auto const rows = static_cast<std::int64_t>(token.size());
  auto const t = test::upload<std::int32_t>(token, rows);
  auto const weights = test::upload<T>(table, vocabulary, width);
  auto y = test::poisoned<T>(rows, width);
  embedding::forward(policy, t, weights, y.as_view());
  return test::download(y);
}
template <class T>
test::values run_backward(test::values const& token, test::values const& d_y, test::values const& d_table,
                          std::int64_t vocabulary, std::int64_t width, test_policy policy = make_policy()) {
  auto const rows = static_cast<std::int64_t>(token.size());
  auto const t = test::upload<std::int32_t>(token, rows);
  auto const dy = test::upload<T>(d_y, rows, width);
  auto const d = test::upload<accum_t<T>>(d_table, vocabulary, width);
  embedding::backward<test_policy, T>(policy, t, dy, d);
  return test::download(d);
}
/// The definition, in A: what backward must give to the last bit.
template <class A>
test::values reference_backward(test::values const& token, test::values const& d_y, test::values d_table,
                                std::int64_t width) {
  auto const w = static_cast<std::size_t>(width);
  std::map<double, std::vector<std::size_t>> rows;
  for (std::size_t r = 0; r < token.size(); ++r) rows[token[r]].push_back(r);
  for (auto const& [v, of] : rows)
    for (std::size_t i = 0; i < w; ++i) {
      std::size_t const runs = std::max<std::size_t>(1, of.size() / 64);
      A sum = 0, group = 0;
      for (std::size_t run = 0; run < runs; ++run) {
        A rows_of_run = 0;
        for (std::size_t k = 64 * run; k < (run + 1 < runs ? 64 * (run + 1) : of.size()); ++k)
          rows_of_run += static_cast<A>(d_y[of[k] * w + i]);
        group += rows_of_run;
        if (run + 1 == runs || run % 32 == 31) {
          sum += group;
          group = 0;
        }
      }
      auto& d = d_table[row_of(v) * w + i];
      d = static_cast<double>(static_cast<A>(d) + sum);
    }
  return d_table;
}

}  // namespace

TEST_CASE_TEMPLATE("embedding: rows of the table, and sums into it in the order of the definition", T, STORAGE_TYPES) {
  using A = accum_t<T>;
  for (std::int64_t rows : test::sizes({0, 1, 7, 300}))
    for (std::int64_t width : test::sizes({0, 1, 16, 65, 130}))
      for (std::int64_t vocabulary : {1, 3, 1000}) {
        auto const token = random_tokens(rows, vocabulary);
        auto const table = test::rounded<T>(test::random_normal(vocabulary * width, 2));
        auto const y = run<T>(token, table, vocabulary, width);
        test::values expected;
        for (double t : token)
          for (std::size_t i = 0; i < static_cast<std::size_t>(width); ++i)
            expected.push_back(table[row_of(t) * static_cast<std::size_t>(width) + i]);
        test::check_equal(y, expected, "y");

        auto const d_y = test::rounded<T>(test::random_normal(rows * width, 3));
        auto const before = test::rounded<A>(test::random_normal(vocabulary * width, 4));
        test::check_equal(run_backward<T>(token, d_y, before, vocabulary, width),
                          reference_backward<A>(token, d_y, before, width), "d_table");
      }
}
// Of one run, of several (the last of 64 to 127 rows), of a whole group and one run more, of several groups.
TEST_CASE_TEMPLATE("embedding: many positions of one token, with others before and after", T, STORAGE_TYPES) {
  using A = accum_t<T>;
  for (auto [rows, width] : test::sizes<std::pair<std::int64_t, std::int64_t>>({{65, 8},
                                                                                {66, 70},
                                                                                {129, 136},
                                                                                {130, 70},
                                                                                {255, 70},
                                                                                {257, 72},
                                                                                {1000, 264},
                                                                                {2050, 8},
                                                                                {2177, 72},
                                                                                {2178, 8},
                                                                                {10000, 40},
                                                                                {4200, 5}})) {
    auto token = test::values(static_cast<std::size_t>(rows), 2.0);
    token.front() = 0;
    token.back() = 4;
    auto const d_y = test::rounded<T>(test::random_normal(rows * width, 1));
    auto const before = test::values(static_cast<std::size_t>(5 * width), 0.5);
    test::check_equal(run_backward<T>(token, d_y, before, 5, width), reference_backward<A>(token, d_y, before, width),
                      "d_table");
  }
}
// Numbers of rows and tokens for which the sort is divided differently.
TEST_CASE("embedding: tokens of which a few occur very often") {
  for (auto [rows, vocabulary] : test::sizes<std::pair<std::int64_t, std::int64_t>>(
           {{20000, 7}, {4096, 256}, {17001, 256}, {16384, 6144}, {16385, 6145}, {9000, 24577}})) {
    std::int64_t const width = 8;
    auto token = random_tokens(rows, vocabulary, 9);
    for (std::size_t i = 0; i < token.size(); ++i) token[i] = std::floor(token[i] / static_cast<double>(1 + i % 50));
    auto const d_y = test::rounded<bfloat16>(test::random_normal(rows * width, 1));
    auto const before = test::rounded<float>(test::random_normal(vocabulary * width, 2));
    auto const once = run_backward<bfloat16>(token, d_y, before, vocabulary, width);
    test::check_equal(once, reference_backward<float>(token, d_y, before, width), "d_table");
    if (test::trials_percent() < 10) continue;
    test::check_equal(run_backward<bfloat16>(token, d_y, before, vocabulary, width), once, "d_table again");
  }
}
TEST_CASE_TEMPLATE("embedding: tokens that occur seldom, often and in runs, of bytes and of words", T, float,
                   bfloat16) {
  using A = accum_t<T>;
  std::int64_t const rows = 6000;
  for (auto [vocabulary, width] :
       test::sizes<std::pair<std::int64_t, std::int64_t>>({{256, 136}, {256, 33}, {50304, 8}, {70000, 3}})) {
    auto token = random_tokens(rows, vocabulary, 5);
    for (std::size_t i = 0; i < token.size(); ++i) {
      if (i % 5 == 0) token[i] = static_cast<double>(vocabulary - 1);
      if (i % 7 == 0) token[i] = static_cast<double>(i / 70);
      if (i >= 3000 && i < 3500) token[i] = 17;
    }
    auto const d_y = test::rounded<T>(test::random_normal(rows * width, 6));
    auto const before = test::rounded<A>(test::random_normal(vocabulary * width, 7));
    auto const once = run_backward<T>(token, d_y, before, vocabulary, width);
    test::check_equal(once, reference_backward<A>(token, d_y, before, width), "d_table");
    test::check_equal(run_backward<T>(token, d_y, before, vocabulary, width), once, "d_table again");
  }
}
TEST_CASE("embedding: rows of the table that do not occur are not touched") {
  std::int64_t const vocabulary = 50304, width = 8;
  test::values const token{50303, 17, 50303};
  auto const d_y = test::random_normal(3 * width, 1);
  auto const t = test::upload<std::int32_t>(token, 3);
  auto const dy = test::upload<double>(d_y, 3, width);
  auto const d = test::poisoned<double>(vocabulary, width);  // NaN everywhere
  memory::zero(make_policy(), d.slice(17, 1));
  memory::zero(make_policy(), d.slice(50303, 1));
  embedding::backward<test_policy, double>(make_policy(), t, dy, d);
  auto const after = test::download(d);
  std::int64_t numbers = 0;
  for (double v : after) numbers += !std::isnan(v);
  CHECK(numbers == 2 * width);
  for (std::size_t i = 0; i < static_cast<std::size_t>(width); ++i) {
    CHECK(after[17 * static_cast<std::size_t>(width) + i] == d_y[static_cast<std::size_t>(width) + i]);
    CHECK(after[50303 * static_cast<std::size_t>(width) + i] == d_y[i] + d_y[2 * static_cast<std::size_t>(width) + i]);
  }
}
TEST_CASE("embedding: the gradient equals central differences") {
  test::values const token{2, 0, 2, 1};
  auto const table = test::random_normal(3 * 5, 1), d_y = test::random_normal(4 * 5, 2);
  auto const gradient = run_backward<double>(token, d_y, test::values(15, 0.0), 3, 5);
  test::check_gradient([&](test::values const& v) { return test::weighted_sum(run<double>(token, v, 3, 5), d_y); },
                       table, gradient, "d_table");
}
TEST_CASE_TEMPLATE("embedding: the same bits in every run, for any number of threads", P, test_policy) {
  std::int64_t const rows = 3000, vocabulary = 40, width = 200;
  auto const token = random_tokens(rows, vocabulary);
  auto const d_y = test::random_normal(rows * width, 1),
             none = test::values(static_cast<std::size_t>(vocabulary * width), 0.0);
  auto const one = run_backward<float>(token, d_y, none, vocabulary, width);
  auto const check_again = [&](test_policy const& policy) {
    test::check_equal(run_backward<float>(token, d_y, none, vocabulary, width, policy), one, "d_table");
    test::check_equal(run<float>(token, none, vocabulary, width, policy), run<float>(token, none, vocabulary, width),
                      "y");
  };
  check_again(make_policy());
  if constexpr (requires(P p) { p.threads; })
    for (int threads : {1, 2, 5}) {
      P policy = make_policy();
      policy.threads = threads;
      check_again(policy);
    }
}
TEST_CASE("embedding: takes and gives strided rows") {
  auto const table = test::upload<float>(test::random_normal(6 * 20, 1), 6, 20);
  auto const token = test::upload<std::int32_t>({5, 0, 5}, 3);
  auto const y = zeros<float>(make_policy(), 3, 10);
  embedding::forward(make_policy(), token, table.columns(3, 4), y.columns(6, 4));
  auto const from = test::download(table), to = test::download(y);
  for (std::size_t r : {0u, 1u, 2u})
    for (std::size_t i = 0; i < 10; ++i)
      CHECK(to[r * 10 + i] == (i < 6 ? 0.0 : from[(r == 1 ? 0u : 5u) * 20 + 3 + i - 6]));
  embedding::backward<test_policy, float>(make_policy(), token, y.columns(6, 4), table.columns(3, 4));
  auto const after = test::download(table);
  for (std::size_t v = 0; v < 6; ++v)
    for (std::size_t i = 0; i < 20; ++i)
      CHECK(after[v * 20 + i] == static_cast<double>(static_cast<float>(from[v * 20 + i] * (i < 3 || i > 6 ? 1
                                                                                            : v == 0       ? 2
                                                                                            : v == 5       ? 3
                                                                                                           : 1))));
}
TEST_CASE("embedding: scratch is exact") {
  using dry = device::dry<test_policy>;
  auto measure = arena<test::test_space>::measuring();
  auto const token = zeros<std::int32_t>(make_policy(), 9);
  auto const d_y = zeros<float>(make_policy(), 9, 3), table = zeros<float>(make_policy(), 100, 3);
  embedding::backward<dry, float>(dry{&measure}, token, d_y, table);
  CHECK(measure.peak() == embedding::scratch_bytes<float, test::test_space>(9, 3, 100));
}
TEST_CASE("embedding: on a device, a token outside the vocabulary gives NaN and adds nothing") {
  if (std::is_same_v<test::test_space, space::host>) return;  // there it is an error
  test::values const token{3, -2, 9, 1, 2147483647, -2147483648.0};
  auto const table = test::random_normal(9 * 5, 1);
  auto const y = run<double>(token, table, 9, 5);
  for (std::size_t r = 0; r < token.size(); ++r)
    for (std::size_t i = 0; i < 5; ++i)
      if (r == 0 || r == 3)
        CHECK(y[r * 5 + i] == table[row_of(token[r]) * 5 + i]);
      else
        CHECK(std::isnan(y[r * 5 + i]));
  auto const d_y = test::random_normal(6 * 5, 2);
  auto const d = run_backward<double>(token, d_y, test::values(45, 0.0), 9, 5);
  for (std::size_t v = 0; v < 9; ++v)
    for (std::size_t i = 0; i < 5; ++i) CHECK(d[v * 5 + i] == (v == 3 ? d_y[i] : v == 1 ? d_y[15 + i] : 0.0));
}
TEST_CASE("embedding: on a device, tokens outside the vocabulary among many") {
  if (std::is_same_v<test::test_space, space::host>) return;
  for (std::int64_t rows : {300, 20000})
    for (std::int64_t every : {2, 17}) {
      std::int64_t const vocabulary = 30, width = 16;
      auto const token = random_tokens(rows, vocabulary, 3);
      auto const d_y = test::rounded<float>(test::random_normal(rows * width, 1));
      test::values part_token, part_d_y, all_token = token;
      for (std::int64_t r = 0; r < rows; ++r)
        if (r % every == 0) {
          all_token[static_cast<std::size_t>(r)] = r % 3 == 0 ? 30 : r % 3 == 1 ? -1 : 2147483647;
        } else {
          part_token.push_back(token[static_cast<std::size_t>(r)]);
          part_d_y.insert(part_d_y.end(), d_y.begin() + r * width, d_y.begin() + (r + 1) * width);
        }
      auto const before = test::rounded<float>(test::random_normal(vocabulary * width, 2));
      test::check_equal(run_backward<float>(all_token, d_y, before, vocabulary, width),
                        reference_backward<float>(part_token, part_d_y, before, width), "d_table");
    }
}
TEST_CASE("embedding: shapes and tokens that do not fit are named") {
  auto const token = test::upload<std::int32_t>({3, 1, -2, 9}, 4);
  auto const table = zeros<float>(make_policy(), 9, 3);
  auto y = test::upload<float>(test::values(12, 7.0), 4, 3);
  CHECK(test::message_of<shape_error>([&] { embedding::forward(make_policy(), token, table, y.slice(0, 3)); }) ==
        "embedding: token: got (4), expected (3)");
  CHECK(test::message_of<shape_error>([&] {
          embedding::forward(make_policy(), token, table.columns(0, 2), y.as_view());
        }) == "embedding: table: got (9, 2), expected (any, 3)");
  if constexpr (std::is_same_v<test::test_space, space::host>) {  // elsewhere the token is not looked at by the host
    CHECK(test::message_of<value_error>([&] { embedding::forward(make_policy(), token, table, y.as_view()); }) ==
          "embedding: token: position 2 holds -2, but the vocabulary has 9 entries");
    test::check_equal(test::download(y), test::values(12, 7.0), "y after the error");
    CHECK(test::message_of<value_error>([&] {
            embedding::backward<test_policy, float>(make_policy(), token.slice(3, 1), y.slice(0, 1), table);
          }) == "embedding.backward: token: position 0 holds 9, but the vocabulary has 9 entries");
    test::check_equal(test::download(table), test::values(27, 0.0), "d_table after the error");
  }
}
