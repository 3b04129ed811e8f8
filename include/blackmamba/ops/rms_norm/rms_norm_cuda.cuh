#pragma once
#include <blackmamba/core/cuda/norm_rows_backward_cuda.cuh>
#include <blackmamba/core/cuda/norm_rows_cuda.cuh>
#include <blackmamba/core/cuda/reduce_cuda.cuh>
#include <blackmamba/ops/rms_norm/rms_norm.hpp>

namespace blackmamba {

/// Bytes of a row's element, each once: forward T + T, with a residual and its sum accum_t<T> twice more; backward
/// S + T + S, with d_residual accum_t<T> more. Arithmetic is far below what memory allows.
template <>
struct backend<rms_norm, device::cuda> {
  template <class T>
  static void forward(device::cuda const& policy, rms_norm::inputs<device::cuda, T> const& in,
                      view<space::device, T, dyn, dyn> y, rms_norm::saved<device::cuda, T> const& keep) {
    cuda::norm_forward<false, T>("rms_norm", policy,
                                 {.x = in.x,
                                  .weight = in.weight,
                                  .bias = {},
                                  .residual = in.residual,
                                  .y = y,
                                  .sum = keep.sum,
                                  .rstd = keep.rstd,
                                  .mean = {},
                                  .eps = static_cast<accum_t<T>>(in.eps)});
  }

  template <class T, class S>
  static void backward(device::cuda const& policy, rms_norm::gradient_inputs<device::cuda, T, S> const& in,
                       view<space::device, S, dyn, dyn> d_s, view<space::device, accum_t<T>, dyn> d_weight,
                       view<space::device, accum_t<T>, dyn, dyn> partial) {
    cuda::norm_backward<false, T, S>("rms_norm.backward", policy,
                                     {.sum = in.sum,
                                      .rstd = in.rstd,
                                      .mean = {},
                                      .weight = in.weight,
                                      .d_y = in.d_y,
                                      .d_residual = in.d_residual,
                                      .d_s = d_s,
                                      .partial = partial});
    cuda::add_column_sums("rms_norm.backward", policy, partial.extent(0), d_s.extent(1), partial.data(),
                          partial.stride(0), d_weight.data());
  }
};

}  // namespace blackmamba
