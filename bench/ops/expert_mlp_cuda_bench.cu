/// The layer of routed experts on CUDA at the sizes of BlackMamba-2.8B (8 experts, 1472 wide, 3872 inside, one expert
/// for a token, SwiGLU) and of 1.5B (1152, 3072), and what it is made of.
///
/// layer: router, plan, experts, combination, from hidden states to hidden states, as the mixer `moe` calls them;
/// inference, training (with Sinkhorn, and what backward needs is kept), backward. `of_product` is the share of the
/// rate of an 8192^3 product by cuBLASLt in the same program; both run in turns, tens of milliseconds each, for the
/// device lowers its clock under load. Few tokens: replayed from a graph; `of_copy` counts the weights of experts that
/// have tokens.
///
/// experts: expert_mlp alone, beside the same line by line (`steps_us`).
#include <blackmamba/core/random.hpp>
#include <blackmamba/nn/moe.hpp>
#include <blackmamba/ops/expert_mlp/expert_mlp.hpp>
#include <blackmamba/ops/linear/linear.hpp>

#include "support/cuda_timing.cuh"

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

using namespace blackmamba;

namespace {

using T = bfloat16;
using S = space::device;
using bench::device_tensor;

template <int Model, int Inner>
struct config {
  static constexpr int d_model = Model, d_ff = Inner, experts = 8;
};
using large = config<1472, 3872>;
using small = config<1152, 3072>;
enum class pass { inference, training, backward };

/// Operations of the experts' products for so many tokens, forward.
template <class Config>
double operations(std::int64_t tokens) {
  return 6.0 * static_cast<double>(tokens) * Config::d_model * Config::d_ff;
}
template <class Config>
double weight_bytes(std::int64_t tokens) {
  return 6.0 * static_cast<double>(std::min<std::int64_t>(tokens, Config::experts)) * Config::d_model * Config::d_ff;
}

/// A layer with random weights, its input and its gradients.
template <class Config>
struct layer {
  using mixer = moe<Config, top1<sinkhorn>, swiglu>;
  std::int64_t tokens;
  device_tensor<T, dyn, dyn> x, y, d_y, d_x, router;
  device_tensor<T, dyn, dyn, dyn> fc1, fc2;
  device_tensor<float, dyn, dyn> d_router;
  device_tensor<float, dyn, dyn, dyn> d_fc1, d_fc2;
  device_tensor<float, dyn> bias, offset, d_bias;
  device_tensor<std::int64_t, dyn> load;
  device_tensor<std::int32_t, dyn> unrouted;
  device_tensor<sinkhorn::report, dyn> report;
  arena<S> workspace;
  typename mixer::template saved<S, T> saved;

  layer(std::int64_t n, pass what, int seed = 1)
      : tokens(n),
        x(bench::random_tensor<T>(seed, n, Config::d_model)),
        y(bench::random_tensor<T>(seed + 1, n, Config::d_model)),
        router(bench::random_tensor<T>(seed + 2, -0.1f, 0.1f, Config::experts, Config::d_model)),
        fc1(bench::random_tensor<T>(seed + 3, -0.05f, 0.05f, Config::experts, 2 * Config::d_ff, Config::d_model)),
        fc2(bench::random_tensor<T>(seed + 4, -0.05f, 0.05f, Config::experts, Config::d_model, Config::d_ff)),
        bias(bench::random_tensor<float>(seed + 5, 0.0f, 0.0f, Config::experts)),
        offset(bench::random_tensor<float>(seed + 5, 0.0f, 0.0f, Config::experts)),
        load(Config::experts + 1),
        unrouted(1),
        report(1),
        workspace((std::size_t{1} << 28) + static_cast<std::size_t>(n) * (what == pass::inference  ? 16384
                                                                          : what == pass::training ? 36864
                                                                                                   : 65536)) {
    if (what != pass::backward) return;
    d_y = bench::random_tensor<T>(seed + 6, n, Config::d_model);
    d_x = bench::random_tensor<T>(seed + 6, n, Config::d_model);
    d_router = bench::random_tensor<float>(seed + 7, Config::experts, Config::d_model);
    d_fc1 = bench::random_tensor<float>(seed + 7, Config::experts, 2 * Config::d_ff, Config::d_model);
    d_fc2 = bench::random_tensor<float>(seed + 7, Config::experts, Config::d_model, Config::d_ff);
    d_bias = bench::random_tensor<float>(seed + 7, Config::experts);
    (void)forward(bench::stream(), true, saved);
  }
  typename mixer::template parameters<S, T> parameters() const {
    typename mixer::template parameters<S, T> p;
    p.router = router;
    p.router_bias = bias;
    p.balance_offset = offset;
    p.fc1 = fc1;
    p.fc2 = fc2;
    p.load = load;
    p.unrouted = unrouted;
    p.report = report;
    return p;
  }
  context<device::cuda> in_context(cudaStream_t stream, bool training) const {
    return {.policy = {.stream = stream, .workspace = const_cast<arena<S>*>(&workspace)},
            .length = tokens,
            .training = training};
  }
  int forward(cudaStream_t stream, bool training, typename mixer::template saved<S, T>& keep) const {
    mixer::template forward<device::cuda, T, S>(in_context(stream, training), parameters(), x, y, keep, nullptr);
    return 0;
  }
  void run(cudaStream_t stream, pass what) const {
    auto const c = in_context(stream, what != pass::inference);
    auto const scope = c.scope();
    if (what != pass::backward) {
      typename mixer::template saved<S, T> keep;
      forward(stream, what == pass::training, keep);
      return;
    }
    typename mixer::template parameters<S, float> d;
    d.router = d_router;
    d.router_bias = d_bias;
    d.fc1 = d_fc1;
    d.fc2 = d_fc2;
    mixer::template backward<device::cuda, T, S>(c, parameters(), saved, d_y, d_x, d);
  }
};

/// An 8192^3 product.
struct square {
  static constexpr std::int64_t n = 8192;
  device_tensor<T, dyn, dyn> a = bench::random_tensor<T>(1, n, n), b = bench::random_tensor<T>(2, n, n),
                             c = bench::random_tensor<T>(3, n, n);
  arena<S> workspace{std::size_t{64} << 20};
  void run() {
    device::cuda const policy{.stream = bench::stream(), .workspace = &workspace};
    linear::forward(policy, {.x = a, .weight = b}, c.as_view());
  }
  static constexpr double operations = 2.0 * n * n * n;
};

/// cached: one layer again and again, whose weights stay in the second-level cache where they fit; else several.
template <class Config>
void whole(benchmark::State& state, pass what, bool cached = false) {
  std::int64_t const tokens = state.range(0);
  double const all = operations<Config>(tokens) * (what == pass::backward ? 2 : 1);
  std::vector<layer<Config>> layers;
  int const count = tokens > 4096 || cached ? 1 : std::min(8, bench::copies_past_l2(weight_bytes<Config>(tokens)));
  for (int i = 0; i < count; ++i) layers.emplace_back(tokens, what, 1 + 10 * i);
  layer<Config> const& l = layers.front();
  if (tokens > 4096) {
    square product;
    auto const [seconds, product_seconds] =
        bench::seconds_in_turns([&] { l.run(bench::stream(), what); }, [&] { product.run(); });
    for (auto _ : state) state.SetIterationTime(seconds);
    double const rate = square::operations / product_seconds;
    state.counters["us"] = seconds * 1e6;
    state.counters["Tops"] = all / seconds * 1e-12;
    state.counters["product_Tops"] = rate * 1e-12;
    state.counters["of_product"] = all / seconds / rate;
    return;
  }
  bench::measure(state, {.bytes = weight_bytes<Config>(tokens)}, layers,
                 [&](device::cuda const& policy, layer<Config> const& one) { one.run(policy.stream, what); });
  state.counters["Tops"] = all / state.counters["us"] * 1e-6;
}

/// expert_mlp alone, and line by line.
template <class Config>
void experts(benchmark::State& state, bool keep) {
  std::int64_t const tokens = state.range(0);
  layer<Config> const l(tokens, pass::training);
  device::cuda const policy{.stream = bench::stream()};
  device_tensor<float, dyn, dyn> const gate = bench::random_tensor<float>(9, 0.0f, 1.0f, tokens, std::int64_t{1});
  device_tensor<std::int32_t, dyn, dyn> const expert(tokens, 1);
  device_tensor<std::int32_t, dyn> const source(tokens), row(tokens);
  bench::host_tensor<std::int32_t, dyn, dyn> chosen(tokens, 1);
  philox const random(1);
  for (std::int64_t t = 0; t < tokens; ++t)
    chosen(t, 0) = static_cast<std::int32_t>(random.bits(static_cast<std::uint64_t>(t)) % Config::experts);
  memory::upload(policy, chosen.as_view(), expert.as_view());
  expert_mlp::inputs<device::cuda, T> in{
      .x = l.x, .gate = gate, .plan = {.offsets = l.load, .source = source, .row = row}, .fc1 = l.fc1, .fc2 = l.fc2};
  expert_dispatch::plan(policy, expert, in.plan);
  device_tensor<T, dyn, dyn> const permuted(tokens, Config::d_model), rows(tokens, Config::d_model);
  device_tensor<T, dyn, dyn> const h(tokens, 2 * Config::d_ff), activated(tokens, Config::d_ff);
  expert_mlp::kept<device::cuda, T> const all{.permuted = permuted, .h = h, .activated = activated, .rows = rows};
  device_tensor<T, dyn, dyn> const other(tokens, Config::d_model);
  auto const fused = [&](cudaStream_t stream) {
    device::cuda const on{.stream = stream, .workspace = const_cast<arena<S>*>(&l.workspace)};
    expert_mlp::forward<swiglu>(on, in, l.y.as_view(), keep ? all : expert_mlp::kept<device::cuda, T>{});
  };
  auto const lines = [&](cudaStream_t stream) {
    device::cuda const on{.stream = stream};
    auto const up = h.columns(Config::d_ff, Config::d_ff);
    expert_dispatch::permute(on, in.plan, in.x, permuted.as_view());
    grouped_linear::forward(on, {.x = permuted, .weight = in.fc1, .offsets = in.plan.offsets}, h.as_view());
    gated_activation::forward<activation::silu>(on, h.columns(0, Config::d_ff), up, activated.as_view());
    grouped_linear::forward(on, {.x = activated, .weight = in.fc2, .offsets = in.plan.offsets}, rows.as_view());
    expert_dispatch::combine(on, in.plan, rows, in.gate, other.as_view());
  };
  fused(bench::stream());
  lines(bench::stream());
  std::int64_t const checked = std::min<std::int64_t>(tokens, 300);
  if (!bench::agrees(state, "y", bench::on_host(l.y.as_view(), tokens - checked, checked),
                     bench::on_host(other.as_view(), tokens - checked, checked), 0x1p-7))
    return;
  double seconds = 0, steps_seconds = 0;
  if (tokens > 4096) {
    std::tie(seconds, steps_seconds) =
        bench::seconds_in_turns([&] { fused(bench::stream()); }, [&] { lines(bench::stream()); });
  } else {
    std::vector<int> const once{0};
    seconds = bench::seconds_of_call(once, 1, [&](device::cuda const& p, int) { fused(p.stream); });
    steps_seconds = bench::seconds_of_call(once, 1, [&](device::cuda const& p, int) { lines(p.stream); });
  }
  for (auto _ : state) state.SetIterationTime(seconds);
  state.counters["us"] = seconds * 1e6;
  state.counters["steps_us"] = steps_seconds * 1e6;
  state.counters["Tops"] = operations<Config>(tokens) / seconds * 1e-12;
  state.counters["of_copy"] = weight_bytes<Config>(tokens) / seconds / bench::copy_rate();
}

void sizes(benchmark::internal::Benchmark* b) {
  bench::manual(b);
  b->ArgName("tokens");
  for (std::int64_t n : {1, 2, 4, 8, 64, 512, 2048, 16384, 65536}) b->Arg(n);
}
void large_sizes(benchmark::internal::Benchmark* b) {
  bench::manual(b);
  b->ArgName("tokens")->Arg(2048)->Arg(16384)->Arg(65536);
}

void layer_2_8b(benchmark::State& state, pass what) { whole<large>(state, what); }
void layer_1_5b(benchmark::State& state, pass what) { whole<small>(state, what); }
void layer_2_8b_cached(benchmark::State& state) { whole<large>(state, pass::inference, true); }
void experts_2_8b(benchmark::State& state, bool keep) { experts<large>(state, keep); }

}  // namespace

BENCHMARK_CAPTURE(layer_2_8b, inference, pass::inference)->Apply(sizes);
BENCHMARK(layer_2_8b_cached)->Apply(bench::manual)->ArgName("tokens")->Arg(1);
BENCHMARK_CAPTURE(layer_2_8b, training, pass::training)->Apply(large_sizes);
BENCHMARK_CAPTURE(layer_2_8b, backward, pass::backward)->Apply(large_sizes);
BENCHMARK_CAPTURE(experts_2_8b, inference, false)->Apply(sizes);
BENCHMARK_CAPTURE(experts_2_8b, training, true)->Apply(large_sizes);
BENCHMARK_CAPTURE(layer_1_5b, inference, pass::inference)->Apply(sizes);
BENCHMARK_CAPTURE(layer_1_5b, backward, pass::backward)->Apply(large_sizes);

int main(int argc, char** argv) { return bench::run(argc, argv); }
