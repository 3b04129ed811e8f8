#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/math.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>

#include <concepts>
#include <cstdint>
#include <type_traits>

#if BLACKMAMBA_CUDA  // with simd packs, these templates are host functions alone, as is meant
#pragma nv_diagnostic push
#pragma nv_diag_suppress 20011, 20014
#endif

namespace blackmamba {

/// Activation functions: types with static apply(x) and derivative(x), written for scalars and simd packs alike. A type
/// of the user's own serves too.
namespace activation {

/// x sigmoid(x) (Hendrycks and Gimpel, arXiv 1606.08415; Elfwing et al., arXiv 1702.03118).
struct silu {
  static constexpr char const* name = "silu";
  template <class X>
  BLACKMAMBA_HD static X apply(X x) {
    return math::silu(x);
  }
  template <class X>
  BLACKMAMBA_HD static X derivative(X x) {
    return math::silu_derivative(x);
  }
};

/// x Phi(x) with the exact normal distribution function (Hendrycks and Gimpel, arXiv 1606.08415).
struct gelu {
  static constexpr char const* name = "gelu";
  template <class X>
  BLACKMAMBA_HD static X apply(X x) {
    return math::gelu(x);
  }
  template <class X>
  BLACKMAMBA_HD static X derivative(X x) {
    return math::gelu_derivative(x);
  }
};

/// x
struct identity {
  static constexpr char const* name = "identity";
  template <class X>
  BLACKMAMBA_HD static X apply(X x) {
    return x;
  }
  template <class X>
  BLACKMAMBA_HD static X derivative(X) {
    return X(1);
  }
};

}  // namespace activation

#if BLACKMAMBA_CUDA
#pragma nv_diagnostic pop
#endif

/// What gated_activation asks of an activation.
template <class F>
concept activation_function = requires(float x) {
  { F::apply(x) } -> std::same_as<float>;
  { F::derivative(x) } -> std::same_as<float>;
};

/// Gated linear units (Shazeer, arXiv 2002.05202, eq. 5 and 6): y = act(gate) up, element by element; y = act(gate)
/// where `up` is absent. SwiGLU is silu with up, GEGLU gelu with up.
///
/// Arithmetic in accum_t<T>. gate, up and y may be halves of one projection. With a row_count (1), as a plan of experts
/// has it in the policy's memory, rows from there on are free: they are neither read nor written. Bitwise repeatable,
/// independent of the number of threads. Asynchronous on cuda. No scratch.
struct gated_activation {
  /// gate, up (optional), y: (R, D). y may alias gate or up.
  template <class Activation, device_policy P, storage T>
  static void forward(P const& policy, in<P, T, dyn, dyn> gate, in<P, T, dyn, dyn> up, out<P, T, dyn, dyn> y,
                      in<P, std::int64_t, dyn> row_count = {}) {
    check_activation<Activation>();
    auto const rows = y.extent(0), width = y.extent(1);
    check_shape("gated_activation", "gate", gate, {rows, width});
    check_optional_shape("gated_activation", "up", up, {rows, width});
    check_optional_shape("gated_activation", "row_count", row_count, {1});
    if (y.size() > 0)
      backend_of<gated_activation, P>::forward(policy, std::type_identity<Activation>{}, gate, up, y, row_count);
  }

  template <device_policy P, storage T>
  struct gradient_inputs {
    in<P, T, dyn, dyn> gate;                  // (R, D)
    in<P, T, dyn, dyn> up;                    // (R, D)  absent where forward's was
    in<P, T, dyn, dyn> d_y;                   // (R, D)
    in<P, std::int64_t, dyn> row_count = {};  // (1)     optional
  };
  template <device_policy P, storage T>
  struct gradients {
    out<P, T, dyn, dyn> d_gate;     // (R, D)
    out<P, T, dyn, dyn> d_up = {};  // (R, D)  absent if and only if up is
  };
  /// d_gate = d_y up act'(gate), d_up = d_y act(gate); act(gate) is computed again, nothing is saved between the two.
  /// d_gate and d_up may alias gate, up or d_y.
  /// T is deduced where in or out is an object, and float where both stand in braces.
  template <class Activation, device_policy P, storage T = float>
  static void backward(P const& policy, gradient_inputs<home<P>, T> const& in, gradients<home<P>, T> const& out) {
    check_activation<Activation>();
    auto const rows = out.d_gate.extent(0), width = out.d_gate.extent(1);
    check_shape("gated_activation.backward", "gate", in.gate, {rows, width});
    check_shape("gated_activation.backward", "d_y", in.d_y, {rows, width});
    check_optional_shape("gated_activation.backward", "up", in.up, {rows, width});
    check_optional_shape("gated_activation.backward", "d_up", out.d_up, {rows, width});
    check_optional_shape("gated_activation.backward", "row_count", in.row_count, {1});
    check_that(in.up.present() == out.d_up.present(), "gated_activation.backward", "d_up",
               out.d_up.present() ? "a view" : "no view", in.up.present() ? "a view, as up" : "no view, as up");
    if (out.d_gate.size() > 0)
      backend_of<gated_activation, P>::backward(policy, std::type_identity<Activation>{}, in, out);
  }

 private:
  template <class Activation>
  static constexpr void check_activation() {
    static_assert(
        activation_function<Activation>,
        "blackmamba: gated_activation: this type is no activation; give it static member templates apply(x) and "
        "derivative(x) that return what they take");
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/gated_activation/gated_activation_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/gated_activation/gated_activation_cuda.cuh>
#endif
