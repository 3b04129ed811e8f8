/// The convolution on CUDA as a share of the device's copy: bytes are those of x, y and their gradients, each once.
/// x is half of a wider tensor, as in a Mamba layer; four taps, bias, SiLU.
#include <blackmamba/ops/causal_conv1d/causal_conv1d.hpp>

#include "support/cuda_timing.cuh"

using namespace blackmamba;

namespace {

template <class T>
struct problem {
  std::int64_t B, L, D;
  bench::device_tensor<T, dyn, dyn, dyn> xz, y, d_y, d_xz;
  bench::device_tensor<accum_t<T>, dyn, dyn> weight, d_weight;
  bench::device_tensor<accum_t<T>, dyn> bias, d_bias;
  bench::device_tensor<std::int64_t, dyn> offsets;

  problem(int seed, std::int64_t batch, std::int64_t length, std::int64_t channels, bool gradients)
      : B(batch),
        L(length),
        D(channels),
        xz(bench::random_tensor<T>(seed, B, L, 2 * D)),
        weight(bench::random_tensor<accum_t<T>>(seed + 1, D, 4)),
        bias(bench::random_tensor<accum_t<T>>(seed + 2, D)) {
    if (gradients) {
      d_y = bench::random_tensor<T>(seed + 3, B, L, D);
      d_xz = bench::poisoned_tensor<T>(B, L, 2 * D);
      d_weight = bench::random_tensor<accum_t<T>>(seed + 4, 0.0f, 0.0f, D, 4);
      d_bias = bench::random_tensor<accum_t<T>>(seed + 5, 0.0f, 0.0f, D);
    } else {
      y = bench::poisoned_tensor<T>(B, L, D);
    }
  }
  void forward(device::cuda const& policy) const {
    causal_conv1d::inputs<device::cuda, T> in{.x = xz.columns(0, D), .weight = weight, .bias = bias, .silu = true};
    if (offsets.size() > 0) in.cu_seqlens = offsets;
    causal_conv1d::forward(policy, in, y.as_view());
  }
  void backward(device::cuda const& policy) const {
    causal_conv1d::gradient_inputs<device::cuda, T> in{
        .x = xz.columns(0, D), .weight = weight, .bias = bias, .silu = true, .d_y = d_y};
    if (offsets.size() > 0) in.cu_seqlens = offsets;
    causal_conv1d::backward<device::cuda, T>(policy, in,
                                             {.d_x = d_xz.columns(0, D), .d_weight = d_weight, .d_bias = d_bias});
  }
  double bytes(int tensors) const { return static_cast<double>(tensors) * sizeof(T) * static_cast<double>(B * L * D); }
};

template <class T>
constexpr double roundoff = sizeof(T) == 2 ? 0x1p-8 : 1e-6;

/// The first sequence's rows against the CPU's.
template <class T>
bool correct(benchmark::State& state, problem<T> const& p, bool backward) {
  device::cpu const cpu;
  device::cuda const policy{.stream = bench::stream()};
  auto const x = bench::on_host(p.xz.as_view(), 0, 1);
  auto const weight = bench::on_host(p.weight.as_view());
  auto const bias = bench::on_host(p.bias.as_view());
  auto const half = x.as_view().reshape(std::int64_t{1}, p.L, 2 * p.D).columns(0, p.D);
  auto const taps = weight.as_view().reshape(p.D, std::int64_t{4});
  auto const host_y = zeros<T>(cpu, 1, p.L, p.D);
  if (!backward) {
    p.forward(policy);
    causal_conv1d::forward(cpu, {.x = half, .weight = taps, .bias = bias, .silu = true}, host_y.as_view());
    return bench::agrees(state, "y", bench::on_host(p.y.as_view(), 0, 1), host_y, roundoff<T>);
  }
  p.backward(policy);
  auto const d_y = bench::on_host(p.d_y.as_view(), 0, 1);
  auto const d_weight = zeros<accum_t<T>>(cpu, p.D, 4);
  causal_conv1d::backward<device::cpu, T>(
      cpu,
      {.x = half, .weight = taps, .bias = bias, .silu = true, .d_y = d_y.as_view().reshape(std::int64_t{1}, p.L, p.D)},
      {.d_x = host_y, .d_weight = d_weight});
  auto const device_d_x = bench::on_host(p.d_xz.as_view(), 0, 1);
  bench::host_tensor<T, dyn> d_x(p.L * p.D);
  for (std::int64_t t = 0; t < p.L; ++t)
    for (std::int64_t c = 0; c < p.D; ++c) d_x(t * p.D + c) = device_d_x(t * 2 * p.D + c);
  if (!bench::agrees(state, "d_x", d_x, host_y, roundoff<T>)) return false;
  return p.B > 1 || bench::agrees(state, "d_weight", bench::on_host(p.d_weight.as_view()), d_weight, 1e-5);
}

template <class T>
void forward(benchmark::State& state) {
  std::int64_t const B = state.range(0), L = state.range(1), D = state.range(2);
  double const bytes = 2.0 * sizeof(T) * static_cast<double>(B * L * D);
  auto const sets = bench::rotated(bytes, [&](int i) { return problem<T>(10 * i, B, L, D, false); });
  if (!correct(state, sets[0], false)) return;
  bench::measure(state, {.bytes = bytes}, sets,
                 [](device::cuda const& policy, problem<T> const& p) { p.forward(policy); });
}
template <class T>
void backward(benchmark::State& state) {
  std::int64_t const B = state.range(0), L = state.range(1), D = state.range(2);
  double const bytes = 3.0 * sizeof(T) * static_cast<double>(B * L * D);
  auto const sets = bench::rotated(bytes, [&](int i) { return problem<T>(10 * i, B, L, D, true); });
  if (!correct(state, sets[0], true)) return;
  bench::measure(state, {.bytes = bytes}, sets,
                 [](device::cuda const& policy, problem<T> const& p) { p.backward(policy); });
}
/// Packed: sequences of 32 to 512 steps, 64 of them.
void packed(benchmark::State& state) {
  std::int64_t const D = 2944, count = 64;
  bench::host_tensor<std::int64_t, dyn> offsets(count + 1);
  offsets(0) = 0;
  for (std::int64_t s = 0; s < count; ++s) offsets(s + 1) = offsets(s) + 32 + (s * 7919) % 481;
  std::int64_t const L = offsets(count);
  bool const backward = state.range(0) != 0;
  double const bytes = (backward ? 3.0 : 2.0) * 2.0 * static_cast<double>(L * D);
  auto const sets = bench::rotated(bytes, [&](int i) {
    problem<bfloat16> p(10 * i, 1, L, D, backward);
    p.offsets = bench::device_tensor<std::int64_t, dyn>(count + 1);
    memory::upload(device::cuda{.stream = bench::stream()}, offsets.as_view(), p.offsets.as_view());
    return p;
  });
  bench::measure(state, {.bytes = bytes}, sets, [&](device::cuda const& policy, problem<bfloat16> const& p) {
    backward ? p.backward(policy) : p.forward(policy);
  });
}

struct token {
  bench::device_tensor<bfloat16, dyn, dyn> x, y;
  bench::device_tensor<bfloat16, dyn, dyn, dyn> state;
  bench::device_tensor<float, dyn, dyn> weight;
  bench::device_tensor<float, dyn> bias;
  bench::device_tensor<std::int32_t, dyn> slots;
};
/// A token of each sequence; their states side by side, or in every other row of a pool.
template <bool Slots>
void step(benchmark::State& state) {
  std::int64_t const B = state.range(0), D = state.range(1);
  double const bytes = 8.0 * 2.0 * static_cast<double>(B * D) + 20.0 * static_cast<double>(D);  // and the taps
  auto const sets = bench::rotated(bytes, [&](int i) {
    bench::host_tensor<std::int32_t, dyn> slots(B);
    for (std::int64_t b = 0; b < B; ++b) slots(b) = static_cast<std::int32_t>(2 * (B - 1 - b));
    token t{bench::random_tensor<bfloat16>(10 * i, B, D),
            bench::poisoned_tensor<bfloat16>(B, D),
            bench::random_tensor<bfloat16>(10 * i + 1, Slots ? 2 * B : B, 3, D),
            bench::random_tensor<float>(10 * i + 2, D, 4),
            bench::random_tensor<float>(10 * i + 3, D),
            bench::device_tensor<std::int32_t, dyn>(B)};
    memory::upload(device::cuda{.stream = bench::stream()}, slots.as_view(), t.slots.as_view());
    return t;
  });
  bench::measure(state, {.bytes = bytes}, sets, [](device::cuda const& policy, token const& p) {
    causal_conv1d::step_inputs<device::cuda, bfloat16> in{.x = p.x, .weight = p.weight, .bias = p.bias, .silu = true};
    if (Slots) in.slots = p.slots;
    causal_conv1d::step(policy, in, p.state.as_view(), p.y.as_view());
  });
}

void shapes(benchmark::internal::Benchmark* b) {
  bench::manual(b);
  b->ArgNames({"B", "L", "D"})->Args({8, 2048, 2944})->Args({1, 2048, 2944})->Args({1, 8192, 2944});
  b->Args({8, 16384, 1536});
}
BENCHMARK(forward<bfloat16>)->Apply(shapes);
BENCHMARK(forward<float>)->Apply(bench::manual)->ArgNames({"B", "L", "D"})->Args({8, 2048, 2944});
BENCHMARK(backward<bfloat16>)->Apply(shapes);
BENCHMARK(backward<float>)->Apply(bench::manual)->ArgNames({"B", "L", "D"})->Args({8, 2048, 2944});
BENCHMARK(packed)->Apply(bench::manual)->ArgNames({"backward"})->Arg(0)->Arg(1);
void batches(benchmark::internal::Benchmark* b) {
  bench::manual(b);
  b->ArgNames({"B", "D"})->Args({1, 2944})->Args({64, 2944})->Args({256, 2944})->Args({1024, 2944});
}
BENCHMARK(step<false>)->Apply(batches);
BENCHMARK(step<true>)->Apply(batches);

}  // namespace

int main(int argc, char** argv) { return bench::run(argc, argv); }
