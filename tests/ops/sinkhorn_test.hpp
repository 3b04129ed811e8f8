#include "support/support.hpp"
#include "support/thread_counts.hpp"

#include <blackmamba/ops/router/router.hpp>
#include <blackmamba/ops/sinkhorn/sinkhorn.hpp>
#include <blackmamba/ops/sinkhorn/sinkhorn_math.hpp>

#include <algorithm>
#include <numeric>

using namespace blackmamba;

namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }
constexpr double infinity = std::numeric_limits<double>::infinity();
using mode = sinkhorn::mode;

struct problem {
  std::int64_t rows, experts;
  test::values logits;
  sinkhorn::options options = {};
  test::values offset = {};  // empty: zeros
};
struct result {
  test::values offset, plan;
  sinkhorn::report report;
};

/// Normal logits, with a bias of its own for each expert.
problem normal(std::int64_t rows, std::int64_t experts, double spread, double bias, std::uint64_t seed = 1) {
  problem p{rows, experts, test::random_normal(rows * experts, seed, spread)};
  auto const b = test::random_normal(experts, seed + 100, bias);
  for (std::size_t i = 0; i < p.logits.size(); ++i) p.logits[i] += b[i % at(experts)];
  return p;
}
template <class A>
problem normal_in(std::int64_t rows, std::int64_t experts, double spread, double bias, std::uint64_t seed = 1) {
  auto p = normal(rows, experts, spread, bias, seed);
  p.logits = test::rounded<A>(p.logits);
  return p;
}

template <class A>
result run(problem const& p, test_policy policy = make_policy()) {
  auto const logits = test::upload<A>(p.logits, p.rows, p.experts);
  auto offset = test::upload<A>(p.offset.empty() ? test::values(at(p.experts)) : p.offset, p.experts);
  tensor<test::test_space, sinkhorn::report, dyn> report(1);
  auto plan = test::poisoned<A>(p.rows, p.experts);
  sinkhorn::forward(policy, logits, offset.as_view(), report, p.options, plan);
  tensor<space::host, sinkhorn::report, dyn> host(1);
  memory::download(policy, report.as_view(), host.as_view());
  return {test::download(offset), test::download(plan), host(0)};
}

bool votes(problem const& p, std::int64_t i) {
  auto const first = p.logits.begin() + i * p.experts;
  return std::all_of(first, first + p.experts, [](double x) { return std::isfinite(x); });
}
/// log c_j by definition, in double and in logarithms: nothing over- or underflows.
test::values log_marginals(problem const& p, test::values const& g) {
  test::values largest(at(p.experts), -infinity), sum(at(p.experts));
  double voters = 0;
  for (std::int64_t i = 0; i < p.rows; ++i) {
    if (!votes(p, i)) continue;
    voters += 1;
    auto const score = [&](std::int64_t j) { return p.options.beta * p.logits[at(i * p.experts + j)] + g[at(j)]; };
    double top = score(0), total = 0;
    for (std::int64_t j = 1; j < p.experts; ++j) top = std::max(top, score(j));
    for (std::int64_t j = 0; j < p.experts; ++j) total += std::exp(score(j) - top);
    for (std::int64_t j = 0; j < p.experts; ++j) {
      double const log_p = score(j) - top - std::log(total), m = std::max(largest[at(j)], log_p);
      sum[at(j)] = sum[at(j)] * std::exp(largest[at(j)] - m) + std::exp(log_p - m);
      largest[at(j)] = m;
    }
  }
  for (std::int64_t j = 0; j < p.experts; ++j) sum[at(j)] = largest[at(j)] + std::log(sum[at(j)]) - std::log(voters);
  return sum;
}
/// max_j |E c_j - 1|
double error_of(problem const& p, test::values const& g) {
  double error = 0;
  for (double c : log_marginals(p, g))
    error = std::max(error, std::abs(static_cast<double>(p.experts) * std::exp(c) - 1));
  return error;
}
void normalise(test::values& g) {
  double const largest = *std::max_element(g.begin(), g.end());
  for (auto& x : g) x -= largest;
}
/// So many fixed-point steps from zero.
test::values fixed_point(problem const& p, int steps) {
  test::values g(at(p.experts));
  for (int s = 0; s < steps; ++s) {
    auto const c = log_marginals(p, g);
    for (std::int64_t j = 0; j < p.experts; ++j) g[at(j)] -= std::log(static_cast<double>(p.experts)) + c[at(j)];
    normalise(g);
  }
  return g;
}

/// The published loop, plainly, in A. The plan is d1 K d0.
template <class A>
struct published {
  std::vector<A> d0, d1, k;
  int passes = 0;

  published(problem const& p, bool ones, double tolerance, int limit) {
    auto const rows = at(p.rows), experts = at(p.experts);
    for (double x : p.logits) k.push_back(std::exp(static_cast<A>(p.options.beta) * static_cast<A>(x)));
    d0.resize(rows);
    for (std::size_t j = 0; j < experts; ++j) {
      double sum = 0;
      for (std::size_t i = 0; i < rows; ++i) sum += static_cast<double>(k[i * experts + j]);
      d1.push_back(ones ? A(1) : A(1) / (static_cast<A>(experts) * static_cast<A>(sum)));
    }
    for (double moved = 1e9; moved > tolerance && passes < limit; ++passes) {
      for (std::size_t i = 0; i < rows; ++i) {
        A sum = 0;
        for (std::size_t j = 0; j < experts; ++j) sum += d1[j] * k[i * experts + j];
        d0[i] = A(1) / static_cast<A>(rows) / (sum + A(1e-8));
      }
      moved = 0;
      for (std::size_t j = 0; j < experts; ++j) {
        double sum = 0;
        for (std::size_t i = 0; i < rows; ++i) sum += static_cast<double>(d0[i] * k[i * experts + j]);
        A const next = A(1) / static_cast<A>(experts) / (static_cast<A>(sum) + A(1e-8));
        moved += static_cast<double>(std::abs(next - d1[j])) / static_cast<double>(experts);
        d1[j] = next;
      }
    }
  }
};

double peak_load(problem const& p, test::values const& offset) {
  auto expert = test::poisoned<std::int32_t>(p.rows, 1);
  auto gate = test::poisoned<float>(p.rows, 1);
  auto const logits = test::upload<float>(p.logits, p.rows, p.experts);
  auto const g = test::upload<float>(offset, p.experts);
  router::forward(make_policy(), {.logits = logits, .offset = g}, {.expert = expert, .gate = gate},
                  {.beta = p.options.beta});
  test::values count(at(p.experts));
  for (double e : test::download(expert)) count[static_cast<std::size_t>(e)] += 1;
  return *std::max_element(count.begin(), count.end()) * static_cast<double>(p.experts) / static_cast<double>(p.rows);
}

}  // namespace

TEST_CASE_TEMPLATE("sinkhorn: reaches the tolerance at every size and spread, and reports the error that it reached", A,
                   float, double) {
  for (std::int64_t rows : test::sizes({1, 2, 7, 8, 63, 64, 65, 1023, 1025, 2500}))
    for (std::int64_t experts : test::sizes({1, 2, 3, 8, 17, 64, 100})) {
      if (rows * experts > 80000) continue;
      for (double spread : {0.3, 1.0, 4.0}) {
        if (spread < 4 && test::trials_percent() < 10) continue;
        auto p = normal_in<A>(rows, experts, spread, spread);
        auto const r = run<A>(p);
        CAPTURE(rows);
        CAPTURE(experts);
        CAPTURE(spread);
        double const error = error_of(p, r.offset);
        CHECK(error <= 1e-3 + 1e-5);
        CHECK(std::abs(static_cast<double>(r.report.error) - error) <= 1e-5);
        CHECK(r.report.non_finite_rows == 0);
        CHECK(r.report.passes <= (experts <= sinkhorn::newton_experts ? 25 : 80));
        CHECK(*std::max_element(r.offset.begin(), r.offset.end()) == 0);
      }
    }
}

TEST_CASE("sinkhorn: few tokens with large logits, where fixed-point steps crawl") {
  for (std::int64_t rows : test::sizes({2, 3, 7, 31}))
    for (std::int64_t experts : {2, 8, 16})
      for (std::uint64_t seed = 1; seed <= test::trials(20); ++seed) {
        auto const p = normal_in<float>(rows, experts, 8, 8, seed);
        auto const r = run<float>(p);
        CHECK(r.report.passes <= 35);
        CHECK(error_of(p, r.offset) <= 1.05e-3);
      }
}

TEST_CASE("sinkhorn: the solution equals the definition's, iterated to the end in logarithms") {
  for (std::int64_t experts : {2, 5, 8}) {
    problem p = normal(150, experts, 1.5, 1);
    auto const expected = fixed_point(p, 400);
    for (bool newton : {false, true}) {
      p.options = {.tolerance = 1e-12, .newton = newton};
      auto const r = run<double>(p);
      test::check_close_each(r.offset, expected, 1e-10, "offset");
      CHECK(static_cast<double>(r.report.error) <= 1e-12);
    }
    p.options = {.tolerance = 1e-6};
    test::check_close_each(run<float>(p).offset, expected, 1e-5, "offset in float");
  }
}

TEST_CASE("sinkhorn: a number of passes fixed before is kept, and without Newton they are fixed-point steps") {
  problem p = normal(200, 8, 2, 2);
  for (int n : {1, 2, 5}) {
    p.options = {.fixed_passes = n, .newton = false};
    auto const r = run<double>(p);
    test::check_close_each(r.offset, fixed_point(p, n), 1e-12, "offset");
    CHECK(r.report.passes == n);
    CHECK(static_cast<double>(r.report.error) == doctest::Approx(error_of(p, r.offset)).epsilon(1e-5));
    p.options.newton = true;
    CHECK(run<float>(p).report.passes == n);
  }
  p.options = {.fixed_passes = 40};  // long converged: the passes are made all the same and do no harm
  auto const r = run<float>(p);
  CHECK(r.report.passes == 40);
  CHECK(static_cast<double>(r.report.error) < 1e-5);
  p.options = {.max_passes = 0};  // measures and changes nothing
  p.offset = {0, -1, 0, -2, 0, 0, 0, -1};
  auto const measured = run<double>(p);
  test::check_equal(measured.offset, p.offset);
  CHECK(measured.report.passes == 0);
  CHECK(static_cast<double>(measured.report.error) == doctest::Approx(error_of(p, p.offset)).epsilon(1e-5));
}

TEST_CASE("sinkhorn: the plan's rows sum to 1/M and its columns to 1/E") {
  for (std::int64_t rows : test::sizes({1, 5, 64, 1500}))
    for (std::int64_t experts : {1, 3, 8}) {
      problem p = normal(rows, experts, 2, 2);
      p.options.tolerance = 1e-10;
      auto const r = run<double>(p);
      test::values row(at(rows)), column(at(experts));
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < experts; ++j) {
          row[at(i)] += r.plan[at(i * experts + j)];
          column[at(j)] += r.plan[at(i * experts + j)];
        }
      test::check_close_each(row, test::values(at(rows), 1 / static_cast<double>(rows)), 1e-14, "rows");
      test::check_close_each(column, test::values(at(experts), 1 / static_cast<double>(experts)), 1e-10, "columns");
    }
}

TEST_CASE("sinkhorn: Newton steps spare passes") {
  for (std::int64_t rows : {2048, 16384}) {
    int const most[] = {5, 7, 12}, fixed_low[] = {7, 15, 30}, fixed_high[] = {10, 20, 45};
    for (int s = 0; s < 3; ++s) {
      auto p = normal_in<float>(rows, 8, 1 << s, 1 << s);
      CHECK(run<float>(p).report.passes <= most[s]);
      p.options.newton = false;
      auto const passes = run<float>(p).report.passes;
      CHECK(passes >= fixed_low[s]);
      CHECK(passes <= fixed_high[s]);
    }
  }
}

TEST_CASE("sinkhorn: constants added to rows change nothing at all, be they 1e4 or a single row's") {
  problem p = normal(700, 8, 4, 4);
  for (auto& x : p.logits) x = std::round(256 * x) / 256;  // exact in float, shifted by up to 16384
  auto const expected = run<float>(p).offset;
  auto const shifted = [&](auto shift) {
    problem q = p;
    for (std::int64_t i = 0; i < p.rows; ++i)
      for (std::int64_t j = 0; j < p.experts; ++j) q.logits[at(i * p.experts + j)] += shift(i);
    return run<float>(q);
  };
  for (double s : {1e4, -1e4, 44.5, -60.0})
    test::check_equal(shifted([&](std::int64_t) { return s; }).offset, expected, "all rows");
  test::check_equal(shifted([](std::int64_t i) { return static_cast<double>(i % 200 - 100) * 100; }).offset, expected,
                    "every row its own");
  for (double s : {20.0, 44.5, 1e4})
    test::check_equal(shifted([&](std::int64_t i) { return i == 350 ? s : 0; }).offset, expected, "one row");
}

TEST_CASE("sinkhorn: one logit far out, and experts that all rows shun by far, are no obstacle") {
  for (double far : {20.0, 44.5, 1e4, -1e4}) {
    auto p = normal_in<float>(700, 8, 1, 1);
    p.logits[8 * 350 + 3] = far;
    auto const r = run<float>(p);
    CHECK(error_of(p, r.offset) <= 1.01e-3);
    CHECK(r.report.passes <= 8);
  }
  for (double far : {30.0, 100.0, -1e4}) {
    problem p = normal(700, 8, 1, 1);
    for (std::int64_t i = 0; i < p.rows; ++i) p.logits[at(8 * i + 3)] += far;
    auto const r = run<double>(p);
    CHECK(error_of(p, r.offset) <= 1.01e-3);
    CHECK(r.report.passes <= 12);
    // In float the offset itself is only known to some units of rounding of its size.
    p.logits = test::rounded<float>(p.logits);
    CHECK(error_of(p, run<float>(p).offset) <= std::max(1.01e-3, 9 * 0x1p-23 * 2 * std::abs(far)));
  }
  problem extreme{3, 3, {3e38, 1, 0, -3e38, 3e38, 0, 0, 1, 2}};
  CHECK(static_cast<double>(run<float>(extreme).report.error) <= 1e-3);
}

TEST_CASE("sinkhorn: starts from the offset that comes in") {
  auto const p = normal_in<float>(4096, 8, 2, 2);
  problem next = p;
  next.offset = run<float>(p).offset;
  CHECK(run<float>(next).report.passes == 0);
  test::check_equal(run<float>(next).offset, next.offset);
  auto const drift = test::random_normal(p.rows * p.experts, 9, 0.05);
  for (std::size_t i = 0; i < drift.size(); ++i) next.logits[i] += drift[i] + 0.05 * static_cast<double>(i % 8);
  next.options.tolerance = 1e-2;
  auto const warm = run<float>(next);
  CHECK(warm.report.passes <= 2);
  CHECK(error_of(next, warm.offset) <= 1.01e-2);
  next.offset.clear();
  auto const cold = run<float>(next);
  CHECK(cold.report.passes > warm.report.passes);
  for (auto& g : next.offset = test::values(8, 3)) g += 0;  // a constant is no information
  test::check_equal(run<float>(next).offset, cold.offset);
  next.offset[5] = std::nan("");  // and what is not finite starts cold
  test::check_equal(run<float>(next).offset, cold.offset);
  next.offset = {0, -20, 5, -30, 0, 10, -10, 0};  // a start far off
  auto const far = run<float>(next);
  CHECK(error_of(next, far.offset) <= 1.01e-2);
}

TEST_CASE("sinkhorn: the selection is balanced afterwards") {
  for (double spread : {0.5, 1.0, 2.0}) {
    auto p = normal_in<float>(16384, 8, spread, spread);
    CHECK(peak_load(p, test::values(8)) > 1.5);
    CHECK(peak_load(p, run<float>(p).offset) <= 1.05);
  }
}

TEST_CASE("sinkhorn: rows whose sample misleads Newton's step do not keep it from the solution") {
  // Every eighth block of 4, 8, 16 or 32 rows belongs to one expert alone.
  for (std::int64_t block : test::sizes({4, 8, 16, 32})) {
    auto p = normal_in<float>(16384, 8, 1, 1);
    for (std::int64_t i = 0; i < p.rows; ++i)
      if (i / block % 8 == 0) p.logits[at(8 * i + i / block / 8 % 2)] += 30;
    auto const r = run<float>(p);
    CHECK(error_of(p, r.offset) <= 1.01e-3);
    CHECK(r.report.passes <= 40);
  }
}

TEST_CASE("sinkhorn: rows that are not finite have no vote, and are counted") {
  auto p = normal_in<float>(500, 8, 2, 2);
  problem without = p;
  without.logits.clear();
  for (std::int64_t i = 0; i < p.rows; ++i) {
    if (i % 50 == 7)
      p.logits[at(8 * i + i / 50 % 8)] = i % 3 == 0 ? std::nan("") : i % 3 == 1 ? infinity : -infinity;
    else
      without.logits.insert(without.logits.end(), p.logits.begin() + 8 * i, p.logits.begin() + 8 * i + 8);
  }
  without.rows = 490;
  for (auto m : {mode::sound, mode::reference, mode::ones}) {
    p.options = without.options = {.mode = m, .tolerance = m == mode::sound ? 1e-5 : 0, .max_passes = 20};
    auto const r = run<float>(p), expected = run<float>(without);
    test::check_close_each(r.offset, expected.offset, 1e-4, "offset");
    CHECK(r.report.non_finite_rows == 10);
    CHECK(r.report.passes == expected.report.passes);
    CHECK(std::abs(static_cast<double>(r.report.error) - error_of(p, r.offset)) < 1e-4);
    for (std::int64_t i = 0; i < p.rows; ++i)
      for (std::int64_t j = 0; j < 8 && i % 50 == 7; ++j) REQUIRE(r.plan[at(8 * i + j)] == 0);
    CHECK(std::accumulate(r.plan.begin(), r.plan.end(), 0.0) ==
          doctest::Approx(std::accumulate(expected.plan.begin(), expected.plan.end(), 0.0)).epsilon(1e-4));
  }
  for (std::int64_t rows : {0, 3}) {  // no vote at all
    problem const none{rows, 2, test::values(at(2 * rows), std::nan("")), {}, {0, -1}};
    auto const r = run<float>(none);
    test::check_equal(r.offset, {0, -1});
    CHECK(r.report.passes == 0);
    CHECK(r.report.non_finite_rows == rows);
    CHECK(r.report.error == 0);
    problem published = none;
    published.options.mode = mode::reference;
    test::check_equal(run<float>(published).offset, {0, 0});
    test::check_equal(run<float>(published).plan, test::values(at(2 * rows)));
  }
}

TEST_CASE_TEMPLATE("sinkhorn: reference and ones equal the published loop", A, float, double) {
  for (bool ones : {false, true})
    for (std::int64_t rows : test::sizes({1, 30, 1000, 2048}))
      for (double spread : {0.3, 1.0, 2.0})
        for (double beta : {1.0, 2.0}) {
          auto p = normal_in<A>(rows, 8, spread, spread);
          p.options = sinkhorn::options{.mode = ones ? mode::ones : mode::reference, .max_passes = 50, .beta = beta};
          published<A> const expected(p, ones, 1e-4, 50);
          auto const r = run<A>(p);
          CAPTURE(rows);
          CAPTURE(spread);
          CHECK(r.report.passes == expected.passes);
          test::values g, plan;
          for (A d : expected.d1) g.push_back(std::log(static_cast<double>(d)));
          normalise(g);
          for (std::size_t i = 0; i < expected.k.size(); ++i)
            plan.push_back(static_cast<double>(expected.d1[i % 8] * expected.k[i] * expected.d0[i / 8]));
          test::check_close_each(r.offset, g, 200 * test::unit_roundoff<A>(), "offset");
          test::check_close_each(r.plan, plan, 200 * test::unit_roundoff<A>(), "plan");
          CHECK(std::abs(static_cast<double>(r.report.error) - error_of(p, r.offset)) < 1e-5);
        }
}

TEST_CASE("sinkhorn: what the published stop rule leaves, and what the sound one does") {
  // With the published initial value the loop stops after one pass where tokens are many, whatever the balance is.
  double const least[] = {0.005, 0.05, 0.15};
  for (std::int64_t rows : {2048, 16384})
    for (int s = 0; s < 3; ++s) {
      auto p = normal_in<float>(rows, 8, 1 << s, 1 << s, 2);
      p.options.mode = mode::reference;
      auto const r = run<float>(p);
      CHECK(r.report.passes == 1);
      CHECK(static_cast<double>(r.report.error) > least[s]);
      auto const published_load = peak_load(p, r.offset);
      p.options.mode = mode::sound;
      auto const sound = run<float>(p);
      CHECK(static_cast<double>(sound.report.error) <= 1e-3);
      if (s == 2) CHECK(peak_load(p, sound.offset) < published_load);
    }
  // With ones, epsilon makes it crawl: the cap ends it where the spread is large or logits are shifted.
  auto p = normal_in<float>(2048, 8, 2, 2, 3);
  p.options = {.mode = mode::ones, .max_passes = 300};
  CHECK(run<float>(p).report.passes == 300);
  p = normal_in<float>(2048, 8, 1, 1, 3);
  p.options = {.mode = mode::ones, .max_passes = 300};
  CHECK(run<float>(p).report.passes <= 20);
  for (auto& x : p.logits) x -= 6;
  CHECK(run<float>(p).report.passes == 300);
  for (auto& x : p.logits) x += 6;
  // One row at +60 overflows: the published loop ends in numbers that are none, and sends every token to expert 0.
  for (std::int64_t j = 0; j < 8; ++j) p.logits[at(8 * 77 + j)] += 60;
  for (auto m : {mode::reference, mode::ones}) {
    p.options.mode = m;
    auto const broken = run<float>(p);
    CHECK(std::isinf(broken.report.error));
    CHECK(peak_load(p, broken.offset) == 8);
  }
  p.options.mode = mode::sound;
  CHECK(peak_load(p, run<float>(p).offset) < 1.1);
}

TEST_CASE("sinkhorn: the safeguard around Newton's step, its damping, and the equation that it solves") {
  using progress = math::sinkhorn_progress;
  using action = progress::action;
  progress p{1e-3, 100};
  CHECK(p.next(0.9) == action::fixed_point);
  CHECK(p.next(0.6) == action::fixed_point);
  CHECK(p.next(0.4) == action::newton);
  CHECK(p.reach == 2);
  CHECK(p.next(0.5) == action::fixed_point_from_saved);  // it did harm: taken back, and fully damped from now on
  CHECK(p.reach == 0);
  CHECK(p.next(0.3) == action::newton);
  CHECK(p.next(0.4) == action::newton);                  // damped steps may
  CHECK(p.next(4.1) == action::fixed_point_from_saved);  // but not tenfold
  CHECK(p.next(0.3) == action::fixed_point);             // no further trial before the error has halved
  CHECK(p.next(0.19) == action::newton);
  CHECK(p.next(std::nan("")) == action::fixed_point_from_saved);
  CHECK(p.next(9e-4) == action::stop);
  CHECK(p.passes == 10);
  progress stuck{1e-3, 100};
  CHECK(stuck.next(3) == action::fixed_point);
  CHECK(stuck.next(2.8) == action::newton);
  CHECK(stuck.reach == 0);
  progress capped{1e-3, 1};
  CHECK(capped.next(0.1) == action::newton);
  CHECK(capped.next(0.2) == action::stop_at_saved);
  progress plain{1e-3, 100, 0};
  CHECK(plain.next(0.1) == action::fixed_point);
  CHECK(plain.next(0.1) == action::fixed_point);

  double const far[] = {0, -3, 5};
  CHECK(math::sinkhorn_damping(3, far, 8) == 1);
  CHECK(math::sinkhorn_damping(3, far, 2) == doctest::Approx((2 + std::log(7)) / 8));
  for (std::int64_t n : test::sizes({1, 2, 5, 8})) {
    test::values s(at(n * n)), step = test::random_normal(n, 1);
    for (std::int64_t j = 0; j < n; ++j)
      for (std::int64_t k = 0; k < j; ++k) {
        auto const seed = static_cast<std::uint64_t>(j * n + k);
        s[at(j * n + k)] = s[at(k * n + j)] = test::random_uniform(1, seed, 0.01, 1)[0];
      }
    step.back() -= std::accumulate(step.begin(), step.end(), 0.0);
    auto const graph = s, b = step;
    REQUIRE(math::sinkhorn_newton_step(n, s.data(), step.data()));
    CHECK(step.back() == 0);
    test::values product(at(n));
    for (std::int64_t j = 0; j < n; ++j)
      for (std::int64_t k = 0; k < n; ++k)
        if (j != k) product[at(j)] += graph[at(j * n + k)] * (step[at(j)] - step[at(k)]);
    if (n > 1) test::check_close_each(product, b, 1e-12, "L d");
  }
  test::values apart = {0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0}, b = {0.1, 0.1, -0.1, -0.1};
  CHECK_FALSE(math::sinkhorn_newton_step(4, apart.data(), b.data()));
}

TEST_CASE("sinkhorn: the same bits in every run, for any number of threads") {
  for (std::int64_t experts : {8, 64}) {
    auto p = normal_in<float>(experts == 8 ? 20011 : 3001, experts, 2, 2);
    for (auto m : {mode::sound, mode::reference}) {
      p.options = {.mode = m, .tolerance = m == mode::sound ? 1e-5 : 0};
      auto const one = run<float>(p);
      test::each_thread_count({1, 2, 5}, [&](test_policy policy) {
        auto const again = run<float>(p, policy);
        test::check_equal(again.offset, one.offset, "offset");
        test::check_equal(again.plan, one.plan, "plan");
        CHECK(again.report.error == one.report.error);
      });
    }
  }
}

TEST_CASE("sinkhorn: hundreds of thousands of rows, odd numbers of them") {
  // 420000 rows are those whose last ones take 48 KB of shared memory on a device of 132 multiprocessors.
  for (auto const& shape : {std::pair{200003, 8}, std::pair{420000, 8}, std::pair{600003, 5}, std::pair{1200001, 8}}) {
    int const rows = shape.first, experts = shape.second;
    auto const p = normal_in<float>(rows, experts, 1, 1);
    auto const r = run<float>(p);
    CAPTURE(rows);
    CHECK(r.report.passes <= 7);
    double const error = error_of(p, r.offset);
    CHECK(error <= 1.01e-3);
    CHECK(std::abs(static_cast<double>(r.report.error) - error) <= 1e-5);
    for (std::int64_t i : {0, rows / 2, rows - 1}) {
      auto const row = r.plan.begin() + i * experts;
      CHECK(std::accumulate(row, row + experts, 0.0) * rows == doctest::Approx(1).epsilon(1e-5));
    }
    CHECK(std::accumulate(r.plan.begin(), r.plan.end(), 0.0) == doctest::Approx(1).epsilon(1e-5));
  }
}

TEST_CASE("sinkhorn: strided logits, the plan in place, scratch from the workspace") {
  for (auto m : {mode::sound, mode::reference}) {
    auto p = normal_in<float>(100, 5, 1, 1);
    p.options.mode = m;
    auto const expected = run<float>(p);
    test::values wide;
    for (std::int64_t i = 0; i < 100; ++i) {
      wide.insert(wide.end(), 3, std::nan(""));
      wide.insert(wide.end(), p.logits.begin() + 5 * i, p.logits.begin() + 5 * i + 5);
    }
    auto const logits = test::upload<float>(wide, 100, 8);
    auto offset = test::upload<float>(test::values(5), 5);
    tensor<test::test_space, sinkhorn::report, dyn> report(1);
    auto memory = arena<test::test_space>(sinkhorn::scratch_bytes<float>(100, 5));
    test_policy policy = make_policy();
    policy.workspace = &memory;
    sinkhorn::forward(policy, logits.columns(3, 5), offset.as_view(), report, p.options, logits.columns(3, 5));
    test::check_equal(test::download(offset), expected.offset, "offset");
    auto const after = test::download(logits);
    for (std::int64_t i = 0; i < 500; ++i) REQUIRE(after[at(i / 5 * 8 + 3 + i % 5)] == expected.plan[at(i)]);
    CHECK(memory.peak() == memory.capacity());
    tensor<space::host, sinkhorn::report, dyn> host(1);
    blackmamba::memory::download(policy, report.as_view(), host.as_view());
    CHECK(host(0).error == expected.report.error);

    auto measuring = arena<test::test_space>::measuring();
    device::dry<test_policy> dry{.workspace = &measuring};
    sinkhorn::forward(dry, logits.columns(3, 5), offset.as_view(), report);
    CHECK(measuring.peak() == memory.capacity());
  }
}

TEST_CASE("sinkhorn: arguments that disagree are named") {
  auto const logits = test::upload<float>(test::values(12), 3, 4);
  auto offset = test::poisoned<float>(5);
  auto right = test::poisoned<float>(4);
  tensor<test::test_space, sinkhorn::report, dyn> report(1);
  CHECK(test::message_of<shape_error>([&] { sinkhorn::forward(make_policy(), logits, offset.as_view(), report); }) ==
        "sinkhorn: offset: got (5), expected (4)");
  auto plan = test::poisoned<float>(4, 4);
  CHECK(test::message_of<shape_error>([&] {
          sinkhorn::forward(make_policy(), logits, right.as_view(), report, {}, plan);
        }) == "sinkhorn: plan: got (4, 4), expected (3, 4)");
  CHECK(test::message_of<value_error>([&] {
          sinkhorn::forward(make_policy(), logits, right.as_view(), report, {.max_passes = -1});
        }) == "sinkhorn: max_passes: got -1, expected 0 or more");
  for (double const beta : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()})
    CHECK(test::message_of<value_error>([&] {
            sinkhorn::forward(make_policy(), logits, right.as_view(), report, {.beta = beta});
          }) == "sinkhorn: beta: got " + std::to_string(beta) + ", expected a finite number");
}
