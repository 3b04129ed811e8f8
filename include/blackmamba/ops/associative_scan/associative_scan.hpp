#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>
#include <blackmamba/ops/associative_scan/associative_scan_math.hpp>
#include <blackmamba/ops/associative_scan/scan_shape.hpp>

#include <concepts>
#include <type_traits>

namespace blackmamba {

/// The element that a scan operator combines: the type of its identity.
template <class Operator>
using scan_element = std::remove_cvref_t<decltype(std::declval<Operator const&>().identity())>;

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
    static_assert(
        associative_operator<Operator>,
        "blackmamba: associative_scan: the operator can't combine two elements; give it E operator()(E a, E b) "
        "const and E identity() const");
    static_assert(
        std::is_trivially_copyable_v<E>,
        "blackmamba: associative_scan: the element type is not trivially copyable; scan indices or handles of "
        "such objects instead");
    static_assert(std::is_default_constructible_v<E>,
                  "blackmamba: associative_scan: the element type has no default constructor; add one");
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
};

}  // namespace blackmamba

#include <blackmamba/ops/associative_scan/associative_scan_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/associative_scan/associative_scan_cuda.cuh>
#endif
