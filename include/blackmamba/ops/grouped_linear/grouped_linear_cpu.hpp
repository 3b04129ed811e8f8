#pragma once
#include <blackmamba/core/cpu/gemm.hpp>
#include <blackmamba/ops/grouped_linear/grouped_linear.hpp>

#include <cstdint>

namespace blackmamba {

template <>
struct backend<grouped_linear, device::cpu> {
  template <class T, class Y>
  static void forward(device::cpu const& policy, grouped_linear::inputs<device::cpu, T> const& in,
                      host_view<Y, dyn, dyn> y) {
    for (std::int64_t e = 0; e < in.weight.extent(0); ++e) {
      std::int64_t const first = in.offsets(e), rows = in.offsets(e + 1) - first;
      cpu::gemm(policy.threads, cpu::transpose::no, cpu::transpose::yes, rows, y.extent(1), in.x.extent(1),
                in.x.row(first), in.x.stride(0), in.weight.row(e, 0), in.weight.stride(1), y.row(first), y.stride(0),
                update::overwrite, in.bias.present() ? in.bias.row(e) : nullptr);
    }
  }

  template <class T, class Y>
  static void backward(device::cpu const& policy, grouped_linear::gradient_inputs<device::cpu, T, Y> const& in,
                       grouped_linear::gradients<device::cpu, T> const& d) {
    using A = accum_t<T>;
    std::int64_t const outputs = in.weight.extent(1), width = in.weight.extent(2);
    for (std::int64_t e = 0; e < in.weight.extent(0); ++e) {
      std::int64_t const first = in.offsets(e), last = in.offsets(e + 1), rows = last - first;
      if (rows == 0) continue;
      if (d.d_x.present())
        cpu::gemm(policy.threads, cpu::transpose::no, cpu::transpose::no, rows, width, outputs, in.d_y.row(first),
                  in.d_y.stride(0), in.weight.row(e, 0), in.weight.stride(1), d.d_x.row(first), d.d_x.stride(0));
      if (d.d_weight.present())
        cpu::gemm(policy.threads, cpu::transpose::yes, cpu::transpose::no, outputs, width, rows, in.d_y.row(first),
                  in.d_y.stride(0), in.x.row(first), in.x.stride(0), d.d_weight.row(e, 0), d.d_weight.stride(1),
                  update::accumulate);
      if (d.d_bias.present())
        for (std::int64_t o = 0; o < outputs; ++o) {
          A sum = 0;
          for (std::int64_t r = first; r < last; ++r) sum += widen(in.d_y(r, o));
          d.d_bias(e, o) += sum;
        }
    }
  }
};

}  // namespace blackmamba
