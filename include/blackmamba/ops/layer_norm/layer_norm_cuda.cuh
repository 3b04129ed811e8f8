#pragma once
#include <blackmamba/core/cuda/norm_rows_backward_cuda.cuh>
#include <blackmamba/core/cuda/norm_rows_cuda.cuh>
#include <blackmamba/core/cuda/reduce_cuda.cuh>
#include <blackmamba/ops/layer_norm/layer_norm.hpp>

namespace blackmamba {

/// Bytes of a row's element as of rms_norm: the mean and the variance about it are taken from registers.
template <>
struct backend<layer_norm, device::cuda> {
  template <class T>
  static void forward(device::cuda const& policy, layer_norm::inputs<device::cuda, T> const& in,
                      view<space::device, T, dyn, dyn> y, layer_norm::saved<device::cuda, T> const& keep) {
    cuda::norm_forward<true, T>("layer_norm", policy,
                                {.x = in.x,
                                 .weight = in.weight,
                                 .bias = in.bias,
                                 .residual = in.residual,
                                 .y = y,
                                 .sum = keep.sum,
                                 .rstd = keep.rstd,
                                 .mean = keep.mean,
                                 .eps = static_cast<accum_t<T>>(in.eps)});
  }

  /// partial: (blocks, 2 D), the weight's and the bias's sums of a block side by side.
  template <class T, class S>
  static void backward(device::cuda const& policy, layer_norm::gradient_inputs<device::cuda, T, S> const& in,
                       view<space::device, S, dyn, dyn> d_s, view<space::device, accum_t<T>, dyn> d_weight,
                       view<space::device, accum_t<T>, dyn> d_bias,
                       view<space::device, accum_t<T>, dyn, dyn> partial) {
    std::int64_t const blocks = partial.extent(0), width = d_s.extent(1);
    cuda::norm_backward<true, T, S>("layer_norm.backward", policy,
                                    {.sum = in.sum,
                                     .rstd = in.rstd,
                                     .mean = in.mean,
                                     .weight = in.weight,
                                     .d_y = in.d_y,
                                     .d_residual = in.d_residual,
                                     .d_s = d_s,
                                     .partial = partial});
    cuda::add_column_sums("layer_norm.backward", policy, blocks, width, partial.data(), 2 * width, d_weight.data());
    if (d_bias.present())
      cuda::add_column_sums("layer_norm.backward", policy, blocks, width, partial.data() + width, 2 * width,
                            d_bias.data());
  }
};

}  // namespace blackmamba
