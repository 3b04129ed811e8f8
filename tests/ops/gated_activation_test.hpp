#include "support/support.hpp"

#include <blackmamba/ops/gated_activation/gated_activation.hpp>

using namespace blackmamba;

namespace {

/// A user's own activation: the squared rectifier (So et al., arXiv 2109.08668).
struct squared_relu {
  template <class X>
  BLACKMAMBA_HD static X apply(X x) {
    X const positive = max(x, X(0));
    return positive * positive;
  }
  template <class X>
  BLACKMAMBA_HD static X derivative(X x) {
    return X(2) * max(x, X(0));
  }
  BLACKMAMBA_HD static float max(float a, float b) { return a > b ? a : b; }
  BLACKMAMBA_HD static double max(double a, double b) { return a > b ? a : b; }
  template <class X>
  requires(!std::is_arithmetic_v<X>) static X max(X a, X b) { return select(a > b, a, b); }
};

/// The definitions, in double.
double value(activation::silu, double x) { return x / (1 + std::exp(-x)); }
double value(activation::gelu, double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }
double value(activation::identity, double x) { return x; }
double value(squared_relu, double x) { return x > 0 ? x * x : 0.0; }

template <class Activation>
test::values reference(test::values const& gate, test::values const& up) {
  test::values y(gate.size());
  for (std::size_t i = 0; i < y.size(); ++i) y[i] = value(Activation{}, gate[i]) * (up.empty() ? 1.0 : up[i]);
  return y;
}

template <class Activation, class T>
test::values run(test::values const& gate, test::values const& up, std::int64_t rows, std::int64_t width,
                 test_policy policy = make_policy()) {
  auto const g = test::upload<T>(gate, rows, width);
  auto y = test::poisoned<T>(rows, width);
  if (up.empty()) {
    gated_activation::forward<Activation>(policy, g, {}, y.as_view());
  } else {
    auto const u = test::upload<T>(up, rows, width);
    gated_activation::forward<Activation>(policy, g, u, y.as_view());
  }
  return test::download(y);
}

struct gradients {
  test::values d_gate, d_up;
};
template <class Activation, class T>
gradients run_backward(test::values const& gate, test::values const& up, test::values const& d_y, std::int64_t rows,
                       std::int64_t width, test_policy policy = make_policy()) {
  auto const g = test::upload<T>(gate, rows, width), dy = test::upload<T>(d_y, rows, width);
  auto d_gate = test::poisoned<T>(rows, width), d_up = test::poisoned<T>(rows, width);
  if (up.empty()) {
    gated_activation::backward<Activation, test_policy, T>(policy, {.gate = g, .up = {}, .d_y = dy},
                                                           {.d_gate = d_gate});
    return {test::download(d_gate), {}};
  }
  auto const u = test::upload<T>(up, rows, width);
  gated_activation::backward<Activation, test_policy, T>(policy, {.gate = g, .up = u, .d_y = dy},
                                                         {.d_gate = d_gate, .d_up = d_up});
  return {test::download(d_gate), test::download(d_up)};
}

template <class Activation, class T>
void check_definition() {
  for (std::int64_t rows : test::sizes({0, 1, 5, 70}))
    for (std::int64_t width : test::sizes({0, 1, 15, 16, 17, 32, 384, 5000})) {
      if (rows * width > 30000) continue;
      auto const gate = test::rounded<T>(test::random_normal(rows * width, 1, 3.0));
      auto const up = test::rounded<T>(test::random_normal(rows * width, 2));
      for (bool with_up : {true, false}) {
        auto const u = with_up ? up : test::values{};
        test::check_close_at_scale(run<Activation, T>(gate, u, rows, width), reference<Activation>(gate, u), 1.0,
                                   2 * test::tolerance<T>(), "y");
      }
    }
}
template <class Activation>
void check_gradients() {
  std::int64_t const rows = 3, width = 21;
  auto const gate = test::random_normal(rows * width, 1, 2.0);
  auto const up = test::random_normal(rows * width, 2);
  auto const d_y = test::random_normal(rows * width, 3);
  auto const loss_of_gate = [&](test::values const& v) {
    return test::weighted_sum(reference<Activation>(v, up), d_y);
  };
  auto const loss_of_up = [&](test::values const& v) {
    return test::weighted_sum(reference<Activation>(gate, v), d_y);
  };
  auto const g = run_backward<Activation, double>(gate, up, d_y, rows, width);
  test::check_gradient(loss_of_gate, gate, g.d_gate, "d_gate");
  test::check_gradient(loss_of_up, up, g.d_up, "d_up");
  auto const plain = run_backward<Activation, double>(gate, {}, d_y, rows, width);
  test::check_gradient([&](test::values const& v) { return test::weighted_sum(reference<Activation>(v, {}), d_y); },
                       gate, plain.d_gate, "d_gate without up");

  auto const single = run_backward<Activation, float>(gate, up, d_y, rows, width);
  test::check_close(single.d_gate, g.d_gate, 4 * test::tolerance<float>(), "d_gate in float");
  test::check_close(single.d_up, g.d_up, 4 * test::tolerance<float>(), "d_up in float");
}

}  // namespace

TEST_CASE_TEMPLATE("gated_activation: equals its definition at every size and type", T, STORAGE_TYPES) {
  check_definition<activation::silu, T>();
  check_definition<activation::gelu, T>();
  check_definition<activation::identity, T>();
}
TEST_CASE("gated_activation: an activation of the user's own") {
  static_assert(activation_function<squared_relu> && !activation_function<int>);
  check_definition<squared_relu, float>();
}
TEST_CASE("gated_activation: gradients equal central differences") {
  check_gradients<activation::silu>();
  check_gradients<activation::gelu>();
  check_gradients<activation::identity>();
}
TEST_CASE("gated_activation: gelu keeps its relative accuracy where it almost vanishes") {
  test::values gate;
  for (double x = -12.5; x < 0; x += 0.125) gate.push_back(x);
  auto const n = static_cast<std::int64_t>(gate.size());
  auto const y = run<activation::gelu, float>(gate, {}, 1, n), expected = reference<activation::gelu>(gate, {});
  test::check_close(y, expected, 8 * test::unit_roundoff<float>() * 2, "y", 0.0);
}
TEST_CASE_TEMPLATE("gated_activation: gelu of every 16-bit number is rounded almost as the exact one would be", T,
                   bfloat16, half) {
  test::values gate;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    T x;
    x.bits = static_cast<std::uint16_t>(bits);
    double const value = convert<float>(x);
    // Where the result is a normal number of T: below, its last place is not relative to it.
    if (std::abs(reference<activation::gelu>({value}, {})[0]) >= (std::is_same_v<T, half> ? 0x1p-14 : 0x1p-126) &&
        std::isfinite(value))
      gate.push_back(value);
  }
  auto const n = static_cast<std::int64_t>(gate.size());
  auto const y = run<activation::gelu, T>(gate, {}, 1, n), expected = reference<activation::gelu>(gate, {});
  test::check_close(y, expected, (1 + 1.0 / 32) * test::unit_roundoff<T>(), "y", 0.0);
  auto const ones = test::values(gate.size(), 1.0);
  auto const d = run_backward<activation::gelu, T>(gate, {}, ones, 1, n).d_gate;
  auto const exact = run_backward<activation::gelu, double>(gate, {}, ones, 1, n).d_gate;
  test::check_close(d, exact, (1 + 1.0 / 32) * test::unit_roundoff<T>(), "d_gate");

  double const infinity = std::numeric_limits<double>::infinity();
  auto const ends = run<activation::gelu, T>({infinity, std::numeric_limits<double>::quiet_NaN()}, {}, 1, 2);
  CHECK(ends[0] == infinity);
  CHECK(std::isnan(ends[1]));
}
TEST_CASE_TEMPLATE("gated_activation: halves of one projection, in place, in both directions", T, float, bfloat16) {
  std::int64_t const rows = 7, width = 37;
  auto const gate = test::rounded<T>(test::random_normal(rows * width, 1));
  auto const up = test::rounded<T>(test::random_normal(rows * width, 2));
  auto const d_y = test::rounded<T>(test::random_normal(rows * width, 3));
  auto const side_by_side = [&](test::values const& left, test::values const& right) {
    test::values both;
    for (std::int64_t i = 0; i < rows; ++i)
      for (auto const* half_of : {&left, &right})
        both.insert(both.end(), half_of->begin() + i * width, half_of->begin() + (i + 1) * width);
    return both;
  };
  auto const projection = test::upload<T>(side_by_side(gate, up), rows, 2 * width);
  auto const left = projection.columns(0, width), right = projection.columns(width, width);
  auto const dy = test::upload<T>(d_y, rows, width);
  gated_activation::backward<activation::silu, test_policy, T>(make_policy(), {.gate = left, .up = right, .d_y = dy},
                                                               {.d_gate = left, .d_up = right});
  auto const g = run_backward<activation::silu, T>(gate, up, d_y, rows, width);
  test::check_equal(test::download(projection), side_by_side(g.d_gate, g.d_up), "gradients");

  auto const again = test::upload<T>(side_by_side(gate, up), rows, 2 * width);
  gated_activation::forward<activation::silu>(make_policy(), again.columns(0, width), again.columns(width, width),
                                              again.columns(0, width));
  test::check_equal(test::download(again), side_by_side(run<activation::silu, T>(gate, up, rows, width), up), "y");
}
TEST_CASE_TEMPLATE("gated_activation: rows that begin anywhere", T, STORAGE_TYPES) {
  std::int64_t const rows = 37, width = 300;
  auto const gate = test::rounded<T>(test::random_normal(rows * width, 1));
  auto const up = test::rounded<T>(test::random_normal(rows * width, 2));
  auto const y = run<activation::silu, T>(gate, up, rows, width);
  auto const g = run_backward<activation::silu, T>(gate, up, y, rows, width);
  // The same matrices as columns [first, first + width) of wider ones, NaN around them.
  for (std::int64_t first : test::sizes({0, 1, 3, 8}))
    for (std::int64_t pitch : {308, 311, 320}) {
      auto const inside = [&](test::values const& x) {
        test::values wide(static_cast<std::size_t>(rows * pitch), std::numeric_limits<double>::quiet_NaN());
        for (std::int64_t r = 0; r < rows; ++r)
          std::copy_n(x.begin() + r * width, width, wide.begin() + r * pitch + first);
        return test::upload<T>(wide, rows, pitch);
      };
      auto const outside = [&](auto const& x) {
        auto const wide = test::download(x);
        test::values inner;
        std::size_t numbers = 0;
        for (double v : wide) numbers += !std::isnan(v);
        for (std::int64_t r = 0; r < rows; ++r)
          inner.insert(inner.end(), wide.begin() + r * pitch + first, wide.begin() + r * pitch + first + width);
        CHECK(numbers == inner.size());  // nothing is written beside the columns
        return inner;
      };
      auto const wide_gate = inside(gate), wide_up = inside(up), wide_y = inside(y);
      auto const result = test::poisoned<T>(rows, pitch), d_gate = test::poisoned<T>(rows, pitch),
                 d_up = test::poisoned<T>(rows, pitch);
      auto const part = [&](auto const& x) { return x.columns(first, width); };
      gated_activation::forward<activation::silu>(make_policy(), part(wide_gate), part(wide_up), part(result));
      test::check_equal(outside(result), y, "y");
      gated_activation::backward<activation::silu, test_policy, T>(
          make_policy(), {.gate = part(wide_gate), .up = part(wide_up), .d_y = part(wide_y)},
          {.d_gate = part(d_gate), .d_up = part(d_up)});
      test::check_equal(outside(d_gate), g.d_gate, "d_gate");
      test::check_equal(outside(d_up), g.d_up, "d_up");
    }
}
TEST_CASE_TEMPLATE("gated_activation: rows past a count in memory stay as they are", T, STORAGE_TYPES) {
  std::int64_t const rows = 37;
  for (std::int64_t width : {8, 33, 1100})
    for (std::int64_t count : test::sizes({0, 1, 20, 37, 100})) {
      auto const there = static_cast<std::size_t>(std::min(count, rows) * width);
      // What lies past the count is no number, and may be anything.
      auto const numbers_before = [&](std::uint64_t seed) {
        auto v = test::rounded<T>(test::random_normal(rows * width, seed));
        std::fill(v.begin() + static_cast<std::ptrdiff_t>(there), v.end(), std::numeric_limits<double>::quiet_NaN());
        return v;
      };
      auto const gate = numbers_before(1), up = numbers_before(2), d_y = numbers_before(3);
      auto const row_count = test::upload<std::int64_t>({static_cast<double>(count)}, 1);
      auto const g = test::upload<T>(gate, rows, width), u = test::upload<T>(up, rows, width),
                 dy = test::upload<T>(d_y, rows, width);
      auto const check = [&](auto const& result, test::values const& expected, char const* what) {
        auto const all = test::download(result);
        test::check_equal({all.begin(), all.begin() + static_cast<std::ptrdiff_t>(there)},
                          {expected.begin(), expected.begin() + static_cast<std::ptrdiff_t>(there)}, what);
        for (std::size_t i = there; i < all.size(); ++i) REQUIRE(all[i] == 7);
      };
      test::values const sevens(static_cast<std::size_t>(rows * width), 7.0);
      for (bool with_up : {true, false}) {
        auto const y = test::upload<T>(sevens, rows, width), d_gate = test::upload<T>(sevens, rows, width),
                   d_up = test::upload<T>(sevens, rows, width);
        view<test::test_space, T, dyn, dyn> const other = with_up ? u.as_view() : view<test::test_space, T, dyn, dyn>{},
                                                  d_other = with_up ? d_up.as_view() : other;
        gated_activation::forward<activation::silu>(make_policy(), g, other, y.as_view(), row_count);
        check(y, run<activation::silu, T>(gate, with_up ? up : test::values{}, rows, width), "y");
        gated_activation::backward<activation::silu, test_policy, T>(
            make_policy(), {.gate = g, .up = other, .d_y = dy, .row_count = row_count},
            {.d_gate = d_gate, .d_up = d_other});
        auto const expected = run_backward<activation::silu, T>(gate, with_up ? up : test::values{}, d_y, rows, width);
        check(d_gate, expected.d_gate, "d_gate");
        if (with_up) check(d_up, expected.d_up, "d_up");
      }
    }
}
TEST_CASE_TEMPLATE("gated_activation: the same bits in every run, for any number of threads", P, test_policy) {
  std::int64_t const rows = 100, width = 333;
  auto const gate = test::random_normal(rows * width, 1);
  auto const one = run<activation::gelu, float>(gate, gate, rows, width);
  auto const back = run_backward<activation::gelu, float>(gate, gate, gate, rows, width);
  auto const check_again = [&](test_policy const& policy) {
    test::check_equal(run<activation::gelu, float>(gate, gate, rows, width, policy), one, "y");
    auto const again = run_backward<activation::gelu, float>(gate, gate, gate, rows, width, policy);
    test::check_equal(again.d_gate, back.d_gate, "d_gate");
    test::check_equal(again.d_up, back.d_up, "d_up");
  };
  check_again(make_policy());
  if constexpr (requires(P p) { p.threads; })
    for (int threads : {1, 2, 5}) {
      P policy = make_policy();
      policy.threads = threads;
      check_again(policy);
    }
}
TEST_CASE("gated_activation: shapes that disagree are named") {
  auto const x = zeros<float>(make_policy(), 3, 4), y = zeros<float>(make_policy(), 3, 5);
  CHECK(test::message_of<shape_error>([&] {
          gated_activation::forward<activation::silu>(make_policy(), y, x, x.as_view());
        }) == "gated_activation: gate: got (3, 5), expected (3, 4)");
  CHECK(test::message_of<shape_error>([&] {
          gated_activation::forward<activation::silu>(make_policy(), x, y, x.as_view());
        }) == "gated_activation: up: got (3, 5), expected (3, 4)");
  CHECK(test::message_of<shape_error>([&] {
          gated_activation::backward<activation::silu>(make_policy(), {.gate = x, .up = x, .d_y = x}, {.d_gate = x});
        }) == "gated_activation.backward: d_up: got no view, expected a view, as up");
  auto const counts = zeros<std::int64_t>(make_policy(), 2);
  CHECK(test::message_of<shape_error>([&] {
          gated_activation::forward<activation::silu>(make_policy(), x, x, x.as_view(), counts);
        }) == "gated_activation: row_count: got (2), expected (1)");
}
