/// The selective scan on CUDA: forward, backward and step with everything on (z, D, delta bias, softplus, logarithm of
/// A), N = 16 unless the name says otherwise.
///
/// Floors: forward takes 20 operations of the special function unit for each channel and step (16 decays, two each for
/// softplus and gate), of which a multiprocessor does 16 a clock; and reads u, delta, z, B, C once and writes y once.
/// `of_floor` is against the larger of both, `of_exp` and `of_copy` against each. Backward's figures are against two
/// times forward's operations (states are computed again) and its own bytes. A step's bytes are the state, read and
/// written, and its inputs. Results are checked against the definition in double on a few channels before timing.
#include <blackmamba/ops/selective_scan/selective_scan.hpp>

#include "support/cuda_timing.cuh"

#include <cmath>
#include <string>
#include <vector>

using namespace blackmamba;
using bench::device_tensor;
using bench::random_tensor;

namespace {

double exp_rate() {
  int khz = 0, device = 0;
  bench::check(cudaGetDevice(&device));
  bench::check(cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, device));
  return 16.0 * cuda::properties().multiprocessors * khz * 1e3;
}

template <class T, int N>
struct problem {
  using A = accum_t<T>;
  std::int64_t B, L, D;
  std::vector<std::int64_t> offsets;
  device_tensor<T, dyn, dyn, dyn> u, delta, z, y, projections;
  device_tensor<A, dyn, dyn> rates;
  device_tensor<A, dyn> skip, bias;
  device_tensor<std::int64_t, dyn> cu_seqlens;

  problem(int seed, std::int64_t batch, std::int64_t length, std::int64_t channels,
          std::vector<std::int64_t> packed = {})
      : B(batch),
        L(length),
        D(channels),
        offsets(std::move(packed)),
        u(random_tensor<T>(seed, B, L, D)),
        delta(random_tensor<T>(seed + 1, B, L, D)),
        z(random_tensor<T>(seed + 2, -3.0f, 3.0f, B, L, D)),
        y(bench::poisoned_tensor<T>(B, L, D)),
        projections(random_tensor<T>(seed + 3, B, L, 2 * N)),
        rates(random_tensor<A>(seed + 4, 0.0f, 2.77f, D, N)),
        skip(random_tensor<A>(seed + 5, 0.5f, 1.5f, D)),
        bias(random_tensor<A>(seed + 6, -6.9f, -2.3f, D)) {
    if (offsets.empty()) return;
    cu_seqlens = device_tensor<std::int64_t, dyn>(static_cast<std::int64_t>(offsets.size()));
    bench::check(cudaMemcpy(cu_seqlens.data(), offsets.data(), 8 * offsets.size(), cudaMemcpyHostToDevice));
  }
  std::int64_t sequences() const { return offsets.empty() ? B : static_cast<std::int64_t>(offsets.size()) - 1; }
  double channel_steps() const { return static_cast<double>(B * L * D); }
  double bytes(int tensors) const {
    return sizeof(T) * (channel_steps() * tensors + static_cast<double>(B * L * 2 * N));
  }
  selective_scan::inputs<device::cuda, T, N> inputs() const {
    return {.u = u,
            .delta = delta,
            .A = rates,
            .B = projections.columns(0, N),
            .C = projections.columns(N, N),
            .D = skip,
            .z = z,
            .delta_bias = bias,
            .cu_seqlens = cu_seqlens,
            .delta_softplus = true,
            .A_is_log = true};
  }
};

/// Columns [first, first + count) of row b of a (B, L, D) tensor, as doubles.
template <class X>
std::vector<double> columns(X const& x, std::int64_t b, std::int64_t first, std::int64_t count) {
  using T = typename std::remove_cvref_t<decltype(x.as_view())>::value_type;
  std::int64_t const rows = x.extent(1);
  tensor<space::host, T, dyn> const host(rows * count);
  bench::check(cudaStreamSynchronize(bench::stream()));
  bench::check(cudaMemcpy2D(host.data(), sizeof(T) * static_cast<std::size_t>(count),
                            x.data() + b * x.stride(0) + first, sizeof(T) * static_cast<std::size_t>(x.stride(1)),
                            sizeof(T) * static_cast<std::size_t>(count), static_cast<std::size_t>(rows),
                            cudaMemcpyDeviceToHost));
  std::vector<double> v(static_cast<std::size_t>(rows * count));
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<double>(widen(host.data()[i]));
  return v;
}

/// The last `count` channels of the last row against the definition.
template <class T, int N>
bool right(benchmark::State& state, problem<T, N> const& p) {
  std::int64_t const count = std::min<std::int64_t>(p.D, 3), b = p.B - 1, first = p.D - count;
  auto const u = columns(p.u, b, first, count), delta = columns(p.delta, b, first, count),
             z = columns(p.z, b, first, count), y = columns(p.y, b, first, count),
             bc = columns(p.projections, b, 0, 2 * N);
  auto const rates = bench::on_host(p.rates.as_view()), skip = bench::on_host(p.skip.as_view()),
             bias = bench::on_host(p.bias.as_view());
  tensor<space::host, float, dyn> const expected(p.L * count), actual(p.L * count);
  for (std::int64_t c = 0; c < count; ++c) {
    double h[N] = {};
    std::size_t sequence = 0;
    for (std::int64_t t = 0; t < p.L; ++t) {
      while (!p.offsets.empty() && sequence < p.offsets.size() && p.offsets[sequence] == t) {
        ++sequence;
        for (double& x : h) x = 0;
      }
      auto const at = static_cast<std::size_t>(t * count + c);
      double const raw = delta[at] + static_cast<double>(bias.data()[first + c]);
      double const dt = std::max(raw, 0.0) + std::log1p(std::exp(-std::abs(raw)));
      double sum = static_cast<double>(skip.data()[first + c]) * u[at];
      for (int n = 0; n < N; ++n) {
        double const rate = -std::exp(static_cast<double>(rates.data()[(first + c) * N + n]));
        h[n] = std::exp(dt * rate) * h[n] + dt * u[at] * bc[static_cast<std::size_t>(t * 2 * N + n)];
        sum += bc[static_cast<std::size_t>(t * 2 * N + N + n)] * h[n];
      }
      expected.data()[at] = static_cast<float>(sum * z[at] / (1 + std::exp(-z[at])));
      actual.data()[at] = static_cast<float>(y[at]);
    }
  }
  return bench::agrees(state, "y", actual, expected, sizeof(T) == 2 ? 5e-3 : 2e-5);
}

std::vector<std::int64_t> offsets_of(std::int64_t sequences) {
  std::vector<std::int64_t> offsets{0};
  for (std::int64_t s = 0; s < sequences; ++s) offsets.push_back(offsets.back() + 32 + s * 7919 % 481);
  return offsets;
}

template <class T, int N>
void forward_of(benchmark::State& state, std::int64_t B, std::int64_t D, std::int64_t L,
                std::vector<std::int64_t> offsets = {}) {
  double const bytes = sizeof(T) * (4.0 * static_cast<double>(B * L * D) + static_cast<double>(B * L * 2 * N));
  auto const sets = bench::rotated(bytes, [&](int i) { return problem<T, N>(10 * i, B, L, D, offsets); });
  auto const call = [](device::cuda const& policy, problem<T, N> const& p) {
    selective_scan::forward<N>(policy, p.inputs(), p.y.as_view());
  };
  call(device::cuda{.stream = bench::stream()}, sets.back());
  if (!right(state, sets.back())) return;
  double const steps = sets[0].channel_steps();
  double const seconds = bench::measure(
      state, {.bytes = bytes, .operations = (N + 4) * steps, .operations_per_second = exp_rate()}, sets, call);
  state.counters["of_exp"] = (N + 4) * steps / exp_rate() / seconds;
}

template <class T, int N>
void forward(benchmark::State& state) {
  forward_of<T, N>(state, state.range(0), state.range(1), state.range(2));
}
void forward_packed(benchmark::State& state) {
  auto const offsets = offsets_of(64);
  forward_of<bfloat16, 16>(state, 1, 2944, offsets.back(), offsets);
}

/// Checkpoints, and the gradients of everything; forward's checkpoints are made before.
template <class T, int N>
void backward(benchmark::State& state) {
  using A = accum_t<T>;
  std::int64_t const B = state.range(0), D = state.range(1), L = state.range(2);
  struct set {
    problem<T, N> p;
    device_tensor<A, dyn> checkpoints;
    device_tensor<T, dyn, dyn, dyn> d_y, d_u, d_delta, d_z, d_projections;
    device_tensor<A, dyn, dyn> d_A;
    device_tensor<A, dyn> d_D, d_bias;
  };
  double const steps = static_cast<double>(B * L * D);
  double const bytes = sizeof(T) * (7 * steps + 4.0 * static_cast<double>(B * L * N));
  auto const sets = bench::rotated(bytes, [&](int i) {
    set s{problem<T, N>(10 * i, B, L, D),
          bench::poisoned_tensor<A>(selective_scan::checkpoint_size<N>(B, L, D, B)),
          random_tensor<T>(10 * i + 7, B, L, D),
          bench::poisoned_tensor<T>(B, L, D),
          bench::poisoned_tensor<T>(B, L, D),
          bench::poisoned_tensor<T>(B, L, D),
          bench::poisoned_tensor<T>(B, L, 2 * N),
          random_tensor<A>(1, D, N),
          random_tensor<A>(2, D),
          random_tensor<A>(3, D)};
    selective_scan::forward<N>(device::cuda{.stream = bench::stream()}, s.p.inputs(), s.p.y.as_view(),
                               {.checkpoints = s.checkpoints});
    return s;
  });
  auto const call = [](device::cuda const& policy, set const& s) {
    auto const in = s.p.inputs();
    selective_scan::backward<N, device::cuda, T>(policy,
                                                 {.u = in.u,
                                                  .delta = in.delta,
                                                  .A = in.A,
                                                  .B = in.B,
                                                  .C = in.C,
                                                  .D = in.D,
                                                  .z = in.z,
                                                  .delta_bias = in.delta_bias,
                                                  .delta_softplus = true,
                                                  .A_is_log = true,
                                                  .checkpoints = s.checkpoints,
                                                  .d_y = s.d_y},
                                                 {.d_u = s.d_u,
                                                  .d_delta = s.d_delta,
                                                  .d_A = s.d_A,
                                                  .d_B = s.d_projections.columns(0, N),
                                                  .d_C = s.d_projections.columns(N, N),
                                                  .d_D = s.d_D,
                                                  .d_z = s.d_z,
                                                  .d_delta_bias = s.d_bias});
  };
  double const seconds =
      bench::measure(state, {.bytes = bytes, .operations = 2 * (N + 4) * steps, .operations_per_second = exp_rate()},
                     sets, call, std::size_t{2} << 30);
  state.counters["of_exp"] = 2 * (N + 4) * steps / exp_rate() / seconds;
}

/// Every other row of a pool, last one first.
device_tensor<std::int32_t, dyn> slots_of(std::int64_t count) {
  bench::host_tensor<std::int32_t, dyn> host(count);
  for (std::int64_t b = 0; b < count; ++b) host(b) = static_cast<std::int32_t>(2 * (count - 1 - b));
  device_tensor<std::int32_t, dyn> slots(count);
  memory::upload(device::cuda{.stream = bench::stream()}, host.as_view(), slots.as_view());
  return slots;
}

/// A token of each sequence; their states side by side, or in slots.
template <class T, int N, class State, bool Slots>
void step(benchmark::State& state) {
  using A = accum_t<T>;
  std::int64_t const B = state.range(0), D = state.range(1);
  struct set {
    device_tensor<T, dyn, dyn> u, delta, z, y, projections;
    device_tensor<A, dyn, dyn> rates;
    device_tensor<A, dyn> skip, bias;
    device_tensor<State, dyn, dyn, dyn> state;
    device_tensor<std::int32_t, dyn> slots;
  };
  double const bytes = 2.0 * sizeof(State) * static_cast<double>(B * D * N) +
                       sizeof(T) * 4.0 * static_cast<double>(B * D) + sizeof(A) * static_cast<double>(D * N);
  auto const sets = bench::rotated(bytes, [&](int i) {
    return set{random_tensor<T>(i, B, D),
               random_tensor<T>(i + 1, B, D),
               random_tensor<T>(i + 2, B, D),
               bench::poisoned_tensor<T>(B, D),
               random_tensor<T>(i + 3, B, 2 * N),
               random_tensor<A>(i + 4, 0.0f, 2.77f, D, N),
               random_tensor<A>(i + 5, D),
               random_tensor<A>(i + 6, D),
               random_tensor<State>(i + 7, Slots ? 2 * B : B, D, N),
               slots_of(B)};
  });
  bench::measure(state, {.bytes = bytes}, sets, [](device::cuda const& policy, set const& s) {
    selective_scan::step_inputs<device::cuda, T, N> in{.u = s.u,
                                                       .delta = s.delta,
                                                       .A = s.rates,
                                                       .B = s.projections.columns(0, N),
                                                       .C = s.projections.columns(N, N),
                                                       .D = s.skip,
                                                       .z = s.z,
                                                       .delta_bias = s.bias,
                                                       .delta_softplus = true,
                                                       .A_is_log = true};
    if (Slots) in.slots = s.slots;
    selective_scan::step<N, State>(policy, in, s.state.as_view(), s.y.as_view());
  });
}

/// Some tokens of each sequence, and the state after each of them.
template <class T, int N>
void steps(benchmark::State& state) {
  using A = accum_t<T>;
  std::int64_t const B = state.range(0), D = state.range(1), L = state.range(2);
  struct set {
    device_tensor<T, dyn, dyn, dyn> u, delta, z, y, projections;
    device_tensor<A, dyn, dyn> rates;
    device_tensor<A, dyn> skip, bias;
    device_tensor<A, dyn, dyn, dyn> state;
    device_tensor<std::int32_t, dyn> rows;
  };
  double const tokens = static_cast<double>(B * L * D);
  double const bytes = sizeof(A) * (tokens + static_cast<double>(B * D)) * N + sizeof(T) * 4.0 * tokens +
                       sizeof(A) * static_cast<double>(D * N);
  auto const sets = bench::rotated(bytes, [&](int i) {
    return set{random_tensor<T>(i, B, L, D),
               random_tensor<T>(i + 1, B, L, D),
               random_tensor<T>(i + 2, B, L, D),
               bench::poisoned_tensor<T>(B, L, D),
               random_tensor<T>(i + 3, B, L, 2 * N),
               random_tensor<A>(i + 4, 0.0f, 2.77f, D, N),
               random_tensor<A>(i + 5, D),
               random_tensor<A>(i + 6, D),
               random_tensor<A>(i + 7, 2 * B * (L + 1), D, N),
               slots_of(B * (L + 1))};
  });
  bench::measure(state, {.bytes = bytes}, sets, [&](device::cuda const& policy, set const& s) {
    selective_scan::steps<N>(policy,
                             {.u = s.u,
                              .delta = s.delta,
                              .A = s.rates,
                              .B = s.projections.columns(0, N),
                              .C = s.projections.columns(N, N),
                              .D = s.skip,
                              .z = s.z,
                              .delta_bias = s.bias,
                              .delta_softplus = true,
                              .A_is_log = true,
                              .slots = s.rows.slice(0, B),
                              .kept_slots = s.rows.slice(B, B * L).reshape(B, L)},
                             s.state.as_view(), s.y.as_view());
  });
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "D", "L"});
  for (std::vector<std::int64_t> const& s : std::vector<std::vector<std::int64_t>>{{8, 2944, 2048},
                                                                                   {8, 1536, 16384},
                                                                                   {1, 2944, 2048},
                                                                                   {1, 2944, 8192},
                                                                                   {1, 2944, 65536},
                                                                                   {64, 2944, 512},
                                                                                   {8, 2944, 3000},
                                                                                   {64, 2944, 100},
                                                                                   {1, 64, 1048576},
                                                                                   {1, 1536, 1000}})
    b->Args(s);
  bench::manual(b);
}
void middle(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "D", "L"})->Args({8, 2944, 2048})->Args({1, 2944, 2048});
  bench::manual(b);
}
void batches(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "D"});
  for (std::int64_t n : {1, 8, 64, 256, 1024}) b->Args({n, 2944});
  bench::manual(b);
}

void drafts(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "D", "L"})->Args({1, 2944, 4})->Args({256, 2944, 4})->Args({256, 2944, 8});
  bench::manual(b);
}

BENCHMARK(forward<bfloat16, 16>)->Apply(shapes);
BENCHMARK(forward_packed)->Apply(bench::manual);
BENCHMARK(backward<bfloat16, 16>)->Apply(shapes);
BENCHMARK(step<bfloat16, 16, float, false>)->Apply(batches);
BENCHMARK(step<bfloat16, 16, float, true>)->Apply(batches);
BENCHMARK(step<bfloat16, 16, bfloat16, true>)->Apply(batches);
BENCHMARK(steps<bfloat16, 16>)->Apply(drafts);
BENCHMARK(forward<float, 16>)->Apply(middle);
BENCHMARK(backward<float, 16>)->Apply(middle);
BENCHMARK(forward<bfloat16, 8>)->Apply(middle);
BENCHMARK(forward<bfloat16, 32>)->Apply(middle);
BENCHMARK(forward<bfloat16, 64>)->Apply(middle);
BENCHMARK(forward<bfloat16, 128>)->Apply(middle);

}  // namespace

int main(int argc, char** argv) { return bench::run(argc, argv); }
