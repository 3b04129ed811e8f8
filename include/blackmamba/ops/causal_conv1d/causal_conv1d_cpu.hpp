#pragma once
#include <blackmamba/core/cpu/column_sums.hpp>
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/sequences.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/core/math.hpp>
#include <blackmamba/ops/causal_conv1d/causal_conv1d.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace blackmamba {

/// Tasks are blocks of steps of one sequence times tiles of channels. Within one, a pack of channels goes through time
/// with the last K inputs (backward: and the last K gradients) in registers: every value is read once, and K-1 steps at
/// a seam twice.
template <>
struct backend<causal_conv1d, device::cpu> {
  template <class Inputs, class T>
  static void forward(device::cpu const& policy, Inputs const& in, host_view<T, dyn, dyn, dyn> y,
                      host_view<T, dyn, dyn, dyn> final_state) {
    cpu::sequences const list("causal_conv1d", y.extent(0), y.extent(1), in.cu_seqlens, steps);
    with_taps(in.weight, [&]<int K>() {
      using V = simd::pack<accum_t<T>>;
      for_tiles<V::lanes>(policy, list, y.extent(2), [&](block const& at, std::int64_t channel, auto lanes) {
        taps<V, K> const w(in.weight, in.bias, channel, lanes);
        auto const input = inputs_of<V, T>(in, at, channel, lanes);
        window<V, K> past;
        past[0] = 0;  // shifted out by the first input
        for (int k = 1; k < K; ++k) past[k] = input(at.begin - K + k);
        for (std::int64_t t = at.begin; t < at.end; ++t) {
          shift(past, input(t));
          V const p = w.apply(past);
          simd::store(in.silu ? math::silu(p) : p, y.row(at.of.batch, at.of.first + t) + channel, lanes);
        }
        if (final_state.present() && at.last())
          for (int k = 1; k < K; ++k)
            simd::store(input(at.end - K + k), final_state.row(at.of.index, k - 1) + channel, lanes);
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
    // Packed sequences leave gaps in the numbering of blocks.
    if (in.cu_seqlens.present()) std::fill_n(partial.data(), partial.size(), A(0));
    with_taps(in.weight, [&]<int K>() {
      using V = simd::pack<A>;
      for_tiles<V::lanes>(policy, list, channels, [&](block const& at, std::int64_t channel, auto lanes) {
        taps<V, K> const w(in.weight, in.bias, channel, lanes);
        auto const input = inputs_of<V, T>(in, at, channel, lanes);
        window<V, K> past, g, d_weight;
        V d_bias = 0;
        for (int k = 0; k < K; ++k) g[k] = d_weight[k] = 0;
        past[0] = 0;  // shifted out by the first input
        for (int k = 1; k < K; ++k) past[k] = input(at.begin - K + k);
        std::int64_t const length = at.of.length;
        for (std::int64_t t = at.begin; t < at.end + K - 1; ++t) {
          V d_p = 0;
          if (t < length) {
            shift(past, input(t));
            d_p = simd::load<V>(in.d_y.row(at.of.batch, at.of.first + t) + channel, lanes);
            if (in.silu) d_p *= math::silu_derivative(w.apply(past));
          }
          if (t < at.end) {
            for (int k = 0; k < K; ++k) d_weight[k] = fma(d_p, past[k], d_weight[k]);
            d_bias += d_p;
          }
          shift(g, d_p);
          std::int64_t const s = t - (K - 1);
          if (s < at.begin && !at.first()) continue;  // the block before has it
          V d_x = 0;
          for (int k = 0; k < K; ++k) d_x = fma(w.weight[k], g[K - 1 - k], d_x);
          std::int64_t const held = s - length + K - 1;
          if (held >= 0 && in.d_final_state.present())
            d_x += simd::load<V>(in.d_final_state.row(at.of.index, held) + channel, lanes);
          if (s >= 0)
            simd::store(d_x, d.d_x.row(at.of.batch, at.of.first + s) + channel, lanes);
          else if (d.d_initial_state.present())
            simd::store(d_x, d.d_initial_state.row(at.of.index, s + K - 1) + channel, lanes);
        }
        for (int k = 0; k < K; ++k) simd::store(d_weight[k], partial.row(at.number, k) + channel, lanes);
        simd::store(d_bias, partial.row(at.number, K) + channel, lanes);
      });
      std::int64_t const blocks = partial.extent(0), stride = partial.stride(0);
      cpu::parallel_for(policy.threads, channels, tile, [&](std::int64_t begin, std::int64_t end) {
        for (int k = 0; k <= K; ++k) {
          A* const sum = partial.row(0, k) + begin;
          cpu::add_column_sums(blocks - 1, end - begin, sum + stride, stride, sum);
          for (std::int64_t c = begin; c < end; ++c)
            if (k < K)
              d.d_weight(c, k) += sum[c - begin];
            else if (d.d_bias.present())
              d.d_bias(c) += sum[c - begin];
        }
      });
    });
  }

  template <class Inputs, class T>
  static void step(device::cpu const& policy, Inputs const& in, host_view<T, dyn, dyn, dyn> state,
                   host_view<T, dyn, dyn> y) {
    using V = simd::pack<accum_t<T>>;
    std::int64_t const channels = y.extent(1), tiles = (channels + tile - 1) / tile;
    with_taps(in.weight, [&]<int K>() {
      cpu::parallel_for(policy.threads, y.extent(0) * tiles, 32, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t task = begin; task < end; ++task) {
          std::int64_t const b = task / tiles, first = task % tiles * tile;
          simd::for_packs<V::lanes>(std::min(tile, channels - first), [&](std::int64_t i, auto lanes) {
            std::int64_t const channel = first + i;
            taps<V, K> const w(in.weight, in.bias, channel, lanes);
            window<V, K> past;
            for (int k = 0; k + 1 < K; ++k) past[k] = simd::load<V>(state.row(b, k) + channel, lanes);
            past[K - 1] = simd::load<V>(in.x.row(b) + channel, lanes);
            for (int k = 0; k + 1 < K; ++k) simd::store(past[k + 1], state.row(b, k) + channel, lanes);
            V const p = w.apply(past);
            simd::store(in.silu ? math::silu(p) : p, y.row(b) + channel, lanes);
          });
        }
      });
    });
  }

 private:
  using block = cpu::sequences::block;
  static constexpr std::int64_t steps = 64;  // of a forward task
  static constexpr std::int64_t tile = 64;   // channels of a task

  /// K packs, oldest first.
  template <class V, int K>
  using window = V[std::size_t{K}];

  /// The taps and the bias of a pack of channels.
  template <class V, int K>
  struct taps {
    window<V, K> weight;
    V bias = 0;

    template <class Weight, class Bias, class Lanes>
    taps(Weight const& w, Bias const& b, std::int64_t channel, Lanes lanes) {
      using A = typename V::value_type;
      int const n = lanes;
      for (int k = 0; k < K; ++k) {
        A column[V::size] = {};
        for (int i = 0; i < n; ++i) column[i] = w(channel + i, k);
        weight[k] = V::load(column);
      }
      if (b.present()) bias = simd::load<V>(b.data() + channel, lanes);
    }
    V apply(window<V, K> const& past) const {
      V p = bias;
      for (int k = 0; k < K; ++k) p = fma(weight[k], past[k], p);
      return p;
    }
  };

  template <class V, std::size_t K>
  static void shift(V (&past)[K], V newest) {
    for (std::size_t k = 0; k + 1 < K; ++k) past[k] = past[k + 1];
    past[K - 1] = newest;
  }

  /// input(t) of a sequence; before its beginning the initial state or zeros.
  template <class V, class T, class Inputs, class Lanes>
  static auto inputs_of(Inputs const& in, block const& at, std::int64_t channel, Lanes lanes) {
    return [&in, &at, channel, lanes](std::int64_t t) {
      if (t >= 0) return simd::load<V>(in.x.row(at.of.batch, at.of.first + t) + channel, lanes);
      if (!in.initial_state.present()) return V(0);
      return simd::load<V>(in.initial_state.row(at.of.index, t + in.weight.extent(1) - 1) + channel, lanes);
    };
  }

  template <class Weight, class Body>
  static void with_taps(Weight const& weight, Body&& body) {
    switch (weight.extent(1)) {
      case 2: return body.template operator()<2>();
      case 3: return body.template operator()<3>();
      default: return body.template operator()<4>();
    }
  }
  /// Calls body(block, channel, lanes) for every block of the sequences and every pack of channels.
  template <int Lanes, class Body>
  static void for_tiles(device::cpu const& policy, cpu::sequences const& list, std::int64_t channels, Body&& body) {
    std::int64_t const tiles = (channels + tile - 1) / tile;
    cpu::parallel_for(policy.threads, list.blocks() * tiles, 1, [&](std::int64_t begin, std::int64_t end) {
      // Tasks in the order (block, tile): a thread's tasks are a row of whole blocks but for its first and last.
      list.blocks_in(begin / tiles, (end + tiles - 1) / tiles, [&](block const& at) {
        std::int64_t const first = std::max(begin - at.number * tiles, std::int64_t{0});
        std::int64_t const last = std::min(end - at.number * tiles, tiles);
        for (std::int64_t i = first; i < last; ++i)
          simd::for_packs<Lanes>(std::min(tile, channels - i * tile),
                                 [&](std::int64_t j, auto lanes) { body(at, i * tile + j, lanes); });
      });
    });
  }
};

}  // namespace blackmamba
