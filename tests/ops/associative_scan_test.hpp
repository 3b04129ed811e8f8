#include "support/support.hpp"

#include <blackmamba/core/memory.hpp>
#include <blackmamba/core/recording.hpp>
#include <blackmamba/core/workspace.hpp>
#include <blackmamba/ops/associative_scan/associative_scan.hpp>

#include <algorithm>
#include <array>
#include <stdexcept>

using namespace blackmamba;
using test::test_space;

namespace {

// Operators as a user writes them. The first four are exact, so that grouping can't hide behind rounding.

struct whole_sum {
  BLACKMAMBA_HD std::int64_t operator()(std::int64_t a, std::int64_t b) const { return a + b; }
  BLACKMAMBA_HD static std::int64_t identity() { return 0; }
};

/// Products of 2 x 2 matrices over the integers modulo a prime: not commutative.
struct matrix {
  std::uint32_t m[4];
  friend bool operator==(matrix const& a, matrix const& b) { return std::equal(a.m, a.m + 4, b.m); }
};
struct matrix_product {
  BLACKMAMBA_HD matrix operator()(matrix const& a, matrix const& b) const {
    matrix c;
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j)
        c.m[2 * i + j] = (a.m[2 * i] * b.m[j] + a.m[2 * i + 1] * b.m[2 + j]) % 32749u;
    return c;
  }
  BLACKMAMBA_HD matrix identity() const { return {{1, 0, 0, 1}}; }
};

/// A text of which the length and the first and last few letters are kept: concatenation, not commutative.
struct excerpt {
  std::int64_t length;
  char head[4], tail[4];
  friend bool operator==(excerpt const& a, excerpt const& b) {
    return a.length == b.length && std::equal(a.head, a.head + 4, b.head) && std::equal(a.tail, a.tail + 4, b.tail);
  }
};
struct concatenation {
  BLACKMAMBA_HD excerpt operator()(excerpt const& a, excerpt const& b) const {
    excerpt c{a.length + b.length, {}, {}};
    for (int i = 0; i < 4; ++i) {
      c.head[i] = i < a.length ? a.head[i] : i - a.length < 4 ? b.head[i - a.length] : char(0);
      c.tail[3 - i] = i < b.length ? b.tail[3 - i] : i - b.length < 4 ? a.tail[3 - (i - b.length)] : char(0);
    }
    return c;
  }
  BLACKMAMBA_HD static excerpt identity() { return {0, {}, {}}; }
};

/// The largest value and where it stands, of values that come as floats and leave as places.
struct place_of_largest {
  float value;
  std::int32_t count, place;
  place_of_largest() = default;
  BLACKMAMBA_HD explicit place_of_largest(float v) : value(v), count(1), place(0) {}
  BLACKMAMBA_HD place_of_largest(float v, std::int32_t n, std::int32_t p) : value(v), count(n), place(p) {}
  BLACKMAMBA_HD explicit operator std::int32_t() const { return place; }
};
struct larger {
  BLACKMAMBA_HD place_of_largest operator()(place_of_largest a, place_of_largest b) const {
    return {a.value >= b.value ? a.value : b.value, a.count + b.count,
            a.value >= b.value ? a.place : a.count + b.place};
  }
  BLACKMAMBA_HD static place_of_largest identity() { return {-INFINITY, 0, 0}; }
};

/// A sum of floats whose author promised nothing about lanes.
struct plain_sum {
  BLACKMAMBA_HD float operator()(float a, float b) const { return a + b; }
  BLACKMAMBA_HD static float identity() { return 0; }
};

template <class T>
auto to_policy(std::vector<T> const& v, auto... extents) {
  tensor<test_space, T, (static_cast<void>(extents), dyn)...> t(extents...);
  REQUIRE(t.size() == static_cast<std::int64_t>(v.size()));
  memory::upload(make_policy(), host_view<T const, dyn>(v.data(), v.size()), t.as_view());
  return t;
}
template <class View>
auto from_policy(View const& view) {
  std::vector<typename View::value_type> v(static_cast<std::size_t>(view.size()));
  if (view.size() > 0)
    memory::download(make_policy(), view.template reshape<std::int64_t>(view.size()),
                     host_view<typename View::value_type, dyn>(v.data(), view.size()));
  return v;
}

template <class E>
struct mode {
  bool exclusive = false, reverse = false;
  std::vector<E> initial = {};
  std::vector<std::int64_t> cu = {};
  std::int64_t states(std::int64_t batch) const {
    return cu.empty() ? batch : static_cast<std::int64_t>(cu.size()) - 1;
  }
};
template <class Y, class E>
struct scanned {
  std::vector<Y> y;
  std::vector<E> total;
};

/// The definition: one fold for each sequence and channel of (B, L, D).
template <class Operator, class X, class E = scan_element<Operator>>
scanned<E, E> reference(Operator const& op, std::vector<X> const& x, std::int64_t batch, std::int64_t length,
                        std::int64_t channels, mode<E> const& how) {
  scanned<E, E> r{std::vector<E>(x.size()), std::vector<E>(static_cast<std::size_t>(how.states(batch) * channels))};
  for (std::int64_t s = 0; s < how.states(batch); ++s) {
    auto const at = static_cast<std::size_t>(s);
    std::int64_t const first = how.cu.empty() ? s * length : how.cu[at];
    std::int64_t const count = how.cu.empty() ? length : how.cu[at + 1] - first;
    for (std::int64_t d = 0; d < channels; ++d) {
      auto const state = static_cast<std::size_t>(s * channels + d);
      E value = how.initial.empty() ? op.identity() : how.initial[state];
      for (std::int64_t j = 0; j < count; ++j) {
        auto const i = static_cast<std::size_t>((first + (how.reverse ? count - 1 - j : j)) * channels + d);
        E const next = op(value, static_cast<E>(x[i]));
        r.y[i] = how.exclusive ? value : next;
        value = next;
      }
      r.total[state] = value;
    }
  }
  return r;
}

template <class Y, class Operator, class X, class E = scan_element<Operator>>
scanned<Y, E> run_rows(Operator const& op, std::vector<X> const& x, std::int64_t rows, std::int64_t length,
                       mode<E> const& how, test_policy policy = make_policy()) {
  auto const dx = to_policy(x, rows, length);
  auto const cu = to_policy(how.cu, how.cu.size());
  auto const initial = to_policy(how.initial, how.initial.size());
  tensor<test_space, Y, dyn, dyn> y(rows, length);
  tensor<test_space, E, dyn> total(how.states(rows));
  typename associative_scan::options<home<test_policy>, E, 2> options{.exclusive = how.exclusive,
                                                                      .reverse = how.reverse, .total = total};
  if (!how.cu.empty()) options.cu_seqlens = cu;
  if (!how.initial.empty()) options.initial = initial;
  associative_scan::forward(policy, op, dx, y, options);
  return {from_policy(y), from_policy(total)};
}
template <class Y, class Operator, class X, class E = scan_element<Operator>>
scanned<Y, E> run_channels(Operator const& op, std::vector<X> const& x, std::int64_t batch, std::int64_t length,
                           std::int64_t channels, mode<E> const& how, test_policy policy = make_policy()) {
  auto const dx = to_policy(x, batch, length, channels);
  auto const cu = to_policy(how.cu, how.cu.size());
  auto const initial = to_policy(how.initial, how.initial.empty() ? 0 : how.states(batch), channels);
  tensor<test_space, Y, dyn, dyn, dyn> y(batch, length, channels);
  tensor<test_space, E, dyn, dyn> total(how.states(batch), channels);
  typename associative_scan::options<home<test_policy>, E, 3> options{.exclusive = how.exclusive,
                                                                      .reverse = how.reverse, .total = total};
  if (!how.cu.empty()) options.cu_seqlens = cu;
  if (!how.initial.empty()) options.initial = initial;
  associative_scan::forward(policy, op, dx, y, options);
  return {from_policy(y), from_policy(total)};
}

std::int64_t random_element(whole_sum, std::uint64_t i) { return test::random_integer(1, i, -1000, 1000); }
matrix random_element(matrix_product, std::uint64_t i) {
  auto const entry = [&](std::uint64_t k) { return static_cast<std::uint32_t>(test::random_integer(k, i, 0, 32748)); };
  return {{entry(1), entry(2), entry(3), entry(4)}};
}
excerpt random_element(concatenation, std::uint64_t i) {
  char const letter = static_cast<char>('a' + test::random_integer(1, i, 0, 25));
  if (test::random_integer(2, i, 0, 3) == 0) return concatenation::identity();
  return {1, {letter, 0, 0, 0}, {0, 0, 0, letter}};
}
float random_element(plain_sum, std::uint64_t i) { return static_cast<float>(test::random_integer(1, i, -8, 8)); }

template <class Operator>
auto random_elements(Operator op, std::int64_t n, std::uint64_t seed = 0) {
  std::vector<scan_element<Operator>> v(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = random_element(op, i + (seed << 32));
  return v;
}
/// Offsets of a few sequences in a row of this length; empty ones among them.
std::vector<std::int64_t> random_offsets(std::int64_t length, std::uint64_t seed) {
  std::vector<std::int64_t> cu{0, length};
  std::int64_t const cuts = test::random_integer(seed, 0, 0, 6);
  for (std::int64_t i = 1; i <= cuts; ++i)
    cu.push_back(test::random_integer(seed, static_cast<std::uint64_t>(i), 0, length));
  std::sort(cu.begin(), cu.end());
  return cu;
}

template <class A, class B>
void require_equal(A const& actual, B const& expected) {
  REQUIRE((actual.y == expected.y));
  REQUIRE((actual.total == expected.total));
}
template <class Operator>
void check_modes(Operator op, std::int64_t batch, std::int64_t length, std::int64_t channels) {
  using E = scan_element<Operator>;
  CAPTURE(batch);
  CAPTURE(length);
  CAPTURE(channels);
  auto const x = random_elements(op, batch * length * channels);
  for (int bits : test::sizes({0, 1, 2, 3, 4, 5, 6, 7})) {
    mode<E> how{.exclusive = (bits & 1) != 0, .reverse = (bits & 2) != 0};
    if (bits & 4) how.initial = random_elements(op, batch * channels, 7);
    auto const expected = reference(op, x, batch, length, channels, how);
    if (channels == 1) require_equal(run_rows<E>(op, x, batch, length, how), expected);
    require_equal(run_channels<E>(op, x, batch, length, channels, how), expected);
  }
}

}  // namespace

TEST_CASE_TEMPLATE("associative_scan: equals its definition at every length, for any operator", Operator, whole_sum,
                   matrix_product, concatenation, plain_sum) {
  for (std::int64_t rows : {0, 1, 3})
    for (std::int64_t length : test::sizes({0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 1024}))
      check_modes(Operator{}, rows, length, 1);
  for (std::int64_t length : test::sizes({2047, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 8193, 20000}))
    check_modes(Operator{}, 1, length, 1);
  for (std::int64_t channels : test::sizes({0, 2, 15, 16, 17, 255, 256, 300}))
    for (std::int64_t length : test::sizes({0, 1, 7, 40})) check_modes(Operator{}, 2, length, channels);
  check_modes(Operator{}, 1, 600, 129);
  check_modes(Operator{}, 2, 9000, 3);
}

TEST_CASE("associative_scan: thousands of random shapes equal the definition") {
  std::uint64_t const shapes = test::trials(std::is_same_v<test_space, space::host> ? 10000 : 2500);
  for (std::uint64_t i = 0; i < shapes; ++i) {
    auto const pick = [&](std::uint64_t what, std::int64_t low, std::int64_t high) {
      return test::random_integer(100 + what, i, low, high);
    };
    bool const packed = pick(0, 0, 1) == 1;
    std::int64_t const batch = packed ? 1 : pick(1, 0, 3), length = pick(2, 0, 70), channels = pick(3, 1, 20);
    std::int64_t const count = pick(4, 0, 1) == 0 ? 1 : channels;
    mode<float> how{.exclusive = pick(5, 0, 1) == 1, .reverse = pick(6, 0, 1) == 1};
    if (packed) how.cu = random_offsets(length, i);
    if (pick(7, 0, 1) == 1) how.initial = random_elements(plain_sum{}, how.states(batch) * count, 7);
    auto const x = random_elements(plain_sum{}, batch * length * count, i);
    auto const expected = reference(plain_sum{}, x, batch, length, count, how);  // small whole numbers: exact
    CAPTURE(i);
    if (count == 1) {
      require_equal(run_rows<float>(plain_sum{}, x, batch, length, how), expected);
      require_equal(run_rows<float>(scan_operator::sum<float>{}, x, batch, length, how), expected);
    } else {
      require_equal(run_channels<float>(plain_sum{}, x, batch, length, count, how), expected);
      require_equal(run_channels<float>(scan_operator::sum<float>{}, x, batch, length, count, how), expected);
    }
  }
}

TEST_CASE_TEMPLATE("associative_scan: lane-wise operators at every storage type", T, STORAGE_TYPES) {
  using A = accum_t<T>;
  for (auto [rows, length] : {std::array<std::int64_t, 2>{3, 33}, {1, 20000}}) {
    auto const x = test::rounded<T>(test::random_normal(rows * length, 1));
    auto const dx = test::upload<T>(x, rows, length);
    auto y = test::poisoned<T>(rows, length);
    mode<double> const how{};
    associative_scan::forward(make_policy(), scan_operator::sum<A>{}, dx, y);
    test::check_close(test::download(y), reference(scan_operator::sum<double>{}, x, rows, length, 1, how).y,
                      test::tolerance<T>(length), "sum");
    associative_scan::forward(make_policy(), scan_operator::maximum<A>{}, dx, y);
    test::check_equal(test::download(y), reference(scan_operator::maximum<double>{}, x, rows, length, 1, how).y, "max");
    associative_scan::forward(make_policy(), scan_operator::minimum<A>{}, dx, y);
    test::check_equal(test::download(y), reference(scan_operator::minimum<double>{}, x, rows, length, 1, how).y, "min");
    auto const near_one = test::rounded<T>(test::random_uniform(rows * length, 2, 0.98, 1.02));
    associative_scan::forward(make_policy(), scan_operator::product<A>{}, test::upload<T>(near_one, rows, length), y);
    test::check_close(test::download(y),
                      reference(scan_operator::product<double>{}, near_one, rows, length, 1, how).y,
                      test::tolerance<T>(length) + static_cast<double>(length) * test::unit_roundoff<A>(), "product");
  }
}

TEST_CASE("associative_scan: what is read and written converts to the element and from it") {
  std::vector<float> x;
  for (double v : test::random_normal(3000, 1)) x.push_back(static_cast<float>(v));
  auto const places = run_rows<std::int32_t>(larger{}, x, 1, 3000, {}).y;
  auto const channels = run_channels<std::int32_t>(larger{}, x, 1, 3000, 1, {}).y;
  for (std::size_t t = 0; t < x.size(); ++t) {
    auto const expected = static_cast<std::int32_t>(
        std::max_element(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(t) + 1) - x.begin());
    REQUIRE(places[t] == expected);
    REQUIRE(channels[t] == expected);
  }
}

TEST_CASE(
    "associative_scan: in reverse it is the reversed row's scan, reversed; exclusive is inclusive, moved by one") {
  for (std::int64_t length : test::sizes({5, 16, 100, 8192, 20001})) {
    auto const values = test::random_normal(length, 1);
    std::vector<float> x(values.begin(), values.end()), mirrored(values.rbegin(), values.rend());
    auto const check = [&](auto op) {
      auto const forward = run_rows<float>(op, x, 1, length, {.initial = {0.5f}});
      auto reverse = run_rows<float>(op, mirrored, 1, length, {.reverse = true, .initial = {0.5f}});
      std::reverse(reverse.y.begin(), reverse.y.end());
      require_equal(reverse, forward);
      // Where no sum is rounded, the two agree beyond blocks too.
      auto const whole = random_elements(plain_sum{}, length);
      auto const inclusive = run_rows<float>(op, whole, 1, length, {.initial = {0.5f}});
      auto const exclusive = run_rows<float>(op, whole, 1, length, {.exclusive = true, .initial = {0.5f}});
      CHECK(exclusive.y[0] == 0.5f);
      CHECK(std::equal(exclusive.y.begin() + 1, exclusive.y.end(), inclusive.y.begin()));
      CHECK(exclusive.total == inclusive.total);
    };
    check(scan_operator::sum<float>{});
    check(plain_sum{});
  }
  // With its arguments exchanged an operator combines in the order of the row.
  auto const text = random_elements(concatenation{}, 50);
  auto const suffixes =
      run_rows<excerpt>(scan_operator::exchanged{concatenation{}}, text, 1, 50, {.reverse = true}).y;
  excerpt all = concatenation::identity();
  for (std::size_t t = 50; t-- > 0;) {
    all = concatenation{}(text[t], all);
    CHECK(suffixes[t] == all);
  }
}

TEST_CASE_TEMPLATE("associative_scan: pieces with the total handed on are the whole", Operator, matrix_product,
                   concatenation) {
  using E = scan_element<Operator>;
  std::int64_t const length = 10000;
  auto const x = random_elements(Operator{}, length);
  auto const whole = run_rows<E>(Operator{}, x, 1, length, {});
  mode<E> how;
  std::vector<E> joined;
  for (std::int64_t first = 0, next; first < length; first = next) {
    next = std::min(length, 2 * first + 17);
    std::vector<E> const piece(x.begin() + first, x.begin() + next);
    auto const r = run_rows<E>(Operator{}, piece, 1, next - first, how);
    joined.insert(joined.end(), r.y.begin(), r.y.end());
    how.initial = r.total;
  }
  CHECK((joined == whole.y));
  CHECK((how.initial == whole.total));
}

TEST_CASE_TEMPLATE("associative_scan: packed sequences give the bits that they give alone", Operator, plain_sum,
                   scan_operator::sum<float>) {
  std::vector<std::int64_t> const cu{0, 3, 3, 9000, 9001, 9017, 26000, 26000};
  std::int64_t const length = cu.back(), channels = 3;
  auto const values = test::random_normal(length * channels, 1);
  for (bool reverse : {false, true}) {
    for (std::int64_t width : {std::int64_t{1}, channels}) {
      std::vector<float> const x(values.begin(), values.begin() + length * width);
      auto const scan = [&](std::vector<float> const& v, mode<float> const& how) {
        auto const n = static_cast<std::int64_t>(v.size()) / width;
        return width == 1 ? run_rows<float>(Operator{}, v, 1, n, how)
                          : run_channels<float>(Operator{}, v, 1, n, width, how);
      };
      auto const packed = scan(x, {.reverse = reverse, .cu = cu});
      for (std::size_t s = 0; s + 1 < cu.size(); ++s) {
        auto const alone = scan({x.begin() + cu[s] * width, x.begin() + cu[s + 1] * width}, {.reverse = reverse});
        CHECK(std::equal(alone.y.begin(), alone.y.end(), packed.y.begin() + cu[s] * width));
        CHECK(std::equal(alone.total.begin(), alone.total.end(),
                         packed.total.begin() + static_cast<std::ptrdiff_t>(s) * width));
      }
    }
  }
}

TEST_CASE_TEMPLATE("associative_scan: the same bits in every run, for any number of threads", P, test_policy) {
  constexpr bool threaded = requires(P policy) { policy.threads; };
  auto const values = test::random_normal(120000, 1);
  std::vector<float> const x(values.begin(), values.end());
  std::vector<std::int64_t> const uneven{0, 10, 90000, 90000, 120000};
  auto const check_again = [&](test_policy const& policy) {
    auto const check = [&](auto op, mode<float> const& how) {
      require_equal(run_rows<float>(op, x, 1, 120000, how, policy), run_rows<float>(op, x, 1, 120000, how));
      require_equal(run_channels<float>(op, x, 1, 24000, 5, {.reverse = how.reverse}, policy),
                    run_channels<float>(op, x, 1, 24000, 5, {.reverse = how.reverse}));
      require_equal(run_channels<float>(op, x, 3, 100, 400, {.reverse = how.reverse}, policy),
                    run_channels<float>(op, x, 3, 100, 400, {.reverse = how.reverse}));
    };
    check(plain_sum{}, {});
    check(plain_sum{}, {.reverse = true, .cu = uneven});
    check(scan_operator::sum<float>{}, {});
    check(scan_operator::sum<float>{}, {.reverse = true, .cu = uneven});
  };
  check_again(make_policy());
  if constexpr (threaded)
    for (int threads : {1, 2, 3, 7}) {
      P policy = make_policy();
      policy.threads = threads;
      check_again(policy);
    }
}

TEST_CASE_TEMPLATE("associative_scan: one long sequence, of elements small and large", Operator, whole_sum,
                   matrix_product, concatenation, plain_sum) {
  check_modes(Operator{}, 1, test::trials_percent() < 10 ? 70001 : 300001, 1);
  check_modes(Operator{}, 1, 40001, 2);
  check_modes(Operator{}, static_cast<std::int64_t>(test::trials(300)), 3001, 1);
}

TEST_CASE_TEMPLATE("associative_scan: recorded, over the scratch of the run before, equals its definition", Operator,
                   plain_sum, whole_sum, matrix_product) {
  // Elements that are handed on in one word, in two, and with a flag for each; rows and channels that are split.
  using E = scan_element<Operator>;
  Operator const op;
  std::int64_t const length = 60001, channels = 3;
  tensor<test_space, E, dyn, dyn> x(1, length), y(1, length);
  tensor<test_space, E, dyn, dyn, dyn> cube(1, length / channels, channels), y_cube(1, length / channels, channels);
  arena<test_space> workspace(associative_scan::scratch_bytes<E, test_space>(1, length) +
                              associative_scan::scratch_bytes<E, test_space>(1, length / channels, channels, 0));
  test_policy policy = make_policy();
  policy.workspace = &workspace;
  recording<test_policy> step;
  for (std::uint64_t run = 0; run < 4; ++run) {
    auto const values = random_elements(op, length, run), some = random_elements(op, cube.size(), run);
    memory::upload(policy, host_view<E const, dyn, dyn>(values.data(), 1, length), x.as_view());
    memory::upload(policy, host_view<E const, dyn, dyn, dyn>(some.data(), 1, cube.extent(1), channels), cube.as_view());
    step.run(policy, [&](test_policy const& p) {
      associative_scan::forward(p, op, x, y);
      associative_scan::forward(p, op, cube, y_cube);
    });
    REQUIRE((from_policy(y) == reference(op, values, 1, length, 1, {}).y));
    REQUIRE((from_policy(y_cube) == reference(op, some, 1, cube.extent(1), channels, {}).y));
  }
}

TEST_CASE("associative_scan: takes slices and works in place") {
  std::int64_t const rows = 5, length = 37;
  auto const values = test::random_normal(rows * 2 * length, 1);
  auto wide = test::upload<float>(values, rows, 2 * length);
  associative_scan::forward(make_policy(), scan_operator::sum<float>{}, wide.columns(length, length),
                            wide.columns(length, length));
  auto cube = test::upload<float>(values, rows, 2, length);  // (B, L, D), channels [3, 20)
  associative_scan::forward(make_policy(), plain_sum{}, cube.columns(3, 17), cube.columns(3, 17));
  auto const after = test::download(wide), after_cube = test::download(cube);
  for (std::int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (std::int64_t i = 0; i < 2 * length; ++i) {
      auto const at = static_cast<std::size_t>(r * 2 * length + i);
      double const x = static_cast<double>(static_cast<float>(values[at]));
      sum += i >= length ? x : 0;
      CHECK(after[at] == doctest::Approx(i >= length ? sum : x).epsilon(1e-5));
      bool const second = i >= length, inside = i % length >= 3 && i % length < 20;
      double const before = second && inside ? values[at - static_cast<std::size_t>(length)] : 0;
      CHECK(after_cube[at] == doctest::Approx(x + before).epsilon(1e-5));
    }
  }
}

TEST_CASE("associative_scan: scratch is what scratch_bytes says") {
  auto const check = [](auto const& y, std::size_t bytes) {
    auto measure = arena<test_space>::measuring();
    associative_scan::forward(device::dry<test_policy>{.workspace = &measure}, plain_sum{}, y, y);
    CHECK(measure.peak() == bytes);
    arena<test_space> exact(bytes);
    test_policy policy = make_policy();
    policy.workspace = &exact;
    associative_scan::forward(policy, plain_sum{}, y, y);
    CHECK(exact.used() == 0);
  };
  check(zeros<float>(make_policy(), 3, 100), 0);  // one block each: nothing is handed on
  check(zeros<float>(make_policy(), 2, 50000), associative_scan::scratch_bytes<float, test_space>(2, 50000));
  check(zeros<float>(make_policy(), 2, 5000, 300), associative_scan::scratch_bytes<float, test_space>(2, 5000, 300, 0));
  CHECK(associative_scan::scratch_bytes<float, test_space>(2, 50000) > 0);
}

TEST_CASE_TEMPLATE("associative_scan: an operator's exception reaches the caller, on any number of threads", P,
                   test_policy) {
  if constexpr (requires(P policy) { policy.threads; }) {
    struct failing_sum {
      float operator()(float a, float b) const {
        if (b == 7) throw std::runtime_error("seven");
        return a + b;
      }
      static float identity() { return 0; }
    };
    std::vector<float> x(100000, 1.0f);
    for (std::size_t at : {0u, 30000u, 99999u}) {
      auto with_seven = x;
      with_seven[at] = 7;
      for (int threads : {1, 2, 4}) {
        P policy = make_policy();
        policy.threads = threads;
        CHECK(test::message_of<std::runtime_error>(
                  [&] { run_rows<float>(failing_sum{}, with_seven, 1, 100000, {}, policy); }) == "seven");
      }
    }
  }
}

TEST_CASE("associative_scan: shapes that disagree are named") {
  auto const x = zeros<float>(make_policy(), 2, 5);
  auto const y = zeros<float>(make_policy(), 2, 6);
  auto const states = zeros<float>(make_policy(), 3);
  using options = associative_scan::options<home<test_policy>, float, 2>;
  auto const message = [&](decltype(x) const& result, options const& how) {
    return test::message_of<shape_error>(
        [&] { associative_scan::forward(make_policy(), plain_sum{}, x, result, how); });
  };
  CHECK(message(y, {}) == "associative_scan: x: got (2, 5), expected (2, 6)");
  CHECK(message(x, {.initial = states}) == "associative_scan: initial: got (3), expected (2)");
  CHECK(message(x, {.total = states}) == "associative_scan: total: got (3), expected (2)");
  auto const cu = to_policy(std::vector<std::int64_t>{0, 2, 5}, 3);
  CHECK(message(x, {.cu_seqlens = cu}) ==
        "associative_scan: cu_seqlens: got a batch of 2 rows, expected one row of packed sequences");
  auto const none = to_policy(std::vector<std::int64_t>{0}, 1);
  auto const one_row = zeros<float>(make_policy(), 1, 5);
  CHECK(test::message_of<shape_error>([&] {
          associative_scan::forward(make_policy(), plain_sum{}, one_row, one_row, {.cu_seqlens = none});
        }) == "associative_scan: cu_seqlens: got no sequences, expected some for 5 steps");
  if constexpr (std::is_same_v<test_space, space::host>) {
    auto const row = zeros<float>(make_policy(), 1, 5);
    for (auto const& [offsets, text] : {std::pair<std::vector<std::int64_t>, char const*>{{1, 5}, "got 1 at index 0"},
                                        {{0, 4, 3, 5}, "got 3 at index 2"},
                                        {{0, 4}, "got 4 at index 1"}}) {
      auto const bad = to_policy(offsets, offsets.size());
      CHECK(test::message_of<value_error>([&] {
              associative_scan::forward(make_policy(), plain_sum{}, row, row, {.cu_seqlens = bad});
            }) == std::string("associative_scan: cu_seqlens: ") + text + ", expected offsets that rise from 0 to 5");
    }
  }
}
