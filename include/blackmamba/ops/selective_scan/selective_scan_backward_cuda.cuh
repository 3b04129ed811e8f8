#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_backward_parts_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan_exponential_cuda.cuh>

#include <cstdint>
#include <type_traits>

/// Instantiated for each T and N in use: scan_backward, and what the parts' header names.
///
/// A block takes chunks of 32 steps, last chunk first, through 64 channels. Of each chunk it runs the recurrence
/// forward from the checkpoint once, keeping the state before every fourth step in shared memory; then, last four steps
/// first, forward again and back, with states and decays in registers. Sums over the states of a channel go from lane
/// to lane; so do sums over the channels of a warp, which are added up over warps, and by another kernel over blocks.
namespace blackmamba::cuda::detail {

/// Sums each of v over the lanes that differ in the bits Begin to End / 2, in the same order everywhere. Each lane is
/// left with the sums of some, in the first elements of v: spread_count of them from spread_first on, the same ones in
/// lanes for which spread_writes tells one from its twins.
template <int Begin, int End, int Count, class A, int Size>
__device__ __forceinline__ void spread_sums(A (&v)[Size], int lane) {
  if constexpr (Begin < End) {
    if constexpr (Count > 1) {
      bool const upper = (lane & Begin) != 0;
#pragma unroll
      for (int i = 0; i < Count / 2; ++i) {
        A const given = upper ? v[i] : v[i + Count / 2], kept = upper ? v[i + Count / 2] : v[i];
        v[i] = kept + __shfl_xor_sync(0xffffffffu, given, Begin);
      }
      spread_sums<2 * Begin, End, Count / 2>(v, lane);
    } else {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], Begin);
      spread_sums<2 * Begin, End, 1>(v, lane);
    }
  }
}
template <int Begin, int End, int Count>
inline constexpr int spread_count = Begin<End && Count> 1 ? spread_count<2 * Begin, End, Count / 2> : Count;
template <int Begin, int Count>
inline constexpr int spread_count<Begin, Begin, Count> = Count;
template <int Begin, int End, int Count>
__device__ __forceinline__ int spread_first(int lane) {
  if constexpr (Begin < End && Count > 1)
    return ((lane & Begin) != 0 ? Count / 2 : 0) + spread_first<2 * Begin, End, Count / 2>(lane);
  else
    return 0;
}
template <int Begin, int End, int Count>
__device__ __forceinline__ bool spread_writes(int lane) {
  if constexpr (Begin < End)
    return (Count > 1 || (lane & Begin) == 0) && spread_writes<2 * Begin, End, (Count > 1 ? Count / 2 : 1)>(lane);
  else
    return true;
}

/// Shared memory of scan_backward, in elements.
template <class T, int N>
struct adjoint_memory {
  using block = adjoint_block<T, N>;
  static constexpr int pieces = adjoint_chunk / block::steps;                  ///< of a chunk
  static constexpr int slot = 32 * block::lane_channels * block::lane_states;  ///< states of a warp
  static constexpr int values = block::steps * 2 * block::states;              ///< of d_B and d_C in a piece
  static constexpr int starts = 0;                                             ///< (pieces - 1, warps, slot)
  static constexpr int times = starts + (pieces - 1) * block::warps * slot;    ///< (chunk, channels, 2)
  static constexpr int outputs = times + adjoint_chunk * block::channels * 2;  ///< (chunk, channels)
  static constexpr int B = outputs + adjoint_chunk * block::channels;          ///< (chunk, states)
  static constexpr int C = B + adjoint_chunk * block::states;
  static constexpr int sums = C + adjoint_chunk * block::states;   ///< (warps, steps, 2, states)
  static constexpr int parameters = sums + block::warps * values;  ///< (warps, channels, 2)
  /// Whether sums over the channels of a warp wait for the end of the chunk, each piece's in the slot that its states
  /// have left, so that warps don't wait for each other in between. The last piece has no slot.
  static constexpr bool late = values <= slot;
  static __device__ __forceinline__ int sums_of(int piece, int warp) {
    return !late || piece == pieces - 1 ? sums + warp * values : starts + (piece * block::warps + warp) * slot;
  }
  static __device__ __forceinline__ int sums_stride(int piece) { return !late || piece == pieces - 1 ? values : slot; }
  static constexpr int elements = parameters + block::warps * block::channels * 2;
  static_assert(elements * sizeof(accum_t<T>) <= 227 * 1024, "blackmamba: selective_scan: shared memory of a block");
};

template <class T, int N, bool Packs>
__global__ void __launch_bounds__(adjoint_block<T, N>::threads, adjoint_block<T, N>::resident)
    scan_backward(selective_scan::gradient_inputs<device::cuda, T, N> const in,
                  selective_scan::gradients<device::cuda, T> const d,
                  selective_scan::workspace<device::cuda, T> const work, scan_chunks const chunks) {
  using block = adjoint_block<T, N>;
  using memory = adjoint_memory<T, N>;
  using A = accum_t<T>;
  constexpr int J = block::lane_channels, Q = block::lane_states, S = block::lanes, width = block::channels;
  constexpr int steps = block::steps, quads = width / 4, states = block::states, threads = block::threads;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  A* const shared = reinterpret_cast<A*>(shared_bytes);
  A* const times = shared + memory::times;      // dt, dt u; then the sums over states of add_adjoint: d_dt_u, d_dt
  A* const outputs = shared + memory::outputs;  // the gradient of y before the gate; then C . h
  int const thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int const own = thread % S * Q, pair = thread / S;  // the lane's first state, and which channels
  A* const starts = shared + memory::starts + warp * memory::slot + lane * 4;
  A const* const B = shared + memory::B + own;
  A const* const C = shared + memory::C + own;
  A* const parameters = shared + memory::parameters + warp * width * 2;
  unsigned const groups = static_cast<unsigned>(chunks.plan.groups);
  std::int64_t const group = blockIdx.x % groups, part = blockIdx.x / groups, channels = in.d_y.extent(2);

#pragma unroll 1
  for (int round = 0; round < block::rounds; ++round) {
    std::int64_t const first_channel = group * block::group_channels + round * width;
    if (first_channel >= channels) break;
    std::int64_t const channel = first_channel + J * pair;
    auto const present = [&](int j) { return channel + j < channels; };
    auto const row_of = [&](int j) { return present(j) ? channel + j : 0; };

    A rate[J][Q], reaching[J][Q], d_A[J][Q];
#pragma unroll
    for (int j = 0; j < J; ++j) {
      load_lane_states<N, Q>(in.A.row(row_of(j)), own, present(j), rate[j]);
#pragma unroll
      for (int n = 0; n < Q; ++n) {
        rate[j][n] = present(j) && own + n < N ? scan_rate(rate[j][n], in.A_is_log) : A(0);
        reaching[j][n] = d_A[j][n] = A(0);
      }
    }
    for (int i = lane; i < 2 * width; i += 32) parameters[i] = A(0);

    std::int64_t const begin = chunks.begin(part);
    bool entered = false;
    std::int64_t s = chunks.owner(chunks.end(part) - 1);
#pragma unroll 1
    for (std::int64_t number = chunks.end(part) - 1; number >= begin; --number) {
      scan_chunk chunk;
      if (!chunks.find(number, s, chunk)) continue;
      if (chunk.ends || !entered) {
        bool const given = chunk.ends ? in.d_final_state.present() : true;
#pragma unroll
        for (int j = 0; j < J; ++j) {
          A const* const from = !given       ? in.A.data()
                                : chunk.ends ? in.d_final_state.row(chunk.sequence, row_of(j))
                                             : work.carry.row(part, row_of(j));
          load_lane_states<N, Q>(from, own, given && present(j), reaching[j]);
        }
      }
      entered = true;
      if (chunk.steps > 0) {
        int const quad = thread % quads;
        std::int64_t const quad_channel = first_channel + 4 * quad;
        int const count = static_cast<int>(min(channels - quad_channel, std::int64_t{4}));
        bool const gated = in.z.present();
        choice<A> const softplus(in.delta_softplus), gating(gated);
        auto const quad_of = [&](auto const& v) {
          return channel_quad<std::remove_pointer_t<decltype(v.data())>, Packs>(v, chunk, quad_channel, count);
        };
        auto const parameter = [&](auto const& v) {
          return v.present() ? load_some<4>(v.data() + quad_channel, count) : pack<A, 4>{};
        };
        A h[J][Q];  // on its way while what follows is prepared
#pragma unroll
        for (int j = 0; j < J; ++j)
          load_lane_states<N, Q>(in.checkpoints.data() + (chunk.number * channels + row_of(j)) * N, own, present(j),
                                 h[j]);
        constexpr int turn = threads / quads;  // steps that the block's threads hold at once
        {
          constexpr int batch = adjoint_batch(turn, sizeof(T) > 2 ? 2 : 4);
          auto const bias = parameter(in.delta_bias);
          auto const u_of = quad_of(in.u), delta_of = quad_of(in.delta), d_y_of = quad_of(in.d_y);
          auto const z_of = gated ? quad_of(in.z) : d_y_of;
#pragma unroll 1
          for (int t0 = thread / quads; t0 < adjoint_chunk; t0 += batch * turn) {
            raw_pack<T, 4> u[batch], delta[batch], d_y[batch], z[batch];
#pragma unroll
            for (int k = 0; k < batch; ++k) {
              int const t = t0 + k * turn;
              bool const within = t < chunk.steps;
              u[k] = u_of.fetch(t, within), delta[k] = delta_of.fetch(t, within);
              d_y[k] = d_y_of.fetch(t, within), z[k] = z_of.fetch(t, within);
            }
#pragma unroll
            for (int k = 0; k < batch; ++k) {
              int const t = t0 + k * turn;
              pack<A, 8> x;
              pack<A, 4> d_sum;
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                A const dt = time_step<A>(widen(delta[k].e[i]) + bias[i], softplus).dt;
                x[2 * i] = t < chunk.steps ? dt : A(0);
                x[2 * i + 1] = x[2 * i] * widen(u[k].e[i]);
                d_sum[i] = widen(d_y[k].e[i]) * gate<A>(widen(z[k].e[i]), gating).value;
              }
              store_pack<8>(times + (t * width + 4 * quad) * 2, x);
              store_pack<4>(outputs + t * width + 4 * quad, d_sum);
            }
          }
        }
        using projection_part = projection_rows<T, N, states, threads, Packs>;
#pragma unroll 1
        for (int i = thread; i < projection_part::all; i += projection_part::batch * threads) {
          projection_part b, c;
          b.fetch(in.B, chunk, i), c.fetch(in.C, chunk, i);
          b.put(shared + memory::B, i), c.put(shared + memory::C, i);
        }
        __syncthreads();

        if (!chunk.begins) {
          // What the next chunk reads: the rows before these. A warp asks for one of the tensors.
          constexpr int elements = 128 / static_cast<int>(sizeof(T)), lines = (width + elements - 1) / elements;
          auto const ask = [&](auto const& v) {
            for (int i = lane; i < adjoint_chunk * lines; i += 32) {
              std::int64_t const line = first_channel + i % lines * elements;
              if (line < channels) prefetch_line(v.row(chunk.batch, chunk.first - adjoint_chunk + i / lines) + line);
            }
          };
          for (int k = warp; k < 4; k += block::warps) {
            if (k == 0) ask(in.u);
            if (k == 1) ask(in.delta);
            if (k == 2) ask(in.d_y);
            if (k == 3 && gated) ask(in.z);
          }
        }
        A* const lane_times = times + J * pair * 2;
        A* const lane_outputs = outputs + J * pair;
        A* const projection = work.d_projection.row(group, chunk.batch * in.d_y.extent(1) + chunk.first);
        // Sums over warps of steps [from, to).
        auto const add_up = [&](int from, int to) {
          constexpr int each = N % 4 == 0 ? 4 : 1, columns = 2 * states / each;
          for (int i = from * columns + thread; i < to * columns; i += threads) {
            int const t = i / columns, column = i % columns * each, piece = t / steps;
            if (N != states && column % states >= N) continue;
            A const* p = shared + memory::sums_of(piece, 0) + t % steps * (2 * states) + column;
            auto sum = load_pack<each>(p);
#pragma unroll
            for (int w = 1; w < block::warps; ++w) {
              auto const x = load_pack<each>(p += memory::sums_stride(piece));
#pragma unroll
              for (int k = 0; k < each; ++k) sum[k] += x[k];
            }
            A* const out = projection + t * (2 * N) + (column < states ? column : column - states + N);
            if (block::rounds > 1 && round > 0) {
              auto const x = load_pack<each>(static_cast<A const*>(out));
#pragma unroll
              for (int k = 0; k < each; ++k) sum[k] += x[k];
            }
            store_pack<each>(out, sum);
          }
        };
        // Steps beyond the chunk's last have dt = 0 and no gradient: they change nothing.
        int const last = (chunk.steps - 1) / steps;
        auto const start = [&](int piece, int j, int n) {
          return starts + piece * (block::warps * memory::slot) + (j * Q + n) / 4 * 128;
        };
        pack<A, 2 * J> times_next[steps];
        pack<A, Q> b_next[steps];
        auto const load_next = [&](int piece) {
#pragma unroll
          for (int i = 0; i < steps; ++i) {
            times_next[i] = load_pack<2 * J>(lane_times + (piece * steps + i) * (width * 2));
            b_next[i] = load_pack<Q>(B + (piece * steps + i) * states);
          }
        };
        load_next(0);
#pragma unroll 2
        for (int piece = 0; piece < last; ++piece) {
          pack<A, 2 * J> time[steps];
          pack<A, Q> b[steps];
#pragma unroll
          for (int i = 0; i < steps; ++i) time[i] = times_next[i], b[i] = b_next[i];
          load_next(piece + 1);
#pragma unroll
          for (int j = 0; j < J; ++j)
#pragma unroll
            for (int n = 0; n < Q; n += 4)
              store_pack<4>(start(piece, j, n), pack<A, 4>{h[j][n], h[j][n + 1], h[j][n + 2], h[j][n + 3]});
#pragma unroll
          for (int i = 0; i < steps; ++i)
#pragma unroll
            for (int j = 0; j < J; ++j)
#pragma unroll
              for (int n = 0; n < Q; ++n)
                h[j][n] = selective_scan_math::advance(power_of_two(time[i][2 * j] * rate[j][n]), h[j][n],
                                                       time[i][2 * j + 1] * b[i][n]);
        }

        pack<A, 2 * J> time[steps];
        pack<A, J> d_y[steps];
        pack<A, Q> b[steps], c[steps];
        auto const load_piece = [&](int piece) {
#pragma unroll
          for (int i = 0; i < steps; ++i) {
            int const t = piece * steps + i;
            time[i] = load_pack<2 * J>(lane_times + t * (width * 2));
            d_y[i] = load_pack<J>(lane_outputs + t * width);
            b[i] = load_pack<Q>(B + t * states);
            c[i] = load_pack<Q>(C + t * states);
          }
        };
        load_piece(last);
#pragma unroll 1
        for (int piece = last; piece >= 0; --piece) {
          A before[steps][J][Q], decay[steps][J][Q], y[steps * J], d_C[Q * steps];
#pragma unroll
          for (int i = 0; i < steps; ++i)
#pragma unroll
            for (int j = 0; j < J; ++j) {
              A const dt = time[i][2 * j], dt_u = time[i][2 * j + 1];
              y[i * J + j] = A(0);
#pragma unroll
              for (int n = 0; n < Q; ++n) {
                before[i][j][n] = h[j][n];
                decay[i][j][n] = power_of_two(dt * rate[j][n]);
                h[j][n] = selective_scan_math::advance(decay[i][j][n], h[j][n], dt_u * b[i][n]);
                y[i * J + j] += c[i][n] * h[j][n];
                d_C[n * steps + i] = d_y[i][j] * h[j][n] + (j == 0 ? A(0) : d_C[n * steps + i]);
              }
            }
          spread_sums<S, 32, Q * steps>(d_C, lane);
          spread_sums<1, S, steps * J>(y, lane);

          A d_dt_u[steps * J], d_dt[steps * J], d_B[Q * steps];
#pragma unroll
          for (int i = steps - 1; i >= 0; --i)
#pragma unroll
            for (int j = 0; j < J; ++j) {
              A const dt = time[i][2 * j], dt_u = time[i][2 * j + 1];
              d_dt_u[i * J + j] = d_dt[i * J + j] = A(0);
#pragma unroll
              for (int n = 0; n < Q; ++n) {
                A const g = d_y[i][j] * c[i][n] + reaching[j][n];
                d_B[n * steps + i] = g * dt_u + (j == 0 ? A(0) : d_B[n * steps + i]);
                reaching[j][n] = g * decay[i][j][n];
                selective_scan_math::add_adjoint(g, reaching[j][n] * before[i][j][n], dt, rate[j][n], b[i][n],
                                                 d_dt_u[i * J + j], d_dt[i * J + j], d_A[j][n]);
              }
            }
          // What the next piece begins with is on its way while sums move between lanes. The first piece asks for its
          // own once more.
          int const next = max(piece - 1, 0);
          load_piece(next);
#pragma unroll
          for (int j = 0; j < J; ++j)
#pragma unroll
            for (int n = 0; n < Q; n += 4) {
              auto const x = load_pack<4>(static_cast<A const*>(start(next, j, n)));
#pragma unroll
              for (int k = 0; k < 4; ++k) h[j][n + k] = x[k];
            }
          spread_sums<S, 32, Q * steps>(d_B, lane);
          spread_sums<1, S, steps * J>(d_dt_u, lane);
          spread_sums<1, S, steps * J>(d_dt, lane);
          // All that is written, last: no store stands in the way of a load.
          __syncwarp();  // every lane has read what is overwritten now
          if (spread_writes<S, 32, Q * steps>(lane)) {
            A* const to = shared + memory::sums_of(piece, warp) + own;
#pragma unroll
            for (int k = 0; k < spread_count<S, 32, Q * steps>; ++k) {
              int const item = spread_first<S, 32, Q * steps>(lane) + k, at = item % steps * 2 * states + item / steps;
              to[at] = d_B[k];
              to[at + states] = d_C[k];
            }
          }
          if (spread_writes<1, S, steps * J>(lane)) {
#pragma unroll
            for (int k = 0; k < spread_count<1, S, steps * J>; ++k) {
              int const item = spread_first<1, S, steps * J>(lane) + k;
              int const at = (piece * steps + item / J) * width + item % J;
              store_pack<2>(lane_times + 2 * at, pack<A, 2>{d_dt_u[k], d_dt[k]});
              lane_outputs[at] = y[k];
            }
          }
          if constexpr (!memory::late) {
            __syncthreads();
            add_up(piece * steps, min(chunk.steps, (piece + 1) * steps));
            __syncthreads();
          }
        }
        if constexpr (memory::late) {
          __syncthreads();
          add_up(0, chunk.steps);
        }

        {
          constexpr int batch = adjoint_batch(turn, 2);
          auto const bias = parameter(in.delta_bias), skip = parameter(in.D);
          auto const u_of = quad_of(in.u), delta_of = quad_of(in.delta), d_y_of = quad_of(in.d_y);
          auto const z_of = gated ? quad_of(in.z) : d_y_of;
          auto const d_u_of = quad_of(d.d_u), d_delta_of = quad_of(d.d_delta), d_z_of = quad_of(d.d_z);
          bool const d_z_wanted = d.d_z.present();
          pack<A, 4> d_skip{}, d_bias{};
#pragma unroll 1
          for (int t0 = thread / quads; t0 < chunk.steps; t0 += batch * turn) {
            raw_pack<T, 4> u[batch], delta[batch], d_y[batch], z[batch];
#pragma unroll
            for (int k = 0; k < batch; ++k) {
              int const t = t0 + k * turn;
              bool const within = t < chunk.steps;
              u[k] = u_of.fetch(t, within), delta[k] = delta_of.fetch(t, within);
              d_y[k] = d_y_of.fetch(t, within), z[k] = z_of.fetch(t, within);
            }
#pragma unroll
            for (int k = 0; k < batch; ++k) {
              int const t = t0 + k * turn;
              if (t >= chunk.steps) continue;
              auto const adjoint = load_pack<8>(times + (t * width + 4 * quad) * 2);
              auto const y = load_pack<4>(outputs + t * width + 4 * quad);
              pack<A, 4> d_u, d_delta, d_z;
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                A const x = widen(u[k].e[i]);
                time_step<A> const time(widen(delta[k].e[i]) + bias[i], softplus);
                gate<A> const g(widen(z[k].e[i]), gating);
                A const d_gated = widen(d_y[k].e[i]), d_sum = d_gated * g.value;
                d_z[i] = d_gated * (y[i] + skip[i] * x) * g.slope;
                d_u[i] = adjoint[2 * i] * time.dt + d_sum * skip[i];
                d_delta[i] = (adjoint[2 * i] * x + adjoint[2 * i + 1] * A(selective_scan_math::ln_2)) * time.slope;
                d_skip[i] += d_sum * x;
                d_bias[i] += d_delta[i];
              }
              d_u_of.put(t, d_u);
              d_delta_of.put(t, d_delta);
              if (d_z_wanted) d_z_of.put(t, d_z);
            }
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int distance = 16; distance >= quads; distance /= 2) {
              d_skip[i] += __shfl_xor_sync(0xffffffffu, d_skip[i], distance);
              d_bias[i] += __shfl_xor_sync(0xffffffffu, d_bias[i], distance);
            }
            if (lane < quads && i < count) {
              parameters[(4 * lane + i) * 2] += d_skip[i];
              parameters[(4 * lane + i) * 2 + 1] += d_bias[i];
            }
          }
        }
        __syncthreads();
      }
      if (chunk.begins && d.d_initial_state.present()) {
#pragma unroll
        for (int j = 0; j < J; ++j)
          store_lane_states<N, Q>(d.d_initial_state.row(chunk.sequence, row_of(j)), own, present(j), reaching[j]);
      }
    }

#pragma unroll
    for (int j = 0; j < J; ++j) store_lane_states<N, Q>(work.d_A.row(part, row_of(j)), own, present(j), d_A[j]);
    __syncthreads();
    for (int i = thread; i < 2 * width; i += threads) {
      if (first_channel + i / 2 >= channels) continue;
      A sum = 0;
#pragma unroll
      for (int w = 0; w < block::warps; ++w) sum += shared[memory::parameters + w * width * 2 + i];
      work.d_channel.row(part, i % 2)[first_channel + i / 2] = sum;
    }
    __syncthreads();
  }
}

template <class T, int N>
void selective_scan_backward(device::cuda const& policy, selective_scan::gradient_inputs<device::cuda, T, N> const& in,
                             selective_scan::gradients<device::cuda, T> const& d,
                             selective_scan::workspace<device::cuda, T> const& work) {
  using block = adjoint_block<T, N>;
  using memory = adjoint_memory<T, N>;
  using A = accum_t<T>;
  static_assert(block::channels % 4 == 0 && block::channels <= 128 && 32 % (block::channels / 4) == 0,
                "blackmamba: selective_scan: a warp's lanes cover the block's channels");
  constexpr char const* op = "selective_scan.backward";
  std::int64_t const batch = in.d_y.extent(0), length = in.d_y.extent(1), channels = in.d_y.extent(2);
  std::int64_t const sequences = in.cu_seqlens.present() ? in.cu_seqlens.extent(0) - 1 : batch;
  auto const plan = selective_scan::device_plan<N, T>(batch, length, channels, sequences);
  scan_chunks const chunks{
      .cu_seqlens = in.cu_seqlens.data(),
      .length = length,
      .sequences = sequences,
      .row_chunks = selective_scan::chunks(batch, length, sequences),
      .plan = plan,
  };
  auto const packs = [](auto const&... views) { return (rows_in_packs<4>(views) && ...); };
  auto const run = [&](auto in_packs) {
    if (plan.cut) {
      std::int64_t const tiles = (channels + block::channels - 1) / block::channels;
      std::size_t const bytes = sizeof(A) * std::size_t{adjoint_chunk * (2 * block::channels + block::states)};
      launch(op, policy, {blocks_for(tiles * plan.parts, 1), block::threads, bytes},
             scan_adjoint_ends<T, N, in_packs()>, in, work, chunks, static_cast<unsigned>(tiles));
      launch(op, policy, {blocks_for(channels * N, 64), 64}, scan_adjoint_carry<T, N>, in.A, in.A_is_log, work);
    }
    launch(op, policy,
           {blocks_for(plan.groups * plan.parts, 1), block::threads, sizeof(A) * std::size_t{memory::elements}},
           scan_backward<T, N, in_packs()>, in, d, work, chunks);
  };
  if (packs(in.u, in.delta, in.z, in.d_y, d.d_u, d.d_delta, d.d_z) && (N % 4 != 0 || packs(in.B, in.C)))
    run(std::true_type{});
  else
    run(std::false_type{});
  constexpr int each = N % 4 == 0 ? 4 : 1;
  launch(op, policy, {blocks_for(batch * length * 2 * N, 128 * each), 128}, scan_projection_sums<each, T, N>,
         work.d_projection, d.d_B, d.d_C);
  launch(op, policy, {blocks_for(channels * (N + 2), 32), dim3(32, 8)}, scan_parameter_sums<T, N>, in.A, in.A_is_log, d,
         work);
}

}  // namespace blackmamba::cuda::detail
