#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/reduce_cuda.cuh>
#include <blackmamba/ops/router/quantile_balance.hpp>
#include <blackmamba/ops/router/router_math.hpp>

#include <cooperative_groups.h>

#include <algorithm>
#include <type_traits>

/// Instantiations: float and double.
///
/// All rounds in one launch of a cooperative grid. A round writes the offset that every row wants from every expert,
/// and then finds the quantiles of all experts at once by their digits of 8 bits, the highest first: the numbers'
/// digits are counted, the digit that the quantile has is the one where the running count passes its rank, and the
/// next digit is counted among the numbers that begin like that. Counts are integers, so that their order is of no
/// consequence. One grid barrier for each digit, and two more for each round.
namespace blackmamba::cuda::detail {

/// Unsigned numbers in the order of the floating-point numbers that they stand for.
template <class A>
struct ordered_key {
  using type = std::conditional_t<sizeof(A) == 4, std::uint32_t, unsigned long long>;
  static constexpr int digits = static_cast<int>(sizeof(A));
  static constexpr type sign = type(1) << (8 * sizeof(A) - 1);

  static __device__ __forceinline__ type of(A x) {
    x += A(0);  // -0 and 0 are equal
    auto const bits = blackmamba::detail::bits_as<type>(x);
    return bits & sign ? static_cast<type>(~bits) : bits | sign;
  }
  static __device__ __forceinline__ A value(type key) {
    return blackmamba::detail::bits_as<A>(key & sign ? key ^ sign : static_cast<type>(~key));
  }
};

template <class A>
struct quantile_arguments {
  std::int64_t rows;
  int experts, k, rounds;
  A beta;
  A const* logits;
  std::int64_t logits_stride;
  A* offset;
  A* wanted;                   // (E, M)
  unsigned long long* counts;  // two sets, used in turn, of (E, digits, 256) 32-bit counts and (E) inverted keys
};

/// Of each expert, in the shared memory of every block.
template <class A>
struct quantile_state {
  unsigned long long prefix;  // the digits found so far
  std::int64_t rank, n;       // rank, from 1, of the quantile among the numbers that begin like that; their number
  A offset;
  bool followed;  // whether the next larger number equals the quantile
};

inline constexpr int quantile_digits = 256;
inline constexpr int quantile_threads = 512;
inline constexpr std::int64_t quantile_chunk = 4096;  // numbers of an expert that a block counts at a time

template <class A>
__global__ void __launch_bounds__(quantile_threads) quantile_rounds(quantile_arguments<A> p) {
  using key = ordered_key<A>;
  using key_type = typename key::type;
  using state = quantile_state<A>;
  extern __shared__ __align__(16) unsigned char quantile_memory[];
  __shared__ unsigned counted[quantile_digits];
  state* const experts = reinterpret_cast<state*>(quantile_memory);
  int const e = p.experts, warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  std::int64_t const set_size = std::int64_t{e} * (key::digits * 128 + 1);
  std::int64_t const thread = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  std::int64_t const threads = std::int64_t{gridDim.x} * blockDim.x;
  auto const barrier = [] {
    if (gridDim.x > 1)
      cooperative_groups::this_grid().sync();
    else
      __syncthreads();
  };
  auto const clear = [&](unsigned long long* set) {
    for (std::int64_t i = thread; i < set_size; i += threads) set[i] = 0;
  };

  bool finite = true;
  for (int j = 0; j < e; ++j) finite = finite && isfinite(p.offset[j]);
  for (int j = static_cast<int>(threadIdx.x); j < e; j += quantile_threads)
    experts[j].offset = finite ? p.offset[j] : A(0);
  clear(p.counts);
  __syncthreads();

  for (int round = 0; round < p.rounds; ++round) {
    unsigned long long* const set = p.counts + round % 2 * set_size;
    auto* const digits = reinterpret_cast<unsigned*>(set);
    auto* const inverted = set + std::int64_t{e} * key::digits * 128;
    for (std::int64_t r = thread; r < p.rows; r += threads) {
      A const* const x = p.logits + r * p.logits_stride;
      auto const logit = [x](std::int64_t j) { return x[j]; };
      auto choice = math::no_choice<A>();
      for (int a = 0; a <= p.k; ++a)
        choice = math::next_choice(choice, e, p.beta, logit, [&](std::int64_t j) { return experts[j].offset; });
      A const threshold = choice.score + math::finite_test<A>(e, logit);
      for (int j = 0; j < e; ++j) p.wanted[j * p.rows + r] = threshold - p.beta * x[j];
    }
    barrier();
    clear(p.counts + (round + 1) % 2 * set_size);  // nobody reads the other set any more

    std::int64_t const chunks = (p.rows + quantile_chunk - 1) / quantile_chunk;
    /// Calls body(expert, key, whether there is a number) for the numbers of this block's share, by whole warps, and
    /// after_chunk(expert).
    auto const each_number = [&](auto&& body, auto&& after_chunk) {
      for (std::int64_t item = blockIdx.x; item < e * chunks; item += gridDim.x) {
        int const j = static_cast<int>(item / chunks);
        std::int64_t const first = item % chunks * quantile_chunk;
        std::int64_t const last = first + quantile_chunk < p.rows ? first + quantile_chunk : p.rows;
        for (std::int64_t start = first; start < last; start += quantile_threads) {
          std::int64_t const r = start + threadIdx.x;
          A const t = r < last ? p.wanted[j * p.rows + r] : A(INFINITY);
          body(j, key::of(t), isfinite(t));
        }
        after_chunk(j);
      }
    };
    for (int d = 0; d < key::digits; ++d) {
      int const shift = 8 * (key::digits - 1 - d);
      if (threadIdx.x < 256) counted[threadIdx.x] = 0;
      __syncthreads();
      each_number(
          [&](int j, key_type number, bool present) {
            bool const counts = present && (d == 0 || (number >> (shift + 8) % (8 * key::digits)) ==
                                                          static_cast<key_type>(experts[j].prefix));
            // Most numbers have one of few digits: lanes with the same add one sum.
            unsigned const digit = static_cast<unsigned>(number >> shift & 0xff);
            unsigned const peers = __match_any_sync(0xffffffffu, counts ? digit : 256u);
            if (counts && (peers & ((1u << lane) - 1)) == 0)
              atomicAdd(counted + digit, static_cast<unsigned>(__popc(peers)));
          },
          [&](int j) {
            __syncthreads();
            if (threadIdx.x < 256) {
              if (counted[threadIdx.x] > 0)
                atomicAdd(digits + (std::int64_t{j} * key::digits + d) * 256 + threadIdx.x, counted[threadIdx.x]);
              counted[threadIdx.x] = 0;
            }
            __syncthreads();
          });
      barrier();
      // Every block finds the digit of every expert, a warp for each; a lane has eight of the counts.
      for (int j = warp; j < e; j += quantile_threads / 32) {
        unsigned const* const count = digits + (std::int64_t{j} * key::digits + d) * 256 + lane * 8;
        std::int64_t n[8], sum = 0;
        for (int i = 0; i < 8; ++i) sum += n[i] = __ldcg(count + i);
        std::int64_t const upto = warp_prefix_sum(sum);
        std::int64_t const all = __shfl_sync(0xffffffffu, upto, 31);
        std::int64_t rank = experts[j].rank;
        if (d == 0) rank = max(std::int64_t{1}, all * p.k / e);
        __syncwarp();
        std::int64_t below = upto - sum;
        if (below < rank && rank <= upto) {
          int digit = 0;
          while (below + n[digit] < rank) below += n[digit++];
          experts[j].prefix = (d == 0 ? 0 : experts[j].prefix << 8) | static_cast<unsigned>(lane * 8 + digit);
          experts[j].rank = rank - below;
          experts[j].followed = rank - below < n[digit];
        }
        if (d == 0 && lane == 0) experts[j].n = all;
      }
      __syncthreads();
    }
    key_type best = 0;
    each_number(
        [&](int j, key_type number, bool present) {
          if (present && !experts[j].followed && number > static_cast<key_type>(experts[j].prefix))
            best = max(best, static_cast<key_type>(~number));
        },
        [&](int j) {
          best = warp_max(best);
          if (lane == 0 && best > 0) atomicMax(inverted + j, static_cast<unsigned long long>(best));
          best = 0;
        });
    barrier();
    for (int j = static_cast<int>(threadIdx.x); j < e; j += quantile_threads) {
      state& s = experts[j];
      if (s.n == 0) continue;
      A const quantile = key::value(static_cast<key_type>(s.prefix));
      A next = quantile;
      if (!s.followed && max(std::int64_t{1}, s.n * p.k / e) < s.n)
        next = key::value(static_cast<key_type>(~__ldcg(inverted + j)));
      s.offset = quantile + (next - quantile) / 2;
    }
    __syncthreads();
    A largest = experts[0].offset;
    for (int j = 1; j < e; ++j) largest = math::max(largest, experts[j].offset);
    __syncthreads();
    for (int j = static_cast<int>(threadIdx.x); j < e; j += quantile_threads) experts[j].offset -= largest;
    __syncthreads();
  }
  if (blockIdx.x == 0)
    for (int j = static_cast<int>(threadIdx.x); j < e; j += quantile_threads) p.offset[j] = experts[j].offset;
}

}  // namespace blackmamba::cuda::detail

namespace blackmamba {

template <>
struct backend<quantile_balance, device::cuda> {
  template <class A>
  static void forward(device::cuda const& policy, view<space::device, A const, dyn, dyn> logits,
                      view<space::device, A, dyn> offset, quantile_balance::options const& how,
                      view<space::device, A, dyn, dyn> wanted, view<space::device, std::uint64_t, dyn> counts) {
    std::int64_t const rows = logits.extent(0), experts = logits.extent(1);
    constexpr std::size_t each = sizeof(cuda::detail::quantile_state<A>);
    constexpr std::size_t counted = cuda::detail::quantile_digits * sizeof(unsigned);
    auto const most = static_cast<std::int64_t>(
        (static_cast<std::size_t>(cuda::properties().shared_bytes_per_block) - counted) / each);
    check_that(experts <= most, "quantile_balance", "offset", std::to_string(experts) + " experts",
               "at most " + std::to_string(most) + " on this device");
    cuda::detail::quantile_arguments<A> const arguments{.rows = rows,
                                                        .experts = static_cast<int>(experts),
                                                        .k = static_cast<int>(how.top_k),
                                                        .rounds = how.top_k < experts ? how.rounds : 0,
                                                        .beta = static_cast<A>(how.beta),
                                                        .logits = logits.data(),
                                                        .logits_stride = logits.stride(0),
                                                        .offset = offset.data(),
                                                        .wanted = wanted.data(),
                                                        .counts = reinterpret_cast<unsigned long long*>(counts.data())};
    constexpr int threads = cuda::detail::quantile_threads;
    unsigned const blocks = rows * experts <= 8 * threads ? 1 : cuda::strided_blocks_for(rows, threads, 1);
    cuda::grid shape{blocks, threads, each * static_cast<std::size_t>(experts)};
    shape.cooperative = blocks > 1;
    cuda::launch("quantile_balance", policy, shape, cuda::detail::quantile_rounds<A>, arguments);
  }
};

}  // namespace blackmamba
