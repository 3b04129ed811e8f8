#pragma once
#include <blackmamba/core/cuda/copy_async_cuda.cuh>
#include <blackmamba/core/cuda/named_barrier_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_exponential_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan_tiles_cuda.cuh>

#include <cstddef>
#include <cstdint>
#include <type_traits>

/// The forward scan with two kinds of warps, for types of 16 bits, sixteen states and rows in packs of eight. Four
/// warps of a block are movers: lanes as in scan_forward, four for each channel, and nothing but the recurrence. The
/// other four are helpers, which make what movers need and finish what they leave: steps dt, sums over a channel's
/// states, gates. A helper's tile of steps is one ahead of the movers' and, on its way out, one behind; rows of u,
/// delta and z come by copies to shared memory, one tile ahead of that. One barrier for each tile keeps all in step.
///
/// Movers' code has no long chain in it, so one or two of their warps on a scheduler suffice to keep exponentials
/// coming; helpers fill what is left. The same bits as scan_forward, which takes what this one does not.
/// Instantiated for each T of 16 bits and the tunings in selective_scan_forward_cuda.cuh.
namespace blackmamba::cuda::detail {

/// Pair: channels of a mover's lane. Tile: steps.
template <class T, int Pair, int Tile>
struct scan_roles {
  using A = accum_t<T>;
  static constexpr int N = 16, movers = 128, helpers = 128, threads = movers + helpers;
  static constexpr int channels = 32 * Pair, pairs = channels / 2;
  static constexpr int each = Tile * pairs / helpers;  ///< pairs of a tile that a helper works on
  static constexpr int apart = helpers / pairs;        ///< steps between them
  static constexpr int width = 8, parts = channels / width;
  /// Shared memory, in elements of A, by tile; then the rows that are copied, in elements of T: u of four tiles, delta
  /// and z of two.
  static constexpr int time = Tile * channels * 2, sum = Tile * channels * 4, projection = Tile * N;
  static constexpr int times = 0;                ///< (2 tiles; Tile, channels, 2)  dt, dt u
  static constexpr int sums = times + 2 * time;  ///< (2; Tile, 4 warps, Pair, 32)  C . h of each lane's states
  static constexpr int B = sums + 2 * sum;       ///< (2; Tile, N)
  static constexpr int C = B + 2 * projection;   ///< (2; Tile, N)
  /// With one channel for each lane, shared memory would be the bound: B and C stay as T there, four entries of each
  /// side by side, and movers widen them.
  static constexpr bool narrow = Pair == 1;
  static constexpr int inputs = narrow ? C : C + 2 * projection;
  static constexpr int rows = Tile * channels, u = 0, delta = u + 4 * rows, z = delta + 2 * rows;
  static constexpr std::size_t bytes = inputs * sizeof(A) + std::size_t{z + 2 * rows} * sizeof(T);
  static_assert(sizeof(T) == 2 && helpers % pairs == 0 && Tile * N / 4 <= helpers && Tile * parts == helpers &&
                selective_scan::chunk_length % Tile == 0);

  // The lanes of a warp may be apart after a store that some leave out, and the two kinds of warps meet at different
  // places of the program. One barrier for all meetings, also for the first, of helpers alone: racecheck takes threads
  // that have met a different number of times for threads that have not met.
  __device__ static void all_meet() { named_barrier<1, threads>(); }
};

template <class T, int Pair, int Tile, bool Outputs>
__global__ void __launch_bounds__(256, 3)
    scan_forward_roles(selective_scan::inputs<device::cuda, T, 16> const in,
                       view<space::device, T, dyn, dyn, dyn> const y,
                       selective_scan::results<device::cuda, T> const keep,
                       selective_scan::forward_workspace<device::cuda, T> const work, scan_numbering const numbering,
                       unsigned const channel_tiles) {
  using shape = scan_roles<T, Pair, Tile>;
  using A = accum_t<T>;
  constexpr int N = shape::N, Q = 4;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  A* const shared = reinterpret_cast<A*>(shared_bytes);
  int const thread = static_cast<int>(threadIdx.x);

  std::int64_t const number = blockIdx.x / channel_tiles;
  std::int64_t const first_channel = blockIdx.x % channel_tiles * shape::channels;
  scan_piece const piece = numbering(number);
  if (!piece.present || (!Outputs && piece.last)) return;
  std::int64_t const channels = y.extent(2);
  int const steps = piece.steps, tiles = (steps + Tile - 1) / Tile;

  if (thread < shape::movers) {
    int const lane = thread % 4;
    std::int64_t const own = first_channel + thread / 4 * Pair;
    bool const mine = own < channels;
    std::int64_t const channel = mine ? own : channels - Pair;
    scan_states<T, N, 4> state[Pair], rate[Pair];
#pragma unroll
    for (int j = 0; j < Pair; ++j) {
      rate[j].load(in.A.row(channel + j), lane);
#pragma unroll
      for (int q = 0; q < Q; ++q) rate[j].h[q] = scan_rate(rate[j].h[q], in.A_is_log);
      if (Outputs && numbering.segment != 0)
        state[j].load(work.states.row(number, channel + j), lane);
      else if (Outputs && in.initial_state.present())
        state[j].load(in.initial_state.row(piece.sequence, channel + j), lane);
      else
        state[j].clear();
    }
    auto const keep_checkpoint = [&](int t) {
      if (!Outputs || !keep.checkpoints.present() || !mine) return;
      std::int64_t const row = (piece.chunk + t / selective_scan::chunk_length) * channels + channel;
#pragma unroll
      for (int j = 0; j < Pair; ++j) state[j].store(keep.checkpoints.data() + (row + j) * N, lane);
    };
    if (steps == 0) {
      keep_checkpoint(0);
    } else {
      shape::all_meet();
      shape::all_meet();
    }
    for (int k = 0; k < tiles; ++k) {
      if (k * Tile % selective_scan::chunk_length == 0) keep_checkpoint(k * Tile);
      A const* const times_of = shared + shape::times + (k & 1) * shape::time + thread / 4 * (2 * Pair);
      A const* const B = shared + shape::B + (k & 1) * shape::projection + lane * Q;
      A const* const C = shared + shape::C + (k & 1) * shape::projection + lane * Q;
      A* const sums = shared + shape::sums + (k & 1) * shape::sum + thread / 32 * (32 * Pair) + thread % 32;
      using entries = std::conditional_t<shape::narrow, raw_pack<T, Q>, pack<A, Q>>;
      struct nothing {};
      struct step_inputs {
        pack<A, 2 * Pair> time;
        entries b;
        std::conditional_t<Outputs, entries, nothing> c;
      };
      auto const load = [&](int i) {
        step_inputs x;
        x.time = load_pack<2 * Pair>(times_of + i * (2 * shape::channels));
        if constexpr (shape::narrow) {
          uint4 const both = *reinterpret_cast<uint4 const*>(B + i * N);
          x.b.w[0] = {both.x, both.y};
          if constexpr (Outputs) x.c.w[0] = {both.z, both.w};
        } else {
          x.b = load_pack<Q>(B + i * N);
          if constexpr (Outputs) x.c = load_pack<Q>(C + i * N);
        }
        return x;
      };
      auto const wide = [](auto const& x) {
        if constexpr (std::is_same_v<decltype(x), raw_pack<T, Q> const&>)
          return x.widened();
        else
          return x;
      };
      A decay[Pair][Q];
      auto const make_decays = [&](step_inputs const& from) {
#pragma unroll
        for (int j = 0; j < Pair; ++j)
#pragma unroll
          for (int q = 0; q < Q; ++q) decay[j][q] = power_of_two(times(from.time[2 * j], rate[j].h[q]));
      };
      // Decays are made a step ahead, from what was loaded a step earlier still. Loads come before what is stored: the
      // compiler does not move one across the other.
      constexpr int ahead = 2;
      step_inputs x[ahead];
#pragma unroll
      for (int i = 0; i < ahead; ++i) x[i] = load(i);
      make_decays(x[0]);
#pragma unroll
      for (int i = 0; i < Tile; ++i) {
        auto const now = x[i % ahead];
        if (i + ahead < Tile) x[i % ahead] = load(i + ahead);
        pack<A, Q> const b = wide(now.b);
        [[maybe_unused]] auto const c = wide(now.c);
#pragma unroll
        for (int j = 0; j < Pair; ++j) {
          A sum{};
#pragma unroll
          for (int q = 0; q < Q; ++q) {
            A& h = state[j].h[q];
            h = math::fma(decay[j][q], h, times(now.time[2 * j + 1], b[q]));
            if constexpr (Outputs) sum = q == 0 ? times(c[q], h) : math::fma(c[q], h, sum);
          }
          if (Outputs) sums[i * (4 * shape::channels) + j * 32] = sum;
        }
        if (i + 1 < Tile) make_decays(x[(i + 1) % ahead]);
      }
      shape::all_meet();
    }
    if (!Outputs) shape::all_meet();
    if (!mine) return;
#pragma unroll
    for (int j = 0; j < Pair; ++j) {
      if (!Outputs)
        state[j].store(work.states.row(number, channel + j), lane);
      else if (piece.last && keep.final_state.present())
        state[j].store(keep.final_state.row(piece.sequence, channel + j), lane);
    }
    return;
  }

  if (steps == 0) return;
  using elements = scan_elements<T, 2>;
  int const helper = thread - shape::movers, pair = helper % shape::pairs, first = helper / shape::pairs;
  std::int64_t const own = first_channel + 2 * pair;
  bool const mine = own < channels;
  std::int64_t const channel = mine ? own : channels - 2;
  unsigned const writable = mine ? static_cast<unsigned>(steps) : 0u;  // a branch would keep steps apart
  A skip[2], bias[2], sum_dt[2] = {};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    skip[k] = in.D.present() ? in.D.data()[channel + k] : A(0);
    bias[k] = in.delta_bias.present() ? in.delta_bias.data()[channel + k] : A(0);
  }
  auto const& z_view = in.z.present() ? in.z : in.u;
  auto const gated = scan_mask<A>(in.z.present()), softplus = scan_mask<A>(in.delta_softplus);
  scan_column<T> const y_column(y, piece, channel);

  // Rows on their way to shared memory: a helper copies 16 bytes of one step, and loads four entries of B and C.
  T* const rows = reinterpret_cast<T*>(shared + shape::inputs);
  int const copied = helper / shape::parts, part = helper % shape::parts * shape::width;
  bool const exists = first_channel + part < channels;
  std::int64_t const copied_channel = exists ? first_channel + part : 0;
  scan_column<T const> const u_rows(in.u, piece, copied_channel), delta_rows(in.delta, piece, copied_channel),
      z_rows(z_view, piece, copied_channel);
  auto const copy = [&](scan_column<T const> const& from, int t0, T* to) {
    copy_async(shared_address(to + copied * shape::channels + part),
               from.at(static_cast<unsigned>(min(t0 + copied, steps - 1))), exists ? 16 : 0);
  };
  auto const u_of = [&](int k) { return rows + shape::u + (k & 3) * shape::rows; };
  auto const delta_of = [&](int k) { return rows + shape::delta + (k & 1) * shape::rows; };
  auto const z_of = [&](int k) { return rows + shape::z + (k & 1) * shape::rows; };
  struct projections {
    uint2 b, c;
  };
  bool const projects = Tile * N / 4 == shape::helpers || helper < Tile * N / 4;
  scan_column<T const> const b_rows(in.B, piece, helper % 4 * 4), c_rows(in.C, piece, helper % 4 * 4);
  auto const load_projections = [&](int t0) {
    projections x{};
    if (!projects) return x;
    unsigned const t = static_cast<unsigned>(min(t0 + helper / 4, steps - 1));
    x.b = *reinterpret_cast<uint2 const*>(b_rows.at(t));
    if (Outputs) x.c = *reinterpret_cast<uint2 const*>(c_rows.at(t));
    return x;
  };
  auto const put_projection = [&](uint2 const& from, A* to) {
    raw_pack<T, 4> x;
    x.w[0] = from;
    store_pack<4>(to + helper * 4, x.widened());
  };
  // What movers need of tile k. Steps beyond the last keep the state: dt is zero there, and u and B those of the last.
  auto const prepare = [&](int k, projections const& coming) {
    A* const to = shared + shape::times + (k & 1) * shape::time + pair * 4;
    T const *const u = u_of(k) + 2 * pair, *const delta = delta_of(k) + 2 * pair;
#pragma unroll
    for (int e = 0; e < shape::each; ++e) {
      int const t = first + e * shape::apart;
      auto const u_here = elements::of(u + t * shape::channels), delta_here = elements::of(delta + t * shape::channels);
      pack<A, 4> out;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        A const raw = delta_here[i] + bias[i], dt = selected(softplus, scan_softplus(raw), raw);
        out[2 * i] = k * Tile + t < steps ? dt : A(0);
        out[2 * i + 1] = times(out[2 * i], u_here[i]);
        if (!Outputs) sum_dt[i] += out[2 * i];
      }
      store_pack<4>(to + t * (2 * shape::channels), out);
    }
    if (!projects) return;
    if constexpr (shape::narrow) {
      static_assert(Tile * N / 4 == shape::helpers);
      *reinterpret_cast<uint4*>(shared + shape::B + (k & 1) * shape::projection + helper * 4) = {
          coming.b.x, coming.b.y, coming.c.x, coming.c.y};
      return;
    }
    put_projection(coming.b, shared + shape::B + (k & 1) * shape::projection);
    if (Outputs) put_projection(coming.c, shared + shape::C + (k & 1) * shape::projection);
  };
  // y of tile k, from what movers left.
  auto const finish = [&](int k) {
    constexpr int of_warp = 4 * Pair, apart = Pair == 2 ? 32 : 4;  // pairs of a warp; between a pair's channels
    A const* const from = shared + shape::sums + (k & 1) * shape::sum + pair / of_warp * (32 * Pair) +
                          pair % of_warp * (Pair == 2 ? 4 : 8);
    T const *const u = u_of(k) + 2 * pair, *const z = z_of(k) + 2 * pair;
#pragma unroll
    for (int e = 0; e < shape::each; ++e) {
      int const t = first + e * shape::apart;
      auto const u_here = elements::of(u + t * shape::channels), z_here = elements::of(z + t * shape::channels);
      A value[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        auto const s = load_pack<4>(from + t * (4 * shape::channels) + i * apart);
        A const sum = (s[0] + s[1]) + (s[2] + s[3]), gate = times(z_here[i], scan_sigmoid(z_here[i]));
        value[i] = times(sum + times(skip[i], u_here[i]), selected(gated, gate, A(1)));
      }
      unsigned const at = static_cast<unsigned>(k * Tile + t);
      if (at < writable) elements::store(y_column.at(at), value);
    }
  };

  copy(u_rows, 0, u_of(0)), copy(delta_rows, 0, delta_of(0));
  copy(u_rows, Tile, u_of(1)), copy(delta_rows, Tile, delta_of(1));
  commit_copies();
  wait_for_copies<0>();
  shape::all_meet();
  prepare(0, load_projections(0));
  projections coming = load_projections(Tile);
  shape::all_meet();
  for (int k = 0; k < tiles; ++k) {
    // What the next turn reads; beyond the last tile, its last step once more.
    copy(u_rows, (k + 2) * Tile, u_of(k + 2)), copy(delta_rows, (k + 2) * Tile, delta_of(k + 2));
    if (Outputs) copy(z_rows, k * Tile, z_of(k));
    commit_copies();
    projections const after = load_projections((k + 2) * Tile);
    if (Outputs && k > 0) finish(k - 1);
    if (k + 1 < tiles) prepare(k + 1, coming);
    coming = after;
    wait_for_copies<0>();
    shape::all_meet();
  }
  if constexpr (Outputs) {
    finish(tiles - 1);
  } else {
    A* const to = shared + shape::sums;
    to[first * shape::channels + 2 * pair] = sum_dt[0], to[first * shape::channels + 2 * pair + 1] = sum_dt[1];
    shape::all_meet();
    if (first != 0 || !mine) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      A sum = 0;
#pragma unroll
      for (int r = 0; r < shape::apart; ++r) sum += to[r * shape::channels + 2 * pair + i];
      work.steps.row(number)[channel + i] = sum;
    }
  }
}

}  // namespace blackmamba::cuda::detail
