#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_cpu.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_tiles_cpu.hpp>

namespace blackmamba {

/// One token: a pack holds states of one channel, which lie side by side in memory. The state is read and written once;
/// that is what a step costs.
template <class T, int N>
void backend<selective_scan, device::cpu>::step(device::cpu const& policy,
                                                selective_scan::step_inputs<device::cpu, T, N> const& in,
                                                host_view<accum_t<T>, dyn, dyn, dyn> state, host_view<T, dyn, dyn> y) {
  namespace tiles = selective_scan_tiles;
  using A = accum_t<T>;
  using V = simd::pack<A>;
  // States in a pack: a whole register where there are so many, else a power of two.
  constexpr int width = N >= V::lanes ? V::lanes : N >= 8 ? 8 : N >= 4 ? 4 : 2;
  using S = simd::pack<A, width>;
  std::int64_t const channels = y.extent(1), packs = (channels + V::lanes - 1) / V::lanes;
  cpu::parallel_for(policy.threads, y.extent(0) * packs, 4, [&](std::int64_t begin, std::int64_t end) {
    tiles::decay<S, false> const decay_of;
    tiles::power_of_two<V> const power;
    constexpr std::size_t padded = (N + width - 1) / width * width;
    alignas(64) A B[padded] = {}, C[padded] = {};
    alignas(64) A dt[V::size], dt_u[V::size], sum[V::size * width] = {};
    std::int64_t loaded = -1;
    for (std::int64_t i = begin; i < end; ++i) {
      std::int64_t const b = i / packs, channel = i % packs * V::lanes;
      if (b != loaded) {
        for (int n = 0; n < N; ++n) B[n] = widen(in.B(b, n));
        for (int n = 0; n < N; ++n) C[n] = widen(in.C(b, n));
        loaded = b;
      }
      tiles::with_lanes<A>(channels - channel, [&](auto count) {
        auto const at = [&](auto const& x) { return x.present() ? simd::load<V>(x.data() + channel, count) : V(0); };
        V const u = simd::load<V>(in.u.row(b) + channel, count);
        V step = simd::load<V>(in.delta.row(b) + channel, count) + at(in.delta_bias);
        if (in.delta_softplus) step = selective_scan_math::softplus(step, power);
        step.store(dt);
        (step * u).store(dt_u);
        for (int lane = 0; lane < count; ++lane) {
          A const* const rate = in.A.row(channel + lane);
          A* const h = state.row(b, channel + lane);
          S products = 0;
          simd::for_packs<width>(N, [&](std::int64_t n, auto states) {
            S const a = selective_scan_math::rate(simd::load<S>(rate + n, states), in.A_is_log);
            S const drive = tiles::rounded(S(dt_u[lane]) * S::load(B + n));
            S const next = selective_scan_math::advance(decay_of(S(dt[lane]), a), simd::load<S>(h + n, states), drive);
            simd::store(next, h + n, states);
            products = fma(next, S::load(C + n), products);
          });
          products.store(sum + lane * width);
        }
        V total;
        if constexpr (width == V::lanes)
          total = tiles::lane_sums<V::lanes>(sum);
        else
          for (int lane = 0; lane < V::lanes; ++lane)
            total.v[lane] = lane < count ? simd::sum(S::load(sum + lane * width)) : A(0);
        total = fma(at(in.D), u, total);
        if (in.z.present()) {
          V const z = simd::load<V>(in.z.row(b) + channel, count);
          total *= z * selective_scan_math::sigmoid(z, power);
        }
        simd::store(total, y.row(b) + channel, count);
      });
    }
  });
}

}  // namespace blackmamba
