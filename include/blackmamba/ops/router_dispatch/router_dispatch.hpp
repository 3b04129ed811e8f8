#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>
#include <blackmamba/ops/expert_dispatch/expert_dispatch.hpp>
#include <blackmamba/ops/linear/linear.hpp>
#include <blackmamba/ops/router/router.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace blackmamba {

/// From tokens to the plan of their experts: what linear, router and expert_dispatch::plan do one after the other,
///
///   logits       = x weight^T + bias
///   expert, gate = the choice of router by beta logits + offset
///   plan         = the stable sort of all slots by expert, with a capacity where one is given
///
/// in as few launches as the device can. Each result is as those operators define it, the logits but for the order of
/// their sums. Bitwise repeatable; a token's logits, experts and gates do not depend on other tokens, as long as there
/// are few (a device's one launch) or many. Asynchronous on cuda.
struct router_dispatch {
  using options = router::options;
  template <device_policy P, storage T>
  struct inputs {
    in<P, T, dyn, dyn> x;                // (M, H)
    in<P, T, dyn, dyn> weight;           // (E, H)
    in<P, accum_t<T>, dyn> bias = {};    // (E)     optional
    in<P, accum_t<T>, dyn> offset = {};  // (E)     optional: of the balance rule
  };
  template <device_policy P, storage T>
  struct results {
    out<P, accum_t<T>, dyn, dyn> logits;  // (M, E)
    router::selection<P, T> chosen;       // (M, k)
    expert_dispatch::routing<P> plan;     // of M k slots
  };
  /// @param capacity  as expert_dispatch::plan
  /// scratch_bytes<P, T>(M, H, E, k) of scratch.
  template <device_policy P, storage T>
  static void forward(P const& policy, std::type_identity_t<inputs<home<P>, T>> const& in,
                      std::type_identity_t<results<home<P>, T>> const& to, options const& how = {},
                      std::int64_t capacity = 0) {
    using A = accum_t<T>;
    auto const rows = to.logits.extent(0), experts = to.logits.extent(1);
    check_shape("router_dispatch", "x", in.x, {rows, -1});
    check_shape("router_dispatch", "weight", in.weight, {experts, in.x.extent(1)});
    check_optional_shape("router_dispatch", "bias", in.bias, {experts});
    check_chosen(in.offset, rows, experts, to.chosen, to.plan, capacity);
    if (backend_of<router_dispatch, home<P>>::template takes_tokens<T>(rows, experts, to.chosen.expert.extent(1))) {
      backend_of<router_dispatch, P>::forward(policy, in, to, how, capacity);
      return;
    }
    linear::forward<P, A, T>(policy, {.x = in.x, .weight = in.weight, .bias = in.bias}, to.logits);
    from_logits<P, T>(policy, {.logits = to.logits, .offset = in.offset}, to.chosen, to.plan, how, capacity);
  }

  /// The same from logits that are there: a balance rule may have looked at them.
  template <device_policy P, storage T>
  static void from_logits(P const& policy, std::type_identity_t<router::inputs<home<P>, T>> const& in,
                          std::type_identity_t<router::selection<home<P>, T>> const& chosen,
                          std::type_identity_t<expert_dispatch::routing<home<P>>> const& plan, options const& how = {},
                          std::int64_t capacity = 0) {
    auto const rows = in.logits.extent(0), experts = in.logits.extent(1);
    check_chosen(in.offset, rows, experts, chosen, plan, capacity);
    if (backend_of<router_dispatch, home<P>>::template takes_logits<accum_t<T>>(rows, experts,
                                                                                chosen.expert.extent(1))) {
      backend_of<router_dispatch, P>::plan(policy, in, chosen, plan, how, capacity);
      return;
    }
    router::forward<P, T>(policy, in, chosen, how);
    expert_dispatch::plan(policy, chosen.expert, plan, capacity);
  }

  template <device_policy P, storage T>
  static std::size_t scratch_bytes(std::int64_t rows, std::int64_t width, std::int64_t experts, std::int64_t k) {
    using where = typename P::memory_space;
    using own = backend_of<router_dispatch, home<P>>;
    if (own::template takes_tokens<T>(rows, experts, k)) return 0;
    std::size_t const product = std::is_same_v<where, space::host> ? 0 : linear::workspace_bytes(rows, width, experts);
    if (own::template takes_logits<accum_t<T>>(rows, experts, k)) return scratch_sum(product);
    return std::max(
        {scratch_sum(product), router::scratch_bytes<where>(rows), expert_dispatch::scratch_bytes(rows * k, experts)});
  }

 private:
  template <class Offset, class Chosen, class Plan>
  static void check_chosen(Offset const& offset, std::int64_t rows, std::int64_t experts, Chosen const& chosen,
                           Plan const& plan, std::int64_t capacity) {
    auto const k = chosen.expert.extent(1);
    check_optional_shape("router_dispatch", "offset", offset, {experts});
    check_shape("router_dispatch", "chosen.expert", chosen.expert, {rows, -1});
    check_shape("router_dispatch", "chosen.gate", chosen.gate, {rows, k});
    check_optional_shape("router_dispatch", "chosen.non_finite_rows", chosen.non_finite_rows, {1});
    check_that(rows == 0 || (k >= 1 && k <= experts), "router_dispatch", "chosen.expert",
               std::to_string(k) + " experts for a token", "1 to " + std::to_string(experts));
    check_shape("router_dispatch", "plan.offsets", plan.offsets, {experts + 1});
    check_shape("router_dispatch", "plan.source", plan.source, {rows * k});
    check_shape("router_dispatch", "plan.row", plan.row, {rows * k});
    check_that(capacity >= 0, "router_dispatch", "capacity", std::to_string(capacity), "0 or more");
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/router_dispatch/router_dispatch_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/router_dispatch/router_dispatch_cuda.cuh>
#endif
