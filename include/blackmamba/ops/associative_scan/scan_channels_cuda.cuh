#pragma once
#include <blackmamba/ops/associative_scan/scan_tiles_cuda.cuh>

#include <cstdint>

/// Scans along L of (B, L, D), for each rule: scan_channels<Rule, Split>, split where there are few sequences and
/// channels.
namespace blackmamba::cuda::detail {

/// As gather_rows, for 32 channels: each lane adds up its own channel's totals, one after another.
template <class Rule, class Block>
__device__ __forceinline__ typename Rule::state gather_channels(Rule const& rule,
                                                                scan_slots<typename Rule::map> const& slots,
                                                                std::int64_t number, std::int64_t tile, Block const& at,
                                                                typename Rule::map const& total, std::int64_t channel,
                                                                bool inside, int lane) {
  using map = typename Rule::map;
  using state = typename Rule::state;
  int const p = static_cast<int>(at.place & 31), q = static_cast<int>(at.place >> 5 & 31);
  auto const publish = [&](int level, auto const& value) {
    if (inside) slots.put_channel(level, number, channel, value);
    __threadfence();
    __syncwarp();
    if (lane == 0) publish_word(slots.flag(level, number, tile));
  };
  auto const wait = [&](int level, std::int64_t first, std::int64_t stride, int count) {
    if (lane < count)
      while (!published_word(slots.flag(level, first + lane * stride, tile))) {
      }
    __syncwarp();
    __threadfence();
  };
  auto const sum = [&](int level, std::int64_t first, std::int64_t stride, int count) {
    map x = rule.identity();
    if (!inside) return x;
    constexpr int together = sizeof(map) <= 16 ? 8 : 1;
    for (int i = 0; i < count; i += together) {
      map part[together];
#pragma unroll
      for (int u = 0; u < together; ++u)
        part[u] = i + u < count ? slots.template take_channel<map>(level, first + (i + u) * stride, channel)
                                : rule.identity();
#pragma unroll
      for (int u = 0; u < together; ++u)
        if (i + u < count) x = i + u == 0 ? part[u] : rule(x, part[u]);
    }
    return x;
  };
  publish(0, total);
  std::int64_t const first_tile = number - p, first_group = number - p - 32 * q + 31;
  wait(0, first_tile, 1, p);
  map const tiles = sum(0, first_tile, 1, p);
  map group = total;
  if (p == 31) {
    group = rule(tiles, total);
    publish(1, group);
  }
  wait(1, first_group, 32, q);
  map const groups = sum(1, first_group, 32, q);
  state start{};
  if (at.place < 1024) {
    if (inside) start = rule.initial(at, channel);
  } else {
    wait(2, number - p - 32 * q - 1, 0, 1);
    if (inside) start = slots.template take_channel<state>(2, number - p - 32 * q - 1, channel);
  }
  state reached = start;
  if (inside && q > 0) reached = rule.advance(reached, groups);
  if (p == 31 && q == 31) publish(2, inside ? rule.advance(start, rule(groups, group)) : start);
  if (inside && p > 0) reached = rule.advance(reached, tiles);
  return reached;
}

/// A Rule for channels, of which each thread has one: map, state; steps (a thread's), warps, line, data;
///   identity(), initial(at, channel), op(map, map), advance(state, map)
///   start(at, channel) -> line
///   source(line, j).load<Full>(i) -> data                    for i = 0, 1, …: the elements j + i; Full: all steps of
///   target(line, j).emit<Full>(i, data, state) -> state      the thread exist
///   fold(data) -> map, append(map, data) -> map
///   final(at, line, channel, state)
template <class Rule, bool Split>
__global__ void __launch_bounds__(32 * Rule::warps, Rule::blocks_per_multiprocessor)
    scan_channels(Rule rule, sequences list, scan_slots<typename Rule::map> slots, std::int64_t channels,
                  unsigned channel_tiles) {
  using map = typename Rule::map;
  using state = typename Rule::state;
  constexpr int steps = Rule::steps, warps = Rule::warps;
  __shared__ value_array<map, 32 * warps> totals;
  __shared__ value_array<state, 32> gathered;
  int const lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y);
  unsigned const place = Split ? slots.take_ticket() : blockIdx.x;
  std::int64_t const tile = place % channel_tiles, number = place / channel_tiles;
  std::int64_t const channel = tile * 32 + lane;
  bool const inside = channel < channels;
  sequences::block at;
  if (!list.find(number, at)) return;
  auto const line = rule.start(at, inside ? channel : 0);
  if (at.length == 0) {
    if (warp == 0 && inside) rule.final(at, line, channel, rule.initial(at, channel));
    return;
  }
  state third{};
  if (!Split && inside) third = rule.initial(at, channel);
  map tiles = rule.identity(), groups = rule.identity();  // of this group so far, of this third level so far
  for (std::int64_t begin = at.begin; begin < at.end; begin += warps * steps) {
    std::int64_t const j = begin + warp * steps;
    int const count = inside ? static_cast<int>(max(std::int64_t{0}, min(std::int64_t{steps}, at.length - j))) : 0;
    bool const full = __all_sync(0xffffffffu, count == steps);
    typename Rule::data data[steps];
    map sum = rule.identity();
    auto from = rule.source(line, j);
    if (full) {
#pragma unroll
      for (int i = 0; i < steps; ++i) data[i] = from.template load<true>(i);
      sum = rule.fold(data[0]);
#pragma unroll
      for (int i = 1; i < steps; ++i) sum = rule.append(sum, data[i]);
    } else {
#pragma unroll
      for (int i = 0; i < steps; ++i)
        if (i < count) data[i] = from.template load<false>(i);
      if (count > 0) sum = rule.fold(data[0]);
#pragma unroll
      for (int i = 1; i < steps; ++i)
        if (i < count) sum = rule.append(sum, data[i]);
    }

    map ahead = rule.identity(), total = sum;
    if constexpr (warps > 1) {
      totals[warp * 32 + lane] = sum;
      __syncthreads();
      total = totals[lane];
#pragma unroll
      for (int w = 1; w < warps; ++w) {
        if (w == warp) ahead = total;
        total = rule(total, totals[w * 32 + lane]);
      }
    }

    state reached{};
    if constexpr (Split) {
      if (warp == 0) {
        reached = gather_channels(rule, slots, number, tile, at, total, channel, inside, lane);
        if constexpr (warps > 1) gathered[lane] = reached;
      }
      if constexpr (warps > 1) {
        __syncthreads();
        reached = gathered[lane];
      }
    } else if (inside) {
      std::int64_t const before = begin / (warps * steps);
      int const p = static_cast<int>(before & 31), q = static_cast<int>(before >> 5 & 31);
      reached = third;
      if (q > 0) reached = rule.advance(reached, groups);
      if (p > 0) reached = rule.advance(reached, tiles);
      tiles = p == 0 ? total : rule(tiles, total);
      if (p == 31) {
        groups = q == 0 ? tiles : rule(groups, tiles);
        if (q == 31) third = rule.advance(third, groups);
      }
    }
    if (warp > 0 && inside) reached = rule.advance(reached, ahead);
    auto to = rule.target(line, j);
    if (full) {
#pragma unroll
      for (int i = 0; i < steps; ++i) reached = to.template emit<true>(i, data[i], reached);
    } else {
#pragma unroll
      for (int i = 0; i < steps; ++i)
        if (i < count) reached = to.template emit<false>(i, data[i], reached);
    }
    if (count > 0 && j + count == at.length) rule.final(at, line, channel, reached);
    if constexpr (warps > 1) __syncthreads();
  }
}

template <class Rule, class Map = typename Rule::map>
void launch_scan_channels(char const* op, device::cuda const& policy, Rule const& rule, std::int64_t batch,
                          std::int64_t length, std::int64_t channels,
                          view<space::device, std::int64_t const, dyn> cu_seqlens,
                          view<space::device, Map, dyn, dyn> carries, view<space::device, std::int32_t, dyn> flags) {
  constexpr std::int64_t tile = Rule::warps * Rule::steps;
  static_assert(tile >= scan_tiles::of_channels<Map>);
  std::int64_t const channel_tiles = (channels + 31) / 32;
  std::int64_t const count = cu_seqlens.present() ? cu_seqlens.extent(0) - 1 : batch;
  bool const split = length > tile && count * channel_tiles < std::int64_t{properties().multiprocessors} *
                                                                  scan_sequences_per_multiprocessor;
  sequences const list(batch, length, cu_seqlens, split ? scan_shift(tile) : 62);
  scan_slots<Map> slots{};
  if (split) slots = empty_flags(op, policy, carries, flags, list.blocks(), channels, channel_tiles);
  launch(op, policy, {blocks_for(list.blocks() * channel_tiles, 1), dim3(32, static_cast<unsigned>(Rule::warps))},
         split ? scan_channels<Rule, true> : scan_channels<Rule, false>, rule, list, slots, channels,
         static_cast<unsigned>(channel_tiles));
}

}  // namespace blackmamba::cuda::detail
