#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/ops/add/add.hpp>

namespace blackmamba {

template <>
struct backend<add, device::cpu> {
  template <class T>
  static void forward(device::cpu const& policy, host_view<T const, dyn, dyn> a, host_view<T const, dyn, dyn> b,
                      host_view<T, dyn, dyn> y) {
    using V = simd::pack<accum_t<T>>;
    cpu::parallel_for(policy.threads, y.extent(0), 64, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r)
        simd::for_packs<V::lanes>(y.extent(1), [&](std::int64_t i, auto lanes) {
          simd::store(simd::load<V>(a.row(r) + i, lanes) + simd::load<V>(b.row(r) + i, lanes), y.row(r) + i, lanes);
        });
    });
  }
};

}  // namespace blackmamba
