#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/sequences_cuda.cuh>
#include <blackmamba/ops/associative_scan/scan_shape.hpp>

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

/// What the kernels of scans share: scan_rows_cuda.cuh along the contiguous axis, scan_channels_cuda.cuh along L of
/// (B, L, D). Both read each element once. What is scanned is a rule (associative_scan_cuda.cuh,
/// first_order_recurrence_cuda.cuh).
///
/// A map is what elements combine to, a state what a map makes of the state before. The state that reaches a tile is
/// grouped in one way only, whatever the launch: with 32 tiles in a group and 32 groups in a third level, the state
/// before the third level's, then the groups before, then the tiles before. Where sequences are many, a block of
/// threads walks down its own. Where they are few, tiles are divided among blocks, which publish their totals and
/// gather the others: a single pass as in Merrill and Garland, "Single-pass parallel prefix scan with decoupled
/// look-back", 2016, but for that order, which makes it bitwise repeatable. Tiles go to blocks in the order in which
/// these start: what a block waits for is done, or a running block's.
namespace blackmamba::cuda {

/// Sequences are split among blocks of threads where there are fewer of them (times tiles of 32 channels) for each
/// multiprocessor. The results don't depend on it.
inline int scan_sequences_per_multiprocessor = 2;

namespace detail {

// Values of any trivially copyable type, through words.

template <class V>
struct value_words {
  static constexpr int count = static_cast<int>((sizeof(V) + 3) / 4);
  std::uint32_t w[count];
};
template <class V>
__device__ __forceinline__ value_words<V> to_words(V const& v) {
  value_words<V> r;
  if constexpr (sizeof(V) % 4 != 0) r.w[value_words<V>::count - 1] = 0;
  memcpy(static_cast<void*>(r.w), &v, sizeof(V));
  return r;
}
template <class V>
__device__ __forceinline__ V from_words(value_words<V> const& w) {
  V v;
  memcpy(static_cast<void*>(&v), w.w, sizeof(V));
  return v;
}
template <class V>
__device__ __forceinline__ V shuffle_up(V const& v, unsigned distance) {
  auto w = to_words(v);
#pragma unroll
  for (int i = 0; i < value_words<V>::count; ++i) w.w[i] = __shfl_up_sync(0xffffffffu, w.w[i], distance);
  return from_words<V>(w);
}
template <class V>
__device__ __forceinline__ V shuffle(V const& v, int lane) {
  auto w = to_words(v);
#pragma unroll
  for (int i = 0; i < value_words<V>::count; ++i) w.w[i] = __shfl_sync(0xffffffffu, w.w[i], lane);
  return from_words<V>(w);
}
/// Lane i gets x[0] . … . x[i]. What a lane gets depends on no lane above it.
template <class E, class Operator>
__device__ __forceinline__ E scan_lanes(Operator const& op, E x, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    E const before = shuffle_up(x, static_cast<unsigned>(distance));
    if constexpr (requires { Operator::total; }) {  // no branch, where the operator takes any two elements
      E const both = op(before, x);
      x = lane >= distance ? both : x;
    } else if (lane >= distance) {
      x = op(before, x);
    }
  }
  return x;
}

/// Shared memory for Count values, which may have constructors.
template <class V, int Count>
struct value_array {
  alignas(alignof(V) < 16 ? alignof(V) : 16) unsigned char bytes[sizeof(V) * static_cast<std::size_t>(Count)];
  __device__ __forceinline__ V& operator[](int i) { return reinterpret_cast<V*>(bytes)[i]; }
};

__device__ __forceinline__ void publish_word(std::int32_t* p) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(1) : "memory");
}
__device__ __forceinline__ bool published_word(std::int32_t const* p) {
  std::int32_t flag;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(flag) : "l"(p) : "memory");
  return flag != 0;
}

/// Words that another multiprocessor wrote before it published. Not __ldcg, which the compiler may move to before the
/// wait.
__device__ __forceinline__ std::uint32_t load_word(std::uint32_t const* p) {
  std::uint32_t w;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(w) : "l"(p) : "memory");
  return w;
}
__device__ __forceinline__ std::uint64_t load_word(std::uint64_t const* p) {
  std::uint64_t w;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(w) : "l"(p) : "memory");
  return w;
}
__device__ __forceinline__ unsigned char load_word(unsigned char const* p) {
  std::uint32_t w;
  asm volatile("ld.relaxed.gpu.global.u8 %0, [%1];" : "=r"(w) : "l"(p) : "memory");
  return static_cast<unsigned char>(w);
}

/// Values that blocks of one launch hand each other, in scan_tiles::levels sections of `count`; flags are zero before.
template <class E>
struct scan_slots {
  E* values;
  std::int32_t* tickets;  // how many tiles were taken
  std::int32_t* flags;
  std::int64_t count;     // of a section
  std::int64_t channels;  // values of a slot
  std::int64_t tiles;     // flags of a slot

  static constexpr bool with_flag = scan_tiles::with_flag<E>;

  /// Called by all threads of a block as it starts: the number of a tile that no other block takes.
  __device__ __forceinline__ unsigned take_ticket() const {
    __shared__ unsigned number;
    if (threadIdx.x == 0 && threadIdx.y == 0) number = static_cast<unsigned>(atomicAdd(tickets, 1));
    __syncthreads();
    return number;
  }

  /// Rows: one value. Of small ones each word travels with a flag of its own: accesses of 8 bytes are the largest that
  /// the memory model of PTX knows as one; a pair of them is two, in any order.
  template <class V>
  __device__ __forceinline__ void put(int level, std::int64_t number, V const& value) const {
    static_assert(sizeof(V) <= sizeof(E));
    std::int64_t const slot = level * count + number;
    auto const w = to_words(value);
    if constexpr (with_flag) {
      auto* const to = flags + scan_tiles::flags_of_row<E> * slot;
      constexpr std::uint64_t flag = std::uint64_t{1} << 32;
      if constexpr (value_words<V>::count == 1)
        asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(flag | w.w[0]) : "memory");
      else
        asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(flag | w.w[0]), "l"(flag | w.w[1])
                     : "memory");
    } else {
      memcpy(static_cast<void*>(values + slot), &value, sizeof(V));
      __threadfence();
      publish_word(flags + slot);
    }
  }
  template <class V>
  __device__ __forceinline__ bool take(int level, std::int64_t number, V& value) const {
    std::int64_t const slot = level * count + number;
    value_words<V> w;
    if constexpr (with_flag) {
      auto const* const from = flags + scan_tiles::flags_of_row<E> * slot;
      std::uint64_t word[value_words<V>::count];
      if constexpr (value_words<V>::count == 1)
        asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word[0]) : "l"(from) : "memory");
      else
        asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                     : "=l"(word[0]), "=l"(word[1])
                     : "l"(from)
                     : "memory");
#pragma unroll
      for (int i = 0; i < value_words<V>::count; ++i) {
        if (word[i] >> 32 == 0) return false;
        w.w[i] = static_cast<std::uint32_t>(word[i]);
      }
      value = from_words<V>(w);
    } else {
      if (!published_word(flags + slot)) return false;
      read(reinterpret_cast<unsigned char const*>(values + slot), value);
    }
    return true;
  }

  /// Channels: each thread one value, then one flag for the tile.
  template <class V>
  __device__ __forceinline__ void put_channel(int level, std::int64_t number, std::int64_t channel,
                                              V const& value) const {
    memcpy(static_cast<void*>(values + (level * count + number) * channels + channel), &value, sizeof(V));
  }
  template <class V>
  __device__ __forceinline__ V take_channel(int level, std::int64_t number, std::int64_t channel) const {
    V value;
    read(reinterpret_cast<unsigned char const*>(values + (level * count + number) * channels + channel), value);
    return value;
  }
  __device__ __forceinline__ std::int32_t* flag(int level, std::int64_t number, std::int64_t tile) const {
    return flags + (level * count + number) * tiles + tile;
  }

 private:
  template <class V>
  static __device__ __forceinline__ void read(unsigned char const* from, V& value) {
    using word =
        std::conditional_t<alignof(E) % 8 == 0 && sizeof(V) % 8 == 0, std::uint64_t,
                           std::conditional_t<alignof(E) % 4 == 0 && sizeof(V) % 4 == 0, std::uint32_t, unsigned char>>;
    constexpr int words = static_cast<int>(sizeof(V) / sizeof(word));
    word w[words];
#pragma unroll
    for (int i = 0; i < words; ++i) w[i] = load_word(reinterpret_cast<word const*>(from) + i);
    memcpy(static_cast<void*>(&value), w, sizeof(V));
  }
};

/// log2 of a power of two.
constexpr int scan_shift(std::int64_t n) {
  int shift = 0;
  while ((std::int64_t{1} << shift) < n) ++shift;
  return shift;
}

template <class Map>
scan_slots<Map> empty_flags(char const* op, device::cuda const& policy, view<space::device, Map, dyn, dyn> carries,
                            view<space::device, std::int32_t, dyn> flags, std::int64_t blocks, std::int64_t channels,
                            std::int64_t flags_each) {
  std::int64_t const count = scan_tiles::tickets + scan_tiles::levels * blocks * flags_each;
  check(op, cudaMemsetAsync(flags.data(), 0, sizeof(std::int32_t) * static_cast<std::size_t>(count), policy.stream));
  return {carries.data(), flags.data(), flags.data() + scan_tiles::tickets, blocks, channels, flags_each};
}

}  // namespace detail
}  // namespace blackmamba::cuda
