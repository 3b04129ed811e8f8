#include "support/support.hpp"
#include "support/thread_counts.hpp"

#include <blackmamba/ops/expert_dispatch/expert_dispatch.hpp>
#include <blackmamba/ops/router/load_bias.hpp>
#include <blackmamba/ops/router/quantile_balance.hpp>
#include <blackmamba/ops/router/router.hpp>

#include <algorithm>
#include <numeric>

using namespace blackmamba;

namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }
constexpr double infinity = std::numeric_limits<double>::infinity();

struct problem {
  std::int64_t rows, experts, k;
  test::values logits, offset;
  router::options options = {};
};
struct result {
  test::values expert, gate;
  double non_finite_rows;
};

bool finite(test::values const& x, std::int64_t first, std::int64_t n) {
  return std::all_of(x.begin() + first, x.begin() + first + n, [](double v) { return std::isfinite(v); });
}

/// The gates of the given experts of one row, by definition.
test::values gates(double const* logits, std::int64_t experts, std::vector<std::int64_t> const& chosen,
                   gate_function f) {
  test::values g;
  double all = 0, selected = 0, largest = *std::max_element(logits, logits + experts);
  for (std::int64_t j = 0; j < experts; ++j) all += std::exp(logits[j] - largest);
  for (auto e : chosen) selected += std::exp(logits[e] - largest);
  for (auto e : chosen) {
    double const x = logits[e];
    g.push_back(f == gate_function::sigmoid ? 1 / (1 + std::exp(-x))
                                            : std::exp(x - largest) / (f == gate_function::softmax ? all : selected));
  }
  return g;
}

/// The definition, in double: sort the experts by score, of equals the lower number first.
result reference(problem const& p) {
  result r{{}, {}, 0};
  for (std::int64_t i = 0; i < p.rows; ++i) {
    if (!finite(p.logits, i * p.experts, p.experts)) {
      r.expert.insert(r.expert.end(), at(p.k), -1);
      r.gate.insert(r.gate.end(), at(p.k), 0);
      r.non_finite_rows += 1;
      continue;
    }
    double const* const x = p.logits.data() + i * p.experts;
    std::vector<std::int64_t> order(at(p.experts));
    std::iota(order.begin(), order.end(), 0);
    auto const score = [&](std::int64_t j) { return p.options.beta * x[j] + (p.offset.empty() ? 0 : p.offset[at(j)]); };
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return score(a) > score(b); });
    order.resize(at(p.k));
    auto const g = gates(x, p.experts, order, p.options.gate);
    r.expert.insert(r.expert.end(), order.begin(), order.end());
    r.gate.insert(r.gate.end(), g.begin(), g.end());
  }
  return r;
}

template <class A>
result run(problem const& p, test_policy policy = make_policy()) {
  auto const logits = test::upload<A>(p.logits, p.rows, p.experts);
  auto const offset = test::upload<A>(p.offset, static_cast<std::int64_t>(p.offset.size()));
  auto expert = test::poisoned<std::int32_t>(p.rows, p.k);
  auto gate = test::poisoned<A>(p.rows, p.k);
  auto count = test::poisoned<std::int32_t>(1);
  router::forward<test_policy, A>(
      policy, {.logits = logits, .offset = p.offset.empty() ? in<test_policy, A, dyn>{} : offset},
      {.expert = expert, .gate = gate, .non_finite_rows = count}, p.options);
  return {test::download(expert), test::download(gate), test::download(count)[0]};
}

template <class A>
test::values run_backward(problem const& p, test::values const& expert, test::values const& d_gate,
                          test_policy policy = make_policy()) {
  auto const logits = test::upload<A>(p.logits, p.rows, p.experts);
  auto const chosen = test::upload<std::int32_t>(expert, p.rows, p.k);
  auto const d = test::upload<A>(d_gate, p.rows, p.k);
  auto d_logits = test::poisoned<A>(p.rows, p.experts);
  router::backward(policy, {.logits = logits, .expert = chosen, .d_gate = d}, d_logits.as_view(), p.options.gate);
  return test::download(d_logits);
}

/// Multiples of 1/8: scores are exact in float, and equal ones are frequent.
test::values coarse(std::int64_t n, std::uint64_t seed, double spread = 1.0) {
  auto v = test::random_normal(n, seed, spread);
  for (auto& x : v) x = std::round(8 * x) / 8;
  return v;
}
constexpr gate_function all_gates[] = {gate_function::sigmoid, gate_function::softmax, gate_function::softmax_selected};

/// Largest number of slots of an expert over the mean.
double peak_load(test::values const& expert, std::int64_t experts) {
  test::values count(at(experts));
  for (double e : expert) count[static_cast<std::size_t>(e)] += 1;
  return *std::max_element(count.begin(), count.end()) * static_cast<double>(experts) /
         static_cast<double>(expert.size());
}
/// Normal logits, and a bias for each expert.
test::values biased(std::int64_t rows, std::int64_t experts, double spread, double bias) {
  auto x = test::random_normal(rows * experts, 1, spread);
  auto const b = test::random_normal(experts, 4, bias);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += b[i % at(experts)];
  return x;
}

}  // namespace

TEST_CASE_TEMPLATE("router: equals its definition at every size, gate and number of choices", A, float, double) {
  for (std::int64_t rows : test::sizes({0, 1, 3, 16, 17, 1025}))
    for (std::int64_t experts : test::sizes({1, 2, 3, 8, 64, 131}))
      for (std::int64_t k : {std::int64_t{1}, std::int64_t{2}, experts}) {
        if (k > experts || rows * experts * k > 300000) continue;
        for (auto gate : all_gates)
          for (bool with_offset : {false, true}) {
            problem const p{rows, experts, k, coarse(rows * experts, 1, 2.0),
                            with_offset ? coarse(experts, 2) : test::values{}, {.gate = gate}};
            auto const expected = reference(p), actual = run<A>(p);
            test::check_equal(actual.expert, expected.expert, "expert");
            test::check_close_each(actual.gate, expected.gate, test::tolerance<A>(experts), "gate");
            CHECK(actual.non_finite_rows == 0);
          }
      }
}

TEST_CASE("router: the lower number wins among equals, and an expert with offset -infinity or not a number is last") {
  problem p{2, 4, 4, {1, 3, 3, 1, 0, 0, 0, 0}, {}};
  test::check_equal(run<float>(p).expert, {1, 2, 0, 3, 0, 1, 2, 3});
  p.offset = {0, -infinity, 0, 1};
  test::check_equal(run<float>(p).expert, {2, 3, 0, 1, 3, 0, 2, 1});
  p.offset = {0, std::nan(""), 0, 1};
  test::check_equal(run<float>(p).expert, {2, 3, 0, 1, 3, 0, 2, 1});
}

TEST_CASE("router: the offset and beta move the choice and leave the gates of the chosen alone") {
  problem p{1, 3, 1, {1, 0.5, -1}, {}};
  CHECK(run<double>(p).expert[0] == 0);
  p.offset = {0, 1.5, 0};
  auto const moved = run<double>(p);
  CHECK(moved.expert[0] == 1);
  CHECK(moved.gate[0] == doctest::Approx(1 / (1 + std::exp(-0.5))));
  p.options.beta = 4;
  CHECK(run<double>(p).expert[0] == 0);
}

TEST_CASE("router: logits shifted by 1e4, and the largest that there are, choose as ever") {
  problem p{300, 8, 2, coarse(2400, 1), {}, {.gate = gate_function::softmax}};
  auto const expected = reference(p);
  for (double shift : {1e4, -1e4}) {
    problem moved = p;
    for (auto& x : moved.logits) x += shift;
    auto const actual = run<float>(moved);
    test::check_equal(actual.expert, expected.expert, "expert");
    test::check_close_each(actual.gate, expected.gate, test::tolerance<float>(8), "gate");
  }
  auto const extreme = run<float>({1, 3, 1, {-3e38, 3e38, 1}, {}, {.gate = gate_function::softmax}});
  CHECK(extreme.expert[0] == 1);
  CHECK(extreme.gate[0] == 1);
}

TEST_CASE("router: rows that are not finite go nowhere, are counted, and touch no other row") {
  for (std::int64_t experts : {8, 131})
    for (auto gate : all_gates) {
      problem p{1100, experts, 2, coarse(1100 * experts, 1), coarse(experts, 2), {.gate = gate}};
      auto const clean = run<float>(p);
      p.logits[at(5 * experts + 3)] = std::nan("");
      p.logits[at(6 * experts)] = infinity;
      p.logits[at(1050 * experts + experts - 1)] = -infinity;
      auto const expected = reference(p), actual = run<float>(p);
      CHECK(actual.non_finite_rows == 3);
      test::check_equal(actual.expert, expected.expert, "expert");
      for (std::size_t i = 0; i < actual.gate.size(); ++i)
        REQUIRE(actual.gate[i] == (actual.expert[i] < 0 ? 0 : clean.gate[i]));
      auto const d = run_backward<float>(p, actual.expert, test::values(2200, 1.0));
      for (std::int64_t row : {5, 6, 1050})
        for (std::int64_t j = 0; j < experts; ++j) REQUIRE(d[at(row * experts + j)] == 0);
      CHECK(finite(d, 0, static_cast<std::int64_t>(d.size())));
    }
}

TEST_CASE("router: gradients equal central differences") {
  for (auto gate : all_gates)
    for (std::int64_t k : {1, 3, 6}) {
      problem const p{5, 6, k, test::random_normal(30, 1), test::random_normal(6, 2), {.gate = gate}};
      auto const chosen = run<double>(p).expert;
      auto const d_gate = test::random_normal(5 * k, 3);
      auto const loss = [&](test::values const& x) {
        double s = 0;
        for (std::int64_t i = 0; i < 5; ++i) {
          std::vector<std::int64_t> row;
          for (std::int64_t a = 0; a < k; ++a) row.push_back(static_cast<std::int64_t>(chosen[at(i * k + a)]));
          auto const g = gates(x.data() + i * 6, 6, row, gate);
          for (std::int64_t a = 0; a < k; ++a) s += g[at(a)] * d_gate[at(i * k + a)];
        }
        return s;
      };
      auto const d = run_backward<double>(p, chosen, d_gate);
      if (gate == gate_function::softmax_selected && k == 1)  // constant
        for (double x : d) CHECK(std::abs(x) < 1e-15);
      else
        test::check_gradient(loss, p.logits, d, "d_logits");
      test::check_close(run_backward<float>(p, chosen, d_gate), d, k == 1 ? 1e-5 : test::tolerance<float>(12), "float");
    }
}

TEST_CASE("router: softmax gates over the selected sum to one; a row's result does not depend on its neighbours") {
  problem const p{77, 16, 4, test::random_normal(77 * 16, 1, 3.0), {}, {.gate = gate_function::softmax_selected}};
  auto const whole = run<float>(p);
  for (std::int64_t i = 0; i < 77; ++i) {
    double sum = 0;
    for (std::int64_t a = 0; a < 4; ++a) sum += whole.gate[at(4 * i + a)];
    CHECK(sum == doctest::Approx(1).epsilon(1e-6));
    problem alone{1, 16, 4, {p.logits.begin() + i * 16, p.logits.begin() + (i + 1) * 16}, {}, p.options};
    auto const one = run<float>(alone);
    for (std::int64_t a = 0; a < 4; ++a) {
      CHECK(one.expert[at(a)] == whole.expert[at(4 * i + a)]);
      CHECK(one.gate[at(a)] == whole.gate[at(4 * i + a)]);
    }
  }
}

TEST_CASE("router: the same bits in every run, for any number of threads") {
  router::options const softmax{.gate = gate_function::softmax};
  problem const p{5000, 8, 2, test::random_normal(40000, 1), test::random_normal(8, 2), softmax};
  auto const one = run<float>(p);
  auto const d_gate = test::random_normal(10000, 3);
  auto const d = run_backward<float>(p, one.expert, d_gate);
  test::each_thread_count({1, 2, 5}, [&](test_policy policy) {
    auto const again = run<float>(p, policy);
    test::check_equal(again.expert, one.expert, "expert");
    test::check_equal(again.gate, one.gate, "gate");
    test::check_equal(run_backward<float>(p, one.expert, d_gate, policy), d, "d_logits");
  });
}

TEST_CASE("router: takes strided logits and writes strided results") {
  auto const wide = test::random_normal(20 * 12, 1);
  problem p{20, 5, 2, {}, {}};
  for (std::int64_t i = 0; i < 20; ++i)
    for (std::int64_t j = 0; j < 5; ++j) p.logits.push_back(wide[at(i * 12 + 4 + j)]);
  auto const expected = run<double>(p);
  auto const logits = test::upload<double>(wide, 20, 12);
  auto expert = test::upload<std::int32_t>(test::values(60, 7), 20, 3);
  auto gate = test::upload<double>(test::values(80, 7), 20, 4);
  router::forward<test_policy, double>(make_policy(), {.logits = logits.columns(4, 5)},
                                       {.expert = expert.columns(1, 2), .gate = gate.columns(1, 2)});
  auto const e = test::download(expert), g = test::download(gate);
  for (std::int64_t i = 0; i < 20; ++i) {
    for (std::int64_t a = 0; a < 2; ++a) {
      CHECK(e[at(3 * i + 1 + a)] == expected.expert[at(2 * i + a)]);
      CHECK(g[at(4 * i + 1 + a)] == expected.gate[at(2 * i + a)]);
    }
    CHECK(e[at(3 * i)] == 7);
    CHECK(g[at(4 * i)] == 7);
    CHECK(g[at(4 * i + 3)] == 7);
  }
}

TEST_CASE("router: arguments that disagree are named") {
  auto const logits = test::upload<float>(test::values(12), 3, 4);
  auto const offset = test::upload<float>(test::values(5), 5);
  auto expert = test::poisoned<std::int32_t>(3, 2);
  auto many = test::poisoned<std::int32_t>(3, 5);
  auto gate = test::poisoned<float>(3, 2);
  auto many_gates = test::poisoned<float>(3, 5);
  CHECK(test::message_of<shape_error>([&] {
          router::forward(make_policy(), {.logits = logits, .offset = offset}, {.expert = expert, .gate = gate});
        }) == "router: offset: got (5), expected (4)");
  CHECK(test::message_of<shape_error>([&] {
          router::forward(make_policy(), {.logits = logits}, {.expert = many, .gate = many_gates});
        }) == "router: expert: got 5 experts for a token, expected 1 to 4");
  CHECK(test::message_of<shape_error>([&] {
          router::forward(make_policy(), {.logits = logits}, {.expert = expert, .gate = many_gates});
        }) == "router: gate: got (3, 5), expected (3, 2)");
  auto d = test::poisoned<float>(3, 5);
  CHECK(test::message_of<shape_error>([&] {
          router::backward(make_policy(), {.logits = logits, .expert = expert, .d_gate = gate}, d.as_view());
        }) == "router.backward: logits: got (3, 4), expected (3, 5)");
}

TEST_CASE("load_bias: equals its definition, and balances a biased router within 200 steps") {
  auto offset = test::upload<double>({0, 1, 2, 3}, 4);
  auto const loads = test::upload<std::int64_t>({0, 3, 3, 5, 12}, 5);  // 3, 0, 2, 7: the mean is 3
  load_bias::forward(make_policy(), loads, offset.as_view(), 0.25);
  test::check_equal(test::download(offset), {0, 1.25, 2.25, 2.75});

  std::int64_t const rows = 2048, experts = 8;
  auto const logits = test::upload<float>(biased(rows, experts, 1, 1), rows, experts);
  auto g = zeros<float>(make_policy(), experts);
  auto expert = test::poisoned<std::int32_t>(rows, 1);
  auto gate = test::poisoned<float>(rows, 1);
  auto offsets = test::poisoned<std::int64_t>(experts + 1);
  auto source = test::poisoned<std::int32_t>(rows), row = test::poisoned<std::int32_t>(rows);
  auto const route = [&] {
    router::forward(make_policy(), {.logits = logits, .offset = g}, {.expert = expert, .gate = gate});
    return peak_load(test::download(expert), experts);
  };
  CHECK(route() > 2);
  for (int step = 0; step < 200; ++step) {
    expert_dispatch::plan(make_policy(), expert, {.offsets = offsets, .source = source, .row = row});
    load_bias::forward(make_policy(), offsets, g.as_view(), 0.02);
    route();
  }
  CHECK(route() < 1.1);
  auto const wrong = test::upload<std::int64_t>({0, 1}, 2);
  CHECK(test::message_of<shape_error>([&] { load_bias::forward(make_policy(), wrong, g.as_view(), 0.1); }) ==
        "load_bias: offsets: got (2), expected (9)");
}

TEST_CASE("quantile_balance: one round equals its definition") {
  std::int64_t const rows = 203, experts = 5;
  auto logits = test::random_normal(rows * experts, 1, 1.5);
  logits[7] = std::nan("");
  auto const start = test::random_normal(experts, 2);
  for (std::int64_t k : {1, 3, 5}) {
    test::values expected = start;
    if (k < experts) {
      test::values wanted[5];
      for (std::int64_t i = 0; i < rows; ++i) {
        if (!finite(logits, i * experts, experts)) continue;
        test::values score;
        for (std::int64_t j = 0; j < experts; ++j) score.push_back(2 * logits[at(i * experts + j)] + start[at(j)]);
        std::sort(score.rbegin(), score.rend());
        for (std::int64_t j = 0; j < experts; ++j) wanted[j].push_back(score[at(k)] - 2 * logits[at(i * experts + j)]);
      }
      for (std::int64_t j = 0; j < experts; ++j) {
        auto& w = wanted[j];
        std::sort(w.begin(), w.end());
        auto const q = w.size() * at(k) / at(experts);
        expected[at(j)] = (w[q - 1] + w[q]) / 2;
      }
      double const largest = *std::max_element(expected.begin(), expected.end());
      for (auto& g : expected) g -= largest;
    }
    auto offset = test::upload<double>(start, experts);
    quantile_balance::forward(make_policy(), test::upload<double>(logits, rows, experts), offset.as_view(),
                              {.top_k = k, .rounds = 1});
    test::check_close(test::download(offset), expected, 1e-14, "offset");
  }
}

TEST_CASE("quantile_balance: balances counts within 8 rounds, whatever the spread, and the same for any threads") {
  std::int64_t const rows = 4096, experts = 8;
  for (std::int64_t k : {1, 2})
    for (double spread : {1.0, 4.0}) {
      auto const x = biased(rows, experts, spread, spread);
      auto const logits = test::upload<float>(x, rows, experts);
      auto g = zeros<float>(make_policy(), experts);
      problem p{rows, experts, k, test::rounded<float>(x), test::download(g)};
      CHECK(peak_load(run<float>(p).expert, experts) > 2);
      quantile_balance::forward(make_policy(), logits, g.as_view(), {.top_k = k});
      p.offset = test::download(g);
      CHECK(peak_load(run<float>(p).expert, experts) < 1.05);
      test::each_thread_count({1, 5}, [&](test_policy policy) {
        auto again = zeros<float>(policy, experts);
        quantile_balance::forward(policy, logits, again.as_view(), {.top_k = k});
        test::check_equal(test::download(again), p.offset, "offset");
      });
    }
  auto g = test::upload<float>({std::nan(""), 0}, 2);
  quantile_balance::forward(make_policy(), test::upload<float>({1, 0, 2, 0, 3, 0, 4, 0}, 4, 2), g.as_view());
  CHECK(test::download(g)[1] == 0);
  CHECK(test::download(g)[0] == doctest::Approx(-5));  // half way between 2 beta and 3 beta
  CHECK(test::message_of<shape_error>([&] {
          quantile_balance::forward(make_policy(), test::upload<float>({1, 2}, 1, 2), g.as_view(), {.top_k = 3});
        }) == "quantile_balance: top_k: got 3, expected 1 to 2");
}

TEST_CASE("router, quantile_balance: take the scratch that they say") {
  using space = test_policy::memory_space;
  using dry = device::dry<test_policy>;
  auto const logits = test::poisoned<float>(3000, 8), gate = test::poisoned<float>(3000, 2);
  auto const offset = test::poisoned<float>(8);
  auto const expert = zeros<std::int32_t>(make_policy(), 3000, 2);
  auto const count = zeros<std::int32_t>(make_policy(), 1);
  auto route = arena<space>::measuring(), balance = arena<space>::measuring();
  router::forward(dry{&route}, {.logits = logits}, {.expert = expert, .gate = gate, .non_finite_rows = count});
  CHECK(route.peak() == router::scratch_bytes<space>(3000));
  quantile_balance::forward(dry{&balance}, logits, offset.as_view());
  CHECK(balance.peak() == quantile_balance::scratch_bytes<float, space>(3000, 8));
}
