include <blackmamba/ops/router_dispatch/router_dispatch.hpp>#pragma once
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>#include <blackmamba/core/cuda/cluster_cuda.cuh>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>#include <blackmamba/core/cuda/gemm_cuda.cuh>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>#include <blackmamba/core/cuda/launch_cuda.cuh>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>#include <blackmamba/core/cuda/reduce_cuda.cuh>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>#include <blackmamba/core/cuda/vector_cuda.cuh>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>#include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>#include <algorithm>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>#include <climits>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>#include <cstdint>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>#include <type_traits>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>/// Tokens or logits to a plan in one launch, of one block or of a cluster of up to eight whose blocks read each other's
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>/// counts. Instantiations: for logits in float and double; with the product, for each 16-bit type.
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>///
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>/// A thread has a token. For each expert, a warp's ballot tells who chose it; a lane's rank among them, the counts of
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>/// the warps before and of the blocks before add up to the slot's place. What that costs is latency: of one read, of
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>/// three barriers of a block and one of the cluster.
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>namespace blackmamba::cuda::detail {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>namespace routed {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>inline constexpr int most_experts = 64;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>inline constexpr unsigned most_blocks = 8;  // of a cluster, on any device that has clusters
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>inline constexpr int most_threads = 1024;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>struct places {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  std::int64_t* offsets;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  std::int32_t *source, *row;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  std::int64_t capacity;  // INT32_MAX: dropless
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  int rows_per_block;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>};
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>/// The router's product, where it is to be made.
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>template <class T>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>struct tokens {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  T const *x, *weight;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  std::int64_t x_stride, weight_stride, width;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  float const* bias;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>};
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>struct no_tokens {};
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>/// Counts in shared memory: column `experts` counts the rows that go nowhere.
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>struct counts {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  std::uint32_t of_warp[most_threads / 32][most_experts + 1];  // then those of the warps before
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  std::uint32_t of_block[most_experts + 1];
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  std::int32_t before[most_experts + 1];  // slots of the blocks before
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  std::int32_t first[most_experts + 1];   // row of each expert, then the number of rows
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>};
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>/// Places the slots of the block's tokens: `chosen`, as bits, are the experts of this thread's, none where it has none.
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>template <class A>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>__device__ __forceinline__ void place(counts& c, router_forward_arguments<A> const& p, places const& to,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                      std::uint64_t chosen, bool refused, std::int64_t token) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  int const thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  int const warps = static_cast<int>(blockDim.x) / 32, experts = p.experts;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  unsigned const blocks = cluster_size(), rank = cluster_rank();
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  for (int e = 0; e <= experts; ++e) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    unsigned const who = __ballot_sync(0xffffffffu, e < experts ? chosen >> e & 1 : refused);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    if (lane == 0) c.of_warp[warp][e] = static_cast<std::uint32_t>(__popc(who));
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  __syncthreads();
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  for (int e = warp; e <= experts; e += warps) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    std::uint32_t const n = lane < warps ? c.of_warp[lane][e] : 0, sum = warp_prefix_sum(n);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    if (lane < warps) c.of_warp[lane][e] = sum - n;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    if (lane == 31) c.of_block[e] = sum;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  __syncwarp();
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  cluster_arrive();
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  cluster_wait();
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  if (thread <= experts) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    std::uint32_t before = 0, all = 0;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    for (unsigned b = 0; b < blocks; ++b) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      std::uint32_t const n = load_of_cluster(c.of_block + thread, b);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      all += n;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      before += b < rank ? n : 0;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    c.before[thread] = static_cast<std::int32_t>(before);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    c.first[thread] = static_cast<std::int32_t>(all);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    if (thread == experts && rank == 0 && p.non_finite_rows) *p.non_finite_rows = static_cast<std::int32_t>(all);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  __syncwarp();
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  cluster_arrive();  // from here on nobody reads of others; the wait is at the end
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  __syncthreads();
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  if (warp == 0) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    std::int32_t row = 0;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    for (int first = 0; first < experts; first += 32) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      int const e = first + lane;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      std::int32_t const n = e < experts ? static_cast<std::int32_t>(min(std::int64_t{c.first[e]}, to.capacity)) : 0;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      std::int32_t const sum = warp_prefix_sum(n);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      if (e < experts) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>        c.first[e] = row + sum - n;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>        if (rank == 0) to.offsets[e] = row + sum - n;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      row += __shfl_sync(0xffffffffu, sum, 31);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    if (lane == 0) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      c.first[experts] = row;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      if (rank == 0) to.offsets[experts] = row;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  __syncthreads();
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  auto const send = [&](int e, int a, unsigned who) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    std::int64_t const slot = token * p.k + a, position = c.before[e] + static_cast<std::int64_t>(c.of_warp[warp][e]) +
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                          __popc(who & ((1u << lane) - 1));
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    bool const placed = position < to.capacity;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    std::int32_t const row = placed ? c.first[e] + static_cast<std::int32_t>(position) : -1;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    to.row[slot] = row;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    if (placed) to.source[row] = static_cast<std::int32_t>(slot);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  };
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  unsigned with_mine = 0;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  for (int e = 0; e < experts; ++e) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    bool const mine = chosen >> e & 1;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    unsigned const who = __ballot_sync(0xffffffffu, mine);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    if (!mine) continue;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    with_mine = who;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    if (p.k == 1) continue;  // all at once, below
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    int a = 0;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    while (p.expert[token * p.expert_stride + a] != e) ++a;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    send(e, a, who);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  if (p.k == 1 && chosen != 0) send(__ffsll(static_cast<long long>(chosen)) - 1, 0, with_mine);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  if (refused)
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    for (int a = 0; a < p.k; ++a) to.row[token * p.k + a] = -1;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  std::int64_t const slots = p.rows * p.k;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  for (std::int64_t r = c.first[experts] + std::int64_t{rank} * blockDim.x + thread; r < slots;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>       r += std::int64_t{blocks} * blockDim.x)
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    to.source[r] = -1;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  cluster_wait();
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>}
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>}  // namespace routed
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>/// From logits.
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>template <class A>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>__global__ void __launch_bounds__(routed::most_threads)
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    router_dispatch_logits(router_forward_arguments<A> const p, routed::places const to) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  __shared__ routed::counts counts;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  wait_for_launch_ahead();
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  let_next_launch_begin();
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  std::int64_t const token = std::int64_t{cluster_rank()} * to.rows_per_block + threadIdx.x;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  bool const there = static_cast<int>(threadIdx.x) < to.rows_per_block && token < p.rows;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  bool refused = false;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  std::uint64_t chosen = 0;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  auto const choose = [&](int, std::int32_t e) { chosen |= std::uint64_t{1} << e; };
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  if (there) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    A const* const from = p.logits + token * p.logits_stride;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    if (p.experts == 8 && p.packs) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      auto const low = load_pack<4>(from), high = load_pack<4>(from + 4);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      A const x[8] = {low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      refused = router_row(
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>          p, token, 8, [&](std::int64_t j) { return x[j]; }, choose);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    } else {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      refused = router_row(
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>          p, token, p.experts, [from](std::int64_t j) { return from[j]; }, choose);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  routed::place(counts, p, to, chosen, refused, token);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>}
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>/// From tokens, 16 for a block: its eight warps share the depth of the product, as in narrow_columns_product.
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>template <class T>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>__global__ void __launch_bounds__(256)
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    router_dispatch_tokens(router_forward_arguments<float> const p, routed::places const to,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                           routed::tokens<T> const from, float* logits) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  __shared__ routed::counts counts;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  __shared__ narrow::parts parts;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  wait_for_launch_ahead();
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  let_next_launch_begin();
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  std::int64_t const first = std::int64_t{cluster_rank()} * narrow::tile, left = p.rows - first;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  narrow::sixteen_rows_by_few<T>(parts, from.x + first * from.x_stride, from.x_stride, left, from.weight,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                 from.weight_stride, p.experts, from.width);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  int const thread = static_cast<int>(threadIdx.x);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  if (thread < narrow::tile * 8) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    int const r = thread / 8, e = thread % 8;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    float const x = narrow::total(parts, r, e, from.bias && e < p.experts ? from.bias[e] : 0.0f);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    __syncwarp();
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    parts.part[0][r][e] = x;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    if (r < left && e < p.experts) logits[(first + r) * p.logits_stride + e] = x;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  __syncthreads();
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  std::int64_t const token = first + thread;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  bool refused = false;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  std::uint64_t chosen = 0;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  if (thread < narrow::tile && thread < left)
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    refused = router_row(
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>        p, token, p.experts, [&](std::int64_t j) { return parts.part[0][thread][j]; },
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>        [&](int, std::int32_t e) { chosen |= std::uint64_t{1} << e; });
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  routed::place(counts, p, to, chosen, refused, token);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>}
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>}  // namespace blackmamba::cuda::detail
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>namespace blackmamba {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>template <>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>struct backend<router_dispatch, device::cuda> {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  /// Whether one launch takes them.
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  template <class T>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  static bool takes_tokens(std::int64_t rows, std::int64_t experts, std::int64_t) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    if constexpr (cuda::tensor_core_operand<T>)
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      return rows > 0 && rows <= cuda::detail::narrow::tile * most_blocks() && experts <= 8;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    else
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      return false;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  template <class A>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  static bool takes_logits(std::int64_t rows, std::int64_t experts, std::int64_t) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    return rows > 0 && rows <= cuda::detail::routed::most_threads * most_blocks() &&
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>           experts <= cuda::detail::routed::most_experts && rows * experts <= 65536;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  template <class T>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  static void forward(device::cuda const& policy, router_dispatch::inputs<device::cuda, T> const& in,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                      router_dispatch::results<device::cuda, T> const& to, router::options const& how,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                      std::int64_t capacity) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    if constexpr (cuda::tensor_core_operand<T>) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      std::int64_t const width = in.x.extent(1);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      if (!cuda::rows_in_packs<8>(in.x) || !cuda::rows_in_packs<8>(in.weight) || width == 0) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>        cuda::gemm<cuda::transpose::no, cuda::transpose::yes>("router_dispatch", policy,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                              cuda::product<T, T, float>{.m = to.logits.extent(0),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                                                         .n = to.logits.extent(1),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                                                         .k = width,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                                                         .a = in.x.data(),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                                                         .lda = in.x.stride(0),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                                                         .b = in.weight.data(),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                                                         .ldb = in.weight.stride(0),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                                                         .c = to.logits.data(),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                                                         .ldc = to.logits.stride(0),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                                                         .bias = in.bias.data()});
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>        return plan(policy, router::inputs<device::cuda, T>{.logits = to.logits, .offset = in.offset}, to.chosen,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                    to.plan, how, capacity);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      auto const arguments = router_arguments<float>(to.logits, in.offset, to.chosen, how);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      unsigned const blocks =
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>          whole_cluster((arguments.rows + cuda::detail::narrow::tile - 1) / cuda::detail::narrow::tile);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>      cuda::launch("router_dispatch", policy, {.blocks = blocks, .threads = 256, .cluster = blocks, .early = true},
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                   cuda::detail::router_dispatch_tokens<T>, arguments,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                   places(to.plan, capacity, cuda::detail::narrow::tile),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                   cuda::detail::routed::tokens<T>{.x = in.x.data(),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                   .weight = in.weight.data(),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                   .x_stride = in.x.stride(0),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                   .weight_stride = in.weight.stride(0),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                   .width = width,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                   .bias = in.bias.data()},
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                   to.logits.data());
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  template <class In, class Chosen>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  static void plan(device::cuda const& policy, In const& in, Chosen const& chosen,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                   expert_dispatch::routing<device::cuda> const& to, router::options const& how,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                   std::int64_t capacity) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    using A = std::remove_cvref_t<decltype(*chosen.gate.data())>;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    auto const arguments = router_arguments<A>(in.logits, in.offset, chosen, how);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    std::int64_t const rows = arguments.rows;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    // Up to 128 tokens are not worth a second block.
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    unsigned const blocks = whole_cluster(std::min<std::int64_t>(most_blocks(), (rows + 127) / 128));
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    auto const each = static_cast<int>((rows + blocks - 1) / blocks);
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    cuda::launch("router_dispatch", policy,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                 {.blocks = blocks,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                  .threads = static_cast<unsigned>(std::max(96, (each + 31) / 32 * 32)),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                  .cluster = blocks,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                  .early = true},
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                 cuda::detail::router_dispatch_logits<A>, arguments, places(to, capacity, each));
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp> private:
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  static std::int64_t most_blocks() { return cuda::properties().major >= 9 ? cuda::detail::routed::most_blocks : 1; }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  /// A power of two.
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  static unsigned whole_cluster(std::int64_t blocks) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    unsigned n = 1;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    while (n < blocks) n *= 2;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    return n;
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  template <class A>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  static cuda::detail::router_forward_arguments<A> router_arguments(auto const& logits, auto const& offset,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                                                    auto const& chosen, router::options const& how) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    return {.rows = logits.extent(0),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .experts = static_cast<int>(logits.extent(1)),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .k = static_cast<int>(chosen.expert.extent(1)),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .gate_rule = how.gate,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .beta = static_cast<A>(how.beta),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .logits = logits.data(),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .logits_stride = logits.stride(0),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .packs = cuda::rows_in_packs<4>(logits),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .offset = offset.data(),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .expert = chosen.expert.data(),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .expert_stride = chosen.expert.stride(0),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .gate = chosen.gate.data(),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .gate_stride = chosen.gate.stride(0),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .non_finite_rows = chosen.non_finite_rows.data(),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .tile = {}};
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  static cuda::detail::routed::places places(expert_dispatch::routing<device::cuda> const& plan, std::int64_t capacity,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>                                             int each) {
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>    return {.offsets = plan.offsets.data(),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .source = plan.source.data(),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .row = plan.row.data(),
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .capacity = capacity > 0 ? capacity : INT32_MAX,
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>            .rows_per_block = each};
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>  }
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>};
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
include <blackmamba/ops/router_dispatch/router_dispatch.hpp>}  // namespace blackmamba
