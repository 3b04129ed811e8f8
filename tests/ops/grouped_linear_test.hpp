#include "support/sums.hpp"
#include "support/support.hpp"

#include <blackmamba/ops/grouped_linear/grouped_linear.hpp>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

using namespace blackmamba;

namespace {

using counts = std::vector<std::int64_t>;

/// What the operator is called with, as it sees it: rounded to the types that it is stored in. Group e has count[e]
/// rows; `spare` rows belong to no group.
struct problem {
  counts count;
  std::int64_t spare, width, outputs;
  test::values x, weight, bias, d_y;

  std::int64_t groups() const { return static_cast<std::int64_t>(count.size()); }
  std::int64_t first(std::int64_t group) const {
    std::int64_t row = 0;
    for (std::int64_t e = 0; e < group; ++e) row += count[static_cast<std::size_t>(e)];
    return row;
  }
  std::int64_t last(std::int64_t group) const { return first(group + 1); }
  std::int64_t rows() const { return first(groups()) + spare; }
  test::values offsets() const {
    test::values v;
    for (std::int64_t e = 0; e <= groups(); ++e) v.push_back(static_cast<double>(first(e)));
    return v;
  }

  template <class T, class Y = T>
  static problem make(counts const& count, std::int64_t width, std::int64_t outputs, std::int64_t spare = 0,
                      bool with_bias = true) {
    problem p{count, spare, width, outputs, {}, {}, {}, {}};
    p.x = test::rounded<T>(test::random_normal(p.rows() * width, 1));
    p.weight = test::rounded<T>(test::random_normal(p.groups() * outputs * width, 2));
    if (with_bias) p.bias = test::rounded<accum_t<T>>(test::random_normal(p.groups() * outputs, 3));
    p.d_y = test::rounded<Y>(test::random_normal(p.rows() * outputs, 4));
    return p;
  }
};

std::string name_of(problem const& p) {
  std::string s = "groups of";
  for (auto c : p.count) s += " " + std::to_string(c);
  return s + ", " + std::to_string(p.width) + " to " + std::to_string(p.outputs);
}

std::size_t at(std::int64_t row, std::int64_t width, std::int64_t column) {
  return static_cast<std::size_t>(row * width + column);
}

/// What an output holds before: rows of no group must keep it.
template <class T>
test::values before(std::int64_t n) {
  return test::rounded<T>(test::random_normal(n, 8));
}

/// The definition, in double. Rows of no group keep what they hold, as one exact term.
template <class Y>
test::sums reference(problem const& p) {
  test::sums y(p.d_y.size());
  for (std::int64_t e = 0; e < p.groups(); ++e)
    for (std::int64_t r = p.first(e); r < p.last(e); ++r)
      for (std::int64_t o = 0; o < p.outputs; ++o) {
        auto& s = y[at(r, p.outputs, o)];
        if (!p.bias.empty()) s.add(p.bias[at(e, p.outputs, o)]);
        for (std::int64_t i = 0; i < p.width; ++i)
          s.add(p.x[at(r, p.width, i)] * p.weight[at(e * p.outputs + o, p.width, i)]);
      }
  auto const held = before<Y>(static_cast<std::int64_t>(y.size()));
  for (std::size_t i = at(p.first(p.groups()), p.outputs, 0); i < y.size(); ++i) y[i].add(held[i]);
  return y;
}

template <class T, class Y = T>
test::values run(problem const& p, test_policy policy = make_policy()) {
  auto const x = test::upload<T>(p.x, p.rows(), p.width);
  auto const weight = test::upload<T>(p.weight, p.groups(), p.outputs, p.width);
  auto const offsets = test::upload<std::int64_t>(p.offsets(), p.groups() + 1);
  auto y = test::upload<Y>(before<Y>(p.rows() * p.outputs), p.rows(), p.outputs);
  if (p.bias.empty()) {
    grouped_linear::forward<test_policy, Y, T>(policy, {.x = x, .weight = weight, .offsets = offsets}, y);
  } else {
    auto const bias = test::upload<accum_t<T>>(p.bias, p.groups(), p.outputs);
    grouped_linear::forward<test_policy, Y, T>(policy, {.x = x, .weight = weight, .offsets = offsets, .bias = bias}, y);
  }
  return test::download(y);
}

struct result {
  test::values d_x, d_weight, d_bias;
};

template <class T, class Y = T>
result run_backward(problem const& p, result const& held, test_policy policy = make_policy()) {
  using A = accum_t<T>;
  auto const x = test::upload<T>(p.x, p.rows(), p.width);
  auto const weight = test::upload<T>(p.weight, p.groups(), p.outputs, p.width);
  auto const offsets = test::upload<std::int64_t>(p.offsets(), p.groups() + 1);
  auto const d_y = test::upload<Y>(p.d_y, p.rows(), p.outputs);
  auto d_x = test::upload<T>(held.d_x, p.rows(), p.width);
  auto d_weight = test::upload<A>(held.d_weight, p.groups(), p.outputs, p.width);
  auto d_bias = test::upload<A>(held.d_bias, p.groups(), p.outputs);
  grouped_linear::backward<test_policy, T, Y>(policy, {.x = x, .weight = weight, .offsets = offsets, .d_y = d_y},
                                              {.d_x = d_x, .d_weight = d_weight, .d_bias = d_bias});
  return {test::download(d_x), test::download(d_weight), test::download(d_bias)};
}
template <class T>
result held_before(problem const& p) {
  return {before<T>(p.rows() * p.width), before<accum_t<T>>(p.groups() * p.outputs * p.width),
          before<accum_t<T>>(p.groups() * p.outputs)};
}

template <class T, class Y = T>
void check_backward(problem const& p) {
  using A = accum_t<T>;
  auto const held = held_before<T>(p);
  test::sums d_x(held.d_x.size()), d_weight(held.d_weight.size()), d_bias(held.d_bias.size());
  for (std::size_t i = 0; i < d_weight.size(); ++i) d_weight[i].add(held.d_weight[i]);
  for (std::size_t i = 0; i < d_bias.size(); ++i) d_bias[i].add(held.d_bias[i]);
  for (std::size_t i = at(p.first(p.groups()), p.width, 0); i < d_x.size(); ++i) d_x[i].add(held.d_x[i]);
  for (std::int64_t e = 0; e < p.groups(); ++e)
    for (std::int64_t r = p.first(e); r < p.last(e); ++r)
      for (std::int64_t o = 0; o < p.outputs; ++o) {
        double const g = p.d_y[at(r, p.outputs, o)];
        d_bias[at(e, p.outputs, o)].add(g);
        for (std::int64_t i = 0; i < p.width; ++i) {
          d_x[at(r, p.width, i)].add(g * p.weight[at(e * p.outputs + o, p.width, i)]);
          d_weight[at(e * p.outputs + o, p.width, i)].add(g * p.x[at(r, p.width, i)]);
        }
      }
  auto const actual = run_backward<T, Y>(p, held);
  test::check_sums<T>(actual.d_x, d_x, p.outputs, "d_x, " + name_of(p));
  test::check_sums<A>(actual.d_weight, d_weight, p.rows() + 1, "d_weight, " + name_of(p));
  test::check_sums<A>(actual.d_bias, d_bias, p.rows() + 1, "d_bias, " + name_of(p));
  for (std::int64_t e = 0; e < p.groups(); ++e)
    if (p.count[static_cast<std::size_t>(e)] == 0)
      for (std::int64_t i = 0; i < p.outputs * p.width; ++i) {
        auto const j = static_cast<std::size_t>(e * p.outputs * p.width + i);
        REQUIRE(actual.d_weight[j] == held.d_weight[j]);
      }
}

/// Every pattern of sizes around the tiles, none and all in one group among them.
std::vector<counts> const patterns = {{},
                                      {0},
                                      {0, 0, 0},
                                      {1},
                                      {3, 5},
                                      {0, 1, 7, 63, 64, 65, 0},
                                      {65, 64, 63, 8, 9, 1, 1, 0},
                                      {0, 0, 0, 200, 0},
                                      {200, 0, 0, 0, 0},
                                      {0, 0, 0, 0, 200}};

}  // namespace

TEST_CASE_TEMPLATE("grouped_linear: equals its definition for every pattern of groups and type", T, STORAGE_TYPES) {
  using A = accum_t<T>;
  for (auto const& count : test::sizes(patterns))
    for (std::int64_t width : test::sizes({0, 1, 17, 40}))
      for (std::int64_t outputs : test::sizes({0, 1, 16, 51}))
        for (std::int64_t spare : {0, 3})
          for (bool bias : {false, true}) {
            auto const p = problem::make<T>(count, width, outputs, spare, bias);
            test::check_sums<T>(run<T>(p), reference<T>(p), width + 1, name_of(p));
            test::check_sums<A>(run<T, A>(p), reference<A>(p), width + 1, name_of(p));
          }
  for (counts const& count : {counts{2, 130, 0, 40}, counts{300}}) {
    auto const p = problem::make<T>(count, 500, 270, 5);
    test::check_sums<T>(run<T>(p), reference<T>(p), 501, name_of(p));
  }
}

TEST_CASE_TEMPLATE("grouped_linear: gradients equal their definition for every pattern of groups and type", T,
                   STORAGE_TYPES) {
  using A = accum_t<T>;
  for (auto const& count : test::sizes(patterns))
    for (std::int64_t width : {0, 1, 19})
      for (std::int64_t outputs : {0, 1, 33})
        for (std::int64_t spare : {0, 3}) {
          check_backward<T>(problem::make<T>(count, width, outputs, spare));
          check_backward<T, A>(problem::make<T, A>(count, width, outputs, spare));
        }
  check_backward<T>(problem::make<T>({2, 130, 0, 900}, 250, 20, 5));
}

TEST_CASE_TEMPLATE("grouped_linear: equals its definition where rows are aligned, over several tiles", T, bfloat16,
                   blackmamba::half) {
  for (auto const& count : test::sizes(patterns)) {
    auto const p = problem::make<T>(count, 72, 136, 3);
    test::check_sums<T>(run<T>(p), reference<T>(p), p.width + 1, name_of(p));
    test::check_sums<float>(run<T, float>(p), reference<float>(p), p.width + 1, name_of(p));
    check_backward<T>(p);
  }
  for (std::int64_t width : {8, 64, 200})
    for (std::int64_t outputs : {8, 256, 280}) {
      auto const p = problem::make<T>({129, 0, 128, 5, 127, 63}, width, outputs, 1, width > 8);
      test::check_sums<T>(run<T>(p), reference<T>(p), p.width + 1, name_of(p));
      check_backward<T>(p);
    }
  auto const many = problem::make<T>(counts(40, 17), 40, 264);
  test::check_sums<T>(run<T>(many), reference<T>(many), many.width + 1, name_of(many));
  check_backward<T>(many);
}

TEST_CASE("grouped_linear: two runs give the same bits") {
  auto const p = problem::make<bfloat16>({700, 0, 13, 300, 1}, 328, 520, 7);
  auto const held = held_before<bfloat16>(p);
  auto const y = run<bfloat16>(p);
  auto const d = run_backward<bfloat16>(p, held);
  for (int i = 0; i < 3; ++i) {
    test::check_equal(run<bfloat16>(p), y, "y");
    auto const again = run_backward<bfloat16>(p, held);
    test::check_equal(again.d_x, d.d_x, "d_x");
    test::check_equal(again.d_weight, d.d_weight, "d_weight");
    test::check_equal(again.d_bias, d.d_bias, "d_bias");
  }
}

TEST_CASE("grouped_linear: gradients equal central differences") {
  auto const p = problem::make<double>({2, 0, 11, 1}, 3, 5, 2);
  // Rows of no group neither feel nor cause anything.
  auto weights = p.d_y;
  std::fill(weights.end() - 2 * p.outputs, weights.end(), 0.0);
  result const zero{test::values(p.x.size()), test::values(p.weight.size()), test::values(p.bias.size())};
  auto const g = run_backward<double>(p, zero);
  auto const loss = [&](test::values problem::*which) {
    return [&p, &weights, which](test::values const& v) {
      problem moved = p;
      moved.*which = v;
      return test::weighted_sum(run<double>(moved), weights);
    };
  };
  test::check_gradient(loss(&problem::x), p.x, g.d_x, "d_x");
  test::check_gradient(loss(&problem::weight), p.weight, g.d_weight, "d_weight");
  test::check_gradient(loss(&problem::bias), p.bias, g.d_bias, "d_bias");
}

TEST_CASE("grouped_linear: each gradient alone equals itself among all") {
  auto const p = problem::make<float>({5, 0, 40}, 12, 20, 3);
  auto const held = held_before<float>(p);
  auto const all = run_backward<float>(p, held);
  auto const x = test::upload<float>(p.x, p.rows(), p.width);
  auto const weight = test::upload<float>(p.weight, p.groups(), p.outputs, p.width);
  auto const offsets = test::upload<std::int64_t>(p.offsets(), p.groups() + 1);
  auto const d_y = test::upload<float>(p.d_y, p.rows(), p.outputs);
  auto d_x = test::upload<float>(held.d_x, p.rows(), p.width);
  auto d_weight = test::upload<float>(held.d_weight, p.groups(), p.outputs, p.width);
  auto d_bias = test::upload<float>(held.d_bias, p.groups(), p.outputs);
  auto const backward = [&](grouped_linear::gradients<test_policy, float> const& d) {
    grouped_linear::backward(make_policy(), {.x = x, .weight = weight, .offsets = offsets, .d_y = d_y}, d);
  };
  backward({});
  backward({.d_x = d_x});
  test::check_equal(test::download(d_x), all.d_x, "d_x");
  test::check_equal(test::download(d_weight), held.d_weight, "d_weight");
  backward({.d_weight = d_weight});
  test::check_equal(test::download(d_weight), all.d_weight, "d_weight");
  test::check_equal(test::download(d_bias), held.d_bias, "d_bias");
  backward({.d_bias = d_bias});
  test::check_equal(test::download(d_bias), all.d_bias, "d_bias");
}

TEST_CASE("grouped_linear: rows past the last group are not even read") {
  auto p = problem::make<float>({3, 0, 20}, 12, 20, 4);
  auto const y = run<float>(p);
  auto const d = run_backward<float>(p, held_before<float>(p));
  std::fill(p.x.end() - 4 * p.width, p.x.end(), std::numeric_limits<double>::quiet_NaN());
  std::fill(p.d_y.end() - 4 * p.outputs, p.d_y.end(), std::numeric_limits<double>::quiet_NaN());
  test::check_equal(run<float>(p), y, "y");
  auto const again = run_backward<float>(p, held_before<float>(p));
  test::check_equal(again.d_x, d.d_x, "d_x");
  test::check_equal(again.d_weight, d.d_weight, "d_weight");
  test::check_equal(again.d_bias, d.d_bias, "d_bias");
}

TEST_CASE("grouped_linear: takes strided rows and leaves what lies between them") {
  // Odd rows, and rows that are as aligned as their elements' packs.
  struct layout {
    std::int64_t width, outputs, offset;
  };
  for (auto const& shape : {layout{19, 23, 5}, {40, 136, 8}}) {
    std::int64_t const width = shape.width, outputs = shape.outputs, offset = shape.offset;
    auto const p = problem::make<blackmamba::half>({2, 0, 30}, width, outputs, 3);
    auto const widened = [&](test::values const& v, std::int64_t columns) {
      auto wide = test::rounded<blackmamba::half>(test::random_normal(p.rows() * 2 * columns, 9));
      for (std::int64_t r = 0; r < p.rows(); ++r)
        for (std::int64_t i = 0; i < columns; ++i) wide[at(r, 2 * columns, offset + i)] = v[at(r, columns, i)];
      return wide;
    };
    auto const weight = test::upload<blackmamba::half>(p.weight, p.groups(), p.outputs, p.width);
    auto const bias = test::upload<float>(p.bias, p.groups(), p.outputs);
    auto const offsets = test::upload<std::int64_t>(p.offsets(), p.groups() + 1);
    auto const x = test::upload<blackmamba::half>(widened(p.x, p.width), p.rows(), 2 * p.width);
    auto y = test::upload<blackmamba::half>(widened(before<blackmamba::half>(p.rows() * p.outputs), p.outputs),
                                            p.rows(), 2 * p.outputs);
    auto const x_part = x.columns(offset, p.width);
    grouped_linear::forward(make_policy(), {.x = x_part, .weight = weight, .offsets = offsets, .bias = bias},
                            y.columns(offset, p.outputs));
    test::check_equal(test::download(y), widened(run<blackmamba::half>(p), p.outputs), "y and its surroundings");

    auto const held = held_before<blackmamba::half>(p);
    auto const d_y = test::upload<blackmamba::half>(widened(p.d_y, p.outputs), p.rows(), 2 * p.outputs);
    auto d_x = test::upload<blackmamba::half>(widened(held.d_x, p.width), p.rows(), 2 * p.width);
    auto d_weight = test::upload<float>(held.d_weight, p.groups(), p.outputs, p.width);
    grouped_linear::backward<test_policy, blackmamba::half>(
        make_policy(), {.x = x_part, .weight = weight, .offsets = offsets, .d_y = d_y.columns(offset, p.outputs)},
        {.d_x = d_x.columns(offset, p.width), .d_weight = d_weight});
    auto const expected = run_backward<blackmamba::half>(p, held);
    test::check_equal(test::download(d_x), widened(expected.d_x, p.width), "d_x and its surroundings");
    test::check_equal(test::download(d_weight), expected.d_weight, "d_weight");
  }
}

TEST_CASE_TEMPLATE("grouped_linear: the same bits for any number of threads", P, test_policy) {
  if constexpr (requires(P p) { p.threads; })
    for (counts const& count : {counts{0, 1, 7, 63, 64, 65, 8}, counts{0, 500, 0}}) {
      auto const p = problem::make<bfloat16>(count, 70, 150, 3);
      auto const held = held_before<bfloat16>(p);
      auto const y = run<bfloat16, float>(p);
      auto const d = run_backward<bfloat16>(p, held);
      for (int threads : {1, 2, 5}) {
        P policy = make_policy();
        policy.threads = threads;
        test::check_equal(run<bfloat16, float>(p, policy), y, "y");
        auto const again = run_backward<bfloat16>(p, held, policy);
        test::check_equal(again.d_x, d.d_x, "d_x");
        test::check_equal(again.d_weight, d.d_weight, "d_weight");
        test::check_equal(again.d_bias, d.d_bias, "d_bias");
      }
    }
}

TEST_CASE("grouped_linear: shapes that disagree are named") {
  auto const x = test::upload<float>(test::values(12), 3, 4);
  auto const weight = test::upload<float>(test::values(40), 2, 5, 4);
  auto const offsets = test::upload<std::int64_t>({0, 1, 3}, 3);
  auto const short_offsets = test::upload<std::int64_t>({0, 3}, 2);
  auto const bias = test::upload<float>(test::values(5), 1, 5);
  auto y = test::poisoned<float>(3, 5);
  auto narrow = test::poisoned<float>(3, 4);
  auto const forward = [&](auto const& o, auto const& b, auto const& to) {
    return test::message_of<shape_error>([&] {
      grouped_linear::forward(make_policy(), {.x = x, .weight = weight, .offsets = o, .bias = b}, to.as_view());
    });
  };
  using bias_view = out<test_policy, float, dyn, dyn>;
  CHECK(forward(offsets, bias_view{}, test::poisoned<float>(2, 5)) ==
        "grouped_linear: x: got (3, 4), expected (2, any)");
  CHECK(forward(offsets, bias_view{}, narrow) == "grouped_linear: weight: got (2, 5, 4), expected (any, 4, 4)");
  CHECK(forward(short_offsets, bias_view{}, y) == "grouped_linear: offsets: got (2), expected (3)");
  CHECK(forward(offsets, bias, y) == "grouped_linear: bias: got (1, 5), expected (2, 5)");
  auto const backward = [&](auto const& o, auto const& d_y, grouped_linear::gradients<test_policy, float> const& d) {
    return test::message_of<shape_error>([&] {
      grouped_linear::backward<test_policy, float>(make_policy(), {.x = x, .weight = weight, .offsets = o, .d_y = d_y},
                                                   d);
    });
  };
  CHECK(backward(offsets, narrow, {}) == "grouped_linear.backward: weight: got (2, 5, 4), expected (any, 4, any)");
  CHECK(backward(short_offsets, y, {}) == "grouped_linear.backward: offsets: got (2), expected (3)");
  CHECK(backward(offsets, y, {.d_x = y}) == "grouped_linear.backward: d_x: got (3, 5), expected (3, 4)");
  auto const d_weight = zeros<float>(make_policy(), 2, 4, 5);
  CHECK(backward(offsets, y, {.d_weight = d_weight}) ==
        "grouped_linear.backward: d_weight: got (2, 4, 5), expected (2, 5, 4)");
  CHECK(backward(offsets, y, {.d_bias = y}) == "grouped_linear.backward: d_bias: got (3, 5), expected (2, 5)");
}
