/// The convolution as a share of a copy: bytes are those of x, y and their gradients, each once; the floor is a copy
/// over arrays as long, with as many threads, in this program. x is half of a wider tensor, as in a Mamba layer.
/// Results are checked before they are timed.
#include <blackmamba/core/random.hpp>
#include <blackmamba/ops/causal_conv1d/causal_conv1d.hpp>

#include "support/bandwidth.hpp"

#include <cmath>
#include <cstdlib>
#include <vector>

using namespace blackmamba;

namespace {

template <class T, class... Ints>
auto filled(std::uint64_t seed, Ints... extents) {
  tensor<space::host, T, (static_cast<void>(extents), dyn)...> t(extents...);
  philox const random(seed);
  for (std::int64_t i = 0; i < t.size(); ++i)
    t.data()[i] = convert<T>(random.normal(static_cast<std::uint64_t>(i % 65536)));
  return t;
}

template <class T>
struct problem {
  std::int64_t B, L, D;
  device::cpu policy;
  tensor<space::host, T, dyn, dyn, dyn> xz, y, d_y, d_xz;
  tensor<space::host, accum_t<T>, dyn, dyn> weight, d_weight;
  tensor<space::host, accum_t<T>, dyn> bias, d_bias;
  double copy_rate;

  explicit problem(benchmark::State const& state)
      : B(state.range(0)),
        L(state.range(1)),
        D(state.range(2)),
        policy{.threads = cpu::thread_count(static_cast<int>(state.range(4)))},
        xz(filled<T>(1, B, L, 2 * D)),
        y(filled<T>(2, B, L, D)),
        d_y(filled<T>(3, B, L, D)),
        d_xz(filled<T>(4, B, L, 2 * D)),
        weight(filled<accum_t<T>>(5, D, 4)),
        d_weight(filled<accum_t<T>>(6, D, 4)),
        bias(filled<accum_t<T>>(7, D)),
        d_bias(filled<accum_t<T>>(8, D)),
        copy_rate(bench::stream_rate(1, std::max<std::int64_t>(B * L * D, 1 << 24), policy.threads)) {}
  double bytes(int tensors) const { return static_cast<double>(tensors) * sizeof(T) * static_cast<double>(B * L * D); }
};

/// Stops the program where `actual` is not `expected` to the precision of T.
template <class T>
void expect_close(char const* what, double actual, double expected, double size) {
  double const tolerance = (sizeof(T) == 4 ? 1e-5 : 2e-2) * (size + 1);
  if (std::abs(actual - expected) <= tolerance) return;
  std::fprintf(stderr, "%s: got %g, expected %g\n", what, actual, expected);
  std::exit(EXIT_FAILURE);
}

/// The definition in double, for one channel of the first sequence.
template <class T>
struct channel {
  std::vector<double> y, d_x;
  double d_weight[4] = {}, d_bias = 0;

  channel(problem<T> const& p, std::int64_t c, bool silu)
      : y(static_cast<std::size_t>(p.L)), d_x(static_cast<std::size_t>(p.L)) {
    for (std::int64_t b = 0; b < p.B; ++b)
      for (std::int64_t t = 0; t < p.L; ++t) {
        auto const x = [&](int k) { return t + k < 3 ? 0.0 : static_cast<double>(widen(p.xz(b, t + k - 3, c))); };
        double sum = static_cast<double>(p.bias(c));
        for (int k = 0; k < 4; ++k) sum += static_cast<double>(p.weight(c, k)) * x(k);
        double const s = 1 / (1 + std::exp(-sum));
        double const slope = silu ? s * (1 + sum * (1 - s)) : 1.0;
        double const d_sum = static_cast<double>(widen(p.d_y(b, t, c))) * slope;
        if (b == 0) y[static_cast<std::size_t>(t)] = silu ? sum * s : sum;
        for (int k = 0; k < 4; ++k) {
          d_weight[k] += d_sum * x(k);
          if (b == 0 && t + k >= 3)
            d_x[static_cast<std::size_t>(t + k - 3)] += d_sum * static_cast<double>(p.weight(c, k));
        }
        d_bias += d_sum;
      }
  }
};

template <class T>
void forward(benchmark::State& state) {
  problem<T> p(state);
  causal_conv1d::forward(
      p.policy, {.x = p.xz.columns(0, p.D), .weight = p.weight, .bias = p.bias, .silu = state.range(3) != 0}, p.y);
  for (std::int64_t c : {std::int64_t{0}, p.D / 2, p.D - 1}) {
    channel<T> const expected(p, c, state.range(3) != 0);
    for (std::int64_t t = 0; t < p.L; ++t) {
      double const y = expected.y[static_cast<std::size_t>(t)];
      expect_close<T>("y", static_cast<double>(widen(p.y(0, t, c))), y, std::abs(y));
    }
  }
  bench::measure(state, p.bytes(2), "of_copy", p.copy_rate, [&] {
    causal_conv1d::forward(
        p.policy, {.x = p.xz.columns(0, p.D), .weight = p.weight, .bias = p.bias, .silu = state.range(3) != 0}, p.y);
  });
}
template <class T>
void backward(benchmark::State& state) {
  problem<T> p(state);
  auto const run = [&] {
    causal_conv1d::backward<device::cpu, T>(
        p.policy,
        {.x = p.xz.columns(0, p.D), .weight = p.weight, .bias = p.bias, .silu = state.range(3) != 0, .d_y = p.d_y},
        {.d_x = p.d_xz.columns(0, p.D), .d_weight = p.d_weight, .d_bias = p.d_bias});
  };
  std::fill_n(p.d_weight.data(), p.d_weight.size(), 0.0f);
  std::fill_n(p.d_bias.data(), p.d_bias.size(), 0.0f);
  run();
  for (std::int64_t c : {std::int64_t{0}, p.D / 2, p.D - 1}) {
    channel<T> const expected(p, c, state.range(3) != 0);
    for (std::int64_t t = 0; t < p.L; ++t) {
      double const d_x = expected.d_x[static_cast<std::size_t>(t)];
      expect_close<T>("d_x", static_cast<double>(widen(p.d_xz(0, t, c))), d_x, std::abs(d_x));
    }
    double const size = std::sqrt(static_cast<double>(p.B * p.L));  // of a sum of as many terms of either sign
    for (int k = 0; k < 4; ++k)
      expect_close<float>("d_weight", static_cast<double>(p.d_weight(c, k)), expected.d_weight[k], 10 * size);
    expect_close<float>("d_bias", static_cast<double>(p.d_bias(c)), expected.d_bias, 10 * size);
  }
  bench::measure(state, p.bytes(3), "of_copy", p.copy_rate, run);
}
template <class T>
void step(benchmark::State& state) {
  problem<T> p(state);
  auto history = filled<T>(9, p.B, 3, p.D);
  auto const x = filled<T>(10, p.B, p.D);
  auto y = filled<T>(11, p.B, p.D);
  bench::measure(state, p.bytes(8), "of_copy", p.copy_rate, [&] {  // state read and written, x, y
    causal_conv1d::step(p.policy, {.x = x, .weight = p.weight, .bias = p.bias, .silu = true}, history, y);
  });
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "L", "D", "silu", "threads"});
  for (int threads : {0, 1})
    for (int silu : {1, 0}) b->Args({4, 2048, 1536, silu, threads});
  b->Args({1, 256, 512, 1, 1})->UseRealTime();
}
BENCHMARK(forward<float>)->Apply(shapes);
BENCHMARK(forward<bfloat16>)->Apply(shapes);
BENCHMARK(backward<float>)->Apply(shapes);
BENCHMARK(backward<bfloat16>)->Apply(shapes);
BENCHMARK(step<float>)->ArgNames({"B", "L", "D", "silu", "threads"})->Args({64, 1, 1536, 1, 1})->UseRealTime();

}  // namespace

BENCHMARK_MAIN();
