#pragma once
#include <blackmamba/core/cuda/cluster_cuda.cuh>
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/reduce_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>

#include <algorithm>
#include <cstddef>
#include <cstdint>

// Kernel: embedding_order.
namespace blackmamba::detail {

inline constexpr int embedding_span = 512;  // tokens of a cluster of embedding_order, at most
inline constexpr int embedding_list = 256;  // positions of those tokens that each warp keeps at hand
inline constexpr int embedding_warps = 32;
/// Marks in what the sort gives: of a position, that a run begins with it; of a token, that it has several runs. Past
/// the last position every bit is set.
inline constexpr std::uint32_t embedding_mark = 0x80000000u, embedding_nothing = 0xffffffffu;

/// Where the sort puts its results, and what it clears.
struct embedding_order_results {
  std::uint32_t* order;    // (R)
  std::uint32_t* token;    // (R)
  std::uint32_t* first;    // (V, 2)
  std::uint32_t* cleared;  // (clear_count)
  std::int64_t clear_count;
};

/// Token v belongs to cluster v mod clusters, which calls it v / clusters: what stands next to each other in a
/// vocabulary occurs equally often, and is shared out.
struct embedding_share {
  std::uint32_t vocabulary, clusters;
  std::uint32_t inverse;  // 2^32 / clusters, rounded up: exact for powers of two, and for v < 2^32 / clusters

  __device__ std::uint32_t local(std::uint32_t v) const { return clusters == 1 ? v : __umulhi(v, inverse); }
  __device__ std::uint32_t token(std::uint32_t cluster, std::uint32_t local) const {
    return local * clusters + cluster;
  }
};

/// The lanes of the warp whose token is the cluster's, and among them those with this lane's.
struct embedding_peers {
  unsigned equal = 0;
  __device__ embedding_peers(bool mine, std::uint32_t local) {
    if (__any_sync(0xffffffffu, mine)) equal = __match_any_sync(0xffffffffu, mine ? local : 0xffffffffu);
    if (!mine) equal = 0;
  }
  __device__ bool leads(int lane) const { return equal != 0 && __ffs(static_cast<int>(equal)) - 1 == lane; }
};

inline std::size_t embedding_order_shared_bytes(int span) {
  return static_cast<std::size_t>(span * (4 + embedding_warps + 1) + embedding_list * embedding_warps) *
         sizeof(std::uint32_t);
}

/// A stable counting sort in one launch. Each cluster has a share of the tokens, each of its blocks a part of the
/// positions, each warp a stretch of that. A block counts the tokens that are its cluster's, by token and warp, and
/// those of the clusters before, which lie before; with what the cluster's other blocks counted it knows where each
/// warp's positions of each token go. They are in a short list by then, or, where that was too short, are looked for
/// again. Tokens outside the vocabulary belong to no cluster.
template <std::uint32_t RunRows>
__global__ void __launch_bounds__(32 * embedding_warps)
    embedding_order(std::int32_t const* token, std::int64_t rows, embedding_share share, int span,
                    embedding_order_results sorted) {
  constexpr int warps = embedding_warps, threads = 32 * warps, unroll = 2, step = 32 * 4 * unroll;
  constexpr int pitch = warps + 1;  // of the counts: threads of a warp read along either side of them
  constexpr unsigned all = 0xffffffffu;
  extern __shared__ __align__(16) unsigned char embedding_shared_bytes[];
  auto* const begin = reinterpret_cast<std::uint32_t*>(embedding_shared_bytes);  // (span)
  auto* const part = begin + span;                                               // (span)  of this block alone
  auto* const runs_of = part + span;                                             // (span)
  auto* const place_here = runs_of + span;                                       // (span)  where its first goes
  auto* const count = place_here + span;                                         // (span, pitch)
  auto* const list = count + span * pitch;                                       // (warps, embedding_list)
  __shared__ std::uint32_t warp_total[warps], part_before;
  int const thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  unsigned const lower = (1u << lane) - 1, parts = cuda::cluster_size(), rank = cuda::cluster_rank();
  std::uint32_t const cluster = blockIdx.x / parts;
  cuda::let_next_launch_begin();
  std::int64_t const shares = std::int64_t{parts} * warps, stretch = (rows + shares * 128 - 1) / (shares * 128) * 128;
  std::int64_t const start = (std::int64_t{rank} * warps + warp) * stretch;
  std::int64_t const stop = start + stretch < rows ? start + stretch : rows;
  std::uint32_t *const mine = count + warp, *const at_hand = list + warp * embedding_list;

  bool const whole = cuda::pack_aligned<4>(token);
  auto const read = [&](std::int64_t i) -> int4 {
    if (whole && i + 4 <= stop) return *reinterpret_cast<int4 const*>(token + i);
    return {i < stop ? token[i] : -1, i + 1 < stop ? token[i + 1] : -1, i + 2 < stop ? token[i + 2] : -1,
            i + 3 < stop ? token[i + 3] : -1};
  };
  int4 next[unroll];
#pragma unroll
  for (int u = 0; u < unroll; ++u) next[u] = read(start + (u * 32 + lane) * 4);
  for (std::int64_t i = std::int64_t{blockIdx.x} * threads + thread; i < sorted.clear_count;
       i += std::int64_t{gridDim.x} * threads)
    sorted.cleared[i] = 0;
  for (int i = thread; i < span * pitch; i += threads) count[i] = 0;
  __syncthreads();
  std::uint32_t listed = 0, before = 0;
  for (std::int64_t r = start; r < stop; r += step) {
    int4 v[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      v[u] = next[u];
      next[u] = read(r + step + (u * 32 + lane) * 4);
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      std::uint32_t const four[4] = {static_cast<std::uint32_t>(v[u].x), static_cast<std::uint32_t>(v[u].y),
                                     static_cast<std::uint32_t>(v[u].z), static_cast<std::uint32_t>(v[u].w)};
      std::uint32_t local[4];
      bool in[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        bool const valid = four[j] < share.vocabulary;
        local[j] = share.local(four[j]);
        std::uint32_t const of = four[j] - local[j] * share.clusters;
        before += valid && of < cluster;
        in[j] = valid && of == cluster;
      }
      if (!__any_sync(all, in[0] || in[1] || in[2] || in[3])) continue;
      std::uint32_t place = listed;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        unsigned const found = __ballot_sync(all, in[j]);
        place += static_cast<std::uint32_t>(__popc(found & lower));
        listed += static_cast<std::uint32_t>(__popc(found));
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!in[j]) continue;
        atomicAdd(&mine[local[j] * pitch], 1u);  // counts: in any order the same
        if (place < embedding_list)
          at_hand[place] = local[j] | static_cast<std::uint32_t>(r - start + (u * 32 + lane) * 4 + j) << 9;
        ++place;
      }
    }
  }
  before = cuda::block_sum<threads>(before, warp_total);

  // count becomes how many of the token the block's earlier warps have.
  for (int t = warp; t < span; t += warps) {
    std::uint32_t const c = count[t * pitch + lane], upto = cuda::warp_prefix_sum(c);
    count[t * pitch + lane] = upto - c;
    if (lane == 31) part[t] = upto;
  }
  if (thread == 0) part_before = before;
  cuda::cluster_arrive();
  cuda::cluster_wait();
  std::uint32_t total = 0, earlier = 0;
  before = 0;
  for (unsigned p = 0; p < parts; ++p) {
    before += cuda::load_of_cluster(&part_before, p);
    if (thread < span) {
      if (p == rank) earlier = total;
      total += cuda::load_of_cluster(&part[thread], p);
    }
  }
  cuda::cluster_arrive();  // a block does not end before the others have read what they need of it

  std::uint32_t upto = cuda::warp_prefix_sum(total);  // of the warp, then of the block, this thread's included
  if (lane == 31) warp_total[warp] = upto;
  __syncthreads();
  std::uint32_t const earlier_warps = cuda::warp_sum(lane < warp ? warp_total[lane] : 0);
  upto += earlier_warps + before;
  std::uint32_t const end_of_all = cuda::warp_sum(warp_total[lane]) + before;
  if (thread < span) {
    begin[thread] = upto - total;
    runs_of[thread] = total / RunRows;
    place_here[thread] = earlier;
    std::uint32_t const v = share.token(cluster, static_cast<std::uint32_t>(thread));
    if (rank == 0 && v < share.vocabulary) reinterpret_cast<uint2*>(sorted.first)[v] = {upto - total, upto};
  }
  __syncthreads();

  // 32 tokens of the warp's, in order of their positions.
  auto const put = [&](bool ours, std::uint32_t local, std::int64_t position) {
    embedding_peers const peers(ours, local);
    if (ours) {
      std::uint32_t const runs = runs_of[local], place = place_here[local] + mine[local * pitch] +
                                                         static_cast<std::uint32_t>(__popc(peers.equal & lower));
      bool const head = place == 0 || (place % RunRows == 0 && place / RunRows < runs);
      std::uint32_t const at = begin[local] + place;
      sorted.order[at] = static_cast<std::uint32_t>(position) | (head ? embedding_mark : 0);
      sorted.token[at] = share.token(cluster, local) | (runs > 1 ? embedding_mark : 0);
    }
    __syncwarp();
    if (peers.leads(lane)) mine[local * pitch] += static_cast<std::uint32_t>(__popc(peers.equal));
    __syncwarp();
  };
  if (listed <= embedding_list && stretch <= std::int64_t{1} << 23) {
    for (std::uint32_t base = 0; base < listed; base += 32) {
      std::uint32_t const i = base + static_cast<std::uint32_t>(lane), item = i < listed ? at_hand[i] : 0;
      put(i < listed, item & 511, start + (item >> 9));
    }
  } else {
    for (std::int64_t r = start; r < stop; r += 32 * 4) {
      std::uint32_t v[4];
#pragma unroll
      for (int u = 0; u < 4; ++u)
        v[u] = r + u * 32 + lane < stop ? static_cast<std::uint32_t>(token[r + u * 32 + lane]) : embedding_nothing;
#pragma unroll 1
      for (int u = 0; u < 4; ++u) {
        std::uint32_t const x = u == 0 ? v[0] : u == 1 ? v[1] : u == 2 ? v[2] : v[3], local = share.local(x);
        put(x < share.vocabulary && x - local * share.clusters == cluster, local, r + u * 32 + lane);
      }
    }
  }
  if (cluster == share.clusters - 1)
    for (std::int64_t i = std::int64_t{end_of_all} + rank * threads + thread; i < rows; i += parts * threads)
      sorted.order[i] = sorted.token[i] = embedding_nothing;
  cuda::cluster_wait();
}

/// RunRows: of a token's rows, how many form a run; the last takes what is left, fewer than twice as many.
template <std::uint32_t RunRows>
void embedding_launch_order(char const* op, device::cuda const& policy, std::int32_t const* token, std::int64_t rows,
                            std::int64_t vocabulary, embedding_order_results const& sorted) {
  // About a block for each multiprocessor. The fewer tokens a cluster has, the more clusters read the same positions:
  // as many blocks share a cluster's reading as its tokens allow, and as have something to read. Not all
  // multiprocessors can be in clusters of eight or four.
  struct division {
    std::int64_t parts, clusters;
  };
  division d{1, 128};
  if (cuda::properties().major >= 9)
    for (auto const& some : {division{8, 14}, division{4, 28}, division{2, 64}})
      if (vocabulary <= some.clusters * embedding_span && rows >= some.parts * 2048) {
        d = some;
        break;
      }
  while (d.clusters * embedding_span < vocabulary) d.clusters *= 2;
  embedding_share const share{static_cast<std::uint32_t>(vocabulary), static_cast<std::uint32_t>(d.clusters),
                              static_cast<std::uint32_t>(((std::int64_t{1} << 32) + d.clusters - 1) / d.clusters)};
  int const span = static_cast<int>((vocabulary + d.clusters - 1) / d.clusters);
  cuda::launch(op, policy,
               {.blocks = static_cast<unsigned>(d.clusters * d.parts),
                .threads = 32 * embedding_warps,
                .shared_bytes = embedding_order_shared_bytes(span),
                .cluster = static_cast<unsigned>(d.parts)},
               embedding_order<RunRows>, token, rows, share, span, sorted);
}

}  // namespace blackmamba::detail
