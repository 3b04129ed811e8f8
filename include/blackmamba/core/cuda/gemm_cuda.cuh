#pragma once
#include <blackmamba/core/cuda/gemm_library_cuda.cuh>
#include <blackmamba/core/cuda/gemm_tiles_cuda.cuh>
#include <blackmamba/core/cuda/product_cuda.cuh>
#include <blackmamba/core/view.hpp>

#include <cstddef>

/// Dense products on the device.
namespace blackmamba::cuda {

/// Scratch memory that a product may use: more of it means more ways to share a product among the multiprocessors.
using gemm_workspace = view<space::device, std::byte, dyn>;

/// Enqueues one product, or those of all groups. Arithmetic in accum_t<TC> (float: true float, no TF32). Bitwise
/// repeatable on one kind of device; the way that is taken, and so the bits, depend on shape, strides, alignment and
/// the workspace's size. @throws cuda_error naming the operator
template <class TA, class TB, class TC>
void gemm(char const* op, device::cuda const& policy, product<TA, TB, TC> const& x, gemm_workspace workspace = {}) {
  if (x.m <= 0 || x.n <= 0 || x.groups.count <= 0) return;
  auto const bytes = static_cast<std::size_t>(workspace.size());
  if (detail::library_product(op, policy, x, workspace.data(), bytes)) return;
  detail::tiles_product(op, policy, x, workspace.data(), bytes);
}

}  // namespace blackmamba::cuda
