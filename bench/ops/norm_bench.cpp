/// rms_norm and layer_norm, with the fused residual add, as a share of a plain copy in this program: bytes are those of
/// the operands and results, each once.
#include <blackmamba/ops/layer_norm/layer_norm.hpp>
#include <blackmamba/ops/rms_norm/rms_norm.hpp>

#include "support/bandwidth.hpp"

using namespace blackmamba;

namespace {

/// Arguments: rows, width, threads.
template <class T>
struct problem {
  using A = accum_t<T>;
  std::int64_t rows, width;
  device::cpu policy;
  tensor<space::host, T, dyn, dyn> x, y;
  tensor<space::host, A, dyn, dyn> residual, sum, d_s;
  tensor<space::host, A, dyn> weight, bias, rstd, mean;

  explicit problem(benchmark::State const& state)
      : rows(state.range(0)),
        width(state.range(1)),
        policy{.threads = static_cast<int>(state.range(2))},
        x(zeros<T>(policy, rows, width)),
        y(zeros<T>(policy, rows, width)),
        residual(zeros<A>(policy, rows, width)),
        sum(zeros<A>(policy, rows, width)),
        d_s(zeros<A>(policy, rows, width)),
        weight(zeros<A>(policy, width)),
        bias(zeros<A>(policy, width)),
        rstd(zeros<A>(policy, rows)),
        mean(zeros<A>(policy, rows)) {
    for (std::int64_t i = 0; i < x.size(); ++i) x.data()[i] = convert<T>(static_cast<float>(i % 101) * 0.02f - 1.0f);
  }
  /// Times f, which reads or writes a tensor of T and one of A as often as said.
  template <class F>
  void measure(benchmark::State& state, double of_t, double of_a, F&& f) const {
    double const bytes = (of_t * sizeof(T) + of_a * sizeof(A)) * static_cast<double>(x.size());
    // A copy that moves as many bytes lives in the same level of the memory hierarchy.
    double const floor = bench::stream_rate(1, static_cast<std::int64_t>(bytes / 8), cpu::thread_count(policy.threads));
    bench::measure(state, bytes, "of_copy", floor, f);
  }
};

template <class T>
void rms_forward(benchmark::State& state) {
  problem<T> const p(state);
  p.measure(state, 2, 2, [&] {
    rms_norm::forward(p.policy, {.x = p.x, .weight = p.weight, .residual = p.residual}, p.y.as_view(),
                      {.sum = p.sum, .rstd = p.rstd});
  });
}
template <class T>
void layer_forward(benchmark::State& state) {
  problem<T> const p(state);
  p.measure(state, 2, 2, [&] {
    layer_norm::forward(p.policy, {.x = p.x, .weight = p.weight, .bias = p.bias, .residual = p.residual}, p.y.as_view(),
                        {.sum = p.sum, .rstd = p.rstd, .mean = p.mean});
  });
}
template <class T>
void rms_backward(benchmark::State& state) {
  problem<T> const p(state);
  p.measure(state, 1, 3, [&] {
    rms_norm::backward<device::cpu, T, accum_t<T>>(
        p.policy, {.sum = p.sum, .rstd = p.rstd, .weight = p.weight, .d_y = p.x, .d_residual = p.residual}, p.d_s,
        p.bias);
  });
}
template <class T>
void layer_backward(benchmark::State& state) {
  problem<T> const p(state);
  auto const d_weight = zeros<accum_t<T>>(p.policy, p.width);
  p.measure(state, 1, 3, [&] {
    layer_norm::backward<device::cpu, T, accum_t<T>>(
        p.policy,
        {.sum = p.sum, .rstd = p.rstd, .mean = p.mean, .weight = p.weight, .d_y = p.x, .d_residual = p.residual}, p.d_s,
        d_weight, p.bias);
  });
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "width", "threads"})->UseRealTime()->Unit(benchmark::kMillisecond);
  for (int threads : {1, 0}) b->Args({2048, 1472, threads})->Args({1024, 256, threads});
}
BENCHMARK(rms_forward<float>)->Apply(shapes);
BENCHMARK(layer_forward<float>)->Apply(shapes);
BENCHMARK(layer_forward<bfloat16>)->Apply(shapes);
BENCHMARK(rms_backward<float>)->Apply(shapes);
BENCHMARK(layer_backward<float>)->Apply(shapes);
BENCHMARK(layer_backward<bfloat16>)->Apply(shapes);

}  // namespace

BENCHMARK_MAIN();
