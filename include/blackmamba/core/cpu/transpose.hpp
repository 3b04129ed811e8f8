#pragma once
#include <blackmamba/core/cpu/simd.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace blackmamba::simd {

/// The lanes with even (odd) number of a and then of b.
template <int Odd, class T, int N>
BLACKMAMBA_INLINE pack<T, N> every_second(pack<T, N> a, pack<T, N> b) {
  constexpr int o = Odd;
  if constexpr (N == 2)
    return {__builtin_shufflevector(a.v, b.v, o, o + 2)};
  else if constexpr (N == 4)
    return {__builtin_shufflevector(a.v, b.v, o, o + 2, o + 4, o + 6)};
  else if constexpr (N == 8)
    return {__builtin_shufflevector(a.v, b.v, o, o + 2, o + 4, o + 6, o + 8, o + 10, o + 12, o + 14)};
  else if constexpr (N == 16)
    return {__builtin_shufflevector(a.v, b.v, o, o + 2, o + 4, o + 6, o + 8, o + 10, o + 12, o + 14, o + 16, o + 18,
                                    o + 20, o + 22, o + 24, o + 26, o + 28, o + 30)};
  else
    static_assert(N <= 16, "blackmamba: simd::every_second: written for up to 16 lanes");
}

/// Rows side by side, one in each lane of V: to[j * V::lanes + i] = x[i * stride + j] for i < rows, j < width. Lanes
/// i >= rows get `missing`. Precondition: rows <= V::lanes. By shuffles of whole vectors where the width is a power
/// of two.
template <class V, class T = typename V::value_type>
void rows_to_lanes(T const* x, std::int64_t stride, std::int64_t rows, std::int64_t width, T missing, T* to) {
  constexpr std::int64_t L = V::lanes, widest = 64;
  auto const bytes = static_cast<std::size_t>(width) * sizeof(T);
  if (width < 2 || width > widest || !std::has_single_bit(static_cast<std::uint64_t>(width))) {
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < width; ++j) to[j * L + i] = x[i * stride + j];
    for (std::int64_t j = 0; j < width; ++j) std::fill(to + j * L + rows, to + (j + 1) * L, missing);
    return;
  }
  // The rows in one piece hold element (i, j) at the place whose binary digits are those of i, then those of j.
  // Taking every second element moves the last digit to the front; after log2(width) times, those of j stand before
  // those of i.
  alignas(64) T spare[static_cast<std::size_t>(widest * L)];
  T const* from = x;
  int const steps = std::countr_zero(static_cast<std::uint64_t>(width));
  T* next = steps % 2 == 1 ? to : spare;
  if (rows < L || stride != width) {
    T* const whole = steps % 2 == 1 ? spare : to;
    for (std::int64_t i = 0; i < rows; ++i) std::memcpy(whole + i * width, x + i * stride, bytes);
    std::fill(whole + rows * width, whole + L * width, missing);
    from = whole;
  }
  for (int step = 0; step < steps; ++step) {
    for (std::int64_t i = 0; i < width / 2; ++i) {
      V const a = V::load(from + 2 * i * L), b = V::load(from + (2 * i + 1) * L);
      every_second<0>(a, b).store(next + i * L);
      every_second<1>(a, b).store(next + (i + width / 2) * L);
    }
    from = next;
    next = from == to ? spare : to;
  }
}

}  // namespace blackmamba::simd
