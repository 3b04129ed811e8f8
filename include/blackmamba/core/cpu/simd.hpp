#pragma once
#include <blackmamba/core/config.hpp>
#include <blackmamba/core/numeric.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
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
template <int N>
using int_vector = typename vector_of<std::int32_t, N>::type;
template <int N>
using float_vector = typename vector_of<float, N>::type;
template <class To, class From>
BLACKMAMBA_INLINE To vector_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

/// N integers from as many 16-bit patterns, and back. For a whole register the instructions are named: g++ 12 moves
/// halves of registers about to do the same.
template <int N>
BLACKMAMBA_INLINE int_vector<N> load_16_bits(void const* p) {
  using u16 = typename vector_of<std::uint16_t, N>::type;
  u16 u;
  std::memcpy(&u, p, sizeof(u));
#if defined(__AVX2__) && !defined(__clang__)
  if constexpr (N * 4 == register_bytes) {
    int_vector<N> wide;
    asm("vpmovzxwd %1, %0" : "=x"(wide) : "xm"(u));
    return wide;
  }
#endif
  return __builtin_convertvector(u, int_vector<N>);
}
template <int N>
BLACKMAMBA_INLINE void store_16_bits(int_vector<N> x, void* p) {
  using u16 = typename vector_of<std::uint16_t, N>::type;
#if defined(__AVX512F__) && !defined(__clang__)
  if constexpr (N == 16) {
    u16 narrow;
    asm("vpmovdw %1, %0" : "=x"(narrow) : "x"(x));
    std::memcpy(p, &narrow, sizeof(narrow));
    return;
  }
#endif
  auto const u = __builtin_convertvector(x, u16);
  std::memcpy(p, &u, sizeof(u));
}

// The 16-bit types, a pack at a time: the same arithmetic on bits as in numeric.hpp, with selections for its branches.
template <int N>
BLACKMAMBA_INLINE float_vector<N> widen_bits(int_vector<N> u, bfloat16) {
  return vector_bits<float_vector<N>>(u << 16);
}
template <int N>
BLACKMAMBA_INLINE float_vector<N> widen_bits(int_vector<N> u, half) {
  int_vector<N> const shifted = (u & 0x7fff) << 13;
  auto const finite = vector_bits<int_vector<N>>(vector_bits<float_vector<N>>(shifted) * 0x1p112f);
  int_vector<N> const special = shifted | 0x7f800000;
  return vector_bits<float_vector<N>>((shifted >= (0x7c00 << 13) ? special : finite) | ((u & 0x8000) << 16));
}
template <int N>
BLACKMAMBA_INLINE int_vector<N> narrow_bits(float_vector<N> x, bfloat16) {
  using u32 = typename vector_of<std::uint32_t, N>::type;
  auto const u = vector_bits<u32>(x);
  u32 const rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  u32 const quiet = (u >> 16) | 0x40u;
  return vector_bits<int_vector<N>>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
template <int N>
BLACKMAMBA_INLINE int_vector<N> narrow_bits(float_vector<N> x, half) {
  auto const u = vector_bits<int_vector<N>>(x);
  int_vector<N> const magnitude = u & 0x7fffffff;
  int_vector<N> const normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  int_vector<N> const subnormal =
      vector_bits<int_vector<N>>(vector_bits<float_vector<N>>(magnitude) + 0.5f) - 0x3f000000;
  int_vector<N> const infinity = int_vector<N>{} + 0x7c00, nan = int_vector<N>{} + 0x7e00;
  int_vector<N> const finite = magnitude < 0x38800000 ? subnormal : normal;
  int_vector<N> const in_range = magnitude >= 0x477ff000 ? infinity : finite;
  return (magnitude > 0x7f800000 ? nan : in_range) | ((u >> 16) & 0x8000);
}
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
  BLACKMAMBA_INLINE pack(S x) : v(static_cast<T>(x) - vector{}) {}  // x - 0 is x even for -0, and folds to a broadcast

  /// Loads N consecutive values of any storage type, widened.
  template <class S>
  static BLACKMAMBA_INLINE pack load(S const* p) {
    pack r;
    if constexpr (std::is_same_v<S, T>) {
      std::memcpy(&r.v, p, sizeof(r.v));
    } else if constexpr (!std::is_arithmetic_v<S> && std::is_same_v<T, float>) {
      r.v = detail::widen_bits<N>(detail::load_16_bits<N>(p), S{});
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
    } else if constexpr (!std::is_arithmetic_v<S> && std::is_same_v<T, float>) {
      detail::store_16_bits<N>(detail::narrow_bits<N>(v, S{}), p);
    } else if constexpr (std::is_arithmetic_v<S>) {
      auto const s = __builtin_convertvector(v, typename detail::vector_of<S, N>::type);
      std::memcpy(p, &s, sizeof(s));
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
  // clang-format on
};

/// |x|: the sign bit cleared.
template <class T, int N>
BLACKMAMBA_INLINE pack<T, N> abs(pack<T, N> x) {
  using integer = detail::integer_of<T>;
  using bits = typename detail::vector_of<integer, N>::type;
  return detail::vector_bits<typename pack<T, N>::vector>(detail::vector_bits<bits>(x.v) &
                                                          std::numeric_limits<integer>::max());
}

/// Applies a scalar function to each lane: for functions that nothing hot depends on.
template <class T, int N, class F>
BLACKMAMBA_INLINE pack<T, N> each_lane(pack<T, N> x, F f) {
  pack<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = f(static_cast<T>(x.v[i]));
  return r;
}

/// The lower or the upper half of a pack; no detour over memory where the halves are registers.
template <class T, int N>
BLACKMAMBA_INLINE pack<T, N / 2> half_of(pack<T, N> x, bool upper) {
  pack<T, N / 2> r;
  std::memcpy(&r.v, reinterpret_cast<char const*>(&x.v) + (upper ? sizeof(r.v) : 0), sizeof(r.v));
  return r;
}
/// Sum of the lanes, in a fixed order (pairwise).
template <class T, int N>
BLACKMAMBA_INLINE T sum(pack<T, N> x) {
  if constexpr (N == 1)
    return x.v[0];
  else if constexpr (N == 2)
    return x.v[0] + x.v[1];
  else
    return sum(half_of(x, false) + half_of(x, true));
}
/// Largest lane.
template <class T, int N>
BLACKMAMBA_INLINE T max_lane(pack<T, N> x) {
  if constexpr (N == 1)
    return x.v[0];
  else if constexpr (N == 2)
    return x.v[0] > x.v[1] ? x.v[0] : x.v[1];
  else
    return max_lane(max(half_of(x, false), half_of(x, true)));
}

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

/// Sum over [0, n) of the lanes of term(index, lanes), whose lanes past the end do not count. In a fixed order: four
/// running sums, for one would make every addition wait for the one before.
template <class V, class Term>
BLACKMAMBA_INLINE typename V::value_type sum_packs(std::int64_t n, Term&& term) {
  constexpr int N = V::lanes;
  V s[4] = {0, 0, 0, 0};
  std::int64_t i = 0;
  for (; i + 4 * N <= n; i += 4 * N)
    for (int j = 0; j < 4; ++j) s[j] += term(i + j * N, std::integral_constant<int, N>{});
  for_packs<N>(n - i, [&](std::int64_t k, auto lanes) { s[0] += first(term(i + k, lanes), lanes); });
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

}  // namespace blackmamba::simd

#include <blackmamba/core/cpu/simd_math.hpp>
