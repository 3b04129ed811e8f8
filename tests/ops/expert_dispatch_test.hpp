#include "support/sums.hpp"
#include "support/support.hpp"
#include "support/thread_counts.hpp"

#include <blackmamba/ops/expert_dispatch/expert_dispatch.hpp>

#include <algorithm>
#include <numeric>

using namespace blackmamba;

namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

/// A plan in the policy's memory, and its values.
struct planned {
  tensor<test::test_space, std::int64_t, dyn> offsets;
  tensor<test::test_space, std::int32_t, dyn> source, row;
  test::values offset_values, source_values, row_values;

  operator expert_dispatch::routing<test_policy>() const {
    return {.offsets = offsets, .source = source, .row = row};
  }
};

planned plan(test::values const& expert, std::int64_t k, std::int64_t experts, std::int64_t capacity = 0,
             test_policy policy = make_policy()) {
  auto const slots = static_cast<std::int64_t>(expert.size());
  planned p{test::poisoned<std::int64_t>(experts + 1), test::poisoned<std::int32_t>(slots),
            test::poisoned<std::int32_t>(slots), {}, {}, {}};
  expert_dispatch::plan(policy, test::upload<std::int32_t>(expert, slots / k, k), p, capacity);
  p.offset_values = test::download(p.offsets);
  p.source_values = test::download(p.source);
  p.row_values = test::download(p.row);
  return p;
}

/// The definition: sort slots by expert, keeping their order; drop what is past the capacity.
void check_plan(planned const& p, test::values const& expert, std::int64_t experts, std::int64_t capacity = 0) {
  test::values offsets{0}, source, row(expert.size(), -1);
  for (std::int64_t e = 0; e < experts; ++e) {
    std::int64_t n = 0;
    for (std::size_t s = 0; s < expert.size(); ++s)
      if (expert[s] == static_cast<double>(e) && (capacity == 0 || n++ < capacity)) {
        row[s] = static_cast<double>(source.size());
        source.push_back(static_cast<double>(s));
      }
    offsets.push_back(static_cast<double>(source.size()));
  }
  source.resize(expert.size(), -1);
  test::check_equal(p.offset_values, offsets, "offsets");
  test::check_equal(p.source_values, source, "source");
  test::check_equal(p.row_values, row, "row");
}

/// k different experts for each token, in any order; some slots without one.
test::values random_experts(std::int64_t tokens, std::int64_t k, std::int64_t experts, std::uint64_t seed,
                            int percent_without = 0) {
  test::values v;
  std::uint64_t i = 0;
  std::vector<double> deck(at(experts));
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::iota(deck.begin(), deck.end(), 0.0);
    for (std::int64_t a = 0; a < k; ++a) {
      std::swap(deck[at(a)], deck[at(test::random_integer(seed, i++, a, experts - 1))]);
      v.push_back(test::random_integer(seed, i++, 1, 100) <= percent_without ? -1.0 : deck[at(a)]);
    }
  }
  return v;
}
/// So many slots for each expert, shuffled.
test::values with_counts(std::vector<std::int64_t> const& counts, std::uint64_t seed) {
  test::values v;
  for (std::size_t e = 0; e < counts.size(); ++e) v.insert(v.end(), at(counts[e]), static_cast<double>(e));
  for (std::size_t i = v.size(); i > 1; --i)
    std::swap(v[i - 1], v[at(test::random_integer(seed, i, 0, static_cast<std::int64_t>(i) - 1))]);
  return v;
}

template <class T>
test::values run_combine(planned const& p, test::values const& rows, test::values const& gate, std::int64_t tokens,
                         std::int64_t k, std::int64_t width, test_policy policy = make_policy()) {
  auto y = test::poisoned<T>(tokens, width);
  expert_dispatch::combine(policy, p, test::upload<T>(rows, tokens * k, width),
                           test::upload<accum_t<T>>(gate, tokens, k), y.as_view());
  return test::download(y);
}
/// y by definition, in double.
test::values reference_combine(test::values const& row, test::values const& rows, test::values const& gate,
                               std::int64_t tokens, std::int64_t k, std::int64_t width) {
  test::values y(at(tokens * width));
  for (std::int64_t s = 0; s < tokens * k; ++s)
    for (std::int64_t i = 0; i < width && row[at(s)] >= 0; ++i)
      y[at(s / k * width + i)] += gate[at(s)] * rows[static_cast<std::size_t>(row[at(s)]) * at(width) + at(i)];
  return y;
}

}  // namespace

TEST_CASE("expert_dispatch: the plan equals its definition for random experts, without and with capacity") {
  for (std::int64_t tokens : test::sizes({0, 1, 2, 63, 64, 65, 1000, 4095, 4096, 4097, 9001}))
    for (std::int64_t experts : test::sizes({1, 2, 8, 64}))
      for (std::int64_t k : {1, 2, 3}) {
        if (k > experts) continue;
        for (int without : {0, 20}) {
          auto const expert = random_experts(tokens, k, experts, static_cast<std::uint64_t>(tokens + k), without);
          check_plan(plan(expert, k, experts), expert, experts);
          auto const capacity = std::max<std::int64_t>(1, tokens * k / experts * 9 / 10);
          check_plan(plan(expert, k, experts, capacity), expert, experts, capacity);
        }
      }
  check_plan(plan({}, 1, 0), {}, 0);
  check_plan(plan({-1, -1}, 1, 0), {-1, -1}, 0);
}

TEST_CASE("expert_dispatch: every pattern of tokens per expert") {
  auto const counts = test::sizes<std::int64_t>({0, 1, 7, 63, 64, 65, 127, 128, 129});
  std::uint64_t seed = 0;
  for (auto a : counts)
    for (auto b : counts)
      for (auto c : counts) {
        auto const expert = with_counts({a, b, 0, c}, ++seed);
        check_plan(plan(expert, 1, 4), expert, 4);
        check_plan(plan(expert, 1, 4, 64), expert, 4, 64);
      }
  for (double all : {0.0, 3.0, 7.0}) {  // one expert takes all
    test::values const expert(5000, all);
    check_plan(plan(expert, 1, 8), expert, 8);
    check_plan(plan(expert, 1, 8, 4100), expert, 8, 4100);
  }
}

TEST_CASE_TEMPLATE("expert_dispatch: permute then combine is the identity, at every width and type", T, STORAGE_TYPES) {
  for (std::int64_t tokens : test::sizes({0, 1, 65, 300}))
    for (std::int64_t k : {1, 3})
      for (std::int64_t width : test::sizes({0, 1, 3, 16, 17, 64, 1472})) {
        if (tokens * width > 100000) continue;
        auto const expert = random_experts(tokens, k, 8, 5);
        auto const p = plan(expert, k, 8);
        auto const x = test::rounded<T>(test::random_normal(tokens * width, 1));
        auto rows = test::poisoned<T>(tokens * k, width);
        expert_dispatch::permute(make_policy(), p, test::upload<T>(x, tokens, width), rows.as_view());
        auto const permuted = test::download(rows);
        for (std::int64_t r = 0; r < tokens * k; ++r)
          for (std::int64_t i = 0; i < width; ++i) {
            auto const token = static_cast<std::int64_t>(p.source_values[at(r)]) / k;
            REQUIRE(permuted[at(r * width + i)] == x[at(token * width + i)]);
          }
        // Powers of two as gates, which sum to one: nothing is rounded.
        test::values gate;
        for (std::int64_t s = 0; s < tokens * k; ++s) gate.push_back(k == 1 ? 1 : s % k == 0 ? 0.5 : 0.25);
        test::check_equal(run_combine<T>(p, permuted, gate, tokens, k, width), x, "y");
      }
}

TEST_CASE_TEMPLATE("expert_dispatch: combine equals its definition, with drops and slots without an expert", T,
                   STORAGE_TYPES) {
  for (std::int64_t k : {1, 2, 4})
    for (std::int64_t width : {5, 48}) {
      std::int64_t const tokens = 150;
      auto const p = plan(random_experts(tokens, k, 8, 3, 10), k, 8, tokens * k / 10);
      CHECK(p.offset_values[8] < static_cast<double>(tokens * k));
      auto const rows = test::rounded<T>(test::random_normal(tokens * k * width, 1));
      auto const gate = test::rounded<accum_t<T>>(test::random_normal(tokens * k, 2));
      test::check_close(run_combine<T>(p, rows, gate, tokens, k, width),
                        reference_combine(p.row_values, rows, gate, tokens, k, width), test::tolerance<T>(k), "y");
    }
}

TEST_CASE("expert_dispatch: dropped tokens are zero, and free rows are neither read nor written") {
  // Expert 0 has room for two: tokens 0 and 1 stay, token 2 is dropped; token 3 has no expert.
  auto const p = plan({0, 0, 0, -1}, 1, 2, 2);
  test::check_equal(p.offset_values, {0, 2, 2});
  auto rows = test::upload<float>(test::values(8, 7), 4, 2);
  expert_dispatch::permute(make_policy(), p, test::upload<float>({1, 2, 3, 4, 5, 6, 7, 8}, 4, 2), rows.as_view());
  test::check_equal(test::download(rows), {1, 2, 3, 4, 7, 7, 7, 7}, "rows");
  double const nan = std::nan("");
  test::check_equal(run_combine<float>(p, {1, 2, 3, 4, nan, nan, nan, nan}, {1, 2, nan, nan}, 4, 1, 2),
                    {1, 2, 6, 8, 0, 0, 0, 0}, "y");
  auto d_gate = test::poisoned<float>(4, 1);
  expert_dispatch::combine_backward(
      make_policy(), p,
      {.rows = test::upload<float>({1, 2, 3, 4, nan, nan, nan, nan}, 4, 2),
       .gate = test::upload<float>({1, 2, nan, nan}, 4, 1),
       .d_y = test::upload<float>({1, 1, 1, 2, 1, 3, 1, 4}, 4, 2)},
      expert_dispatch::combine_gradients<test_policy, float>{.d_rows = rows, .d_gate = d_gate});
  test::check_equal(test::download(rows), {1, 1, 2, 4, 7, 7, 7, 7}, "d_rows");
  test::check_equal(test::download(d_gate), {3, 11, 0, 0}, "d_gate");
  auto d_x = test::poisoned<float>(4, 2);
  expert_dispatch::permute_backward(make_policy(), p, rows, d_x.as_view());
  test::check_equal(test::download(d_x), {1, 1, 2, 4, 0, 0, 0, 0}, "d_x");
}

TEST_CASE("expert_dispatch: gradients equal central differences") {
  std::int64_t const tokens = 6, k = 2, width = 3;
  auto const p = plan(random_experts(tokens, k, 3, 1, 10), k, 3, 3);
  CHECK(p.offset_values[3] < static_cast<double>(tokens * k));
  auto const x = test::random_normal(tokens * width, 1), gate = test::random_normal(tokens * k, 2);
  auto const scale = test::random_normal(tokens * k * width, 3), d_y = test::random_normal(tokens * width, 4);
  // rows = permute(x), each multiplied by a number of its own; y = combine(rows, gate).
  auto const scaled = [&](test::values const& from) {
    test::values rows(at(tokens * k * width));
    for (std::int64_t r = 0; r < static_cast<std::int64_t>(p.offset_values[3]); ++r)
      for (std::int64_t i = 0; i < width; ++i)
        rows[at(r * width + i)] =
            from[at(static_cast<std::int64_t>(p.source_values[at(r)]) / k * width + i)] * scale[at(r * width + i)];
    return rows;
  };
  auto const loss = [&](test::values const& from, test::values const& with) {
    return test::weighted_sum(reference_combine(p.row_values, scaled(from), with, tokens, k, width), d_y);
  };
  auto rows = test::upload<double>(scaled(x), tokens * k, width);
  auto d_gate = test::poisoned<double>(tokens, k);
  expert_dispatch::combine_backward<test_policy, double>(
      make_policy(), p,
      {.rows = rows, .gate = test::upload<double>(gate, tokens, k), .d_y = test::upload<double>(d_y, tokens, width)},
      {.d_rows = rows, .d_gate = d_gate});  // in place
  auto d_rows = test::download(rows);
  for (std::size_t i = 0; i < d_rows.size(); ++i) d_rows[i] *= scale[i];
  auto d_x = test::poisoned<double>(tokens, width);
  expert_dispatch::permute_backward(make_policy(), p, test::upload<double>(d_rows, tokens * k, width), d_x.as_view());
  test::check_gradient([&](test::values const& v) { return loss(v, gate); }, x, test::download(d_x), "d_x");
  test::check_gradient([&](test::values const& v) { return loss(x, v); }, gate, test::download(d_gate), "d_gate");
}

TEST_CASE_TEMPLATE("expert_dispatch: gradients in every type stay within rounding of those in double", T,
                   STORAGE_TYPES) {
  std::int64_t const tokens = 90, k = 2, width = 37;
  auto const p = plan(random_experts(tokens, k, 8, 1, 10), k, 8, 20);
  auto const rows = test::rounded<T>(test::random_normal(tokens * k * width, 1));
  auto const gate = test::rounded<accum_t<T>>(test::random_normal(tokens * k, 2));
  auto const d_y = test::rounded<T>(test::random_normal(tokens * width, 3));
  test::values expected_rows(rows.size());
  test::sums expected_gate(gate.size());
  for (std::int64_t s = 0; s < tokens * k; ++s)
    for (std::int64_t i = 0; i < width && p.row_values[at(s)] >= 0; ++i) {
      auto const r = static_cast<std::size_t>(p.row_values[at(s)]) * at(width) + at(i);
      expected_rows[r] = gate[at(s)] * d_y[at(s / k * width + i)];
      expected_gate[at(s)].add(rows[r] * d_y[at(s / k * width + i)]);
    }
  auto d_rows = test::upload<T>(test::values(rows.size()), tokens * k, width);
  auto d_gate = test::poisoned<accum_t<T>>(tokens, k);
  expert_dispatch::combine_backward<test_policy, T>(make_policy(), p,
                                                    {.rows = test::upload<T>(rows, tokens * k, width),
                                                     .gate = test::upload<accum_t<T>>(gate, tokens, k),
                                                     .d_y = test::upload<T>(d_y, tokens, width)},
                                                    {.d_rows = d_rows, .d_gate = d_gate});
  test::check_close_each(test::download(d_rows), expected_rows, test::tolerance<T>(), "d_rows");
  test::check_sums<accum_t<T>>(test::download(d_gate), expected_gate, width, "d_gate");
  auto d_x = test::poisoned<T>(tokens, width);
  expert_dispatch::permute_backward(make_policy(), p, test::upload<T>(rows, tokens * k, width), d_x.as_view());
  test::check_close(test::download(d_x),
                    reference_combine(p.row_values, rows, test::values(gate.size(), 1.0), tokens, k, width),
                    test::tolerance<T>(k), "d_x");
}

TEST_CASE("expert_dispatch: the same bits in every run, for any number of threads") {
  std::int64_t const tokens = 20000, k = 2, width = 9;
  auto const expert = random_experts(tokens, k, 8, 1, 5);
  auto const rows = test::random_normal(tokens * k * width, 1), gate = test::random_normal(tokens * k, 2);
  auto const one = plan(expert, k, 8, 4500);
  check_plan(one, expert, 8, 4500);
  auto const y = run_combine<float>(one, rows, gate, tokens, k, width);
  test::each_thread_count({1, 2, 5}, [&](test_policy policy) {
    auto const again = plan(expert, k, 8, 4500, policy);
    test::check_equal(again.offset_values, one.offset_values, "offsets");
    test::check_equal(again.source_values, one.source_values, "source");
    test::check_equal(again.row_values, one.row_values, "row");
    test::check_equal(run_combine<float>(again, rows, gate, tokens, k, width, policy), y, "y");
  });
}

TEST_CASE("expert_dispatch: many slots, more experts than a warp has lanes, and an expert that takes half") {
  std::int64_t const slots = 700001;
  for (std::int64_t experts : {8, 64, 300}) {
    if (experts != 64 && test::trials_percent() < 10) continue;
    test::values expert(at(slots));
    for (std::int64_t s = 0; s < slots; ++s) {
      auto const i = static_cast<std::uint64_t>(s);
      expert[at(s)] = static_cast<double>(s % 2 == 0 ? 3 : test::random_integer(1, i, -1, experts - 1));
    }
    check_plan(plan(expert, 1, experts), expert, experts);
    check_plan(plan(expert, 1, experts, slots / experts), expert, experts, slots / experts);
  }
}

TEST_CASE("expert_dispatch: takes strided tokens and experts") {
  auto const wide = test::upload<std::int32_t>({9, 1, 0, 9, 0, 1, 9, 1, 1}, 3, 3);  // the experts are columns 1 and 2
  planned p{.offsets = test::poisoned<std::int64_t>(3),
            .source = test::poisoned<std::int32_t>(6),
            .row = test::poisoned<std::int32_t>(6),
            .offset_values = {},
            .source_values = {},
            .row_values = {}};
  expert_dispatch::plan(make_policy(), wide.columns(1, 2), p);
  test::check_equal(test::download(p.offsets), {0, 2, 6});
  test::check_equal(test::download(p.source), {1, 2, 0, 3, 4, 5});
  auto const x = test::upload<float>({0, 1, 2, 10, 11, 12, 20, 21, 22}, 3, 3);
  auto rows = test::upload<float>(test::values(24), 6, 4);
  expert_dispatch::permute(make_policy(), p, x.columns(1, 2), rows.columns(1, 2));
  test::check_equal(test::download(rows),
                    {0, 1, 2, 0, 0, 11, 12, 0, 0, 1, 2, 0, 0, 11, 12, 0, 0, 21, 22, 0, 0, 21, 22, 0}, "rows");
}

TEST_CASE("expert_dispatch: arguments that disagree are named") {
  auto const p = plan({0, 1, 1, 0}, 2, 2);
  auto const x = test::upload<float>(test::values(9), 3, 3);
  auto rows = test::poisoned<float>(4, 3);
  CHECK(test::message_of<shape_error>([&] { expert_dispatch::permute(make_policy(), p, x, rows.as_view()); }) ==
        "expert_dispatch.permute: routing.row: got (4), expected a multiple of the 3 tokens");
  auto y = test::poisoned<float>(2, 3);
  auto const gate = test::upload<float>(test::values(2), 2, 1);
  CHECK(test::message_of<shape_error>([&] { expert_dispatch::combine(make_policy(), p, rows, gate, y.as_view()); }) ==
        "expert_dispatch.combine: gate: got (2, 1), expected (2, 2)");
  auto const expert = test::upload<std::int32_t>({0, 1, 1, 0, 1}, 5, 1);
  CHECK(test::message_of<shape_error>([&] { expert_dispatch::plan(make_policy(), expert, p); }) ==
        "expert_dispatch.plan: source: got (4), expected (5)");
  CHECK(test::message_of<shape_error>([&] { expert_dispatch::plan(make_policy(), expert, p, -1); }) ==
        "expert_dispatch.plan: capacity: got -1, expected 0 or more");
  if constexpr (std::is_same_v<test_policy, device::cpu>) {
    CHECK(test::message_of<value_error>([&] { plan({0, 1, 2, 0}, 1, 2); }) ==
          "expert_dispatch.plan: expert: slot 2 has expert 2, expected -1 or 0 to 1");
    CHECK(test::message_of<value_error>([&] { plan({-2}, 1, 2); }) ==
          "expert_dispatch.plan: expert: slot 0 has expert -2, expected -1 or 0 to 1");
  }
}
