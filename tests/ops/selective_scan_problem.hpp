#pragma once
#include "support/sums.hpp"
#include "support/support.hpp"

#include <blackmamba/ops/selective_scan/selective_scan.hpp>

#include <algorithm>
#include <cstdint>
#include <vector>

/// Calls of the selective scan as plain numbers, the definition and its derivatives by the chain rule in double, and
/// the operator on the same numbers.
namespace selective_scan_problem {

using namespace blackmamba;

using test::values;

inline std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

/// A call of the operator: sizes, options and every tensor. An empty vector is an absent argument.
struct problem {
  std::int64_t batch = 1, length = 1, channels = 1, states = 1;
  bool softplus = false, log = false;
  values u = {}, delta = {}, A = {}, B = {}, C = {}, D = {}, z = {}, bias = {}, initial = {};
  std::vector<std::int64_t> offsets = {};

  std::int64_t sequences() const { return offsets.empty() ? batch : static_cast<std::int64_t>(offsets.size()) - 1; }
  std::int64_t row_of(std::int64_t s) const { return offsets.empty() ? s : 0; }
  std::int64_t begin(std::int64_t s) const { return offsets.empty() ? 0 : offsets[index(s)]; }
  std::int64_t end(std::int64_t s) const { return offsets.empty() ? length : offsets[index(s + 1)]; }
  /// A itself, where its logarithm is given.
  values decay_rates() const {
    values rates = A;
    if (log)
      for (double& a : rates) a = -std::exp(a);
    return rates;
  }
};

struct options {
  bool all = true;  ///< D, z, delta_bias, an initial state, softplus, the logarithm of A
  std::vector<std::int64_t> offsets = {};
};

/// Random inputs as T sees them. Decay rates lie in -0.05 to -8.
template <class T>
problem make(std::int64_t batch, std::int64_t length, std::int64_t channels, std::int64_t states, options const& o = {},
             std::uint64_t seed = 1) {
  using A = accum_t<T>;
  problem p{.batch = batch, .length = length, .channels = channels, .states = states, .softplus = o.all, .log = o.all,
            .offsets = o.offsets};
  auto const rows = batch * length;
  p.u = test::rounded<T>(test::random_normal(rows * channels, seed));
  p.delta = o.all ? test::rounded<T>(test::random_normal(rows * channels, seed + 1, 2.0))
                  : test::rounded<T>(test::random_uniform(rows * channels, seed + 1, 0.01, 1.0));
  p.A = test::random_uniform(channels * states, seed + 2, -3.0, 2.0);
  if (!o.all)
    for (auto& a : p.A) a = -std::exp(a);
  p.A = test::rounded<A>(p.A);
  p.B = test::rounded<T>(test::random_normal(rows * states, seed + 3));
  p.C = test::rounded<T>(test::random_normal(rows * states, seed + 4));
  if (!o.all) return p;
  p.D = test::rounded<A>(test::random_normal(channels, seed + 5));
  p.z = test::rounded<T>(test::random_normal(rows * channels, seed + 6));
  p.bias = test::rounded<A>(test::random_normal(channels, seed + 7));
  p.initial = test::rounded<A>(test::random_normal(p.sequences() * channels * states, seed + 8));
  return p;
}

struct outputs {
  values y, final_state;
};

/// The definition, in double. magnitude, where wanted: what the results would be if no terms cancelled, to which bounds
/// of rounding errors are relative.
inline outputs reference(problem const& p, outputs* magnitude = nullptr) {
  outputs r{values(p.u.size()), values(index(p.sequences() * p.channels * p.states))};
  if (magnitude) *magnitude = r;
  values const A = p.decay_rates();
  values without_signs(index(p.states));
  for (std::int64_t s = 0; s < p.sequences(); ++s)
    for (std::int64_t d = 0; d < p.channels; ++d) {
      auto const state = index((s * p.channels + d) * p.states);
      double* const h = r.final_state.data() + state;
      double* const sizes = magnitude ? magnitude->final_state.data() + state : without_signs.data();
      for (std::size_t n = 0; n < index(p.states); ++n) {
        h[n] = p.initial.empty() ? 0 : p.initial[state + n];
        sizes[n] = std::abs(h[n]);
      }
      for (std::int64_t t = p.begin(s); t < p.end(s); ++t) {
        std::int64_t const row = p.row_of(s) * p.length + t;
        auto const at = index(row * p.channels + d);
        double dt = p.delta[at] + (p.bias.empty() ? 0 : p.bias[index(d)]);
        if (p.softplus) dt = std::max(dt, 0.0) + std::log1p(std::exp(-std::abs(dt)));
        double y = p.D.empty() ? 0 : p.D[index(d)] * p.u[at], size = std::abs(y);
        for (std::size_t n = 0; n < index(p.states); ++n) {
          double const decay = std::exp(dt * A[index(d * p.states) + n]);
          double const added = dt * p.B[index(row * p.states) + n] * p.u[at], c = p.C[index(row * p.states) + n];
          h[n] = decay * h[n] + added;
          y += c * h[n];
          sizes[n] = decay * sizes[n] + std::abs(added);
          size += std::abs(c) * sizes[n];
        }
        auto const silu = [](double z) { return z / (1 + std::exp(-z)); };
        r.y[at] = p.z.empty() ? y : y * silu(p.z[at]);
        if (magnitude) magnitude->y[at] = p.z.empty() ? size : size * silu(std::abs(p.z[at]));
      }
    }
  return r;
}

struct derivatives {
  values d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_bias, d_initial;
};

/// The derivative of sum(d_y y) + sum(d_final final_state), in double, by the chain rule along the definition. Where
/// nothing that is given is negative, `magnitudes` takes the decay rates' factors without their sign too: then no terms
/// cancel, and the results are what bounds of rounding errors are relative to.
inline derivatives reference_backward(problem const& p, values const& d_y, values const& d_final,
                                      bool magnitudes = false) {
  auto const like = [](values const& v) { return values(v.size()); };
  derivatives r{like(p.u), like(p.u), like(p.A), like(p.B), like(p.C), values(index(p.channels)), like(p.u),
                values(index(p.channels)), values(index(p.sequences() * p.channels * p.states))};
  auto const N = index(p.states);
  values const rates = p.decay_rates();
  for (std::int64_t s = 0; s < p.sequences(); ++s)
    for (std::int64_t d = 0; d < p.channels; ++d) {
      auto const state = index((s * p.channels + d) * p.states);
      std::vector<values> h(1, values(N));
      for (std::size_t n = 0; n < N; ++n) h[0][n] = p.initial.empty() ? 0 : p.initial[state + n];
      auto const A = [&](std::size_t n) { return rates[index(d) * N + n]; };
      auto const factor = [&](std::size_t n) { return magnitudes ? -A(n) : A(n); };
      // The decay's error is some roundings of its exponent, which is a share of that many roundings' bound.
      auto const decay_of = [&](double exponent) {
        return std::exp(exponent) * (magnitudes ? 1 - exponent / 8 : 1.0);
      };
      auto const x = [&](std::size_t at) { return p.delta[at] + (p.bias.empty() ? 0 : p.bias[index(d)]); };
      auto const dt_of = [&](std::size_t at) {
        return p.softplus ? std::max(x(at), 0.0) + std::log1p(std::exp(-std::abs(x(at)))) : x(at);
      };
      auto const row = [&](std::int64_t t) { return index(p.row_of(s) * p.length + t); };
      for (std::int64_t t = p.begin(s); t < p.end(s); ++t) {
        auto const at = row(t) * index(p.channels) + index(d);
        h.push_back(values(N));
        for (std::size_t n = 0; n < N; ++n)
          h.back()[n] = decay_of(dt_of(at) * A(n)) * h[h.size() - 2][n] + dt_of(at) * p.B[row(t) * N + n] * p.u[at];
      }
      values g(N);
      for (std::size_t n = 0; n < N; ++n) g[n] = d_final.empty() ? 0 : d_final[state + n];
      for (std::int64_t t = p.end(s) - 1; t >= p.begin(s); --t) {
        auto const at = row(t) * index(p.channels) + index(d);
        auto const& now = h[index(t - p.begin(s) + 1)];
        auto const& past = h[index(t - p.begin(s))];
        double const dt = dt_of(at), skip = p.D.empty() ? 0 : p.D[index(d)];
        double y = skip * p.u[at], gate = 1;
        for (std::size_t n = 0; n < N; ++n) y += p.C[row(t) * N + n] * now[n];
        if (!p.z.empty()) {
          double const sigmoid = 1 / (1 + std::exp(-p.z[at]));
          gate = p.z[at] * sigmoid;
          r.d_z[at] = d_y[at] * y * sigmoid * (1 + p.z[at] * (1 - sigmoid));
        }
        double const d_sum = d_y[at] * gate;
        double d_dt = 0;
        r.d_u[at] = d_sum * skip;
        r.d_D[index(d)] += d_sum * p.u[at];
        for (std::size_t n = 0; n < N; ++n) {
          g[n] += d_sum * p.C[row(t) * N + n];
          r.d_C[row(t) * N + n] += d_sum * now[n];
          r.d_B[row(t) * N + n] += g[n] * dt * p.u[at];
          r.d_u[at] += g[n] * dt * p.B[row(t) * N + n];
          double const decay = decay_of(dt * A(n));
          d_dt += g[n] * (p.B[row(t) * N + n] * p.u[at] + factor(n) * decay * past[n]);
          r.d_A[index(d) * N + n] += g[n] * dt * decay * past[n] * (p.log ? factor(n) : 1);
          g[n] *= decay;
        }
        r.d_delta[at] = d_dt * (p.softplus ? 1 / (1 + std::exp(-x(at))) : 1);
        r.d_bias[index(d)] += r.d_delta[at];
      }
      for (std::size_t n = 0; n < N; ++n) r.d_initial[state + n] = g[n];
    }
  return r;
}

/// A problem's tensors in the policy's memory.
template <class T, int N>
struct device_problem {
  using A = accum_t<T>;
  using S = test::test_space;
  tensor<S, T, dyn, dyn, dyn> u, delta, B, C, z;
  tensor<S, A, dyn, dyn> A_;
  tensor<S, A, dyn> D, bias;
  tensor<S, A, dyn, dyn, dyn> initial;
  tensor<S, std::int64_t, dyn> offsets;
  bool softplus, log;

  explicit device_problem(problem const& p) : softplus(p.softplus), log(p.log) {
    REQUIRE(p.states == N);
    u = test::upload<T>(p.u, p.batch, p.length, p.channels);
    delta = test::upload<T>(p.delta, p.batch, p.length, p.channels);
    B = test::upload<T>(p.B, p.batch, p.length, p.states);
    C = test::upload<T>(p.C, p.batch, p.length, p.states);
    A_ = test::upload<A>(p.A, p.channels, p.states);
    if (!p.z.empty()) z = test::upload<T>(p.z, p.batch, p.length, p.channels);
    if (!p.D.empty()) D = test::upload<A>(p.D, p.channels);
    if (!p.bias.empty()) bias = test::upload<A>(p.bias, p.channels);
    if (!p.initial.empty()) initial = test::upload<A>(p.initial, p.sequences(), p.channels, p.states);
    if (!p.offsets.empty())
      offsets = test::upload<std::int64_t>(values(p.offsets.begin(), p.offsets.end()), p.sequences() + 1);
  }
  selective_scan::inputs<test_policy, T, N> inputs() const {
    return {.u = u, .delta = delta, .A = A_, .B = B, .C = C, .D = D, .z = z, .delta_bias = bias,
            .initial_state = initial, .cu_seqlens = offsets, .delta_softplus = softplus, .A_is_log = log};
  }
};

template <class T, int N>
outputs run(problem const& p, test_policy policy = make_policy()) {
  device_problem<T, N> const in(p);
  auto y = test::poisoned<T>(p.batch, p.length, p.channels);
  auto final_state = test::poisoned<accum_t<T>>(p.sequences(), p.channels, p.states);
  selective_scan::forward<N>(policy, in.inputs(), y, {.final_state = final_state});
  return {test::download(y), test::download(final_state)};
}

template <class T, int N>
derivatives run_backward(problem const& p, values const& d_y, values const& d_final,
                         test_policy policy = make_policy()) {
  using A = accum_t<T>;
  device_problem<T, N> const in(p);
  auto const sequences = p.sequences();
  auto y = test::poisoned<T>(p.batch, p.length, p.channels);
  auto checkpoints = test::poisoned<A>(selective_scan::checkpoint_size<N>(p.batch, p.length, p.channels, sequences));
  selective_scan::forward<N>(policy, in.inputs(), y, {.checkpoints = checkpoints});

  auto const g_y = test::upload<T>(d_y, p.batch, p.length, p.channels);
  tensor<test::test_space, A, dyn, dyn, dyn> g_final;
  if (!d_final.empty()) g_final = test::upload<A>(d_final, sequences, p.channels, p.states);
  auto d_u = test::poisoned<T>(p.batch, p.length, p.channels);
  auto d_delta = test::poisoned<T>(p.batch, p.length, p.channels);
  auto d_z = test::poisoned<T>(p.batch, p.length, p.channels);
  auto d_B = test::poisoned<T>(p.batch, p.length, p.states);
  auto d_C = test::poisoned<T>(p.batch, p.length, p.states);
  auto d_initial = test::poisoned<A>(sequences, p.channels, p.states);
  auto d_A = zeros<A>(policy, p.channels, p.states);
  auto d_D = zeros<A>(policy, p.channels), d_bias = zeros<A>(policy, p.channels);
  selective_scan::gradients<test_policy, T> d{.d_u = d_u, .d_delta = d_delta, .d_A = d_A, .d_B = d_B, .d_C = d_C,
                                              .d_initial_state = d_initial};
  if (!p.D.empty()) d.d_D = d_D;
  if (!p.z.empty()) d.d_z = d_z;
  if (!p.bias.empty()) d.d_delta_bias = d_bias;
  selective_scan::backward<N, test_policy, T>(
      policy,
      {.u = in.u, .delta = in.delta, .A = in.A_, .B = in.B, .C = in.C, .D = in.D, .z = in.z, .delta_bias = in.bias,
       .initial_state = in.initial, .cu_seqlens = in.offsets, .delta_softplus = p.softplus, .A_is_log = p.log,
       .checkpoints = checkpoints, .d_y = g_y, .d_final_state = g_final},
      d);
  return {test::download(d_u), test::download(d_delta), test::download(d_A), test::download(d_B), test::download(d_C),
          test::download(d_D), test::download(d_z), test::download(d_bias), test::download(d_initial)};
}

/// Bound for a state or its gradient after so many steps: each multiplies by a power of two whose error is a few
/// roundings, of which the exponent brings one for each doubling.
template <class T>
double state_tolerance(std::int64_t steps) {
  return test::tolerance<accum_t<T>>(16 * steps + 16);
}

/// A decay below the normal numbers may be the smallest of them, times steps of 1000 and what decays.
template <class T>
constexpr double least = std::is_same_v<T, half> ? 0x1p-25 : 0x1p-90;

template <class T, int N>
void check_forward(problem const& p) {
  outputs magnitude;
  auto const expected = reference(p, &magnitude);
  auto const actual = run<T, N>(p);
  test::check_within<T>(actual.y, expected.y, magnitude.y, 16 * p.length + N, "y", least<T>);
  test::check_within<accum_t<T>>(actual.final_state, expected.final_state, magnitude.final_state, 16 * p.length + 16,
                                 "final_state", least<accum_t<T>>);
  test::check_close(actual.y, expected.y, test::tolerance<T>(p.length * N), "y");
  test::check_close(actual.final_state, expected.final_state, state_tolerance<T>(p.length), "final_state");
}

/// The gradients of a problem, within a bound for each element: states and their gradients carry what they gather over
/// the steps; then come sums over states, channels, or steps of all sequences.
template <class T, int N>
void check_gradients(problem const& p, values const& d_y, values const& d_final, derivatives const& actual,
                     derivatives const& expected, std::string const& text = {}) {
  using A = accum_t<T>;
  auto const absolute = [](values v) {
    for (auto& x : v) x = std::abs(x);
    return v;
  };
  problem positive = p;
  for (auto* v : {&positive.u, &positive.B, &positive.C, &positive.D, &positive.z, &positive.initial})
    *v = absolute(*v);
  auto const magnitude = reference_backward(positive, absolute(d_y), absolute(d_final), true);
  auto const check = [&]<class V>(V, values derivatives::* of, std::int64_t terms, char const* what) {
    test::check_within<V>(actual.*of, expected.*of, magnitude.*of, 32 * p.length + terms, text + what,
                          least<V>);
  };
  std::int64_t const steps = p.batch * p.length;
  check(T{}, &derivatives::d_u, N, "d_u");
  check(T{}, &derivatives::d_delta, N, "d_delta");
  check(A{}, &derivatives::d_A, steps, "d_A");
  check(T{}, &derivatives::d_B, p.channels, "d_B");
  check(T{}, &derivatives::d_C, p.channels, "d_C");
  check(A{}, &derivatives::d_initial, N, "d_initial_state");
  if (!p.z.empty()) check(T{}, &derivatives::d_z, N, "d_z");
  if (!p.D.empty()) check(A{}, &derivatives::d_D, steps, "d_D");
  if (!p.bias.empty()) check(A{}, &derivatives::d_bias, N + steps, "d_delta_bias");
}

template <class T, int N>
void check_backward(problem const& p) {
  auto const d_y = test::rounded<T>(test::random_normal(p.batch * p.length * p.channels, 21));
  auto const d_final = test::rounded<accum_t<T>>(test::random_normal(p.sequences() * p.channels * p.states, 22));
  auto const e = reference_backward(p, d_y, d_final);
  auto const a = run_backward<T, N>(p, d_y, d_final);
  check_gradients<T, N>(p, d_y, d_final, a, e);
  auto const in_T = [&](std::int64_t terms) { return test::tolerance<T>(terms); };
  auto const in_A = [&](std::int64_t terms) { return test::tolerance<accum_t<T>>(terms); };
  std::int64_t const steps = p.batch * p.length;
  test::check_close(a.d_u, e.d_u, in_T(p.length * N), "d_u");
  test::check_close(a.d_delta, e.d_delta, in_T(p.length * N), "d_delta");
  test::check_close(a.d_A, e.d_A, in_A(steps * 4), "d_A");
  test::check_close(a.d_B, e.d_B, in_T(p.length * p.channels), "d_B");
  test::check_close(a.d_C, e.d_C, in_T(p.length * p.channels), "d_C");
  test::check_close(a.d_initial, e.d_initial, state_tolerance<T>(p.length), "d_initial_state");
  if (!p.z.empty()) test::check_close(a.d_z, e.d_z, in_T(p.length * N), "d_z");
  if (!p.D.empty()) test::check_close(a.d_D, e.d_D, in_A(steps), "d_D");
  if (!p.bias.empty()) test::check_close(a.d_bias, e.d_bias, in_A(steps * N), "d_delta_bias");
}

/// Steps [begin, end) of a problem of one row; the channels' parameters stay.
inline problem steps_of(problem const& p, std::int64_t begin, std::int64_t end, values const& initial) {
  problem part = p;
  auto const cut = [&](values const& v, std::int64_t width) {
    return v.empty() ? v : values(v.begin() + begin * width, v.begin() + end * width);
  };
  part.length = end - begin;
  part.offsets = {};
  part.u = cut(p.u, p.channels);
  part.delta = cut(p.delta, p.channels);
  part.z = cut(p.z, p.channels);
  part.B = cut(p.B, p.states);
  part.C = cut(p.C, p.states);
  part.initial = initial;
  return part;
}
inline values slice(values const& v, std::int64_t begin, std::int64_t count) {
  return values(v.begin() + begin, v.begin() + begin + count);
}

enum class place_of_y { own, u, delta, z };
template <class T, int N>
void check_step(std::int64_t batch, std::int64_t channels, bool all, place_of_y where = place_of_y::own) {
  using A = accum_t<T>;
  std::int64_t const length = 5;
  auto p = make<T>(batch, length, channels, N, {.all = all});
  if (p.initial.empty()) p.initial = values(index(batch * channels * N));
  auto const expected = reference(p);
  device_problem<T, N> const in(p);
  auto state = test::upload<A>(p.initial, batch, channels, N);
  for (std::int64_t t = 0; t < length; ++t) {
    auto const own = test::poisoned<T>(batch, channels);
    // The t-th step of every sequence: rows that lie a sequence apart.
    auto const at = [&](auto const& x) {
      using element = typename std::remove_cvref_t<decltype(x)>::value_type;
      view<test::test_space, element, dyn, dyn> step;
      if (x.present()) {
        step = {x.data() + t * x.stride(1), batch, x.extent(2)};
        step.set_stride(0, x.stride(0));
      }
      return step;
    };
    auto const y = where == place_of_y::u       ? at(in.u)
                   : where == place_of_y::delta ? at(in.delta)
                   : where == place_of_y::z     ? at(in.z)
                                                : own.as_view();
    selective_scan::step<N>(make_policy(),
                            {.u = at(in.u), .delta = at(in.delta), .A = in.A_, .B = at(in.B), .C = at(in.C), .D = in.D,
                             .z = at(in.z), .delta_bias = in.bias, .delta_softplus = all, .A_is_log = all},
                            state, y);
    values y_t, got;
    for (std::int64_t b = 0; b < batch; ++b) {
      auto const row = slice(expected.y, (b * length + t) * channels, channels);
      y_t.insert(y_t.end(), row.begin(), row.end());
      auto const part = test::download(y.slice(b, 1));
      got.insert(got.end(), part.begin(), part.end());
    }
    test::check_close(got, y_t, test::tolerance<T>(length * N), "y");
  }
  test::check_close(test::download(state), expected.final_state, state_tolerance<T>(length), "state");
}

}  // namespace selective_scan_problem
