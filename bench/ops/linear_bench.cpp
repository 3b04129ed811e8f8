/// linear: the products of training as a share of Eigen's rate on one thread times the threads, measured in turns; the
/// products of decoding (few rows, weights beyond the cache) as a share of plain reading on the same threads.
#include "support/eigen_product.hpp"

#include <blackmamba/ops/linear/linear.hpp>

#include "support/bandwidth.hpp"

using namespace blackmamba;

namespace {

/// Arguments: rows, outputs, inputs, threads (0: all cores).
struct sizes {
  std::int64_t rows, outputs, width;
  device::cpu policy;

  explicit sizes(benchmark::State const& state)
      : rows(state.range(0)),
        outputs(state.range(1)),
        width(state.range(2)),
        policy{.threads = static_cast<int>(state.range(3))} {}
};

template <class T>
auto filled(std::int64_t rows, std::int64_t columns) {
  tensor<space::host, T, dyn, dyn> t(rows, columns);
  for (std::int64_t i = 0; i < t.size(); ++i) t.data()[i] = convert<T>(static_cast<float>(i % 101) * 0.02f - 1.0f);
  return t;
}

/// Runs f and Eigen's product in turns.
template <class F, class G>
void compare(benchmark::State& state, sizes const& s, F&& f, G&& eigen) {
  double best = 1e9, best_eigen = 1e9;
  for (auto _ : state) {
    best = std::min(best, bench::seconds(f));
    best_eigen = std::min(best_eigen, bench::seconds(eigen));
  }
  double const flops = 2e-9 * static_cast<double>(s.rows * s.outputs * s.width);
  state.counters["GFLOP_per_s"] = flops / best;
  state.counters["eigen_one_thread"] = flops / best_eigen;
  state.counters["of_eigen"] = best_eigen / best / cpu::thread_count(s.policy.threads);
}

template <class T>
void forward(benchmark::State& state) {
  sizes const s(state);
  auto const x = filled<T>(s.rows, s.width), weight = filled<T>(s.outputs, s.width);
  auto const bias = zeros<accum_t<T>>(s.policy, s.outputs);
  auto y = filled<T>(s.rows, s.outputs);
  bench::eigen_product eigen(s.rows, s.width, s.outputs);
  compare(
      state, s, [&] { linear::forward(s.policy, {.x = x, .weight = weight, .bias = bias}, y.as_view()); },
      [&] { eigen.forward(); });
}

template <class T, bool DX>
void backward(benchmark::State& state) {
  sizes const s(state);
  using A = accum_t<T>;
  auto const x = filled<T>(s.rows, s.width), weight = filled<T>(s.outputs, s.width);
  auto const d_y = filled<T>(s.rows, s.outputs);
  auto d_x = filled<T>(s.rows, s.width);
  auto d_weight = zeros<A>(s.policy, s.outputs, s.width);
  auto d_bias = zeros<A>(s.policy, s.outputs);
  arena<space::host> workspace(linear::scratch_bytes<T>(s.rows, s.width, s.outputs));
  auto policy = s.policy;
  policy.workspace = &workspace;
  bench::eigen_product eigen(s.rows, s.width, s.outputs);
  linear::gradients<device::cpu, T> const d =
      DX ? linear::gradients<device::cpu, T>{.d_x = d_x}
         : linear::gradients<device::cpu, T>{.d_weight = d_weight, .d_bias = d_bias};
  compare(
      state, s, [&] { linear::backward<device::cpu, T>(policy, {.x = x, .weight = weight, .d_y = d_y}, d); },
      [&] { DX ? eigen.d_x() : eigen.d_weight(); });
}

/// Sum over the weights' memory as floats: what reading alone costs.
float read(int threads, float const* x, std::int64_t n) {
  using V = simd::pack<float>;
  constexpr std::int64_t grain = 1 << 16;
  std::vector<float> sums(static_cast<std::size_t>(n / grain + 1));
  cpu::parallel_for(threads, n, grain, [&](std::int64_t begin, std::int64_t end) {
    V a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
    for (std::int64_t i = begin; i + 8 * V::lanes <= end; i += 8 * V::lanes) {
      a += V::load(x + i);
      b += V::load(x + i + V::lanes);
      c += V::load(x + i + 2 * V::lanes);
      d += V::load(x + i + 3 * V::lanes);
      e += V::load(x + i + 4 * V::lanes);
      f += V::load(x + i + 5 * V::lanes);
      g += V::load(x + i + 6 * V::lanes);
      h += V::load(x + i + 7 * V::lanes);
    }
    sums[static_cast<std::size_t>(begin / grain)] = simd::sum(((a + b) + (c + d)) + ((e + f) + (g + h)));
  });
  float total = 0;
  for (float s : sums) total += s;
  return total;
}

template <class T>
void decode(benchmark::State& state) {
  sizes const s(state);
  auto const x = filled<T>(s.rows, s.width), weight = filled<T>(s.outputs, s.width);
  tensor<space::host, accum_t<T>, dyn, dyn> y(s.rows, s.outputs);
  double const bytes = sizeof(T) * static_cast<double>(weight.size());
  tensor<space::host, float, dyn> plain(static_cast<std::int64_t>(bytes) / 4);
  std::fill_n(plain.data(), plain.size(), 1.0f);
  double best = 1e9, best_read = 1e9;
  for (auto _ : state) {
    best = std::min(best, bench::seconds([&] {
                      linear::forward<device::cpu, accum_t<T>, T>(s.policy, {.x = x, .weight = weight}, y);
                    }));
    best_read =
        std::min(best_read,
                 bench::seconds([&] { benchmark::DoNotOptimize(read(s.policy.threads, plain.data(), plain.size())); }));
  }
  state.counters["best_us"] = best * 1e6;
  state.counters["GB_per_s"] = bytes / best * 1e-9;
  state.counters["read_GB_per_s"] = bytes / best_read * 1e-9;
  state.counters["of_read"] = best_read / best;
}

/// The layers of a model with 160 channels (Mamba's four projections, attention's, the experts', the vocabulary) and a
/// large one.
void training_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "outputs", "inputs", "threads"})->Unit(benchmark::kMicrosecond)->UseRealTime();
  std::int64_t const shapes[][2] = {{640, 160}, {42, 320},  {320, 10},  {160, 320}, {768, 160},
                                    {160, 384}, {256, 160}, {432, 160}, {160, 432}};
  for (int threads : {1, 0})
    for (auto const& [outputs, width] : shapes) b->Args({2048, outputs, width, threads});
  for (int threads : {1, 0}) b->Args({512, 3872, 1472, threads});
}
void decoding_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "outputs", "inputs", "threads"})->Unit(benchmark::kMicrosecond)->UseRealTime();
  for (int threads : {1, 0})
    for (std::int64_t rows : {1, 2, 4, 8}) b->Args({rows, 50280, 768, threads});
  for (int threads : {1, 0}) b->Args({1, 240000, 160, threads});
}

}  // namespace

BENCHMARK(forward<float>)->Apply(training_shapes);
BENCHMARK(backward<float, true>)->Apply(training_shapes)->Name("d_x<float>");
BENCHMARK(backward<float, false>)->Apply(training_shapes)->Name("d_weight<float>");
BENCHMARK(forward<bfloat16>)->Args({2048, 640, 160, 1})->UseRealTime()->Unit(benchmark::kMicrosecond);
BENCHMARK(forward<half>)->Args({2048, 640, 160, 1})->UseRealTime()->Unit(benchmark::kMicrosecond);
BENCHMARK(decode<float>)->Apply(decoding_shapes);
BENCHMARK(decode<bfloat16>)->Apply(decoding_shapes);
BENCHMARK(decode<half>)->Apply(decoding_shapes);

BENCHMARK_MAIN();
