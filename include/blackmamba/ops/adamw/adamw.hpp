#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>

#include <array>
#include <cmath>
#include <span>
#include <string>

namespace blackmamba {

/// Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; Kingma and Ba, arXiv
/// 1412.6980), and clipping of the gradient by its norm. With eta = learning_rate learning_rate_scale and t = step:
///
///   g = gradient min(1, max_norm / norm)            (g = gradient where max_norm is 0)
///   m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
///   p = p - eta (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p)
///
/// One pass over memory, for all segments together: on cuda one launch. Parameters, gradients and moments in
/// accum_t<T>; the factors that depend on t are computed in double. Bitwise repeatable, independent of the number of
/// threads and of how parameters are divided into segments. Asynchronous on cuda: the norm stays on the device.
struct adamw {
  struct options {
    double learning_rate;   ///< finite, not negative; so are the segments' factors of it and their decay
    double beta1 = 0.9;
    double beta2 = 0.95;
    double eps = 1e-8;
    std::int64_t step = 1;  ///< 1 for the first
    double max_norm = 0;    ///< 0: no clipping
  };
  /// Parameters that are treated alike: a tensor, or a part of one.
  template <device_policy P, storage T>
  struct segment {
    out<P, accum_t<T>, dyn> parameter;      // (n)  in and out
    in<P, accum_t<T>, dyn> gradient;        // (n)
    out<P, accum_t<T>, dyn> first_moment;   // (n)  in and out; zeros before the first step
    out<P, accum_t<T>, dyn> second_moment;  // (n)  in and out; zeros before the first step
    out<P, T, dyn> copy = {};               // (n)  optional: the new parameters, rounded to storage
    double weight_decay = 0;
    double learning_rate_scale = 1;

    /// Parameters [first, first + count) of these.
    segment slice(std::int64_t first, std::int64_t count) const {
      segment part = *this;
      part.parameter = parameter.slice(first, count);
      part.gradient = gradient.slice(first, count);
      part.first_moment = first_moment.slice(first, count);
      part.second_moment = second_moment.slice(first, count);
      if (copy.present()) part.copy = copy.slice(first, count);
      return part;
    }
  };
  /// What changes from step to step, as three numbers: eta, 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t). A step that is
  /// recorded once and replayed reads them from memory.
  static std::array<double, 3> schedule_of(options const& how) {
    double const t = static_cast<double>(how.step);
    return {how.learning_rate, 1 / (1 - std::pow(how.beta1, t)), 1 / std::sqrt(1 - std::pow(how.beta2, t))};
  }

  /// @param segments host memory; their tensors do not overlap, and any of them may be empty
  /// @param norm (1) the gradient's norm over everything that is clipped together; may be absent where max_norm is 0. A
  /// norm that is not finite leaves every tensor unchanged.
  /// @param schedule (3) optional: in place of options::learning_rate and options::step
  /// @throws value_error where an option is outside its domain
  template <device_policy P, storage T>
  static void step(P const& policy, std::span<segment<home<P>, T> const> segments, in<P, accum_t<T>, dyn> norm,
                   options const& how, in<P, double, dyn> schedule = {}) {
    bool empty = true;
    for (std::size_t i = 0; i < segments.size(); ++i) {
      auto const& s = segments[i];
      auto const n = s.parameter.extent(0);
      std::string const op = segments.size() == 1 ? "adamw" : "adamw: segment " + std::to_string(i);
      check_shape(op, "gradient", s.gradient, {n});
      check_shape(op, "first_moment", s.first_moment, {n});
      check_shape(op, "second_moment", s.second_moment, {n});
      check_optional_shape(op, "copy", s.copy, {n});
      check_value(not_negative(s.weight_decay), "weight_decay", s.weight_decay, "a finite number from 0", op);
      check_value(not_negative(s.learning_rate_scale), "learning_rate_scale", s.learning_rate_scale,
                  "a finite number from 0", op);
      empty = empty && n == 0;
    }
    check_optional_shape("adamw", "norm", norm, {1});
    check_optional_shape("adamw", "schedule", schedule, {3});
    check_that(norm.present() || how.max_norm == 0, "adamw", "norm", "no view", "a view, because max_norm is not 0");
    check_value(not_negative(how.learning_rate), "learning_rate", how.learning_rate, "a finite number from 0");
    check_value(how.step >= 1, "step", static_cast<double>(how.step), "at least 1");
    check_value(how.beta1 >= 0 && how.beta1 < 1, "beta1", how.beta1, "in [0, 1)");
    check_value(how.beta2 >= 0 && how.beta2 < 1, "beta2", how.beta2, "in [0, 1)");
    check_value(how.eps >= 0, "eps", how.eps, "not negative");
    check_value(how.max_norm >= 0, "max_norm", how.max_norm, "not negative");
    if (!empty) backend_of<adamw, P>::step(policy, segments, norm, how, schedule);
  }
  /// One segment. T is deduced where it is an object, and float where it stands in braces.
  template <device_policy P, storage T = float>
  static void step(P const& policy, segment<home<P>, T> const& all, in<P, accum_t<T>, dyn> norm, options const& how,
                   in<P, double, dyn> schedule = {}) {
    step<P, T>(policy, std::span<segment<home<P>, T> const>(&all, 1), norm, how, schedule);
  }

  /// norm (1) = sqrt(sum of gradient^2), summed in double over fixed blocks in a fixed order.
  /// scratch_bytes(n) of scratch.
  template <device_policy P, storage A>
  static void norm(P const& policy, in<P, A, dyn> gradient, out<P, A, dyn> norm) {
    check_shape("adamw.norm", "norm", norm, {1});
    scratch<P> memory(policy, scratch_bytes(gradient.extent(0)));
    auto partial = memory.template allocate<double>(partial_count(gradient.extent(0)));
    backend_of<adamw, P>::norm(policy, gradient, norm, partial);
  }

  static constexpr std::int64_t values_per_partial = 16384;
  static constexpr std::int64_t partial_count(std::int64_t n) {
    return (n + values_per_partial - 1) / values_per_partial;
  }
  static constexpr std::size_t scratch_bytes(std::int64_t n) {
    return scratch_sum(sizeof(double) * static_cast<std::size_t>(partial_count(n)));
  }

 private:
  static bool not_negative(double x) { return std::isfinite(x) && x >= 0; }
  static void check_value(bool good, char const* name, double value, char const* domain,
                          std::string const& op = "adamw") {
    if (!good) throw value_error(op + ": " + name + ": got " + std::to_string(value) + ", expected " + domain);
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/adamw/adamw_cpu.hpp>

#if BLACKMAMBA_CUDA
#include <blackmamba/ops/adamw/adamw_cuda.cuh>
#endif
