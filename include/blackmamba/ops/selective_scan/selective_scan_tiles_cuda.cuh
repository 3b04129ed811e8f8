#pragma once
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_exponential_cuda.cuh>

#include <algorithm>
#include <cstdint>
#include <type_traits>

/// What the forward scan on a device is made of: how lanes share channels, how sequences are cut, and how states,
/// projections and elements of sequences come and go.
namespace blackmamba::cuda::detail {

/// Sums over the lanes that share a channel, for each step of a group: lane i gets the i-th sum. From four lanes on by
/// way of shared memory, rows padded so that no two lanes meet in a bank: half the instructions of a butterfly of
/// shuffles and selections, and measured faster. The order of a sum does not depend on i.
template <int Lanes, class A>
struct scan_sums {
  static constexpr int row = Lanes + (Lanes >= 8 ? 4 : 0), channel = Lanes * row + Lanes;
  static constexpr int elements = Lanes < 4 ? 0 : 32 / Lanes * channel;  ///< of a warp

  /// `in_warp`: the lane's place in the warp.
  static __device__ __forceinline__ void put(A* to, int in_warp, A const (&y)[Lanes]) {
    A* const p = to + in_warp / Lanes * channel + in_warp % Lanes;
#pragma unroll
    for (int i = 0; i < Lanes; ++i) p[i * row] = y[i];
  }
  /// After a __syncwarp().
  static __device__ __forceinline__ A take(A const* from, int in_warp) {
    A const* const p = from + in_warp / Lanes * channel + in_warp % Lanes * row;
    pack<A, 4> sum = load_pack<4>(p);
#pragma unroll
    for (int i = 4; i < Lanes; i += 4) {
      auto const x = load_pack<4>(p + i);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] += x[e];
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
};
template <int Half, int Lanes, class A>
__device__ __forceinline__ void halve_sums(A (&y)[Lanes], int lane) {
  if constexpr (Half > 0) {
    bool const upper = (lane & Half) != 0;
#pragma unroll
    for (int i = 0; i < Half; ++i) {
      A const given = upper ? y[i] : y[i + Half], kept = upper ? y[i + Half] : y[i];
      y[i] = kept + __shfl_xor_sync(0xffffffffu, given, Half);
    }
    halve_sums<Half / 2>(y, lane);
  }
}
template <int Lanes, class A>
__device__ __forceinline__ A sums_by_lane(A (&y)[Lanes], int lane) {
  halve_sums<Lanes / 2>(y, lane);
  return y[0];
}

/// `Lanes` neighbouring lanes share a channel. Each holds some of its states in registers over the whole sequence, and
/// does what a step needs once (softplus, gate, memory access) for one step out of `Lanes`, a group. With Pair = 2 a
/// lane does all that for two neighbouring channels, which halves what it reads of B and C: with one, shared memory
/// would be what bounds a scan.
template <class T, int N, int Lanes, int Pair>
struct scan_shape {
  using A = accum_t<T>;
  static constexpr int threads = 128, warps = threads / 32;
  static constexpr int channels = threads / Lanes * Pair;
  /// States of a lane; those beyond N stay zero.
  static constexpr int share = (N + Lanes - 1) / Lanes, states = share <= 2 ? share : (share + 3) / 4 * 4;
  static constexpr int width = Lanes * states;
  static constexpr int group = Lanes;
  /// Groups whose inputs are on their way, and that one turn of the loop works on; 32 steps are whole turns.
  static constexpr int depth = std::min(32 / group, std::clamp(256 / (states * group), 1, 4));
  static constexpr int turn = depth * group;
  /// Whether decays are computed a group ahead of their use, where registers allow: neither waits for the other then.
  static constexpr bool early = states * group * Pair <= 16;
  /// Steps whose B and C are in shared memory at once.
  static constexpr int tile = width <= 64 ? 32 : turn;
  /// Steps whose B a lane reads with one access of four elements.
  static constexpr int together = std::min(std::max(4 / states, 1), group);
  static constexpr int columns = (N + 3) / 4;
  static constexpr int packs = (2 * tile * columns + threads - 1) / threads;
  /// Shared memory: two buffers of B and C, (2, 2, tile, width); then for each warp two of dt and dt u,
  /// (2, Pair, 2, 32), and two of the outputs' parts, (2, Pair, scan_sums).
  static constexpr int shared_of_warp = 4 * Pair * 32 + 2 * Pair * scan_sums<Lanes, A>::elements;
  static constexpr int shared_elements = 4 * tile * width + warps * shared_of_warp;

  /// Where state n of step t of a tile lies.
  static __device__ __forceinline__ int place(int t, int n) {
    return ((t / together * Lanes + n / states) * together + t % together) * states + n % states;
  }
};

/// Steps of one sequence that one block works on.
struct scan_piece {
  std::int64_t sequence = 0;  ///< row of the states
  std::int64_t batch = 0;     ///< row of the tensors
  std::int64_t first = 0;     ///< its first step in that row
  std::int64_t before = 0;    ///< steps of the sequence before it
  std::int64_t chunk = 0;     ///< number of its first checkpoint
  int steps = 0;
  bool last = false;
  bool present = true;
};
/// How sequences are numbered: by themselves, or in pieces of `segment` steps, row by row, or one packed sequence after
/// the other with gaps where they end early.
struct scan_numbering {
  std::int64_t const* cu_seqlens;
  std::int64_t batch, length, sequences;
  std::int64_t segment;  ///< 0: uncut

  __host__ __device__ std::int64_t pieces_of(std::int64_t steps) const {
    return segment == 0 || steps == 0 ? 1 : (steps + segment - 1) / segment;
  }
  std::int64_t count() const {
    if (cu_seqlens != nullptr) return segment == 0 ? sequences : length / segment + sequences;
    return batch * pieces_of(length);
  }
  __device__ std::int64_t first_number(std::int64_t s) const {
    return cu_seqlens != nullptr ? cu_seqlens[s] / segment + s : s * pieces_of(length);
  }

  __device__ scan_piece operator()(std::int64_t number) const {
    scan_piece p;
    std::int64_t begin = 0, end = length, k = 0;
    if (cu_seqlens == nullptr) {
      p.sequence = p.batch = number / pieces_of(length);
      k = number % pieces_of(length);
      p.chunk = p.batch * ((length + selective_scan::chunk_length - 1) / selective_scan::chunk_length);
      if (length == 0) p.chunk = p.batch;
    } else {
      std::int64_t low = number;
      if (segment != 0) {
        low = 0;
        for (std::int64_t high = sequences; low + 1 < high;) {
          std::int64_t const middle = (low + high) / 2;
          (first_number(middle) <= number ? low : high) = middle;
        }
        k = number - first_number(low);
      }
      p.sequence = low;
      begin = cu_seqlens[low];
      end = cu_seqlens[low + 1];
      p.chunk = begin / selective_scan::chunk_length + low;
    }
    p.before = k * segment;
    p.first = begin + p.before;
    std::int64_t const rest = end - p.first;
    p.present = k == 0 || rest > 0;
    p.last = segment == 0 || rest <= segment;
    p.steps = static_cast<int>(p.last ? (rest > 0 ? rest : 0) : segment);
    p.chunk += p.before / selective_scan::chunk_length;
    return p;
  }
};

template <class T, int N, int Lanes>
struct scan_states {
  using shape = scan_shape<T, N, Lanes, 1>;
  using A = accum_t<T>;
  A h[shape::states];

  /// Of a channel's N states at p, this lane's.
  __device__ __forceinline__ void load(A const* p, int lane) {
    if constexpr (N % 4 == 0 && shape::states % 4 == 0) {
      if (pack_aligned<4>(p)) {
#pragma unroll
        for (int q = 0; q < shape::states; q += 4) {
          int const n = lane * shape::states + q;
          auto const x = n < N ? load_pack<4>(p + n) : pack<A, 4>{};
#pragma unroll
          for (int i = 0; i < 4; ++i) h[q + i] = x[i];
        }
        return;
      }
    }
#pragma unroll
    for (int q = 0; q < shape::states; ++q) {
      int const n = lane * shape::states + q;
      h[q] = n < N ? p[n] : A(0);
    }
  }
  __device__ __forceinline__ void store(A* p, int lane) const {
    if constexpr (N % 4 == 0 && shape::states % 4 == 0) {
      if (pack_aligned<4>(p)) {
#pragma unroll
        for (int q = 0; q < shape::states; q += 4) {
          int const n = lane * shape::states + q;
          pack<A, 4> x;
#pragma unroll
          for (int i = 0; i < 4; ++i) x[i] = h[q + i];
          if (n < N) store_pack<4>(p + n, x);
        }
        return;
      }
    }
#pragma unroll
    for (int q = 0; q < shape::states; ++q) {
      int const n = lane * shape::states + q;
      if (n < N) p[n] = h[q];
    }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int q = 0; q < shape::states; ++q) h[q] = A(0);
  }
};

/// B and C of the next tile on their way from memory to shared memory, in packs of four states.
template <class T, int N, int Lanes>
struct scan_projection {
  using shape = scan_shape<T, N, Lanes, 1>;
  using A = accum_t<T>;
  raw_pack<T, 4> on_the_way[shape::packs];

  __device__ __forceinline__ void fetch(selective_scan::inputs<device::cuda, T, N> const& in, scan_piece const& piece,
                                        int t0, bool in_packs) {
#pragma unroll
    for (int k = 0; k < shape::packs; ++k) {
      int const i = static_cast<int>(threadIdx.x) + k * shape::threads,
                t = t0 + i % (shape::tile * shape::columns) / shape::columns, n = i % shape::columns * 4;
      raw_pack<T, 4>& x = on_the_way[k];
#pragma unroll
      for (int w = 0; w < raw_pack<T, 4>::words; ++w) x.w[w] = {};
      if (i >= 2 * shape::tile * shape::columns || t >= piece.steps) continue;
      auto const& from = i < shape::tile * shape::columns ? in.B : in.C;
      T const* const p = from.row(piece.batch, piece.first + t) + n;
      if (N % 4 == 0 && in_packs) {
#pragma unroll
        for (int w = 0; w < raw_pack<T, 4>::words; ++w)
          x.w[w] = reinterpret_cast<typename raw_pack<T, 4>::word const*>(p)[w];
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (n + e < N) x.e[e] = p[e];
      }
    }
  }
  /// to: (2, tile, width)
  __device__ __forceinline__ void put(A* to) const {
#pragma unroll
    for (int k = 0; k < shape::packs; ++k) {
      int const i = static_cast<int>(threadIdx.x) + k * shape::threads,
                t = i % (shape::tile * shape::columns) / shape::columns, n = i % shape::columns * 4;
      if (i >= 2 * shape::tile * shape::columns) continue;
      A* const half = to + (i < shape::tile * shape::columns ? 0 : shape::tile * shape::width);
      if constexpr (shape::states % 4 == 0) {
        pack<A, 4> x;
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = widen(on_the_way[k].e[e]);
        store_pack<4>(half + shape::place(t, n), x);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (n + e < shape::width) half[shape::place(t, n + e)] = widen(on_the_way[k].e[e]);
      }
    }
  }
  /// States beyond N that no pack reaches.
  static __device__ __forceinline__ void clear_rest(A* to) {
    if constexpr (4 * shape::columns < shape::width)
      for (int i = static_cast<int>(threadIdx.x); i < 4 * shape::tile * shape::width; i += shape::threads) to[i] = A(0);
  }
};

/// The channels of a lane, of a (B, L, D) tensor, by step.
template <class T>
struct scan_column {
  char* first;
  unsigned stride;  ///< bytes

  template <class View>
  __device__ __forceinline__ scan_column(View const& x, scan_piece const& piece, std::int64_t channel)
      : first(const_cast<char*>(reinterpret_cast<char const*>(x.row(piece.batch, piece.first) + channel))),
        stride(static_cast<unsigned>(x.stride(1)) * static_cast<unsigned>(sizeof(T))) {
    asm("" : "+r"(stride));  // keeps the product with it one of 32 bits
  }
  __device__ __forceinline__ T* at(unsigned t) const {  // one instruction
    return reinterpret_cast<T*>(first + static_cast<std::uint64_t>(t) * stride);
  }
};

/// Pair elements on their way from memory, and back. Sixteen bits take a register of their own: where the compiler
/// packs two into one, it waits for both as soon as they are asked for.
template <class T, int Pair>
struct scan_elements {
  using A = accum_t<T>;
  static constexpr bool narrow = sizeof(T) == 2;
  using word = std::conditional_t<narrow, unsigned, T>;
  word w[narrow ? 1 : Pair];

  /// From memory that nothing writes while the kernel runs.
  __device__ __forceinline__ void load(T const* p) {
    if constexpr (narrow && Pair == 1) {
      asm("ld.global.nc.u16 %0, [%1];" : "=r"(w[0]) : "l"(p));
    } else if constexpr (narrow) {
      asm("ld.global.nc.u32 %0, [%1];" : "=r"(w[0]) : "l"(p));
    } else if constexpr (Pair == 1) {
      w[0] = __ldg(p);
    } else {
      auto const x = __ldg(reinterpret_cast<float2 const*>(p));
      w[0] = x.x, w[1] = x.y;
    }
  }
  /// The same of memory that the kernel writes too. What stands before it in the program stays there.
  __device__ __forceinline__ void load_current(T const* p)
  requires(Pair == 1)
  {
    if constexpr (narrow)
      asm volatile("ld.global.u16 %0, [%1];" : "=r"(w[0]) : "l"(p) : "memory");
    else
      w[0] = *p;
  }
  /// Those at p in shared memory.
  static __device__ __forceinline__ scan_elements of(T const* p) {
    static_assert(narrow && Pair == 2);
    scan_elements x;
    x.w[0] = *reinterpret_cast<unsigned const*>(p);
    return x;
  }
  __device__ __forceinline__ A operator[](int k) const {
    if constexpr (std::is_same_v<T, bfloat16>) {
      return __uint_as_float(k == 0 ? w[0] << 16 : w[0] & 0xffff0000u);
    } else if constexpr (std::is_same_v<T, half>) {
      T x;
      x.bits = static_cast<std::uint16_t>(k == 0 ? w[0] : w[0] >> 16);
      return widen(x);
    } else {
      return w[k];
    }
  }
  static __device__ __forceinline__ void store(T* p, A const (&x)[Pair]) {
    pack<A, Pair> values;
#pragma unroll
    for (int k = 0; k < Pair; ++k) values[k] = x[k];
    store_pack<Pair>(p, values);
  }
};

/// All bits, or none. What is chosen with it is computed either way: a branch in the middle of a step would keep the
/// compiler from interleaving what stands on both sides of it.
template <class A>
__device__ __forceinline__ auto scan_mask(bool on) {
  if constexpr (sizeof(A) == 4) {
    int mask = on ? -1 : 0;
    asm("" : "+r"(mask));
    return mask;
  } else {
    long long mask = on ? -1 : 0;
    asm("" : "+l"(mask));
    return mask;
  }
}
__device__ __forceinline__ float selected(int mask, float a, float b) {
  return __int_as_float((__float_as_int(a) & mask) | (__float_as_int(b) & ~mask));
}
__device__ __forceinline__ double selected(long long mask, double a, double b) {
  return __longlong_as_double((__double_as_longlong(a) & mask) | (__double_as_longlong(b) & ~mask));
}

}  // namespace blackmamba::cuda::detail
