/// Scans as a share of what memory allows: bytes are those of the operands and results, each once; the floor is a
/// STREAM triad (or a copy, for one operand) over arrays as long, with as many threads, in this program.
#include <blackmamba/core/random.hpp>
#include <blackmamba/ops/associative_scan/associative_scan.hpp>
#include <blackmamba/ops/associative_scan/first_order_recurrence.hpp>

#include "support/bandwidth.hpp"

using namespace blackmamba;

namespace {

template <class T, class... Ints>
auto filled(std::uint64_t seed, float low, float high, Ints... extents) {
  tensor<space::host, T, (static_cast<void>(extents), dyn)...> t(extents...);
  philox const random(seed);
  for (std::int64_t i = 0; i < t.size(); ++i)
    t.data()[i] = convert<T>(random.uniform(static_cast<std::uint64_t>(i % 65536), low, high));
  return t;
}
int threads_of(benchmark::State const& state, std::size_t i) {
  return cpu::thread_count(static_cast<int>(state.range(i)));
}
double triad(std::int64_t n, int threads) { return bench::stream_rate(2, std::max<std::int64_t>(n, 1 << 24), threads); }
double copy(std::int64_t n, int threads) { return bench::stream_rate(1, std::max<std::int64_t>(n, 1 << 24), threads); }

/// The plain loop of the definition, to compare with.
void recurrence_loop(benchmark::State& state) {
  std::int64_t const n = state.range(0);
  auto const a = filled<float>(1, 0.8f, 1.0f, n), b = filled<float>(2, -1, 1, n);
  auto h = filled<float>(3, 0, 1, n);
  bench::measure(state, 12.0 * static_cast<double>(n), "of_triad", triad(n, 1), [&] {
    float state_value = 0;
    for (std::int64_t i = 0; i < n; ++i) h(i) = state_value = a(i) * state_value + b(i);
  });
}
BENCHMARK(recurrence_loop)->Arg(1 << 24)->UseRealTime();

template <class T>
void recurrence_rows(benchmark::State& state) {
  std::int64_t const rows = state.range(0), length = state.range(1), n = rows * length;
  int const threads = threads_of(state, 2);
  device::cpu const policy{.threads = threads};
  auto const a = filled<T>(1, 0.8f, 1.0f, rows, length), b = filled<T>(2, -1, 1, rows, length);
  auto h = filled<T>(3, 0, 1, rows, length);
  bench::measure(state, 3.0 * sizeof(T) * static_cast<double>(n), "of_triad", triad(n, threads),
                 [&] { first_order_recurrence::forward(policy, {.a = a, .b = b}, h); });
}
template <class T>
void recurrence_rows_backward(benchmark::State& state) {
  std::int64_t const rows = state.range(0), length = state.range(1), n = rows * length;
  int const threads = threads_of(state, 2);
  device::cpu const policy{.threads = threads};
  auto const a = filled<T>(1, 0.8f, 1.0f, rows, length), h = filled<T>(2, -1, 1, rows, length),
             d_h = filled<T>(3, -1, 1, rows, length);
  auto d_a = filled<T>(3, 0, 1, rows, length), d_b = filled<T>(3, 0, 1, rows, length);
  bench::measure(state, 5.0 * sizeof(T) * static_cast<double>(n), "of_triad", triad(n, threads),
                 [&] { first_order_recurrence::backward(policy, {.a = a, .h = h, .d_h = d_h}, d_a, d_b); });
}
void row_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "length", "threads"});
  for (int threads : {0, 1}) b->Args({1, 1 << 24, threads});
  b->Args({3072, 2048, 0})->Args({512, 16384, 0})->Args({1, 1 << 14, 1})->Args({64, 256, 1})->UseRealTime();
}
BENCHMARK(recurrence_rows<float>)->Apply(row_shapes);
BENCHMARK(recurrence_rows<bfloat16>)->Args({1, 1 << 24, 0})->Args({3072, 2048, 0})->UseRealTime();
BENCHMARK(recurrence_rows<double>)->Args({1, 1 << 23, 0})->UseRealTime();
BENCHMARK(recurrence_rows_backward<float>)->Apply(row_shapes);

template <class T>
void recurrence_channels(benchmark::State& state) {
  std::int64_t const B = state.range(0), L = state.range(1), D = state.range(2), n = B * L * D;
  int const threads = threads_of(state, 3);
  device::cpu const policy{.threads = threads};
  auto const a = filled<T>(1, 0.8f, 1.0f, B, L, D), b = filled<T>(2, -1, 1, B, L, D);
  auto h = filled<T>(3, 0, 1, B, L, D);
  bench::measure(state, 3.0 * sizeof(T) * static_cast<double>(n), "of_triad", triad(n, threads),
                 [&] { first_order_recurrence::forward(policy, {.a = a, .b = b}, h); });
}
template <class T>
void recurrence_channels_backward(benchmark::State& state) {
  std::int64_t const B = state.range(0), L = state.range(1), D = state.range(2), n = B * L * D;
  int const threads = threads_of(state, 3);
  device::cpu const policy{.threads = threads};
  auto const a = filled<T>(1, 0.8f, 1.0f, B, L, D), h = filled<T>(2, -1, 1, B, L, D),
             d_h = filled<T>(3, -1, 1, B, L, D);
  auto d_a = filled<T>(3, 0, 1, B, L, D), d_b = filled<T>(3, 0, 1, B, L, D);
  bench::measure(state, 5.0 * sizeof(T) * static_cast<double>(n), "of_triad", triad(n, threads),
                 [&] { first_order_recurrence::backward(policy, {.a = a, .h = h, .d_h = d_h}, d_a, d_b); });
}
void channel_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "L", "D", "threads"});
  for (int threads : {0, 1}) b->Args({4, 2048, 1536, threads});
  b->Args({1, 8192, 1536, 0})
      ->Args({1, 1 << 20, 16, 0})
      ->Args({2, 64, 512, 1})
      ->Args({64, 256, 1000, 0})
      ->UseRealTime();
}
BENCHMARK(recurrence_channels<float>)->Apply(channel_shapes);
BENCHMARK(recurrence_channels<bfloat16>)->Args({4, 2048, 1536, 0})->UseRealTime();
BENCHMARK(recurrence_channels_backward<float>)->Apply(channel_shapes);

// The generic operator: of one operand, so the floor is a copy.

/// A 2 x 2 matrix and its product: an element that no register holds four of, an operator that does not commute.
struct matrix {
  float m[4];
};
struct matrix_product {
  matrix operator()(matrix const& a, matrix const& b) const {
    return {{b.m[0] * a.m[0] + b.m[1] * a.m[2], b.m[0] * a.m[1] + b.m[1] * a.m[3], b.m[2] * a.m[0] + b.m[3] * a.m[2],
             b.m[2] * a.m[1] + b.m[3] * a.m[3]}};
  }
  static matrix identity() { return {{1, 0, 0, 1}}; }
};
/// A sum whose author promised nothing: scanned element by element.
struct plain_sum {
  float operator()(float a, float b) const { return a + b; }
  static float identity() { return 0; }
};

template <class Operator>
void operator_rows(benchmark::State& state) {
  std::int64_t const rows = state.range(0), length = state.range(1), n = rows * length;
  int const threads = threads_of(state, 2);
  device::cpu const policy{.threads = threads};
  auto const x = filled<float>(1, -1, 1, rows, length);
  auto y = filled<float>(2, 0, 1, rows, length);
  bench::measure(state, 8.0 * static_cast<double>(n), "of_copy", copy(n, threads),
                 [&] { associative_scan::forward(policy, Operator{}, x, y); });
}
void matrix_rows(benchmark::State& state) {
  std::int64_t const length = state.range(0);
  int const threads = threads_of(state, 1);
  device::cpu const policy{.threads = threads};
  tensor<space::host, matrix, dyn, dyn> x(1, length), y(1, length);
  for (std::int64_t i = 0; i < length; ++i) {
    float const c = std::cos(static_cast<float>(i % 100)), s = std::sin(static_cast<float>(i % 100));
    x(0, i) = y(0, i) = {{c, -s, s, c}};
  }
  bench::measure(state, 32.0 * static_cast<double>(length), "of_copy", copy(4 * length, threads),
                 [&] { associative_scan::forward(policy, matrix_product{}, x, y); });
}
void operator_channels(benchmark::State& state) {
  std::int64_t const B = state.range(0), L = state.range(1), D = state.range(2), n = B * L * D;
  int const threads = threads_of(state, 3);
  device::cpu const policy{.threads = threads};
  auto const x = filled<float>(1, -1, 1, B, L, D);
  auto y = filled<float>(2, 0, 1, B, L, D);
  bench::measure(state, 8.0 * static_cast<double>(n), "of_copy", copy(n, threads),
                 [&] { associative_scan::forward(policy, scan_operator::maximum<float>{}, x, y); });
}
BENCHMARK(operator_rows<scan_operator::sum<float>>)->Args({1, 1 << 24, 0})->Args({3072, 2048, 0})->UseRealTime();
BENCHMARK(operator_rows<plain_sum>)->Args({1, 1 << 24, 0})->Args({1, 1 << 24, 1})->Args({3072, 2048, 0})->UseRealTime();
BENCHMARK(matrix_rows)->Args({1 << 22, 0})->Args({1 << 22, 1})->UseRealTime();
BENCHMARK(operator_channels)->Args({4, 2048, 1536, 0})->Args({1, 1 << 20, 16, 0})->UseRealTime();

}  // namespace

BENCHMARK_MAIN();
