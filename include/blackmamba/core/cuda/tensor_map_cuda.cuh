#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/numeric.hpp>

#include <cuda.h>

#include <cstdint>
#include <type_traits>

/// Descriptions of matrices for Hopper's copy engine.
namespace blackmamba::cuda {

namespace detail {

using tensor_map_encoder = decltype(&cuTensorMapEncodeTiled);

/// The driver's function, found at run time: nothing links with the driver. Null where the driver has none.
inline tensor_map_encoder find_tensor_map_encoder() {
  static auto const found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result) !=
            cudaSuccess ||
        result != cudaDriverEntryPointSuccess) {
      (void)cudaGetLastError();
      function = nullptr;
    }
    return reinterpret_cast<tensor_map_encoder>(function);
  }();
  return found;
}

}  // namespace detail

/// Matrices (count, rows, columns) of 16-bit elements or floats, `stride` elements from row to row and `apart` from
/// one to the next, in boxes of (1, box_rows, 128 bytes), which shared memory holds in permuted rows (shared_operand);
/// zeros beyond the edges. False where the copy engine does not take them.
template <class T>
bool describe_matrices(CUtensorMap& map, T const* x, std::int64_t count, std::int64_t rows, std::int64_t columns,
                       std::int64_t stride, std::int64_t apart, unsigned box_rows) {
  static_assert(sizeof(T) == 2 || std::is_same_v<T, float>);
  constexpr std::int64_t most = std::int64_t{1} << 31, unit = 16 / sizeof(T);
  auto const encode = detail::find_tensor_map_encoder();
  if (rows == 1) stride = (columns + unit - 1) / unit * unit;  // the stride of one row means nothing
  if (!encode || rows >= most || columns >= most || stride <= 0 || stride % unit != 0) return false;
  if (count == 1) apart = rows * stride;
  if (apart <= 0 || apart % unit != 0 || reinterpret_cast<std::uintptr_t>(x) % 16 != 0) return false;
  constexpr auto type = sizeof(T) == 4            ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                        : std::is_same_v<T, half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  cuuint64_t const extents[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                                static_cast<cuuint64_t>(count)};
  cuuint64_t const strides[] = {static_cast<cuuint64_t>(stride) * sizeof(T),
                                static_cast<cuuint64_t>(apart) * sizeof(T)};
  cuuint32_t const box[] = {128 / sizeof(T), box_rows, 1}, steps[] = {1, 1, 1};
  return encode(&map, type, 3, const_cast<T*>(x), extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace blackmamba::cuda
