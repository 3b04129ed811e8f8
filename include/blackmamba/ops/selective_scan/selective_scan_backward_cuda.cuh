#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_backward_parts_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan_exponential_cuda.cuh>

#include <cmath>
#include <cstdint>

/// Instantiated for each T and N in use: scan_backward, and what the parts' header names.
///
/// A block takes chunks of 32 steps, last chunk first, through 64 channels. Of each chunk it runs the recurrence
/// forward from the checkpoint once, keeping the state of every fourth step in shared memory; then, last four steps
/// first, forward again and back, with states and decays in registers. Sums over the states of a channel go from lane to
/// lane; so do sums over the channels of a warp, which are added up over warps, and by another kernel over blocks.
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
  static constexpr int pieces = adjoint_chunk / block::steps;                   ///< of a chunk
  static constexpr int start = block::lane_channels * block::lane_states;       ///< states of a lane
  static constexpr int starts = 0;                                              ///< (pieces - 2, start / 4, threads, 4)
  static constexpr int times = starts + (pieces - 2) * block::threads * start;  ///< (chunk, channels, 2)
  static constexpr int outputs = times + adjoint_chunk * block::channels * 2;   ///< (chunk, channels)
  static constexpr int B = outputs + adjoint_chunk * block::channels;           ///< (chunk, states)
  static constexpr int C = B + adjoint_chunk * block::states;
  static constexpr int sums = C + adjoint_chunk * block::states;  ///< (warps, steps, 2, states)
  static constexpr int parameters = sums + block::warps * block::steps * 2 * block::states;  ///< (warps, channels, 2)
  static constexpr int elements = parameters + block::warps * block::channels * 2;
};

template <class T, int N>
__global__ void __launch_bounds__(adjoint_block<T, N>::threads,
                                  sizeof(accum_t<T>) > 4 ? 1 : 512 / adjoint_block<T, N>::threads)
    scan_backward(selective_scan::gradient_inputs<device::cuda, T, N> const in,
                  selective_scan::gradients<device::cuda, T> const d,
                  selective_scan::workspace<device::cuda, T> const work, scan_chunks const chunks,
                  bool const in_packs) {
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
  A* const starts = shared + memory::starts + 4 * thread;
  A const* const B = shared + memory::B + own;
  A const* const C = shared + memory::C + own;
  A* const sums = shared + memory::sums;
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
        auto const at = [&](auto const& v, int t) {
          return v.row(chunk.batch, chunk.first + t) + first_channel + 4 * (thread % quads);
        };
        {
          std::int64_t const c = first_channel + 4 * (thread % quads), count = channels - c;
          auto const bias = in.delta_bias.present() ? load_some<4>(in.delta_bias.data() + c, count) : pack<A, 4>{};
#pragma unroll 2
          for (int t = thread / quads; t < adjoint_chunk; t += threads / quads) {
            pack<A, 8> x{};
            pack<A, 4> d_sum{};
            if (t < chunk.steps) {
              auto const load = [&](auto const& v) { return load_channels(at(v, t), count, in_packs); };
              auto const u = load(in.u), delta = load(in.delta), d_y = load(in.d_y);
              auto const z = in.z.present() ? load(in.z) : pack<A, 4>{};
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                bool const within = i < count;
                x[2 * i] = within ? time_step<A>(delta[i] + bias[i], in.delta_softplus).dt : A(0);
                x[2 * i + 1] = x[2 * i] * u[i];
                d_sum[i] = in.z.present() ? d_y[i] * gate<A>(z[i]).value : d_y[i];
              }
            }
            store_pack<8>(times + (t * width + 4 * (thread % quads)) * 2, x);
            store_pack<4>(outputs + t * width + 4 * (thread % quads), d_sum);
          }
        }
        stage_projection<threads, N, states, T>(in.B, chunk, shared + memory::B);
        stage_projection<threads, N, states, T>(in.C, chunk, shared + memory::C);
        __syncthreads();

        // Steps beyond the chunk's last have dt = 0 and no gradient: they change nothing.
        int const last = (chunk.steps - 1) / steps;
        A h[J][Q];
        auto const load_checkpoint = [&] {
#pragma unroll
          for (int j = 0; j < J; ++j)
            load_lane_states<N, Q>(in.checkpoints.data() + (chunk.number * channels + row_of(j)) * N, own, present(j),
                                   h[j]);
        };
        auto const start = [&](int piece, int j, int n) {
          return starts + ((piece - 1) * (memory::start / 4) + (j * Q + n) / 4) * 4 * threads;
        };
        load_checkpoint();
#pragma unroll 1
        for (int piece = 0; piece < last; ++piece) {
          if (piece > 0) {
#pragma unroll
            for (int j = 0; j < J; ++j)
#pragma unroll
              for (int n = 0; n < Q; n += 4)
                store_pack<4>(start(piece, j, n), pack<A, 4>{h[j][n], h[j][n + 1], h[j][n + 2], h[j][n + 3]});
          }
#pragma unroll
          for (int i = 0; i < steps; ++i) {
            int const t = piece * steps + i;
            auto const time = load_pack<2 * J>(times + (t * width + J * pair) * 2);
            auto const b = load_pack<Q>(B + t * states);
#pragma unroll
            for (int j = 0; j < J; ++j)
#pragma unroll
              for (int n = 0; n < Q; ++n)
                h[j][n] = power_of_two(time[2 * j] * rate[j][n]) * h[j][n] + time[2 * j + 1] * b[n];
          }
        }

#pragma unroll 1
        for (int piece = last; piece >= 0; --piece) {
          if (piece != last) {
            if (piece == 0) {
              load_checkpoint();
            } else {
#pragma unroll
              for (int j = 0; j < J; ++j)
#pragma unroll
                for (int n = 0; n < Q; n += 4) {
                  auto const x = load_pack<4>(static_cast<A const*>(start(piece, j, n)));
#pragma unroll
                  for (int k = 0; k < 4; ++k) h[j][n + k] = x[k];
                }
            }
          }
          A before[steps][J][Q], decay[steps][J][Q], y[steps * J];
          constexpr int kept = spread_count<S, 32, Q>;
          A* const sums_to = sums + warp * (steps * 2 * states) + own + spread_first<S, 32, Q>(lane);
          bool const writes = spread_writes<S, 32, Q>(lane);
#pragma unroll
          for (int i = 0; i < steps; ++i) {
            int const t = piece * steps + i;
            auto const time = load_pack<2 * J>(times + (t * width + J * pair) * 2);
            auto const d_y = load_pack<J>(outputs + t * width + J * pair);
            auto const b = load_pack<Q>(B + t * states), c = load_pack<Q>(C + t * states);
            A d_C[Q];
#pragma unroll
            for (int j = 0; j < J; ++j) {
              y[i * J + j] = A(0);
#pragma unroll
              for (int n = 0; n < Q; ++n) {
                before[i][j][n] = h[j][n];
                decay[i][j][n] = power_of_two(time[2 * j] * rate[j][n]);
                h[j][n] = decay[i][j][n] * h[j][n] + time[2 * j + 1] * b[n];
                y[i * J + j] += c[n] * h[j][n];
                d_C[n] = j == 0 ? d_y[j] * h[j][n] : d_C[n] + d_y[j] * h[j][n];
              }
            }
            spread_sums<S, 32, Q>(d_C, lane);
            if (writes) {
#pragma unroll
              for (int k = 0; k < kept; ++k) sums_to[(i * 2 + 1) * states + k] = d_C[k];
            }
          }
          spread_sums<1, S, steps * J>(y, lane);

          A d_dt_u[steps * J], d_dt[steps * J];
#pragma unroll
          for (int i = steps - 1; i >= 0; --i) {
            int const t = piece * steps + i;
            auto const time = load_pack<2 * J>(times + (t * width + J * pair) * 2);
            auto const d_y = load_pack<J>(outputs + t * width + J * pair);
            auto const b = load_pack<Q>(B + t * states), c = load_pack<Q>(C + t * states);
            A d_B[Q];
#pragma unroll
            for (int j = 0; j < J; ++j) {
              d_dt_u[i * J + j] = d_dt[i * J + j] = A(0);
#pragma unroll
              for (int n = 0; n < Q; ++n) {
                A const g = d_y[j] * c[n] + reaching[j][n];
                d_B[n] = j == 0 ? g * time[2 * j + 1] : d_B[n] + g * time[2 * j + 1];
                reaching[j][n] = g * decay[i][j][n];
                selective_scan_math::add_adjoint(g, reaching[j][n] * before[i][j][n], time[2 * j], rate[j][n], b[n],
                                                 d_dt_u[i * J + j], d_dt[i * J + j], d_A[j][n]);
              }
            }
            spread_sums<S, 32, Q>(d_B, lane);
            if (writes) {
#pragma unroll
              for (int k = 0; k < kept; ++k) sums_to[i * 2 * states + k] = d_B[k];
            }
          }
          spread_sums<1, S, steps * J>(d_dt_u, lane);
          spread_sums<1, S, steps * J>(d_dt, lane);
          __syncwarp();  // every lane has read what is overwritten now
          if (spread_writes<1, S, steps * J>(lane)) {
#pragma unroll
            for (int k = 0; k < spread_count<1, S, steps * J>; ++k) {
              int const item = spread_first<1, S, steps * J>(lane) + k;
              int const to = (piece * steps + item / J) * width + J * pair + item % J;
              store_pack<2>(times + 2 * to, pack<A, 2>{d_dt_u[k], d_dt[k]});
              outputs[to] = y[k];
            }
          }
          __syncthreads();
          for (int i = thread; i < steps * 2 * states; i += threads) {
            int const t = piece * steps + i / (2 * states), column = i % (2 * states), n = column % states;
            if (n >= N || t >= chunk.steps) continue;
            A sum = sums[i];
#pragma unroll
            for (int w = 1; w < block::warps; ++w) sum += sums[w * (steps * 2 * states) + i];
            A* const to = work.d_projection.row(group, chunk.batch * in.d_y.extent(1) + chunk.first + t) +
                          (column < states ? 0 : N) + n;
            *to = round == 0 ? sum : *to + sum;
          }
          __syncthreads();
        }

        {
          std::int64_t const c = first_channel + 4 * (thread % quads), count = channels - c;
          auto const parameter = [&](auto const& v) {
            return v.present() ? load_some<4>(v.data() + c, count) : pack<A, 4>{};
          };
          auto const bias = parameter(in.delta_bias), skip = parameter(in.D);
          pack<A, 4> d_skip{}, d_bias{};
#pragma unroll 1
          for (int t = thread / quads; t < chunk.steps; t += threads / quads) {
            auto const load = [&](auto const& v) { return load_channels(at(v, t), count, in_packs); };
            auto const u = load(in.u), delta = load(in.delta), d_y = load(in.d_y);
            auto const z = in.z.present() ? load(in.z) : pack<A, 4>{};
            auto const adjoint = load_pack<8>(times + (t * width + 4 * (thread % quads)) * 2);
            auto const y = load_pack<4>(outputs + t * width + 4 * (thread % quads));
            pack<A, 4> d_u, d_delta, d_z;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              time_step<A> const time(delta[i] + bias[i], in.delta_softplus);
              A d_sum = d_y[i];
              if (in.z.present()) {
                gate<A> const g(z[i]);
                d_z[i] = d_sum * (y[i] + skip[i] * u[i]) * g.slope;
                d_sum *= g.value;
              }
              d_u[i] = adjoint[2 * i] * time.dt + d_sum * skip[i];
              d_delta[i] = (adjoint[2 * i] * u[i] + adjoint[2 * i + 1] * A(selective_scan_math::ln_2)) * time.slope;
              d_skip[i] += d_sum * u[i];
              d_bias[i] += d_delta[i];
            }
            store_channels(at(d.d_u, t), d_u, count, in_packs);
            store_channels(at(d.d_delta, t), d_delta, count, in_packs);
            if (d.d_z.present()) store_channels(at(d.d_z, t), d_z, count, in_packs);
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
  bool const in_packs = packs(in.u, in.delta, in.z, in.d_y, d.d_u, d.d_delta, d.d_z);

  if (plan.cut) {
    unsigned const tiles = blocks_for(channels, block::channels);
    std::size_t const bytes =
        sizeof(A) * static_cast<std::size_t>(adjoint_chunk * (2 * block::channels + block::states));
    launch(op, policy, {blocks_for(tiles * plan.parts, 1), block::threads, bytes}, scan_adjoint_ends<T, N>, in, work,
           chunks, tiles, in_packs);
    launch(op, policy, {blocks_for(channels * N, 64), 64}, scan_adjoint_carry<T, N>, in.A, in.A_is_log, work);
  }
  launch(op, policy,
         {blocks_for(plan.groups * plan.parts, 1), block::threads, sizeof(A) * std::size_t{memory::elements}},
         scan_backward<T, N>, in, d, work, chunks, in_packs);
  constexpr int each = N % 4 == 0 ? 4 : 1;
  launch(op, policy, {blocks_for(batch * length * 2 * N, 128 * each), 128}, scan_projection_sums<each, T, N>,
         work.d_projection, d.d_B, d.d_C);
  launch(op, policy, {blocks_for(channels * (N + 2), 32), dim3(32, 8)}, scan_parameter_sums<T, N>, in.A, in.A_is_log, d,
         work);
}

}  // namespace blackmamba::cuda::detail
