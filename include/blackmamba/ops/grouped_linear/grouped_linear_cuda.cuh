#pragma once
#include <blackmamba/core/cuda/gemm_cuda.cuh>
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/ops/grouped_linear/grouped_linear.hpp>

#include <cstdint>

namespace blackmamba {

namespace cuda::detail {

/// As column_sums, over the rows of one group each; a group without rows adds nothing.
template <class T, class A>
__global__ void __launch_bounds__(1024) group_column_sums(T const* x, std::int64_t const* offsets, std::int64_t columns,
                                                          std::int64_t row_stride, A* sums, std::int64_t sums_stride) {
  __shared__ A part[32][33];
  std::int64_t const across = (columns + 31) / 32, group = blockIdx.x / across;
  std::int64_t const first_column = (blockIdx.x - group * across) * 32, column = first_column + threadIdx.x;
  std::int64_t const end = offsets[group + 1];
  if (offsets[group] == end) return;
  A sum = 0;
  if (column < columns)
#pragma unroll 4
    for (std::int64_t r = offsets[group] + threadIdx.y; r < end; r += 32) sum += convert<A>(x[r * row_stride + column]);
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  A total = part[threadIdx.x][threadIdx.y];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
  std::int64_t const mine = first_column + threadIdx.y;
  if (threadIdx.x == 0 && mine < columns) sums[group * sums_stride + mine] += total;
}

}  // namespace cuda::detail

/// The offsets never visit the host: kernels are launched for the most tiles that there can be, and find their group.
template <>
struct backend<grouped_linear, device::cuda> {
  template <class T, class Y>
  static void forward(device::cuda const& policy, grouped_linear::inputs<device::cuda, T> const& in,
                      out<device::cuda, Y, dyn, dyn> y) {
    cuda::gemm_groups<cuda::transpose::no, cuda::transpose::yes>(
        "grouped_linear", policy,
        cuda::product<T, T, Y>{.m = y.extent(0),
                               .n = y.extent(1),
                               .k = in.x.extent(1),
                               .a = in.x.data(),
                               .lda = in.x.stride(0),
                               .b = in.weight.data(),
                               .ldb = in.weight.stride(1),
                               .c = y.data(),
                               .ldc = y.stride(0),
                               .bias = in.bias.data(),
                               .groups = {.by = cuda::grouping::rows,
                                          .count = in.weight.extent(0),
                                          .offsets = in.offsets.data(),
                                          .b_apart = in.weight.stride(0),
                                          .bias_apart = in.bias.stride(0)}});
  }

  template <class T, class Y>
  static void backward(device::cuda const& policy, grouped_linear::gradient_inputs<device::cuda, T, Y> const& in,
                       grouped_linear::gradients<device::cuda, T> const& d) {
    using A = accum_t<T>;
    std::int64_t const groups = in.weight.extent(0), outputs = in.weight.extent(1), width = in.weight.extent(2);
    std::int64_t const rows = in.d_y.extent(0);
    if (d.d_x.present())
      cuda::gemm_groups<cuda::transpose::no, cuda::transpose::no>(
          "grouped_linear.backward", policy,
          cuda::product<Y, T, T>{.m = rows,
                                 .n = width,
                                 .k = outputs,
                                 .a = in.d_y.data(),
                                 .lda = in.d_y.stride(0),
                                 .b = in.weight.data(),
                                 .ldb = in.weight.stride(1),
                                 .c = d.d_x.data(),
                                 .ldc = d.d_x.stride(0),
                                 .groups = {.by = cuda::grouping::rows,
                                            .count = groups,
                                            .offsets = in.offsets.data(),
                                            .b_apart = in.weight.stride(0)}});
    if (d.d_weight.present())
      cuda::gemm_groups<cuda::transpose::yes, cuda::transpose::no>(
          "grouped_linear.backward", policy,
          cuda::product<Y, T, A>{.m = outputs,
                                 .n = width,
                                 .k = rows,
                                 .a = in.d_y.data(),
                                 .lda = in.d_y.stride(0),
                                 .b = in.x.data(),
                                 .ldb = in.x.stride(0),
                                 .c = d.d_weight.data(),
                                 .ldc = d.d_weight.stride(1),
                                 .mode = update::accumulate,
                                 .groups = {.by = cuda::grouping::depth,
                                            .count = groups,
                                            .offsets = in.offsets.data(),
                                            .c_apart = d.d_weight.stride(0)}});
    if (d.d_bias.present() && outputs > 0 && groups > 0)
      cuda::launch("grouped_linear.backward", policy,
                   {cuda::blocks_for(groups * ((outputs + 31) / 32), 1), dim3(32, 32)},
                   cuda::detail::group_column_sums<Y, A>, in.d_y.data(), in.offsets.data(), outputs, in.d_y.stride(0),
                   d.d_bias.data(), d.d_bias.stride(0));
  }
};

}  // namespace blackmamba
