#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/core/cpu/simd_lanes.hpp>
#include <blackmamba/ops/gated_activation/gated_activation.hpp>

#include <algorithm>

namespace blackmamba {

template <>
struct backend<gated_activation, device::cpu> {
  template <class Activation, class T>
  static void forward(device::cpu const& policy, std::type_identity<Activation>, host_view<T const, dyn, dyn> gate,
                      host_view<T const, dyn, dyn> up, host_view<T, dyn, dyn> y,
                      host_view<std::int64_t const, dyn> row_count) {
    using V = simd::pack<accum_t<T>>;
    for_rows(policy, rows_of(y.extent(0), row_count), y.extent(1), [&](std::int64_t r, std::int64_t next) {
      T const *g = gate.row(r), *u = row_if(up, r), *next_g = gate.row(next), *next_u = row_if(up, next);
      simd::for_packs<V::lanes>(y.extent(1), [&](std::int64_t i, auto lanes) {
        simd::prefetch(next_g + i);
        V v = Activation::apply(simd::load<V>(g + i, lanes));
        if (u) {
          simd::prefetch(next_u + i);
          v *= simd::load<V>(u + i, lanes);
        }
        simd::store(v, y.row(r) + i, lanes);
      });
    });
  }

  template <class Activation, class T>
  static void backward(device::cpu const& policy, std::type_identity<Activation>,
                       gated_activation::gradient_inputs<device::cpu, T> const& in,
                       gated_activation::gradients<device::cpu, T> const& out) {
    using V = simd::pack<accum_t<T>>;
    std::int64_t const width = in.gate.extent(1);
    for_rows(policy, rows_of(in.gate.extent(0), in.row_count), width, [&](std::int64_t r, std::int64_t next) {
      T const *g = in.gate.row(r), *u = row_if(in.up, r), *d_y = in.d_y.row(r);
      T const *next_g = in.gate.row(next), *next_u = row_if(in.up, next), *next_d_y = in.d_y.row(next);
      simd::for_packs<V::lanes>(width, [&](std::int64_t i, auto lanes) {
        simd::prefetch(next_g + i);
        simd::prefetch(next_d_y + i);
        V const gate = simd::load<V>(g + i, lanes);
        V const d = simd::load<V>(d_y + i, lanes);
        V d_gate = d * Activation::derivative(gate);
        if (u) {
          simd::prefetch(next_u + i);
          d_gate *= simd::load<V>(u + i, lanes);
          simd::store(d * Activation::apply(gate), out.d_up.row(r) + i, lanes);
        }
        simd::store(d_gate, out.d_gate.row(r) + i, lanes);
      });
    });
  }

 private:
  static std::int64_t rows_of(std::int64_t rows, host_view<std::int64_t const, dyn> row_count) {
    return row_count.present() ? std::min(rows, row_count(0)) : rows;
  }
  /// Calls body(r, the row that comes after it) for each row.
  template <class Body>
  static void for_rows(device::cpu const& policy, std::int64_t rows, std::int64_t width, Body&& body) {
    std::int64_t const grain = std::max<std::int64_t>(1, 4096 / width);
    cpu::parallel_for(policy.threads, rows, grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) body(r, std::min(r + 1, rows - 1));
    });
  }
  template <class T>
  static T const* row_if(host_view<T const, dyn, dyn> x, std::int64_t r) {
    return x.present() ? x.row(r) : nullptr;
  }
};

}  // namespace blackmamba
