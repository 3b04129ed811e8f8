/// Decoding one sequence with a dense Mamba of 24 layers, d_model 768, vocabulary 50280, float weights (the published
/// mamba-130m's dimensions): bytes of weights per second against the machine's read bandwidth in the same run.
#include <blackmamba/blackmamba.hpp>
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>

#include <benchmark/benchmark.h>

#include <cmath>
#include <vector>

namespace bm = blackmamba;

namespace {

struct mamba_130m {
  static constexpr int d_model = 768, layers = 24, d_state = 16, d_conv = 4, expand = 2, vocab = 50280;
};

void decode_step(benchmark::State& state) {
  using network_type = bm::network<bm::dense_mamba<mamba_130m>, bm::device::cpu>;
  network_type net(1);
  bm::generator from(net, {.prefill_chunk = 16});
  std::int32_t token = 17;
  from.step({&token, 1});
  for (auto _ : state) from.step({&token, 1});
  for (float x : from.logits())
    if (!std::isfinite(x)) state.SkipWithError("a logit is not finite");
  double const bytes = 4.0 * static_cast<double>(bm::count_parameters<network_type::arch>().total);
  state.counters["weight_bytes"] = benchmark::Counter(bytes, benchmark::Counter::kIsIterationInvariantRate,
                                                      benchmark::Counter::kIs1000);
}

/// All cores read 512 MB that no cache holds.
void read_bandwidth(benchmark::State& state) {
  using V = bm::simd::pack<float>;
  std::vector<float> const x(std::size_t{1} << 27, 1.0f);
  std::int64_t const n = static_cast<std::int64_t>(x.size()), block = 1 << 16;
  std::vector<float> partial(static_cast<std::size_t>(n / block));
  for (auto _ : state) {
    bm::cpu::parallel_for(0, n / block, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t b = begin; b < end; ++b) {
        V sum[4] = {0, 0, 0, 0};
        float const* p = x.data() + b * block;
        for (std::int64_t i = 0; i < block; i += 4 * V::lanes)
          for (int j = 0; j < 4; ++j) sum[j] += V::load(p + i + j * V::lanes);
        partial[static_cast<std::size_t>(b)] = bm::simd::sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
      }
    });
    benchmark::DoNotOptimize(partial.data());
  }
  state.counters["bytes"] = benchmark::Counter(
      4.0 * static_cast<double>(n), benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
}

}  // namespace

BENCHMARK(read_bandwidth)->UseRealTime()->Unit(benchmark::kMillisecond)->MinTime(2);
BENCHMARK(decode_step)->UseRealTime()->Unit(benchmark::kMillisecond)->MinTime(3);

BENCHMARK_MAIN();
