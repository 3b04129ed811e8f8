#pragma once
#include <blackmamba/core/cpu/column_sums.hpp>
#include <blackmamba/core/cpu/gemm.hpp>
#include <blackmamba/ops/linear/linear.hpp>

#include <cstdint>

namespace blackmamba {

template <>
struct backend<linear, device::cpu> {
  template <class T, class Y>
  static void forward(device::cpu const& policy, linear::inputs<device::cpu, T> const& in, host_view<Y, dyn, dyn> y) {
    cpu::gemm(policy.threads, cpu::product<T, T, Y>{.ta = cpu::transpose::no,
                                                    .tb = cpu::transpose::yes,
                                                    .m = y.extent(0),
                                                    .n = y.extent(1),
                                                    .k = in.x.extent(1),
                                                    .a = in.x.data(),
                                                    .lda = in.x.stride(0),
                                                    .b = in.weight.data(),
                                                    .ldb = in.weight.stride(0),
                                                    .c = y.data(),
                                                    .ldc = y.stride(0),
                                                    .bias = in.bias.data()});
  }

  template <class T, class Y>
  static void backward(device::cpu const& policy, linear::gradient_inputs<device::cpu, T, Y> const& in,
                       linear::gradients<device::cpu, T> const& d,
                       host_view<accum_t<T>, dyn, dyn, dyn> d_weight_parts) {
    using A = accum_t<T>;
    std::int64_t const rows = in.d_y.extent(0), outputs = in.d_y.extent(1), width = in.weight.extent(1);
    if (d.d_x.present())
      cpu::gemm(policy.threads, cpu::product<Y, T, T>{.ta = cpu::transpose::no,
                                                      .tb = cpu::transpose::no,
                                                      .m = rows,
                                                      .n = width,
                                                      .k = outputs,
                                                      .a = in.d_y.data(),
                                                      .lda = in.d_y.stride(0),
                                                      .b = in.weight.data(),
                                                      .ldb = in.weight.stride(0),
                                                      .c = d.d_x.data(),
                                                      .ldc = d.d_x.stride(0),
                                                      .mode = d.d_x_update});
    if (d.d_weight.present())
      cpu::gemm_deep(policy.threads,
                     cpu::product<Y, T, A>{.ta = cpu::transpose::yes,
                                           .tb = cpu::transpose::no,
                                           .m = outputs,
                                           .n = width,
                                           .k = rows,
                                           .a = in.d_y.data(),
                                           .lda = in.d_y.stride(0),
                                           .b = in.x.data(),
                                           .ldb = in.x.stride(0),
                                           .c = d.d_weight.data(),
                                           .ldc = d.d_weight.stride(0),
                                           .mode = update::accumulate},
                     d_weight_parts);
    if (d.d_bias.present())
      cpu::add_column_sums(policy.threads, rows, outputs, in.d_y.data(), in.d_y.stride(0), d.d_bias.data());
  }
};

}  // namespace blackmamba
