#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>

namespace blackmamba {

/// Brings tokens to their experts and back: a plan (a stable counting sort of the slots by expert), permute, combine,
/// and their gradients. Slot s = token k + a is the a-th choice of a token.
///
/// The permuted rows of expert e are [offsets[e], offsets[e+1]), in the order of their slots; rows from offsets[E] on
/// are free: nothing reads or writes them. Nothing here needs the counts on the host. Bitwise repeatable, independent
/// of the number of threads: every row has one writer, sums run over a in order. Asynchronous on cuda.
struct expert_dispatch {
  /// The plan, in the policy's memory.
  template <device_policy P>
  struct routing {
    out<P, std::int64_t, dyn> offsets;  // (E+1)  first row of each expert, then the number of rows in all
    out<P, std::int32_t, dyn> source;   // (M*k)  slot that a row holds, -1 for rows from offsets[E] on
    out<P, std::int32_t, dyn> row;      // (M*k)  row of a slot, -1 where the slot is dropped or has no expert
  };

  /// @param expert    (M, k) expert of each slot, -1 for none
  /// @param capacity  0: dropless. Else at most this many rows for an expert: the first slots in order stay, the others
  ///                  are dropped, and the rows of an expert still follow the previous expert's without a gap.
  /// On the cpu an expert that is neither -1 nor in [0, E) is a value_error; on a device it counts as none.
  /// scratch_bytes(M*k, E) of scratch.
  template <device_policy P>
  static void plan(P const& policy, in<P, std::int32_t, dyn, dyn> expert,
                   std::type_identity_t<routing<home<P>>> const& to, std::int64_t capacity = 0) {
    auto const slots = expert.size(), experts = to.offsets.extent(0) - 1;
    check_that(experts >= 0, "expert_dispatch.plan", "offsets", "(0)", "(E+1)");
    check_that(slots <= INT32_MAX, "expert_dispatch.plan", "expert", std::to_string(slots) + " slots",
               "at most 2147483647");
    check_that(capacity >= 0, "expert_dispatch.plan", "capacity", std::to_string(capacity), "0 or more");
    check_shape("expert_dispatch.plan", "source", to.source, {slots});
    check_shape("expert_dispatch.plan", "row", to.row, {slots});
    scratch<P> memory(policy, scratch_bytes(slots, experts));
    auto counts = memory.template allocate<std::int64_t>(chunks(slots), experts);
    backend_of<expert_dispatch, P>::plan(policy, expert, to, capacity, counts);
  }

  /// rows[r,:] = x[source[r] / k, :]   for r < offsets[E].    x (M, H), rows (M*k, H); no aliasing.
  template <device_policy P, storage T>
  static void permute(P const& policy, std::type_identity_t<routing<home<P>>> const& plan, in<P, T, dyn, dyn> x,
                      out<P, T, dyn, dyn> rows) {
    check_plan("expert_dispatch.permute", plan, x.extent(0));
    check_shape("expert_dispatch.permute", "rows", rows, {plan.row.extent(0), x.extent(1)});
    if (rows.size() > 0) backend_of<expert_dispatch, P>::permute(policy, plan, x, rows);
  }

  /// y[t,:] = sum over a of gate[t,a] rows[row[t k + a], :]   over the slots that have a row; 0 where none has.
  /// rows (M*k, H), gate (M, k), y (M, H); no aliasing.
  template <device_policy P, storage T>
  static void combine(P const& policy, std::type_identity_t<routing<home<P>>> const& plan, in<P, T, dyn, dyn> rows,
                      in<P, accum_t<T>, dyn, dyn> gate, out<P, T, dyn, dyn> y) {
    check_plan("expert_dispatch.combine", plan, y.extent(0));
    check_shape("expert_dispatch.combine", "rows", rows, {plan.row.extent(0), y.extent(1)});
    check_shape("expert_dispatch.combine", "gate", gate, {y.extent(0), slots_per_token(plan, y.extent(0))});
    if (y.size() > 0) backend_of<expert_dispatch, P>::combine(policy, plan, rows, gate, y);
  }

  /// d_x[t,:] = sum over a of d_rows[row[t k + a], :].    d_rows (M*k, H), d_x (M, H) overwritten; no aliasing.
  template <device_policy P, storage T>
  static void permute_backward(P const& policy, std::type_identity_t<routing<home<P>>> const& plan,
                               in<P, T, dyn, dyn> d_rows, out<P, T, dyn, dyn> d_x) {
    check_plan("expert_dispatch.permute_backward", plan, d_x.extent(0));
    check_shape("expert_dispatch.permute_backward", "d_rows", d_rows, {plan.row.extent(0), d_x.extent(1)});
    if (d_x.size() > 0) backend_of<expert_dispatch, P>::permute_backward(policy, plan, d_rows, d_x);
  }

  template <device_policy P, storage T>
  struct combine_gradient_inputs {
    in<P, T, dyn, dyn> rows;           // (M*k, H)
    in<P, accum_t<T>, dyn, dyn> gate;  // (M, k)
    in<P, T, dyn, dyn> d_y;            // (M, H)
  };
  template <device_policy P, storage T>
  struct combine_gradients {
    out<P, T, dyn, dyn> d_rows;           // (M*k, H)  overwritten up to row offsets[E]; may alias rows
    out<P, accum_t<T>, dyn, dyn> d_gate;  // (M, k)    overwritten; 0 where the slot has no row
  };
  /// d_rows[r,:] = gate[t,a] d_y[t,:],  d_gate[t,a] = rows[r,:] . d_y[t,:]   for r = row[t k + a].
  /// T is deduced where the gradients are an object, and float where they stand in braces.
  template <device_policy P, storage T = float>
  static void combine_backward(P const& policy, std::type_identity_t<routing<home<P>>> const& plan,
                               std::type_identity_t<combine_gradient_inputs<home<P>, T>> const& in,
                               combine_gradients<home<P>, T> const& d) {
    auto const tokens = in.d_y.extent(0), width = in.d_y.extent(1);
    check_plan("expert_dispatch.combine_backward", plan, tokens);
    auto const slots = plan.row.extent(0), k = slots_per_token(plan, tokens);
    check_shape("expert_dispatch.combine_backward", "rows", in.rows, {slots, width});
    check_shape("expert_dispatch.combine_backward", "gate", in.gate, {tokens, k});
    check_shape("expert_dispatch.combine_backward", "d_rows", d.d_rows, {slots, width});
    check_shape("expert_dispatch.combine_backward", "d_gate", d.d_gate, {tokens, k});
    if (d.d_gate.size() > 0) backend_of<expert_dispatch, P>::combine_backward(policy, plan, in, d);
  }

  /// Slots are counted and placed in chunks of this many.
  static constexpr std::int64_t slots_per_chunk = 4096;
  static constexpr std::int64_t chunks(std::int64_t slots) { return (slots + slots_per_chunk - 1) / slots_per_chunk; }
  static constexpr std::size_t scratch_bytes(std::int64_t slots, std::int64_t experts) {
    return scratch_sum(sizeof(std::int64_t) * static_cast<std::size_t>(chunks(slots) * experts));
  }

 private:
  template <class Routing>
  static std::int64_t slots_per_token(Routing const& plan, std::int64_t tokens) {
    return tokens > 0 ? plan.row.extent(0) / tokens : -1;
  }
  template <class Routing>
  static void check_plan(char const* op, Routing const& plan, std::int64_t tokens) {
    auto const slots = plan.row.extent(0);
    check_that(tokens > 0 ? slots % tokens == 0 : slots == 0, op, "routing.row", detail::shape_text(plan.row.extents()),
               "a multiple of the " + std::to_string(tokens) + " tokens");
    check_shape(op, "routing.source", plan.source, {slots});
    check_that(plan.offsets.extent(0) >= 1, op, "routing.offsets", "(0)", "(E+1)");
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/expert_dispatch/expert_dispatch_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/expert_dispatch/expert_dispatch_cuda.cuh>
#endif
