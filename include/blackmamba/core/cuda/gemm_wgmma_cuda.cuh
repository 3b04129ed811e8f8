#pragma once
#include <blackmamba/core/cuda/gemm_mma_cuda.cuh>
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/product_cuda.cuh>
#include <blackmamba/core/cuda/tensor_map_cuda.cuh>
#include <blackmamba/core/cuda/warpgroup_cuda.cuh>
#include <blackmamba/core/numeric.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

/// Products of 16-bit operands on Hopper's tensor cores, with and without groups; gemm_mma_cuda.cuh has their twin for
/// other devices. Instantiated once for each element type, result type and layout that is asked for, with code only
/// where the compilation is one for sm_90a.
///
/// One block on each multiprocessor walks over the tiles (128 x 256). One of its warpgroups has the copy engine fill a
/// ring of stages, 64 steps of the depth each, in one stream over all tiles; two multiply them, 64 rows each, and store
/// the result while the next tile's operands arrive. Nothing here may call a function or assert: it would serialise the
/// products; so do branches around them, or sequences of several widths that share the sums' registers.
///
/// Pairs of blocks that copy their columns of B to each other (clusters of two) were slower at every size measured.
namespace blackmamba::cuda::detail {

namespace wgmma {

inline constexpr int rows = mma::rows, columns = mma::columns, depth = mma::depth, stages = 4;
inline constexpr int threads = 384, producers = 128, consumer_warps = 8;
inline constexpr int a_bytes = rows * depth * 2, b_bytes = columns * depth * 2, stage_bytes = a_bytes + b_bytes;
inline constexpr int block_bytes = 64 * depth * 2;  // of an operand that lies across, 64 of its rows
/// Of 384 threads with 168 registers each, the warpgroup that copies gives some to the two that multiply.
inline constexpr int producer_registers = 56, consumer_registers = 224;

/// The two descriptions of operands, and the operands themselves for what the copy engine can't do.
template <class T, class TC>
struct arguments {
  CUtensorMap a, b;
  product<T, T, TC> x;
  bool wide;
};

/// Copies an operand that lies across, Extent rows of it from `from` on and 64 steps of the depth from p on, with zeros
/// from `end` and p_end on: the end of a group, whose neighbour the copy engine would read.
template <int Extent, class T>
__device__ __forceinline__ void copy_end(unsigned char* to, T const* x, std::int64_t stride, std::int64_t from,
                                         std::int64_t end, std::int64_t p, std::int64_t p_end) {
  constexpr int chunks = Extent / 8;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < chunks * depth; i += producers) {
    int const chunk = i % chunks, step = i / chunks;
    T const* const source = x + (p + step) * stride + from + chunk * 8;
    std::int64_t const left = p + step < p_end ? end - from - chunk * 8 : 0;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (left >= 8) {
      v = *reinterpret_cast<uint4 const*>(source);
    } else if (left > 0) {
      v.x = source[0].bits | (left > 1 ? static_cast<std::uint32_t>(source[1].bits) << 16 : 0);
      if (left > 2) v.y = source[2].bits | (left > 3 ? static_cast<std::uint32_t>(source[3].bits) << 16 : 0);
      if (left > 4) v.z = source[4].bits | (left > 5 ? static_cast<std::uint32_t>(source[5].bits) << 16 : 0);
      if (left > 6) v.w = source[6].bits;
    }
    *reinterpret_cast<uint4*>(to + chunk / 8 * block_bytes + step * 128 + ((chunk ^ step) & 7) * 16) = v;
  }
}

/// The warpgroup that copies. full, free: the addresses of the stages' barriers.
template <class T, class TC, bool AlongA, bool AlongB>
__device__ __forceinline__ void produce(arguments<T, TC> const& args, unsigned char* memory, std::uint32_t full,
                                        std::uint32_t free) {
  auto const& x = args.x;
  mma::cursor<rows> at(x, blockIdx.x, gridDim.x);
  int stage = 0;
  std::uint32_t parity = 1;  // a new barrier's phase before the first counts as over
  while (at.valid) {
    auto const& t = at.tile;
    phase_barrier::wait(free + 8 * stage, parity);
    named_barrier<1, producers>();  // none gets ahead by a whole round, where a parity means another phase
    unsigned char* const to = memory + stage * stage_bytes;
    std::uint32_t const a = shared_address(to), b = a + a_bytes, barrier = full + 8 * stage;
    bool const whole = AlongA || AlongB || x.groups.by != grouping::depth || at.p + depth <= t.depth_end;
    if (whole) {
      if (threadIdx.x == 0) {
        phase_barrier::arrive_expecting(barrier, stage_bytes);
        int const p = static_cast<int>(at.p), row = static_cast<int>(t.row), column = static_cast<int>(t.column);
        int const group = x.groups.by == grouping::rows ? static_cast<int>(t.group) : 0;
        if constexpr (AlongA) {
          copy_box(a, &args.a, barrier, p, row, 0);
        } else {
#pragma unroll
          for (int i = 0; i < rows / 64; ++i) copy_box(a + i * block_bytes, &args.a, barrier, row + 64 * i, p, 0);
        }
        if constexpr (AlongB) {
          copy_box(b, &args.b, barrier, p, column, group);
        } else {
#pragma unroll
          for (int i = 0; i < columns / 64; ++i)
            copy_box(b + i * block_bytes, &args.b, barrier, column + 64 * i, p, group);
        }
      }
    } else {
      copy_end<rows>(to, x.a, x.lda, t.row, x.m, at.p, t.depth_end);
      copy_end<columns>(to + a_bytes, x.b, x.ldb, t.column, x.n, at.p, t.depth_end);
      publish_shared_writes();
      named_barrier<1, producers>();
      if (threadIdx.x == 0) phase_barrier::arrive(barrier);
    }
    at.step(x);
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

/// A warpgroup that multiplies rows [64 half, 64 half + 64) of each tile.
template <class T, class TC, bool AlongA, bool AlongB>
__device__ __forceinline__ void consume(arguments<T, TC> const& args, unsigned char* memory, std::uint32_t full,
                                        std::uint32_t free, int half) {
  auto const& x = args.x;
  int const lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32 % 4;
  int stage = 0;
  std::uint32_t parity = 0;
  auto const release = [&](int which) {
    if (lane == 0) phase_barrier::arrive(free + 8 * which);
  };
  auto const next_stage = [&] {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  };
  for (mma::cursor<rows> at(x, blockIdx.x, gridDim.x); at.valid; at.next_tile(x)) {
    auto const& t = at.tile;
    int const steps = static_cast<int>((t.depth_end - t.depth + depth - 1) / depth);
    if (t.row + 64 * half >= t.row_end) {  // nothing for this warpgroup
      for (int s = 0; s < steps; ++s) {
        phase_barrier::wait(full + 8 * stage, parity);
        release(stage);
        next_stage();
      }
      continue;
    }
    float sum[32][4];
    int last = 0;
    for (int s = 0; s < steps; ++s) {
      phase_barrier::wait(full + 8 * stage, parity);
      std::uint32_t const address = shared_address(memory + stage * stage_bytes);
      std::uint64_t a = shared_operand<!AlongA>(address + half * (AlongA ? a_bytes / 2 : block_bytes), block_bytes);
      std::uint64_t b = shared_operand<!AlongB>(address + a_bytes, block_bytes);
      begin_warpgroup_products();
#pragma unroll
      for (int q = 0; q < depth / 16; ++q) {
        multiply_in_warpgroup<T, !AlongA, !AlongB>(sum, a, b, s + q > 0);
        a += shared_operand_step<!AlongA>;
        b += shared_operand_step<!AlongB>;
      }
      commit_warpgroup_products();
      wait_for_warpgroup_products<1>();
      // All products but the latest step's are done: the stage before is free.
      if (s > 0) release(last);
      last = stage;
      next_stage();
    }
    wait_for_warpgroup_products<0>();
    release(last);
    std::int64_t const row = t.row + 64 * half + 16 * warp;
    TC* const c = x.c + (x.groups.by == grouping::depth ? t.group * x.groups.c_apart : 0);
    float const* const bias = x.bias ? x.bias + t.group * x.groups.bias_apart + t.column : nullptr;
    store_fragments<sizeof(TC) == 4>(sum, c + row * x.ldc + t.column, x.ldc, t.row_end - row, x.n - t.column, bias,
                                     x.mode == update::accumulate, args.wide);
  }
}

}  // namespace wgmma

template <class T, class TC, bool AlongA, bool AlongB>
__global__ void __launch_bounds__(wgmma::threads, 1)
    wgmma_product([[maybe_unused]] __grid_constant__ wgmma::arguments<T, TC> const args) {
  if constexpr (warpgroup_instructions) {
    // The host knows by the barriers' bytes that this program has the kernel's code.
    __shared__ alignas(8) std::uint64_t barriers[2 * wgmma::stages];
    extern __shared__ unsigned char wgmma_memory[];
    unsigned char* const memory = wgmma_memory + (0u - shared_address(wgmma_memory)) % 1024;
    std::uint32_t const full = shared_address(barriers), free = full + 8 * wgmma::stages;
    if (threadIdx.x == 0) {
      for (int s = 0; s < wgmma::stages; ++s) {
        phase_barrier::init(full + 8 * s, 1);
        phase_barrier::init(free + 8 * s, wgmma::consumer_warps);
      }
      phase_barrier::publish_init();
    }
    __syncthreads();
    if (threadIdx.x < wgmma::producers) {
      release_registers<wgmma::producer_registers>();
      wgmma::produce<T, TC, AlongA, AlongB>(args, memory, full, free);
    } else {
      request_registers<wgmma::consumer_registers>();
      wgmma::consume<T, TC, AlongA, AlongB>(args, memory, full, free,
                                            static_cast<int>(threadIdx.x) / wgmma::producers - 1);
    }
  }
}

/// Whether the current device is a Hopper and this program has the kernel's code for it.
template <class T, class TC, bool AlongA, bool AlongB>
bool wgmma_product_exists() {
  if (properties().major != 9) return false;
  static bool const exists = [] {
    cudaFuncAttributes attributes{};
    check("wgmma_product", cudaFuncGetAttributes(&attributes, wgmma_product<T, TC, AlongA, AlongB>));
    return attributes.sharedSizeBytes > 0;
  }();
  return exists;
}

/// Enqueues the product on a Hopper where the copy engine takes its operands. False elsewhere.
template <bool AlongA, bool AlongB, class T, class TC>
bool wgmma_product_if_possible(char const* op, device::cuda const& policy, product<T, T, TC> const& x) {
  if (x.k <= 0 || !wgmma_product_exists<T, TC, AlongA, AlongB>()) return false;
  // The registers do not suffice for sums with 16-bit elements of C.
  if (sizeof(TC) == 2 && x.mode == update::accumulate) return false;
  // An operand of one group that is cut along the depth must lie across, so that groups end between its rows.
  if (x.groups.by == grouping::depth && (AlongA || AlongB)) return false;
  wgmma::arguments<T, TC> args{};
  std::int64_t const count = x.groups.by == grouping::rows ? x.groups.count : 1;
  if (!describe_matrices(args.a, x.a, 1, AlongA ? x.m : x.k, AlongA ? x.k : x.m, x.lda, 0,
                         AlongA ? wgmma::rows : wgmma::depth) ||
      !describe_matrices(args.b, x.b, count, AlongB ? x.n : x.k, AlongB ? x.k : x.n, x.ldb, x.groups.b_apart,
                         AlongB ? wgmma::columns : wgmma::depth))
    return false;
  args.x = x;
  args.wide = stores_wide(x.c, x.ldc, x.groups.c_apart);
  std::int64_t const tiles = most_tiles<wgmma::rows, wgmma::columns>(x);
  auto const blocks = static_cast<unsigned>(std::min<std::int64_t>(tiles, properties().multiprocessors));
  launch(op, policy, {blocks, wgmma::threads, wgmma::stages * wgmma::stage_bytes + 1024},
         wgmma_product<T, TC, AlongA, AlongB>, args);
  return true;
}

}  // namespace blackmamba::cuda::detail
