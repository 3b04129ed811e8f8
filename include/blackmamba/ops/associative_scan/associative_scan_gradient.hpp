#pragma once
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/view.hpp>
#include <blackmamba/ops/associative_scan/associative_scan_math.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#if BLACKMAMBA_CUDA  // with an operator of the host alone, these templates are host functions alone, as is meant
#pragma nv_diagnostic push
#pragma nv_diag_suppress 20011, 20014
#endif

/// The mathematics of a scan's gradient, written once for host and device.
///
/// With s_0 = initial and s_{t+1} = s_t . x_t, the gradient g of every s follows from that of the one after it by a
/// linear map, the transposed Jacobian of the combination in its left argument:
///
///   g_t = (what is given of s_t) + (d s_{t+1} / d s_t)^T g_{t+1},      d_x_t = (d s_{t+1} / d x_t)^T g_{t+1}
///
/// First all maps are computed, independently of each other (scan_maps), then comes a scan of these against the
/// direction of the first, and then all d_x, independently (scan_pullback).
namespace blackmamba {

template <class Operator>
using scan_element = std::remove_cvref_t<decltype(std::declval<Operator const&>().identity())>;

/// The numbers that an operator's element consists of: the element itself, or what the operator calls `scalar`.
template <class Operator, class E = scan_element<Operator>>
struct scan_scalar {
  using type = void;
};
template <class Operator, std::floating_point E>
struct scan_scalar<Operator, E> {
  using type = E;
};
template <class Operator, class E>
requires(!std::floating_point<E> && requires { typename Operator::scalar; }) struct scan_scalar<Operator, E> {
  using type = typename Operator::scalar;
};
template <class Operator, class E>
requires(!std::floating_point<E>) struct scan_scalar<scan_operator::exchanged<Operator>, E> : scan_scalar<Operator, E> {
};

/// An operator that tells its gradient: `scan_gradient<E> backward(E a, E b, E d_c) const` returns d_a and d_b for
/// c = a . b. It is linear in d_c.
template <class Operator>
concept differentiable_operator = requires(Operator const& op, scan_element<Operator> const& e) {
  { op.backward(e, e, e) } -> std::convertible_to<scan_gradient<scan_element<Operator>>>;
};

namespace detail {

/// An element as the numbers that it consists of.
template <class E, class S>
struct scan_components {
  static constexpr int count = static_cast<int>(sizeof(E) / sizeof(S));
  S at[std::size_t{count}];
  BLACKMAMBA_HD static scan_components of(E const& e) { return __builtin_bit_cast(scan_components, e); }
  BLACKMAMBA_HD E element() const { return __builtin_bit_cast(E, *this); }
  /// Zeros, but for a one in place k.
  BLACKMAMBA_HD static E unit(int k) {
    scan_components c;
    for (int i = 0; i < count; ++i) c.at[i] = i == k ? S(1) : S(0);
    return c.element();
  }
  BLACKMAMBA_HD static E zero() { return unit(-1); }
  BLACKMAMBA_HD static E sum(E const& x, E const& y) {
    scan_components a = of(x);
    scan_components const b = of(y);
    for (int i = 0; i < count; ++i) a.at[i] += b.at[i];
    return a.element();
  }
};

/// g -> m g + v, on gradients of elements.
template <class E, class S>
struct scan_map {
  using components = scan_components<E, S>;
  static constexpr int n = components::count;
  S m[std::size_t{n}][std::size_t{n}];
  components v;
  BLACKMAMBA_HD explicit operator E() const { return v.element(); }
};
/// One such map after another: a is applied first.
template <class E, class S>
struct scan_map_composition {
  using map = scan_map<E, S>;
  static constexpr int n = map::n;
  BLACKMAMBA_HD map operator()(map const& a, map const& b) const {
    map c;
    for (int i = 0; i < n; ++i) {
      c.v.at[i] = b.v.at[i];
      for (int k = 0; k < n; ++k) c.v.at[i] += b.m[i][k] * a.v.at[k];
      for (int j = 0; j < n; ++j) {
        c.m[i][j] = S(0);
        for (int k = 0; k < n; ++k) c.m[i][j] += b.m[i][k] * a.m[k][j];
      }
    }
    return c;
  }
  BLACKMAMBA_HD static map identity() {
    map c;
    for (int i = 0; i < n; ++i) {
      c.v.at[i] = S(0);
      for (int j = 0; j < n; ++j) c.m[i][j] = i == j ? S(1) : S(0);
    }
    return c;
  }
};

/// Whether the left Jacobian is diagonal: of a single number, and where the operator says so.
template <class Operator, class E, class S>
constexpr bool scan_is_diagonal() {
  if constexpr (requires { Operator::diagonal; })
    return Operator::diagonal || sizeof(E) == sizeof(S);
  else
    return sizeof(E) == sizeof(S);
}

template <class E, class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE E scan_value(T const& value) {
  if constexpr (std::is_same_v<E, T>)
    return value;
  else
    return convert<E>(value);
}

/// A sequence's elements in the order of the forward scan: step j, channel d.
template <class V>
struct scan_steps {
  V* first;
  std::int64_t stride;
  BLACKMAMBA_HD BLACKMAMBA_INLINE V& operator()(std::int64_t j, std::int64_t d) const { return first[j * stride + d]; }
};

/// What the two passes over all elements have in common. A pass is called as
///
///   auto const steps = pass.at(place);                of a place: index, batch, first, length of a sequence
///   pass.step(place, steps, j, d, excluding, edge)    excluding is pass.exclusive, where that is known in advance
///   pass.empty(place, d)                              where the sequence has no steps
///
/// where edge holds for the first step and the last, and may hold for others.
template <class Operator, class Space, class T>
struct scan_gradient_pass {
  using E = scan_element<Operator>;
  using S = typename scan_scalar<Operator>::type;
  using components = scan_components<E, S>;
  template <class V>
  using tensor = view<Space, V, dyn, dyn, dyn>;

  Operator op;
  tensor<T const> x, y;
  view<Space, E const, dyn, dyn> initial, d_total;
  view<Space, std::int64_t const, dyn> cu_seqlens;
  bool exclusive, reverse;

  template <class V, class Place>
  BLACKMAMBA_HD scan_steps<V> steps_of(tensor<V> const& v, Place const& q) const {
    std::int64_t const first = q.first + (reverse && q.length > 0 ? q.length - 1 : 0);
    return {v.row(q.batch, first), reverse ? -v.stride(1) : v.stride(1)};
  }
  template <class Place>
  BLACKMAMBA_HD BLACKMAMBA_INLINE E given_total(Place const& q, std::int64_t d) const {
    return d_total.present() ? d_total.row(q.index)[d] : components::zero();
  }
};

/// What g_j is of g_{j+1}: where Diagonal, m and v in tensors of their own, with the components beside each other, else
/// a scan_map. The last step's takes in d_total, and is constant.
template <class Operator, class Space, class T, bool Diagonal>
struct scan_maps : scan_gradient_pass<Operator, Space, T> {
  using base = scan_gradient_pass<Operator, Space, T>;
  using typename base::components;
  using typename base::E;
  using typename base::S;
  using M = std::conditional_t<Diagonal, S, scan_map<E, S>>;
  static constexpr int n = components::count;

  typename base::template tensor<T const> d_y;
  typename base::template tensor<M> m;
  typename base::template tensor<S> v;  // absent where not Diagonal

  struct steps {
    scan_steps<T const> x, y, d_y;
    scan_steps<M> m;
    scan_steps<S> v;
  };
  template <class Place>
  BLACKMAMBA_HD steps at(Place const& q) const {
    return {this->steps_of(this->x, q), this->steps_of(this->y, q), this->steps_of(d_y, q), this->steps_of(m, q),
            this->steps_of(v, q)};
  }
  template <class Place>
  BLACKMAMBA_HD BLACKMAMBA_INLINE void step(Place const& q, steps const& s, std::int64_t j, std::int64_t d,
                                            bool excluding, bool edge) const {
    E const given = scan_value<E>(s.d_y(j, d)), a = scan_value<E>(s.y(j, d));
    if (edge && j + 1 == q.length) {
      // Inclusive: y_j is the total. Exclusive: it is combined once more.
      E total = this->given_total(q, d);
      if (excluding && this->d_total.present()) total = this->op.backward(a, scan_value<E>(s.x(j, d)), total).d_a;
      put(s, j, d, components::sum(given, total), [](int) { return components::zero(); });
    } else {
      E const b = scan_value<E>(s.x(excluding ? j : j + 1, d));
      put(s, j, d, given, [&](int k) { return this->op.backward(a, b, k < 0 ? ones() : components::unit(k)).d_a; });
    }
  }
  template <class Place>
  BLACKMAMBA_HD void empty(Place const&, std::int64_t) const {}

 private:
  BLACKMAMBA_HD BLACKMAMBA_INLINE static E ones() {
    components c;
    for (int i = 0; i < n; ++i) c.at[i] = S(1);
    return c.element();
  }
  /// column(k) is the map's k-th column, column(-1) the sum of all.
  template <class Column>
  BLACKMAMBA_HD BLACKMAMBA_INLINE static void put(steps const& s, std::int64_t j, std::int64_t d, E const& given,
                                                  Column const& column) {
    components const constant = components::of(given);
    if constexpr (Diagonal) {
      components const diagonal = components::of(column(-1));
      for (int i = 0; i < n; ++i) {
        s.m(j, d * n + i) = diagonal.at[i];
        s.v(j, d * n + i) = constant.at[i];
      }
    } else {
      scan_map<E, S> map;
      map.v = constant;
      for (int k = 0; k < n; ++k) {
        components const c = components::of(column(k));
        for (int i = 0; i < n; ++i) map.m[i][k] = c.at[i];
      }
      s.m(j, d) = map;
    }
  }
};

/// d_x and d_initial from g.
template <class Operator, class Space, class T>
struct scan_pullback : scan_gradient_pass<Operator, Space, T> {
  using base = scan_gradient_pass<Operator, Space, T>;
  using typename base::components;
  using typename base::E;

  typename base::template tensor<E const> g;
  typename base::template tensor<T> d_x;
  view<Space, E, dyn, dyn> d_initial;

  struct steps {
    scan_steps<T const> x, y;
    scan_steps<E const> g;
    scan_steps<T> d_x;
  };
  template <class Place>
  BLACKMAMBA_HD steps at(Place const& q) const {
    return {this->steps_of(this->x, q), this->steps_of(this->y, q), this->steps_of(g, q), this->steps_of(d_x, q)};
  }
  template <class Place>
  BLACKMAMBA_HD BLACKMAMBA_INLINE void step(Place const& q, steps const& s, std::int64_t j, std::int64_t d,
                                            bool excluding, bool edge) const {
    E const b = scan_value<E>(s.x(j, d));
    scan_gradient<E> combined;
    if (excluding) {
      E const next = edge && j + 1 == q.length ? this->given_total(q, d) : s.g(j + 1, d);
      combined = this->op.backward(scan_value<E>(s.y(j, d)), b, next);
      combined.d_a = s.g(j, d);
    } else {
      E const a = edge && j == 0 ? before_first(q, d) : scan_value<E>(s.y(j - 1, d));
      combined = this->op.backward(a, b, s.g(j, d));
    }
    s.d_x(j, d) = scan_value<T>(combined.d_b);
    if (edge && j == 0 && d_initial.present()) d_initial.row(q.index)[d] = combined.d_a;
  }
  template <class Place>
  BLACKMAMBA_HD void empty(Place const& q, std::int64_t d) const {
    if (d_initial.present()) d_initial.row(q.index)[d] = this->given_total(q, d);
  }

 private:
  template <class Place>
  BLACKMAMBA_HD BLACKMAMBA_INLINE E before_first(Place const& q, std::int64_t d) const {
    if (this->initial.present()) return this->initial.row(q.index)[d];
    return this->op.identity();
  }
};

}  // namespace detail

}  // namespace blackmamba

#if BLACKMAMBA_CUDA
#pragma nv_diagnostic pop
#endif
