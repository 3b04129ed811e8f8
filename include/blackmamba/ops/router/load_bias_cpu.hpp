#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/ops/router/load_bias.hpp>
#include <blackmamba/ops/router/router_math.hpp>

#include <algorithm>

namespace blackmamba {

template <>
struct backend<load_bias, device::cpu> {
  template <class A>
  static void forward(device::cpu const& policy, host_view<std::int32_t const, dyn, dyn> expert,
                      host_view<A, dyn> offset, double rate, host_view<std::int64_t, dyn, dyn> counts) {
    std::int64_t const slots = expert.size(), experts = offset.extent(0), k = expert.extent(1);
    cpu::parallel_for(policy.threads, counts.extent(0), 4, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t c = begin; c < end; ++c) {
        std::int64_t* const count = counts.row(c);
        std::fill_n(count, experts, 0);
        std::int64_t const first = c * load_bias::slots_per_chunk;
        for (std::int64_t s = first; s < std::min(first + load_bias::slots_per_chunk, slots); ++s) {
          std::int32_t const e = expert(s / k, s % k);
          if (e >= 0 && e < experts) ++count[e];
        }
      }
    });
    // The first row becomes the sum of all.
    std::int64_t total = 0;
    for (std::int64_t j = 0; j < experts && counts.extent(0) > 0; ++j) {
      for (std::int64_t c = 1; c < counts.extent(0); ++c) counts(0, j) += counts(c, j);
      total += counts(0, j);
    }
    if (total == 0) return;
    for (std::int64_t j = 0; j < experts; ++j)
      offset(j) += static_cast<A>(rate * math::load_direction(counts(0, j), total, experts));
  }
};

}  // namespace blackmamba
