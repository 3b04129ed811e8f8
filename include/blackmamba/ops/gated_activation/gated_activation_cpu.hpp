#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/ops/gated_activation/gated_activation.hpp>

#include <algorithm>

namespace blackmamba {

template <>
struct backend<gated_activation, device::cpu> {
  template <class Activation, class T>
  static void forward(device::cpu const& policy, std::type_identity<Activation>, host_view<T const, dyn, dyn> gate,
                      host_view<T const, dyn, dyn> up, host_view<T, dyn, dyn> y) {
    using V = simd::pack<accum_t<T>>;
    for_elements<V>(policy, y.extent(0), y.extent(1), [&](std::int64_t r, std::int64_t i, auto lanes) {
      V v = Activation::apply(simd::load<V>(gate.row(r) + i, lanes));
      if (up.present()) v *= simd::load<V>(up.row(r) + i, lanes);
      simd::store(v, y.row(r) + i, lanes);
    });
  }

  template <class Activation, class T>
  static void backward(device::cpu const& policy, std::type_identity<Activation>,
                       gated_activation::gradient_inputs<device::cpu, T> const& in,
                       gated_activation::gradients<device::cpu, T> const& out) {
    using V = simd::pack<accum_t<T>>;
    for_elements<V>(policy, in.gate.extent(0), in.gate.extent(1), [&](std::int64_t r, std::int64_t i, auto lanes) {
      V const gate = simd::load<V>(in.gate.row(r) + i, lanes);
      V const d_y = simd::load<V>(in.d_y.row(r) + i, lanes);
      V d_gate = d_y * Activation::derivative(gate);
      if (in.up.present()) {
        d_gate *= simd::load<V>(in.up.row(r) + i, lanes);
        simd::store(d_y * Activation::apply(gate), out.d_up.row(r) + i, lanes);
      }
      simd::store(d_gate, out.d_gate.row(r) + i, lanes);
    });
  }

 private:
  template <class V, class Body>
  static void for_elements(device::cpu const& policy, std::int64_t rows, std::int64_t width, Body&& body) {
    std::int64_t const grain = std::max<std::int64_t>(1, 4096 / width);
    cpu::parallel_for(policy.threads, rows, grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r)
        simd::for_packs<V::lanes>(width, [&](std::int64_t i, auto lanes) { body(r, i, lanes); });
    });
  }
};

}  // namespace blackmamba
