#pragma once
#include "support/support.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

/// Expected values that are sums, with what their error bound needs.
namespace test {

/// A sum in double that knows the size of its terms: where they cancel, the error is still theirs.
struct sum {
  double value = 0;
  double squares = 0;

  void add(double term) {
    value += term;
    squares += term * term;
  }
};
using sums = std::vector<sum>;

/// Requires |actual - expected| <= u_T |expected| + 4 sqrt(terms + 1) u_A ||terms|| for each element: the result is
/// rounded to T once, and the errors of the additions in A = accum_t<T> add up as a random walk does, four times as
/// wide. Below the normal numbers half rounds by half a spacing of its subnormals, 2^-25. NaN fails.
template <class T>
void check_sums(values const& actual, sums const& expected, std::int64_t terms, std::string const& what) {
  REQUIRE_MESSAGE(actual.size() == expected.size(), what);
  double const walk = 4 * std::sqrt(static_cast<double>(terms) + 1) * unit_roundoff<blackmamba::accum_t<T>>();
  double const least = std::is_same_v<T, blackmamba::half> ? 0x1p-25 : 0.0;
  double worst = 0;
  std::size_t at = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    double const rounding = std::max(unit_roundoff<T>() * std::abs(expected[i].value), least);
    double const bound = rounding + walk * std::sqrt(expected[i].squares);
    double const error = std::abs(actual[i] - expected[i].value) / (bound + 1e-300);
    if (!(error <= worst)) {
      worst = error;
      at = i;
      if (std::isnan(error)) break;
    }
  }
  CHECK_MESSAGE(worst <= 1, what << ": element " << at << " is " << (actual.empty() ? 0 : actual[at]) << ", expected "
                                 << (expected.empty() ? 0 : expected[at].value) << ", error " << worst
                                 << " times its bound");
}

/// The same where what is known of an element is its magnitude: what it would be if no terms cancelled; where none do,
/// `expected` itself. The bound is u_T |expected| + 4 sqrt(terms + 1) u_A |magnitude| + least.
template <class T>
void check_within(values const& actual, values const& expected, values const& magnitude, std::int64_t terms,
                  std::string const& what, double least = std::is_same_v<T, blackmamba::half> ? 0x1p-25 : 0.0) {
  REQUIRE_MESSAGE(actual.size() == expected.size(), what);
  REQUIRE_MESSAGE(magnitude.size() == expected.size(), what);
  double const walk = 4 * std::sqrt(static_cast<double>(terms) + 1) * unit_roundoff<blackmamba::accum_t<T>>();
  for (std::size_t i = 0; i < actual.size(); ++i) {
    double const bound = unit_roundoff<T>() * std::abs(expected[i]) + walk * std::abs(magnitude[i]) + least;
    bool const within = std::abs(actual[i] - expected[i]) <= bound;
    if (!within) {
      FAIL_CHECK(what << ": element " << i << " is " << actual[i] << ", expected " << expected[i] << " within "
                      << bound);
      return;
    }
  }
}

}  // namespace test
