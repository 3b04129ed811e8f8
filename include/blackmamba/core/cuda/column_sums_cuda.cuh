#pragma once
#include <blackmamba/core/cuda/depth_parts_cuda.cuh>
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/reduce_cuda.cuh>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/view.hpp>

#include <cstddef>
#include <cstdint>
#include <type_traits>

/// Sums of columns of any height, as the gradient of a bias is one.
namespace blackmamba::cuda::detail {

/// Rows of x that a block sums, column by column: `width` columns, a power of two, by 256 / width threads each.
template <class T, class A>
__global__ void __launch_bounds__(256)
    column_sums_of_part(T const* x, std::int64_t rows, std::int64_t columns, std::int64_t row_stride,
                        std::int64_t part_rows, std::int64_t across, int width, A* partial) {
  __shared__ A sums[256];
  std::int64_t const part = blockIdx.x / across;
  std::int64_t const column = (blockIdx.x - part * across) * width + static_cast<int>(threadIdx.x) % width;
  std::int64_t const begin = part * part_rows, end = begin + part_rows < rows ? begin + part_rows : rows;
  int const every = 256 / width;
  A sum = 0;
  if (column < columns)
#pragma unroll 8
    for (std::int64_t r = begin + static_cast<int>(threadIdx.x) / width; r < end; r += every)
      sum += convert<A>(x[r * row_stride + column]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= width || column >= columns) return;
  for (int i = 1; i < every; ++i) sum += sums[i * width + static_cast<int>(threadIdx.x)];
  partial[part * columns + column] = sum;
}

}  // namespace blackmamba::cuda::detail

namespace blackmamba::cuda {

/// sums[j] += sum over i of x[i, j], with scratch memory: rows are shared among all multiprocessors however few columns
/// there are. Without enough of it, as the function without scratch.
template <class T, class A>
void add_column_sums(char const* op, device::cuda const& policy, std::int64_t rows, std::int64_t columns, T const* x,
                     std::int64_t row_stride, A* sums, view<space::device, std::byte, dyn> workspace) {
  if (rows <= 0 || columns <= 0) return;
  int width = 1;
  while (width < 256 && width < columns) width *= 2;
  std::int64_t const across = (columns + width - 1) / width;
  std::int64_t parts = detail::parts_of_depth<A>(rows, std::int64_t{8} * (256 / width), across, columns,
                                                 static_cast<std::size_t>(workspace.size()));
  if (parts < 2) return add_column_sums(op, policy, rows, columns, x, row_stride, sums);
  std::int64_t const part_rows = (rows + parts - 1) / parts;
  parts = (rows + part_rows - 1) / part_rows;
  auto* const partial = reinterpret_cast<A*>(workspace.data());
  launch(op, policy, {blocks_for(parts * across, 1), 256}, detail::column_sums_of_part<std::remove_const_t<T>, A>, x,
         rows, columns, row_stride, part_rows, across, width, partial);
  launch(op, policy, {blocks_for(columns, 256), 256}, detail::add_parts<A, A>, static_cast<A const*>(partial), parts,
         std::int64_t{1}, columns, static_cast<A const*>(nullptr), sums, columns, true);
}

}  // namespace blackmamba::cuda
