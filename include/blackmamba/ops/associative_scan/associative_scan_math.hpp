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

/// Gradients of a combination c = a . b with respect to its arguments.
template <class E>
struct scan_gradient {
  E d_a, d_b;
};

namespace scan_operator {

/// An operator is a small value with `E operator()(E a, E b) const` for a before b, associative, and `E identity()`.
/// One that says `lane_wise = true` promises that its operator() also takes packs of E and works lane by lane; scans of
/// float and double by such an operator are vectorised along the row.
///
/// With `scan_gradient<E> backward(E a, E b, E d_c) const`, the gradients of a and b from that of c = a . b, its scans
/// have a backward pass. An element that is a struct then consists of numbers of one type, which the operator names:
/// `using scalar = float`. Where each component of d_a depends on the same component of d_c alone, `diagonal = true`
/// says so, and saves the matrices.

template <class E>
struct sum {
  static constexpr bool lane_wise = true;
  template <class V>
  BLACKMAMBA_HD V operator()(V a, V b) const {
    return a + b;
  }
  BLACKMAMBA_HD static E identity() { return E(0); }
  BLACKMAMBA_HD scan_gradient<E> backward(E, E, E d_c) const { return {d_c, d_c}; }
};

template <class E>
struct product {
  static constexpr bool lane_wise = true;
  template <class V>
  BLACKMAMBA_HD V operator()(V a, V b) const {
    return a * b;
  }
  BLACKMAMBA_HD static E identity() { return E(1); }
  BLACKMAMBA_HD scan_gradient<E> backward(E a, E b, E d_c) const { return {d_c * b, a * d_c}; }
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
  /// Of equals the earlier one has the gradient.
  BLACKMAMBA_HD scan_gradient<E> backward(E a, E b, E d_c) const {
    return a >= b ? scan_gradient<E>{d_c, E(0)} : scan_gradient<E>{E(0), d_c};
  }
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
  /// Of equals the earlier one has the gradient.
  BLACKMAMBA_HD scan_gradient<E> backward(E a, E b, E d_c) const {
    return a <= b ? scan_gradient<E>{d_c, E(0)} : scan_gradient<E>{E(0), d_c};
  }
};

/// log(e^a + e^b), from the larger one on: no overflow, and -infinity is the logarithm of nothing.
template <class E>
struct log_sum_exp {
  static_assert(std::is_floating_point_v<E>, "blackmamba: scan_operator::log_sum_exp: the element is float or double");
  static constexpr bool lane_wise = true;
  template <class V>
  BLACKMAMBA_HD V operator()(V a, V b) const {
    using math::abs;
    using math::exp;
    using math::log1p_unit;
    using math::max;
    return max(a, b) + log1p_unit(exp(-abs(finite(a) - finite(b))));
  }
  BLACKMAMBA_HD static E identity() { return E(-INFINITY); }
  BLACKMAMBA_HD scan_gradient<E> backward(E a, E b, E d_c) const {
    E const difference = finite(a) - finite(b);
    return {math::sigmoid(difference) * d_c, math::sigmoid(-difference) * d_c};
  }

 private:
  /// Infinities have no difference; numbers of this size have, and e to its power is 0. max and min return their second
  /// argument where one is not a number: such an x stays, and so does the sum's.
  template <class V>
  BLACKMAMBA_HD static V finite(V x) {
    using math::max;
    using math::min;
    return max(V(E(-1e37)), min(V(E(1e37)), x));
  }
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

  using scalar = T;
  static constexpr bool diagonal = true;  // d_a = (d_c.a, d_c.b) b.a
  BLACKMAMBA_HD scan_gradient<affine<T>> backward(affine<T> a, affine<T> b, affine<T> d_c) const {
    return {{d_c.a * b.a, d_c.b * b.a}, {math::fma(d_c.b, a.b, d_c.a * a.a), d_c.b}};
  }
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
  template <class V>
    requires requires(Operator const& o, V const& v) { o.backward(v, v, v); }
  BLACKMAMBA_HD scan_gradient<V> backward(V const& a, V const& b, V const& d_c) const {
    scan_gradient<V> const d = op.backward(b, a, d_c);
    return {d.d_b, d.d_a};
  }
};
template <class Operator>
exchanged(Operator) -> exchanged<Operator>;

}  // namespace scan_operator
}  // namespace blackmamba

#if BLACKMAMBA_CUDA
#pragma nv_diagnostic pop
#endif
