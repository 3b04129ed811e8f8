#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_exponential_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan_tuning.hpp>

#include <algorithm>
#include <cstdint>

/// Instantiated for each T and N in use: one kernel that writes y; where sequences are cut, one that finds the pieces'
/// last states, and one that carries states from piece to piece.
namespace blackmamba::cuda::detail {

/// `Lanes` neighbouring lanes share a channel. Each holds some of its states in registers over the whole sequence, and
/// does what a step needs once (softplus, gate, memory access) for one step out of `Lanes`, a group.
template <class T, int N, int Lanes>
struct scan_shape {
  using A = accum_t<T>;
  static constexpr int threads = 128, warps = threads / 32;
  static constexpr int channels = threads / Lanes;
  /// States of a lane; those beyond N stay zero.
  static constexpr int share = (N + Lanes - 1) / Lanes, states = share <= 2 ? share : (share + 3) / 4 * 4;
  static constexpr int width = Lanes * states;
  static constexpr int group = Lanes;
  /// Groups whose inputs are on their way, and that one turn of the loop works on; 32 steps are whole turns.
  static constexpr int depth = std::min(32 / group, std::clamp(256 / (states * group), 1, 4));
  static constexpr int turn = depth * group;
  /// Steps whose B and C are in shared memory at once.
  static constexpr int tile = width <= 64 ? 32 : turn;
  /// Steps whose B a lane reads with one access of four elements.
  static constexpr int together = std::min(std::max(4 / states, 1), group);
  static constexpr int columns = (N + 3) / 4;
  static constexpr int packs = (2 * tile * columns + threads - 1) / threads;
  static constexpr int shared_elements = 4 * tile * width + warps * 4 * 32;

  /// Where state n of step t of a tile lies.
  static __device__ __forceinline__ int place(int t, int n) {
    return ((t / together * Lanes + n / states) * together + t % together) * states + n % states;
  }
};

/// Steps of one sequence that one block works on.
struct scan_piece {
  std::int64_t sequence = 0;  ///< row of the states
  std::int64_t batch = 0;     ///< row of the tensors
  std::int64_t first = 0;     ///< its first step in that row
  std::int64_t before = 0;    ///< steps of the sequence before it
  std::int64_t chunk = 0;     ///< number of its first checkpoint
  int steps = 0;
  bool last = false;
  bool present = true;
};
/// How sequences are numbered: by themselves, or in pieces of `segment` steps, then with gaps where packed sequences end.
struct scan_numbering {
  std::int64_t const* cu_seqlens;
  std::int64_t batch, length, sequences;
  std::int64_t segment;  ///< 0: uncut

  std::int64_t per_row() const { return segment == 0 ? 1 : (length + segment - 1) / segment; }
  std::int64_t count() const {
    if (cu_seqlens != nullptr) return segment == 0 ? sequences : length / segment + sequences;
    return batch * per_row();
  }
  __device__ std::int64_t first_number(std::int64_t s) const { return cu_seqlens[s] / segment + s; }

  __device__ scan_piece operator()(std::int64_t number) const {
    scan_piece p;
    std::int64_t begin = 0, end = length, k = 0;
    if (cu_seqlens == nullptr) {
      std::int64_t const pieces = segment == 0 ? 1 : (length + segment - 1) / segment;
      p.sequence = p.batch = number / pieces;
      k = number % pieces;
      p.chunk = p.batch * ((length + selective_scan::chunk_length - 1) / selective_scan::chunk_length);
      if (length == 0) p.chunk = p.batch;
    } else {
      std::int64_t low = number;
      if (segment != 0) {
        low = 0;
        for (std::int64_t high = sequences; low + 1 < high;) {
          std::int64_t const middle = (low + high) / 2;
          (first_number(middle) <= number ? low : high) = middle;
        }
        k = number - first_number(low);
      }
      p.sequence = low;
      begin = cu_seqlens[low];
      end = cu_seqlens[low + 1];
      p.chunk = begin / selective_scan::chunk_length + low;
    }
    p.before = k * segment;
    p.first = begin + p.before;
    std::int64_t const rest = end - p.first;
    p.present = k == 0 || rest > 0;
    p.last = segment == 0 || rest <= segment;
    p.steps = static_cast<int>(p.last ? (rest > 0 ? rest : 0) : segment);
    p.chunk += p.before / selective_scan::chunk_length;
    return p;
  }
};

/// Sums y[i] over the lanes that share a channel, for each i; lane i gets the i-th sum. The sums are trees over lanes
/// that are the same for each i.
template <int Lanes, class A>
__device__ __forceinline__ A sums_by_lane(A (&y)[Lanes], int lane) {
#pragma unroll
  for (int half = Lanes / 2; half > 0; half /= 2) {
    bool const upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      A const given = upper ? y[i] : y[i + half], kept = upper ? y[i + half] : y[i];
      y[i] = kept + __shfl_xor_sync(0xffffffffu, given, half);
    }
  }
  return y[0];
}

template <class T, int N, int Lanes>
struct scan_states {
  using shape = scan_shape<T, N, Lanes>;
  using A = accum_t<T>;
  A h[shape::states];

  /// Of a channel's N states at p, this lane's.
  __device__ __forceinline__ void load(A const* p, int lane) {
    if constexpr (N % 4 == 0 && shape::states % 4 == 0) {
      if (pack_aligned<4>(p)) {
#pragma unroll
        for (int q = 0; q < shape::states; q += 4) {
          int const n = lane * shape::states + q;
          auto const x = n < N ? load_pack<4>(p + n) : pack<A, 4>{};
#pragma unroll
          for (int i = 0; i < 4; ++i) h[q + i] = x[i];
        }
        return;
      }
    }
#pragma unroll
    for (int q = 0; q < shape::states; ++q) {
      int const n = lane * shape::states + q;
      h[q] = n < N ? p[n] : A(0);
    }
  }
  __device__ __forceinline__ void store(A* p, int lane) const {
    if constexpr (N % 4 == 0 && shape::states % 4 == 0) {
      if (pack_aligned<4>(p)) {
#pragma unroll
        for (int q = 0; q < shape::states; q += 4) {
          int const n = lane * shape::states + q;
          pack<A, 4> x;
#pragma unroll
          for (int i = 0; i < 4; ++i) x[i] = h[q + i];
          if (n < N) store_pack<4>(p + n, x);
        }
        return;
      }
    }
#pragma unroll
    for (int q = 0; q < shape::states; ++q) {
      int const n = lane * shape::states + q;
      if (n < N) p[n] = h[q];
    }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int q = 0; q < shape::states; ++q) h[q] = A(0);
  }
};

/// B and C of the next tile on their way from memory to shared memory, in packs of four states.
template <class T, int N, int Lanes>
struct scan_projection {
  using shape = scan_shape<T, N, Lanes>;
  using A = accum_t<T>;
  raw_pack<T, 4> on_the_way[shape::packs];

  __device__ __forceinline__ void fetch(selective_scan::inputs<device::cuda, T, N> const& in, scan_piece const& piece,
                                        int t0, bool in_packs) {
#pragma unroll
    for (int k = 0; k < shape::packs; ++k) {
      int const i = static_cast<int>(threadIdx.x) + k * shape::threads,
                t = t0 + i % (shape::tile * shape::columns) / shape::columns, n = i % shape::columns * 4;
      raw_pack<T, 4>& x = on_the_way[k];
#pragma unroll
      for (int w = 0; w < raw_pack<T, 4>::words; ++w) x.w[w] = {};
      if (i >= 2 * shape::tile * shape::columns || t >= piece.steps) continue;
      auto const& from = i < shape::tile * shape::columns ? in.B : in.C;
      T const* const p = from.row(piece.batch, piece.first + t) + n;
      if (N % 4 == 0 && in_packs) {
#pragma unroll
        for (int w = 0; w < raw_pack<T, 4>::words; ++w)
          x.w[w] = reinterpret_cast<typename raw_pack<T, 4>::word const*>(p)[w];
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (n + e < N) x.e[e] = p[e];
      }
    }
  }
  /// to: (2, tile, width)
  __device__ __forceinline__ void put(A* to) const {
#pragma unroll
    for (int k = 0; k < shape::packs; ++k) {
      int const i = static_cast<int>(threadIdx.x) + k * shape::threads,
                t = i % (shape::tile * shape::columns) / shape::columns, n = i % shape::columns * 4;
      if (i >= 2 * shape::tile * shape::columns) continue;
      A* const half = to + (i < shape::tile * shape::columns ? 0 : shape::tile * shape::width);
      if constexpr (shape::states % 4 == 0) {
        pack<A, 4> x;
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = widen(on_the_way[k].e[e]);
        store_pack<4>(half + shape::place(t, n), x);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (n + e < shape::width) half[shape::place(t, n + e)] = widen(on_the_way[k].e[e]);
      }
    }
  }
  /// States beyond N that no pack reaches.
  static __device__ __forceinline__ void clear_rest(A* to) {
    if constexpr (4 * shape::columns < shape::width)
      for (int i = static_cast<int>(threadIdx.x); i < 4 * shape::tile * shape::width; i += shape::threads) to[i] = A(0);
  }
};

/// What a lane knows of its step in a group.
template <class T>
struct scan_step_values {
  accum_t<T> dt, dt_u, skip;
  T z;
};

/// Runs channels of one piece through its steps. With Outputs, from the state that reaches the piece, writing y,
/// checkpoints and the final state; without, from zero, leaving the last state and the sum of dt in work.
template <class T, int N, int Lanes, bool Outputs>
__global__ void __launch_bounds__(128)
    scan_forward(selective_scan::inputs<device::cuda, T, N> const in, view<space::device, T, dyn, dyn, dyn> const y,
                 selective_scan::results<device::cuda, T> const keep,
                 selective_scan::forward_workspace<device::cuda, T> const work, scan_numbering const numbering,
                 unsigned const channel_tiles, bool const in_packs) {
  using shape = scan_shape<T, N, Lanes>;
  using A = accum_t<T>;
  constexpr int Q = shape::states, group = shape::group, depth = shape::depth, V = shape::together;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  A* const projections = reinterpret_cast<A*>(shared_bytes);  // (2 buffers; B, C; tile, width)
  int const thread = static_cast<int>(threadIdx.x), lane = thread % Lanes;
  A* const exchange = projections + 4 * shape::tile * shape::width + thread / 32 * 128;  // (2 buffers; dt, dt u; 32)

  std::int64_t const number = blockIdx.x / channel_tiles;
  scan_piece const piece = numbering(number);
  if (!piece.present || (!Outputs && piece.last)) return;
  std::int64_t const channels = y.extent(2);
  std::int64_t const own = std::int64_t{blockIdx.x % channel_tiles} * shape::channels + thread / Lanes;
  bool const mine = own < channels;
  std::int64_t const channel = mine ? own : channels - 1;
  int const steps = piece.steps;

  scan_states<T, N, Lanes> state, rate;
  rate.load(in.A.row(channel), lane);
#pragma unroll
  for (int q = 0; q < Q; ++q) rate.h[q] = lane * Q + q < N ? scan_rate(rate.h[q], in.A_is_log) : A(0);
  if (Outputs && numbering.segment != 0)
    state.load(work.states.row(number, channel), lane);
  else if (Outputs && in.initial_state.present())
    state.load(in.initial_state.row(piece.sequence, channel), lane);
  else
    state.clear();
  auto const keep_checkpoint = [&](int t) {
    if (Outputs && keep.checkpoints.present() && mine)
      state.store(keep.checkpoints.data() + ((piece.chunk + t / selective_scan::chunk_length) * channels + channel) * N,
                  lane);
  };
  if (steps == 0) {
    keep_checkpoint(0);
    if (Outputs && keep.final_state.present() && mine) state.store(keep.final_state.row(piece.sequence, channel), lane);
    return;
  }

  A const skip = in.D.present() ? in.D.data()[channel] : A(0);
  A const bias = in.delta_bias.present() ? in.delta_bias.data()[channel] : A(0);
  bool const gated = in.z.present(), softplus = in.delta_softplus;
  auto const& z_view = gated ? in.z : in.u;
  T const* const u_row = in.u.row(piece.batch, piece.first) + channel;
  T const* const delta_row = in.delta.row(piece.batch, piece.first) + channel;
  T const* const z_row = z_view.row(piece.batch, piece.first) + channel;
  T* const y_row = y.row(piece.batch, piece.first) + channel;
  int const u_stride = static_cast<int>(in.u.stride(1)), delta_stride = static_cast<int>(in.delta.stride(1)),
            z_stride = static_cast<int>(z_view.stride(1)), y_stride = static_cast<int>(y.stride(1));

  T next_u[depth], next_delta[depth], next_z[depth];
  auto const fetch = [&](int slot, int t0) {
    std::int64_t const t = min(t0 + lane, steps - 1);
    next_u[slot] = u_row[t * u_stride];
    next_delta[slot] = delta_row[t * delta_stride];
    if (Outputs) next_z[slot] = z_row[t * z_stride];
  };
  A sum_dt = 0;
  auto const prepare = [&](int slot, int t0, A* to) {
    scan_step_values<T> x;
    bool const within = t0 + lane < steps;
    A const u = within ? widen(next_u[slot]) : A(0), raw = widen(next_delta[slot]) + bias;
    A const dt = softplus ? scan_softplus(raw) : raw;
    x.dt = within ? dt : A(0);
    x.dt_u = x.dt * u;
    x.skip = skip * u;
    x.z = next_z[slot];
    if (!Outputs) sum_dt += x.dt;
    if (Lanes > 1) {
      to[thread % 32] = x.dt;
      to[32 + thread % 32] = x.dt_u;
    }
    return x;
  };
  auto const finish = [&](scan_step_values<T> const& x, A sum, int t0) {
    int const t = t0 + lane;
    A value = sum + x.skip;
    A const z = widen(x.z);
    value *= gated ? z * scan_sigmoid(z) : A(1);
    if (mine && static_cast<unsigned>(t) < static_cast<unsigned>(steps))
      y_row[std::int64_t{t} * y_stride] = convert<T>(value);
  };

#pragma unroll
  for (int p = 0; p < depth; ++p) fetch(p, p * group);
  scan_projection<T, N, Lanes> projection;
  projection.fetch(in, piece, 0, in_packs);
  projection.clear_rest(projections);
  if (4 * shape::columns < shape::width) __syncthreads();
  projection.put(projections);
  scan_step_values<T> now = prepare(0, 0, exchange), before = now;
  A sum_before = 0;
  fetch(0, depth * group);
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
        int const begin = t0 + p * group;
        int const parity = depth % 2 == 0 ? p % 2 : begin / group % 2;  // the buffers of `exchange` alternate
        A dt[group], dt_u[group], sum[group];
        if constexpr (Lanes == 1) {
          dt[0] = now.dt;
          dt_u[0] = now.dt_u;
        } else {
          __syncwarp();
          A const* const from = exchange + parity * 64 + thread % 32 / Lanes * Lanes;
          constexpr int n = Lanes < 4 ? Lanes : 4;
#pragma unroll
          for (int i = 0; i < group; i += n) {
            auto const x = load_pack<n>(from + i), xu = load_pack<n>(from + 32 + i);
#pragma unroll
            for (int e = 0; e < n; ++e) dt[i + e] = x[e], dt_u[i + e] = xu[e];
          }
        }
        int const slot = (p + 1) % depth;
        scan_step_values<T> const next = prepare(slot, begin + group, exchange + (parity ^ 1) * 64);
        fetch(slot, begin + group + depth * group);
        pack<A, Q * V> b, c;
#pragma unroll
        for (int i = 0; i < group; ++i) {
          if (i % V == 0) {
            int const at = (turn + p * group + i) * shape::width;
            b = load_pack<Q * V>(B + at);
            if (Outputs) c = load_pack<Q * V>(C + at);
          }
          sum[i] = 0;
#pragma unroll
          for (int q = 0; q < Q; ++q) {
            A const decay = power_of_two(dt[i] * rate.h[q]);
            state.h[q] = decay * state.h[q] + dt_u[i] * b[i % V * Q + q];
            if (Outputs) sum[i] += c[i % V * Q + q] * state.h[q];
          }
        }
        if (Outputs) {
          finish(before, sum_before, begin - group);
          sum_before = sums_by_lane<Lanes>(sum, lane);
        }
        before = now;
        now = next;
      }
    }
    if (tile + shape::tile < steps) projection.put(projections + (buffer ^ 1) * (2 * shape::tile * shape::width));
    __syncthreads();
  }
  if (Outputs) {
    int const done = (steps + shape::turn - 1) / shape::turn * shape::turn;
    finish(before, sum_before, done - group);
    if (piece.last && keep.final_state.present() && mine)
      state.store(keep.final_state.row(piece.sequence, channel), lane);
  } else {
#pragma unroll
    for (int half = Lanes / 2; half > 0; half /= 2) sum_dt += __shfl_xor_sync(0xffffffffu, sum_dt, half);
    if (mine) {
      state.store(work.states.row(number, channel), lane);
      if (lane == 0) work.steps.row(number)[channel] = sum_dt;
    }
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
  std::int64_t length = numbering.length, first = s * ((length + numbering.segment - 1) / numbering.segment);
  if (numbering.cu_seqlens != nullptr) {
    length = numbering.cu_seqlens[s + 1] - numbering.cu_seqlens[s];
    first = numbering.first_number(s);
  }
  std::int64_t const pieces = length == 0 ? 1 : (length + numbering.segment - 1) / numbering.segment;
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

template <class T, int N, int Lanes, bool Outputs>
void launch_scan_forward(device::cuda const& policy, selective_scan::inputs<device::cuda, T, N> const& in,
                         view<space::device, T, dyn, dyn, dyn> y, selective_scan::results<device::cuda, T> const& keep,
                         selective_scan::forward_workspace<device::cuda, T> const& work,
                         scan_numbering const& numbering) {
  using shape = scan_shape<T, N, Lanes>;
  unsigned const tiles = blocks_for(y.extent(2), shape::channels);
  unsigned const blocks = blocks_for(numbering.count() * std::int64_t{tiles}, 1);
  bool const in_packs = rows_in_packs<4>(in.B) && rows_in_packs<4>(in.C);
  launch("selective_scan", policy, {blocks, shape::threads, shape::shared_elements * sizeof(accum_t<T>)},
         scan_forward<T, N, Lanes, Outputs>, in, y, keep, work, numbering, tiles, in_packs);
}

template <class T, int N, int Lanes>
void selective_scan_forward_with(device::cuda const& policy, selective_scan::inputs<device::cuda, T, N> const& in,
                                 view<space::device, T, dyn, dyn, dyn> y,
                                 selective_scan::results<device::cuda, T> const& keep,
                                 selective_scan::forward_workspace<device::cuda, T> const& work,
                                 scan_numbering const& numbering) {
  if (numbering.segment != 0) {
    launch_scan_forward<T, N, Lanes, false>(policy, in, y, keep, work, numbering);
    unsigned const blocks = blocks_for(numbering.sequences * y.extent(2) * N, 128);
    launch("selective_scan", policy, {blocks, 128}, scan_carry<T, N>, in.A, in.A_is_log, in.initial_state, work,
           numbering);
  }
  launch_scan_forward<T, N, Lanes, true>(policy, in, y, keep, work, numbering);
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
  selective_scan_forward_with<T, N, selective_scan_tuning::lanes_for(N)>(policy, in, y, keep, work, numbering);
}

}  // namespace blackmamba::cuda::detail
