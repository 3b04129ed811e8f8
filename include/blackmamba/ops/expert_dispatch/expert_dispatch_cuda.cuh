#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/reduce_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/expert_dispatch/expert_dispatch.hpp>

#include <cooperative_groups.h>

#include <algorithm>
#include <string>
#include <type_traits>

/// Instantiations: dispatch_plan once; dispatch_permute for words of 16, 4 and 2 bytes; dispatch_gather (combine and
/// the gradient of permute) and dispatch_combine_backward for each storage type, in packs and one by one.
namespace blackmamba::cuda::detail {

struct dispatch_plan_arguments {
  std::int32_t const* expert;
  std::int64_t expert_stride;  // from one token to the next
  std::uint32_t k;
  std::int32_t slots, experts;
  std::int32_t slots_per_warp;  // a multiple of 32
  std::int64_t capacity;        // INT32_MAX: dropless
  std::int64_t* offsets;
  std::int32_t* source;
  std::int32_t* row;
  std::int32_t* counts;  // (blocks, E)
};

/// The plan in one launch, of one block or of a cooperative grid. Every warp owns a run of slots. It counts them by
/// expert; one grid barrier; every block adds up the counts before its own; the warps walk over their slots again and
/// hand out rows. Lanes with the same expert find each other by ballots on the bits of its number, so that order is
/// kept.
///
/// Shared memory: (warps + 2) E numbers.
template <int>
__global__ void __launch_bounds__(1024) dispatch_plan(dispatch_plan_arguments p) {
  wait_for_launch_ahead();
  let_next_launch_begin();
  extern __shared__ std::int32_t dispatch_memory[];
  int const experts = p.experts, warps = static_cast<int>(blockDim.x / 32);
  int const thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int const warp = thread / 32;
  unsigned const lane = threadIdx.x % 32;
  std::int32_t* const totals = dispatch_memory;   // slots of each expert; then the first row of this block's
  std::int32_t* const before = totals + experts;  // those of the blocks before this one
  std::int32_t* const next = before + experts;    // (warps, E)  counts, then what the next slot gets
  std::int32_t* const mine = next + warp * experts;
  for (int i = thread; i < experts * (warps + 2); i += threads) dispatch_memory[i] = 0;

  std::int64_t const run = (std::int64_t{blockIdx.x} * warps + warp) * p.slots_per_warp;
  auto const begin = static_cast<std::uint32_t>(run < p.slots ? run : p.slots);
  auto const end = static_cast<std::uint32_t>(run + p.slots_per_warp < p.slots ? run + p.slots_per_warp : p.slots);
  bool const gaps = p.expert_stride != p.k;
  auto const expert_of = [&](std::uint32_t s) {
    if (s >= end) return -1;
    std::int32_t const e = p.expert[gaps ? s / p.k * p.expert_stride + s % p.k : s];
    return e >= 0 && e < experts ? e : -1;
  };
  int const bits = 32 - __clz(experts - 1);  // none for one expert
  /// Lanes with the expert e; of no meaning for -1.
  auto const peers_of = [bits](std::int32_t e) {
    unsigned peers = __ballot_sync(0xffffffffu, e >= 0);
    for (int b = 0; b < bits; ++b) {
      bool const one = e >> b & 1;
      unsigned const ones = __ballot_sync(0xffffffffu, one);
      peers &= one ? ones : ~ones;
    }
    return peers;
  };
  constexpr int ahead = 4;  // loads in flight
  /// Calls body(slot, expert, lanes with that expert) for the warp's slots, 32 at a time.
  auto const each = [&](auto&& body) {
    for (std::uint32_t s = begin; s < end; s += 32 * ahead) {
      std::int32_t e[ahead];
#pragma unroll
      for (unsigned a = 0; a < ahead; ++a) e[a] = expert_of(s + 32u * a + lane);
#pragma unroll
      for (unsigned a = 0; a < ahead; ++a)
        if (s + 32u * a < end) body(s + 32u * a + lane, e[a], peers_of(e[a]));
    }
  };
  unsigned const lower = (1u << lane) - 1;

  __syncthreads();
  each([&](std::uint32_t, std::int32_t e, unsigned peers) {
    if (e >= 0 && (peers & lower) == 0) mine[e] += __popc(peers);
    __syncwarp();
  });
  __syncthreads();
  for (int e = thread; e < experts; e += threads) {
    std::int32_t sum = 0;
    for (int w = 0; w < warps; ++w) {
      std::int32_t const n = next[w * experts + e];
      next[w * experts + e] = sum;
      sum += n;
    }
    if (gridDim.x == 1)
      totals[e] = sum;
    else
      p.counts[std::int64_t{blockIdx.x} * experts + e] = sum;
  }
  if (gridDim.x > 1 && experts > 0) {
    cooperative_groups::this_grid().sync();
    int const groups = threads / experts > 0 ? threads / experts : 1;
    int const group = thread / experts;
    if (groups == 1 || group < groups)
      for (int e = groups == 1 ? thread : thread % experts; e < experts; e += threads) {
        std::int32_t all = 0, earlier = 0;
        for (unsigned b = groups == 1 ? 0 : static_cast<unsigned>(group); b < gridDim.x;
             b += static_cast<unsigned>(groups)) {
          std::int32_t const n = p.counts[std::int64_t{b} * experts + e];
          all += n;
          earlier += b < blockIdx.x ? n : 0;
        }
        atomicAdd(totals + e, all);  // of integers: the order is of no consequence
        atomicAdd(before + e, earlier);
      }
  }
  __syncthreads();

  // totals becomes the first row of each expert. A warp scans 32 experts at a time.
  if (warp == 0) {
    std::int32_t row = 0;
    for (int first = 0; first < experts; first += 32) {
      int const e = first + static_cast<int>(lane);
      std::int32_t const n = e < experts ? static_cast<std::int32_t>(min(std::int64_t{totals[e]}, p.capacity)) : 0;
      std::int32_t const sum = cuda::warp_prefix_sum(n);
      if (e < experts) {
        totals[e] = row + sum - n;
        if (blockIdx.x == 0) p.offsets[e] = row + sum - n;
      }
      row += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (lane == 0) {
      if (blockIdx.x == 0) p.offsets[experts] = row;
      dispatch_memory[experts * (warps + 2)] = row;
    }
  }
  __syncthreads();
  std::int32_t const used = dispatch_memory[experts * (warps + 2)];
  for (int e = static_cast<int>(lane); e < experts; e += 32) mine[e] += before[e];
  __syncwarp();

  each([&](std::uint32_t s, std::int32_t e, unsigned peers) {
    std::int32_t const position = e >= 0 ? mine[e] + __popc(peers & lower) : 0;
    __syncwarp();
    if (e >= 0 && (peers & lower) == 0) mine[e] = position + __popc(peers);
    __syncwarp();
    bool const placed = e >= 0 && position < p.capacity;
    std::int32_t const row = placed ? totals[e] + position : -1;
    if (s < end) p.row[s] = row;
    if (placed) p.source[row] = static_cast<std::int32_t>(s);
  });
  std::int64_t const all_threads = std::int64_t{gridDim.x} * threads;
  for (std::int64_t r = used + std::int64_t{blockIdx.x} * threads + thread; r < p.slots; r += all_threads)
    p.source[r] = -1;
}

/// rows[r,:] = x[source[r] / k,:]. threads: (lanes of a row, rows of a block).
template <class Word>
__global__ void __launch_bounds__(256)
    dispatch_permute(std::int32_t const* source, std::uint32_t k, std::int64_t slots, std::int64_t words, Word const* x,
                     std::int64_t x_stride, Word* rows, std::int64_t rows_stride) {
  wait_for_launch_ahead();
  let_next_launch_begin();
  std::int64_t const r = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (r >= slots) return;
  std::int32_t const slot = source[r];
  if (slot < 0) return;
  Word const* const from = x + static_cast<std::uint32_t>(slot) / k * x_stride;
  Word* const to = rows + r * rows_stride;
  constexpr int ahead = 4;
  int const lanes = static_cast<int>(blockDim.x);
  for (std::int64_t i = threadIdx.x; i < words; i += ahead * lanes) {
    Word w[ahead];
#pragma unroll
    for (int a = 0; a < ahead; ++a)
      if (i + a * lanes < words) w[a] = from[i + a * lanes];
#pragma unroll
    for (int a = 0; a < ahead; ++a)
      if (i + a * lanes < words) to[i + a * lanes] = w[a];
  }
}

/// to[t,:] = sum over a of gate[t,a] from[row[t k + a],:], with gate 1 where there is none.
template <class T, int N>
__global__ void __launch_bounds__(256)
    dispatch_gather(std::int32_t const* row, std::int64_t tokens, int k, std::int64_t width, T const* from,
                    std::int64_t from_stride, accum_t<T> const* gate, std::int64_t gate_stride, T* to,
                    std::int64_t to_stride) {
  using A = accum_t<T>;
  std::int64_t const t = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (t >= tokens) return;
  constexpr int ahead = 2;
  std::int64_t const step = std::int64_t{blockDim.x} * N;
  for (std::int64_t i = std::int64_t{threadIdx.x} * N; i < width; i += ahead * step) {
    pack<A, N> sum[ahead];
#pragma unroll
    for (int b = 0; b < ahead; ++b)
#pragma unroll
      for (int n = 0; n < N; ++n) sum[b][n] = 0;
    for (int a = 0; a < k; ++a) {
      std::int32_t const r = row[t * k + a];
      if (r < 0) continue;
      A const weight = gate ? gate[t * gate_stride + a] : A(1);
      T const* const x = from + r * from_stride + i;
      pack<A, N> part[ahead];
#pragma unroll
      for (int b = 0; b < ahead; ++b)
        if (i + b * step < width) part[b] = load_pack<N>(x + b * step);
#pragma unroll
      for (int b = 0; b < ahead; ++b)
        if (i + b * step < width)
#pragma unroll
          for (int n = 0; n < N; ++n) sum[b][n] = math::fma(weight, part[b][n], sum[b][n]);
    }
#pragma unroll
    for (int b = 0; b < ahead; ++b)
      if (i + b * step < width) store_pack<N>(to + t * to_stride + i + b * step, sum[b]);
  }
}

template <class T>
struct dispatch_combine_backward_arguments {
  std::int32_t const* row;
  std::int64_t slots, width;
  std::uint32_t k;
  T const* rows;
  std::int64_t rows_stride;
  accum_t<T> const* gate;
  std::int64_t gate_stride;
  T const* d_y;
  std::int64_t d_y_stride;
  T* d_rows;  // may be rows
  std::int64_t d_rows_stride;
  accum_t<T>* d_gate;
  std::int64_t d_gate_stride;
};

/// d_rows[r,:] = gate[s] d_y[s / k,:] and d_gate[s] = rows[r,:] . d_y[s / k,:] for r = row[s]. A warp for each slot.
template <class T, int N>
__global__ void __launch_bounds__(256) dispatch_combine_backward(dispatch_combine_backward_arguments<T> p) {
  using A = accum_t<T>;
  std::int64_t const s = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (s >= p.slots) return;
  std::int64_t const t = static_cast<std::uint32_t>(s) / p.k, a = static_cast<std::uint32_t>(s) % p.k;
  std::int32_t const r = p.row[s];
  A sum = 0;
  if (r >= 0) {
    A const gate = p.gate[t * p.gate_stride + a];
    T const* const x = p.rows + r * p.rows_stride;
    T const* const g = p.d_y + t * p.d_y_stride;
    T* const d = p.d_rows + r * p.d_rows_stride;
    constexpr int ahead = 2;
    constexpr int step = 32 * N;
    for (std::int64_t i = std::int64_t{threadIdx.x} * N; i < p.width; i += ahead * step) {
      pack<A, N> value[ahead], gradient[ahead];
#pragma unroll
      for (int b = 0; b < ahead; ++b)
        if (i + b * step < p.width) {
          gradient[b] = load_pack<N>(g + i + b * step);
          value[b] = load_pack<N>(x + i + b * step);
        }
#pragma unroll
      for (int b = 0; b < ahead; ++b)
        if (i + b * step < p.width) {
#pragma unroll
          for (int n = 0; n < N; ++n) {
            sum = math::fma(value[b][n], gradient[b][n], sum);
            gradient[b][n] *= gate;
          }
          store_pack<N>(d + i + b * step, gradient[b]);
        }
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) p.d_gate[t * p.d_gate_stride + a] = sum;
}

}  // namespace blackmamba::cuda::detail

namespace blackmamba {

/// An expert outside [0, E) counts as none: the device does not stop to complain.
template <>
struct backend<expert_dispatch, device::cuda> {
  using routing = expert_dispatch::routing<device::cuda>;
  template <class T, int... E>
  using device_view = view<space::device, T, E...>;

  template <class Counts>  // a template, so that who does not call it does not compile it
  static void plan(device::cuda const& policy, device_view<std::int32_t const, dyn, dyn> expert, routing const& to,
                   std::int64_t capacity, Counts const& counts) {
    std::int64_t const slots = expert.size(), experts = to.offsets.extent(0) - 1;
    auto const& device = cuda::properties();
    // A block counts for itself up to here; beyond, `counts` has room for two blocks a chunk.
    std::int64_t const blocks =
        slots <= one_block ? 1 : std::min<std::int64_t>(device.multiprocessors, 2 * counts.extent(0));
    std::int64_t const room = device.shared_bytes_per_block / 4 - 1;
    std::int64_t const fitting = experts > 0 ? room / experts - 2 : 32;
    check_that(fitting >= 1, "expert_dispatch.plan", "offsets", std::to_string(experts) + " experts",
               "at most " + std::to_string(room / 3) + " on this device");
    std::int64_t const warps =
        std::max<std::int64_t>(1, std::min({std::int64_t{32}, fitting, (slots + blocks * 32 - 1) / (blocks * 32)}));
    std::int64_t const each = ((slots + blocks * warps - 1) / (blocks * warps) + 31) / 32 * 32;
    cuda::detail::dispatch_plan_arguments const arguments{
        .expert = expert.data(),
        .expert_stride = expert.extent(0) > 1 ? expert.stride(0) : expert.extent(1),
        .k = static_cast<std::uint32_t>(std::max<std::int64_t>(expert.extent(1), 1)),
        .slots = static_cast<std::int32_t>(slots),
        .experts = static_cast<std::int32_t>(experts),
        .slots_per_warp = static_cast<std::int32_t>(each),
        .capacity = capacity > 0 ? capacity : INT32_MAX,
        .offsets = to.offsets.data(),
        .source = to.source.data(),
        .row = to.row.data(),
        .counts = reinterpret_cast<std::int32_t*>(counts.data())};
    cuda::launch("expert_dispatch.plan", policy,
                 {.blocks = static_cast<unsigned>(blocks),
                  .threads = static_cast<unsigned>(32 * warps),
                  .shared_bytes = static_cast<std::size_t>((warps + 2) * experts + 1) * sizeof(std::int32_t),
                  .cooperative = blocks > 1,
                  .early = blocks == 1},
                 cuda::detail::dispatch_plan<0>, arguments);
  }

  template <class T>
  static void permute(device::cuda const& policy, routing const& plan, device_view<T const, dyn, dyn> x,
                      device_view<T, dyn, dyn> rows) {
    constexpr int n = cuda::pack_width<T>;
    if (cuda::rows_in_packs<n>(x) && cuda::rows_in_packs<n>(rows))
      permute_words<uint4, n>(policy, plan, x, rows);
    else if constexpr (sizeof(T) == 2)
      permute_words<std::uint16_t, 1>(policy, plan, x, rows);
    else
      permute_words<std::conditional_t<sizeof(T) == 8, uint2, std::uint32_t>, 1>(policy, plan, x, rows);
  }

  template <class T>
  static void combine(device::cuda const& policy, routing const& plan, device_view<T const, dyn, dyn> rows,
                      device_view<accum_t<T> const, dyn, dyn> gate, device_view<T, dyn, dyn> y) {
    gather("expert_dispatch.combine", policy, plan, rows, gate, y);
  }

  template <class T>
  static void permute_backward(device::cuda const& policy, routing const& plan, device_view<T const, dyn, dyn> d_rows,
                               device_view<T, dyn, dyn> d_x) {
    gather("expert_dispatch.permute_backward", policy, plan, d_rows, device_view<accum_t<T> const, dyn, dyn>{}, d_x);
  }

  template <class T>
  static void combine_backward(device::cuda const& policy, routing const& plan,
                               expert_dispatch::combine_gradient_inputs<device::cuda, T> const& in,
                               expert_dispatch::combine_gradients<device::cuda, T> const& d) {
    std::int64_t const slots = plan.row.extent(0);
    cuda::detail::dispatch_combine_backward_arguments<T> const arguments{
        .row = plan.row.data(),
        .slots = slots,
        .width = in.d_y.extent(1),
        .k = static_cast<std::uint32_t>(in.gate.extent(1)),
        .rows = in.rows.data(),
        .rows_stride = in.rows.stride(0),
        .gate = in.gate.data(),
        .gate_stride = in.gate.stride(0),
        .d_y = in.d_y.data(),
        .d_y_stride = in.d_y.stride(0),
        .d_rows = d.d_rows.data(),
        .d_rows_stride = d.d_rows.stride(0),
        .d_gate = d.d_gate.data(),
        .d_gate_stride = d.d_gate.stride(0)};
    constexpr int n = cuda::pack_width<T>;
    bool const packs =
        cuda::rows_in_packs<n>(in.rows) && cuda::rows_in_packs<n>(in.d_y) && cuda::rows_in_packs<n>(d.d_rows);
    cuda::launch("expert_dispatch.combine_backward", policy, {cuda::blocks_for(slots, 8), dim3(32, 8)},
                 packs ? cuda::detail::dispatch_combine_backward<T, n> : cuda::detail::dispatch_combine_backward<T, 1>,
                 arguments);
  }

 private:
  static constexpr std::int64_t one_block = 8192;  // slots that one block plans

  /// Blocks of 256 threads, a row in each line of them: lines are narrow where rows are, and wide where rows are few.
  static cuda::grid lines(std::int64_t rows, std::int64_t words) {
    std::int64_t const threads = std::int64_t{cuda::properties().multiprocessors} * 2048;
    unsigned lanes = 1;
    while (lanes < 256 && lanes < words && (lanes < 32 || rows * lanes < threads / 2)) lanes *= 2;
    return {cuda::blocks_for(rows, 256 / lanes), dim3(lanes, 256 / lanes)};
  }
  template <class Word, int Elements, class From, class To>
  static void permute_words(device::cuda const& policy, routing const& plan, From const& x, To const& rows) {
    std::int64_t const slots = rows.extent(0), words = rows.extent(1) / Elements;
    cuda::grid shape = lines(slots, words);
    shape.early = true;
    cuda::launch("expert_dispatch.permute", policy, shape, cuda::detail::dispatch_permute<Word>, plan.source.data(),
                 static_cast<std::uint32_t>(slots / x.extent(0)), slots, words, reinterpret_cast<Word const*>(x.data()),
                 x.stride(0) / Elements, reinterpret_cast<Word*>(rows.data()), rows.stride(0) / Elements);
  }
  template <class T>
  static void gather(char const* op, device::cuda const& policy, routing const& plan,
                     device_view<T const, dyn, dyn> from, device_view<accum_t<T> const, dyn, dyn> gate,
                     device_view<T, dyn, dyn> to) {
    std::int64_t const tokens = to.extent(0), width = to.extent(1);
    constexpr int n = cuda::pack_width<T>;
    bool const packs = cuda::rows_in_packs<n>(from) && cuda::rows_in_packs<n>(to);
    cuda::launch(op, policy, lines(tokens, packs ? width / n : width),
                 packs ? cuda::detail::dispatch_gather<T, n> : cuda::detail::dispatch_gather<T, 1>, plan.row.data(),
                 tokens, static_cast<int>(plan.row.extent(0) / tokens), width, from.data(), from.stride(0), gate.data(),
                 gate.stride(0), to.data(), to.stride(0));
  }
};

}  // namespace blackmamba
