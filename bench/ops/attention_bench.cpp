/// Attention on the CPU: forward, backward and one step of generation, beside the product that bounds it.
///
/// Counters: flops counts the products under the mask (4 dh L (L + 1) / 2 for each head forward, 2.5 times that
/// backward); bytes counts the keys and values that a step has to read.
#include <blackmamba/core/cpu/gemm.hpp>
#include <blackmamba/core/tensor.hpp>
#include <blackmamba/ops/attention/attention.hpp>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>

using namespace blackmamba;

namespace {

template <class T, class... Ints>
auto filled(Ints... extents) {
  tensor<space::host, T, (static_cast<void>(extents), dyn)...> t(extents...);
  for (std::int64_t i = 0; i < t.size(); ++i)
    t.data()[i] = convert<T>(static_cast<float>((i * 2654435761) % 1000) / 500.0f - 1.0f);
  return t;
}

device::cpu policy_of(benchmark::State const& state) { return {.threads = static_cast<int>(state.range(0))}; }

void set_rate(benchmark::State& state, char const* name, double work,
              benchmark::Counter::OneK unit = benchmark::Counter::kIs1000) {
  state.counters[name] =
      benchmark::Counter(work * static_cast<double>(state.iterations()), benchmark::Counter::kIsRate, unit);
}

/// Arguments: threads, batch, L, heads, key/value heads, dh.
template <class T>
struct problem {
  std::int64_t batch, length, heads, kv_heads, head_dim;
  explicit problem(benchmark::State const& state)
      : batch(state.range(1)),
        length(state.range(2)),
        heads(state.range(3)),
        kv_heads(state.range(4)),
        head_dim(state.range(5)) {}
  auto query() const { return filled<T>(batch, length, heads, head_dim); }
  auto key() const { return filled<T>(batch, length, kv_heads, head_dim); }
  double flops() const {
    return 4.0 * static_cast<double>(batch * heads * head_dim) * static_cast<double>(length * (length + 1) / 2);
  }
};

template <class T>
void forward(benchmark::State& state) {
  problem<T> const p(state);
  auto const q = p.query();
  auto const k = p.key(), v = p.key();
  auto y = p.query();
  tensor<space::host, accum_t<T>, dyn, dyn, dyn> lse(p.batch, p.heads, p.length);
  for (auto _ : state) attention::forward(policy_of(state), {.q = q, .k = k, .v = v}, y, {.lse = lse});
  set_rate(state, "flops", p.flops());
}

template <class T>
void backward(benchmark::State& state) {
  problem<T> const p(state);
  auto const q = p.query(), d_y = p.query();
  auto const k = p.key(), v = p.key();
  auto y = p.query(), d_q = p.query();
  auto d_k = p.key(), d_v = p.key();
  tensor<space::host, accum_t<T>, dyn, dyn, dyn> lse(p.batch, p.heads, p.length);
  attention::forward(policy_of(state), {.q = q, .k = k, .v = v}, y, {.lse = lse});
  for (auto _ : state)
    attention::backward<device::cpu, T>(policy_of(state), {.q = q, .k = k, .v = v, .y = y, .lse = lse, .d_y = d_y},
                                        {.d_q = d_q, .d_k = d_k, .d_v = d_v});
  set_rate(state, "flops", 2.5 * p.flops());
}

template <class T>
void step(benchmark::State& state) {
  problem<T> const p(state);
  auto const q = filled<T>(p.batch, p.heads, p.head_dim);
  auto const k = filled<T>(p.batch, p.kv_heads, p.head_dim), v = filled<T>(p.batch, p.kv_heads, p.head_dim);
  tensor<space::host, T, dyn, dyn, dyn> y(p.batch, p.heads, p.head_dim);
  auto key = p.key(), value = p.key();
  tensor<space::host, std::int32_t, dyn> length(p.batch);
  for (auto _ : state) {
    std::fill_n(length.data(), p.batch, static_cast<std::int32_t>(p.length - 1));
    attention::step(policy_of(state), {.q = q, .k = k, .v = v}, {.key = key, .value = value, .length = length}, y);
  }
  set_rate(state, "bytes", static_cast<double>(2 * sizeof(T)) * static_cast<double>(key.size()));
}

/// The library's square product of the given size, for comparison.
void product(benchmark::State& state) {
  std::int64_t const n = state.range(1);
  auto const a = filled<float>(n, n), b = filled<float>(n, n);
  auto c = filled<float>(n, n);
  for (auto _ : state)
    cpu::gemm(static_cast<int>(state.range(0)), cpu::transpose::no, cpu::transpose::yes, n, n, n, a.data(), n, b.data(),
              n, c.data(), n);
  set_rate(state, "flops", 2.0 * static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n));
}

/// Reads and sums memory: the rate that bounds a step.
void read_memory(benchmark::State& state) {
  auto const x = filled<float>(state.range(1));
  using V = simd::pack<float>;
  std::int64_t const block = 1 << 16;
  for (auto _ : state)
    cpu::parallel_for(static_cast<int>(state.range(0)), x.size() / block, 1, [&](std::int64_t begin, std::int64_t end) {
      V a = 0, b = 0, c = 0, d = 0;
      for (std::int64_t i = begin * block; i < end * block; i += 4 * V::lanes) {
        a += V::load(x.data() + i);
        b += V::load(x.data() + i + V::lanes);
        c += V::load(x.data() + i + 2 * V::lanes);
        d += V::load(x.data() + i + 3 * V::lanes);
      }
      benchmark::DoNotOptimize(simd::sum((a + b) + (c + d)));
    });
  set_rate(state, "bytes", 4.0 * static_cast<double>(x.size()));
}

void train_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"threads", "B", "L", "Hq", "Hkv", "dh"})->UseRealTime()->Unit(benchmark::kMillisecond);
  for (std::int64_t threads : {1, 0}) {
    b->Args({threads, 4, 1024, 8, 8, 64});
    b->Args({threads, 1, 2048, 8, 2, 128});
    b->Args({threads, 16, 64, 8, 8, 64});
  }
}
void step_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"threads", "B", "L", "Hq", "Hkv", "dh"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (std::int64_t threads : {1, 0}) {
    b->Args({threads, 1, 65536, 8, 8, 64});
    b->Args({threads, 8, 8192, 32, 8, 128});
    b->Args({threads, 1, 256, 8, 8, 64});
  }
}

BENCHMARK(product)->ArgNames({"threads", "n"})->Args({1, 1024})->Args({0, 1024})->UseRealTime();
BENCHMARK(read_memory)->ArgNames({"threads", "n"})->Args({1, 1 << 26})->Args({0, 1 << 26})->UseRealTime();
BENCHMARK(forward<float>)->Apply(train_shapes);
BENCHMARK(forward<bfloat16>)->Apply(train_shapes);
BENCHMARK(backward<float>)->Apply(train_shapes);
BENCHMARK(backward<bfloat16>)->Apply(train_shapes);
BENCHMARK(step<float>)->Apply(step_shapes);
BENCHMARK(step<bfloat16>)->Apply(step_shapes);

}  // namespace

BENCHMARK_MAIN();
