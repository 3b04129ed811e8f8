#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/core/view.hpp>

#include <algorithm>
#include <cstdint>

namespace blackmamba::cpu {

/// total (D) += sum over rows of partial (R, D), rows in order: the second half of a reduction whose first half left one
/// row for each fixed-size block. Parallel over columns, so the result does not depend on the number of threads.
template <class A>
void add_rows(int threads, host_view<A, dyn, dyn> partial, host_view<A, dyn> total) {
  using V = simd::pack<A>;
  parallel_for(threads, total.extent(0), 1024, [&](std::int64_t begin, std::int64_t end) {
    simd::for_packs<V::lanes>(end - begin, [&](std::int64_t i, auto lanes) {
      A* const t = total.data() + begin + i;
      V sum = simd::load<V>(t, lanes);
      for (std::int64_t r = 0; r < partial.extent(0); ++r) sum += simd::load<V>(partial.row(r) + begin + i, lanes);
      simd::store(sum, t, lanes);
    });
  });
}

}  // namespace blackmamba::cpu
