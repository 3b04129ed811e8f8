#include "support/convolution_problem.hpp"

using namespace blackmamba;
using namespace test::convolution_problem;
using test::test_space;

TEST_CASE_TEMPLATE("causal_conv1d: equals its definition at every size and type", T, STORAGE_TYPES) {
  for (std::int64_t length : test::sizes({0, 1, 2, 3, 63, 64, 65, 200}))
    for (std::int64_t channels : test::sizes({1, 15, 16, 17, 70}))
      for (std::int64_t taps : {2, 3, 4})
        for (int o = 0; o < 8; ++o)
          check_forward<T>(make<T>(2, length, channels, taps,
                                   {.bias = o % 2 == 1, .initial = o / 2 % 2 == 1, .silu = o / 4 == 1}));
}
TEST_CASE_TEMPLATE("causal_conv1d: gradients equal those of its definition at every size and type", T, STORAGE_TYPES) {
  for (std::int64_t length : test::sizes({0, 1, 2, 3, 64, 255, 256, 257, 258, 600}))
    for (std::int64_t channels : {1, 16, 70})
      for (std::int64_t taps : {2, 3, 4})
        for (bool all : {false, true})
          check_backward<T>(make<T>(2, length, channels, taps, {.bias = all, .initial = all, .silu = all}));
}

TEST_CASE("causal_conv1d: gradients equal central differences") {
  auto const check = [](problem const& p) {
    auto const d_y = test::random_normal(p.batch * p.length * p.channels, 21);
    auto const d_final = test::random_normal(p.state_size(), 22);
    auto const g = run_backward<double>(p, d_y, d_final);
    auto const check_argument = [&](values problem::*argument, values const& gradient, char const* what) {
      if ((p.*argument).empty()) return;
      auto const loss = [&](values const& v) {
        problem moved = p;
        moved.*argument = v;
        auto const r = reference(moved);
        return test::weighted_sum(r.y, d_y) + test::weighted_sum(r.final_state, d_final);
      };
      test::check_gradient(loss, p.*argument, gradient, what);
    };
    check_argument(&problem::x, g.d_x, "d_x");
    check_argument(&problem::weight, g.d_weight, "d_weight");
    check_argument(&problem::bias, g.d_bias, "d_bias");
    check_argument(&problem::initial, g.d_initial, "d_initial_state");
  };
  for (std::int64_t taps : {2, 3, 4})
    for (bool silu : {false, true}) {
      for (std::int64_t length : test::sizes({0, 1, 2, 3, 9})) check(make<double>(2, length, 3, taps, {.silu = silu}));
      check(make<double>(2, 5, 3, taps, {.bias = false, .initial = false, .silu = silu}));
      check(make<double>(1, 14, 3, taps, {.silu = silu, .offsets = {0, 0, 1, 3, 3, 6, 14, 14}}));
    }
  check(make<double>(1, 300, 1, 4));  // two blocks of backward
  check(make<double>(1, 267, 1, 4, {.offsets = {0, 5, 263, 267}}));
}

TEST_CASE("causal_conv1d: gradients of weight and bias are added, and only those that are wanted") {
  auto const p = make<float>(2, 300, 17, 4);
  auto const d_y = test::random_normal(2 * 300 * 17, 21);
  auto const zero = run_backward<float>(p, d_y, {});
  auto const one = run_backward<float>(p, d_y, {}, make_policy(), 64.0);
  auto const check_added = [](values from_one, values const& from_zero, char const* what) {
    for (auto& v : from_one) v -= 64.0;
    check_near<float>(from_one, from_zero, 64.0 + largest(from_zero), 1, what);
  };
  check_added(one.d_weight, zero.d_weight, "d_weight");
  check_added(one.d_bias, zero.d_bias, "d_bias");
  test::check_equal(one.d_x, zero.d_x, "d_x");

  // An absent gradient of the final state is one of zeros.
  test::check_equal(run_backward<float>(p, d_y, values(index(p.state_size()))).d_x, zero.d_x, "d_x");

  device_problem<float> const in(p);
  auto const g_y = test::upload<float>(d_y, 2, 300, 17);
  auto d_x = test::poisoned<float>(2, 300, 17), y = test::poisoned<float>(2, 300, 17);
  auto d_weight = zeros<float>(make_policy(), 17, 4);
  causal_conv1d::backward(
      make_policy(),
      {.x = in.x, .weight = in.weight, .bias = in.bias, .initial_state = in.initial, .silu = true, .d_y = g_y},
      {.d_x = d_x, .d_weight = d_weight});
  test::check_equal(test::download(d_x), zero.d_x, "d_x");
  test::check_equal(test::download(d_weight), zero.d_weight, "d_weight");
  causal_conv1d::forward(make_policy(), in.inputs(), y);
  test::check_equal(test::download(y), run<float>(p).y, "y");
}

TEST_CASE_TEMPLATE("causal_conv1d: packed sequences give the bits that they give alone", T, STORAGE_TYPES) {
  std::int64_t const channels = 21;
  for (std::int64_t taps : {2, 3, 4})
    for (auto const& offsets : std::vector<std::vector<std::int64_t>>{{0, 0, 1, 3, 3, 6, 10, 74, 139, 396, 700, 700},
                                                                      {0, 700},
                                                                      {0, 700, 700},
                                                                      {0, 0, 699, 700},
                                                                      {0, 0, 0},
                                                                      {0}}) {
      auto const p = make<T>(1, offsets.back(), channels, taps, {.offsets = offsets});
      auto const d_y = test::rounded<T>(test::random_normal(p.length * channels, 21));
      auto const d_final = test::rounded<T>(test::random_normal(p.state_size(), 22));
      auto const together = run<T>(p);
      auto const g = run_backward<T>(p, d_y, d_final);
      outputs alone;
      derivatives g_alone;
      values d_weight(p.weight.size()), d_bias(p.bias.size());
      double size = 0;
      for (std::int64_t s = 0; s < p.sequences(); ++s) {
        auto const part = steps_of(p, p.begin(s), p.end(s), part_of(p.initial, s, p.sequences()));
        auto const r = run<T>(part);
        append(alone.y, r.y);
        append(alone.final_state, r.final_state);
        auto const d = run_backward<T>(part, slice(d_y, p.begin(s) * channels, p.end(s) * channels),
                                       part_of(d_final, s, p.sequences()));
        append(g_alone.d_x, d.d_x);
        append(g_alone.d_initial, d.d_initial);
        for (std::size_t i = 0; i < d_weight.size(); ++i) d_weight[i] += d.d_weight[i];
        for (std::size_t i = 0; i < d_bias.size(); ++i) d_bias[i] += d.d_bias[i];
        size += std::max(largest(d.d_weight), largest(d.d_bias));
      }
      test::check_equal(together.y, alone.y, "y");
      test::check_equal(together.final_state, alone.final_state, "final_state");
      test::check_equal(g.d_x, g_alone.d_x, "d_x");
      test::check_equal(g.d_initial, g_alone.d_initial, "d_initial_state");
      check_near<accum_t<T>>(g.d_weight, d_weight, size, p.sequences(), "d_weight");
      check_near<accum_t<T>>(g.d_bias, d_bias, size, p.sequences(), "d_bias");
    }
}

TEST_CASE_TEMPLATE("causal_conv1d: a text in pieces gives the bits of the whole", T, STORAGE_TYPES) {
  for (std::int64_t taps : {2, 3, 4})
    for (bool initial : {false, true}) {
      auto const p = make<T>(1, 200, 19, taps, {.initial = initial});
      auto const whole = run<T>(p);
      for (auto const& cuts : std::vector<std::vector<std::int64_t>>{
               {0, 200}, {0, 1, 2, 3, 200}, {0, 0, 64, 130, 200}, {0, 65, 67, 67, 70, 199, 200, 200}}) {
        values y, state = p.initial;
        for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
          auto const r = run<T>(steps_of(p, cuts[i], cuts[i + 1], state));
          append(y, r.y);
          state = r.final_state;
        }
        test::check_equal(y, whole.y, "y");
        test::check_equal(state, whole.final_state, "final_state");
      }
    }
}

TEST_CASE_TEMPLATE("causal_conv1d: step equals forward", T, STORAGE_TYPES) {
  std::int64_t const length = 6;
  for (std::int64_t batch : {0, 1, 3})
    for (std::int64_t channels : test::sizes({1, 16, 70, 200}))
      for (std::int64_t taps : {2, 3, 4})
        for (bool all : {false, true}) {
          auto const p = make<T>(batch, length, channels, taps, {.bias = all, .silu = all});
          auto const expected = run<T>(p);
          double const scale = largest(reference(sizes_of(p)).y);
          device_problem<T> const in(p);
          auto state = test::upload<T>(p.initial, batch, taps - 1, channels);
          for (std::int64_t t = 0; t < length; ++t) {
            // The t-th step of every sequence: rows that lie a sequence apart. Then the same in place.
            view<test::test_space, T, dyn, dyn> x(in.x.data() + t * channels, batch, channels);
            x.set_stride(0, length * channels);
            auto y = test::poisoned<T>(batch, channels);
            values x_t, y_t;
            for (std::int64_t b = 0; b < batch; ++b) {
              std::int64_t const begin = (b * length + t) * channels;
              append(x_t, slice(p.x, begin, begin + channels));
              append(y_t, slice(expected.y, begin, begin + channels));
            }
            auto in_place = test::upload<T>(x_t, batch, channels);
            auto other = test::upload<T>(test::download(state), batch, taps - 1, channels);
            causal_conv1d::step(make_policy(), {.x = x, .weight = in.weight, .bias = in.bias, .silu = all}, state, y);
            causal_conv1d::step(make_policy(), {.x = in_place, .weight = in.weight, .bias = in.bias, .silu = all},
                                other, in_place);
            check_near<T>(test::download(y), y_t, scale, taps, "y");
            test::check_equal(test::download(in_place), test::download(y), "y in place");
            test::check_equal(test::download(other), test::download(state), "state");
          }
          test::check_equal(test::download(state), expected.final_state, "state");
        }
}

TEST_CASE_TEMPLATE("causal_conv1d: the same bits in every run, for any number of threads", P, test_policy) {
  for (bool packed : {false, true}) {
    auto const p = packed ? make<float>(1, 1500, 150, 4, {.offsets = {0, 3, 3, 700, 1100, 1101, 1500}})
                          : make<float>(3, 700, 150, 4);
    auto const d_y = test::random_normal(p.batch * p.length * p.channels, 21);
    auto const d_final = test::random_normal(p.state_size(), 22);
    auto const r = run<float>(p);
    auto const g = run_backward<float>(p, d_y, d_final);
    auto const check_again = [&](test_policy const& policy) {
      auto const again = run<float>(p, policy);
      test::check_equal(again.y, r.y, "y");
      test::check_equal(again.final_state, r.final_state, "final_state");
      auto const g_again = run_backward<float>(p, d_y, d_final, policy);
      test::check_equal(g_again.d_x, g.d_x, "d_x");
      test::check_equal(g_again.d_weight, g.d_weight, "d_weight");
      test::check_equal(g_again.d_bias, g.d_bias, "d_bias");
      test::check_equal(g_again.d_initial, g.d_initial, "d_initial_state");
    };
    check_again(make_policy());
    if constexpr (requires(P policy) { policy.threads; })
      for (int threads : {1, 2, 3, 7}) {
        P policy = make_policy();
        policy.threads = threads;
        check_again(policy);
      }
  }
}

TEST_CASE_TEMPLATE("causal_conv1d: every tensor may be a slice of a wider one", T, STORAGE_TYPES) {
  using A = accum_t<T>;
  std::int64_t const B = 2, L = 300, D = 37, K = 4;
  auto const p = make<T>(B, L, D, K);
  auto const d_y = test::rounded<T>(test::random_normal(B * L * D, 21));
  auto const d_final = test::rounded<T>(test::random_normal(p.state_size(), 22));
  auto const r = run<T>(p);
  auto const g = run_backward<T>(p, d_y, d_final);
  // Rows of 3 D: something that must stay, what is read, what is to be written.
  auto const wide = [&](values const& v) {
    values w(3 * v.size(), 7.0);
    for (std::size_t i = 0; i < v.size(); ++i) w[i / index(D) * 3 * index(D) + index(D) + i % index(D)] = v[i];
    return w;
  };
  auto const check = [&](values const& after, values const& read, values const& written, char const* what) {
    for (std::size_t row = 0; row < read.size() / index(D); ++row)
      for (std::size_t j = 0; j < index(D); ++j) {
        std::size_t const i = row * index(D) + j, at = row * 3 * index(D) + j;
        REQUIRE_MESSAGE(after[at] == 7.0, what);
        REQUIRE_MESSAGE(after[at + index(D)] == read[i], what);
        REQUIRE_MESSAGE(after[at + 2 * index(D)] == written[i], what);
      }
  };
  // Taps and their gradients with a gap after each channel's.
  values taps(index(D * 6), 7.0);
  for (std::int64_t i = 0; i < D * K; ++i) taps[index(i / K * 6 + i % K)] = p.weight[index(i)];
  auto const weight = test::upload<A>(taps, D, 6), d_weight = zeros<A>(make_policy(), D, 6);
  auto const bias = test::upload<A>(p.bias, D), d_bias = zeros<A>(make_policy(), D);

  auto const x_y = test::upload<T>(wide(p.x), B, L, 3 * D), states = test::upload<T>(wide(p.initial), B, K - 1, 3 * D);
  causal_conv1d::forward(
      make_policy(),
      {.x = x_y.columns(D, D), .weight = weight.columns(0, K), .bias = bias, .initial_state = states.columns(D, D),
       .silu = true},
      x_y.columns(2 * D, D), states.columns(2 * D, D));
  check(test::download(x_y), p.x, r.y, "x and y");
  check(test::download(states), p.initial, r.final_state, "states");

  auto const d_y_d_x = test::upload<T>(wide(d_y), B, L, 3 * D);
  auto const d_states = test::upload<T>(wide(d_final), B, K - 1, 3 * D);
  causal_conv1d::backward<test_policy, T>(
      make_policy(),
      {.x = x_y.columns(D, D), .weight = weight.columns(0, K), .bias = bias, .initial_state = states.columns(D, D),
       .silu = true, .d_y = d_y_d_x.columns(D, D), .d_final_state = d_states.columns(D, D)},
      {.d_x = d_y_d_x.columns(2 * D, D), .d_weight = d_weight.columns(0, K), .d_bias = d_bias,
       .d_initial_state = d_states.columns(2 * D, D)});
  check(test::download(d_y_d_x), d_y, g.d_x, "d_y and d_x");
  check(test::download(d_states), d_final, g.d_initial, "d_states");
  auto const after = test::download(d_weight);
  for (std::int64_t i = 0; i < D * 6; ++i)
    REQUIRE(after[index(i)] == (i % 6 < K ? g.d_weight[index(i / 6 * K + i % 6)] : 0.0));
  test::check_equal(test::download(d_bias), g.d_bias, "d_bias");
}

TEST_CASE_TEMPLATE("causal_conv1d: results larger than the caches have the bits of their parts", T, float, bfloat16) {
  std::int64_t const D = 2064, part = 1000, L = (std::int64_t{17} << 20) / (D * static_cast<std::int64_t>(sizeof(T)));
  problem p{.batch = 1, .length = L, .channels = D, .taps = 4};
  p.x = values(index(L * D));
  for (std::size_t i = 0; i < p.x.size(); ++i) p.x[i] = static_cast<double>(i % 1009) / 512 - 1;
  p.weight = test::random_normal(D * 4, 1);
  device_problem<T> const in(p);
  auto const d_weight = zeros<accum_t<T>>(make_policy(), D, 4);
  auto const both = [&](auto const& y, auto const& d_x, std::int64_t first, std::int64_t count) {
    auto const x = in.x.columns(first, count);
    auto const weight = in.weight.slice(first, count);
    causal_conv1d::forward(make_policy(), {.x = x, .weight = weight}, y.columns(first, count));
    causal_conv1d::backward<test_policy, T>(
        make_policy(), {.x = x, .weight = weight, .d_y = x},
        {.d_x = d_x.columns(first, count), .d_weight = d_weight.slice(first, count)});
  };
  auto const y = test::poisoned<T>(1, L, D), d_x = test::poisoned<T>(1, L, D);
  both(y, d_x, 0, D);
  auto const y_parts = test::poisoned<T>(1, L, D), d_x_parts = test::poisoned<T>(1, L, D);
  both(y_parts, d_x_parts, 0, part);
  both(y_parts, d_x_parts, part, D - part);
  CHECK((test::download(y) == test::download(y_parts)));
  CHECK((test::download(d_x) == test::download(d_x_parts)));
}

TEST_CASE("causal_conv1d: sequences without steps hand their state on") {
  auto const p = make<float>(3, 0, 5, 4);
  test::check_equal(run<float>(p).final_state, p.initial, "final_state");
  auto const d_final = test::rounded<float>(test::random_normal(p.state_size(), 22));
  auto const g = run_backward<float>(p, {}, d_final);
  test::check_equal(g.d_initial, d_final, "d_initial_state");
  test::check_equal(g.d_weight, values(20), "d_weight");
  test::check_equal(run<float>(make<float>(3, 0, 5, 4, {.initial = false})).final_state, values(45), "final_state");

  CHECK(run<float>(make<float>(0, 9, 5, 4)).y.empty());
  CHECK(run<float>(make<float>(2, 9, 0, 4)).y.empty());
  test::check_equal(run_backward<float>(make<float>(0, 9, 5, 4), {}, {}).d_weight, values(20), "d_weight");
  CHECK(run_backward<float>(make<float>(2, 9, 0, 4), {}, {}).d_x.empty());
}

TEST_CASE("causal_conv1d: thousands of small problems equal the definition") {
  std::uint64_t const problems = test::trials(std::is_same_v<test_space, space::host> ? 10000 : 2400);
  auto const check = []<class T>(T, std::uint64_t i) {
    std::uint64_t n = 0;
    auto const any = [&](std::int64_t low, std::int64_t high) { return test::random_integer(i, n++, low, high); };
    options o{.bias = any(0, 1) == 1, .initial = any(0, 1) == 1, .silu = any(0, 1) == 1};
    std::int64_t batch = any(0, 3), length = any(0, 9) > 0 ? any(0, 12) : any(0, 300);
    if (any(0, 1) == 1) {
      batch = 1;
      for (std::int64_t s = any(0, 5); s > 0; --s) o.offsets.push_back(any(0, length));
      o.offsets.push_back(0);
      if (o.offsets.size() > 1)
        o.offsets.push_back(length);
      else
        length = 0;
      std::sort(o.offsets.begin(), o.offsets.end());
    }
    auto const p = make<T>(batch, length, any(0, 9) > 0 ? any(0, 20) : any(60, 70), any(2, 4), o, i);
    CAPTURE(i);
    check_forward<T>(p);
    check_backward<T>(p);
  };
  for (std::uint64_t i = 0; i < problems; i += 4) {
    check(float{}, i);
    check(double{}, i + 1);
    check(bfloat16{}, i + 2);
    check(half{}, i + 3);
  }
}

TEST_CASE("causal_conv1d: takes the scratch that it says") {
  using dry = device::dry<test_policy>;
  auto arena = blackmamba::arena<test_policy::memory_space>::measuring();
  dry const policy{&arena};
  auto const x = test::poisoned<bfloat16>(3, 700, 100);
  auto const weight = test::poisoned<float>(100, 3);
  causal_conv1d::backward<dry, bfloat16>(policy, {.x = x, .weight = weight, .d_y = x}, {.d_x = x, .d_weight = weight});
  CHECK(arena.peak() == causal_conv1d::scratch_bytes<bfloat16>(3, 700, 100, 3, 0));
  CHECK(arena.used() == 0);

  auto packed_arena = blackmamba::arena<test_policy::memory_space>::measuring();
  dry const packed{&packed_arena};
  auto const row = test::poisoned<bfloat16>(1, 700, 100);
  auto const offsets = test::upload<std::int64_t>({0, 2, 300, 700}, 4);
  causal_conv1d::backward<dry, bfloat16>(packed, {.x = row, .weight = weight, .cu_seqlens = offsets, .d_y = row},
                                         {.d_x = row, .d_weight = weight});
  CHECK(packed_arena.peak() == causal_conv1d::scratch_bytes<bfloat16>(1, 700, 100, 3, 3));
}

TEST_CASE("causal_conv1d: what disagrees is named") {
  using inputs = causal_conv1d::inputs<test_policy, float>;
  auto const x = test::upload<float>(values(24), 2, 3, 4), row = test::upload<float>(values(12), 1, 3, 4);
  auto const weight = test::upload<float>(values(12), 4, 3), wrong = test::upload<float>(values(12), 3, 4);
  auto const bias = test::upload<float>(values(3), 3);
  auto y = test::poisoned<float>(2, 3, 4), y_row = test::poisoned<float>(1, 3, 4);
  auto const offsets = [](values const& v) {
    return test::upload<std::int64_t>(v, static_cast<std::int64_t>(v.size()));
  };
  auto const message = [&](inputs const& in, auto const& to, auto const&... rest) {
    return test::message_of<error>([&] { causal_conv1d::forward(make_policy(), in, to, rest...); });
  };
  CHECK(message({.x = row, .weight = weight}, y) == "causal_conv1d: x: got (1, 3, 4), expected (2, 3, 4)");
  CHECK(message({.x = x, .weight = wrong}, y) == "causal_conv1d: weight: got (3, 4), expected (4, any)");
  CHECK(message({.x = x, .weight = test::upload<float>(values(20), 4, 5)}, y) ==
        "causal_conv1d: weight: got 5 taps, expected 2 to 4");
  CHECK(message({.x = x, .weight = weight.columns(0, 1)}, y) == "causal_conv1d: weight: got 1 taps, expected 2 to 4");
  CHECK(message({.x = x, .weight = weight, .bias = bias}, y) == "causal_conv1d: bias: got (3), expected (4)");
  CHECK(message({.x = x, .weight = weight, .initial_state = x}, y) ==
        "causal_conv1d: initial_state: got (2, 3, 4), expected (2, 2, 4)");
  CHECK(message({.x = x, .weight = weight}, y, y_row) ==
        "causal_conv1d: final_state: got (1, 3, 4), expected (2, 2, 4)");
  auto const two = offsets({0, 1, 3});
  CHECK(message({.x = x, .weight = weight, .cu_seqlens = two}, y) ==
        "causal_conv1d: cu_seqlens: got a batch of 2 rows, expected one row of packed sequences");
  CHECK(message({.x = row, .weight = weight, .initial_state = row, .cu_seqlens = two}, y_row) ==
        "causal_conv1d: initial_state: got (1, 3, 4), expected (2, 2, 4)");
  auto const none = offsets({0});
  CHECK(message({.x = row, .weight = weight, .cu_seqlens = none}, y_row) ==
        "causal_conv1d: cu_seqlens: got no sequences, expected some for 3 steps");
  if constexpr (std::is_same_v<test_space, space::host>) {
    auto const falling = offsets({0, 2, 1, 3}), late = offsets({1, 3}), early = offsets({0, 2});
    CHECK(message({.x = row, .weight = weight, .cu_seqlens = falling}, y_row) ==
          "causal_conv1d: cu_seqlens: got 1 at index 2, expected offsets that rise from 0 to 3");
    CHECK(message({.x = row, .weight = weight, .cu_seqlens = late}, y_row) ==
          "causal_conv1d: cu_seqlens: got 1 at index 0, expected offsets that rise from 0 to 3");
    CHECK(message({.x = row, .weight = weight, .cu_seqlens = early}, y_row) ==
          "causal_conv1d: cu_seqlens: got 2 at index 1, expected offsets that rise from 0 to 3");
  }

  auto const backward = [&](causal_conv1d::gradient_inputs<test_policy, float> const& in,
                            causal_conv1d::gradients<test_policy, float> const& d) {
    return test::message_of<shape_error>(
        [&] { causal_conv1d::backward<test_policy, float>(make_policy(), in, d); });
  };
  CHECK(backward({.x = row, .weight = weight, .d_y = x}, {.d_x = y, .d_weight = weight}) ==
        "causal_conv1d.backward: x: got (1, 3, 4), expected (2, 3, 4)");
  CHECK(backward({.x = x, .weight = weight, .d_y = x, .d_final_state = x}, {.d_x = y, .d_weight = weight}) ==
        "causal_conv1d.backward: d_final_state: got (2, 3, 4), expected (2, 2, 4)");
  CHECK(backward({.x = x, .weight = weight, .d_y = x}, {.d_x = y_row, .d_weight = weight}) ==
        "causal_conv1d.backward: d_x: got (1, 3, 4), expected (2, 3, 4)");
  CHECK(backward({.x = x, .weight = weight, .d_y = x}, {.d_x = y, .d_weight = wrong}) ==
        "causal_conv1d.backward: d_weight: got (3, 4), expected (4, 3)");
  CHECK(backward({.x = x, .weight = weight, .d_y = x}, {.d_x = y, .d_weight = weight, .d_bias = bias}) ==
        "causal_conv1d.backward: d_bias: got (3), expected (4)");
  CHECK(backward({.x = x, .weight = weight, .d_y = x}, {.d_x = y, .d_weight = weight, .d_initial_state = y}) ==
        "causal_conv1d.backward: d_initial_state: got (2, 3, 4), expected (2, 2, 4)");

  auto token = test::poisoned<float>(2, 4);
  CHECK(test::message_of<shape_error>([&] {
          causal_conv1d::step(make_policy(), {.x = token, .weight = weight}, y, token);
        }) == "causal_conv1d.step: state: got (2, 3, 4), expected (2, 2, 4)");
  CHECK(test::message_of<shape_error>([&] {
          causal_conv1d::step(make_policy(), {.x = wrong, .weight = weight}, y, token);
        }) == "causal_conv1d.step: x: got (3, 4), expected (2, 4)");
}
