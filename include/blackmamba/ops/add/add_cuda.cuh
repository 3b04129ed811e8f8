#pragma once
#include <blackmamba/core/cuda/elementwise_cuda.cuh>
#include <blackmamba/ops/add/add.hpp>

namespace blackmamba {

namespace detail {

template <class T>
struct add_elements {
  view<space::device, T const, dyn, dyn> a, b;
  view<space::device, T, dyn, dyn> y;

  template <int N>
  struct operands {
    cuda::stored_pack<N, T> a, b;
  };
  template <int N>
  __device__ operands<N> load(std::int64_t r, std::int64_t c, std::int64_t left) const {
    return {cuda::load_element_pack<N>(a, r, c, left), cuda::load_element_pack<N>(b, r, c, left)};
  }
  template <int N>
  __device__ void finish(operands<N> const& x, std::int64_t r, std::int64_t c, std::int64_t left) const {
    auto sum = x.a.widened();
    auto const other = x.b.widened();
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += other[i];
    cuda::store_element_pack<N>(y, r, c, left, sum);
  }
};

}  // namespace detail

/// Bytes: three of T for each element. Kernels: packs and single elements, for each T.
template <>
struct backend<add, device::cuda> {
  template <class T>
  static void forward(device::cuda const& policy, view<space::device, T const, dyn, dyn> a,
                      view<space::device, T const, dyn, dyn> b, view<space::device, T, dyn, dyn> y) {
    cuda::element_shape<cuda::pack_width<T>> const shape(y, a, b);
    cuda::launch_elements("add", policy, shape, detail::add_elements<T>{a, b, y});
  }
};

}  // namespace blackmamba
