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
/// their sums. Bitwise repeatable, independent of the number of threads. Asynchronous on cuda.
///
/// A Hopper or later does all of it in one launch up to 128 tokens and 8 experts, for T of 16 bits in rows that begin
/// at multiples of 16 bytes; from logits up to 128 tokens and 64 experts, or 8192 tokens and 16 experts. (Devices
/// before it: 16 tokens; from logits 1024.) Among calls that one launch takes, a token's logits, experts and gates do
/// not depend on other tokens; elsewhere its logits have the bits of linear's, which may depend on how many there are.
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
    out<P, accum_t<T>, dyn, dyn> logits;      // (M, E)
    router::selection<P, accum_t<T>> chosen;  // (M, k)
    expert_dispatch::routing<P> plan;         // of M k slots
  };
  /// No aliasing.
  /// @param capacity  as expert_dispatch::plan
  /// scratch_bytes<P, T>(M, H, E, k) of scratch.
  template <device_policy P, storage T>
  static void forward(P const& policy, std::type_identity_t<inputs<home<P>, T>> const& in,
                      std::type_identity_t<results<home<P>, T>> const& to, options const& how = {},
                      std::int64_t capacity = 0) {
    using A = accum_t<T>;
    using own = backend_of<router_dispatch, home<P>>;
    auto const rows = to.logits.extent(0), experts = to.logits.extent(1);
    check_shape("router_dispatch", "x", in.x, {rows, -1});
    check_shape("router_dispatch", "weight", in.weight, {experts, in.x.extent(1)});
    check_optional_shape("router_dispatch", "bias", in.bias, {experts});
    check_chosen("router_dispatch", in.offset, rows, experts, to.chosen, to.plan, capacity);
    if constexpr (own::fused)
      if (own::template takes_tokens<T>(rows, experts)) {
        backend_of<router_dispatch, P>::forward(policy, in, to, how, capacity);
        return;
      }
    linear::forward<P, A, T>(policy, {.x = in.x, .weight = in.weight, .bias = in.bias}, to.logits);
    from_logits<P, A>(policy, {.logits = to.logits, .offset = in.offset}, to.chosen, to.plan, how, capacity);
  }

  /// The same from logits that are there: a balance rule may have looked at them. No aliasing.
  template <device_policy P, storage T>
  static void from_logits(P const& policy, std::type_identity_t<router::inputs<home<P>, T>> const& in,
                          std::type_identity_t<router::selection<home<P>, T>> const& chosen,
                          std::type_identity_t<expert_dispatch::routing<home<P>>> const& plan, options const& how = {},
                          std::int64_t capacity = 0) {
    using own = backend_of<router_dispatch, home<P>>;
    auto const rows = in.logits.extent(0), experts = in.logits.extent(1);
    check_chosen("router_dispatch.from_logits", in.offset, rows, experts, chosen, plan, capacity);
    if constexpr (own::fused)
      if (own::takes_logits(rows, experts)) {
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
    std::size_t const product = std::is_same_v<where, space::host> ? 0 : linear::workspace_bytes(rows, width, experts);
    if constexpr (own::fused) {
      if (own::template takes_tokens<T>(rows, experts)) return 0;
      if (own::takes_logits(rows, experts)) return scratch_sum(product);
    }
    return std::max(
        {scratch_sum(product), router::scratch_bytes<where>(rows), expert_dispatch::scratch_bytes(rows * k, experts)});
  }

 private:
  template <class Offset, class Chosen, class Plan>
  static void check_chosen(char const* op, Offset const& offset, std::int64_t rows, std::int64_t experts,
                           Chosen const& chosen, Plan const& plan, std::int64_t capacity) {
    auto const k = chosen.expert.extent(1);
    check_optional_shape(op, "offset", offset, {experts});
    check_shape(op, "chosen.expert", chosen.expert, {rows, -1});
    check_shape(op, "chosen.gate", chosen.gate, {rows, k});
    check_optional_shape(op, "chosen.non_finite_rows", chosen.non_finite_rows, {1});
    check_that(rows == 0 || (k >= 1 && k <= experts), op, "chosen.expert", std::to_string(k) + " experts for a token",
               "1 to " + std::to_string(experts));
    check_shape(op, "plan.offsets", plan.offsets, {experts + 1});
    check_shape(op, "plan.source", plan.source, {rows * k});
    check_shape(op, "plan.row", plan.row, {rows * k});
    check_that(capacity >= 0, op, "capacity", std::to_string(capacity), "0 or more");
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/router_dispatch/router_dispatch_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/router_dispatch/router_dispatch_cuda.cuh>
#endif
