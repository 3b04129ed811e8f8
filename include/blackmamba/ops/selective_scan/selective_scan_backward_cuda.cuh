#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_backward_parts_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan_backward_sums_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan_exponential_cuda.cuh>

#include <cstdint>
#include <type_traits>

/// Instantiated for each T and N in use: scan_backward, and what the parts' header names.
///
/// A block takes chunks of 32 steps, last chunk first, through 64 channels. Of each chunk it runs the recurrence
/// forward from the checkpoint once, keeping the state before every fourth step in shared memory; then, last four steps
/// first, forward again and back, with states and decays in registers. Sums over the states of a channel go from lane
/// to lane; sums over the channels of a warp too, or by way of shared memory, see state_sums; they are added up over
/// warps, and by another kernel over blocks. Inputs of a chunk are on their way while the one before is finished.
namespace blackmamba::cuda::detail {

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
  static constexpr int parameters = sums + block::warps * values;  ///< (2, threads, 4)  of d_D, of d_delta_bias
  /// Whether sums over the channels of a warp wait for the end of the chunk, each piece's in the slot that its states
  /// have left, so that warps don't wait for each other in between. The last piece has no slot.
  static constexpr bool late = values <= slot;
  static __device__ __forceinline__ int sums_of(int piece, int warp) {
    return !late || piece == pieces - 1 ? sums + warp * values : starts + (piece * block::warps + warp) * slot;
  }
  static __device__ __forceinline__ int sums_stride(int piece) { return !late || piece == pieces - 1 ? values : slot; }
  /// Whether sums over the channels of a warp go by way of shared memory, as state_sums, and not from lane to lane.
  static constexpr bool shared_sums = sizeof(accum_t<T>) == 4 && block::lanes == 4 && block::lane_states == 4 &&
                                      block::lane_channels == 2 && block::steps == 4;
  static constexpr int exchange_elements = shared_sums ? state_sums<accum_t<T>>::elements : 0;
  static constexpr int channel_values = parameters + block::threads * 8;    ///< (2, channels)  delta_bias, D
  static constexpr int exchange = channel_values + 2 * block::channels;     ///< (warps, exchange_elements)
  static constexpr int walk = exchange + block::warps * exchange_elements;  ///< chunk_walk
  static constexpr int elements = walk + static_cast<int>(sizeof(chunk_walk) / sizeof(accum_t<T>));
  static_assert(walk % 4 == 0);
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
  A* const parameters = shared + memory::parameters + thread * 4;
  [[maybe_unused]] A* const exchange = shared + memory::exchange + warp * memory::exchange_elements;
  auto& walk = *reinterpret_cast<chunk_walk*>(shared + memory::walk);
  bool const gated = in.z.present();
  auto const z_view = gated ? in.z : in.d_y;
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
    store_pack<4>(parameters, pack<A, 4>{});
    store_pack<4>(parameters + 4 * threads, pack<A, 4>{});

    std::int64_t const begin = chunks.begin(part);
    if (thread == 0) {
      walk.set(chunk_walk::u, in.u, first_channel), walk.set(chunk_walk::delta, in.delta, first_channel);
      walk.set(chunk_walk::d_y, in.d_y, first_channel), walk.set(chunk_walk::z, z_view, first_channel);
      walk.set(chunk_walk::d_u, d.d_u, first_channel), walk.set(chunk_walk::d_delta, d.d_delta, first_channel);
      walk.set(chunk_walk::d_z, d.d_z, first_channel);
      walk.set(chunk_walk::B, in.B, 0), walk.set(chunk_walk::C, in.C, 0);
      walk.number = chunks.end(part) - 1, walk.sequence = chunks.owner(chunks.end(part) - 1);
    }
    for (int i = thread; i < 2 * width; i += threads) {
      auto const& v = i < width ? in.delta_bias : in.D;
      std::int64_t const c = first_channel + i % width;
      shared[memory::channel_values + i] = v.present() && c < channels ? v.data()[c] : A(0);
    }
    // Four channels of some steps are a thread's to prepare and to finish.
    int const quad = thread % quads;
    int const count = static_cast<int>(min(channels - first_channel - 4 * quad, std::int64_t{4}));
    constexpr int turn = threads / quads;  // steps that the block's threads hold at once; may exceed a chunk
    constexpr int batch = adjoint_batch(turn, sizeof(T) > 2 ? 2 : 4);
    A const* const biases = shared + memory::channel_values + 4 * quad;
    A const* const skips = biases + width;
    struct step_inputs {
      raw_pack<T, 4> u[batch], delta[batch], d_y[batch], z[batch];
    };
    auto const quad_of = [&](auto const& v, std::int64_t row) {
      using element = std::remove_pointer_t<decltype(v.data())>;
      return channel_quad<element, Packs>(v, row + 4 * quad * static_cast<int>(sizeof(T)), count);
    };
    auto const fetch = [&](chunk_walk::record const& of, int t0) {
      auto const u = quad_of(in.u, of.rows[chunk_walk::u]), delta = quad_of(in.delta, of.rows[chunk_walk::delta]),
                 d_y = quad_of(in.d_y, of.rows[chunk_walk::d_y]), z = quad_of(z_view, of.rows[chunk_walk::z]);
      step_inputs x;
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        int const t = t0 + k * turn;
        bool const within = t < of.steps;
        x.u[k] = u.fetch(t, within), x.delta[k] = delta.fetch(t, within);
        x.d_y[k] = d_y.fetch(t, within), x.z[k] = z.fetch(t, within);
      }
      return x;
    };
    __syncthreads();
    if (warp == 0) walk.find(chunks, begin, walk.records[0], lane);
    __syncthreads();
    step_inputs ahead = fetch(walk.records[0], thread / quads);  // on their way while the chunk before is finished

    bool entered = false;
#pragma unroll 1
    for (int place = 0;; place = 1 - place) {
      chunk_walk::record const &chunk = walk.records[place], &next = walk.records[1 - place];
      int const chunk_steps = uniform(chunk.steps);
      if (chunk_steps < 0) break;
      if (chunk.ends || !entered) {
        bool const ends = chunk.ends, given = ends ? in.d_final_state.present() : true;
#pragma unroll
        for (int j = 0; j < J; ++j) {
          A const* const from = !given ? in.A.data()
                                : ends ? in.d_final_state.row(chunk.sequence, row_of(j))
                                       : work.carry.row(part, row_of(j));
          load_lane_states<N, Q>(from, own, given && present(j), reaching[j]);
        }
      }
      entered = true;
      if (chunk_steps == 0) {
        __syncthreads();  // every warp has done with the chunk before, whose record is filled anew
        if (warp == 0) walk.find(chunks, begin, walk.records[1 - place], lane);
        __syncthreads();
        ahead = fetch(next, thread / quads);
      } else {
        choice<A> const softplus(in.delta_softplus), gating(gated);
        using projection_part = projection_rows<T, N, states, threads, Packs>;
        auto const row_at = [](auto const& v, std::int64_t bytes) {
          return reinterpret_cast<T const*>(reinterpret_cast<char const*>(v.data()) + bytes);
        };
        auto const put_projections = [&](int i, auto&& meanwhile) {
          projection_part b, c;
          b.fetch(row_at(in.B, chunk.rows[chunk_walk::B]), in.B.stride(1), chunk_steps, i);
          c.fetch(row_at(in.C, chunk.rows[chunk_walk::C]), in.C.stride(1), chunk_steps, i);
          meanwhile();
          b.put(shared + memory::B, i), c.put(shared + memory::C, i);
        };
        A h[J][Q];  // on its way while what follows is prepared
        A const* const checkpoint = in.checkpoints.data() + (chunk.number * channels + channel) * N;
#pragma unroll
        for (int j = 0; j < J; ++j) load_lane_states<N, Q>(checkpoint + j * N, own, present(j), h[j]);
        put_projections(thread, [&] {
          auto const bias = load_pack<4>(biases);
          auto const prepare = [&](step_inputs const& x, int t0) {
#pragma unroll
            for (int k = 0; k < batch; ++k) {
              int const t = t0 + k * turn;
              if (turn > adjoint_chunk && t >= adjoint_chunk) continue;
              auto const u = x.u[k].widened(), delta = x.delta[k].widened(), d_y = x.d_y[k].widened(),
                         z = x.z[k].widened();
              pack<A, 8> time;
              pack<A, 4> d_sum;
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                A const dt = time_step<A>(delta[i] + bias[i], softplus).dt;
                time[2 * i] = t < chunk_steps ? dt : A(0);
                time[2 * i + 1] = time[2 * i] * u[i];
                d_sum[i] = d_y[i] * gate<A>(z[i], gating).value;
              }
              store_pack<8>(times + (t * width + 4 * quad) * 2, time);
              store_pack<4>(outputs + t * width + 4 * quad, d_sum);
            }
          };
          prepare(ahead, thread / quads);
#pragma unroll 1
          for (int t0 = batch * turn; t0 < adjoint_chunk; t0 += batch * turn)
            prepare(fetch(chunk, t0 + thread / quads), t0 + thread / quads);
        });
#pragma unroll 1
        for (int i = projection_part::batch * threads; i < projection_part::all; i += projection_part::batch * threads)
          put_projections(i + thread, [] {});
        __syncthreads();

        if (warp == 0) walk.find(chunks, begin, walk.records[1 - place], lane);
        if (!chunk.begins) {
          // What the next chunk reads: the rows before these. A warp asks for one of the tensors.
          constexpr int elements = 128 / static_cast<int>(sizeof(T)), lines = (width + elements - 1) / elements;
          auto const ask = [&](auto const& v, int k) {
            auto const* const row = row_at(v, chunk.rows[k]);
            for (int i = lane; i < adjoint_chunk * lines; i += 32)
              if (first_channel + i % lines * elements < channels)
                prefetch_line(row + i % lines * elements -
                              std::uint64_t{static_cast<unsigned>(adjoint_chunk - i / lines)} *
                                  static_cast<unsigned>(v.stride(1)));
          };
          for (int k = warp; k < 4; k += block::warps) {
            if (k == 0) ask(in.u, chunk_walk::u);
            if (k == 1) ask(in.delta, chunk_walk::delta);
            if (k == 2) ask(in.d_y, chunk_walk::d_y);
            if (k == 3 && gated) ask(in.z, chunk_walk::z);
          }
        }
        A* const lane_times = times + J * pair * 2;
        A* const lane_outputs = outputs + J * pair;
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
            A* const out = work.d_projection.row(group, chunk.row) + t * (2 * N) +
                           (column < states ? column : column - states + N);
            if (block::rounds > 1 && round > 0) {
              auto const x = load_pack<each>(static_cast<A const*>(out));
#pragma unroll
              for (int k = 0; k < each; ++k) sum[k] += x[k];
            }
            store_pack<each>(out, sum);
          }
        };
        // Steps beyond the chunk's last have dt = 0 and no gradient: they change nothing.
        int const last = (chunk_steps - 1) / steps;
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
          for (int i = 0; i < steps; ++i) {
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
          }
          if constexpr (memory::shared_sums)
            state_sums<A>::put(exchange, d_C, lane);
          else
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
          [[maybe_unused]] pack<A, 2> d_B_sum, d_C_sum;
          if constexpr (memory::shared_sums) {
            __syncwarp();
            d_C_sum = state_sums<A>::take(exchange, lane);
            __syncwarp();
            state_sums<A>::put(exchange, d_B, lane);
            __syncwarp();
            d_B_sum = state_sums<A>::take(exchange, lane);
          } else {
            spread_sums<S, 32, Q * steps>(d_B, lane);
          }
          spread_sums<1, S, steps * J>(d_dt_u, lane);
          spread_sums<1, S, steps * J>(d_dt, lane);
          // All that is written, last: no store stands in the way of a load.
          __syncwarp();  // every lane has read what is overwritten now
          if constexpr (memory::shared_sums) {
            A* const to = shared + memory::sums_of(piece, warp) + state_sums<A>::step(lane) * 2 * states +
                          state_sums<A>::state(lane);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              to[k * 2 * states] = d_B_sum[k];
              to[k * 2 * states + states] = d_C_sum[k];
            }
          } else if (spread_writes<S, 32, Q * steps>(lane)) {
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
            add_up(piece * steps, min(chunk_steps, (piece + 1) * steps));
            __syncthreads();
          }
        }
        auto const finish = [&](step_inputs const& x, int t0, pack<A, 4> const& bias, pack<A, 4> const& skip) {
          auto const d_u_of = quad_of(d.d_u, chunk.rows[chunk_walk::d_u]),
                     d_delta_of = quad_of(d.d_delta, chunk.rows[chunk_walk::d_delta]),
                     d_z_of = quad_of(d.d_z, chunk.rows[chunk_walk::d_z]);
          bool const d_z_wanted = d.d_z.present();
          auto d_skip = load_pack<4>(static_cast<A const*>(parameters)),
               d_bias = load_pack<4>(static_cast<A const*>(parameters + 4 * threads));
#pragma unroll
          for (int k = 0; k < batch; ++k) {
            int const t = t0 + k * turn;
            if (turn > adjoint_chunk && t >= adjoint_chunk) continue;
            bool const within = t < chunk_steps;  // no branch, which would keep steps apart
            auto const adjoint = load_pack<8>(static_cast<A const*>(times + (t * width + 4 * quad) * 2));
            auto const y = load_pack<4>(static_cast<A const*>(outputs + t * width + 4 * quad));
            auto const u = x.u[k].widened(), delta = x.delta[k].widened(), d_y = x.d_y[k].widened(),
                       z = x.z[k].widened();
            pack<A, 4> d_u, d_delta, d_z;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              time_step<A> const time(delta[i] + bias[i], softplus);
              gate<A> const g(z[i], gating);
              A const d_sum = d_y[i] * g.value;
              d_z[i] = d_y[i] * (y[i] + skip[i] * u[i]) * g.slope;
              d_u[i] = adjoint[2 * i] * time.dt + d_sum * skip[i];
              d_delta[i] = (adjoint[2 * i] * u[i] + adjoint[2 * i + 1] * A(selective_scan_math::ln_2)) * time.slope;
              d_skip[i] += d_sum * u[i];
              d_bias[i] += within ? d_delta[i] : A(0);
            }
            d_u_of.put(t, d_u, within);
            d_delta_of.put(t, d_delta, within);
            d_z_of.put(t, d_z, within && d_z_wanted);
          }
          store_pack<4>(parameters, d_skip);
          store_pack<4>(parameters + 4 * threads, d_bias);
        };
        auto const finished = fetch(chunk, thread / quads);
        if constexpr (memory::late) {
          __syncthreads();
          add_up(0, chunk_steps);
        }
        {
          auto const bias = load_pack<4>(biases), skip = load_pack<4>(skips);
          ahead = fetch(next, thread / quads);
          finish(finished, thread / quads, bias, skip);
#pragma unroll 1
          for (int t0 = batch * turn; t0 < adjoint_chunk; t0 += batch * turn)
            finish(fetch(chunk, t0 + thread / quads), t0 + thread / quads, bias, skip);
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
      A const* const of_quad = shared + memory::parameters + i % 2 * (4 * threads) + i / 2;
      A sum = 0;
#pragma unroll
      for (int k = 0; k < turn; ++k) sum += of_quad[k * width];
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
