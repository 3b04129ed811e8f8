#pragma once
#include <blackmamba/core/config.hpp>
#include <blackmamba/core/numeric.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

/// Vectors of N lanes for host code, on the compiler's vector extension (g++, clang++): the widest registers that the
/// translation unit is compiled for, two or more registers where N asks for more.
namespace blackmamba::simd {

#if defined(__AVX512F__)
inline constexpr int register_bytes = 64;
#elif defined(__AVX__)
inline constexpr int register_bytes = 32;
#else
inline constexpr int register_bytes = 16;
#endif

/// Lanes of T in one register.
template <class T>
inline constexpr int width = register_bytes / static_cast<int>(sizeof(T));

namespace detail {
template <class T, int N>
struct vector_of {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <class T>
using integer_of = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;
}  // namespace detail

/// The result of comparing packs: all bits of a lane set, or none.
template <class T, int N>
struct mask {
  typename detail::vector_of<detail::integer_of<T>, N>::type v;
  friend BLACKMAMBA_INLINE mask operator&(mask a, mask b) { return {a.v & b.v}; }
  friend BLACKMAMBA_INLINE mask operator|(mask a, mask b) { return {a.v | b.v}; }
  friend BLACKMAMBA_INLINE mask operator!(mask a) { return {~a.v}; }
};

/// N lanes of float or double with element-wise arithmetic; a scalar converts to a pack of equal lanes.
template <class T, int N = width<T>>
struct pack {
  static_assert(std::is_floating_point_v<T> && (N & (N - 1)) == 0);
  using value_type = T;
  using vector = typename detail::vector_of<T, N>::type;
  static constexpr int lanes = N;
  static constexpr std::size_t size = N;

  vector v;

  pack() = default;
  BLACKMAMBA_INLINE pack(vector x) : v(x) {}
  /// Every lane = x.
  template <class S>
    requires std::is_arithmetic_v<S>
  BLACKMAMBA_INLINE pack(S x) : v(vector{} + static_cast<T>(x)) {}

  /// Loads N consecutive values of any storage type, widened.
  template <class S>
  static BLACKMAMBA_INLINE pack load(S const* p) {
    pack r;
    if constexpr (std::is_same_v<S, T>) {
      std::memcpy(&r.v, p, sizeof(r.v));
    } else if constexpr (std::is_same_v<S, bfloat16> && std::is_same_v<T, float>) {
      typename detail::vector_of<std::uint16_t, N>::type h;
      std::memcpy(&h, p, sizeof(h));
      auto const wide = __builtin_convertvector(h, typename detail::vector_of<std::uint32_t, N>::type) << 16;
      std::memcpy(&r.v, &wide, sizeof(r.v));
    } else if constexpr (std::is_arithmetic_v<S>) {
      typename detail::vector_of<S, N>::type s;
      std::memcpy(&s, p, sizeof(s));
      r.v = __builtin_convertvector(s, vector);
    } else {
      for (int i = 0; i < N; ++i) r.v[i] = convert<T>(p[i]);
    }
    return r;
  }
  /// Loads the first n < N values; the other lanes are zero. Reads nothing past p + n.
  template <class S>
  static BLACKMAMBA_INLINE pack load(S const* p, int n) {
    S buffer[size] = {};
    std::memcpy(buffer, p, static_cast<std::size_t>(n) * sizeof(S));
    return load(buffer);
  }
  /// Stores N consecutive values, rounded to the storage type.
  template <class S>
  BLACKMAMBA_INLINE void store(S* p) const {
    if constexpr (std::is_same_v<S, T>) {
      std::memcpy(p, &v, sizeof(v));
    } else if constexpr (std::is_same_v<S, bfloat16> && std::is_same_v<T, float>) {
      using u32 = typename detail::vector_of<std::uint32_t, N>::type;
      u32 u;
      std::memcpy(&u, &v, sizeof(v));
      u32 const rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
      u32 const quiet = (u >> 16) | 0x40u;
      auto const is_nan = (u & 0x7fffffffu) > 0x7f800000u;
      auto const chosen = __builtin_convertvector(is_nan ? quiet : rounded,
                                                  typename detail::vector_of<std::uint16_t, N>::type);
      std::memcpy(p, &chosen, sizeof(chosen));
    } else {
      for (int i = 0; i < N; ++i) p[i] = convert<S>(static_cast<T>(v[i]));
    }
  }
  /// Stores the first n < N lanes. Writes nothing past p + n.
  template <class S>
  BLACKMAMBA_INLINE void store(S* p, int n) const {
    S buffer[size];
    store(buffer);
    std::memcpy(p, buffer, static_cast<std::size_t>(n) * sizeof(S));
  }

  BLACKMAMBA_INLINE T operator[](int i) const { return v[i]; }

  // clang-format off
  friend BLACKMAMBA_INLINE pack operator+(pack a, pack b) { return a.v + b.v; }
  friend BLACKMAMBA_INLINE pack operator-(pack a, pack b) { return a.v - b.v; }
  friend BLACKMAMBA_INLINE pack operator*(pack a, pack b) { return a.v * b.v; }
  friend BLACKMAMBA_INLINE pack operator/(pack a, pack b) { return a.v / b.v; }
  friend BLACKMAMBA_INLINE pack operator-(pack a) { return -a.v; }
  BLACKMAMBA_INLINE pack& operator+=(pack b) { v += b.v; return *this; }
  BLACKMAMBA_INLINE pack& operator-=(pack b) { v -= b.v; return *this; }
  BLACKMAMBA_INLINE pack& operator*=(pack b) { v *= b.v; return *this; }
  friend BLACKMAMBA_INLINE mask<T, N> operator>(pack a, pack b)  { return {a.v > b.v}; }
  friend BLACKMAMBA_INLINE mask<T, N> operator<(pack a, pack b)  { return {a.v < b.v}; }
  friend BLACKMAMBA_INLINE mask<T, N> operator>=(pack a, pack b) { return {a.v >= b.v}; }
  friend BLACKMAMBA_INLINE mask<T, N> operator<=(pack a, pack b) { return {a.v <= b.v}; }
  friend BLACKMAMBA_INLINE mask<T, N> operator==(pack a, pack b) { return {a.v == b.v}; }
  /// a b + c in one expression, which both compilers contract to one instruction where the machine has it.
  friend BLACKMAMBA_INLINE pack fma(pack a, pack b, pack c) { return a.v * b.v + c.v; }
  friend BLACKMAMBA_INLINE pack select(mask<T, N> m, pack a, pack b) { return m.v ? a.v : b.v; }
  friend BLACKMAMBA_INLINE pack max(pack a, pack b) { return a.v > b.v ? a.v : b.v; }
  friend BLACKMAMBA_INLINE pack min(pack a, pack b) { return a.v < b.v ? a.v : b.v; }
  friend BLACKMAMBA_INLINE pack abs(pack a) { return a.v < 0 ? -a.v : a.v; }
  // clang-format on
};

/// Applies a scalar function to each lane: for functions that nothing hot depends on.
template <class T, int N, class F>
BLACKMAMBA_INLINE pack<T, N> each_lane(pack<T, N> x, F f) {
  pack<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = f(static_cast<T>(x.v[i]));
  return r;
}

/// Sum of the lanes, in a fixed order (pairwise).
template <class T, int N>
BLACKMAMBA_INLINE T sum(pack<T, N> x) {
  T lane[pack<T, N>::size];
  x.store(lane);
  for (int half_width = N / 2; half_width > 0; half_width /= 2)
    for (int i = 0; i < half_width; ++i) lane[i] += lane[i + half_width];
  return lane[0];
}
/// Largest lane.
template <class T, int N>
BLACKMAMBA_INLINE T max_lane(pack<T, N> x) {
  T lane[pack<T, N>::size];
  x.store(lane);
  T m = lane[0];
  for (int i = 1; i < N; ++i) m = lane[i] > m ? lane[i] : m;
  return m;
}

namespace detail {
template <int N>
using int_vector = typename vector_of<std::int32_t, N>::type;
template <int N>
BLACKMAMBA_INLINE int_vector<N> as_int(pack<float, N> x) {
  int_vector<N> i;
  std::memcpy(&i, &x.v, sizeof(i));
  return i;
}
template <int N>
BLACKMAMBA_INLINE pack<float, N> as_float(int_vector<N> i) {
  pack<float, N> x;
  std::memcpy(&x.v, &i, sizeof(i));
  return x;
}
/// 2^x for |x| <= 126; relative error below 2e-7. Adding 1.5 * 2^23 rounds x to the nearest integer and leaves that
/// integer in the low bits; the remainder in [-1/2, 1/2] goes through a minimax polynomial.
template <int N>
BLACKMAMBA_INLINE pack<float, N> exp2_unclamped(pack<float, N> x) {
  using V = pack<float, N>;
  V const shifted = x + 12582912.0f;
  V const r = x - (shifted - 12582912.0f);
  V p = fma(V(1.535336188e-4f), r, V(1.339887440e-3f));
  p = fma(p, r, V(9.618437357e-3f));
  p = fma(p, r, V(5.550332471e-2f));
  p = fma(p, r, V(2.402264791e-1f));
  p = fma(p, r, V(6.931472028e-1f));
  p = fma(p, r, V(1.0f));
  return as_float<N>(as_int(p) + (as_int(shifted) << 23));
}
}  // namespace detail

/// 2^x; zero below -126 (no subnormals), infinity from 128. Relative error below 2e-7.
template <int N>
BLACKMAMBA_INLINE pack<float, N> exp2(pack<float, N> x) {
  using V = pack<float, N>;
  V const y = detail::exp2_unclamped(min(max(x, V(-126.0f)), V(127.0f)));
  V const high = select(x > V(127.0f), detail::exp2_unclamped(min(x, V(128.0f)) - V(1.0f)) * V(2.0f), y);
  V const finite = select(x < V(-126.0f), V(0.0f), high);
  return select(x == x, select(x >= V(128.0f), V(INFINITY), finite), x);
}
/// e^x; zero below -87.3 (no subnormals). Relative error below 2e-7.
template <int N>
BLACKMAMBA_INLINE pack<float, N> exp(pack<float, N> x) {
  using V = pack<float, N>;
  V const clamped = min(max(x, V(-87.3f)), V(88.7f));
  V const shifted = fma(clamped, V(1.44269504f), V(12582912.0f));
  V const n = shifted - 12582912.0f;
  V r = fma(n, V(-0.693359375f), clamped);
  r = fma(n, V(2.12194440e-4f), r);
  V p = fma(V(1.9875691500e-4f), r, V(1.3981999507e-3f));
  p = fma(p, r, V(8.3334519073e-3f));
  p = fma(p, r, V(4.1665795894e-2f));
  p = fma(p, r, V(1.6666665459e-1f));
  p = fma(p, r, V(5.0000001201e-1f));
  p = fma(p, r * r, r) + V(1.0f);
  // Two steps of 2^(n/2) keep the exponent in range where n is 128.
  auto const whole = detail::as_int(shifted) - 0x4b400000;
  auto const first = whole >> 1;
  V const y = p * detail::as_float<N>((first + 127) << 23) * detail::as_float<N>((whole - first + 127) << 23);
  V const finite = select(x < V(-87.3f), V(0.0f), y);
  return select(x == x, select(x > V(88.72283f), V(INFINITY), finite), x);
}
/// Natural logarithm of a positive normal number. Relative error below 2e-7 away from 1; absolute 1e-7 near 1.
template <int N>
BLACKMAMBA_INLINE pack<float, N> log(pack<float, N> x) {
  using V = pack<float, N>;
  // x = 2^e m with m in [sqrt(1/2), sqrt(2)).
  auto const bits = detail::as_int(x) - 0x3f3504f3;
  V const e = V(__builtin_convertvector(bits >> 23, typename V::vector));
  V const m = detail::as_float<N>((bits & 0x007fffff) + 0x3f3504f3);
  V const t = m - V(1.0f);
  V p = fma(V(7.0376836292e-2f), t, V(-1.1514610310e-1f));
  p = fma(p, t, V(1.1676998740e-1f));
  p = fma(p, t, V(-1.2420140846e-1f));
  p = fma(p, t, V(1.4249322787e-1f));
  p = fma(p, t, V(-1.6668057665e-1f));
  p = fma(p, t, V(2.0000714765e-1f));
  p = fma(p, t, V(-2.4999993993e-1f));
  p = fma(p, t, V(3.3333331174e-1f));
  V const t2 = t * t;
  V y = p * t * t2;
  y = fma(e, V(-2.12194440e-4f), y);
  y = fma(V(-0.5f), t2, y);
  V const finite = fma(e, V(0.693359375f), t + y);
  return select(x > V(0.0f), select(x == V(INFINITY), x, finite), select(x == V(0.0f), V(-INFINITY), V(NAN)));
}
/// log(1 + x) for x > -1, accurate for small x: the rounding of 1 + x is given back as its first-order term.
template <int N>
BLACKMAMBA_INLINE pack<float, N> log1p(pack<float, N> x) {
  using V = pack<float, N>;
  V const u = x + V(1.0f);
  V const lost = x - (u - V(1.0f));
  return select(u == V(INFINITY), u, log(u) + lost / u);
}
template <class T, int N>
BLACKMAMBA_INLINE pack<T, N> sqrt(pack<T, N> x) {
  return each_lane(x, [](T a) { return std::sqrt(a); });
}

// double serves references and gradient checks, where the library's own function per lane is what one wants.
// clang-format off
template <int N> BLACKMAMBA_INLINE pack<double, N> exp(pack<double, N> x)   { return each_lane(x, [](double a) { return std::exp(a); }); }
template <int N> BLACKMAMBA_INLINE pack<double, N> exp2(pack<double, N> x)  { return each_lane(x, [](double a) { return std::exp2(a); }); }
template <int N> BLACKMAMBA_INLINE pack<double, N> log(pack<double, N> x)   { return each_lane(x, [](double a) { return std::log(a); }); }
template <int N> BLACKMAMBA_INLINE pack<double, N> log1p(pack<double, N> x) { return each_lane(x, [](double a) { return std::log1p(a); }); }
template <class T, int N> BLACKMAMBA_INLINE pack<T, N> erf(pack<T, N> x)    { return each_lane(x, [](T a) { return std::erf(a); }); }
// clang-format on

/// Calls body(index, lanes) over [0, n): full packs of N with the integral constant N, then one rest with an int.
template <int N, class Body>
BLACKMAMBA_INLINE void for_packs(std::int64_t n, Body&& body) {
  std::int64_t i = 0;
  for (; i + N <= n; i += N) body(i, std::integral_constant<int, N>{});
  if (i < n) body(i, static_cast<int>(n - i));
}
/// x where `lanes` is the integral constant; else the first n lanes of x, and zeros: what a sum over a rest needs.
template <class V, class Lanes>
BLACKMAMBA_INLINE V first(V x, Lanes lanes) {
  if constexpr (std::is_same_v<Lanes, int>) {
    for (int i = lanes; i < V::lanes; ++i) x.v[i] = 0;
  }
  return x;
}
/// Loads or stores whole packs where `lanes` is the integral constant, parts otherwise.
template <class V, class S, class Lanes>
BLACKMAMBA_INLINE V load(S const* p, Lanes lanes) {
  if constexpr (std::is_same_v<Lanes, int>)
    return V::load(p, lanes);
  else
    return V::load(p);
}
template <class V, class S, class Lanes>
BLACKMAMBA_INLINE void store(V x, S* p, Lanes lanes) {
  if constexpr (std::is_same_v<Lanes, int>)
    x.store(p, lanes);
  else
    x.store(p);
}

}  // namespace blackmamba::simd
