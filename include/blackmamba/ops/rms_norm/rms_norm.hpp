#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/row_blocks.hpp>
#include <blackmamba/core/workspace.hpp>

namespace blackmamba {

/// Root-mean-square normalisation with an optional fused residual add (Zhang and Sennrich, arXiv 1910.07467, eq. 4):
///
///   s[r,:] = x[r,:] + residual[r,:]                 (s = x without a residual)
///   y[r,:] = s[r,:] rstd[r] weight,  rstd[r] = 1 / sqrt(mean(s[r,:]^2) + eps)
///
/// Statistics and s in accum_t<T>. Bitwise repeatable, independent of the number of threads. Asynchronous on cuda.
struct rms_norm {
  template <device_policy P, storage T>
  struct inputs {
    in<P, T, dyn, dyn> x;                       // (R, D)
    in<P, accum_t<T>, dyn> weight;              // (D)
    in<P, accum_t<T>, dyn, dyn> residual = {};  // (R, D)  optional
    double eps = 1e-5;
  };
  /// What backward needs, where wanted.
  template <device_policy P, storage T>
  struct saved {
    out<P, accum_t<T>, dyn, dyn> sum = {};  // (R, D)  s; optional; may alias the residual
    out<P, accum_t<T>, dyn> rstd = {};      // (R)     optional
  };
  /// y (R, D) may alias x.
  template <device_policy P, storage T>
  static void forward(P const& policy, inputs<home<P>, T> const& in, out<P, T, dyn, dyn> y,
                      saved<home<P>, T> const& keep = {}) {
    auto const rows = y.extent(0), width = y.extent(1);
    check_shape("rms_norm", "x", in.x, {rows, width});
    check_shape("rms_norm", "weight", in.weight, {width});
    check_optional_shape("rms_norm", "residual", in.residual, {rows, width});
    check_optional_shape("rms_norm", "sum", keep.sum, {rows, width});
    check_optional_shape("rms_norm", "rstd", keep.rstd, {rows});
    if (y.size() > 0) backend_of<rms_norm, P>::forward(policy, in, y, keep);
  }

  /// S is the type that s is kept in: accum_t<T> with a residual, else T or accum_t<T>.
  template <device_policy P, storage T, storage S>
  struct gradient_inputs {
    in<P, S, dyn, dyn> sum;                       // (R, D)
    in<P, accum_t<T>, dyn> rstd;                  // (R)
    in<P, accum_t<T>, dyn> weight;                // (D)
    in<P, T, dyn, dyn> d_y;                       // (R, D)
    in<P, accum_t<T>, dyn, dyn> d_residual = {};  // (R, D)  optional: gradient that reaches s past the norm; is added
  };
  /// d_s = d_residual + rstd (weight d_y - s rstd^2 mean(s weight d_y))      may alias d_residual, or d_y where S is T
  /// d_weight += sum over rows of d_y s rstd
  /// scratch_bytes<T, memory space>(R, D) of scratch.
  /// S is deduced from d_s; T is float unless named: backward<Policy, T, S>(...).
  template <device_policy P, storage T = float, storage S = T>
  static void backward(P const& policy, std::type_identity_t<gradient_inputs<home<P>, T, S>> const& in,
                       out<P, S, dyn, dyn> d_s, std::type_identity_t<out<P, accum_t<T>, dyn>> d_weight) {
    auto const rows = d_s.extent(0), width = d_s.extent(1);
    check_shape("rms_norm.backward", "sum", in.sum, {rows, width});
    check_shape("rms_norm.backward", "rstd", in.rstd, {rows});
    check_shape("rms_norm.backward", "weight", in.weight, {width});
    check_shape("rms_norm.backward", "d_y", in.d_y, {rows, width});
    check_optional_shape("rms_norm.backward", "d_residual", in.d_residual, {rows, width});
    check_shape("rms_norm.backward", "d_weight", d_weight, {width});
    if (d_s.size() == 0) return;
    using space = typename P::memory_space;
    scratch<P> memory(policy, scratch_bytes<T, space>(rows, width));
    auto partial = memory.template allocate<accum_t<T>>(row_blocks<space>::count(rows), width);
    backend_of<rms_norm, P>::backward(policy, in, d_s, d_weight, partial);
  }

  template <storage T, class Space = space::host>
  static constexpr std::size_t scratch_bytes(std::int64_t rows, std::int64_t width) {
    return scratch_sum(sizeof(accum_t<T>) * static_cast<std::size_t>(row_blocks<Space>::count(rows) * width));
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/rms_norm/rms_norm_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/rms_norm/rms_norm_cuda.cuh>
#endif
