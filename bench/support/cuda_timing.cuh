#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/memory.hpp>
#include <blackmamba/core/tensor.hpp>
#include <blackmamba/core/workspace.hpp>

#include <benchmark/benchmark.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

/// What the benchmarks of CUDA operators share: inputs larger than the caches, time by events, and operators as a share
/// of what the same device copies in the same program.
///
///     void forward(benchmark::State& state) {
///       double const bytes = ...;
///       auto const sets = bench::rotated(bytes, [&](int i) { return problem(i); });
///       if (!bench::agrees(state, "y", actual, expected, tolerance)) return;
///       bench::measure(state, {.bytes = bytes}, sets, [](device::cuda const& policy, problem const& p) { ... });
///     }
///     BENCHMARK(forward)->Apply(bench::manual);
///     int main(int argc, char** argv) { return bench::run(argc, argv); }
namespace bench {

namespace bm = blackmamba;
using bm::dyn;

inline void check(cudaError_t status) { bm::cuda::check("bench", status); }

template <class T, int... Extents>
using device_tensor = bm::tensor<bm::space::device, T, Extents...>;
template <class T, int... Extents>
using host_tensor = bm::tensor<bm::space::host, T, Extents...>;

/// A stream of the program's own, which can be captured.
inline cudaStream_t stream() {
  static cudaStream_t const own = [] {
    cudaStream_t s = nullptr;
    check(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    return s;
  }();
  return own;
}

/// Seconds that the device takes for what f enqueues on the stream.
template <class F>
double device_seconds(cudaStream_t on, F&& f) {
  cudaEvent_t begin = nullptr, end = nullptr;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  check(cudaEventRecord(begin, on));
  f();
  check(cudaEventRecord(end, on));
  check(cudaEventSynchronize(end));
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, begin, end));
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  return milliseconds * 1e-3;
}

inline double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return x[x.size() / 2];
}

/// Bytes per second, read plus written, of a copy of 1 GiB within the device. Measured once.
inline double copy_rate() {
  static double const rate = [] {
    std::size_t const bytes = std::size_t{1} << 30;
    device_tensor<char, dyn> const from(static_cast<std::int64_t>(bytes)), to(static_cast<std::int64_t>(bytes));
    check(cudaMemsetAsync(from.data(), 0x5a, bytes, stream()));
    auto const copy = [&] {
      check(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, stream()));
    };
    for (int i = 0; i < 5; ++i) copy();
    std::vector<double> samples;
    for (int i = 0; i < 21; ++i) samples.push_back(device_seconds(stream(), copy));
    return 2.0 * static_cast<double>(bytes) / median(samples);
  }();
  return rate;
}

/// How many sets of inputs of so many bytes together exceed four times the L2 cache, so that going round them none is
/// still in it.
inline int copies_past_l2(double bytes_of_a_set) {
  double const l2 = static_cast<double>(bm::cuda::properties().l2_bytes);
  return static_cast<int>(std::clamp(std::ceil(4.0 * l2 / std::max(bytes_of_a_set, 1.0)), 1.0, 4096.0));
}
/// make(0), make(1), ...: as many sets of inputs as that takes. A set that is a tensor, or made of tensors, moves.
template <class Make>
auto rotated(double bytes_of_a_set, Make&& make) {
  std::vector<decltype(make(0))> sets;
  int const count = copies_past_l2(bytes_of_a_set);
  sets.reserve(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) sets.push_back(make(i));
  return sets;
}

namespace values {
template <class T>
__global__ void fill(T* x, std::int64_t n, std::uint32_t seed, float low, float high) {
  std::int64_t const stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride) {
    // A hash of the index: no pattern that rows or tiles could meet.
    std::uint64_t h = (static_cast<std::uint64_t>(i) + 1) * 0x9E3779B97F4A7C15u + seed * 0xD1B54A32D192ED03u;
    h = (h ^ (h >> 31)) * 0xBF58476D1CE4E5B9u;
    h = (h ^ (h >> 29)) * 0x94D049BB133111EBu;
    float const unit = static_cast<float>(h >> 40) * 0x1p-24f;
    if constexpr (bm::storage<T>)
      x[i] = bm::convert<T>(low + (high - low) * unit);
    else
      x[i] = static_cast<T>(std::floor(low + (high - low) * unit));  // whole numbers of [low, high)
  }
}
}  // namespace values

/// A device tensor of numbers that are uniform in [low, high), the same for the same seed.
template <class T, class... Ints>
auto random_tensor(int seed, float low, float high, Ints... extents) {
  device_tensor<T, (static_cast<void>(extents), dyn)...> t(extents...);
  bm::cuda::launch("bench", bm::device::cuda{.stream = stream()}, {bm::cuda::strided_blocks_for(t.size(), 256, 8), 256},
                   values::fill<T>, t.data(), t.size(), static_cast<std::uint32_t>(seed), low, high);
  return t;
}
template <class T, class... Ints>
auto random_tensor(int seed, Ints... extents) {
  return random_tensor<T>(seed, -1.0f, 1.0f, extents...);
}
/// A device tensor with every bit set: NaN where nothing is written.
template <class T, class... Ints>
auto poisoned_tensor(Ints... extents) {
  device_tensor<T, (static_cast<void>(extents), dyn)...> t(extents...);
  check(cudaMemsetAsync(t.data(), 0xff, sizeof(T) * static_cast<std::size_t>(t.size()), stream()));
  return t;
}

/// Rows [first, first + count) of a contiguous tensor, on the host.
template <class T, int... Extents>
auto on_host(bm::view<bm::space::device, T, Extents...> x, std::int64_t first, std::int64_t count) {
  auto const part = x.slice(first, count);
  host_tensor<std::remove_const_t<T>, dyn> flat(part.size());
  check(cudaStreamSynchronize(stream()));
  check(
      cudaMemcpy(flat.data(), part.data(), sizeof(T) * static_cast<std::size_t>(part.size()), cudaMemcpyDeviceToHost));
  return flat;
}
template <class T, int... Extents>
auto on_host(bm::view<bm::space::device, T, Extents...> x) {
  return on_host(x, 0, x.extent(0));
}

/// Whether |actual - expected| <= tolerance (largest |expected|) everywhere; else the benchmark ends with what differs.
template <class A, class E>
bool agrees(benchmark::State& state, std::string const& what, A const& actual, E const& expected, double tolerance) {
  double scale = 0, worst = 0;
  bool same = actual.size() == expected.size();
  for (std::int64_t i = 0; same && i < expected.size(); ++i)
    scale = std::max(scale, std::abs(static_cast<double>(bm::convert<float>(expected.data()[i]))));
  for (std::int64_t i = 0; same && i < expected.size(); ++i) {
    double const error = std::abs(static_cast<double>(bm::convert<float>(actual.data()[i])) -
                                  static_cast<double>(bm::convert<float>(expected.data()[i])));
    if (!(error <= worst)) worst = error;
    if (std::isnan(error)) break;
  }
  if (same && worst <= tolerance * scale) return true;
  std::string const message = what + " is wrong by " + std::to_string(worst) + " of " + std::to_string(scale);
  std::printf("%s\n", message.c_str());
  state.SkipWithError(message.c_str());
  return false;
}

/// What a call has to do at least: bytes that it reads and writes, and operations of a unit that does so many a second.
struct work {
  double bytes = 0;
  double operations = 0;
  double operations_per_second = 0;
};

/// Median seconds of one call f(policy, set), over the sets in turn: calls are recorded into a graph of at least 2 ms,
/// which is run many times, so that neither the host nor the caches take part.
template <class Sets, class F>
double seconds_of_call(Sets const& sets, std::size_t workspace_bytes, F&& f) {
  bm::arena<bm::space::device> workspace(workspace_bytes);
  bm::device::cuda const policy{.stream = stream(), .workspace = &workspace};
  auto const round = [&] {
    for (auto const& set : sets) f(policy, set);
  };
  round();
  check(cudaStreamSynchronize(stream()));
  double const once = device_seconds(stream(), round);
  int const rounds = static_cast<int>(std::clamp(std::ceil(2e-3 / once), 1.0, 500.0));
  check(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < rounds; ++i) round();
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(stream(), &graph));
  cudaGraphExec_t recorded = nullptr;
  check(cudaGraphInstantiate(&recorded, graph, 0));
  auto const replay = [&] { check(cudaGraphLaunch(recorded, stream())); };
  for (int i = 0; i < 3; ++i) replay();
  std::vector<double> samples;
  int const count = once * rounds > 0.05 ? 5 : 21;
  for (int i = 0; i < count; ++i) samples.push_back(device_seconds(stream(), replay));
  check(cudaGraphExecDestroy(recorded));
  check(cudaGraphDestroy(graph));
  return median(samples) / (static_cast<double>(rounds) * static_cast<double>(sets.size()));
}

/// Measures f(policy, set) and reports it: us, GB_per_s, of_copy (share of the copy's rate) and, where operations are
/// told, floor_us and of_floor (share of the larger of both floors).
template <class Sets, class F>
double measure(benchmark::State& state, work const& least, Sets const& sets, F&& f,
               std::size_t workspace_bytes = std::size_t{256} << 20) {
  double const seconds = seconds_of_call(sets, workspace_bytes, f);
  for (auto _ : state) state.SetIterationTime(seconds);
  double const floor =
      std::max(least.bytes / copy_rate(), least.operations > 0 ? least.operations / least.operations_per_second : 0.0);
  state.counters["us"] = seconds * 1e6;
  state.counters["GB_per_s"] = least.bytes / seconds * 1e-9;
  state.counters["of_copy"] = least.bytes / seconds / copy_rate();
  if (least.operations > 0) {
    state.counters["Tops"] = least.operations / seconds * 1e-12;
    state.counters["floor_us"] = floor * 1e6;
    state.counters["of_floor"] = floor / seconds;
  }
  state.counters["sets"] = static_cast<double>(sets.size());
  return seconds;
}

/// Median seconds of a call of f and of g, each in several stretches of 20 ms after 10 ms of its own.
template <class F, class G>
std::pair<double, double> seconds_in_turns(F&& f, G&& g) {
  auto const stretch = [&](auto const& call, std::vector<double>& samples) {
    double const once = device_seconds(stream(), call);
    int const calls = std::max(2, static_cast<int>(20e-3 / once));
    for (int i = 0; i < calls / 2; ++i) call();
    samples.push_back(device_seconds(stream(),
                                     [&] {
                                       for (int i = 0; i < calls; ++i) call();
                                     }) /
                      calls);
  };
  std::vector<double> first, second, unused;
  for (int turn = 0; turn < 6; ++turn) {
    stretch(f, turn == 0 ? unused : first);
    stretch(g, turn == 0 ? unused : second);
  }
  return {median(first), median(second)};
}

/// The measure's own median is the time: one iteration, told by hand.
inline void manual(benchmark::internal::Benchmark* b) {
  b->UseManualTime()->Iterations(1)->Unit(benchmark::kMicrosecond);
}

/// Runs the program's benchmarks, with the device in the context. Without a device: says so and returns 77.
inline int run(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  cudaDeviceProp properties{};
  int clock_khz = 0, memory_khz = 0, device = 0;
  check(cudaGetDevice(&device));
  check(cudaGetDeviceProperties(&properties, device));
  check(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, device));
  check(cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, device));
  benchmark::AddCustomContext("device", properties.name);
  benchmark::AddCustomContext("device_clock_MHz", std::to_string(clock_khz / 1000));
  benchmark::AddCustomContext("device_memory_clock_MHz", std::to_string(memory_khz / 1000));
  benchmark::AddCustomContext("device_multiprocessors", std::to_string(properties.multiProcessorCount));
  benchmark::AddCustomContext("device_l2_bytes", std::to_string(properties.l2CacheSize));
  benchmark::AddCustomContext("device_copy_GB_per_s", std::to_string(copy_rate() * 1e-9));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace bench
