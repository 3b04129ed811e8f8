#include "support/golden_files.hpp"

#include <blackmamba/ops/associative_scan/associative_scan.hpp>
#include <blackmamba/ops/associative_scan/first_order_recurrence.hpp>
#include <blackmamba/ops/attention/attention.hpp>
#include <blackmamba/ops/causal_conv1d/causal_conv1d.hpp>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>

using namespace blackmamba;
using namespace test::golden_files;

namespace {
/// Rows, scanned in each direction, with and without the element itself.
template <class T, class Operator>
void check_row_scans(golden& g, std::string const& name, Operator op) {
  auto const x = input<T>(1, {2}, 2, 37);
  auto const start = input<T>(2, {4}, 2);
  for (bool const exclusive : {false, true})
    for (bool const reverse : {false, true}) {
      auto y = result<T>(2, 37);
      auto total = result<T>(2);
      associative_scan::forward(policy, op, x.as_view(), y.as_view(),
                                {.exclusive = exclusive, .reverse = reverse, .initial = start, .total = total});
      std::string const kind = exclusive ? (reverse ? "exclusive_reverse" : "exclusive")
                               : reverse ? "reverse"
                                         : "inclusive";
      g.check(name + "." + kind + ".y", y);
      g.check(name + "." + kind + ".total", total);
    }
}
}  // namespace

TEST_CASE_TEMPLATE("golden: associative_scan", T, double, float) {
  golden g("associative_scan");
  check_row_scans<T>(g, "sum", scan_operator::sum<T>{});
  check_row_scans<T>(g, "maximum", scan_operator::maximum<T>{});
  check_row_scans<T>(g, "minimum", scan_operator::minimum<T>{});
  {
    auto const x = input<T>(3, {1, 1}, 2, 9, 3);
    auto const start = input<T>(4, {2}, 2, 3);
    auto y = result<T>(2, 9, 3);
    auto total = result<T>(2, 3);
    associative_scan::forward(policy, scan_operator::product<T>{}, x.as_view(), y.as_view(),
                              {.initial = start, .total = total});
    g.check("product.channels.y", y);
    g.check("product.channels.total", total);
  }
  auto const x = input<T>(5, {2}, 1, 12);
  auto const packed = offsets({0, 4, 4, 12});
  auto y = result<T>(1, 12);
  auto total = result<T>(3);
  associative_scan::forward(policy, scan_operator::sum<T>{}, x.as_view(), y.as_view(),
                            {.total = total, .cu_seqlens = packed});
  g.check("sum.packed.y", y);
  g.check("sum.packed.total", total);
}

TEST_CASE_TEMPLATE("golden: first_order_recurrence", T, double, float) {
  golden g("first_order_recurrence");
  auto const a = input<T>(1, {2}, 2, 5, 2), b = input<T>(2, {2}, 2, 5, 2), d_h = input<T>(4, {}, 2, 5, 2);
  auto const start = input<T>(3, {2}, 2, 2), d_final = input<T>(5, {}, 2, 2);
  for (auto const& [name, reverse] : {std::pair<std::string, bool>{"forward", false}, {"reverse", true}}) {
    auto h = result<T>(2, 5, 2), d_a = result<T>(2, 5, 2), d_b = result<T>(2, 5, 2);
    auto last = result<T>(2, 2), d_start = result<T>(2, 2);
    first_order_recurrence::forward(policy, {.a = a, .b = b, .initial_state = start, .reverse = reverse}, h.as_view(),
                                    last);
    first_order_recurrence::backward(
        policy, {.a = a, .h = h, .d_h = d_h, .initial_state = start, .d_final_state = d_final, .reverse = reverse},
        d_a.as_view(), d_b, d_start);
    g.check(name + ".h", h);
    g.check(name + ".final_state", last);
    g.check(name + ".d_a", d_a);
    g.check(name + ".d_b", d_b);
    g.check(name + ".d_initial_state", d_start);
  }
}

TEST_CASE_TEMPLATE("golden: causal_conv1d", T, double, float) {
  golden g("causal_conv1d");
  {
    auto const x = input<T>(1, {2}, 2, 5, 3), s = input<T>(4, {2}, 2, 3, 3), d_y = input<T>(5, {}, 2, 5, 3);
    auto const w = input<T>(2, {2}, 3, 4);
    auto const b = input<T>(3, {}, 3);
    auto const d_final = input<T>(6, {}, 2, 3, 3);
    auto y = result<T>(2, 5, 3), last = result<T>(2, 3, 3), d_x = result<T>(2, 5, 3), d_s = result<T>(2, 3, 3);
    auto d_w = sums<T>(3, 4);
    auto d_b = sums<T>(3);
    causal_conv1d::forward(policy, {.x = x, .weight = w, .bias = b, .initial_state = s, .silu = true}, y, last);
    causal_conv1d::backward<test_policy, T>(
        policy,
        {.x = x, .weight = w, .bias = b, .initial_state = s, .silu = true, .d_y = d_y, .d_final_state = d_final},
        {.d_x = d_x, .d_weight = d_w, .d_bias = d_b, .d_initial_state = d_s});
    g.check("silu.y", y);
    g.check("silu.final_state", last);
    g.check("silu.d_x", d_x);
    g.check("silu.d_weight", d_w);
    g.check("silu.d_bias", d_b);
    g.check("silu.d_initial_state", d_s);
  }
  auto const x = input<T>(7, {2}, 1, 6, 2), d_y = input<T>(9, {}, 1, 6, 2);
  auto const w = input<T>(8, {2}, 2, 3);
  auto const packed = offsets({0, 1, 1, 6});
  auto y = result<T>(1, 6, 2), last = result<T>(3, 2, 2), d_x = result<T>(1, 6, 2);
  auto d_w = sums<T>(2, 3);
  causal_conv1d::forward(policy, {.x = x, .weight = w, .cu_seqlens = packed}, y, last);
  causal_conv1d::backward<test_policy, T>(policy, {.x = x, .weight = w, .cu_seqlens = packed, .d_y = d_y},
                                          {.d_x = d_x, .d_weight = d_w});
  g.check("packed.y", y);
  g.check("packed.final_state", last);
  g.check("packed.d_x", d_x);
  g.check("packed.d_weight", d_w);
}

TEST_CASE_TEMPLATE("golden: selective_scan", T, double, float) {
  golden g("selective_scan");
  constexpr int N = 4;
  {
    auto const u = input<T>(1, {2}, 2, 4, 2), delta = input<T>(2, {4}, 2, 4, 2), z = input<T>(7, {4}, 2, 4, 2);
    auto const B = input<T>(4, {2}, 2, 4, N), C = input<T>(5, {2}, 2, 4, N), d_y = input<T>(10, {}, 2, 4, 2);
    auto const A = input<T>(3, {2}, 2, N);
    auto const D = input<T>(6, {2, 1}, 2), bias = input<T>(8, {2, -1}, 2);
    auto const h = input<T>(9, {2}, 2, 2, N), d_final = input<T>(11, {}, 2, 2, N);
    auto y = result<T>(2, 4, 2), last = result<T>(2, 2, N);
    auto checkpoints = result<T>(selective_scan::checkpoint_size<N>(2, 4, 2, 2));
    auto d_u = result<T>(2, 4, 2), d_delta = result<T>(2, 4, 2), d_z = result<T>(2, 4, 2), d_h = result<T>(2, 2, N);
    auto d_B = result<T>(2, 4, N), d_C = result<T>(2, 4, N);
    auto d_A = sums<T>(2, N);
    auto d_D = sums<T>(2), d_bias = sums<T>(2);
    selective_scan::forward<N>(policy,
                               {.u = u,
                                .delta = delta,
                                .A = A,
                                .B = B,
                                .C = C,
                                .D = D,
                                .z = z,
                                .delta_bias = bias,
                                .initial_state = h,
                                .delta_softplus = true,
                                .A_is_log = true},
                               y, {.final_state = last, .checkpoints = checkpoints});
    selective_scan::backward<N, test_policy, T>(policy,
                                                {.u = u,
                                                 .delta = delta,
                                                 .A = A,
                                                 .B = B,
                                                 .C = C,
                                                 .D = D,
                                                 .z = z,
                                                 .delta_bias = bias,
                                                 .initial_state = h,
                                                 .delta_softplus = true,
                                                 .A_is_log = true,
                                                 .checkpoints = checkpoints,
                                                 .d_y = d_y,
                                                 .d_final_state = d_final},
                                                {.d_u = d_u,
                                                 .d_delta = d_delta,
                                                 .d_A = d_A,
                                                 .d_B = d_B,
                                                 .d_C = d_C,
                                                 .d_D = d_D,
                                                 .d_z = d_z,
                                                 .d_delta_bias = d_bias,
                                                 .d_initial_state = d_h});
    g.check("mamba.y", y);
    g.check("mamba.final_state", last);
    g.check("mamba.d_u", d_u);
    g.check("mamba.d_delta", d_delta);
    g.check("mamba.d_A", d_A);
    g.check("mamba.d_B", d_B);
    g.check("mamba.d_C", d_C);
    g.check("mamba.d_D", d_D);
    g.check("mamba.d_z", d_z);
    g.check("mamba.d_delta_bias", d_bias);
    g.check("mamba.d_initial_state", d_h);
  }
  auto const u = input<T>(12, {2}, 1, 6, 3), delta = input<T>(13, {0.5, 0.5}, 1, 6, 3), d_y = input<T>(17, {}, 1, 6, 3);
  auto const B = input<T>(15, {2}, 1, 6, N), C = input<T>(16, {2}, 1, 6, N);
  auto const A = input<T>(14, {1, -1}, 3, N);
  auto const packed = offsets({0, 2, 2, 6});
  auto y = result<T>(1, 6, 3), last = result<T>(3, 3, N), d_u = result<T>(1, 6, 3), d_delta = result<T>(1, 6, 3);
  auto checkpoints = result<T>(selective_scan::checkpoint_size<N>(1, 6, 3, 3));
  auto d_B = result<T>(1, 6, N), d_C = result<T>(1, 6, N);
  auto d_A = sums<T>(3, N);
  selective_scan::forward<N>(policy, {.u = u, .delta = delta, .A = A, .B = B, .C = C, .cu_seqlens = packed}, y,
                             {.final_state = last, .checkpoints = checkpoints});
  selective_scan::backward<N, test_policy, T>(
      policy,
      {.u = u, .delta = delta, .A = A, .B = B, .C = C, .cu_seqlens = packed, .checkpoints = checkpoints, .d_y = d_y},
      {.d_u = d_u, .d_delta = d_delta, .d_A = d_A, .d_B = d_B, .d_C = d_C});
  g.check("packed.y", y);
  g.check("packed.final_state", last);
  g.check("packed.d_u", d_u);
  g.check("packed.d_delta", d_delta);
  g.check("packed.d_A", d_A);
  g.check("packed.d_B", d_B);
  g.check("packed.d_C", d_C);
}

TEST_CASE_TEMPLATE("golden: attention", T, double, float) {
  golden g("attention");
  for (auto const& [name, base] : {std::pair<std::string, float>{"packed", 10000}, {"packed_without_rotary", 0}}) {
    auto const q = input<T>(1, {4}, 1, 6, 2, 4), d_y = input<T>(4, {}, 1, 6, 2, 4);
    auto const k = input<T>(2, {4}, 1, 6, 1, 4), v = input<T>(3, {2}, 1, 6, 1, 4);
    auto const packed = offsets({0, 2, 2, 6});
    auto y = result<T>(1, 6, 2, 4), d_q = result<T>(1, 6, 2, 4);
    auto d_k = result<T>(1, 6, 1, 4), d_v = result<T>(1, 6, 1, 4);
    auto lse = result<T>(1, 2, 6);
    attention::forward(policy, {.q = q, .k = k, .v = v, .cu_seqlens = packed, .rotary_base = base}, y, {.lse = lse});
    attention::backward<test_policy, T>(
        policy, {.q = q, .k = k, .v = v, .y = y, .lse = lse, .d_y = d_y, .cu_seqlens = packed, .rotary_base = base},
        {.d_q = d_q, .d_k = d_k, .d_v = d_v});
    g.check(name + ".y", y);
    g.check(name + ".lse", lse);
    g.check(name + ".d_q", d_q);
    g.check(name + ".d_k", d_k);
    g.check(name + ".d_v", d_v);
  }
  auto const q = input<T>(5, {4}, 1, 150, 4, 8), d_y = input<T>(8, {}, 1, 150, 4, 8);
  auto const k = input<T>(6, {4}, 1, 150, 2, 8), v = input<T>(7, {2}, 1, 150, 2, 8);
  auto y = result<T>(1, 150, 4, 8), d_q = result<T>(1, 150, 4, 8);
  auto d_k = result<T>(1, 150, 2, 8), d_v = result<T>(1, 150, 2, 8);
  auto lse = result<T>(1, 4, 150);
  attention::forward(policy, {.q = q, .k = k, .v = v}, y, {.lse = lse});
  attention::backward<test_policy, T>(policy, {.q = q, .k = k, .v = v, .y = y, .lse = lse, .d_y = d_y},
                                      {.d_q = d_q, .d_k = d_k, .d_v = d_v});
  auto const all_y = test::download(y), all_lse = test::download(lse);
  g.check<T>("long.last_y", test::values(all_y.end() - 32, all_y.end()));
  g.check<T>("long.last_lse", test::values{all_lse[149], all_lse[299], all_lse[449], all_lse[599]});
  auto const summary = [](test::values const& gradient, std::uint32_t probe) {
    return test::values{test::weighted_sum(gradient, input_values(probe, static_cast<std::int64_t>(gradient.size()))),
                        std::sqrt(test::weighted_sum(gradient, gradient))};
  };
  g.check<T>("long.d_q", summary(test::download(d_q), 9));
  g.check<T>("long.d_k", summary(test::download(d_k), 10));
  g.check<T>("long.d_v", summary(test::download(d_v), 11));
}
