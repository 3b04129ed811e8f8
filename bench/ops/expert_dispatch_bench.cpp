/// Expert dispatch on the CPU, in bytes that have to move, beside a plain copy in memory on as many threads.
///
/// Counters: bytes_per_second; of_copy, that rate over the copy's (best of several, measured just before; what fits a
/// cache may be above 1). A plan reads an expert and writes a row and a source for each slot; permute and its
/// gradient read and write each row once; combine reads k rows for each token and writes one; its gradient reads rows
/// and d_y and writes d_rows.
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/random.hpp>
#include <blackmamba/core/tensor.hpp>
#include <blackmamba/ops/expert_dispatch/expert_dispatch.hpp>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>

using namespace blackmamba;

namespace {

constexpr std::int64_t experts = 8;

/// Bytes (read and written) per second of a copy that is far larger than every cache.
double copy_rate(int threads) {
  std::int64_t const n = std::int64_t{1} << 27;
  double const moved = 2.0 * static_cast<double>(n);
  tensor<space::host, char, dyn> from(n), to(n);
  std::memset(from.data(), 1, static_cast<std::size_t>(n));
  double best = 0;
  for (int i = 0; i < 8; ++i) {
    auto const start = std::chrono::steady_clock::now();
    cpu::parallel_for(threads, n, 1 << 18, [&](std::int64_t begin, std::int64_t end) {
      std::memcpy(to.data() + begin, from.data() + begin, static_cast<std::size_t>(end - begin));
    });
    benchmark::ClobberMemory();
    best = std::max(best, moved / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

/// Arguments: threads, tokens, k, width.
struct problem {
  std::int64_t tokens, k, width;
  tensor<space::host, std::int32_t, dyn, dyn> expert;
  tensor<space::host, std::int64_t, dyn> offsets;
  tensor<space::host, std::int32_t, dyn> source, row;
  arena<space::host> workspace;
  device::cpu policy;

  explicit problem(benchmark::State const& state)
      : tokens(state.range(1)),
        k(state.range(2)),
        width(state.range(3)),
        expert(tokens, k),
        offsets(experts + 1),
        source(tokens * k),
        row(tokens * k),
        workspace(expert_dispatch::scratch_bytes(tokens * k, experts)),
        policy{.threads = static_cast<int>(state.range(0)), .workspace = &workspace} {
    philox const random(1);
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t a = 0; a < k; ++a)  // k different experts
        expert(t, a) = static_cast<std::int32_t>((random.bits(static_cast<std::uint64_t>(t)) + a) % experts);
    expert_dispatch::plan(policy, expert, plan());
  }
  expert_dispatch::routing<device::cpu> plan() const { return {.offsets = offsets, .source = source, .row = row}; }

  template <class T>
  auto matrix(std::int64_t rows) const {
    auto m = zeros<T>(policy, rows, width);
    for (std::int64_t i = 0; i < m.size(); ++i) m.data()[i] = convert<T>(static_cast<float>(i % 100) / 100);
    return m;
  }
  template <class A>
  auto gate() const {
    tensor<space::host, A, dyn, dyn> g(tokens, k);
    std::fill_n(g.data(), g.size(), A(0.5));
    return g;
  }
  template <class Body>
  void run(benchmark::State& state, double moved, Body&& body) {
    double const copy = copy_rate(policy.threads);
    auto const start = std::chrono::steady_clock::now();
    for (auto _ : state) {
      body();
      benchmark::ClobberMemory();
    }
    auto const total = moved * static_cast<double>(state.iterations());
    state.counters["bytes_per_second"] =
        benchmark::Counter(total, benchmark::Counter::kIsRate, benchmark::Counter::kIs1024);
    state.counters["of_copy"] =
        total / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / copy;
  }
  template <class T>
  double bytes(std::int64_t rows) const {
    return static_cast<double>(rows * width) * sizeof(T);
  }
};

void plan(benchmark::State& state) {
  problem p(state);
  p.run(state, 12.0 * static_cast<double>(p.tokens * p.k),
        [&] { expert_dispatch::plan(p.policy, p.expert, p.plan()); });
}
template <class T>
void permute(benchmark::State& state) {
  problem p(state);
  auto const x = p.matrix<T>(p.tokens);
  auto rows = p.matrix<T>(p.tokens * p.k);
  p.run(state, 2 * p.bytes<T>(p.tokens * p.k),
        [&] { expert_dispatch::permute(p.policy, p.plan(), x, rows.as_view()); });
}
template <class T>
void combine(benchmark::State& state) {
  problem p(state);
  auto const rows = p.matrix<T>(p.tokens * p.k);
  auto const gate = p.gate<accum_t<T>>();
  auto y = p.matrix<T>(p.tokens);
  p.run(state, p.bytes<T>(p.tokens * (p.k + 1)),
        [&] { expert_dispatch::combine(p.policy, p.plan(), rows, gate, y.as_view()); });
}
template <class T>
void permute_backward(benchmark::State& state) {
  problem p(state);
  auto const rows = p.matrix<T>(p.tokens * p.k);
  auto d_x = p.matrix<T>(p.tokens);
  p.run(state, p.bytes<T>(p.tokens * (p.k + 1)),
        [&] { expert_dispatch::permute_backward(p.policy, p.plan(), rows, d_x.as_view()); });
}
template <class T>
void combine_backward(benchmark::State& state) {
  problem p(state);
  auto const rows = p.matrix<T>(p.tokens * p.k), d_y = p.matrix<T>(p.tokens);
  auto const gate = p.gate<accum_t<T>>();
  auto d_rows = p.matrix<T>(p.tokens * p.k);
  auto d_gate = p.gate<accum_t<T>>();
  p.run(state, p.bytes<T>(p.tokens * (2 * p.k + 1)), [&] {
    expert_dispatch::combine_backward<device::cpu, T>(p.policy, p.plan(), {.rows = rows, .gate = gate, .d_y = d_y},
                                                      {.d_rows = d_rows, .d_gate = d_gate});
  });
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"threads", "tokens", "k", "width"})->Unit(benchmark::kMicrosecond)->UseRealTime();
  for (std::int64_t threads : {1, 0})
    b->Args({threads, 2048, 1, 128})->Args({threads, 65536, 1, 1472})->Args({threads, 32768, 2, 1152});
}
void plans(benchmark::internal::Benchmark* b) {
  b->ArgNames({"threads", "tokens", "k", "width"})->Unit(benchmark::kMicrosecond)->UseRealTime();
  for (std::int64_t threads : {1, 0})
    b->Args({threads, 2048, 1, 0})->Args({threads, 65536, 1, 0})->Args({threads, 1 << 24, 1, 0});
}

BENCHMARK(plan)->Apply(plans);
BENCHMARK(permute<float>)->Apply(shapes);
BENCHMARK(permute<bfloat16>)->Apply(shapes);
BENCHMARK(combine<float>)->Apply(shapes);
BENCHMARK(combine<bfloat16>)->Apply(shapes);
BENCHMARK(permute_backward<float>)->Apply(shapes);
BENCHMARK(combine_backward<float>)->Apply(shapes);
BENCHMARK(combine_backward<bfloat16>)->Apply(shapes);

}  // namespace

BENCHMARK_MAIN();
