#pragma once
#include <blackmamba/core/cpu/norm_rows.hpp>
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/ops/layer_norm/layer_norm.hpp>

#include <cmath>

namespace blackmamba {

template <>
struct backend<layer_norm, device::cpu> {
  template <class T>
  static void forward(device::cpu const& policy, layer_norm::inputs<device::cpu, T> const& in, host_view<T, dyn, dyn> y,
                      layer_norm::saved<device::cpu, T> const& keep) {
    using A = accum_t<T>;
    using V = simd::pack<A>;
    std::int64_t const width = y.extent(1);
    cpu::parallel_for(policy.threads, y.extent(0), 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        cpu::fused_row<V, T> const s(in.x, in.residual, r);
        A const mean = simd::sum_packs<V>(width, s) / static_cast<A>(width);
        A const squares = simd::sum_packs<V>(width, [&](std::int64_t i, auto lanes) {
          V const v = s(i, lanes) - mean;
          return v * v;
        });
        A const rstd = 1 / std::sqrt(squares / static_cast<A>(width) + static_cast<A>(in.eps));
        simd::for_packs<V::lanes>(width, [&](std::int64_t i, auto lanes) {
          V const v = s(i, lanes);
          V normalised = (v - mean) * rstd * simd::load<V>(in.weight.data() + i, lanes);
          if (in.bias.present()) normalised += simd::load<V>(in.bias.data() + i, lanes);
          simd::store(normalised, y.row(r) + i, lanes);
          if (keep.sum.present()) simd::store(v, keep.sum.row(r) + i, lanes);
        });
        if (keep.rstd.present()) keep.rstd(r) = rstd;
        if (keep.mean.present()) keep.mean(r) = mean;
      }
    });
  }

  /// partial: (blocks, 2 D), the weight's and the bias's sums of a block side by side.
  template <class T, class S>
  static void backward(device::cpu const& policy, layer_norm::gradient_inputs<device::cpu, T, S> const& in,
                       host_view<S, dyn, dyn> d_s, host_view<accum_t<T>, dyn> d_weight,
                       host_view<accum_t<T>, dyn> d_bias, host_view<accum_t<T>, dyn, dyn> partial) {
    using A = accum_t<T>;
    using V = simd::pack<A>;
    std::int64_t const rows = d_s.extent(0), width = d_s.extent(1);
    std::int64_t const rows_per_block = row_blocks<space::host>::rows_per_block(rows);
    cpu::for_row_blocks(policy.threads, rows, rows_per_block, partial, [&](std::int64_t r, A* d_w) {
      A* const d_b = d_w + width;
      A const rstd = in.rstd(r), mean = in.mean(r);
      V sum_g = 0, sum_gn = 0;
      simd::for_packs<V::lanes>(width, [&](std::int64_t i, auto lanes) {
        V const d_y = simd::load<V>(in.d_y.row(r) + i, lanes);
        V const normalised = (simd::load<V>(in.sum.row(r) + i, lanes) - mean) * rstd;
        simd::store(fma(d_y, normalised, simd::load<V>(d_w + i, lanes)), d_w + i, lanes);
        simd::store(d_y + simd::load<V>(d_b + i, lanes), d_b + i, lanes);
        V const g = d_y * simd::load<V>(in.weight.data() + i, lanes);
        sum_g += g;
        sum_gn = fma(g, normalised, sum_gn);
      });
      A const mean_g = simd::sum(sum_g) / static_cast<A>(width);
      A const mean_gn = simd::sum(sum_gn) / static_cast<A>(width);
      simd::for_packs<V::lanes>(width, [&](std::int64_t i, auto lanes) {
        V const g = simd::load<V>(in.d_y.row(r) + i, lanes) * simd::load<V>(in.weight.data() + i, lanes);
        V const normalised = (simd::load<V>(in.sum.row(r) + i, lanes) - mean) * rstd;
        V d = (g - mean_g - normalised * mean_gn) * rstd;
        if (in.d_residual.present()) d += simd::load<V>(in.d_residual.row(r) + i, lanes);
        simd::store(d, d_s.row(r) + i, lanes);
      });
    });
    std::int64_t const blocks = partial.extent(0);
    cpu::add_column_sums(policy.threads, blocks, width, partial.data(), 2 * width, d_weight.data());
    if (d_bias.present())
      cpu::add_column_sums(policy.threads, blocks, width, partial.data() + width, 2 * width, d_bias.data());
  }
};

}  // namespace blackmamba
