#pragma once
#include <blackmamba/core/memory.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/random.hpp>
#include <blackmamba/core/tensor.hpp>
#include <blackmamba/core/workspace.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

/// What every operator test needs: values in and out of the policy's memory, comparisons, central differences.
namespace test {

using values = std::vector<double>;
using test_space = test_policy::memory_space;

/// The environment's BLACKMAMBA_TEST_GUARD (own_memory or band) guards the workspaces of the whole program.
inline bool const workspaces_guarded = [] {
  char const* const guard = std::getenv("BLACKMAMBA_TEST_GUARD");
  if (guard == nullptr) return false;
  bool const band = std::strcmp(guard, "band") == 0;
  if (!band && std::strcmp(guard, "own_memory") != 0) {
    std::fprintf(stderr, "BLACKMAMBA_TEST_GUARD is \"%s\"; expected own_memory or band\n", guard);
    std::exit(1);
  }
  blackmamba::guard_workspaces = band ? blackmamba::workspace_guard::band : blackmamba::workspace_guard::own_memory;
  return true;
}();

/// n numbers, normal with the given spread, the same for the same seed everywhere.
inline values random_normal(std::int64_t n, std::uint64_t seed, double spread = 1.0) {
  blackmamba::philox const random(seed, 7);
  values v(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = spread * random.normal(i);
  return v;
}
inline values random_uniform(std::int64_t n, std::uint64_t seed, double low, double high) {
  blackmamba::philox const random(seed, 8);
  values v(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = low + (high - low) * static_cast<double>(random.uniform(i));
  return v;
}
/// A whole number in [low, high].
inline std::int64_t random_integer(std::uint64_t seed, std::uint64_t i, std::int64_t low, std::int64_t high) {
  return low +
         static_cast<std::int64_t>(blackmamba::philox(seed, 9).bits(i) % static_cast<std::uint64_t>(high - low + 1));
}

/// The environment's BLACKMAMBA_TEST_TRIALS_PERCENT, 1 to 100: for tools under which a program runs many times longer.
inline std::uint64_t trials_percent() {
  char const* const percent = std::getenv("BLACKMAMBA_TEST_TRIALS_PERCENT");
  if (percent == nullptr) return 100;
  int const share = std::atoi(percent);
  bool const valid = share >= 1 && share <= 100;
  REQUIRE_MESSAGE(valid, "BLACKMAMBA_TEST_TRIALS_PERCENT is \"" << percent << "\"; expected 1 to 100");
  return static_cast<std::uint64_t>(share);
}
/// How many of a test's random problems or equal steps this run goes through: all of them, or the share asked for.
inline std::uint64_t trials(std::uint64_t all) { return (all * trials_percent() + 99) / 100; }
/// The sizes of a loop: all of them; of four and more the first, the middle one and the last where less than a tenth of
/// the problems is asked for.
template <class T>
std::vector<T> sizes(std::vector<T> const& all) {
  if (trials_percent() >= 10 || all.size() < 4) return all;
  return {all.front(), all[all.size() / 2], all.back()};
}
template <class T>
std::vector<T> sizes(std::initializer_list<T> all) {
  return sizes(std::vector<T>(all));
}

/// The values as T in the policy's memory.
template <class T, class... Ints>
auto upload(values const& v, Ints... extents) {
  blackmamba::tensor<blackmamba::space::host, T, blackmamba::dyn> host(static_cast<std::int64_t>(v.size()));
  for (std::size_t i = 0; i < v.size(); ++i) {
    if constexpr (blackmamba::storage<T>)
      host.data()[i] = blackmamba::convert<T>(v[i]);
    else
      host.data()[i] = static_cast<T>(v[i]);
  }
  blackmamba::tensor<test_space, T, (static_cast<void>(extents), blackmamba::dyn)...> t(extents...);
  REQUIRE(t.size() == host.size());
  blackmamba::memory::upload(make_policy(), host.as_view(), t.as_view());
  return t;
}
/// As upload, rounded to T and back: what the operator really sees.
template <class T>
values rounded(values v) {
  for (auto& x : v) x = static_cast<double>(blackmamba::widen(blackmamba::convert<T>(x)));
  return v;
}
/// A tensor whose every byte is set: an operator that leaves a part of its output unwritten shows NaNs.
template <class T, class... Ints>
auto poisoned(Ints... extents) {
  blackmamba::tensor<blackmamba::space::host, T, blackmamba::dyn> host((std::int64_t{1} * ... * extents));
  std::memset(static_cast<void*>(host.data()), 0xff, sizeof(T) * static_cast<std::size_t>(host.size()));
  blackmamba::tensor<test_space, T, (static_cast<void>(extents), blackmamba::dyn)...> t(extents...);
  blackmamba::memory::upload(make_policy(), host.as_view(), t.as_view());
  return t;
}
/// The view's elements as doubles, row-major. Contiguous views only.
template <class View>
values download(View const& view) {
  using T = typename View::value_type;
  blackmamba::tensor<blackmamba::space::host, T, blackmamba::dyn> host(view.size());
  if (view.size() > 0)
    blackmamba::memory::download(make_policy(), view.template reshape<std::int64_t>(view.size()), host.as_view());
  values v(static_cast<std::size_t>(view.size()));
  for (std::size_t i = 0; i < v.size(); ++i) {
    if constexpr (blackmamba::storage<T>)
      v[i] = static_cast<double>(blackmamba::widen(host.data()[i]));
    else
      v[i] = static_cast<double>(host.data()[i]);
  }
  return v;
}

/// Largest relative rounding error of a storage type: 2^-24 for float, 2^-53, 2^-8, 2^-11.
template <class T>
constexpr double unit_roundoff() {
  if constexpr (std::is_same_v<T, double>) return 0x1p-53;
  if constexpr (std::is_same_v<T, blackmamba::bfloat16>) return 0x1p-8;
  if constexpr (std::is_same_v<T, blackmamba::half>) return 0x1p-11;
  return 0x1p-24;
}
/// Bound for a result stored as T that sums `terms` products in accum_t<T>.
template <class T>
constexpr double tolerance(std::int64_t terms = 1) {
  return unit_roundoff<T>() +
         4.0 * std::sqrt(static_cast<double>(terms) + 1.0) * unit_roundoff<blackmamba::accum_t<T>>();
}

/// Requires |actual - expected| <= tolerance * max(scale, |expected|) everywhere, where scale is the largest |expected|
/// times `floor`. NaN fails.
inline void check_close(values const& actual, values const& expected, double tolerance, std::string const& what = "",
                        double floor = 1.0) {
  REQUIRE_MESSAGE(actual.size() == expected.size(), what);
  double scale = 0;
  for (double e : expected) scale = std::max(scale, std::abs(e));
  double worst = 0;
  std::size_t at = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    double const error = std::abs(actual[i] - expected[i]) / std::max({std::abs(expected[i]), floor * scale, 1e-300});
    if (!(error <= worst)) {  // also true for NaN
      worst = error;
      at = i;
      if (std::isnan(error)) break;
    }
  }
  CHECK_MESSAGE(worst <= tolerance, what << ": element " << at << " is " << (actual.empty() ? 0 : actual[at])
                                         << ", expected " << (expected.empty() ? 0 : expected[at])
                                         << ", relative error " << worst << " above " << tolerance);
}
/// As check_close, relative to each element itself: for results in which nothing cancels.
inline void check_close_each(values const& actual, values const& expected, double tolerance,
                             std::string const& what = "") {
  check_close(actual, expected, tolerance, what, 0.0);
}
/// As check_close, for results that are differences of numbers as large as `scale` and carry the rounding of those.
inline void check_close_at_scale(values actual, values expected, double scale, double tolerance,
                                 std::string const& what) {
  actual.push_back(scale);
  expected.push_back(scale);
  check_close(actual, expected, tolerance, what);
}
inline void check_equal(values const& actual, values const& expected, std::string const& what = "") {
  REQUIRE_MESSAGE(actual.size() == expected.size(), what);
  auto const differs = std::mismatch(actual.begin(), actual.end(), expected.begin());
  bool const equal = differs.first == actual.end();
  REQUIRE_MESSAGE(equal, what << ": element " << differs.first - actual.begin() << " is "
                              << (equal ? 0 : *differs.first) << ", expected " << (equal ? 0 : *differs.second));
}

/// Checks d(loss)/d(x) against central differences of loss(x) in double: 4th-order stencil, every coordinate; of less
/// than all problems (trials) the same share of them, at least 8.
inline void check_gradient(std::function<double(values const&)> const& loss, values const& x, values const& gradient,
                           std::string const& what, double tolerance = 1e-7, double step = 1e-3) {
  REQUIRE_MESSAGE(gradient.size() == x.size(), what);
  auto const chosen = std::min<std::size_t>(x.size(), std::max<std::uint64_t>(8, trials(x.size())));
  values numeric(chosen);
  values analytic(chosen);
  values moved = x;
  for (std::size_t k = 0; k < chosen; ++k) {
    std::size_t const i = k * x.size() / chosen;
    auto const at = [&](double offset) {
      moved[i] = x[i] + offset;
      return loss(moved);
    };
    numeric[k] = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step);
    analytic[k] = gradient[i];
    moved[i] = x[i];
  }
  check_close(analytic, numeric, tolerance, what);
}
/// The scalar whose gradient with respect to y is `weights`: turns any output into a loss.
inline double weighted_sum(values const& y, values const& weights) {
  double s = 0;
  for (std::size_t i = 0; i < y.size(); ++i) s += y[i] * weights[i];
  return s;
}

/// The message of the exception of type E that f throws; fails the test if it throws none.
template <class E, class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (E const& e) {
    return e.what();
  }
  FAIL("expected an exception");
  return {};
}

}  // namespace test

/// Builds with sanitizers name fewer (cmake/policy_tests.cmake).
#ifndef STORAGE_TYPES
#define STORAGE_TYPES float, double, blackmamba::bfloat16, blackmamba::half
#endif
