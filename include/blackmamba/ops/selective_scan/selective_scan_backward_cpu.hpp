#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/sequences.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_cpu.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_tiles_cpu.hpp>

namespace blackmamba::selective_scan_tiles {

/// States that a tile of backward keeps in registers. Four: what a tile keeps over a chunk stays in the first-level
/// cache.
inline constexpr int backward_states = 4;

/// What the tiles of a pack of channels hold over a chunk, (chunk, lanes) each.
template <class A>
struct alignas(64) channel_tiles {
  using tile = A[std::size_t{chunk * lanes<A>}];
  tile dt;    ///< the time step
  tile dt_u;  ///< dt u
  tile d_y;   ///< gradient of y before the gate
  tile y;     ///< y before the gate
  tile d_dt;  ///< sums over states: see add_adjoint
  tile d_dt_u;
};

/// Runs States states of a pack of channels through a chunk again, from their checkpoint h (States, lanes) on. Keeps,
/// in `kept` (steps, States, 2, lanes), each decay and the state before it; adds C . h to y; and leaves in d_C (steps,
/// States, lanes) d_y h, plus what stands in `before`, which moves by before_stride with each step.
template <int States, bool Bounded, class A>
__attribute__((noinline)) void replay_states(A const* rate, A const* h_memory, A const* B, A const* C,
                                             channel_tiles<A>& tiles, A* kept, A const* before,
                                             std::int64_t before_stride, A* d_C, int steps, prefetch_share ahead) {
  using V = simd::pack<A>;
  decay<V, Bounded> const decay_of;
  V h[std::size_t{States}];
  unroll<States>([&](auto n) __attribute__((always_inline)) { h[n] = V::load(h_memory + n * V::lanes); });
  for (int t = 0; t < steps; ++t) {
    ahead.ask(t);
    V const dt = V::load(tiles.dt + t * V::lanes), dt_u = V::load(tiles.dt_u + t * V::lanes);
    V const d_y = V::load(tiles.d_y + t * V::lanes);
    V y = V::load(tiles.y + t * V::lanes);
    unroll<States>([&](auto n) __attribute__((always_inline)) {
      std::int64_t const at = (t * States + n) * V::lanes;
      V const a = decay_of(dt, V::load(rate + n * V::lanes));
      a.store(kept + 2 * at);
      h[n].store(kept + 2 * at + V::lanes);
      h[n] = selective_scan_math::advance(a, h[n], rounded(dt_u * V(B[t * States + n])));
      y = fma(h[n], V(C[t * States + n]), y);
      fma(d_y, h[n], V::load(before + t * before_stride + n * V::lanes)).store(d_C + at);
    });
    y.store(tiles.y + t * V::lanes);
  }
}

/// The same states from the end of the chunk to its beginning. carry (States, carry_stride) holds the gradient that
/// reaches the state from the steps after the chunk, and then that of the state before it. Adds to d_dt, d_dt_u and to
/// d_A (States, carry_stride); leaves in d_B the gradient of the state times dt u, plus `before`.
template <int States, class A>
__attribute__((noinline)) void retrace_states(A const* rate, A* carry, A* d_A_memory, std::int64_t carry_stride,
                                              A const* B, A const* C, channel_tiles<A>& tiles, A const* kept,
                                              A const* before, std::int64_t before_stride, A* d_B, int steps,
                                              prefetch_share ahead) {
  using V = simd::pack<A>;
  V reaching[std::size_t{States}], d_A[std::size_t{States}];
  unroll<States>([&](auto n) __attribute__((always_inline)) {
    reaching[n] = V::load(carry + n * carry_stride);
    d_A[n] = V(0);
  });
  for (int t = steps - 1; t >= 0; --t) {
    ahead.ask(t);
    V const dt = V::load(tiles.dt + t * V::lanes), dt_u = V::load(tiles.dt_u + t * V::lanes);
    V const d_y = V::load(tiles.d_y + t * V::lanes);
    V d_dt = V::load(tiles.d_dt + t * V::lanes), d_dt_u = V::load(tiles.d_dt_u + t * V::lanes);
    unroll<States>([&](auto n) __attribute__((always_inline)) {
      std::int64_t const at = (t * States + n) * V::lanes;
      V const g = fma(d_y, V(C[t * States + n]), reaching[n]);
      fma(g, dt_u, V::load(before + t * before_stride + n * V::lanes)).store(d_B + at);
      reaching[n] = g * V::load(kept + 2 * at);
      selective_scan_math::add_adjoint(g, reaching[n] * V::load(kept + 2 * at + V::lanes), dt,
                                       V::load(rate + n * V::lanes), V(B[t * States + n]), d_dt_u, d_dt, d_A[n]);
    });
    d_dt.store(tiles.d_dt + t * V::lanes);
    d_dt_u.store(tiles.d_dt_u + t * V::lanes);
  }
  unroll<States>([&](auto n) __attribute__((always_inline)) {
    A* const to = d_A_memory + n * carry_stride;
    reaching[n].store(carry + n * carry_stride);
    (V::load(to) + d_A[n]).store(to);
  });
}

/// Takes chunks back through a few groups of channels.
template <class T, int N>
class backward_worker {
 public:
  using A = accum_t<T>;
  using V = simd::pack<A>;
  static constexpr int group_packs = static_cast<int>(selective_scan::group_channels) / V::lanes;
  /// Groups that are worked on chunk by chunk: rows of 1 KiB of float, and at most 16 KiB of rates.
  static constexpr int most_groups = std::clamp(16384 / (N * simd::register_bytes * group_packs), 1, 4);

  backward_worker(selective_scan::gradient_inputs<device::cpu, T, N> const& in,
                  selective_scan::gradients<device::cpu, T> const& d,
                  selective_scan::workspace<device::cpu, T> const& work)
      : in_(in), d_(d), work_(work) {}

  /// The groups that the following chunks are run through, at most most_groups.
  void take_groups(std::int64_t first, int count) {
    first_group_ = first;
    groups_ = count;
    for (int g = 0; g < count; ++g)
      for (int p = 0; p < packs_of(g); ++p)
        at_[g][p].largest_rate = load_rates<N>(in_.A, in_.A_is_log, channel(g, p), lanes_of(g, p), at_[g][p].rate);
  }
  /// The chunk's d_B and d_C go to rows of the workspace's d_projection from `row` on.
  void run(std::int64_t stream, cpu::sequences::block const& block, std::int64_t row) {
    chunk_ = {stream,
              block.of.index,
              block.of.batch,
              block.of.first + block.begin,
              block.number,
              static_cast<int>(block.end - block.begin),
              block.first()};
    if (block.last())
      each_pack([&](int g, int p) {
        alignas(64) A last[std::size_t{N * V::lanes}];
        load_states<N>(in_.d_final_state, chunk_.sequence, channel(g, p), lanes_of(g, p), last);
        for (int n = 0; n < N; ++n) std::copy_n(last + n * V::lanes, V::lanes, carry(n, g, p));
      });
    if (chunk_.steps > 0) {
      load_projection<N, backward_states>(rows_at(in_.B, chunk_.b, chunk_.first, 0), chunk_.steps, B_);
      load_projection<N, backward_states>(rows_at(in_.C, chunk_.b, chunk_.first, 0), chunk_.steps, C_);
      for (int g = 0; g < groups_; ++g) run_group(g, row);
    }
    if (block.first())
      each_pack([&](int g, int p) {
        store_states<N, A>(carry(0, g, p), d_.d_initial_state, chunk_.sequence, channel(g, p), lanes_of(g, p),
                           carry_stride());
      });
  }

 private:
  std::int64_t channel(int g, int p) const {
    return (first_group_ + g) * selective_scan::group_channels + p * V::lanes;
  }
  int lanes_of(int g, int p) const {
    return static_cast<int>(std::min<std::int64_t>(in_.d_y.extent(2) - channel(g, p), V::lanes));
  }
  int packs_of(int g) const {
    std::int64_t const rest = in_.d_y.extent(2) - channel(g, 0);
    return static_cast<int>(std::min<std::int64_t>((rest + V::lanes - 1) / V::lanes, group_packs));
  }
  template <class F>
  void each_pack(F f) const {
    for (int g = 0; g < groups_; ++g)
      for (int p = 0; p < packs_of(g); ++p) f(g, p);
  }
  A* carry(int n, int g, int p) const { return work_.carry.row(chunk_.stream, n) + channel(g, p); }
  std::int64_t carry_stride() const { return work_.carry.stride(1); }
  template <class View>
  auto rows(View const& x, int g, int p) const {
    return rows_at(x, chunk_.b, chunk_.first, channel(g, p));
  }
  template <class Count>
  V parameter(in<device::cpu, A, dyn> const& x, int g, int p, Count count) const {
    return x.present() ? simd::load<V>(x.data() + channel(g, p), count) : V(0);
  }

  void run_group(int g, std::int64_t row) {
    int const packs = packs_of(g);
    for (int p = 0; p < packs; ++p) with_lanes<A>(lanes_of(g, p), [&](auto count) { open(g, p, count); });
    look_ahead(g);
    state_tiles<N, backward_states>([&](int n, auto states) {
      for (int p = 0; p < packs; ++p) run_states<states>(g, p, n);
      store_projection<states>(g, row, n);
    });
    for (int p = 0; p < packs; ++p) with_lanes<A>(lanes_of(g, p), [&](auto count) { close(g, p, count); });
  }

  /// Asks for where this group's gradients go, and for what is read next: the following group, or the first one of the
  /// chunk before this one.
  void look_ahead(int g) {
    prefetch_.start(2 * ((N + backward_states - 1) / backward_states) * packs_of(g));
    for (int p = 0; p < packs_of(g); ++p) {
      prefetch_.add(rows(d_.d_u, g, p));
      prefetch_.add(rows(d_.d_delta, g, p));
      prefetch_.add(rows(d_.d_z, g, p));
    }
    bool const wrap = g + 1 == groups_;
    if (wrap && chunk_.begins_sequence) return;
    int const next = wrap ? 0 : g + 1;
    std::int64_t const first = chunk_.first - (wrap ? chunk : 0), channels = in_.d_y.extent(2);
    for (int p = 0; p < packs_of(next); ++p) {
      prefetch_.add(rows_at(in_.u, chunk_.b, first, channel(next, p)));
      prefetch_.add(rows_at(in_.delta, chunk_.b, first, channel(next, p)));
      prefetch_.add(rows_at(in_.z, chunk_.b, first, channel(next, p)));
      prefetch_.add(rows_at(in_.d_y, chunk_.b, first, channel(next, p)));
      prefetch_.add(strided_rows<A const>{
          in_.checkpoints.data() + (chunk_.number - (wrap ? 1 : 0)) * N * channels + channel(next, p), channels});
    }
  }

  /// Fills a pack's tiles.
  template <class Count>
  void open(int g, int p, Count count) {
    power_of_two<V> const power;
    auto const u = rows(in_.u, g, p), delta = rows(in_.delta, g, p), z = rows(in_.z, g, p), d_y = rows(in_.d_y, g, p);
    V const bias = parameter(in_.delta_bias, g, p, count), skip = parameter(in_.D, g, p, count);
    V longest = 0;
    for (int t = 0; t < chunk_.steps; ++t) {
      V const x = simd::load<V>(u[t], count);
      V dt = simd::load<V>(delta[t], count) + bias, d_sum = simd::load<V>(d_y[t], count);
      if (in_.delta_softplus) dt = selective_scan_math::softplus(dt, power);
      if (in_.z.present()) {
        V const gate = simd::load<V>(z[t], count);
        d_sum *= gate * selective_scan_math::sigmoid(gate, power);
      }
      dt.store(tiles_[p].dt + t * V::lanes);
      (dt * x).store(tiles_[p].dt_u + t * V::lanes);
      d_sum.store(tiles_[p].d_y + t * V::lanes);
      (skip * x).store(tiles_[p].y + t * V::lanes);
      V(0).store(tiles_[p].d_dt + t * V::lanes);
      V(0).store(tiles_[p].d_dt_u + t * V::lanes);
      longest = max(longest, abs(dt));
    }
    bounded_[p] = simd::max_lane(longest * at_[g][p].largest_rate) <= A(-selective_scan_math::least_exponent);
  }

  template <int States>
  void run_states(int g, int p, int n) {
    alignas(64) A h[std::size_t{States * V::lanes}];
    with_lanes<A>(lanes_of(g, p), [&](auto count) {
      std::int64_t const channels = in_.d_y.extent(2);
      A const* const from = in_.checkpoints.data() + (chunk_.number * N + n) * channels + channel(g, p);
      for (int k = 0; k < States; ++k) simd::load<V>(from + k * channels, count).store(h + k * V::lanes);
    });
    A const *const B = B_ + n * chunk, *const C = C_ + n * chunk, *const rate = at_[g][p].rate + n * V::lanes;
    // The first pack of the group finds zeros in place of a sum.
    std::int64_t const before_stride = p == 0 ? 0 : States * V::lanes;
    auto const replay = [&](auto bounded) {
      replay_states<States, bounded>(rate, h, B, C, tiles_[p], kept_, p == 0 ? zeros_ : d_C_, before_stride, d_C_,
                                     chunk_.steps, prefetch_.share());
    };
    bounded_[p] ? replay(std::true_type{}) : replay(std::false_type{});
    retrace_states<States>(rate, carry(n, g, p), work_.d_A.row(chunk_.stream, n) + channel(g, p), carry_stride(), B, C,
                           tiles_[p], kept_, p == 0 ? zeros_ : d_B_, before_stride, d_B_, chunk_.steps,
                           prefetch_.share());
  }

  /// Adds the lanes up.
  template <int States>
  void store_projection(int g, std::int64_t row, int n) {
    alignas(64) A sums[2][std::size_t{chunk * States}];
    for (int i = 0; i < chunk_.steps * States; i += V::lanes) {
      lane_sums<V::lanes>(d_B_ + i * V::lanes).store(sums[0] + i);
      lane_sums<V::lanes>(d_C_ + i * V::lanes).store(sums[1] + i);
    }
    for (int t = 0; t < chunk_.steps; ++t) {
      A* const to = work_.d_projection.row(chunk_.stream, row + t, first_group_ + g) + n;
      std::copy_n(sums[0] + t * States, States, to);
      std::copy_n(sums[1] + t * States, States, to + N);
    }
  }

  /// Turns a pack's adjoints into gradients.
  template <class Count>
  void close(int g, int p, Count count) {
    power_of_two<V> const power;
    auto const u = rows(in_.u, g, p), delta = rows(in_.delta, g, p), z = rows(in_.z, g, p), d_y = rows(in_.d_y, g, p);
    auto const d_u = rows(d_.d_u, g, p), d_delta = rows(d_.d_delta, g, p), d_z = rows(d_.d_z, g, p);
    V const bias = parameter(in_.delta_bias, g, p, count), skip = parameter(in_.D, g, p, count);
    V d_skip = 0, d_bias = 0;
    for (int t = 0; t < chunk_.steps; ++t) {
      V const x = simd::load<V>(u[t], count), d_sum = V::load(tiles_[p].d_y + t * V::lanes);
      V const d_dt_u = V::load(tiles_[p].d_dt_u + t * V::lanes);
      V d_dt = fma(d_dt_u, x, V::load(tiles_[p].d_dt + t * V::lanes) * V(selective_scan_math::ln_2));
      if (in_.delta_softplus) d_dt *= selective_scan_math::sigmoid(simd::load<V>(delta[t], count) + bias, power);
      simd::store(d_dt, d_delta[t], count);
      d_bias += d_dt;
      d_skip = fma(d_sum, x, d_skip);
      simd::store(fma(d_dt_u, V::load(tiles_[p].dt + t * V::lanes), d_sum * skip), d_u[t], count);
      if (d_.d_z.present()) {
        V const gate = simd::load<V>(z[t], count);
        V const slope = selective_scan_math::silu_derivative(gate, selective_scan_math::sigmoid(gate, power));
        simd::store(simd::load<V>(d_y[t], count) * V::load(tiles_[p].y + t * V::lanes) * slope, d_z[t], count);
      }
    }
    A* const d_channel = work_.d_channel.row(chunk_.stream, 0) + channel(g, p);
    (V::load(d_channel) + d_skip).store(d_channel);
    A* const d_channel_bias = work_.d_channel.row(chunk_.stream, 1) + channel(g, p);
    (V::load(d_channel_bias) + d_bias).store(d_channel_bias);
  }

  struct pack_rates {
    alignas(64) A rate[std::size_t{N * V::lanes}];
    V largest_rate;
  };
  struct chunk_place {
    std::int64_t stream, sequence, b, first, number;
    int steps;
    bool begins_sequence;
  };

  selective_scan::gradient_inputs<device::cpu, T, N> const& in_;
  selective_scan::gradients<device::cpu, T> const& d_;
  selective_scan::workspace<device::cpu, T> const& work_;
  std::int64_t first_group_ = 0;
  int groups_ = 0;
  chunk_place chunk_ = {};
  prefetch_list<8 * group_packs> prefetch_;
  bool bounded_[std::size_t{group_packs}] = {};
  pack_rates at_[std::size_t{most_groups}][std::size_t{group_packs}];
  alignas(64) A B_[std::size_t{chunk * N}];
  alignas(64) A C_[std::size_t{chunk * N}];
  channel_tiles<A> tiles_[std::size_t{group_packs}];
  alignas(64) A kept_[std::size_t{chunk * backward_states * 2 * V::lanes}];
  alignas(64) A d_B_[std::size_t{chunk * backward_states * V::lanes}] = {};
  alignas(64) A d_C_[std::size_t{chunk * backward_states * V::lanes}] = {};
  alignas(64) A zeros_[std::size_t{backward_states * V::lanes}] = {};
};

/// The parts that backward works on side by side: rows of the batch, or of packed sequences as many runs of whole
/// sequences as there are streams, of about the same number of steps. Their chunks are worked on in bands, last band
/// first.
class band_list {
 public:
  band_list(cpu::sequences const& sequences, std::int64_t streams) : sequences_(sequences), streams_(streams) {
    for (std::int64_t k = 0; k < streams; ++k) most_ = std::max(most_, bands(k));
  }
  std::int64_t most() const { return most_; }

  /// Calls body(block, step) for those chunks of a band that have places [from, to) in it, in order; step is the
  /// block's first within the band.
  template <class Body>
  void blocks(std::int64_t stream, std::int64_t band, std::int64_t from, std::int64_t to, Body&& body) const {
    std::int64_t const first = begin(stream) + band * selective_scan::band_chunks;
    sequences_.blocks_in(first + from, std::min(first + to, begin(stream + 1)),
                         [&](cpu::sequences::block const& block) {
                           body(block, (block.number - first) * selective_scan::chunk_length);
                         });
  }

 private:
  /// Number of a stream's first chunk.
  std::int64_t begin(std::int64_t stream) const {
    if (sequences_.count() == streams_) return sequences_.first_block(stream);
    std::int64_t low = 0, high = sequences_.count();
    while (low < high) {
      std::int64_t const middle = (low + high) / 2;
      if (sequences_[middle].first * streams_ < sequences_.steps() * stream)
        low = middle + 1;
      else
        high = middle;
    }
    return sequences_.first_block(stream == streams_ ? sequences_.count() : low);
  }
  std::int64_t bands(std::int64_t stream) const {
    return (begin(stream + 1) - begin(stream) + selective_scan::band_chunks - 1) / selective_scan::band_chunks;
  }

  cpu::sequences const& sequences_;
  std::int64_t streams_;
  std::int64_t most_ = 0;
};

}  // namespace blackmamba::selective_scan_tiles

namespace blackmamba {

template <class T, int N>
void backend<selective_scan, device::cpu>::backward(device::cpu const& policy,
                                                    selective_scan::gradient_inputs<device::cpu, T, N> const& in,
                                                    selective_scan::gradients<device::cpu, T> const& d,
                                                    selective_scan::workspace<device::cpu, T> const& work) {
  namespace tiles = selective_scan_tiles;
  using A = accum_t<T>;
  using V = simd::pack<A>;
  cpu::sequences const sequences("selective_scan.backward", in.d_y.extent(0), in.d_y.extent(1), in.cu_seqlens,
                                 selective_scan::chunk_length);
  std::int64_t const streams = work.carry.extent(0), groups = work.d_projection.extent(2);
  std::fill_n(work.d_A.data(), work.d_A.size(), A(0));
  std::fill_n(work.d_channel.data(), work.d_channel.size(), A(0));

  // Work is shared out by groups of channels, a few at a time where the threads all get work, and within them by
  // streams. No result depends on it.
  using worker = tiles::backward_worker<T, N>;
  int width = worker::most_groups;
  auto const units = [&] { return (groups + width - 1) / width; };
  while (width > 1 && units() * streams < 2 * cpu::thread_count(policy.threads)) width /= 2;

  tiles::band_list const bands(sequences, streams);
  for (std::int64_t band = bands.most() - 1; band >= 0; --band) {
    cpu::parallel_for(policy.threads, units() * streams, 1, [&](std::int64_t begin, std::int64_t end) {
      worker w(in, d, work);
      std::int64_t unit = -1;
      for (std::int64_t i = begin; i < end; ++i) {
        if (i / streams != unit) {
          unit = i / streams;
          w.take_groups(unit * width, static_cast<int>(std::min<std::int64_t>(groups - unit * width, width)));
        }
        struct place {
          cpu::sequences::block block;
          std::int64_t step;
        } chunks[selective_scan::band_chunks];
        std::int64_t count = 0;
        bands.blocks(i % streams, band, 0, selective_scan::band_chunks,
                     [&](cpu::sequences::block const& block, std::int64_t step) {
                       chunks[count++] = {block, step};
                     });
        while (count-- > 0) w.run(i % streams, chunks[count].block, chunks[count].step);
      }
    });
    // d_B and d_C of the band: sums over groups.
    constexpr std::int64_t places = selective_scan::band_chunks;
    cpu::parallel_for(policy.threads, streams * places, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        auto const sum_groups = [&](cpu::sequences::block const& block, std::int64_t step) {
          for (std::int64_t t = block.begin; t < block.end; ++t, ++step) {
            A sums[std::size_t{2 * N}] = {};
            for (std::int64_t group = 0; group < groups; ++group) {
              A const* const part = work.d_projection.row(i / places, step, group);
              for (int n = 0; n < 2 * N; ++n) sums[n] += part[n];
            }
            T* const d_B = d.d_B.row(block.of.batch, block.of.first + t);
            T* const d_C = d.d_C.row(block.of.batch, block.of.first + t);
            for (int n = 0; n < N; ++n) d_B[n] = convert<T>(sums[n]);
            for (int n = 0; n < N; ++n) d_C[n] = convert<T>(sums[N + n]);
          }
        };
        bands.blocks(i / places, band, i % places, i % places + 1, sum_groups);
      }
    });
  }

  // Gradients of parameters: sums over streams.
  std::int64_t const channels = in.d_y.extent(2);
  cpu::parallel_for(policy.threads, channels, V::lanes, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t channel = begin; channel < end; channel += V::lanes) {
      int const count = static_cast<int>(std::min<std::int64_t>(end - channel, V::lanes));
      auto const total = [&](auto const& parts, int n) {
        V sum = 0;
        for (std::int64_t stream = 0; stream < streams; ++stream) sum += V::load(parts.row(stream, n) + channel);
        return sum;
      };
      if (d.d_A.present()) {
        alignas(64) A rate[std::size_t{N * V::lanes}];
        tiles::load_rates<N>(in.A, in.A_is_log, channel, count, rate);
        for (int n = 0; n < N; ++n) {
          V const natural = V::load(rate + n * V::lanes) * V(selective_scan_math::ln_2);
          V const sum = total(work.d_A, n) * selective_scan_math::natural_rate_derivative(natural, in.A_is_log);
          for (int lane = 0; lane < count; ++lane) d.d_A(channel + lane, n) += sum[lane];
        }
      }
      V const d_D = total(work.d_channel, 0), d_bias = total(work.d_channel, 1);
      for (int lane = 0; lane < count; ++lane) {
        if (d.d_D.present()) d.d_D(channel + lane) += d_D[lane];
        if (d.d_delta_bias.present()) d.d_delta_bias(channel + lane) += d_bias[lane];
      }
    }
  });
}

}  // namespace blackmamba
