#pragma once
#include <blackmamba/core/cuda/gemm_results_cuda.cuh>
#include <blackmamba/ops/expert_mlp/expert_mlp.hpp>
#include <blackmamba/ops/expert_mlp/expert_mlp_few_cuda.cuh>
#include <blackmamba/ops/expert_mlp/expert_mlp_steps.hpp>
#include <blackmamba/ops/gated_activation/gated_activation.hpp>

#include <cstdint>
#include <type_traits>

namespace blackmamba {

namespace detail {

/// What a product of gated units asks for.
template <class Function, class T>
struct gate_function_of {
  __device__ __forceinline__ static float of(float gate, float up) {
    return activation_for<Function, T>(gate).value() * up;
  }
  /// In: gate, up and the gradient of act(gate) up; out: the gradients of the first two.
  __device__ __forceinline__ static void gradient(float& gate, float& up, float d) {
    activation_for<Function, T> const act(gate);
    gate = d * act.derivative() * up;
    up = d * act.value();
  }
};

}  // namespace detail

/// Operands of 16 bits: the first product's results are activated before they are stored, and with one expert for a
/// token the second's go to their tokens weighted. Everything else, line by line.
template <>
struct backend<expert_mlp, device::cuda> {
  template <class Activation, class T>
  static constexpr bool makes_h() {
    return !(Activation::gated && cuda::tensor_core_operand<T>);
  }

  template <class Activation, class T>
  static void forward(device::cuda const& policy, std::type_identity<Activation>,
                      expert_mlp::inputs<device::cuda, T> const& in, view<space::device, T, dyn, dyn> y,
                      expert_mlp::kept<device::cuda, T> const& keep, bool wants_rows, bool wants_nothing) {
    using steps = detail::expert_mlp_steps<Activation, device::cuda, T>;
    if constexpr (!makes_h<Activation, T>())
      if (wants_nothing && few_tokens<Activation>(policy, in, y, keep)) return;
    steps::permute(policy, in, keep);
    if constexpr (makes_h<Activation, T>()) {
      steps::activated(policy, in, keep);
    } else {
      using gated = cuda::gated_units<detail::gate_function_of<typename Activation::function, T>, T>;
      auto x = product_of<T, gated>(in, keep.permuted, in.fc1, in.fc1_bias, keep.activated);
      x.result = {.both = keep.h.data(), .both_stride = keep.h.stride(0)};
      x.early = true;  // permute waits for all that is older, the plan included, before it lets this one begin
      if (!cuda::gemm_groups_gated("expert_mlp", policy, x))
        throw cuda_error("expert_mlp: " + cuda::detail::device_text() + " has no path for products of 16-bit operands");
    }
    if constexpr (cuda::tensor_core_operand<T>)
      if (in.gate.extent(1) == 1) {
        auto x = product_of<T, cuda::rows_to_tokens<T>>(in, keep.activated, in.fc2, in.fc2_bias, keep.rows);
        if (!wants_rows) x.c = nullptr;
        x.result = {.y = y.data(),
                    .y_stride = y.stride(0),
                    .tokens = y.extent(0),
                    .source = in.plan.source.data(),
                    .row = in.plan.row.data(),
                    .gate = in.gate.data(),
                    .gate_apart = in.gate.stride(0)};
        // Gated: the first product lets this one begin at once, but began itself when the plan and the gates, older
        // than permute, were there, as above; and it ends after permute, for which it waits. Else the activation's
        // kernel is between the two, which begins when all before it has ended and lets nobody begin early.
        x.early = true;
        if (cuda::gemm_groups_to_tokens("expert_mlp", policy, x)) return;
      }
    steps::combined(policy, in, keep, y);
  }

  template <class Activation, class T>
  static void backward(device::cuda const& policy, std::type_identity<Activation>,
                       expert_mlp::gradient_inputs<device::cuda, T> const& in,
                       expert_mlp::gradients<device::cuda, T> const& d,
                       expert_mlp::gradient_memory<device::cuda, T> const& memory) {
    using steps = detail::expert_mlp_steps<Activation, device::cuda, T>;
    steps::combine_backward(policy, in, d, memory);
    bool fused = false;
    if constexpr (!makes_h<Activation, T>()) {
      using gradient = cuda::gated_units_gradient<detail::gate_function_of<typename Activation::function, T>, T>;
      cuda::product<T, T, T, gradient> const x{.ta = cuda::transpose::no,
                                               .tb = cuda::transpose::no,
                                               .m = memory.d_rows.extent(0),
                                               .n = in.fc2.extent(2),
                                               .k = in.fc2.extent(1),
                                               .a = memory.d_rows.data(),
                                               .lda = memory.d_rows.stride(0),
                                               .b = in.fc2.data(),
                                               .ldb = in.fc2.stride(1),
                                               .c = nullptr,
                                               .ldc = 0,
                                               .groups = {.by = cuda::grouping::rows,
                                                          .count = in.fc2.extent(0),
                                                          .offsets = in.plan.offsets.data(),
                                                          .b_apart = in.fc2.stride(0)},
                                               .result = {.both = in.h.data(),
                                                          .both_stride = in.h.stride(0),
                                                          .d_both = memory.d_h.data(),
                                                          .d_both_stride = memory.d_h.stride(0)}};
      fused = cuda::gemm_groups_gated_gradient("expert_mlp.backward", policy, x);
    }
    steps::second_backward(policy, in, d, memory, !fused);
    if (!fused) steps::activate_backward(policy, in, memory);
    steps::first_backward(policy, in, d, memory);
  }

 private:
  template <class T>
  using matrix = view<space::device, T, dyn, dyn>;

  template <class Activation, class T>
  static bool few_tokens(device::cuda const& policy, expert_mlp::inputs<device::cuda, T> const& in, matrix<T> y,
                         expert_mlp::kept<device::cuda, T> const& keep) {
    if (in.gate.extent(1) != 1) return false;
    return cuda::detail::expert_mlp_of_few_tokens<detail::gate_function_of<typename Activation::function, T>>(
        "expert_mlp", policy,
        cuda::detail::few::arguments<T>{.tokens = y.extent(0),
                                        .experts = in.fc1.extent(0),
                                        .width = y.extent(1),
                                        .inner = in.fc2.extent(2),
                                        .x = in.x.data(),
                                        .x_stride = in.x.stride(0),
                                        .gate = in.gate.data(),
                                        .gate_stride = in.gate.stride(0),
                                        .offsets = in.plan.offsets.data(),
                                        .source = in.plan.source.data(),
                                        .row = in.plan.row.data(),
                                        .fc1 = in.fc1.data(),
                                        .fc2 = in.fc2.data(),
                                        .fc1_stride = in.fc1.stride(1),
                                        .fc1_apart = in.fc1.stride(0),
                                        .fc2_stride = in.fc2.stride(1),
                                        .fc2_apart = in.fc2.stride(0),
                                        .fc1_bias = in.fc1_bias.data(),
                                        .fc2_bias = in.fc2_bias.data(),
                                        .fc1_bias_apart = in.fc1_bias.stride(0),
                                        .fc2_bias_apart = in.fc2_bias.stride(0),
                                        .activated = keep.activated.data(),
                                        .activated_stride = keep.activated.stride(0),
                                        .y = y.data(),
                                        .y_stride = y.stride(0)});
  }

  /// rows (n columns) = x weight^T + bias, group by group.
  template <class T, class Result>
  static cuda::product<T, T, T, Result> product_of(expert_mlp::inputs<device::cuda, T> const& in, matrix<T const> x,
                                                   view<space::device, T const, dyn, dyn, dyn> weight,
                                                   matrix<float const> bias, matrix<T> rows) {
    return {.ta = cuda::transpose::no,
            .tb = cuda::transpose::yes,
            .m = rows.extent(0),
            .n = rows.extent(1),
            .k = x.extent(1),
            .a = x.data(),
            .lda = x.stride(0),
            .b = weight.data(),
            .ldb = weight.stride(1),
            .c = rows.data(),
            .ldc = rows.stride(0),
            .bias = bias.data(),
            .groups = {.by = cuda::grouping::rows,
                       .count = weight.extent(0),
                       .offsets = in.plan.offsets.data(),
                       .b_apart = weight.stride(0),
                       .bias_apart = bias.stride(0)}};
  }
};

}  // namespace blackmamba
