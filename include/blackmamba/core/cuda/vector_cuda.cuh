#pragma once
#include <blackmamba/core/numeric.hpp>

#include <cstddef>
#include <cstdint>
#include <type_traits>

/// Vector access to memory: several elements of a storage type in one transaction, as values of the accumulation type.
namespace blackmamba::cuda {

/// N values in registers. Index with constants only (unrolled loops).
template <class A, int N>
struct pack {
  A v[N];
  __device__ __forceinline__ A& operator[](int i) { return v[i]; }
  __device__ __forceinline__ A operator[](int i) const { return v[i]; }
};

/// Elements of T in 16 bytes: the widest access of one thread.
template <class T>
inline constexpr int pack_width = static_cast<int>(16 / sizeof(T));

/// Whether N elements at p can be accessed as one (or, beyond 16 bytes, as several of 16).
template <int N, class T>
__host__ __device__ bool pack_aligned(T const* p) {
  constexpr std::size_t bytes = N * sizeof(T) < 16 ? N * sizeof(T) : 16;
  return reinterpret_cast<std::uintptr_t>(p) % bytes == 0;
}
/// Whether every row of a view can be accessed in packs of N, from its first element and for its whole width.
template <int N, class View>
bool rows_in_packs(View const& x) {
  if (!x.present()) return true;
  if (!pack_aligned<N>(x.data()) || x.extent(View::rank - 1) % N != 0) return false;
  for (int i = 0; i + 1 < View::rank; ++i)
    if (x.extent(i) != 1 && x.stride(i) % N != 0) return false;
  return true;
}

namespace detail {

template <std::size_t Bytes>
struct raw;
template <>
struct raw<16> {
  using type = uint4;
};
template <>
struct raw<8> {
  using type = uint2;
};
template <>
struct raw<4> {
  using type = std::uint32_t;
};
template <>
struct raw<2> {
  using type = std::uint16_t;
};

/// The bytes of N elements as machine words of at most 16 bytes.
template <class T, int N>
struct raw_pack {
  static constexpr std::size_t bytes = N * sizeof(T);
  using word = typename raw<(bytes < 16 ? bytes : 16)>::type;
  static constexpr int words = static_cast<int>(bytes / sizeof(word));
  union {
    word w[words];
    T e[N];
    std::uint32_t pair[bytes < 4 ? 1 : bytes / 4];  // of 16-bit elements
  };
  __device__ __forceinline__ raw_pack() {}
  template <class A>
  __device__ __forceinline__ explicit raw_pack(pack<A, N> const& x) {
#pragma unroll
    for (int i = 0; i < N; ++i) e[i] = convert<T>(x.v[i]);
  }

  /// One instruction for an element: of a pair, the compiler would take the upper bfloat16 out and then shift it.
  __device__ __forceinline__ auto widened() const {
    pack<accum_t<T>, N> x;
    if constexpr (std::is_same_v<T, bfloat16> && N % 2 == 0) {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        x.v[i] = __uint_as_float(pair[i / 2] << 16);
        x.v[i + 1] = __uint_as_float(pair[i / 2] & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) x.v[i] = widen(e[i]);
    }
    return x;
  }
};

}  // namespace detail

/// N elements at p, which is aligned for them (pack_aligned).
template <int N, class T>
__device__ __forceinline__ pack<accum_t<T>, N> load_pack(T const* p) {
  using raw = detail::raw_pack<std::remove_const_t<T>, N>;
  raw r;
#pragma unroll
  for (int i = 0; i < raw::words; ++i) r.w[i] = reinterpret_cast<typename raw::word const*>(p)[i];
  return r.widened();
}
/// As load_pack, for data that is read once: does not displace what the caches hold.
template <int N, class T>
__device__ __forceinline__ pack<accum_t<T>, N> load_pack_streaming(T const* p) {
  using raw = detail::raw_pack<std::remove_const_t<T>, N>;
  raw r;
#pragma unroll
  for (int i = 0; i < raw::words; ++i) r.w[i] = __ldcs(reinterpret_cast<typename raw::word const*>(p) + i);
  return r.widened();
}
template <int N, class T, class A>
__device__ __forceinline__ void store_pack(T* p, pack<A, N> const& x) {
  using raw = detail::raw_pack<T, N>;
  raw const r(x);
#pragma unroll
  for (int i = 0; i < raw::words; ++i) reinterpret_cast<typename raw::word*>(p)[i] = r.w[i];
}

/// As store_pack, to global memory, by instructions of 16 bytes wherever it stands: next to other stores, or where the
/// address comes from a table, the compiler takes the words of store_pack apart.
template <int N, class T, class A>
__device__ __forceinline__ void store_pack_whole(T* p, pack<A, N> const& x) {
  using raw = detail::raw_pack<T, N>;
  raw const r(x);
#pragma unroll
  for (int i = 0; i < raw::words; ++i) __stwb(reinterpret_cast<typename raw::word*>(p) + i, r.w[i]);
}

/// What a kernel that works in packs of N is told at its row's end where the width is no multiple of N: the first
/// `count` elements, zeros beyond.
template <int N, class T>
__device__ __forceinline__ pack<accum_t<T>, N> load_some(T const* p, std::int64_t count) {
  pack<accum_t<T>, N> x;
#pragma unroll
  for (int i = 0; i < N; ++i) x.v[i] = i < count ? widen(p[i]) : accum_t<T>(0);
  return x;
}
template <int N, class T, class A>
__device__ __forceinline__ void store_some(T* p, pack<A, N> const& x, std::int64_t count) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < count) p[i] = convert<T>(x.v[i]);
}

}  // namespace blackmamba::cuda
