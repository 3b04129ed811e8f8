#include "support/sums.hpp"
#include "support/support.hpp"

#include <blackmamba/ops/layer_norm/layer_norm.hpp>

using namespace blackmamba;

namespace {

struct problem {
  std::int64_t rows, width;
  test::values x, weight, bias = {}, residual = {};  // bias and residual: empty where there is none
};
struct result {
  test::values y, sum, mean, rstd;
};

problem random_problem(std::int64_t rows, std::int64_t width) {
  return {rows,
          width,
          test::random_normal(rows * width, 1),
          test::random_normal(width, 2),
          test::random_normal(width, 3),
          test::random_normal(rows * width, 4, 3.0)};
}

/// The definition, in double.
result reference(problem const& p, double eps = 1e-5) {
  result r{p.x, p.x, {}, {}};
  for (std::int64_t i = 0; i < p.rows; ++i) {
    auto const begin = static_cast<std::size_t>(i * p.width), end = begin + static_cast<std::size_t>(p.width);
    double mean = 0, variance = 0;
    for (std::size_t at = begin; at < end; ++at) {
      r.sum[at] = p.x[at] + (p.residual.empty() ? 0.0 : p.residual[at]);
      mean += r.sum[at] / static_cast<double>(p.width);
    }
    for (std::size_t at = begin; at < end; ++at)
      variance += (r.sum[at] - mean) * (r.sum[at] - mean) / static_cast<double>(p.width);
    r.mean.push_back(mean);
    r.rstd.push_back(1 / std::sqrt(variance + eps));
    for (std::size_t at = begin; at < end; ++at)
      r.y[at] = (r.sum[at] - mean) * r.rstd.back() * p.weight[at - begin] + (p.bias.empty() ? 0.0 : p.bias[at - begin]);
  }
  return r;
}

double largest(test::values const& v) {
  double m = 0;
  for (double x : v) m = std::max(m, std::abs(x));
  return m;
}
/// What y and d_s are differences of: rows of s, and of d_y weight, times rstd. With few columns rstd is large.
double scale_of_y(problem const& p, result const& r) {
  double m = 0;
  for (std::size_t i = 0; i < r.sum.size(); ++i)
    m = std::max(m, std::abs(r.sum[i]) * r.rstd[i / static_cast<std::size_t>(p.width)]);
  return m * largest(p.weight);
}
/// An error of s moves rstd by as much relative to itself as s rstd is large.
double scale_of_rstd(problem const& p, result const& r) { return 1 + scale_of_y(p, r) / largest(p.weight); }
double scale_of_d_s(problem const& p, result const& r, test::values const& d_y) {
  return largest(r.rstd) * largest(p.weight) * largest(d_y);
}

/// An uploaded tensor, or an absent view.
template <class T, class... Ints>
auto upload_if(test::values const& v, Ints... extents) {
  return v.empty() ? tensor<test::test_space, T, (static_cast<void>(extents), dyn)...>{}
                   : test::upload<T>(v, extents...);
}

template <class T>
result run(problem const& p, test_policy policy = make_policy()) {
  using A = accum_t<T>;
  auto const x = test::upload<T>(p.x, p.rows, p.width);
  auto const weight = test::upload<A>(p.weight, p.width);
  auto const bias = upload_if<A>(p.bias, p.width);
  auto const residual = upload_if<A>(p.residual, p.rows, p.width);
  auto y = test::poisoned<T>(p.rows, p.width);
  auto sum = test::poisoned<A>(p.rows, p.width);
  auto rstd = test::poisoned<A>(p.rows), mean = test::poisoned<A>(p.rows);
  layer_norm::forward(policy, {.x = x, .weight = weight, .bias = bias, .residual = residual}, y,
                      {.sum = sum, .rstd = rstd, .mean = mean});
  return {test::download(y), test::download(sum), test::download(mean), test::download(rstd)};
}
/// As run, without a residual: in place, without the sum.
template <class T>
result run_alone(problem const& p) {
  using A = accum_t<T>;
  auto const y = test::upload<T>(p.x, p.rows, p.width);
  auto const weight = test::upload<A>(p.weight, p.width);
  auto const bias = upload_if<A>(p.bias, p.width);
  auto const rstd = test::poisoned<A>(p.rows), mean = test::poisoned<A>(p.rows);
  layer_norm::forward(make_policy(), {.x = y, .weight = weight, .bias = bias}, y.as_view(),
                      {.rstd = rstd, .mean = mean});
  return {test::download(y), {}, test::download(mean), test::download(rstd)};
}

struct gradients {
  test::values d_s, d_weight, d_bias;
  test::sums weight_sums = {}, bias_sums = {};  // of the reference: the last two with the size of their terms
};

/// S: the type that s was kept in. d_residual may be empty. The parameters' gradients start from `initial`.
template <class T, class S>
gradients run_backward(problem const& p, result const& forward, test::values const& d_y, test::values const& d_residual,
                       double initial = 0, test_policy policy = make_policy()) {
  using A = accum_t<T>;
  auto const sum = test::upload<S>(forward.sum, p.rows, p.width);
  auto const rstd = test::upload<A>(forward.rstd, p.rows), mean = test::upload<A>(forward.mean, p.rows);
  auto const weight = test::upload<A>(p.weight, p.width);
  auto const dy = test::upload<T>(d_y, p.rows, p.width);
  auto const through = upload_if<A>(d_residual, p.rows, p.width);
  auto d_s = test::poisoned<S>(p.rows, p.width);
  auto const start = test::values(static_cast<std::size_t>(p.width), initial);
  auto d_weight = test::upload<A>(start, p.width), d_bias = test::upload<A>(start, p.width);
  layer_norm::backward<test_policy, T, S>(
      policy, {.sum = sum, .rstd = rstd, .mean = mean, .weight = weight, .d_y = dy, .d_residual = through}, d_s,
      d_weight, d_bias);
  return {test::download(d_s), test::download(d_weight), test::download(d_bias)};
}

/// The gradients' formulas, in double, from what forward kept.
gradients reference_backward(problem const& p, result const& forward, test::values const& d_y, double initial = 0) {
  auto const start = test::values(static_cast<std::size_t>(p.width), initial);
  gradients g{test::values(d_y.size()), start, start, test::sums(start.size()), test::sums(start.size())};
  for (auto* sums : {&g.weight_sums, &g.bias_sums})
    for (auto& sum : *sums) sum.add(initial);
  double const n = static_cast<double>(p.width);
  for (std::size_t r = 0; r < forward.mean.size(); ++r) {
    auto const at = [&](std::size_t i) { return r * static_cast<std::size_t>(p.width) + i; };
    auto const normal = [&](std::size_t i) { return (forward.sum[at(i)] - forward.mean[r]) * forward.rstd[r]; };
    double mean_g = 0, mean_gn = 0;
    for (std::size_t i = 0; i < p.weight.size(); ++i) {
      mean_g += d_y[at(i)] * p.weight[i] / n;
      mean_gn += d_y[at(i)] * p.weight[i] * normal(i) / n;
      g.d_weight[i] += d_y[at(i)] * normal(i);
      g.d_bias[i] += d_y[at(i)];
      // The deviation from the mean carries the rounding of both, in forward's mean as here.
      g.weight_sums[i].add(d_y[at(i)] * normal(i));
      g.weight_sums[i].squares += std::pow(d_y[at(i)] * forward.mean[r] * forward.rstd[r], 2);
      g.bias_sums[i].add(d_y[at(i)]);
    }
    for (std::size_t i = 0; i < p.weight.size(); ++i)
      g.d_s[at(i)] = forward.rstd[r] * (d_y[at(i)] * p.weight[i] - mean_g - normal(i) * mean_gn);
  }
  return g;
}

}  // namespace

TEST_CASE_TEMPLATE("layer_norm: equals its definition at every size and type", T, STORAGE_TYPES) {
  using A = accum_t<T>;
  for (std::int64_t rows : test::sizes({0, 1, 2, 3, 65}))
    for (std::int64_t width : test::sizes({1, 2, 15, 16, 17, 64, 1472, 5004, 5008, 16388, 65536, 70001})) {
      if (width > 5000 && rows != 2) continue;  // rows of many warps, rows that no block holds in registers
      auto p = random_problem(rows, width);
      p.x = test::rounded<T>(p.x);
      p.weight = test::rounded<A>(p.weight);
      p.bias = test::rounded<A>(p.bias);
      p.residual = test::rounded<A>(p.residual);
      for (bool with_bias : {true, false})
        for (bool with_residual : {true, false}) {
          if (!with_bias) p.bias.clear();
          auto q = p;
          if (!with_residual) q.residual.clear();
          auto const expected = reference(q);
          auto const check = [&](result const& actual) {
            test::check_close_at_scale(actual.y, expected.y, scale_of_y(q, expected), test::tolerance<T>(width), "y");
            test::check_close_at_scale(actual.mean, expected.mean, largest(expected.sum), test::tolerance<A>(width),
                                       "mean");
            test::check_close_each(actual.rstd, expected.rstd, test::tolerance<A>(width) * scale_of_rstd(q, expected),
                              "rstd");
          };
          auto const actual = run<T>(q);
          test::check_close_each(actual.sum, expected.sum, test::tolerance<A>(), "sum");
          check(actual);
          if (!with_residual) check(run_alone<T>(q));
        }
    }
}

TEST_CASE_TEMPLATE("layer_norm: backward equals its formulas at every type, where s is kept as it came and as a sum", T,
                   STORAGE_TYPES) {
  for (std::int64_t rows : test::sizes({0, 1, 3, 64, 129, 3000}))
    for (std::int64_t width : test::sizes({1, 16, 17, 64, 300, 4100, 16388, 20001})) {
      // Rows that no block of threads holds in registers; more rows than blocks take at once.
      if (width > 4000 ? rows != 3 : rows == 3000 && width > 20) continue;
      auto p = random_problem(rows, width);
      p.x = test::rounded<T>(p.x);
      p.weight = test::rounded<accum_t<T>>(p.weight);
      p.residual.clear();
      auto const d_y = test::rounded<T>(test::random_normal(rows * width, 5));
      auto const forward = reference(p);
      auto const expected = reference_backward(p, forward, d_y, 2.0);
      for (auto const& actual :
           {run_backward<T, T>(p, forward, d_y, {}, 2.0), run_backward<T, accum_t<T>>(p, forward, d_y, {}, 2.0)}) {
        test::check_close_at_scale(actual.d_s, expected.d_s, scale_of_d_s(p, forward, d_y), test::tolerance<T>(width),
                                   "d_s");
        test::check_sums<accum_t<T>>(actual.d_weight, expected.weight_sums, rows + 1, "d_weight");
        test::check_sums<accum_t<T>>(actual.d_bias, expected.bias_sums, rows + 1, "d_bias");
      }
    }
}

TEST_CASE("layer_norm: gradients equal central differences") {
  auto p = random_problem(3, 7);
  auto const d_y = test::random_normal(21, 5);
  auto const through = test::random_normal(21, 6);  // gradient that passes the norm on the residual
  auto const forward = run<double>(p);
  auto const g = run_backward<double, double>(p, forward, d_y, through);
  auto const loss = [&](problem const& q) {
    auto const r = reference(q);
    return test::weighted_sum(r.y, d_y) + test::weighted_sum(r.sum, through);
  };
  auto const check = [&](test::values problem::*argument, test::values const& gradient, char const* name) {
    test::check_gradient(
        [&](test::values const& v) {
          auto q = p;
          q.*argument = v;
          return loss(q);
        },
        p.*argument, gradient, name);
  };
  check(&problem::x, g.d_s, "d_x");
  check(&problem::residual, g.d_s, "d_residual");
  check(&problem::weight, g.d_weight, "d_weight");
  check(&problem::bias, g.d_bias, "d_bias");
}

TEST_CASE("layer_norm: a common shift of a row changes nothing, however large") {
  auto p = random_problem(4, 500);
  p.residual.clear();
  for (auto& v : p.x) v = static_cast<double>(static_cast<float>(v + 1e4));
  // A variance as a difference of moments would carry an error of about 1e8 float roundings.
  test::check_close(run<float>(p).y, reference(p).y, 1e-3, "y");
}

TEST_CASE_TEMPLATE("layer_norm: the same bits in every run, for any number of threads", P, test_policy) {
  auto const p = random_problem(333, 50);
  auto const forward = run<float>(p);
  auto const one = run_backward<float, float>(p, forward, p.x, p.residual);
  auto const check_again = [&](test_policy const& policy) {
    auto const again = run<float>(p, policy);
    test::check_equal(again.y, forward.y, "y");
    test::check_equal(again.mean, forward.mean, "mean");
    auto const backward = run_backward<float, float>(p, forward, p.x, p.residual, 0, policy);
    test::check_equal(backward.d_s, one.d_s, "d_s");
    test::check_equal(backward.d_weight, one.d_weight, "d_weight");
    test::check_equal(backward.d_bias, one.d_bias, "d_bias");
  };
  check_again(make_policy());
  if constexpr (requires(P any) { any.threads; })
    for (int threads : {1, 2, 5}) {
      P policy = make_policy();
      policy.threads = threads;
      check_again(policy);
    }
}

TEST_CASE("layer_norm: takes strided rows, works in place, keeps only what is asked for") {
  std::int64_t const rows = 5, width = 19;
  auto p = random_problem(rows, width);
  auto const expected = run<float>(p);
  auto const beside_zeros = [&](test::values const& v) {
    test::values both;
    for (std::int64_t i = 0; i < rows; ++i) {
      both.insert(both.end(), static_cast<std::size_t>(width), 0.0);
      both.insert(both.end(), v.begin() + i * width, v.begin() + (i + 1) * width);
    }
    return both;
  };
  auto const wide = test::upload<float>(beside_zeros(p.x), rows, 2 * width);
  auto const half_of = wide.columns(width, width);
  auto const weight = test::upload<float>(p.weight, width), bias = test::upload<float>(p.bias, width);
  auto const residual = test::upload<float>(p.residual, rows, width);
  layer_norm::forward(make_policy(), {.x = half_of, .weight = weight, .bias = bias, .residual = residual}, half_of,
                      {.sum = residual});
  test::check_equal(test::download(wide), beside_zeros(expected.y), "y");
  test::check_equal(test::download(residual), expected.sum, "sum over the residual");

  // d_s over d_residual, no bias.
  auto const d_y = test::random_normal(rows * width, 7);
  auto const separate = run_backward<float, float>(p, expected, d_y, p.residual);
  auto const in_place = test::upload<float>(p.residual, rows, width);
  auto const dy = test::upload<float>(d_y, rows, width);
  auto const rstd = test::upload<float>(expected.rstd, rows), mean = test::upload<float>(expected.mean, rows);
  auto const d_weight = zeros<float>(make_policy(), width);
  layer_norm::backward(
      make_policy(), {.sum = residual, .rstd = rstd, .mean = mean, .weight = weight, .d_y = dy, .d_residual = in_place},
      in_place.as_view(), d_weight);
  test::check_equal(test::download(in_place), separate.d_s, "d_s");
  test::check_equal(test::download(d_weight), separate.d_weight, "d_weight");
}

TEST_CASE("layer_norm: scratch is exact") {
  auto measure = arena<test::test_space>::measuring();
  auto const x = zeros<float>(make_policy(), 130, 48);
  auto const w = zeros<float>(make_policy(), 48), r = zeros<float>(make_policy(), 130);
  using dry = device::dry<test_policy>;
  layer_norm::backward<dry, float, float>(dry{&measure}, {.sum = x, .rstd = r, .mean = r, .weight = w, .d_y = x}, x, w,
                                          w);
  CHECK(measure.peak() == layer_norm::scratch_bytes<float, test::test_space>(130, 48));
  CHECK(measure.used() == 0);
}

TEST_CASE("layer_norm: shapes that disagree are named") {
  auto const x = zeros<float>(make_policy(), 3, 4);
  auto const four = zeros<float>(make_policy(), 4), five = zeros<float>(make_policy(), 5);
  auto const rows = zeros<float>(make_policy(), 3);
  CHECK(test::message_of<shape_error>([&] { layer_norm::forward(make_policy(), {.x = x, .weight = five}, x); }) ==
        "layer_norm: weight: got (5), expected (4)");
  CHECK(test::message_of<shape_error>([&] {
          layer_norm::forward(make_policy(), {.x = x, .weight = four, .bias = five}, x);
        }) == "layer_norm: bias: got (5), expected (4)");
  CHECK(test::message_of<shape_error>([&] {
          layer_norm::backward<test_policy, float, float>(
              make_policy(), {.sum = x, .rstd = rows, .mean = four, .weight = four, .d_y = x}, x, four, four);
        }) == "layer_norm.backward: mean: got (4), expected (3)");
}
