#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>
#include <blackmamba/ops/expert_dispatch/expert_dispatch.hpp>
#include <blackmamba/ops/gated_activation/hidden_activation.hpp>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace blackmamba {

/// A layer of routed experts, from tokens to tokens, with a plan of expert_dispatch. Row r of the plan holds a choice
/// of token t = source[r] / k and belongs to expert e:
///
///   permuted[r,:]  = x[t,:]
///   h[r,:]         = fc1[e] permuted[r,:] + fc1_bias[e]
///   activated[r,:] = act(h[r,:F]) h[r,F:]      with a gated activation, gates first; else act(h[r,:])
///   rows[r,:]      = fc2[e] activated[r,:] + fc2_bias[e]
///   y[t,:]         = sum over a of gate[t,a] rows[row[t k + a],:]   over the slots that have a row; 0 where none has
///
/// (BlackMamba, arXiv 2402.01771, section 3.) Each line rounds to T, whether or not what it makes is ever stored: the
/// devices fuse what they can. Rows from offsets[E] on are free. Activation: a hidden_activation. Bitwise repeatable,
/// independent of the number of threads. Asynchronous on cuda; there, the order of the products' sums depends on the
/// number of tokens, and on a Hopper up to 4 tokens with k = 1, T of 16 bits and a gated activation have another order
/// with nothing kept than with something kept: such results agree to rounding.
struct expert_mlp {
  template <device_policy P, storage T>
  struct inputs {
    in<P, T, dyn, dyn> x;                       // (M, H)
    in<P, accum_t<T>, dyn, dyn> gate;           // (M, k)
    expert_dispatch::routing<P> plan;           // of M k slots for E experts
    in<P, T, dyn, dyn, dyn> fc1;                // (E, D, H)  D is 2 F where the activation is gated, else F
    in<P, T, dyn, dyn, dyn> fc2;                // (E, H, F)
    in<P, accum_t<T>, dyn, dyn> fc1_bias = {};  // (E, D)     optional
    in<P, accum_t<T>, dyn, dyn> fc2_bias = {};  // (E, H)     optional
  };
  /// What backward needs, each (M k, ...). In inference it is not wanted, and not all of it is ever made.
  template <device_policy P, storage T>
  struct kept {
    out<P, T, dyn, dyn> permuted = {};   // (M k, H)  each optional
    out<P, T, dyn, dyn> h = {};          // (M k, D)
    out<P, T, dyn, dyn> activated = {};  // (M k, F)
    out<P, T, dyn, dyn> rows = {};       // (M k, H)
  };
  /// y (M, H); no aliasing. scratch_bytes of scratch for what is not kept.
  template <class Activation, device_policy P, storage T>
  static void forward(P const& policy, std::type_identity_t<inputs<home<P>, T>> const& in, out<P, T, dyn, dyn> y,
                      std::type_identity_t<kept<home<P>, T>> keep = {}) {
    auto const tokens = y.extent(0), width = y.extent(1);
    check_inputs<Activation>("expert_mlp", in, tokens, width);
    auto const slots = in.plan.row.extent(0), hidden = in.fc1.extent(1), inner = in.fc2.extent(2);
    check_kept("expert_mlp", keep, slots, width, hidden, inner);
    if (y.size() == 0) return;
    scratch<P> memory(policy, scratch_bytes<Activation, P, T>(slots, width, inner));
    bool const wants_rows = keep.rows.present();
    bool const wants_nothing = !wants_rows && !keep.h.present() && !keep.permuted.present();
    if (!keep.h.present() && makes_h<Activation, P, T>()) keep.h = memory.template allocate<T>(slots, hidden);
    if (!keep.activated.present()) keep.activated = memory.template allocate<T>(slots, inner);
    // Once h is there, nobody reads the permuted tokens any more, unless they are kept.
    bool const shared = !keep.permuted.present() && !wants_rows;
    if (!keep.permuted.present()) keep.permuted = memory.template allocate<T>(slots, width);
    if (!wants_rows) keep.rows = shared ? keep.permuted : memory.template allocate<T>(slots, width);
    backend_of<expert_mlp, P>::forward(policy, std::type_identity<Activation>{}, in, y, keep, wants_rows,
                                       wants_nothing);
  }

  template <device_policy P, storage T>
  struct gradient_inputs {
    in<P, accum_t<T>, dyn, dyn> gate;  // (M, k)
    expert_dispatch::routing<P> plan;
    in<P, T, dyn, dyn, dyn> fc1;   // (E, D, H)
    in<P, T, dyn, dyn, dyn> fc2;   // (E, H, F)
    in<P, T, dyn, dyn> permuted;   // (M k, H)  as forward kept them
    in<P, T, dyn, dyn> h;          // (M k, D)
    in<P, T, dyn, dyn> activated;  // (M k, F)
    in<P, T, dyn, dyn> rows;       // (M k, H)
    in<P, T, dyn, dyn> d_y;        // (M, H)
  };
  template <device_policy P, storage T>
  struct gradients {
    out<P, T, dyn, dyn> d_x;                       // (M, H)     overwritten
    out<P, accum_t<T>, dyn, dyn> d_gate;           // (M, k)     overwritten; 0 where the slot has no row
    out<P, accum_t<T>, dyn, dyn, dyn> d_fc1 = {};  // (E, D, H)  added to, where wanted
    out<P, accum_t<T>, dyn, dyn, dyn> d_fc2 = {};  // (E, H, F)
    out<P, accum_t<T>, dyn, dyn> d_fc1_bias = {};  // (E, D)
    out<P, accum_t<T>, dyn, dyn> d_fc2_bias = {};  // (E, H)
  };
  /// The gradients of those lines, in their order backwards; each intermediate gradient is rounded to T. Those of an
  /// expert's parameters stay as they are where it has no rows. No aliasing. backward_scratch_bytes of scratch.
  template <class Activation, device_policy P, storage T>
  static void backward(P const& policy, gradient_inputs<home<P>, T> const& in, gradients<home<P>, T> const& d) {
    auto const tokens = d.d_x.extent(0), width = d.d_x.extent(1), slots = in.plan.row.extent(0);
    auto const experts = in.fc1.extent(0), hidden = in.fc1.extent(1), inner = in.fc2.extent(2);
    char const* const op = "expert_mlp.backward";
    check_weights<Activation>(op, in, width);
    check_shape(op, "gate", in.gate, {tokens, -1});
    check_shape(op, "plan.row", in.plan.row, {tokens * in.gate.extent(1)});
    check_shape(op, "permuted", in.permuted, {slots, width});
    check_shape(op, "h", in.h, {slots, hidden});
    check_shape(op, "activated", in.activated, {slots, inner});
    check_shape(op, "rows", in.rows, {slots, width});
    check_shape(op, "d_y", in.d_y, {tokens, width});
    check_shape(op, "d_gate", d.d_gate, {tokens, in.gate.extent(1)});
    check_optional_shape(op, "d_fc1", d.d_fc1, {experts, hidden, width});
    check_optional_shape(op, "d_fc2", d.d_fc2, {experts, width, inner});
    check_optional_shape(op, "d_fc1_bias", d.d_fc1_bias, {experts, hidden});
    check_optional_shape(op, "d_fc2_bias", d.d_fc2_bias, {experts, width});
    if (tokens == 0) return;
    scratch<P> memory(policy, backward_scratch_bytes<T>(slots, width, hidden, inner));
    gradient_memory<home<P>, T> const scratch_rows{.d_rows = memory.template allocate<T>(slots, width),
                                                   .d_activated = memory.template allocate<T>(slots, inner),
                                                   .d_h = memory.template allocate<T>(slots, hidden)};
    backend_of<expert_mlp, P>::backward(policy, std::type_identity<Activation>{}, in, d, scratch_rows);
  }

  /// Of forward with nothing kept.
  template <class Activation, device_policy P, storage T>
  static constexpr std::size_t scratch_bytes(std::int64_t slots, std::int64_t width, std::int64_t inner) {
    auto const bytes = [](std::int64_t a, std::int64_t b) { return sizeof(T) * static_cast<std::size_t>(a * b); };
    bool const h = makes_h<Activation, P, T>();
    // Permuted tokens and rows of output share memory, but not where one of them is kept.
    return scratch_sum(h ? bytes(slots, Activation::gated ? 2 * inner : inner) : 0, bytes(slots, inner),
                       bytes(slots, width));
  }
  template <storage T>
  static constexpr std::size_t backward_scratch_bytes(std::int64_t slots, std::int64_t width, std::int64_t hidden,
                                                      std::int64_t inner) {
    auto const bytes = [](std::int64_t a, std::int64_t b) { return sizeof(T) * static_cast<std::size_t>(a * b); };
    return scratch_sum(bytes(slots, width), bytes(slots, inner), bytes(slots, hidden));
  }

  /// backward's scratch: d_rows of the experts' output, then of their input.
  template <device_policy P, storage T>
  struct gradient_memory {
    out<P, T, dyn, dyn> d_rows, d_activated, d_h;
  };

 private:
  /// Whether h is stored although nobody keeps it.
  template <class Activation, class P, class T>
  static constexpr bool makes_h() {
    return backend_of<expert_mlp, home<P>>::template makes_h<Activation, T>();
  }
  template <class Activation, class In>
  static void check_weights(char const* op, In const& in, std::int64_t width) {
    auto const experts = in.fc1.extent(0), inner = in.fc2.extent(2);
    check_shape(op, "fc1", in.fc1, {experts, Activation::gated ? 2 * inner : inner, width});
    check_shape(op, "fc2", in.fc2, {experts, width, inner});
    check_shape(op, "plan.offsets", in.plan.offsets, {experts + 1});
    check_shape(op, "plan.source", in.plan.source, {in.plan.row.extent(0)});
  }
  template <class Activation, class In>
  static void check_inputs(char const* op, In const& in, std::int64_t tokens, std::int64_t width) {
    check_weights<Activation>(op, in, width);
    check_shape(op, "x", in.x, {tokens, width});
    check_shape(op, "gate", in.gate, {tokens, -1});
    check_shape(op, "plan.row", in.plan.row, {tokens * in.gate.extent(1)});
    check_optional_shape(op, "fc1_bias", in.fc1_bias, {in.fc1.extent(0), in.fc1.extent(1)});
    check_optional_shape(op, "fc2_bias", in.fc2_bias, {in.fc1.extent(0), width});
  }
  template <class Kept>
  static void check_kept(char const* op, Kept const& keep, std::int64_t slots, std::int64_t width, std::int64_t hidden,
                         std::int64_t inner) {
    check_optional_shape(op, "kept.permuted", keep.permuted, {slots, width});
    check_optional_shape(op, "kept.h", keep.h, {slots, hidden});
    check_optional_shape(op, "kept.activated", keep.activated, {slots, inner});
    check_optional_shape(op, "kept.rows", keep.rows, {slots, width});
  }
};

namespace detail {
template <class Activation, device_policy P, storage T>
struct expert_mlp_steps;  // expert_mlp_steps.hpp, which includes this file
}

}  // namespace blackmamba

#include <blackmamba/ops/expert_mlp/expert_mlp_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/expert_mlp/expert_mlp_cuda.cuh>
#endif
