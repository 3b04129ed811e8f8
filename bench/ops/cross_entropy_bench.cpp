/// Fused cross entropy as a share of a plain copy in this program. Bytes: the logits once forward, though a row is read
/// twice; read and written backward.
#include <blackmamba/ops/cross_entropy/cross_entropy.hpp>

#include "support/bandwidth.hpp"

using namespace blackmamba;

namespace {

/// Arguments: rows, classes, threads.
template <class T>
struct problem {
  using A = accum_t<T>;
  device::cpu policy;
  tensor<space::host, T, dyn, dyn> logits, d_logits;
  tensor<space::host, std::int32_t, dyn> target;
  tensor<space::host, A, dyn> loss, lse;

  explicit problem(benchmark::State const& state)
      : policy{.threads = static_cast<int>(state.range(2))},
        logits(zeros<T>(policy, state.range(0), state.range(1))),
        d_logits(zeros<T>(policy, state.range(0), state.range(1))),
        target(zeros<std::int32_t>(policy, state.range(0))),
        loss(zeros<A>(policy, 1)),
        lse(zeros<A>(policy, state.range(0))) {
    for (std::int64_t i = 0; i < logits.size(); ++i)
      logits.data()[i] = convert<T>(static_cast<float>(i % 101) * 0.1f - 5.0f);
    for (std::int64_t i = 0; i < target.size(); ++i) target(i) = static_cast<std::int32_t>(i * 7919 % logits.extent(1));
  }
  void run_forward() const {
    cross_entropy::forward<device::cpu, T>(policy, {.logits = logits, .target = target}, {.loss = loss, .lse = lse});
  }
  template <class F>
  void measure(benchmark::State& state, double passes, F&& f) const {
    double const bytes = passes * sizeof(T) * static_cast<double>(logits.size());
    // A copy that moves as many bytes lives in the same level of the memory hierarchy.
    double const floor = bench::stream_rate(1, static_cast<std::int64_t>(bytes / 8), cpu::thread_count(policy.threads));
    bench::measure(state, bytes, "of_copy", floor, f);
  }
};

template <class T>
void forward(benchmark::State& state) {
  problem<T> const p(state);
  p.measure(state, 1, [&] { p.run_forward(); });
}
template <class T>
void backward(benchmark::State& state) {
  problem<T> const p(state);
  p.run_forward();
  p.measure(state, 2, [&] {
    cross_entropy::backward(p.policy,
                            {.logits = p.logits, .target = p.target, .lse = p.lse, .scale = accum_t<T>(0.001f)},
                            p.d_logits.as_view());
  });
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "classes", "threads"})->UseRealTime()->Unit(benchmark::kMillisecond);
  for (int threads : {1, 0}) b->Args({192, 50304, threads})->Args({4096, 256, threads});
}
BENCHMARK(forward<float>)->Apply(shapes);
BENCHMARK(forward<bfloat16>)->Apply(shapes);
BENCHMARK(backward<float>)->Apply(shapes);
BENCHMARK(backward<bfloat16>)->Apply(shapes);

}  // namespace

BENCHMARK_MAIN();
