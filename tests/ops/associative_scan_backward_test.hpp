#include "support/sums.hpp"
#include "support/support.hpp"
#include "support/thread_counts.hpp"

#include <blackmamba/ops/associative_scan/associative_scan.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

using namespace blackmamba;
using test::test_space;

namespace {

/// Products of upper triangular matrices ((p, q), (0, r)), as a user writes them: neither commutative nor diagonal.
template <class S>
struct triangle {
  S p, q, r;
};
template <class S>
struct triangular {
  using E = triangle<S>;
  using scalar = S;
  BLACKMAMBA_HD E operator()(E a, E b) const { return {a.p * b.p, a.p * b.q + a.q * b.r, a.r * b.r}; }
  BLACKMAMBA_HD static E identity() { return {1, 0, 1}; }
  BLACKMAMBA_HD scan_gradient<E> backward(E a, E b, E d) const {
    return {{d.p * b.p + d.q * b.q, d.q * b.r, d.r * b.r}, {d.p * a.p, d.q * a.p, d.q * a.q + d.r * a.r}};
  }
};
/// The same with what is visited first on the right.
using mixing = scan_operator::exchanged<triangular<double>>;
/// Elements and their numbers.
template <class E>
std::vector<E> elements_of(test::values const& v) {
  std::vector<E> out(v.size() * sizeof(double) / sizeof(E));
  if (!v.empty()) std::memcpy(static_cast<void*>(out.data()), v.data(), v.size() * sizeof(double));
  return out;
}
template <class E>
constexpr std::int64_t numbers = static_cast<std::int64_t>(sizeof(E) / sizeof(double));

template <class E>
test::values flat(std::vector<E> const& v) {
  test::values out(v.size() * static_cast<std::size_t>(numbers<E>));
  if (!v.empty()) std::memcpy(out.data(), v.data(), out.size() * sizeof(double));
  return out;
}

template <class V>
auto to_policy(std::vector<V> const& v, auto... extents) {
  tensor<test_space, V, (static_cast<void>(extents), dyn)...> t(extents...);
  REQUIRE(t.size() == static_cast<std::int64_t>(v.size()));
  memory::upload(make_policy(), host_view<V const, dyn>(v.data(), v.size()), t.as_view());
  return t;
}
/// The numbers of a contiguous view's elements.
template <class View>
test::values numbers_of(View const& view) {
  using E = typename View::value_type;
  std::vector<E> v(static_cast<std::size_t>(view.size()));
  if (view.size() > 0)
    memory::download(make_policy(), view.template reshape<std::int64_t>(view.size()),
                     host_view<E, dyn>(v.data(), view.size()));
  if constexpr (storage<E>) {
    test::values out;
    for (E const& e : v) out.push_back(static_cast<double>(widen(e)));
    return out;
  } else {
    return flat(v);
  }
}

/// A scan of (B, L, D) and what is given of its results. Values are numbers of elements, row-major; states may be
/// absent.
struct problem {
  std::int64_t batch = 1, length = 1, channels = 1;
  bool exclusive = false, reverse = false;
  std::vector<std::int64_t> cu = {};
  test::values x = {}, initial = {}, d_y = {}, d_total = {};

  std::int64_t sequences() const { return cu.empty() ? batch : static_cast<std::int64_t>(cu.size()) - 1; }
  std::int64_t first(std::int64_t s) const { return cu.empty() ? s * length : cu[static_cast<std::size_t>(s)]; }
  std::int64_t steps(std::int64_t s) const {
    return cu.empty() ? length : cu[static_cast<std::size_t>(s) + 1] - cu[static_cast<std::size_t>(s)];
  }
  /// Index of the element that sequence s visits as its j-th.
  std::size_t at(std::int64_t s, std::int64_t j, std::int64_t d) const {
    return static_cast<std::size_t>((first(s) + (reverse ? steps(s) - 1 - j : j)) * channels + d);
  }
  std::size_t state(std::int64_t s, std::int64_t d) const { return static_cast<std::size_t>(s * channels + d); }
};
struct gradients {
  test::values d_x, d_initial;
};

/// The definition in double: sum of d_y . y and d_total . total, without what is an identity, which may be infinite.
template <class Operator>
double loss(Operator const& op, problem const& p) {
  using E = scan_element<Operator>;
  auto const x = elements_of<E>(p.x), initial = elements_of<E>(p.initial);
  constexpr auto n = static_cast<std::size_t>(numbers<E>);
  double sum = 0;
  auto const add = [&](E const& e, test::values const& weights, std::size_t i) {
    double c[n];
    std::memcpy(c, &e, sizeof(E));
    for (std::size_t k = 0; k < n; ++k) sum += c[k] * weights[i * n + k];
  };
  for (std::int64_t s = 0; s < p.sequences(); ++s)
    for (std::int64_t d = 0; d < p.channels; ++d) {
      E value = initial.empty() ? op.identity() : initial[p.state(s, d)];
      for (std::int64_t j = 0; j < p.steps(s); ++j) {
        E const next = op(value, x[p.at(s, j, d)]);
        if (!p.exclusive || j > 0 || !initial.empty()) add(p.exclusive ? value : next, p.d_y, p.at(s, j, d));
        value = next;
      }
      if (!p.d_total.empty() && (p.steps(s) > 0 || !initial.empty())) add(value, p.d_total, p.state(s, d));
    }
  return sum;
}

/// The chain rule as one loop for each sequence and channel, in double; of states as they are, or rounded as y is.
template <class T, class Operator>
gradients by_loop(Operator const& op, problem const& p) {
  using E = scan_element<Operator>;
  constexpr auto n = static_cast<std::size_t>(numbers<E>);
  auto const x = elements_of<E>(p.x), initial = elements_of<E>(p.initial), d_y = elements_of<E>(p.d_y),
             d_total = elements_of<E>(p.d_total);
  auto const stored = [](E const& e) {
    if constexpr (storage<E>)
      return static_cast<E>(widen(convert<T>(e)));
    else
      return e;
  };
  std::vector<E> d_x(x.size()), d_initial(static_cast<std::size_t>(p.sequences() * p.channels));
  for (std::int64_t s = 0; s < p.sequences(); ++s)
    for (std::int64_t d = 0; d < p.channels; ++d) {
      std::vector<E> before;
      E value = initial.empty() ? E(op.identity()) : initial[p.state(s, d)];
      for (std::int64_t j = 0; j < p.steps(s); ++j) {
        before.push_back(j == 0 && !p.exclusive ? value : stored(value));
        value = op(value, x[p.at(s, j, d)]);
      }
      double g[n] = {};
      if (!d_total.empty()) std::memcpy(g, &d_total[p.state(s, d)], sizeof(E));
      auto const element = [&] {
        E e;
        std::memcpy(static_cast<void*>(&e), g, sizeof(E));
        return e;
      };
      auto const add = [&](E const& e) {
        double c[n];
        std::memcpy(c, &e, sizeof(E));
        for (std::size_t k = 0; k < n; ++k) g[k] += c[k];
      };
      for (std::int64_t j = p.steps(s); j-- > 0;) {
        std::size_t const i = p.at(s, j, d);
        if (!p.exclusive) add(d_y[i]);
        auto const back = op.backward(before[static_cast<std::size_t>(j)], x[i], element());
        d_x[i] = back.d_b;
        std::memcpy(g, &back.d_a, sizeof(E));
        if (p.exclusive) add(d_y[i]);
      }
      d_initial[p.state(s, d)] = element();
    }
  return {flat(d_x), flat(d_initial)};
}

/// Forward and backward of the operator, along rows where Rank is 2. T is double where elements are structs.
template <class T, int Rank, class Operator>
gradients by_operator(Operator const& op, problem const& p, test_policy policy = make_policy()) {
  using E = scan_element<Operator>;
  auto const tensor_of = [&](test::values const& v) {
    auto const shaped = [&](auto const& list) {
      if constexpr (Rank == 2)
        return to_policy(list, p.batch, p.length);
      else
        return to_policy(list, p.batch, p.length, p.channels);
    };
    if constexpr (storage<T>) {
      std::vector<T> list;
      for (double value : v) list.push_back(convert<T>(value));
      return shaped(list);
    } else {
      return shaped(elements_of<E>(v));
    }
  };
  auto const state_of = [&](test::values const& v) {
    std::vector<E> list;
    if constexpr (storage<E>)
      for (double value : v) list.push_back(static_cast<E>(value));
    else
      list = elements_of<E>(v);
    if constexpr (Rank == 2)
      return to_policy(list, list.size());
    else
      return to_policy(list, list.empty() ? 0 : p.sequences(), p.channels);
  };
  auto const x = tensor_of(p.x), d_y = tensor_of(p.d_y), y = tensor_of(p.x), d_x = tensor_of(p.d_y);
  auto const initial = state_of(p.initial), d_total = state_of(p.d_total);
  constexpr std::int64_t each = storage<E> ? 1 : numbers<E>;
  auto const d_initial = state_of(test::values(static_cast<std::size_t>(p.sequences() * p.channels * each)));
  auto const cu = to_policy(p.cu, p.cu.size());
  using V = std::remove_const_t<typename decltype(x.as_view())::element_type>;
  typename associative_scan::options<home<test_policy>, E, Rank> how{.exclusive = p.exclusive, .reverse = p.reverse};
  typename associative_scan::gradient_inputs<home<test_policy>, V, E, Rank> in{
      .x = x, .y = y, .d_y = d_y, .exclusive = p.exclusive, .reverse = p.reverse};
  if (!p.cu.empty()) how.cu_seqlens = in.cu_seqlens = cu;
  if (!p.initial.empty()) how.initial = in.initial = initial;
  if (!p.d_total.empty()) in.d_total = d_total;
  associative_scan::forward(policy, op, x, y, how);
  associative_scan::backward(policy, op, in, d_x.as_view(), d_initial);
  return {numbers_of(d_x.as_view()), numbers_of(d_initial.as_view())};
}

/// Numbers of random elements: where nothing overflows and no maximum is near a tie.
test::values random_numbers(scan_operator::product<double>, std::int64_t n, std::uint64_t seed) {
  return test::random_uniform(n, seed, 0.9, 1.1);
}
test::values random_numbers(scan_operator::log_sum_exp<double>, std::int64_t n, std::uint64_t seed) {
  return test::random_normal(n, seed, 2.0);
}
test::values random_numbers(scan_operator::composition<double>, std::int64_t n, std::uint64_t seed) {
  auto v = test::random_uniform(2 * n, seed, 0.5, 1.0);
  for (std::size_t i = 1; i < v.size(); i += 2) v[i] = 4 * v[i] - 3;
  return v;
}
test::values random_numbers(triangular<double>, std::int64_t n, std::uint64_t seed) {
  auto v = test::random_uniform(3 * n, seed, 0.8, 1.1);
  for (std::size_t i = 1; i < v.size(); i += 3) v[i] -= 0.9;
  return v;
}
test::values random_numbers(mixing op, std::int64_t n, std::uint64_t seed) { return random_numbers(op.op, n, seed); }

template <class Operator>
problem random_problem(Operator op, problem p, std::uint64_t seed, bool states) {
  constexpr std::int64_t n = numbers<scan_element<Operator>>;
  p.x = random_numbers(op, p.batch * p.length * p.channels, seed);
  p.d_y = test::random_normal(n * p.batch * p.length * p.channels, seed + 1);
  if (states) {
    p.initial = random_numbers(op, p.sequences() * p.channels, seed + 3);
    p.d_total = test::random_normal(n * p.sequences() * p.channels, seed + 2);
  }
  return p;
}

}  // namespace

TEST_CASE_TEMPLATE("scan_operator: backward is the combination's derivative", Operator, scan_operator::sum<double>,
                   scan_operator::product<double>, scan_operator::log_sum_exp<double>, scan_operator::maximum<double>,
                   scan_operator::minimum<double>, scan_operator::composition<double>,
                   scan_operator::exchanged<scan_operator::composition<double>>, triangular<double>) {
  using E = scan_element<Operator>;
  Operator const op{};
  auto const numbers_in = [](E const& e) { return flat(std::vector<E>{e}); };
  for (std::uint64_t i = 0; i < 20; ++i) {
    auto const both = test::random_normal(2 * numbers<E>, i), weights = test::random_normal(numbers<E>, 50 + i);
    auto const back = op.backward(elements_of<E>(both)[0], elements_of<E>(both)[1], elements_of<E>(weights)[0]);
    auto gradient = numbers_in(back.d_a);
    for (double x : numbers_in(back.d_b)) gradient.push_back(x);
    test::check_gradient(
        [&](test::values const& v) {
          return test::weighted_sum(numbers_in(op(elements_of<E>(v)[0], elements_of<E>(v)[1])), weights);
        },
        both, gradient, "operator");
  }
  static_assert(differentiable_operator<Operator>);
}

TEST_CASE("scan_operator: the logarithm of nothing takes no gradient from log_sum_exp, and loses none") {
  scan_operator::log_sum_exp<double> const op;
  double const none = op.identity();
  CHECK(op(none, none) == none);
  CHECK(op(none, 1.5) == 1.5);
  CHECK(op.backward(none, 1.5, 2.0).d_a == 0);
  CHECK(op.backward(none, 1.5, 2.0).d_b == 2);
  CHECK(op.backward(1.5, none, 2.0).d_a == 2);
  auto const even = op.backward(none, none, 2.0);
  CHECK(even.d_a + even.d_b == 2);
}

TEST_CASE("scan_operator: log_sum_exp of infinity is infinity, and of what is no number no number") {
  scan_operator::log_sum_exp<double> const op;
  double const infinity = std::numeric_limits<double>::infinity(), no_number = std::nan("");
  for (double const other : {-infinity, 0.0, 1.0, infinity, no_number}) {
    CAPTURE(other);
    auto const left = op.backward(no_number, other, 2), right = op.backward(other, no_number, 2);
    for (double const x : {op(no_number, other), op(other, no_number), left.d_a, left.d_b, right.d_a, right.d_b})
      CHECK(std::isnan(x));
    bool const stays = other != other || (op(infinity, other) == infinity && op(other, infinity) == infinity);
    CHECK(stays);
  }
  CHECK(op.backward(infinity, 1, 2).d_a == 2);
  CHECK(op.backward(1, infinity, 2).d_a == 0);
}

TEST_CASE("associative_scan: a row of log_sum_exp is no number from the first one on that is none") {
  std::int64_t const length = 600, bad = 70;
  scan_operator::log_sum_exp<float> const op;
  auto p = random_problem(scan_operator::log_sum_exp<double>{}, {.batch = 3, .length = length}, 1, true);
  p.x[static_cast<std::size_t>(length + bad)] = std::numeric_limits<double>::quiet_NaN();
  auto const x = test::upload<float>(p.x, 3, length);
  auto const y = zeros<float>(make_policy(), 3, length);
  associative_scan::forward(make_policy(), op, x, y);
  auto const d = by_operator<float, 2>(op, p);
  auto const forward = test::download(y.as_view());
  std::int64_t wrong_y = 0, wrong_d_x = 0;
  for (std::int64_t i = 0; i < 3 * length; ++i) {
    wrong_y += std::isnan(forward[static_cast<std::size_t>(i)]) != (i >= length + bad && i < 2 * length);
    wrong_d_x += std::isnan(d.d_x[static_cast<std::size_t>(i)]) != (i >= length && i < 2 * length);
  }
  CHECK(wrong_y == 0);
  CHECK(wrong_d_x == 0);
}

TEST_CASE_TEMPLATE("associative_scan.backward: gradients are central differences", Operator,
                   scan_operator::composition<double>, mixing) {
  Operator const op{};
  for (int bits = 0; bits < 8; ++bits) {
    problem shape{.batch = 2, .length = 5, .channels = 2, .exclusive = (bits & 1) != 0, .reverse = (bits & 2) != 0};
    if (bits & 4)
      shape = {
          .length = 9, .channels = 2, .exclusive = shape.exclusive, .reverse = shape.reverse, .cu = {0, 4, 4, 5, 9}};
    problem const p = random_problem(op, shape, 10, bits % 3 > 0);
    auto const d = by_operator<scan_element<Operator>, 3>(op, p);
    auto const of = [&](test::values problem::*member, test::values const& gradient, char const* what) {
      problem moved = p;
      test::check_gradient(
          [&](test::values const& v) {
            moved.*member = v;
            return loss(op, moved);
          },
          p.*member, gradient, what + std::to_string(bits));
    };
    of(&problem::x, d.d_x, "d_x ");
    if (!p.initial.empty()) of(&problem::initial, d.d_initial, "d_initial ");
  }
}

TEST_CASE_TEMPLATE("associative_scan.backward: is the loop of the chain rule at every size", Operator,
                   scan_operator::product<double>, scan_operator::composition<double>, mixing) {
  Operator const op{};
  auto const check = [&](problem const& p) {
    CAPTURE(p.batch);
    CAPTURE(p.length);
    CAPTURE(p.channels);
    problem positive = p;
    for (auto* v : {&positive.x, &positive.initial, &positive.d_y, &positive.d_total})
      for (double& x : *v) x = std::abs(x);
    auto const expected = by_loop<double>(op, p), magnitude = by_loop<double>(op, positive);
    auto const compare = [&](gradients const& d) {
      test::check_within<double>(d.d_x, expected.d_x, magnitude.d_x, 32 * p.length, "d_x", 0x1p-1000);
      test::check_within<double>(d.d_initial, expected.d_initial, magnitude.d_initial, 32 * p.length, "d_initial",
                                 0x1p-1000);
    };
    compare(by_operator<scan_element<Operator>, 3>(op, p));
    if (p.channels == 1) compare(by_operator<scan_element<Operator>, 2>(op, p));
  };
  for (std::int64_t length : test::sizes({0, 1, 2, 63, 64, 65, 1000, 1025, 9000, 20000}))
    for (bool exclusive : {false, true})
      check(random_problem(op, {.batch = 2, .length = length, .exclusive = exclusive}, 5, true));
  for (std::int64_t channels : test::sizes({2, 31, 32, 33, 300}))
    check(random_problem(op, {.batch = 2, .length = 70, .channels = channels}, 6, true));
  check(random_problem(op, {.length = 3000, .channels = 5, .reverse = true, .cu = {0, 0, 700, 2999, 3000}}, 7, true));

  for (std::uint64_t i = 0; i < test::trials(400); ++i) {
    auto const pick = [&](std::uint64_t what, std::int64_t high) { return test::random_integer(what, i, 0, high); };
    problem p{.batch = pick(0, 3),
              .length = pick(1, 40),
              .channels = pick(2, 1) == 0 ? 1 : 1 + pick(3, 8),
              .exclusive = pick(4, 1) == 1,
              .reverse = pick(5, 1) == 1};
    if (pick(6, 1) == 1) {
      p.batch = 1;
      p.cu = {0, pick(7, p.length), pick(8, p.length), p.length};
      std::sort(p.cu.begin(), p.cu.end());
    }
    CAPTURE(i);
    check(random_problem(op, p, i, pick(9, 1) == 1));
  }
}

TEST_CASE_TEMPLATE("associative_scan.backward: what is stored in other types", T, float, bfloat16) {
  using A = accum_t<T>;
  std::int64_t const length = 600;
  auto p = random_problem(scan_operator::log_sum_exp<double>{}, {.batch = 3, .length = length}, 1, true);
  for (auto* v : {&p.x, &p.d_y}) *v = test::rounded<T>(*v);
  for (auto* v : {&p.initial, &p.d_total}) *v = test::rounded<A>(*v);
  auto const d = by_operator<T, 2>(scan_operator::log_sum_exp<A>{}, p);
  auto const expected = by_loop<T>(scan_operator::log_sum_exp<double>{}, p);
  // Where y is rounded to 16 bits, one that lies beside the middle of two numbers may be rounded to the other one than
  // in double, which moves both factors of a step by as much as that.
  test::check_close(d.d_x, expected.d_x, test::tolerance<T>(length) + 4 * test::unit_roundoff<T>(), "d_x");
  test::check_close(d.d_initial, expected.d_initial, test::tolerance<A>(length) + 8 * test::unit_roundoff<T>(),
                    "d_initial");
}

TEST_CASE("associative_scan.backward: a sequence in two pieces is the whole one") {
  scan_operator::product<double> const op{};
  auto const whole = random_problem(op, {.length = 5000}, 3, true);
  auto const d = by_operator<double, 2>(op, whole);
  problem head = whole, tail = whole;
  head.length = 1234;
  tail.length = whole.length - head.length;
  auto const cut = [&](test::values const& v, problem& first, problem& second, test::values problem::*member) {
    (first.*member).assign(v.begin(), v.begin() + first.length);
    (second.*member).assign(v.begin() + first.length, v.end());
  };
  cut(whole.x, head, tail, &problem::x);
  cut(whole.d_y, head, tail, &problem::d_y);
  tail.initial = {whole.initial[0]};
  for (double x : head.x) tail.initial[0] *= x;
  auto const of_tail = by_operator<double, 2>(op, tail);
  head.d_total = of_tail.d_initial;
  auto of_head = by_operator<double, 2>(op, head);
  of_head.d_x.insert(of_head.d_x.end(), of_tail.d_x.begin(), of_tail.d_x.end());
  test::check_close(of_head.d_x, d.d_x, 1e-12, "d_x");
  test::check_close(of_head.d_initial, d.d_initial, 1e-12, "d_initial");
}

TEST_CASE_TEMPLATE("associative_scan.backward: the same bits in every run, for any number of threads", Operator,
                   scan_operator::product<double>, mixing) {
  auto const p = random_problem(Operator{}, {.length = 30000}, 3, true);
  auto const first = by_operator<scan_element<Operator>, 2>(Operator{}, p);
  test::each_thread_count({1, 2, 3}, [&](test_policy const& policy) {
    auto const again = by_operator<scan_element<Operator>, 2>(Operator{}, p, policy);
    test::check_equal(again.d_x, first.d_x);
    test::check_equal(again.d_initial, first.d_initial);
  });
}

TEST_CASE_TEMPLATE("associative_scan.backward: takes the scratch that it says", Operator,
                   scan_operator::product<double>, scan_operator::composition<double>, mixing) {
  using E = scan_element<Operator>;
  std::int64_t const length = 20000;
  tensor<test_space, E, dyn, dyn> x(1, length), y(1, length), d_y(1, length), d_x(1, length);
  auto const bytes = associative_scan::backward_scratch_bytes<Operator, test_space>(1, length);
  using dry = device::dry<test_policy>;
  auto measuring = arena<test_space>::measuring();
  associative_scan::backward(dry{.workspace = &measuring}, Operator{}, {.x = x, .y = y, .d_y = d_y}, d_x.as_view());
  CHECK(measuring.peak() == bytes);
  auto const wide = zeros<E>(make_policy(), 2, 700, 40);
  auto measuring_wide = arena<test_space>::measuring();
  associative_scan::backward(dry{.workspace = &measuring_wide}, Operator{}, {.x = wide, .y = wide, .d_y = wide},
                             wide.as_view());
  CHECK(measuring_wide.peak() == associative_scan::backward_scratch_bytes<Operator, test_space>(2, 700, 40, 0));
}

TEST_CASE("associative_scan.step: steps are forward, one after the other") {
  std::int64_t const batch = 3, length = 20, channels = 70;
  auto const run = [&]<class T, class Operator>(T, Operator op, double tolerance) {
    auto const x = test::upload<T>(test::random_normal(batch * length * channels, 1), batch, length, channels);
    auto const initial = test::upload<float>(test::random_normal(batch * channels, 2), batch, channels);
    auto const state = test::upload<float>(test::random_normal(batch * channels, 2), batch, channels);
    tensor<test_space, T, dyn, dyn, dyn> y(batch, length, channels), stepped(batch, length, channels);
    auto const total = zeros<float>(make_policy(), batch, channels);
    associative_scan::forward(make_policy(), op, x, y, {.initial = initial, .total = total});
    for (std::int64_t t = 0; t < length; ++t) {
      auto const at = [&](auto const& v) {
        return v.as_view().reshape(batch, length * channels).columns(t * channels, channels);
      };
      associative_scan::step(make_policy(), op, at(x), state, at(stepped));
    }
    test::check_close(test::download(stepped.as_view()), test::download(y.as_view()), tolerance);
    test::check_close(test::download(state.as_view()), test::download(total.as_view()), tolerance);
  };
  run(float{}, scan_operator::log_sum_exp<float>{}, test::tolerance<float>(length));
  run(bfloat16{}, scan_operator::log_sum_exp<float>{}, test::tolerance<bfloat16>(length));
}

TEST_CASE("associative_scan: bad arguments of backward and step are named") {
  auto const x = zeros<float>(make_policy(), 2, 5), other = zeros<float>(make_policy(), 2, 4);
  auto const states = zeros<float>(make_policy(), 3);
  using inputs = associative_scan::gradient_inputs<home<test_policy>, float, float, 2>;
  auto const message = [&](inputs const& in) {
    return test::message_of<shape_error>(
        [&] { associative_scan::backward(make_policy(), scan_operator::log_sum_exp<float>{}, in, x.as_view()); });
  };
  CHECK(message({.x = other, .y = x, .d_y = x}) == "associative_scan.backward: x: got (2, 4), expected (2, 5)");
  CHECK(message({.x = x, .y = other, .d_y = x}) == "associative_scan.backward: y: got (2, 4), expected (2, 5)");
  CHECK(message({.x = x, .y = x, .d_y = other}) == "associative_scan.backward: d_y: got (2, 4), expected (2, 5)");
  CHECK(message({.x = x, .y = x, .d_y = x, .d_total = states}) ==
        "associative_scan.backward: d_total: got (3), expected (2)");
  CHECK(test::message_of<shape_error>([&] {
          associative_scan::step(make_policy(), scan_operator::log_sum_exp<float>{}, x, other, x.as_view());
        }) == "associative_scan.step: state: got (2, 4), expected (2, 5)");
}
