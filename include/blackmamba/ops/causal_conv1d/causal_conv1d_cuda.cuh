#pragma once
#include <blackmamba/core/cuda/exponential_cuda.cuh>
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/sequences_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/core/math.hpp>
#include <blackmamba/core/slots.hpp>
#include <blackmamba/ops/causal_conv1d/causal_conv1d.hpp>

#include <cstdint>
#include <type_traits>

/// Kernels, for each storage type T, each number of taps K = 2, 3, 4 and packs of N channels (as many as fill one
/// access to memory, or 1 where rows don't come in packs): forward, backward, step, steps; and one sum of partial
/// gradients.
///
/// A warp walks down the steps of a tile with the last K inputs of 32 packs of channels in registers, and loads rows
/// some steps before it needs them: each input is read once, but for K-1 rows above a tile (in backward also below it),
/// which the caches hold for the neighbouring warp.
namespace blackmamba::cuda::detail {

/// The taps and bias of N channels, the window of the last K inputs, and what they come to.
template <class T, int K, int N>
struct convolution_column {
  using A = accum_t<T>;
  using raw = raw_pack<T, N>;
  A weight[K][N], bias[N];
  A past[K][N];  // oldest first

  static __device__ __forceinline__ raw load(T const* p) {
    raw r;
#pragma unroll
    for (int i = 0; i < raw::words; ++i) r.w[i] = reinterpret_cast<typename raw::word const*>(p)[i];
    return r;
  }

  template <class Inputs>
  __device__ __forceinline__ void read_taps(Inputs const& in, std::int64_t channel) {
    bool const together = K == 4 && in.weight.stride(0) % 4 == 0 && pack_aligned<4>(in.weight.data());
#pragma unroll
    for (int i = 0; i < N; ++i) {
      A const* const row = in.weight.row(channel + i);
      if (together) {
        if constexpr (K == 4) {
          auto const taps = load_pack<4>(row);
#pragma unroll
          for (int k = 0; k < K; ++k) weight[k][i] = taps[k];
        }
      } else {
#pragma unroll
        for (int k = 0; k < K; ++k) weight[k][i] = row[k];
      }
      bias[i] = in.bias.present() ? in.bias.data()[channel + i] : A(0);
    }
  }

  /// The K-1 inputs before step t of a sequence, in the places that the step's own moves down by one.
  template <class Inputs>
  __device__ __forceinline__ void read_past(Inputs const& in, sequences::block const& at, std::int64_t t,
                                            std::int64_t channel) {
#pragma unroll
    for (int k = 0; k + 1 < K; ++k) {
      std::int64_t const s = t - (K - 1) + k;
      T const* from = nullptr;
      if (s >= 0)
        from = in.x.row(at.batch, at.first + s) + channel;
      else if (in.initial_state.present())
        from = in.initial_state.row(at.index, s + K - 1) + channel;
#pragma unroll
      for (int i = 0; i < N; ++i) past[k + 1][i] = A(0);
      if (from) widen_to(past[k + 1], load(from));
    }
  }

  __device__ __forceinline__ void push(raw const& newest) {
#pragma unroll
    for (int k = 0; k + 1 < K; ++k)
#pragma unroll
      for (int i = 0; i < N; ++i) past[k][i] = past[k + 1][i];
    widen_to(past[K - 1], newest);
  }
  /// The sum over the taps, before the activation.
  __device__ __forceinline__ A apply(int i) const {
    A p = bias[i];
#pragma unroll
    for (int k = 0; k < K; ++k) p = math::fma(weight[k][i], past[k][i], p);
    return p;
  }

  static __device__ __forceinline__ void widen_to(A (&to)[N], raw const& r) {
    auto const x = r.widened();
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = x[i];
  }
};

/// 1 / (1 + e^-p). In float within 3 units in the last place, and e^-p within |p| units more.
__device__ __forceinline__ double convolution_sigmoid(double p) { return math::sigmoid(p); }
__device__ __forceinline__ float convolution_sigmoid(float p) {
  return reciprocal(1.0f + power_of_two(p * -1.4426950408889634f));
}

/// A step's result, of what the column holds.
template <class T, int K, int N>
__device__ __forceinline__ pack<accum_t<T>, N> convolution_result(convolution_column<T, K, N> const& c, bool silu) {
  pack<accum_t<T>, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result[i] = c.apply(i);
  if (silu)
#pragma unroll
    for (int i = 0; i < N; ++i) result[i] *= convolution_sigmoid(result[i]);
  return result;
}

inline constexpr int convolution_forward_warps = 4;
inline constexpr unsigned convolution_backward_warps = 8;  // at most

/// One block: convolution_forward_warps tiles of 2^steps_shift steps, one above the other, of 32 packs of channels.
template <class T, int K, int N>
__global__ void __launch_bounds__(32 * convolution_forward_warps, 6)
    causal_conv1d_forward(causal_conv1d::inputs<device::cuda, T> in, view<space::device, T, dyn, dyn, dyn> y,
                          view<space::device, T, dyn, dyn, dyn> final_state, sequences list, unsigned channel_blocks,
                          int steps_shift) {
  using column_type = convolution_column<T, K, N>;
  using raw = typename column_type::raw;
  constexpr int together = sizeof(T) == 2 ? 8 : 4;  // rows on their way: in bytes as many for each type
  std::int64_t const channel = (std::int64_t{blockIdx.x % channel_blocks} * 32 + threadIdx.x) * N;
  if (channel >= y.extent(2)) return;
  sequences::block at;
  if (!list.find(blockIdx.x / channel_blocks, at)) return;
  std::int64_t const begin = at.begin + (std::int64_t{threadIdx.y} << steps_shift);
  if (begin >= at.end && (at.length > 0 || threadIdx.y > 0)) return;
  int const steps = static_cast<int>(min(std::int64_t{1} << steps_shift, at.end - begin));

  T const* from = in.x.row(at.batch, at.first + begin) + channel;
  T* to = y.row(at.batch, at.first + begin) + channel;
  std::int64_t const from_stride = in.x.stride(1), to_stride = y.stride(1);
  raw ahead[together];  // step t's in place t % together
  auto const fetch = [&](int t, raw& place) {
    if (t < steps) place = column_type::load(from);
    from += from_stride;
  };
#pragma unroll
  for (int u = 0; u < together; ++u) fetch(u, ahead[u]);
  column_type c;
  c.read_past(in, at, begin, channel);
  c.read_taps(in, channel);
  auto const one = [&](bool silu, int t, raw& newest) {
    c.push(newest);
    fetch(t + together, newest);
    store_pack<N>(to, convolution_result(c, silu));
    to += to_stride;
  };
  int t = 0;
  auto const groups = [&](bool silu) {
    for (; t + together <= steps; t += together) {
#pragma unroll
      for (int u = 0; u < together; ++u) one(silu, t + u, ahead[u]);
    }
  };
  // Asked once for all: a question at each step would keep their latencies from overlapping.
  in.silu ? groups(true) : groups(false);
#pragma unroll
  for (int u = 0; u + 1 < together; ++u)
    if (t + u < steps) one(in.silu, t + u, ahead[u]);

  if (final_state.present() && begin + steps == at.length) {
#pragma unroll
    for (int k = 0; k + 1 < K; ++k) {
      pack<accum_t<T>, N> input;
#pragma unroll
      for (int i = 0; i < N; ++i) input[i] = c.past[k + 1][i];
      store_pack<N>(final_state.row(at.index, k) + channel, input);
    }
  }
}

/// One block: steps_per_partial steps of 32 packs of channels, divided among the warps. With g = d_p, going forward in
/// time: d_x[t - (K-1)] = sum over k of weight[k] g[t - k], where the g of K steps are at hand once step t is done.
/// Times before the sequence are the initial state's; what the final state's gradient adds is that of the input which
/// it holds.
template <class T, int K, int N>
__global__ void __launch_bounds__(32 * convolution_backward_warps, sizeof(accum_t<T>) == 4 ? 2 : 1)
    causal_conv1d_backward(causal_conv1d::gradient_inputs<device::cuda, T> in,
                           causal_conv1d::gradients<device::cuda, T> d,
                           view<space::device, accum_t<T>, dyn, dyn, dyn> partial, sequences list,
                           unsigned channel_blocks) {
  using A = accum_t<T>;
  using column_type = convolution_column<T, K, N>;
  using raw = typename column_type::raw;
  constexpr int together = 4, width = 32 * N;
  int const warps = static_cast<int>(blockDim.y);
  int const most_steps = static_cast<int>(causal_conv1d::steps_per_partial) / warps;
  std::int64_t const first_channel = std::int64_t{blockIdx.x % channel_blocks} * width;
  std::int64_t const channel = first_channel + threadIdx.x * N, channels = d.d_x.extent(2);
  std::int64_t const number = blockIdx.x / channel_blocks;
  sequences::block at;
  bool work = list.find(number, at) && channel < channels;
  std::int64_t const begin = work ? at.begin + threadIdx.y * most_steps : 0;
  work = work && (begin < at.end || (at.length == 0 && threadIdx.y == 0));

  A sum[K + 1][N] = {};  // of d_weight, and last of d_bias
  if (work) {
    int const steps = static_cast<int>(min(std::int64_t{most_steps}, at.end - begin));
    int const known = static_cast<int>(min(std::int64_t{most_steps + K}, at.length - begin));  // steps with an input
    T const* x = in.x.row(at.batch, at.first + begin) + channel;
    T const* d_y = in.d_y.row(at.batch, at.first + begin) + channel;
    T* d_x = d.d_x.row(at.batch, at.first + begin) + channel;
    std::int64_t const x_stride = in.x.stride(1), d_y_stride = in.d_y.stride(1), d_x_stride = d.d_x.stride(1);
    raw ahead_x[together], ahead_d_y[together];  // step t's in place t % together
    auto const fetch = [&](int t, int place) {
      if (t < known) {
        ahead_x[place] = column_type::load(x);
        ahead_d_y[place] = column_type::load(d_y);
      }
      x += x_stride;
      d_y += d_y_stride;
    };
#pragma unroll
    for (int u = 0; u < together; ++u) fetch(u, u);
    column_type c;
    c.read_past(in, at, begin, channel);
    c.read_taps(in, channel);
    A g[K][N] = {};  // oldest first
    auto const shift = [&] {
#pragma unroll
      for (int k = 0; k + 1 < K; ++k)
#pragma unroll
        for (int i = 0; i < N; ++i) g[k][i] = g[k + 1][i];
    };
    auto const input = [&](int t, int place, bool own, bool silu) {
      c.push(ahead_x[place]);
      shift();
      A d_p[N];
      column_type::widen_to(d_p, ahead_d_y[place]);
      fetch(t + together, place);
      if (silu)
#pragma unroll
        for (int i = 0; i < N; ++i) {
          A const p = c.apply(i), s = convolution_sigmoid(p);
          d_p[i] *= s * math::fma(p, A(1) - s, A(1));
        }
#pragma unroll
      for (int i = 0; i < N; ++i) g[K - 1][i] = d_p[i];
      if (own)
#pragma unroll
        for (int i = 0; i < N; ++i) {
#pragma unroll
          for (int k = 0; k < K; ++k) sum[k][i] = math::fma(d_p[i], c.past[k][i], sum[k][i]);
          sum[K][i] += d_p[i];
        }
    };
    // The gradient of the input K-1 steps before the last one; `held`: what the final state adds.
    auto const output = [&](T* to, T const* held) {
      pack<A, N> result;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        A value = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) value = math::fma(c.weight[k][i], g[K - 1 - k][i], value);
        result[i] = value;
      }
      if (held) {
        auto const more = load_pack<N>(held);
#pragma unroll
        for (int i = 0; i < N; ++i) result[i] += more[i];
      }
      store_pack<N>(to, result);
    };
    // The first steps and those that are left: their inputs, or the outputs, may be another tile's or the states'.
    auto const edge = [&](int t, int place) {
      if (t < known) {
        input(t, place, t < steps, in.silu);
      } else {
        shift();
#pragma unroll
        for (int i = 0; i < N; ++i) g[K - 1][i] = A(0);
      }
      std::int64_t const held = begin + t - at.length;  // the input is the one that the final state holds there
      T const* const more =
          held >= 0 && in.d_final_state.present() ? in.d_final_state.row(at.index, held) + channel : nullptr;
      if (t >= K - 1) {
        output(d_x, more);
        d_x += d_x_stride;
      } else if (begin == 0 && d.d_initial_state.present()) {
        output(d.d_initial_state.row(at.index, t) + channel, more);
      }
    };

    int const all = steps + K - 1;  // the K-1 steps below the tile complete its d_x
    // Most tiles touch no state, have steps below them and an activation: there no step asks anything, so that the
    // latencies of several overlap.
    bool const plain = N > 1 && in.silu && steps % together == 0 && begin + all <= at.length &&
                       !(begin == 0 && d.d_initial_state.present());
    auto const middle = [&](int t, bool silu) {
#pragma unroll
      for (int u = 0; u < together; ++u) {
        input(t + u, u, true, silu);
        output(d_x, nullptr);
        d_x += d_x_stride;
      }
    };
    if (plain) {
#pragma unroll
      for (int u = 0; u < together; ++u) {
        input(u, u, true, true);
        if (u < K - 1) continue;
        output(d_x, nullptr);
        d_x += d_x_stride;
      }
      for (int t = together; t < steps; t += together) middle(t, true);
#pragma unroll
      for (int u = 0; u < K - 1; ++u) {
        input(steps + u, u, false, true);
        output(d_x, nullptr);
        d_x += d_x_stride;
      }
    } else {
#pragma unroll
      for (int u = 0; u < together; ++u)
        if (u < all) edge(u, u);
      int t = together;
      for (; t + together <= steps; t += together) middle(t, in.silu);
      for (; t < all; t += together) {
#pragma unroll
        for (int u = 0; u < together; ++u)
          if (t + u < all) edge(t + u, u);
      }
    }
  }

  __shared__ A shared[convolution_backward_warps][K + 1][width];
#pragma unroll
  for (int k = 0; k <= K; ++k)
#pragma unroll
    for (int i = 0; i < N; ++i) shared[threadIdx.y][k][threadIdx.x * N + i] = sum[k][i];
  __syncthreads();
  for (int j = static_cast<int>(threadIdx.y * 32 + threadIdx.x); j < (K + 1) * width; j += 32 * warps) {
    int const k = j / width, i = j % width;
    if (first_channel + i >= channels) continue;
    A total = shared[0][k][i];
    for (int w = 1; w < warps; ++w) total += shared[w][k][i];
    partial.row(number, k)[first_channel + i] = total;
  }
}

/// d_weight and d_bias += the sums over blocks of steps; a block of threads for 32 columns of (block, K+1, D).
template <class A>
__global__ void __launch_bounds__(512)
    causal_conv1d_add_partials(A const* partial, std::int64_t blocks, int taps, std::int64_t channels,
                               view<space::device, A, dyn, dyn> d_weight, view<space::device, A, dyn> d_bias) {
  __shared__ A part[16][32];
  std::int64_t const column = std::int64_t{blockIdx.x} * 32 + threadIdx.x, columns = (taps + 1) * channels;
  A sum = 0;
  if (column < columns)
    for (std::int64_t b = threadIdx.y; b < blocks; b += 16) sum += partial[b * columns + column];
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= columns) return;
#pragma unroll
  for (int i = 1; i < 16; ++i) sum += part[i][threadIdx.x];
  std::int64_t const k = column / channels, c = column % channels;
  if (k < taps)
    d_weight.row(c)[k] += sum;
  else if (d_bias.present())
    d_bias.data()[c] += sum;
}

/// A token's result, of the window of the last K inputs as they are in memory, oldest first.
template <class T, int K, int N>
__device__ __forceinline__ pack<accum_t<T>, N> convolution_result(convolution_column<T, K, N>& c,
                                                                  raw_pack<T, N> const (&window)[K], bool silu) {
#pragma unroll
  for (int k = 0; k < K; ++k) c.widen_to(c.past[k], window[k]);
  return convolution_result(c, silu);
}
/// The state before a token, into the window's places before the newest; and the one after it, from there.
template <class T, int K, int N>
__device__ __forceinline__ void convolution_read(view<space::device, T, dyn, dyn, dyn> const& state, std::int64_t row,
                                                 std::int64_t channel, raw_pack<T, N> (&window)[K]) {
#pragma unroll
  for (int k = 0; k + 1 < K; ++k) window[k] = convolution_column<T, K, N>::load(state.row(row, k) + channel);
}
template <class T, int K, int N>
__device__ __forceinline__ void convolution_leave(view<space::device, T, dyn, dyn, dyn> const& state, std::int64_t row,
                                                  std::int64_t channel, raw_pack<T, N> const (&window)[K]) {
  using raw = raw_pack<T, N>;
#pragma unroll
  for (int k = 0; k + 1 < K; ++k)
#pragma unroll
    for (int i = 0; i < raw::words; ++i)
      reinterpret_cast<typename raw::word*>(state.row(row, k) + channel)[i] = window[k + 1].w[i];
}

/// A thread moves N channels of `rows` sequences on, which share one reading of the taps.
template <class T, int K, int N>
__global__ void __launch_bounds__(128)
    causal_conv1d_step(causal_conv1d::step_inputs<device::cuda, T> in, view<space::device, T, dyn, dyn, dyn> state,
                       view<space::device, T, dyn, dyn> y, std::int64_t packs, std::int64_t rows) {
  using column_type = convolution_column<T, K, N>;
  std::int64_t const thread = std::int64_t{blockIdx.x} * 128 + threadIdx.x;
  std::int64_t const first = thread / packs * rows, channel = thread % packs * N, batch = y.extent(0);
  if (first >= batch) return;
  column_type c;
  c.read_taps(in, channel);
  bool const silu = in.silu;
  struct token {
    std::int64_t slot;
    typename column_type::raw window[K];
  };
  // Nothing of a row depends on another one: the next is on its way while one is worked on.
  auto const fetch = [&](std::int64_t b) {
    token x;
    x.slot = slot_of(in.slots, b, state.extent(0));
    convolution_read<T, K, N>(state, x.slot < 0 ? 0 : x.slot, channel, x.window);
    x.window[K - 1] = column_type::load(in.x.row(b) + channel);
    return x;
  };
  std::int64_t const end = min(first + rows, batch);
  token next = fetch(first);
  for (std::int64_t b = first; b < end; ++b) {
    token const x = next;
    if (b + 1 < end) next = fetch(b + 1);
    auto const result = convolution_result<T, K, N>(c, x.window, silu);
    if (x.slot < 0) continue;
    convolution_leave<T, K, N>(state, x.slot, channel, x.window);
    store_pack<N>(y.row(b) + channel, result);
  }
}

/// A thread moves N channels of a sequence on by some tokens.
template <class T, int K, int N>
__global__ void __launch_bounds__(128)
    causal_conv1d_steps(causal_conv1d::token_inputs<device::cuda, T> in, view<space::device, T, dyn, dyn, dyn> state,
                        view<space::device, T, dyn, dyn, dyn> y, std::int64_t packs) {
  using column_type = convolution_column<T, K, N>;
  std::int64_t const thread = std::int64_t{blockIdx.x} * 128 + threadIdx.x, b = thread / packs;
  std::int64_t const channel = thread % packs * N, length = y.extent(1);
  if (b >= y.extent(0)) return;
  std::int64_t const slot = slot_of(in.slots, b, state.extent(0));
  if (slot < 0) return;
  typename column_type::raw window[K], next = column_type::load(in.x.row(b, 0) + channel);
  convolution_read<T, K, N>(state, slot, channel, window);
  column_type c;
  c.read_taps(in, channel);
  for (std::int64_t t = 0; t < length; ++t) {
    if (t > 0)
#pragma unroll
      for (int k = 0; k + 1 < K; ++k) window[k] = window[k + 1];
    window[K - 1] = next;
    if (t + 1 < length) next = column_type::load(in.x.row(b, t + 1) + channel);
    std::int64_t const to = kept_slot_of(in.kept_slots, b, t, length, slot, state.extent(0));
    auto const result = convolution_result<T, K, N>(c, window, in.silu);
    if (to >= 0) convolution_leave<T, K, N>(state, to, channel, window);
    store_pack<N>(y.row(b, t) + channel, result);
  }
}

}  // namespace blackmamba::cuda::detail

namespace blackmamba {

template <>
struct backend<causal_conv1d, device::cuda> {
  template <class T>
  using states = view<space::device, T, dyn, dyn, dyn>;

  template <class T>
  static void forward(device::cuda const& policy, causal_conv1d::inputs<device::cuda, T> const& in, states<T> y,
                      states<T> final_state) {
    constexpr int wide = wide_pack<T>, warps = cuda::detail::convolution_forward_warps;
    bool const packs = cuda::rows_in_packs<wide>(in.x) && cuda::rows_in_packs<wide>(y) &&
                       cuda::rows_in_packs<wide>(in.initial_state) && cuda::rows_in_packs<wide>(final_state);
    with_taps_and_packs<wide>(in.weight.extent(1), packs, [&]<int K, int N>() {
      std::int64_t const channel_blocks = blocks_of(y.extent(2), 32 * N);
      // A wave of blocks takes as long as its tiles and about 6 steps more; with tiles of 64 the last is emptier.
      std::int64_t const resident = std::int64_t{cuda::properties().multiprocessors} * 6;
      auto const steps_of = [&](int s) {
        std::int64_t const blocks = channel_blocks * y.extent(0) * blocks_of(y.extent(1), warps << s);
        return blocks_of(blocks, resident) * ((1 << s) + 6);
      };
      int const shift = steps_of(4) < steps_of(5) ? 4 : 5;
      cuda::sequences const list(y.extent(0), y.extent(1), in.cu_seqlens, shift + 2);
      static_assert(warps == 4);
      cuda::launch("causal_conv1d", policy, {cuda::blocks_for(list.blocks() * channel_blocks, 1), dim3(32, warps)},
                   cuda::detail::causal_conv1d_forward<T, K, N>, in, y, final_state, list,
                   static_cast<unsigned>(channel_blocks), shift);
    });
  }

  template <class T>
  static void backward(device::cuda const& policy, causal_conv1d::gradient_inputs<device::cuda, T> const& in,
                       causal_conv1d::gradients<device::cuda, T> const& d, states<accum_t<T>> partial) {
    constexpr char const* op = "causal_conv1d.backward";
    // With more 32-bit channels the sums and windows would leave registers for few warps.
    constexpr int wide = sizeof(T) == 4 ? 2 : wide_pack<T>;
    bool const packs = cuda::rows_in_packs<wide>(in.x) && cuda::rows_in_packs<wide>(in.d_y) &&
                       cuda::rows_in_packs<wide>(in.initial_state) && cuda::rows_in_packs<wide>(in.d_final_state) &&
                       cuda::rows_in_packs<wide>(d.d_x) && cuda::rows_in_packs<wide>(d.d_initial_state);
    std::int64_t const batch = d.d_x.extent(0), length = d.d_x.extent(1), channels = d.d_x.extent(2);
    static_assert(causal_conv1d::steps_per_partial == 256);
    cuda::sequences const list(batch, length, in.cu_seqlens, 8);
    with_taps_and_packs<wide>(in.weight.extent(1), packs, [&]<int K, int N>() {
      std::int64_t const channel_blocks = blocks_of(channels, 32 * N);
      // A block's warps divide its steps: fewer of them repeat less at their edges, more of them fill the device.
      bool const fill = list.blocks() * channel_blocks < std::int64_t{cuda::properties().multiprocessors} * 4;
      cuda::launch(op, policy,
                   {cuda::blocks_for(list.blocks() * channel_blocks, 1),
                    dim3(32, fill ? cuda::detail::convolution_backward_warps : 4u)},
                   cuda::detail::causal_conv1d_backward<T, K, N>, in, d, partial, list,
                   static_cast<unsigned>(channel_blocks));
    });
    std::int64_t const taps = in.weight.extent(1);
    cuda::launch(op, policy, {cuda::blocks_for((taps + 1) * channels, 32), dim3(32, 16)},
                 cuda::detail::causal_conv1d_add_partials<accum_t<T>>, partial.data(), list.blocks(),
                 static_cast<int>(taps), channels, d.d_weight, d.d_bias);
  }

  template <class T>
  static void step(device::cuda const& policy, causal_conv1d::step_inputs<device::cuda, T> const& in, states<T> state,
                   view<space::device, T, dyn, dyn> y) {
    constexpr int wide = wide_pack<T>;
    bool const packs =
        cuda::rows_in_packs<wide>(in.x) && cuda::rows_in_packs<wide>(state) && cuda::rows_in_packs<wide>(y);
    with_taps_and_packs<wide>(in.weight.extent(1), packs, [&]<int K, int N>() {
      std::int64_t const columns = blocks_of(y.extent(1), N);
      std::int64_t const enough = std::int64_t{cuda::properties().multiprocessors} * 512;
      std::int64_t rows = 8;
      while (rows > 1 && columns * (y.extent(0) / rows) < enough) rows /= 2;
      cuda::launch("causal_conv1d.step", policy, {cuda::blocks_for(columns * blocks_of(y.extent(0), rows), 128), 128},
                   cuda::detail::causal_conv1d_step<T, K, N>, in, state, y, columns, rows);
    });
  }

  template <class T>
  static void steps(device::cuda const& policy, causal_conv1d::token_inputs<device::cuda, T> const& in, states<T> state,
                    states<T> y) {
    constexpr int wide = wide_pack<T>;
    bool const packs =
        cuda::rows_in_packs<wide>(in.x) && cuda::rows_in_packs<wide>(state) && cuda::rows_in_packs<wide>(y);
    with_taps_and_packs<wide>(in.weight.extent(1), packs, [&]<int K, int N>() {
      std::int64_t const columns = blocks_of(y.extent(2), N);
      cuda::launch("causal_conv1d.steps", policy, {cuda::blocks_for(columns * y.extent(0), 128), 128},
                   cuda::detail::causal_conv1d_steps<T, K, N>, in, state, y, columns);
    });
  }

 private:
  /// Channels of a thread: 16 bytes of them, but at most 4, for each has its window and taps in registers.
  template <class T>
  static constexpr int wide_pack = cuda::pack_width<T> < 4 ? cuda::pack_width<T> : 4;
  static constexpr std::int64_t blocks_of(std::int64_t n, std::int64_t each) { return (n + each - 1) / each; }

  template <int Wide, class Body>
  static void with_taps_and_packs(std::int64_t taps, bool packs, Body&& body) {
    auto const with_packs = [&]<int K>() {
      packs ? body.template operator()<K, Wide>() : body.template operator()<K, 1>();
    };
    switch (taps) {
      case 2:
        return with_packs.template operator()<2>();
      case 3:
        return with_packs.template operator()<3>();
      default:
        return with_packs.template operator()<4>();
    }
  }
};

}  // namespace blackmamba
