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

struct gradients {
  test::values d_s, d_weight;
};

template <class T>
gradients run_backward(test::values const& sum, test::values const& rstd, test::values const& weight,
                       test::values const& d_y, test::values const& d_residual, std::int64_t rows, std::int64_t width,
                       test_policy policy = make_policy()) {
  using A = accum_t<T>;
  auto const ds = test::upload<A>(sum, rows, width);
  auto const dr = test::upload<A>(rstd, rows);
  auto const dw = test::upload<A>(weight, width);
  auto const dy = test::upload<T>(d_y, rows, width);
  auto d_s = test::upload<A>(d_residual, rows, width);
  auto d_weight = zeros<A>(policy, width);
  rms_norm::backward<test_policy, T, A>(policy, {.sum = ds, .rstd = dr, .weight = dw, .d_y = dy, .d_residual = d_s},
                                        d_s, d_weight);
  return {test::download(d_s), test::download(d_weight)};
}

}  // namespace

TEST_CASE_TEMPLATE("rms_norm: equals its definition at every size and type", T, STORAGE_TYPES) {
  for (std::int64_t rows : {0, 1, 3, 65})
    for (std::int64_t width : {1, 2, 15, 16, 17, 64, 1472}) {
      auto const x = test::rounded<T>(test::random_normal(rows * width, 1));
      auto const w = test::rounded<accum_t<T>>(test::random_normal(width, 2));
      auto const residual = test::rounded<accum_t<T>>(test::random_normal(rows * width, 3, 3.0));
      for (bool with_residual : {false, true}) {
        auto const r = with_residual ? residual : test::values{};
        auto const expected = reference(x, r, w, rows, width, 1e-5);
        auto const actual = run<T>(x, r, w, rows, width);
        test::check_close(actual.y, expected.y, test::tolerance<T>(width), "y");
        test::check_close(actual.sum, expected.sum, test::tolerance<accum_t<T>>(), "sum");
        test::check_close(actual.rstd, expected.rstd, test::tolerance<accum_t<T>>(width), "rstd");
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

TEST_CASE("rms_norm: the same bits for any number of threads") {
  std::int64_t const rows = 333, width = 50;
  auto const x = test::random_normal(rows * width, 1);
  auto const w = test::random_normal(width, 2);
  auto const forward = run<float>(x, {}, w, rows, width);
  auto const one = run_backward<float>(forward.sum, forward.rstd, w, x, x, rows, width);
  if constexpr (requires(test_policy p) { p.threads; })
    for (int threads : {1, 2, 5}) {
      test_policy policy = make_policy();
      policy.threads = threads;
      test::check_equal(run<float>(x, {}, w, rows, width, policy).y, forward.y, "y");
      auto const again = run_backward<float>(forward.sum, forward.rstd, w, x, x, rows, width, policy);
      test::check_equal(again.d_s, one.d_s, "d_s");
      test::check_equal(again.d_weight, one.d_weight, "d_weight");
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

TEST_CASE("rms_norm: shapes that disagree are named") {
  auto const x = test::upload<float>(test::values(12), 3, 4);
  auto const w = test::upload<float>(test::values(5), 5);
  auto y = test::poisoned<float>(3, 4);
  CHECK(test::message_of<shape_error>([&] { rms_norm::forward(make_policy(), {.x = x, .weight = w}, y); }) ==
        "rms_norm: weight: got (5), expected (4)");
}
