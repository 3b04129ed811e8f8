/// The selective scan on the CPU, beside the plain loop of its definition and beside the arithmetic that it can't do
/// without.
///
/// What one register of channels (16 floats with AVX-512) costs for each step of a sequence, in instructions of the
/// multiply pipes, of which current cores have two; everything else fits beside them on the other pipes:
///
///   forward   7 for each state: dt rate, three of the power of two (polynomial and factor of the table), dt u B, the
///             state, the output; 27 for each step: softplus 14, dt u and D u 2, silu 11 (its division counted as five)
///   backward  15 for each state: 8 to run the chunk again (forward's and d_C), 7 back (the gradient of the state, d_B,
///             dt u, the state before, and its three parts); 55 for each step: forward's, and two more sigmoids
///
/// `of_floor` is the time that these take at the rate of multiplications measured in this program, over the best time;
/// with N = 16, backward's floor is 2.1 times forward's. An element is one state of one channel at one step. GB_per_s
/// counts every tensor of (B, L, D) and (B, L, N) once. Times are the best of many runs; with one thread they are the
/// thread's own, which other programs on the machine disturb less.
#include <blackmamba/core/random.hpp>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>

#include "support/bandwidth.hpp"

#include <time.h>

#include <cmath>
#include <functional>
#include <vector>

using namespace blackmamba;

namespace {

template <class T, class... Ints>
auto random(std::uint64_t seed, float low, float high, Ints... extents) {
  tensor<space::host, T, (static_cast<void>(extents), dyn)...> t(extents...);
  for (std::int64_t i = 0; i < t.size(); ++i)
    t.data()[i] = convert<T>(philox(seed).uniform(static_cast<std::uint64_t>(i), low, high));
  return t;
}

/// Seconds that f takes: of this thread, where it does all the work, else of the clock on the wall.
template <class F>
double seconds(device::cpu const& policy, F&& f) {
  if (policy.threads != 1) return bench::seconds(f);
  auto const now = [] {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  };
  double const begin = now();
  f();
  return now() - begin;
}

/// Multiplications of registers of T that one thread can do in a second.
template <class T>
double multiply_rate() {
  using V = simd::pack<T>;
  static double rate = 0;
  std::int64_t const rounds = 20000;
  for (int run = 0; run < 50; ++run) {
    V chain[12];
    for (auto& c : chain) c = 1;
    V factor = T(0.999), term = T(0.001);
    benchmark::DoNotOptimize(factor);
    benchmark::DoNotOptimize(term);
    double const s = seconds(device::cpu{.threads = 1}, [&] {
      for (std::int64_t i = 0; i < rounds; ++i)
        for (auto& c : chain) c = fma(c, factor, term);
    });
    for (auto& c : chain) benchmark::DoNotOptimize(c);
    rate = std::max(rate, 12.0 * static_cast<double>(rounds) / s);
  }
  return rate;
}

/// Everything that a layer passes: all options. Arguments: threads, B, L, D, packed sequences (0: none).
template <class T, int N>
struct problem {
  using A = accum_t<T>;
  std::int64_t B, L, D, packed, sequences;
  device::cpu policy;
  tensor<space::host, T, dyn, dyn, dyn> u, delta, z, y;
  tensor<space::host, T, dyn, dyn, dyn> projections;  // B and C side by side
  tensor<space::host, A, dyn, dyn> A_log;
  tensor<space::host, A, dyn> skip, bias, checkpoints;
  tensor<space::host, std::int64_t, dyn> offsets;

  explicit problem(benchmark::State const& state)
      : B(state.range(1)),
        L(state.range(2)),
        D(state.range(3)),
        packed(state.range(4)),
        sequences(packed > 0 ? packed : B),
        policy{.threads = static_cast<int>(state.range(0))},
        u(random<T>(1, -1, 1, B, L, D)),
        delta(random<T>(2, -6, -1, B, L, D)),
        z(random<T>(3, -2, 2, B, L, D)),
        y(random<T>(0, 0, 1, B, L, D)),
        projections(random<T>(4, -1, 1, B, L, 2 * N)),
        A_log(random<A>(5, 0, 2.8f, D, N)),
        skip(random<A>(6, 0, 1, D)),
        bias(random<A>(7, 0, 1, D)),
        checkpoints(selective_scan::checkpoint_size<N>(B, L, D, sequences)),
        offsets(packed + 1) {
    for (std::int64_t s = 0; s <= packed; ++s) offsets(s) = packed > 0 ? L * s / packed : 0;
  }
  selective_scan::inputs<device::cpu, T, N> inputs() const {
    selective_scan::inputs<device::cpu, T, N> in{.u = u, .delta = delta, .A = A_log, .B = projections.columns(0, N),
                                                 .C = projections.columns(N, N), .D = skip, .z = z,
                                                 .delta_bias = bias, .delta_softplus = true, .A_is_log = true};
    if (packed > 0) in.cu_seqlens = offsets;
    return in;
  }
  void forward() const { selective_scan::forward<N>(policy, inputs(), y.as_view(), {.checkpoints = checkpoints}); }

  double elements() const { return static_cast<double>(B * L * D * N); }
  /// Tensors of (B, L, D) and of (B, L, N) that are read or written.
  double bytes(double of_channels, double of_states) const {
    return sizeof(T) * static_cast<double>(B * L) * (of_channels * static_cast<double>(D) + of_states * N);
  }
  /// Seconds that the multiply pipes of the threads need.
  double floor(double for_state, double for_step) const {
    double const registers = static_cast<double>(B * L * ((D + simd::width<A> - 1) / simd::width<A>));
    return registers * (for_state * N + for_step) / multiply_rate<A>() / cpu::thread_count(policy.threads);
  }
};

/// The definition, as one writes it down, on the same layout: every channel's states for one step after the other.
template <int N>
__attribute__((noinline)) void plain_forward(problem<float, N> const& p, float* y) {
  std::vector<float> A(static_cast<std::size_t>(p.D * N)), state(static_cast<std::size_t>(p.D * N));
  for (std::size_t i = 0; i < A.size(); ++i) A[i] = -std::exp(p.A_log.data()[i]);
  for (std::int64_t b = 0; b < p.B; ++b) {
    std::fill(state.begin(), state.end(), 0.0f);
    for (std::int64_t t = 0; t < p.L; ++t) {
      float const *const u = p.u.row(b, t), *const delta = p.delta.row(b, t), *const z = p.z.row(b, t);
      float const *const in = p.projections.row(b, t), *const out = in + N;
      for (std::int64_t d = 0; d < p.D; ++d) {
        float const x = delta[d] + p.bias(d), dt = x > 20 ? x : std::log1p(std::exp(x));
        float* const h = state.data() + d * N;
        float sum = p.skip(d) * u[d];
        for (int n = 0; n < N; ++n) {
          h[n] = std::exp(dt * A[static_cast<std::size_t>(d * N + n)]) * h[n] + dt * in[n] * u[d];
          sum += out[n] * h[n];
        }
        y[(b * p.L + t) * p.D + d] = sum * z[d] / (1 + std::exp(-z[d]));
      }
    }
  }
}

/// Best times of the plain loop and of forward on one thread, by shape; measured once.
template <int N>
double plain_seconds(problem<float, N> const& p) {
  static std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t>, double> known;
  double& best = known[{p.B, p.L, p.D}];
  if (best == 0) {
    std::vector<float> y(static_cast<std::size_t>(p.y.size()));
    best = 1e9;
    for (int run = 0; run < 5; ++run)
      best = std::min(best, seconds({.threads = 1}, [&] { plain_forward(p, y.data()); }));
    p.forward();
    double worst = 0;
    for (std::size_t i = 0; i < y.size(); ++i)
      worst = std::max(worst, std::abs(static_cast<double>(y[i]) - static_cast<double>(p.y.data()[i])));
    if (!(worst < 2e-5)) {
      std::fprintf(stderr, "forward differs from the plain loop by %g\n", worst);
      std::abort();
    }
  }
  return best;
}

/// Runs f, and reports the best run. `between` is called between runs, and not measured.
template <class P, class F>
double report(
    benchmark::State& state, P const& p, double bytes, double floor, F&& f, std::function<void()> between = [] {}) {
  f();
  double best = 1e9;
  for (auto _ : state) {
    best = std::min(best, seconds(p.policy, f));
    between();
  }
  state.counters["best_ms"] = best * 1e3;
  state.counters["ns_per_element"] = best / p.elements() * 1e9;
  state.counters["Gitems_per_s"] = p.elements() / best * 1e-9;
  state.counters["GB_per_s"] = bytes / best * 1e-9;
  state.counters["of_floor"] = floor / best;
  return best;
}

template <class T, int N>
void forward(benchmark::State& state) {
  problem<T, N> const p(state);
  double plain = 0;
  if constexpr (std::is_same_v<T, float>)
    if (p.packed == 0 && p.elements() < 1e8) plain = plain_seconds(p);
  double const best = report(state, p, p.bytes(4, 2), p.floor(7, 27), [&] { p.forward(); });
  if (plain > 0) state.counters["times_plain"] = plain / best;
}

void plain(benchmark::State& state) {
  problem<float, 16> const p(state);
  report(state, p, p.bytes(4, 2), p.floor(7, 27), [&] { plain_forward(p, p.y.data()); });
}

/// d(sum of d_y y)/d(u) and /d(delta) of one channel by the chain rule, in double, against what backward left.
template <class T, int N, class Gradients>
void check_channel(problem<T, N> const& p, T const* d_y, Gradients const& d, std::int64_t c) {
  auto const at = [&](auto const& x, std::int64_t t) { return static_cast<double>(widen(x(0, t, c))); };
  std::int64_t const L = p.packed > 0 ? p.offsets(1) : p.L;
  std::vector<double> h(static_cast<std::size_t>((L + 1) * N)), g(N);
  auto const A = [&](int n) { return -std::exp(static_cast<double>(p.A_log(c, n))); };
  auto const in = [&](std::int64_t t, int n) { return static_cast<double>(widen(p.projections(0, t, n))); };
  auto const dt = [&](std::int64_t t) { return std::log1p(std::exp(at(p.delta, t) + static_cast<double>(p.bias(c)))); };
  for (std::int64_t t = 0; t < L; ++t)
    for (int n = 0; n < N; ++n)
      h[static_cast<std::size_t>((t + 1) * N + n)] =
          std::exp(dt(t) * A(n)) * h[static_cast<std::size_t>(t * N + n)] + dt(t) * in(t, n) * at(p.u, t);
  double worst = 0, largest = 0;
  for (std::int64_t t = L - 1; t >= 0; --t) {
    double const gate = at(p.z, t) / (1 + std::exp(-at(p.z, t)));
    double const d_sum = static_cast<double>(widen(d_y[t * p.D + c])) * gate;
    double d_u = d_sum * static_cast<double>(p.skip(c)), d_dt = 0;
    for (std::size_t n = 0; n < N; ++n) {
      int const k = static_cast<int>(n);
      double const decay = std::exp(dt(t) * A(k));
      g[n] += d_sum * in(t, N + k);
      d_u += g[n] * dt(t) * in(t, k);
      d_dt += g[n] * (in(t, k) * at(p.u, t) + A(k) * decay * h[static_cast<std::size_t>(t * N + k)]);
      g[n] *= decay;
    }
    double const d_delta = d_dt / (1 + std::exp(-at(p.delta, t) - static_cast<double>(p.bias(c))));
    for (double x : {d_u, d_delta}) largest = std::max(largest, std::abs(x));
    worst = std::max({worst, std::abs(d_u - at(d.d_u, t)), std::abs(d_delta - at(d.d_delta, t))});
  }
  if (!(worst <= (std::is_same_v<T, float> ? 2e-5 : 2e-2) * largest)) {
    std::fprintf(stderr, "gradients of channel %lld differ by %g of %g\n", static_cast<long long>(c), worst, largest);
    std::abort();
  }
}

template <class T, int N>
void backward(benchmark::State& state) {
  using A = accum_t<T>;
  problem<T, N> p(state);
  auto const d_y = random<T>(8, -1, 1, p.B, p.L, p.D);
  auto const d_u = random<T>(0, 0, 1, p.B, p.L, p.D), d_delta = random<T>(0, 0, 1, p.B, p.L, p.D);
  auto const d_z = random<T>(0, 0, 1, p.B, p.L, p.D), d_projections = random<T>(0, 0, 1, p.B, p.L, 2 * N);
  auto const d_A = zeros<A>(p.policy, p.D, N);
  auto const d_skip = zeros<A>(p.policy, p.D), d_bias = zeros<A>(p.policy, p.D);
  auto const in = p.inputs();
  arena<space::host> workspace(selective_scan::scratch_bytes<N, T>(p.B, p.L, p.D, p.sequences));
  p.policy.workspace = &workspace;
  selective_scan::gradients<device::cpu, T> const d{
      .d_u = d_u, .d_delta = d_delta, .d_A = d_A, .d_B = d_projections.columns(0, N),
      .d_C = d_projections.columns(N, N), .d_D = d_skip, .d_z = d_z, .d_delta_bias = d_bias};
  p.forward();
  auto const run = [&] {
    selective_scan::backward<N, device::cpu, T>(
        p.policy,
        {.u = in.u, .delta = in.delta, .A = in.A, .B = in.B, .C = in.C, .D = in.D, .z = in.z,
         .delta_bias = in.delta_bias, .cu_seqlens = in.cu_seqlens, .delta_softplus = true, .A_is_log = true,
         .checkpoints = p.checkpoints, .d_y = d_y},
        d);
  };
  run();
  for (std::int64_t c : {std::int64_t{0}, p.D / 2, p.D - 1}) check_channel(p, d_y.data(), d, c);
  // Forward takes turns with backward, so that their ratio is of the same moments.
  double best_forward = 1e9;
  double const best = report(state, p, p.bytes(7, 4), p.floor(15, 55), run, [&] {
    best_forward = std::min(best_forward, seconds(p.policy, [&] { p.forward(); }));
  });
  state.counters["times_forward"] = best / best_forward;
}

/// One token: the state is read and written once, and A is read.
template <class T, int N>
void step(benchmark::State& state) {
  using A = accum_t<T>;
  problem<T, N> const p(state);  // L = 1
  auto const states = zeros<A>(p.policy, p.B, p.D, N);
  auto const row = [&](auto const& x) { return view<space::host, T const, dyn, dyn>(x.data(), p.B, x.extent(2)); };
  view<space::host, T, dyn, dyn> const y(p.y.data(), p.B, p.D);
  double const bytes = sizeof(A) * static_cast<double>((2 * p.B + 1) * p.D * N) + p.bytes(4, 2);
  double const best = report(state, p, bytes, p.floor(16, 40), [&] {
    selective_scan::step<N>(p.policy,
                            {.u = row(p.u), .delta = row(p.delta), .A = p.A_log,
                             .B = row(p.projections).columns(0, N), .C = row(p.projections).columns(N, N),
                             .D = p.skip, .z = row(p.z), .delta_bias = p.bias, .delta_softplus = true,
                             .A_is_log = true},
                            states, y);
  });
  state.counters["us_per_token"] = best * 1e6 / static_cast<double>(p.B);
}

void named(benchmark::internal::Benchmark* b) {
  b->ArgNames({"threads", "B", "L", "D", "packed"})->UseRealTime()->Unit(benchmark::kMillisecond)->MinTime(0.3);
}
void one_thread(benchmark::internal::Benchmark* b) {
  named(b);
  b->Args({1, 1, 2048, 1536, 0});
}
void shapes(benchmark::internal::Benchmark* b) {
  named(b);
  for (int threads : {1, 0}) {
    b->Args({threads, 1, 2048, 1536, 0});
    b->Args({threads, 1, 512, 256, 0});
  }
  b->Args({0, 4, 1024, 2304, 0});
  b->Args({0, 1, 4096, 1536, 100});
}
void steps(benchmark::internal::Benchmark* b) {
  named(b);
  for (int threads : {1, 0})
    for (std::int64_t batch : {1, 16, 256}) b->Args({threads, batch, 1, 2304, 0});
}
BENCHMARK(plain)->Apply(one_thread);
BENCHMARK(forward<float, 16>)->Apply(shapes);
BENCHMARK(forward<bfloat16, 16>)->Apply(one_thread);
BENCHMARK(forward<half, 16>)->Apply(one_thread);
BENCHMARK(forward<double, 16>)->Apply(one_thread);
BENCHMARK(forward<float, 8>)->Apply(one_thread);
BENCHMARK(forward<float, 64>)->Apply(one_thread);
BENCHMARK(backward<float, 16>)->Apply(shapes);
BENCHMARK(backward<bfloat16, 16>)->Apply(one_thread);
BENCHMARK(backward<float, 64>)->Apply(one_thread);
BENCHMARK(step<float, 16>)->Apply(steps);
BENCHMARK(step<bfloat16, 16>)->Apply(steps);

}  // namespace

BENCHMARK_MAIN();
