#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>
#include <blackmamba/ops/associative_scan/associative_scan_gradient.hpp>
#include <blackmamba/ops/associative_scan/associative_scan_math.hpp>
#include <blackmamba/ops/associative_scan/first_order_recurrence.hpp>
#include <blackmamba/ops/associative_scan/scan_shape.hpp>

#include <concepts>
#include <type_traits>

namespace blackmamba {

/// A small value with `E operator()(E a, E b) const`, a before b, and `E identity() const` (static or not).
template <class Operator>
concept associative_operator = requires(Operator const& op, scan_element<Operator> const& e) {
  { op(e, e) } -> std::convertible_to<scan_element<Operator>>;
};

/// Scan (all prefix combinations) by any associative operator, for what is visited at t = 0, 1, … L-1:
///
///   inclusive  y_t = initial . x_0 . x_1 … x_t            total = initial . x_0 … x_{L-1}
///   exclusive  y_t = initial . x_0 … x_{t-1},  y_0 = initial
///
/// along the contiguous axis of rows (R, L), or along L of (B, L, D), each channel for itself. The operator need not be
/// commutative: its left argument is what was visited before. In reverse the row is visited from its end: the result is
/// that of the reversed row, reversed (scan_operator::exchanged turns the arguments round).
///
/// The element type E is what identity() returns; it is trivially copyable. x may hold any type that converts to E
/// explicitly, y any that E converts to; between storage types (float, double, bfloat16, half) values are widened and
/// rounded. An operator with `lane_wise = true` (associative_scan_math.hpp) is vectorised along rows.
/// On cuda the operator's functions, and conversions of its own types, are __host__ __device__ (BLACKMAMBA_HD).
///
/// Combinations are grouped in blocks of fixed length counted from each row's (sequence's) first visited element: the
/// result is bitwise repeatable, independent of the number of threads and of neighbouring rows, and for operators that
/// round it differs from that of one long fold by rounding. Blelloch, "Prefix sums and their applications", 1990;
/// blocks hand their prefix on as in Merrill and Garland, "Single-pass parallel prefix scan with decoupled look-back",
/// 2016.
struct associative_scan {
  /// Rank is x's: 2 for (R, L), 3 for (B, L, D).
  template <device_policy P, class E, int Rank>
  struct options {
    bool exclusive = false;
    bool reverse = false;
    scan_state<P, E const, Rank> initial = {};  // (R|S) or (B|S, D)  optional; the identity where absent
    scan_state<P, E, Rank> total = {};          // (R|S) or (B|S, D)  optional, out; must not alias initial
    in<P, std::int64_t, dyn> cu_seqlens = {};   // (S+1)  optional; R or B is 1; from 0 to L, non-decreasing
  };
  /// y may be x where both hold the same type. scratch_bytes<E, Space>(extents of y, S) of scratch. Asynchronous on
  /// cuda.
  template <device_policy P, class Operator, class X, class Y, int... N, int... M>
    requires(sizeof...(N) == sizeof...(M) && (sizeof...(N) == 2 || sizeof...(N) == 3))
  static void forward(P const& policy, Operator const& op, view<typename P::memory_space, X, N...> x,
                      view<typename P::memory_space, Y, M...> y,
                      std::type_identity_t<options<home<P>, scan_element<Operator>, sizeof...(N)>> const& how = {}) {
    using E = scan_element<Operator>;
    check_operator<Operator>();
    static_assert(
        scan_convertible<std::remove_const_t<X>, E>,
        "blackmamba: associative_scan: x does not convert to the operator's element type; add a conversion or "
        "let identity() return the type that x holds");
    static_assert(
        scan_convertible<E, Y>,
        "blackmamba: associative_scan: the operator's element type does not convert to the type that y holds; "
        "add a conversion");
    scan_shape const shape("associative_scan", y, how.cu_seqlens);
    shape.check("x", x);
    shape.check_state("initial", how.initial);
    shape.check_state("total", how.total);
    if (shape.states() == 0) return;
    scan_scratch<P, E> memory(policy, shape);
    backend_of<associative_scan, P>::forward(policy, op, scan_view<P, X const, sizeof...(N)>(x),
                                             scan_view<P, Y, sizeof...(M)>(y), how, memory.carries, memory.flags);
  }

  /// T is what x, y and their gradients hold: E, or where E is float or double any storage type.
  template <device_policy P, class T, class E, int Rank>
  struct gradient_inputs {
    scan_view<P, T const, Rank> x;              // (R, L) or (B, L, D)  as in forward
    scan_view<P, T const, Rank> y;              // (R, L) or (B, L, D)  the result of forward
    scan_view<P, T const, Rank> d_y;            // (R, L) or (B, L, D)
    bool exclusive = false;                     //                      these four as in forward
    bool reverse = false;
    scan_state<P, E const, Rank> initial = {};  // (R|S) or (B|S, D)
    in<P, std::int64_t, dyn> cu_seqlens = {};   // (S+1)
    scan_state<P, E const, Rank> d_total = {};  // (R|S) or (B|S, D)    optional: zeros
  };
  /// Gradients of x and of initial (optional; of an empty sequence d_total), by an operator with
  ///
  ///   scan_gradient<E> backward(E a, E b, E d_c) const     d_a and d_b for c = op(a, b), linear in d_c
  ///
  /// (see scan_operator in associative_scan_math.hpp for what elements of several numbers ask for). Overwrites. d_x may
  /// be d_y; nothing else may alias. States are those that y holds, as it is rounded to T.
  ///
  /// A pass over all elements, a scan against the direction of the first of the maps from each state's gradient to the
  /// one before it (see associative_scan_gradient.hpp), and one more pass. The scan of one number, or of several that
  /// do not mix, is the first-order recurrence; n numbers that mix are scanned as matrices, (n + 1) n numbers each: for
  /// small n. Bitwise repeatable, independent of the number of threads. Asynchronous on cuda.
  /// backward_scratch_bytes<Operator, Space>(extents of d_x, S) of scratch.
  template <device_policy P, class Operator, class T, int... N>
    requires(sizeof...(N) == 2 || sizeof...(N) == 3)
  static void backward(
      P const& policy, Operator const& op,
      std::type_identity_t<gradient_inputs<home<P>, T, scan_element<Operator>, sizeof...(N)>> const& in,
      view<typename P::memory_space, T, N...> d_x,
      std::type_identity_t<scan_state<P, scan_element<Operator>, sizeof...(N)>> d_initial = {}) {
    using E = scan_element<Operator>;
    check_operator<Operator>();
    static_assert(differentiable_operator<Operator>,
                  "blackmamba: associative_scan.backward: the operator does not tell its gradient; give it "
                  "scan_gradient<E> backward(E a, E b, E d_c) const, which returns d_a and d_b for c = op(a, b)");
    if constexpr (differentiable_operator<Operator>) {
      static_assert(std::is_same_v<T, E> || (std::is_floating_point_v<E> && storage<T>),
                    "blackmamba: associative_scan.backward: d_x does not hold the operator's elements; scan values of "
                    "the type that identity() returns");
      static_assert(has_scalar<Operator>,
                    "blackmamba: associative_scan.backward: the element's numbers are not known; write `using scalar = "
                    "float` (or double) into the operator, and let the element consist of such numbers alone");
      if constexpr (has_scalar<Operator>) {
        scan_shape const shape("associative_scan.backward", d_x, in.cu_seqlens);
        shape.check("x", in.x);
        shape.check("y", in.y);
        shape.check("d_y", in.d_y);
        shape.check_state("initial", in.initial);
        shape.check_state("d_total", in.d_total);
        shape.check_state("d_initial", d_initial);
        if (shape.states() > 0) run_backward<P, Operator, T, sizeof...(N)>(policy, op, in, d_x, d_initial);
      }
    }
  }

  /// One step of (B, L, D): state = op(state, x), in place; y (B, D) is the new state, and may be x where both hold the
  /// same type. The state aliases neither. (As it is before the step, it is the exclusive result.)
  template <device_policy P, class Operator, class X, class Y>
  static void step(P const& policy, Operator const& op, view<typename P::memory_space, X, dyn, dyn> x,
                   std::type_identity_t<out<P, scan_element<Operator>, dyn, dyn>> state, out<P, Y, dyn, dyn> y) {
    using E = scan_element<Operator>;
    check_operator<Operator>();
    static_assert(scan_convertible<std::remove_const_t<X>, E> && scan_convertible<E, Y>,
                  "blackmamba: associative_scan.step: x and y do not convert to the operator's element type and back; "
                  "add conversions");
    check_shape("associative_scan.step", "x", x, {y.extent(0), y.extent(1)});
    check_shape("associative_scan.step", "state", state, {y.extent(0), y.extent(1)});
    if (y.size() > 0)
      backend_of<associative_scan, P>::step(policy, op, view<typename P::memory_space, X const, dyn, dyn>(x), state, y);
  }

  /// Bytes of scratch for y (R, L), with S packed sequences where there are any, under policies of a memory space.
  template <class E, class Space = space::host>
  static std::size_t scratch_bytes(std::int64_t rows, std::int64_t length, std::int64_t packed = 0) {
    return scan_shape(2, rows, length, 1, packed).template scratch_bytes<E, Space>();
  }
  /// The same for y (B, L, D).
  template <class E, class Space = space::host>
  static std::size_t scratch_bytes(std::int64_t batch, std::int64_t length, std::int64_t channels,
                                   std::int64_t packed) {
    return scan_shape(3, batch, length, channels, packed).template scratch_bytes<E, Space>();
  }
  /// The same of backward, for d_x (R, L).
  template <class Operator, class Space = space::host>
  static std::size_t backward_scratch_bytes(std::int64_t rows, std::int64_t length, std::int64_t packed = 0) {
    return backward_bytes<Operator, Space>(2, rows, length, 1, packed);
  }
  /// The same for (B, L, D).
  template <class Operator, class Space = space::host>
  static std::size_t backward_scratch_bytes(std::int64_t batch, std::int64_t length, std::int64_t channels,
                                            std::int64_t packed) {
    return backward_bytes<Operator, Space>(3, batch, length, channels, packed);
  }

 private:
  template <class Operator>
  static constexpr void check_operator() {
    using E = scan_element<Operator>;
    static_assert(associative_operator<Operator>,
                  "blackmamba: associative_scan: the operator can't combine two elements; give it E operator()(E a, E "
                  "b) const and E identity() const");
    static_assert(std::is_trivially_copyable_v<E>,
                  "blackmamba: associative_scan: the element type is not trivially copyable; scan indices or handles "
                  "of such objects instead");
    static_assert(std::is_default_constructible_v<E>,
                  "blackmamba: associative_scan: the element type has no default constructor; add one");
  }
  template <class Operator>
  static constexpr bool has_scalar = [] {
    using S = typename scan_scalar<Operator>::type;
    if constexpr (std::is_floating_point_v<S>)
      return sizeof(scan_element<Operator>) % sizeof(S) == 0;
    else
      return false;
  }();
  template <class Operator>
  struct gradient_types {
    using E = scan_element<Operator>;
    using S = typename scan_scalar<Operator>::type;
    static constexpr bool diagonal = detail::scan_is_diagonal<Operator, E, S>();
    static constexpr int n = detail::scan_components<E, S>::count;
    using map = detail::scan_map<E, S>;
  };

  /// (R, L) as (R, L, 1), and (R) as (R, 1).
  template <class Space, class T>
  static view<Space, T, dyn, dyn, dyn> with_channels(view<Space, T, dyn, dyn> v) {
    return {v.data(), {v.extent(0), v.extent(1), 1}, {v.stride(0), 1, 1}};
  }
  template <class Space, class T>
  static view<Space, T, dyn, dyn, dyn> with_channels(view<Space, T, dyn, dyn, dyn> v) {
    return v;
  }
  template <class Space, class T>
  static view<Space, T, dyn, dyn> state_with_channels(view<Space, T, dyn> v) {
    return {v.data(), {v.extent(0), 1}, {1, 1}};
  }
  template <class Space, class T>
  static view<Space, T, dyn, dyn> state_with_channels(view<Space, T, dyn, dyn> v) {
    return v;
  }

  template <device_policy P, class Operator, class T, int Rank>
  static void run_backward(P const& policy, Operator const& op,
                           gradient_inputs<home<P>, T, scan_element<Operator>, Rank> const& in,
                           scan_view<P, T, Rank> d_x, scan_state<P, scan_element<Operator>, Rank> d_initial) {
    using types = gradient_types<Operator>;
    using E = typename types::E;
    using S = typename types::S;
    using Space = typename P::memory_space;
    constexpr int n = types::n;
    std::int64_t channels = 1;
    if constexpr (Rank == 3) channels = d_x.extent(2);
    std::int64_t const batch = d_x.extent(0), length = d_x.extent(1);
    scratch<P> memory(policy, own_bytes<Operator>(batch * length * channels));
    detail::scan_gradient_pass<Operator, Space, T> const pass{op,
                                                              with_channels(in.x),
                                                              with_channels(in.y),
                                                              state_with_channels(in.initial),
                                                              state_with_channels(in.d_total),
                                                              in.cu_seqlens,
                                                              in.exclusive,
                                                              in.reverse};
    view<Space, E, dyn, dyn, dyn> g;
    if constexpr (types::diagonal) {
      auto const m = memory.template allocate<S>(batch, length, channels * n);
      auto const v = memory.template allocate<S>(batch, length, channels * n);
      backend_of<associative_scan, P>::backward(
          policy, detail::scan_maps<Operator, Space, T, true>{pass, with_channels(in.d_y), m, v});
      if constexpr (Rank * n == 2) {
        auto const a = m.reshape(batch, length), b = v.reshape(batch, length);
        first_order_recurrence::forward<P, S>(
            policy, {.a = a, .b = b, .cu_seqlens = in.cu_seqlens, .reverse = !in.reverse}, b);
      } else {
        first_order_recurrence::forward<P, S>(
            policy, {.a = m, .b = v, .cu_seqlens = in.cu_seqlens, .reverse = !in.reverse}, v);
      }
      g = {reinterpret_cast<E*>(v.data()), batch, length, channels};
    } else {
      using map = typename types::map;
      auto const maps = memory.template allocate<map>(batch, length, channels);
      g = memory.template allocate<E>(batch, length, channels);
      backend_of<associative_scan, P>::backward(
          policy, detail::scan_maps<Operator, Space, T, false>{pass, with_channels(in.d_y), maps, {}});
      detail::scan_map_composition<E, S> const composition;
      if constexpr (Rank == 2)
        forward(policy, composition, maps.reshape(batch, length), g.reshape(batch, length),
                {.reverse = !in.reverse, .cu_seqlens = in.cu_seqlens});
      else
        forward(policy, composition, maps, g, {.reverse = !in.reverse, .cu_seqlens = in.cu_seqlens});
    }
    backend_of<associative_scan, P>::backward(
        policy, detail::scan_pullback<Operator, Space, T>{pass, g, with_channels(d_x), state_with_channels(d_initial)});
  }
  template <class Operator>
  static std::size_t own_bytes(std::int64_t elements) {
    using types = gradient_types<Operator>;
    auto const count = static_cast<std::size_t>(elements);
    return scratch_sum((types::diagonal ? sizeof(typename types::E) : sizeof(typename types::map)) * count,
                       sizeof(typename types::E) * count);
  }
  template <class Operator, class Space>
  static std::size_t backward_bytes(int rank, std::int64_t batch, std::int64_t length, std::int64_t channels,
                                    std::int64_t packed) {
    using types = gradient_types<Operator>;
    std::size_t const own = own_bytes<Operator>(batch * length * channels);
    if constexpr (types::diagonal) {
      using S = typename types::S;
      return own + (rank * types::n == 2
                        ? first_order_recurrence::scratch_bytes<S, Space>(batch, length, packed)
                        : first_order_recurrence::scratch_bytes<S, Space>(batch, length, channels * types::n, packed));
    } else {
      using map = typename types::map;
      return own + scan_shape(rank, batch, length, channels, packed).template scratch_bytes<map, Space>();
    }
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/associative_scan/associative_scan_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/associative_scan/associative_scan_cuda.cuh>
#endif
