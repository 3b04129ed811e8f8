#pragma once
#include <blackmamba/core/cpu/simd.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

/// What simd.hpp leaves out: moving values between the lanes of a pack, and stores that go past the cache.
namespace blackmamba::simd {

namespace detail {
/// Lane i = lane Index::at(i) of a followed by b. Written out, because nvcc's host pass does not expand a parameter
/// pack among a builtin's arguments.
template <class Index, class T, int N>
BLACKMAMBA_INLINE pack<T, N> shuffle(pack<T, N> a, pack<T, N> b) {
  using I = Index;
  static_assert(N <= 16);
  if constexpr (N == 2)
    return pack<T, N>(__builtin_shufflevector(a.v, b.v, I::at(0), I::at(1)));
  else if constexpr (N == 4)
    return pack<T, N>(__builtin_shufflevector(a.v, b.v, I::at(0), I::at(1), I::at(2), I::at(3)));
  else if constexpr (N == 8)
    return pack<T, N>(__builtin_shufflevector(a.v, b.v, I::at(0), I::at(1), I::at(2), I::at(3), I::at(4), I::at(5),
                                              I::at(6), I::at(7)));
  else if constexpr (N == 16)
    return pack<T, N>(__builtin_shufflevector(a.v, b.v, I::at(0), I::at(1), I::at(2), I::at(3), I::at(4), I::at(5),
                                              I::at(6), I::at(7), I::at(8), I::at(9), I::at(10), I::at(11), I::at(12),
                                              I::at(13), I::at(14), I::at(15)));
  else
    return I::at(0) < N ? a : b;
}
template <int N, int Distance>
struct moved_up {
  static constexpr int at(int i) { return N - Distance + i; }
};
template <int Distance>
struct end_of_lower_half {
  static constexpr bool upper(int i) { return (i & Distance) != 0; }
  static constexpr int at(int i) { return upper(i) ? (i / (2 * Distance)) * (2 * Distance) + Distance - 1 : i; }
};
template <int N>
struct all_last {
  static constexpr int at(int) { return N - 1; }
};
template <int N>
struct mirrored {
  static constexpr int at(int i) { return N - 1 - i; }
};
}  // namespace detail

/// Lane i = x[i - Distance]; the lanes below take the last lanes of `below`.
template <int Distance, class T, int N>
BLACKMAMBA_INLINE pack<T, N> move_up(pack<T, N> below, pack<T, N> x) {
  return detail::shuffle<detail::moved_up<N, Distance>>(below, x);
}
/// With lanes in groups of 2 Distance: in the upper half of a group, the last lane of the lower half; below, x itself.
template <int Distance, class T, int N>
BLACKMAMBA_INLINE pack<T, N> end_of_lower_half(pack<T, N> x) {
  return detail::shuffle<detail::end_of_lower_half<Distance>>(x, x);
}
/// The lanes in the upper halves of groups of 2 Distance.
template <int Distance, class V>
BLACKMAMBA_INLINE auto upper_halves() {
  mask<typename V::value_type, V::lanes> m;
  for (int i = 0; i < V::lanes; ++i) m.v[i] = detail::end_of_lower_half<Distance>::upper(i) ? -1 : 0;
  return m;
}
/// Every lane = the last one.
template <class T, int N>
BLACKMAMBA_INLINE pack<T, N> broadcast_last(pack<T, N> x) {
  return detail::shuffle<detail::all_last<N>>(x, x);
}
/// Lanes in reverse order.
template <class T, int N>
BLACKMAMBA_INLINE pack<T, N> reverse_lanes(pack<T, N> x) {
  return detail::shuffle<detail::mirrored<N>>(x, x);
}

/// Stores N consecutive values, rounded to the storage type. With `past_cache`, and where the address allows, the store
/// does not read the line it fills, which saves a third of the traffic of a result that is larger than the caches.
/// A thread that stored so calls finish_stores() before another may read.
template <class T, int N, class S>
BLACKMAMBA_INLINE void store(pack<T, N> x, S* p, bool past_cache) {
#if defined(__SSE2__)
  constexpr std::size_t bytes = N * sizeof(S);
  if constexpr (bytes == 16 || (bytes == 32 && register_bytes >= 32) || (bytes == 64 && register_bytes >= 64)) {
    if (past_cache && reinterpret_cast<std::uintptr_t>(p) % bytes == 0) {
      typedef float raw __attribute__((vector_size(bytes), may_alias));
      raw r;
      if constexpr (std::is_same_v<S, T>) {
        std::memcpy(&r, &x.v, bytes);
      } else {
        S rounded[pack<T, N>::size];
        x.store(rounded);
        std::memcpy(&r, rounded, bytes);
      }
      // The instruction by name: the builtins for it differ between compilers, and its header costs every includer.
      if constexpr (register_bytes >= 32)
        asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<raw*>(p)) : "x"(r));
      else
        asm volatile("movntps %1, %0" : "=m"(*reinterpret_cast<raw*>(p)) : "x"(r));
      return;
    }
  }
#else
  static_cast<void>(past_cache);
#endif
  x.store(p);
}
/// Orders what store(…, past_cache) wrote before what this thread does next.
inline void finish_stores() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}
/// Asks for the line at p, which need not be readable, to be brought to the first-level cache.
BLACKMAMBA_INLINE void prefetch(void const* p) { __builtin_prefetch(p); }
BLACKMAMBA_INLINE void prefetch_to_write(void const* p) { __builtin_prefetch(p, 1); }
/// From this size on, a result is worth storing past the cache: it would push out what it was computed from.
inline constexpr std::int64_t past_cache_bytes = std::int64_t{16} << 20;

}  // namespace blackmamba::simd
