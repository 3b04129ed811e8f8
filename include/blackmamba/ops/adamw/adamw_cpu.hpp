#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/ops/adamw/adamw.hpp>
#include <blackmamba/ops/adamw/adamw_math.hpp>

#include <algorithm>
#include <cmath>
#include <span>

namespace blackmamba {

template <>
struct backend<adamw, device::cpu> {
  template <class T>
  static void step(device::cpu const& policy, std::span<adamw::segment<device::cpu, T> const> segments,
                   host_view<accum_t<T> const, dyn> norm, adamw::options const& how,
                   host_view<double const, dyn> schedule) {
    using A = accum_t<T>;
    using V = simd::pack<A>;
    double clip = 1;
    if (norm.present()) {
      double const length = static_cast<double>(norm(0));
      if (!std::isfinite(length)) return;
      clip = math::adamw_clip(length, how.max_norm);
    }
    auto now = adamw::schedule_of(how);
    if (schedule.present()) std::copy_n(schedule.data(), 3, now.begin());
    auto const all_lanes = [](double x) { return V(static_cast<A>(x)); };
    for (auto const& s : segments) {
      double const rate = now[0] * s.learning_rate_scale;
      math::adamw_factors<V> const factors{.clip = all_lanes(clip),
                                           .beta1 = all_lanes(how.beta1),
                                           .rest1 = all_lanes(1 - how.beta1),
                                           .beta2 = all_lanes(how.beta2),
                                           .rest2 = all_lanes(1 - how.beta2),
                                           .step_size = all_lanes(rate) * all_lanes(now[1]),
                                           .second_correction = all_lanes(now[2]),
                                           .eps = all_lanes(how.eps),
                                           .decay = all_lanes(rate * s.weight_decay)};
      cpu::parallel_for(policy.threads, s.parameter.extent(0), 4096, [&](std::int64_t begin, std::int64_t end) {
        auto const f = factors;
        simd::for_packs<V::lanes>(end - begin, [&](std::int64_t offset, auto lanes) {
          std::int64_t const i = begin + offset;
          V m = simd::load<V>(s.first_moment.data() + i, lanes), v = simd::load<V>(s.second_moment.data() + i, lanes);
          V p = simd::load<V>(s.parameter.data() + i, lanes);
          math::adamw_update(p, m, v, simd::load<V>(s.gradient.data() + i, lanes), f);
          simd::store(m, s.first_moment.data() + i, lanes);
          simd::store(v, s.second_moment.data() + i, lanes);
          simd::store(p, s.parameter.data() + i, lanes);
          if (s.copy.present()) simd::store(p, s.copy.data() + i, lanes);
        });
      });
    }
  }

  template <class A>
  static void norm(device::cpu const& policy, host_view<A const, dyn> gradient, host_view<A, dyn> norm,
                   host_view<double, dyn> partial) {
    using V = simd::pack<double>;
    std::int64_t const n = gradient.extent(0);
    cpu::parallel_for(policy.threads, partial.extent(0), 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t block = begin; block < end; ++block) {
        A const* const g = gradient.data() + block * adamw::values_per_partial;
        std::int64_t const count = std::min(adamw::values_per_partial, n - block * adamw::values_per_partial);
        V squares[2] = {0, 0};
        std::int64_t i = 0;
        for (; i + 2 * V::lanes <= count; i += 2 * V::lanes)
          for (int j = 0; j < 2; ++j) {
            V const x = V::load(g + i + j * V::lanes);
            squares[j] = fma(x, x, squares[j]);
          }
        double rest = 0;
        for (; i < count; ++i) rest += static_cast<double>(g[i]) * static_cast<double>(g[i]);
        partial(block) = simd::sum(squares[0] + squares[1]) + rest;
      }
    });
    double total = 0;
    for (std::int64_t block = 0; block < partial.extent(0); ++block) total += partial(block);
    norm(0) = static_cast<A>(std::sqrt(total));
  }
};

}  // namespace blackmamba
