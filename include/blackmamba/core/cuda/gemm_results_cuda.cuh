#pragma once
#include <blackmamba/core/cuda/gemm_cuda.cuh>

/// Products of groups that become something else before they are stored: gated units, tokens.
namespace blackmamba::cuda {

/// Up to here, rows are few even for kernels that stream B in tiles.
inline constexpr std::int64_t very_few_rows = 4;

/// Enqueues A B^T of all groups as gated units. 16-bit operands; x.k is not 0. False where the device has no path.
template <class T, class Function>
bool gemm_groups_gated(char const* op, device::cuda const& policy,
                       product<T, T, T, gated_units<Function, T>> const& x) {
  if (x.m <= 0 || x.n <= 0 || x.groups.count <= 0) return true;
  return (x.m <= very_few_rows && detail::narrow_product(op, policy, x)) ||
         (!portable_products && detail::wgmma_product_if_possible<true, true>(op, policy, x)) ||
         detail::narrow_product(op, policy, x) || detail::mma_product_if_possible<true, true>(op, policy, x);
}

/// Enqueues A B^T of all groups, with its rows weighted and sent to their tokens. False where that has to be done in
/// two steps.
template <class T>
bool gemm_groups_to_tokens(char const* op, device::cuda const& policy, product<T, T, T, rows_to_tokens<T>> const& x) {
  if (x.m <= very_few_rows || x.n <= 0 || x.groups.count <= 0) return false;
  return !portable_products && detail::wgmma_product_if_possible<true, true>(op, policy, x);
}

/// Enqueues A B of all groups as the gradients of gated units. False where that has to be done in two steps.
template <class T, class Function>
bool gemm_groups_gated_gradient(char const* op, device::cuda const& policy,
                                product<T, T, T, gated_units_gradient<Function, T>> const& x) {
  if (x.m <= 0 || x.n <= 0 || x.groups.count <= 0) return true;
  return !portable_products && detail::wgmma_product_if_possible<true, false>(op, policy, x);
}

}  // namespace blackmamba::cuda
