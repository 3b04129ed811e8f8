#pragma once
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/core/math.hpp>

#include <limits>

/// Elementary functions of packs, found by argument-dependent lookup where core/math.hpp's scalar functions are not.
///
/// In float they are polynomials over a reduced range; each states its largest error in units in the last place (ulp)
/// of the true result, which tests/core/simd_test.hpp holds. NaN gives NaN. Results below the normal numbers are
/// flushed to zero where said. Functions named in_range are right there alone; elsewhere they give any number, which
/// their callers select away. In double they are the standard library's, lane by lane: double serves references and
/// gradient checks.
namespace blackmamba::simd {

namespace detail {
template <int N>
BLACKMAMBA_INLINE int_vector<N> as_int(pack<float, N> x) {
  return vector_bits<int_vector<N>>(x.v);
}
template <int N>
BLACKMAMBA_INLINE pack<float, N> as_float(int_vector<N> i) {
  return vector_bits<float_vector<N>>(i);
}

template <int N>
using uint_vector = typename vector_of<std::uint32_t, N>::type;
template <int N>
BLACKMAMBA_INLINE uint_vector<N> as_unsigned(pack<float, N> x) {
  return vector_bits<uint_vector<N>>(x.v);
}
/// p 2^n with n in the low bits of `shifted`: added to the exponent. Unsigned, for lanes that are selected away later
/// hold any bits, whose sum may wrap.
template <int N>
BLACKMAMBA_INLINE pack<float, N> scaled(pack<float, N> p, pack<float, N> shifted) {
  return vector_bits<float_vector<N>>(as_unsigned(p) + (as_unsigned(shifted) << 23));
}

/// Polynomial in x, highest coefficient first (Horner's rule).
template <class V, class... Coefficients>
BLACKMAMBA_INLINE V polynomial(V x, float highest, Coefficients... rest) {
  V p = highest;
  ((p = fma(p, x, V(rest))), ...);
  return p;
}

/// Added to |x| < 2^22, rounds x to the nearest integer and leaves that integer in the low bits.
inline constexpr float round_to_integer = 12582912.0f;  // 1.5 * 2^23

/// 2^x for x in [-126, 128).
template <int N>
BLACKMAMBA_INLINE pack<float, N> exp2_in_range(pack<float, N> x) {
  using V = pack<float, N>;
  V const shifted = x + round_to_integer;
  V const r = x - (shifted - round_to_integer);
  V const p = polynomial(r, 1.535336188e-4f, 1.339887440e-3f, 9.618437357e-3f, 5.550332471e-2f, 2.402264791e-1f,
                         6.931472028e-1f, 1.0f);
  return scaled(p, shifted);
}
/// x = n ln 2 + remainder with the integer n in the low bits of `shifted`.
template <int N>
struct exp_reduction {
  pack<float, N> shifted, remainder;

  /// For x in [-87.3, 88.72283]. ln 2 is split in two parts, the first such that its product is exact.
  explicit BLACKMAMBA_INLINE exp_reduction(pack<float, N> x) {
    using V = pack<float, N>;
    shifted = fma(x, V(1.44269504f), V(round_to_integer));
    V const n = shifted - round_to_integer;
    remainder = fma(n, V(2.12194440e-4f), fma(n, V(-0.693359375f), x));
  }
  /// e^x
  BLACKMAMBA_INLINE pack<float, N> value() const {
    using V = pack<float, N>;
    V const r = remainder;
    V const q = polynomial(r, 1.379046938e-3f, 8.380413055e-3f, 4.166970775e-2f, 1.666640788e-1f, 4.999998510e-1f);
    V const p = fma(q, r * r, r) + 1.0f;
    return scaled(p, shifted);
  }
};
/// e^x for x in [-87.3, 88.72283].
template <int N>
BLACKMAMBA_INLINE pack<float, N> exp_in_range(pack<float, N> x) {
  return exp_reduction<N>(x).value();
}
/// e^(-x^2 / 2) for |x| <= 13.2. The square is split in an exact head and a small rest, for its rounding would be 87
/// times as large in the result.
template <int N>
BLACKMAMBA_INLINE pack<float, N> exp_minus_half_square(pack<float, N> x) {
  using V = pack<float, N>;
  V const head = as_float<N>(as_int(x) & ~0xfff);
  exp_reduction<N> reduced(head * head * -0.5f);
  reduced.remainder += (head - x) * (head + x) * 0.5f;
  return reduced.value();
}
/// e^(x^2 / 2) Phi(-x) for x in [0, 13.2], given t = (x - 3) / (x + 3): relative error 7e-9 and rounding.
template <int N>
BLACKMAMBA_INLINE pack<float, N> scaled_normal_tail(pack<float, N> t) {
  return polynomial(t, 5.415083433e-5f, 1.160373431e-4f, -3.399113193e-4f, -9.841826977e-4f, 2.904702676e-3f,
                    6.132183131e-3f, -4.621331394e-2f, 1.232250184e-1f, -2.064026147e-1f, 1.215139478e-1f);
}

#if defined(__SSE2__)
/// The square root of one register. The instruction by name: the builtins for it differ between compilers, and their
/// header costs every includer.
template <class V>
BLACKMAMBA_INLINE V register_sqrt(V x) {
  V y;
  constexpr bool is_double = sizeof(x[0]) == 8;
#if defined(__AVX__)
  if constexpr (is_double)
    asm("vsqrtpd %1, %0" : "=x"(y) : "x"(x));
  else
    asm("vsqrtps %1, %0" : "=x"(y) : "x"(x));
#else
  if constexpr (is_double)
    asm("sqrtpd %1, %0" : "=x"(y) : "x"(x));
  else
    asm("sqrtps %1, %0" : "=x"(y) : "x"(x));
#endif
  return y;
}
inline constexpr bool has_register_sqrt = true;
#else
template <class V>
V register_sqrt(V x);
inline constexpr bool has_register_sqrt = false;
#endif
}  // namespace detail

/// Square root, correctly rounded. A loop over std::sqrt would not become one instruction, because std::sqrt sets
/// errno.
template <class T, int N>
BLACKMAMBA_INLINE pack<T, N> sqrt(pack<T, N> x) {
  constexpr int part = N < width<T> ? N : width<T>;
  if constexpr (detail::has_register_sqrt && part * sizeof(T) >= 16) {
    typename detail::vector_of<T, part>::type parts[static_cast<std::size_t>(N / part)];
    std::memcpy(parts, &x.v, sizeof(x.v));
    for (auto& p : parts) p = detail::register_sqrt(p);
    std::memcpy(&x.v, parts, sizeof(x.v));
    return x;
  } else {
    return each_lane(x, [](T a) { return std::sqrt(a); });
  }
}

/// 2^x; zero below -126, infinity from 128. 2 ulp.
template <int N>
BLACKMAMBA_INLINE pack<float, N> exp2(pack<float, N> x) {
  using V = pack<float, N>;
  V const finite = select(x < V(-126.0f), V(0.0f), detail::exp2_in_range(x));
  return select(x == x, select(x >= V(128.0f), V(INFINITY), finite), x);
}
/// e^x; zero below -87.3, infinity where float has no larger number. 2 ulp.
template <int N>
BLACKMAMBA_INLINE pack<float, N> exp(pack<float, N> x) {
  using V = pack<float, N>;
  V const finite = select(x < V(-87.3f), V(0.0f), detail::exp_in_range(x));
  return select(x == x, select(x > V(88.72283f), V(INFINITY), finite), x);
}
/// Natural logarithm; -infinity of zero, NaN of negative numbers. 1 ulp.
template <int N>
BLACKMAMBA_INLINE pack<float, N> log(pack<float, N> x) {
  using V = pack<float, N>;
  auto const subnormal = x < V(0x1p-126f);
  // x = 2^e m with m in [sqrt(1/2), sqrt(2)).
  auto const bits =
      detail::vector_bits<detail::int_vector<N>>(detail::as_unsigned(select(subnormal, x * 0x1p23f, x)) - 0x3f3504f3u);
  V const e = V(__builtin_convertvector(bits >> 23, typename V::vector)) - select(subnormal, V(23.0f), V(0.0f));
  V const t = detail::as_float<N>((bits & 0x007fffff) + 0x3f3504f3) - V(1.0f);
  V const t2 = t * t;
  V y = detail::polynomial(t, 7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f,
                           1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f) *
        t * t2;
  y = fma(e, V(-2.12194440e-4f), y);
  y = fma(V(-0.5f), t2, y);
  V const finite = fma(e, V(0.693359375f), t + y);
  return select(x > V(0.0f), select(x == V(INFINITY), x, finite), select(x == V(0.0f), V(-INFINITY), V(NAN)));
}
/// log(1 + x), accurate for small x: the rounding of 1 + x is given back as its first-order term. 2 ulp.
template <int N>
BLACKMAMBA_INLINE pack<float, N> log1p(pack<float, N> x) {
  using V = pack<float, N>;
  V const u = x + V(1.0f);
  V const lost = x - (u - V(1.0f));
  V const y = log(u);
  return select(abs(lost) > V(0.0f), y + lost / u, y);
}
/// log(1 + x) for x in [0, 1], without division or special cases: the inner part of softplus. 2 ulp.
template <int N>
BLACKMAMBA_INLINE pack<float, N> log1p_unit(pack<float, N> x) {
  return x * detail::polynomial(x, -3.243819345e-3f, 1.985109411e-2f, -5.696006492e-2f, 1.060385481e-1f,
                                -1.530581415e-1f, 1.967606097e-1f, -2.495416850e-1f, 3.332996666e-1f, -4.999990165e-1f,
                                1.0f);
}
/// Error function. 3 ulp.
template <int N>
BLACKMAMBA_INLINE pack<float, N> erf(pack<float, N> x) {
  using V = pack<float, N>;
  V const a = min(V(4.0f), abs(x)), square = a * a;  // erf(4) is 1 in float
  V const small = a * detail::polynomial(square, 7.853849820e-5f, -8.010202437e-4f, 5.188330542e-3f, -2.685381472e-2f,
                                         1.128358543e-1f, -3.761262596e-1f, 1.128379107e+00f);
  // erf(a) = 1 - 2 Phi(-sqrt(2) a)
  V const t = (a - V(2.12132034f)) / (a + V(2.12132034f));
  V const large = V(1.0f) - detail::exp_in_range(-square) * detail::scaled_normal_tail(t) * 2.0f;
  auto const sign = detail::as_int(x) & std::numeric_limits<std::int32_t>::min();
  V const y = detail::as_float<N>(detail::as_int(select(a < V(1.0f), small, large)) | sign);
  return select(x == x, y, x);
}
/// Normal distribution function Phi(x), relative to its size far into the left tail; zero below -13.2. 8 ulp.
template <int N>
BLACKMAMBA_INLINE pack<float, N> normal_cdf(pack<float, N> x) {
  using V = pack<float, N>;
  V const a = abs(x);
  V const y = detail::exp_minus_half_square(a) * detail::scaled_normal_tail((a - V(3.0f)) / (a + V(3.0f)));
  V const tail = select(a > V(13.2f), V(0.0f), y);
  return select(x == x, select(x < V(0.0f), tail, V(1.0f) - tail), x);
}
/// Normal density e^(-x^2 / 2) / sqrt(2 pi); zero beyond 13.2. 3 ulp.
template <int N>
BLACKMAMBA_INLINE pack<float, N> normal_pdf(pack<float, N> x) {
  using V = pack<float, N>;
  V const a = abs(x), y = detail::exp_minus_half_square(a) * 0.398942280f;
  return select(x == x, select(a > V(13.2f), V(0.0f), y), x);
}

template <int N>
BLACKMAMBA_INLINE pack<double, N> exp(pack<double, N> x) {
  return each_lane(x, [](double a) { return std::exp(a); });
}
template <int N>
BLACKMAMBA_INLINE pack<double, N> exp2(pack<double, N> x) {
  return each_lane(x, [](double a) { return std::exp2(a); });
}
template <int N>
BLACKMAMBA_INLINE pack<double, N> log(pack<double, N> x) {
  return each_lane(x, [](double a) { return std::log(a); });
}
template <int N>
BLACKMAMBA_INLINE pack<double, N> log1p(pack<double, N> x) {
  return each_lane(x, [](double a) { return std::log1p(a); });
}
template <int N>
BLACKMAMBA_INLINE pack<double, N> log1p_unit(pack<double, N> x) {
  return log1p(x);
}
template <int N>
BLACKMAMBA_INLINE pack<double, N> erf(pack<double, N> x) {
  return each_lane(x, [](double a) { return std::erf(a); });
}
template <int N>
BLACKMAMBA_INLINE pack<double, N> normal_cdf(pack<double, N> x) {
  return each_lane(x, [](double a) { return math::normal_cdf(a); });
}
template <int N>
BLACKMAMBA_INLINE pack<double, N> normal_pdf(pack<double, N> x) {
  return each_lane(x, [](double a) { return math::normal_pdf(a); });
}

}  // namespace blackmamba::simd
