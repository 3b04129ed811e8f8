#pragma once
#include <blackmamba/ops/selective_scan/selective_scan.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_backward_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan_forward_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan_step_cuda.cuh>

namespace blackmamba {

template <>
struct backend<selective_scan, device::cuda> {
  template <class T, int N>
  static void forward(device::cuda const& policy, selective_scan::inputs<device::cuda, T, N> const& in,
                      view<space::device, T, dyn, dyn, dyn> y, selective_scan::results<device::cuda, T> const& keep,
                      selective_scan::forward_workspace<device::cuda, T> const& work) {
    cuda::detail::selective_scan_forward<T, N>(policy, in, y, keep, work);
  }
  template <class T, int N>
  static void backward(device::cuda const& policy, selective_scan::gradient_inputs<device::cuda, T, N> const& in,
                       selective_scan::gradients<device::cuda, T> const& d,
                       selective_scan::workspace<device::cuda, T> const& work) {
    cuda::detail::selective_scan_backward<T, N>(policy, in, d, work);
  }
  template <class T, int N, class State>
  static void step(device::cuda const& policy, selective_scan::step_inputs<device::cuda, T, N> const& in,
                   view<space::device, State, dyn, dyn, dyn> state, view<space::device, T, dyn, dyn> y) {
    cuda::detail::selective_scan_step<T, N>(policy, in, state, y);
  }
  template <class T, int N, class State>
  static void steps(device::cuda const& policy, selective_scan::token_inputs<device::cuda, T, N> const& in,
                    view<space::device, State, dyn, dyn, dyn> state, view<space::device, T, dyn, dyn, dyn> y) {
    cuda::detail::selective_scan_steps<T, N>(policy, in, state, y);
  }
};

}  // namespace blackmamba
