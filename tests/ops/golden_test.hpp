#include "support/golden_files.hpp"

#include <blackmamba/ops/adamw/adamw.hpp>
#include <blackmamba/ops/add/add.hpp>
#include <blackmamba/ops/cross_entropy/cross_entropy.hpp>
#include <blackmamba/ops/embedding/embedding.hpp>
#include <blackmamba/ops/expert_dispatch/expert_dispatch.hpp>
#include <blackmamba/ops/gated_activation/gated_activation.hpp>
#include <blackmamba/ops/grouped_linear/grouped_linear.hpp>
#include <blackmamba/ops/layer_norm/layer_norm.hpp>
#include <blackmamba/ops/linear/linear.hpp>
#include <blackmamba/ops/rms_norm/rms_norm.hpp>
#include <blackmamba/ops/router/router.hpp>
#include <blackmamba/ops/sinkhorn/sinkhorn.hpp>

#include <array>

using namespace blackmamba;
using namespace test::golden_files;

TEST_CASE_TEMPLATE("golden: add", T, double, float) {
  golden g("add");
  auto const a = input<T>(1, {2}, 3, 5), b = input<T>(2, {8}, 3, 5);
  auto y = result<T>(3, 5);
  add::forward<test_policy, T>(policy, a, b, y);
  g.check("rows.y", y);
}

TEST_CASE_TEMPLATE("golden: embedding", T, double, float) {
  golden g("embedding");
  auto const table = input<T>(1, {2}, 6, 3), d_y = input<T>(2, {}, 5, 3);
  auto const token = test::upload<std::int32_t>({4, 0, 4, 5, 4}, 5);
  auto y = result<T>(5, 3);
  auto d_table = sums<T>(6, 3);
  embedding::forward(policy, token, table, y.as_view());
  embedding::backward<test_policy, T>(policy, token, d_y, d_table);
  g.check("table.y", y);
  g.check("table.d_table", d_table);
}

TEST_CASE_TEMPLATE("golden: rms_norm and layer_norm", T, double, float) {
  auto const x = input<T>(1, {2}, 3, 5), residual = input<T>(2, {4}, 3, 5), d_y = input<T>(5, {}, 3, 5);
  auto const w = input<T>(3, {1, 1}, 5), b = input<T>(4, {}, 5);
  auto const d_past = input<T>(6, {}, 3, 5);
  auto y = result<T>(3, 5), sum = result<T>(3, 5), d_s = result<T>(3, 5);
  auto mean = result<T>(3), rstd = result<T>(3);
  {
    golden g("rms_norm");
    auto d_w = sums<T>(5);
    rms_norm::forward(policy, {.x = x, .weight = w, .residual = residual}, y, {.sum = sum, .rstd = rstd});
    rms_norm::backward<test_policy, T, T>(
        policy, {.sum = sum, .rstd = rstd, .weight = w, .d_y = d_y, .d_residual = d_past}, d_s, d_w);
    g.check("residual.y", y);
    g.check("residual.sum", sum);
    g.check("residual.d_s", d_s);
    g.check("residual.d_weight", d_w);
  }
  golden g("layer_norm");
  auto d_w = sums<T>(5), d_b = sums<T>(5);
  layer_norm::forward(policy, {.x = x, .weight = w, .bias = b, .residual = residual}, y,
                      {.sum = sum, .rstd = rstd, .mean = mean});
  layer_norm::backward<test_policy, T, T>(
      policy, {.sum = sum, .rstd = rstd, .mean = mean, .weight = w, .d_y = d_y, .d_residual = d_past}, d_s, d_w, d_b);
  g.check("residual.y", y);
  g.check("residual.sum", sum);
  g.check("residual.d_s", d_s);
  g.check("residual.d_weight", d_w);
  g.check("residual.d_bias", d_b);
}

namespace {
template <class Activation, class T>
void check_gated_activation(golden& g, std::string const& name) {
  auto const gate = input<T>(1, {8}, 3, 7), up = input<T>(2, {2}, 3, 7), d_y = input<T>(3, {}, 3, 7);
  auto y = result<T>(3, 7), d_gate = result<T>(3, 7), d_up = result<T>(3, 7);
  gated_activation::forward<Activation>(policy, gate, up, y);
  gated_activation::backward<Activation, test_policy, T>(policy, {.gate = gate, .up = up, .d_y = d_y},
                                                         {.d_gate = d_gate, .d_up = d_up});
  g.check(name + ".y", y);
  g.check(name + ".d_gate", d_gate);
  g.check(name + ".d_up", d_up);
}
}  // namespace

TEST_CASE_TEMPLATE("golden: gated_activation", T, double, float) {
  golden g("gated_activation");
  check_gated_activation<activation::silu, T>(g, "silu");
  check_gated_activation<activation::gelu, T>(g, "gelu");
}

namespace {
/// BlackMamba's routed layer out of the operators: router, permute, experts, combine; and back.
template <class Activation, class T>
void check_routed_layer(golden& g, std::string const& name) {
  std::int64_t const M = 7, H = 4, D = 3, E = 3;
  auto const x = input<T>(1, {4}, M, H), d_y = input<T>(2, {}, M, H), w = input<T>(3, {2}, E, H);
  auto const b = input<T>(4, {}, E), offset = input<T>(7, {2}, E);
  auto const fc1 = input<T>(5, {2}, E, 2 * D, H), fc2 = input<T>(6, {2}, E, H, D);
  auto logits = result<T>(M, E), gate = result<T>(M, 1), y = result<T>(M, H);
  auto expert = result<std::int32_t>(M, 1);
  auto first = result<std::int64_t>(E + 1);
  auto source = result<std::int32_t>(M), row = result<std::int32_t>(M);
  auto rows = result<T>(M, H), hidden = result<T>(M, 2 * D), active = result<T>(M, D), out_rows = result<T>(M, H);
  expert_dispatch::routing<test_policy> const plan{.offsets = first, .source = source, .row = row};
  router::selection<test_policy, T> const chosen{.expert = expert, .gate = gate};

  linear::forward(policy, {.x = x, .weight = w, .bias = b}, logits.as_view());
  router::forward(policy, {.logits = logits, .offset = offset}, chosen, {.beta = 2});
  expert_dispatch::plan(policy, expert, plan);
  expert_dispatch::permute(policy, plan, x, rows.as_view());
  grouped_linear::forward(policy, {.x = rows, .weight = fc1, .offsets = first}, hidden.as_view());
  gated_activation::forward<Activation>(policy, hidden.columns(0, D), hidden.columns(D, D), active.as_view());
  grouped_linear::forward(policy, {.x = active, .weight = fc2, .offsets = first}, out_rows.as_view());
  expert_dispatch::combine(policy, plan, out_rows, gate, y.as_view());
  test::check_equal(test::download(expert), g[name + ".expert"], name + ".expert");
  g.check(name + ".y", y);

  auto d_out_rows = result<T>(M, H), d_active = result<T>(M, D), d_hidden = result<T>(M, 2 * D),
       d_rows = result<T>(M, H);
  auto d_gate = result<T>(M, 1), d_logits = result<T>(M, E), d_x = result<T>(M, H), d_w = sums<T>(E, H);
  auto d_b = sums<T>(E);
  auto d_fc1 = sums<T>(E, 2 * D, H), d_fc2 = sums<T>(E, H, D);
  expert_dispatch::combine_gradients<test_policy, T> const d_combined{.d_rows = d_out_rows, .d_gate = d_gate};
  expert_dispatch::combine_backward(policy, plan, {.rows = out_rows, .gate = gate, .d_y = d_y}, d_combined);
  grouped_linear::backward<test_policy, T>(policy, {.x = active, .weight = fc2, .offsets = first, .d_y = d_out_rows},
                                           {.d_x = d_active, .d_weight = d_fc2});
  gated_activation::backward<Activation, test_policy, T>(
      policy, {.gate = hidden.columns(0, D), .up = hidden.columns(D, D), .d_y = d_active},
      {.d_gate = d_hidden.columns(0, D), .d_up = d_hidden.columns(D, D)});
  grouped_linear::backward<test_policy, T>(policy, {.x = rows, .weight = fc1, .offsets = first, .d_y = d_hidden},
                                           {.d_x = d_rows, .d_weight = d_fc1});
  expert_dispatch::permute_backward(policy, plan, d_rows, d_x.as_view());
  router::backward(policy, {.logits = logits, .expert = expert, .d_gate = d_gate}, d_logits.as_view());
  linear::backward<test_policy, T>(policy, {.x = x, .weight = w, .d_y = d_logits},
                                   {.d_x = d_x, .d_weight = d_w, .d_bias = d_b, .d_x_update = update::accumulate});
  g.check(name + ".d_x", d_x);
  g.check(name + ".d_weight", d_w);
  g.check(name + ".d_bias", d_b);
  g.check(name + ".d_fc1", d_fc1);
  g.check(name + ".d_fc2", d_fc2);
}
}  // namespace

TEST_CASE_TEMPLATE("golden: router and experts", T, double, float) {
  golden g("router");
  check_routed_layer<activation::silu, T>(g, "swiglu");
  check_routed_layer<activation::gelu, T>(g, "geglu");
  auto const logits = input<T>(8, {4}, 5, 4), d_gate = input<T>(9, {}, 5, 2);
  for (auto const& [name, gate] : {std::pair<std::string, gate_function>{"sigmoid", gate_function::sigmoid},
                                   {"softmax", gate_function::softmax},
                                   {"softmax_selected", gate_function::softmax_selected}}) {
    auto expert = result<std::int32_t>(5, 2);
    auto weight = result<T>(5, 2), d_logits = result<T>(5, 4);
    router::selection<test_policy, T> const chosen{.expert = expert, .gate = weight};
    router::forward(policy, {.logits = logits}, chosen, {.gate = gate});
    router::backward(policy, {.logits = logits, .expert = expert, .d_gate = d_gate}, d_logits.as_view(), gate);
    test::check_equal(test::download(expert), g[name + ".expert"], name + ".expert");
    g.check(name + ".gate", weight);
    g.check(name + ".d_logits", d_logits);
  }
}

TEST_CASE_TEMPLATE("golden: cross_entropy", T, double, float) {
  golden g("cross_entropy");
  auto const logits = input<T>(1, {16}, 5, 7);
  auto const target = test::upload<std::int32_t>({3, -1, 0, 6, 3}, 5);
  auto loss = result<T>(1), row_loss = result<T>(5), lse = result<T>(5);
  auto d_logits = result<T>(5, 7);
  cross_entropy::results<test_policy, T> const results{.loss = loss, .row_loss = row_loss, .lse = lse};
  cross_entropy::forward(policy, {.logits = logits, .target = target}, results);
  cross_entropy::backward(policy, {.logits = logits, .target = target, .lse = lse, .scale = T(0.25)},
                          d_logits.as_view());
  g.check("sum.loss", loss);
  g.check("sum.row_loss", row_loss);
  g.check("sum.d_logits", d_logits);
}

TEST_CASE_TEMPLATE("golden: adamw", T, double, float) {
  golden g("adamw");
  for (auto const& [name, max_norm] : {std::pair<std::string, double>{"clipped", 0.5}, {"unclipped", 0.0}}) {
    auto parameter = input<T>(1, {2}, 10), first = sums<T>(10), second = sums<T>(10), norm = result<T>(1);
    for (int step = 1; step <= 3; ++step) {
      auto const gradient = input<T>(static_cast<std::uint32_t>(1 + step), {}, 10);
      adamw::norm(policy, gradient, norm.as_view());
      g.check(name + ".norm" + std::to_string(step), norm);
      adamw::segment<test_policy, T> const all{
          .parameter = parameter, .gradient = gradient, .first_moment = first, .second_moment = second};
      adamw::segment<test_policy, T> parts[] = {all.slice(0, 6), all.slice(6, 4)};
      parts[0].weight_decay = 0.125;
      parts[1].learning_rate_scale = 0.5;
      adamw::step<test_policy, T>(
          policy, parts, norm,
          {.learning_rate = 0x1p-7, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .step = step, .max_norm = max_norm});
    }
    g.check(name + ".parameter", parameter);
    g.check(name + ".first_moment", first);
    g.check(name + ".second_moment", second);
  }
}

TEST_CASE_TEMPLATE("golden: sinkhorn", T, double, float) {
  golden g("sinkhorn");
  auto x = input_values(1, 36, {2});
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += std::array{0.5, 0.0, -0.25}[i % 3];
  auto const logits = test::upload<T>(x, 12, 3);
  auto const run = [&](std::string const& name, sinkhorn_options const& how) {
    auto offset = sums<T>(3);
    tensor<test::test_space, sinkhorn_report, dyn> report(1);
    auto plan = result<T>(12, 3);
    sinkhorn::forward(policy, logits, offset.as_view(), report, how, plan);
    g.check(name + ".offset", offset);
    g.check(name + ".plan", plan);
    tensor<space::host, sinkhorn_report, dyn> host(1);
    memory::download(policy, report.as_view(), host.as_view());
    return host(0);
  };
  for (auto const& [name, mode] :
       {std::pair<std::string, sinkhorn_mode>{"reference", sinkhorn_mode::reference}, {"ones", sinkhorn_mode::ones}}) {
    auto const report = run(name, {.mode = mode});
    CHECK(report.passes == g[name + ".passes"][0]);
    CHECK(std::abs(static_cast<double>(report.error) - g[name + ".error"][0]) <= 1e-6);
  }
  run("sound", {.tolerance = std::is_same_v<T, double> ? 1e-12 : 1e-6});
}
