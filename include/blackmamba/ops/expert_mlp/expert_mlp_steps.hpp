#pragma once
#include <blackmamba/ops/expert_mlp/expert_mlp.hpp>
#include <blackmamba/ops/grouped_linear/grouped_linear.hpp>

#include <cstdint>
#include <type_traits>

namespace blackmamba::detail {

/// expert_mlp line by line, each by an operator of its own: what any device can do.
template <class Activation, device_policy P, storage T>
struct expert_mlp_steps {
  using inputs = expert_mlp::inputs<P, T>;
  using kept = expert_mlp::kept<P, T>;

  static void permute(P const& policy, inputs const& in, kept const& keep) {
    expert_dispatch::permute<P, T>(policy, in.plan, in.x, keep.permuted);
  }
  static void activated(P const& policy, inputs const& in, kept const& keep) {
    grouped_linear::forward<P, T>(
        policy, {.x = keep.permuted, .weight = in.fc1, .offsets = in.plan.offsets, .bias = in.fc1_bias}, keep.h);
    activate<Activation, P, T>(policy, keep.h, in.fc2.extent(2), keep.activated, used(in));
  }
  static void combined(P const& policy, inputs const& in, kept const& keep, out<P, T, dyn, dyn> y) {
    grouped_linear::forward<P, T>(
        policy, {.x = keep.activated, .weight = in.fc2, .offsets = in.plan.offsets, .bias = in.fc2_bias}, keep.rows);
    expert_dispatch::combine<P, T>(policy, in.plan, keep.rows, in.gate, y);
  }

  using gradient_inputs = expert_mlp::gradient_inputs<P, T>;
  using gradients = expert_mlp::gradients<P, T>;
  using gradient_memory = expert_mlp::gradient_memory<P, T>;

  static void combine_backward(P const& policy, gradient_inputs const& in, gradients const& d,
                               gradient_memory const& memory) {
    expert_dispatch::combine_backward<P, T>(policy, in.plan, {.rows = in.rows, .gate = in.gate, .d_y = in.d_y},
                                            {.d_rows = memory.d_rows, .d_gate = d.d_gate});
  }
  /// The second product's: d_activated where `through`, and its weights'.
  static void second_backward(P const& policy, gradient_inputs const& in, gradients const& d,
                              gradient_memory const& memory, bool through) {
    grouped_linear::gradients<P, T> to{.d_weight = d.d_fc2, .d_bias = d.d_fc2_bias};
    if (through) to.d_x = memory.d_activated;
    grouped_linear::backward<P, T>(
        policy, {.x = in.activated, .weight = in.fc2, .offsets = in.plan.offsets, .d_y = memory.d_rows}, to);
  }
  static void activate_backward(P const& policy, gradient_inputs const& in, gradient_memory const& memory) {
    detail::activate_backward<Activation, P, T>(policy, in.h, in.fc2.extent(2), memory.d_activated, memory.d_h,
                                                used(in));
  }
  static void first_backward(P const& policy, gradient_inputs const& in, gradients const& d,
                             gradient_memory const& memory) {
    grouped_linear::backward<P, T>(policy,
                                   {.x = in.permuted, .weight = in.fc1, .offsets = in.plan.offsets, .d_y = memory.d_h},
                                   {.d_x = memory.d_rows, .d_weight = d.d_fc1, .d_bias = d.d_fc1_bias});
    expert_dispatch::permute_backward<P, T>(policy, in.plan, memory.d_rows, d.d_x);
  }

 private:
  /// The number of rows that experts have.
  template <class In>
  static auto used(In const& in) {
    return in.plan.offsets.slice(in.plan.offsets.extent(0) - 1, 1);
  }
};

}  // namespace blackmamba::detail
