#include "support/policy_cuda.hpp"

#include "support/support.hpp"

#include <blackmamba/ops/adamw/adamw.hpp>
#include <blackmamba/ops/add/add.hpp>
#include <blackmamba/ops/cross_entropy/cross_entropy.hpp>
#include <blackmamba/ops/embedding/embedding.hpp>
#include <blackmamba/ops/gated_activation/gated_activation.hpp>
#include <blackmamba/ops/layer_norm/layer_norm.hpp>
#include <blackmamba/ops/rms_norm/rms_norm.hpp>

using namespace blackmamba;

/// Tensors of more than 2^31 elements: the last rows of a large matrix are treated as the same rows alone.
namespace {

constexpr std::int64_t limit = std::int64_t{1} << 31, last = 5;

/// Skips the test case and returns false where the device has less memory free.
bool fits(double gigabytes) {
  std::size_t free = 0, total = 0;
  REQUIRE(cudaMemGetInfo(&free, &total) == cudaSuccess);
  if (static_cast<double>(free) > gigabytes * 1e9) return true;
  test::skip_case(std::to_string(static_cast<int>(gigabytes)) + " GB of free device memory");
  return false;
}

/// Zeros, but for random numbers in the last rows.
template <class T>
auto zeros_and_last(std::int64_t rows, std::int64_t width, std::uint64_t seed) {
  auto x = zeros<T>(make_policy(), rows, width);
  auto const part = test::upload<T>(test::random_normal(last * width, seed), last, width);
  memory::copy(make_policy(), part.as_view(), x.slice(rows - last, last));
  return x;
}
/// The last rows, as a tensor of their own.
template <class T>
auto last_of(tensor<space::device, T, dyn, dyn> const& x) {
  tensor<space::device, T, dyn, dyn> part(last, x.extent(1));
  memory::copy(make_policy(), x.slice(x.extent(0) - last, last), part.as_view());
  return part;
}
template <class View>
test::values fetch_last(View const& x) {
  return test::download(x.slice(x.extent(0) - last, last));
}

struct shape {
  std::int64_t rows, width;
};
// Rows in registers, and rows that are passed over.
shape const many_rows{limit / 1032 + last, 1032}, long_rows{limit / 40001 + last, 40001};

}  // namespace

TEST_CASE("rms_norm: more than 2^31 elements") {
  for (auto const& [rows, width] : {many_rows, long_rows}) {
    if (!fits(28)) return;
    auto const x = zeros_and_last<bfloat16>(rows, width, 1);
    auto const sum = zeros_and_last<float>(rows, width, 2);
    auto const part_x = last_of(x), part_y = last_of(x);
    auto const part_sum = last_of(sum);
    auto const weight = test::upload<float>(test::random_normal(width, 3), width);
    auto const rstd = test::poisoned<float>(rows), part_rstd = test::poisoned<float>(last);
    rms_norm::forward<test_policy, bfloat16>(make_policy(), {.x = x, .weight = weight, .residual = sum}, x,
                                             {.sum = sum, .rstd = rstd});
    rms_norm::forward<test_policy, bfloat16>(make_policy(), {.x = part_x, .weight = weight, .residual = part_sum},
                                             part_y, {.sum = part_sum, .rstd = part_rstd});
    test::check_equal(fetch_last(x), test::download(part_y), "y");
    test::check_equal(fetch_last(sum), test::download(part_sum), "sum");
    // y as the gradient; the gradient through the residual is the sum, in place.
    auto const d_weight = zeros<float>(make_policy(), width), part_d_weight = zeros<float>(make_policy(), width);
    rms_norm::backward<test_policy, bfloat16, float>(
        make_policy(), {.sum = sum, .rstd = rstd, .weight = weight, .d_y = x, .d_residual = sum}, sum, d_weight);
    rms_norm::backward<test_policy, bfloat16, float>(
        make_policy(), {.sum = part_sum, .rstd = part_rstd, .weight = weight, .d_y = part_y, .d_residual = part_sum},
        part_sum, part_d_weight);
    test::check_equal(fetch_last(sum), test::download(part_sum), "d_s");
    test::check_close(test::download(d_weight), test::download(part_d_weight), test::tolerance<float>(last),
                      "d_weight");
  }
}
TEST_CASE("layer_norm: more than 2^31 elements") {
  for (auto const& [rows, width] : {many_rows, long_rows}) {
    if (!fits(10)) return;
    auto const x = zeros_and_last<bfloat16>(rows, width, 1), y = zeros_and_last<bfloat16>(rows, width, 2);
    auto const part_x = last_of(x), part_y = last_of(x);
    auto const weight = test::upload<float>(test::random_normal(width, 3), width);
    auto const rstd = test::poisoned<float>(rows), part_rstd = test::poisoned<float>(last);
    auto const mean = test::poisoned<float>(rows), part_mean = test::poisoned<float>(last);
    layer_norm::forward<test_policy, bfloat16>(make_policy(), {.x = x, .weight = weight, .bias = weight}, y,
                                               {.rstd = rstd, .mean = mean});
    layer_norm::forward<test_policy, bfloat16>(make_policy(), {.x = part_x, .weight = weight, .bias = weight}, part_y,
                                               {.rstd = part_rstd, .mean = part_mean});
    test::check_equal(fetch_last(y), test::download(part_y), "y");
    auto const d_weight = zeros<float>(make_policy(), width);
    layer_norm::backward<test_policy, bfloat16, bfloat16>(
        make_policy(), {.sum = x, .rstd = rstd, .mean = mean, .weight = weight, .d_y = y}, y, d_weight);
    layer_norm::backward<test_policy, bfloat16, bfloat16>(
        make_policy(), {.sum = part_x, .rstd = part_rstd, .mean = part_mean, .weight = weight, .d_y = part_y}, part_y,
        d_weight);
    test::check_equal(fetch_last(y), test::download(part_y), "d_s");
  }
}
TEST_CASE("gated_activation, add: more than 2^31 elements") {
  for (auto const& [rows, width] : {many_rows, long_rows}) {
    if (!fits(15)) return;
    auto const gate = zeros_and_last<bfloat16>(rows, width, 1), up = zeros_and_last<bfloat16>(rows, width, 2),
               d = zeros_and_last<bfloat16>(rows, width, 3);
    auto const part_gate = last_of(gate), part_up = last_of(up), part_d = last_of(d);
    gated_activation::backward<activation::silu, test_policy, bfloat16>(
        make_policy(), {.gate = gate, .up = up, .d_y = d}, {.d_gate = gate, .d_up = up});
    gated_activation::backward<activation::silu, test_policy, bfloat16>(
        make_policy(), {.gate = part_gate, .up = part_up, .d_y = part_d}, {.d_gate = part_gate, .d_up = part_up});
    gated_activation::forward<activation::silu>(make_policy(), gate, up, d.as_view());
    gated_activation::forward<activation::silu>(make_policy(), part_gate, part_up, part_d.as_view());
    test::check_equal(fetch_last(gate), test::download(part_gate), "d_gate");
    test::check_equal(fetch_last(up), test::download(part_up), "d_up");
    test::check_equal(fetch_last(d), test::download(part_d), "y");
    add::forward(make_policy(), gate, up, d.as_view());
    add::forward(make_policy(), part_gate, part_up, part_d.as_view());
    test::check_equal(fetch_last(d), test::download(part_d), "sum");
  }
}
TEST_CASE("cross_entropy: more than 2^31 logits") {
  for (std::int64_t classes : {50304, 50257}) {
    if (!fits(5)) return;
    std::int64_t const rows = limit / classes + last;
    auto const logits = zeros_and_last<bfloat16>(rows, classes, 1);
    auto const part = last_of(logits);
    auto const target = zeros<std::int32_t>(make_policy(), rows);
    auto const loss = test::poisoned<float>(1), lse = test::poisoned<float>(rows),
               part_lse = test::poisoned<float>(last);
    cross_entropy::forward<test_policy, bfloat16>(make_policy(), {.logits = logits, .target = target},
                                                  {.loss = loss, .lse = lse});
    double const whole = test::download(loss)[0];
    cross_entropy::forward<test_policy, bfloat16>(make_policy(), {.logits = part, .target = target.slice(0, last)},
                                                  {.loss = loss, .lse = part_lse});
    double const zero_rows = static_cast<double>(rows - last) * std::log(static_cast<double>(classes));
    CHECK(whole == doctest::Approx(zero_rows + test::download(loss)[0]).epsilon(1e-6));
    test::check_equal(test::download(lse.slice(rows - last, last)), test::download(part_lse), "lse");
    cross_entropy::backward<test_policy, bfloat16>(make_policy(), {.logits = logits, .target = target, .lse = lse},
                                                   logits.as_view());
    cross_entropy::backward<test_policy, bfloat16>(
        make_policy(), {.logits = part, .target = target.slice(0, last), .lse = part_lse}, part.as_view());
    test::check_equal(fetch_last(logits), test::download(part), "d_logits");
  }
}
TEST_CASE("embedding: more than 2^31 elements, of the table and of y") {
  for (auto const& [large, width] : {many_rows, long_rows}) {
    if (!fits(14)) return;
    test::values const end{static_cast<double>(large - 1), static_cast<double>(large - last),
                           static_cast<double>(large - 1)};
    {
      auto const table = zeros_and_last<bfloat16>(large, width, 1);
      auto const token = test::upload<std::int32_t>(end, 3);
      auto const y = test::poisoned<bfloat16>(3, width);
      embedding::forward(make_policy(), token, table, y.as_view());
      auto const rows = fetch_last(table), got = test::download(y);
      auto const w = static_cast<std::size_t>(width);
      for (std::size_t i = 0; i < w; ++i) {
        REQUIRE(got[i] == rows[4 * w + i]);
        REQUIRE(got[w + i] == rows[i]);
        REQUIRE(got[2 * w + i] == rows[4 * w + i]);
      }
      auto const d_table = zeros<float>(make_policy(), large, width);
      embedding::backward<test_policy, bfloat16>(make_policy(), token, y, d_table);
      auto const d = fetch_last(d_table);
      for (std::size_t i = 0; i < w; ++i) {
        REQUIRE(d[4 * w + i] == 2 * got[i]);
        REQUIRE(d[i] == got[w + i]);
      }
    }
    // Two tokens in turn, so that each is a sum over half of d_y, of which all but the last rows are zero.
    test::values turn(static_cast<std::size_t>(large));
    for (std::size_t r = 0; r < turn.size(); ++r) turn[r] = static_cast<double>(r % 2);
    auto const token = test::upload<std::int32_t>(turn, large);
    auto const y = zeros_and_last<bfloat16>(large, width, 2);
    auto const part = last_of(y);
    auto const d_table = zeros<float>(make_policy(), 2, width), part_d_table = zeros<float>(make_policy(), 2, width);
    embedding::backward<test_policy, bfloat16>(make_policy(), token, y, d_table);
    embedding::backward<test_policy, bfloat16>(make_policy(), token.slice(large - last, last), part, part_d_table);
    test::check_equal(test::download(d_table), test::download(part_d_table), "d_table");
    auto const table = test::upload<bfloat16>(test::random_normal(2 * width, 3), 2, width);
    auto const part_y = test::poisoned<bfloat16>(last, width);
    embedding::forward(make_policy(), token, table, y.as_view());
    embedding::forward(make_policy(), token.slice(large - last, last), table, part_y.as_view());
    test::check_equal(fetch_last(y), test::download(part_y), "y");
  }
}
TEST_CASE("adamw: more than 2^31 parameters") {
  if (!fits(36)) return;
  std::int64_t const n = limit + 1001, rest = 1000;
  auto const make = [&](std::uint64_t seed) {
    auto x = zeros<float>(make_policy(), n);
    auto values = test::random_normal(rest, seed);
    for (auto& v : values) v = std::abs(v);
    auto const part = test::upload<float>(values, rest);
    memory::copy(make_policy(), part.as_view(), x.slice(n - rest, rest));
    return x;
  };
  auto const part_of = [&](auto const& x) {
    tensor<space::device, float, dyn> part(rest);
    memory::copy(make_policy(), x.slice(n - rest, rest), part.as_view());
    return part;
  };
  auto const p = make(1), g = make(2), m = make(3), v = make(4);
  auto const part_p = part_of(p), part_g = part_of(g), part_m = part_of(m), part_v = part_of(v);
  auto const norm = test::poisoned<float>(1), part_norm = test::poisoned<float>(1);
  adamw::norm<test_policy, float>(make_policy(), g, norm.as_view());
  adamw::norm<test_policy, float>(make_policy(), part_g, part_norm.as_view());
  test::check_close(test::download(norm), test::download(part_norm), test::unit_roundoff<float>() * 2, "norm");
  adamw::options const how{.learning_rate = 0.1, .max_norm = 1};
  using segment = adamw::segment<test_policy, float>;
  segment const all{.parameter = p, .gradient = g, .first_moment = m, .second_moment = v},
      last{.parameter = part_p, .gradient = part_g, .first_moment = part_m, .second_moment = part_v};
  for (auto const& one : {all, last}) {
    auto const size = one.parameter.extent(0);
    segment parts[] = {one.slice(0, size - rest / 2), one.slice(size - rest / 2, rest / 2)};
    parts[0].weight_decay = 0.1;
    adamw::step<test_policy, float>(make_policy(), parts, norm, how);
  }
  test::check_equal(test::download(p.slice(n - rest, rest)), test::download(part_p), "parameter");
  test::check_equal(test::download(m.slice(n - rest, rest)), test::download(part_m), "first_moment");
  test::check_equal(test::download(v.slice(n - rest, rest)), test::download(part_v), "second_moment");
}
