#include "support/sums.hpp"
#include "support/support.hpp"

#include <blackmamba/ops/rms_norm/rms_norm.hpp>

using namespace blackmamba;

namespace {

struct result {
  test::values y, sum, rstd;
};

/// The definition, in double.
result reference(test::values const& x, test::values const& residual, test::values const& weight, std::int64_t rows,
                 std::int64_t width, double eps) {
  result r{test::values(x.size()), test::values(x.size()), test::values(static_cast<std::size_t>(rows))};
  for (std::int64_t i = 0; i < rows; ++i) {
    double squares = 0;
    for (std::int64_t j = 0; j < width; ++j) {
      auto const at = static_cast<std::size_t>(i * width + j);
      r.sum[at] = x[at] + (residual.empty() ? 0.0 : residual[at]);
      squares += r.sum[at] * r.sum[at];
    }
    double const rstd = 1 / std::sqrt(squares / static_cast<double>(width) + eps);
    r.rstd[static_cast<std::size_t>(i)] = rstd;
    for (std::int64_t j = 0; j < width; ++j) {
      auto const at = static_cast<std::size_t>(i * width + j);
      r.y[at] = r.sum[at] * rstd * weight[static_cast<std::size_t>(j)];
    }
  }
  return r;
}

template <class T>
result run(test::values const& x, test::values const& residual, test::values const& weight, std::int64_t rows,
           std::int64_t width, test_policy policy = make_policy()) {
  using A = accum_t<T>;
  auto const dx = test::upload<T>(x, rows, width);
  auto const dw = test::upload<A>(weight, width);
  auto y = test::poisoned<T>(rows, width);
  auto sum = test::poisoned<A>(rows, width);
  auto rstd = test::poisoned<A>(rows);
  if (residual.empty()) {
    rms_norm::forward(policy, {.x = dx, .weight = dw}, y, {.sum = sum, .rstd = rstd});
  } else {
    auto const dr = test::upload<A>(residual, rows, width);
    rms_norm::forward(policy, {.x = dx, .weight = dw, .residual = dr}, y, {.sum = sum, .rstd = rstd});
  }
  return {test::download(y), test::download(sum), test::download(rstd)};
}
/// As run, of x alone: in place, without the sum.
template <class T>
result run_alone(test::values const& x, test::values const& weight, std::int64_t rows, std::int64_t width) {
  using A = accum_t<T>;
  auto const y = test::upload<T>(x, rows, width);
  auto const w = test::upload<A>(weight, width);
  auto const rstd = test::poisoned<A>(rows);
  rms_norm::forward(make_policy(), {.x = y, .weight = w}, y.as_view(), {.rstd = rstd});
  return {test::download(y), {}, test::download(rstd)};
}

struct gradients {
  test::values d_s, d_weight;
  test::sums d_weight_sums = {};  // of the reference
};

/// S: the type that s was kept in. d_residual may be empty. The weight's gradient starts from `initial`.
template <class T, class S = accum_t<T>>
gradients run_backward(test::values const& sum, test::values const& rstd, test::values const& weight,
                       test::values const& d_y, test::values const& d_residual, std::int64_t rows, std::int64_t width,
                       test_policy policy = make_policy(), double initial = 0) {
  using A = accum_t<T>;
  auto const ds = test::upload<S>(sum, rows, width);
  auto const dr = test::upload<A>(rstd, rows);
  auto const dw = test::upload<A>(weight, width);
  auto const dy = test::upload<T>(d_y, rows, width);
  auto d_s = test::poisoned<S>(rows, width);
  auto d_weight = test::upload<A>(test::values(static_cast<std::size_t>(width), initial), width);
  if (d_residual.empty()) {
    rms_norm::backward<test_policy, T, S>(policy, {.sum = ds, .rstd = dr, .weight = dw, .d_y = dy}, d_s, d_weight);
  } else {
    auto const through = test::upload<A>(d_residual, rows, width);
    rms_norm::backward<test_policy, T, S>(
        policy, {.sum = ds, .rstd = dr, .weight = dw, .d_y = dy, .d_residual = through}, d_s, d_weight);
  }
  return {test::download(d_s), test::download(d_weight)};
}

/// The gradients' formulas, in double, from what forward kept.
gradients reference_backward(result const& forward, test::values const& weight, test::values const& d_y,
                             test::values const& d_residual, double initial) {
  gradients g{test::values(d_y.size()), {}, test::sums(weight.size())};
  for (auto& sum : g.d_weight_sums) sum.add(initial);
  for (std::size_t r = 0; r < forward.rstd.size(); ++r) {
    std::size_t const begin = r * weight.size();
    double const rstd = forward.rstd[r];
    double mean = 0;
    for (std::size_t i = 0; i < weight.size(); ++i) {
      double const normalised = forward.sum[begin + i] * rstd;
      mean += d_y[begin + i] * weight[i] * normalised / static_cast<double>(weight.size());
      g.d_weight_sums[i].add(d_y[begin + i] * normalised);
    }
    for (std::size_t i = 0; i < weight.size(); ++i)
      g.d_s[begin + i] = (d_residual.empty() ? 0.0 : d_residual[begin + i]) +
                         rstd * (d_y[begin + i] * weight[i] - forward.sum[begin + i] * rstd * mean);
  }
  return g;
}
double largest(test::values const& v) {
  double m = 0;
  for (double x : v) m = std::max(m, std::abs(x));
  return m;
}

}  // namespace

TEST_CASE_TEMPLATE("rms_norm: equals its definition at every size and type", T, STORAGE_TYPES) {
  for (std::int64_t rows : test::sizes({0, 1, 2, 3, 65}))
    for (std::int64_t width : test::sizes({1, 2, 15, 16, 17, 64, 1472, 5004, 5008, 16388, 65536, 70001})) {
      if (width > 5000 && rows != 2) continue;  // rows of many warps, rows that no block holds in registers
      auto const x = test::rounded<T>(test::random_normal(rows * width, 1));
      auto const w = test::rounded<accum_t<T>>(test::random_normal(width, 2));
      auto const residual = test::rounded<accum_t<T>>(test::random_normal(rows * width, 3, 3.0));
      for (bool with_residual : {false, true}) {
        auto const r = with_residual ? residual : test::values{};
        auto const expected = reference(x, r, w, rows, width, 1e-5);
        auto const actual = run<T>(x, r, w, rows, width);
        test::check_within<T>(actual.y, expected.y, expected.y, width, "y");
        test::check_close_each(actual.sum, expected.sum, test::tolerance<accum_t<T>>(), "sum");
        test::check_close_each(actual.rstd, expected.rstd, test::tolerance<accum_t<T>>(width), "rstd");
        if (with_residual) continue;
        auto const alone = run_alone<T>(x, w, rows, width);
        test::check_within<T>(alone.y, expected.y, expected.y, width, "y of x alone");
        test::check_close_each(alone.rstd, expected.rstd, test::tolerance<accum_t<T>>(width), "rstd of x alone");
      }
    }
}

TEST_CASE_TEMPLATE("rms_norm: backward equals its formulas at every type, where s is kept as it came and as a sum", T,
                   STORAGE_TYPES) {
  using A = accum_t<T>;
  struct shape {
    std::int64_t rows, width;
  };
  // Rows of few lanes and of whole warps, more rows than blocks take at once, rows that no block holds in registers.
  for (auto const& [rows, width] : std::vector<shape>{{0, 5},
                                                      {1, 1},
                                                      {2, 16},
                                                      {64, 17},
                                                      {129, 64},
                                                      {129, 300},
                                                      {9, 1472},
                                                      {5000, 12},
                                                      {700, 40},
                                                      {3, 4100},
                                                      {2, 16388},
                                                      {3, 20001}}) {
    auto const x = test::rounded<T>(test::random_normal(rows * width, 1));
    auto const w = test::rounded<A>(test::random_normal(width, 2));
    auto const d_y = test::rounded<T>(test::random_normal(rows * width, 3));
    auto const through = test::rounded<A>(test::random_normal(rows * width, 4));
    auto const forward = reference(x, {}, w, rows, width, 1e-5);
    for (auto const& d_residual : {test::values{}, through}) {
      auto const expected = reference_backward(forward, w, d_y, d_residual, 2.0);
      double const scale = largest(forward.rstd) * largest(w) * largest(d_y);
      for (auto const& actual :
           {run_backward<T, T>(forward.sum, forward.rstd, w, d_y, d_residual, rows, width, make_policy(), 2.0),
            run_backward<T, A>(forward.sum, forward.rstd, w, d_y, d_residual, rows, width, make_policy(), 2.0)}) {
        test::check_close_at_scale(actual.d_s, expected.d_s, scale, test::tolerance<T>(width), "d_s");
        test::check_sums<A>(actual.d_weight, expected.d_weight_sums, rows + 1, "d_weight");
      }
    }
  }
}

TEST_CASE("rms_norm: gradients equal central differences") {
  std::int64_t const rows = 3, width = 7;
  auto const x = test::random_normal(rows * width, 1);
  auto const w = test::random_normal(width, 2);
  auto const d_y = test::random_normal(rows * width, 4);
  auto const through = test::random_normal(rows * width, 5);  // gradient that passes the norm on the residual
  auto const forward = run<double>(x, {}, w, rows, width);
  auto const g = run_backward<double>(forward.sum, forward.rstd, w, d_y, through, rows, width);
  test::check_gradient(
      [&](test::values const& v) {
        auto const r = reference(v, {}, w, rows, width, 1e-5);
        return test::weighted_sum(r.y, d_y) + test::weighted_sum(r.sum, through);
      },
      x, g.d_s, "d_s");
  test::check_gradient(
      [&](test::values const& v) { return test::weighted_sum(reference(x, {}, v, rows, width, 1e-5).y, d_y); }, w,
      g.d_weight, "d_weight");
}

TEST_CASE_TEMPLATE("rms_norm: the same bits in every run, for any number of threads", P, test_policy) {
  std::int64_t const rows = 333, width = 50;
  auto const x = test::random_normal(rows * width, 1);
  auto const w = test::random_normal(width, 2);
  auto const forward = run<float>(x, {}, w, rows, width);
  auto const one = run_backward<float>(forward.sum, forward.rstd, w, x, x, rows, width);
  auto const check_again = [&](test_policy const& policy) {
    test::check_equal(run<float>(x, {}, w, rows, width, policy).y, forward.y, "y");
    auto const again = run_backward<float>(forward.sum, forward.rstd, w, x, x, rows, width, policy);
    test::check_equal(again.d_s, one.d_s, "d_s");
    test::check_equal(again.d_weight, one.d_weight, "d_weight");
  };
  check_again(make_policy());
  if constexpr (requires(P p) { p.threads; })
    for (int threads : {1, 2, 5}) {
      P policy = make_policy();
      policy.threads = threads;
      check_again(policy);
    }
}

TEST_CASE("rms_norm: takes strided rows and works in place") {
  std::int64_t const rows = 5, width = 19;
  auto const both = test::random_normal(rows * 2 * width, 1);
  auto const w = test::random_normal(width, 2);
  test::values half_of;
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < width; ++j)
      half_of.push_back(both[static_cast<std::size_t>(i * 2 * width + width + j)]);
  auto const wide = test::upload<float>(both, rows, 2 * width);
  auto const dw = test::upload<float>(w, width);
  rms_norm::forward(make_policy(), {.x = wide.columns(width, width), .weight = dw}, wide.columns(width, width));
  auto const after = test::download(wide);
  auto const expected = run<float>(half_of, {}, w, rows, width).y;
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < width; ++j) {
      CHECK(after[static_cast<std::size_t>(i * 2 * width + width + j)] ==
            expected[static_cast<std::size_t>(i * width + j)]);
      CHECK(after[static_cast<std::size_t>(i * 2 * width + j)] ==
            static_cast<double>(static_cast<float>(both[static_cast<std::size_t>(i * 2 * width + j)])));
    }
}

TEST_CASE("rms_norm: the sum over the residual, d_s over d_residual and over d_y") {
  for (std::int64_t width : {21, 40, 17000}) {
    std::int64_t const rows = 6;
    auto const x = test::random_normal(rows * width, 1), w = test::random_normal(width, 2),
               residual = test::random_normal(rows * width, 3), d_y = test::random_normal(rows * width, 4);
    auto const separate = run<float>(x, residual, w, rows, width);
    auto const dx = test::upload<float>(x, rows, width);
    auto const dw = test::upload<float>(w, width);
    auto const sum = test::upload<float>(residual, rows, width);
    auto const rstd = test::poisoned<float>(rows);
    rms_norm::forward<test_policy, float>(make_policy(), {.x = dx, .weight = dw, .residual = sum}, dx,
                                          {.sum = sum, .rstd = rstd});
    test::check_equal(test::download(dx), separate.y, "y over x");
    test::check_equal(test::download(sum), separate.sum, "sum over the residual");

    auto const expected = run_backward<float>(separate.sum, separate.rstd, w, d_y, x, rows, width);
    auto const over_residual = test::upload<float>(x, rows, width), dy = test::upload<float>(d_y, rows, width);
    auto const d_weight = zeros<float>(make_policy(), width), again = zeros<float>(make_policy(), width);
    auto const through = test::upload<float>(x, rows, width);
    rms_norm::backward<test_policy, float, float>(
        make_policy(), {.sum = sum, .rstd = rstd, .weight = dw, .d_y = dy, .d_residual = over_residual}, over_residual,
        d_weight);
    test::check_equal(test::download(over_residual), expected.d_s, "d_s over d_residual");
    rms_norm::backward(make_policy(), {.sum = sum, .rstd = rstd, .weight = dw, .d_y = dy, .d_residual = through},
                       dy.as_view(), again);
    test::check_equal(test::download(dy), expected.d_s, "d_s over d_y");
    test::check_equal(test::download(again), expected.d_weight, "d_weight");
  }
}

TEST_CASE("rms_norm: scratch is exact") {
  using dry = device::dry<test_policy>;
  for (std::int64_t rows : {1, 130, 100000}) {
    auto measure = arena<test::test_space>::measuring();
    auto const x = zeros<float>(make_policy(), rows, 4), w = zeros<float>(make_policy(), 4, 1);
    auto const r = zeros<float>(make_policy(), rows);
    rms_norm::backward<dry, float, float>(dry{&measure}, {.sum = x, .rstd = r, .weight = w.reshape(4), .d_y = x}, x,
                                          w.reshape(4));
    CHECK(measure.peak() == rms_norm::scratch_bytes<float, test::test_space>(rows, 4));
    CHECK(measure.used() == 0);
  }
}

TEST_CASE("rms_norm: shapes that disagree are named") {
  auto const x = test::upload<float>(test::values(12), 3, 4);
  auto const w = test::upload<float>(test::values(5), 5);
  auto y = test::poisoned<float>(3, 4);
  CHECK(test::message_of<shape_error>([&] { rms_norm::forward(make_policy(), {.x = x, .weight = w}, y); }) ==
        "rms_norm: weight: got (5), expected (4)");
}
