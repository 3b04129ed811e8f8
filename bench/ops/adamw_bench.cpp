/// One step of AdamW and the gradient's norm as a share of a plain copy in this program. Bytes: a step reads four
/// arrays and writes three (and the copy, where there is one); the norm reads one.
#include <blackmamba/ops/adamw/adamw.hpp>

#include "support/bandwidth.hpp"

using namespace blackmamba;

namespace {

/// Arguments: parameters, threads.
struct problem {
  std::int64_t n;
  device::cpu policy;
  tensor<space::host, float, dyn> parameter, gradient, first_moment, second_moment, norm;

  explicit problem(benchmark::State const& state)
      : n(state.range(0)),
        policy{.threads = static_cast<int>(state.range(1))},
        parameter(zeros<float>(policy, n)),
        gradient(zeros<float>(policy, n)),
        first_moment(zeros<float>(policy, n)),
        second_moment(zeros<float>(policy, n)),
        norm(zeros<float>(policy, 1)) {
    for (std::int64_t i = 0; i < n; ++i) gradient(i) = static_cast<float>(i % 101) * 0.001f - 0.05f;
    adamw::norm(policy, gradient, norm.as_view());
  }
  template <class F>
  void measure(benchmark::State& state, double bytes_each, F&& f) const {
    double const bytes = bytes_each * static_cast<double>(n);
    // A copy that moves as many bytes lives in the same level of the memory hierarchy.
    double const floor = bench::stream_rate(1, static_cast<std::int64_t>(bytes / 8), cpu::thread_count(policy.threads));
    bench::measure(state, bytes, "of_copy", floor, f);
  }
  template <class T>
  void step(view<space::host, T, dyn> copy) const {
    adamw::segment<device::cpu, T> const all{.parameter = parameter,
                                             .gradient = gradient,
                                             .first_moment = first_moment,
                                             .second_moment = second_moment,
                                             .copy = copy};
    adamw::segment<device::cpu, T> parts[] = {all.slice(0, n - n / 100), all.slice(n - n / 100, n / 100)};
    parts[0].weight_decay = 0.1;
    adamw::step<device::cpu, T>(policy, parts, norm, {.learning_rate = 1e-3, .step = 10, .max_norm = 1.0});
  }
};

void step(benchmark::State& state) {
  problem const p(state);
  p.measure(state, 28, [&] { p.step<float>({}); });
}
void step_with_bfloat16_copy(benchmark::State& state) {
  problem const p(state);
  auto const copy = zeros<bfloat16>(p.policy, p.n);
  p.measure(state, 30, [&] { p.step<bfloat16>(copy); });
}
void norm(benchmark::State& state) {
  problem const p(state);
  p.measure(state, 4, [&] { adamw::norm(p.policy, p.gradient, p.norm.as_view()); });
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"parameters", "threads"})->UseRealTime()->Unit(benchmark::kMillisecond);
  for (int threads : {1, 0}) b->Args({1 << 22, threads})->Args({1 << 18, threads});
}
BENCHMARK(step)->Apply(shapes);
BENCHMARK(step_with_bfloat16_copy)->Apply(shapes);
BENCHMARK(norm)->Apply(shapes);

}  // namespace

BENCHMARK_MAIN();
