#pragma once
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_tiles_cpu.hpp>

namespace blackmamba {

static_assert(selective_scan_tiles::chunk == selective_scan::chunk_length);

template <>
struct backend<selective_scan, device::cpu> {
  template <class T, int N>
  static void forward(device::cpu const& policy, selective_scan::inputs<device::cpu, T, N> const& in,
                      host_view<T, dyn, dyn, dyn> y, selective_scan::results<device::cpu, T> const& keep);

  template <class T, int N>
  static void backward(device::cpu const& policy, selective_scan::gradient_inputs<device::cpu, T, N> const& in,
                       selective_scan::gradients<device::cpu, T> const& d,
                       selective_scan::workspace<device::cpu, T> const& work);

  template <class T, int N, class State>
  static void step(device::cpu const& policy, selective_scan::step_inputs<device::cpu, T, N> const& in,
                   host_view<State, dyn, dyn, dyn> state, host_view<T, dyn, dyn> y);

  template <class T, int N, class State>
  static void steps(device::cpu const& policy, selective_scan::token_inputs<device::cpu, T, N> const& in,
                    host_view<State, dyn, dyn, dyn> state, host_view<T, dyn, dyn, dyn> y);
};

}  // namespace blackmamba

#include <blackmamba/ops/selective_scan/selective_scan_backward_cpu.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_forward_cpu.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_step_cpu.hpp>
