/// Scans on CUDA as a share of the device's copy: bytes are those of the operands and results, each once. In the same
/// program: the copy, and cub::DeviceScan with the same operator over one row of maps.
#include <blackmamba/ops/associative_scan/associative_scan.hpp>
#include <blackmamba/ops/associative_scan/first_order_recurrence.hpp>

#include "support/cuda_timing.cuh"

#include <cub/device/device_scan.cuh>

// Not the whole namespace: CUB's stubs speak of a namespace cuda, of which there must be one.
using blackmamba::affine, blackmamba::associative_scan, blackmamba::bfloat16, blackmamba::convert, blackmamba::dyn,
    blackmamba::first_order_recurrence, blackmamba::view;
namespace device = blackmamba::device;
namespace space = blackmamba::space;
namespace scan_operator = blackmamba::scan_operator;

namespace {

using op = first_order_recurrence;

template <class T>
constexpr double roundoff = sizeof(T) == 2 ? 0x1p-7 : 1e-4;

/// (R, L), or (B, L, D).
template <class T, int Rank>
struct problem {
  using tensor_type =
      std::conditional_t<Rank == 2, bench::device_tensor<T, dyn, dyn>, bench::device_tensor<T, dyn, dyn, dyn>>;
  tensor_type a, b, h, d_h, d_a, d_b;

  template <class... Ints>
  problem(int seed, bool backward, Ints... extents)
      : a(bench::random_tensor<T>(seed, 0.5f, 1.0f, extents...)),
        b(bench::random_tensor<T>(seed + 1, extents...)),
        h(bench::poisoned_tensor<T>(extents...)) {
    if (!backward) return;
    op::forward(device::cuda{.stream = bench::stream()}, {.a = a, .b = b}, h.as_view());
    d_h = std::move(b);
    d_a = bench::poisoned_tensor<T>(extents...);
    d_b = bench::poisoned_tensor<T>(extents...);
  }
  void forward(device::cuda const& policy) const { op::forward(policy, {.a = a, .b = b}, h.as_view()); }
  void backward(device::cuda const& policy) const {
    op::backward(policy, {.a = a, .h = h, .d_h = d_h}, d_a.as_view(), d_b.as_view());
  }
};

/// The recurrence by its definition, along the first row or channel of the first batch.
template <class T>
auto plain_loop(bench::host_tensor<T, dyn> const& a, bench::host_tensor<T, dyn> const& b) {
  bench::host_tensor<T, dyn> h(a.size());
  double state = 0;
  for (std::int64_t i = 0; i < a.size(); ++i)
    h(i) = convert<T>(static_cast<float>(state = convert<float>(a(i)) * state + convert<float>(b(i))));
  return h;
}
/// Elements 0, stride, 2 stride, … of the first `count` on the host: the beginning of the first row or channel.
template <class T, class Tensor>
auto beginning(Tensor const& x, std::int64_t count, std::int64_t stride) {
  bench::host_tensor<T, dyn> all(std::min(count, x.size())), part(all.size() / stride);
  bench::check(cudaStreamSynchronize(bench::stream()));
  bench::check(
      cudaMemcpy(all.data(), x.data(), sizeof(T) * static_cast<std::size_t>(all.size()), cudaMemcpyDeviceToHost));
  for (std::int64_t i = 0; i < part.size(); ++i) part(i) = all(i * stride);
  return part;
}

template <class T, int Rank, class... Ints>
void measure(benchmark::State& state, bool backward, std::int64_t first, std::int64_t stride, Ints... extents) {
  double const n = static_cast<double>((std::int64_t{1} * ... * extents));
  double const bytes = (backward ? 5.0 : 3.0) * sizeof(T) * n;
  auto const sets = bench::rotated(bytes, [&](int i) { return problem<T, Rank>(4 * i, backward, extents...); });
  auto const& p = sets[0];
  device::cuda const policy{.stream = bench::stream()};
  backward ? p.backward(policy) : p.forward(policy);
  if (!backward) {
    std::int64_t const count = std::min<std::int64_t>(first, std::int64_t{1} << 22) / stride * stride;
    auto const of = [&](auto const& x) { return beginning<T>(x, count, stride); };
    if (!bench::agrees(state, "h", of(p.h), plain_loop<T>(of(p.a), of(p.b)), roundoff<T>)) return;
  }
  bench::measure(
      state, {.bytes = bytes}, sets,
      [&](device::cuda const& on, problem<T, Rank> const& q) { backward ? q.backward(on) : q.forward(on); },
      std::size_t{512} << 20);
}
template <class T>
void rows_forward(benchmark::State& state) {
  blackmamba::cuda::scan_sequences_per_multiprocessor = static_cast<int>(state.range(2));
  measure<T, 2>(state, false, state.range(1), 1, state.range(0), state.range(1));
}
template <class T>
void rows_backward(benchmark::State& state) {
  blackmamba::cuda::scan_sequences_per_multiprocessor = static_cast<int>(state.range(2));
  measure<T, 2>(state, true, 1, 1, state.range(0), state.range(1));
}
template <class T>
void channels_forward(benchmark::State& state) {
  blackmamba::cuda::scan_sequences_per_multiprocessor = static_cast<int>(state.range(3));
  measure<T, 3>(state, false, state.range(1) * state.range(2), state.range(2), state.range(0), state.range(1),
                state.range(2));
}
template <class T>
void channels_backward(benchmark::State& state) {
  blackmamba::cuda::scan_sequences_per_multiprocessor = static_cast<int>(state.range(3));
  measure<T, 3>(state, true, 1, state.range(2), state.range(0), state.range(1), state.range(2));
}

struct map_composition {
  __host__ __device__ affine<float> operator()(affine<float> const& a, affine<float> const& b) const {
    return {a.a * b.a, fmaf(b.a, a.b, b.b)};
  }
};
/// Maps as floats in pairs.
struct pair_set {
  bench::device_tensor<float, dyn> from, to;
  std::int64_t length;
  auto row(bench::device_tensor<float, dyn> const& t) const {
    return view<space::device, affine<float>, dyn, dyn>(reinterpret_cast<affine<float>*>(t.data()), 1, length);
  }
  auto x() const { return row(from); }
  auto y() const { return row(to); }
};
auto pair_sets(std::int64_t length) {
  return bench::rotated(16.0 * static_cast<double>(length), [&](int i) {
    return pair_set{bench::random_tensor<float>(i, 0.5f, 1.0f, 2 * length), bench::poisoned_tensor<float>(2 * length),
                    length};
  });
}
/// One row of maps, with any operator: ours and cub's.
void maps(benchmark::State& state) {
  std::int64_t const length = state.range(0);
  auto const sets = pair_sets(length);
  bench::measure(
      state, {.bytes = 16.0 * static_cast<double>(length)}, sets,
      [](device::cuda const& policy, pair_set const& p) {
        associative_scan::forward(policy, scan_operator::composition<float>{}, p.x(), p.y());
      },
      std::size_t{512} << 20);
}
void maps_by_cub(benchmark::State& state) {
  std::int64_t const length = state.range(0);
  auto const sets = pair_sets(length);
  std::size_t bytes = 0;
  cub::DeviceScan::InclusiveScan(nullptr, bytes, sets[0].x().data(), sets[0].y().data(), map_composition{}, length);
  bench::device_tensor<char, dyn> const temporary(static_cast<std::int64_t>(bytes));
  bench::measure(state, {.bytes = 16.0 * static_cast<double>(length)}, sets,
                 [&](device::cuda const& policy, pair_set const& p) {
                   bench::check(cub::DeviceScan::InclusiveScan(temporary.data(), bytes, p.x().data(), p.y().data(),
                                                               map_composition{}, length, policy.stream));
                 });
}
/// Sums of one row of floats.
void sums(benchmark::State& state) {
  std::int64_t const rows = state.range(0), length = state.range(1);
  double const bytes = 8.0 * static_cast<double>(rows * length);
  auto const sets = bench::rotated(bytes, [&](int i) {
    return std::pair(bench::random_tensor<float>(i, rows, length), bench::poisoned_tensor<float>(rows, length));
  });
  bench::measure(
      state, {.bytes = bytes}, sets,
      [](device::cuda const& policy, auto const& p) {
        associative_scan::forward(policy, scan_operator::sum<float>{}, p.first.as_view(), p.second.as_view());
      },
      std::size_t{512} << 20);
}
void sums_by_cub(benchmark::State& state) {
  std::int64_t const length = state.range(1);
  double const bytes = 8.0 * static_cast<double>(length);
  auto const sets = bench::rotated(bytes, [&](int i) {
    return std::pair(bench::random_tensor<float>(i, length), bench::poisoned_tensor<float>(length));
  });
  std::size_t size = 0;
  cub::DeviceScan::InclusiveSum(nullptr, size, sets[0].first.data(), sets[0].second.data(), length);
  bench::device_tensor<char, dyn> const temporary(static_cast<std::int64_t>(size));
  bench::measure(state, {.bytes = bytes}, sets, [&](device::cuda const& policy, auto const& p) {
    bench::check(
        cub::DeviceScan::InclusiveSum(temporary.data(), size, p.first.data(), p.second.data(), length, policy.stream));
  });
}

void row_shapes(benchmark::internal::Benchmark* b) {
  bench::manual(b);
  b->ArgNames({"rows", "L", "split_below"})->Args({12288, 2048, 2})->Args({12288, 16384, 2});
  b->Args({512, 65536, 2})->Args({512, 65536, 8})->Args({1, 1 << 28, 2});
}
void channel_shapes(benchmark::internal::Benchmark* b) {
  bench::manual(b);
  b->ArgNames({"B", "L", "D", "split_below"})->Args({8, 2048, 1536, 2})->Args({8, 2048, 1536, 4});
  b->Args({8, 16384, 1536, 2})->Args({1, 65536, 512, 2});
}
BENCHMARK(rows_forward<float>)->Apply(row_shapes);
BENCHMARK(rows_forward<bfloat16>)->Apply(row_shapes);
BENCHMARK(rows_backward<float>)->Apply(row_shapes);
BENCHMARK(rows_backward<bfloat16>)->Apply(row_shapes);
BENCHMARK(channels_forward<float>)->Apply(channel_shapes);
BENCHMARK(channels_forward<bfloat16>)->Apply(channel_shapes);
BENCHMARK(channels_backward<float>)->Apply(channel_shapes);
BENCHMARK(channels_backward<bfloat16>)->Apply(channel_shapes);
BENCHMARK(maps)->Apply(bench::manual)->ArgName("L")->Arg(1 << 28)->Arg(1 << 22);
BENCHMARK(maps_by_cub)->Apply(bench::manual)->ArgName("L")->Arg(1 << 28)->Arg(1 << 22);
BENCHMARK(sums)->Apply(bench::manual)->ArgNames({"rows", "L"})->Args({1, 1 << 28})->Args({1, 1 << 22});
BENCHMARK(sums_by_cub)->Apply(bench::manual)->ArgNames({"rows", "L"})->Args({1, 1 << 28})->Args({1, 1 << 22});

}  // namespace

int main(int argc, char** argv) { return bench::run(argc, argv); }
