#pragma once
#include <blackmamba/core/math.hpp>

#include <cmath>
#include <type_traits>

#if BLACKMAMBA_CUDA  // with simd packs, these templates are host functions alone, as is meant
#pragma nv_diagnostic push
#pragma nv_diag_suppress 20011, 20014
#endif

/// Operators of scans, for a scalar on any device or a simd pack on the host.
namespace blackmamba {

/// The map h -> a h + b.
template <class T>
struct affine {
  T a, b;
};

namespace scan_operator {

/// An operator is a small value with `E operator()(E a, E b) const` for a before b, associative, and `E identity()`.
/// One that says `lane_wise = true` promises that its operator() also takes packs of E and works lane by lane; scans of
/// float and double by such an operator are vectorised along the row.

template <class E>
struct sum {
  static constexpr bool lane_wise = true;
  template <class V>
  BLACKMAMBA_HD V operator()(V a, V b) const {
    return a + b;
  }
  BLACKMAMBA_HD static E identity() { return E(0); }
};

template <class E>
struct product {
  static constexpr bool lane_wise = true;
  template <class V>
  BLACKMAMBA_HD V operator()(V a, V b) const {
    return a * b;
  }
  BLACKMAMBA_HD static E identity() { return E(1); }
};

template <class E>
struct maximum {
  static_assert(std::is_floating_point_v<E>,
                "blackmamba: scan_operator::maximum: the type has no infinity; write the operator with a least value "
                "of your own");
  static constexpr bool lane_wise = true;
  template <class V>
  BLACKMAMBA_HD V operator()(V a, V b) const {
    using math::max;
    return max(a, b);
  }
  BLACKMAMBA_HD static E identity() { return E(-INFINITY); }
};

template <class E>
struct minimum {
  static_assert(std::is_floating_point_v<E>,
                "blackmamba: scan_operator::minimum: the type has no infinity; write the operator with a largest value "
                "of your own");
  static constexpr bool lane_wise = true;
  template <class V>
  BLACKMAMBA_HD V operator()(V a, V b) const {
    using math::min;
    return min(a, b);
  }
  BLACKMAMBA_HD static E identity() { return E(INFINITY); }
};

/// One affine map after another: a is applied first. Scanning the maps (a_t, b_t) from (1, h_0) gives in its b the
/// recurrence h_t = a_t h_{t-1} + b_t (Blelloch, "Prefix sums and their applications", 1990, section 1.4).
template <class T>
struct composition {
  template <class V>
  BLACKMAMBA_HD affine<V> operator()(affine<V> a, affine<V> b) const {
    using math::fma;
    return {a.a * b.a, fma(b.a, a.b, b.b)};
  }
  BLACKMAMBA_HD static affine<T> identity() { return {T(1), T(0)}; }
};

/// The same operator with its arguments exchanged: in a scan in reverse, what lies earlier in the row stays on the
/// left.
template <class Operator>
struct exchanged {
  Operator op;
  template <class V>
  BLACKMAMBA_HD V operator()(V const& a, V const& b) const {
    return op(b, a);
  }
  BLACKMAMBA_HD auto identity() const { return op.identity(); }
};
template <class Operator>
exchanged(Operator) -> exchanged<Operator>;

}  // namespace scan_operator
}  // namespace blackmamba

#if BLACKMAMBA_CUDA
#pragma nv_diagnostic pop
#endif
