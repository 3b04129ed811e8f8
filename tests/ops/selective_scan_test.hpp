#include "ops/selective_scan_problem.hpp"
#include "support/support.hpp"

#include <blackmamba/core/workspace.hpp>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>

#include <algorithm>
#include <vector>

using namespace blackmamba;
using namespace selective_scan_problem;

TEST_CASE_TEMPLATE("selective_scan: equals its definition at every size and type", T, STORAGE_TYPES) {
  for (std::int64_t length : test::sizes({0, 1, 2, 31, 32, 33, 200}))
    for (std::int64_t channels : test::sizes({1, 15, 16, 17, 40}))
      for (bool all : {false, true}) check_forward<T, 16>(make<T>(2, length, channels, 16, {.all = all}));
}

TEST_CASE("selective_scan: gradients equal central differences") {
  for (bool all : {true, false})
    for (bool packed : {false, true}) {
      auto const p = packed ? make<double>(1, 40, 3, 3, {.all = all, .offsets = {0, 0, 35, 35, 36, 40}})
                            : make<double>(2, 35, 2, 3, {.all = all});
      auto const d_y = test::random_normal(p.batch * p.length * p.channels, 21);
      auto const d_final = test::random_normal(p.sequences() * p.channels * p.states, 22);
      auto const g = run_backward<double, 3>(p, d_y, d_final);
      auto const loss = [&](problem const& q) {
        auto const r = reference(q);
        return test::weighted_sum(r.y, d_y) + test::weighted_sum(r.final_state, d_final);
      };
      auto const check = [&](values problem::*member, values const& gradient, char const* what) {
        if ((p.*member).empty()) return;
        problem q = p;
        test::check_gradient(
            [&](values const& v) {
              q.*member = v;
              return loss(q);
            },
            p.*member, gradient, what, 1e-6);
      };
      check(&problem::u, g.d_u, "d_u");
      check(&problem::delta, g.d_delta, "d_delta");
      check(&problem::A, g.d_A, "d_A");
      check(&problem::B, g.d_B, "d_B");
      check(&problem::C, g.d_C, "d_C");
      check(&problem::D, g.d_D, "d_D");
      check(&problem::z, g.d_z, "d_z");
      check(&problem::bias, g.d_bias, "d_delta_bias");
      check(&problem::initial, g.d_initial, "d_initial_state");
    }
}

TEST_CASE_TEMPLATE("selective_scan: gradients equal the chain rule at every type", T, STORAGE_TYPES) {
  for (bool all : {false, true}) check_backward<T, 16>(make<T>(2, 70, 81, 16, {.all = all}));
}

TEST_CASE("selective_scan: gradients equal the chain rule at every size") {
  for (std::int64_t length : test::sizes({0, 1, 31, 32, 33, 1100}))
    for (std::int64_t channels : {1, 17, 129}) check_backward<float, 3>(make<float>(2, length, channels, 3));
  options const packed{.offsets = {0, 1, 1, 3, 33, 65, 66, 200, 201, 202, 640, 640, 700}};
  check_backward<float, 3>(make<float>(1, 700, 17, 3, packed));
}

TEST_CASE("selective_scan: parameter gradients are added, and wanted where present") {
  auto const p = make<float>(1, 40, 5, 8);
  auto const d_y = test::random_normal(40 * 5, 21);
  auto const whole = run_backward<float, 8>(p, d_y, {});
  device_problem<float, 8> const in(p);
  auto y = test::poisoned<float>(1, 40, 5);
  auto checkpoints = test::poisoned<float>(selective_scan::checkpoint_size<8>(1, 40, 5, 1));
  selective_scan::forward<8>(make_policy(), in.inputs(), y, {.checkpoints = checkpoints});
  auto const g_y = test::upload<float>(d_y, 1, 40, 5);
  auto d_u = test::poisoned<float>(1, 40, 5), d_delta = test::poisoned<float>(1, 40, 5);
  auto d_B = test::poisoned<float>(1, 40, 8), d_C = test::poisoned<float>(1, 40, 8);
  auto d_A = test::upload<float>(values(40, 100.0), 5, 8);
  selective_scan::backward<8>(
      make_policy(),
      {.u = in.u, .delta = in.delta, .A = in.A_, .B = in.B, .C = in.C, .D = in.D, .z = in.z, .delta_bias = in.bias,
       .initial_state = in.initial, .delta_softplus = true, .A_is_log = true, .checkpoints = checkpoints, .d_y = g_y},
      {.d_u = d_u, .d_delta = d_delta, .d_A = d_A, .d_B = d_B, .d_C = d_C});
  test::check_equal(test::download(d_u), whole.d_u, "d_u");
  test::check_equal(test::download(d_B), whole.d_B, "d_B");
  auto expected = whole.d_A;
  for (auto& a : expected) a += 100;
  test::check_close(test::download(d_A), expected, 1e-6, "d_A");
}

TEST_CASE("selective_scan: in two calls as in one") {
  for (std::int64_t split : test::sizes({0, 1, 31, 32, 50, 99, 100})) {
    auto const p = make<float>(1, 100, 19, 16);
    auto const whole = run<float, 16>(p);
    auto const first = run<float, 16>(steps_of(p, 0, split, p.initial));
    auto const second = run<float, 16>(steps_of(p, split, 100, first.final_state));
    test::check_equal(first.y, slice(whole.y, 0, split * 19), "y of the first part");
    test::check_equal(second.y, slice(whole.y, split * 19, (100 - split) * 19), "y of the second part");
    test::check_equal(second.final_state, whole.final_state, "final_state");

    // Backward, last part first.
    auto const d_y = test::random_normal(100 * 19, 21), d_final = test::random_normal(19 * 16, 22);
    auto const g = run_backward<float, 16>(p, d_y, d_final);
    auto const g2 = run_backward<float, 16>(steps_of(p, split, 100, first.final_state),
                                            slice(d_y, split * 19, (100 - split) * 19), d_final);
    auto const g1 = run_backward<float, 16>(steps_of(p, 0, split, p.initial), slice(d_y, 0, split * 19), g2.d_initial);
    test::check_equal(g1.d_initial, g.d_initial, "d_initial_state");
    test::check_equal(g1.d_u, slice(g.d_u, 0, split * 19), "d_u of the first part");
    test::check_equal(g2.d_delta, slice(g.d_delta, split * 19, (100 - split) * 19), "d_delta of the second part");
    test::check_equal(g1.d_B, slice(g.d_B, 0, split * 16), "d_B of the first part");
    values d_A = g1.d_A;
    for (std::size_t i = 0; i < d_A.size(); ++i) d_A[i] += g2.d_A[i];
    test::check_close(d_A, g.d_A, test::tolerance<float>(100), "d_A");
  }
}

TEST_CASE("selective_scan: packed sequences as one by one, to the bit") {
  std::vector<std::int64_t> const offsets = {0, 0, 1, 33, 33, 65, 100, 101, 140, 140, 180, 240};
  auto const p = make<float>(1, 240, 37, 16, {.offsets = offsets});
  auto const d_y = test::random_normal(240 * 37, 21), d_final = test::random_normal(p.sequences() * 37 * 16, 22);
  auto const whole = run<float, 16>(p);
  auto const g = run_backward<float, 16>(p, d_y, d_final);
  for (std::int64_t s = 0; s < p.sequences(); ++s) {
    auto const first = p.begin(s), count = p.end(s) - first, state = s * 37 * 16;
    auto const q = steps_of(p, first, first + count, slice(p.initial, state, 37 * 16));
    auto const alone = run<float, 16>(q);
    test::check_equal(alone.y, slice(whole.y, first * 37, count * 37), "y");
    test::check_equal(alone.final_state, slice(whole.final_state, state, 37 * 16), "final_state");
    auto const h = run_backward<float, 16>(q, slice(d_y, first * 37, count * 37), slice(d_final, state, 37 * 16));
    test::check_equal(h.d_u, slice(g.d_u, first * 37, count * 37), "d_u");
    test::check_equal(h.d_delta, slice(g.d_delta, first * 37, count * 37), "d_delta");
    test::check_equal(h.d_z, slice(g.d_z, first * 37, count * 37), "d_z");
    test::check_equal(h.d_B, slice(g.d_B, first * 16, count * 16), "d_B");
    test::check_equal(h.d_C, slice(g.d_C, first * 16, count * 16), "d_C");
    test::check_equal(h.d_initial, slice(g.d_initial, state, 37 * 16), "d_initial_state");
  }
}

TEST_CASE_TEMPLATE("selective_scan: sixteen bits in packs, in two calls as in one and packed as one by one", T,
                   bfloat16, half) {
  constexpr std::int64_t D = 40;
  auto const p = make<T>(1, 100, D, 16);
  auto const whole = run<T, 16>(p);
  for (std::int64_t split : test::sizes({1, 15, 16, 31, 32, 50, 99})) {
    auto const first = run<T, 16>(steps_of(p, 0, split, p.initial));
    auto const second = run<T, 16>(steps_of(p, split, 100, first.final_state));
    test::check_equal(first.y, slice(whole.y, 0, split * D), "y of the first part");
    test::check_equal(second.y, slice(whole.y, split * D, (100 - split) * D), "y of the second part");
    test::check_equal(second.final_state, whole.final_state, "final_state");
  }
  // So many that a device gives a block fewer channels; some are empty, most end within a tile of steps.
  std::vector<std::int64_t> offsets = {0};
  for (std::int64_t s = 0; s < 140; ++s) offsets.push_back(offsets.back() + s * 37 % 71);
  auto const q = make<T>(1, offsets.back(), D, 16, {.offsets = offsets});
  check_forward<T, 16>(q);
  auto const packed = run<T, 16>(q);
  for (std::int64_t s = 0; s < q.sequences(); ++s) {
    auto const first = q.begin(s), count = q.end(s) - first;
    auto const alone = run<T, 16>(steps_of(q, first, first + count, slice(q.initial, s * D * 16, D * 16)));
    test::check_equal(alone.y, slice(packed.y, first * D, count * D), "y");
    test::check_equal(alone.final_state, slice(packed.final_state, s * D * 16, D * 16), "final_state");
  }
  // Cut into pieces.
  check_forward<T, 16>(make<T>(2, 3001, 72, 16));
  check_forward<T, 16>(make<T>(1, 6000, 72, 16, {.offsets = {0, 0, 1, 256, 513, 5000, 5000, 6000}}));
}

TEST_CASE("selective_scan: the same bits again, and for any number of threads") {
  auto const p = make<float>(2, 600, 150, 16);
  auto const q = make<float>(1, 300, 150, 16, {.offsets = {0, 7, 70, 71, 72, 100, 101, 160, 200, 300}});
  for (auto const& r : {p, q}) {
    auto const d_y = test::random_normal(r.batch * r.length * 150, 21);
    std::vector<test_policy> policies(2, make_policy());
    [&](auto& all) {
      if constexpr (requires { all[0].threads; }) {
        for (int threads : {1, 2, 3, 5}) {
          all.push_back(make_policy());
          all.back().threads = threads;
        }
      }
    }(policies);
    auto const forward = run<float, 16>(r, policies[0]);
    auto const g = run_backward<float, 16>(r, d_y, {}, policies[0]);
    for (std::size_t i = 1; i < policies.size(); ++i) {
      auto const again = run<float, 16>(r, policies[i]);
      test::check_equal(again.y, forward.y, "y");
      test::check_equal(again.final_state, forward.final_state, "final_state");
      auto const h = run_backward<float, 16>(r, d_y, {}, policies[i]);
      test::check_equal(h.d_u, g.d_u, "d_u");
      test::check_equal(h.d_delta, g.d_delta, "d_delta");
      test::check_equal(h.d_A, g.d_A, "d_A");
      test::check_equal(h.d_B, g.d_B, "d_B");
      test::check_equal(h.d_C, g.d_C, "d_C");
      test::check_equal(h.d_D, g.d_D, "d_D");
      test::check_equal(h.d_z, g.d_z, "d_z");
      test::check_equal(h.d_bias, g.d_bias, "d_delta_bias");
      test::check_equal(h.d_initial, g.d_initial, "d_initial_state");
    }
  }
}

TEST_CASE("selective_scan: few channels of long sequences, which a device cuts into pieces") {
  // Around and at many multiples of pieces; a packed row has sequences shorter than a piece, and none at all.
  check_forward<float, 16>(make<float>(1, 4096, 3, 16));
  check_forward<float, 16>(make<float>(2, 5001, 5, 16));
  check_forward<bfloat16, 16>(make<bfloat16>(1, 20000, 33, 16));
  check_forward<float, 3>(make<float>(1, 9000, 7, 3, {.offsets = {0, 0, 1, 256, 513, 4609, 4609, 8999, 9000}}));
  auto const p = make<float>(1, 6000, 9, 8, {.offsets = {0, 5000, 6000}});
  check_backward<float, 8>(p);
  auto const once = run<float, 8>(p), again = run<float, 8>(p);
  test::check_equal(again.y, once.y, "y");
  test::check_equal(again.final_state, once.final_state, "final_state");
}

TEST_CASE("selective_scan: small steps keep their digits") {
  // softplus(-12) = 6.1e-6; 1 + e^-12 in float would lose a third of it.
  auto p = make<float>(1, 64, 17, 16);
  for (auto& d : p.delta) d = static_cast<float>(-12 + 0.3 * d);
  p.bias = p.D = p.initial = {};
  auto const expected = reference(p), actual = run<float, 16>(p);
  test::check_close(actual.final_state, expected.final_state, 2e-6, "final_state");
  test::check_close(actual.y, expected.y, 2e-6, "y");
}

TEST_CASE("selective_scan: a long memory forgets at the right rate") {
  // Decay 0.9999 over 4096 steps: an error of 1e-7 in each would grow to 4e-4.
  std::int64_t const length = 4096;
  auto const rate = static_cast<float>(8 * std::log(0.9999));
  problem p{.batch = 1, .length = length, .channels = 17, .states = 16, .u = values(length * 17, 1.0),
            .delta = values(length * 17, 0.125), .A = values(17 * 16, static_cast<double>(rate)),
            .B = values(length * 16, 1.0), .C = values(length * 16, 1.0), .initial = values(17 * 16, 1000.0)};
  auto const expected = reference(p), actual = run<float, 16>(p);
  test::check_close(actual.final_state, expected.final_state, 1.5e-4, "final_state", 0.0);
}

TEST_CASE("selective_scan: steps of any size give numbers") {
  for (bool log : {false, true}) {
    auto p = make<float>(1, 70, 17, 16);
    p.log = log;
    if (!log)
      for (auto& a : p.A) a = static_cast<float>(-std::exp(a));
    for (std::size_t i = 0; i < p.delta.size(); i += 7) p.delta[i] = i % 2 ? 1e4 : 1e30;
    for (std::size_t i = 3; i < p.delta.size(); i += 7) p.delta[i] = i % 2 ? -1e4 : -1e30;
    for (std::size_t i = 0; i < p.u.size(); ++i)
      if (p.delta[i] > 1e3) p.u[i] = 0;
    check_forward<float, 16>(p);
    auto const d_y = test::random_normal(70 * 17, 21);
    auto const g = run_backward<float, 16>(p, d_y, {});
    for (auto const* v : {&g.d_u, &g.d_delta, &g.d_A, &g.d_B, &g.d_C, &g.d_z})
      CHECK(std::all_of(v->begin(), v->end(), [](double x) { return std::isfinite(x); }));
  }
}

TEST_CASE("selective_scan: a NaN stays in its channel") {
  auto p = make<float>(1, 40, 20, 16);
  p.delta[5 * 20 + 3] = std::numeric_limits<double>::quiet_NaN();
  auto const y = run<float, 16>(p).y;
  for (std::int64_t t = 0; t < 40; ++t)
    for (std::int64_t d = 0; d < 20; ++d) CHECK(std::isnan(y[index(t * 20 + d)]) == (d == 3 && t >= 5));
}

TEST_CASE("selective_scan: takes slices of projections, and writes their gradients there") {
  // (dt, B, C) and (x, z) as mixers have them; d_z in the place of z.
  std::int64_t const L = 45, D = 18, N = 8, R = 3, wide = R + 2 * N;
  auto const p = make<float>(2, L, D, N);
  auto const d_y = test::random_normal(2 * L * D, 21);
  auto const expected = run<float, 8>(p);
  auto const g = run_backward<float, 8>(p, d_y, {});

  values projections(index(2 * L * wide), 7.0), xz(index(2 * L * 2 * D), 7.0);
  for (std::int64_t r = 0; r < 2 * L; ++r) {
    for (std::int64_t n = 0; n < N; ++n) {
      projections[index(r * wide + R + n)] = p.B[index(r * N + n)];
      projections[index(r * wide + R + N + n)] = p.C[index(r * N + n)];
    }
    for (std::int64_t d = 0; d < D; ++d) {
      xz[index(r * 2 * D + d)] = p.u[index(r * D + d)];
      xz[index(r * 2 * D + D + d)] = p.z[index(r * D + d)];
    }
  }
  device_problem<float, 8> const in(p);
  auto const bc = test::upload<float>(projections, 2, L, wide);
  auto const halves = test::upload<float>(xz, 2, L, 2 * D);
  auto y = test::poisoned<float>(2, L, D);
  auto checkpoints = test::poisoned<float>(selective_scan::checkpoint_size<8>(2, L, D, 2));
  auto inputs = in.inputs();
  inputs.u = halves.columns(0, D);
  inputs.z = halves.columns(D, D);
  inputs.B = bc.columns(R, N);
  inputs.C = bc.columns(R + N, N);
  selective_scan::forward<8>(make_policy(), inputs, y, {.checkpoints = checkpoints});
  test::check_equal(test::download(y), expected.y, "y");

  auto const d_bc = test::upload<float>(values(index(2 * L * wide), 7.0), 2, L, wide);
  auto const g_y = test::upload<float>(d_y, 2, L, D);
  auto d_u = test::poisoned<float>(2, L, D), d_delta = test::poisoned<float>(2, L, D);
  selective_scan::backward<8, test_policy, float>(
      make_policy(),
      {.u = inputs.u, .delta = in.delta, .A = in.A_, .B = inputs.B, .C = inputs.C, .D = in.D, .z = inputs.z,
       .delta_bias = in.bias, .initial_state = in.initial, .delta_softplus = true, .A_is_log = true,
       .checkpoints = checkpoints, .d_y = g_y},
      {.d_u = d_u, .d_delta = d_delta, .d_B = d_bc.columns(R, N), .d_C = d_bc.columns(R + N, N),
       .d_z = halves.columns(D, D)});
  test::check_equal(test::download(d_u), g.d_u, "d_u");
  auto const written = test::download(d_bc), in_place = test::download(halves);
  for (std::int64_t r = 0; r < 2 * L; ++r) {
    for (std::int64_t n = 0; n < wide; ++n) {
      double const e = n < R ? 7.0 : n < R + N ? g.d_B[index(r * N + n - R)] : g.d_C[index(r * N + n - R - N)];
      REQUIRE(written[index(r * wide + n)] == e);
    }
    for (std::int64_t d = 0; d < D; ++d) {
      REQUIRE(in_place[index(r * 2 * D + d)] == p.u[index(r * D + d)]);
      REQUIRE(in_place[index(r * 2 * D + D + d)] == g.d_z[index(r * D + d)]);
    }
  }
}

TEST_CASE("selective_scan: sequences without steps hand their state on") {
  auto const p = make<float>(3, 0, 5, 8);
  auto const r = run<float, 8>(p);
  test::check_equal(r.final_state, p.initial, "final_state");
  auto const d_final = test::rounded<float>(test::random_normal(3 * 5 * 8, 22));
  auto const g = run_backward<float, 8>(p, {}, d_final);
  test::check_equal(g.d_initial, d_final, "d_initial_state");
  test::check_equal(g.d_A, values(40), "d_A");

  auto const none = make<float>(1, 0, 5, 8, {.offsets = {0}});
  CHECK(run<float, 8>(none).final_state.empty());
  CHECK(run<float, 8>(make<float>(0, 9, 5, 8)).y.empty());
  CHECK(run<float, 8>(make<float>(2, 9, 0, 8)).y.empty());
  auto const d_B = run_backward<float, 8>(make<float>(2, 9, 0, 8), {}, {}).d_B;
  test::check_equal(d_B, values(2 * 9 * 8), "d_B without channels");
}

TEST_CASE_TEMPLATE("selective_scan: step equals forward", T, STORAGE_TYPES) {
  for (std::int64_t batch : {1, 3})
    for (std::int64_t channels : {1, 16, 40})
      for (bool all : {true, false}) check_step<T, 16>(batch, channels, all);
}
TEST_CASE_TEMPLATE("selective_scan: a step's result may take the place of its inputs", T, STORAGE_TYPES) {
  for (auto where : {place_of_y::u, place_of_y::delta, place_of_y::z})
    for (std::int64_t batch : {3, 33}) {
      check_step<T, 16>(batch, 40, true, where);
      check_step<T, 3>(batch, 37, true, where);
    }
}
TEST_CASE("selective_scan: takes the scratch that it says") {
  using dry = device::dry<test_policy>;
  auto arena = blackmamba::arena<test_policy::memory_space>::measuring();
  dry const policy{&arena};
  auto const u = test::poisoned<float>(3, 700, 100), B = test::poisoned<float>(3, 700, 16);
  auto const A = test::poisoned<float>(100, 16);
  auto const checkpoints = test::poisoned<float>(selective_scan::checkpoint_size<16>(3, 700, 100, 3));
  selective_scan::backward<16, dry, float>(
      policy, {.u = u, .delta = u, .A = A, .B = B, .C = B, .checkpoints = checkpoints, .d_y = u},
      {.d_u = u, .d_delta = u, .d_B = B, .d_C = B});
  CHECK(arena.peak() == selective_scan::scratch_bytes<16, float, test_policy::memory_space>(3, 700, 100, 3));
  CHECK(arena.used() == 0);

  auto forward_arena = blackmamba::arena<test_policy::memory_space>::measuring();
  auto y = test::poisoned<float>(3, 700, 100);
  selective_scan::forward<16>(dry{&forward_arena}, {.u = u, .delta = u, .A = A, .B = B, .C = B}, y.as_view());
  CHECK(forward_arena.peak() == selective_scan::forward_scratch_bytes<test_policy, 16, float>(3, 700, 100, 3));
  CHECK(forward_arena.used() == 0);
}

TEST_CASE("selective_scan: what disagrees is named") {
  auto const x = test::upload<float>(values(12), 1, 3, 4), B = test::upload<float>(values(6), 1, 3, 2);
  auto const A = test::upload<float>(values(8), 4, 2), wrong = test::upload<float>(values(8), 2, 4);
  auto const initial = test::upload<float>(values(16), 2, 4, 2);
  auto y = test::poisoned<float>(1, 3, 4);
  auto const message = [&](auto const& in, auto const&... rest) {
    return test::message_of<error>([&] { selective_scan::forward<2>(make_policy(), in, y, rest...); });
  };
  selective_scan::inputs<test_policy, float, 2> const good{.u = x, .delta = x, .A = A, .B = B, .C = B};
  auto in = good;
  in.A = wrong;
  CHECK(message(in) == "selective_scan: A: got (2, 4), expected (4, 2)");
  in = good;
  in.C = x;
  CHECK(message(in) == "selective_scan: C: got (1, 3, 4), expected (1, 3, 2)");
  in = good;
  in.initial_state = initial;
  CHECK(message(in) == "selective_scan: initial_state: got (2, 4, 2), expected (1, 4, 2)");
  selective_scan::results<test_policy, float> keep;
  auto checkpoints = test::poisoned<float>(9);
  keep.checkpoints = checkpoints;
  CHECK(message(good, keep) == "selective_scan: checkpoints: got (9), expected (8)");

  auto const offsets = test::upload<std::int64_t>({0, 2, 1, 3}, 4);
  in = good;
  in.cu_seqlens = offsets;
  if constexpr (std::is_same_v<test::test_space, space::host>)  // elsewhere offsets are not read on the way
    CHECK(message(in) == "selective_scan: cu_seqlens: got 1 at index 2, expected offsets that rise from 0 to 3");
  auto const none = test::upload<std::int64_t>(values{0}, 1);
  in.cu_seqlens = none;
  CHECK(message(in) == "selective_scan: cu_seqlens: got no sequences, expected some for 3 steps");
  auto const two = test::upload<float>(values(24), 2, 3, 4), two_B = test::upload<float>(values(12), 2, 3, 2);
  auto y_two = test::poisoned<float>(2, 3, 4);
  selective_scan::inputs<test_policy, float, 2> const rows{.u = two, .delta = two, .A = A, .B = two_B, .C = two_B,
                                                           .cu_seqlens = offsets};
  CHECK(test::message_of<shape_error>([&] { selective_scan::forward<2>(make_policy(), rows, y_two); }) ==
        "selective_scan: cu_seqlens: got a batch of 2 rows, expected one row of packed sequences");

  CHECK(test::message_of<shape_error>([&] {
          selective_scan::backward<2, test_policy, float>(
              make_policy(),
              {.u = x, .delta = x, .A = A, .B = B, .C = B, .checkpoints = checkpoints.slice(0, 8), .d_y = x},
              {.d_u = y, .d_delta = y, .d_B = y, .d_C = y});
        }) == "selective_scan.backward: d_B: got (1, 3, 4), expected (1, 3, 2)");
  auto d_B = test::poisoned<float>(1, 3, 2);
  CHECK(test::message_of<shape_error>([&] {
          selective_scan::backward<2, test_policy, float>(
              make_policy(),
              {.u = x, .delta = x, .A = A, .B = B, .C = B, .checkpoints = checkpoints.slice(0, 8), .d_y = x},
              {.d_u = y, .d_delta = y, .d_B = d_B, .d_C = d_B, .d_z = y});
        }) == "selective_scan.backward: d_z: got a gradient, expected none, for z is absent");

  if constexpr (!std::is_same_v<test::test_space, space::host>) {
    auto const far = [](auto steps) {
      steps.set_stride(1, std::int64_t{1} << 30);
      return steps;
    };
    in = good;
    in.delta = far(x.as_view());
    CHECK(message(in) ==
          "selective_scan: delta: got steps 1073741824 elements apart, expected at most 1073741823 on a device");
    CHECK(test::message_of<shape_error>([&] {
            selective_scan::backward<2, test_policy, float>(
                make_policy(),
                {.u = x, .delta = x, .A = A, .B = B, .C = B, .checkpoints = checkpoints.slice(0, 8), .d_y = x},
                {.d_u = y, .d_delta = far(y.as_view()), .d_B = d_B, .d_C = d_B});
          }) == "selective_scan.backward: d_delta: got steps 1073741824 elements apart, expected at most 1073741823 on "
                "a device");
    std::int64_t const many = std::int64_t{1} << 31;
    view<test::test_space, float, dyn, dyn, dyn> one{y.data(), 1, many, 4}, one_B{y.data(), 1, many, 2};
    CHECK(test::message_of<shape_error>([&] {
            selective_scan::forward<2>(make_policy(), {.u = one, .delta = one, .A = A, .B = one_B, .C = one_B}, one);
          }) == "selective_scan: u: got 2147483648 steps, expected at most 2147483647 on a device");
  }

  auto state = test::poisoned<float>(3, 4, 1);
  auto const row = test::upload<float>(values(12), 3, 4), row_B = test::upload<float>(values(6), 3, 2);
  auto y_row = test::poisoned<float>(3, 4);
  CHECK(test::message_of<shape_error>([&] {
          selective_scan::step<2>(make_policy(), {.u = row, .delta = row, .A = A, .B = row_B, .C = row_B}, state,
                                  y_row);
        }) == "selective_scan.step: state: got (3, 4, 1), expected (3, 4, 2)");
}
