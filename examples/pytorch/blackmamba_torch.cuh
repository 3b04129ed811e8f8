// What the extensions for PyTorch share: tensors as views, scratch memory from PyTorch's allocator, storage types.
#pragma once
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/view.hpp>
#include <blackmamba/core/workspace.hpp>

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/csrc/utils/pybind.h>  // far less than torch/extension.h

#include <cstddef>
#include <cstdint>
#include <optional>
#include <type_traits>

namespace bm = blackmamba;
using bm::dyn;
using tensor = at::Tensor;
using optional_tensor = std::optional<at::Tensor>;
using on_device = bm::space::device;

template <class T>
constexpr at::ScalarType scalar_type() {
  if constexpr (std::is_same_v<T, float>) return at::kFloat;
  if constexpr (std::is_same_v<T, double>) return at::kDouble;
  if constexpr (std::is_same_v<T, bm::bfloat16>) return at::kBFloat16;
  if constexpr (std::is_same_v<T, bm::half>) return at::kHalf;
  if constexpr (std::is_same_v<T, std::int32_t>) return at::kInt;
  if constexpr (std::is_same_v<T, std::int64_t>) return at::kLong;
}

/// A tensor as a view of the given rank. @throws where type, device, rank or the last stride is another
template <class T, int... E>
bm::view<on_device, T, E...> view_of(char const* name, tensor const& x) {
  constexpr int rank = sizeof...(E);
  using value = std::remove_const_t<T>;
  TORCH_CHECK(x.is_cuda(), name, ": got a tensor on ", x.device(), ", expected a CUDA device");
  TORCH_CHECK(x.scalar_type() == scalar_type<value>(), name, ": got ", x.scalar_type(), ", expected ",
              scalar_type<value>());
  TORCH_CHECK(x.dim() == rank, name, ": got ", x.dim(), " dimensions, expected ", rank);
  TORCH_CHECK(x.size(rank - 1) <= 1 || x.stride(rank - 1) == 1, name, ": the last dimension is not contiguous");
  typename bm::view<on_device, T, E...>::shape_type extents{}, strides{};
  for (int i = 0; i < rank; ++i) {
    extents[static_cast<std::size_t>(i)] = x.size(i);
    strides[static_cast<std::size_t>(i)] = i + 1 < rank ? x.stride(i) : 1;
  }
  return {static_cast<T*>(x.data_ptr()), extents, strides};
}
template <class T, int... E>
bm::view<on_device, T, E...> view_of(char const* name, optional_tensor const& x) {
  if (!x) return {};
  return view_of<T, E...>(name, *x);
}

/// Runs an operator with scratch memory from PyTorch's allocator: its size is found by a dry run.
template <class Run>
void with_scratch(tensor const& like, Run&& run) {
  auto measuring = bm::arena<on_device>::measuring();
  run(bm::device::dry<bm::device::cuda>{&measuring});
  auto const memory = at::empty({static_cast<std::int64_t>(measuring.peak()) + 256}, like.options().dtype(at::kByte));
  auto const base = (reinterpret_cast<std::uintptr_t>(memory.data_ptr()) + 255) / 256 * 256;
  auto workspace = bm::arena<on_device>::borrowing(reinterpret_cast<void*>(base), measuring.peak());
  run(bm::device::cuda{.stream = at::cuda::getCurrentCUDAStream().stream(), .workspace = &workspace});
}

/// Calls f with a value of the tensor's storage type.
template <class F>
void for_type(tensor const& x, F&& f) {
  switch (x.scalar_type()) {
    case at::kFloat: return f(float{});
    case at::kBFloat16: return f(bm::bfloat16{});
    case at::kHalf: return f(bm::half{});
    default: TORCH_CHECK(false, "got ", x.scalar_type(), ", expected float32, bfloat16 or float16");
  }
}
