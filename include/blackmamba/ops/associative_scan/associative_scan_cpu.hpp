#pragma once
#include <blackmamba/ops/associative_scan/associative_scan.hpp>
#include <blackmamba/ops/associative_scan/scan_blocks_cpu.hpp>

#include <algorithm>
#include <array>
#include <cstdint>

namespace blackmamba {

template <>
struct backend<associative_scan, device::cpu> {
  using flags = host_view<std::int32_t, dyn>;
  using sequence = cpu::sequences::sequence;
  using block = cpu::sequences::block;

  template <class Operator, class X, class Y, class E>
  static void forward(device::cpu const& policy, Operator const& op, host_view<X const, dyn, dyn> x,
                      host_view<Y, dyn, dyn> y, associative_scan::options<device::cpu, E, 2> const& how,
                      host_view<E, dyn, dyn> carries, flags ready) {
    cpu::sequences const list("associative_scan", y.extent(0), y.extent(1), how.cu_seqlens, scan_blocks::of_rows<E>());
    auto const scan = [&]<class Kernel>(Kernel const& kernel) {
      cpu::scan::run(policy.threads, list, 1, ready, kernel);
    };
    if constexpr (vectorised<Operator, E, X, Y>) {
      auto const scan_packs = [&]<bool Reverse>(std::bool_constant<Reverse>) {
        using rule_type = pack_rows<Operator, E, X, Y, Reverse>;
        rule_type const rule{op, x, y, how, carries, large(y)};
        scan(cpu::scan::row_kernel<rule_type>{rule});
      };
      how.reverse ? scan_packs(std::true_type{}) : scan_packs(std::false_type{});
    } else {
      scan(element_rows<Operator, E, X, Y>{op, x, y, how, carries});
    }
  }
  template <class Operator, class X, class Y, class E>
  static void forward(device::cpu const& policy, Operator const& op, host_view<X const, dyn, dyn, dyn> x,
                      host_view<Y, dyn, dyn, dyn> y, associative_scan::options<device::cpu, E, 3> const& how,
                      host_view<E, dyn, dyn> carries, flags ready) {
    std::int64_t const channels = y.extent(2), tile = scan_blocks::channel_tile<E>;
    cpu::sequences const list("associative_scan", y.extent(0), y.extent(1), how.cu_seqlens,
                              scan_blocks::of_channels<E>(channels));
    using rule_type = channel_rule<Operator, E, X, Y>;
    rule_type const rule{op, x, y, how, carries, vectorised<Operator, E, X, Y> && large(y)};
    cpu::scan::run(policy.threads, list, (channels + tile - 1) / tile, ready,
                   cpu::scan::channel_kernel<rule_type>{rule, channels});
  }

  /// A pass of the gradient over each step and channel of each sequence.
  template <class Work>
  static void backward(device::cpu const& policy, Work const& work) {
    std::int64_t const channels = work.y.extent(2);
    cpu::sequences const list("associative_scan.backward", work.y.extent(0), work.y.extent(1), work.cu_seqlens,
                              std::max<std::int64_t>(1, 4096 / channels));
    cpu::parallel_for(policy.threads, list.blocks(), 1, [&](std::int64_t begin, std::int64_t end) {
      list.blocks_in(begin, end, [&](block const& b) {
        if (b.of.length == 0)
          for (std::int64_t d = 0; d < channels; ++d) work.empty(b.of, d);
        else
          work.exclusive ? gradient_block<true>(work, b, channels) : gradient_block<false>(work, b, channels);
      });
    });
  }

  template <class Operator, class X, class Y, class E>
  static void step(device::cpu const& policy, Operator const& op, host_view<X const, dyn, dyn> x,
                   host_view<E, dyn, dyn> state, host_view<Y, dyn, dyn> y) {
    std::int64_t const channels = y.extent(1);
    cpu::parallel_for(policy.threads, y.extent(0), std::max<std::int64_t>(1, 4096 / channels),
                      [&](std::int64_t begin, std::int64_t end) {
                        for (std::int64_t b = begin; b < end; ++b)
                          for (std::int64_t d = 0; d < channels; ++d) {
                            E const next = op(state(b, d), converted<E>(x(b, d)));
                            state(b, d) = next;
                            y(b, d) = converted<Y>(next);
                          }
                      });
  }

 private:
  /// The first step and the last ask questions, those between do not.
  template <bool Exclusive, class Work>
  static void gradient_block(Work const& work, block const& b, std::int64_t channels) {
    auto const steps = work.at(b.of);
    auto const all = [&]<bool Edge>(std::bool_constant<Edge>, std::int64_t begin, std::int64_t end) {
      if (channels == 1)
        for (std::int64_t j = begin; j < end; ++j) work.step(b.of, steps, j, 0, Exclusive, Edge);
      else
        for (std::int64_t j = begin; j < end; ++j)
          for (std::int64_t d = 0; d < channels; ++d) work.step(b.of, steps, j, d, Exclusive, Edge);
    };
    std::int64_t const last = b.of.length - 1, inner = std::max<std::int64_t>(b.begin, 1);
    if (b.first()) all(std::true_type{}, 0, 1);
    all(std::false_type{}, inner, std::min(b.end, last));
    if (b.last() && last > 0) all(std::true_type{}, last, b.end);
  }

  template <class Operator, class E, class X, class Y>
  static constexpr bool vectorised = [] {
    if constexpr (requires { Operator::lane_wise; })
      return Operator::lane_wise && std::is_floating_point_v<E> && storage<X> && storage<Y>;
    else
      return false;
  }();
  template <class View>
  static bool large(View const& v) {
    return v.size() * static_cast<std::int64_t>(sizeof(typename View::value_type)) >= simd::past_cache_bytes;
  }

  template <class To, class From>
  static BLACKMAMBA_INLINE To converted(From const& value) {
    if constexpr (std::is_same_v<To, From>)
      return value;
    else if constexpr (storage<To> && storage<From>)
      return convert<To>(value);
    else
      return static_cast<To>(value);
  }

  /// Rows of float or double elements, a pack at a time.
  template <class Operator, class E, class X, class Y, bool Reverse>
  struct pack_rows {
    using Wide = simd::pack<E>;
    static constexpr int lanes = Wide::lanes;

    Operator const& op;
    host_view<X const, dyn, dyn> x;
    host_view<Y, dyn, dyn> y;
    associative_scan::options<device::cpu, E, 2> const& how;
    host_view<E, dyn, dyn> carries;
    bool past_cache;

    Wide identity() const { return op.identity(); }
    static Wide carried(Wide value) { return value; }
    static constexpr std::int64_t margin = 0;
    struct lines {
      cpu::scan::line<X const, Reverse> x;
      cpu::scan::line<Y, Reverse> y;
      E identity;
      bool exclusive, past_cache;
      template <bool Edge>
      BLACKMAMBA_INLINE Wide load(std::int64_t j) const {
        return x.template load<Wide, Edge>(j, identity);
      }
      template <bool Edge>
      BLACKMAMBA_INLINE void emit(std::int64_t j, Wide inclusive, Wide before) const {
        y.template store<Edge>(exclusive ? simd::move_up<1>(before, inclusive) : inclusive, j, past_cache);
      }
    };
    lines at(sequence const& q) const { return {{x, q}, {y, q}, op.identity(), how.exclusive, past_cache}; }
    Wide initial(sequence const& q) const { return how.initial.present() ? how.initial(q.index) : op.identity(); }
    void final(sequence const& q, Wide value) const {
      if (how.total.present()) how.total(q.index) = value[0];
    }
    Wide advance(Wide carry, Wide total) const { return op(carry, total); }
    void give(std::int64_t number, Wide carry) const { carries(number, 0) = carry[0]; }
    Wide take(std::int64_t number) const { return carries(number, 0); }
  };

  /// Rows of any elements: a block is cut into streams that advance side by side, for one combination waits for the
  /// result of the one before.
  template <class Operator, class E, class X, class Y>
  struct element_rows {
    static constexpr std::size_t streams = sizeof(E) <= 8 ? 8 : 4;
    struct carry {
      E value;
    };
    struct total {
      E value;
      std::array<E, streams> before;  ///< what each stream's elements have on their left
      bool known = false;
    };

    Operator const& op;
    host_view<X const, dyn, dyn> x;
    host_view<Y, dyn, dyn> y;
    associative_scan::options<device::cpu, E, 2> const& how;
    host_view<E, dyn, dyn> carries;

    void begin(sequence const& q, std::int64_t, carry& c) const {
      c.value = how.initial.present() ? how.initial(q.index) : op.identity();
    }
    void end(sequence const& q, std::int64_t, carry const& c) const {
      if (how.total.present()) how.total(q.index) = c.value;
    }
    void advance(std::int64_t, carry& c, total const& t) const { c.value = op(c.value, t.value); }
    void give(std::int64_t number, std::int64_t, carry const& c) const { carries(number, 0) = c.value; }
    void take(std::int64_t number, std::int64_t, carry& c) const { c.value = carries(number, 0); }

    template <cpu::scan::pass Pass>
    [[gnu::noinline]] void run(block const& b, std::int64_t, carry& c, total& t) const {
      std::int64_t const length = b.end - b.begin;
      std::int64_t const place = b.of.first + (how.reverse ? b.of.length - 1 - b.begin : b.begin);
      X const* const from = x.row(b.of.batch) + place;
      Y* const to = y.row(b.of.batch) + place;
      std::int64_t const step = how.reverse ? -1 : 1;
      Operator const combine = op;
      if (Pass != cpu::scan::pass::apply || (!t.known && length >= shortest)) {
        std::array<E, streams> value;
        value.fill(combine.identity());
        auto const fetch = [&](std::int64_t j) { simd::prefetch(from + j * step); };
        over_streams(length, value, fetch, [&](std::int64_t j, E& v) {
          v = combine(v, converted<E>(from[j * step]));
        });
        t.value = combine.identity();
        for (std::size_t s = 0; s < streams; ++s) {
          t.before[s] = t.value;
          t.value = combine(t.value, value[s]);
        }
        t.known = true;
      }
      if constexpr (Pass != cpu::scan::pass::total) {
        std::array<E, streams> value;
        value.fill(c.value);
        if (length >= shortest)
          for (std::size_t s = 1; s < streams; ++s) value[s] = combine(c.value, t.before[s]);
        auto const fetch = [&](std::int64_t j) { simd::prefetch_to_write(to + j * step); };
        if (how.exclusive)
          over_streams(length, value, fetch, [&](std::int64_t j, E& v) {
            E const element = converted<E>(from[j * step]);
            to[j * step] = converted<Y>(v);
            v = combine(v, element);
          });
        else
          over_streams(length, value, fetch, [&](std::int64_t j, E& v) {
            v = combine(v, converted<E>(from[j * step]));
            to[j * step] = converted<Y>(v);
          });
        c.value = value[length >= shortest ? streams - 1 : 0];
      }
    }

    /// Blocks shorter than this are one stream.
    static constexpr std::int64_t shortest = 16 * static_cast<std::int64_t>(streams);

    /// body(j, value of its stream) for each element j of the block; within a stream in order. Streams are as long, but
    /// for the last; long ones an odd number of lines, or else they would meet in the same places of the cache.
    /// fetch(j) runs ahead, once in a few elements, for no hardware follows so many short streams.
    template <class Fetch, class Body>
    static BLACKMAMBA_INLINE void over_streams(std::int64_t length, std::array<E, streams>& value, Fetch&& fetch,
                                               Body&& body) {
      if (length < shortest) {
        E v = value[0];
        for (std::int64_t j = 0; j < length; ++j) body(j, v);
        value[0] = v;
        return;
      }
      constexpr auto count = static_cast<std::int64_t>(streams);
      constexpr std::int64_t line = std::max<std::int64_t>(1, 64 / static_cast<std::int64_t>(sizeof(X)));
      std::int64_t each = (length + count - 1) / count;
      if (each >= 16 * line) each = ((each + line - 1) / line | 1) * line;
      std::int64_t const last = length - (count - 1) * each;
      [&]<std::size_t... S>(std::index_sequence<S...>) {
        E v[streams] = {value[S]...};
        for (std::int64_t j = 0; j < last;) {
          (fetch(j + 8 * line + static_cast<std::int64_t>(S) * each), ...);
          for (std::int64_t const stop = std::min(last, j + line); j < stop; ++j)
            (body(j + static_cast<std::int64_t>(S) * each, v[S]), ...);
        }
        for (std::int64_t j = last; j < each; ++j)
          ((S + 1 < streams ? body(j + static_cast<std::int64_t>(S) * each, v[S]) : void()), ...);
        ((value[S] = v[S]), ...);
      }(std::make_index_sequence<streams>{});
    }
  };

  /// Channels: packs where the operator takes them, else one element at a time.
  template <class Operator, class E, class X, class Y>
  struct channel_rule {
    static constexpr bool packs = vectorised<Operator, E, X, Y>;
    static constexpr std::int64_t tile = scan_blocks::channel_tile<E>;
    static constexpr int lanes = [] {
      if constexpr (packs)
        return simd::pack<E>::lanes;
      else
        return 1;
    }();

    struct carry {
      alignas(64) std::array<E, static_cast<std::size_t>(tile)> value;
      template <int N>
      auto get(std::int64_t d) const {
        if constexpr (packs)
          return simd::pack<E, N>::load(value.data() + d);
        else
          return value[static_cast<std::size_t>(d)];
      }
      template <int N, class Wide>
      void put(std::int64_t d, Wide const& w) {
        if constexpr (packs)
          w.store(value.data() + d);
        else
          value[static_cast<std::size_t>(d)] = w;
      }
    };
    using total = carry;

    Operator const& op;
    host_view<X const, dyn, dyn, dyn> x;
    host_view<Y, dyn, dyn, dyn> y;
    associative_scan::options<device::cpu, E, 3> const& how;
    host_view<E, dyn, dyn> carries;
    bool past_cache;

    struct place {
      cpu::scan::column<X const> x;
      cpu::scan::column<Y> y;
      bool exclusive, past_cache;
      template <int N>
      BLACKMAMBA_INLINE auto load(std::int64_t i, std::int64_t d) const {
        if constexpr (packs)
          return simd::pack<E, N>::load(x(i, d));
        else
          return converted<E>(*x(i, d));
      }
      template <int N, class Wide>
      BLACKMAMBA_INLINE void emit(std::int64_t i, std::int64_t d, Wide const& inclusive, Wide const& before) const {
        Wide const result = exclusive ? before : inclusive;
        if constexpr (packs)
          simd::store(result, y(i, d), past_cache);
        else
          *y(i, d) = converted<Y>(result);
      }
      BLACKMAMBA_INLINE void fetch(std::int64_t i, std::int64_t d) const { simd::prefetch(x(i, d)); }
    };
    place at(sequence const& q, std::int64_t j, std::int64_t d0) const {
      return {{x, q, j, d0, how.reverse}, {y, q, j, d0, how.reverse}, how.exclusive, past_cache};
    }
    void initial(sequence const& q, std::int64_t d0, std::int64_t width, carry& c) const {
      how.initial.present() ? std::copy_n(how.initial.row(q.index) + d0, width, c.value.data())
                            : std::fill_n(c.value.data(), width, op.identity());
    }
    void final(sequence const& q, std::int64_t d0, std::int64_t width, carry const& c) const {
      if (how.total.present()) std::copy_n(c.value.data(), width, how.total.row(q.index) + d0);
    }
    void clear(std::int64_t width, total& t) const { std::fill_n(t.value.data(), width, op.identity()); }
    void advance(std::int64_t width, carry& c, total const& t) const {
      for (std::size_t d = 0; d < static_cast<std::size_t>(width); ++d) c.value[d] = op(c.value[d], t.value[d]);
    }
    void give(std::int64_t number, std::int64_t d0, std::int64_t width, carry const& c) const {
      std::copy_n(c.value.data(), width, carries.row(number) + d0);
    }
    void take(std::int64_t number, std::int64_t d0, std::int64_t width, carry& c) const {
      std::copy_n(carries.row(number) + d0, width, c.value.data());
    }
  };
};

}  // namespace blackmamba
