#pragma once
#include <blackmamba/core/config.hpp>
#include <blackmamba/core/math.hpp>

#include <cmath>
#include <cstdint>

// nvcc: with simd packs, these templates are host functions alone; that is meant.
#if BLACKMAMBA_CUDA
#pragma nv_diagnostic push
#pragma nv_diag_suppress 20011, 20014
#endif

/// Mathematics of attention on one value: V is float or double on any device, or a simd pack on the host.
namespace blackmamba::attention_math {

/// Scores are kept in units of log 2, so that the softmax needs 2^x alone.
inline constexpr double log2_e = 1.44269504088896340736;
inline constexpr double ln_2 = 0.69314718055994530942;

/// Rotary positions (Su et al., arXiv 2104.09864, eq. 34) in the half-split order: elements i and i + dh/2 of a head
/// are one pair, turned by the angle position * rotary_frequency(i).
BLACKMAMBA_HD inline double rotary_frequency(std::int64_t i, std::int64_t head_dim, double base) {
  return std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
}
/// A pair of elements, or the cosine and sine of an angle.
template <class V>
struct pair_of {
  V first, second;
};
/// The pair turned by the angle; by -angle with the sine negated, which is also how its gradient turns back.
/// Turning the cosine and sine of another angle adds the angles.
BLACKMAMBA_HD_WHERE_DEFINED template <class V>
BLACKMAMBA_HD BLACKMAMBA_INLINE pair_of<V> rotate(pair_of<V> x, V cosine, V sine) {
  using math::fma;
  return {fma(x.first, cosine, -(x.second * sine)), fma(x.second, cosine, x.first * sine)};
}

/// The running maximum of scores and sum of 2^(score - maximum): a softmax over keys seen so far (Milakov and
/// Gimelshein, arXiv 1805.02867, algorithm 3). Empty: maximum = -infinity, sum = 0.
template <class V>
struct running_softmax {
  V maximum, sum;

  /// log sum e^score, in natural units.
  BLACKMAMBA_HD BLACKMAMBA_INLINE V log_sum() const {
    using math::log;
    return maximum * V(ln_2) + log(sum);
  }
};
/// What weights relative to `maximum` are multiplied by when the maximum rises to `raised`; 0 where nothing was seen.
/// Precondition: raised is finite.
BLACKMAMBA_HD_WHERE_DEFINED template <class V>
BLACKMAMBA_HD BLACKMAMBA_INLINE V rescaling(V maximum, V raised) {
  using math::exp2;
  return exp2(maximum - raised);
}

}  // namespace blackmamba::attention_math

#if BLACKMAMBA_CUDA
#pragma nv_diagnostic pop
#endif
