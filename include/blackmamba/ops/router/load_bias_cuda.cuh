#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/ops/router/load_bias.hpp>
#include <blackmamba/ops/router/router_math.hpp>

namespace blackmamba::cuda::detail {

/// Instantiations: float and double.
template <class A>
__global__ void load_bias_forward(std::int64_t const* offsets, std::int64_t experts, A* offset, double rate) {
  std::int64_t const j = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= experts) return;
  std::int64_t const total = offsets[experts] - offsets[0];
  offset[j] += static_cast<A>(rate * math::load_direction(offsets[j + 1] - offsets[j], total, experts));
}

}  // namespace blackmamba::cuda::detail

namespace blackmamba {

template <>
struct backend<load_bias, device::cuda> {
  template <class A>
  static void forward(device::cuda const& policy, view<space::device, std::int64_t const, dyn> offsets,
                      view<space::device, A, dyn> offset, double rate) {
    cuda::launch("load_bias", policy, {cuda::blocks_for(offset.extent(0), 128), 128},
                 cuda::detail::load_bias_forward<A>, offsets.data(), offset.extent(0), offset.data(), rate);
  }
};

}  // namespace blackmamba
