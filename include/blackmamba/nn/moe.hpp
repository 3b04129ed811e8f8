#pragma once
#include <blackmamba/nn/balance.hpp>
#include <blackmamba/nn/mlp.hpp>
#include <blackmamba/nn/module.hpp>
#include <blackmamba/ops/expert_mlp/expert_mlp.hpp>
#include <blackmamba/ops/router/router.hpp>
#include <blackmamba/ops/router_dispatch/router_dispatch.hpp>

namespace blackmamba {

/// Which experts a token visits: the K best by the balance rule's selector, weighted by Gate of their raw logits.
/// Capacity is the most rows of an expert, as a multiple of the balanced load in hundredths; 0 drops nothing.
template <int K, class Balance, gate_function Gate = K == 1 ? gate_function::sigmoid : gate_function::softmax_selected,
          int CapacityPercent = 0>
struct top_k {
  static constexpr int k = K;
  using balance = balance_rule<Balance>;
  static constexpr gate_function gate = Gate;
  static constexpr int capacity_percent = CapacityPercent;
};
/// BlackMamba's: one expert, weighted by the sigmoid of its logit.
template <class Balance>
using top1 = top_k<1, Balance>;

/// Routed mixture of experts (BlackMamba, arXiv 2402.01771, section 3):
///
///   logits = router(hidden)        expert, gate = Routing(logits)
///   out[i,:] = sum over its experts e of gate[i,e] linear_fc2_e(act(linear_fc1_e(hidden[i,:])))
///
/// The gradient reaches the router through the gates alone. In inference no balance rule acts, but for rules that say
/// so.
template <class Config, class Routing, class Activation = swiglu>
struct moe : stateless {
  static constexpr int d_model = Config::d_model;
  static constexpr int d_ff = Config::d_ff;
  static constexpr int d_fc1 = detail::first_product_width<Activation>(d_ff);
  static constexpr int experts = Config::experts;
  static constexpr int k = Routing::k;
  using balance = typename Routing::balance;
  static_assert(balancing<balance>, "blackmamba: moe: the argument of top_k is no balance rule; give it the members "
                                    "that nn/balance.hpp asks for");
  static_assert(k >= 1 && k <= experts, "blackmamba: moe: top_k is larger than the number of experts; lower it");

  template <class S, storage T>
  struct parameters {
    view<S, T, dyn, dyn> router;             // (E, d_model)
    view<S, accum_t<T>, dyn> router_bias;    // (E)
    view<S, accum_t<T>, dyn> balance_offset; // (E)                buffer: the balance rule's g
    view<S, T, dyn, dyn, dyn> fc1;           // (E, d_fc1, d_model)
    view<S, accum_t<T>, dyn, dyn> fc1_bias;  // (E, d_fc1)         only with Config::add_bias_linear
    view<S, T, dyn, dyn, dyn> fc2;           // (E, d_model, d_ff)
    view<S, accum_t<T>, dyn, dyn> fc2_bias;  // (E, d_model)       only with Config::add_bias_linear
    view<S, std::int64_t, dyn> load;         // (E + 1)            statistic: offsets of the experts' rows
    view<S, std::int32_t, dyn> unrouted;     // (1)                statistic: rows whose logits are not finite
    view<S, sinkhorn::report, dyn> report;   // (1)                statistic: what Sinkhorn reached
  };
  template <class S, storage T>
  struct saved {
    view<S, T const, dyn, dyn> hidden;       // (tokens, d_model)
    view<S, accum_t<T>, dyn, dyn> logits;    // (tokens, E)
    view<S, std::int32_t, dyn, dyn> expert;  // (tokens, k)
    view<S, accum_t<T>, dyn, dyn> gate;      // (tokens, k)
    view<S, std::int64_t, dyn> offsets;      // (E + 1)
    view<S, std::int32_t, dyn> source;       // (tokens k)
    view<S, std::int32_t, dyn> row;          // (tokens k)
    view<S, T, dyn, dyn> permuted;           // (tokens k, d_model)  these four only in training
    view<S, T, dyn, dyn> h;                  // (tokens k, d_fc1)
    view<S, T, dyn, dyn> activated;          // (tokens k, d_ff)
    view<S, T, dyn, dyn> expert_out;         // (tokens k, d_model)
  };

  template <class Parameters, class Visitor>
  static void visit(Parameters& p, std::string const& prefix, Visitor&& v) {
    auto const fan_in = [](int n) { return initial::uniform(1 / std::sqrt(static_cast<double>(n))); };
    constexpr bool biased = configuration::add_bias_linear<Config>();
    constexpr double active = static_cast<double>(k) / experts;
    std::string const expert = prefix + "local_experts.{e}.";
    v(entry{prefix + "router.weight", kind::matrix, {experts, d_model}, fan_in(d_model)}, p.router);
    v(entry{prefix + "router.bias", kind::vector, {experts}, initial::constant(0)}, p.router_bias);
    v(entry{prefix + "router.balance_offset", kind::buffer, {experts}, initial::constant(0)}, p.balance_offset);
    v(entry{expert + "linear_fc1.weight", kind::matrix, {experts, d_fc1, d_model}, fan_in(d_model), active}, p.fc1);
    if (biased)
      v(entry{expert + "linear_fc1.bias", kind::vector, {experts, d_fc1}, initial::constant(0), active}, p.fc1_bias);
    v(entry{expert + "linear_fc2.weight", kind::matrix, {experts, d_model, d_ff}, fan_in(d_ff).residual(), active},
      p.fc2);
    if (biased)
      v(entry{expert + "linear_fc2.bias", kind::vector, {experts, d_model}, initial::constant(0), active}, p.fc2_bias);
    v(entry{prefix + "load", kind::statistic, {experts + 1}}, p.load);
    v(entry{prefix + "unrouted", kind::statistic, {1}}, p.unrouted);
    v(entry{prefix + "report", kind::statistic, {1}}, p.report);
  }

  template <class Visitor>
  static void describe(std::string const& prefix, Visitor&& v) {
    v(trait{prefix + "kind", "moe"});
    detail::describe_activation<Activation>(prefix, v);
    v(trait{prefix + "router.top_k", std::to_string(k)});
    v(trait{prefix + "router.gate", router::name_of(Routing::gate)});
    v(trait{prefix + "router.capacity_percent", std::to_string(Routing::capacity_percent)});
    v(trait{prefix + "router.offset_at_inference", balance::at_inference ? "yes" : "no"});
    v(trait{prefix + "router.beta", detail::number_text(balance::beta), !balance::at_inference});
    detail::describe_name<balance>(prefix + "router.balance", v, true);
    detail::describe_part<balance>(prefix + "router.balance.", v);
  }

  template <device_policy P, storage T, class S>
  static void forward(context<P> const& c, parameters<S, T> const& p, in<P, T, dyn, dyn> x, out<P, T, dyn, dyn> y,
                      saved<S, T>& keep, nothing*) {
    using A = accum_t<T>;
    auto const tokens = x.extent(0), slots = tokens * k;
    keep.hidden = x;
    bool const record = c.training || c.observe;
    keep.logits = c.template allocate<A>(tokens, experts);
    keep.expert = c.template allocate<std::int32_t>(tokens, k);
    keep.gate = c.template allocate<A>(tokens, k);
    keep.offsets = record ? p.load : c.template allocate<std::int64_t>(experts + 1);
    keep.source = c.template allocate<std::int32_t>(slots);
    keep.row = c.template allocate<std::int32_t>(slots);
    std::int64_t const capacity = (slots * Routing::capacity_percent + 100 * experts - 1) / (100 * experts);
    router::selection<home<P>, A> const chosen{.expert = keep.expert,
                                               .gate = keep.gate,
                                               .non_finite_rows = record ? p.unrouted : view<S, std::int32_t, dyn>{}};
    router::options const how{.gate = Routing::gate, .beta = balance::beta};
    auto const offset = c.training || balance::at_inference ? p.balance_offset : view<S, A, dyn>{};
    if (c.training) {
      linear::forward<P, A, T>(c.policy, {.x = x, .weight = p.router, .bias = p.router_bias}, keep.logits);
      balance::template before<P, A>(c, keep.logits, p.balance_offset, k, p.report);
      router_dispatch::from_logits<P, A>(c.policy, {.logits = keep.logits, .offset = offset}, chosen, routing<P>(keep),
                                         how, capacity);
    } else {
      router_dispatch::forward<P, T>(c.policy, {.x = x, .weight = p.router, .bias = p.router_bias, .offset = offset},
                                     {.logits = keep.logits, .chosen = chosen, .plan = routing<P>(keep)}, how,
                                     capacity);
    }
    if (c.training) balance::template after<P, A>(c, routing<P>(keep), p.balance_offset, k);

    if (c.training) {
      keep.permuted = c.template allocate<T>(slots, d_model);
      keep.h = c.template allocate<T>(slots, d_fc1);
      keep.activated = c.template allocate<T>(slots, d_ff);
      keep.expert_out = c.template allocate<T>(slots, d_model);
    }
    expert_mlp::forward<Activation, P, T>(
        c.policy,
        {.x = x,
         .gate = keep.gate,
         .plan = routing<P>(keep),
         .fc1 = p.fc1,
         .fc2 = p.fc2,
         .fc1_bias = p.fc1_bias,
         .fc2_bias = p.fc2_bias},
        y, {.permuted = keep.permuted, .h = keep.h, .activated = keep.activated, .rows = keep.expert_out});
  }

  template <device_policy P, storage T, class S>
  static void backward(context<P> const& c, parameters<S, T> const& p, saved<S, T> const& keep, in<P, T, dyn, dyn> d_y,
                       out<P, T, dyn, dyn> d_x, parameters<S, accum_t<T>> const& d) {
    using A = accum_t<T>;
    auto const tokens = d_y.extent(0);
    auto const scope = c.scope();
    auto const d_gate = c.template allocate<A>(tokens, k);
    auto const d_logits = c.template allocate<A>(tokens, experts);
    expert_mlp::backward<Activation, P, T>(c.policy,
                                           {.gate = keep.gate,
                                            .plan = routing<P>(keep),
                                            .fc1 = p.fc1,
                                            .fc2 = p.fc2,
                                            .permuted = keep.permuted,
                                            .h = keep.h,
                                            .activated = keep.activated,
                                            .rows = keep.expert_out,
                                            .d_y = d_y},
                                           {.d_x = d_x,
                                            .d_gate = d_gate,
                                            .d_fc1 = d.fc1,
                                            .d_fc2 = d.fc2,
                                            .d_fc1_bias = d.fc1_bias,
                                            .d_fc2_bias = d.fc2_bias});
    router::backward<P, A>(c.policy, {.logits = keep.logits, .expert = keep.expert, .d_gate = d_gate}, d_logits,
                           Routing::gate);
    linear::backward<P, T, A>(c.policy, {.x = keep.hidden, .weight = p.router, .d_y = d_logits},
                              {.d_x = d_x,
                               .d_weight = d.router,
                               .d_bias = d.router_bias,
                               .d_x_update = update::accumulate});
  }

  template <device_policy P, storage T, class S>
  static void step(context<P> const& c, parameters<S, T> const& p, nothing&, in<P, T, dyn, dyn> x,
                   out<P, T, dyn, dyn> y) {
    auto const scope = c.scope();
    saved<S, T> keep;
    forward<P, T, S>(c, p, x, y, keep, nullptr);
  }

 private:
  template <device_policy P, class Saved>
  static expert_dispatch::routing<home<P>> routing(Saved const& keep) {
    return {.offsets = keep.offsets, .source = keep.source, .row = keep.row};
  }
};

}  // namespace blackmamba
