#pragma once
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/core/numeric.hpp>

#include <cstdint>
#include <type_traits>

namespace blackmamba::cuda {

/// N elements of T as memory holds them: the destination of a load that may be under way. Widening them waits for it,
/// so a kernel with several loads to make keeps their stored packs until the last one is issued.
template <int N, class T>
class stored_pack {
  using raw = detail::raw_pack<T, N>;

 public:
  /// N elements at p, which is aligned for them (pack_aligned).
  __device__ __forceinline__ void load(T const* p) {
#pragma unroll
    for (int i = 0; i < raw::words; ++i) word_[i] = reinterpret_cast<typename raw::word const*>(p)[i];
  }
  /// The first `count` elements, of any alignment; the others are zero.
  __device__ __forceinline__ void load_some(T const* p, std::int64_t count) {
    raw r;
#pragma unroll
    for (int i = 0; i < raw::words; ++i) r.w[i] = typename raw::word{};
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) r.e[i] = p[i];
#pragma unroll
    for (int i = 0; i < raw::words; ++i) word_[i] = r.w[i];
  }
  /// As many elements as a row has left: N or fewer.
  __device__ __forceinline__ void load(T const* p, std::int64_t left) {
    if (left >= N)
      load(p);
    else
      load_some(p, left);
  }
  __device__ __forceinline__ pack<accum_t<T>, N> widened() const {
    raw r;
#pragma unroll
    for (int i = 0; i < raw::words; ++i) r.w[i] = word_[i];
    return r.widened();
  }
  /// Every bit set: NaN.
  __device__ __forceinline__ void poison() {
#pragma unroll
    for (int i = 0; i < raw::words; ++i) memset(&word_[i], 0xff, sizeof(typename raw::word));
  }

  /// The elements go to p as they are.
  __device__ __forceinline__ void store(T* p) const {
#pragma unroll
    for (int i = 0; i < raw::words; ++i) reinterpret_cast<typename raw::word*>(p)[i] = word_[i];
  }
  __device__ __forceinline__ void store(T* p, std::int64_t left) const {
    if (left >= N) return store(p);
    raw r;
#pragma unroll
    for (int i = 0; i < raw::words; ++i) r.w[i] = word_[i];
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < left) p[i] = r.e[i];
  }

 private:
  typename raw::word word_[raw::words];
};

}  // namespace blackmamba::cuda
