#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/sequences.hpp>
#include <blackmamba/core/cpu/simd_lanes.hpp>
#include <blackmamba/core/math.hpp>
#include <blackmamba/ops/causal_conv1d/causal_conv1d.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace blackmamba {

/// Tasks are blocks of steps of one sequence times tiles of channels. Within one, a few steps of a pack of channels are
/// done before the next pack's, with the last K inputs (backward: and gradients) in registers: few lines of memory are
/// open at a time, what the steps have in common is loaded once for them, and the steps that follow are fetched ahead,
/// for no hardware guesses such an order.
template <>
struct backend<causal_conv1d, device::cpu> {
  template <class Inputs, class T>
  static void forward(device::cpu const& policy, Inputs const& in, host_view<T, dyn, dyn, dyn> y,
                      host_view<T, dyn, dyn, dyn> final_state) {
    cpu::sequences const list("causal_conv1d", y.extent(0), y.extent(1), in.cu_seqlens, steps_per_task);
    bool const large = y.size() * static_cast<std::int64_t>(sizeof(T)) >= simd::past_cache_bytes;
    with_taps(in.weight, [&]<int K>() {
      using V = simd::pack<accum_t<T>>;
      for_tiles(policy, list, y.extent(2), [&](block const& at, std::int64_t first, std::int64_t width) {
        taps<V, K> const w(in.weight, in.bias, first, width);
        bool const silu = in.silu;
        for (std::int64_t t = at.begin; t < at.end; t += steps_together) {
          std::int64_t const steps = std::min(steps_together, at.end - t);
          std::int64_t const ahead = std::min(steps_together, at.of.length - t - steps);
          auto const before = rows_before<K, T>(in, at, t, first);
          rows<T const> const x(in.x, at, t, first);
          rows<T> const result(y, at, t, first);
          simd::for_packs<V::lanes>(width, [&](std::int64_t d, auto lanes) {
            auto const tap = w.at(d);
            window<V, K> past;
            read(before, d, lanes, past);
            for (std::int64_t i = 0; i < ahead; ++i) simd::prefetch(x(steps + i, d));
            for (std::int64_t i = 0; i < steps; ++i) {
              shift(past, simd::load<V>(x(i, d), lanes));
              V const p = tap.apply(past);
              put(silu ? math::silu(p) : p, result(i, d), lanes, large);
            }
          });
        }
        if (final_state.present() && at.last()) {
          auto const last = rows_before<K, T>(in, at, at.end, first);
          for (std::size_t k = 0; k + 1 < K; ++k)
            copy_row(last[k], final_state.row(at.of.index, static_cast<std::int64_t>(k)) + first, width);
        }
        if (large) simd::finish_stores();
      });
    });
  }

  /// With g = d_p, going forward in time: d_x[t - (K-1)] = sum over k of weight[k] g[t - k], where the g of K steps are
  /// at hand once step t is done. Times before the sequence are the initial state's; what the final state's gradient
  /// adds is that of the input which it holds.
  template <class Inputs, class Gradients, class A>
  static void backward(device::cpu const& policy, Inputs const& in, Gradients const& d,
                       host_view<A, dyn, dyn, dyn> partial) {
    using T = typename decltype(Gradients::d_x)::value_type;
    std::int64_t const channels = in.x.extent(2);
    cpu::sequences const list("causal_conv1d.backward", in.x.extent(0), in.x.extent(1), in.cu_seqlens,
                              causal_conv1d::steps_per_partial);
    bool const large = d.d_x.size() * static_cast<std::int64_t>(sizeof(T)) >= simd::past_cache_bytes;
    // Packed sequences leave gaps in the numbering of blocks.
    if (in.cu_seqlens.present()) std::fill_n(partial.data(), partial.size(), A(0));
    with_taps(in.weight, [&]<int K>() {
      using V = simd::pack<A>;
      for_tiles(policy, list, channels, [&](block const& at, std::int64_t first, std::int64_t width) {
        taps<V, K> const w(in.weight, in.bias, first, width);
        columns<A, K> sums;    // of d_weight; what d_bias gets is in d_bias
        columns<A, K> recent;  // g of the last K-1 steps
        columns<A, 1> d_bias;
        std::int64_t const length = at.of.length;
        // K-1 steps beyond the block belong to the next one; here they complete d_x.
        for (std::int64_t t = at.begin; t < at.end + K - 1; t += steps_together) {
          std::int64_t const steps = std::min(steps_together, at.end + K - 1 - t);
          std::int64_t const known = std::clamp<std::int64_t>(length - t, 0, steps);  // steps with an input
          std::int64_t const own = std::clamp<std::int64_t>(at.end - t, 0, steps);
          std::int64_t const ahead = std::clamp<std::int64_t>(length - t - steps, 0, steps_together);
          auto const before = rows_before<K, T>(in, at, t, first);
          rows<T const> const x(in.x, at, t, first), d_y(in.d_y, at, t, first);
          std::array<T*, steps_together> result;
          std::array<T const*, steps_together> held;
          for (std::int64_t i = 0; i < steps; ++i) {
            auto const [to, from] = gradient_rows<K>(in, d, at, t + i - (K - 1), first);
            result[static_cast<std::size_t>(i)] = to;
            held[static_cast<std::size_t>(i)] = from;
          }
          bool const silu = in.silu;
          simd::for_packs<V::lanes>(width, [&](std::int64_t c, auto lanes) {
            auto const tap = w.at(c);
            window<V, K> past, g, sum;
            read(before, c, lanes, past);
            g[0] = 0;  // shifted out
            for (int k = 1; k < K; ++k) g[k] = recent.template at<V>(k, c);
            for (int k = 0; k < K; ++k) sum[k] = sums.template at<V>(k, c);
            V bias_sum = d_bias.template at<V>(0, c);
            for (std::int64_t i = 0; i < ahead; ++i) {
              simd::prefetch(x(steps + i, c));
              simd::prefetch(d_y(steps + i, c));
            }
            for (std::int64_t i = 0; i < steps; ++i) {
              V d_p = 0;
              if (i < known) {
                shift(past, simd::load<V>(x(i, c), lanes));
                d_p = simd::load<V>(d_y(i, c), lanes);
                if (silu) d_p *= math::silu_derivative(tap.apply(past));
              }
              if (i < own) {
                for (int k = 0; k < K; ++k) sum[k] = fma(d_p, past[k], sum[k]);
                bias_sum += d_p;
              }
              shift(g, d_p);
              T* const to = result[static_cast<std::size_t>(i)];
              if (to == nullptr) continue;
              V d_x = 0;
              for (int k = 0; k < K; ++k) d_x = fma(tap.weight[k], g[K - 1 - k], d_x);
              if (T const* const from = held[static_cast<std::size_t>(i)]) d_x += simd::load<V>(from + c, lanes);
              put(d_x, to + c, lanes, large);
            }
            for (int k = 1; k < K; ++k) g[k].store(recent.at(k, c));
            for (int k = 0; k < K; ++k) sum[k].store(sums.at(k, c));
            bias_sum.store(d_bias.at(0, c));
          });
        }
        for (int k = 0; k < K; ++k) std::copy_n(sums.at(k, 0), width, partial.row(at.number, k) + first);
        std::copy_n(d_bias.at(0, 0), width, partial.row(at.number, K) + first);
        if (large) simd::finish_stores();
      });
      cpu::parallel_for(policy.threads, channels, tile, [&](std::int64_t begin, std::int64_t end) {
        for (int k = 0; k <= K; ++k) {
          if (k == K && !d.d_bias.present()) continue;
          auto const at = [&](std::int64_t c) -> A& { return k < K ? d.d_weight(c, k) : d.d_bias(c); };
          for (std::int64_t first = begin; first < end; first += tile) {
            std::int64_t const width = std::min(tile, end - first);
            columns<A, 1> total;
            for (std::int64_t c = 0; c < width; ++c) *total.at(0, c) = at(first + c);
            for (std::int64_t b = 0; b < partial.extent(0); ++b) {
              A const* const part = partial.row(b, k) + first;
              for (std::int64_t c = 0; c < width; ++c) *total.at(0, c) += part[c];
            }
            for (std::int64_t c = 0; c < width; ++c) at(first + c) = *total.at(0, c);
          }
        }
      });
    });
  }

  template <class T>
  static void step(device::cpu const& policy, causal_conv1d::step_inputs<device::cpu, T> const& in,
                   host_view<T, dyn, dyn, dyn> state, host_view<T, dyn, dyn> y) {
    steps(policy,
          causal_conv1d::token_inputs<device::cpu, T>{
              .x = as_one_token(in.x), .weight = in.weight, .bias = in.bias, .silu = in.silu, .slots = in.slots},
          state, as_one_token(y));
  }
  template <class T>
  static void steps(device::cpu const& policy, causal_conv1d::token_inputs<device::cpu, T> const& in,
                    host_view<T, dyn, dyn, dyn> state, host_view<T, dyn, dyn, dyn> y) {
    using V = simd::pack<accum_t<T>>;
    std::int64_t const batch = y.extent(0), length = y.extent(1), channels = y.extent(2);
    std::int64_t const tiles = (channels + tile - 1) / tile;
    bool const silu = in.silu;
    with_taps(in.weight, [&]<int K>() {
      // Tasks in the order (tile, batch): one reading of the taps serves the batch.
      cpu::parallel_for(policy.threads, batch * tiles, 16, [&](std::int64_t begin, std::int64_t end) {
        while (begin < end) {
          std::int64_t const first = begin / batch * tile, width = std::min(tile, channels - first);
          taps<V, K> const w(in.weight, in.bias, first, width);
          for (std::int64_t const stop = std::min(end, (begin / batch + 1) * batch); begin < stop; ++begin) {
            std::int64_t const b = begin % batch, slot = slot_of(in.slots, b, state.extent(0));
            if (slot < 0) continue;
            simd::for_packs<V::lanes>(width, [&](std::int64_t d, auto lanes) {
              std::int64_t const channel = first + d;
              auto const leave = [&](window<V, K> const& past, std::int64_t row) {
                for (int k = 0; k + 1 < K; ++k) simd::store(past[k + 1], state.row(row, k) + channel, lanes);
              };
              window<V, K> past;
              past[0] = 0;  // shifted out
              for (int k = 0; k + 1 < K; ++k) past[k + 1] = simd::load<V>(state.row(slot, k) + channel, lanes);
              for (std::int64_t t = 0; t < length; ++t) {
                shift(past, simd::load<V>(in.x.row(b, t) + channel, lanes));
                std::int64_t const to = kept_slot_of(in.kept_slots, b, t, length, slot, state.extent(0));
                if (to >= 0) leave(past, to);
                V const p = w.at(d).apply(past);
                simd::store(silu ? math::silu(p) : p, y.row(b, t) + channel, lanes);
              }
            });
          }
        }
      });
    });
  }

 private:
  using block = cpu::sequences::block;
  static constexpr std::int64_t steps_per_task = 256;  // of forward
  static constexpr std::int64_t steps_together = 8;
  static constexpr std::int64_t tile = 128;  // channels of a task

  /// K packs, oldest first.
  template <class V, int K>
  using window = V[std::size_t{K}];

  /// Rows of a tile's channels, zero at first.
  template <class A, int Rows>
  struct columns {
    alignas(64) A value[std::size_t{Rows}][std::size_t{tile}] = {};
    A* at(int row, std::int64_t channel) { return value[row] + channel; }
    A const* at(int row, std::int64_t channel) const { return value[row] + channel; }
    template <class V>
    V at(int row, std::int64_t channel) const {
      return V::load(at(row, channel));
    }
  };

  /// The taps and the bias of a tile of channels.
  template <class V, int K>
  struct taps {
    struct of_pack {
      window<V, K> weight;
      V bias;
      V apply(window<V, K> const& past) const {
        V p = bias;
        for (int k = 0; k < K; ++k) p = fma(weight[k], past[k], p);
        return p;
      }
    };
    columns<typename V::value_type, K + 1> value;  // the last row is the bias

    template <class Weight, class Bias>
    taps(Weight const& w, Bias const& b, std::int64_t first, std::int64_t width) {
      for (std::int64_t c = 0; c < width; ++c) {
        for (int k = 0; k < K; ++k) *value.at(k, c) = w(first + c, k);
        if (b.present()) *value.at(K, c) = b(first + c);
      }
    }
    of_pack at(std::int64_t channel) const {
      of_pack p;
      for (int k = 0; k < K; ++k) p.weight[k] = value.template at<V>(k, channel);
      p.bias = value.template at<V>(K, channel);
      return p;
    }
  };

  /// Channel d (of the tile at `first`) of the i-th step from t on.
  template <class T>
  struct rows {
    T* start;
    std::int64_t stride;
    template <class View>
    rows(View const& v, block const& at, std::int64_t t, std::int64_t first)
        : start(v.row(at.of.batch, at.of.first + t) + first), stride(v.stride(1)) {}
    T* operator()(std::int64_t i, std::int64_t d) const { return start + (i * stride + d); }
  };

  /// The K-1 inputs before step t, oldest first; null for zeros, as beyond the end, where backward has steps without an
  /// input.
  template <int K, class T, class Inputs>
  static auto rows_before(Inputs const& in, block const& at, std::int64_t t, std::int64_t first) {
    std::array<T const*, std::size_t{K - 1}> row;
    for (int k = 0; k + 1 < K; ++k) {
      std::int64_t const s = t - (K - 1) + k;
      T const*& from = row[static_cast<std::size_t>(k)];
      from = nullptr;
      if (s >= 0 && s < at.of.length)
        from = in.x.row(at.of.batch, at.of.first + s) + first;
      else if (s < 0 && in.initial_state.present())
        from = in.initial_state.row(at.of.index, s + K - 1) + first;
    }
    return row;
  }
  /// Where the gradient of the input at time s goes, null where this block does not have it; and what the final state
  /// adds.
  template <int K, class Inputs, class Gradients>
  static auto gradient_rows(Inputs const& in, Gradients const& d, block const& at, std::int64_t s, std::int64_t first) {
    using T = typename decltype(Gradients::d_x)::value_type;
    std::pair<T*, T const*> r{nullptr, nullptr};
    if (s < at.begin && !at.first()) return r;  // the block before has it
    if (s >= 0)
      r.first = d.d_x.row(at.of.batch, at.of.first + s) + first;
    else if (d.d_initial_state.present())
      r.first = d.d_initial_state.row(at.of.index, s + K - 1) + first;
    std::int64_t const held = s - at.of.length + K - 1;
    if (held >= 0 && in.d_final_state.present()) r.second = in.d_final_state.row(at.of.index, held) + first;
    return r;
  }

  /// The K-1 inputs before a step, in the places that the step's own shifts down by one.
  template <class T, std::size_t Count, class Lanes, class V, std::size_t K>
  static void read(std::array<T const*, Count> const& before, std::int64_t d, Lanes lanes, V (&past)[K]) {
    past[0] = 0;  // shifted out
    for (std::size_t k = 0; k < Count; ++k) past[k + 1] = before[k] ? simd::load<V>(before[k] + d, lanes) : V(0);
  }
  template <class V, std::size_t K>
  static void shift(V (&past)[K], V newest) {
    for (std::size_t k = 0; k + 1 < K; ++k) past[k] = past[k + 1];
    past[K - 1] = newest;
  }
  template <class V, class T, class Lanes>
  static void put(V x, T* p, Lanes lanes, bool past_cache) {
    if constexpr (std::is_same_v<Lanes, int>)
      simd::store(x, p, lanes);
    else
      simd::store(x, p, past_cache);
  }
  template <class T>
  static void copy_row(T const* from, T* to, std::int64_t width) {
    from ? std::copy_n(from, width, to) : std::fill_n(to, width, T(0.0f));
  }

  template <class Weight, class Body>
  static void with_taps(Weight const& weight, Body&& body) {
    switch (weight.extent(1)) {
      case 2:
        return body.template operator()<2>();
      case 3:
        return body.template operator()<3>();
      default:
        return body.template operator()<4>();
    }
  }
  /// Calls body(block, first channel, channels) for every block of the sequences and every tile of channels.
  template <class Body>
  static void for_tiles(device::cpu const& policy, cpu::sequences const& list, std::int64_t channels, Body&& body) {
    std::int64_t const tiles = (channels + tile - 1) / tile;
    cpu::parallel_for(policy.threads, list.blocks() * tiles, 1, [&](std::int64_t begin, std::int64_t end) {
      // Tasks in the order (block, tile): a thread's tasks are a row of whole blocks but for its first and last.
      list.blocks_in(begin / tiles, (end + tiles - 1) / tiles, [&](block const& at) {
        std::int64_t const first = std::max(begin - at.number * tiles, std::int64_t{0});
        std::int64_t const last = std::min(end - at.number * tiles, tiles);
        for (std::int64_t i = first; i < last; ++i) body(at, i * tile, std::min(tile, channels - i * tile));
      });
    });
  }
};

}  // namespace blackmamba
