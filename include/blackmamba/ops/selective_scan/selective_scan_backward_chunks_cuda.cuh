#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>

#include <cstdint>
#include <type_traits>

/// The chunks of steps that the backward pass of the selective scan works on, and access to their rows.
namespace blackmamba::cuda::detail {

template <class T, int N>
using adjoint_block = selective_scan_tuning::backward_block<N, sizeof(accum_t<T>)>;

inline constexpr int adjoint_chunk = static_cast<int>(selective_scan::chunk_length);
/// Steps whose inputs a thread has on their way, where threads are `turn` steps apart: at most `most`.
__host__ __device__ constexpr int adjoint_batch(int turn, int most) {
  return turn >= adjoint_chunk ? 1 : adjoint_chunk / turn < most ? adjoint_chunk / turn : most;
}

/// Up to chunk_length steps of one sequence.
struct scan_chunk {
  std::int64_t number;    ///< of its checkpoint
  std::int64_t sequence;  ///< row of the states
  std::int64_t batch;     ///< row of the tensors
  std::int64_t first;     ///< its first step in that row
  int steps;
  bool begins, ends;  ///< the sequence
};

/// Chunks in order of their numbers, which have gaps where packed sequences end early.
struct scan_chunks {
  std::int64_t const* cu_seqlens;
  std::int64_t length, sequences, row_chunks;
  selective_scan_tuning::backward_plan plan;

  __device__ std::int64_t begin(std::int64_t part) const {
    return part / plan.unit_parts * plan.unit + part % plan.unit_parts * plan.part_chunks;
  }
  __device__ std::int64_t end(std::int64_t part) const {
    std::int64_t const unit_end = (part / plan.unit_parts + 1) * plan.unit, end = begin(part) + plan.part_chunks;
    return end < unit_end ? end : unit_end;
  }
  __device__ std::int64_t first_number(std::int64_t s) const { return cu_seqlens[s] / adjoint_chunk + s; }
  /// The last sequence whose first chunk's number is at most this one.
  __device__ std::int64_t owner(std::int64_t number) const {
    if (cu_seqlens == nullptr) return number / row_chunks;
    std::int64_t low = 0;
    for (std::int64_t high = sequences; low + 1 < high;) {
      std::int64_t const middle = (low + high) / 2;
      (first_number(middle) <= number ? low : high) = middle;
    }
    return low;
  }
  /// Finds a chunk of sequence s or of one before it; moves s there. @returns false where no chunk has the number
  __device__ bool find(std::int64_t number, std::int64_t& s, scan_chunk& chunk) const {
    if (sequences == 0) return false;
    std::int64_t begin = 0, size = length, k = 0;
    if (cu_seqlens == nullptr) {
      while (number < s * row_chunks) --s;
      k = number - s * row_chunks;
    } else {
      while (s > 0 && number < first_number(s)) --s;
      k = number - first_number(s);
      begin = cu_seqlens[s];
      size = cu_seqlens[s + 1] - begin;
    }
    std::int64_t const rest = size - k * adjoint_chunk;
    if (k > 0 && rest <= 0) return false;
    chunk = {.number = number,
             .sequence = s,
             .batch = cu_seqlens == nullptr ? s : 0,
             .first = begin + k * adjoint_chunk,
             .steps = static_cast<int>(rest < adjoint_chunk ? rest : adjoint_chunk),
             .begins = k == 0,
             .ends = rest <= adjoint_chunk};
    return true;
  }
};

/// A value that a warp's lanes share, where the compiler sees that they do.
__device__ __forceinline__ int uniform(int x) {
  return static_cast<int>(__reduce_or_sync(0xffffffffu, static_cast<unsigned>(x)));
}

/// Loads a word from global memory, or zeros, and stores one, or doesn't, without a branch, which would keep the
/// compiler from interleaving what stands on both sides of it. A load happens where it stands: it isn't merged with
/// another one of the same word. What is loaded here, the kernel doesn't write before.
__device__ __forceinline__ void load_where(bool on, uint2 const* p, uint2& x) {
  asm volatile(
      "{.reg .pred on; setp.ne.u32 on, %2, 0; mov.u32 %0, 0; mov.u32 %1, 0; @on ld.global.v2.u32 {%0, %1}, [%3];}"
      : "=r"(x.x), "=r"(x.y)
      : "r"(static_cast<unsigned>(on)), "l"(__cvta_generic_to_global(p)));
}
__device__ __forceinline__ void load_where(bool on, uint4 const* p, uint4& x) {
  asm volatile(
      "{.reg .pred on; setp.ne.u32 on, %4, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0; "
      "@on ld.global.v4.u32 {%0, %1, %2, %3}, [%5];}"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "r"(static_cast<unsigned>(on)), "l"(__cvta_generic_to_global(p)));
}
__device__ __forceinline__ void store_where(bool on, uint2* p, uint2 const& x) {
  asm volatile(
      "{.reg .pred on; setp.ne.u32 on, %0, 0; @on st.global.v2.u32 [%1], {%2, %3};}" ::"r"(static_cast<unsigned>(on)),
      "l"(__cvta_generic_to_global(p)), "r"(x.x), "r"(x.y));
}
__device__ __forceinline__ void store_where(bool on, uint4* p, uint4 const& x) {
  asm volatile("{.reg .pred on; setp.ne.u32 on, %0, 0; @on st.global.v4.u32 [%1], {%2, %3, %4, %5};}" ::"r"(
                   static_cast<unsigned>(on)),
               "l"(__cvta_generic_to_global(p)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w));
}

/// Four neighbouring channels of a (B, L, D) tensor, by step of a chunk; `count` of them exist. With Packs, all or none
/// of them do, and they are one access.
template <class T, bool Packs>
struct channel_quad {
  using A = accum_t<T>;
  using raw = raw_pack<std::remove_const_t<T>, 4>;
  T* first;
  unsigned stride;  ///< bytes
  int count;

  /// @param offset bytes from the tensor's first element
  template <class View>
  __device__ __forceinline__ channel_quad(View const& x, std::int64_t offset, int n)
      : first(reinterpret_cast<T*>(const_cast<char*>(reinterpret_cast<char const*>(x.data())) + offset)),
        stride(static_cast<unsigned>(x.stride(1)) * static_cast<unsigned>(sizeof(T))),
        count(n) {}
  __device__ __forceinline__ T* at(int t) const {  // one instruction, where a sum for each step would be two
    std::uint64_t address;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(t), "r"(stride), "l"(first));
    return reinterpret_cast<T*>(address);
  }
  /// What stands there, zeros where nothing does or `within` is false; widened only when it is used, so that several
  /// can be on their way.
  __device__ __forceinline__ raw fetch(int t, bool within) const {
    raw x;
    if constexpr (Packs) {
#pragma unroll
      for (int w = 0; w < raw::words; ++w)
        load_where(within && count > 0, reinterpret_cast<typename raw::word const*>(at(t)) + w, x.w[w]);
    } else {
#pragma unroll
      for (int w = 0; w < raw::words; ++w) x.w[w] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (within && i < count) x.e[i] = at(t)[i];
    }
    return x;
  }
  __device__ __forceinline__ void put(int t, pack<A, 4> const& x, bool within) const {
    if constexpr (Packs) {
      raw const r(x);
#pragma unroll
      for (int w = 0; w < raw::words; ++w)
        store_where(within && count > 0, reinterpret_cast<typename raw::word*>(at(t)) + w, r.w[w]);
    } else {
      store_some<4>(at(t), x, within ? count : 0);
    }
  }
};

/// Rows of a projection of a chunk, B or C, on their way to shared memory: (steps, states), zeros where there is
/// nothing.
template <class T, int N, int States, int Threads, bool Packs>
struct projection_rows {
  using A = accum_t<T>;
  using raw = raw_pack<T, 4>;
  static constexpr int quads = States / 4, all = adjoint_chunk * quads, each = (all + Threads - 1) / Threads;
  static constexpr int batch = each < 4 ? each : 4;
  raw x[batch];

  __device__ __forceinline__ void fetch(T const* rows, std::int64_t stride, int steps, int first) {
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      int const i = first + k * Threads, t = i / quads, n = i % quads * 4;
#pragma unroll
      for (int w = 0; w < raw::words; ++w) x[k].w[w] = {};
      if (t >= steps) continue;
      T const* const p = rows + t * stride + n;
      if constexpr (Packs && N % 4 == 0) {
        if (n < N) {
#pragma unroll
          for (int w = 0; w < raw::words; ++w) x[k].w[w] = reinterpret_cast<typename raw::word const*>(p)[w];
        }
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (n + e < N) x[k].e[e] = p[e];
      }
    }
  }
  __device__ __forceinline__ void put(A* to, int first) const {
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      int const i = first + k * Threads;
      if (all % (batch * Threads) != 0 && i >= all) continue;
      store_pack<4>(to + 4 * i, x[k].widened());
    }
  }
};

/// Asks for the lines of a row to be brought to the second-level cache.
__device__ __forceinline__ void prefetch_line(void const* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

/// The chunks of a part, last one first, and where their rows lie, in shared memory: one warp finds a chunk while the
/// block works on the one before, and a lane of it does the products of 64 bits for one tensor.
struct chunk_walk {
  enum tensor : int { u, delta, d_y, z, d_u, d_delta, d_z, B, C, tensors };
  struct record {
    std::int64_t rows[tensors];  ///< bytes from a tensor's first element to the block's channels of the first step
    std::int64_t number;         ///< of the checkpoint
    std::int64_t sequence;       ///< row of the states
    std::int64_t row;            ///< the first step's, of all rows of the batch
    int steps;                   ///< negative where there is no more chunk
    int begins, ends;            ///< the sequence
  };
  std::int64_t batch_strides[tensors], step_strides[tensors], columns[tensors];  ///< bytes
  std::int64_t number, sequence;                                                 ///< to look at next
  record records[2];

  template <class View>
  __device__ void set(int k, View const& x, std::int64_t column) {
    using T = std::remove_pointer_t<decltype(x.data())>;
    auto const bytes = static_cast<std::int64_t>(sizeof(T));
    batch_strides[k] = x.stride(0) * bytes, step_strides[k] = x.stride(1) * bytes, columns[k] = column * bytes;
  }
  /// Fills a record; a warp's lanes together.
  __device__ void find(scan_chunks const& chunks, std::int64_t begin, record& to, int lane) {
    scan_chunk chunk{};
    std::int64_t n = number, s = sequence;
    __syncwarp();  // every lane has read
    while (n >= begin && !chunks.find(n, s, chunk)) --n;
    if (lane < tensors)
      to.rows[lane] = chunk.batch * batch_strides[lane] + chunk.first * step_strides[lane] + columns[lane];
    if (lane == 0) {
      to.number = chunk.number, to.sequence = chunk.sequence, to.row = chunk.batch * chunks.length + chunk.first;
      to.steps = n >= begin ? chunk.steps : -1;
      to.begins = chunk.begins, to.ends = chunk.ends;
      number = n - 1, sequence = s;
    }
  }
};

}  // namespace blackmamba::cuda::detail
