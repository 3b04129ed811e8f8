#pragma once
#include <blackmamba/core/config.hpp>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace blackmamba {

namespace detail {

template <class To, class From>
BLACKMAMBA_HD BLACKMAMBA_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

BLACKMAMBA_HD inline std::uint16_t half_bits_from_float(float value) {
  // Round to nearest even by adding in float: the magic constant aligns the last kept bit with float's last bit.
  std::uint32_t const u = bits_as<std::uint32_t>(value);
  std::uint32_t const sign = (u >> 16) & 0x8000u;
  std::uint32_t const magnitude = u & 0x7fffffffu;
  if (magnitude >= 0x7f800000u)  // infinity or NaN
    return static_cast<std::uint16_t>(sign | 0x7c00u | (magnitude > 0x7f800000u ? 0x200u : 0u));
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {                                                   // subnormal half
    float const aligned = bits_as<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (bits_as<std::uint32_t>(aligned) - 0x3f000000u));
  }
  std::uint32_t const odd = (magnitude >> 13) & 1u;
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

BLACKMAMBA_HD inline float float_from_half_bits(std::uint16_t h) {
  std::uint32_t const sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  std::uint32_t const magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // 2^112 moves the half exponent's bias (15) to float's (127) and normalises subnormals.
  float const scaled = bits_as<float>(magnitude << 13) * 0x1p112f;
  return bits_as<float>(bits_as<std::uint32_t>(scaled) | sign);
}

}  // namespace detail

/// bfloat16 storage: 8 exponent bits, 7 fraction bits. Arithmetic happens in float; conversions round to nearest even.
struct bfloat16 {
  std::uint16_t bits;

  bfloat16() = default;
  BLACKMAMBA_HD explicit bfloat16(float value) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));  // sm_80 and later; a NaN becomes 0x7fff
#else
    std::uint32_t const u = detail::bits_as<std::uint32_t>(value);
    bits = (u & 0x7fffffffu) > 0x7f800000u
               ? static_cast<std::uint16_t>((u >> 16) | 0x40u)  // a NaN stays a NaN
               : static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
#endif
  }
  BLACKMAMBA_HD explicit operator float() const {
    return detail::bits_as<float>(static_cast<std::uint32_t>(bits) << 16);
  }
  friend bool operator==(bfloat16, bfloat16) = default;  // bitwise
};

/// IEEE binary16 storage: 5 exponent bits, 10 fraction bits. Arithmetic happens in float; conversions round to nearest
/// even.
struct half {
  std::uint16_t bits;

  half() = default;
  BLACKMAMBA_HD explicit half(float value) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    bits = detail::half_bits_from_float(value);
#endif
  }
  BLACKMAMBA_HD explicit operator float() const {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return detail::float_from_half_bits(bits);
#endif
  }
  friend bool operator==(half, half) = default;  // bitwise
};

/// Types that tensors are stored in.
template <class T>
concept storage = std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, bfloat16> ||
                  std::is_same_v<T, half>;

namespace detail {
template <class T>
struct accumulation {
  using type = float;
};
template <>
struct accumulation<double> {
  using type = double;
};
}  // namespace detail

/// The type that arithmetic on values stored as T happens in: float, for double double.
template <class T>
using accum_t = typename detail::accumulation<std::remove_const_t<T>>::type;

/// Converts between storage types; through float where a 16-bit type takes part.
template <class To, class From>
BLACKMAMBA_HD BLACKMAMBA_INLINE To convert(From value) {
  if constexpr (std::is_same_v<To, From>)
    return value;
  else if constexpr (std::is_arithmetic_v<To> && std::is_arithmetic_v<From>)
    return static_cast<To>(value);
  else
    return static_cast<To>(static_cast<float>(value));
}

/// The value in its accumulation type.
template <class T>
BLACKMAMBA_HD BLACKMAMBA_INLINE accum_t<T> widen(T value) {
  return convert<accum_t<T>>(value);
}

/// "float32", "float64", "bfloat16", "float16": for messages and file headers.
template <storage T>
constexpr char const* type_name() {
  if constexpr (std::is_same_v<T, float>) return "float32";
  if constexpr (std::is_same_v<T, double>) return "float64";
  if constexpr (std::is_same_v<T, bfloat16>) return "bfloat16";
  if constexpr (std::is_same_v<T, half>) return "float16";
}

}  // namespace blackmamba
