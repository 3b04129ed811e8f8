#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd_lanes.hpp>
#include <blackmamba/core/tensor.hpp>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <tuple>

/// What the memory of this machine does, measured in the program that quotes it, and operators as a share of it.
namespace bench {

using blackmamba::dyn;
using host_floats = blackmamba::tensor<blackmamba::space::host, float, dyn>;

template <class F>
double seconds(F&& f) {
  auto const begin = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Bytes per second of c = a + 3 b (STREAM triad: two arrays read, one written) or c = a (copy: one read, one written)
/// on n floats each. The best of many runs, with ordinary stores or with stores past the cache, whichever is faster.
inline double stream_rate(int reads, std::int64_t n, int threads) {
  using V = blackmamba::simd::pack<float>;
  static std::map<std::tuple<int, std::int64_t, int>, double> known;
  double& rate = known[{reads, n, threads}];
  if (rate > 0) return rate;
  host_floats a(n), b(n), c(n);
  for (auto* t : {&a, &b, &c}) std::fill_n(t->data(), n, 1.0f);
  double best[2] = {1e9, 1e9};
  for (int run = 0; run < 60; ++run) {
    bool const past_cache = run % 2 == 1;
    double const s = seconds([&] {
      blackmamba::cpu::parallel_for(threads, n, 4096, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i + V::lanes <= end; i += V::lanes) {
          V x = V::load(a.data() + i);
          if (reads == 2) x = fma(V::load(b.data() + i), V(3.0f), x);
          blackmamba::simd::store(x, c.data() + i, past_cache);
        }
        blackmamba::simd::finish_stores();
      });
    });
    best[past_cache] = std::min(best[past_cache], s);
  }
  double const bytes = (reads + 1.0) * sizeof(float) * static_cast<double>(n);
  std::printf("%s, %lld floats, %d threads: %.1f GB/s with ordinary stores, %.1f GB/s past the cache\n",
              reads == 2 ? "triad" : "copy", static_cast<long long>(n), threads, bytes / best[0] * 1e-9,
              bytes / best[1] * 1e-9);
  rate = bytes / std::min(best[0], best[1]);
  return rate;
}

/// Runs f as the benchmark's body, and reports the best run: the mean measures the other users of the machine too.
/// @param floor bytes per second to compare with; its share is reported as `name`
template <class F>
void measure(benchmark::State& state, double bytes, char const* name, double floor, F&& f) {
  f();
  double best = 1e9;
  for (auto _ : state) best = std::min(best, seconds(f));
  state.counters["best_ms"] = best * 1e3;
  state.counters["best_GB_per_s"] = bytes / best * 1e-9;
  state.counters[name] = bytes / best / floor;
}

}  // namespace bench
