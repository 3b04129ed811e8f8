#pragma once
#include <blackmamba/core/cuda/gemm_library_cuda.cuh>
#include <blackmamba/core/cuda/gemm_mma_cuda.cuh>
#include <blackmamba/core/cuda/gemm_narrow_cuda.cuh>
#include <blackmamba/core/cuda/gemm_simple_cuda.cuh>
#include <blackmamba/core/cuda/gemm_thin_cuda.cuh>
#include <blackmamba/core/cuda/gemm_wgmma_cuda.cuh>
#include <blackmamba/core/cuda/product_cuda.cuh>
#include <blackmamba/core/view.hpp>

#include <cstddef>
#include <type_traits>

/// Dense products on the device.
namespace blackmamba::cuda {

/// Scratch memory that a product may use: more of it means more ways to share a product among the multiprocessors.
using gemm_workspace = view<space::device, std::byte, dyn>;

/// Whether products of this element type can run on the warpgroups of the current device: it is a Hopper, and this
/// program has code for sm_90a.
template <class T>
bool warpgroup_products_exist() {
  return detail::wgmma_product_exists<detail::wgmma::shape<256>, true, true, T, T, as_is>() &&
         detail::wgmma_product_exists<detail::wgmma::shape<128>, true, true, T, T, as_is>();
}

namespace detail {
/// A B^T of 16-bit operands.
template <transpose TransposeA, transpose TransposeB, class TA, class TB>
inline constexpr bool rows_by_rows =
    TransposeA == transpose::no&& TransposeB == transpose::yes&& tensor_core_operand<TA>&& std::is_same_v<TA, TB>;

template <bool AlongA, bool AlongB, class T, class TC>
bool tensor_core_product(char const* op, device::cuda const& policy, product<T, T, TC> const& x) {
  // Copies of 16 bytes begin at multiples of 8 in a stored row. A group begins anywhere: at a row, therefore.
  if (x.groups.by == grouping::rows && !AlongA) return false;
  if (x.groups.by == grouping::depth && (AlongA || AlongB)) return false;
  return (!portable_products && wgmma_product_if_possible<AlongA, AlongB>(op, policy, x)) ||
         mma_product_if_possible<AlongA, AlongB>(op, policy, x);
}
}  // namespace detail

/// Enqueues one product; the layout is static: TransposeA, TransposeB are those of x. Arithmetic in accum_t<TC> (float:
/// true float, no TF32). Bitwise repeatable on one kind of device; the way that is taken, and so the bits, depend on
/// shape, strides, alignment and the workspace's size. @throws cuda_error naming the operator
template <transpose TransposeA, transpose TransposeB, class TA, class TB, class TC>
void gemm(char const* op, device::cuda const& policy, product<TA, TB, TC> x, gemm_workspace workspace = {}) {
  if (x.m <= 0 || x.n <= 0) return;
  x.ta = TransposeA;
  x.tb = TransposeB;
  auto const bytes = static_cast<std::size_t>(workspace.size());
  if constexpr (detail::rows_by_rows<TransposeA, TransposeB, TA, TB>)
    if (detail::narrow_product(op, policy, x)) return;
  if (!portable_products && detail::library_product(op, policy, x, workspace.data(), bytes)) return;
  if constexpr (tensor_core_operand<TA> && std::is_same_v<TA, TB> && std::is_same_v<TA, TC>)
    if (detail::tensor_core_product<TransposeA == transpose::no, TransposeB == transpose::yes>(op, policy, x)) return;
  // The library takes operands of one type only.
  if constexpr (!std::is_same_v<TA, TB> && TransposeB == transpose::no) {
    if constexpr (TransposeA == transpose::no) {
      if (detail::shallow_product_if_possible(op, policy, x)) return;
    } else {
      if (detail::flat_product_if_possible(op, policy, x, workspace.data(), bytes)) return;
    }
  }
  detail::simple_product(op, policy, x, workspace.data(), bytes);
}

/// Enqueues the products of all groups, whose sizes lie on the device. An element of C is summed in an order that
/// depends on the layout and on whether there are few rows in all. Any layout will do; tensor cores take those in which
/// groups begin at rows of the stored matrices.
template <transpose TransposeA, transpose TransposeB, class TA, class TB, class TC>
void gemm_groups(char const* op, device::cuda const& policy, product<TA, TB, TC> x) {
  if (x.m <= 0 || x.n <= 0 || x.groups.count <= 0) return;
  x.ta = TransposeA;
  x.tb = TransposeB;
  if constexpr (detail::rows_by_rows<TransposeA, TransposeB, TA, TB>)
    if (detail::narrow_product(op, policy, x)) return;
  if constexpr (tensor_core_operand<TA> && std::is_same_v<TA, TB>)
    if (detail::tensor_core_product<TransposeA == transpose::no, TransposeB == transpose::yes>(op, policy, x)) return;
  detail::simple_product(op, policy, x, nullptr, 0);
}

}  // namespace blackmamba::cuda
