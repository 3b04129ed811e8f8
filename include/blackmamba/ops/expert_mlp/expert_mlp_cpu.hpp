#pragma once
#include <blackmamba/ops/expert_mlp/expert_mlp.hpp>
#include <blackmamba/ops/expert_mlp/expert_mlp_steps.hpp>

#include <type_traits>

namespace blackmamba {

template <>
struct backend<expert_mlp, device::cpu> {
  template <class Activation, class T>
  static constexpr bool makes_h() {
    return true;
  }

  template <class Activation, class T>
  static void forward(device::cpu const& policy, std::type_identity<Activation>,
                      expert_mlp::inputs<device::cpu, T> const& in, host_view<T, dyn, dyn> y,
                      expert_mlp::kept<device::cpu, T> const& keep, bool, bool) {
    using steps = detail::expert_mlp_steps<Activation, device::cpu, T>;
    steps::permute(policy, in, keep);
    steps::activated(policy, in, keep);
    steps::combined(policy, in, keep, y);
  }

  template <class Activation, class T>
  static void backward(device::cpu const& policy, std::type_identity<Activation>,
                       expert_mlp::gradient_inputs<device::cpu, T> const& in,
                       expert_mlp::gradients<device::cpu, T> const& d,
                       expert_mlp::gradient_memory<device::cpu, T> const& memory) {
    using steps = detail::expert_mlp_steps<Activation, device::cpu, T>;
    steps::combine_backward(policy, in, d, memory);
    steps::second_backward(policy, in, d, memory, true);
    steps::activate_backward(policy, in, memory);
    steps::first_backward(policy, in, d, memory);
  }
};

}  // namespace blackmamba
