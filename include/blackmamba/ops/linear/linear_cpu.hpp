#pragma once
#include <blackmamba/core/cpu/gemm.hpp>
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/ops/linear/linear.hpp>

#include <algorithm>

namespace blackmamba {

template <>
struct backend<linear, device::cpu> {
  template <class T, class Y>
  static void forward(device::cpu const& policy, linear::inputs<device::cpu, T> const& in, host_view<Y, dyn, dyn> y) {
    cpu::gemm(policy.threads, cpu::transpose::no, cpu::transpose::yes, y.extent(0), y.extent(1), in.x.extent(1),
              in.x.data(), in.x.stride(0), in.weight.data(), in.weight.stride(0), y.data(), y.stride(0),
              update::overwrite, in.bias.data());
  }

  template <class T, class Y>
  static void backward(device::cpu const& policy, linear::gradient_inputs<device::cpu, T, Y> const& in,
                       linear::gradients<device::cpu, T> const& d) {
    using A = accum_t<T>;
    std::int64_t const rows = in.d_y.extent(0), outputs = in.d_y.extent(1), width = in.weight.extent(1);
    if (d.d_x.present())
      cpu::gemm(policy.threads, cpu::transpose::no, cpu::transpose::no, rows, width, outputs, in.d_y.data(),
                in.d_y.stride(0), in.weight.data(), in.weight.stride(0), d.d_x.data(), d.d_x.stride(0), d.d_x_update);
    if (d.d_weight.present())
      cpu::gemm(policy.threads, cpu::transpose::yes, cpu::transpose::no, outputs, width, rows, in.d_y.data(),
                in.d_y.stride(0), in.x.data(), in.x.stride(0), d.d_weight.data(), d.d_weight.stride(0),
                update::accumulate);
    if (d.d_bias.present())
      for (std::int64_t o = 0; o < outputs; ++o) {
        A sum = 0;
        for (std::int64_t r = 0; r < rows; ++r) sum += widen(in.d_y(r, o));
        d.d_bias(o) += sum;
      }
  }
};

}  // namespace blackmamba
