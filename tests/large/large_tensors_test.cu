/// Tensors of more than 2^31 elements, through every operator that goes over one: their first and last rows against the
/// host's. Takes up to 35 GB of device memory.
#include "large/device_values.cuh"

#include <blackmamba/ops/adamw/adamw.hpp>
#include <blackmamba/ops/add/add.hpp>
#include <blackmamba/ops/attention/attention.hpp>
#include <blackmamba/ops/causal_conv1d/causal_conv1d.hpp>
#include <blackmamba/ops/cross_entropy/cross_entropy.hpp>
#include <blackmamba/ops/embedding/embedding.hpp>
#include <blackmamba/ops/expert_dispatch/expert_dispatch.hpp>
#include <blackmamba/ops/gated_activation/gated_activation.hpp>
#include <blackmamba/ops/grouped_linear/grouped_linear.hpp>
#include <blackmamba/ops/layer_norm/layer_norm.hpp>
#include <blackmamba/ops/linear/linear.hpp>
#include <blackmamba/ops/rms_norm/rms_norm.hpp>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>

using namespace blackmamba;
using namespace test::large;
using T = bfloat16;

namespace {

constexpr std::int64_t rows = 524'289, width = 4096, some = 4;
static_assert(rows * width > std::int64_t{1} << 31);
constexpr double tolerance = rounding<T>();

device::cuda policy() { return {}; }
template <class F>
void first_and_last(F&& f) {
  for (std::int64_t first : {std::int64_t{0}, rows - some}) f(first);
}

}  // namespace

TEST_CASE("more than 2^31 elements: rms_norm, layer_norm") {
  report const done("more than 2^31 elements: rms_norm, layer_norm");
  auto const x = uniform<T>(1, -1, 1, rows, width);
  auto const weight = uniform<float>(2, 0.5, 1.5, width), bias = uniform<float>(3, -1, 1, width);
  auto const y = unwritten<T>(rows, width);
  auto const host_weight = all_of(weight.as_view()), host_bias = all_of(bias.as_view());
  host_tensor<T, dyn, dyn> expected(some, width);
  rms_norm::forward(policy(), {.x = x, .weight = weight}, y.as_view());
  first_and_last([&](std::int64_t first) {
    auto const part = rows_of(x.as_view(), first, some);
    rms_norm::forward(host, {.x = part, .weight = host_weight.reshape(width)}, expected.as_view());
    check_same("rms_norm", rows_of(y.as_view(), first, some), expected, tolerance);
  });
  layer_norm::forward(policy(), {.x = x, .weight = weight, .bias = bias}, y.as_view());
  first_and_last([&](std::int64_t first) {
    auto const part = rows_of(x.as_view(), first, some);
    layer_norm::forward(host, {.x = part, .weight = host_weight.reshape(width), .bias = host_bias.reshape(width)},
                        expected.as_view());
    check_same("layer_norm", rows_of(y.as_view(), first, some), expected, tolerance);
  });
}

TEST_CASE("more than 2^31 elements: add, gated_activation") {
  report const done("more than 2^31 elements: add, gated_activation");
  auto const a = uniform<T>(1, -2, 2, rows, width), b = uniform<T>(2, -2, 2, rows, width);
  auto const y = unwritten<T>(rows, width);
  host_tensor<T, dyn, dyn> expected(some, width);
  add::forward(policy(), a, b, y.as_view());
  first_and_last([&](std::int64_t first) {
    auto const part_a = rows_of(a.as_view(), first, some), part_b = rows_of(b.as_view(), first, some);
    add::forward(host, part_a, part_b, expected.as_view());
    check_same("add", rows_of(y.as_view(), first, some), expected, 0);
  });
  gated_activation::forward<activation::silu>(policy(), a, b, y.as_view());
  first_and_last([&](std::int64_t first) {
    auto const part_a = rows_of(a.as_view(), first, some), part_b = rows_of(b.as_view(), first, some);
    gated_activation::forward<activation::silu>(host, part_a, part_b, expected.as_view());
    check_same("gated_activation", rows_of(y.as_view(), first, some), expected, tolerance);
  });
}

TEST_CASE("more than 2^31 elements: embedding, with a table as large as its result") {
  report const done("more than 2^31 elements: embedding, with a table as large as its result");
  auto const table = uniform<T>(1, -1, 1, rows, width);
  auto const y = unwritten<T>(rows, width);
  host_tensor<std::int32_t, dyn> reversed(rows);
  for (std::int64_t i = 0; i < rows; ++i) reversed.data()[i] = static_cast<std::int32_t>(rows - 1 - i);
  device_tensor<std::int32_t, dyn> token(rows);
  memory::upload(policy(), reversed.as_view(), token.as_view());
  embedding::forward(policy(), token, table, y.as_view());
  for (std::int64_t row : {std::int64_t{0}, std::int64_t{1}, rows / 2, rows - 1})
    check_same("embedding", rows_of(y.as_view(), row, 1), rows_of(table.as_view(), rows - 1 - row, 1), 0);

  // Backward: token 7 stands first and last, 1 everywhere else.
  std::fill_n(reversed.data(), rows, 1);
  reversed.data()[0] = reversed.data()[rows - 1] = 7;
  memory::upload(policy(), reversed.as_view(), token.as_view());
  auto const d_table = zeros<float>(policy(), 9, width);
  embedding::backward<device::cuda, T>(policy(), token, table, d_table);
  auto const found = all_of(d_table.as_view());
  auto const first = rows_of(table.as_view(), 0, 1), last = rows_of(table.as_view(), rows - 1, 1);
  for (std::int64_t j = 0; j < width; ++j) {
    REQUIRE(found(7, j) == static_cast<float>(first(0, j)) + static_cast<float>(last(0, j)));
    REQUIRE(found(8, j) == 0);
  }
}

TEST_CASE("more than 2^31 elements: cross_entropy") {
  report const done("more than 2^31 elements: cross_entropy");
  std::int64_t const classes = 50'304, count = 42'700;
  REQUIRE(classes * count > std::int64_t{1} << 31);
  auto const logits = uniform<T>(1, -8, 8, count, classes);
  auto const target = uniform<std::int32_t>(2, 0, 50'304, count);
  auto const loss = unwritten<float>(1), row_loss = unwritten<float>(count), lse = unwritten<float>(count);
  cross_entropy::forward<device::cuda, T>(policy(), {.logits = logits, .target = target},
                                          {.loss = loss, .row_loss = row_loss, .lse = lse});
  host_tensor<T, dyn, dyn> d[2] = {host_tensor<T, dyn, dyn>(some, classes), host_tensor<T, dyn, dyn>(some, classes)};
  std::int64_t const firsts[2] = {0, count - some};
  for (int i = 0; i < 2; ++i) {
    auto const part = rows_of(logits.as_view(), firsts[i], some);
    auto const part_target = rows_of(target.as_view(), firsts[i], some);
    host_tensor<float, dyn> sum(1), part_loss(some), part_lse(some);
    cross_entropy::forward<device::cpu, T>(host, {.logits = part, .target = part_target.reshape(some)},
                                           {.loss = sum, .row_loss = part_loss, .lse = part_lse});
    check_same("row_loss", rows_of(row_loss.as_view(), firsts[i], some), part_loss, 1e-5);
    cross_entropy::backward<device::cpu, T>(
        host, {.logits = part, .target = part_target.reshape(some), .lse = part_lse, .scale = 1}, d[i].as_view());
  }
  cross_entropy::backward<device::cuda, T>(policy(), {.logits = logits, .target = target, .lse = lse, .scale = 1},
                                           logits.as_view());
  for (int i = 0; i < 2; ++i) check_same("d_logits", rows_of(logits.as_view(), firsts[i], some), d[i], tolerance);
}

TEST_CASE("more than 2^31 elements: expert_dispatch, grouped_linear, linear") {
  report const done("more than 2^31 elements: expert_dispatch, grouped_linear, linear");
  std::int64_t const experts = 8, outputs = 16;
  auto const x = uniform<T>(1, -1, 1, rows, width);
  auto const permuted = unwritten<T>(rows, width);
  auto const expert = uniform<std::int32_t>(2, 0, 8, rows, std::int64_t{1});
  auto const offsets = unwritten<std::int64_t>(experts + 1);
  auto const source = unwritten<std::int32_t>(rows), row = unwritten<std::int32_t>(rows);
  expert_dispatch::routing<device::cuda> const plan{.offsets = offsets, .source = source, .row = row};
  expert_dispatch::plan(policy(), expert, plan);
  expert_dispatch::permute(policy(), plan, x, permuted.as_view());
  auto const host_source = all_of(source.as_view());
  for (std::int64_t r : {std::int64_t{0}, rows / 3, rows - 2, rows - 1})
    check_same("permute", rows_of(permuted.as_view(), r, 1), rows_of(x.as_view(), host_source.data()[r], 1), 0);

  auto const weight = uniform<T>(3, -0.1f, 0.1f, experts, outputs, width);
  auto const y = unwritten<T>(rows, outputs);
  grouped_linear::forward(policy(), {.x = permuted, .weight = weight, .offsets = offsets}, y.as_view());
  host_tensor<T, dyn, dyn> expected(some, outputs);
  first_and_last([&](std::int64_t first) {
    auto const part = rows_of(permuted.as_view(), first, some);
    auto const of_expert = rows_of(weight.as_view(), first == 0 ? 0 : experts - 1, 1);
    linear::forward(host, {.x = part, .weight = of_expert.reshape(outputs, width)}, expected.as_view());
    check_same("grouped_linear", rows_of(y.as_view(), first, some), expected, tolerance);
  });
  linear::forward(policy(), {.x = x, .weight = weight.slice(0, 1).reshape(outputs, width)}, y.as_view());
  first_and_last([&](std::int64_t first) {
    auto const part = rows_of(x.as_view(), first, some);
    auto const of_expert = rows_of(weight.as_view(), 0, 1);
    linear::forward(host, {.x = part, .weight = of_expert.reshape(outputs, width)}, expected.as_view());
    check_same("linear", rows_of(y.as_view(), first, some), expected, tolerance);
  });

  auto const gate = uniform<float>(4, 1, 1, rows, std::int64_t{1});
  blackmamba::cuda::check("test", cudaMemsetAsync(x.data(), 0xff, sizeof(T) * static_cast<std::size_t>(x.size())));
  expert_dispatch::combine(policy(), plan, permuted, gate, x.as_view());
  for (std::int64_t r : {std::int64_t{0}, rows / 3, rows - 1})
    check_same("combine", rows_of(x.as_view(), host_source.data()[r], 1), rows_of(permuted.as_view(), r, 1), 0);
}

TEST_CASE("more than 2^31 elements: results of linear") {
  report const done("more than 2^31 elements: results of linear");
  std::int64_t const count = 131'073, outputs = 16'384, inputs = 64;
  auto const x = uniform<T>(1, -1, 1, count, inputs), weight = uniform<T>(2, -1, 1, outputs, inputs);
  auto const y = unwritten<T>(count, outputs);
  linear::forward(policy(), {.x = x, .weight = weight}, y.as_view());
  auto const host_weight = all_of(weight.as_view());
  for (std::int64_t first : {std::int64_t{0}, count - some}) {
    auto const part = rows_of(x.as_view(), first, some);
    host_tensor<T, dyn, dyn> expected(some, outputs);
    linear::forward(host, {.x = part, .weight = host_weight}, expected.as_view());
    check_same("linear", rows_of(y.as_view(), first, some), expected, tolerance);
  }
}

TEST_CASE("more than 2^31 elements: selective_scan, causal_conv1d") {
  report const done("more than 2^31 elements: selective_scan, causal_conv1d");
  constexpr int N = 16;
  std::int64_t const batch = 64, length = 8193, channels = 4096, seen = 64, one = 1;
  REQUIRE(batch * length * channels > std::int64_t{1} << 31);
  auto const u = uniform<T>(1, -1, 1, batch, length, channels), delta = uniform<T>(2, -4, -1, batch, length, channels);
  auto const A = uniform<float>(3, -2, -0.1f, channels, N);
  auto const B = uniform<T>(4, -1, 1, batch, length, N), C = uniform<T>(5, -1, 1, batch, length, N);
  auto const y = unwritten<T>(batch, length, channels);
  // The last channels of the last row of the batch.
  auto const last = [&](auto const& x) {
    return pieces(x.data() + ((batch - 1) * length * channels + channels - seen), length, seen, channels);
  };
  selective_scan::forward<N>(policy(), {.u = u, .delta = delta, .A = A, .B = B, .C = C, .delta_softplus = true},
                             y.as_view());
  {
    auto const host_u = last(u), host_delta = last(delta);
    auto const host_A = rows_of(A.as_view(), channels - seen, seen);
    auto const host_B = rows_of(B.as_view(), batch - 1, 1), host_C = rows_of(C.as_view(), batch - 1, 1);
    host_tensor<T, dyn, dyn, dyn> expected(one, length, seen);
    selective_scan::forward<N>(host,
                               {.u = host_u.reshape(one, length, seen),
                                .delta = host_delta.reshape(one, length, seen),
                                .A = host_A,
                                .B = host_B.reshape(one, length, std::int64_t{N}),
                                .C = host_C.reshape(one, length, std::int64_t{N}),
                                .delta_softplus = true},
                               expected.as_view());
    check_same("selective_scan", last(y), expected, tolerance);
  }
  auto const taps = uniform<float>(6, -1, 1, channels, std::int64_t{4});
  causal_conv1d::forward(policy(), {.x = u, .weight = taps, .silu = true}, y.as_view());
  auto const host_u = last(u);
  auto const host_taps = rows_of(taps.as_view(), channels - seen, seen);
  host_tensor<T, dyn, dyn, dyn> expected(one, length, seen);
  causal_conv1d::forward(host, {.x = host_u.reshape(one, length, seen), .weight = host_taps, .silu = true},
                         expected.as_view());
  check_same("causal_conv1d", last(y), expected, tolerance);
}

TEST_CASE("more than 2^31 elements: attention, and a step against such a cache") {
  report const done("more than 2^31 elements: attention, and a step against such a cache");
  std::int64_t const one = 1;
  {
    std::int64_t const batch = 1025, length = 1024, heads = 32, head_dim = 64, some_tokens = 128;
    REQUIRE(batch * length * heads * head_dim > std::int64_t{1} << 31);
    auto const q = uniform<T>(1, -1, 1, batch, length, heads, head_dim);
    auto const k = uniform<T>(2, -1, 1, batch, length, one, head_dim),
               v = uniform<T>(3, -1, 1, batch, length, one, head_dim);
    auto const y = unwritten<T>(batch, length, heads, head_dim);
    attention::forward(policy(), {.q = q, .k = k, .v = v}, y.as_view());
    std::int64_t const first = (batch - 1) * length;
    auto const tokens = [&](auto const& x, std::int64_t h) {
      return pieces(x.data() + first * h * head_dim, some_tokens, h * head_dim, h * head_dim);
    };
    auto const host_q = tokens(q, heads), host_k = tokens(k, one), host_v = tokens(v, one);
    host_tensor<T, dyn, dyn, dyn, dyn> expected(one, some_tokens, heads, head_dim);
    attention::forward(host,
                       {.q = host_q.reshape(one, some_tokens, heads, head_dim),
                        .k = host_k.reshape(one, some_tokens, one, head_dim),
                        .v = host_v.reshape(one, some_tokens, one, head_dim)},
                       expected.as_view());
    check_same("attention", tokens(y, heads), expected, 0.02);
  }
  std::int64_t const capacity = (std::int64_t{1} << 20) + 1, heads = 16, head_dim = 128;
  auto const key = uniform<T>(1, -1, 1, one, capacity, heads, head_dim);
  auto const value = uniform<T>(2, -1, 1, one, capacity, heads, head_dim);
  auto const q = uniform<T>(3, -1, 1, one, heads, head_dim), k = uniform<T>(4, -1, 1, one, heads, head_dim),
             v = uniform<T>(5, -1, 1, one, heads, head_dim);
  auto const length = uniform<std::int32_t>(6, static_cast<float>(capacity - 1), static_cast<float>(capacity - 1), one);
  auto const y = unwritten<T>(one, heads, head_dim);
  auto const last = heads - 1;
  // Of the last head, on the host; values so that their mean is not lost in rounding.
  auto const host_key = pieces(key.data() + last * head_dim, capacity, head_dim, heads * head_dim);
  auto const host_value = pieces(value.data() + last * head_dim, capacity, head_dim, heads * head_dim);
  auto const head_of = [&](auto const& x) { return pieces(x.data() + last * head_dim, one, head_dim, head_dim); };
  auto const host_q = head_of(q), host_k = head_of(k), host_v = head_of(v);
  host_tensor<T, dyn, dyn, dyn> expected(one, one, head_dim);
  host_tensor<std::int32_t, dyn> host_length(one);
  host_length.data()[0] = static_cast<std::int32_t>(capacity - 1);
  attention::step(host,
                  {.q = host_q.reshape(one, one, head_dim),
                   .k = host_k.reshape(one, one, head_dim),
                   .v = host_v.reshape(one, one, head_dim)},
                  {.key = host_key.reshape(one, capacity, one, head_dim),
                   .value = host_value.reshape(one, capacity, one, head_dim),
                   .length = host_length},
                  expected.as_view());
  attention::step(policy(), {.q = q, .k = k, .v = v}, {.key = key, .value = value, .length = length}, y.as_view());
  check_same("attention.step", head_of(y), expected, 0.02);
  CHECK(all_of(length.as_view()).data()[0] == capacity);
}

TEST_CASE("more than 2^31 elements: adamw") {
  report const done("more than 2^31 elements: adamw");
  std::int64_t const n = (std::int64_t{1} << 31) + 1001, part = 1000;
  auto const parameter = uniform<float>(1, -1, 1, n), gradient = uniform<float>(2, -1, 1, n),
             first = uniform<float>(3, -1, 1, n), second = uniform<float>(4, 0.1f, 1, n);
  auto const norm = unwritten<float>(1);
  auto const at_end = [&](auto const& x) { return pieces(x.data() + n - part, 1, part, part); };
  auto const host_parameter = at_end(parameter), host_gradient = at_end(gradient), host_first = at_end(first),
             host_second = at_end(second);
  adamw::norm<device::cuda, float>(policy(), gradient, norm.as_view());
  double const length = static_cast<double>(all_of(norm.as_view()).data()[0]);
  CHECK(length == doctest::Approx(std::sqrt(static_cast<double>(n) / 3)).epsilon(1e-3));
  adamw::options const how{.learning_rate = 1e-2, .step = 3};
  auto const step = [&]<class P>(P const& on, adamw::segment<P, float> const& all) {
    auto const size = all.parameter.extent(0);
    adamw::segment<P, float> parts[] = {all.slice(0, size - 500), all.slice(size - 500, 500)};
    parts[0].weight_decay = 0.1;
    adamw::step<P, float>(on, parts, {}, how);
  };
  step(policy(), {.parameter = parameter, .gradient = gradient, .first_moment = first, .second_moment = second});
  step(host, {.parameter = host_parameter.reshape(part),
              .gradient = host_gradient.reshape(part),
              .first_moment = host_first.reshape(part),
              .second_moment = host_second.reshape(part)});
  check_same("parameter", at_end(parameter), host_parameter, 1e-6);
  check_same("first moment", at_end(first), host_first, 1e-6);
}
