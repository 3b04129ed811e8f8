#pragma once
#include <blackmamba/core/cuda/cluster_cuda.cuh>
#include <blackmamba/core/cuda/gemm_cuda.cuh>
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/reduce_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/router_dispatch/router_dispatch.hpp>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <type_traits>

/// Tokens or logits to a plan in one launch, of one block or of a cluster of up to eight whose blocks read each other's
/// counts. Instantiations: for logits in float and double; with the product, for each 16-bit type.
///
/// A thread has a token. For each expert, a warp's ballot tells who chose it; a lane's rank among them, the counts of
/// the warps before and of the blocks before add up to the slot's place. What that costs is latency: of one read, of
/// three barriers of a block and one of the cluster.
namespace blackmamba::cuda::detail {

namespace routed {

inline constexpr int most_experts = 64;
inline constexpr unsigned most_blocks = 8;  // of a cluster, on any device that has clusters
inline constexpr int most_threads = 1024;

struct places {
  std::int64_t* offsets;
  std::int32_t *source, *row;
  std::int64_t capacity;  // INT32_MAX: dropless
  int rows_per_block;
};

/// The router's product, where it is to be made.
template <class T>
struct tokens {
  T const *x, *weight;
  std::int64_t x_stride, weight_stride, width;
  float const* bias;
};
struct no_tokens {};

/// Counts in shared memory: column `experts` counts the rows that go nowhere.
struct counts {
  std::uint32_t of_warp[most_threads / 32][most_experts + 1];  // then those of the warps before
  std::uint32_t of_block[most_experts + 1];
  std::int32_t before[most_experts + 1];  // slots of the blocks before
  std::int32_t first[most_experts + 1];   // row of each expert, then the number of rows
};

/// Places the slots of the block's tokens: `chosen`, as bits, are the experts of this thread's, none where it has none.
template <class A>
__device__ __forceinline__ void place(counts& c, router_forward_arguments<A> const& p, places const& to,
                                      std::uint64_t chosen, bool refused, std::int64_t token) {
  int const thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int const warps = static_cast<int>(blockDim.x) / 32, experts = p.experts;
  unsigned const blocks = cluster_size(), rank = cluster_rank();
  for (int e = 0; e <= experts; ++e) {
    unsigned const who = __ballot_sync(0xffffffffu, e < experts ? chosen >> e & 1 : refused);
    if (lane == 0) c.of_warp[warp][e] = static_cast<std::uint32_t>(__popc(who));
  }
  __syncthreads();
  for (int e = warp; e <= experts; e += warps) {
    std::uint32_t const n = lane < warps ? c.of_warp[lane][e] : 0, sum = warp_prefix_sum(n);
    if (lane < warps) c.of_warp[lane][e] = sum - n;
    if (lane == 31) c.of_block[e] = sum;
  }
  __syncwarp();
  cluster_arrive();
  cluster_wait();
  if (thread <= experts) {
    std::uint32_t before = 0, all = 0;
    for (unsigned b = 0; b < blocks; ++b) {
      std::uint32_t const n = load_of_cluster(c.of_block + thread, b);
      all += n;
      before += b < rank ? n : 0;
    }
    c.before[thread] = static_cast<std::int32_t>(before);
    c.first[thread] = static_cast<std::int32_t>(all);
    if (thread == experts && rank == 0 && p.non_finite_rows) *p.non_finite_rows = static_cast<std::int32_t>(all);
  }
  __syncwarp();
  cluster_arrive();  // from here on nobody reads of others; the wait is at the end
  __syncthreads();
  if (warp == 0) {
    std::int32_t row = 0;
    for (int first = 0; first < experts; first += 32) {
      int const e = first + lane;
      std::int32_t const n = e < experts ? static_cast<std::int32_t>(min(std::int64_t{c.first[e]}, to.capacity)) : 0;
      std::int32_t const sum = warp_prefix_sum(n);
      if (e < experts) {
        c.first[e] = row + sum - n;
        if (rank == 0) to.offsets[e] = row + sum - n;
      }
      row += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (lane == 0) {
      c.first[experts] = row;
      if (rank == 0) to.offsets[experts] = row;
    }
  }
  __syncthreads();
  auto const send = [&](int e, int a, unsigned who) {
    std::int64_t const slot = token * p.k + a, position = c.before[e] + static_cast<std::int64_t>(c.of_warp[warp][e]) +
                                                          __popc(who & ((1u << lane) - 1));
    bool const placed = position < to.capacity;
    std::int32_t const row = placed ? c.first[e] + static_cast<std::int32_t>(position) : -1;
    to.row[slot] = row;
    if (placed) to.source[row] = static_cast<std::int32_t>(slot);
  };
  unsigned with_mine = 0;
  for (int e = 0; e < experts; ++e) {
    bool const mine = chosen >> e & 1;
    unsigned const who = __ballot_sync(0xffffffffu, mine);
    if (!mine) continue;
    with_mine = who;
    if (p.k == 1) continue;  // all at once, below
    int a = 0;
    while (p.expert[token * p.expert_stride + a] != e) ++a;
    send(e, a, who);
  }
  if (p.k == 1 && chosen != 0) send(__ffsll(static_cast<long long>(chosen)) - 1, 0, with_mine);
  if (refused)
    for (int a = 0; a < p.k; ++a) to.row[token * p.k + a] = -1;
  std::int64_t const slots = p.rows * p.k;
  for (std::int64_t r = c.first[experts] + std::int64_t{rank} * blockDim.x + thread; r < slots;
       r += std::int64_t{blocks} * blockDim.x)
    to.source[r] = -1;
  cluster_wait();
}

}  // namespace routed

/// From logits.
template <class A>
__global__ void __launch_bounds__(routed::most_threads)
    router_dispatch_logits(router_forward_arguments<A> const p, routed::places const to) {
  __shared__ routed::counts counts;
  wait_for_launch_ahead();
  let_next_launch_begin();
  std::int64_t const token = std::int64_t{cluster_rank()} * to.rows_per_block + threadIdx.x;
  bool const there = static_cast<int>(threadIdx.x) < to.rows_per_block && token < p.rows;
  bool refused = false;
  std::uint64_t chosen = 0;
  auto const choose = [&](int, std::int32_t e) { chosen |= std::uint64_t{1} << e; };
  if (there) {
    A const* const from = p.logits + token * p.logits_stride;
    if (p.experts == 8 && p.packs) {
      auto const low = load_pack<4>(from), high = load_pack<4>(from + 4);
      A const x[8] = {low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
      refused = router_row(
          p, token, 8, [&](std::int64_t j) { return x[j]; }, choose);
    } else {
      refused = router_row(
          p, token, p.experts, [from](std::int64_t j) { return from[j]; }, choose);
    }
  }
  routed::place(counts, p, to, chosen, refused, token);
}

/// From tokens, 16 for a block: its eight warps share the depth of the product, as in narrow_columns_product.
template <class T>
__global__ void __launch_bounds__(256)
    router_dispatch_tokens(router_forward_arguments<float> const p, routed::places const to,
                           routed::tokens<T> const from, float* logits) {
  __shared__ routed::counts counts;
  __shared__ narrow::parts parts;
  wait_for_launch_ahead();
  let_next_launch_begin();
  std::int64_t const first = std::int64_t{cluster_rank()} * narrow::tile, left = p.rows - first;
  narrow::sixteen_rows_by_few<T>(parts, from.x + first * from.x_stride, from.x_stride, left, from.weight,
                                 from.weight_stride, p.experts, from.width);
  int const thread = static_cast<int>(threadIdx.x);
  if (thread < narrow::tile * 8) {
    int const r = thread / 8, e = thread % 8;
    float const x = narrow::total(parts, r, e, from.bias && e < p.experts ? from.bias[e] : 0.0f);
    __syncwarp();
    parts.part[0][r][e] = x;
    if (r < left && e < p.experts) logits[(first + r) * p.logits_stride + e] = x;
  }
  __syncthreads();
  std::int64_t const token = first + thread;
  bool refused = false;
  std::uint64_t chosen = 0;
  if (thread < narrow::tile && thread < left)
    refused = router_row(
        p, token, p.experts, [&](std::int64_t j) { return parts.part[0][thread][j]; },
        [&](int, std::int32_t e) { chosen |= std::uint64_t{1} << e; });
  routed::place(counts, p, to, chosen, refused, token);
}

}  // namespace blackmamba::cuda::detail

namespace blackmamba {

template <>
struct backend<router_dispatch, device::cuda> {
  static constexpr bool fused = true;  ///< forward and plan exist, for what the next two say
  template <class T>
  static bool takes_tokens(std::int64_t rows, std::int64_t experts) {
    if constexpr (cuda::tensor_core_operand<T>)
      return rows > 0 && rows <= cuda::detail::narrow::tile * most_blocks() && experts <= 8;
    else
      return false;
  }
  static bool takes_logits(std::int64_t rows, std::int64_t experts) {
    return rows > 0 && rows <= cuda::detail::routed::most_threads * most_blocks() &&
           experts <= (rows <= 128 ? cuda::detail::routed::most_experts : 16);
  }

  template <class T>
  static void forward(device::cuda const& policy, router_dispatch::inputs<device::cuda, T> const& in,
                      router_dispatch::results<device::cuda, T> const& to, router::options const& how,
                      std::int64_t capacity) {
    if constexpr (cuda::tensor_core_operand<T>) {
      std::int64_t const width = in.x.extent(1);
      if (!cuda::rows_in_packs<8>(in.x) || !cuda::rows_in_packs<8>(in.weight) || width == 0) {
        cuda::gemm<cuda::transpose::no, cuda::transpose::yes>("router_dispatch", policy,
                                                              cuda::product<T, T, float>{.m = to.logits.extent(0),
                                                                                         .n = to.logits.extent(1),
                                                                                         .k = width,
                                                                                         .a = in.x.data(),
                                                                                         .lda = in.x.stride(0),
                                                                                         .b = in.weight.data(),
                                                                                         .ldb = in.weight.stride(0),
                                                                                         .c = to.logits.data(),
                                                                                         .ldc = to.logits.stride(0),
                                                                                         .bias = in.bias.data()});
        return plan(policy, router::inputs<device::cuda, T>{.logits = to.logits, .offset = in.offset}, to.chosen,
                    to.plan, how, capacity);
      }
      auto const arguments = router_arguments<float>(to.logits, in.offset, to.chosen, how);
      unsigned const blocks =
          whole_cluster((arguments.rows + cuda::detail::narrow::tile - 1) / cuda::detail::narrow::tile);
      cuda::launch("router_dispatch", policy, {.blocks = blocks, .threads = 256, .cluster = blocks, .early = true},
                   cuda::detail::router_dispatch_tokens<T>, arguments,
                   places(to.plan, capacity, cuda::detail::narrow::tile),
                   cuda::detail::routed::tokens<T>{.x = in.x.data(),
                                                   .weight = in.weight.data(),
                                                   .x_stride = in.x.stride(0),
                                                   .weight_stride = in.weight.stride(0),
                                                   .width = width,
                                                   .bias = in.bias.data()},
                   to.logits.data());
    }
  }

  template <class In, class Chosen>
  static void plan(device::cuda const& policy, In const& in, Chosen const& chosen,
                   expert_dispatch::routing<device::cuda> const& to, router::options const& how,
                   std::int64_t capacity) {
    using A = std::remove_cvref_t<decltype(*chosen.gate.data())>;
    auto const arguments = router_arguments<A>(in.logits, in.offset, chosen, how);
    std::int64_t const rows = arguments.rows;
    // Up to 128 tokens are not worth a second block.
    unsigned const blocks = whole_cluster(std::min<std::int64_t>(most_blocks(), (rows + 127) / 128));
    auto const each = static_cast<int>((rows + blocks - 1) / blocks);
    cuda::launch("router_dispatch", policy,
                 {.blocks = blocks,
                  .threads = static_cast<unsigned>(std::max(96, (each + 31) / 32 * 32)),
                  .cluster = blocks,
                  .early = true},
                 cuda::detail::router_dispatch_logits<A>, arguments, places(to, capacity, each));
  }

 private:
  static std::int64_t most_blocks() { return cuda::properties().major >= 9 ? cuda::detail::routed::most_blocks : 1; }
  /// A power of two.
  static unsigned whole_cluster(std::int64_t blocks) {
    unsigned n = 1;
    while (n < blocks) n *= 2;
    return n;
  }
  template <class A>
  static cuda::detail::router_forward_arguments<A> router_arguments(auto const& logits, auto const& offset,
                                                                    auto const& chosen, router::options const& how) {
    return {.rows = logits.extent(0),
            .experts = static_cast<int>(logits.extent(1)),
            .k = static_cast<int>(chosen.expert.extent(1)),
            .gate_rule = how.gate,
            .beta = static_cast<A>(how.beta),
            .logits = logits.data(),
            .logits_stride = logits.stride(0),
            .packs = cuda::rows_in_packs<4>(logits),
            .offset = offset.data(),
            .expert = chosen.expert.data(),
            .expert_stride = chosen.expert.stride(0),
            .gate = chosen.gate.data(),
            .gate_stride = chosen.gate.stride(0),
            .non_finite_rows = chosen.non_finite_rows.data(),
            .tile = {}};
  }
  static cuda::detail::routed::places places(expert_dispatch::routing<device::cuda> const& plan, std::int64_t capacity,
                                             int each) {
    return {.offsets = plan.offsets.data(),
            .source = plan.source.data(),
            .row = plan.row.data(),
            .capacity = capacity > 0 ? capacity : INT32_MAX,
            .rows_per_block = each};
  }
};

}  // namespace blackmamba
