#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_exponential_cuda.cuh>

#include <algorithm>
#include <bit>
#include <cstdint>

/// Instantiated for each T and N in use: one kernel for few sequences, one for many.
namespace blackmamba::cuda::detail {

/// One token: `lanes` neighbouring lanes share a channel of a sequence and hold four states each (fewer or more at N
/// below 3 or above 128).
template <int N>
struct scan_step_shape {
  static constexpr int threads = 128;
  static constexpr int lanes = static_cast<int>(std::bit_ceil(static_cast<unsigned>(std::clamp((N + 3) / 4, 1, 32))));
  static constexpr int share = (N + lanes - 1) / lanes, states = share <= 2 ? share : (share + 3) / 4 * 4;
  static constexpr int channels = threads / lanes;
};

/// As load_pack, for N states of which some may lie beyond the channel's, or at an odd address.
template <int K, class X>
__device__ __forceinline__ pack<accum_t<X>, K> load_states_of_lane(X const* p, int count) {
  if (count >= K && pack_aligned<K>(p)) return load_pack<K>(p);
  return load_some<K>(p, count);
}

/// Rows: sequences that a thread moves on, with rates that it makes once; all their states are on their way at once.
template <class T, int N, int Rows>
__global__ void __launch_bounds__(128)
    scan_step(selective_scan::step_inputs<device::cuda, T, N> const in,
              view<space::device, accum_t<T>, dyn, dyn, dyn> const state, view<space::device, T, dyn, dyn> const y,
              unsigned const channel_tiles) {
  using shape = scan_step_shape<N>;
  using A = accum_t<T>;
  constexpr int K = shape::states < 4 ? shape::states : 4, packs = shape::states / K;
  std::int64_t const batch = y.extent(0), first = std::int64_t{blockIdx.x / channel_tiles} * Rows;
  int const lane = static_cast<int>(threadIdx.x) % shape::lanes;
  std::int64_t const own =
      std::int64_t{blockIdx.x % channel_tiles} * shape::channels + static_cast<int>(threadIdx.x) / shape::lanes;
  bool const mine = own < y.extent(1);
  std::int64_t const channel = mine ? own : y.extent(1) - 1;

  // All loads first; rows beyond the batch are the last one, and not stored.
  pack<A, K> h[Rows][packs], rate[packs];
  A u[Rows], dt[Rows], z[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    std::int64_t const b = first + r < batch ? first + r : batch - 1;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      int const n = (k * shape::lanes + lane) * K;
      h[r][k] = load_states_of_lane<K>(state.row(b, channel) + n, N - n);
    }
    u[r] = widen(in.u.row(b)[channel]);
    dt[r] = widen(in.delta.row(b)[channel]);
    z[r] = in.z.present() ? widen(in.z.row(b)[channel]) : A(0);
  }
#pragma unroll
  for (int k = 0; k < packs; ++k) {
    int const n = (k * shape::lanes + lane) * K;
    rate[k] = load_states_of_lane<K>(in.A.row(channel) + n, N - n);
#pragma unroll
    for (int q = 0; q < K; ++q) rate[k][q] = scan_rate(rate[k][q], in.A_is_log);
  }
  A const bias = in.delta_bias.present() ? in.delta_bias.data()[channel] : A(0);
  A const skip = in.D.present() ? in.D.data()[channel] : A(0);

#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    std::int64_t const b = first + r < batch ? first + r : batch - 1;
    bool const writes = mine && first + r < batch;
    A const raw = dt[r] + bias, step = in.delta_softplus ? scan_softplus(raw) : raw, step_u = times(step, u[r]);
    A sum = 0;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      int const n = (k * shape::lanes + lane) * K, count = N - n;
      auto const in_b = load_states_of_lane<K>(in.B.row(b) + n, count),
                 in_c = load_states_of_lane<K>(in.C.row(b) + n, count);
#pragma unroll
      for (int q = 0; q < K; ++q) {
        A const decay = power_of_two(times(step, rate[k][q]));
        h[r][k][q] = math::fma(decay, h[r][k][q], times(step_u, in_b[q]));
        sum = math::fma(in_c[q], h[r][k][q], sum);
      }
      A* const to = state.row(b, channel) + n;
      if (!writes) continue;
      if (count >= K && pack_aligned<K>(to))
        store_pack<K>(to, h[r][k]);
      else
        store_some<K>(to, h[r][k], count);
    }
#pragma unroll
    for (int half = shape::lanes / 2; half > 0; half /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, half);
    A value = sum + times(skip, u[r]);
    if (in.z.present()) value = times(value, times(z[r], scan_sigmoid(z[r])));
    if (writes && lane == 0) y.row(b)[channel] = convert<T>(value);
  }
}

template <class T, int N, int Rows>
void launch_scan_step(device::cuda const& policy, selective_scan::step_inputs<device::cuda, T, N> const& in,
                      view<space::device, accum_t<T>, dyn, dyn, dyn> state, view<space::device, T, dyn, dyn> y) {
  using shape = scan_step_shape<N>;
  unsigned const tiles = blocks_for(y.extent(1), shape::channels);
  std::int64_t const groups = (y.extent(0) + Rows - 1) / Rows;
  launch("selective_scan.step", policy, {blocks_for(groups * std::int64_t{tiles}, 1), shape::threads},
         scan_step<T, N, Rows>, in, state, y, tiles);
}

template <class T, int N>
void selective_scan_step(device::cuda const& policy, selective_scan::step_inputs<device::cuda, T, N> const& in,
                         view<space::device, accum_t<T>, dyn, dyn, dyn> state, view<space::device, T, dyn, dyn> y) {
  constexpr int many = scan_step_shape<N>::states <= 8 ? 4 : 1;
  if (y.extent(0) >= 32)
    launch_scan_step<T, N, many>(policy, in, state, y);
  else
    launch_scan_step<T, N, 1>(policy, in, state, y);
}

}  // namespace blackmamba::cuda::detail
