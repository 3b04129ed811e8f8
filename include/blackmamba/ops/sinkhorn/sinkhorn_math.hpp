#pragma once
#include <blackmamba/core/math.hpp>

#include <cstdint>

// nvcc: with simd packs, these templates are host functions alone, as is meant.
#if BLACKMAMBA_CUDA
#pragma nv_diagnostic push
#pragma nv_diag_suppress 20011, 20014
#endif

/// The Sinkhorn update, for one row or column (T is float or double, on any device) or one in each lane (T is a
/// pack).
namespace blackmamba::math {

/// The published loop's guard against division by zero.
inline constexpr double sinkhorn_epsilon = 1e-8;
/// Rows without a vote have K = 0 and hence the sum 0; this keeps their scale finite and leaves every other sum as it
/// is.
inline constexpr float sinkhorn_no_vote = 1.17549435e-38f;

/// Scale of a row (or, in the published loop, of a column) that gives it the wanted mass.
BLACKMAMBA_HD_WHERE_DEFINED template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE T sinkhorn_scale(T sum, T mass, T epsilon) {
  return mass / (sum + epsilon);
}
/// The column step g += log(1/E) - log(c), where c is the column's marginal.
BLACKMAMBA_HD BLACKMAMBA_INLINE double sinkhorn_column_step(double log_marginal, std::int64_t experts) {
  return -(log(static_cast<double>(experts)) + log_marginal);
}
/// |E c - 1|
BLACKMAMBA_HD BLACKMAMBA_INLINE double sinkhorn_error(double marginal, std::int64_t experts) {
  return abs(static_cast<double>(experts) * marginal - 1);
}

/// log of a sum of exponentials, without overflow or underflow.
struct log_sum {
  double largest = static_cast<double>(-INFINITY), sum = 0;  // the value is largest + log(sum)

  BLACKMAMBA_HD void add(double x) { merge({x, 1}); }
  BLACKMAMBA_HD void merge(log_sum other) {
    if (other.sum == 0) return;
    if (other.largest > largest) {
      sum = sum * exp(largest - other.largest) + other.sum;
      largest = other.largest;
    } else {
      sum += other.sum * exp(other.largest - largest);
    }
  }
  BLACKMAMBA_HD double value() const { return largest + log(sum); }
};

/// Solves the Newton equation  L d = b  with  L = diag(sum_k s_jk) - s, where s_jk = mean_i p_ij p_ik (j != k): the
/// Hessian of the concave dual  mean_j g_j - mean_i log sum_j e^(beta x_ij + g_j),  with its sign turned. L is the
/// Laplacian of a graph with positive weights: singular along the vector of ones, so d[n-1] = 0 and n-1 unknowns are
/// left. Eliminating one node after another needs no subtraction (Grassmann, Taksar and Heyman, 1985), so nothing
/// cancels.
///
/// @param s  (n, n) symmetric, the diagonal is not read; overwritten
/// @param d  in: b, with sum zero; out: the solution
/// Returns whether there is one: not where experts fall into groups that share no token.
BLACKMAMBA_HD inline bool sinkhorn_newton_step(std::int64_t n, double* s, double* d) {
  for (std::int64_t k = 0; k + 1 < n; ++k) {
    double degree = 0;
    for (std::int64_t j = k + 1; j < n; ++j) degree += s[k * n + j];
    if (!(degree > 1e-300)) return false;
    s[k * n + k] = degree;
    for (std::int64_t j = k + 1; j < n; ++j) {
      double const share = s[k * n + j] / degree;
      d[j] += share * d[k];
      for (std::int64_t i = j + 1; i < n; ++i) {
        s[j * n + i] += share * s[k * n + i];
      }
    }
  }
  if (n > 0) d[n - 1] = 0;
  for (std::int64_t k = n - 2; k >= 0; --k) {
    double sum = d[k];
    for (std::int64_t j = k + 1; j < n; ++j) sum += s[k * n + j] * d[j];
    d[k] = sum / s[k * n + k];
    if (!(abs(d[k]) < 1e300)) return false;
  }
  return true;
}

/// Part of Newton's step to take: all of it where offsets move by no more than `reach` against each other, and beyond
/// that reach + log(1 + range - reach) of the range. Third derivatives of a log-sum-exp are bounded by the range of a
/// step times its second derivatives (Bach, "Self-concordant analysis for logistic regression", 2010, section 2):
/// with reach 0 this is the damping at which Newton's method rises from any start.
template <class T>
BLACKMAMBA_HD T sinkhorn_damping(T range, T reach) {
  return range > reach ? (reach + log1p(range - reach)) / range : T(1);
}
/// The same for the step d of n offsets.
BLACKMAMBA_HD inline double sinkhorn_damping(std::int64_t n, double const* d, double reach) {
  double low = 0, high = 0;
  for (std::int64_t k = 0; k < n; ++k) {
    low = min(low, d[k]);
    high = max(high, d[k]);
  }
  return sinkhorn_damping(high - low, reach);
}

enum class sinkhorn_action { stop, stop_at_saved, fixed_point, fixed_point_from_saved, newton };

/// What the iteration does next, told from the error that a sweep has found.
///
/// Fixed-point steps lead from a cold start into the neighbourhood of the solution; Newton's step is tried once the
/// error is below 1/2 (further out it is no better). Where they get stuck, as they do with few tokens and large
/// logits, fully damped Newton steps take over, which rise from any start. A trial that does not reduce the error is
/// taken back, and the fixed-point step is made from where it started; from then on Newton's steps are fully damped.
/// Those may raise the error for a while (what they raise is the dual) but not tenfold: a trial that does is taken
/// back too, and the next one waits until the error has halved.
template <class T>
struct basic_sinkhorn_progress {
  using action = sinkhorn_action;

  T tolerance;              ///< stop at this error; negative: never
  std::int32_t limit;       ///< stop after so many steps
  T newton_below = T(0.5);  ///< Newton's step is tried below this error; 0: never
  T reach = T(2);           ///< see sinkhorn_damping; 0: fully damped
  std::int32_t passes = 0;
  T saved_error = T(INFINITY);  ///< of the offset that the trial started from
  T last_error = T(INFINITY);
  bool trial = false;

  BLACKMAMBA_HD action next(T error) {
    bool const worse = trial && !(error < (reach > 0 ? saved_error : 10 * saved_error));
    if (worse) refuse_newton();
    if (!worse && !trial && newton_below > 0 && error > T(0.9) * last_error) {
      reach = 0;
      newton_below = T(INFINITY);
    }
    trial = false;
    last_error = worse ? saved_error : error;
    if (passes >= limit || last_error <= tolerance) return worse ? action::stop_at_saved : action::stop;
    ++passes;
    if (worse) return action::fixed_point_from_saved;
    if (!(error < newton_below)) return action::fixed_point;
    trial = true;
    saved_error = error;
    return action::newton;
  }
  /// Newton's step did harm, or its equation has no solution.
  BLACKMAMBA_HD void refuse_newton() {
    trial = false;
    if (reach > 0)
      reach = 0;
    else
      newton_below = saved_error / 2;
  }
};
using sinkhorn_progress = basic_sinkhorn_progress<double>;

}  // namespace blackmamba::math

#if BLACKMAMBA_CUDA
#pragma nv_diagnostic pop
#endif
