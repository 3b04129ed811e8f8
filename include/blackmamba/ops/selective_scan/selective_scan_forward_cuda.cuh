#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_exponential_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan_forward_roles_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan_tiles_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan_tuning.hpp>

#include <algorithm>
#include <cstdint>
#include <type_traits>

/// Instantiated for each T and N in use: one kernel that writes y; where sequences are cut, one that finds the pieces'
/// last states, and one that carries states from piece to piece. For 16-bit types with sixteen states
/// scan_forward_roles takes the place of the first two where rows come in packs.
namespace blackmamba::cuda::detail {

/// What a lane knows of its step in a group.
template <class T, int Pair>
struct scan_step_values {
  accum_t<T> dt[Pair], dt_u[Pair], skip[Pair];
  scan_elements<T, Pair> z;
};

/// Runs channels of one piece through its steps. With Outputs, from the state that reaches the piece, writing y,
/// checkpoints and the final state; without, from zero, leaving the last state and the sum of dt in work.
template <class T, int N, int Lanes, int Pair, bool Outputs>
__global__ void __launch_bounds__(128, 3)
    scan_forward(selective_scan::inputs<device::cuda, T, N> const in, view<space::device, T, dyn, dyn, dyn> const y,
                 selective_scan::results<device::cuda, T> const keep,
                 selective_scan::forward_workspace<device::cuda, T> const work, scan_numbering const numbering,
                 unsigned const channel_tiles, bool const in_packs) {
  using shape = scan_shape<T, N, Lanes, Pair>;
  using sums = scan_sums<Lanes, accum_t<T>>;
  using values = scan_step_values<T, Pair>;
  using A = accum_t<T>;
  constexpr int Q = shape::states, group = shape::group, depth = shape::depth, V = shape::together;
  constexpr bool early = shape::early;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  A* const projections = reinterpret_cast<A*>(shared_bytes);  // (2 buffers; B, C; tile, width)
  int const thread = static_cast<int>(threadIdx.x), lane = thread % Lanes, in_warp = thread % 32;
  A* const exchange = projections + 4 * shape::tile * shape::width + thread / 32 * shape::shared_of_warp;
  A* const parts = exchange + 4 * Pair * 32;

  std::int64_t const number = blockIdx.x / channel_tiles, channel_tile = blockIdx.x % channel_tiles;
  scan_piece const piece = numbering(number);
  if (!piece.present || (!Outputs && piece.last)) return;
  std::int64_t const channels = y.extent(2);
  std::int64_t const own = channel_tile * shape::channels + thread / Lanes * Pair;
  bool const mine = own < channels;
  std::int64_t const channel = mine ? own : channels - Pair;
  int const steps = piece.steps;

  scan_states<T, N, Lanes> state[Pair], rate[Pair];
  A skip[Pair], bias[Pair];
#pragma unroll
  for (int k = 0; k < Pair; ++k) {
    rate[k].load(in.A.row(channel + k), lane);
#pragma unroll
    for (int q = 0; q < Q; ++q) rate[k].h[q] = lane * Q + q < N ? scan_rate(rate[k].h[q], in.A_is_log) : A(0);
    skip[k] = in.D.present() ? in.D.data()[channel + k] : A(0);
    bias[k] = in.delta_bias.present() ? in.delta_bias.data()[channel + k] : A(0);
  }
  auto const load_states = [&](A const* p, std::int64_t stride) {
#pragma unroll
    for (int k = 0; k < Pair; ++k) state[k].load(p + k * stride, lane);
  };
  auto const store_states = [&](A* p, std::int64_t stride) {
#pragma unroll
    for (int k = 0; k < Pair; ++k) state[k].store(p + k * stride, lane);
  };
  if (Outputs && numbering.segment != 0) {
    load_states(work.states.row(number, channel), N);
  } else if (Outputs && in.initial_state.present()) {
    load_states(in.initial_state.row(piece.sequence, channel), in.initial_state.stride(1));
  } else {
#pragma unroll
    for (int k = 0; k < Pair; ++k) state[k].clear();
  }
  auto const keep_checkpoint = [&](int t) {
    if (Outputs && keep.checkpoints.present() && mine)
      store_states(
          keep.checkpoints.data() + ((piece.chunk + t / selective_scan::chunk_length) * channels + channel) * N, N);
  };
  auto const keep_final = [&] {
    if (Outputs && keep.final_state.present() && mine)
      store_states(keep.final_state.row(piece.sequence, channel), keep.final_state.stride(1));
  };
  if (steps == 0) {
    keep_checkpoint(0);
    return keep_final();
  }

  auto const& z_view = in.z.present() ? in.z : in.u;
  auto const gated = scan_mask<A>(in.z.present()), softplus = scan_mask<A>(in.delta_softplus);
  scan_column<T const> const u_column(in.u, piece, channel), delta_column(in.delta, piece, channel),
      z_column(z_view, piece, channel);
  scan_column<T> const y_column(y, piece, channel);

  scan_elements<T, Pair> next_u[depth], next_delta[depth], next_z[depth] = {};
  auto const fetch = [&](int slot, int t0) {
    unsigned const t = static_cast<unsigned>(min(t0 + lane, steps - 1));
    next_u[slot].load(u_column.at(t));
    next_delta[slot].load(delta_column.at(t));
    if (Outputs) next_z[slot].load(z_column.at(t));
  };
  A sum_dt[Pair] = {};
  // Steps beyond the last keep the state: dt is zero there, and u that of the last step.
  auto const prepare = [&](int slot, int t0, A* to) {
    values x;
#pragma unroll
    for (int k = 0; k < Pair; ++k) {
      A const u = next_u[slot][k], raw = next_delta[slot][k] + bias[k];
      A const dt = selected(softplus, scan_softplus(raw), raw);
      x.dt[k] = t0 + lane < steps ? dt : A(0);
      x.dt_u[k] = times(x.dt[k], u);
      x.skip[k] = times(skip[k], u);
      if (!Outputs) sum_dt[k] += x.dt[k];
      if (Lanes > 1) {
        to[k * 64 + in_warp] = x.dt[k];
        to[k * 64 + 32 + in_warp] = x.dt_u[k];
      }
    }
    x.z = next_z[slot];
    return x;
  };
  int const writable = mine ? steps : 0;
  auto const finish = [&](values const& x, A const(&sum)[Pair], int t0) {
    unsigned const t = static_cast<unsigned>(t0 + lane);
    A value[Pair];
#pragma unroll
    for (int k = 0; k < Pair; ++k) {
      A const z = x.z[k];
      value[k] = times(sum[k] + x.skip[k], selected(gated, times(z, scan_sigmoid(z)), A(1)));
    }
    if (t < static_cast<unsigned>(writable)) scan_elements<T, Pair>::store(y_column.at(t), value);
  };
  // Steps [i, i + at_once) of a group, of all its lanes.
  constexpr int at_once = Lanes < 4 ? Lanes : 4;
  auto const take_steps = [&](values const& own_step, A const* from, int i, A(&dt)[Pair][group],
                              A(&dt_u)[Pair][group]) {
#pragma unroll
    for (int k = 0; k < Pair; ++k) {
      if constexpr (Lanes == 1) {
        dt[k][0] = own_step.dt[k];
        dt_u[k][0] = own_step.dt_u[k];
      } else {
        A const* const p = from + k * 64 + in_warp / Lanes * Lanes + i;
        auto const x = load_pack<at_once>(p), xu = load_pack<at_once>(p + 32);
#pragma unroll
        for (int e = 0; e < at_once; ++e) dt[k][i + e] = x[e], dt_u[k][i + e] = xu[e];
      }
    }
  };
  auto const take_sums = [&](int parity, A(&sum)[Pair]) {
#pragma unroll
    for (int k = 0; k < Pair; ++k) sum[k] = sums::take(parts + (parity * Pair + k) * sums::elements, in_warp);
  };

#pragma unroll
  for (int p = 0; p < depth; ++p) fetch(p, p * group);
  scan_projection<T, N, Lanes> projection;
  projection.fetch(in, piece, 0, in_packs);
  projection.clear_rest(projections);
  if (4 * shape::columns < shape::width) __syncthreads();
  projection.put(projections);
  // The steps of the group before, of the one that the states move through, and of the next one.
  values now = prepare(0, 0, exchange), before = now, next = now;
  A decay[group][Pair][Q], dt_u[Pair][group];  // of the group that the states move through, where made early
  A sum_before[Pair] = {};
  fetch(0, depth * group);
  auto const make_decays = [&](A const(&dt)[Pair][group], A(&to)[group][Pair][Q]) {
#pragma unroll
    for (int i = 0; i < group; ++i)
#pragma unroll
      for (int k = 0; k < Pair; ++k)
#pragma unroll
        for (int q = 0; q < Q; ++q) to[i][k][q] = power_of_two(times(dt[k][i], rate[k].h[q]));
  };
  if constexpr (early) {
    A dt[Pair][group];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < group; i += at_once) take_steps(now, exchange, i, dt, dt_u);
    make_decays(dt, decay);
    next = prepare(1 % depth, group, exchange + Pair * 64);
    fetch(1 % depth, (depth + 1) * group);
  }
  __syncthreads();

  for (int tile = 0, buffer = 0; tile < steps; tile += shape::tile, buffer ^= 1) {
    if (tile + shape::tile < steps) projection.fetch(in, piece, tile + shape::tile, in_packs);
    A const* const B = projections + buffer * (2 * shape::tile * shape::width) + lane * (Q * V);
    A const* const C = B + shape::tile * shape::width;
#pragma unroll 1
    for (int turn = 0; turn < shape::tile; turn += shape::turn) {
      int const t0 = tile + turn;
      if (t0 >= steps) break;
      if (t0 % selective_scan::chunk_length == 0) keep_checkpoint(t0);
#pragma unroll
      for (int p = 0; p < depth; ++p) {
        constexpr int lead = early ? 1 : 0;
        int const begin = t0 + p * group;
        int const parity = depth % 2 == 0 ? p % 2 : begin / group % 2;  // the buffers of a warp alternate
        A dt[Pair][group], next_dt_u[Pair][group], next_decay[group][Pair][Q], sum[Pair][group];
        __syncwarp();
        if constexpr (Outputs && Lanes >= 4) take_sums(parity ^ 1, sum_before);
        A const* const stepping = exchange + (parity ^ lead) * (Pair * 64);
        if constexpr (early) {
#pragma unroll
          for (int i = 0; i < group; i += at_once) take_steps(next, stepping, i, dt, next_dt_u);
          make_decays(dt, next_decay);
        } else {
          take_steps(now, stepping, 0, dt, next_dt_u);  // at once, before its use; later ones as they are needed
        }
        int const slot = (p + 1 + lead) % depth, ahead = begin + (1 + lead) * group;
        values const after = prepare(slot, ahead, exchange + (parity ^ lead ^ 1) * (Pair * 64));
        fetch(slot, ahead + depth * group);
        pack<A, Q * V> b, c;
#pragma unroll
        for (int i = 0; i < group; ++i) {
          if (!early && i > 0 && i % at_once == 0) take_steps(now, stepping, i, dt, next_dt_u);
          if (i % V == 0) {
            int const at = (turn + p * group + i) * shape::width;
            b = load_pack<Q * V>(B + at);
            if (Outputs) c = load_pack<Q * V>(C + at);
          }
#pragma unroll
          for (int k = 0; k < Pair; ++k) {
            A const x = early ? dt_u[k][i] : next_dt_u[k][i];
#pragma unroll
            for (int q = 0; q < Q; ++q) {
              int const e = i % V * Q + q;
              A const a = early ? decay[i][k][q] : power_of_two(times(dt[k][i], rate[k].h[q]));
              A& h = state[k].h[q];
              h = math::fma(a, h, times(x, b[e]));
              if (Outputs) sum[k][i] = q == 0 ? times(c[e], h) : math::fma(c[e], h, sum[k][i]);
            }
          }
        }
        if constexpr (Outputs) {
          finish(before, sum_before, begin - group);
#pragma unroll
          for (int k = 0; k < Pair; ++k) {
            if constexpr (Lanes >= 4)
              sums::put(parts + (parity * Pair + k) * sums::elements, in_warp, sum[k]);
            else
              sum_before[k] = sums_by_lane(sum[k], lane);
          }
        }
        before = now;
        now = early ? next : after;
        next = after;
        if constexpr (early) {
#pragma unroll
          for (int i = 0; i < group; ++i)
#pragma unroll
            for (int k = 0; k < Pair; ++k) {
              dt_u[k][i] = next_dt_u[k][i];
#pragma unroll
              for (int q = 0; q < Q; ++q) decay[i][k][q] = next_decay[i][k][q];
            }
        }
      }
    }
    if (tile + shape::tile < steps) projection.put(projections + (buffer ^ 1) * (2 * shape::tile * shape::width));
    __syncthreads();
  }
  if constexpr (Outputs) {
    int const done = (steps + shape::turn - 1) / shape::turn * shape::turn;
    if constexpr (Lanes >= 4) {
      __syncwarp();
      take_sums((done / group + 1) % 2, sum_before);
    }
    finish(before, sum_before, done - group);
    if (piece.last) keep_final();
  } else {
#pragma unroll
    for (int k = 0; k < Pair; ++k)
#pragma unroll
      for (int half = Lanes / 2; half > 0; half /= 2) sum_dt[k] += __shfl_xor_sync(0xffffffffu, sum_dt[k], half);
    if (!mine) return;
    store_states(work.states.row(number, channel), N);
#pragma unroll
    for (int k = 0; k < Pair; ++k)
      if (lane == 0) work.steps.row(number)[channel + k] = sum_dt[k];
  }
}

/// Turns the last states of pieces that began with zero into the states that pieces begin with: over a piece a state
/// decays by exp(A times the sum of dt). One thread for each state of each sequence, piece after piece.
template <class T, int N>
__global__ void __launch_bounds__(128)
    scan_carry(view<space::device, accum_t<T> const, dyn, dyn> const rates, bool const A_is_log,
               view<space::device, accum_t<T> const, dyn, dyn, dyn> const initial,
               selective_scan::forward_workspace<device::cuda, T> const work, scan_numbering const numbering) {
  using A = accum_t<T>;
  constexpr int ahead = 16;  // pieces whose states are on their way
  std::int64_t const channels = rates.extent(0);
  std::int64_t const i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= numbering.sequences * channels * N) return;
  std::int64_t const s = i / (channels * N), channel = i / N % channels, n = i % N;
  std::int64_t const length =
      numbering.cu_seqlens != nullptr ? numbering.cu_seqlens[s + 1] - numbering.cu_seqlens[s] : numbering.length;
  std::int64_t const pieces = numbering.pieces_of(length), first = numbering.first_number(s);
  A const rate = scan_rate(rates.row(channel)[n], A_is_log);
  A h = initial.present() ? initial.row(s, channel)[n] : A(0);
  A* const states = work.states.row(first, channel) + n;
  A const* const steps = work.steps.row(first) + channel;
  for (std::int64_t k = 0; k < pieces; k += ahead) {
    A last[ahead], sum[ahead];
#pragma unroll
    for (int a = 0; a < ahead; ++a) {
      bool const carries_on = k + a + 1 < pieces;
      last[a] = carries_on ? states[(k + a) * channels * N] : A(0);
      sum[a] = carries_on ? steps[(k + a) * channels] : A(0);
    }
#pragma unroll
    for (int a = 0; a < ahead; ++a) {
      if (k + a < pieces) states[(k + a) * channels * N] = h;
      h = power_of_two(rate * sum[a]) * h + last[a];
    }
  }
}

template <class T, int N>
void carry_states(device::cuda const& policy, selective_scan::inputs<device::cuda, T, N> const& in,
                  std::int64_t channels, selective_scan::forward_workspace<device::cuda, T> const& work,
                  scan_numbering const& numbering) {
  unsigned const blocks = blocks_for(numbering.sequences * channels * N, 128);
  launch("selective_scan", policy, {blocks, 128}, scan_carry<T, N>, in.A, in.A_is_log, in.initial_state, work,
         numbering);
}

template <class T, int N, int Lanes, int Pair, bool Outputs>
void launch_scan_forward(device::cuda const& policy, selective_scan::inputs<device::cuda, T, N> const& in,
                         view<space::device, T, dyn, dyn, dyn> y, selective_scan::results<device::cuda, T> const& keep,
                         selective_scan::forward_workspace<device::cuda, T> const& work,
                         scan_numbering const& numbering) {
  using shape = scan_shape<T, N, Lanes, Pair>;
  unsigned const tiles = blocks_for(y.extent(2), shape::channels);
  unsigned const blocks = blocks_for(numbering.count() * std::int64_t{tiles}, 1);
  bool const in_packs = rows_in_packs<4>(in.B) && rows_in_packs<4>(in.C);
  launch("selective_scan", policy, {blocks, shape::threads, shape::shared_elements * sizeof(accum_t<T>)},
         scan_forward<T, N, Lanes, Pair, Outputs>, in, y, keep, work, numbering, tiles, in_packs);
}

template <class T, int N, int Lanes, int Pair>
void selective_scan_forward_with(device::cuda const& policy, selective_scan::inputs<device::cuda, T, N> const& in,
                                 view<space::device, T, dyn, dyn, dyn> y,
                                 selective_scan::results<device::cuda, T> const& keep,
                                 selective_scan::forward_workspace<device::cuda, T> const& work,
                                 scan_numbering const& numbering) {
  if (numbering.segment != 0) {
    launch_scan_forward<T, N, Lanes, Pair, false>(policy, in, y, keep, work, numbering);
    carry_states(policy, in, y.extent(2), work, numbering);
  }
  launch_scan_forward<T, N, Lanes, Pair, true>(policy, in, y, keep, work, numbering);
}

template <class T, int Pair, int Tile, bool Outputs>
void launch_scan_roles(device::cuda const& policy, selective_scan::inputs<device::cuda, T, 16> const& in,
                       view<space::device, T, dyn, dyn, dyn> y, selective_scan::results<device::cuda, T> const& keep,
                       selective_scan::forward_workspace<device::cuda, T> const& work,
                       scan_numbering const& numbering) {
  using shape = scan_roles<T, Pair, Tile>;
  unsigned const tiles = blocks_for(y.extent(2), shape::channels);
  unsigned const blocks = blocks_for(numbering.count() * std::int64_t{tiles}, 1);
  launch("selective_scan", policy, {blocks, shape::threads, shape::bytes}, scan_forward_roles<T, Pair, Tile, Outputs>,
         in, y, keep, work, numbering, tiles);
}

template <class T, int N>
void selective_scan_forward(device::cuda const& policy, selective_scan::inputs<device::cuda, T, N> const& in,
                            view<space::device, T, dyn, dyn, dyn> y,
                            selective_scan::results<device::cuda, T> const& keep,
                            selective_scan::forward_workspace<device::cuda, T> const& work) {
  std::int64_t const batch = y.extent(0), length = y.extent(1), channels = y.extent(2);
  bool const packed = in.cu_seqlens.present();
  std::int64_t const sequences = packed ? in.cu_seqlens.extent(0) - 1 : batch;
  if (sequences == 0) return;
  auto const plan = selective_scan_tuning::plan_forward(N, length, channels, sequences);
  scan_numbering const numbering{packed ? in.cu_seqlens.data() : nullptr, batch, length, sequences, plan.segment};
  constexpr int lanes = selective_scan_tuning::lanes_for(N), pair = sizeof(T) <= 4 && N <= 128 ? 2 : 1;
  if constexpr (sizeof(T) == 2 && N == 16) {
    bool const in_packs = rows_in_packs<8>(in.u) && rows_in_packs<8>(in.delta) && rows_in_packs<8>(in.z) &&
                          rows_in_packs<4>(in.B) && rows_in_packs<4>(in.C) && rows_in_packs<2>(y);
    if (in_packs) {
      bool const whole = plan.whole && (!packed || selective_scan_tuning::plan_forward(N, length, channels, 1).whole);
      if (plan.narrow || whole) {
        auto uncut = numbering;
        uncut.segment = 0;
        return launch_scan_roles<T, 1, 32, true>(policy, in, y, keep, work, uncut);
      }
      if (numbering.segment != 0) {
        launch_scan_roles<T, 2, 16, false>(policy, in, y, keep, work, numbering);
        carry_states(policy, in, y.extent(2), work, numbering);
      }
      return launch_scan_roles<T, 2, 16, true>(policy, in, y, keep, work, numbering);
    }
  }
  bool const pairs =
      rows_in_packs<pair>(in.u) && rows_in_packs<pair>(in.delta) && rows_in_packs<pair>(in.z) && rows_in_packs<pair>(y);
  if (pairs)
    selective_scan_forward_with<T, N, lanes, pair>(policy, in, y, keep, work, numbering);
  else
    selective_scan_forward_with<T, N, lanes, 1>(policy, in, y, keep, work, numbering);
}

}  // namespace blackmamba::cuda::detail
