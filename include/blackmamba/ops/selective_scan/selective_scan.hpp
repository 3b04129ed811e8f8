#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/packed.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/slots.hpp>
#include <blackmamba/core/workspace.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_backward_tuning.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_tuning.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

namespace blackmamba {

/// The selective state-space recurrence of Mamba (Gu and Dao, arXiv 2312.00752, algorithm 2 and eq. 2a, 2b). Channel d
/// of D has N states, which its own step size dt, and the projections B and C that all channels share, drive and read:
///
///   dt_t = delta_t + delta_bias                       (softplus of that with delta_softplus)
///   h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t         h: N states for each channel
///   y_t  = (C_t . h_t + D u_t) silu(z_t)              (no factor without z, no second term without D)
///
/// Sequences are rows of the batch, or with cu_seqlens the pieces [cu_seqlens[s], cu_seqlens[s+1]) of the one row; S
/// stands for their number, and states have one row for each. A sequence in two calls, with the final state of the
/// first as the initial state of the second, gives what one call gives.
///
/// Arithmetic and states are in accum_t<T>, written A below where it is a type. Of size L D N nothing is stored:
/// training keeps the state at the beginning of every chunk_length steps (checkpoints), and backward runs each chunk
/// again. Bitwise repeatable, independent of the number of threads and of the other sequences. Asynchronous on cuda;
/// there, long sequences are cut where batch and channels are few, by their sizes alone: in forward from 512 steps on
/// (selective_scan_tuning.hpp; some of those stay whole where T has 16 bits, N is 16 and rows begin at multiples of 16
/// bytes), in backward from about 225, or 768 in a row of packed ones (selective_scan_backward_tuning.hpp). Calls that
/// are cut differently agree to rounding. There, L is less than 2^31, and fewer than 2^32 bytes lie between two steps
/// of a tensor.
struct selective_scan {
  /// u, delta, z, B, C may be slices of wider tensors.
  template <device_policy P, storage T, int N>
  struct inputs {
    in<P, T, dyn, dyn, dyn> u;                            // (B, L, D)
    in<P, T, dyn, dyn, dyn> delta;                        // (B, L, D)
    in<P, accum_t<T>, dyn, dyn> A;                        // (D, N)     any sign; decays have A < 0
    in<P, T, dyn, dyn, dyn> B;                            // (B, L, N)
    in<P, T, dyn, dyn, dyn> C;                            // (B, L, N)
    in<P, accum_t<T>, dyn> D = {};                        // (D)        optional
    in<P, T, dyn, dyn, dyn> z = {};                       // (B, L, D)  optional
    in<P, accum_t<T>, dyn> delta_bias = {};               // (D)        optional
    in<P, accum_t<T>, dyn, dyn, dyn> initial_state = {};  // (S, D, N)  optional; zeros
    in<P, std::int64_t, dyn> cu_seqlens = {};             // (S + 1)    optional; B = 1; from 0 to L, non-decreasing
    bool delta_softplus = false;
    bool A_is_log = false;  // the decay rate is -exp(A) in place of A
  };
  template <device_policy P, storage T>
  struct results {
    out<P, accum_t<T>, dyn, dyn, dyn> final_state = {};  // (S, D, N)  optional; of an empty sequence the initial one
    out<P, accum_t<T>, dyn> checkpoints = {};            // (n)        optional; what backward needs
  };
  /// y (B, L, D) aliases no input, final_state no initial_state. dt A log2(e) is taken to lie in [-126, 127.9].
  /// Scratch: forward_scratch_bytes<P, N, T>(B, L, D, S).
  template <int N, device_policy P, storage T>
  static void forward(P const& policy, std::type_identity_t<inputs<home<P>, T, N>> const& in,
                      out<P, T, dyn, dyn, dyn> y, std::type_identity_t<results<home<P>, T>> const& keep = {}) {
    auto const batch = y.extent(0), length = y.extent(1), channels = y.extent(2);
    std::int64_t const states = check_inputs<N>("selective_scan", in, batch, length, channels);
    check_optional_shape("selective_scan", "final_state", keep.final_state, {states, channels, N});
    check_optional_shape("selective_scan", "checkpoints", keep.checkpoints,
                         {checkpoint_size<N>(batch, length, channels, states)});
    check_steps<P>("selective_scan", length,
                   {{"u", in.u}, {"delta", in.delta}, {"B", in.B}, {"C", in.C}, {"z", in.z}, {"y", y}});
    if (channels == 0 || batch == 0) return;
    if constexpr (std::is_same_v<typename P::memory_space, space::device>) {
      forward_workspace<home<P>, T> work;
      auto const pieces = forward_pieces<N>(batch, length, channels, states);
      if (pieces == 0) return backend_of<selective_scan, P>::forward(policy, in, y, keep, work);
      scratch<P> memory(policy, forward_scratch_bytes<P, N, T>(batch, length, channels, states));
      work = {.states = memory.template allocate<accum_t<T>>(pieces, channels, N),
              .steps = memory.template allocate<accum_t<T>>(pieces, channels)};
      backend_of<selective_scan, P>::forward(policy, in, y, keep, work);
    } else {
      backend_of<selective_scan, P>::forward(policy, in, y, keep);
    }
  }

  /// The inputs of forward, the checkpoints that it left, and the gradients that reach its outputs.
  template <device_policy P, storage T, int N>
  struct gradient_inputs {
    in<P, T, dyn, dyn, dyn> u;                            // (B, L, D)
    in<P, T, dyn, dyn, dyn> delta;                        // (B, L, D)
    in<P, accum_t<T>, dyn, dyn> A;                        // (D, N)
    in<P, T, dyn, dyn, dyn> B;                            // (B, L, N)
    in<P, T, dyn, dyn, dyn> C;                            // (B, L, N)
    in<P, accum_t<T>, dyn> D = {};                        // (D)        optional
    in<P, T, dyn, dyn, dyn> z = {};                       // (B, L, D)  optional
    in<P, accum_t<T>, dyn> delta_bias = {};               // (D)        optional
    in<P, accum_t<T>, dyn, dyn, dyn> initial_state = {};  // (S, D, N)  optional
    in<P, std::int64_t, dyn> cu_seqlens = {};             // (S + 1)    optional
    bool delta_softplus = false;
    bool A_is_log = false;
    in<P, accum_t<T>, dyn> checkpoints = {};              // (n)        from forward, with the same inputs
    in<P, T, dyn, dyn, dyn> d_y = {};                     // (B, L, D)
    in<P, accum_t<T>, dyn, dyn, dyn> d_final_state = {};  // (S, D, N)  optional; zeros
  };
  /// Gradients of activations and of the initial state overwrite, those of A, D and delta_bias are added. The last five
  /// are wanted where present.
  template <device_policy P, storage T>
  struct gradients {
    out<P, T, dyn, dyn, dyn> d_u;               // (B, L, D)
    out<P, T, dyn, dyn, dyn> d_delta;           // (B, L, D)  with respect to delta itself
    out<P, accum_t<T>, dyn, dyn> d_A = {};      // (D, N)  +=  with respect to A as given, so to its logarithm
    out<P, T, dyn, dyn, dyn> d_B = {};          // (B, L, N)
    out<P, T, dyn, dyn, dyn> d_C = {};          // (B, L, N)
    out<P, accum_t<T>, dyn> d_D = {};           // (D)     +=
    out<P, T, dyn, dyn, dyn> d_z = {};          // (B, L, D)
    out<P, accum_t<T>, dyn> d_delta_bias = {};  // (D)     +=
    out<P, accum_t<T>, dyn, dyn, dyn> d_initial_state = {};  // (S, D, N)
  };
  /// d_z may alias z; the other gradients alias no input. All of (B, L, ...) may be slices of wider tensors.
  /// d_B and d_C are sums over channels, in groups of group_channels, then over groups, in order. On a device, groups
  /// and the parts that sequences are cut into follow from the sizes (selective_scan_backward_tuning.hpp).
  /// T is float unless named: backward<N, Policy, T>(...).
  /// Scratch: scratch_bytes<N, T, memory space>(B, L, D, S).
  template <int N, device_policy P, storage T = float>
  static void backward(P const& policy, std::type_identity_t<gradient_inputs<home<P>, T, N>> const& in,
                       std::type_identity_t<gradients<home<P>, T>> const& d) {
    constexpr char const* op = "selective_scan.backward";
    auto const batch = in.d_y.extent(0), length = in.d_y.extent(1), channels = in.d_y.extent(2);
    std::int64_t const states = check_inputs<N>(op, in, batch, length, channels);
    check_shape(op, "checkpoints", in.checkpoints, {checkpoint_size<N>(batch, length, channels, states)});
    check_optional_shape(op, "d_final_state", in.d_final_state, {states, channels, N});
    check_shape(op, "d_u", d.d_u, {batch, length, channels});
    check_shape(op, "d_delta", d.d_delta, {batch, length, channels});
    check_shape(op, "d_B", d.d_B, {batch, length, N});
    check_shape(op, "d_C", d.d_C, {batch, length, N});
    check_optional_shape(op, "d_A", d.d_A, {channels, N});
    check_of_optional(op, "d_D", d.d_D, {channels}, "D", in.D.present());
    check_of_optional(op, "d_z", d.d_z, {batch, length, channels}, "z", in.z.present());
    check_of_optional(op, "d_delta_bias", d.d_delta_bias, {channels}, "delta_bias", in.delta_bias.present());
    check_optional_shape(op, "d_initial_state", d.d_initial_state, {states, channels, N});
    check_steps<P>(op, length,
                   {{"u", in.u},
                    {"delta", in.delta},
                    {"B", in.B},
                    {"C", in.C},
                    {"z", in.z},
                    {"d_y", in.d_y},
                    {"d_u", d.d_u},
                    {"d_delta", d.d_delta},
                    {"d_B", d.d_B},
                    {"d_C", d.d_C},
                    {"d_z", d.d_z}});
    if (batch == 0) return;
    if constexpr (on_device<P>) {
      auto const plan = device_plan<N, T>(batch, length, channels, states);
      std::int64_t const carried = plan.cut ? plan.parts : 0;
      scratch<P> memory(policy, scratch_bytes<N, T, space::device>(batch, length, channels, states));
      workspace<home<P>, T> const work{
          .carry = memory.template allocate<accum_t<T>>(carried, channels, N),
          .steps = memory.template allocate<accum_t<T>>(carried, channels),
          .d_A = memory.template allocate<accum_t<T>>(plan.parts, channels, N),
          .d_channel = memory.template allocate<accum_t<T>>(plan.parts, 2, channels),
          .d_projection = memory.template allocate<accum_t<T>>(plan.groups, batch * length, 2 * N),
      };
      backend_of<selective_scan, P>::backward(policy, in, d, work);
    } else {
      scratch<P> memory(policy, scratch_bytes<N, T>(batch, length, channels, states));
      std::int64_t const parts = streams(batch, states), groups = channel_groups(channels),
                         width = groups * group_channels;
      workspace<home<P>, T> const work{
          .carry = memory.template allocate<accum_t<T>>(parts, N, width),
          .d_A = memory.template allocate<accum_t<T>>(parts, N, width),
          .d_channel = memory.template allocate<accum_t<T>>(parts, 2, width),
          .d_projection = memory.template allocate<accum_t<T>>(parts, band_steps(batch, length, states), groups, 2 * N),
      };
      backend_of<selective_scan, P>::backward(policy, in, d, work);
    }
  }

  /// One token of each sequence.
  template <device_policy P, storage T, int N>
  struct step_inputs {
    in<P, T, dyn, dyn> u;                    // (B, D)
    in<P, T, dyn, dyn> delta;                // (B, D)
    in<P, accum_t<T>, dyn, dyn> A;           // (D, N)
    in<P, T, dyn, dyn> B;                    // (B, N)
    in<P, T, dyn, dyn> C;                    // (B, N)
    in<P, accum_t<T>, dyn> D = {};           // (D)     optional
    in<P, T, dyn, dyn> z = {};               // (B, D)  optional
    in<P, accum_t<T>, dyn> delta_bias = {};  // (D)     optional
    bool delta_softplus = false;
    bool A_is_log = false;
    in<P, std::int32_t, dyn> slots = {};  // (B)  optional; the row of the state that each sequence has, below 0 none
  };
  /// y (B, D) and the state (B, D, N), moved on in place: forward at L = 1. y may alias u, delta or z.
  ///
  /// With slots the state is a pool (S, D, N) of more sequences than the batch has: that of sequence b is row slots[b].
  /// Where that is below 0, nothing of the sequence's inputs is used, which must be readable all the same, and the row
  /// of y stays as it is. On a host, rows beyond the pool and rows that two sequences have are named; on a device the
  /// first count as none, and the second leave a state that neither expects.
  ///
  ///   selective_scan::step<16>(policy, {.u = u, ..., .slots = slots}, pool, y);
  ///   selective_scan::step<16, bfloat16>(policy, {.u = u, ..., .slots = slots}, pool, y);  // states of 16 bits
  template <int N, device_policy P, storage T>
  static void step(P const& policy, std::type_identity_t<step_inputs<home<P>, T, N>> const& in,
                   std::type_identity_t<out<P, accum_t<T>, dyn, dyn, dyn>> state, out<P, T, dyn, dyn> y) {
    step<N, accum_t<T>>(policy, in, state, y);
  }
  /// The same with a state that is kept as State: rounded to it after the token, whose y is of the state before that.
  template <int N, storage State, device_policy P, storage T>
  requires std::is_same_v<accum_t<State>, accum_t<T>>
  static void step(P const& policy, std::type_identity_t<step_inputs<home<P>, T, N>> const& in,
                   std::type_identity_t<out<P, State, dyn, dyn, dyn>> state, out<P, T, dyn, dyn> y) {
    constexpr char const* op = "selective_scan.step";
    check_states<N>();
    auto const batch = y.extent(0), channels = y.extent(1);
    check_shape(op, "u", in.u, {batch, channels});
    check_shape(op, "delta", in.delta, {batch, channels});
    check_shape(op, "B", in.B, {batch, N});
    check_shape(op, "C", in.C, {batch, N});
    check_optional_shape(op, "z", in.z, {batch, channels});
    check_parameters<N>(op, in, channels);
    check_slots<P>(op, in.slots, host_view<std::int32_t const, dyn, dyn>{}, state, batch, 1, channels, N);
    if (y.size() > 0 && state.extent(0) > 0) backend_of<selective_scan, P>::step(policy, in, state, y);
  }

  /// Up to most_tokens tokens of each sequence (core/slots.hpp).
  template <device_policy P, storage T, int N>
  struct token_inputs {
    in<P, T, dyn, dyn, dyn> u;               // (B, L, D)
    in<P, T, dyn, dyn, dyn> delta;           // (B, L, D)
    in<P, accum_t<T>, dyn, dyn> A;           // (D, N)
    in<P, T, dyn, dyn, dyn> B;               // (B, L, N)
    in<P, T, dyn, dyn, dyn> C;               // (B, L, N)
    in<P, accum_t<T>, dyn> D = {};           // (D)        optional
    in<P, T, dyn, dyn, dyn> z = {};          // (B, L, D)  optional
    in<P, accum_t<T>, dyn> delta_bias = {};  // (D)        optional
    bool delta_softplus = false;
    bool A_is_log = false;
    in<P, std::int32_t, dyn> slots = {};            // (B)     optional; as in step
    in<P, std::int32_t, dyn, dyn> kept_slots = {};  // (B, L)  optional, with slots; below 0 none
  };
  /// L steps in one, with the bits of as many calls of step; y (B, L, D) may alias u, delta or z.
  ///
  /// For speculative decoding, kept_slots names the row of the pool that the state after each token is left in; the
  /// sequence's own row is then only read, unless it is among them. A sequence of which m of the tokens are accepted
  /// goes on from kept_slots[b, m - 1] without a copy:
  ///
  ///   selective_scan::steps<16>(policy, {.u = drafts, ..., .slots = slots, .kept_slots = kept}, pool, y);
  ///   slots[b] = kept[b, m - 1];  // and the other rows are free again
  template <int N, device_policy P, storage T>
  static void steps(P const& policy, std::type_identity_t<token_inputs<home<P>, T, N>> const& in,
                    std::type_identity_t<out<P, accum_t<T>, dyn, dyn, dyn>> state, out<P, T, dyn, dyn, dyn> y) {
    steps<N, accum_t<T>>(policy, in, state, y);
  }
  template <int N, storage State, device_policy P, storage T>
  requires std::is_same_v<accum_t<State>, accum_t<T>>
  static void steps(P const& policy, std::type_identity_t<token_inputs<home<P>, T, N>> const& in,
                    std::type_identity_t<out<P, State, dyn, dyn, dyn>> state, out<P, T, dyn, dyn, dyn> y) {
    constexpr char const* op = "selective_scan.steps";
    check_states<N>();
    auto const batch = y.extent(0), length = y.extent(1), channels = y.extent(2);
    check_shape(op, "u", in.u, {batch, length, channels});
    check_shape(op, "delta", in.delta, {batch, length, channels});
    check_shape(op, "B", in.B, {batch, length, N});
    check_shape(op, "C", in.C, {batch, length, N});
    check_optional_shape(op, "z", in.z, {batch, length, channels});
    check_parameters<N>(op, in, channels);
    check_slots<P>(op, in.slots, in.kept_slots, state, batch, length, channels, N);
    if (y.size() > 0 && state.extent(0) > 0) backend_of<selective_scan, P>::steps(policy, in, state, y);
  }

  /// A checkpoint is taken at the beginning of every so many steps of a sequence.
  static constexpr std::int64_t chunk_length = 32;
  /// Checkpoints for each row of the batch, or for so many sequences packed in one row: each begins a chunk of its own.
  static constexpr std::int64_t chunks(std::int64_t batch, std::int64_t length, std::int64_t sequences) {
    return batch == 1 ? length / chunk_length + std::max<std::int64_t>(sequences, 1)
                      : std::max<std::int64_t>((length + chunk_length - 1) / chunk_length, 1);
  }
  /// Elements of accum_t<T> that forward's checkpoints take. For one row, sequences is the number packed in it.
  template <int N>
  static constexpr std::int64_t checkpoint_size(std::int64_t batch, std::int64_t length, std::int64_t channels,
                                                std::int64_t sequences) {
    return batch * chunks(batch, length, sequences) * N * channels;
  }

  /// What forward keeps while it runs, on a device, where it cuts sequences into pieces (selective_scan_tuning).
  template <device_policy P, storage T>
  struct forward_workspace {
    out<P, accum_t<T>, dyn, dyn, dyn> states = {};  // (pieces, D, N)  what each leaves from zero, then begins with
    out<P, accum_t<T>, dyn, dyn> steps = {};        // (pieces, D)     the sum of its steps dt
  };
  template <int N>
  static constexpr std::int64_t forward_pieces(std::int64_t batch, std::int64_t length, std::int64_t channels,
                                               std::int64_t sequences) {
    return selective_scan_tuning::pieces_of_forward(selective_scan_tuning::plan_forward(N, length, channels, sequences),
                                                    batch, length, sequences);
  }
  template <device_policy P, int N, storage T>
  static constexpr std::size_t forward_scratch_bytes(std::int64_t batch, std::int64_t length, std::int64_t channels,
                                                     std::int64_t sequences) {
    if (!std::is_same_v<typename P::memory_space, space::device>) return 0;
    auto const n = static_cast<std::size_t>(forward_pieces<N>(batch, length, channels, sequences) * channels);
    return scratch_sum(sizeof(accum_t<T>) * n * N, sizeof(accum_t<T>) * n);
  }

  /// Backward works on so many channels at a time, and on so many chunks before it sums d_B and d_C over the channels.
  static constexpr std::int64_t group_channels = 64;
  static constexpr std::int64_t band_chunks = 16;
  static constexpr std::int64_t channel_groups(std::int64_t channels) {
    return (channels + group_channels - 1) / group_channels;
  }
  static constexpr std::int64_t band_steps(std::int64_t batch, std::int64_t length, std::int64_t sequences) {
    return std::min(band_chunks, chunks(batch, length, sequences)) * chunk_length;
  }
  /// Parts of the batch that backward works on side by side: its rows, or of a packed row up to eight pieces.
  static constexpr std::int64_t streams(std::int64_t batch, std::int64_t sequences) {
    return batch == 1 ? std::clamp<std::int64_t>(sequences, 1, 8) : batch;
  }
  /// How backward is cut on a device.
  template <int N, storage T>
  static constexpr selective_scan_tuning::backward_plan device_plan(std::int64_t batch, std::int64_t length,
                                                                    std::int64_t channels, std::int64_t sequences) {
    using block = selective_scan_tuning::backward_block<N, sizeof(accum_t<T>)>;
    return selective_scan_tuning::plan_backward(batch, chunks(batch, length, sequences), sequences, channels,
                                                block::group_channels);
  }
  template <int N, storage T, class Space = space::host>
  static constexpr std::size_t scratch_bytes(std::int64_t batch, std::int64_t length, std::int64_t channels,
                                             std::int64_t sequences) {
    if constexpr (std::is_same_v<Space, space::device>) {
      auto const plan = device_plan<N, T>(batch, length, channels, sequences);
      auto const bytes = [](std::int64_t n) { return sizeof(accum_t<T>) * static_cast<std::size_t>(n); };
      std::int64_t const carried = plan.cut ? plan.parts : 0;
      return scratch_sum(bytes(carried * channels * N), bytes(carried * channels), bytes(plan.parts * channels * N),
                         bytes(plan.parts * 2 * channels), bytes(plan.groups * batch * length * 2 * N));
    }
    auto const parts = streams(batch, sequences), groups = channel_groups(channels), width = groups * group_channels;
    auto const bytes = [](std::int64_t n) { return sizeof(accum_t<T>) * static_cast<std::size_t>(n); };
    return scratch_sum(bytes(parts * N * width), bytes(parts * N * width), bytes(parts * 2 * width),
                       bytes(parts * band_steps(batch, length, sequences) * groups * 2 * N));
  }
  /// What backward keeps while it runs; width is D rounded up to whole groups.
  template <device_policy P, storage T>
  struct workspace {
    out<P, accum_t<T>, dyn, dyn, dyn> carry;              // (streams, N, width)  gradient of the state between bands
    out<P, accum_t<T>, dyn, dyn, dyn> d_A;                // (streams, N, width)
    out<P, accum_t<T>, dyn, dyn, dyn> d_channel;          // (streams, 2, width)  d_D and d_delta_bias
    out<P, accum_t<T>, dyn, dyn, dyn, dyn> d_projection;  // (streams, band_steps, groups, 2 N)  d_B and d_C
  };
  /// The same on a device, where parts of all sequences are worked on side by side.
  template <device_policy P, storage T>
  requires std::is_same_v<typename P::memory_space, space::device>
  struct workspace<P, T> {
    out<P, accum_t<T>, dyn, dyn, dyn> carry;         // (parts, D, N)       gradient of the state after each part
    out<P, accum_t<T>, dyn, dyn> steps;              // (parts, D)          sums of dt
    out<P, accum_t<T>, dyn, dyn, dyn> d_A;           // (parts, D, N)
    out<P, accum_t<T>, dyn, dyn, dyn> d_channel;     // (parts, 2, D)       d_D and d_delta_bias
    out<P, accum_t<T>, dyn, dyn, dyn> d_projection;  // (groups, B L, 2 N)  d_B and d_C
  };

 private:
  template <class P>
  static constexpr bool on_device = std::is_same_v<typename P::memory_space, space::device>;
  struct named_stride {
    char const* name;
    std::int64_t stride, most;  // of the second dimension
    template <class View>
    constexpr named_stride(char const* of, View const& x)
        : name(of), stride(x.present() ? x.stride(1) : 0), most(0xffffffff / sizeof(typename View::value_type)) {}
  };
  /// Kernels count steps by 31 bits, and the bytes from one to the next by 32.
  template <class P>
  static void check_steps(char const* op, std::int64_t length, std::initializer_list<named_stride> all) {
    if (!on_device<P> || length < 2) return;
    if (length > 0x7fffffff)
      check_that(false, op, "u", std::to_string(length) + " steps", "at most 2147483647 on a device");
    for (auto const& x : all)
      if (x.stride < 0 || x.stride > x.most)
        check_that(false, op, x.name, "steps " + std::to_string(x.stride) + " elements apart",
                   "at most " + std::to_string(x.most) + " on a device");
  }
  template <int N>
  static constexpr void check_states() {
    static_assert(N >= 1 && N <= 256,
                  "blackmamba: selective_scan: N, the number of states of a channel, must lie in 1 to 256; choose a "
                  "smaller d_state");
  }
  template <int N, class Inputs>
  static void check_parameters(char const* op, Inputs const& in, std::int64_t channels) {
    check_shape(op, "A", in.A, {channels, N});
    check_optional_shape(op, "D", in.D, {channels});
    check_optional_shape(op, "delta_bias", in.delta_bias, {channels});
  }
  /// @returns the number of rows that states have
  template <int N, class Inputs>
  static std::int64_t check_inputs(char const* op, Inputs const& in, std::int64_t batch, std::int64_t length,
                                   std::int64_t channels) {
    check_states<N>();
    check_shape(op, "u", in.u, {batch, length, channels});
    check_shape(op, "delta", in.delta, {batch, length, channels});
    check_shape(op, "B", in.B, {batch, length, N});
    check_shape(op, "C", in.C, {batch, length, N});
    check_optional_shape(op, "z", in.z, {batch, length, channels});
    check_parameters<N>(op, in, channels);
    std::int64_t const states = check_packed(op, batch, length, in.cu_seqlens);
    check_optional_shape(op, "initial_state", in.initial_state, {states, channels, N});
    return states;
  }
  template <class View>
  static void check_of_optional(char const* op, char const* name, View const& view,
                                std::initializer_list<std::int64_t> expected, char const* input, bool present) {
    if (!view.present()) return;
    check_that(present, op, name, "a gradient", std::string("none, for ") + input + " is absent");
    check_shape(op, name, view, expected);
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/selective_scan/selective_scan_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/selective_scan/selective_scan_cuda.cuh>
#endif
