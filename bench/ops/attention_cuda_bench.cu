/// Attention on a CUDA device: forward and backward against the rate of a matrix product, steps of generation against
/// the rate of a copy, both measured here.
///
/// Operations count the products under the mask (4 dh L (L + 1) / 2 for each head forward, 2.5 times that backward);
/// bytes of a step the keys and values that it has to read. Results are compared with the CPU's before the clock
/// starts.
#include <blackmamba/ops/attention/attention.hpp>
#include <blackmamba/ops/linear/linear.hpp>

#include "support/cuda_timing.cuh"

using namespace blackmamba;
using bench::agrees;
using bench::device_tensor;
using bench::host_tensor;
using bench::on_host;

namespace {

device::cuda policy() { return {.stream = bench::stream()}; }
device::cpu const host;

/// Operations per second of an 8192^3 product in bfloat16 on random numbers.
double product_rate() {
  static double const rate = [] {
    std::int64_t const n = 8192;
    struct set {
      device_tensor<bfloat16, dyn, dyn> x, weight, y;
    };
    auto const sets = bench::rotated(1e9, [&](int i) {
      return set{bench::random_tensor<bfloat16>(i, n, n), bench::random_tensor<bfloat16>(i + 1, n, n),
                 bench::poisoned_tensor<bfloat16>(n, n)};
    });
    double const seconds =
        bench::seconds_of_call(sets, std::size_t{256} << 20, [](device::cuda const& on, set const& s) {
          linear::forward(on, {.x = s.x, .weight = s.weight}, s.y.as_view());
        });
    double const operations = 2.0 * static_cast<double>(n * n * n);
    benchmark::AddCustomContext("device_product_Tops", std::to_string(operations / seconds * 1e-12));
    return operations / seconds;
  }();
  return rate;
}

template <class T>
struct problem {
  std::int64_t batch, length, heads, kv_heads, head_dim;
  device_tensor<T, dyn, dyn, dyn, dyn> q, k, v, y, d_y, d_q, d_k, d_v;
  device_tensor<float, dyn, dyn, dyn> lse;

  problem(benchmark::State const& state, int seed)
      : batch(state.range(0)),
        length(state.range(1)),
        heads(state.range(2)),
        kv_heads(state.range(3)),
        head_dim(state.range(4)),
        q(bench::random_tensor<T>(seed, batch, length, heads, head_dim)),
        k(bench::random_tensor<T>(seed + 1, batch, length, kv_heads, head_dim)),
        v(bench::random_tensor<T>(seed + 2, batch, length, kv_heads, head_dim)),
        y(bench::poisoned_tensor<T>(batch, length, heads, head_dim)),
        d_y(bench::random_tensor<T>(seed + 3, batch, length, heads, head_dim)),
        d_q(bench::poisoned_tensor<T>(batch, length, heads, head_dim)),
        d_k(bench::poisoned_tensor<T>(batch, length, kv_heads, head_dim)),
        d_v(bench::poisoned_tensor<T>(batch, length, kv_heads, head_dim)),
        lse(bench::poisoned_tensor<float>(batch, heads, length)) {}
  double operations() const {
    return 4.0 * static_cast<double>(batch * heads * head_dim) * static_cast<double>(length * (length + 1) / 2);
  }
  double elements() const { return static_cast<double>(q.size() + k.size()); }
};

template <class T>
void forward_call(device::cuda const& on, problem<T> const& p) {
  attention::forward(on, {.q = p.q, .k = p.k, .v = p.v}, p.y.as_view(), {.lse = p.lse});
}
template <class T>
void backward_call(device::cuda const& on, problem<T> const& p) {
  attention::backward<device::cuda, T>(on, {.q = p.q, .k = p.k, .v = p.v, .y = p.y, .lse = p.lse, .d_y = p.d_y},
                                       {.d_q = p.d_q, .d_k = p.d_k, .d_v = p.d_v});
}

/// One row of the batch on the host, where its first `some` tokens are enough: nothing later reaches them.
template <class T>
struct host_problem {
  std::int64_t some;
  host_tensor<T, dyn> q, k, v, d_y;
  host_tensor<T, dyn, dyn, dyn, dyn> y, d_q, d_k, d_v;
  host_tensor<float, dyn, dyn, dyn> lse;
  attention::inputs<device::cpu, T> in;

  host_problem(problem<T> const& p, std::int64_t n)
      : some(n),
        q(on_host(row(p.q), 0, n)),
        k(on_host(row(p.k), 0, n)),
        v(on_host(row(p.v), 0, n)),
        d_y(on_host(row(p.d_y), 0, n)),
        y(1, n, p.heads, p.head_dim),
        d_q(1, n, p.heads, p.head_dim),
        d_k(1, n, p.kv_heads, p.head_dim),
        d_v(1, n, p.kv_heads, p.head_dim),
        lse(1, p.heads, n) {
    in.q = q.reshape(std::int64_t{1}, n, p.heads, p.head_dim);
    in.k = k.reshape(std::int64_t{1}, n, p.kv_heads, p.head_dim);
    in.v = v.reshape(std::int64_t{1}, n, p.kv_heads, p.head_dim);
    attention::forward(host, in, y.as_view(), {.lse = lse});
  }
  /// The last row of the batch, (L, H, dh).
  template <class X>
  static auto row(X const& x) {
    std::int64_t const last = x.extent(0) - 1;
    return view<space::device, T, dyn, dyn, dyn>(x.data() + last * x.stride(0), x.extent(1), x.extent(2), x.extent(3));
  }
};

/// Arguments: B, L, Hq, Hkv, dh.
template <class T>
void forward(benchmark::State& state) {
  auto const sets =
      bench::rotated(problem<T>(state, 0).elements() * 2 * sizeof(T), [&](int i) { return problem<T>(state, 10 * i); });
  auto const& p = sets[0];
  forward_call(policy(), p);
  host_problem<T> const expected(p, std::min<std::int64_t>(p.length, 1024));
  if (!agrees(state, "y", on_host(expected.row(p.y), 0, expected.some), expected.y, sizeof(T) == 2 ? 0.02 : 1e-5))
    return;
  bench::measure(
      state,
      {.bytes = p.elements() * 2 * sizeof(T), .operations = p.operations(), .operations_per_second = product_rate()},
      sets, [](device::cuda const& on, problem<T> const& set) { forward_call(on, set); });
}

template <class T>
void backward(benchmark::State& state) {
  auto const sets = bench::rotated(problem<T>(state, 0).elements() * 4 * sizeof(T), [&](int i) {
    problem<T> p(state, 10 * i);
    forward_call(policy(), p);
    return p;
  });
  auto const& p = sets[0];
  backward_call(policy(), p);
  if (p.length <= 2048) {  // keys hear of every later query: the whole row is wanted
    host_problem<T> const expected(p, p.length);
    attention::backward<device::cpu, T>(host,
                                        {.q = expected.in.q,
                                         .k = expected.in.k,
                                         .v = expected.in.v,
                                         .y = expected.y,
                                         .lse = expected.lse,
                                         .d_y = expected.d_y.reshape(std::int64_t{1}, p.length, p.heads, p.head_dim)},
                                        {.d_q = expected.d_q, .d_k = expected.d_k, .d_v = expected.d_v});
    double const tolerance = sizeof(T) == 2 ? 0.02 : 1e-5;
    if (!agrees(state, "d_q", on_host(expected.row(p.d_q)), expected.d_q, tolerance) ||
        !agrees(state, "d_k", on_host(expected.row(p.d_k)), expected.d_k, tolerance) ||
        !agrees(state, "d_v", on_host(expected.row(p.d_v)), expected.d_v, tolerance))
      return;
  }
  bench::measure(
      state,
      {.bytes = p.elements() * 4 * sizeof(T),
       .operations = 2.5 * p.operations(),
       .operations_per_second = product_rate()},
      sets, [](device::cuda const& on, problem<T> const& set) { backward_call(on, set); }, std::size_t{2} << 30);
}

/// A cache of L tokens, the last of which comes with each call. Calls count the token in: lengths lie ready for many
/// calls and are set back together.
template <class T>
struct step_set {
  static constexpr std::int64_t ready = 64;
  std::int64_t batch, length;
  device_tensor<T, dyn, dyn, dyn, dyn> key, value;
  device_tensor<T, dyn, dyn, dyn> q, k, v, y;
  device_tensor<std::int32_t, dyn, dyn> lengths, first_lengths;
  mutable std::int64_t next = 0;
  mutable cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;

  step_set(benchmark::State const& state, int seed)
      : batch(state.range(0)),
        length(state.range(1)),
        key(bench::random_tensor<T>(seed, batch, length, state.range(3), state.range(4))),
        value(bench::random_tensor<T>(seed + 1, batch, length, state.range(3), state.range(4))),
        q(bench::random_tensor<T>(seed + 2, batch, state.range(2), state.range(4))),
        k(bench::random_tensor<T>(seed + 3, batch, state.range(3), state.range(4))),
        v(bench::random_tensor<T>(seed + 4, batch, state.range(3), state.range(4))),
        y(bench::poisoned_tensor<T>(batch, state.range(2), state.range(4))),
        lengths(ready, batch),
        first_lengths(bench::random_tensor<std::int32_t>(0, static_cast<float>(length - 1),
                                                         static_cast<float>(length - 1), ready, batch)) {}
  void call(device::cuda const& on) const {
    auto const before = capturing;
    bench::check(cudaStreamIsCapturing(on.stream, &capturing));
    if (capturing != before) next = 0;  // what is replayed sets its lengths back itself
    if (next == 0) memory::copy(on, first_lengths.as_view(), lengths.as_view());
    view<space::device, std::int32_t, dyn> const held(lengths.row(next), batch);
    next = (next + 1) % ready;
    attention::step(on, {.q = q, .k = k, .v = v}, {.key = key, .value = value, .length = held}, y.as_view());
  }
};

template <class T>
void step(benchmark::State& state) {
  std::int64_t const batch = state.range(0), length = state.range(1), heads = state.range(2), kv_heads = state.range(3),
                     head_dim = state.range(4), one = 1;
  double const bytes = 2.0 * sizeof(T) * static_cast<double>(batch * length * kv_heads * head_dim);
  auto const sets = bench::rotated(bytes, [&](int i) { return step_set<T>(state, 10 * i); });
  auto const& p = sets[0];
  auto const last = batch - 1;
  auto const key = on_host(p.key.as_view(), last, 1), value = on_host(p.value.as_view(), last, 1);
  auto const q = on_host(p.q.as_view(), last, 1), k = on_host(p.k.as_view(), last, 1),
             v = on_host(p.v.as_view(), last, 1);
  host_tensor<T, dyn, dyn, dyn> y(one, heads, head_dim);
  host_tensor<std::int32_t, dyn> held(one);
  held.data()[0] = static_cast<std::int32_t>(length - 1);
  attention::step(host,
                  {.q = q.reshape(one, heads, head_dim),
                   .k = k.reshape(one, kv_heads, head_dim),
                   .v = v.reshape(one, kv_heads, head_dim)},
                  {.key = key.reshape(one, length, kv_heads, head_dim),
                   .value = value.reshape(one, length, kv_heads, head_dim),
                   .length = held},
                  y.as_view());
  p.call(policy());
  if (!agrees(state, "y", on_host(p.y.as_view(), last, 1), y, sizeof(T) == 2 ? 0.01 : 1e-5)) return;
  bench::measure(state, {.bytes = bytes}, sets, [](device::cuda const& on, step_set<T> const& set) { set.call(on); });
}

void train_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "L", "Hq", "Hkv", "dh"})->Apply(bench::manual);
  b->Args({8, 2048, 16, 16, 64});
  b->Args({8, 2048, 16, 4, 64});
  b->Args({4, 2048, 12, 12, 128});
  b->Args({8, 2048, 16, 16, 96});
  b->Args({64, 256, 16, 16, 64});
  b->Args({1, 16384, 16, 16, 64});
  b->Args({1, 16384, 16, 16, 128});
}
void step_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "L", "Hq", "Hkv", "dh"})->Apply(bench::manual);
  for (std::int64_t batch : {1, 32})
    for (std::int64_t length : {1024, 2048, 4096, 8192, 16384, 32768, 65536}) b->Args({batch, length, 16, 16, 64});
  for (std::int64_t batch : {1, 32})
    for (std::int64_t length : {4096, 65536}) b->Args({batch, length, 32, 8, 128});
  b->Args({1, 8192, 12, 12, 96})->Args({32, 8192, 12, 12, 96})->Args({256, 1024, 16, 16, 64});
}
BENCHMARK(step<bfloat16>)->Apply(step_shapes);
BENCHMARK(forward<bfloat16>)->Apply(train_shapes);
BENCHMARK(backward<bfloat16>)->Apply(train_shapes);

}  // namespace

int main(int argc, char** argv) { return bench::run(argc, argv); }
