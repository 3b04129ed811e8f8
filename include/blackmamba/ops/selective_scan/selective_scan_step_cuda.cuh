#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/core/slots.hpp>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_exponential_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan_tiles_cuda.cuh>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

/// Instantiated for each T, N and type of states in use: scan_step for few
/// sequences, for many, and for rows at odd addresses; scan_steps for rows in
/// packs and for odd addresses.
namespace blackmamba::cuda::detail {

/// One token: `lanes` neighbouring lanes share a channel of a sequence and hold
/// four states each (fewer or more at N below 3 or above 128).
template <int N>
struct scan_step_shape {
  static constexpr int threads = 128;
  static constexpr int lanes = static_cast<int>(std::bit_ceil(static_cast<unsigned>(std::clamp((N + 3) / 4, 1, 32))));
  static constexpr int share = (N + lanes - 1) / lanes, states = share <= 2 ? share : (share + 3) / 4 * 4;
  static constexpr int channels = threads / lanes;
  static constexpr bool whole = N % 4 == 0 && N == lanes * states;  ///< no lane has fewer states than another
};

/// K elements on their way from memory: with Packs at once, without any of them
/// one by one, zeros beyond `count`. What is on its way stays as it is in
/// memory; the first use of a converted value would wait for it.
template <class X, int K, bool Packs>
struct scan_step_load {
  raw_pack<X, K> raw;
  __device__ __forceinline__ void load(X const* p, int count) {
    if constexpr (Packs) {
#pragma unroll
      for (int w = 0; w < raw_pack<X, K>::words; ++w)
        raw.w[w] = reinterpret_cast<typename raw_pack<X, K>::word const*>(p)[w];
    } else {
#pragma unroll
      for (int i = 0; i < K; ++i) raw.e[i] = i < count ? p[i] : convert<X>(0.0f);
    }
  }
  __device__ __forceinline__ accum_t<X> operator[](int i) const { return widen(raw.e[i]); }
};

/// What the lanes of a channel know of it for all tokens: rates of their
/// states, bias, skip.
template <class T, int N, bool Packs>
struct scan_step_channel {
  using shape = scan_step_shape<N>;
  using A = accum_t<T>;
  static constexpr int K = shape::states < 4 ? shape::states : 4, packs = shape::states / K;
  A rate[packs * K], bias, skip;
  decltype(scan_mask<A>(true)) gated, softplus;

  template <class Inputs>
  __device__ __forceinline__ void load(Inputs const& in, std::int64_t channel, int lane) {
    scan_step_load<A, K, Packs> rates[packs];
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      int const n = first_state(k, lane);
      rates[k].load(in.A.row(channel) + n, N - n);
#pragma unroll
      for (int q = 0; q < K; ++q) rate[k * K + q] = scan_rate(rates[k][q], in.A_is_log);
    }
    bias = in.delta_bias.present() ? in.delta_bias.data()[channel] : A(0);
    skip = in.D.present() ? in.D.data()[channel] : A(0);
    gated = scan_mask<A>(in.z.present()), softplus = scan_mask<A>(in.delta_softplus);
  }
  static __device__ __forceinline__ int first_state(int k, int lane) { return (k * shape::lanes + lane) * K; }

  __device__ __forceinline__ A step_of(A delta) const {
    A const raw = delta + bias;
    return selected(softplus, scan_softplus(raw), raw);
  }
  /// Moves the states of a lane on by one token, from before(k, q); keep(k, h)
  /// is told each pack of them as it is then.
  /// @returns the lane's part of C . h
  template <class Before, class Projection, class Keep>
  __device__ __forceinline__ A advance(Before const& before, Projection const (&b)[packs], Projection const (&c)[packs],
                                       A dt, A dt_u, Keep const& keep) const {
    A sum = 0;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      pack<A, K> h;
#pragma unroll
      for (int q = 0; q < K; ++q) {
        A const decay = power_of_two(times(dt, rate[k * K + q]));
        h[q] = math::fma(decay, before(k, q), times(dt_u, b[k][q]));
        sum = math::fma(c[k][q], h[q], sum);
      }
      keep(k, h);
    }
    return sum;
  }
  /// y, of C . h.
  __device__ __forceinline__ A result(A sum, A u, A gate) const {
    return times(sum + times(skip, u), selected(gated, times(gate, scan_sigmoid(gate)), A(1)));
  }
};

/// A lane's pack of states, of which `count` exist, to memory.
template <int K, bool Packs, class State, class A>
__device__ __forceinline__ void scan_step_store(State* p, pack<A, K> const& h, int count) {
  if constexpr (Packs)
    store_pack<K>(p, h);
  else
    store_some<K>(p, h, count);
}

/// Rows: sequences that a thread moves on, with rates that it makes once; all
/// their states are on their way at once. Lanes of a channel share its rows out
/// for what a token needs once, softplus, gate and access to u, delta, z and y:
/// row r is a lane's own where r is the lane's number, of as many rows as there
/// are lanes.
template <class T, int N, class State, int Rows, bool Packs>
__global__ void __launch_bounds__(128)
    scan_step(selective_scan::step_inputs<device::cuda, T, N> const in,
              view<space::device, State, dyn, dyn, dyn> const state, view<space::device, T, dyn, dyn> const y,
              unsigned const channel_tiles) {
  using shape = scan_step_shape<N>;
  using channel_type = scan_step_channel<T, N, Packs>;
  using A = accum_t<T>;
  constexpr int K = channel_type::K, packs = channel_type::packs;
  constexpr int group = Rows < shape::lanes ? Rows : shape::lanes, groups = Rows / group;
  std::int64_t const batch = y.extent(0), first = std::int64_t{blockIdx.x / channel_tiles} * Rows;
  int const lane = static_cast<int>(threadIdx.x) % shape::lanes;
  std::int64_t const own =
      std::int64_t{blockIdx.x % channel_tiles} * shape::channels + static_cast<int>(threadIdx.x) / shape::lanes;
  bool const mine = own < y.extent(1);
  std::int64_t const channel = mine ? own : y.extent(1) - 1;

  // All loads first; rows beyond the batch are the last one, and not stored.
  // Nor is a sequence without a state, in whose place any is read.
  auto const row_of = [&](int r) { return first + r < batch ? first + r : batch - 1; };
  auto const& z_view = in.z.present() ? in.z : in.u;
  std::int64_t slot[Rows];
  scan_step_load<State, K, Packs> old[Rows][packs];
  scan_step_load<T, K, Packs> in_b[Rows][packs], in_c[Rows][packs];
  scan_elements<T, 1> u[groups], delta[groups], z[groups];
#pragma unroll
  for (int r = 0; r < Rows; ++r) slot[r] = slot_of(in.slots, row_of(r), state.extent(0));
#pragma unroll
  for (int g = 0; g < groups; ++g) {  // y may be one of them
    std::int64_t const b = row_of(g * group + lane % group);
    delta[g].load_current(in.delta.row(b) + channel);
    u[g].load_current(in.u.row(b) + channel);
    z[g].load_current(z_view.row(b) + channel);
  }
#pragma unroll
  for (int r = 0; r < Rows; ++r)
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      int const n = channel_type::first_state(k, lane);
      old[r][k].load(state.row(slot[r] < 0 ? 0 : slot[r], channel) + n, N - n);
      in_b[r][k].load(in.B.row(row_of(r)) + n, N - n);
      in_c[r][k].load(in.C.row(row_of(r)) + n, N - n);
    }
  channel_type of_channel;
  of_channel.load(in, channel, lane);

#pragma unroll
  for (int g = 0; g < groups; ++g) {
    A const own_dt = of_channel.step_of(delta[g][0]), own_dt_u = times(own_dt, u[g][0]);
    A sum[group];
    bool writes[group];
#pragma unroll
    for (int i = 0; i < group; ++i) {
      int const r = g * group + i;
      writes[i] = mine && first + r < batch && slot[r] >= 0;
      A const dt = group == 1 ? own_dt : __shfl_sync(0xffffffffu, own_dt, i, shape::lanes);
      A const dt_u = group == 1 ? own_dt_u : __shfl_sync(0xffffffffu, own_dt_u, i, shape::lanes);
      sum[i] = of_channel.advance([&](int k, int q) { return old[r][k][q]; }, in_b[r], in_c[r], dt, dt_u,
                                  [&](int k, pack<A, K> const& h) {
                                    int const n = channel_type::first_state(k, lane);
                                    if (writes[i]) scan_step_store<K, Packs>(state.row(slot[r], channel) + n, h, N - n);
                                  });
#pragma unroll
      for (int half = shape::lanes / 2; half >= group; half /= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], half);
    }
    A const value = of_channel.result(sums_by_lane(sum, lane), u[g][0], z[g][0]);
#pragma unroll
    for (int i = 0; i < group; ++i)
      if (writes[i] && lane == i) y.row(first + g * group + i)[channel] = convert<T>(value);
  }
}

/// Some tokens of one sequence, whose states stay in registers from one to the
/// next, rounded as memory would round them. A token's inputs are on their way
/// while the one before it is worked on.
template <class T, int N, class State, bool Packs>
__global__ void __launch_bounds__(128)
    scan_steps(selective_scan::token_inputs<device::cuda, T, N> const in,
               view<space::device, State, dyn, dyn, dyn> const state, view<space::device, T, dyn, dyn, dyn> const y,
               unsigned const channel_tiles) {
  using shape = scan_step_shape<N>;
  using channel_type = scan_step_channel<T, N, Packs>;
  using A = accum_t<T>;
  constexpr int K = channel_type::K, packs = channel_type::packs;
  int const length = static_cast<int>(y.extent(1)), lane = static_cast<int>(threadIdx.x) % shape::lanes;
  std::int64_t const b = blockIdx.x / channel_tiles, slot = slot_of(in.slots, b, state.extent(0));
  std::int64_t const own =
      std::int64_t{blockIdx.x % channel_tiles} * shape::channels + static_cast<int>(threadIdx.x) / shape::lanes;
  bool const mine = own < y.extent(2);
  std::int64_t const channel = mine ? own : y.extent(2) - 1;
  if (slot < 0) return;  // the whole block

  struct token {
    scan_step_load<T, K, Packs> b[packs], c[packs];
    scan_elements<T, 1> u, delta, z;
  };
  auto const& z_view = in.z.present() ? in.z : in.u;
  auto const fetch = [&](int t) {
    token x;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      int const n = channel_type::first_state(k, lane);
      x.b[k].load(in.B.row(b, t) + n, N - n);
      x.c[k].load(in.C.row(b, t) + n, N - n);
    }
    // y may be one of them.
    x.delta.load_current(in.delta.row(b, t) + channel);
    x.u.load_current(in.u.row(b, t) + channel);
    x.z.load_current(z_view.row(b, t) + channel);
    return x;
  };
  token next = fetch(0);
  A h[packs][K];
#pragma unroll
  for (int k = 0; k < packs; ++k) {
    int const n = channel_type::first_state(k, lane);
    scan_step_load<State, K, Packs> old;
    old.load(state.row(slot, channel) + n, N - n);
#pragma unroll
    for (int q = 0; q < K; ++q) h[k][q] = old[q];
  }
  channel_type of_channel;
  of_channel.load(in, channel, lane);

#pragma unroll 1
  for (int t = 0; t < length; ++t) {
    token const x = next;
    if (t + 1 < length) next = fetch(t + 1);
    std::int64_t const to = kept_slot_of(in.kept_slots, b, t, length, slot, state.extent(0));
    A const dt = of_channel.step_of(x.delta[0]);
    A sum = of_channel.advance([&](int k, int q) { return h[k][q]; }, x.b, x.c, dt, times(dt, x.u[0]),
                               [&](int k, pack<A, K> const& moved) {
                                 int const n = channel_type::first_state(k, lane);
#pragma unroll
                                 for (int q = 0; q < K; ++q) h[k][q] = widen(convert<State>(moved[q]));
                                 if (mine && to >= 0)
                                   scan_step_store<K, Packs>(state.row(to, channel) + n, moved, N - n);
                               });
#pragma unroll
    for (int half = shape::lanes / 2; half > 0; half /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, half);
    A const value = of_channel.result(sum, x.u[0], x.z[0]);
    if (mine && lane == 0) y.row(b, t)[channel] = convert<T>(value);
  }
}

template <class T, int N, class State, int Rows, bool Packs>
void launch_scan_step(device::cuda const& policy, selective_scan::step_inputs<device::cuda, T, N> const& in,
                      view<space::device, State, dyn, dyn, dyn> state, view<space::device, T, dyn, dyn> y) {
  using shape = scan_step_shape<N>;
  unsigned const tiles = blocks_for(y.extent(1), shape::channels);
  std::int64_t const groups = (y.extent(0) + Rows - 1) / Rows;
  launch("selective_scan.step", policy, {blocks_for(groups * std::int64_t{tiles}, 1), shape::threads},
         scan_step<T, N, State, Rows, Packs>, in, state, y, tiles);
}

/// Whether a lane's states are packs in memory; where they can be, see
/// scan_step_shape::whole.
template <class Inputs, class State>
bool scan_step_in_packs(Inputs const& in, State const& state) {
  return rows_in_packs<4>(in.A) && rows_in_packs<4>(in.B) && rows_in_packs<4>(in.C) && rows_in_packs<4>(state);
}

template <class T, int N, class State>
void selective_scan_step(device::cuda const& policy, selective_scan::step_inputs<device::cuda, T, N> const& in,
                         view<space::device, State, dyn, dyn, dyn> state, view<space::device, T, dyn, dyn> y) {
  using shape = scan_step_shape<N>;
  constexpr int many = shape::states <= 8 ? 4 : 1;
  if constexpr (shape::whole) {
    if (scan_step_in_packs(in, state)) {
      if (y.extent(0) >= 32)
        launch_scan_step<T, N, State, many, true>(policy, in, state, y);
      else
        launch_scan_step<T, N, State, 1, true>(policy, in, state, y);
      return;
    }
  }
  launch_scan_step<T, N, State, 1, false>(policy, in, state, y);
}

template <class T, int N, class State>
void selective_scan_steps(device::cuda const& policy, selective_scan::token_inputs<device::cuda, T, N> const& in,
                          view<space::device, State, dyn, dyn, dyn> state, view<space::device, T, dyn, dyn, dyn> y) {
  using shape = scan_step_shape<N>;
  unsigned const tiles = blocks_for(y.extent(2), shape::channels);
  auto const run = [&](auto packs) {
    launch("selective_scan.steps", policy, {blocks_for(y.extent(0) * std::int64_t{tiles}, 1), shape::threads},
           scan_steps<T, N, State, packs()>, in, state, y, tiles);
  };
  if constexpr (shape::whole)
    if (scan_step_in_packs(in, state)) return run(std::true_type{});
  run(std::false_type{});
}

}  // namespace blackmamba::cuda::detail
