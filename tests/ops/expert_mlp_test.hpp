#include "support/sums.hpp"
#include "support/support.hpp"
#include "support/thread_counts.hpp"

#include <blackmamba/ops/expert_dispatch/expert_dispatch.hpp>
#include <blackmamba/ops/expert_mlp/expert_mlp.hpp>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

using namespace blackmamba;

namespace {

std::size_t at(std::int64_t row, std::int64_t width, std::int64_t column) {
  return static_cast<std::size_t>(row * width + column);
}

/// What the operator is called with, as it sees it.
struct problem {
  std::int64_t experts, k, width, inner, hidden;
  test::values expert;  // of each slot, -1 for none
  test::values x, gate, fc1, fc2, fc1_bias, fc2_bias, d_y;

  std::int64_t slots() const { return static_cast<std::int64_t>(expert.size()); }
  std::int64_t tokens() const { return slots() / k; }

  template <class Activation, class T>
  static problem make(test::values const& expert, std::int64_t experts, std::int64_t k, std::int64_t width,
                      std::int64_t inner, bool biased = false) {
    problem p{experts, k, width, inner, Activation::gated ? 2 * inner : inner, expert, {}, {}, {}, {}, {}, {}, {}};
    // Weights so that every line's results are about as large as what it reads.
    double const in1 = 1 / std::sqrt(static_cast<double>(width)), in2 = 1 / std::sqrt(static_cast<double>(inner));
    p.x = test::rounded<T>(test::random_normal(p.tokens() * width, 1));
    p.gate = test::rounded<accum_t<T>>(test::random_uniform(p.slots(), 2, 0.0, 1.0));
    p.fc1 = test::rounded<T>(test::random_normal(experts * p.hidden * width, 3, 2 * in1));
    p.fc2 = test::rounded<T>(test::random_normal(experts * width * inner, 4, 2 * in2));
    if (biased) {
      p.fc1_bias = test::rounded<accum_t<T>>(test::random_normal(experts * p.hidden, 5));
      p.fc2_bias = test::rounded<accum_t<T>>(test::random_normal(experts * width, 6));
    }
    p.d_y = test::rounded<T>(test::random_normal(p.tokens() * width, 7));
    return p;
  }
  std::string name() const {
    return std::to_string(tokens()) + " tokens, " + std::to_string(experts) + " experts, k " + std::to_string(k) +
           ", width " + std::to_string(width) + ", inner " + std::to_string(inner) +
           (fc1_bias.empty() ? "" : ", biased");
  }
};

/// So many slots for each expert and so many without one, shuffled.
test::values shuffled(std::vector<std::int64_t> const& counts, std::int64_t without = 0) {
  test::values v(static_cast<std::size_t>(without), -1.0);
  for (std::size_t e = 0; e < counts.size(); ++e)
    v.insert(v.end(), static_cast<std::size_t>(counts[e]), static_cast<double>(e));
  for (std::size_t i = v.size(); i > 1; --i)
    std::swap(v[i - 1], v[static_cast<std::size_t>(test::random_integer(5, i, 0, static_cast<std::int64_t>(i) - 1))]);
  return v;
}

/// The arguments, in the policy's memory.
template <class T>
struct arguments {
  using A = accum_t<T>;
  tensor<test::test_space, T, dyn, dyn> x, d_y;
  tensor<test::test_space, A, dyn, dyn> gate, fc1_bias, fc2_bias;
  tensor<test::test_space, T, dyn, dyn, dyn> fc1, fc2;
  tensor<test::test_space, std::int64_t, dyn> offsets;
  tensor<test::test_space, std::int32_t, dyn> source, row;

  explicit arguments(problem const& p)
      : x(test::upload<T>(p.x, p.tokens(), p.width)),
        d_y(test::upload<T>(p.d_y, p.tokens(), p.width)),
        gate(test::upload<A>(p.gate, p.tokens(), p.k)),
        fc1(test::upload<T>(p.fc1, p.experts, p.hidden, p.width)),
        fc2(test::upload<T>(p.fc2, p.experts, p.width, p.inner)),
        offsets(test::poisoned<std::int64_t>(p.experts + 1)),
        source(test::poisoned<std::int32_t>(p.slots())),
        row(test::poisoned<std::int32_t>(p.slots())) {
    if (!p.fc1_bias.empty()) fc1_bias = test::upload<A>(p.fc1_bias, p.experts, p.hidden);
    if (!p.fc2_bias.empty()) fc2_bias = test::upload<A>(p.fc2_bias, p.experts, p.width);
    expert_dispatch::plan(make_policy(), test::upload<std::int32_t>(p.expert, p.tokens(), p.k), plan());
  }
  expert_dispatch::routing<test_policy> plan() const { return {.offsets = offsets, .source = source, .row = row}; }
  expert_mlp::inputs<test_policy, T> inputs() const {
    expert_mlp::inputs<test_policy, T> in{.x = x, .gate = gate, .plan = plan(), .fc1 = fc1, .fc2 = fc2};
    if (fc1_bias.size() > 0) in.fc1_bias = fc1_bias;
    if (fc2_bias.size() > 0) in.fc2_bias = fc2_bias;
    return in;
  }
};

/// What forward leaves.
template <class T>
struct results {
  tensor<test::test_space, T, dyn, dyn> y, permuted, h, activated, rows;
  explicit results(problem const& p)
      : y(test::poisoned<T>(p.tokens(), p.width)),
        permuted(test::poisoned<T>(p.slots(), p.width)),
        h(test::poisoned<T>(p.slots(), p.hidden)),
        activated(test::poisoned<T>(p.slots(), p.inner)),
        rows(test::poisoned<T>(p.slots(), p.width)) {}
  expert_mlp::kept<test_policy, T> keep() const {
    return {.permuted = permuted, .h = h, .activated = activated, .rows = rows};
  }
};

/// y with nothing kept.
template <class Activation, class T>
test::values run(problem const& p, arguments<T> const& a, test_policy const& policy = make_policy()) {
  auto y = test::poisoned<T>(p.tokens(), p.width);
  expert_mlp::forward<Activation>(policy, a.inputs(), y.as_view());
  return test::download(y);
}

template <class Activation>
double activated(double x) {
  if constexpr (std::is_same_v<typename Activation::function, activation::silu>) return x / (1 + std::exp(-x));
  return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
}

/// Whether sums have an order of their own where nothing is kept: the way of few tokens on a Hopper.
template <class Activation, class T>
bool has_own_order(problem const& p) {
  return std::is_same_v<test::test_space, space::device> && sizeof(T) == 2 && Activation::gated && p.k == 1 &&
         p.tokens() <= 4 && p.width % 8 == 0 && p.inner % 8 == 0;
}
/// y from activations that may have been rounded otherwise than those of `expected`, the sums of its terms: a row and y
/// are rounded, by u_T each; and where sums of the first product have another order, a few units, close to the middle
/// between two numbers, are another one: by 2 u_T of a half of h, about twice that through the activation, and 2 u_T of
/// the unit. 8 u_T of all terms' norm is more than one of them makes, however large.
template <class T>
void check_roundings(test::values const& actual, test::sums const& expected, std::int64_t terms,
                     std::string const& what) {
  REQUIRE_MESSAGE(actual.size() == expected.size(), what);
  double const u = test::unit_roundoff<T>(), walk = test::tolerance<T>(terms) - u;
  double const least = std::is_same_v<T, blackmamba::half> ? 0x1p-24 : 0.0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    double const e = expected[i].value, norm = std::sqrt(expected[i].squares);
    bool const within = std::abs(actual[i] - e) <= 2 * u * std::abs(e) + (8 * u + walk) * norm + least;
    REQUIRE_MESSAGE(within, what << ": element " << i << " is " << actual[i] << ", expected " << e);
  }
}

/// Each line against its definition in double on what the line before has left, and y without keeping anything.
template <class Activation, class T>
void check_forward(problem const& p) {
  arguments<T> const a(p);
  results<T> r(p);
  expert_mlp::forward<Activation>(make_policy(), a.inputs(), r.y.as_view(), r.keep());
  auto const permuted = test::download(r.permuted), h = test::download(r.h), inner = test::download(r.activated);
  auto const rows = test::download(r.rows), y = test::download(r.y);
  auto const offsets = test::download(a.offsets), source = test::download(a.source);
  auto const used = static_cast<std::int64_t>(offsets.back());

  test::values x_rows, expected_inner, inner_used;
  test::sums h_sums, row_sums, y_sums(y.size()), exact(y.size());
  auto const upto = [&](test::values const& v, std::int64_t width) {
    return test::values(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(used * width));
  };
  std::size_t e = 0;
  for (std::int64_t i = 0; i < used; ++i) {
    while (static_cast<double>(i) >= offsets[e + 1]) ++e;
    auto const slot = static_cast<std::int64_t>(source[static_cast<std::size_t>(i)]), token = slot / p.k;
    auto const expert = static_cast<std::int64_t>(e);
    for (std::int64_t c = 0; c < p.width; ++c) x_rows.push_back(p.x[at(token, p.width, c)]);
    for (std::int64_t o = 0; o < p.hidden; ++o) {
      test::sum s;
      if (!p.fc1_bias.empty()) s.add(p.fc1_bias[at(expert, p.hidden, o)]);
      for (std::int64_t c = 0; c < p.width; ++c)
        s.add(p.x[at(token, p.width, c)] * p.fc1[at(expert * p.hidden + o, p.width, c)]);
      h_sums.push_back(s);
    }
    for (std::int64_t o = 0; o < p.inner; ++o)
      expected_inner.push_back(activated<Activation>(h[at(i, p.hidden, o)]) *
                               (Activation::gated ? h[at(i, p.hidden, p.inner + o)] : 1.0));
    for (std::int64_t o = 0; o < p.width; ++o) {
      double const gate = p.gate[static_cast<std::size_t>(slot)];
      test::sum s;
      if (!p.fc2_bias.empty()) s.add(p.fc2_bias[at(expert, p.width, o)]);
      for (std::int64_t c = 0; c < p.inner; ++c)
        s.add(inner[at(i, p.inner, c)] * p.fc2[at(expert * p.width + o, p.inner, c)]);
      row_sums.push_back(s);
      y_sums[at(token, p.width, o)].add(gate * rows[at(i, p.width, o)]);
      exact[at(token, p.width, o)] = {gate * s.value, gate * gate * s.squares};
    }
  }
  test::check_equal(upto(permuted, p.width), x_rows, "permuted, " + p.name());
  test::check_sums<T>(upto(h, p.hidden), h_sums, p.width + 1, "h, " + p.name());
  test::check_close_at_scale(upto(inner, p.inner), expected_inner, 1.0, 2 * test::tolerance<T>(),
                             "activated, " + p.name());
  test::check_sums<T>(upto(rows, p.width), row_sums, p.inner + 1, "rows, " + p.name());
  test::check_sums<T>(y, y_sums, p.k, "y, " + p.name());
  auto const alone = run<Activation>(p, a);
  if (p.k == 1 && p.tokens() <= 4) check_roundings<T>(alone, exact, p.inner + 1, "y with nothing kept, " + p.name());
  if (!has_own_order<Activation, T>(p)) test::check_equal(alone, y, "y with nothing kept, " + p.name());
}

struct gradients {
  test::values d_x, d_gate, d_fc1, d_fc2, d_fc1_bias, d_fc2_bias;
};
template <class Activation, class T>
gradients run_backward(problem const& p) {
  using A = accum_t<T>;
  arguments<T> const a(p);
  results<T> r(p);
  expert_mlp::forward<Activation>(make_policy(), a.inputs(), r.y.as_view(), r.keep());
  auto d_x = test::poisoned<T>(p.tokens(), p.width);
  auto d_gate = test::poisoned<A>(p.tokens(), p.k);
  auto d_fc1 = zeros<A>(make_policy(), p.experts, p.hidden, p.width);
  auto d_fc2 = zeros<A>(make_policy(), p.experts, p.width, p.inner);
  auto d_fc1_bias = zeros<A>(make_policy(), p.experts, p.hidden);
  auto d_fc2_bias = zeros<A>(make_policy(), p.experts, p.width);
  expert_mlp::backward<Activation, test_policy, T>(make_policy(),
                                                   {.gate = a.gate,
                                                    .plan = a.plan(),
                                                    .fc1 = a.fc1,
                                                    .fc2 = a.fc2,
                                                    .permuted = r.permuted,
                                                    .h = r.h,
                                                    .activated = r.activated,
                                                    .rows = r.rows,
                                                    .d_y = a.d_y},
                                                   {.d_x = d_x,
                                                    .d_gate = d_gate,
                                                    .d_fc1 = d_fc1,
                                                    .d_fc2 = d_fc2,
                                                    .d_fc1_bias = d_fc1_bias,
                                                    .d_fc2_bias = d_fc2_bias});
  return {test::download(d_x),   test::download(d_gate),     test::download(d_fc1),
          test::download(d_fc2), test::download(d_fc1_bias), test::download(d_fc2_bias)};
}

/// Sizes around the tiles, empty experts, one expert for all, tokens without an expert.
struct load {
  std::vector<std::int64_t> counts;
  std::int64_t without;
};
std::vector<load> const loads = {{{3}, 0},
                                 {{0, 0, 0}, 4},
                                 {{1, 0, 2, 5}, 1},
                                 {{0, 1, 7, 63, 64, 65, 0}, 3},
                                 {{129, 0, 128, 5, 127, 63}, 40},
                                 {{0, 0, 200, 0}, 0}};

}  // namespace

TEST_CASE_TEMPLATE("expert_mlp: equals its definition for every load and type", T, STORAGE_TYPES) {
  for (auto const& l : test::sizes(loads)) {
    auto const expert = shuffled(l.counts, l.without);
    auto const experts = static_cast<std::int64_t>(l.counts.size());
    check_forward<swiglu, T>(problem::make<swiglu, T>(expert, experts, 1, 40, 24));
    check_forward<swiglu, T>(problem::make<swiglu, T>(expert, experts, 1, 17, 9, true));
    check_forward<geglu, T>(problem::make<geglu, T>(expert, experts, 1, 24, 40, true));
    check_forward<plain_gelu, T>(problem::make<plain_gelu, T>(expert, experts, 1, 9, 33));
    if (expert.size() % 2 == 0) check_forward<swiglu, T>(problem::make<swiglu, T>(expert, experts, 2, 40, 16, true));
  }
  // So few tokens that kernels of their own may take them, with and without a common expert.
  for (test::values const& expert :
       test::sizes<test::values>({{2}, {1, 1}, {3, 0, 3}, {0, -1, 2, 2}, {1, 1, 1, 1}, {-1}})) {
    check_forward<swiglu, T>(problem::make<swiglu, T>(expert, 4, 1, 296, 136, true));
    check_forward<geglu, T>(problem::make<geglu, T>(expert, 40, 1, 1600, 24));
    check_forward<swiglu, T>(problem::make<swiglu, T>(expert, 4, 1, 8, 4104));
  }
  // More parts of a product than a block's ring has stages.
  if (sizeof(T) == 2) {
    check_forward<swiglu, T>(problem::make<swiglu, T>({1}, 2, 1, 1472, 1320));
    check_forward<swiglu, T>(problem::make<swiglu, T>({2, 0, 1, 0}, 3, 1, 1472, 136));
  }
  check_forward<swiglu, T>(problem::make<swiglu, T>({}, 3, 1, 8, 8));
  check_forward<swiglu, T>(problem::make<swiglu, T>({0, 1, 0}, 2, 1, 8, 0, true));
}

TEST_CASE_TEMPLATE("expert_mlp: equals its definition over several tiles", T, bfloat16, blackmamba::half) {
  for (std::int64_t inner : {8, 128, 200}) {
    check_forward<swiglu, T>(
        problem::make<swiglu, T>(shuffled({129, 0, 128, 5, 127, 63}, 9), 6, 1, 280, inner, inner == 200));
    check_forward<geglu, T>(problem::make<geglu, T>(shuffled({300, 20}, 0), 2, 2, 72, inner, inner == 128));
  }
  // Depths with fewer steps than a result takes to leave, and with more.
  for (std::int64_t width : {64, 136, 1096})
    check_forward<swiglu, T>(problem::make<swiglu, T>(shuffled({140, 70, 1}, 2), 3, 1, width, 264));
  check_forward<swiglu, T>(problem::make<swiglu, T>(shuffled(std::vector<std::int64_t>(40, 17)), 40, 1, 40, 136));
}

TEST_CASE("expert_mlp: y does not depend on the other tokens of a layer") {
  auto const p = problem::make<swiglu, bfloat16>(shuffled({400, 100, 300}, 5), 3, 1, 136, 264);
  arguments<bfloat16> const a(p);
  auto const y = run<swiglu>(p, a);
  auto half_of = p;
  // The first half of the tokens: still so many that the same kernels take them.
  auto const first = [&](test::values& v, std::int64_t width) {
    v.resize(static_cast<std::size_t>(p.tokens() / 2 * width));
  };
  first(half_of.expert, 1);
  first(half_of.x, p.width);
  first(half_of.gate, 1);
  first(half_of.d_y, p.width);
  auto const y_half = run<swiglu>(half_of, arguments<bfloat16>(half_of));
  test::check_equal(y_half, test::values(y.begin(), y.begin() + static_cast<std::ptrdiff_t>(y_half.size())), "y");
}

TEST_CASE("expert_mlp: two runs give the same bits") {
  auto const p = problem::make<swiglu, bfloat16>(shuffled({400, 0, 100, 13}, 5), 4, 1, 136, 264);
  arguments<bfloat16> const a(p);
  auto const y = run<swiglu>(p, a);
  auto const d = run_backward<swiglu, bfloat16>(p);
  for (int i = 0; i < 3; ++i) {
    test::check_equal(run<swiglu>(p, a), y, "y");
    auto const again = run_backward<swiglu, bfloat16>(p);
    test::check_equal(again.d_x, d.d_x, "d_x");
    test::check_equal(again.d_gate, d.d_gate, "d_gate");
    test::check_equal(again.d_fc1, d.d_fc1, "d_fc1");
    test::check_equal(again.d_fc2, d.d_fc2, "d_fc2");
  }
}

TEST_CASE_TEMPLATE("expert_mlp: gradients equal central differences", Activation, swiglu, geglu, plain_silu) {
  for (std::int64_t k : {1, 2}) {
    auto const p = problem::make<Activation, double>({0, 2, -1, 0, 1, 0, 2, 0}, 4, k, 3, 5, true);
    auto const g = run_backward<Activation, double>(p);
    auto const loss = [&](test::values problem::*which) {
      return [&p, which](test::values const& v) {
        problem moved = p;
        moved.*which = v;
        return test::weighted_sum(run<Activation>(moved, arguments<double>(moved)), moved.d_y);
      };
    };
    test::check_gradient(loss(&problem::x), p.x, g.d_x, "d_x");
    test::check_gradient(loss(&problem::gate), p.gate, g.d_gate, "d_gate");
    test::check_gradient(loss(&problem::fc1), p.fc1, g.d_fc1, "d_fc1");
    test::check_gradient(loss(&problem::fc2), p.fc2, g.d_fc2, "d_fc2");
    test::check_gradient(loss(&problem::fc1_bias), p.fc1_bias, g.d_fc1_bias, "d_fc1_bias");
    test::check_gradient(loss(&problem::fc2_bias), p.fc2_bias, g.d_fc2_bias, "d_fc2_bias");
  }
}

TEST_CASE_TEMPLATE("expert_mlp: gradients in lower precision", T, float, bfloat16, blackmamba::half) {
  for (bool large : {false, true}) {
    auto const p = problem::make<swiglu, T>(large ? shuffled({129, 0, 70, 5}, 4) : shuffled({2, 0, 7}, 1),
                                            large ? 4 : 3, 1, large ? 136 : 24, large ? 72 : 16, true);
    auto const g = run_backward<swiglu, T>(p), exact = run_backward<swiglu, double>(p);
    // A gradient passes through at most seven roundings of about as large numbers, some of them terms of sums.
    double const tolerance = 8 * test::unit_roundoff<T>() + 8 * test::tolerance<float>(256);
    test::check_close(g.d_x, exact.d_x, tolerance, "d_x");
    test::check_close(g.d_gate, exact.d_gate, tolerance, "d_gate");
    test::check_close(g.d_fc1, exact.d_fc1, tolerance, "d_fc1");
    test::check_close(g.d_fc2, exact.d_fc2, tolerance, "d_fc2");
    test::check_close(g.d_fc1_bias, exact.d_fc1_bias, tolerance, "d_fc1_bias");
    test::check_close(g.d_fc2_bias, exact.d_fc2_bias, tolerance, "d_fc2_bias");
  }
}

TEST_CASE("expert_mlp: tells the scratch that it takes, to the byte") {
  auto const p = problem::make<swiglu, bfloat16>(shuffled({40, 0, 100}, 5), 3, 1, 136, 264);
  arguments<bfloat16> const a(p);
  arena<test::test_space> workspace(
      expert_mlp::scratch_bytes<swiglu, test_policy, bfloat16>(p.slots(), p.width, p.inner));
  auto policy = make_policy();
  policy.workspace = &workspace;
  test::check_equal(run<swiglu>(p, a, policy), run<swiglu>(p, a), "y");
  CHECK(workspace.peak() == workspace.capacity());
}

TEST_CASE("expert_mlp: shapes that disagree are named") {
  auto const p = problem::make<swiglu, float>({0, 1, 0}, 2, 1, 4, 6);
  arguments<float> const a(p);
  auto y = test::poisoned<float>(3, 4);
  auto const message = [&](expert_mlp::inputs<test_policy, float> const& in,
                           expert_mlp::kept<test_policy, float> const& keep = {}) {
    return test::message_of<shape_error>([&] { expert_mlp::forward<swiglu>(make_policy(), in, y.as_view(), keep); });
  };
  auto const narrow = test::poisoned<float>(2, 11, 4);
  auto in = a.inputs();
  in.fc1 = narrow;
  CHECK(message(in) == "expert_mlp: fc1: got (2, 11, 4), expected (2, 12, 4)");
  in = a.inputs();
  auto const wide = test::poisoned<float>(3, 5);
  in.x = wide;
  CHECK(message(in) == "expert_mlp: x: got (3, 5), expected (3, 4)");
  in = a.inputs();
  auto const short_gate = test::poisoned<float>(2, 1);
  in.gate = short_gate;
  CHECK(message(in) == "expert_mlp: gate: got (2, 1), expected (3, any)");
  CHECK(message(a.inputs(), {.h = wide}) == "expert_mlp: kept.h: got (3, 5), expected (3, 12)");
}
