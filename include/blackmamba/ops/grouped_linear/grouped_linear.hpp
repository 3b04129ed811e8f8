#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>

#include <cstdint>
#include <type_traits>

namespace blackmamba {

/// One affine map for each group of rows, as the experts of a mixture need it. With o = offsets, rows o[e] <= r <
/// o[e+1] belong to group e (Gale et al., arXiv 2211.15841: grouped products instead of padding each group to a
/// capacity):
///
///   y[r,:] = weight[e] x[r,:] + bias[e]
///
/// offsets is non-decreasing from 0 and ends at most at R; groups may be empty. Rows past offsets[E] belong to no
/// group: they are neither read nor written. Arithmetic in accum_t<T>; y is stored as T or as accum_t<T>. Rows of every
/// matrix may be strided. Bitwise repeatable, independent of the number of threads. Asynchronous on cuda: the offsets
/// stay on the device.
struct grouped_linear {
  template <device_policy P, storage T>
  struct inputs {
    in<P, T, dyn, dyn> x;                   // (R, I)
    in<P, T, dyn, dyn, dyn> weight;         // (E, O, I)
    in<P, std::int64_t, dyn> offsets;       // (E + 1)
    in<P, accum_t<T>, dyn, dyn> bias = {};  // (E, O)  optional
  };
  /// y (R, O) must not overlap the inputs.
  template <device_policy P, storage Y, storage T = Y>
  static void forward(P const& policy, std::type_identity_t<inputs<home<P>, T>> const& in, out<P, Y, dyn, dyn> y) {
    check_result_type<Y, T>();
    auto const rows = y.extent(0), outputs = y.extent(1), groups = in.weight.extent(0);
    check_shape("grouped_linear", "x", in.x, {rows, -1});
    check_shape("grouped_linear", "weight", in.weight, {-1, outputs, in.x.extent(1)});
    check_shape("grouped_linear", "offsets", in.offsets, {groups + 1});
    check_optional_shape("grouped_linear", "bias", in.bias, {groups, outputs});
    if (y.size() > 0) backend_of<grouped_linear, P>::forward(policy, in, y);
  }

  template <device_policy P, storage T, storage Y>
  struct gradient_inputs {
    in<P, T, dyn, dyn> x;              // (R, I)
    in<P, T, dyn, dyn, dyn> weight;    // (E, O, I)
    in<P, std::int64_t, dyn> offsets;  // (E + 1)
    in<P, Y, dyn, dyn> d_y;            // (R, O)
  };
  /// Each where wanted.
  template <device_policy P, storage T>
  struct gradients {
    out<P, T, dyn, dyn> d_x = {};                     // (R, I)     optional
    out<P, accum_t<T>, dyn, dyn, dyn> d_weight = {};  // (E, O, I)  optional
    out<P, accum_t<T>, dyn, dyn> d_bias = {};         // (E, O)     optional
  };
  /// d_x[r,:] = d_y[r,:] weight[e]                        d_x must not overlap d_y
  /// d_weight[e] += sum over the group's rows of d_y[r,:]^T x[r,:]
  /// d_bias[e] += sum over the group's rows of d_y[r,:]
  /// The gradients of an empty group's parameters are left as they are.
  /// T is float unless named, and Y is T: backward<Policy, T, Y>(...).
  template <device_policy P, storage T = float, storage Y = T>
  static void backward(P const& policy, std::type_identity_t<gradient_inputs<home<P>, T, Y>> const& in,
                       std::type_identity_t<gradients<home<P>, T>> const& d) {
    check_result_type<Y, T>();
    auto const rows = in.d_y.extent(0), outputs = in.d_y.extent(1);
    auto const groups = in.weight.extent(0), width = in.weight.extent(2);
    check_shape("grouped_linear.backward", "weight", in.weight, {-1, outputs, -1});
    check_shape("grouped_linear.backward", "x", in.x, {rows, width});
    check_shape("grouped_linear.backward", "offsets", in.offsets, {groups + 1});
    check_optional_shape("grouped_linear.backward", "d_x", d.d_x, {rows, width});
    check_optional_shape("grouped_linear.backward", "d_weight", d.d_weight, {groups, outputs, width});
    check_optional_shape("grouped_linear.backward", "d_bias", d.d_bias, {groups, outputs});
    if (rows > 0) backend_of<grouped_linear, P>::backward(policy, in, d);
  }

 private:
  template <class Y, class T>
  static constexpr void check_result_type() {
    static_assert(
        std::is_same_v<Y, T> || std::is_same_v<Y, accum_t<T>>,
        "blackmamba: grouped_linear: y is stored neither as the operands' type nor as its accumulation type; name "
        "the operands' type: grouped_linear::forward<Policy, Y, T>(...), grouped_linear::backward<Policy, T, Y>(...)");
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/grouped_linear/grouped_linear_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/grouped_linear/grouped_linear_cuda.cuh>
#endif
