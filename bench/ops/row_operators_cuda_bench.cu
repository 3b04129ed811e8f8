/// The operators that go over memory once, on a CUDA device, as a share of what the same device copies in this program:
/// norms with and without the fused residual add, gated activation, embedding, AdamW, cross entropy, and the dispatch
/// of tokens to experts. Bytes are those of operands and results, each once; tensors have 100 MB and more. Results are
/// compared with the CPU's on the first and the last rows before the clock starts.
#include <blackmamba/ops/adamw/adamw.hpp>
#include <blackmamba/ops/cross_entropy/cross_entropy.hpp>
#include <blackmamba/ops/embedding/embedding.hpp>
#include <blackmamba/ops/expert_dispatch/expert_dispatch.hpp>
#include <blackmamba/ops/gated_activation/gated_activation.hpp>
#include <blackmamba/ops/layer_norm/layer_norm.hpp>
#include <blackmamba/ops/rms_norm/rms_norm.hpp>

#include "support/cuda_timing.cuh"

using namespace blackmamba;
using bench::agrees;
using bench::device_tensor;
using bench::host_tensor;
using bench::on_host;

namespace {

device::cuda policy() { return {.stream = bench::stream()}; }
device::cpu const host;

template <class T>
constexpr double rounding() {
  return sizeof(T) == 2 ? 1.0 / 128 : 2e-6;
}
constexpr std::int64_t checked = 8;

// ---- norms: rows x width in T, residual stream in float ----

template <class T>
struct norm_set {
  device_tensor<T, dyn, dyn> x, y;
  device_tensor<float, dyn, dyn> residual, sum;
  device_tensor<float, dyn> weight, bias, rstd, mean, d_weight, d_bias;

  norm_set(std::int64_t rows, std::int64_t width, bool fused, int seed)
      : x(bench::random_tensor<T>(seed, rows, width)),
        y(bench::poisoned_tensor<T>(rows, width)),
        weight(bench::random_tensor<float>(seed + 2, 0.5f, 1.5f, width)),
        bias(bench::random_tensor<float>(seed + 3, width)),
        rstd(bench::poisoned_tensor<float>(rows)),
        mean(bench::poisoned_tensor<float>(rows)),
        d_weight(zeros<float>(policy(), width)),
        d_bias(zeros<float>(policy(), width)) {
    if (!fused) return;
    residual = bench::random_tensor<float>(seed + 1, rows, width);
    sum = bench::poisoned_tensor<float>(rows, width);
  }
};

template <class Norm, class T>
typename Norm::template inputs<device::cuda, T> forward_inputs(norm_set<T> const& p) {
  if constexpr (std::is_same_v<Norm, layer_norm>)
    return {.x = p.x, .weight = p.weight, .bias = p.bias, .residual = p.residual};
  else
    return {.x = p.x, .weight = p.weight, .residual = p.residual};
}
template <class Norm, class T>
typename Norm::template saved<device::cuda, T> forward_results(norm_set<T> const& p) {
  if constexpr (std::is_same_v<Norm, layer_norm>)
    return {.sum = p.sum, .rstd = p.rstd, .mean = p.mean};
  else
    return {.sum = p.sum, .rstd = p.rstd};
}

template <class Norm, class T>
bool norm_agrees(benchmark::State& state, norm_set<T> const& p, std::int64_t first) {
  std::int64_t const width = p.x.extent(1);
  auto const x = on_host(p.x.as_view(), first, checked);
  auto const weight = on_host(p.weight.as_view()), bias = on_host(p.bias.as_view());
  host_tensor<T, dyn, dyn> y(checked, width);
  typename Norm::template inputs<device::cpu, T> in{.x = x.reshape(checked, width), .weight = weight};
  if constexpr (std::is_same_v<Norm, layer_norm>) in.bias = bias;
  host_tensor<float, dyn> residual;
  if (p.residual.present()) {
    residual = on_host(p.residual.as_view(), first, checked);
    in.residual = residual.reshape(checked, width);
  }
  Norm::forward(host, in, y.as_view());
  return agrees(state, "y", on_host(p.y.as_view(), first, checked), y, rounding<T>());
}

/// Arguments: rows, width, whether the residual add is fused.
template <class Norm, class T>
void norm_forward(benchmark::State& state) {
  std::int64_t const rows = state.range(0), width = state.range(1);
  bool const fused = state.range(2) != 0;
  double const bytes = static_cast<double>(rows * width) * (2 * sizeof(T) + (fused ? 2 * sizeof(float) : 0));
  auto const sets = bench::rotated(bytes, [&](int i) { return norm_set<T>(rows, width, fused, 10 * i); });
  auto const call = [](device::cuda const& on, norm_set<T> const& p) {
    Norm::forward(on, forward_inputs<Norm>(p), p.y.as_view(), forward_results<Norm>(p));
  };
  call(policy(), sets[0]);
  for (std::int64_t first : {std::int64_t{0}, rows - checked})
    if (!norm_agrees<Norm>(state, sets[0], first)) return;
  bench::measure(state, {.bytes = bytes}, sets, call);
}

template <class Norm>
typename Norm::template gradient_inputs<device::cuda, bfloat16, float> backward_inputs(norm_set<bfloat16> const& p) {
  if constexpr (std::is_same_v<Norm, layer_norm>)
    return {.sum = p.sum, .rstd = p.rstd, .mean = p.mean, .weight = p.weight, .d_y = p.x, .d_residual = p.residual};
  else
    return {.sum = p.sum, .rstd = p.rstd, .weight = p.weight, .d_y = p.x, .d_residual = p.residual};
}

/// d_y in bf16, sum and the residual's gradient in float, in place.
template <class Norm>
void norm_backward(benchmark::State& state) {
  std::int64_t const rows = state.range(0), width = state.range(1);
  double const bytes = static_cast<double>(rows * width) * (2 + 3 * sizeof(float));
  auto const sets = bench::rotated(bytes, [&](int i) {
    norm_set<bfloat16> p(rows, width, true, 10 * i);
    Norm::forward(policy(), forward_inputs<Norm>(p), p.y.as_view(), forward_results<Norm>(p));
    return p;
  });
  auto const call = [](device::cuda const& on, norm_set<bfloat16> const& p) {
    if constexpr (std::is_same_v<Norm, layer_norm>)
      Norm::template backward<device::cuda, bfloat16, float>(on, backward_inputs<Norm>(p), p.residual.as_view(),
                                                             p.d_weight, p.d_bias);
    else
      Norm::template backward<device::cuda, bfloat16, float>(on, backward_inputs<Norm>(p), p.residual.as_view(),
                                                             p.d_weight);
  };
  auto const& p = sets[0];
  for (std::int64_t first : {std::int64_t{0}, rows - checked}) {
    // The rows before the call, on the host; then the call on a copy of the rows alone.
    auto const sum = on_host(p.sum.as_view(), first, checked), before = on_host(p.residual.as_view(), first, checked);
    auto const d_y = on_host(p.x.as_view(), first, checked);
    auto const rstd = on_host(p.rstd.as_view(), first, checked), mean = on_host(p.mean.as_view(), first, checked);
    auto const weight = on_host(p.weight.as_view());
    host_tensor<float, dyn, dyn> d_s(checked, width);
    auto const d_weight = zeros<float>(host, width), d_bias = zeros<float>(host, width);
    typename Norm::template gradient_inputs<device::cpu, bfloat16, float> in{};
    in.sum = sum.reshape(checked, width);
    in.rstd = rstd;
    if constexpr (std::is_same_v<Norm, layer_norm>) in.mean = mean;
    in.weight = weight;
    in.d_y = d_y.reshape(checked, width);
    in.d_residual = before.reshape(checked, width);
    Norm::template backward<device::cpu, bfloat16, float>(host, in, d_s.as_view(), d_weight);
    call(policy(), p);
    if (!agrees(state, "d_s", on_host(p.residual.as_view(), first, checked), d_s, 1e-5)) return;
  }
  bench::measure(state, {.bytes = bytes}, sets, call);
}

void norm_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "width", "fused"})->Apply(bench::manual);
  for (int fused : {0, 1}) b->Args({65536, 1472, fused})->Args({16384, 4096, fused})->Args({262144, 256, fused});
}
void norm_gradient_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "width"})->Apply(bench::manual)->Args({65536, 1472})->Args({16384, 4096});
}
BENCHMARK(norm_forward<rms_norm, bfloat16>)->Apply(norm_shapes);
BENCHMARK(norm_forward<rms_norm, float>)->Apply(norm_shapes);
BENCHMARK(norm_forward<layer_norm, bfloat16>)->Apply(norm_shapes);
BENCHMARK(norm_backward<rms_norm>)->Apply(norm_gradient_shapes);
BENCHMARK(norm_backward<layer_norm>)->Apply(norm_gradient_shapes);

// ---- gated activation: gate and up are halves of one projection ----

struct gate_set {
  std::int64_t rows, width;
  device_tensor<bfloat16, dyn, dyn> projection, y, d_projection;
  gate_set(std::int64_t r, std::int64_t w, int seed)
      : rows(r),
        width(w),
        projection(bench::random_tensor<bfloat16>(seed, -3.0f, 3.0f, r, 2 * w)),
        y(bench::random_tensor<bfloat16>(seed + 1, r, w)),
        d_projection(bench::poisoned_tensor<bfloat16>(r, 2 * w)) {}
};

template <class Activation>
void gated_forward(benchmark::State& state) {
  std::int64_t const rows = state.range(0), width = state.range(1);
  double const bytes = static_cast<double>(rows * width) * 6;
  auto const sets = bench::rotated(bytes, [&](int i) { return gate_set(rows, width, 10 * i); });
  auto const call = [](device::cuda const& on, gate_set const& p) {
    gated_activation::forward<Activation>(on, p.projection.columns(0, p.width), p.projection.columns(p.width, p.width),
                                          p.y.as_view());
  };
  call(policy(), sets[0]);
  for (std::int64_t first : {std::int64_t{0}, rows - checked}) {
    auto const projection = on_host(sets[0].projection.as_view(), first, checked);
    auto const both = projection.reshape(checked, 2 * width);
    host_tensor<bfloat16, dyn, dyn> y(checked, width);
    gated_activation::forward<Activation>(host, both.columns(0, width), both.columns(width, width), y.as_view());
    if (!agrees(state, "y", on_host(sets[0].y.as_view(), first, checked), y, rounding<bfloat16>())) return;
  }
  bench::measure(state, {.bytes = bytes}, sets, call);
}
template <class Activation>
void gated_backward(benchmark::State& state) {
  std::int64_t const rows = state.range(0), width = state.range(1);
  double const bytes = static_cast<double>(rows * width) * 10;
  auto const sets = bench::rotated(bytes, [&](int i) { return gate_set(rows, width, 10 * i); });
  auto const call = [](device::cuda const& on, gate_set const& p) {
    gated_activation::backward<Activation, device::cuda, bfloat16>(
        on, {.gate = p.projection.columns(0, p.width), .up = p.projection.columns(p.width, p.width), .d_y = p.y},
        {.d_gate = p.d_projection.columns(0, p.width), .d_up = p.d_projection.columns(p.width, p.width)});
  };
  call(policy(), sets[0]);
  for (std::int64_t first : {std::int64_t{0}, rows - checked}) {
    auto const projection = on_host(sets[0].projection.as_view(), first, checked);
    auto const both = projection.reshape(checked, 2 * width);
    auto const d_y = on_host(sets[0].y.as_view(), first, checked);
    host_tensor<bfloat16, dyn, dyn> d(checked, 2 * width);
    gated_activation::backward<Activation, device::cpu, bfloat16>(
        host, {.gate = both.columns(0, width), .up = both.columns(width, width), .d_y = d_y.reshape(checked, width)},
        {.d_gate = d.columns(0, width), .d_up = d.columns(width, width)});
    if (!agrees(state, "d", on_host(sets[0].d_projection.as_view(), first, checked), d, rounding<bfloat16>())) return;
  }
  bench::measure(state, {.bytes = bytes}, sets, call);
}

void gate_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "width"})->Apply(bench::manual)->Args({16384, 3872})->Args({65536, 1472});
}
BENCHMARK(gated_forward<activation::silu>)->Apply(gate_shapes);
BENCHMARK(gated_forward<activation::gelu>)->Apply(gate_shapes);
BENCHMARK(gated_backward<activation::silu>)->Apply(gate_shapes);

// ---- embedding ----

struct embedding_set {
  device_tensor<std::int32_t, dyn> token;
  device_tensor<bfloat16, dyn, dyn> table, y;
  device_tensor<float, dyn, dyn> d_table;
};

/// Bytes count each row of the output and the row of the table that it comes from.
void embedding_forward(benchmark::State& state) {
  std::int64_t const rows = state.range(0), width = state.range(1), vocabulary = state.range(2);
  double const bytes = static_cast<double>(rows * width) * 4;
  auto const sets = bench::rotated(bytes, [&](int i) {
    return embedding_set{bench::random_tensor<std::int32_t>(i, 0.0f, static_cast<float>(vocabulary), rows),
                         bench::random_tensor<bfloat16>(i + 1, vocabulary, width),
                         bench::poisoned_tensor<bfloat16>(rows, width),
                         {}};
  });
  auto const call = [](device::cuda const& on, embedding_set const& p) {
    embedding::forward(on, p.token, p.table, p.y.as_view());
  };
  call(policy(), sets[0]);
  auto const token = on_host(sets[0].token.as_view(), 0, checked);
  auto const table = on_host(sets[0].table.as_view());
  host_tensor<bfloat16, dyn, dyn> y(checked, width);
  embedding::forward(host, token, table.reshape(vocabulary, width), y.as_view());
  if (!agrees(state, "y", on_host(sets[0].y.as_view(), 0, checked), y, 0)) return;
  bench::measure(state, {.bytes = bytes}, sets, call);
}
/// Tokens of which number n + 1 occurs in proportion to 1 / (n + 1)^Exponent: uniform, as words do, and, for a large
/// exponent, one alone.
template <int Exponent>
device_tensor<std::int32_t, dyn> random_words(int seed, std::int64_t rows, std::int64_t vocabulary) {
  if constexpr (Exponent == 0)
    return bench::random_tensor<std::int32_t>(seed, 0.0f, static_cast<float>(vocabulary), rows);
  std::vector<double> upto(static_cast<std::size_t>(vocabulary));
  double sum = 0;
  for (std::size_t n = 0; n < upto.size(); ++n) upto[n] = sum += std::pow(static_cast<double>(n + 1), -Exponent);
  auto const uniform = on_host(bench::random_tensor<float>(seed, 0.0f, 1.0f, rows).as_view());
  host_tensor<std::int32_t, dyn> token(rows);
  for (std::int64_t r = 0; r < rows; ++r) {
    auto const at = std::lower_bound(upto.begin(), upto.end(), static_cast<double>(uniform.data()[r]) * sum);
    token(r) = static_cast<std::int32_t>(std::min<std::int64_t>(at - upto.begin(), vocabulary - 1));
  }
  device_tensor<std::int32_t, dyn> words(rows);
  memory::upload(policy(), token.as_view(), words.as_view());
  return words;
}
/// Bytes count the gradients' rows once, and each row of the table that occurs read and written.
template <int Exponent>
void embedding_backward(benchmark::State& state) {
  std::int64_t const rows = state.range(0), width = state.range(1), vocabulary = state.range(2);
  auto const sets = bench::rotated(static_cast<double>(rows * width) * 2, [&](int i) {
    return embedding_set{random_words<Exponent>(i, rows, vocabulary),
                         {},
                         bench::random_tensor<bfloat16>(i + 1, rows, width),
                         zeros<float>(policy(), vocabulary, width)};
  });
  auto const call = [](device::cuda const& on, embedding_set const& p) {
    embedding::backward<device::cuda, bfloat16>(on, p.token, p.y, p.d_table);
  };
  call(policy(), sets[0]);
  auto const token = on_host(sets[0].token.as_view());
  auto const d_y = on_host(sets[0].y.as_view());
  auto const d_table = zeros<float>(host, vocabulary, width);
  embedding::backward<device::cpu, bfloat16>(host, token, d_y.reshape(rows, width), d_table);
  if (!agrees(state, "d_table", on_host(sets[0].d_table.as_view()), d_table, 0)) return;
  std::vector<bool> occurs(static_cast<std::size_t>(vocabulary));
  for (std::int64_t r = 0; r < rows; ++r) occurs[static_cast<std::size_t>(token.data()[r])] = true;
  auto const occurring = static_cast<double>(std::count(occurs.begin(), occurs.end(), true));
  double const bytes = static_cast<double>(width) * (2 * static_cast<double>(rows) + 8 * occurring);
  bench::measure(state, {.bytes = bytes}, sets, call);
}
BENCHMARK(embedding_forward)
    ->ArgNames({"rows", "width", "vocabulary"})
    ->Apply(bench::manual)
    ->Args({65536, 1472, 50304})
    ->Args({65536, 1472, 256});
void embedding_gradient_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "width", "vocabulary"})->Apply(bench::manual);
  for (int vocabulary : {50304, 256}) b->Args({65536, 1472, vocabulary});
}
BENCHMARK(embedding_backward<0>)->Name("embedding_backward")->Apply(embedding_gradient_shapes);
BENCHMARK(embedding_backward<1>)->Name("embedding_backward_of_words")->Apply(embedding_gradient_shapes);
BENCHMARK(embedding_backward<64>)->Name("embedding_backward_of_one_token")->Apply(embedding_gradient_shapes);

// ---- adamw ----

struct adamw_set {
  device_tensor<float, dyn> parameter, gradient, first, second, norm;
  device_tensor<bfloat16, dyn> copy;
  adamw_set(std::int64_t n, int seed)
      : parameter(bench::random_tensor<float>(seed, n)),
        gradient(bench::random_tensor<float>(seed + 1, n)),
        first(bench::random_tensor<float>(seed + 2, n)),
        second(bench::random_tensor<float>(seed + 3, 0.1f, 1.0f, n)),
        norm(bench::poisoned_tensor<float>(1)),
        copy(bench::poisoned_tensor<bfloat16>(n)) {}
};
adamw::options const optimiser{.learning_rate = 1e-3, .step = 7, .max_norm = 1};

void adamw_step(benchmark::State& state) {
  std::int64_t const n = state.range(0);
  double const bytes = static_cast<double>(n) * (7 * 4 + 2);
  auto const sets = bench::rotated(bytes, [&](int i) { return adamw_set(n, 10 * i); });
  auto const call = [&](device::cuda const& on, adamw_set const& p) {
    adamw::segment<device::cuda, bfloat16> const all{.parameter = p.parameter,
                                                     .gradient = p.gradient,
                                                     .first_moment = p.first,
                                                     .second_moment = p.second,
                                                     .copy = p.copy};
    adamw::segment<device::cuda, bfloat16> parts[] = {all.slice(0, n / 3), all.slice(n / 3, n - n / 3)};
    parts[0].weight_decay = 0.1;
    adamw::step<device::cuda, bfloat16>(on, parts, p.norm, optimiser);
  };
  auto const& p = sets[0];
  std::int64_t const some = 1000;
  auto const parameter = on_host(p.parameter.as_view(), 0, some), gradient = on_host(p.gradient.as_view(), 0, some);
  auto const first = on_host(p.first.as_view(), 0, some), second = on_host(p.second.as_view(), 0, some);
  for (auto const& set : sets) adamw::norm<device::cuda, float>(policy(), set.gradient, set.norm.as_view());
  call(policy(), p);
  auto const norm = on_host(p.norm.as_view());
  adamw::step<device::cpu, bfloat16>(
      host,
      {.parameter = parameter,
       .gradient = gradient,
       .first_moment = first,
       .second_moment = second,
       .weight_decay = 0.1},
      norm, optimiser);
  if (!agrees(state, "parameter", on_host(p.parameter.as_view(), 0, some), parameter, 1e-6)) return;
  bench::measure(state, {.bytes = bytes}, sets, call);
}
void adamw_norm(benchmark::State& state) {
  std::int64_t const n = state.range(0);
  double const bytes = static_cast<double>(n) * 4;
  auto const sets = bench::rotated(bytes, [&](int i) { return adamw_set(n, 10 * i); });
  auto const call = [](device::cuda const& on, adamw_set const& p) {
    adamw::norm<device::cuda, float>(on, p.gradient, p.norm.as_view());
  };
  call(policy(), sets[0]);
  auto const gradient = on_host(sets[0].gradient.as_view());
  host_tensor<float, dyn> norm(1);
  adamw::norm<device::cpu, float>(host, gradient, norm.as_view());
  if (!agrees(state, "norm", on_host(sets[0].norm.as_view()), norm, 1e-6)) return;
  bench::measure(state, {.bytes = bytes}, sets, call);
}
BENCHMARK(adamw_step)->ArgName("n")->Apply(bench::manual)->Arg(100'000'000);
BENCHMARK(adamw_norm)->ArgName("n")->Apply(bench::manual)->Arg(100'000'000);

// ---- cross entropy ----

struct loss_set {
  device_tensor<bfloat16, dyn, dyn> logits, d_logits;
  device_tensor<std::int32_t, dyn> target;
  device_tensor<float, dyn> loss, row_loss, lse;
  loss_set(std::int64_t rows, std::int64_t classes, int seed)
      : logits(bench::random_tensor<bfloat16>(seed, -8.0f, 8.0f, rows, classes)),
        d_logits(bench::poisoned_tensor<bfloat16>(rows, classes)),
        target(bench::random_tensor<std::int32_t>(seed + 1, 0.0f, static_cast<float>(classes), rows)),
        loss(bench::poisoned_tensor<float>(1)),
        row_loss(bench::poisoned_tensor<float>(rows)),
        lse(bench::poisoned_tensor<float>(rows)) {}
};
void loss_forward_call(device::cuda const& on, loss_set const& p) {
  cross_entropy::forward<device::cuda, bfloat16>(on, {.logits = p.logits, .target = p.target},
                                                 {.loss = p.loss, .row_loss = p.row_loss, .lse = p.lse});
}

template <bool Backward>
void loss(benchmark::State& state) {
  std::int64_t const rows = state.range(0), classes = state.range(1);
  double const bytes = static_cast<double>(rows * classes) * (Backward ? 4 : 2);
  auto const sets = bench::rotated(bytes, [&](int i) { return loss_set(rows, classes, 10 * i); });
  auto const gradient = [](device::cuda const& on, loss_set const& p) {
    cross_entropy::backward<device::cuda, bfloat16>(
        on, {.logits = p.logits, .target = p.target, .lse = p.lse, .scale = 0.5f}, p.d_logits.as_view());
  };
  for (auto const& p : sets) loss_forward_call(policy(), p);
  auto const& p = sets[0];
  if (Backward) gradient(policy(), p);
  for (std::int64_t first : {std::int64_t{0}, rows - checked}) {
    auto const logits = on_host(p.logits.as_view(), first, checked);
    auto const target = on_host(p.target.as_view(), first, checked);
    host_tensor<float, dyn> sum(1), row_loss(checked), lse(checked);
    cross_entropy::forward<device::cpu, bfloat16>(host, {.logits = logits.reshape(checked, classes), .target = target},
                                                  {.loss = sum, .row_loss = row_loss, .lse = lse});
    if (!agrees(state, "row_loss", on_host(p.row_loss.as_view(), first, checked), row_loss, 1e-5)) return;
    if (!Backward) continue;
    host_tensor<bfloat16, dyn, dyn> d(checked, classes);
    cross_entropy::backward<device::cpu, bfloat16>(
        host, {.logits = logits.reshape(checked, classes), .target = target, .lse = lse, .scale = 0.5f}, d.as_view());
    if (!agrees(state, "d_logits", on_host(p.d_logits.as_view(), first, checked), d, rounding<bfloat16>())) return;
  }
  if (Backward)
    bench::measure(state, {.bytes = bytes}, sets, gradient);
  else
    bench::measure(state, {.bytes = bytes}, sets, loss_forward_call);
}
void loss_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "classes"})->Apply(bench::manual)->Args({8192, 50304})->Args({2048, 50304})->Args({524288, 256});
}
BENCHMARK(loss<false>)->Name("cross_entropy_forward")->Apply(loss_shapes);
BENCHMARK(loss<true>)->Name("cross_entropy_backward")->Apply(loss_shapes);

// ---- expert dispatch ----

struct dispatch_set {
  std::int64_t tokens, choices, experts, width;
  device_tensor<std::int32_t, dyn, dyn> expert;
  device_tensor<std::int64_t, dyn> offsets;
  device_tensor<std::int32_t, dyn> source, row;
  device_tensor<bfloat16, dyn, dyn> x, rows, d_rows;
  device_tensor<float, dyn, dyn> gate, d_gate;

  dispatch_set(std::int64_t m, std::int64_t k, std::int64_t e, std::int64_t h, int seed)
      : tokens(m),
        choices(k),
        experts(e),
        width(h),
        expert(bench::random_tensor<std::int32_t>(seed, 0.0f, static_cast<float>(e), m, k)),
        offsets(bench::poisoned_tensor<std::int64_t>(e + 1)),
        source(bench::poisoned_tensor<std::int32_t>(m * k)),
        row(bench::poisoned_tensor<std::int32_t>(m * k)),
        x(bench::random_tensor<bfloat16>(seed + 1, m, h)),
        rows(bench::random_tensor<bfloat16>(seed + 2, m * k, h)),
        d_rows(bench::poisoned_tensor<bfloat16>(m * k, h)),
        gate(bench::random_tensor<float>(seed + 3, m, k)),
        d_gate(bench::poisoned_tensor<float>(m, k)) {
    expert_dispatch::plan(policy(), expert, plan());
  }
  expert_dispatch::routing<device::cuda> plan() const { return {.offsets = offsets, .source = source, .row = row}; }
};

/// The same on the host: the whole problem, for its plan spans all tokens.
struct host_dispatch {
  host_tensor<std::int64_t, dyn> offsets;
  host_tensor<std::int32_t, dyn> source, row;
  host_tensor<bfloat16, dyn> x, rows;
  host_tensor<float, dyn> gate;
  explicit host_dispatch(dispatch_set const& p)
      : offsets(p.experts + 1),
        source(p.tokens * p.choices),
        row(p.tokens * p.choices),
        x(on_host(p.x.as_view())),
        rows(on_host(p.rows.as_view())),
        gate(on_host(p.gate.as_view())) {
    auto const expert = on_host(p.expert.as_view());
    expert_dispatch::plan(host, expert.reshape(p.tokens, p.choices), plan());
  }
  expert_dispatch::routing<device::cpu> plan() const { return {.offsets = offsets, .source = source, .row = row}; }
};

enum class part { plan, permute, combine, permute_backward, combine_backward };

template <part Part>
void dispatch(benchmark::State& state) {
  std::int64_t const m = state.range(0), k = state.range(1), e = state.range(2), h = state.range(3);
  double const token_bytes = static_cast<double>(m * h) * 2, row_bytes = token_bytes * static_cast<double>(k);
  double const slots = static_cast<double>(m * k);
  double const bytes = Part == part::plan               ? slots * 12
                       : Part == part::combine_backward ? token_bytes + 2 * row_bytes
                                                        : token_bytes + row_bytes;
  auto const sets =
      bench::rotated(Part == part::plan ? 1e9 : bytes, [&](int i) { return dispatch_set(m, k, e, h, 10 * i); });
  auto const call = [](device::cuda const& on, dispatch_set const& p) {
    if constexpr (Part == part::plan) expert_dispatch::plan(on, p.expert, p.plan());
    if constexpr (Part == part::permute) expert_dispatch::permute(on, p.plan(), p.x, p.rows.as_view());
    if constexpr (Part == part::combine) expert_dispatch::combine(on, p.plan(), p.rows, p.gate, p.x.as_view());
    if constexpr (Part == part::permute_backward)
      expert_dispatch::permute_backward(on, p.plan(), p.rows, p.x.as_view());
    if constexpr (Part == part::combine_backward)
      expert_dispatch::combine_backward<device::cuda, bfloat16>(
          on, p.plan(), {.rows = p.rows, .gate = p.gate, .d_y = p.x}, {.d_rows = p.d_rows, .d_gate = p.d_gate});
  };
  auto const& p = sets[0];
  host_dispatch const expected(p);
  call(policy(), p);
  bool same = agrees(state, "row", on_host(p.row.as_view()), expected.row, 0);
  if (same && Part == part::permute) {
    host_tensor<bfloat16, dyn, dyn> rows(m * k, h);
    expert_dispatch::permute(host, expected.plan(), expected.x.reshape(m, h), rows.as_view());
    same = agrees(state, "rows", on_host(p.rows.as_view()), rows, 0);
  }
  if (same && (Part == part::combine || Part == part::permute_backward)) {
    host_tensor<bfloat16, dyn, dyn> y(m, h);
    if (Part == part::combine)
      expert_dispatch::combine(host, expected.plan(), expected.rows.reshape(m * k, h), expected.gate.reshape(m, k),
                               y.as_view());
    else
      expert_dispatch::permute_backward(host, expected.plan(), expected.rows.reshape(m * k, h), y.as_view());
    same = agrees(state, "y", on_host(p.x.as_view()), y, rounding<bfloat16>());
  }
  if (same && Part == part::combine_backward) {
    host_tensor<bfloat16, dyn, dyn> d_rows(m * k, h);
    host_tensor<float, dyn, dyn> d_gate(m, k);
    expert_dispatch::combine_backward<device::cpu, bfloat16>(
        host, expected.plan(),
        {.rows = expected.rows.reshape(m * k, h), .gate = expected.gate.reshape(m, k), .d_y = expected.x.reshape(m, h)},
        {.d_rows = d_rows, .d_gate = d_gate});
    same = agrees(state, "d_rows", on_host(p.d_rows.as_view()), d_rows, rounding<bfloat16>()) &&
           agrees(state, "d_gate", on_host(p.d_gate.as_view()), d_gate, 1e-5);
  }
  if (same) bench::measure(state, {.bytes = bytes}, sets, call);
}
void dispatch_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"tokens", "k", "experts", "width"})
      ->Apply(bench::manual)
      ->Args({65536, 1, 8, 1472})
      ->Args({32768, 2, 8, 1472});
}
BENCHMARK(dispatch<part::plan>)->Name("dispatch_plan")->Apply(dispatch_shapes);
BENCHMARK(dispatch<part::permute>)->Name("dispatch_permute")->Apply(dispatch_shapes);
BENCHMARK(dispatch<part::combine>)->Name("dispatch_combine")->Apply(dispatch_shapes);
BENCHMARK(dispatch<part::permute_backward>)->Name("dispatch_permute_backward")->Apply(dispatch_shapes);
BENCHMARK(dispatch<part::combine_backward>)->Name("dispatch_combine_backward")->Apply(dispatch_shapes);

}  // namespace

int main(int argc, char** argv) { return bench::run(argc, argv); }
