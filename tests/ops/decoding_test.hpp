#include "support/support.hpp"

#include <blackmamba/ops/causal_conv1d/causal_conv1d.hpp>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

/// Decoding of many sequences: states in a pool, named by slots; several tokens in one call, with the state after each.
using namespace blackmamba;
using test::values;

namespace {

using slots_type = std::vector<std::int64_t>;

values as_values(slots_type const& slots) { return {slots.begin(), slots.end()}; }
std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

/// `count` rows of a pool for a batch, no two the same, every fifth sequence without one.
slots_type some_slots(std::int64_t batch, std::int64_t pool) {
  slots_type slots(index(batch));
  for (std::int64_t b = 0; b < batch; ++b) slots[index(b)] = b % 5 == 3 ? -1 : (b * 7 + 3) % pool;
  return slots;
}
/// A pool's rows without a common divisor with 7, so that those are different.
std::int64_t rows_for(std::int64_t n) { return n % 7 == 0 ? n + 1 : n; }

/// Rows of `width` elements; of rows below 0, zeros.
values gathered(values const& pool, slots_type const& slots, std::int64_t width) {
  values v(slots.size() * index(width));
  for (std::size_t b = 0; b < slots.size(); ++b)
    for (std::int64_t i = 0; slots[b] >= 0 && i < width; ++i)
      v[b * index(width) + index(i)] = pool[index(slots[b] * width + i)];
  return v;
}
void scatter(values& pool, slots_type const& slots, std::int64_t width, values const& rows) {
  for (std::size_t b = 0; b < slots.size(); ++b)
    for (std::int64_t i = 0; slots[b] >= 0 && i < width; ++i)
      pool[index(slots[b] * width + i)] = rows[b * index(width) + index(i)];
}

/// Tokens (B, L, ...) of the scan, and its parameters. `apart`: B and C at odd addresses.
template <class T, int N>
struct scan_tokens {
  using A = accum_t<T>;
  std::int64_t batch, length, channels;
  bool all;
  values u, delta, B, C, z;
  tensor<test::test_space, A, dyn, dyn> rates;
  tensor<test::test_space, A, dyn> skip, bias;

  scan_tokens(std::int64_t batch_, std::int64_t length_, std::int64_t channels_, bool all_)
      : batch(batch_),
        length(length_),
        channels(channels_),
        all(all_),
        u(test::rounded<T>(test::random_normal(batch * length * channels, 1))),
        delta(test::rounded<T>(all ? test::random_normal(batch * length * channels, 2)
                                   : test::random_uniform(batch * length * channels, 2, 0.01, 1.0))),
        B(test::rounded<T>(test::random_normal(batch * length * N, 3))),
        C(test::rounded<T>(test::random_normal(batch * length * N, 4))),
        z(test::rounded<T>(test::random_normal(batch * length * channels, 5))),
        rates(test::upload<A>(
            all ? test::random_uniform(channels * N, 6, -3.0, 2.0) : test::random_uniform(channels * N, 6, -4.0, -0.05),
            channels, N)),
        skip(test::upload<A>(test::random_normal(channels, 7), channels)),
        bias(test::upload<A>(test::random_normal(channels, 8), channels)) {}

  /// Runs f with the tokens [t, t + count) in memory of their own.
  template <class F>
  void with_tokens(std::int64_t t, std::int64_t count, F&& f) const {
    auto const part = [&](values const& v, std::int64_t width) {
      values x;
      for (std::int64_t b = 0; b < batch; ++b) {
        auto const begin = v.begin() + (b * length + t) * width;
        x.insert(x.end(), begin, begin + count * width);
      }
      return test::upload<T>(x, batch, count, width);
    };
    auto const u_t = part(u, channels), delta_t = part(delta, channels), B_t = part(B, N), C_t = part(C, N),
               z_t = part(z, channels);
    selective_scan::token_inputs<test_policy, T, N> in{
        .u = u_t, .delta = delta_t, .A = rates, .B = B_t, .C = C_t, .delta_softplus = all, .A_is_log = all};
    if (all) in.D = skip, in.z = z_t, in.delta_bias = bias;
    f(in);
  }
};
/// The only token of each sequence.
template <class T, int N>
selective_scan::step_inputs<test_policy, T, N> one_token(selective_scan::token_inputs<test_policy, T, N> const& in) {
  selective_scan::step_inputs<test_policy, T, N> one{.u = in.u.rows(),
                                                     .delta = in.delta.rows(),
                                                     .A = in.A,
                                                     .B = in.B.rows(),
                                                     .C = in.C.rows(),
                                                     .D = in.D,
                                                     .delta_bias = in.delta_bias,
                                                     .delta_softplus = in.delta_softplus,
                                                     .A_is_log = in.A_is_log};
  if (in.z.present()) one.z = in.z.rows();
  return one;
}

constexpr double unwritten = 17;  // in y, where a sequence has no state

template <class T, class State, int N>
void check_scan_slots(std::int64_t batch, std::int64_t channels, bool all) {
  scan_tokens<T, N> const tokens(batch, 1, channels, all);
  std::int64_t const rows = rows_for(batch + 3), width = channels * N;
  auto const slots = some_slots(batch, rows);
  auto const before = test::rounded<State>(test::random_normal(rows * width, 9));
  tokens.with_tokens(0, 1, [&](auto const& in) {
    auto one = one_token(in);
    auto alone = test::upload<State>(gathered(before, slots, width), batch, channels, N);
    auto y_alone = test::poisoned<T>(batch, channels);
    selective_scan::step<N, State>(make_policy(), one, alone, y_alone.as_view());

    auto const device_slots = test::upload<std::int32_t>(as_values(slots), batch);
    one.slots = device_slots;
    auto pool = test::upload<State>(before, rows, channels, N);
    auto y = test::upload<T>(values(index(batch * channels), unwritten), batch, channels);
    selective_scan::step<N, State>(make_policy(), one, pool, y.as_view());

    auto expected = before;
    scatter(expected, slots, width, test::download(alone));
    test::check_equal(test::download(pool), expected, "pool");
    auto expected_y = test::download(y_alone);
    for (std::int64_t b = 0; b < batch; ++b)
      for (std::int64_t d = 0; slots[index(b)] < 0 && d < channels; ++d)
        expected_y[index(b * channels + d)] = unwritten;
    test::check_equal(test::download(y), expected_y, "y");
  });
}

/// A row of a pool for each sequence but every fifth, and one for the state after each of its tokens. Of the last
/// sequence, the state after the second token isn't kept, and its last one stays where the first was.
struct pool_rows {
  slots_type slots, kept;
};
pool_rows rows_of_tokens(std::int64_t batch, std::int64_t length) {
  pool_rows rows{slots_type(index(batch)), slots_type(index(batch * length))};
  for (std::int64_t b = 0; b < batch; ++b) {
    rows.slots[index(b)] = b % 5 == 3 ? -1 : b * (length + 1) + 1;
    for (std::int64_t t = 0; t < length; ++t) rows.kept[index(b * length + t)] = b * (length + 1) + 2 + t;
    if (b + 1 == batch && length > 1) rows.kept[index(b * length + 1)] = -1;
    if (b + 1 == batch) rows.kept[index(b * length + length - 1)] = rows.slots[index(b)];
  }
  REQUIRE(rows.slots.back() >= 0);
  return rows;
}

/// Steps of several tokens against as many single ones, with the state moved on in place, and with every state kept.
template <class T, class State, int N>
void check_scan_steps(std::int64_t batch, std::int64_t length, std::int64_t channels, bool all) {
  scan_tokens<T, N> const tokens(batch, length, channels, all);
  std::int64_t const rows = batch * (length + 1) + 2, width = channels * N;
  pool_rows const used = rows_of_tokens(batch, length);
  slots_type const &slots = used.slots, &kept = used.kept;
  auto const before = test::rounded<State>(test::random_normal(rows * width, 9));
  auto const device_slots = test::upload<std::int32_t>(as_values(slots), batch);
  auto const device_kept = test::upload<std::int32_t>(as_values(kept), batch, length);

  auto single = test::upload<State>(before, rows, channels, N);
  auto expected_kept = before;
  values expected_y(index(batch * length * channels), unwritten);
  for (std::int64_t t = 0; t < length; ++t)
    tokens.with_tokens(t, 1, [&](auto const& in) {
      auto one = one_token(in);
      one.slots = device_slots;
      auto y = test::upload<T>(values(index(batch * channels), unwritten), batch, channels);
      selective_scan::step<N, State>(make_policy(), one, single, y.as_view());
      auto const y_t = test::download(y);
      for (std::int64_t b = 0; b < batch; ++b)
        std::copy_n(y_t.begin() + b * channels, channels, expected_y.begin() + (b * length + t) * channels);
      slots_type to(index(batch));
      for (std::int64_t b = 0; b < batch; ++b) to[index(b)] = slots[index(b)] < 0 ? -1 : kept[index(b * length + t)];
      scatter(expected_kept, to, width, gathered(test::download(single), slots, width));
    });

  tokens.with_tokens(0, length, [&](auto in) {
    in.slots = device_slots;
    auto pool = test::upload<State>(before, rows, channels, N);
    auto y = test::upload<T>(values(index(batch * length * channels), unwritten), batch, length, channels);
    selective_scan::steps<N, State>(make_policy(), in, pool, y.as_view());
    test::check_equal(test::download(pool), test::download(single), "state");
    test::check_equal(test::download(y), expected_y, "y");

    in.kept_slots = device_kept;
    auto keeping = test::upload<State>(before, rows, channels, N);
    auto again = test::upload<T>(values(index(batch * length * channels), unwritten), batch, length, channels);
    selective_scan::steps<N, State>(make_policy(), in, keeping, again.as_view());
    test::check_equal(test::download(keeping), expected_kept, "kept states");
    test::check_equal(test::download(again), expected_y, "y with kept states");
  });
}
template <class T, class State>
void check_scan() {
  for (bool all : {true, false}) {
    for (std::int64_t batch : {1, 4, 41}) check_scan_slots<T, State, 16>(batch, 40, all);
    check_scan_slots<T, State, 3>(5, 37, all);
    for (std::int64_t length : {1, 2, 8}) {
      check_scan_steps<T, State, 16>(5, length, 40, all);
      check_scan_steps<T, State, 3>(2, length, 37, all);
    }
    check_scan_steps<T, State, 16>(33, 3, 9, all);
  }
}

}  // namespace

TEST_CASE_TEMPLATE("selective_scan: states in slots and several tokens give the bits of plain steps", T,
                   STORAGE_TYPES) {
  check_scan<T, accum_t<T>>();
}
TEST_CASE("selective_scan: the same with states of 16 bits") {
  check_scan<bfloat16, bfloat16>();
  check_scan<half, half>();
}
TEST_CASE("selective_scan: slots and several tokens with any number of states") {
  check_scan_slots<float, float, 1>(3, 17, true);
  check_scan_steps<float, float, 1>(3, 4, 17, true);
  check_scan_slots<float, float, 17>(3, 17, true);
  check_scan_steps<float, float, 17>(3, 4, 17, true);
  check_scan_slots<bfloat16, bfloat16, 128>(3, 6, true);
  check_scan_steps<bfloat16, float, 128>(3, 4, 6, true);
  check_scan_slots<float, float, 256>(2, 3, true);
  check_scan_steps<float, float, 256>(2, 3, 3, true);
}
TEST_CASE("selective_scan: slots of a batch of 1024") {
  check_scan_slots<bfloat16, float, 16>(1024, 8, true);
  check_scan_slots<bfloat16, bfloat16, 16>(1024, 8, true);
}

TEST_CASE("selective_scan: a state of 16 bits is the state rounded after the token") {
  std::int64_t const batch = 3, channels = 40;
  scan_tokens<bfloat16, 16> const tokens(batch, 1, channels, true);
  auto const before = test::rounded<bfloat16>(test::random_normal(batch * channels * 16, 9));
  tokens.with_tokens(0, 1, [&](auto const& in) {
    auto wide = test::upload<float>(before, batch, channels, 16);
    auto narrow = test::upload<bfloat16>(before, batch, channels, 16);
    auto y_wide = test::poisoned<bfloat16>(batch, channels), y_narrow = test::poisoned<bfloat16>(batch, channels);
    selective_scan::step<16>(make_policy(), one_token(in), wide, y_wide.as_view());
    selective_scan::step<16, bfloat16>(make_policy(), one_token(in), narrow, y_narrow.as_view());
    test::check_equal(test::download(y_narrow), test::download(y_wide), "y");
    test::check_equal(test::download(narrow), test::rounded<bfloat16>(test::download(wide)), "state");
  });
}

TEST_CASE_TEMPLATE("selective_scan: y of several tokens may take the place of u, delta or z", T, STORAGE_TYPES) {
  std::int64_t const batch = 3, length = 5, channels = 40;
  scan_tokens<T, 16> const tokens(batch, length, channels, true);
  auto const before = test::rounded<accum_t<T>>(test::random_normal(batch * channels * 16, 9));
  values expected;
  for (int where = 0; where < 4; ++where)
    tokens.with_tokens(0, length, [&](auto const& in) {
      auto state = test::upload<accum_t<T>>(before, batch, channels, 16);
      auto const own = test::poisoned<T>(batch, length, channels);
      auto const writable = [&](auto const& x) {
        return view<test::test_space, T, dyn, dyn, dyn>(const_cast<T*>(x.data()), batch, length, channels);
      };
      auto const y = where == 0 ? own.as_view() : writable(where == 1 ? in.u : where == 2 ? in.delta : in.z);
      selective_scan::steps<16>(make_policy(), in, state, y);
      if (where == 0) expected = test::download(y);
      test::check_equal(test::download(y), expected, "y in place " + std::to_string(where));
    });
}

namespace {

template <class T>
void check_convolution(std::int64_t batch, std::int64_t length, std::int64_t channels, std::int64_t taps, bool all) {
  std::int64_t const rows = batch * (length + 1) + 2, width = (taps - 1) * channels;
  pool_rows const used = rows_of_tokens(batch, length);
  slots_type const &slots = used.slots, &kept = used.kept;
  auto const before = test::rounded<T>(test::random_normal(rows * width, 9));
  auto const x = test::rounded<T>(test::random_normal(batch * length * channels, 1));
  auto const weight = test::upload<accum_t<T>>(test::random_normal(channels * taps, 2), channels, taps);
  auto const bias = test::upload<accum_t<T>>(test::random_normal(channels, 3), channels);
  auto const device_x = test::upload<T>(x, batch, length, channels);
  auto const device_slots = test::upload<std::int32_t>(as_values(slots), batch);
  auto const device_kept = test::upload<std::int32_t>(as_values(kept), batch, length);

  // Steps on states side by side, and on those of the pool.
  auto alone = test::upload<T>(gathered(before, slots, width), batch, taps - 1, channels);
  auto single = test::upload<T>(before, rows, taps - 1, channels);
  auto expected_kept = before;
  values expected_y(index(batch * length * channels), unwritten);
  for (std::int64_t t = 0; t < length; ++t) {
    view<test::test_space, T const, dyn, dyn> x_t(device_x.data() + t * channels, batch, channels);
    x_t.set_stride(0, length * channels);
    causal_conv1d::step_inputs<test_policy, T> in{.x = x_t, .weight = weight, .silu = all};
    if (all) in.bias = bias;
    auto y_alone = test::poisoned<T>(batch, channels);
    causal_conv1d::step(make_policy(), in, alone, y_alone.as_view());
    in.slots = device_slots;
    auto y = test::upload<T>(values(index(batch * channels), unwritten), batch, channels);
    causal_conv1d::step(make_policy(), in, single, y.as_view());
    auto const y_t = test::download(y), plain = test::download(y_alone);
    slots_type to(index(batch));
    for (std::int64_t b = 0; b < batch; ++b) {
      bool const there = slots[index(b)] >= 0;
      for (std::int64_t d = 0; d < channels; ++d)
        expected_y[index((b * length + t) * channels + d)] = there ? plain[index(b * channels + d)] : unwritten;
      test::check_equal(values(y_t.begin() + b * channels, y_t.begin() + (b + 1) * channels),
                        values(expected_y.begin() + (b * length + t) * channels,
                               expected_y.begin() + (b * length + t + 1) * channels),
                        "y of a step");
      to[index(b)] = there ? kept[index(b * length + t)] : -1;
    }
    auto moved = before;
    scatter(moved, slots, width, test::download(alone));
    test::check_equal(test::download(single), moved, "state of a step");
    scatter(expected_kept, to, width, gathered(moved, slots, width));
  }

  causal_conv1d::token_inputs<test_policy, T> in{.x = device_x, .weight = weight, .silu = all, .slots = device_slots};
  if (all) in.bias = bias;
  auto pool = test::upload<T>(before, rows, taps - 1, channels);
  auto y = test::upload<T>(values(index(batch * length * channels), unwritten), batch, length, channels);
  causal_conv1d::steps(make_policy(), in, pool, y.as_view());
  test::check_equal(test::download(pool), test::download(single), "state");
  test::check_equal(test::download(y), expected_y, "y");

  in.kept_slots = device_kept;
  auto keeping = test::upload<T>(before, rows, taps - 1, channels);
  auto in_place = test::upload<T>(x, batch, length, channels);  // y takes the place of x
  in.x = in_place;
  causal_conv1d::steps(make_policy(), in, keeping, in_place.as_view());
  test::check_equal(test::download(keeping), expected_kept, "kept states");
  auto expected_in_place = expected_y;
  for (std::int64_t b = 0; b < batch; ++b)
    if (slots[index(b)] < 0)
      std::copy_n(x.begin() + b * length * channels, length * channels,
                  expected_in_place.begin() + b * length * channels);
  test::check_equal(test::download(in_place), expected_in_place, "y in place");
}

}  // namespace

TEST_CASE_TEMPLATE("causal_conv1d: states in slots and several tokens give the bits of plain steps", T, STORAGE_TYPES) {
  for (std::int64_t taps : {2, 3, 4})
    for (std::int64_t channels : {17, 200})
      for (std::int64_t length : {1, 2, 8}) check_convolution<T>(5, length, channels, taps, taps != 3);
  check_convolution<T>(70, 3, 64, 4, true);
}

TEST_CASE("selective_scan, causal_conv1d: a batch without a state, or without sequences, is left alone") {
  auto const slots = test::upload<std::int32_t>({-1, -1}, 2);
  auto const x = test::upload<float>(values(8), 2, 4), taps = test::upload<float>(values(16), 4, 4),
             projection = test::upload<float>(values(4), 2, 2), rates = test::upload<float>(values(8), 4, 2);
  auto y = test::upload<float>(values(8, unwritten), 2, 4);
  tensor<test::test_space, float, dyn, dyn, dyn> const no_window(0, 3, 4), no_state(0, 4, 2);
  causal_conv1d::step(make_policy(), {.x = x, .weight = taps, .slots = slots}, no_window.as_view(), y.as_view());
  selective_scan::step<2>(make_policy(),
                          {.u = x, .delta = x, .A = rates, .B = projection, .C = projection, .slots = slots},
                          no_state.as_view(), y.as_view());
  test::check_equal(test::download(y), values(8, unwritten), "y");

  tensor<test::test_space, float, dyn, dyn, dyn> const none(0, 5, 4), none_of_two(2, 0, 4);
  tensor<test::test_space, float, dyn, dyn, dyn> const window(3, 3, 4);
  causal_conv1d::steps(make_policy(), {.x = none_of_two, .weight = taps, .slots = slots}, window.as_view(),
                       none_of_two.as_view());
}

TEST_CASE("selective_scan, causal_conv1d: slots that can't be are named") {
  auto const x = test::upload<float>(values(12), 3, 4), taps = test::upload<float>(values(16), 4, 4);
  auto const B = test::upload<float>(values(6), 3, 2), A = test::upload<float>(values(8), 4, 2);
  auto const tokens = test::upload<float>(values(24), 3, 2, 4), tokens_B = test::upload<float>(values(12), 3, 2, 2);
  auto y = test::poisoned<float>(3, 4);
  auto y_tokens = test::poisoned<float>(3, 2, 4);
  auto state = test::poisoned<float>(5, 4, 2), window = test::poisoned<float>(5, 3, 4);
  auto const scan = [&](values const& slots) {
    auto const of = test::upload<std::int32_t>(slots, static_cast<std::int64_t>(slots.size()));
    return test::message_of<error>([&] {
      selective_scan::step<2>(make_policy(), {.u = x, .delta = x, .A = A, .B = B, .C = B, .slots = of}, state,
                              y.as_view());
    });
  };
  auto const convolution = [&](values const& slots) {
    auto const of = test::upload<std::int32_t>(slots, static_cast<std::int64_t>(slots.size()));
    return test::message_of<error>(
        [&] { causal_conv1d::step(make_policy(), {.x = x, .weight = taps, .slots = of}, window, y.as_view()); });
  };
  CHECK(scan({0, 1}) == "selective_scan.step: slots: got (2), expected (3)");
  CHECK(convolution({0, 1}) == "causal_conv1d.step: slots: got (2), expected (3)");

  auto const three = test::upload<std::int32_t>({4, -1, 0}, 3);
  auto const run_steps = [&](in<test_policy, std::int32_t, dyn> slots, values const& kept) {
    auto const of = test::upload<std::int32_t>(kept, 3, static_cast<std::int64_t>(kept.size()) / 3);
    selective_scan::steps<2>(
        make_policy(),
        {.u = tokens, .delta = tokens, .A = A, .B = tokens_B, .C = tokens_B, .slots = slots, .kept_slots = of}, state,
        y_tokens.as_view());
  };
  auto const steps_of = [&](in<test_policy, std::int32_t, dyn> slots, values const& kept) {
    return test::message_of<error>([&] { run_steps(slots, kept); });
  };
  auto const steps = [&](values const& kept, bool with_slots) {
    in<test_policy, std::int32_t, dyn> slots;
    if (with_slots) slots = three;
    return steps_of(slots, kept);
  };
  CHECK(steps({1, 2, 3}, true) == "selective_scan.steps: kept_slots: got (3, 1), expected (3, 2)");
  CHECK(steps(values(6), false) ==
        "selective_scan.steps: kept_slots: got rows to keep states in, expected none, for slots is absent");
  auto const many = test::poisoned<float>(3, 9, 4), many_B = test::poisoned<float>(3, 9, 2);
  CHECK(test::message_of<error>([&] {
          selective_scan::steps<2>(make_policy(), {.u = many, .delta = many, .A = A, .B = many_B, .C = many_B}, state,
                                   many.as_view());
        }) == "selective_scan.steps: y: got 9 tokens, expected at most 8; forward takes more");

  if constexpr (std::is_same_v<test::test_space, space::host>) {  // elsewhere slots are not read on the way
    CHECK(scan({0, 5, 1}) ==
          "selective_scan.step: slots: got 5 for sequence 1, expected rows of 5 states, or less than 0");
    CHECK(convolution({0, 5, 1}) ==
          "causal_conv1d.step: slots: got 5 for sequence 1, expected rows of 5 states, or less than 0");
    CHECK(scan({2, -1, 2}) == "selective_scan.step: slots: got 2 twice, expected each row of states once");
    CHECK(convolution({2, -1, 2}) == "causal_conv1d.step: slots: got 2 twice, expected each row of states once");
    CHECK(steps({1, 2, 0, 0, 4, 3}, true) ==
          "selective_scan.steps: kept_slots: got 4 twice, expected each row of states once");
    CHECK(steps({1, 2, 0, 0, 0, 7}, true) ==
          "selective_scan.steps: kept_slots: got 7 for sequence 2, expected rows of 5 states, or less than 0");
    // What is wrong with slots is said of slots, whatever is kept.
    auto const same = test::upload<std::int32_t>({2, -1, 2}, 3);
    CHECK(steps_of(same, {0, 1, 0, 0, 3, 4}) ==
          "selective_scan.steps: slots: got 2 twice, expected each row of states once");
    // A sequence keeps one state in its own row, and what one without a state would keep doesn't matter.
    run_steps(three, {1, 4, 9, 9, 0, 3});
    CHECK(steps({4, 4, 0, 0, 1, 3}, true) ==
          "selective_scan.steps: kept_slots: got 4 twice, expected each row of states once");
    CHECK(steps({1, 1, 0, 0, 2, 3}, true) ==
          "selective_scan.steps: kept_slots: got 1 twice, expected each row of states once");
    // Also where the pool has no rows.
    auto const first = test::upload<std::int32_t>({0, -1, -1}, 3);
    tensor<test::test_space, float, dyn, dyn, dyn> const no_state(0, 4, 2), no_window(0, 3, 4);
    CHECK(test::message_of<error>([&] {
            selective_scan::step<2>(make_policy(), {.u = x, .delta = x, .A = A, .B = B, .C = B, .slots = first},
                                    no_state.as_view(), y.as_view());
          }) == "selective_scan.step: slots: got 0 for sequence 0, expected rows of 0 states, or less than 0");
    CHECK(test::message_of<error>([&] {
            causal_conv1d::step(make_policy(), {.x = x, .weight = taps, .slots = first}, no_window.as_view(),
                                y.as_view());
          }) == "causal_conv1d.step: slots: got 0 for sequence 0, expected rows of 0 states, or less than 0");
    CHECK(test::message_of<error>([&] {
            causal_conv1d::steps(make_policy(), {.x = tokens, .weight = taps, .slots = first}, no_window.as_view(),
                                 y_tokens.as_view());
          }) == "causal_conv1d.steps: slots: got 0 for sequence 0, expected rows of 0 states, or less than 0");
  } else {
    // Beyond the pool there is no state: nothing is read or written.
    auto const untouched = test::upload<float>(values(12, unwritten), 3, 4);
    auto const beyond = test::upload<std::int32_t>({5, 6, 1 << 30}, 3);
    selective_scan::step<2>(make_policy(), {.u = x, .delta = x, .A = A, .B = B, .C = B, .slots = beyond}, state,
                            untouched.as_view());
    causal_conv1d::step(make_policy(), {.x = x, .weight = taps, .slots = beyond}, window, untouched.as_view());
    test::check_equal(test::download(untouched), values(12, unwritten), "y beyond the pool");
  }
}
