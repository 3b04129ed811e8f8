#include "support/sums.hpp"
#include "support/support.hpp"
#include "support/thread_counts.hpp"

#include <blackmamba/ops/router_dispatch/router_dispatch.hpp>

#include <cmath>
#include <cstddef>
#include <limits>
#include <string>

using namespace blackmamba;

namespace {

struct problem {
  std::int64_t rows, experts, k, width;
  bool biased = false, offset = false;
  std::int64_t capacity = 0;
  gate_function gate = gate_function::sigmoid;
  bool spoilt = false;  // some rows are not finite

  std::string name() const {
    return std::to_string(rows) + " rows, " + std::to_string(experts) + " experts, k " + std::to_string(k) +
           ", width " + std::to_string(width) + ", capacity " + std::to_string(capacity);
  }
};

template <class T>
struct results {
  using A = accum_t<T>;
  tensor<test::test_space, A, dyn, dyn> logits, gate;
  tensor<test::test_space, std::int32_t, dyn, dyn> expert;
  tensor<test::test_space, std::int32_t, dyn> refused, source, row;
  tensor<test::test_space, std::int64_t, dyn> offsets;

  explicit results(problem const& p)
      : logits(test::poisoned<A>(p.rows, p.experts)),
        gate(test::poisoned<A>(p.rows, p.k)),
        expert(test::poisoned<std::int32_t>(p.rows, p.k)),
        refused(test::poisoned<std::int32_t>(1)),
        source(test::poisoned<std::int32_t>(p.rows * p.k)),
        row(test::poisoned<std::int32_t>(p.rows * p.k)),
        offsets(test::poisoned<std::int64_t>(p.experts + 1)) {}
  router::selection<test_policy, A> chosen() const {
    return {.expert = expert, .gate = gate, .non_finite_rows = refused};
  }
  expert_dispatch::routing<test_policy> plan() const { return {.offsets = offsets, .source = source, .row = row}; }
};

template <class T>
void check_same(results<T> const& actual, results<T> const& expected, std::string const& name) {
  test::check_equal(test::download(actual.expert), test::download(expected.expert), "expert, " + name);
  test::check_equal(test::download(actual.gate), test::download(expected.gate), "gate, " + name);
  test::check_equal(test::download(actual.refused), test::download(expected.refused), "refused, " + name);
  test::check_equal(test::download(actual.offsets), test::download(expected.offsets), "offsets, " + name);
  test::check_equal(test::download(actual.source), test::download(expected.source), "source, " + name);
  test::check_equal(test::download(actual.row), test::download(expected.row), "row, " + name);
}

/// Logits against their definition, and everything else against the operators that it stands for, on those logits.
template <class T>
results<T> check(problem const& p, test_policy const& policy = make_policy()) {
  using A = accum_t<T>;
  auto x_values = test::rounded<T>(test::random_normal(p.rows * p.width, 1));
  auto const weight_values = test::rounded<T>(test::random_normal(p.experts * p.width, 2));
  auto const bias_values = test::rounded<A>(test::random_normal(p.experts, 3));
  if (p.spoilt)
    for (std::int64_t r = 0; r < p.rows; r += 5)
      x_values[static_cast<std::size_t>(r * p.width + r % p.width)] = std::numeric_limits<double>::quiet_NaN();
  auto const x = test::upload<T>(x_values, p.rows, p.width),
             weight = test::upload<T>(weight_values, p.experts, p.width);
  auto const bias = test::upload<A>(bias_values, p.experts);
  auto const offset = test::upload<A>(test::random_normal(p.experts, 4, 3.0), p.experts);
  using vector = in<test_policy, A, dyn>;
  results<T> r(p), steps(p), again(p);
  router::options const how{.gate = p.gate};
  router_dispatch::forward<test_policy, T>(policy,
                                           {.x = x,
                                            .weight = weight,
                                            .bias = p.biased ? vector(bias) : vector(),
                                            .offset = p.offset ? vector(offset) : vector()},
                                           {.logits = r.logits, .chosen = r.chosen(), .plan = r.plan()}, how,
                                           p.capacity);
  if (!p.spoilt) {
    test::sums s;
    for (std::int64_t i = 0; i < p.rows; ++i)
      for (std::int64_t e = 0; e < p.experts; ++e) {
        test::sum one;
        if (p.biased) one.add(bias_values[static_cast<std::size_t>(e)]);
        for (std::int64_t c = 0; c < p.width; ++c)
          one.add(x_values[static_cast<std::size_t>(i * p.width + c)] *
                  weight_values[static_cast<std::size_t>(e * p.width + c)]);
        s.push_back(one);
      }
    test::check_sums<A>(test::download(r.logits), s, p.width + 1, "logits, " + p.name());
  }
  router::inputs<test_policy, A> const in{.logits = r.logits, .offset = p.offset ? vector(offset) : vector()};
  router::forward<test_policy, A>(make_policy(), in, steps.chosen(), how);
  expert_dispatch::plan(make_policy(), steps.expert, steps.plan(), p.capacity);
  check_same(r, steps, p.name());
  router_dispatch::from_logits<test_policy, A>(policy, in, again.chosen(), again.plan(), how, p.capacity);
  check_same(again, steps, p.name() + ", from logits");
  return r;
}

}  // namespace

TEST_CASE_TEMPLATE("router_dispatch: equals linear, router and plan", T, STORAGE_TYPES) {
  for (std::int64_t rows : {0, 1, 2, 15, 16, 17, 31, 33, 64, 100, 127, 128, 129, 200, 300}) {
    check<T>({.rows = rows, .experts = 8, .k = 1, .width = 72, .biased = true});
    check<T>({.rows = rows, .experts = 8, .k = 2, .width = 40, .offset = true, .capacity = 1 + rows / 10});
    check<T>({.rows = rows, .experts = 3, .k = 1, .width = 17, .biased = true, .spoilt = true});
  }
  check<T>({.rows = 50, .experts = 1, .k = 1, .width = 8});
  check<T>({.rows = 77, .experts = 7, .k = 7, .width = 328, .gate = gate_function::softmax_selected});
  check<T>({.rows = 77, .experts = 64, .k = 5, .width = 24, .gate = gate_function::softmax, .spoilt = true});
  check<T>({.rows = 90, .experts = 70, .k = 2, .width = 24});
  check<T>({.rows = 128, .experts = 8, .k = 1, .width = 1472, .spoilt = true});
}

TEST_CASE("router_dispatch: equals linear, router and plan for many rows") {
  for (std::int64_t rows : {1000, 1023, 1025, 4100, 8191, 8192, 8193, 20000}) {
    check<bfloat16>({.rows = rows, .experts = 8, .k = 1, .width = 8, .offset = true, .spoilt = rows % 2 == 1});
    check<float>({.rows = rows, .experts = 5, .k = 2, .width = 4, .capacity = rows / 4, .spoilt = rows % 2 == 1});
  }
  check<bfloat16>({.rows = 1024, .experts = 64, .k = 2, .width = 8});
}

TEST_CASE("router_dispatch: two runs give the same bits, and rows do not depend on others") {
  problem const p{.rows = 128, .experts = 8, .k = 2, .width = 136, .biased = true};
  auto const r = check<bfloat16>(p);
  for (int i = 0; i < 3; ++i) {
    auto const again = check<bfloat16>(p);
    test::check_equal(test::download(again.logits), test::download(r.logits), "logits");
    check_same(again, r, "again");
  }
  auto fewer = p;
  fewer.rows = 20;
  auto const some = test::download(check<bfloat16>(fewer).logits);
  auto all = test::download(r.logits);
  all.resize(some.size());
  test::check_equal(some, all, "logits of fewer rows");
}

TEST_CASE("router_dispatch: tells the scratch that it takes, to the byte") {
  for (std::int64_t rows : {5, 300, 20000}) {
    problem const p{.rows = rows, .experts = 8, .k = 1, .width = 64};
    arena<test::test_space> workspace(
        router_dispatch::scratch_bytes<test_policy, bfloat16>(rows, p.width, p.experts, p.k));
    auto policy = make_policy();
    policy.workspace = &workspace;
    check<bfloat16>(p, policy);
    CHECK(workspace.peak() == workspace.capacity());
  }
}

TEST_CASE("router_dispatch: shapes that disagree are named") {
  problem const p{.rows = 4, .experts = 3, .k = 1, .width = 8};
  results<float> r(p);
  auto const x = test::poisoned<float>(4, 8), weight = test::poisoned<float>(3, 7);
  CHECK(test::message_of<shape_error>([&] {
          router_dispatch::forward<test_policy, float>(make_policy(), {.x = x, .weight = weight},
                                                       {.logits = r.logits, .chosen = r.chosen(), .plan = r.plan()});
        }) == "router_dispatch: weight: got (3, 7), expected (3, 8)");
  auto const short_gate = test::poisoned<float>(3, 1);
  auto chosen = r.chosen();
  chosen.gate = short_gate;
  CHECK(test::message_of<shape_error>([&] {
          router_dispatch::from_logits<test_policy, float>(make_policy(), {.logits = r.logits}, chosen, r.plan());
        }) == "router_dispatch.from_logits: chosen.gate: got (3, 1), expected (4, 1)");
}
