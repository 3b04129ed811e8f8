#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/packed.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/slots.hpp>
#include <blackmamba/core/workspace.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

namespace blackmamba {

/// Causal depthwise convolution over time with K = 2, 3 or 4 taps (Gu and Dao, arXiv 2312.00752, section 3.4):
///
///   p[b,t,d] = bias[d] + sum over k of weight[d,k] x[b, t - (K-1) + k, d],     y = p, or silu(p)
///
/// where x before the sequence is the initial state (zeros without one), and the final state is the last K-1 inputs.
/// Arithmetic in accum_t<T>. Packed sequences give the bits that they give alone; a text in pieces, with the state
/// handed on, those of the whole. Bitwise repeatable, independent of the number of threads. Asynchronous on cuda.
struct causal_conv1d {
  /// S is the number of packed sequences, or B.
  template <device_policy P, storage T>
  struct inputs {
    in<P, T, dyn, dyn, dyn> x;                   // (B, L, D)
    in<P, accum_t<T>, dyn, dyn> weight;          // (D, K)       weight[:,K-1] meets the present
    in<P, accum_t<T>, dyn> bias = {};            // (D)          optional
    in<P, T, dyn, dyn, dyn> initial_state = {};  // (S, K-1, D)  optional; oldest first
    in<P, std::int64_t, dyn> cu_seqlens = {};    // (S + 1)      optional; B = 1; from 0 to L, non-decreasing
    bool silu = false;
  };
  /// y (B, L, D) must not alias x, final_state (S, K-1, D; optional) not initial_state.
  template <device_policy P, storage T>
  static void forward(P const& policy, std::type_identity_t<inputs<home<P>, T>> const& in, out<P, T, dyn, dyn, dyn> y,
                      std::type_identity_t<out<P, T, dyn, dyn, dyn>> final_state = {}) {
    auto const batch = y.extent(0), length = y.extent(1), channels = y.extent(2);
    std::int64_t const states = check_inputs("causal_conv1d", in, batch, length, channels);
    check_optional_shape("causal_conv1d", "final_state", final_state, {states, in.weight.extent(1) - 1, channels});
    if (channels > 0 && states > 0) backend_of<causal_conv1d, P>::forward(policy, in, y, final_state);
  }

  /// The inputs of forward, and the gradients that reach its outputs.
  template <device_policy P, storage T>
  struct gradient_inputs {
    in<P, T, dyn, dyn, dyn> x;                   // (B, L, D)
    in<P, accum_t<T>, dyn, dyn> weight;          // (D, K)
    in<P, accum_t<T>, dyn> bias = {};            // (D)          optional
    in<P, T, dyn, dyn, dyn> initial_state = {};  // (S, K-1, D)  optional
    in<P, std::int64_t, dyn> cu_seqlens = {};    // (S + 1)      optional
    bool silu = false;
    in<P, T, dyn, dyn, dyn> d_y = {};            // (B, L, D)
    in<P, T, dyn, dyn, dyn> d_final_state = {};  // (S, K-1, D)  optional; zeros
  };
  /// Gradients of activations and states overwrite, those of weight and bias are added. The last two are wanted where
  /// present.
  template <device_policy P, storage T>
  struct gradients {
    out<P, T, dyn, dyn, dyn> d_x;                   // (B, L, D)
    out<P, accum_t<T>, dyn, dyn> d_weight;          // (D, K)       +=
    out<P, accum_t<T>, dyn> d_bias = {};            // (D)          +=
    out<P, T, dyn, dyn, dyn> d_initial_state = {};  // (S, K-1, D)
  };
  /// p is computed again; nothing but the inputs is kept from forward. d_x must not alias x or d_y.
  /// scratch_bytes<T>(B, L, D, K, S) of scratch, S = 0 where nothing is packed.
  /// T is float unless named: backward<Policy, T>(...).
  template <device_policy P, storage T = float>
  static void backward(P const& policy, std::type_identity_t<gradient_inputs<home<P>, T>> const& in,
                       std::type_identity_t<gradients<home<P>, T>> const& d) {
    constexpr char const* op = "causal_conv1d.backward";
    auto const batch = in.d_y.extent(0), length = in.d_y.extent(1), channels = in.d_y.extent(2);
    auto const taps = in.weight.extent(1);
    std::int64_t const states = check_inputs(op, in, batch, length, channels);
    check_optional_shape(op, "d_final_state", in.d_final_state, {states, taps - 1, channels});
    check_shape(op, "d_x", d.d_x, {batch, length, channels});
    check_shape(op, "d_weight", d.d_weight, {channels, taps});
    check_optional_shape(op, "d_bias", d.d_bias, {channels});
    check_optional_shape(op, "d_initial_state", d.d_initial_state, {states, taps - 1, channels});
    if (channels == 0 || states == 0) return;
    std::int64_t const packed = in.cu_seqlens.present() ? states : 0;
    scratch<P> memory(policy, scratch_bytes<T>(batch, length, channels, taps, packed));
    auto const partial =
        memory.template allocate<accum_t<T>>(partial_blocks(batch, length, packed), taps + 1, channels);
    backend_of<causal_conv1d, P>::backward(policy, in, d, partial);
  }

  /// One token of each sequence.
  template <device_policy P, storage T>
  struct step_inputs {
    in<P, T, dyn, dyn> x;                // (B, D)
    in<P, accum_t<T>, dyn, dyn> weight;  // (D, K)
    in<P, accum_t<T>, dyn> bias = {};    // (D)     optional
    bool silu = false;
    in<P, std::int32_t, dyn> slots = {};  // (B)  optional; the row of the state that each sequence has, below 0 none
  };
  /// y (B, D) and the state (B, K-1, D), moved on in place: forward at L = 1. y may alias x.
  ///
  /// With slots the state is a pool (S, K-1, D): that of sequence b is row slots[b]. Where that is below 0, nothing of
  /// the sequence's x is used, which must be readable all the same, and the row of y stays as it is. On a host, rows
  /// beyond the pool and rows that two sequences have are named; on a device the first count as none, and the second
  /// leave a state that neither expects.
  template <device_policy P, storage T>
  static void step(P const& policy, std::type_identity_t<step_inputs<home<P>, T>> const& in,
                   std::type_identity_t<out<P, T, dyn, dyn, dyn>> state, out<P, T, dyn, dyn> y) {
    constexpr char const* op = "causal_conv1d.step";
    auto const batch = y.extent(0), channels = y.extent(1);
    check_taps(op, in, channels);
    check_shape(op, "x", in.x, {batch, channels});
    check_slots<P>(op, in.slots, host_view<std::int32_t const, dyn, dyn>{}, state, batch, 1, in.weight.extent(1) - 1,
                   channels);
    if (y.size() > 0 && state.extent(0) > 0) backend_of<causal_conv1d, P>::step(policy, in, state, y);
  }

  /// Up to most_tokens tokens of each sequence (core/slots.hpp).
  template <device_policy P, storage T>
  struct token_inputs {
    in<P, T, dyn, dyn, dyn> x;           // (B, L, D)
    in<P, accum_t<T>, dyn, dyn> weight;  // (D, K)
    in<P, accum_t<T>, dyn> bias = {};    // (D)        optional
    bool silu = false;
    in<P, std::int32_t, dyn> slots = {};            // (B)     optional; as in step
    in<P, std::int32_t, dyn, dyn> kept_slots = {};  // (B, L)  optional, with slots; below 0 none
  };
  /// L steps in one, with the bits of as many calls of step; y (B, L, D) may alias x. For speculative decoding,
  /// kept_slots names the row of the pool that the state after each token is left in; the sequence's own row is then
  /// only read, unless it is among them.
  template <device_policy P, storage T>
  static void steps(P const& policy, std::type_identity_t<token_inputs<home<P>, T>> const& in,
                    std::type_identity_t<out<P, T, dyn, dyn, dyn>> state, out<P, T, dyn, dyn, dyn> y) {
    constexpr char const* op = "causal_conv1d.steps";
    auto const batch = y.extent(0), length = y.extent(1), channels = y.extent(2);
    check_taps(op, in, channels);
    check_shape(op, "x", in.x, {batch, length, channels});
    check_slots<P>(op, in.slots, in.kept_slots, state, batch, length, in.weight.extent(1) - 1, channels);
    if (y.size() > 0 && state.extent(0) > 0) backend_of<causal_conv1d, P>::steps(policy, in, state, y);
  }

  /// The gradients of weight and bias are summed over blocks of this many steps, then over blocks, in order.
  static constexpr std::int64_t steps_per_partial = 256;
  static constexpr std::int64_t partial_blocks(std::int64_t batch, std::int64_t length, std::int64_t packed) {
    return packed > 0 ? length / steps_per_partial + packed
                      : batch * std::max<std::int64_t>(1, (length + steps_per_partial - 1) / steps_per_partial);
  }
  template <storage T>
  static constexpr std::size_t scratch_bytes(std::int64_t batch, std::int64_t length, std::int64_t channels,
                                             std::int64_t taps, std::int64_t packed) {
    return scratch_sum(sizeof(accum_t<T>) *
                       static_cast<std::size_t>(partial_blocks(batch, length, packed) * (taps + 1) * channels));
  }

 private:
  template <class Inputs>
  static void check_taps(char const* op, Inputs const& in, std::int64_t channels) {
    auto const taps = in.weight.extent(1);
    check_shape(op, "weight", in.weight, {channels, -1});
    check_that(taps >= 2 && taps <= 4, op, "weight", std::to_string(taps) + " taps", "2 to 4");
    check_optional_shape(op, "bias", in.bias, {channels});
  }
  /// Returns the number of sequences.
  template <class Inputs>
  static std::int64_t check_inputs(char const* op, Inputs const& in, std::int64_t batch, std::int64_t length,
                                   std::int64_t channels) {
    check_shape(op, "x", in.x, {batch, length, channels});
    check_taps(op, in, channels);
    std::int64_t const states = check_packed(op, batch, length, in.cu_seqlens);
    check_optional_shape(op, "initial_state", in.initial_state, {states, in.weight.extent(1) - 1, channels});
    return states;
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/causal_conv1d/causal_conv1d_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/causal_conv1d/causal_conv1d_cuda.cuh>
#endif
