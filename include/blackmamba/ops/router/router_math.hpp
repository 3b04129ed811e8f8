#pragma once
#include <blackmamba/core/math.hpp>

#include <cstdint>

// nvcc: with simd packs, these templates are host functions alone, as is meant; locals are auto because nvcc accepts
// no named vector type in a function that is also for the device.
#if BLACKMAMBA_CUDA
#pragma nv_diagnostic push
#pragma nv_diag_suppress 20011, 20013, 20014, 20015
#endif

/// The selection and its gates, for one row (T is float or double, on any device) or for a row in each lane (T is a
/// simd pack, on the host). `logit(j)` and `offset(j)` give the row's logit and the offset of expert j as T.
namespace blackmamba::math {

/// A selected expert: its number (a whole number kept as T), its score beta logit + offset, and its logit.
template <class T>
struct choice {
  T expert, score, logit;
};

/// What comes before the first choice.
BLACKMAMBA_HD_WHERE_DEFINED template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE choice<T> no_choice() {
  return {T(-1), T(INFINITY), T(0)};
}

/// The expert that follows `previous` in the order of descending scores, where of equal scores the lower number comes
/// first and a score that is not a number counts as -infinity. Starting from no_choice(), k <= experts calls give the
/// top k, all different.
BLACKMAMBA_HD_WHERE_DEFINED template <class T, class Logit, class Offset>
BLACKMAMBA_HD BLACKMAMBA_INLINE choice<T> next_choice(choice<T> previous, std::int64_t experts, T beta, Logit&& logit,
                                                      Offset&& offset) {
  auto best = previous;
  best.expert = T(-1);
  best.score = T(-INFINITY);
  for (std::int64_t j = 0; j < experts; ++j) {
    auto const x = logit(j);
    auto const raw = beta * x + offset(j);
    auto const score = select(raw == raw, raw, T(-INFINITY));
    auto const number = T(static_cast<float>(j));
    auto const follows = (score < previous.score) | ((score == previous.score) & (number > previous.expert));
    auto const better = follows & ((score > best.score) | (best.expert < T(0)));
    best.expert = select(better, number, best.expert);
    best.score = select(better, score, best.score);
    best.logit = select(better, x, best.logit);
  }
  return best;
}

/// Zero where every logit of the row is finite, else not a number.
BLACKMAMBA_HD_WHERE_DEFINED template <class T, class Logit>
BLACKMAMBA_HD BLACKMAMBA_INLINE T finite_test(std::int64_t experts, Logit&& logit) {
  auto test = T(0);
  for (std::int64_t j = 0; j < experts; ++j) test = test + logit(j) * T(0);
  return test;
}

/// The largest logit and the sum of e^(logit - largest): what a softmax over the row needs. Precondition: n > 0.
template <class T>
struct softmax_sums {
  T largest, sum;
};
BLACKMAMBA_HD_WHERE_DEFINED template <class T, class Logit>
BLACKMAMBA_HD BLACKMAMBA_INLINE softmax_sums<T> softmax_over(std::int64_t n, Logit&& logit) {
  auto largest = T(logit(0));
  for (std::int64_t j = 1; j < n; ++j) largest = max(largest, logit(j));
  auto sum = T(0);
  for (std::int64_t j = 0; j < n; ++j) sum = sum + exp(logit(j) - largest);
  return {largest, sum};
}

/// sign(mean load - load): 1, 0 or -1.
BLACKMAMBA_HD BLACKMAMBA_INLINE double load_direction(std::int64_t load, std::int64_t total, std::int64_t experts) {
  return load * experts < total ? 1.0 : load * experts > total ? -1.0 : 0.0;
}

}  // namespace blackmamba::math

#if BLACKMAMBA_CUDA
#pragma nv_diagnostic pop
#endif
