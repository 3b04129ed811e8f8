#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>

namespace blackmamba {

/// Cross entropy of a softmax with integer targets, fused:
///
///   lse[r] = log(sum_j exp(logits[r,j]))
///   loss   = sum over rows of lse[r] - logits[r, target[r]]
///
/// A row with a negative target is ignored: it adds nothing, whatever its logits hold. Rows are shifted by their
/// largest logit, so logits of any finite size do. A logit of -inf is a probability of zero. A NaN, a logit of +inf, or
/// a row of nothing but -inf makes the row's loss, and with it the loss, NaN. Sums over rows and over long rows are
/// carried in double. Bitwise repeatable, independent of the number of threads. Asynchronous on cuda.
struct cross_entropy {
  template <device_policy P, storage T>
  struct inputs {
    in<P, T, dyn, dyn> logits;        // (R, V)
    in<P, std::int32_t, dyn> target;  // (R)     in [0, V), or negative: ignored
  };
  template <device_policy P, storage T>
  struct results {
    out<P, accum_t<T>, dyn> loss;           // (1)  overwritten
    out<P, accum_t<T>, dyn> row_loss = {};  // (R)  optional; 0 for ignored rows
    out<P, accum_t<T>, dyn> lse = {};       // (R)  optional; 0 for ignored rows; backward needs it
  };
  /// scratch_bytes<memory space>(R) of scratch.
  /// @throws value_error (cpu) naming position, value and classes where a target is at least V; nothing is then
  /// written. On cuda loss and lse of such a row are NaN.
  /// T is deduced where in or out is an object, and float where both stand in braces.
  template <device_policy P, storage T = float>
  static void forward(P const& policy, inputs<home<P>, T> const& in, results<home<P>, T> const& out) {
    auto const rows = in.logits.extent(0);
    check_shape("cross_entropy", "target", in.target, {rows});
    check_shape("cross_entropy", "loss", out.loss, {1});
    check_optional_shape("cross_entropy", "row_loss", out.row_loss, {rows});
    check_optional_shape("cross_entropy", "lse", out.lse, {rows});
    using space = typename P::memory_space;
    scratch<P> memory(policy, scratch_bytes<space>(rows));
    auto partial = memory.template allocate<double>(partial_rows<space>(rows));
    backend_of<cross_entropy, P>::forward(policy, in, out, partial);
  }

  template <device_policy P, storage T>
  struct gradient_inputs {
    in<P, T, dyn, dyn> logits;        // (R, V)
    in<P, std::int32_t, dyn> target;  // (R)
    in<P, accum_t<T>, dyn> lse;       // (R)     of forward
    accum_t<T> scale = 1;             // the gradient of what is minimised with respect to the loss: 1 / rows for a mean
  };
  /// d_logits[r,j] = scale (exp(logits[r,j] - lse[r]) - [j = target[r]]); 0 for ignored rows.
  /// d_logits (R, V) may alias logits. No scratch.
  template <device_policy P, storage T>
  static void backward(P const& policy, std::type_identity_t<gradient_inputs<home<P>, T>> const& in,
                       out<P, T, dyn, dyn> d_logits) {
    auto const rows = d_logits.extent(0), classes = d_logits.extent(1);
    check_shape("cross_entropy.backward", "logits", in.logits, {rows, classes});
    check_shape("cross_entropy.backward", "target", in.target, {rows});
    check_shape("cross_entropy.backward", "lse", in.lse, {rows});
    if (d_logits.size() > 0) backend_of<cross_entropy, P>::backward(policy, in, d_logits);
  }

  /// The loss is summed over blocks of this many rows, then over blocks, in order. On a device, over as many rows as a
  /// block of threads has, one or more.
  static constexpr std::int64_t rows_per_partial = 16;
  template <class Space = space::host>
  static constexpr std::int64_t partial_rows(std::int64_t rows) {
    return std::is_same_v<Space, space::host> ? (rows + rows_per_partial - 1) / rows_per_partial : rows;
  }
  template <class Space = space::host>
  static constexpr std::size_t scratch_bytes(std::int64_t rows) {
    return scratch_sum(sizeof(double) * static_cast<std::size_t>(partial_rows<Space>(rows)));
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/cross_entropy/cross_entropy_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/cross_entropy/cross_entropy_cuda.cuh>
#endif
