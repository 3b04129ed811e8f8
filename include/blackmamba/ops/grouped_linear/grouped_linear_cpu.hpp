#pragma once
#include <blackmamba/core/cpu/column_sums.hpp>
#include <blackmamba/core/cpu/gemm.hpp>
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/ops/grouped_linear/grouped_linear.hpp>

#include <algorithm>
#include <cstdint>

namespace blackmamba {

template <>
struct backend<grouped_linear, device::cpu> {
  template <class T, class Y>
  static void forward(device::cpu const& policy, grouped_linear::inputs<device::cpu, T> const& in,
                      host_view<Y, dyn, dyn> y) {
    cpu::gemm_groups(policy.threads, in.weight.extent(0), [&](std::int64_t e) {
      std::int64_t const first = in.offsets(e);
      return cpu::product<T, T, Y>{.ta = cpu::transpose::no,
                                   .tb = cpu::transpose::yes,
                                   .m = in.offsets(e + 1) - first,
                                   .n = y.extent(1),
                                   .k = in.x.extent(1),
                                   .a = in.x.row(first),
                                   .lda = in.x.stride(0),
                                   .b = in.weight.row(e, 0),
                                   .ldb = in.weight.stride(1),
                                   .c = y.row(first),
                                   .ldc = y.stride(0),
                                   .bias = in.bias.present() ? in.bias.row(e) : nullptr};
    });
  }

  template <class T, class Y>
  static void backward(device::cpu const& policy, grouped_linear::gradient_inputs<device::cpu, T, Y> const& in,
                       grouped_linear::gradients<device::cpu, T> const& d) {
    using A = accum_t<T>;
    std::int64_t const groups = in.weight.extent(0), outputs = in.weight.extent(1), width = in.weight.extent(2);
    if (d.d_x.present())
      cpu::gemm_groups(policy.threads, groups, [&](std::int64_t e) {
        std::int64_t const first = in.offsets(e);
        return cpu::product<Y, T, T>{.ta = cpu::transpose::no,
                                     .tb = cpu::transpose::no,
                                     .m = in.offsets(e + 1) - first,
                                     .n = width,
                                     .k = outputs,
                                     .a = in.d_y.row(first),
                                     .lda = in.d_y.stride(0),
                                     .b = in.weight.row(e, 0),
                                     .ldb = in.weight.stride(1),
                                     .c = d.d_x.row(first),
                                     .ldc = d.d_x.stride(0)};
      });
    if (d.d_weight.present())
      cpu::gemm_groups(policy.threads, groups, [&](std::int64_t e) {
        std::int64_t const first = in.offsets(e), rows = in.offsets(e + 1) - first;
        return cpu::product<Y, T, A>{.ta = cpu::transpose::yes,
                                     .tb = cpu::transpose::no,
                                     .m = rows > 0 ? outputs : 0,  // nothing to add: d_weight is not even read
                                     .n = width,
                                     .k = rows,
                                     .a = in.d_y.row(first),
                                     .lda = in.d_y.stride(0),
                                     .b = in.x.row(first),
                                     .ldb = in.x.stride(0),
                                     .c = d.d_weight.row(e, 0),
                                     .ldc = d.d_weight.stride(1),
                                     .mode = update::accumulate};
      });
    if (d.d_bias.present()) {
      std::int64_t const blocks = (outputs + cpu::column_sums_grain - 1) / cpu::column_sums_grain;
      cpu::parallel_for(policy.threads, groups * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t task = begin; task < end; ++task) {
          std::int64_t const e = task / blocks, o = task % blocks * cpu::column_sums_grain, first = in.offsets(e);
          cpu::add_column_sums(in.offsets(e + 1) - first, std::min(cpu::column_sums_grain, outputs - o),
                               in.d_y.row(first) + o, in.d_y.stride(0), d.d_bias.row(e) + o);
        }
      });
    }
  }
};

}  // namespace blackmamba
