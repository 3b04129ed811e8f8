/// Sizes at the ends: a million steps of few channels, rows of 70,000 elements, one token, none, and experts without
/// tokens, on the device against the host.
#include "large/device_values.cuh"

#include <blackmamba/ops/add/add.hpp>
#include <blackmamba/ops/associative_scan/first_order_recurrence.hpp>
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
#include <blackmamba/ops/router/router.hpp>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>
#include <blackmamba/ops/sinkhorn/sinkhorn.hpp>

using namespace blackmamba;
using namespace test::large;

namespace {

constexpr std::int64_t one = 1;

/// What one policy makes of one problem: inputs as the device has them, results poisoned.
template <class P>
struct on;
template <>
struct on<device::cuda> {
  static device::cuda policy() { return {}; }
  template <class T, class... Ints>
  static auto input(std::uint64_t seed, float low, float high, Ints... extents) {
    return uniform<T>(seed, low, high, extents...);
  }
  template <class T, class... Ints>
  static auto output(Ints... extents) {
    return unwritten<T>(extents...);
  }
  template <class V>
  static auto result(V const& x) {
    return all_of(x.as_view());
  }
};
template <>
struct on<device::cpu> {
  static device::cpu policy() { return {}; }
  template <class T, class... Ints>
  static auto input(std::uint64_t seed, float low, float high, Ints... extents) {
    auto const source = uniform<T>(seed, low, high, extents...);
    host_tensor<T, (static_cast<void>(extents), dyn)...> x(extents...);
    if (x.size() > 0) memory::download(device::cuda{}, source.as_view(), x.as_view());
    return x;
  }
  template <class T, class... Ints>
  static auto output(Ints... extents) {
    return host_tensor<T, (static_cast<void>(extents), dyn)...>(extents...);
  }
  template <class V>
  static auto result(V const& x) {
    using T = typename V::value_type;
    host_tensor<T, dyn> copy(x.size());
    std::copy_n(x.data(), x.size(), copy.data());
    return copy;
  }
};

/// f(on<policy>, keep) names its results by keep(name, result, tolerance); both policies must have the same.
template <class F>
void check_both(F&& f) {
  struct named {
    std::string name;
    double tolerance;
    host_tensor<float, dyn> values;
  };
  auto const run = [&]<class P>(P) {
    std::vector<named> results;
    f(on<P>{}, [&](std::string const& name, auto const& x, double tolerance) {
      auto const values = on<P>::result(x);
      host_tensor<float, dyn> as_float(values.size());
      for (std::int64_t i = 0; i < values.size(); ++i) as_float.data()[i] = static_cast<float>(values.data()[i]);
      results.push_back({name, tolerance, std::move(as_float)});
    });
    return results;
  };
  auto const expected = run(device::cpu{});
  auto const actual = run(device::cuda{});
  REQUIRE(expected.size() == actual.size());
  for (std::size_t i = 0; i < expected.size(); ++i)
    check_same(expected[i].name, actual[i].values, expected[i].values, expected[i].tolerance);
}

/// selective_scan, forward and backward. Sums over all steps are carried in float on both sides, in different orders.
template <class T, class At, class Keep>
void scan(At at, Keep const& keep, std::int64_t length, std::int64_t channels) {
  constexpr int N = 16;
  using P = decltype(at.policy());
  auto const p = at.policy();
  double const close = sizeof(T) == 2 ? rounding<T>() : 1e-4, sums = 2e-3;
  auto const u = at.template input<T>(1, -1, 1, one, length, channels);
  auto const delta = at.template input<T>(2, -5, -1, one, length, channels);
  auto const z = at.template input<T>(3, -1, 1, one, length, channels);
  auto const d_y = at.template input<T>(4, -1, 1, one, length, channels);
  auto const A = at.template input<float>(5, -2, -0.01f, channels, std::int64_t{N});
  auto const B = at.template input<T>(6, -1, 1, one, length, std::int64_t{N});
  auto const C = at.template input<T>(7, -1, 1, one, length, std::int64_t{N});
  auto const D = at.template input<float>(8, -1, 1, channels);
  auto const y = at.template output<T>(one, length, channels);
  auto const final_state = at.template output<float>(one, channels, std::int64_t{N});
  auto const checkpoints = at.template output<float>(selective_scan::checkpoint_size<N>(one, length, channels, one));
  selective_scan::forward<N>(p,
                             {.u = u, .delta = delta, .A = A, .B = B, .C = C, .D = D, .z = z, .delta_softplus = true},
                             y.as_view(), {.final_state = final_state, .checkpoints = checkpoints});
  keep("scan: y", y, close);
  keep("scan: final state", final_state, 1e-4);
  auto const d_u = at.template output<T>(one, length, channels), d_delta = at.template output<T>(one, length, channels),
             d_z = at.template output<T>(one, length, channels);
  auto const d_B = at.template output<T>(one, length, std::int64_t{N}),
             d_C = at.template output<T>(one, length, std::int64_t{N});
  auto const d_A = zeros<float>(p, channels, N);
  auto const d_D = zeros<float>(p, channels);
  selective_scan::backward<N, P, T>(
      p,
      {.u = u,
       .delta = delta,
       .A = A,
       .B = B,
       .C = C,
       .D = D,
       .z = z,
       .delta_softplus = true,
       .checkpoints = checkpoints,
       .d_y = d_y},
      {.d_u = d_u, .d_delta = d_delta, .d_A = d_A, .d_B = d_B, .d_C = d_C, .d_D = d_D, .d_z = d_z});
  keep("scan: d_u", d_u, close);
  keep("scan: d_delta", d_delta, close);
  keep("scan: d_z", d_z, close);
  keep("scan: d_B", d_B, close);
  keep("scan: d_C", d_C, close);
  keep("scan: d_A", d_A, sums);
  keep("scan: d_D", d_D, sums);
}

template <class T, class At, class Keep>
void convolution(At at, Keep const& keep, std::int64_t length, std::int64_t channels) {
  auto const x = at.template input<T>(1, -1, 1, one, length, channels);
  auto const weight = at.template input<float>(2, -1, 1, channels, std::int64_t{4});
  auto const y = at.template output<T>(one, length, channels);
  causal_conv1d::forward(at.policy(), {.x = x, .weight = weight, .silu = true}, y.as_view());
  keep("convolution: y", y, rounding<T>());
}

template <class At, class Keep>
void recurrence(At at, Keep const& keep, std::int64_t rows, std::int64_t length) {
  auto const a = at.template input<float>(1, 0.5f, 0.999f, rows, length);
  auto const b = at.template input<float>(2, -1, 1, rows, length);
  auto const h = at.template output<float>(rows, length);
  first_order_recurrence::forward(at.policy(), {.a = a, .b = b}, h.as_view());
  keep("recurrence: h", h, 1e-4);
}

/// What goes row by row.
template <class T, class At, class Keep>
void rows_by_rows(At at, Keep const& keep, std::int64_t rows, std::int64_t width) {
  using P = decltype(at.policy());
  auto const p = at.policy();
  auto const x = at.template input<T>(1, -1, 1, rows, width), other = at.template input<T>(2, -1, 1, rows, width);
  auto const weight = at.template input<float>(3, 0.5f, 1.5f, width), bias = at.template input<float>(4, -1, 1, width);
  auto const residual = at.template input<float>(5, -1, 1, rows, width);
  auto const y = at.template output<T>(rows, width);
  auto const sum = at.template output<float>(rows, width), d_s = at.template output<float>(rows, width);
  auto const rstd = at.template output<float>(rows), mean = at.template output<float>(rows);
  rms_norm::forward(p, {.x = x, .weight = weight, .residual = residual}, y.as_view(), {.sum = sum, .rstd = rstd});
  keep("rms_norm: y", y, rounding<T>());
  auto const d_weight = zeros<float>(p, width), d_bias = zeros<float>(p, width);
  rms_norm::backward<P, T, float>(p, {.sum = sum, .rstd = rstd, .weight = weight, .d_y = other}, d_s.as_view(),
                                  d_weight);
  keep("rms_norm: d_s", d_s, 1e-5);
  keep("rms_norm: d_weight", d_weight, 1e-5);
  layer_norm::forward(p, {.x = x, .weight = weight, .bias = bias, .residual = residual}, y.as_view(),
                      {.sum = sum, .rstd = rstd, .mean = mean});
  keep("layer_norm: y", y, rounding<T>());
  layer_norm::backward<P, T, float>(p, {.sum = sum, .rstd = rstd, .mean = mean, .weight = weight, .d_y = other},
                                    d_s.as_view(), d_weight, d_bias);
  keep("layer_norm: d_s", d_s, 1e-5);
  keep("layer_norm: d_bias", d_bias, 1e-5);
  gated_activation::forward<activation::silu>(p, x, other, y.as_view());
  keep("gated_activation: y", y, rounding<T>());
  add::forward(p, x, other, y.as_view());
  keep("add: y", y, 0);

  auto const target = at.template input<std::int32_t>(6, 0, static_cast<float>(width), rows);
  auto const loss = at.template output<float>(one), lse = at.template output<float>(rows);
  cross_entropy::forward<P, T>(p, {.logits = x, .target = target}, {.loss = loss, .lse = lse});
  keep("cross_entropy: loss", loss, 1e-5);
  cross_entropy::backward<P, T>(p, {.logits = x, .target = target, .lse = lse, .scale = 1}, y.as_view());
  keep("cross_entropy: d_logits", y, rounding<T>());

  std::int64_t const words = 50, outputs = 8;
  auto const token = at.template input<std::int32_t>(7, 0, static_cast<float>(words), rows);
  auto const table = at.template input<T>(8, -1, 1, words, width);
  embedding::forward(p, token, table, y.as_view());
  keep("embedding: y", y, 0);
  auto const d_table = zeros<float>(p, words, width);
  embedding::backward<P, T>(p, token, x, d_table);
  keep("embedding: d_table", d_table, 1e-5);

  auto const matrix = at.template input<T>(9, -1, 1, outputs, width);
  auto const product = at.template output<T>(rows, outputs), d_x = at.template output<T>(rows, width);
  auto const d_matrix = zeros<float>(p, outputs, width);
  linear::forward(p, {.x = x, .weight = matrix}, product.as_view());
  keep("linear: y", product, rounding<T>());
  linear::backward<P, T>(p, {.x = x, .weight = matrix, .d_y = at.template input<T>(10, -1, 1, rows, outputs)},
                         {.d_x = d_x, .d_weight = d_matrix});
  keep("linear: d_x", d_x, rounding<T>());
  keep("linear: d_weight", d_matrix, 1e-4);
}

/// A mixture's way there and back, with the plan that the given choice makes.
template <class T, class At, class Keep, class Choice>
void dispatch(At at, Keep const& keep, std::int64_t tokens, std::int64_t choices, std::int64_t width,
              Choice const& choice, std::int64_t capacity = 0) {
  using P = decltype(at.policy());
  auto const p = at.policy();
  std::int64_t const experts = 8, outputs = 96;
  auto const x = at.template input<T>(1, -1, 1, tokens, width),
             weight_flat = at.template input<T>(2, -0.1f, 0.1f, experts * outputs, width);
  auto const weight = weight_flat.reshape(experts, outputs, width);
  auto const gate = at.template input<float>(3, 0, 1, tokens, choices);
  auto const offsets = at.template output<std::int64_t>(experts + 1);
  auto const source = at.template output<std::int32_t>(tokens * choices),
             row = at.template output<std::int32_t>(tokens * choices);
  expert_dispatch::routing<P> const plan{.offsets = offsets, .source = source, .row = row};
  expert_dispatch::plan(p, choice, plan, capacity);
  keep("plan: offsets", offsets, 0);
  keep("plan: source", source, 0);
  keep("plan: row", row, 0);
  // Rows that nothing writes are the same zeros on both sides.
  auto const permuted = zeros<T>(p, tokens * choices, width);
  auto const y = zeros<T>(p, tokens * choices, outputs);
  expert_dispatch::permute(p, plan, x, permuted.as_view());
  keep("permute", permuted, 0);
  grouped_linear::forward(p, {.x = permuted, .weight = weight, .offsets = offsets}, y.as_view());
  keep("grouped_linear: y", y, rounding<T>());
  auto const combined = at.template output<T>(tokens, outputs);
  expert_dispatch::combine(p, plan, y, gate, combined.as_view());
  keep("combine", combined, 2 * rounding<T>());

  auto const d_combined = at.template input<T>(4, -1, 1, tokens, outputs);
  auto const d_y = zeros<T>(p, tokens * choices, outputs);
  auto const d_gate = at.template output<float>(tokens, choices);
  expert_dispatch::combine_backward<P, T>(p, plan, {.rows = y, .gate = gate, .d_y = d_combined},
                                          {.d_rows = d_y, .d_gate = d_gate});
  keep("combine: d_rows", d_y, rounding<T>());
  keep("combine: d_gate", d_gate, rounding<T>());
  auto const d_permuted = zeros<T>(p, tokens * choices, width);
  auto const d_weight = zeros<float>(p, experts, outputs, width);
  auto const d_bias = zeros<float>(p, experts, outputs);
  grouped_linear::backward<P, T>(p, {.x = permuted, .weight = weight, .offsets = offsets, .d_y = d_y},
                                 {.d_x = d_permuted, .d_weight = d_weight, .d_bias = d_bias});
  keep("grouped_linear: d_x", d_permuted, 2 * rounding<T>());
  keep("grouped_linear: d_weight", d_weight, rounding<T>());
  keep("grouped_linear: d_bias", d_bias, rounding<T>());
  auto const d_x = at.template output<T>(tokens, width);
  expert_dispatch::permute_backward(p, plan, d_permuted, d_x.as_view());
  keep("permute: d_x", d_x, 2 * rounding<T>());
}

/// Every operator on so many tokens.
template <class T, class At, class Keep>
void tokens(At at, Keep const& keep, std::int64_t count) {
  using P = decltype(at.policy());
  auto const p = at.policy();
  rows_by_rows<T>(at, keep, count, 64);
  convolution<T>(at, keep, count, 64);
  scan<T>(at, keep, count, 64);

  std::int64_t const experts = 8, choices = 2;
  auto const logits = at.template input<float>(20, -2, 2, count, experts);
  auto const offset = zeros<float>(p, experts);
  tensor<typename P::memory_space, sinkhorn::report, dyn> report(one);
  sinkhorn::forward(p, logits, offset.as_view(), report.as_view());
  keep("sinkhorn: offset", offset, 1e-3);
  auto const expert = at.template output<std::int32_t>(count, choices);
  auto const gate = at.template output<float>(count, choices);
  router::forward<P, float>(p, {.logits = logits}, {.expert = expert, .gate = gate});
  keep("router: expert", expert, 0);
  keep("router: gate", gate, 1e-6);
  dispatch<T>(at, keep, count, choices, 64, expert);

  std::int64_t const heads = 4, head_dim = 32;
  auto const q = at.template input<T>(30, -1, 1, one, count, heads, head_dim);
  auto const k = at.template input<T>(31, -1, 1, one, count, heads, head_dim);
  auto const v = at.template input<T>(32, -1, 1, one, count, heads, head_dim);
  auto const y = at.template output<T>(one, count, heads, head_dim);
  attention::forward(p, {.q = q, .k = k, .v = v}, y.as_view());
  keep("attention: y", y, 2 * rounding<T>());
}

}  // namespace

TEST_CASE("L = 1,048,576, B 1, D 64: selective_scan in float32") {
  report const done("L = 1,048,576, B 1, D 64: selective_scan in float32, forward and backward");
  check_both([](auto at, auto const& keep) { scan<float>(at, keep, 1 << 20, 64); });
}
TEST_CASE("L = 1,048,576, B 1, D 64: selective_scan in bfloat16") {
  report const done("L = 1,048,576, B 1, D 64: selective_scan in bfloat16, forward and backward");
  check_both([](auto at, auto const& keep) { scan<bfloat16>(at, keep, 1 << 20, 64); });
}
TEST_CASE("L = 1,048,576, B 1, D 64: causal_conv1d; one row of 2^28 steps: first_order_recurrence") {
  report const done("L = 1,048,576, B 1, D 64: causal_conv1d; one row of 2^28: first_order_recurrence");
  check_both([](auto at, auto const& keep) {
    convolution<bfloat16>(at, keep, 1 << 20, 64);
    recurrence(at, keep, 1, 1 << 28);
  });
}
TEST_CASE("D = 70,000") {
  report const done("D = 70,000: norms, activation, embedding, loss, linear, convolution, scan");
  check_both([](auto at, auto const& keep) {
    rows_by_rows<bfloat16>(at, keep, 5, 70'000);
    convolution<bfloat16>(at, keep, 9, 70'000);
    scan<bfloat16>(at, keep, 40, 70'000);
  });
}
TEST_CASE("one token") {
  report const done("one token: every operator");
  check_both([](auto at, auto const& keep) { tokens<bfloat16>(at, keep, 1); });
}
TEST_CASE("no token") {
  report const done("no token: every operator");
  check_both([](auto at, auto const& keep) { tokens<bfloat16>(at, keep, 0); });
}
TEST_CASE("all tokens to one expert, 7 of 8 experts empty") {
  report const done("all tokens to one expert, 7 of 8 empty: each of the first, an inner, the last; with a capacity");
  for (float expert : {0.0f, 3.0f, 7.0f})
    for (std::int64_t capacity : {0, 100})
      check_both([&](auto at, auto const& keep) {
        auto const choice = at.template input<std::int32_t>(1, expert, expert, std::int64_t{4096}, one);
        dispatch<bfloat16>(at, keep, 4096, 1, 256, choice, capacity);
      });
}
