#pragma once
#include <blackmamba/core/cuda/named_barrier_cuda.cuh>
#include <blackmamba/ops/associative_scan/scan_tiles_cuda.cuh>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

/// Scans along the contiguous axis, for each rule: scan_rows, where every row has a block of threads;
/// scan_rows_streamed, where rows are split.
namespace blackmamba::cuda::detail {

/// What a block's first warp does for a tile whose total is published: gathers what came before it, and publishes what
/// the tile completes. Every lane returns the state that reaches the tile.
template <class Rule, class Block>
__device__ __forceinline__ typename Rule::state gather_rows(Rule const& rule,
                                                            scan_slots<typename Rule::map> const& slots,
                                                            std::int64_t number, Block const& at,
                                                            typename Rule::map const& total, int lane) {
  using map = typename Rule::map;
  using state = typename Rule::state;
  int const p = static_cast<int>(at.place & 31), q = static_cast<int>(at.place >> 5 & 31);
  map tile = rule.identity(), group = rule.identity();
  state start{};
  bool tile_ready = lane >= p, group_ready = lane >= q, start_ready = at.place < 1024, told = p != 31;
  if (start_ready) start = rule.initial(at);
  for (;;) {
    if (!tile_ready) tile_ready = slots.take(0, number - p + lane, tile);
    if (!group_ready) group_ready = slots.take(1, number - p - 32 * (q - lane) + 31, group);
    if (!start_ready) start_ready = slots.take(2, number - p - 32 * q - 1, start);
    bool const tiles = __all_sync(0xffffffffu, tile_ready);
    if (tiles && !told) {
      if (lane == 31) tile = total;
      map const whole = shuffle(scan_lanes(rule, tile, lane), 31);
      if (lane == 0) slots.put(1, number, whole);
      if (q == 31 && lane == 31) group = whole;
      told = true;
    }
    if (tiles && __all_sync(0xffffffffu, group_ready && start_ready)) break;
  }
  state reached = start;
  if (q > 0) {
    map const groups = scan_lanes(rule, group, lane);
    reached = rule.advance(start, shuffle(groups, q - 1));
    if (p == 31 && q == 31) {
      state const next = rule.advance(start, shuffle(groups, 31));
      if (lane == 0) slots.put(2, number, next);
    }
  }
  if (p > 0) reached = rule.advance(reached, shuffle(scan_lanes(rule, tile, lane), p - 1));
  return reached;
}

/// A Rule for rows: map, state; items and packs (a thread's elements, in as many packs), line, data;
///   identity(), initial(at), op(map, map), advance(state, map)
///   start(at) -> line                  where a sequence stands
///   load(line, j, lane) -> data        its elements j, j + 1, … as they are visited; called by whole warps
///   fold(line, j, data) -> map         nothing past the end
///   emit(line, j, data, state) -> state    results, from the state before element j; the state after the last
///   final(at, line, state)             of the whole sequence

/// A warp's elements: before[s] is what a lane's pack s has on its left within the warp. Returns the warp's total.
template <class Rule, class Line, int Packs>
__device__ __forceinline__ typename Rule::map scan_segment(Rule const& rule, Line const& line, std::int64_t own,
                                                           typename Rule::data const (&data)[Packs],
                                                           typename Rule::map (&before)[Packs], int lane) {
  using map = typename Rule::map;
  map sum = rule.identity();
#pragma unroll
  for (int s = 0; s < Packs; ++s) {
    map const x = scan_lanes(rule, rule.fold(line, own + s * 32 * Rule::items, data[s]), lane);
    map const left = shuffle_up(x, 1), whole = shuffle(x, 31);
    if (s == 0) {
      before[s] = lane > 0 ? left : rule.identity();
      sum = whole;
    } else {
      before[s] = lane > 0 ? rule(sum, left) : sum;
      sum = rule(sum, whole);
    }
  }
  return sum;
}

/// Shared memory in which each thread keeps its part of two tiles: the elements, and what they have on their left.
template <class Rule>
struct scan_stash {
  using data = typename Rule::data;
  using map = typename Rule::map;
  template <class V>
  static constexpr std::size_t rounded = (sizeof(V) + 3) / 4 * 4;
  static constexpr int threads = static_cast<int>(scan_tiles::threads), packs = Rule::packs;
  static constexpr std::size_t data_bytes = 2 * threads * packs * rounded<data>;
  static constexpr std::size_t bytes = data_bytes + 2 * threads * packs * rounded<map>;
  static constexpr bool fits = bytes <= 100 * 1024;
  static constexpr int blocks = bytes <= 48 * 1024 ? 3 : 2;  // of a multiprocessor

  unsigned char* memory;
  int thread;
  __device__ __forceinline__ void put(int half, int s, data const& d, map const& before) const {
    put(memory, half * packs + s, d);
    put(memory + data_bytes, half * packs + s, before);
  }
  __device__ __forceinline__ data elements(int half, int s) const { return get<data>(memory, half * packs + s); }
  __device__ __forceinline__ map before(int half, int s) const {
    return get<map>(memory + data_bytes, half * packs + s);
  }

 private:
  template <class V>
  using unit =
      std::conditional_t<rounded<V> % 16 == 0, uint4, std::conditional_t<rounded<V> % 8 == 0, uint2, std::uint32_t>>;
  template <class V>
  static constexpr int units = static_cast<int>(rounded<V> / sizeof(unit<V>));

  // Neighbouring threads' units are neighbours: no two of them meet in a bank.
  template <class V>
  __device__ __forceinline__ void put(unsigned char* section, int slot, V const& value) const {
    unit<V> w[units<V>] = {};
    memcpy(static_cast<void*>(w), &value, sizeof(V));
#pragma unroll
    for (int i = 0; i < units<V>; ++i)
      reinterpret_cast<unit<V>*>(section)[(slot * units<V> + i) * threads + thread] = w[i];
  }
  template <class V>
  __device__ __forceinline__ V get(unsigned char* section, int slot) const {
    unit<V> w[units<V>];
#pragma unroll
    for (int i = 0; i < units<V>; ++i)
      w[i] = reinterpret_cast<unit<V> const*>(section)[(slot * units<V> + i) * threads + thread];
    V value;
    memcpy(static_cast<void*>(&value), w, sizeof(V));
    return value;
  }
};

/// Rows that are split: a block takes one tile after another, in order, as they are left. Eight warps scan tiles; the
/// ninth gathers what came before one tile while the others load and add up the next, so that what a block waits for
/// was published a tile ago.
template <class Rule>
__global__ void __launch_bounds__(scan_tiles::threads + 32, scan_stash<Rule>::blocks)
    scan_rows_streamed(Rule rule, sequences list, scan_slots<typename Rule::map> slots) {
  using map = typename Rule::map;
  using state = typename Rule::state;
  constexpr int items = Rule::items, packs = Rule::packs, segment = 32 * items * packs, warps = 8;
  extern __shared__ __align__(16) unsigned char scan_memory[];
  __shared__ value_array<map, 2 * warps> totals;
  __shared__ value_array<state, 2> gathered;
  struct taken_tile {
    sequences::block at;
    int number;
    bool real;  // it has elements
  };
  __shared__ taken_tile taken[8];  // this block's n-th tile in place n % 8
  int const thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int const tiles = static_cast<int>(slots.count);
  // The two kinds of warps meet at different places of the program, which __syncthreads() does not allow.
  auto const meet = [] { named_barrier<1, static_cast<int>(scan_tiles::threads) + 32>(); };
  auto const take = [&](int n, int number) {
    taken_tile t{{}, number, false};
    if (t.number < tiles && list.find(t.number, t.at)) {
      t.real = t.at.length > 0;
      if (!t.real) rule.final(t.at, rule.start(t.at), rule.initial(t.at));
    }
    taken[n & 7] = t;
  };
  if (thread == 32 * warps)
    for (int n = 0; n < 3; ++n) take(n, atomicAdd(slots.tickets, 1));
  __syncthreads();

  if (warp == warps) {
    for (int n = 0;; ++n) {
      meet();  // the n-th tile's totals are there
      taken_tile const& t = taken[n & 7];
      if (t.number >= tiles) break;
      map total = rule.identity();
      if (t.real) {
        total = totals[(n & 1) * warps];
        for (int w = 1; w < warps; ++w) total = rule(total, totals[(n & 1) * warps + w]);
        if (lane == 0) slots.put(0, t.number, total);
      }
      int const number = lane == 0 ? atomicAdd(slots.tickets, 1) : 0;
      if (t.real) {
        state const reached = gather_rows(rule, slots, t.number, t.at, total, lane);
        if (lane == 0) gathered[n & 1] = reached;
      }
      if (lane == 0) take(n + 3, number);
    }
    return;
  }

  scan_stash<Rule> const stash{scan_memory, thread};
  int const offset = warp * segment + lane * items;
  typename Rule::data data[packs];
  auto const fetch = [&](taken_tile const& t) {
    if (!t.real) return;
    auto const line = rule.start(t.at);
#pragma unroll
    for (int s = 0; s < packs; ++s) data[s] = rule.load(line, t.at.begin + offset + s * 32 * items, lane);
  };
  map ahead_before = rule.identity();
  fetch(taken[0]);
  for (int n = 0;; ++n) {
    {
      taken_tile const& t = taken[n & 7];
      if (t.real) {
        map before[packs];
        map const sum = scan_segment(rule, rule.start(t.at), t.at.begin + offset, data, before, lane);
#pragma unroll
        for (int s = 0; s < packs; ++s) stash.put(n & 1, s, data[s], before[s]);
        if (lane == 0) totals[(n & 1) * warps + warp] = sum;
      }
      fetch(taken[n + 1 & 7]);
    }
    meet();  // what reaches the tile before this one is there
    if (n > 0 && taken[n - 1 & 7].real) {
      taken_tile const& t = taken[n - 1 & 7];
      auto const line = rule.start(t.at);
      state reached = gathered[(n & 1) ^ 1];
      if (warp > 0) reached = rule.advance(reached, ahead_before);
#pragma unroll
      for (int s = 0; s < packs; ++s) {
        std::int64_t const j = t.at.begin + offset + s * 32 * items;
        auto elements = stash.elements((n & 1) ^ 1, s);
        state const last = rule.emit(line, j, elements, rule.advance(reached, stash.before((n & 1) ^ 1, s)), lane);
        if (j < t.at.length && t.at.length <= j + items) rule.final(t.at, line, last);
      }
    }
    if (taken[n & 7].number >= tiles) break;
    if (taken[n & 7].real && warp > 0) {
      ahead_before = totals[(n & 1) * warps];
      for (int w = 1; w < warp; ++w) ahead_before = rule(ahead_before, totals[(n & 1) * warps + w]);
    }
  }
}

/// Rows of which each has a block. Split, which it is for what a stash can't hold: each tile has one.
template <class Rule>
__global__ void __launch_bounds__(scan_tiles::threads, Rule::blocks_per_multiprocessor)
    scan_rows(Rule rule, sequences list, scan_slots<typename Rule::map> slots, bool split) {
  using map = typename Rule::map;
  using state = typename Rule::state;
  constexpr int items = Rule::items, packs = Rule::packs, segment = 32 * items * packs, most = 8;
  __shared__ value_array<map, 2 * most> totals;
  __shared__ value_array<state, 1> gathered;
  int const lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int const warps = static_cast<int>(blockDim.x) / 32;
  unsigned number = blockIdx.x;
  if (!scan_stash<Rule>::fits && split) number = slots.take_ticket();
  sequences::block at;
  if (!list.find(number, at)) return;
  auto const line = rule.start(at);
  if (at.length == 0) {
    if (threadIdx.x == 0) rule.final(at, line, rule.initial(at));
    return;
  }
  state third = split ? state{} : rule.initial(at);
  map tiles = rule.identity(), groups = rule.identity();  // lane i: the i-th of this group's, of this third level's
  int buffer = 0;
  for (std::int64_t begin = at.begin; begin < at.end; begin += most * segment, buffer ^= 1) {
    std::int64_t const own = begin + warp * segment + lane * items;
    typename Rule::data data[packs];
    map before[packs];
#pragma unroll
    for (int s = 0; s < packs; ++s) data[s] = rule.load(line, own + s * 32 * items, lane);
    map const sum = scan_segment(rule, line, own, data, before, lane);
    if (lane == 0) totals[buffer * most + warp] = sum;
    __syncthreads();
    map ahead = rule.identity(), total = totals[buffer * most];
    for (int w = 1; w < warps; ++w) {
      if (w == warp) ahead = total;
      total = rule(total, totals[buffer * most + w]);
    }

    state reached{};
    if (!scan_stash<Rule>::fits && split) {
      if (warp == 0) {
        if (lane == 0) slots.put(0, number, total);
        reached = gather_rows(rule, slots, number, at, total, lane);
        if (lane == 0) gathered[0] = reached;
      }
      __syncthreads();
      reached = gathered[0];
    } else {
      std::int64_t const place = begin / (most * segment);
      int const p = static_cast<int>(place & 31), q = static_cast<int>(place >> 5 & 31);
      reached = third;
      if (q > 0) reached = rule.advance(reached, shuffle(scan_lanes(rule, groups, lane), q - 1));
      if (p > 0) reached = rule.advance(reached, shuffle(scan_lanes(rule, tiles, lane), p - 1));
      if (lane == p) tiles = total;
      if (p == 31) {
        map const whole = shuffle(scan_lanes(rule, tiles, lane), 31);
        if (lane == q) groups = whole;
        tiles = rule.identity();
        if (q == 31) {
          third = rule.advance(third, shuffle(scan_lanes(rule, groups, lane), 31));
          groups = rule.identity();
        }
      }
    }

    if (warp > 0) reached = rule.advance(reached, ahead);
#pragma unroll
    for (int s = 0; s < packs; ++s) {
      std::int64_t const j = own + s * 32 * items;
      state const last = rule.emit(line, j, data[s], rule.advance(reached, before[s]), lane);
      if (j < at.length && at.length <= j + items) rule.final(at, line, last);
    }
  }
}

template <class Rule, class Map = typename Rule::map>
void launch_scan_rows(char const* op, device::cuda const& policy, Rule const& rule, std::int64_t rows,
                      std::int64_t length, view<space::device, std::int64_t const, dyn> cu_seqlens,
                      view<space::device, Map, dyn, dyn> carries, view<space::device, std::int32_t, dyn> flags) {
  constexpr std::int64_t segment = 32 * Rule::items * Rule::packs, tile = 8 * segment;
  static_assert(tile >= scan_tiles::of_rows<Map>);
  std::int64_t const count = cu_seqlens.present() ? cu_seqlens.extent(0) - 1 : rows;
  bool const split =
      length > tile && count < std::int64_t{properties().multiprocessors} * scan_sequences_per_multiprocessor;
  sequences const list(rows, length, cu_seqlens, split ? scan_shift(tile) : 62);
  scan_slots<Map> slots{};
  if (split) slots = empty_flags(op, policy, carries, flags, list.blocks(), 1, scan_tiles::flags_of_row<Map>);
  if constexpr (scan_stash<Rule>::fits)
    if (split) {
      std::int64_t const resident = std::int64_t{properties().multiprocessors} * scan_stash<Rule>::blocks;
      launch(op, policy,
             {static_cast<unsigned>(std::min<std::int64_t>(resident, list.blocks())),
              static_cast<unsigned>(scan_tiles::threads + 32), scan_stash<Rule>::bytes},
             scan_rows_streamed<Rule>, rule, list, slots);
      return;
    }
  std::int64_t const warps = length >= tile ? 8 : (length + segment - 1) / segment;
  launch(op, policy, {blocks_for(list.blocks(), 1), static_cast<unsigned>(32 * (warps > 0 ? warps : 1))},
         scan_rows<Rule>, rule, list, slots, split);
}
}  // namespace blackmamba::cuda::detail
