#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_exponential_cuda.cuh>

#include <algorithm>
#include <bit>
#include <cstdint>

/// Instantiated for each T and N in use: one kernel.
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

template <class T, int N>
__global__ void __launch_bounds__(128)
    scan_step(selective_scan::step_inputs<device::cuda, T, N> const in,
              view<space::device, accum_t<T>, dyn, dyn, dyn> const state, view<space::device, T, dyn, dyn> const y,
              unsigned const channel_tiles) {
  using shape = scan_step_shape<N>;
  using A = accum_t<T>;
  constexpr int K = shape::states < 4 ? shape::states : 4;
  std::int64_t const b = blockIdx.x / channel_tiles;
  int const lane = static_cast<int>(threadIdx.x) % shape::lanes;
  std::int64_t const own =
      std::int64_t{blockIdx.x % channel_tiles} * shape::channels + static_cast<int>(threadIdx.x) / shape::lanes;
  bool const mine = own < y.extent(1);
  std::int64_t const channel = mine ? own : y.extent(1) - 1;

  A* const h = state.row(b, channel);
  A const* const rates = in.A.row(channel);
  T const *const B = in.B.row(b), *const C = in.C.row(b);
  pack<A, K> old[shape::states / K], a[shape::states / K], in_b[shape::states / K], in_c[shape::states / K];
#pragma unroll
  for (int k = 0; k < shape::states / K; ++k) {  // all loads first
    int const n = (k * shape::lanes + lane) * K, count = N - n;
    old[k] = load_states_of_lane<K>(h + n, count);
    a[k] = load_states_of_lane<K>(rates + n, count);
    in_b[k] = load_states_of_lane<K>(B + n, count);
    in_c[k] = load_states_of_lane<K>(C + n, count);
  }
  A const u = widen(in.u.row(b)[channel]);
  A dt = widen(in.delta.row(b)[channel]) + (in.delta_bias.present() ? in.delta_bias.data()[channel] : A(0));
  A const z = in.z.present() ? widen(in.z.row(b)[channel]) : A(0);
  A const skip = in.D.present() ? in.D.data()[channel] : A(0);
  if (in.delta_softplus) dt = scan_softplus(dt);
  A const dt_u = dt * u;

  A sum = 0;
#pragma unroll
  for (int k = 0; k < shape::states / K; ++k) {
    int const n = (k * shape::lanes + lane) * K, count = N - n;
#pragma unroll
    for (int q = 0; q < K; ++q) {
      A const decay = power_of_two(dt * scan_rate(a[k][q], in.A_is_log));
      old[k][q] = decay * old[k][q] + dt_u * in_b[k][q];
      sum += in_c[k][q] * old[k][q];
    }
    if (!mine) continue;
    if (count >= K && pack_aligned<K>(h + n))
      store_pack<K>(h + n, old[k]);
    else
      store_some<K>(h + n, old[k], count);
  }
#pragma unroll
  for (int half = shape::lanes / 2; half > 0; half /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, half);
  A value = sum + skip * u;
  if (in.z.present()) value *= z * scan_sigmoid(z);
  if (mine && lane == 0) y.row(b)[channel] = convert<T>(value);
}

template <class T, int N>
void selective_scan_step(device::cuda const& policy, selective_scan::step_inputs<device::cuda, T, N> const& in,
                         view<space::device, accum_t<T>, dyn, dyn, dyn> state, view<space::device, T, dyn, dyn> y) {
  using shape = scan_step_shape<N>;
  unsigned const tiles = blocks_for(y.extent(1), shape::channels);
  launch("selective_scan.step", policy, {blocks_for(y.extent(0) * std::int64_t{tiles}, 1), shape::threads},
         scan_step<T, N>, in, state, y, tiles);
}

}  // namespace blackmamba::cuda::detail
