#include "support/support.hpp"

#include <blackmamba/ops/cross_entropy/cross_entropy.hpp>

using namespace blackmamba;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

struct problem {
  std::int64_t rows, classes;
  test::values logits, target;
};
problem random_problem(std::int64_t rows, std::int64_t classes, double spread = 1.0) {
  problem p{rows, classes, test::random_normal(rows * classes, 1, spread), {}};
  for (std::int64_t i = 0; i < rows; ++i)
    p.target.push_back(static_cast<double>(test::random_integer(2, static_cast<std::uint64_t>(i), 0, classes - 1)));
  return p;
}

struct result {
  double loss = 0;
  test::values row_loss, lse;
};
/// The definition, in double; the shift by the largest logit is what makes it computable.
result reference(problem const& p) {
  result r;
  for (std::size_t i = 0; i < p.target.size(); ++i) {
    if (p.target[i] < 0) {
      r.row_loss.push_back(0);
      r.lse.push_back(0);
      continue;
    }
    auto const logit = [&](std::size_t j) { return p.logits[i * static_cast<std::size_t>(p.classes) + j]; };
    double largest = -infinity;
    long double sum = 0;  // thousands of roundings of double would show
    for (std::size_t j = 0; j < static_cast<std::size_t>(p.classes); ++j) largest = std::max(largest, logit(j));
    for (std::size_t j = 0; j < static_cast<std::size_t>(p.classes); ++j)
      sum += std::exp(static_cast<long double>(logit(j)) - static_cast<long double>(largest));
    r.lse.push_back(largest + static_cast<double>(std::log(sum)));
    r.row_loss.push_back(r.lse.back() - logit(static_cast<std::size_t>(p.target[i])));
    r.loss += r.row_loss.back();
  }
  return r;
}
test::values reference_backward(problem const& p, double scale) {
  auto const r = reference(p);
  test::values d(p.logits.size(), 0.0);
  for (std::size_t i = 0; i < p.target.size(); ++i)
    for (std::size_t j = 0; p.target[i] >= 0 && j < static_cast<std::size_t>(p.classes); ++j) {
      auto const at = i * static_cast<std::size_t>(p.classes) + j;
      d[at] = scale * (std::exp(p.logits[at] - r.lse[i]) - (static_cast<double>(j) == p.target[i] ? 1 : 0));
    }
  return d;
}

template <class T>
result run(problem const& p, test_policy policy = make_policy()) {
  using A = accum_t<T>;
  auto const logits = test::upload<T>(p.logits, p.rows, p.classes);
  auto const target = test::upload<std::int32_t>(p.target, p.rows);
  auto const loss = test::poisoned<A>(1), row_loss = test::poisoned<A>(p.rows), lse = test::poisoned<A>(p.rows);
  cross_entropy::forward<test_policy, T>(policy, {.logits = logits, .target = target},
                                         {.loss = loss, .row_loss = row_loss, .lse = lse});
  return {test::download(loss)[0], test::download(row_loss), test::download(lse)};
}
template <class T>
test::values run_backward(problem const& p, double scale, test_policy policy = make_policy()) {
  using A = accum_t<T>;
  auto const logits = test::upload<T>(p.logits, p.rows, p.classes);
  auto const target = test::upload<std::int32_t>(p.target, p.rows);
  auto const lse = test::upload<A>(run<T>(p).lse, p.rows);
  auto const d_logits = test::poisoned<T>(p.rows, p.classes);
  cross_entropy::backward(policy, {.logits = logits, .target = target, .lse = lse, .scale = static_cast<A>(scale)},
                          d_logits.as_view());
  return test::download(d_logits);
}

}  // namespace

TEST_CASE_TEMPLATE("cross_entropy: equals its definition at every size and type", T, STORAGE_TYPES) {
  using A = accum_t<T>;
  for (std::int64_t rows : test::sizes({0, 1, 16, 33}))
    for (std::int64_t classes : test::sizes({1, 2, 15, 16, 17, 256, 1024, 5001, 5008}))
      for (double spread : {1.0, 6.0}) {
        auto p = random_problem(rows, classes, spread);
        p.logits = test::rounded<T>(p.logits);
        auto const expected = reference(p);
        auto const actual = run<T>(p);
        // A row's loss is what the largest logit and a logarithm leave; no sum is longer than a block before double.
        test::check_close_at_scale(actual.row_loss, expected.row_loss, 1, test::tolerance<A>(8), "row_loss");
        test::check_close_at_scale(actual.lse, expected.lse, 1, test::tolerance<A>(8), "lse");
        test::check_close_at_scale({actual.loss}, {expected.loss}, 1, test::tolerance<A>(8), "loss");
        // lse is rounded to A, and with it, relative to its size, each probability.
        test::check_close_at_scale(run_backward<T>(p, 0.25), reference_backward(p, 0.25), 0.25,
                                   test::tolerance<T>(8) + 32 * test::unit_roundoff<A>(), "d_logits");
      }
}
TEST_CASE("cross_entropy: the gradient equals central differences") {
  auto p = random_problem(4, 7, 2.0);
  p.target[2] = -1;
  test::check_gradient(
      [&](test::values const& v) {
        auto q = p;
        q.logits = v;
        return 0.3 * run<double>(q).loss;
      },
      p.logits, run_backward<double>(p, 0.3), "d_logits");
}
TEST_CASE("cross_entropy: a common shift of a row changes nothing, however large") {
  auto p = random_problem(3, 40, 3.0);
  for (auto& v : p.logits) v = std::round(v * 64) / 64;  // still a float after the shift
  auto const plain = run<float>(p);
  auto const gradient = run_backward<float>(p, 1.0);
  for (double shift : {1e4, -1e4}) {
    auto q = p;
    for (auto& v : q.logits) v += shift;
    auto const shifted = run<float>(q);
    test::check_equal(shifted.row_loss, plain.row_loss, "row_loss");
    CHECK(shifted.loss == plain.loss);
    test::check_close(run_backward<float>(q, 1.0), gradient, 1e4 * test::unit_roundoff<float>(), "d_logits");
  }
}
TEST_CASE("cross_entropy: rows of the gradient sum to zero") {
  auto const p = random_problem(5, 333, 2.0);
  auto const d = run_backward<double>(p, 1.0);
  for (std::size_t i = 0; i < 5; ++i) {
    double sum = 0;
    for (std::size_t j = 0; j < 333; ++j) sum += d[i * 333 + j];
    CHECK(std::abs(sum) < 1e-13);
  }
}
TEST_CASE("cross_entropy: extreme logits") {
  // One certain class; classes that are masked out; both to the exact value.
  problem p{3, 4, {1e4, 0, 0, 0, 0, -infinity, 0, -infinity, 3.0e38, -3.0e38, 3.0e38, 0}, {0, 2, 0}};
  auto const r = run<float>(p);
  CHECK(r.row_loss[0] == 0);
  CHECK(r.row_loss[1] == doctest::Approx(std::log(2.0)).epsilon(1e-7));
  CHECK(r.row_loss[2] == doctest::Approx(std::log(2.0)).epsilon(1e-7));
  auto const d = run_backward<float>(p, 1.0);
  CHECK(d[5] == 0);
  CHECK(d[7] == 0);
  CHECK(d[4] == doctest::Approx(0.5).epsilon(1e-6));
  p.target[1] = 1;  // the target itself is masked out
  CHECK(run<float>(p).row_loss[1] == infinity);
}
TEST_CASE_TEMPLATE("cross_entropy: a NaN, +inf or nothing but -inf makes the loss NaN, in whatever lane", T,
                   STORAGE_TYPES) {
  for (std::int64_t classes : test::sizes({1, 16, 37, 1500}))
    for (std::int64_t column : {std::int64_t{0}, classes / 2, classes - 1})
      for (double bad : {std::numeric_limits<double>::quiet_NaN(), infinity}) {
        auto p = random_problem(3, classes);
        p.logits[static_cast<std::size_t>(classes + column)] = bad;
        auto const r = run<T>(p);
        CHECK(std::isnan(r.loss));
        CHECK(std::isnan(r.row_loss[1]));
        CHECK(std::isfinite(r.row_loss[0]));
        CHECK(std::isfinite(r.row_loss[2]));
        p.target[1] = -1;  // an ignored row may hold anything
        CHECK(std::isfinite(run<T>(p).loss));
      }
  auto p = random_problem(1, 20);
  p.logits.assign(20, -infinity);
  CHECK(std::isnan(run<T>(p).loss));
}
TEST_CASE("cross_entropy: ignored rows add nothing and get no gradient") {
  auto p = random_problem(40, 50);
  for (std::size_t i = 0; i < 40; i += 3) p.target[i] = -100;
  auto const expected = reference(p), actual = run<float>(p);
  test::check_close(actual.row_loss, expected.row_loss, test::tolerance<float>(8), "row_loss");
  CHECK(actual.row_loss[3] == 0);
  CHECK(actual.lse[3] == 0);
  auto const d = run_backward<float>(p, 1.0);
  for (std::size_t j = 0; j < 50; ++j) CHECK(d[3 * 50 + j] == 0);
  test::check_close(d, reference_backward(p, 1.0), 1e-6, "d_logits");
}
TEST_CASE("cross_entropy: the loss of many rows and of many classes is exact to float's last digit") {
  for (auto const& p : {random_problem(20000, 3), random_problem(2000, 40), random_problem(3, 300000)}) {
    auto q = p;
    q.logits = test::rounded<float>(q.logits);
    auto const expected = reference(q), actual = run<float>(q);
    CHECK(std::abs(actual.loss - expected.loss) < 2 * test::unit_roundoff<float>() * expected.loss);
    test::check_close_at_scale(actual.row_loss, expected.row_loss, 1, 3 * test::unit_roundoff<float>(), "row_loss");
  }
}
TEST_CASE_TEMPLATE("cross_entropy: the same bits in every run, for any number of threads", P, test_policy) {
  auto const p = random_problem(200, 77, 2.0);
  auto const one = run<float>(p);
  auto const gradient = run_backward<float>(p, 0.1);
  auto const check_again = [&](test_policy const& policy) {
    auto const again = run<float>(p, policy);
    CHECK(again.loss == one.loss);
    test::check_equal(again.row_loss, one.row_loss, "row_loss");
    test::check_equal(again.lse, one.lse, "lse");
    test::check_equal(run_backward<float>(p, 0.1, policy), gradient, "d_logits");
  };
  check_again(make_policy());
  if constexpr (requires(P any) { any.threads; })
    for (int threads : {1, 2, 5}) {
      P policy = make_policy();
      policy.threads = threads;
      check_again(policy);
    }
}
TEST_CASE("cross_entropy: takes strided rows, writes the gradient over the logits") {
  auto p = random_problem(6, 21);
  test::values wide;
  for (std::int64_t i = 0; i < 6; ++i) {
    wide.insert(wide.end(), p.logits.begin() + i * 21, p.logits.begin() + (i + 1) * 21);
    wide.insert(wide.end(), {7, 7});
  }
  auto const padded = test::upload<float>(wide, 6, 23);
  auto const logits = padded.columns(0, 21);
  auto const target = test::upload<std::int32_t>(p.target, 6);
  auto const loss = test::poisoned<float>(1), lse = test::poisoned<float>(6);
  cross_entropy::forward(make_policy(), {.logits = logits, .target = target}, {.loss = loss, .lse = lse});
  auto const whole = run<float>(p);
  CHECK(test::download(loss)[0] == whole.loss);
  test::check_equal(test::download(lse), whole.lse, "lse");
  cross_entropy::backward(make_policy(), {.logits = logits, .target = target, .lse = lse, .scale = 0.5f}, logits);
  auto const after = test::download(padded), expected = run_backward<float>(p, 0.5);
  for (std::size_t i = 0; i < 6; ++i)
    for (std::size_t j = 0; j < 23; ++j) CHECK(after[i * 23 + j] == (j < 21 ? expected[i * 21 + j] : 7.0));
}
TEST_CASE("cross_entropy: on a device, a target beyond the classes makes its row NaN") {
  if (std::is_same_v<test::test_space, space::host>) return;  // there it is an error
  auto p = random_problem(4, 24);
  auto const whole = run<float>(p);
  auto const gradient = run_backward<float>(p, 1.0);
  p.target[2] = 24;
  auto const r = run<float>(p);
  auto const d = run_backward<float>(p, 1.0);
  CHECK(std::isnan(r.loss));
  for (std::size_t i = 0; i < 4; ++i) {
    if (i == 2)
      CHECK(std::isnan(r.row_loss[i]));
    else
      CHECK(r.row_loss[i] == whole.row_loss[i]);
    for (std::size_t j = i * 24; j < i * 24 + 24; ++j)
      if (i == 2)
        CHECK(std::isnan(d[j]));
      else
        CHECK(d[j] == gradient[j]);
  }
}
TEST_CASE("cross_entropy: scratch is exact") {
  using dry = device::dry<test_policy>;
  auto measure = arena<test::test_space>::measuring();
  auto const logits = zeros<float>(make_policy(), 600, 3), loss = zeros<float>(make_policy(), 1, 1);
  auto const target = zeros<std::int32_t>(make_policy(), 600);
  cross_entropy::forward<dry, float>(dry{&measure}, {.logits = logits, .target = target}, {.loss = loss.reshape(1)});
  CHECK(measure.peak() == cross_entropy::scratch_bytes<test::test_space>(600));
}
TEST_CASE("cross_entropy: shapes and targets that do not fit are named") {
  auto const logits = zeros<float>(make_policy(), 3, 4);
  auto const target = test::upload<std::int32_t>({0, 4, -1}, 3);
  auto const one = zeros<float>(make_policy(), 1), two = zeros<float>(make_policy(), 2);
  CHECK(test::message_of<shape_error>([&] {
          cross_entropy::forward<test_policy, float>(make_policy(), {.logits = logits, .target = target.slice(0, 2)},
                                                     {.loss = one});
        }) == "cross_entropy: target: got (2), expected (3)");
  CHECK(test::message_of<shape_error>([&] {
          cross_entropy::forward<test_policy, float>(make_policy(), {.logits = logits, .target = target},
                                                     {.loss = two});
        }) == "cross_entropy: loss: got (2), expected (1)");
  CHECK(test::message_of<shape_error>([&] {
          cross_entropy::backward(make_policy(), {.logits = logits, .target = target, .lse = two}, logits.as_view());
        }) == "cross_entropy.backward: lse: got (2), expected (3)");
  if constexpr (std::is_same_v<test::test_space, space::host>)  // elsewhere the target is not looked at by the host
    CHECK(test::message_of<value_error>([&] {
            cross_entropy::forward<test_policy, float>(make_policy(), {.logits = logits, .target = target},
                                                       {.loss = one});
          }) == "cross_entropy: target: position 1 holds 4, but there are 4 classes");
}
