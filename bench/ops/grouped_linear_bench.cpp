/// grouped_linear: the experts' products as a share of linear's rate for as many rows with one weight, measured in
/// turns. Groups are equal, or one has half of the rows and the others share the rest unevenly.
#include <blackmamba/ops/grouped_linear/grouped_linear.hpp>
#include <blackmamba/ops/linear/linear.hpp>

#include "support/bandwidth.hpp"

using namespace blackmamba;

namespace {

enum class product { forward, d_x, d_weight };

template <class T, class... Ints>
auto filled(Ints... extents) {
  tensor<space::host, T, (static_cast<void>(extents), dyn)...> t(extents...);
  for (std::int64_t i = 0; i < t.size(); ++i) t.data()[i] = convert<T>(static_cast<float>(i % 101) * 0.02f - 1.0f);
  return t;
}

/// Arguments: rows, groups, outputs, inputs, skewed, threads (0: all cores).
template <class T, product What>
void grouped(benchmark::State& state) {
  std::int64_t const rows = state.range(0), groups = state.range(1), outputs = state.range(2), width = state.range(3);
  device::cpu policy{.threads = static_cast<int>(state.range(5))};
  using A = accum_t<T>;
  auto offsets = zeros<std::int64_t>(policy, groups + 1);
  for (std::int64_t e = 1; e <= groups; ++e)
    offsets(e) = state.range(4) == 0 ? rows * e / groups : rows / 2 + rows / 2 * (e * e - 1) / (groups * groups - 1);
  auto const x = filled<T>(rows, width), d_y = filled<T>(rows, outputs);
  auto const weight = filled<T>(groups, outputs, width);
  auto y = filled<T>(rows, outputs), d_x = filled<T>(rows, width);
  auto d_weight = zeros<A>(policy, groups, outputs, width);
  auto const one = weight.slice(0, 1).reshape(outputs, width);
  auto const d_one = d_weight.slice(0, 1).reshape(outputs, width);
  arena<space::host> workspace(linear::scratch_bytes<T>(rows, width, outputs));
  policy.workspace = &workspace;

  double best = 1e9, best_dense = 1e9;
  for (auto _ : state) {
    best = std::min(best, bench::seconds([&] {
                      if (What == product::forward)
                        grouped_linear::forward(policy, {.x = x, .weight = weight, .offsets = offsets}, y.as_view());
                      else if (What == product::d_x)
                        grouped_linear::backward<device::cpu, T>(
                            policy, {.x = x, .weight = weight, .offsets = offsets, .d_y = d_y}, {.d_x = d_x});
                      else
                        grouped_linear::backward<device::cpu, T>(
                            policy, {.x = x, .weight = weight, .offsets = offsets, .d_y = d_y}, {.d_weight = d_weight});
                    }));
    best_dense =
        std::min(best_dense, bench::seconds([&] {
                   if (What == product::forward)
                     linear::forward(policy, {.x = x, .weight = one}, y.as_view());
                   else if (What == product::d_x)
                     linear::backward<device::cpu, T>(policy, {.x = x, .weight = one, .d_y = d_y}, {.d_x = d_x});
                   else
                     linear::backward<device::cpu, T>(policy, {.x = x, .weight = one, .d_y = d_y}, {.d_weight = d_one});
                 }));
  }
  double const flops = 2e-9 * static_cast<double>(rows * outputs * width);
  state.counters["GFLOP_per_s"] = flops / best;
  state.counters["dense_GFLOP_per_s"] = flops / best_dense;
  state.counters["of_dense"] = best_dense / best;
}

/// Both layers of experts of width 432 behind 160 channels, and 3872 behind 1472.
void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "groups", "outputs", "inputs", "skewed", "threads"});
  b->Unit(benchmark::kMicrosecond)->UseRealTime();
  for (int threads : {1, 0})
    for (int skewed : {0, 1}) {
      b->Args({2048, 8, 432, 160, skewed, threads});
      b->Args({2048, 8, 160, 432, skewed, threads});
      b->Args({512, 8, 3872, 1472, skewed, threads});
      b->Args({512, 8, 1472, 3872, skewed, threads});
    }
  for (int threads : {1, 0}) b->Args({16, 8, 3872, 1472, 0, threads});  // decoding
}

}  // namespace

BENCHMARK(grouped<float, product::forward>)->Apply(shapes)->Name("forward<float>");
BENCHMARK(grouped<float, product::d_x>)->Apply(shapes)->Name("d_x<float>");
BENCHMARK(grouped<float, product::d_weight>)->Apply(shapes)->Name("d_weight<float>");
BENCHMARK(grouped<bfloat16, product::forward>)->Apply(shapes)->Name("forward<bfloat16>");

BENCHMARK_MAIN();
