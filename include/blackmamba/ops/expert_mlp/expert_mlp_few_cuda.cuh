#pragma once
#include <blackmamba/core/cuda/copy_async_cuda.cuh>
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/named_barrier_cuda.cuh>
#include <blackmamba/core/cuda/reduce_cuda.cuh>
#include <blackmamba/core/cuda/tensor_core_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/core/cuda/warpgroup_cuda.cuh>
#include <blackmamba/core/numeric.hpp>

#include <cooperative_groups.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

/// expert_mlp of very few tokens on Hopper, in one launch: to read the weights of their experts is all there is to do.
/// Each block has a part of the first product's rows, then of the second's, and one thread has the copy engine bring
/// them through a ring in shared memory, in one stream: while the blocks wait for each other between the two products,
/// the second one's weights arrive. Then all warps share these rows' depth, by tensor cores.
/// Kernels: (one row, up to four) for each activation and T.
namespace blackmamba::cuda::detail {

namespace few {

inline constexpr int most_rows = 4;
inline constexpr int warps = 16, threads = 32 * (warps + 1);  // that compute; and one that copies
inline constexpr int chunk = 8;                               // elements in 16 bytes
inline constexpr int most_stages = 32, stage_aim = 16384;     // bytes

template <class T>
struct arguments {
  std::int64_t tokens, experts, width, inner;
  T const* x;
  std::int64_t x_stride;
  float const* gate;
  std::int64_t gate_stride;
  std::int64_t const* offsets;
  std::int32_t const *source, *row;
  T const *fc1, *fc2;
  std::int64_t fc1_stride, fc1_apart, fc2_stride, fc2_apart;
  float const *fc1_bias, *fc2_bias;
  std::int64_t fc1_bias_apart, fc2_bias_apart;
  T* activated;
  std::int64_t activated_stride;
  T* y;
  std::int64_t y_stride;
};

/// The ring, and how many pairs of rows of the first product, or rows of the second, go into a stage of it.
struct ring_shape {
  int stages, stage_bytes, pairs, rows;
};

/// The experts that have rows, and which; the rows' tokens.
struct groups {
  int count, expert[most_rows], first[most_rows], rows[most_rows], token[most_rows];
  float gate[most_rows];
};

/// A stage of the stream: rows [begin, begin + count) of the product's part that the expert `which` has.
struct piece {
  int which, begin, count;
};

/// Walks over the pieces of a product of `all` rows for each expert: the block's share of each, `each` at a time.
struct pieces {
  int low, high, each, experts;
  piece at;
  __device__ __forceinline__ pieces(int all, int per_stage, int used)
      : low(static_cast<int>(std::int64_t{all} * blockIdx.x / gridDim.x)),
        high(static_cast<int>(std::int64_t{all} * (blockIdx.x + 1) / gridDim.x)),
        each(per_stage),
        experts(low < high ? used : 0),
        at{0, low, min(per_stage, high - low)} {}
  __device__ __forceinline__ bool more() const { return at.which < experts; }
  __device__ __forceinline__ void next() {
    at.begin += each;
    if (at.begin >= high) {
      at.begin = low;
      ++at.which;
    }
    at.count = min(each, high - at.begin);
  }
};

/// Where the stream is.
struct place {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ __forceinline__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// sum[r] = w times row r of x, both in shared memory, in two sums that are added at the end: over the lanes, too.
template <int Most, class T>
__device__ __forceinline__ void multiply_rows(float (&sum)[Most], T const* w, T const* x, int width, int rows) {
  auto const widened = [](T const* p) {
    raw_pack<T, 8> raw;
    raw.w[0] = *reinterpret_cast<uint4 const*>(p);
    return raw.widened();
  };
  float part[Most][2] = {};
#pragma unroll 4
  for (int c = static_cast<int>(threadIdx.x) % 32 * chunk; c < width; c += 32 * chunk) {
    auto const a = widened(w + c);
#pragma unroll
    for (int r = 0; r < Most; ++r) {
      if (r >= rows) break;
      auto const b = widened(x + r * width + c);
#pragma unroll
      for (int i = 0; i < 8; ++i) part[r][i % 2] = math::fma(a[i], b[i], part[r][i % 2]);
    }
  }
#pragma unroll
  for (int r = 0; r < Most; ++r) sum[r] = r < rows ? warp_sum(part[r][0] + part[r][1]) : 0.0f;
}

/// sum[0] and sum[1] = row lane / 4 of w times columns 2 (lane % 4) and 2 (lane % 4) + 1, rows of x, over every
/// `every`-th 32 steps of the depth from `first` on, by tensor cores. A lane names its own rows, w and x: those of
/// number lane / 4, or any others where there are none.
template <class T>
__device__ __forceinline__ void multiply_eight_rows(float (&sum)[2], T const* w, T const* x, int depth, int first,
                                                    int every) {
  constexpr int step = 32;
  int const at = static_cast<int>(threadIdx.x) % 4 * chunk;
  float part[2][4] = {};
#pragma unroll 4
  for (int p = first * step; p < depth; p += every * step) {
    uint4 a = make_uint4(0, 0, 0, 0), b = a;
    if (p + at < depth) {
      a = *reinterpret_cast<uint4 const*>(w + p + at);
      b = *reinterpret_cast<uint4 const*>(x + p + at);
    }
    std::uint32_t const front[4] = {a.x, 0, a.y, 0}, back[4] = {a.z, 0, a.w, 0};
    multiply_matrices<T>(part[0], front, b.x, b.y);
    multiply_matrices<T>(part[1], back, b.z, b.w);
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) sum[e] = part[0][e] + part[1][e];
}

}  // namespace few

template <class Function, class T, int Most>
__global__ void __launch_bounds__(few::threads, 1)
    expert_mlp_few_tokens([[maybe_unused]] __grid_constant__ few::arguments<T> const p,
                          [[maybe_unused]] few::ring_shape const ring) {
  if constexpr (warpgroup_instructions) {
    // The host knows by the barriers' bytes that this program has the kernel's code.
    __shared__ alignas(8) std::uint64_t barriers[2 * few::most_stages + 1];
    __shared__ few::groups g;
    __shared__ float parts[2][few::warps][8][few::most_rows + 1];  // sums of the warps, in turns
    extern __shared__ __align__(128) unsigned char few_memory[];
    int const width = static_cast<int>(p.width), inner = static_cast<int>(p.inner);
    int const lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    // Rows of x, then of what is activated; behind them the ring.
    T* const rows = reinterpret_cast<T*>(few_memory + ring.stages * ring.stage_bytes);
    std::uint32_t const memory = shared_address(few_memory), full = shared_address(barriers);
    std::uint32_t const free = full + 8 * few::most_stages, x_there = free + 8 * few::most_stages;

    if (warp == few::warps) {
      if (lane == 0) {
        for (int s = 0; s < ring.stages; ++s) {
          phase_barrier::init(full + 8 * s, 1);
          phase_barrier::init(free + 8 * s, few::warps);
        }
        phase_barrier::init(x_there, 1);
        phase_barrier::publish_init();
      }
    } else if (warp == 0) {
      int count = 0;
      for (std::int64_t first = 0; first < p.experts; first += 32) {
        std::int64_t const e = first + lane;
        int const begin = e < p.experts ? static_cast<int>(p.offsets[e]) : 0;
        int const end = e < p.experts ? static_cast<int>(p.offsets[e + 1]) : 0;
        unsigned const used = __ballot_sync(0xffffffffu, end > begin);
        if (end > begin) {
          int const at = count + __popc(used & ((1u << lane) - 1));
          g.expert[at] = static_cast<int>(e);
          g.first[at] = begin;
          g.rows[at] = end - begin;
        }
        count += __popc(used);
      }
      if (lane == 0) g.count = count;
    } else if (warp == 1 && lane < p.tokens) {
      int const token = p.source[lane];
      g.token[lane] = token;
      g.gate[lane] = token >= 0 ? p.gate[token * p.gate_stride] : 0.0f;
    } else if (warp > 1) {
      for (std::int64_t t = blockIdx.x; t < p.tokens; t += gridDim.x)
        if (p.row[t] < 0)
          for (int c = static_cast<int>(threadIdx.x) - 64; c < width; c += 32 * (few::warps - 2))
            p.y[t * p.y_stride + c].bits = 0;
    }
    __syncthreads();
    int const all = g.count > 0 ? g.first[g.count - 1] + g.rows[g.count - 1] : 0;
    auto const fetch = [&](std::uint32_t to, T const* from, std::int64_t stride, int length, int count,
                           std::uint32_t barrier) {
      int const bytes = length * static_cast<int>(sizeof(T));
      if (stride == length) return copy_bytes(to, from, count * bytes, barrier);
      for (int i = 0; i < count; ++i) copy_bytes(to + i * bytes, from + i * stride, bytes, barrier);
    };

    few::pieces first(inner, ring.pairs, g.count), second(width, ring.rows, g.count);
    few::place at;
    // The thread that copies is a ring ahead: a stage is free at first.
    auto const begin_stage = [&](int bytes) {
      phase_barrier::wait(free + 8 * at.stage, at.parity ^ 1);
      phase_barrier::arrive_expecting(full + 8 * at.stage, bytes);
      return memory + static_cast<std::uint32_t>(at.stage * ring.stage_bytes);
    };
    auto const fetch_second = [&] {
      int const bytes = second.at.count * inner * static_cast<int>(sizeof(T));
      std::uint32_t const barrier = full + 8 * at.stage, to = begin_stage(bytes);
      fetch(to, p.fc2 + g.expert[second.at.which] * p.fc2_apart + second.at.begin * p.fc2_stride, p.fc2_stride, inner,
            second.at.count, barrier);
      at.next(ring.stages);
      second.next();
    };
    if (warp == few::warps) {
      if (lane == 0) {
        // x first: it is little, and everything waits for it.
        phase_barrier::arrive_expecting(x_there, all * width * static_cast<int>(sizeof(T)));
        for (int r = 0; r < all; ++r)
          copy_bytes(shared_address(rows + r * width), p.x + g.token[r] * p.x_stride,
                     width * static_cast<int>(sizeof(T)), x_there);
        for (; first.more(); first.next()) {
          int const bytes = first.at.count * width * static_cast<int>(sizeof(T));
          T const* const from = p.fc1 + g.expert[first.at.which] * p.fc1_apart + first.at.begin * p.fc1_stride;
          std::uint32_t const barrier = full + 8 * at.stage, to = begin_stage(2 * bytes);
          fetch(to, from, p.fc1_stride, width, first.at.count, barrier);
          fetch(to + static_cast<std::uint32_t>(bytes), from + p.inner * p.fc1_stride, p.fc1_stride, width,
                first.at.count, barrier);
          at.next(ring.stages);
        }
        // As much as the ring holds: nobody takes it out before the blocks have met.
        for (int s = 0; s < ring.stages && second.more(); ++s) fetch_second();
      }
      __syncwarp();
    } else {
      phase_barrier::wait(x_there, 0);
      for (int done = 0; first.more(); first.next()) {
        auto const& now = first.at;
        int const members = g.rows[now.which], row = g.first[now.which], e = g.expert[now.which];
        T const* const gates = reinterpret_cast<T const*>(few_memory + at.stage * ring.stage_bytes);
        phase_barrier::wait(full + 8 * at.stage, at.parity);
        for (int i = (warp - done % few::warps + few::warps) % few::warps; i < now.count; i += few::warps) {
          float gate[Most], up[Most];
          few::multiply_rows(gate, gates + i * width, rows + row * width, width, members);
          few::multiply_rows(up, gates + (now.count + i) * width, rows + row * width, width, members);
          int const j = now.begin + i;
#pragma unroll
          for (int r = 0; r < Most; ++r) {
            if (r >= members || lane != 0) continue;
            if (p.fc1_bias) {
              float const* const bias = p.fc1_bias + e * p.fc1_bias_apart + j;
              gate[r] += bias[0];
              up[r] += bias[inner];
            }
            p.activated[(row + r) * p.activated_stride + j] =
                convert<T>(Function::of(convert<float>(convert<T>(gate[r])), convert<float>(convert<T>(up[r]))));
          }
        }
        done += now.count;
        __syncwarp();
        if (lane == 0) phase_barrier::arrive(free + 8 * at.stage);
        at.next(ring.stages);
      }
    }
    cooperative_groups::this_grid().sync();
    if (warp == few::warps) {
      if (lane == 0)
        while (second.more()) fetch_second();
      return;
    }
    int const chunks = inner / few::chunk;
    for (int i = static_cast<int>(threadIdx.x); i < all * chunks; i += 32 * few::warps) {
      int const r = i / chunks, c = (i - r * chunks) * few::chunk;
      *reinterpret_cast<uint4*>(rows + r * inner + c) =
          __ldcg(reinterpret_cast<uint4 const*>(p.activated + r * p.activated_stride + c));
    }
    named_barrier<1, 32 * few::warps>();
    // Up to eight rows at once; the warps share their depth.
    int const q = lane / 4;
    for (int pass = 0; second.more(); ++pass) {
      auto const start = second.at;
      int const members = g.rows[start.which], row = g.first[start.which], e = g.expert[start.which];
      T const* w = reinterpret_cast<T const*>(few_memory + at.stage * ring.stage_bytes);
      few::place const begun = at;
      int n = 0, stages = 0;
      for (; second.more() && second.at.which == start.which && n + second.at.count <= 8 && stages < ring.stages;
           second.next(), ++stages) {
        phase_barrier::wait(full + 8 * at.stage, at.parity);
        if (q >= n && q < n + second.at.count)
          w = reinterpret_cast<T const*>(few_memory + at.stage * ring.stage_bytes) + (q - n) * inner;
        n += second.at.count;
        at.next(ring.stages);
      }
      float sum[2];
      few::multiply_eight_rows(sum, w, rows + (row + min(q, members - 1)) * inner, inner, warp, few::warps);
      __syncwarp();
      few::place left = begun;
      for (int s = 0; s < stages; ++s, left.next(ring.stages))
        if (lane == 0) phase_barrier::arrive(free + 8 * left.stage);
      auto& part = parts[pass % 2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (lane % 4 * 2 + i < few::most_rows) part[warp][q][lane % 4 * 2 + i] = sum[i];
      named_barrier<1, 32 * few::warps>();
      for (int i = static_cast<int>(threadIdx.x); i < n * members; i += 32 * few::warps) {
        int const r = i / n, o = i - r * n, column = start.begin + o;
        float total = p.fc2_bias ? p.fc2_bias[e * p.fc2_bias_apart + column] : 0.0f;
#pragma unroll
        for (int v = 0; v < few::warps; ++v) total += part[v][o][r];
        p.y[g.token[row + r] * p.y_stride + column] = convert<T>(g.gate[row + r] * convert<float>(convert<T>(total)));
      }
    }
  }
}

/// Enqueues it where there are few enough tokens, all rows are aligned and the device is a Hopper. False elsewhere.
template <class Function, class T>
bool expert_mlp_of_few_tokens(char const* op, device::cuda const& policy, few::arguments<T> const& p) {
  auto const aligned = [](void const* x, std::int64_t stride, std::int64_t apart) {
    return reinterpret_cast<std::uintptr_t>(x) % 16 == 0 && stride % few::chunk == 0 && apart % few::chunk == 0;
  };
  if (p.tokens > few::most_rows || p.width % few::chunk != 0 || p.inner % few::chunk != 0 || p.inner == 0 ||
      std::max(p.width, p.inner) > 65536 || !aligned(p.x, p.x_stride, 0) ||
      !aligned(p.fc1, p.fc1_stride, p.fc1_apart) || !aligned(p.fc2, p.fc2_stride, p.fc2_apart) ||
      !aligned(p.activated, p.activated_stride, 0) || properties().major != 9)
    return false;
  auto* const kernel =
      p.tokens == 1 ? expert_mlp_few_tokens<Function, T, 1> : expert_mlp_few_tokens<Function, T, few::most_rows>;
  static int const own_bytes = [&] {  // of both
    cudaFuncAttributes attributes{};
    check(op, cudaFuncGetAttributes(&attributes, kernel));
    return static_cast<int>(attributes.sharedSizeBytes);
  }();
  if (own_bytes == 0) return false;
  int const first_row = static_cast<int>(p.width * 2), second_row = static_cast<int>(p.inner * 2);
  int const rows_bytes = static_cast<int>(p.tokens) * std::max(first_row, second_row);
  few::ring_shape ring{};
  ring.pairs = std::max(1, few::stage_aim / (2 * first_row));
  ring.rows = std::clamp(few::stage_aim / second_row, 1, 8);
  ring.stage_bytes = (std::max(2 * ring.pairs * first_row, ring.rows * second_row) + 127) / 128 * 128;
  int const left = properties().shared_bytes_per_block - own_bytes - rows_bytes;
  ring.stages = std::min(few::most_stages, left / ring.stage_bytes);
  if (ring.stages < 2) return false;
  launch(op, policy,
         {.blocks = static_cast<unsigned>(properties().multiprocessors),
          .threads = few::threads,
          .shared_bytes = static_cast<std::size_t>(ring.stages * ring.stage_bytes + rows_bytes),
          .cooperative = true},
         kernel, p, ring);
  return true;
}

}  // namespace blackmamba::cuda::detail
