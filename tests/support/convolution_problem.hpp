#pragma once
#include "support/support.hpp"

#include <blackmamba/core/workspace.hpp>
#include <blackmamba/ops/causal_conv1d/causal_conv1d.hpp>

#include <algorithm>
#include <vector>

/// Problems for the causal convolution: values, the definition in double, and the operator run on them.
namespace test::convolution_problem {

using namespace blackmamba;

using test::values;

inline std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

/// A call of the operator. An empty vector is an absent argument.
struct problem {
  std::int64_t batch = 1, length = 1, channels = 1, taps = 4;
  bool silu = false;
  values x = {}, weight = {}, bias = {}, initial = {};
  std::vector<std::int64_t> offsets = {};

  std::int64_t sequences() const { return offsets.empty() ? batch : static_cast<std::int64_t>(offsets.size()) - 1; }
  std::int64_t begin(std::int64_t s) const { return offsets.empty() ? s * length : offsets[index(s)]; }
  std::int64_t end(std::int64_t s) const { return offsets.empty() ? (s + 1) * length : offsets[index(s + 1)]; }
  std::int64_t state_size() const { return sequences() * (taps - 1) * channels; }
  /// Index of the input of sequence s at time t in x (t >= 0) or in the states (t < 0).
  std::size_t at(std::int64_t s, std::int64_t t, std::int64_t d) const {
    return index((t >= 0 ? begin(s) + t : s * (taps - 1) + t + taps - 1) * channels + d);
  }
  double input(std::int64_t s, std::int64_t t, std::int64_t d) const {
    return t >= 0 ? x[at(s, t, d)] : initial.empty() ? 0 : initial[at(s, t, d)];
  }
};

struct options {
  bool bias = true, initial = true, silu = true;
  std::vector<std::int64_t> offsets = {};
};

/// Random inputs as T sees them.
template <class T>
problem make(std::int64_t batch, std::int64_t length, std::int64_t channels, std::int64_t taps, options const& o = {},
             std::uint64_t seed = 1) {
  using A = accum_t<T>;
  problem p{.batch = batch, .length = length, .channels = channels, .taps = taps, .silu = o.silu, .offsets = o.offsets};
  p.x = test::rounded<T>(test::random_normal(batch * length * channels, seed));
  p.weight = test::rounded<A>(test::random_normal(channels * taps, seed + 1));
  if (o.bias) p.bias = test::rounded<A>(test::random_normal(channels, seed + 2));
  if (o.initial) p.initial = test::rounded<T>(test::random_normal(p.state_size(), seed + 3));
  return p;
}

struct outputs {
  values y, final_state;
};

inline double preactivation(problem const& p, std::int64_t s, std::int64_t t, std::int64_t d) {
  double sum = p.bias.empty() ? 0 : p.bias[index(d)];
  for (std::int64_t k = 0; k < p.taps; ++k)
    sum += p.weight[index(d * p.taps + k)] * p.input(s, t - (p.taps - 1) + k, d);
  return sum;
}

/// The definition, in double.
inline outputs reference(problem const& p) {
  outputs r{values(p.x.size()), values(index(p.state_size()))};
  for (std::int64_t s = 0; s < p.sequences(); ++s)
    for (std::int64_t d = 0; d < p.channels; ++d) {
      std::int64_t const length = p.end(s) - p.begin(s);
      for (std::int64_t t = 0; t < length; ++t) {
        double const y = preactivation(p, s, t, d);
        r.y[p.at(s, t, d)] = p.silu ? y / (1 + std::exp(-y)) : y;
      }
      for (std::int64_t t = 1 - p.taps; t < 0; ++t) r.final_state[p.at(s, t, d)] = p.input(s, length + t, d);
    }
  return r;
}

struct derivatives {
  values d_x, d_weight, d_bias, d_initial;
};

/// The derivative of sum(d_y y) + sum(d_final final_state), in double: each output sends to the inputs it came from.
inline derivatives reference_backward(problem const& p, values const& d_y, values const& d_final) {
  derivatives r{values(p.x.size()), values(p.weight.size()), values(index(p.channels)), values(index(p.state_size()))};
  for (std::int64_t s = 0; s < p.sequences(); ++s)
    for (std::int64_t d = 0; d < p.channels; ++d) {
      std::int64_t const length = p.end(s) - p.begin(s);
      auto const to = [&](std::int64_t t) -> double& { return (t >= 0 ? r.d_x : r.d_initial)[p.at(s, t, d)]; };
      for (std::int64_t t = 0; t < length; ++t) {
        double const v = preactivation(p, s, t, d), sigmoid = 1 / (1 + std::exp(-v));
        double const d_p = d_y[p.at(s, t, d)] * (p.silu ? sigmoid * (1 + v * (1 - sigmoid)) : 1);
        r.d_bias[index(d)] += d_p;
        for (std::int64_t k = 0; k < p.taps; ++k) {
          std::int64_t const from = t - (p.taps - 1) + k;
          r.d_weight[index(d * p.taps + k)] += d_p * p.input(s, from, d);
          to(from) += d_p * p.weight[index(d * p.taps + k)];
        }
      }
      for (std::int64_t t = 1 - p.taps; t < 0; ++t)
        if (!d_final.empty()) to(length + t) += d_final[p.at(s, t, d)];
    }
  return r;
}

/// The same call with every number's absolute value, without silu: sums of the sizes of the terms of each result.
inline problem sizes_of(problem p) {
  for (auto* v : {&p.x, &p.weight, &p.bias, &p.initial})
    for (auto& a : *v) a = std::abs(a);
  p.silu = false;
  return p;
}
inline values sizes_of(values v) {
  for (auto& a : v) a = std::abs(a);
  return v;
}
inline double largest(values const& v) {
  double m = 0;
  for (double a : v) m = std::max(m, std::abs(a));
  return m;
}

/// A problem's tensors in the policy's memory.
template <class T>
struct device_problem {
  using A = accum_t<T>;
  using S = test::test_space;
  tensor<S, T, dyn, dyn, dyn> x, initial;
  tensor<S, A, dyn, dyn> weight;
  tensor<S, A, dyn> bias;
  tensor<S, std::int64_t, dyn> offsets;
  bool silu;

  explicit device_problem(problem const& p) : silu(p.silu) {
    x = test::upload<T>(p.x, p.batch, p.length, p.channels);
    weight = test::upload<A>(p.weight, p.channels, p.taps);
    if (!p.bias.empty()) bias = test::upload<A>(p.bias, p.channels);
    if (!p.initial.empty()) initial = test::upload<T>(p.initial, p.sequences(), p.taps - 1, p.channels);
    if (!p.offsets.empty())
      offsets = test::upload<std::int64_t>(values(p.offsets.begin(), p.offsets.end()), p.sequences() + 1);
  }
  causal_conv1d::inputs<test_policy, T> inputs() const {
    return {.x = x, .weight = weight, .bias = bias, .initial_state = initial, .cu_seqlens = offsets, .silu = silu};
  }
};

template <class T>
outputs run(problem const& p, test_policy policy = make_policy()) {
  device_problem<T> const in(p);
  auto y = test::poisoned<T>(p.batch, p.length, p.channels);
  auto final_state = test::poisoned<T>(p.sequences(), p.taps - 1, p.channels);
  causal_conv1d::forward(policy, in.inputs(), y, final_state);
  return {test::download(y), test::download(final_state)};
}

/// d_weight and d_bias start from `before`.
template <class T>
derivatives run_backward(problem const& p, values const& d_y, values const& d_final,
                         test_policy policy = make_policy(), double before = 0) {
  using A = accum_t<T>;
  device_problem<T> const in(p);
  auto const g_y = test::upload<T>(d_y, p.batch, p.length, p.channels);
  tensor<test::test_space, T, dyn, dyn, dyn> g_final;
  if (!d_final.empty()) g_final = test::upload<T>(d_final, p.sequences(), p.taps - 1, p.channels);
  auto d_x = test::poisoned<T>(p.batch, p.length, p.channels);
  auto d_initial = test::poisoned<T>(p.sequences(), p.taps - 1, p.channels);
  auto d_weight = test::upload<A>(values(p.weight.size(), before), p.channels, p.taps);
  auto d_bias = test::upload<A>(values(index(p.channels), before), p.channels);
  causal_conv1d::backward<test_policy, T>(
      policy,
      {.x = in.x, .weight = in.weight, .bias = in.bias, .initial_state = in.initial, .cu_seqlens = in.offsets,
       .silu = p.silu, .d_y = g_y, .d_final_state = g_final},
      {.d_x = d_x, .d_weight = d_weight, .d_bias = d_bias, .d_initial_state = d_initial});
  return {test::download(d_x), test::download(d_weight), test::download(d_bias), test::download(d_initial)};
}

/// Requires |actual - expected| to be at most the rounding to T and that of `terms` operations in accum_t<T> on numbers
/// as large as `scale`, everywhere. NaN fails.
template <class T>
void check_near(values const& actual, values const& expected, double scale, std::int64_t terms, char const* what) {
  REQUIRE_MESSAGE(actual.size() == expected.size(), what);
  double const subnormal = std::is_same_v<T, half> ? 0x1p-25 : 0;
  double const sums = 4 * std::sqrt(static_cast<double>(terms) + 1) * test::unit_roundoff<accum_t<T>>() * scale;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    double const bound = test::unit_roundoff<T>() * std::abs(expected[i]) + sums + subnormal;
    if (!(std::abs(actual[i] - expected[i]) <= bound))
      FAIL_CHECK(what << ": element " << i << " is " << actual[i] << ", expected " << expected[i] << " to within "
                      << bound);
  }
}

/// Errors are measured against the largest sum of the sizes of a result's terms.
template <class T>
void check_forward(problem const& p) {
  auto const expected = reference(p);
  auto const actual = run<T>(p);
  check_near<T>(actual.y, expected.y, largest(reference(sizes_of(p)).y), p.taps, "y");
  test::check_equal(actual.final_state, expected.final_state, "final_state");
}

template <class T>
void check_backward(problem const& p) {
  using A = accum_t<T>;
  auto const d_y = test::rounded<T>(test::random_normal(p.batch * p.length * p.channels, 21));
  auto const d_final = test::rounded<T>(test::random_normal(p.state_size(), 22));
  auto const e = reference_backward(p, d_y, d_final);
  auto const a = run_backward<T>(p, d_y, d_final);
  auto const sizes = reference_backward(sizes_of(p), sizes_of(d_y), sizes_of(d_final));
  // silu' is at most 1.1, and silu'' 0.5: the rounding of p shows in the derivative at p.
  double const curve = p.silu ? 1.1 + 0.5 * largest(reference(sizes_of(p)).y) : 1;
  std::int64_t const steps = p.batch * p.length;
  check_near<T>(a.d_x, e.d_x, curve * largest(sizes.d_x), p.taps, "d_x");
  check_near<T>(a.d_initial, e.d_initial, curve * largest(sizes.d_initial), p.taps, "d_initial_state");
  check_near<A>(a.d_weight, e.d_weight, curve * largest(sizes.d_weight), steps, "d_weight");
  check_near<A>(a.d_bias, e.d_bias, curve * largest(sizes.d_bias), steps, "d_bias");
}

/// Steps [begin, end) of one row as a problem of their own.
inline problem steps_of(problem const& p, std::int64_t begin, std::int64_t end, values const& initial) {
  problem part = p;
  part.batch = 1;
  part.length = end - begin;
  part.offsets = {};
  part.x = values(p.x.begin() + begin * p.channels, p.x.begin() + end * p.channels);
  part.initial = initial;
  return part;
}
/// The s-th of `count` equal parts.
inline values part_of(values const& v, std::int64_t s, std::int64_t count) {
  std::int64_t const n = static_cast<std::int64_t>(v.size()) / count;
  return values(v.begin() + s * n, v.begin() + (s + 1) * n);
}
inline values slice(values const& v, std::int64_t begin, std::int64_t end) {
  return values(v.begin() + begin, v.begin() + end);
}
inline void append(values& to, values const& from) { to.insert(to.end(), from.begin(), from.end()); }

}  // namespace test::convolution_problem
