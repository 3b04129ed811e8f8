#pragma once
#include <blackmamba/core/cuda/copy_async_cuda.cuh>
#include <blackmamba/core/cuda/elementwise_cuda.cuh>
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/reduce_cuda.cuh>
#include <blackmamba/core/cuda/stored_pack_cuda.cuh>
#include <blackmamba/ops/embedding/embedding.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace blackmamba {

namespace detail {

template <class T>
struct embedding_elements {
  view<space::device, std::int32_t const, dyn> token;
  view<space::device, T const, dyn, dyn> table;
  view<space::device, T, dyn, dyn> y;

  template <int N>
  __device__ cuda::stored_pack<N, T> load(std::int64_t r, std::int64_t c, std::int64_t left) const {
    std::int32_t const v = token(r);
    cuda::stored_pack<N, T> x;
    if (v >= 0 && v < table.extent(0))
      x.load(table.row(v) + c, left);
    else
      x.poison();
    return x;
  }
  template <int N>
  __device__ void finish(cuda::stored_pack<N, T> const& x, std::int64_t r, std::int64_t c, std::int64_t left) const {
    x.store(y.row(r) + c, left);
  }
};

inline constexpr int embedding_span = 384;  // tokens of a block of embedding_order, at most
inline constexpr int embedding_list = 256;  // positions of a block's tokens that each of its warps keeps at hand
/// Marks on a sorted position: the first and the last of a token that occurs seldom.
inline constexpr std::int64_t embedding_head = std::int64_t{1} << 61, embedding_tail = std::int64_t{1} << 62;

/// What the sort gives: positions by token, with marks; the tokens in that order; where each token's begin.
struct embedding_sorted {
  std::int64_t* order;     // (R)
  std::int32_t* token;     // (R)
  std::int64_t* first;     // (V + 1)
  std::int32_t* frequent;  // how many tokens occur often, and which
};

/// The lanes of the warp that hold a token of the block, and among them those with this lane's.
struct embedding_peers {
  bool mine;
  unsigned equal;
  int local;

  __device__ embedding_peers(std::int32_t v, std::int32_t first, int here) {
    auto const at = static_cast<std::uint32_t>(v) - static_cast<std::uint32_t>(first);
    mine = at < static_cast<std::uint32_t>(here);
    local = mine ? static_cast<int>(at) : 0;
    equal = 0;
    if (__any_sync(0xffffffffu, mine)) equal = __match_any_sync(0xffffffffu, mine ? local : -1);
  }
  __device__ bool leads(int lane) const { return mine && __ffs(static_cast<int>(equal)) - 1 == lane; }
};

/// A stable counting sort in one launch: no block needs what another finds. Each takes `span` tokens and goes through
/// all positions, each warp through a stretch of its own. It counts those that are the block's, by token and warp, and
/// those of smaller tokens, which lie before; then it knows where each warp's positions of each token go. They are in
/// a short list by then, or, where that was too short, are looked for again. Tokens outside [0, vocabulary) belong to
/// no block.
template <int>
__global__ void __launch_bounds__(1024) embedding_order(std::int32_t const* token, std::int64_t rows,
                                                        std::int32_t vocabulary, int span, embedding_sorted sorted) {
  constexpr int warps = 32, unroll = 4;
  constexpr unsigned all = 0xffffffffu;
  extern __shared__ __align__(16) unsigned char embedding_shared_bytes[];
  auto* const begin = reinterpret_cast<std::int64_t*>(embedding_shared_bytes);  // (span + 1)
  auto* const count = reinterpret_cast<std::uint32_t*>(begin + span + 1);       // (warps, span)
  auto* const list = count + warps * span;                                      // (warps, embedding_list)
  __shared__ std::int64_t warp_total[warps];
  int const thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  unsigned const lower = (1u << lane) - 1;
  auto const first_token = static_cast<std::int32_t>(blockIdx.x * static_cast<unsigned>(span));
  int const here = vocabulary - first_token < span ? vocabulary - first_token : span;
  constexpr int step = 32 * 4 * unroll;
  std::int64_t const stretch = (rows + warps * step - 1) / (warps * step) * step;
  std::int64_t const start = warp * stretch, stop = start + stretch < rows ? start + stretch : rows;
  std::uint32_t *const mine = count + warp * span, *const at_hand = list + warp * embedding_list;

  for (int i = thread; i < warps * span; i += 1024) count[i] = 0;
  __syncthreads();
  bool const whole = cuda::pack_aligned<4>(token);
  std::uint32_t listed = 0;
  std::uint32_t smaller = 0;
  for (std::int64_t r = start; r < stop; r += step) {
    int4 v[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      std::int64_t const i = r + (u * 32 + lane) * 4;
      if (whole && i + 4 <= stop)
        v[u] = *reinterpret_cast<int4 const*>(token + i);
      else
        v[u] = {i < stop ? token[i] : -1, i + 1 < stop ? token[i + 1] : -1, i + 2 < stop ? token[i + 2] : -1,
                i + 3 < stop ? token[i + 3] : -1};
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      std::uint32_t const four[4] = {static_cast<std::uint32_t>(v[u].x), static_cast<std::uint32_t>(v[u].y),
                                     static_cast<std::uint32_t>(v[u].z), static_cast<std::uint32_t>(v[u].w)};
      std::uint32_t local[4];
      bool in[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        smaller += four[j] < static_cast<std::uint32_t>(first_token);
        local[j] = four[j] - static_cast<std::uint32_t>(first_token);
        in[j] = local[j] < static_cast<std::uint32_t>(here);
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
        atomicAdd(&mine[local[j]], 1u);  // counts: in any order the same
        if (place < embedding_list)
          at_hand[place] = local[j] | static_cast<std::uint32_t>(r - start + (u * 32 + lane) * 4 + j) << 9;
        ++place;
      }
    }
  }
  std::int64_t const before = cuda::block_sum<1024>(std::int64_t{smaller}, warp_total);

  // count becomes how many of the token earlier warps have; begin where the token's positions begin.
  std::int64_t total = 0;
  if (thread < here)
    for (int w = 0; w < warps; ++w) {
      std::uint32_t const c = count[w * span + thread];
      count[w * span + thread] = static_cast<std::uint32_t>(total);
      total += c;
    }
  std::int64_t upto = cuda::warp_prefix_sum(total);  // of the warp, then of the block, this thread's included
  if (lane == 31) warp_total[warp] = upto;
  __syncthreads();
  for (int w = 0; w < warp; ++w) upto += warp_total[w];
  if (thread < here) {
    begin[thread] = before + upto - total;
    sorted.first[first_token + thread] = begin[thread];
    if (thread == here - 1) begin[here] = before + upto;
    if (first_token + thread == vocabulary - 1) sorted.first[vocabulary] = before + upto;
    // The list's order is anyone's: each of its tokens is summed by itself.
    if (total > embedding::seldom) sorted.frequent[1 + atomicAdd(sorted.frequent, 1)] = first_token + thread;
  }
  __syncthreads();

  // 32 tokens of the warp's, in order of their positions.
  auto const put = [&](embedding_peers const& peers, std::int64_t position) {
    if (peers.mine) {
      std::int64_t const size = begin[peers.local + 1] - begin[peers.local];
      std::int64_t const place = mine[peers.local] + static_cast<std::uint32_t>(__popc(peers.equal & lower));
      if (size <= embedding::seldom) {
        if (place == 0) position |= embedding_head;
        if (place == size - 1) position |= embedding_tail;
      }
      sorted.order[begin[peers.local] + place] = position;
      sorted.token[begin[peers.local] + place] = first_token + peers.local;
    }
    __syncwarp();
    if (peers.leads(lane)) mine[peers.local] += static_cast<std::uint32_t>(__popc(peers.equal));
    __syncwarp();
  };
  if (listed <= embedding_list && stretch <= std::int64_t{1} << 23) {
    for (std::uint32_t i = static_cast<std::uint32_t>(lane); i - static_cast<std::uint32_t>(lane) < listed; i += 32) {
      std::uint32_t const item = i < listed ? at_hand[i] : 0;
      std::int32_t const v = i < listed ? first_token + static_cast<std::int32_t>(item & 511) : -1;
      put(embedding_peers(v, first_token, here), start + (item >> 9));
    }
    return;
  }
  for (std::int64_t r = start; r < stop; r += 32 * unroll) {
    std::int32_t v[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) v[u] = r + u * 32 + lane < stop ? token[r + u * 32 + lane] : -1;
#pragma unroll
    for (int u = 0; u < unroll; ++u) put(embedding_peers(v[u], first_token, here), r + u * 32 + lane);
  }
}

template <class T>
struct embedding_gradient_arguments {
  view<space::device, T const, dyn, dyn> d_y;
  view<space::device, accum_t<T>, dyn, dyn> d_table;
  embedding_sorted sorted;
};

/// The tokens that occur seldom. A warp takes 32 N columns of the tokens whose positions begin among 32 in their sorted
/// order, and adds position after position: eight are on their way at a time, with the rows of the table that they
/// begin from, or sixteen of one token; which rows come next is looked up before they are added.
template <int N, class T>
__global__ void __launch_bounds__(256) embedding_add_seldom(embedding_gradient_arguments<T> a, std::int64_t tiles) {
  using A = accum_t<T>;
  constexpr unsigned all = 0xffffffffu;
  int const lane = static_cast<int>(threadIdx.x) % 32;
  std::int64_t const work = std::int64_t{blockIdx.x} * 8 + threadIdx.x / 32, vocabulary = a.d_table.extent(0);
  std::int64_t const begin = work / tiles * 32, column = (work % tiles * 32 + lane) * N;
  std::int64_t const total = a.sorted.first[vocabulary];
  if (begin >= total) return;
  std::int64_t start = 0, stop = 0;
  {
    std::int64_t const i = begin + lane;
    std::int64_t const position = i < total ? a.sorted.order[i] : 0;
    std::int64_t const end = a.sorted.first[(i < total ? a.sorted.token[i] : 0) + 1];
    unsigned const heads = __ballot_sync(all, (position & embedding_head) != 0);
    if (heads == 0) return;
    start = begin + __ffs(static_cast<int>(heads)) - 1;
    stop = __shfl_sync(all, end, 31 - __clz(static_cast<int>(heads)));
  }
  bool const live = column < a.d_y.extent(1);
  std::int64_t next_position = 0;
  std::int32_t next_token = 0;
  auto const look_up = [&](std::int64_t i) {
    next_position = i < stop ? a.sorted.order[i] : 0;
    next_token = i < stop ? a.sorted.token[i] : 0;
  };
  look_up(start + lane);
  cuda::pack<A, N> sum;
  for (std::int64_t base = start; base < stop; base += 32) {
    std::int32_t const v = next_token;
    unsigned const heads = __ballot_sync(all, (next_position & embedding_head) != 0);
    unsigned const tails = __ballot_sync(all, (next_position & embedding_tail) != 0);
    std::int64_t const offset = (next_position & (embedding_head - 1)) * a.d_y.stride(0);  // of the lane's row
    int const count = stop - base < 32 ? static_cast<int>(stop - base) : 32;
    look_up(base + 32 + lane);
    // `several` rows of one token, which neither begins nor ends among them.
    auto const within = [&]<int several>(std::integral_constant<int, several>, int group) {
      cuda::stored_pack<N, T> d_y[several];
#pragma unroll
      for (int u = 0; u < several; ++u) {
        std::int64_t const from = __shfl_sync(all, offset, group + u);
        if (live) d_y[u].load(a.d_y.data() + from + column);
      }
#pragma unroll
      for (int u = 0; u < several; ++u) {
        auto const d = d_y[u].widened();
        if (live)
#pragma unroll
          for (int n = 0; n < N; ++n) sum[n] += d[n];
      }
    };
    auto const any = [&]<int several>(std::integral_constant<int, several>, int group) {
      cuda::stored_pack<N, T> d_y[several];
      cuda::stored_pack<N, A> d_table[several];
#pragma unroll
      for (int u = 0; u < several; ++u) {
        std::int64_t const from = __shfl_sync(all, offset, group + u);
        std::int32_t const to = __shfl_sync(all, v, group + u);
        if (live && group + u < count) {
          d_y[u].load(a.d_y.data() + from + column);
          if (heads >> (group + u) & 1) d_table[u].load(a.d_table.row(to) + column);
        }
      }
#pragma unroll
      for (int u = 0; u < several; ++u) {
        std::int32_t const to = __shfl_sync(all, v, group + u);
        if (live && group + u < count) {
          if (heads >> (group + u) & 1) sum = d_table[u].widened();
          auto const d = d_y[u].widened();
#pragma unroll
          for (int n = 0; n < N; ++n) sum[n] += d[n];
          if (tails >> (group + u) & 1) cuda::store_pack<N>(a.d_table.row(to) + column, sum);
        }
      }
    };
    for (int group = 0; group < count;) {
      if (group + 16 <= count && ((heads | tails) >> group & 0xffff) == 0) {
        within(std::integral_constant<int, 16>{}, group);
        group += 16;
      } else {
        any(std::integral_constant<int, 8>{}, group);
        group += 8;
      }
    }
  }
}

inline constexpr int embedding_columns = 64, embedding_stage_rows = 32, embedding_stages = 8;

/// The tokens that occur often, one by one, each by a block for 64 columns: rows come to shared memory eight stages of
/// 32 ahead, where one thread for each column adds them in order.
template <bool Packs, class T>
__global__ void __launch_bounds__(256) embedding_add_frequent(embedding_gradient_arguments<T> a, int tiles) {
  using A = accum_t<T>;
  constexpr int columns = embedding_columns, rows = embedding_stage_rows, stages = embedding_stages;
  constexpr int n = Packs ? cuda::pack_width<T> : 1, pieces = columns / n;  // of a row
  constexpr int each = rows * pieces / 256;                                 // pieces that a thread copies of a stage
  extern __shared__ __align__(16) unsigned char embedding_stage_bytes[];
  auto* const memory = reinterpret_cast<T*>(embedding_stage_bytes);  // (stages, rows, columns)
  int const thread = static_cast<int>(threadIdx.x);
  std::int64_t const width = a.d_y.extent(1), items = std::int64_t{a.sorted.frequent[0]} * tiles;
  for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    std::int32_t const v = a.sorted.frequent[1 + item / tiles];
    std::int64_t const column = item % tiles * columns, begin = a.sorted.first[v], end = a.sorted.first[v + 1];
    std::int64_t const count = (end - begin + rows - 1) / rows;
    // Where the rows are of the pieces that this thread copies, looked up before they are needed: of the first stages
    // together, of the others a stage ahead.
    using positions = std::int64_t[each];
    auto const look_up = [&](std::int64_t stage, positions& at) {
#pragma unroll
      for (int k = 0; k < each; ++k) {
        std::int64_t const i = begin + stage * rows + (thread + k * 256) / pieces;
        at[k] = i < end ? a.sorted.order[i] : -1;
      }
    };
    auto const fetch = [&](std::int64_t stage, positions const& at) {
#pragma unroll
      for (int k = 0; k < each; ++k) {
        int const row = (thread + k * 256) / pieces, piece = (thread + k * 256) % pieces;
        std::int64_t const c = column + piece * n;
        if (at[k] >= 0 && c < width) {
          T* const to = memory + ((stage % stages) * rows + row) * columns + piece * n;
          T const* const from = a.d_y.row(at[k]) + c;
          if constexpr (Packs)
            cuda::copy_async(cuda::shared_address(to), from);
          else
            *to = *from;
        }
      }
      cuda::commit_copies();  // an empty group at the end keeps the count
    };
    positions ahead[stages - 1], next;
#pragma unroll
    for (int stage = 0; stage < stages - 1; ++stage) look_up(stage, ahead[stage]);
    look_up(stages - 1, next);
#pragma unroll
    for (int stage = 0; stage < stages - 1; ++stage) fetch(stage, ahead[stage]);
    std::int64_t const mine = column + thread;
    bool const adds = thread < columns && mine < width;
    A sum = adds ? a.d_table.row(v)[mine] : A(0);
    for (std::int64_t stage = 0; stage < count; ++stage) {
      cuda::wait_for_copies<stages - 2>();
      __syncthreads();  // the stage is there, and the one before it is no longer read
      fetch(stage + stages - 1, next);
      look_up(stage + stages, next);
      if (adds) {
        T const* const from = memory + (stage % stages) * rows * columns + thread;
        int const left = static_cast<int>(end - begin - stage * rows < rows ? end - begin - stage * rows : rows);
        if (left == rows) {
#pragma unroll
          for (int i = 0; i < rows; ++i) sum += widen(from[i * columns]);
        } else {
          for (int i = 0; i < left; ++i) sum += widen(from[i * columns]);
        }
      }
    }
    if (adds) a.d_table.row(v)[mine] = sum;
    __syncthreads();
  }
}

}  // namespace detail

/// Bytes: forward two of T for each element of y; backward T for each of d_y, and accum_t<T> read and written for each
/// element of a row of d_table that occurs. Backward is a sort of the positions (its tokens come from the L2 cache) and
/// two kernels that add, for tokens that occur seldom and often. Kernels for each T: forward and the two, each for
/// packs and for single elements.
template <>
struct backend<embedding, device::cuda> {
  template <class T>
  static void forward(device::cuda const& policy, view<space::device, std::int32_t const, dyn> token,
                      view<space::device, T const, dyn, dyn> table, view<space::device, T, dyn, dyn> y) {
    constexpr int n = cuda::pack_width<T>;
    std::int64_t const rows = y.extent(0), width = y.extent(1);
    detail::embedding_elements<T> const op{token, table, y};
    if (cuda::rows_in_packs<n>(table) && cuda::rows_in_packs<n>(y))
      cuda::launch_elements<n, 4>("embedding", policy, rows, width, op);
    else
      cuda::launch_elements<1, 4>("embedding", policy, rows, width, op);
  }

  template <class T>
  static void backward(device::cuda const& policy, view<space::device, std::int32_t const, dyn> token,
                       view<space::device, T const, dyn, dyn> d_y, view<space::device, accum_t<T>, dyn, dyn> d_table,
                       view<space::device, std::int64_t, dyn> order, view<space::device, std::int64_t, dyn> first,
                       view<space::device, std::int32_t, dyn> lists) {
    char const* const op = "embedding.backward";
    std::int64_t const rows = d_y.extent(0), width = d_y.extent(1), vocabulary = d_table.extent(0);
    if (vocabulary == 0) return;
    detail::embedding_sorted const sorted{order.data(), lists.data(), first.data(), lists.data() + rows};
    cuda::check(op, cudaMemsetAsync(sorted.frequent, 0, sizeof(std::int32_t), policy.stream));
    // About a block for each multiprocessor: each reads all tokens.
    int const span = static_cast<int>(std::clamp<std::int64_t>((vocabulary + 127) / 128, 1, detail::embedding_span));
    std::size_t const shared = static_cast<std::size_t>(span + 1) * sizeof(std::int64_t) +
                               static_cast<std::size_t>(span + detail::embedding_list) * 32 * sizeof(std::uint32_t);
    cuda::launch(op, policy, {cuda::blocks_for(vocabulary, span), 1024, shared}, detail::embedding_order<0>,
                 token.data(), rows, static_cast<std::int32_t>(vocabulary), span, sorted);
    detail::embedding_gradient_arguments<T> const a{d_y, d_table, sorted};
    constexpr int seldom_pack = cuda::pack_width<accum_t<T>>;
    if (cuda::rows_in_packs<seldom_pack>(d_y) && cuda::rows_in_packs<seldom_pack>(d_table))
      add_seldom<seldom_pack>(op, policy, a, rows, width);
    else
      add_seldom<1>(op, policy, a, rows, width);
    if (rows <= embedding::seldom) return;
    if (cuda::rows_in_packs<cuda::pack_width<T>>(d_y))
      add_frequent<true>(op, policy, a, width);
    else
      add_frequent<false>(op, policy, a, width);
  }

 private:
  template <int N, class T>
  static void add_seldom(char const* op, device::cuda const& policy, detail::embedding_gradient_arguments<T> const& a,
                         std::int64_t rows, std::int64_t width) {
    std::int64_t const tiles = (width + 32 * N - 1) / (32 * N);
    cuda::launch(op, policy, {cuda::blocks_for((rows + 31) / 32 * tiles, 8), 256}, detail::embedding_add_seldom<N, T>,
                 a, tiles);
  }
  template <bool Packs, class T>
  static void add_frequent(char const* op, device::cuda const& policy, detail::embedding_gradient_arguments<T> const& a,
                           std::int64_t width) {
    constexpr std::size_t shared =
        sizeof(T) * detail::embedding_stages * detail::embedding_stage_rows * detail::embedding_columns;
    auto const tiles = static_cast<int>((width + detail::embedding_columns - 1) / detail::embedding_columns);
    unsigned const blocks = static_cast<unsigned>(cuda::properties().multiprocessors) * 4;
    cuda::launch(op, policy, {blocks, 256, shared}, detail::embedding_add_frequent<Packs, T>, a, tiles);
  }
};

}  // namespace blackmamba
