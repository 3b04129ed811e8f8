#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_exponential_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan_tiles_cuda.cuh>

#include <algorithm>
#include <bit>
#include <cstdint>

/// Instantiated for each T and N in use: one kernel for few sequences, one for many, one for rows at odd addresses.
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

/// K elements on their way from memory: with Packs at once, without any of them one by one, zeros beyond `count`. What
/// is on its way stays as it is in memory; the first use of a converted value would wait for it.
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

/// Rows: sequences that a thread moves on, with rates that it makes once; all their states are on their way at once.
template <class T, int N, int Rows, bool Packs>
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
  auto const& z_view = in.z.present() ? in.z : in.u;
  scan_step_load<A, K, Packs> old[Rows][packs], rates[packs];
  scan_step_load<T, K, Packs> in_b[Rows][packs], in_c[Rows][packs];
  scan_elements<T, 1> u[Rows], delta[Rows], z[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    std::int64_t const b = first + r < batch ? first + r : batch - 1;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      int const n = (k * shape::lanes + lane) * K;
      old[r][k].load(state.row(b, channel) + n, N - n);
      in_b[r][k].load(in.B.row(b) + n, N - n);
      in_c[r][k].load(in.C.row(b) + n, N - n);
    }
    // y may be one of them.
    delta[r].load_current(in.delta.row(b) + channel);
    u[r].load_current(in.u.row(b) + channel);
    z[r].load_current(z_view.row(b) + channel);
  }
  A rate[packs * K];
#pragma unroll
  for (int k = 0; k < packs; ++k) {
    int const n = (k * shape::lanes + lane) * K;
    rates[k].load(in.A.row(channel) + n, N - n);
#pragma unroll
    for (int q = 0; q < K; ++q) rate[k * K + q] = scan_rate(rates[k][q], in.A_is_log);
  }
  A const bias = in.delta_bias.present() ? in.delta_bias.data()[channel] : A(0);
  A const skip = in.D.present() ? in.D.data()[channel] : A(0);
  auto const gated = scan_mask<A>(in.z.present()), softplus = scan_mask<A>(in.delta_softplus);

#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    std::int64_t const b = first + r < batch ? first + r : batch - 1;
    bool const writes = mine && first + r < batch;
    A const raw = delta[r][0] + bias, dt = selected(softplus, scan_softplus(raw), raw), dt_u = times(dt, u[r][0]);
    A sum = 0;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      int const n = (k * shape::lanes + lane) * K;
      pack<A, K> h;
#pragma unroll
      for (int q = 0; q < K; ++q) {
        A const decay = power_of_two(times(dt, rate[k * K + q]));
        h[q] = math::fma(decay, old[r][k][q], times(dt_u, in_b[r][k][q]));
        sum = math::fma(in_c[r][k][q], h[q], sum);
      }
      if (!writes) continue;
      if constexpr (Packs)
        store_pack<K>(state.row(b, channel) + n, h);
      else
        store_some<K>(state.row(b, channel) + n, h, N - n);
    }
#pragma unroll
    for (int half = shape::lanes / 2; half > 0; half /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, half);
    A const gate = z[r][0];
    A const value = times(sum + times(skip, u[r][0]), selected(gated, times(gate, scan_sigmoid(gate)), A(1)));
    if (writes && lane == 0) y.row(b)[channel] = convert<T>(value);
  }
}

template <class T, int N, int Rows, bool Packs>
void launch_scan_step(device::cuda const& policy, selective_scan::step_inputs<device::cuda, T, N> const& in,
                      view<space::device, accum_t<T>, dyn, dyn, dyn> state, view<space::device, T, dyn, dyn> y) {
  using shape = scan_step_shape<N>;
  unsigned const tiles = blocks_for(y.extent(1), shape::channels);
  std::int64_t const groups = (y.extent(0) + Rows - 1) / Rows;
  launch("selective_scan.step", policy, {blocks_for(groups * std::int64_t{tiles}, 1), shape::threads},
         scan_step<T, N, Rows, Packs>, in, state, y, tiles);
}

template <class T, int N>
void selective_scan_step(device::cuda const& policy, selective_scan::step_inputs<device::cuda, T, N> const& in,
                         view<space::device, accum_t<T>, dyn, dyn, dyn> state, view<space::device, T, dyn, dyn> y) {
  using shape = scan_step_shape<N>;
  constexpr int many = shape::states <= 8 ? 4 : 1;
  if constexpr (N % 4 == 0 && N == shape::lanes * shape::states) {
    if (rows_in_packs<4>(in.A) && rows_in_packs<4>(in.B) && rows_in_packs<4>(in.C) && rows_in_packs<4>(state)) {
      if (y.extent(0) >= 32)
        launch_scan_step<T, N, many, true>(policy, in, state, y);
      else
        launch_scan_step<T, N, 1, true>(policy, in, state, y);
      return;
    }
  }
  launch_scan_step<T, N, 1, false>(policy, in, state, y);
}

}  // namespace blackmamba::cuda::detail
