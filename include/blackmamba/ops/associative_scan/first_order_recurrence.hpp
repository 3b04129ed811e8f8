#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>
#include <blackmamba/ops/associative_scan/associative_scan_math.hpp>
#include <blackmamba/ops/associative_scan/scan_shape.hpp>

#include <type_traits>

namespace blackmamba {

/// The linear recurrence with coefficients that vary, element by element:
///
///   h_t = a_t h_{t-1} + b_t,   t = 0 … L-1,   h_{-1} = initial_state
///
/// along the contiguous axis of rows (R, L), or along L of (B, L, D), each channel for itself; in reverse
/// h_t = a_t h_{t+1} + b_t from h_L = initial_state. It is the scan of the maps h -> a_t h + b_t under composition
/// (Blelloch, "Prefix sums and their applications", 1990, section 1.4).
///
/// Stored as T, computed in accum_t<T>. Beyond a block of fixed length (scan_blocks) the state is carried on as
/// (product of the block's a) times (state before) plus (the block from zero), which is bitwise repeatable, independent
/// of the number of threads and of neighbouring rows, and equal to the plain loop up to rounding, provided that no
/// product of a over one block overflows where the state does not. Asynchronous on cuda.
struct first_order_recurrence {
  /// Rank is 2 for (R, L), 3 for (B, L, D).
  template <device_policy P, storage T, int Rank>
  struct inputs {
    scan_view<P, T const, Rank> a;                           // (R, L) or (B, L, D)
    scan_view<P, T const, Rank> b;                           // (R, L) or (B, L, D)
    scan_state<P, accum_t<T> const, Rank> initial_state = {};  // (R|S) or (B|S, D)  optional: zeros
    in<P, std::int64_t, dyn> cu_seqlens = {};  // (S+1)  optional; R or B is 1; from 0 to L, non-decreasing
    bool reverse = false;
  };
  /// h may be a or b. final_state, where wanted: h after the last step (before rounding to T); of an empty sequence,
  /// its initial state; must not alias initial_state. scratch_bytes<T, Space>(extents of h, S) of scratch.
  template <device_policy P, storage T, int... N>
    requires(sizeof...(N) == 2 || sizeof...(N) == 3)
  static void forward(P const& policy, std::type_identity_t<inputs<home<P>, T, sizeof...(N)>> const& in,
                      view<typename P::memory_space, T, N...> h,
                      std::type_identity_t<scan_state<P, accum_t<T>, sizeof...(N)>> final_state = {}) {
    scan_shape const shape("first_order_recurrence", h, in.cu_seqlens);
    shape.check("a", in.a);
    shape.check("b", in.b);
    shape.check_state("initial_state", in.initial_state);
    shape.check_state("final_state", final_state);
    if (shape.states() == 0) return;
    scan_scratch<P, handed_on<T, typename P::memory_space>> memory(policy, shape);
    backend_of<first_order_recurrence, P>::forward(policy, in, scan_view<P, T, sizeof...(N)>(h), final_state,
                                                   memory.carries, memory.flags);
  }

  template <device_policy P, storage T, int Rank>
  struct gradient_inputs {
    scan_view<P, T const, Rank> a;                             // (R, L) or (B, L, D)
    scan_view<P, T const, Rank> h;                             // (R, L) or (B, L, D)  the result of forward
    scan_view<P, T const, Rank> d_h;                           // (R, L) or (B, L, D)
    scan_state<P, accum_t<T> const, Rank> initial_state = {};  // (R|S) or (B|S, D)    as in forward
    scan_state<P, accum_t<T> const, Rank> d_final_state = {};  // (R|S) or (B|S, D)    optional: zeros
    in<P, std::int64_t, dyn> cu_seqlens = {};                  // (S+1)                as in forward
    bool reverse = false;
  };
  ///   d_b_t = d_h_t + a_{t+1} d_b_{t+1},  d_b_{L-1} = d_h_{L-1} + d_final_state
  ///   d_a_t = d_b_t h_{t-1}
  ///   d_initial_state = a_0 d_b_0         (optional; of an empty sequence d_final_state)
  /// (in reverse t+1 and t-1 change places). Overwrites. d_b may be d_h; nothing else may alias.
  /// scratch_bytes<T, Space>(extents of d_a, S) of scratch.
  template <device_policy P, storage T, int... N>
    requires(sizeof...(N) == 2 || sizeof...(N) == 3)
  static void backward(P const& policy, std::type_identity_t<gradient_inputs<home<P>, T, sizeof...(N)>> const& in,
                       view<typename P::memory_space, T, N...> d_a,
                       std::type_identity_t<scan_view<P, T, sizeof...(N)>> d_b,
                       std::type_identity_t<scan_state<P, accum_t<T>, sizeof...(N)>> d_initial_state = {}) {
    scan_shape const shape("first_order_recurrence.backward", d_a, in.cu_seqlens);
    shape.check("a", in.a);
    shape.check("h", in.h);
    shape.check("d_h", in.d_h);
    shape.check("d_b", d_b);
    shape.check_state("initial_state", in.initial_state);
    shape.check_state("d_final_state", in.d_final_state);
    shape.check_state("d_initial_state", d_initial_state);
    if (shape.states() == 0) return;
    scan_scratch<P, handed_on<T, typename P::memory_space>> memory(policy, shape);
    backend_of<first_order_recurrence, P>::backward(policy, in, scan_view<P, T, sizeof...(N)>(d_a), d_b,
                                                    d_initial_state, memory.carries, memory.flags);
  }

  template <device_policy P, storage T>
  struct step_inputs {
    in<P, T, dyn, dyn> a;  // (B, D)
    in<P, T, dyn, dyn> b;  // (B, D)
  };
  /// One step of (B, L, D): state = a state + b, in place; h (B, D) is the new state as T, and may be a or b.
  template <device_policy P, storage T>
  static void step(P const& policy, std::type_identity_t<step_inputs<home<P>, T>> const& in,
                   std::type_identity_t<out<P, accum_t<T>, dyn, dyn>> state, out<P, T, dyn, dyn> h) {
    auto const batch = h.extent(0), channels = h.extent(1);
    check_shape("first_order_recurrence.step", "a", in.a, {batch, channels});
    check_shape("first_order_recurrence.step", "b", in.b, {batch, channels});
    check_shape("first_order_recurrence.step", "state", state, {batch, channels});
    if (h.size() > 0) backend_of<first_order_recurrence, P>::step(policy, in, state, h);
  }

  /// Bytes of scratch for rows (R, L), with S packed sequences where there are any, under policies of a memory space.
  template <storage T, class Space = space::host>
  static std::size_t scratch_bytes(std::int64_t rows, std::int64_t length, std::int64_t packed = 0) {
    return scan_shape(2, rows, length, 1, packed).template scratch_bytes<handed_on<T, Space>, Space>();
  }
  /// The same for (B, L, D).
  template <storage T, class Space = space::host>
  static std::size_t scratch_bytes(std::int64_t batch, std::int64_t length, std::int64_t channels,
                                   std::int64_t packed) {
    return scan_shape(3, batch, length, channels, packed).template scratch_bytes<handed_on<T, Space>, Space>();
  }

 private:
  /// What blocks hand on: on the host the state, on a device, where they run together, the map.
  template <class T, class Space>
  using handed_on = std::conditional_t<std::is_same_v<Space, space::host>, accum_t<T>, affine<accum_t<T>>>;
};

}  // namespace blackmamba

#include <blackmamba/ops/associative_scan/first_order_recurrence_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/associative_scan/first_order_recurrence_cuda.cuh>
#endif
