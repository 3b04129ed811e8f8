#pragma once
#include <blackmamba/ops/router/load_bias.hpp>
#include <blackmamba/ops/router/router_math.hpp>

namespace blackmamba {

template <>
struct backend<load_bias, device::cpu> {
  template <class A>
  static void forward(device::cpu const&, host_view<std::int64_t const, dyn> offsets, host_view<A, dyn> offset,
                      double rate) {
    std::int64_t const experts = offset.extent(0), total = offsets(experts) - offsets(0);
    for (std::int64_t j = 0; j < experts; ++j)
      offset(j) += static_cast<A>(rate * math::load_direction(offsets(j + 1) - offsets(j), total, experts));
  }
};

}  // namespace blackmamba
