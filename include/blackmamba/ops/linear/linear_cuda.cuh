#pragma once
#include <blackmamba/core/cuda/column_sums_cuda.cuh>
#include <blackmamba/core/cuda/gemm_cuda.cuh>
#include <blackmamba/ops/linear/linear.hpp>

#include <cstdint>

namespace blackmamba {

template <>
struct backend<linear, device::cuda> {
  template <class T, class Y>
  static void forward(device::cuda const& policy, linear::inputs<device::cuda, T> const& in,
                      out<device::cuda, Y, dyn, dyn> y, cuda::gemm_workspace workspace) {
    cuda::gemm<cuda::transpose::no, cuda::transpose::yes>("linear", policy,
                                                          cuda::product<T, T, Y>{.m = y.extent(0),
                                                                                 .n = y.extent(1),
                                                                                 .k = in.x.extent(1),
                                                                                 .a = in.x.data(),
                                                                                 .lda = in.x.stride(0),
                                                                                 .b = in.weight.data(),
                                                                                 .ldb = in.weight.stride(0),
                                                                                 .c = y.data(),
                                                                                 .ldc = y.stride(0),
                                                                                 .bias = in.bias.data()},
                                                          workspace);
  }

  template <class T, class Y>
  static void backward(device::cuda const& policy, linear::gradient_inputs<device::cuda, T, Y> const& in,
                       linear::gradients<device::cuda, T> const& d, cuda::gemm_workspace workspace) {
    using A = accum_t<T>;
    std::int64_t const rows = in.d_y.extent(0), outputs = in.d_y.extent(1), width = in.weight.extent(1);
    if (d.d_x.present())
      cuda::gemm<cuda::transpose::no, cuda::transpose::no>("linear.backward", policy,
                                                           cuda::product<Y, T, T>{.m = rows,
                                                                                  .n = width,
                                                                                  .k = outputs,
                                                                                  .a = in.d_y.data(),
                                                                                  .lda = in.d_y.stride(0),
                                                                                  .b = in.weight.data(),
                                                                                  .ldb = in.weight.stride(0),
                                                                                  .c = d.d_x.data(),
                                                                                  .ldc = d.d_x.stride(0),
                                                                                  .mode = d.d_x_update},
                                                           workspace);
    if (d.d_weight.present())
      cuda::gemm<cuda::transpose::yes, cuda::transpose::no>("linear.backward", policy,
                                                            cuda::product<Y, T, A>{.m = outputs,
                                                                                   .n = width,
                                                                                   .k = rows,
                                                                                   .a = in.d_y.data(),
                                                                                   .lda = in.d_y.stride(0),
                                                                                   .b = in.x.data(),
                                                                                   .ldb = in.x.stride(0),
                                                                                   .c = d.d_weight.data(),
                                                                                   .ldc = d.d_weight.stride(0),
                                                                                   .mode = update::accumulate},
                                                            workspace);
    if (d.d_bias.present())
      cuda::add_column_sums("linear.backward", policy, rows, outputs, in.d_y.data(), in.d_y.stride(0), d.d_bias.data(),
                            workspace);
  }
};

}  // namespace blackmamba
