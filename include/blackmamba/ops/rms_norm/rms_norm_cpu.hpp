#pragma once
#include <blackmamba/core/cpu/norm_rows.hpp>
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/ops/rms_norm/rms_norm.hpp>

#include <cmath>

namespace blackmamba {

template <>
struct backend<rms_norm, device::cpu> {
  template <class T>
  static void forward(device::cpu const& policy, rms_norm::inputs<device::cpu, T> const& in, host_view<T, dyn, dyn> y,
                      rms_norm::saved<device::cpu, T> const& keep) {
    using A = accum_t<T>;
    using V = simd::pack<A>;
    std::int64_t const width = y.extent(1);
    cpu::parallel_for(policy.threads, y.extent(0), 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        cpu::fused_row<V, T> const s(in.x, in.residual, r);
        A const squares = simd::sum_packs<V>(width, [&](std::int64_t i, auto lanes) {
          V const v = s(i, lanes);
          return v * v;
        });
        A const rstd = 1 / std::sqrt(squares / static_cast<A>(width) + static_cast<A>(in.eps));
        simd::for_packs<V::lanes>(width, [&](std::int64_t i, auto lanes) {
          V const v = s(i, lanes);
          simd::store(v * rstd * simd::load<V>(in.weight.data() + i, lanes), y.row(r) + i, lanes);
          if (keep.sum.present()) simd::store(v, keep.sum.row(r) + i, lanes);
        });
        if (keep.rstd.present()) keep.rstd(r) = rstd;
      }
    });
  }

  template <class T, class S>
  static void backward(device::cpu const& policy, rms_norm::gradient_inputs<device::cpu, T, S> const& in,
                       host_view<S, dyn, dyn> d_s, host_view<accum_t<T>, dyn> d_weight,
                       host_view<accum_t<T>, dyn, dyn> partial) {
    using A = accum_t<T>;
    using V = simd::pack<A>;
    std::int64_t const rows = d_s.extent(0), width = d_s.extent(1);
    std::int64_t const rows_per_block = row_blocks<space::host>::rows_per_block(rows);
    cpu::for_row_blocks(policy.threads, rows, rows_per_block, partial, [&](std::int64_t r, A* d_w) {
      A const rstd = in.rstd(r);
      V dot = 0;
      simd::for_packs<V::lanes>(width, [&](std::int64_t i, auto lanes) {
        V const g = simd::load<V>(in.d_y.row(r) + i, lanes);
        V const normalised = simd::load<V>(in.sum.row(r) + i, lanes) * rstd;
        simd::store(fma(g, normalised, simd::load<V>(d_w + i, lanes)), d_w + i, lanes);
        dot = fma(g * simd::load<V>(in.weight.data() + i, lanes), normalised, dot);
      });
      A const mean = simd::sum(dot) / static_cast<A>(width);
      simd::for_packs<V::lanes>(width, [&](std::int64_t i, auto lanes) {
        V const g = simd::load<V>(in.d_y.row(r) + i, lanes) * simd::load<V>(in.weight.data() + i, lanes);
        V const normalised = simd::load<V>(in.sum.row(r) + i, lanes) * rstd;
        V d = (g - normalised * mean) * rstd;
        if (in.d_residual.present()) d += simd::load<V>(in.d_residual.row(r) + i, lanes);
        simd::store(d, d_s.row(r) + i, lanes);
      });
    });
    cpu::add_column_sums(policy.threads, partial.extent(0), width, partial.data(), width, d_weight.data());
  }
};

}  // namespace blackmamba
