#include "support/support.hpp"

#include <blackmamba/ops/adamw/adamw.hpp>

using namespace blackmamba;

namespace {

struct state {
  test::values parameter, first_moment, second_moment;
};
state random_state(std::int64_t n) {
  state s{test::random_normal(n, 1), test::random_normal(n, 2, 0.1), test::random_uniform(n, 3, 0.0, 0.1)};
  return s;
}

/// Parameters [end of the group before, end) of an array.
struct group {
  std::int64_t end;
  double weight_decay;
  double learning_rate_scale = 1;
};
using groups_of = std::vector<group>;

/// The definition, in double.
void reference_step(state& s, test::values const& gradient, double norm, groups_of const& groups,
                    adamw::options const& o) {
  double const t = static_cast<double>(o.step);
  double const clip = o.max_norm > 0 && norm > o.max_norm ? o.max_norm / norm : 1.0;
  std::size_t i = 0;
  for (auto const& part : groups)
    for (; i < static_cast<std::size_t>(part.end); ++i) {
      double const g = gradient[i] * clip, rate = o.learning_rate * part.learning_rate_scale;
      s.first_moment[i] = o.beta1 * s.first_moment[i] + (1 - o.beta1) * g;
      s.second_moment[i] = o.beta2 * s.second_moment[i] + (1 - o.beta2) * g * g;
      double const m = s.first_moment[i] / (1 - std::pow(o.beta1, t)),
                   v = s.second_moment[i] / (1 - std::pow(o.beta2, t));
      s.parameter[i] -= rate * (m / (std::sqrt(v) + o.eps) + part.weight_decay * s.parameter[i]);
    }
}

template <class T>
struct on_device {
  using A = accum_t<T>;
  tensor<test::test_space, A, dyn> parameter, first_moment, second_moment;
  tensor<test::test_space, T, dyn> copy;

  explicit on_device(state const& s)
      : parameter(test::upload<A>(s.parameter, size(s))),
        first_moment(test::upload<A>(s.first_moment, size(s))),
        second_moment(test::upload<A>(s.second_moment, size(s))),
        copy(test::poisoned<T>(size(s))) {}
  static std::int64_t size(state const& s) { return static_cast<std::int64_t>(s.parameter.size()); }

  adamw::segment<test_policy, T> with(tensor<test::test_space, A, dyn> const& gradient) const {
    return {.parameter = parameter,
            .gradient = gradient,
            .first_moment = first_moment,
            .second_moment = second_moment,
            .copy = copy};
  }
  void step(test::values const& gradient, double norm, groups_of const& groups, adamw::options const& o,
            test_policy policy = make_policy()) {
    auto const g = test::upload<A>(gradient, static_cast<std::int64_t>(gradient.size()));
    auto const length = test::upload<A>({norm}, 1);
    std::vector<adamw::segment<test_policy, T>> segments;
    std::int64_t begin = 0;
    for (auto const& one : groups) {
      segments.push_back(with(g).slice(begin, one.end - begin));
      segments.back().weight_decay = one.weight_decay;
      segments.back().learning_rate_scale = one.learning_rate_scale;
      begin = one.end;
    }
    adamw::step<test_policy, T>(policy, segments, length, o);
  }
  state values() const {
    return {test::download(parameter), test::download(first_moment), test::download(second_moment)};
  }
};

double norm_of(test::values const& v) {
  long double s = 0;
  for (long double x : v) s += x * x;
  return static_cast<double>(std::sqrt(s));
}
template <class A>
double run_norm(test::values const& v, test_policy policy = make_policy()) {
  auto const g = test::upload<A>(v, static_cast<std::int64_t>(v.size()));
  auto const norm = test::poisoned<A>(1);
  adamw::norm(policy, g, norm.as_view());
  return test::download(norm)[0];
}

void check_same(state const& a, state const& b) {
  test::check_equal(a.parameter, b.parameter, "parameter");
  test::check_equal(a.first_moment, b.first_moment, "first_moment");
  test::check_equal(a.second_moment, b.second_moment, "second_moment");
}

}  // namespace

TEST_CASE_TEMPLATE("adamw: equals its definition over ten steps at every size and type", T, STORAGE_TYPES) {
  using A = accum_t<T>;
  for (std::int64_t n : test::sizes({0, 1, 15, 16, 17, 1000, 9001}))
    for (double max_norm : {0.0, 1.0, 1e9}) {
      state expected{test::rounded<A>(test::random_normal(n, 1)), test::values(static_cast<std::size_t>(n), 0.0),
                     test::values(static_cast<std::size_t>(n), 0.0)};
      on_device<T> actual(expected);
      groups_of const groups{{n / 3, 0.1}, {n / 3, 0.7}, {n / 2, 0.0, 3.0}, {n, 0.02}};
      for (std::int64_t step = 1; step <= 10; ++step) {
        auto const g = test::rounded<A>(test::random_normal(n, static_cast<std::uint64_t>(10 + step)));
        adamw::options const o{.learning_rate = 0.01 / static_cast<double>(step), .step = step, .max_norm = max_norm};
        double const norm = test::rounded<A>({norm_of(g)})[0];
        reference_step(expected, g, norm, groups, o);
        actual.step(g, norm, groups, o);
      }
      auto const after = actual.values();
      // Ten steps of a few roundings each.
      test::check_close_at_scale(after.parameter, expected.parameter, 1, 10 * test::tolerance<A>(), "parameter");
      test::check_close(after.first_moment, expected.first_moment, 10 * test::tolerance<A>(), "first_moment");
      test::check_close_each(after.second_moment, expected.second_moment, 10 * test::tolerance<A>(), "second_moment");
      test::check_equal(test::download(actual.copy), test::rounded<T>(after.parameter), "copy");
    }
}
TEST_CASE("adamw: the first step moves each parameter by the learning rate against its gradient's sign") {
  test::values const gradient{1e-3, -5.0, 1e4, -1e-5};
  on_device<double> p({test::values(4, 1.0), test::values(4, 0.0), test::values(4, 0.0)});
  p.step(gradient, 0, {{4, 0.0}}, {.learning_rate = 0.1, .eps = 0});
  auto const after = p.values().parameter;
  for (std::size_t i = 0; i < 4; ++i) CHECK(after[i] == doctest::Approx(gradient[i] > 0 ? 0.9 : 1.1).epsilon(1e-14));
}
TEST_CASE("adamw: decay is decoupled from the gradient") {
  // Without eps, scaling all gradients changes nothing: not the step, and not the decay, as it would in Adam with L2.
  auto const gradient = test::random_normal(50, 1);
  auto larger = gradient;
  for (auto& g : larger) g *= 1024;
  state const start{test::random_normal(50, 2), test::values(50, 0.0), test::values(50, 0.0)};
  on_device<double> a(start), b(start);
  adamw::options const o{.learning_rate = 0.1, .eps = 0};
  a.step(gradient, 0, {{50, 0.3}}, o);
  b.step(larger, 0, {{50, 0.3}}, o);
  test::check_equal(a.values().parameter, b.values().parameter, "parameter");
  // And with no gradient what is left is a shrinking by 1 - rate decay.
  on_device<double> c(start);
  c.step(test::values(50, 0.0), 0, {{50, 0.3}}, {.learning_rate = 0.1});
  auto expected = start.parameter;
  for (auto& p : expected) p *= 1 - 0.03;
  test::check_close(c.values().parameter, expected, 1e-15, "parameter");
}
TEST_CASE("adamw: a decay below float's resolution of one still acts as a mean") {
  // rate decay = 1e-7: 1 - 1e-7 is not a float, and a rounded factor would be wrong by a fifth.
  std::int64_t const n = 4096;
  state const start{test::random_uniform(n, 1, 1.0, 2.0), test::values(4096, 0.0), test::values(4096, 0.0)};
  on_device<float> p(start);
  for (int i = 0; i < 50; ++i) p.step(test::values(4096, 0.0), 0, {{n, 0.001}}, {.learning_rate = 0.001});
  double before = 0, after = 0;
  auto const end = p.values().parameter, begin = test::rounded<float>(start.parameter);
  for (std::size_t i = 0; i < 4096; ++i) {
    before += begin[i];
    after += end[i];
  }
  CHECK((before - after) / before == doctest::Approx(50 * 1e-6).epsilon(0.15));
}
TEST_CASE("adamw: clipping scales the gradient, and only where its norm is larger") {
  auto const gradient = test::random_normal(300, 1);
  double const norm = norm_of(gradient);
  auto const start = random_state(300);
  auto clipped = gradient;
  for (auto& g : clipped) g *= 2.0 / norm;
  on_device<double> a(start), b(start), c(start), d(start);
  a.step(gradient, norm, {{300, 0.1}}, {.learning_rate = 0.1, .step = 7, .max_norm = 2.0});
  b.step(clipped, 2.0, {{300, 0.1}}, {.learning_rate = 0.1, .step = 7});
  test::check_close(a.values().parameter, b.values().parameter, 1e-14, "clipped");
  c.step(gradient, norm, {{300, 0.1}}, {.learning_rate = 0.1, .step = 7, .max_norm = norm});
  d.step(gradient, norm, {{300, 0.1}}, {.learning_rate = 0.1, .step = 7});
  check_same(c.values(), d.values());
}
TEST_CASE("adamw: a norm that is not finite leaves everything unchanged") {
  auto const start = random_state(100);
  for (double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()})
    for (double max_norm : {0.0, 1.0}) {
      on_device<double> p(start);
      p.step(test::values(100, bad), bad, {{100, 0.1}}, {.learning_rate = 0.1, .max_norm = max_norm});
      check_same(p.values(), start);
      for (double v : test::download(p.copy)) CHECK(std::isnan(v));  // as it was before
    }
}
TEST_CASE("adamw: without clipping no norm is needed, without a copy none is written") {
  auto const start = random_state(40);
  auto const gradient = test::random_normal(40, 5);
  on_device<double> with(start), without(start);
  adamw::options const o{.learning_rate = 0.1, .step = 3};
  with.step(gradient, 1.0, {{40, 0.1}}, o);
  auto const g = test::upload<double>(gradient, 40);
  adamw::step<test_policy, double>(make_policy(),
                                   {.parameter = without.parameter,
                                    .gradient = g,
                                    .first_moment = without.first_moment,
                                    .second_moment = without.second_moment,
                                    .weight_decay = 0.1},
                                   {}, o);
  check_same(without.values(), with.values());
}
TEST_CASE("adamw: the norm is exact to its last digit, at every size") {
  for (std::int64_t n : test::sizes({0, 1, 15, 16, 17, 16384, 16385, 100000})) {
    auto const single = test::rounded<float>(test::random_normal(n, 1)), wide = test::random_normal(n, 2);
    CHECK(std::abs(run_norm<float>(single) - norm_of(single)) <= test::unit_roundoff<float>() * norm_of(single));
    CHECK(std::abs(run_norm<double>(wide) - norm_of(wide)) <= 1e-14 * norm_of(wide));
  }
  // Squares that no float holds.
  CHECK(run_norm<float>(test::values(4, 1e30)) == static_cast<double>(2e30f));
  CHECK(run_norm<float>(test::values(4, 1e-30)) == static_cast<double>(2e-30f));
  CHECK(std::isnan(run_norm<float>({1, std::numeric_limits<double>::quiet_NaN(), 2})));
  CHECK(std::isinf(run_norm<float>({1, -std::numeric_limits<double>::infinity(), 2})));
}
TEST_CASE_TEMPLATE("adamw: the same bits in every run, for any number of threads", P, test_policy) {
  std::int64_t const n = 50001;
  auto const start = random_state(n);
  auto const gradient = test::random_normal(n, 5);
  groups_of const groups{{13, 0.1}, {20000, 0.0}, {n, 0.1}};
  adamw::options const o{.learning_rate = 0.1, .step = 3, .max_norm = 1.0};
  on_device<float> one(start);
  one.step(gradient, norm_of(gradient), groups, o);
  auto const check_again = [&](test_policy const& policy) {
    on_device<float> again(start);
    again.step(gradient, norm_of(gradient), groups, o, policy);
    check_same(again.values(), one.values());
    CHECK(run_norm<float>(gradient, policy) == run_norm<float>(gradient));
  };
  check_again(make_policy());
  if constexpr (requires(P p) { p.threads; })
    for (int threads : {1, 2, 5}) {
      P policy = make_policy();
      policy.threads = threads;
      check_again(policy);
    }
}
TEST_CASE("adamw: scratch is exact") {
  using dry = device::dry<test_policy>;
  auto measure = arena<test::test_space>::measuring();
  auto const g = zeros<float>(make_policy(), 1 << 20), norm = zeros<float>(make_policy(), 1);
  adamw::norm(dry{&measure}, g, norm.as_view());
  CHECK(measure.peak() == adamw::scratch_bytes(1 << 20));
}
TEST_CASE("adamw: shapes and options that do not fit are named") {
  auto const four = zeros<float>(make_policy(), 4), five = zeros<float>(make_policy(), 5),
             one = zeros<float>(make_policy(), 1);
  using segment = adamw::segment<test_policy, float>;
  segment const good{.parameter = four, .gradient = four, .first_moment = four, .second_moment = four};
  auto const message = [&](std::vector<segment> const& segments, auto const& norm, adamw::options const& o) {
    return test::message_of<error>([&] { adamw::step<test_policy, float>(make_policy(), segments, norm, o); });
  };
  view<test::test_space, float const, dyn> const absent;
  adamw::options const plain{.learning_rate = 0.1};
  auto bad = good;
  bad.gradient = five;
  CHECK(message({bad}, one, plain) == "adamw: gradient: got (5), expected (4)");
  CHECK(message({good, bad}, one, plain) == "adamw: segment 1: gradient: got (5), expected (4)");
  bad = good;
  bad.copy = five;
  CHECK(message({bad, good}, one, plain) == "adamw: segment 0: copy: got (5), expected (4)");
  CHECK(message({good}, four, plain) == "adamw: norm: got (4), expected (1)");
  CHECK(message({good}, absent, {.learning_rate = 0.1, .max_norm = 1}) ==
        "adamw: norm: got no view, expected a view, because max_norm is not 0");
  CHECK(message({good}, one, {.learning_rate = 0.1, .step = 0}) == "adamw: step: got 0.000000, expected at least 1");
  CHECK(message({good}, one, {.learning_rate = 0.1, .beta1 = 1}) == "adamw: beta1: got 1.000000, expected in [0, 1)");
  CHECK(message({good}, one, {.learning_rate = -0.1}) ==
        "adamw: learning_rate: got -0.100000, expected a finite number from 0");
  CHECK(message({good}, one, {.learning_rate = std::nan("")}) ==
        "adamw: learning_rate: got nan, expected a finite number from 0");
  bad = good;
  bad.weight_decay = -1;
  CHECK(message({good, bad}, one, plain) ==
        "adamw: segment 1: weight_decay: got -1.000000, expected a finite number from 0");
  bad = good;
  bad.learning_rate_scale = INFINITY;
  CHECK(message({bad}, one, plain) == "adamw: learning_rate_scale: got inf, expected a finite number from 0");
}
TEST_CASE_TEMPLATE("adamw: a schedule in memory is what options say, to the bit", T, float, bfloat16, double) {
  using A = accum_t<T>;
  std::int64_t const n = 1003;
  auto const start = random_state(n);
  auto const gradient = test::random_normal(n, 5);
  adamw::options const o{.learning_rate = 0.1, .step = 7};
  on_device<T> by_options(start), by_schedule(start);
  by_options.step(gradient, norm_of(gradient), {{400, 0.1}, {n, 0, 0.5}}, o);
  auto const numbers = adamw::schedule_of(o);
  auto const schedule = test::upload<double>({numbers.begin(), numbers.end()}, 3);
  auto const g = test::upload<A>(gradient, n);
  adamw::segment<test_policy, T> segments[] = {by_schedule.with(g).slice(0, 400),
                                               by_schedule.with(g).slice(400, n - 400)};
  segments[0].weight_decay = 0.1;
  segments[1].learning_rate_scale = 0.5;
  adamw::step<test_policy, T>(make_policy(), segments, {}, {.learning_rate = 99, .step = 1}, schedule);
  check_same(by_schedule.values(), by_options.values());
}
// Segments are of tensors of their own, some of which begin after a pack's place, alike or each elsewhere; with a copy
// or without; more of them than one launch takes.
TEST_CASE_TEMPLATE("adamw: segments in one call are calls one by one, to the bit", T, STORAGE_TYPES) {
  using A = accum_t<T>;
  struct shape {
    std::int64_t n, shift, gradient_shift;
    bool copy;
  };
  std::vector<shape> const some{{4096, 0, 0, true}, {0, 0, 0, true},     {5, 0, 0, false},
                                {1023, 1, 1, true}, {1, 3, 3, true},     {0, 1, 0, false},
                                {2500, 0, 2, true}, {1025, 2, 1, false}, {3, 1, 1, true}};
  auto many = some;
  for (std::int64_t i = 0; i < 40; ++i) many.push_back({37 * i, i % 5, i % 3 == 0 ? i % 4 : i % 5, i % 2 == 0});
  for (auto const& shapes : {some, many, std::vector<shape>{{0, 0, 0, true}, {0, 1, 2, false}}}) {
    std::vector<on_device<T>> together, apart;
    std::vector<tensor<test::test_space, A, dyn>> gradients;
    std::vector<adamw::segment<test_policy, T>> segments, one_by_one;
    std::uint64_t seed = 1;
    for (auto const& s : shapes) {
      std::int64_t const room = s.n + s.shift + 3;  // what lies around a segment stays as it is
      state const start{test::random_normal(room, seed), test::random_normal(room, seed + 1, 0.1),
                        test::random_uniform(room, seed + 2, 0.0, 0.1)};
      gradients.push_back(test::upload<A>(test::random_normal(s.n + 8, seed + 3), s.n + 8));
      seed += 4;
      for (auto* all : {&together, &apart}) all->emplace_back(start);
    }
    for (std::size_t i = 0; i < shapes.size(); ++i)
      for (auto [all, list] : {std::pair(&together, &segments), std::pair(&apart, &one_by_one)}) {
        auto const& s = shapes[i];
        auto segment = (*all)[i].with(gradients[i]).slice(s.shift, s.n);
        segment.gradient = gradients[i].slice(s.gradient_shift, s.n);
        if (!s.copy) segment.copy = {};
        segment.weight_decay = i % 2 == 0 ? 0.1 : 0.0;
        if (i % 3 == 2) segment.learning_rate_scale = 0.3;
        list->push_back(segment);
      }
    auto const norm = test::upload<A>({2.5}, 1);
    adamw::options const o{.learning_rate = 0.1, .step = 3, .max_norm = 1};
    adamw::step<test_policy, T>(make_policy(), segments, norm, o);
    for (auto const& segment : one_by_one) adamw::step<test_policy, T>(make_policy(), segment, norm, o);
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      check_same(together[i].values(), apart[i].values());
      auto const a = test::download(together[i].copy), b = test::download(apart[i].copy);
      for (std::size_t j = 0; j < a.size(); ++j) {
        auto const at = static_cast<std::int64_t>(j) - shapes[i].shift;
        bool const written = shapes[i].copy && at >= 0 && at < shapes[i].n;
        if (std::isnan(a[j]) != !written || std::isnan(b[j]) != !written || (written && a[j] != b[j]))
          FAIL("segment " << i << ": copy " << j << " is " << a[j] << " and " << b[j]);
      }
    }
  }
}
TEST_CASE("adamw: how arrays are divided and aligned changes no bit") {
  std::int64_t const n = 997, shift = 1;
  auto const start = random_state(n + shift);
  auto const gradient = test::random_normal(n + shift, 5);
  groups_of groups;
  for (std::int64_t i = 1; i <= 20; ++i) groups.push_back({n * i / 20, 0.1});
  adamw::options const o{.learning_rate = 0.1, .step = 2};
  auto const tail = [](test::values const& v) { return test::values(v.begin() + 1, v.end()); };
  on_device<float> straight({tail(start.parameter), tail(start.first_moment), tail(start.second_moment)});
  straight.step(tail(gradient), 1, groups, o);
  on_device<float> shifted(start);
  auto const g = test::upload<float>(gradient, n + shift);
  auto const whole = shifted.with(g).slice(shift, n);
  adamw::step(make_policy(),
              {.parameter = whole.parameter,
               .gradient = whole.gradient,
               .first_moment = whole.first_moment,
               .second_moment = whole.second_moment,
               .weight_decay = 0.1},
              {}, o);
  auto const after = shifted.values();
  check_same({tail(after.parameter), tail(after.first_moment), tail(after.second_moment)}, straight.values());
}
