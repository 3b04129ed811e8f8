#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace blackmamba {

/// The affine map of rows, weights stored as (outputs, inputs):
///
///   y[r,:] = weight x[r,:] + bias
///
/// Arithmetic in accum_t<T>; y is stored as T, or as accum_t<T> where the next operator wants the unrounded sums (the
/// router's and the vocabulary's logits). Rows of every matrix may be strided. Bitwise repeatable, independent of the
/// number of threads; the bits of a row may depend on how many rows there are. Asynchronous on cuda.
struct linear {
  template <device_policy P, storage T>
  struct inputs {
    in<P, T, dyn, dyn> x;              // (R, I)
    in<P, T, dyn, dyn> weight;         // (O, I)
    in<P, accum_t<T>, dyn> bias = {};  // (O)     optional
  };
  /// y (R, O) must not overlap the inputs. On a device, workspace_bytes(R, I, O) of scratch.
  template <device_policy P, storage Y, storage T = Y>
  static void forward(P const& policy, std::type_identity_t<inputs<home<P>, T>> const& in, out<P, Y, dyn, dyn> y) {
    check_result_type<Y, T>();
    auto const rows = y.extent(0), outputs = y.extent(1);
    check_shape("linear", "x", in.x, {rows, -1});
    check_shape("linear", "weight", in.weight, {outputs, in.x.extent(1)});
    check_optional_shape("linear", "bias", in.bias, {outputs});
    if (y.size() == 0) return;
    if constexpr (on_device<P>)
      with_workspace(policy, rows, in.x.extent(1), outputs,
                     [&](auto workspace) { backend_of<linear, P>::forward(policy, in, y, workspace); });
    else
      backend_of<linear, P>::forward(policy, in, y);
  }

  template <device_policy P, storage T, storage Y>
  struct gradient_inputs {
    in<P, T, dyn, dyn> x;       // (R, I)
    in<P, T, dyn, dyn> weight;  // (O, I)
    in<P, Y, dyn, dyn> d_y;     // (R, O)
  };
  /// Each where wanted.
  template <device_policy P, storage T>
  struct gradients {
    out<P, T, dyn, dyn> d_x = {};                // (R, I)  optional
    out<P, accum_t<T>, dyn, dyn> d_weight = {};  // (O, I)  optional
    out<P, accum_t<T>, dyn> d_bias = {};         // (O)     optional
    update d_x_update = update::overwrite;       // accumulate: x has other readers, whose gradients d_x holds already
  };
  /// d_x = d_y weight, or d_x += it        d_x must not overlap d_y
  /// d_weight += d_y^T x
  /// d_bias += sum over rows of d_y
  /// scratch_bytes<T, Space>(R, I, O) of scratch; on the host only where d_weight is wanted.
  /// T is float unless named, and Y is T: backward<Policy, T, Y>(...).
  template <device_policy P, storage T = float, storage Y = T>
  static void backward(P const& policy, std::type_identity_t<gradient_inputs<home<P>, T, Y>> const& in,
                       std::type_identity_t<gradients<home<P>, T>> const& d) {
    check_result_type<Y, T>();
    auto const rows = in.d_y.extent(0), outputs = in.d_y.extent(1), width = in.weight.extent(1);
    check_shape("linear.backward", "weight", in.weight, {outputs, -1});
    check_shape("linear.backward", "x", in.x, {rows, width});
    check_optional_shape("linear.backward", "d_x", d.d_x, {rows, width});
    check_optional_shape("linear.backward", "d_weight", d.d_weight, {outputs, width});
    check_optional_shape("linear.backward", "d_bias", d.d_bias, {outputs});
    if (rows == 0 || (outputs == 0 && d.d_x_update == update::accumulate)) return;
    if constexpr (on_device<P>) {
      with_workspace(policy, rows, width, outputs,
                     [&](auto workspace) { backend_of<linear, P>::backward(policy, in, d, workspace); });
    } else {
      bool const parts = d.d_weight.present();
      scratch<P> memory(policy, parts ? scratch_bytes<T>(rows, width, outputs) : 0);
      auto d_weight_parts =
          memory.template allocate<accum_t<T>>(parts ? d_weight_parts_apart(rows, width, outputs) : 0, outputs, width);
      backend_of<linear, P>::backward(policy, in, d, d_weight_parts);
    }
  }

  /// A small d_weight has too few elements to share among cores, but each is a sum over many rows: the rows are cut in
  /// parts of at least 512, as many as make 32 tasks of at most 128 x 240 elements. The first part is added to d_weight
  /// directly; this many others are summed apart, and added in order.
  static constexpr std::int64_t d_weight_parts_apart(std::int64_t rows, std::int64_t width, std::int64_t outputs) {
    std::int64_t const tiles = std::max<std::int64_t>(1, (outputs + 127) / 128 * ((width + 239) / 240));
    return std::max<std::int64_t>(1, std::min(rows / 512, 32 / tiles)) - 1;
  }
  /// On a device, products take what they need of a workspace of constant size; small ones need none.
  static constexpr std::size_t workspace_bytes(std::int64_t rows, std::int64_t width, std::int64_t outputs) {
    return static_cast<double>(rows) * static_cast<double>(width) * static_cast<double>(outputs) < 1e6
               ? std::size_t{0}
               : std::size_t{32} << 20;
  }
  template <storage T, class Space = space::host>
  static constexpr std::size_t scratch_bytes(std::int64_t rows, std::int64_t width, std::int64_t outputs) {
    if constexpr (!std::is_same_v<Space, space::host>) return scratch_sum(workspace_bytes(rows, width, outputs));
    return scratch_sum(sizeof(accum_t<T>) *
                       static_cast<std::size_t>(d_weight_parts_apart(rows, width, outputs) * outputs * width));
  }

 private:
  template <class P>
  static constexpr bool on_device = !std::is_same_v<typename P::memory_space, space::host>;

  /// f(workspace), without an allocation where none is needed.
  template <class P, class F>
  static void with_workspace(P const& policy, std::int64_t rows, std::int64_t width, std::int64_t outputs, F const& f) {
    std::size_t const bytes = workspace_bytes(rows, width, outputs);
    if (bytes == 0) return f(out<P, std::byte, dyn>{});
    scratch<P> memory(policy, bytes);
    f(memory.template allocate<std::byte>(bytes));
  }

  template <class Y, class T>
  static constexpr void check_result_type() {
    static_assert(
        std::is_same_v<Y, T> || std::is_same_v<Y, accum_t<T>>,
        "blackmamba: linear: y is stored neither as the operands' type nor as its accumulation type; name the "
        "operands' type: linear::forward<Policy, Y, T>(...), linear::backward<Policy, T, Y>(...)");
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/linear/linear_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/linear/linear_cuda.cuh>
#endif
