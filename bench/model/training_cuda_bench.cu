/// A training step on a CUDA device: BlackMamba of about 100M active parameters (the quickstart's large model), weights
/// and activations in bfloat16. Time of whole steps as a program sees them: tokens in, loss out. Model FLOPs count 6
/// for each parameter that multiplies a token; utilisation is their rate over that of an 8192^3 bfloat16 product by
/// cuBLAS in the same run.
///
/// With the argument `eager`, one step runs kernel by kernel and nothing is timed: for a profiler.
#include "support/quickstart_model.hpp"

#include <blackmamba/blackmamba.hpp>

#include <benchmark/benchmark.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

namespace bm = blackmamba;

namespace {

using network_type = bm::network<bm::blackmamba_model<quickstart_large>, bm::device::cuda, bm::bfloat16>;

bm::token_batch random_tokens(std::int64_t batch, std::int64_t length) {
  bm::token_batch tokens(batch, length + 1);
  bm::philox const random(1);
  for (std::int64_t i = 0; i < tokens.size(); ++i)
    tokens.data()[i] = static_cast<std::int32_t>(random.bits(static_cast<std::uint64_t>(i)) % quickstart_large::vocab);
  return tokens;
}

void square_product(benchmark::State& state) {
  constexpr std::int64_t n = 8192;
  bm::device::cuda policy;
  bm::arena<bm::space::device> workspace(std::size_t{64} << 20);
  policy.workspace = &workspace;
  bm::tensor<bm::space::host, bm::bfloat16, bm::dyn> host(n * n);
  bm::philox const random(2);
  for (std::int64_t i = 0; i < n * n; ++i)
    host.data()[i] = bm::bfloat16(random.uniform(static_cast<std::uint64_t>(i), -1.0f, 1.0f));
  bm::tensor<bm::space::device, bm::bfloat16, bm::dyn, bm::dyn> x(n, n), weight(n, n), y(n, n);
  bm::memory::upload(policy, host.as_view(), x.as_view());
  bm::memory::upload(policy, host.as_view(), weight.as_view());
  auto const product = [&] { bm::linear::forward(policy, {.x = x, .weight = weight}, y.as_view()); };
  for (int i = 0; i < 3; ++i) product();
  for (auto _ : state) {
    for (int i = 0; i < 10; ++i) product();
    bm::cuda::check("bench", cudaDeviceSynchronize());
  }
  state.counters["flops"] = benchmark::Counter(20.0 * n * n * n, benchmark::Counter::kIsIterationInvariantRate);
}

void training_step(benchmark::State& state) {
  std::int64_t const batch = quickstart_large::batch, length = quickstart_large::length;
  network_type net(1);
  bm::trainer train(net, {.batch = batch, .length = length});
  auto const tokens = random_tokens(batch, length);
  double loss = 0;
  for (int i = 0; i < 3; ++i) loss = train.step(tokens).loss;
  for (auto _ : state) loss = train.step(tokens).loss;
  if (!std::isfinite(loss)) state.SkipWithError("the loss is not finite");
  double const parameters = static_cast<double>(bm::count_parameters<network_type::arch>().active);
  double const per_step = static_cast<double>(batch * length);
  state.counters["model_flops"] =
      benchmark::Counter(6 * parameters * per_step, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["tokens"] = benchmark::Counter(per_step, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["peak_device_bytes"] = static_cast<double>(bm::cuda::device_memory().peak);
  state.counters["workspace_bytes"] = static_cast<double>(train.workspace_bytes());
}

BENCHMARK(square_product)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(training_step)->UseRealTime()->Unit(benchmark::kMillisecond)->MinTime(3);

int one_step() {
  network_type net(1);
  bm::trainer train(net, {.batch = quickstart_large::batch, .length = quickstart_large::length});
  double const loss = train.step(random_tokens(quickstart_large::batch, quickstart_large::length)).loss;
  std::printf("loss %.4f\n", loss);
  return std::isfinite(loss) ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "eager") == 0) return one_step();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
