#pragma once
#include <blackmamba/nn/module.hpp>
#include <blackmamba/ops/expert_dispatch/expert_dispatch.hpp>
#include <blackmamba/ops/router/load_bias.hpp>
#include <blackmamba/ops/router/quantile_balance.hpp>
#include <blackmamba/ops/sinkhorn/sinkhorn.hpp>

#include <concepts>
#include <string>

namespace blackmamba {

/// Balance rules. All of them route by the same selector, argmax_j(beta x_ij + g_j) over the router's logits x; a rule
/// says how the E numbers g come about. A rule of one's own derives from no_balance and replaces what it needs:
///
///   static constexpr double beta;           // scale of the logits in the selector
///   static constexpr bool at_inference;     // whether g takes part when the model is not training
///   static constexpr char const* name;      // optional: a trainer's files are told apart by it
///
///   template <class Visitor>                // optional: and by its options, v(trait{prefix + "rate", "0.1", true})
///   static void describe(std::string const& prefix, Visitor&& v);
///
///   template <device_policy P, storage A>   // sets g from this step's logits
///   static void before(context<P> const& c,
///                      in<P, A, dyn, dyn> logits,                 // (tokens, E)
///                      out<P, A, dyn> offset,                     // (E)  in: g of the step before; out: g
///                      int top_k,
///                      out<P, sinkhorn::report, dyn> report);     // (1)  what Sinkhorn reached; may be left alone
///
///   template <device_policy P, storage A>   // sets the next step's g from this step's load
///   static void after(context<P> const& c,
///                     expert_dispatch::routing<home<P>> const& routing,    // offsets (E + 1), source, row
///                     out<P, A, dyn> offset,                               // (E)
///                     int top_k);
///
/// offset keeps g from step to step, starts from zeros and is part of a checkpoint.
///
/// before and after are also called under device::dry<P>, which measures the workspace of a step: there the views have
/// sizes, but no memory that may be touched. Use operators (memory::zero and the like are some), which do nothing under
/// that policy, or put what touches memory under `if constexpr (!is_dry<P>)`. Allocate the same under both.
template <class Rule>
struct balance_rule : Rule {};

/// Whether a type has a balance rule's members. Checked with host memory and float.
template <class Rule>
concept balancing = requires(context<device::cpu> const& c, host_view<float, dyn, dyn> logits,
                             host_view<float, dyn> offset, host_view<sinkhorn::report, dyn> report,
                             expert_dispatch::routing<device::cpu> const& routing) {
  { Rule::beta } -> std::convertible_to<double>;
  { Rule::at_inference } -> std::convertible_to<bool>;
  Rule::template before<device::cpu, float>(c, logits, offset, 1, report);
  Rule::template after<device::cpu, float>(c, routing, offset, 1);
};

/// Every token goes where its logit is largest.
struct no_balance {
  static constexpr double beta = 1;
  static constexpr bool at_inference = false;
  template <device_policy P, storage A>
  static void before(context<P> const&, in<P, A, dyn, dyn>, out<P, A, dyn>, int, out<P, sinkhorn::report, dyn>) {}
  template <device_policy P, storage A>
  static void after(context<P> const&, expert_dispatch::routing<home<P>> const&, out<P, A, dyn>, int) {}
};

template <>
struct balance_rule<no_balance> : no_balance {
  static constexpr char const* name = "none";  // here, so that rules that derive from no_balance do not inherit it
};

/// Sinkhorn balancing in training, starting from the previous step's solution (BlackMamba, arXiv 2402.01771, section
/// 3). top1<sinkhorn> takes the operator's default options; others stand where sinkhorn stood:
///
///   top1<sinkhorn_balance<sinkhorn::options{.mode = sinkhorn::mode::reference}>>    the published loop
///   top1<sinkhorn_balance<sinkhorn::options{.fixed_passes = 2}>>                    a step of known cost
///
/// nvcc 13.0 cannot write such options into a call's explicit template arguments, f<a_layer_with_the_rule>(): name the
/// rule there, struct two_passes : sinkhorn_balance<sinkhorn::options{.fixed_passes = 2}> {}.
template <sinkhorn::options How = sinkhorn::options{}>
struct sinkhorn_balance : no_balance {
  static_assert(How.tolerance >= 0 && How.max_passes >= 0 && How.fixed_passes >= 0,
                "blackmamba: sinkhorn_balance: tolerance, max_passes and fixed_passes are 0 or more; change the one "
                "that is not");
  static constexpr char const* name = "sinkhorn";
  static constexpr double beta = How.beta;
  template <device_policy P, storage A>
  static void before(context<P> const& c, in<P, A, dyn, dyn> logits, out<P, A, dyn> offset, int,
                     out<P, sinkhorn::report, dyn> report) {
    sinkhorn::forward(c.policy, logits, offset, report, How);
  }
  template <class Visitor>
  static void describe(std::string const& prefix, Visitor&& v) {
    auto const option = [&](char const* option_name, std::string const& value) {
      v(trait{prefix + option_name, value, true});
    };
    option("mode", sinkhorn::name_of(How.mode));
    option("tolerance", detail::number_text(How.tolerance));
    option("max_passes", std::to_string(How.max_passes));
    option("fixed_passes", std::to_string(How.fixed_passes));
    option("newton", How.newton ? "yes" : "no");
  }
};
template <>
struct balance_rule<sinkhorn> : sinkhorn_balance<> {};

/// Auxiliary-loss-free bias (Wang et al., arXiv 2408.15664): after a step, g moves against the sign of the load's
/// excess.
template <>
struct balance_rule<load_bias> : no_balance {
  static constexpr char const* name = "load_bias";
  static constexpr bool at_inference = true;
  static constexpr double rate = 1e-3;
  template <device_policy P, storage A>
  static void after(context<P> const& c, expert_dispatch::routing<home<P>> const& routing, out<P, A, dyn> offset, int) {
    load_bias::forward(c.policy, routing.offsets, offset, rate);
  }
};

/// Quantile balancing: g such that each expert's share of the tokens passes its threshold.
template <>
struct balance_rule<quantile_balance> : no_balance {
  static constexpr char const* name = "quantile_balance";
  template <device_policy P, storage A>
  static void before(context<P> const& c, in<P, A, dyn, dyn> logits, out<P, A, dyn> offset, int top_k,
                     out<P, sinkhorn::report, dyn>) {
    quantile_balance::forward(c.policy, logits, offset, {.top_k = top_k, .beta = no_balance::beta});
  }
};

}  // namespace blackmamba
