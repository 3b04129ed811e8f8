#pragma once
#include <blackmamba/core/cuda/elementwise_cuda.cuh>
#include <blackmamba/ops/gated_activation/gated_activation.hpp>

namespace blackmamba {

namespace detail {

template <class Activation, class T>
struct gated_activation_elements {
  view<space::device, T const, dyn, dyn> gate, up;  // up: may be absent
  view<space::device, T, dyn, dyn> y;

  template <int N>
  struct operands {
    cuda::stored_pack<N, T> gate, up;
  };
  template <int N>
  __device__ operands<N> load(std::int64_t r, std::int64_t c, std::int64_t left) const {
    operands<N> x;
    x.gate = cuda::load_element_pack<N>(gate, r, c, left);
    if (up.present()) x.up = cuda::load_element_pack<N>(up, r, c, left);
    return x;
  }
  template <int N>
  __device__ void finish(operands<N> const& x, std::int64_t r, std::int64_t c, std::int64_t left) const {
    auto v = x.gate.widened();
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = Activation::apply(v[i]);
    if (up.present()) {
      auto const other = x.up.widened();
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] *= other[i];
    }
    cuda::store_element_pack<N>(y, r, c, left, v);
  }
};

template <class Activation, class T>
struct gated_activation_gradient_elements {
  view<space::device, T const, dyn, dyn> gate, up, d_y;  // up and d_up: may be absent
  view<space::device, T, dyn, dyn> d_gate, d_up;

  template <int N>
  struct operands {
    cuda::stored_pack<N, T> gate, up, d_y;
  };
  template <int N>
  __device__ operands<N> load(std::int64_t r, std::int64_t c, std::int64_t left) const {
    operands<N> x;
    x.gate = cuda::load_element_pack<N>(gate, r, c, left);
    x.d_y = cuda::load_element_pack<N>(d_y, r, c, left);
    if (up.present()) x.up = cuda::load_element_pack<N>(up, r, c, left);
    return x;
  }
  template <int N>
  __device__ void finish(operands<N> const& x, std::int64_t r, std::int64_t c, std::int64_t left) const {
    auto const g = x.gate.widened(), d = x.d_y.widened();
    cuda::pack<accum_t<T>, N> of_gate;
#pragma unroll
    for (int i = 0; i < N; ++i) of_gate[i] = d[i] * Activation::derivative(g[i]);
    if (up.present()) {
      auto const other = x.up.widened();
      cuda::pack<accum_t<T>, N> of_up;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        of_gate[i] *= other[i];
        of_up[i] = d[i] * Activation::apply(g[i]);
      }
      cuda::store_element_pack<N>(d_up, r, c, left, of_up);
    }
    cuda::store_element_pack<N>(d_gate, r, c, left, of_gate);
  }
};

}  // namespace detail

/// Bytes of an element: forward three of T, backward five. An activation's apply and derivative run on the device: mark
/// one's own BLACKMAMBA_HD. Kernels: (forward, backward) x (packs, single elements), for each Activation and T.
template <>
struct backend<gated_activation, device::cuda> {
  template <class Activation, class T>
  static void forward(device::cuda const& policy, std::type_identity<Activation>,
                      view<space::device, T const, dyn, dyn> gate, view<space::device, T const, dyn, dyn> up,
                      view<space::device, T, dyn, dyn> y) {
    cuda::element_shape<cuda::pack_width<T>> const shape(y, gate, up);
    cuda::launch_elements("gated_activation", policy, shape,
                          detail::gated_activation_elements<Activation, T>{gate, up, y});
  }

  template <class Activation, class T>
  static void backward(device::cuda const& policy, std::type_identity<Activation>,
                       gated_activation::gradient_inputs<device::cuda, T> const& in,
                       gated_activation::gradients<device::cuda, T> const& out) {
    cuda::element_shape<cuda::pack_width<T>> const shape(out.d_gate, out.d_up, in.gate, in.up, in.d_y);
    cuda::launch_elements(
        "gated_activation.backward", policy, shape,
        detail::gated_activation_gradient_elements<Activation, T>{in.gate, in.up, in.d_y, out.d_gate, out.d_up});
  }
};

}  // namespace blackmamba
