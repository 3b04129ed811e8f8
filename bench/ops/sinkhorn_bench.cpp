/// Sinkhorn on the CPU, beside the published loop written plainly, on the same logits: normal with the given spread,
/// plus a bias for each expert with the same spread.
///
/// Counters: passes and error (max_j |E c_j - 1|) as reached; per_pass: time for one sweep over the rows, setup
/// included; peak_load: slots of the busiest expert over the mean, routed with the result. The published loop as
/// published stops by its own rule, whatever the error; until_error goes on, without its epsilon, until the error is
/// what the operator was asked for.
#include <blackmamba/core/random.hpp>
#include <blackmamba/core/tensor.hpp>
#include <blackmamba/ops/router/router.hpp>
#include <blackmamba/ops/sinkhorn/sinkhorn.hpp>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

using namespace blackmamba;

namespace {

using matrix = tensor<space::host, float, dyn, dyn>;

/// Arguments: threads, tokens, experts, spread, reciprocal of the tolerance.
struct problem {
  std::int64_t threads, tokens, experts;
  double spread, tolerance;
  matrix logits;
  tensor<space::host, float, dyn> offset;
  tensor<space::host, sinkhorn::report, dyn> report;
  arena<space::host> workspace;
  device::cpu policy;

  explicit problem(benchmark::State const& state)
      : threads(state.range(0)),
        tokens(state.range(1)),
        experts(state.range(2)),
        spread(static_cast<double>(state.range(3))),
        tolerance(1 / static_cast<double>(state.range(4))),
        logits(tokens, experts),
        offset(experts),
        report(1),
        workspace(sinkhorn::scratch_bytes<float>(tokens, experts) + router::scratch_bytes(tokens)),
        policy{.threads = static_cast<int>(threads), .workspace = &workspace} {
    fill(1);
    reset();
  }
  /// Logits of step `step`: they drift by a hundredth of their spread from one step to the next.
  void fill(int step) {
    philox const normal(1, 1), bias(1, 2), drift(1, static_cast<std::uint64_t>(2 + step));
    for (std::int64_t i = 0; i < logits.size(); ++i) {
      auto const at = static_cast<std::uint64_t>(i);
      auto const expert = static_cast<std::uint64_t>(i % experts);
      double const drifted = drift.normal(at) + drift.normal(expert + (1u << 30));
      double const x = normal.normal(at) + bias.normal(expert) + 0.01 * drifted;
      logits.data()[i] = static_cast<float>(spread * x);
    }
  }
  void reset() { std::fill_n(offset.data(), experts, 0.0f); }
  double peak_load() {
    tensor<space::host, std::int32_t, dyn, dyn> expert(tokens, 1);
    matrix gate(tokens, 1);
    router::forward(policy, {.logits = logits, .offset = offset}, {.expert = expert, .gate = gate});
    std::vector<double> load(static_cast<std::size_t>(experts));
    for (std::int64_t i = 0; i < tokens; ++i) load[static_cast<std::size_t>(expert(i, 0))] += 1;
    return *std::max_element(load.begin(), load.end()) * static_cast<double>(experts) / static_cast<double>(tokens);
  }
  void tell(benchmark::State& state, double passes, double error) {
    state.counters["passes"] = passes;
    state.counters["error"] = error;
    state.counters["peak_load"] = peak_load();
    state.counters["per_pass"] = benchmark::Counter((passes + 1) * static_cast<double>(state.iterations()),
                                                    benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
  }
};

void run(benchmark::State& state, sinkhorn::options how) {
  problem p(state);
  how.tolerance = p.tolerance;
  for (auto _ : state) {
    p.reset();
    sinkhorn::forward(p.policy, p.logits, p.offset.as_view(), p.report, how);
  }
  p.tell(state, p.report(0).passes, static_cast<double>(p.report(0).error));
}
void cold(benchmark::State& state) { run(state, {}); }
void cold_fixed_point(benchmark::State& state) { run(state, {.newton = false}); }
void warm(benchmark::State& state) {
  problem p(state);
  p.fill(2);
  sinkhorn::forward(p.policy, p.logits, p.offset.as_view(), p.report, {.tolerance = p.tolerance});
  std::vector<float> const previous(p.offset.data(), p.offset.data() + p.experts);
  p.fill(3);
  for (auto _ : state) {
    std::copy(previous.begin(), previous.end(), p.offset.data());
    sinkhorn::forward(p.policy, p.logits, p.offset.as_view(), p.report, {.tolerance = p.tolerance});
  }
  p.tell(state, p.report(0).passes, static_cast<double>(p.report(0).error));
}

/// The published loop in plain C++, one thread, float, K computed once. With `until` above zero, epsilon is left out
/// and the loop goes on until the marginal error of softmax(2 x + log d1) is that small.
int plain_loop(matrix const& x, std::vector<float>& d1, std::vector<float>& k, bool ones, double until, double& error) {
  auto const rows = static_cast<std::size_t>(x.extent(0)), experts = static_cast<std::size_t>(x.extent(1));
  float const epsilon = until > 0 ? 0.0f : 1e-8f;
  std::vector<float> column(experts), sum(experts);
  for (std::size_t i = 0; i < rows * experts; ++i) k[i] = std::exp(2.0f * x.data()[i]);
  for (std::size_t i = 0; i < rows; ++i)
    for (std::size_t j = 0; j < experts; ++j) sum[j] += k[i * experts + j];
  for (std::size_t j = 0; j < experts; ++j) d1[j] = ones ? 1.0f : 1.0f / (static_cast<float>(experts) * sum[j]);
  for (int pass = 0;; ++pass) {
    std::fill(column.begin(), column.end(), 0.0f);
    for (std::size_t i = 0; i < rows; ++i) {
      float row = 0;
      for (std::size_t j = 0; j < experts; ++j) row += k[i * experts + j] * d1[j];
      float const d0 = 1.0f / static_cast<float>(rows) / (row + epsilon);
      for (std::size_t j = 0; j < experts; ++j) column[j] += k[i * experts + j] * d0;
    }
    error = 0;
    for (std::size_t j = 0; j < experts; ++j)
      error = std::max(error, std::abs(static_cast<double>(experts) * static_cast<double>(column[j] * d1[j]) - 1));
    if (until > 0 && (error <= until || pass == 2000)) return pass;
    float moved = 0;
    for (std::size_t j = 0; j < experts; ++j) {
      float const next = 1.0f / static_cast<float>(experts) / (column[j] + epsilon);
      moved += std::abs(next - d1[j]) / static_cast<float>(experts);
      d1[j] = next;
    }
    if (until <= 0 && (moved <= 1e-4f || pass == 2000)) return pass + 1;
  }
}
void plain(benchmark::State& state, bool ones, bool to_tolerance) {
  problem p(state);
  std::vector<float> d1(static_cast<std::size_t>(p.experts)), k(static_cast<std::size_t>(p.logits.size()));
  int passes = 0;
  double error = 0;
  for (auto _ : state) {
    passes = plain_loop(p.logits, d1, k, ones, to_tolerance ? p.tolerance : 0, error);
    benchmark::DoNotOptimize(d1.data());
  }
  if (!to_tolerance) {  // the loop does not know its error: measure that of the result
    for (std::int64_t j = 0; j < p.experts; ++j) p.offset(j) = std::log(d1[static_cast<std::size_t>(j)]);
    sinkhorn::forward(p.policy, p.logits, p.offset.as_view(), p.report, {.max_passes = 0});
    error = static_cast<double>(p.report(0).error);
  }
  for (std::int64_t j = 0; j < p.experts; ++j) p.offset(j) = std::log(d1[static_cast<std::size_t>(j)]);
  p.tell(state, passes, error);
}
void published(benchmark::State& state) { plain(state, false, false); }
void published_ones(benchmark::State& state) { plain(state, true, false); }
void published_until_error(benchmark::State& state) { plain(state, false, true); }

void shapes(benchmark::internal::Benchmark* b, std::vector<std::int64_t> const& threads) {
  b->ArgNames({"threads", "T", "E", "spread", "1/tol"})->Unit(benchmark::kMicrosecond)->UseRealTime();
  for (auto n : threads)
    for (std::int64_t tokens : {2048, 65536, 1 << 20})
      for (std::int64_t spread : {1, 4}) b->Args({n, tokens, 8, spread, 1000});
  for (auto n : threads) {
    for (std::int64_t spread : {1, 4}) b->Args({n, 65536, 64, spread, 1000});
    b->Args({n, 65536, 8, 2, 100000});
  }
}
void both(benchmark::internal::Benchmark* b) { shapes(b, {1, 2}); }
void one(benchmark::internal::Benchmark* b) { shapes(b, {1}); }

}  // namespace

BENCHMARK(cold)->Apply(both);
BENCHMARK(cold_fixed_point)->Apply(one);
BENCHMARK(warm)->Apply(both);
BENCHMARK(published)->Apply(one);
BENCHMARK(published_ones)->Apply(one);
BENCHMARK(published_until_error)->Apply(one);

BENCHMARK_MAIN();
