/// Decoding one sequence with a dense Mamba of 24 layers, d_model 768, vocabulary 50280, float weights (the published
/// mamba-130m's dimensions): bytes of weights per second against what reading memory reaches, in turns.
#include <blackmamba/blackmamba.hpp>
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>

#include "support/bandwidth.hpp"

#include <benchmark/benchmark.h>

#include <cmath>
#include <vector>

namespace bm = blackmamba;

namespace {

struct mamba_130m {
  static constexpr int d_model = 768, layers = 24, d_state = 16, d_conv = 4, expand = 2, vocab = 50280;
};

/// All cores read 512 MB that no cache holds.
class memory_reader {
 public:
  memory_reader() : x_(std::size_t{1} << 27, 1.0f), partial_(x_.size() / block) {}

  double bytes() const { return 4.0 * static_cast<double>(x_.size()); }

  void read() {
    using V = bm::simd::pack<float>;
    bm::cpu::parallel_for(0, static_cast<std::int64_t>(partial_.size()), 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t b = begin; b < end; ++b) {
        V sum[4] = {0, 0, 0, 0};
        float const* p = x_.data() + b * block;
        for (std::int64_t i = 0; i < block; i += 4 * V::lanes)
          for (int j = 0; j < 4; ++j) sum[j] += V::load(p + i + j * V::lanes);
        partial_[static_cast<std::size_t>(b)] = bm::simd::sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
      }
    });
    benchmark::DoNotOptimize(partial_.data());
  }

 private:
  static constexpr std::int64_t block = 1 << 16;
  std::vector<float> x_, partial_;
};

/// Steps and readings in turns: what the machine's other users leave of its bandwidth changes within seconds.
void decode_step(benchmark::State& state) {
  using network_type = bm::network<bm::dense_mamba<mamba_130m>, bm::device::cpu>;
  network_type net(1);
  bm::generator from(net, {.prefill_chunk = 16});
  std::int32_t token = 17;
  from.step({&token, 1});
  memory_reader memory;
  memory.read();
  double step_seconds = 0, read_seconds = 0;
  for (auto _ : state) {
    double const s = bench::seconds([&] { from.step({&token, 1}); });
    state.SetIterationTime(s);
    step_seconds += s;
    read_seconds += bench::seconds([&] { memory.read(); });
  }
  for (float x : from.logits())
    if (!std::isfinite(x)) state.SkipWithError("a logit is not finite");
  double const steps = static_cast<double>(state.iterations());
  double const bytes = 4.0 * static_cast<double>(bm::count_parameters<network_type::arch>().total);
  double const rate = bytes * steps / step_seconds, read_rate = memory.bytes() * steps / read_seconds;
  state.counters["weight_GB_per_s"] = rate * 1e-9;
  state.counters["read_GB_per_s"] = read_rate * 1e-9;
  state.counters["of_read"] = rate / read_rate;
}

}  // namespace

BENCHMARK(decode_step)->UseManualTime()->Unit(benchmark::kMillisecond)->MinTime(3);

BENCHMARK_MAIN();
