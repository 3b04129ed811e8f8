#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/core/cpu/simd_lanes.hpp>
#include <blackmamba/ops/cross_entropy/cross_entropy.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace blackmamba {

template <>
struct backend<cross_entropy, device::cpu> {
  template <class T>
  static void forward(device::cpu const& policy, cross_entropy::inputs<device::cpu, T> const& in,
                      cross_entropy::results<device::cpu, T> const& out, host_view<double, dyn> partial) {
    using A = accum_t<T>;
    std::int64_t const rows = in.logits.extent(0), classes = in.logits.extent(1);
    check_targets("cross_entropy", in.target, classes);
    cpu::parallel_for(policy.threads, partial.extent(0), 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t block = begin; block < end; ++block) {
        std::int64_t const last = std::min(rows, (block + 1) * cross_entropy::rows_per_partial);
        double total = 0;
        for (std::int64_t r = block * cross_entropy::rows_per_partial; r < last; ++r) {
          double lse = 0, loss = 0;
          if (in.target(r) >= 0) {
            T const *row = in.logits.row(r), *next = in.logits.row(std::min(r + 1, rows - 1));
            A const largest = max_of(row, classes);
            double const log_sum = std::log(sum_of_exponentials(row, next, classes, largest));
            lse = static_cast<double>(largest) + log_sum;
            // Not lse - logit: the difference of the two logits is exact where the sum of a large and a small is not.
            loss = (static_cast<double>(largest) - static_cast<double>(widen(row[in.target(r)]))) + log_sum;
          }
          total += loss;
          if (out.row_loss.present()) out.row_loss(r) = static_cast<A>(loss);
          if (out.lse.present()) out.lse(r) = static_cast<A>(lse);
        }
        partial(block) = total;
      }
    });
    double loss = 0;
    for (std::int64_t block = 0; block < partial.extent(0); ++block) loss += partial(block);
    out.loss(0) = static_cast<A>(loss);
  }

  template <class T>
  static void backward(device::cpu const& policy, cross_entropy::gradient_inputs<device::cpu, T> const& in,
                       host_view<T, dyn, dyn> d_logits) {
    using A = accum_t<T>;
    using V = simd::pack<A>;
    std::int64_t const classes = d_logits.extent(1);
    check_targets("cross_entropy.backward", in.target, classes);
    cpu::parallel_for(policy.threads, d_logits.extent(0), 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        T* const d = d_logits.row(r);
        std::int32_t const target = in.target(r);
        if (target < 0) {
          std::fill_n(d, classes, convert<T>(A(0)));
          continue;
        }
        T const* const row = in.logits.row(r);
        A const lse = in.lse(r), of_target = std::exp(widen(row[target]) - lse) - A(1);
        simd::for_packs<V::lanes>(classes, [&](std::int64_t i, auto lanes) {
          simd::store(exp(simd::load<V>(row + i, lanes) - lse) * in.scale, d + i, lanes);
        });
        d[target] = convert<T>(of_target * in.scale);
      }
    });
  }

 private:
  template <class T>
  static accum_t<T> max_of(T const* row, std::int64_t n) {
    using V = simd::pack<accum_t<T>>;
    V largest[4];  // four at a time: comparisons wait for each other
    for (auto& m : largest) m = -std::numeric_limits<accum_t<T>>::infinity();
    std::int64_t i = 0;
    for (; i + 4 * V::lanes <= n; i += 4 * V::lanes)
      for (int j = 0; j < 4; ++j) largest[j] = max(V::load(row + i + j * V::lanes), largest[j]);
    accum_t<T> m = simd::max_lane(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
    for (; i < n; ++i) m = std::max(m, widen(row[i]));
    return m;
  }
  /// Sum of exp(logit - largest), in accum_t<T> over blocks that are short enough for it, over blocks in double. Here
  /// there is time to fetch the next row, whose largest logit is looked for next.
  template <class T>
  static double sum_of_exponentials(T const* row, T const* next, std::int64_t n, accum_t<T> largest) {
    using V = simd::pack<accum_t<T>>;
    constexpr std::int64_t block = 64 * V::lanes;
    double total = 0;
    for (std::int64_t begin = 0; begin < n; begin += block) {
      total += static_cast<double>(simd::sum_packs<V>(std::min(block, n - begin), [&](std::int64_t i, auto lanes) {
        simd::prefetch(next + begin + i);
        return exp(simd::load<V>(row + begin + i, lanes) - largest);
      }));
    }
    return total;
  }
  static void check_targets(char const* op, host_view<std::int32_t const, dyn> target, std::int64_t classes) {
    for (std::int64_t r = 0; r < target.extent(0); ++r)
      if (target(r) >= classes)
        throw value_error(std::string(op) + ": target: position " + std::to_string(r) + " holds " +
                          std::to_string(target(r)) + ", but there are " + std::to_string(classes) + " classes");
  }
};

}  // namespace blackmamba
