/// Gated activations as a share of a plain copy in this program: bytes are those of the operands and results, each
/// once. identity multiplies and nothing else: what the others lose to it is the price of their function.
#include <blackmamba/ops/gated_activation/gated_activation.hpp>

#include "support/bandwidth.hpp"

using namespace blackmamba;

namespace {

/// Arguments: rows, width, threads.
template <class T>
struct problem {
  device::cpu policy;
  tensor<space::host, T, dyn, dyn> projection, y;  // gate and up side by side

  explicit problem(benchmark::State const& state)
      : policy{.threads = static_cast<int>(state.range(2))},
        projection(zeros<T>(policy, state.range(0), 2 * state.range(1))),
        y(zeros<T>(policy, state.range(0), state.range(1))) {
    for (std::int64_t i = 0; i < projection.size(); ++i)
      projection.data()[i] = convert<T>(static_cast<float>(i % 101) * 0.1f - 5.0f);
  }
  auto gate() const { return projection.columns(0, y.extent(1)); }
  auto up() const { return projection.columns(y.extent(1), y.extent(1)); }
  template <class F>
  void measure(benchmark::State& state, double arrays, F&& f) const {
    double const bytes = arrays * sizeof(T) * static_cast<double>(y.size());
    // A copy that moves as many bytes lives in the same level of the memory hierarchy.
    double const floor = bench::stream_rate(1, static_cast<std::int64_t>(bytes / 8), cpu::thread_count(policy.threads));
    bench::measure(state, bytes, "of_copy", floor, f);
  }
};

template <class Activation, class T>
void forward(benchmark::State& state) {
  problem<T> const p(state);
  p.measure(state, 3, [&] { gated_activation::forward<Activation>(p.policy, p.gate(), p.up(), p.y.as_view()); });
}
template <class Activation, class T>
void backward(benchmark::State& state) {
  problem<T> const p(state);
  auto const d = zeros<T>(p.policy, p.y.extent(0), 2 * p.y.extent(1));
  auto const d_gate = d.columns(0, p.y.extent(1)), d_up = d.columns(p.y.extent(1), p.y.extent(1));
  p.measure(state, 5, [&] {
    gated_activation::backward<Activation, device::cpu, T>(p.policy, {.gate = p.gate(), .up = p.up(), .d_y = p.y},
                                                           {.d_gate = d_gate, .d_up = d_up});
  });
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "width", "threads"})->UseRealTime()->Unit(benchmark::kMillisecond);
  for (int threads : {1, 0}) b->Args({1024, 3072, threads})->Args({256, 688, threads});
}
BENCHMARK(forward<activation::identity, float>)->Apply(shapes);
BENCHMARK(forward<activation::silu, float>)->Apply(shapes);
BENCHMARK(forward<activation::gelu, float>)->Apply(shapes);
BENCHMARK(forward<activation::silu, bfloat16>)->Apply(shapes);
BENCHMARK(backward<activation::silu, float>)->Apply(shapes);
BENCHMARK(backward<activation::gelu, float>)->Apply(shapes);
BENCHMARK(backward<activation::gelu, bfloat16>)->Apply(shapes);

}  // namespace

BENCHMARK_MAIN();
