#pragma once
#include <blackmamba/core/cpu/carry_chain.hpp>
#include <blackmamba/core/cpu/sequences.hpp>
#include <blackmamba/core/cpu/simd_lanes.hpp>
#include <blackmamba/ops/associative_scan/associative_scan_math.hpp>
#include <blackmamba/ops/associative_scan/scan_shape.hpp>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

/// The engine of this folder's CPU backends: scans of sequences in blocks, on one thread or many, with the same bits.
///
/// A block of a sequence is a value `total` (what its elements combine to) and a map from the `carry` that reaches it
/// to its results. The carry of the next block is advance(carry, total), however the results were computed; so blocks
/// can be given to any thread. A thread that finds its carry ready computes results and total in one pass. One that
/// does not computes the total first, hands the next carry on as soon as its own arrives, and reads the block again,
/// from cache.
///
/// A Kernel has types carry and total and, for a block b of a sequence q and a channel tile:
///   begin(q, tile, carry&)                  carry = the sequence's initial value
///   run<pass>(b, tile, carry&, total&)      total: computes total; apply: writes results and moves carry to the
///     block's
///                                           last element; both
///   advance(tile, carry&, total const&)
///   end(q, tile, carry const&)              the sequence's last value
///   give(number, tile, carry const&), take(number, tile, carry&)    through memory, under a block's number
namespace blackmamba::cpu::scan {

enum class pass { total, apply, both };

template <class Kernel>
void whole_sequence(sequences const& list, std::int64_t s, std::int64_t tile, Kernel const& kernel) {
  typename Kernel::carry carry;
  kernel.begin(list[s], tile, carry);
  list.blocks_of_sequence(s, [&](sequences::block const& b) {
    typename Kernel::total total;
    if (b.last()) {
      kernel.template run<pass::apply>(b, tile, carry, total);
      kernel.end(b.of, tile, carry);
    } else {
      typename Kernel::carry moving = carry;
      kernel.template run<pass::both>(b, tile, moving, total);
      kernel.advance(tile, carry, total);
    }
  });
}

template <class Kernel>
void one_block(sequences::block const& b, std::int64_t tile, std::int64_t tiles, carry_chain& chain,
               Kernel const& kernel) {
  std::int64_t const flag = b.number * tiles + tile;
  typename Kernel::carry carry;
  typename Kernel::total total;
  bool const ahead = !b.first() && !b.last() && !chain.ready(flag - tiles);
  if (ahead) kernel.template run<pass::total>(b, tile, carry, total);
  if (b.first()) {
    kernel.begin(b.of, tile, carry);
  } else {
    if (!chain.wait(flag - tiles)) return;
    kernel.take(b.number - 1, tile, carry);
  }
  if (b.last()) {
    kernel.template run<pass::apply>(b, tile, carry, total);
    kernel.end(b.of, tile, carry);
    return;
  }
  typename Kernel::carry moving = carry;
  if (!ahead) kernel.template run<pass::both>(b, tile, moving, total);
  kernel.advance(tile, carry, total);
  kernel.give(b.number, tile, carry);
  chain.publish(flag);
  if (ahead) kernel.template run<pass::apply>(b, tile, moving, total);
}

/// Scans every sequence in every channel tile. Which thread does what is chosen here; the results don't depend on it.
template <class Kernel>
void run(int threads, sequences const& list, std::int64_t tiles, host_view<std::int32_t, dyn> flags,
         Kernel const& kernel) {
  std::int64_t const workers = thread_count(threads), units = list.count() * tiles;
  bool const enough_sequences = list.longest() * 4 * workers <= list.steps() * tiles;
  if (workers == 1 || enough_sequences || !flags.present()) {
    for_in_order(threads, units, std::max<std::int64_t>(1, units / (16 * workers)),
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t u = begin; u < end; ++u) whole_sequence(list, u / tiles, u % tiles, kernel);
                 });
    return;
  }
  carry_chain chain(flags);
  for_in_order(threads, list.blocks() * tiles, 1, [&](std::int64_t i, std::int64_t) {
    try {
      list.blocks_in(i / tiles, i / tiles + 1,
                     [&](sequences::block const& b) { one_block(b, i % tiles, tiles, chain, kernel); });
    } catch (...) {
      chain.fail();
      throw;
    }
  });
}

// Packs, and maps of packs: what a pass does with several lanes at once.

using simd::broadcast_last;
using simd::end_of_lower_half;

template <int Distance, class T, int N>
BLACKMAMBA_INLINE affine<simd::pack<T, N>> end_of_lower_half(affine<simd::pack<T, N>> x) {
  return {simd::end_of_lower_half<Distance>(x.a), simd::end_of_lower_half<Distance>(x.b)};
}
template <class T, int N>
BLACKMAMBA_INLINE affine<simd::pack<T, N>> broadcast_last(affine<simd::pack<T, N>> x) {
  return {simd::broadcast_last(x.a), simd::broadcast_last(x.b)};
}
template <int Distance, class T, int N>
BLACKMAMBA_INLINE simd::pack<T, N> in_upper_halves(simd::pack<T, N> there, simd::pack<T, N> elsewhere) {
  return select(simd::upper_halves<Distance, simd::pack<T, N>>(), there, elsewhere);
}
template <int Distance, class T, int N>
BLACKMAMBA_INLINE affine<simd::pack<T, N>> in_upper_halves(affine<simd::pack<T, N>> there,
                                                           affine<simd::pack<T, N>> elsewhere) {
  return {in_upper_halves<Distance>(there.a, elsewhere.a), in_upper_halves<Distance>(there.b, elsewhere.b)};
}

/// Lane i = x[0] . … . x[i] in log2(Lanes) steps (Sklansky, 1960): in each, what the lower half of a group came to goes
/// to every lane of the upper half. Of the networks of that depth it needs the shuffles that processors do fastest.
template <int Lanes, int Distance = 1, class Operator, class Wide>
BLACKMAMBA_INLINE Wide scan_lanes(Operator const& op, Wide x) {
  if constexpr (Distance >= Lanes)
    return x;
  else
    return scan_lanes<Lanes, 2 * Distance>(op, in_upper_halves<Distance>(op(end_of_lower_half<Distance>(x), x), x));
}

/// Lane i = row[at + i], or `outside` where that lies outside [0, length). Out of line: it is for the ends of rows, and
/// loops should not carry it.
template <class V, class S>
[[gnu::noinline]] V load_edge(S const* row, std::int64_t length, std::int64_t at, typename V::value_type outside) {
  typename V::value_type lane[V::size];
  V(outside).store(lane);
  std::int64_t const last = std::min<std::int64_t>(V::lanes, length - at);
  for (std::int64_t i = std::max<std::int64_t>(0, -at); i < last; ++i) lane[i] = widen(row[at + i]);
  return V::load(lane);
}
/// row[at + i] = lane i, where that lies inside [0, length).
template <class V, class S>
[[gnu::noinline]] void store_edge(V x, S* row, std::int64_t length, std::int64_t at) {
  S lane[V::size];
  x.store(lane);
  std::int64_t const last = std::min<std::int64_t>(V::lanes, length - at);
  for (std::int64_t i = std::max<std::int64_t>(0, -at); i < last; ++i) row[at + i] = lane[i];
}

/// One row of a sequence as it is visited: element j is row[j], or in reverse row[length - 1 - j].
template <class T, bool Reverse>
struct line {
  T* row;
  std::int64_t length;

  template <class View>
  line(View const& v, sequences::sequence const& q) : row(v.row(q.batch) + q.first), length(q.length) {}
  /// Lane i = element j + i. At an edge, `outside` where there is none.
  template <class V, bool Edge>
  BLACKMAMBA_INLINE V load(std::int64_t j, typename V::value_type outside) const {
    std::int64_t const at = Reverse ? length - V::lanes - j : j;
    V const x = Edge ? load_edge<V>(row, length, at, outside) : V::load(row + at);
    return Reverse ? simd::reverse_lanes(x) : x;
  }
  template <bool Edge, class V>
  BLACKMAMBA_INLINE void store(V x, std::int64_t j, bool past_cache) const {
    std::int64_t const at = Reverse ? length - V::lanes - j : j;
    if (Reverse) x = simd::reverse_lanes(x);
    if (Edge)
      store_edge(x, row, length, at);
    else
      simd::store(x, row + at, past_cache);
  }
};

/// Rows, several elements of one at a time. A Rule says what is scanned:
///   Wide, lanes, op, identity()             Wide: a pack, or a struct of packs
///   at(q) -> lines                          where a sequence stands: lines has
///     load<Edge>(j)                           elements j, j + 1, …; the identity past the end
///     emit<Edge>(j, inclusive, before)        their results, and the carry that reached them
///   margin                                  how far beyond its elements load or emit looks; what reaches over an end
///     of
///                                           the sequence is an edge
///   carried(Wide) -> Wide                   what of a result is carried on
///   initial(q) -> Wide, in every lane; final(q, Wide); advance(carry, total); give(number, Wide), take(number) -> Wide
template <class Rule>
struct row_kernel {
  using Wide = typename Rule::Wide;
  struct value {
    Wide x;
  };
  using carry = value;
  using total = value;

  Rule const& rule;

  void begin(sequences::sequence const& q, std::int64_t, carry& c) const { c.x = rule.initial(q); }
  void end(sequences::sequence const& q, std::int64_t, carry const& c) const { rule.final(q, c.x); }
  void advance(std::int64_t, carry& c, total const& t) const { c.x = rule.advance(c.x, t.x); }
  void give(std::int64_t number, std::int64_t, carry const& c) const { rule.give(number, c.x); }
  void take(std::int64_t number, std::int64_t, carry& c) const { c.x = rule.take(number); }

  template <pass Pass>
  [[gnu::noinline]] void run(sequences::block const& b, std::int64_t, carry& c, total& t) const {
    auto const lines = rule.at(b.of);
    if constexpr (Pass != pass::apply) t.x = rule.identity();
    std::int64_t const inner_begin =
        std::max<std::int64_t>(b.begin, Rule::margin > 0 && b.begin == 0 ? Rule::lanes : 0);
    std::int64_t const inner_end =
        inner_begin + std::max<std::int64_t>(0, std::min(b.end, b.of.length - Rule::margin) - inner_begin) /
                          Rule::lanes * Rule::lanes;
    if (inner_begin > b.begin) range<Pass, true>(lines, b.begin, std::min(inner_begin, b.end), c, t);
    range<Pass, false>(lines, inner_begin, inner_end, c, t);
    if (inner_end < b.end) range<Pass, true>(lines, inner_end, b.end, c, t);
    if (Pass != pass::total && rule.past_cache) simd::finish_stores();
  }

 private:
  template <pass Pass, bool Edge, class Lines>
  BLACKMAMBA_INLINE void range(Lines const& lines, std::int64_t begin, std::int64_t end, carry& c, total& t) const {
    auto const op = rule.op;
    Wide const identity = rule.identity();
    [[maybe_unused]] Wide reached = Pass != pass::total ? c.x : identity, sum = Pass != pass::apply ? t.x : identity;
    for (std::int64_t j = begin; j < end; j += Rule::lanes) {
      Wide const x = scan_lanes<Rule::lanes>(op, lines.template load<Edge>(j));
      Wide const last = broadcast_last(x);
      if constexpr (Pass != pass::total) {
        lines.template emit<Edge>(j, op(reached, x), reached);
        reached = op(reached, last);
      }
      if constexpr (Pass != pass::apply) sum = op(sum, last);
    }
    if constexpr (Pass != pass::total) c.x = rule.carried(reached);
    if constexpr (Pass != pass::apply) t.x = sum;
  }
};

/// Channels of a (B, L, D) tensor from element j of a sequence on, as they are visited.
template <class T>
struct column {
  T* start;
  std::int64_t stride;

  template <class View>
  column(View const& v, sequences::sequence const& q, std::int64_t j, std::int64_t channel, bool reverse)
      : start(v.row(q.batch, q.first + (reverse ? q.length - 1 - j : j)) + channel),
        stride(reverse ? -v.stride(1) : v.stride(1)) {}
  /// Channel d of the i-th element.
  BLACKMAMBA_INLINE T* operator()(std::int64_t i, std::int64_t d) const { return start + i * stride + d; }
};

/// Calls body(d, integral_constant<N>) over [d, end) in packs of N, then of N/2, … 1: no partial packs.
template <int N, class Body>
BLACKMAMBA_INLINE void for_narrowing_packs(std::int64_t d, std::int64_t end, Body&& body) {
  for (; d + N <= end; d += N) body(d, std::integral_constant<int, N>{});
  if constexpr (N > 1)
    if (d < end) for_narrowing_packs<N / 2>(d, end, body);
}

/// Channels, several at a time, and a few steps of each before the next ones: carries go through the first-level cache
/// once in a few steps, and the steps that follow are fetched ahead, for no hardware guesses an order by columns.
/// A Rule says what is scanned:
///   lanes, tile, op; carry, total with get<N>(d), put<N>(d, x) for d in [0, tile); clear(width, total&)
///   at(q, j, d0) -> place           where channels d0, d0 + 1, … of elements j, j + 1, … stand: place has
///     load<N>(i, d); emit<N>(i, d, inclusive, before); fetch(i, d), for channel d0 + d of element j + i
///   initial(q, d0, width, carry&), final(…), advance(width, carry&, total), give(number, d0, width, carry), take(…)
template <class Rule>
struct channel_kernel {
  using carry = typename Rule::carry;
  using total = typename Rule::total;

  Rule const& rule;
  std::int64_t channels;

  std::int64_t first(std::int64_t tile) const { return tile * Rule::tile; }
  std::int64_t width(std::int64_t tile) const { return std::min<std::int64_t>(Rule::tile, channels - first(tile)); }

  void begin(sequences::sequence const& q, std::int64_t tile, carry& c) const {
    rule.initial(q, first(tile), width(tile), c);
  }
  void end(sequences::sequence const& q, std::int64_t tile, carry const& c) const {
    rule.final(q, first(tile), width(tile), c);
  }
  void advance(std::int64_t tile, carry& c, total const& t) const { rule.advance(width(tile), c, t); }
  void give(std::int64_t number, std::int64_t tile, carry const& c) const {
    rule.give(number, first(tile), width(tile), c);
  }
  void take(std::int64_t number, std::int64_t tile, carry& c) const { rule.take(number, first(tile), width(tile), c); }

  template <pass Pass>
  [[gnu::noinline]] void run(sequences::block const& b, std::int64_t tile, carry& c, total& t) const {
    if constexpr (Pass != pass::apply) rule.clear(width(tile), t);
    // These steps and those fetched ahead stay in the first-level cache; the results don't depend on their number.
    std::int64_t const together = std::clamp<std::int64_t>(1024 / width(tile), 4, 16);
    for (std::int64_t j = b.begin; j < b.end; j += together) {
      std::int64_t const steps = std::min(together, b.end - j);
      std::int64_t const ahead = std::min(together, b.of.length - j - steps);
      auto const here = rule.at(b.of, j, first(tile));
      for_narrowing_packs<Rule::lanes>(0, width(tile), [&](std::int64_t d, auto lanes) {
        constexpr int N = decltype(lanes)::value;
        auto reached = get<N, Pass != pass::total>(c, d);
        auto sum = get<N, Pass != pass::apply>(t, d);
        for (std::int64_t i = 0; i < ahead; ++i) here.fetch(steps + i, d);
        for (std::int64_t i = 0; i < steps; ++i) {
          auto const x = here.template load<N>(i, d);
          if constexpr (Pass != pass::total) {
            auto const before = reached;
            reached = rule.op(reached, x);
            here.template emit<N>(i, d, reached, before);
          }
          if constexpr (Pass != pass::apply) sum = rule.op(sum, x);
        }
        if constexpr (Pass != pass::total) c.template put<N>(d, reached);
        if constexpr (Pass != pass::apply) t.template put<N>(d, sum);
      });
    }
    if (Pass != pass::total && rule.past_cache) simd::finish_stores();
  }

 private:
  /// What stands there, or where this pass has no use for it nothing in particular.
  template <int N, bool Wanted, class Values>
  static BLACKMAMBA_INLINE auto get(Values const& from, std::int64_t d) {
    if constexpr (Wanted)
      return from.template get<N>(d);
    else
      return decltype(from.template get<N>(d)){};
  }
};

}  // namespace blackmamba::cpu::scan
