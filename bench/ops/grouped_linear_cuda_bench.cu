/// Grouped products on CUDA at the sizes of BlackMamba-2.8B's experts (8 of them, 1472 wide, 3872 inside, gate and up
/// as one), beside the dense product of the same operations by cuBLASLt in the same program: `of_dense` is the share of
/// its rate. Both run in turns, tens of milliseconds each, for the device lowers its clock under load: what runs first
/// after a pause is up to 15% faster. Few tokens: the floor is to read the weights of the experts that have any.
#include <blackmamba/ops/grouped_linear/grouped_linear.hpp>
#include <blackmamba/ops/linear/linear.hpp>

#include "support/cuda_timing.cuh"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

using namespace blackmamba;

namespace {

using T = bfloat16;
constexpr std::int64_t experts = 8;

enum class pass { forward, d_x, d_weight };

struct problem {
  std::int64_t rows, width, outputs;
  bench::device_tensor<T, dyn, dyn> x, y;
  bench::device_tensor<T, dyn, dyn, dyn> weight;
  bench::device_tensor<float, dyn, dyn, dyn> d_weight;
  bench::device_tensor<std::int64_t, dyn> offsets;

  /// @param skewed  the first expert takes half of the rows
  problem(int seed, std::int64_t r, std::int64_t i, std::int64_t o, bool skewed, pass what)
      : rows(r),
        width(i),
        outputs(o),
        x(bench::random_tensor<T>(seed, rows, width)),
        y(bench::random_tensor<T>(seed + 1, rows, outputs)),
        weight(bench::random_tensor<T>(seed + 2, experts, outputs, width)),
        offsets(experts + 1) {
    if (what == pass::d_weight) d_weight = bench::random_tensor<float>(seed + 3, experts, outputs, width);
    bench::host_tensor<std::int64_t, dyn> ends(experts + 1);
    for (std::int64_t e = 0; e <= experts; ++e) {
      ends(e) = rows * e / experts;
      if (skewed && e > 0) ends(e) = rows / 2 + (rows - rows / 2) * (e - 1) / (experts - 1);
      // Groups of no tile's multiple.
      if (rows >= 2048 && e > 0 && e < experts) ends(e) += e * 37 % 50 - 25;
    }
    memory::upload(device::cuda{.stream = bench::stream()}, ends.as_view(), offsets.as_view());
  }

  void grouped(device::cuda const& policy, pass what) const {
    if (what == pass::forward)
      return grouped_linear::forward(policy, {.x = x, .weight = weight, .offsets = offsets}, y.as_view());
    grouped_linear::gradients<device::cuda, T> d;
    if (what == pass::d_x) d.d_x = x;
    if (what == pass::d_weight) d.d_weight = d_weight;
    grouped_linear::backward<device::cuda, T>(policy, {.x = x, .weight = weight, .offsets = offsets, .d_y = y}, d);
  }
  void dense(device::cuda const& policy, pass what) const {
    auto const first = weight.as_view().slice(0, 1).reshape(outputs, width);
    if (what == pass::forward) return linear::forward(policy, {.x = x, .weight = first}, y.as_view());
    linear::gradients<device::cuda, T> d;
    if (what == pass::d_x) d.d_x = x;
    if (what == pass::d_weight) d.d_weight = d_weight.as_view().slice(0, 1).reshape(outputs, width);
    linear::backward<device::cuda, T>(policy, {.x = x, .weight = first, .d_y = y}, d);
  }
  double operations() const {
    return 2.0 * static_cast<double>(rows) * static_cast<double>(width) * static_cast<double>(outputs);
  }
  /// The least: rows in and out, and the weights of experts that have rows.
  double bytes() const {
    auto const used = static_cast<double>(std::min(rows, experts));
    return 2.0 * (static_cast<double>(rows * (width + outputs)) + used * static_cast<double>(width * outputs));
  }
};

/// The last row against a sum in double.
bool correct(benchmark::State& state, problem const& p) {
  p.grouped({.stream = bench::stream()}, pass::forward);
  auto const x = bench::on_host(p.x.as_view(), p.rows - 1, 1);
  auto const y = bench::on_host(p.y.as_view(), p.rows - 1, 1);
  auto const weight = bench::on_host(p.weight.as_view(), std::min(p.rows, experts) - 1, 1);
  bench::host_tensor<float, dyn> expected(p.outputs);
  for (std::int64_t o = 0; o < p.outputs; ++o) {
    double sum = 0;
    for (std::int64_t i = 0; i < p.width; ++i)
      sum += static_cast<double>(widen(x(i))) * static_cast<double>(widen(weight(o * p.width + i)));
    expected(o) = static_cast<float>(sum);
  }
  return bench::agrees(state, "y", y, expected, 0x1p-8);
}

void many(benchmark::State& state, pass what, bool skewed) {
  problem const p(1, state.range(0), state.range(1), state.range(2), skewed, what);
  if (what == pass::forward && !skewed && !correct(state, p)) return;
  arena<space::device> workspace(std::size_t{64} << 20);
  device::cuda const policy{.stream = bench::stream(), .workspace = &workspace};
  auto const [dense, seconds] =
      bench::seconds_in_turns([&] { p.dense(policy, what); }, [&] { p.grouped(policy, what); });
  for (auto _ : state) state.SetIterationTime(seconds);
  state.counters["us"] = seconds * 1e6;
  state.counters["Tops"] = p.operations() / seconds * 1e-12;
  state.counters["of_copy"] = p.bytes() / seconds / bench::copy_rate();
  state.counters["dense_us"] = dense * 1e6;
  state.counters["of_dense"] = dense / seconds;
}

void few(benchmark::State& state) {
  std::int64_t const rows = state.range(0), width = state.range(1), outputs = state.range(2);
  double const used = static_cast<double>(std::min(rows, experts));
  double const bytes = 2.0 * used * static_cast<double>(width * outputs);
  auto const sets = bench::rotated(bytes, [&](int i) {
    problem p(10 * i, rows, width, outputs, false, pass::forward);
    if (rows < experts) {  // one row each for the first experts
      bench::host_tensor<std::int64_t, dyn> ends(experts + 1);
      for (std::int64_t e = 0; e <= experts; ++e) ends(e) = std::min(e, rows);
      memory::upload(device::cuda{.stream = bench::stream()}, ends.as_view(), p.offsets.as_view());
    }
    return p;
  });
  if (!correct(state, sets.front())) return;
  bench::measure(state, {.bytes = sets.front().bytes()}, sets,
                 [](device::cuda const& policy, problem const& p) { p.grouped(policy, pass::forward); });
}

void sizes(benchmark::internal::Benchmark* b) {
  bench::manual(b);
  b->ArgNames({"rows", "width", "outputs"});
  for (std::int64_t rows : {2048, 16384, 65536}) b->Args({rows, 1472, 7744})->Args({rows, 3872, 1472});
}
void few_sizes(benchmark::internal::Benchmark* b) {
  bench::manual(b);
  b->ArgNames({"rows", "width", "outputs"});
  for (std::int64_t rows : {1, 8, 64, 128, 256, 512, 2048}) b->Args({rows, 1472, 7744})->Args({rows, 3872, 1472});
}

}  // namespace

BENCHMARK_CAPTURE(many, forward, pass::forward, false)->Apply(sizes);
BENCHMARK_CAPTURE(many, forward_skewed, pass::forward, true)->Apply(sizes);
BENCHMARK_CAPTURE(many, d_x, pass::d_x, false)->Apply(sizes);
BENCHMARK_CAPTURE(many, d_weight, pass::d_weight, false)->Apply(sizes);
BENCHMARK(few)->Apply(few_sizes);

int main(int argc, char** argv) { return bench::run(argc, argv); }
