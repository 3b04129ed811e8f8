#include "support/sums.hpp"
#include "support/support.hpp"

#include <blackmamba/core/workspace.hpp>
#include <blackmamba/ops/associative_scan/associative_scan.hpp>
#include <blackmamba/ops/associative_scan/first_order_recurrence.hpp>

#include <algorithm>
#include <array>

using namespace blackmamba;
using test::test_space;
using test::values;

namespace {

/// (B, L, D); rows (R, L) are D = 1. `b` is d_h in backward, and `initial` d_final_state's shape.
struct problem {
  std::int64_t batch, length, channels = 1;
  std::vector<std::int64_t> cu = {};
  bool reverse = false;
  bool with_initial = true;

  std::int64_t states() const { return cu.empty() ? batch : static_cast<std::int64_t>(cu.size()) - 1; }
  std::int64_t size() const { return batch * length * channels; }
  std::int64_t state_size() const { return states() * channels; }
  /// Calls f(state, first, stride, count): the elements of one sequence and channel as they are visited forward.
  template <class F>
  void each_sequence(F&& f) const {
    for (std::int64_t s = 0; s < states(); ++s) {
      auto const at = static_cast<std::size_t>(s);
      std::int64_t const first = cu.empty() ? s * length : cu[at], count = cu.empty() ? length : cu[at + 1] - first;
      for (std::int64_t d = 0; d < channels; ++d)
        f(static_cast<std::size_t>(s * channels + d), (reverse ? first + count - 1 : first) * channels + d,
          reverse ? -channels : channels, count);
    }
  }
};

struct forward_result {
  values h, final_state;
};
struct backward_result {
  values d_a, d_b, d_initial_state;
};
std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

/// The definition, in double.
forward_result reference(problem const& p, values const& a, values const& b, values const& initial) {
  forward_result r{values(at(p.size())), values(at(p.state_size()))};
  p.each_sequence([&](std::size_t state, std::int64_t first, std::int64_t stride, std::int64_t count) {
    double h = p.with_initial ? initial[state] : 0.0;
    for (std::int64_t j = 0; j < count; ++j) {
      std::size_t const i = at(first + j * stride);
      r.h[i] = h = a[i] * h + b[i];
    }
    r.final_state[state] = h;
  });
  return r;
}
backward_result reference_backward(problem const& p, values const& a, values const& h, values const& d_h,
                                   values const& initial, values const& d_final) {
  backward_result r{values(at(p.size())), values(at(p.size())), values(at(p.state_size()))};
  p.each_sequence([&](std::size_t state, std::int64_t first, std::int64_t stride, std::int64_t count) {
    double d = p.with_initial ? d_final[state] : 0.0;  // what reaches h_j from later
    for (std::int64_t j = count; j-- > 0;) {
      std::size_t const i = at(first + j * stride);
      d += d_h[i];
      r.d_b[i] = d;
      r.d_a[i] = d * (j > 0 ? h[at(first + (j - 1) * stride)] : p.with_initial ? initial[state] : 0.0);
      d *= a[i];
    }
    r.d_initial_state[state] = d;
  });
  return r;
}

/// Calls f with a maker of tensors of p's shape, and one of states': rank 2 for rows, else 3.
template <class F>
auto with_shape(problem const& p, bool rows, F&& f) {
  if (rows)
    return f(
        std::integral_constant<int, 2>{}, [&](auto make) { return make(p.batch, p.length); },
        [&](auto make) { return make(p.states()); });
  return f(
      std::integral_constant<int, 3>{}, [&](auto make) { return make(p.batch, p.length, p.channels); },
      [&](auto make) { return make(p.states(), p.channels); });
}
template <class T>
auto from(values const& v) {
  return [&v](auto... extents) { return test::upload<T>(v, extents...); };
}
template <class T>
auto poison() {
  return [](auto... extents) { return test::poisoned<T>(extents...); };
}
auto offsets(problem const& p) {
  return test::upload<std::int64_t>(values(p.cu.begin(), p.cu.end()), static_cast<std::int64_t>(p.cu.size()));
}

template <class T>
forward_result run(problem const& p, bool rows, values const& a, values const& b, values const& initial,
                   test_policy policy = make_policy()) {
  return with_shape(p, rows, [&]<int Rank>(std::integral_constant<int, Rank>, auto of_shape, auto of_state) {
    using A = accum_t<T>;
    auto const da = of_shape(from<T>(a)), db = of_shape(from<T>(b));
    auto const state = of_state(from<A>(initial));
    auto const cu = offsets(p);
    auto h = of_shape(poison<T>());
    auto final_state = of_state(poison<A>());
    first_order_recurrence::inputs<home<test_policy>, T, Rank> in{.a = da, .b = db, .reverse = p.reverse};
    if (p.with_initial) in.initial_state = state;
    if (!p.cu.empty()) in.cu_seqlens = cu;
    first_order_recurrence::forward(policy, in, h, final_state);
    return forward_result{test::download(h), test::download(final_state)};
  });
}
template <class T>
backward_result run_backward(problem const& p, bool rows, values const& a, values const& h, values const& d_h,
                             values const& initial, values const& d_final, test_policy policy = make_policy()) {
  return with_shape(p, rows, [&]<int Rank>(std::integral_constant<int, Rank>, auto of_shape, auto of_state) {
    using A = accum_t<T>;
    auto const da = of_shape(from<T>(a)), dh = of_shape(from<T>(h));
    auto const state = of_state(from<A>(initial)), d_state = of_state(from<A>(d_final));
    auto const cu = offsets(p);
    auto d_a = of_shape(poison<T>());
    auto d_b = of_shape(from<T>(d_h));  // in place
    auto d_initial = of_state(poison<A>());
    first_order_recurrence::gradient_inputs<home<test_policy>, T, Rank> in{
        .a = da, .h = dh, .d_h = d_b, .reverse = p.reverse};
    if (p.with_initial) in.initial_state = state, in.d_final_state = d_state;
    if (!p.cu.empty()) in.cu_seqlens = cu;
    first_order_recurrence::backward(policy, in, d_a, d_b, d_initial);
    return backward_result{test::download(d_a), test::download(d_b), test::download(d_initial)};
  });
}

struct data {
  values a, b, initial, d_final;
  explicit data(problem const& p, std::uint64_t seed = 1)
      : a(test::random_uniform(p.size(), seed, -0.95, 0.95)),
        b(test::random_normal(p.size(), seed + 1)),
        initial(test::random_normal(p.state_size(), seed + 2)),
        d_final(test::random_normal(p.state_size(), seed + 3)) {}
  template <class T>
  void round() {
    a = test::rounded<T>(a);
    b = test::rounded<T>(b);
    initial = test::rounded<accum_t<T>>(initial);
    d_final = test::rounded<accum_t<T>>(d_final);
  }
};

values absolute(values v) {
  for (double& x : v) x = std::abs(x);
  return v;
}

/// Sums cancel, so errors are measured by what each would be if its terms did not.
template <class T>
void check(problem const& p, bool rows, std::uint64_t seed = 1) {
  CAPTURE(p.batch);
  CAPTURE(p.length);
  CAPTURE(p.channels);
  CAPTURE(p.reverse);
  data x(p, seed);
  x.template round<T>();
  using A = accum_t<T>;
  auto const expected = reference(p, x.a, x.b, x.initial);
  auto const actual = run<T>(p, rows, x.a, x.b, x.initial);
  auto const sizes = reference(p, absolute(x.a), absolute(x.b), absolute(x.initial));
  test::check_within<T>(actual.h, expected.h, sizes.h, 32, "h");
  test::check_within<A>(actual.final_state, expected.final_state, sizes.final_state, 32, "final_state");

  auto const h = test::rounded<T>(expected.h);
  auto const gradient = reference_backward(p, x.a, h, x.b, x.initial, x.d_final);
  auto const g = run_backward<T>(p, rows, x.a, h, x.b, x.initial, x.d_final);
  auto const gradient_sizes = reference_backward(p, absolute(x.a), absolute(h), absolute(x.b), absolute(x.initial),
                                                 absolute(x.d_final));
  test::check_within<T>(g.d_a, gradient.d_a, gradient_sizes.d_a, 32, "d_a");
  test::check_within<T>(g.d_b, gradient.d_b, gradient_sizes.d_b, 32, "d_b");
  test::check_within<A>(g.d_initial_state, gradient.d_initial_state, gradient_sizes.d_initial_state, 32,
                        "d_initial_state");
}

values part(values const& v, std::int64_t first, std::int64_t last) { return {v.begin() + first, v.begin() + last}; }
void append(values& v, values const& more) { v.insert(v.end(), more.begin(), more.end()); }
std::vector<std::int64_t> random_offsets(std::int64_t length, std::uint64_t seed) {
  std::vector<std::int64_t> cu{0, length};
  for (std::int64_t i = 0, cuts = test::random_integer(seed, 0, 0, 6); i < cuts; ++i)
    cu.push_back(test::random_integer(seed, at(i) + 1, 0, length));
  std::sort(cu.begin(), cu.end());
  return cu;
}

}  // namespace

TEST_CASE_TEMPLATE("first_order_recurrence: equals its definition at every length and type", T, STORAGE_TYPES) {
  for (bool reverse : {false, true})
    for (std::int64_t length : test::sizes({0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100}))
      for (std::int64_t rows : {0, 1, 3}) {
        check<T>({.batch = rows, .length = length, .reverse = reverse}, true);
        check<T>({.batch = rows, .length = length, .reverse = reverse, .with_initial = false}, true);
      }
  for (bool reverse : {false, true}) {
    for (std::int64_t channels : test::sizes({0, 1, 2, 7, 16, 17, 31, 256, 259}))
      for (std::int64_t length : test::sizes({0, 1, 5, 40}))
        check<T>({.batch = 2, .length = length, .channels = channels, .reverse = reverse}, false);
    check<T>({.batch = 1, .length = 20, .channels = 5, .reverse = reverse, .with_initial = false}, false);
    // More than one block.
    for (std::int64_t length : test::sizes({8191, 8192, 8193, 20000}))
      check<T>({.batch = 1, .length = length, .reverse = reverse}, true);
    check<T>({.batch = 2, .length = 300, .channels = 258, .reverse = reverse}, false);
    check<T>({.batch = 1, .length = 9000, .channels = 3, .reverse = reverse}, false);
  }
}

TEST_CASE("first_order_recurrence: gradients equal central differences") {
  for (bool rows : {true, false})
    for (bool reverse : {false, true})
      for (bool packed : {false, true}) {
        problem p{.batch = packed ? 1 : 2, .length = 9, .channels = rows ? 1 : 2, .reverse = reverse};
        if (packed) p.cu = {0, 4, 4, 9};
        data const x(p);
        auto const d_h = test::random_normal(p.size(), 9);
        auto const h = run<double>(p, rows, x.a, x.b, x.initial).h;
        auto const g = run_backward<double>(p, rows, x.a, h, d_h, x.initial, x.d_final);
        auto const loss = [&](values const& a, values const& b, values const& initial) {
          auto const r = run<double>(p, rows, a, b, initial);
          return test::weighted_sum(r.h, d_h) + test::weighted_sum(r.final_state, x.d_final);
        };
        test::check_gradient([&](values const& v) { return loss(v, x.b, x.initial); }, x.a, g.d_a, "d_a");
        test::check_gradient([&](values const& v) { return loss(x.a, v, x.initial); }, x.b, g.d_b, "d_b");
        test::check_gradient([&](values const& v) { return loss(x.a, x.b, v); }, x.initial, g.d_initial_state,
                             "d_initial_state");
      }
}

TEST_CASE("first_order_recurrence: thousands of random shapes equal the definition") {
  std::uint64_t const shapes = test::trials(std::is_same_v<test_space, space::host> ? 10000 : 2500);
  for (std::uint64_t i = 0; i < shapes; ++i) {
    auto const pick = [&](std::uint64_t what, std::int64_t low, std::int64_t high) {
      return test::random_integer(100 + what, i, low, high);
    };
    bool const packed = pick(0, 0, 1) == 1, rows = pick(1, 0, 1) == 1;
    problem p{.batch = packed ? 1 : pick(2, 0, 3),
              .length = pick(3, 0, 50),
              .channels = rows ? 1 : pick(4, 0, 20),
              .reverse = pick(5, 0, 1) == 1,
              .with_initial = pick(6, 0, 1) == 1};
    if (packed) p.cu = random_offsets(p.length, i);
    CAPTURE(i);
    check<float>(p, rows, i);
  }
}

TEST_CASE("first_order_recurrence: is the scan of affine maps under composition") {
  std::int64_t const length = 3000;
  problem const p{.batch = 1, .length = length, .with_initial = false};
  data x(p);
  x.round<float>();
  for (bool reverse : {false, true}) {
    tensor<space::host, affine<float>, dyn> maps(length), prefixes(length);
    for (std::int64_t t = 0; t < length; ++t)
      maps(t) = {static_cast<float>(x.a[at(t)]), static_cast<float>(x.b[at(t)])};
    tensor<test_space, affine<float>, dyn, dyn> in(1, length), out(1, length);
    memory::upload(make_policy(), maps.as_view(), in.as_view());
    associative_scan::forward(make_policy(), scan_operator::composition<float>{}, in, out, {.reverse = reverse});
    memory::download(make_policy(), out.reshape(length), prefixes.as_view());
    values composed(at(length));
    for (std::int64_t t = 0; t < length; ++t) composed[at(t)] = static_cast<double>(prefixes(t).b);
    problem q = p;
    q.reverse = reverse;
    test::check_close(run<float>(q, true, x.a, x.b, x.initial).h, composed, test::tolerance<float>(32), "h");
  }
}

TEST_CASE("first_order_recurrence: pieces with the state handed on are the whole, both ways") {
  for (bool rows : {true, false}) {
    problem const p{.batch = 1, .length = 9000, .channels = rows ? 1 : 3};
    data const x(p);
    auto const d_h = test::random_normal(p.size(), 9);
    auto const whole = run<double>(p, rows, x.a, x.b, x.initial);
    auto const whole_gradient = run_backward<double>(p, rows, x.a, whole.h, d_h, x.initial, x.d_final);
    std::vector<std::int64_t> const cuts{0, 1, 17, 17, 100, 8300, 9000};
    forward_result joined{{}, x.initial};
    std::vector<values> states;
    auto const piece = [&](std::size_t c) {
      problem q = p;
      q.length = cuts[c + 1] - cuts[c];
      return q;
    };
    auto const of = [&](values const& v, std::size_t c) {
      return part(v, cuts[c] * p.channels, cuts[c + 1] * p.channels);
    };
    for (std::size_t c = 0; c + 1 < cuts.size(); ++c) {
      states.push_back(joined.final_state);
      auto const r = run<double>(piece(c), rows, of(x.a, c), of(x.b, c), joined.final_state);
      append(joined.h, r.h);
      joined.final_state = r.final_state;
    }
    test::check_close(joined.h, whole.h, test::tolerance<double>(32), "h");
    test::check_close(joined.final_state, whole.final_state, test::tolerance<double>(32), "final_state");
    backward_result back{{}, {}, x.d_final};
    for (std::size_t c = cuts.size() - 1; c-- > 0;) {
      auto r = run_backward<double>(piece(c), rows, of(x.a, c), of(whole.h, c), of(d_h, c), states[c],
                                    back.d_initial_state);
      append(r.d_a, back.d_a);
      append(r.d_b, back.d_b);
      back = r;
    }
    test::check_close(back.d_a, whole_gradient.d_a, test::tolerance<double>(32), "d_a");
    test::check_close(back.d_b, whole_gradient.d_b, test::tolerance<double>(32), "d_b");
    test::check_close(back.d_initial_state, whole_gradient.d_initial_state, test::tolerance<double>(32), "d_initial");
  }
}

TEST_CASE("first_order_recurrence: packed sequences give the bits that they give alone") {
  for (bool rows : {true, false})
    for (bool reverse : {false, true}) {
      problem p{.batch = 1, .length = 0, .channels = rows ? 1 : 3, .reverse = reverse};
      p.cu = {0, 3, 3, 9000, 9001, 9018, 26000, 26000};
      p.length = p.cu.back();
      data x(p);
      x.round<float>();
      auto const d_h = test::random_normal(p.size(), 9);
      auto const packed = run<float>(p, rows, x.a, x.b, x.initial);
      auto const gradient = run_backward<float>(p, rows, x.a, packed.h, d_h, x.initial, x.d_final);
      for (std::size_t s = 0; s + 1 < p.cu.size(); ++s) {
        problem one = p;
        one.cu.clear();
        one.length = p.cu[s + 1] - p.cu[s];
        auto const of = [&](values const& v) { return part(v, p.cu[s] * p.channels, p.cu[s + 1] * p.channels); };
        auto const state = [&](values const& v) {
          auto const first = static_cast<std::int64_t>(s) * p.channels;
          return part(v, first, first + p.channels);
        };
        auto const alone = run<float>(one, rows, of(x.a), of(x.b), state(x.initial));
        test::check_equal(of(packed.h), alone.h, "h");
        test::check_equal(state(packed.final_state), alone.final_state, "final_state");
        auto const g =
            run_backward<float>(one, rows, of(x.a), of(packed.h), of(d_h), state(x.initial), state(x.d_final));
        test::check_equal(of(gradient.d_a), g.d_a, "d_a");
        test::check_equal(of(gradient.d_b), g.d_b, "d_b");
        test::check_equal(state(gradient.d_initial_state), g.d_initial_state, "d_initial_state");
      }
    }
}

TEST_CASE("first_order_recurrence: steps are forward") {
  std::int64_t const batch = 3, length = 6, channels = 37;
  problem const p{.batch = batch, .length = length, .channels = channels};
  data x(p);
  x.round<bfloat16>();
  auto const whole = run<bfloat16>(p, false, x.a, x.b, x.initial);
  auto const a = test::upload<bfloat16>(x.a, batch, length * channels),
             b = test::upload<bfloat16>(x.b, batch, length * channels);
  auto h = test::poisoned<bfloat16>(batch, length * channels);
  auto state = test::upload<float>(x.initial, batch, channels);
  for (std::int64_t t = 0; t < length; ++t)
    first_order_recurrence::step(
        make_policy(), {.a = a.columns(t * channels, channels), .b = b.columns(t * channels, channels)}, state,
        h.columns(t * channels, channels));
  test::check_equal(test::download(h), whole.h, "h");
  test::check_equal(test::download(state), whole.final_state, "state");
}

TEST_CASE_TEMPLATE("first_order_recurrence: the same bits in every run, for any number of threads", P, test_policy) {
  std::vector<P> policies{make_policy()};
  if constexpr (requires(P policy) { policy.threads; })
    for (int threads : {1, 2, 3, 7}) {
      policies.push_back(make_policy());
      policies.back().threads = threads;
    }
  auto const check_shape_of = [&](problem const& p, bool rows) {
    data x(p);
    x.round<float>();
    auto const d_h = test::random_normal(p.size(), 9);
    auto const one = run<float>(p, rows, x.a, x.b, x.initial);
    auto const gradient = run_backward<float>(p, rows, x.a, one.h, d_h, x.initial, x.d_final);
    for (auto const& policy : policies) {
      auto const many = run<float>(p, rows, x.a, x.b, x.initial, policy);
      test::check_equal(many.h, one.h, "h");
      test::check_equal(many.final_state, one.final_state, "final_state");
      auto const g = run_backward<float>(p, rows, x.a, one.h, d_h, x.initial, x.d_final, policy);
      test::check_equal(g.d_a, gradient.d_a, "d_a");
      test::check_equal(g.d_b, gradient.d_b, "d_b");
      test::check_equal(g.d_initial_state, gradient.d_initial_state, "d_initial_state");
    }
  };
  check_shape_of({.batch = 1, .length = 100000}, true);
  check_shape_of({.batch = 40, .length = 9000}, true);
  check_shape_of({.batch = 1, .length = 100000, .cu = {0, 5, 80000, 80000, 100000}, .reverse = true}, true);
  check_shape_of({.batch = 1, .length = 10000, .channels = 5}, false);
  check_shape_of({.batch = 2, .length = 600, .channels = 300, .reverse = true}, false);
}

TEST_CASE("first_order_recurrence: a sequence has its own bits, among however many") {
  // More sequences than a device has blocks for, of more than one block each, and of several groups of blocks.
  for (bool rows : {true, false}) {
    problem const p{.batch = 600, .length = rows ? 9001 : 700, .channels = rows ? 1 : 2};
    data x(p);
    x.round<float>();
    auto const d_h = test::random_normal(p.size(), 9);
    auto const all = run<float>(p, rows, x.a, x.b, x.initial);
    auto const gradient = run_backward<float>(p, rows, x.a, all.h, d_h, x.initial, x.d_final);
    problem one = p;
    one.batch = 1;
    std::array<std::int64_t, 3> const some{0, 1, p.batch - 1};
    for (std::int64_t s : some) {
      auto const of = [&](values const& v) { return part(v, s * one.size(), (s + 1) * one.size()); };
      auto const state = [&](values const& v) { return part(v, s * p.channels, (s + 1) * p.channels); };
      auto const alone = run<float>(one, rows, of(x.a), of(x.b), state(x.initial));
      test::check_equal(of(all.h), alone.h, "h");
      test::check_equal(state(all.final_state), alone.final_state, "final_state");
      auto const g = run_backward<float>(one, rows, of(x.a), of(all.h), of(d_h), state(x.initial), state(x.d_final));
      test::check_equal(of(gradient.d_a), g.d_a, "d_a");
      test::check_equal(of(gradient.d_b), g.d_b, "d_b");
    }
  }
}

TEST_CASE("first_order_recurrence: one long sequence is the plain loop") {
  for (bool rows : {true, false})
    for (bool reverse : {false, true}) {
      check<float>({.batch = 1, .length = rows ? 2200001 : 150001, .channels = rows ? 1 : 3, .reverse = reverse}, rows);
      check<bfloat16>({.batch = 1, .length = 100001, .channels = rows ? 1 : 3, .reverse = reverse}, rows);
    }
}

TEST_CASE("first_order_recurrence: a result larger than the caches is the same one") {
  // Such results are stored in another way (simd_lanes.hpp).
  std::int64_t const rows = 17, length = 1 << 18;
  problem const p{.batch = rows, .length = length, .with_initial = false};
  data x(p);
  x.round<float>();
  auto const all = run<float>(p, true, x.a, x.b, x.initial).h;
  problem const one{.batch = 1, .length = length, .with_initial = false};
  for (std::int64_t r : {std::int64_t{0}, rows - 1}) {
    auto const of = [&](values const& v) { return part(v, r * length, (r + 1) * length); };
    test::check_equal(of(all), run<float>(one, true, of(x.a), of(x.b), {0}).h, "h");
  }
}

TEST_CASE("first_order_recurrence: takes slices, and works in place") {
  std::int64_t const batch = 2, length = 5, channels = 19;
  auto const both = test::random_uniform(batch * length * 2 * channels, 1, -1, 1);
  auto wide = test::upload<float>(both, batch, length, 2 * channels);  // a and b side by side; h takes b's place
  first_order_recurrence::forward(make_policy(),
                                  {.a = wide.columns(0, channels), .b = wide.columns(channels, channels)},
                                  wide.columns(channels, channels));
  auto const after = test::download(wide);
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t d = 0; d < channels; ++d) {
      double h = 0;
      for (std::int64_t t = 0; t < length; ++t) {
        std::size_t const i = at((b * length + t) * 2 * channels + d), j = i + at(channels);
        h = both[i] * h + both[j];
        CHECK(after[i] == static_cast<double>(static_cast<float>(both[i])));
        CHECK(after[j] == doctest::Approx(h).epsilon(1e-5));
      }
    }
}

TEST_CASE("first_order_recurrence: a state of zero stays zero whatever a is; long memories stay") {
  std::int64_t const length = 40000;
  problem const p{.batch = 1, .length = length, .with_initial = false};
  values const growing(at(length), 1.5), zero(at(length), 0.0);
  test::check_equal(run<float>(p, true, growing, zero, {0}).h, zero, "h");
  values pulse = zero;
  pulse[0] = 1;
  values const slow(at(length), static_cast<double>(0.9999f));
  values expected(at(length));
  for (std::int64_t t = 0; t < length; ++t) expected[at(t)] = std::pow(slow[0], static_cast<double>(t));
  auto const h = run<float>(p, true, slow, pulse, {0}).h;
  for (std::size_t t = 0; t < h.size(); t += 1000) CHECK(h[t] == doctest::Approx(expected[t]).epsilon(2e-3));
}

TEST_CASE("first_order_recurrence: scratch is what scratch_bytes says") {
  auto const a = zeros<float>(make_policy(), 2, 5000, 300);
  auto h = zeros<float>(make_policy(), 2, 5000, 300), d_a = zeros<float>(make_policy(), 2, 5000, 300);
  auto d_b = zeros<float>(make_policy(), 2, 5000, 300);
  std::size_t const bytes = first_order_recurrence::scratch_bytes<float, test_space>(2, 5000, 300, 0);
  auto measure = arena<test_space>::measuring();
  device::dry<test_policy> const dry{.workspace = &measure};
  first_order_recurrence::forward(dry, {.a = a, .b = a}, h);
  CHECK(measure.peak() == bytes);
  arena<test_space> exact(bytes);
  test_policy policy = make_policy();
  policy.workspace = &exact;
  first_order_recurrence::forward(policy, {.a = a, .b = a}, h);
  first_order_recurrence::backward(policy, {.a = a, .h = h, .d_h = a}, d_a, d_b);
  CHECK(exact.used() == 0);
  CHECK(exact.peak() == bytes);
}

TEST_CASE("first_order_recurrence: shapes that disagree are named") {
  auto const x = zeros<float>(make_policy(), 2, 5, 3), wrong = zeros<float>(make_policy(), 2, 5, 4);
  auto const state = zeros<float>(make_policy(), 2, 3), wrong_state = zeros<float>(make_policy(), 3, 3);
  auto y = zeros<float>(make_policy(), 2, 5, 3), z = zeros<float>(make_policy(), 2, 5, 3);
  auto const cu = test::upload<std::int64_t>({0, 5}, 2);
  using op = first_order_recurrence;
  using inputs = op::inputs<home<test_policy>, float, 3>;
  using gradient_inputs = op::gradient_inputs<home<test_policy>, float, 3>;
  auto const forward = [&](inputs const& in) {
    return test::message_of<shape_error>([&] { op::forward(make_policy(), in, y); });
  };
  auto const backward = [&](gradient_inputs const& in) {
    return test::message_of<shape_error>([&] { op::backward(make_policy(), in, y, z); });
  };
  CHECK(forward({.a = wrong, .b = x}) == "first_order_recurrence: a: got (2, 5, 4), expected (2, 5, 3)");
  CHECK(forward({.a = x, .b = wrong}) == "first_order_recurrence: b: got (2, 5, 4), expected (2, 5, 3)");
  CHECK(forward({.a = x, .b = x, .initial_state = wrong_state}) ==
        "first_order_recurrence: initial_state: got (3, 3), expected (2, 3)");
  CHECK(forward({.a = x, .b = x, .cu_seqlens = cu}) ==
        "first_order_recurrence: cu_seqlens: got a batch of 2 rows, expected one row of packed sequences");
  CHECK(backward({.a = x, .h = wrong, .d_h = x}) ==
        "first_order_recurrence.backward: h: got (2, 5, 4), expected (2, 5, 3)");
  CHECK(backward({.a = x, .h = x, .d_h = wrong}) ==
        "first_order_recurrence.backward: d_h: got (2, 5, 4), expected (2, 5, 3)");
  CHECK(backward({.a = x, .h = x, .d_h = x, .d_final_state = wrong_state}) ==
        "first_order_recurrence.backward: d_final_state: got (3, 3), expected (2, 3)");
  CHECK(test::message_of<shape_error>([&] {
          op::step(make_policy(), {.a = state, .b = wrong_state}, state, state);
        }) == "first_order_recurrence.step: b: got (3, 3), expected (2, 3)");
}
