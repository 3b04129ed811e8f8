/// From router logits to permuted rows and back on a CUDA device, replayed from a graph.
///
/// Sinkhorn: cold starts from zeros, warm from the solution for logits that drifted by a hundredth of their spread;
/// counters tell passes and error (max_j |E c_j - 1|) as reported by the last call. Logits are normal with the given
/// spread, plus a bias of the same spread for each expert; they come from memory, except in cold_cached and
/// warm_cached, where the sets stay in the L2 cache, as they do behind the product that makes them. Plan, permute and
/// combine: bytes that have to move as a share of what the same device copies in this program.
#include <blackmamba/core/random.hpp>
#include <blackmamba/ops/expert_dispatch/expert_dispatch.hpp>
#include <blackmamba/ops/router/quantile_balance.hpp>
#include <blackmamba/ops/router/router.hpp>
#include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
#include <blackmamba/ops/sinkhorn/sinkhorn.hpp>

#include "support/cuda_timing.cuh"

using namespace blackmamba;
using bench::device_tensor;
using bench::host_tensor;

namespace {

device::cuda policy() { return {.stream = bench::stream()}; }
device::cpu const host;

using host_matrix = host_tensor<float, dyn, dyn>;

/// Logits of step `step`: they drift by a hundredth of their spread from one step to the next. Beyond 65536 rows they
/// are those rows again.
host_matrix logits(std::int64_t tokens, std::int64_t experts, double spread, int step) {
  philox const normal(1, 1), bias(1, 2), drift(1, static_cast<std::uint64_t>(2 + step));
  host_matrix x(tokens, experts);
  std::int64_t const different = std::min<std::int64_t>(tokens, 65536) * experts;
  for (std::int64_t i = 0; i < different; ++i) {
    auto const at = static_cast<std::uint64_t>(i), expert = static_cast<std::uint64_t>(i % experts);
    double const drifted = drift.normal(at) + drift.normal(expert + (1u << 30));
    x.data()[i] = static_cast<float>(spread * (normal.normal(at) + bias.normal(expert) + 0.01 * drifted));
  }
  for (std::int64_t i = different; i < x.size(); ++i) x.data()[i] = x.data()[i - different];
  return x;
}
/// Sets of inputs enough to leave the caches, as far as 64 do.
template <class Make>
auto rotated(double bytes, Make&& make) {
  std::vector<decltype(make(0))> sets;
  for (int i = 0; i < std::min(bench::copies_past_l2(bytes), 64); ++i) sets.push_back(make(i));
  return sets;
}
template <class T>
auto on_device(host_tensor<T, dyn, dyn> const& x) {
  device_tensor<T, dyn, dyn> y(x.extent(0), x.extent(1));
  memory::upload(policy(), x.as_view(), y.as_view());
  return y;
}

// ---- Sinkhorn. Arguments: tokens, experts, spread, reciprocal of the tolerance ----

enum class start { cold, warm };

void solve(benchmark::State& state, start from, bool cached, sinkhorn::options how) {
  std::int64_t const tokens = state.range(0), experts = state.range(1);
  double const spread = static_cast<double>(state.range(2));
  how.tolerance = 1 / static_cast<double>(state.range(3));
  host_tensor<float, dyn> expected(experts), before(experts);
  host_tensor<sinkhorn::report, dyn> report(1);
  std::fill_n(before.data(), experts, 0.0f);
  if (from == start::warm)
    sinkhorn::forward(host, logits(tokens, experts, spread, 2), before.as_view(), report.as_view(), how);
  host_matrix const x = logits(tokens, experts, spread, 3);
  std::copy_n(before.data(), experts, expected.data());
  sinkhorn::forward(host, x, expected.as_view(), report.as_view(), how);

  struct set {
    int number;
    device_tensor<float, dyn, dyn> logits;
  };
  double const bytes = static_cast<double>(x.size()) * sizeof(float);
  int const count = cached ? std::max(1, static_cast<int>(16e6 / bytes)) : bench::copies_past_l2(bytes);
  std::vector<set> sets;
  for (int i = 0; i < std::min(count, 64); ++i) sets.push_back({i, on_device(x)});
  // Every set has an offset of its own, and all of them are put back with the first: one copy for as many calls.
  auto const calls = static_cast<std::int64_t>(sets.size());
  device_tensor<float, dyn, dyn> offset(calls, experts), saved(calls, experts);
  for (std::int64_t i = 0; i < calls; ++i)
    memory::upload(policy(), before.as_view(), saved.as_view().slice(i, 1).reshape(experts));
  device_tensor<sinkhorn::report, dyn> told(1);
  auto const run = [&](device::cuda const& on, set const& s) {
    if (s.number == 0) memory::copy(on, saved.as_view(), offset.as_view());
    sinkhorn::forward(on, s.logits, offset.as_view().slice(s.number, 1).reshape(experts), told.as_view(), how);
  };
  run(policy(), sets[0]);
  if (!bench::agrees(state, "offset", bench::on_host(offset.as_view(), 0, 1), expected, 2e-3)) return;
  bench::measure(state, {.bytes = bytes}, sets, run, sinkhorn::scratch_bytes<float>(tokens, experts));
  auto const last = bench::on_host(told.as_view());
  state.counters["passes"] = last(0).passes;
  state.counters["error"] = static_cast<double>(last(0).error);
}
void cold(benchmark::State& state) { solve(state, start::cold, false, {}); }
void cold_cached(benchmark::State& state) { solve(state, start::cold, true, {}); }
void cold_fixed_point(benchmark::State& state) { solve(state, start::cold, false, {.newton = false}); }
void warm(benchmark::State& state) { solve(state, start::warm, false, {}); }
void warm_cached(benchmark::State& state) { solve(state, start::warm, true, {}); }

void few(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "E", "spread", "1/tol"})->Apply(bench::manual);
  for (std::int64_t tokens : {2048, 65536, 1 << 20}) b->Args({tokens, 8, 1, 1000});
}
void many(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "E", "spread", "1/tol"})->Apply(bench::manual);
  for (std::int64_t tokens : {64, 2048, 16384, 65536, 1 << 20}) b->Args({tokens, 8, 1, 1000});
  b->Args({65536, 8, 2, 1000})->Args({65536, 8, 4, 1000})->Args({65536, 16, 1, 1000})->Args({65536, 64, 1, 1000});
}
BENCHMARK(cold)->Apply(many);
BENCHMARK(cold_cached)->Apply(few);
BENCHMARK(cold_fixed_point)->Apply(few);
BENCHMARK(warm)->Apply(few);
BENCHMARK(warm_cached)->Apply(few);

// ---- Router and quantile balance. Arguments: tokens, experts, k ----

struct routed {
  device_tensor<float, dyn, dyn> logits, gate;
  device_tensor<std::int32_t, dyn, dyn> expert;
};
void route(benchmark::State& state) {
  std::int64_t const tokens = state.range(0), experts = state.range(1), k = state.range(2);
  host_matrix const x = logits(tokens, experts, 1, 0);
  double const bytes = static_cast<double>(x.size() + 2 * tokens * k) * 4;
  auto const sets = rotated(bytes, [&](int) {
    return routed{on_device(x), bench::poisoned_tensor<float>(tokens, k),
                  bench::poisoned_tensor<std::int32_t>(tokens, k)};
  });
  auto const offset = zeros<float>(policy(), experts);
  auto const run = [&](device::cuda const& on, routed const& s) {
    router::forward(on, {.logits = s.logits, .offset = offset}, {.expert = s.expert, .gate = s.gate});
  };
  run(policy(), sets[0]);
  host_tensor<std::int32_t, dyn, dyn> expert(tokens, k);
  host_matrix gate(tokens, k);
  router::forward(host, {.logits = x}, {.expert = expert, .gate = gate});
  if (!bench::agrees(state, "gate", bench::on_host(sets[0].gate.as_view()), gate, 1e-6)) return;
  if (!bench::agrees(state, "expert", bench::on_host(sets[0].expert.as_view()), expert, 0)) return;
  bench::measure(state, {.bytes = bytes}, sets, run, router::scratch_bytes<space::device>(tokens));
}
BENCHMARK(route)
    ->ArgNames({"T", "E", "k"})
    ->Args({65536, 8, 1})
    ->Args({1 << 20, 8, 1})
    ->Args({1 << 20, 8, 2})
    ->Args({1 << 18, 64, 2})
    ->Apply(bench::manual);

// ---- From tokens, or from logits, to the plan. Arguments: tokens, experts, width; steps_us: operator by operator ----

struct planned_tokens {
  device_tensor<bfloat16, dyn, dyn> x, weight;
  device_tensor<float, dyn, dyn> logits, gate;
  device_tensor<std::int32_t, dyn, dyn> expert;
  device_tensor<std::int64_t, dyn> offsets;
  device_tensor<std::int32_t, dyn> source, row;

  planned_tokens(std::int64_t tokens, std::int64_t experts, std::int64_t width, int seed)
      : x(bench::random_tensor<bfloat16>(seed, tokens, width)),
        weight(bench::random_tensor<bfloat16>(seed + 1, -0.1f, 0.1f, experts, width)),
        logits(bench::random_tensor<float>(seed + 2, tokens, experts)),
        gate(bench::poisoned_tensor<float>(tokens, std::int64_t{1})),
        expert(bench::poisoned_tensor<std::int32_t>(tokens, std::int64_t{1})),
        offsets(experts + 1),
        source(tokens),
        row(tokens) {}
  router::selection<device::cuda, float> chosen() const { return {.expert = expert, .gate = gate}; }
  expert_dispatch::routing<device::cuda> plan() const { return {.offsets = offsets, .source = source, .row = row}; }
};
void to_plan(benchmark::State& state, bool from_tokens) {
  std::int64_t const tokens = state.range(0), experts = state.range(1), width = state.range(2);
  double const bytes = static_cast<double>(tokens) *
                       (4.0 * static_cast<double>(experts) + 12 + (from_tokens ? 2.0 * static_cast<double>(width) : 0));
  auto const sets = rotated(bytes, [&](int i) { return planned_tokens(tokens, experts, width, 3 * i); });
  auto const fused = [&](device::cuda const& on, planned_tokens const& s) {
    if (from_tokens)
      router_dispatch::forward<device::cuda, bfloat16>(on, {.x = s.x, .weight = s.weight},
                                                       {.logits = s.logits, .chosen = s.chosen(), .plan = s.plan()});
    else
      router_dispatch::from_logits<device::cuda, float>(on, {.logits = s.logits}, s.chosen(), s.plan());
  };
  auto const steps = [&](device::cuda const& on, planned_tokens const& s) {
    if (from_tokens)
      linear::forward<device::cuda, float, bfloat16>(on, {.x = s.x, .weight = s.weight}, s.logits.as_view());
    router::forward<device::cuda, float>(on, {.logits = s.logits}, s.chosen());
    expert_dispatch::plan(on, s.expert, s.plan());
  };
  std::size_t const scratch = std::size_t{64} << 20;
  double const steps_seconds = bench::seconds_of_call(sets, scratch, steps);
  bench::measure(state, {.bytes = bytes}, sets, fused, scratch);
  state.counters["steps_us"] = steps_seconds * 1e6;
}
void plan_sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "E", "width"})->Apply(bench::manual);
  for (std::int64_t tokens : {1, 64, 128, 512, 2048, 8192, 16384, 65536}) b->Args({tokens, 8, 1472});
  b->Args({1024, 64, 1472});
}
BENCHMARK_CAPTURE(to_plan, tokens, true)->Apply(plan_sizes);
BENCHMARK_CAPTURE(to_plan, logits, false)->Apply(plan_sizes);

void router_product(benchmark::State& state) {
  std::int64_t const tokens = state.range(0), width = state.range(1);
  double const bytes = static_cast<double>(tokens) * (2.0 * static_cast<double>(width) + 32);
  auto const sets = rotated(bytes, [&](int i) { return planned_tokens(tokens, 8, width, 3 * i); });
  bench::measure(state, {.bytes = bytes}, sets, [](device::cuda const& on, planned_tokens const& s) {
    linear::forward<device::cuda, float, bfloat16>(on, {.x = s.x, .weight = s.weight}, s.logits.as_view());
  });
}
BENCHMARK(router_product)
    ->ArgNames({"T", "width"})
    ->Args({64, 1472})
    ->Args({512, 1472})
    ->Args({2048, 1472})
    ->Args({16384, 768})
    ->Args({16384, 1472})
    ->Args({65536, 1472})
    ->Apply(bench::manual);

void quantile(benchmark::State& state) {
  std::int64_t const tokens = state.range(0), experts = state.range(1);
  quantile_balance::options const how{.rounds = static_cast<int>(state.range(2))};
  host_matrix const x = logits(tokens, experts, 1, 0);
  std::vector<device_tensor<float, dyn, dyn>> sets;
  sets.push_back(on_device(x));
  auto offset = zeros<float>(policy(), experts);
  host_tensor<float, dyn> expected(experts);
  std::fill_n(expected.data(), experts, 0.0f);
  quantile_balance::forward(host, x, expected.as_view(), how);
  quantile_balance::forward(policy(), sets[0], offset.as_view(), how);
  if (!bench::agrees(state, "offset", bench::on_host(offset.as_view()), expected, 1e-5)) return;
  bench::measure(
      state, {.bytes = static_cast<double>(x.size()) * 4}, sets,
      [&](device::cuda const& on, auto const& s) { quantile_balance::forward(on, s, offset.as_view(), how); },
      quantile_balance::scratch_bytes<float, space::device>(tokens, experts));
}
BENCHMARK(quantile)
    ->ArgNames({"T", "E", "rounds"})
    ->Args({65536, 8, 1})
    ->Args({65536, 8, 8})
    ->Args({1 << 20, 8, 1})
    ->Apply(bench::manual);

// ---- Dispatch. Arguments: tokens, experts, k, width ----

struct planned {
  device_tensor<std::int32_t, dyn, dyn> expert;
  device_tensor<std::int64_t, dyn> offsets;
  device_tensor<std::int32_t, dyn> source, row;

  planned(std::int64_t tokens, std::int64_t experts, std::int64_t k)
      : offsets(experts + 1), source(tokens * k), row(tokens * k) {
    host_tensor<std::int32_t, dyn, dyn> e(tokens, k);
    philox const random(1);
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t a = 0; a < k; ++a)  // k different experts
        e(t, a) =
            static_cast<std::int32_t>((random.bits(static_cast<std::uint64_t>(t)) + static_cast<std::uint64_t>(a)) %
                                      static_cast<std::uint64_t>(experts));
    expert = on_device(e);
    expert_dispatch::plan(policy(), expert, routing());
  }
  expert_dispatch::routing<device::cuda> routing() const { return {.offsets = offsets, .source = source, .row = row}; }
};

void plan(benchmark::State& state) {
  std::int64_t const tokens = state.range(0), experts = state.range(1), k = state.range(2), slots = tokens * k;
  double const bytes = 12.0 * static_cast<double>(slots);
  planned const first(tokens, experts, k);
  auto const sets = rotated(bytes, [&](int) { return planned(tokens, experts, k); });
  host_tensor<std::int64_t, dyn> offsets(experts + 1);
  host_tensor<std::int32_t, dyn> source(slots), row(slots);
  host_tensor<std::int32_t, dyn, dyn> expert(tokens, k);
  memory::download(policy(), first.expert.as_view(), expert.as_view());
  expert_dispatch::plan(host, expert, {.offsets = offsets, .source = source, .row = row});
  if (!bench::agrees(state, "row", bench::on_host(first.row.as_view()), row, 0)) return;
  bench::measure(
      state, {.bytes = bytes}, sets,
      [](device::cuda const& on, planned const& p) { expert_dispatch::plan(on, p.expert, p.routing()); },
      expert_dispatch::scratch_bytes(slots, experts));
}
BENCHMARK(plan)
    ->ArgNames({"T", "E", "k"})
    ->Args({1, 8, 1})
    ->Args({2048, 8, 1})
    ->Args({16384, 8, 1})
    ->Args({65536, 8, 1})
    ->Args({65536, 64, 2})
    ->Args({1 << 20, 8, 1})
    ->Args({1 << 24, 8, 1})
    ->Apply(bench::manual);

template <class T>
struct moved {
  device_tensor<T, dyn, dyn> x, rows, y;
  device_tensor<accum_t<T>, dyn, dyn> gate, d_gate;

  moved(std::int64_t tokens, std::int64_t k, std::int64_t width, int seed)
      : x(bench::random_tensor<T>(seed, tokens, width)),
        rows(bench::poisoned_tensor<T>(tokens * k, width)),
        y(bench::poisoned_tensor<T>(tokens, width)),
        gate(bench::random_tensor<accum_t<T>>(seed + 1, 1.0f, 1.0f, tokens, k)),
        d_gate(bench::poisoned_tensor<accum_t<T>>(tokens, k)) {}
};
/// copies: how often the k rows and the one row of a token are read or written.
template <class T, class F>
void move_rows(benchmark::State& state, double of_rows, double of_tokens, F&& f) {
  std::int64_t const tokens = state.range(0), experts = state.range(1), k = state.range(2), width = state.range(3);
  planned const plan(tokens, experts, k);
  double const bytes = (of_rows * static_cast<double>(k) + of_tokens) * static_cast<double>(tokens * width) * sizeof(T);
  auto const sets = rotated(bytes, [&](int i) { return moved<T>(tokens, k, width, i); });
  for (auto const& s : sets) expert_dispatch::permute(policy(), plan.routing(), s.x, s.rows.as_view());
  expert_dispatch::permute_backward(policy(), plan.routing(), sets[0].rows, sets[0].y.as_view());
  host_tensor<T, dyn> expected = bench::on_host(sets[0].x.as_view(), 0, 64);  // k times, which powers of two keep exact
  for (std::int64_t i = 0; i < expected.size(); ++i)
    expected.data()[i] = convert<T>(static_cast<accum_t<T>>(k) * widen(expected.data()[i]));
  if (!bench::agrees(state, "y", bench::on_host(sets[0].y.as_view(), 0, 64), expected, 0)) return;
  bench::measure(state, {.bytes = bytes}, sets,
                 [&](device::cuda const& on, moved<T> const& s) { f(on, plan.routing(), s); });
}
template <class T>
void permute(benchmark::State& state) {
  move_rows<T>(state, 2, 0, [](auto const& on, auto const& plan, auto const& s) {
    expert_dispatch::permute(on, plan, s.x, s.rows.as_view());
  });
}
template <class T>
void combine(benchmark::State& state) {
  move_rows<T>(state, 1, 1, [](auto const& on, auto const& plan, auto const& s) {
    expert_dispatch::combine(on, plan, s.rows, s.gate, s.y.as_view());
  });
}
template <class T>
void permute_backward(benchmark::State& state) {
  move_rows<T>(state, 1, 1, [](auto const& on, auto const& plan, auto const& s) {
    expert_dispatch::permute_backward(on, plan, s.rows, s.y.as_view());
  });
}
template <class T>
void combine_backward(benchmark::State& state) {
  move_rows<T>(state, 2, 1, [](auto const& on, auto const& plan, auto const& s) {
    expert_dispatch::combine_gradients<device::cuda, T> const d{.d_rows = s.rows, .d_gate = s.d_gate};
    expert_dispatch::combine_backward(on, plan, {.rows = s.rows, .gate = s.gate, .d_y = s.x}, d);
  });
}
void rows(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "E", "k", "width"})->Apply(bench::manual);
  b->Args({65536, 8, 1, 1472})->Args({32768, 8, 2, 1472})->Args({2048, 8, 1, 1472});
}
BENCHMARK(permute<bfloat16>)->Apply(rows);
BENCHMARK(combine<bfloat16>)->Apply(rows);
BENCHMARK(permute_backward<bfloat16>)->Apply(rows);
BENCHMARK(combine_backward<bfloat16>)->Apply(rows);

}  // namespace

int main(int argc, char** argv) { return bench::run(argc, argv); }
