/// A training step of the quickstart's model against Eigen's product at that model's largest size, on the same cores in
/// the same run. Model FLOPs count 6 for each parameter that multiplies a token (2 forward, 4 backward), the
/// embedding's look-up excluded and the output layer included; recurrence, norms, routing and the optimizer are
/// overhead.
#include "support/quickstart_model.hpp"

#include <blackmamba/blackmamba.hpp>
#include <blackmamba/core/cpu/parallel_for.hpp>

#include <Eigen/Core>
#include <benchmark/benchmark.h>

#include <cmath>
#include <vector>

namespace bm = blackmamba;

namespace {

constexpr std::int64_t batch = quickstart_batch, length = quickstart_length;

void training_step(benchmark::State& state) {
  using network_type = bm::network<bm::blackmamba_model<quickstart_config>, bm::device::cpu>;
  network_type net(1);
  bm::trainer train(net, {.batch = batch, .length = length});
  bm::token_batch tokens(batch, length + 1);
  bm::philox const random(1);
  for (std::int64_t i = 0; i < tokens.size(); ++i)
    tokens.data()[i] = static_cast<std::int32_t>(random.bits(static_cast<std::uint64_t>(i)) % quickstart_config::vocab);
  double loss = 0;
  for (auto _ : state) loss = train.step(tokens).loss;
  if (!std::isfinite(loss)) state.SkipWithError("the loss is not finite");
  double const parameters = static_cast<double>(bm::count_parameters<network_type::arch>().active);
  double const tokens_per_step = static_cast<double>(batch * length);
  state.counters["model_flops"] =
      benchmark::Counter(6 * parameters * tokens_per_step, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["tokens"] = benchmark::Counter(tokens_per_step, benchmark::Counter::kIsIterationInvariantRate);
}

/// tokens x d_ff product of an expert's first layer with all of the batch's tokens: the model's largest. Every core
/// computes its share of the rows with a plain Eigen product.
void eigen_largest_product(benchmark::State& state) {
  using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  std::int64_t const rows = batch * length, k = quickstart_config::d_model;
  std::int64_t const columns = std::max(2 * quickstart_config::d_ff, 4 * quickstart_config::d_model);
  matrix const a = matrix::Random(rows, k), b = matrix::Random(columns, k);
  matrix c(rows, columns);
  int const cores = bm::cpu::thread_count(0);
  std::int64_t const share = (rows + cores - 1) / cores;
  for (auto _ : state) {
    bm::cpu::parallel_for(0, rows, share, [&](std::int64_t begin, std::int64_t end) {
      c.middleRows(begin, end - begin).noalias() = a.middleRows(begin, end - begin) * b.transpose();
    });
    benchmark::DoNotOptimize(c.data());
    benchmark::ClobberMemory();
  }
  state.counters["flops"] = benchmark::Counter(2.0 * static_cast<double>(rows * columns * k),
                                               benchmark::Counter::kIsIterationInvariantRate);
}

}  // namespace

BENCHMARK(eigen_largest_product)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(training_step)->UseRealTime()->Unit(benchmark::kMillisecond)->MinTime(4);

BENCHMARK_MAIN();
