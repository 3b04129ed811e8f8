/// Dense products on CUDA. Decoding: the floor is to read the weights, which are rotated past the caches. A router: the
/// floor is to read the rows, or to read and write their gradients.
#include <blackmamba/ops/linear/linear.hpp>

#include "support/cuda_timing.cuh"

using namespace blackmamba;

namespace {

using T = bfloat16;

template <class Y>
struct problem {
  std::int64_t rows, width, outputs;
  bench::device_tensor<T, dyn, dyn> x, weight, d_x;
  bench::device_tensor<Y, dyn, dyn> y;
  bench::device_tensor<float, dyn, dyn> d_weight;
  bench::device_tensor<float, dyn> d_bias;

  problem(int seed, std::int64_t r, std::int64_t i, std::int64_t o)
      : rows(r),
        width(i),
        outputs(o),
        x(bench::random_tensor<T>(seed, rows, width)),
        weight(bench::random_tensor<T>(seed + 1, outputs, width)),
        y(bench::random_tensor<Y>(seed + 2, rows, outputs)) {}
  void add_gradients(int seed) {
    d_x = bench::random_tensor<T>(seed, rows, width);
    d_weight = bench::random_tensor<float>(seed + 1, outputs, width);
    d_bias = bench::random_tensor<float>(seed + 2, outputs);
  }
  void forward(device::cuda const& policy) const {
    linear::forward<device::cuda, Y, T>(policy, {.x = x, .weight = weight}, y.as_view());
  }
  void backward(device::cuda const& policy, linear::gradients<device::cuda, T> const& d) const {
    linear::backward<device::cuda, T, Y>(policy, {.x = x, .weight = weight, .d_y = y}, d);
  }
};

/// The last row against a sum in double.
template <class Y>
bool correct(benchmark::State& state, problem<Y> const& p) {
  p.forward({.stream = bench::stream()});
  auto const x = bench::on_host(p.x.as_view(), p.rows - 1, 1);
  auto const y = bench::on_host(p.y.as_view(), p.rows - 1, 1);
  auto const weight = bench::on_host(p.weight.as_view());
  bench::host_tensor<float, dyn> expected(p.outputs);
  for (std::int64_t o = 0; o < p.outputs; ++o) {
    double sum = 0;
    for (std::int64_t i = 0; i < p.width; ++i)
      sum += static_cast<double>(widen(x(i))) * static_cast<double>(widen(weight(o * p.width + i)));
    expected(o) = static_cast<float>(sum);
  }
  return bench::agrees(state, "y", y, expected, 0x1p-8);
}

void decode(benchmark::State& state) {
  std::int64_t const rows = state.range(0), width = state.range(1), outputs = state.range(2);
  double const bytes = 2.0 * static_cast<double>(width * outputs);
  auto const sets = bench::rotated(bytes, [&](int i) { return problem<T>(10 * i, rows, width, outputs); });
  if (!correct(state, sets.front())) return;
  bench::measure(state, {.bytes = bytes}, sets,
                 [](device::cuda const& policy, problem<T> const& p) { p.forward(policy); });
}

enum class pass { forward, d_x, d_weight, d_bias };

void router(benchmark::State& state, pass what) {
  std::int64_t const rows = state.range(0), width = state.range(1), outputs = state.range(2);
  double const row_bytes = 2.0 * static_cast<double>(rows * width);
  double const logit_bytes = 4.0 * static_cast<double>(rows * outputs);
  double const bytes = (what == pass::d_x ? 2 : what == pass::d_bias ? 0 : 1) * row_bytes + logit_bytes;
  auto const sets = bench::rotated(bytes, [&](int i) {
    problem<float> p(10 * i, rows, width, outputs);
    p.add_gradients(10 * i + 5);
    return p;
  });
  if (!correct(state, sets.front())) return;
  bench::measure(state, {.bytes = bytes}, sets, [&](device::cuda const& policy, problem<float> const& p) {
    switch (what) {
      case pass::forward:
        return p.forward(policy);
      case pass::d_x:
        return p.backward(policy, {.d_x = p.d_x, .d_x_update = update::accumulate});
      case pass::d_weight:
        return p.backward(policy, {.d_weight = p.d_weight});
      case pass::d_bias:
        return p.backward(policy, {.d_bias = p.d_bias});
    }
  });
}

void decode_sizes(benchmark::internal::Benchmark* b) {
  bench::manual(b);
  b->ArgNames({"rows", "width", "outputs"});
  for (std::int64_t rows : {1, 4, 8, 16, 64})
    b->Args({rows, 1472, 5888})->Args({rows, 2944, 1472})->Args({rows, 2944, 128})->Args({rows, 1472, 50304});
}
void router_sizes(benchmark::internal::Benchmark* b) {
  bench::manual(b);
  b->ArgNames({"rows", "width", "outputs"});
  for (std::int64_t rows : {16384, 65536}) b->Args({rows, 1472, 8})->Args({rows, 1472, 64});
}

}  // namespace

BENCHMARK(decode)->Apply(decode_sizes);
BENCHMARK_CAPTURE(router, forward, pass::forward)->Apply(router_sizes);
BENCHMARK_CAPTURE(router, d_x, pass::d_x)->Apply(router_sizes);
BENCHMARK_CAPTURE(router, d_weight, pass::d_weight)->Apply(router_sizes);
BENCHMARK_CAPTURE(router, d_bias, pass::d_bias)->Apply(router_sizes);

int main(int argc, char** argv) { return bench::run(argc, argv); }
