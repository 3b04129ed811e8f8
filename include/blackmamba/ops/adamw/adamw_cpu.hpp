#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/ops/adamw/adamw.hpp>

#include <algorithm>
#include <cmath>

namespace blackmamba {

template <>
struct backend<adamw, device::cpu> {
  template <class T>
  static void step(device::cpu const& policy, adamw::tensors<device::cpu, T> const& on,
                   host_view<accum_t<T> const, dyn> norm, std::span<adamw::group const> groups,
                   adamw::options const& how) {
    using A = accum_t<T>;
    using V = simd::pack<A>;
    double clip = 1;
    if (norm.present()) {
      double const length = static_cast<double>(norm(0));
      if (!std::isfinite(length)) return;
      if (how.max_norm > 0 && length > how.max_norm) clip = how.max_norm / length;
    }
    // eta m' / (sqrt(v') + eps) with m' = m / c1, v' = v / c2 is (eta / c1) m / (sqrt(v) / sqrt(c2) + eps).
    auto schedule = adamw::schedule_of(how);
    if (on.schedule.present()) std::copy_n(on.schedule.data(), 3, schedule.begin());
    A const first_correction = static_cast<A>(schedule[1]);
    A const second_correction = static_cast<A>(schedule[2]);
    A const scale = static_cast<A>(clip), beta1 = static_cast<A>(how.beta1), beta2 = static_cast<A>(how.beta2);
    A const rest1 = static_cast<A>(1 - how.beta1), rest2 = static_cast<A>(1 - how.beta2);
    A const eps = static_cast<A>(how.eps);
    std::int64_t begin = 0;
    for (auto const& group : groups) {
      double const rate = schedule[0] * group.learning_rate_scale;
      A const step_size = static_cast<A>(rate) * first_correction;
      A const decay = static_cast<A>(rate * group.weight_decay);
      cpu::parallel_for(policy.threads, group.end - begin, 4096, [&](std::int64_t low, std::int64_t high) {
        simd::for_packs<V::lanes>(high - low, [&](std::int64_t offset, auto lanes) {
          std::int64_t const i = begin + low + offset;
          V const g = simd::load<V>(on.gradient.data() + i, lanes) * scale;
          V const m = fma(simd::load<V>(on.first_moment.data() + i, lanes), V(beta1), g * rest1);
          V const v = fma(simd::load<V>(on.second_moment.data() + i, lanes), V(beta2), g * g * rest2);
          V p = simd::load<V>(on.parameter.data() + i, lanes);
          p -= fma(p, V(decay), m * step_size / fma(sqrt(v), V(second_correction), V(eps)));
          simd::store(m, on.first_moment.data() + i, lanes);
          simd::store(v, on.second_moment.data() + i, lanes);
          simd::store(p, on.parameter.data() + i, lanes);
          if (on.copy.present()) simd::store(p, on.copy.data() + i, lanes);
        });
      });
      begin = group.end;
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
