#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/sequences.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_cpu.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_tiles_cpu.hpp>

namespace blackmamba::selective_scan_tiles {

/// States that a tile of forward keeps in registers.
inline constexpr int forward_states = simd::register_bytes == 64 ? 8 : 4;

/// Moves `States` states of a pack of channels over the steps of a chunk: h (States, lanes), rate (States, lanes); B, C
/// (steps, States); dt, dt u (steps, lanes); y (steps, lanes) += C . h.
template <int States, bool Bounded, class A>
__attribute__((noinline)) void advance_states(A const* rate, A* h_memory, A const* B, A const* C, A const* dt_memory,
                                              A const* dt_u_memory, A* y, int steps, prefetch_share ahead) {
  using V = simd::pack<A>;
  decay<V, Bounded> const decay_of;
  V h[std::size_t{States}];
  unroll<States>([&](auto n) __attribute__((always_inline)) { h[n] = V::load(h_memory + n * V::lanes); });
  for (int t = 0; t < steps; ++t) {
    ahead.ask(t);
    V const dt = V::load(dt_memory + t * V::lanes), dt_u = V::load(dt_u_memory + t * V::lanes);
    V sum[2] = {V::load(y + t * V::lanes), V(0)};
    unroll<States>([&](auto n) __attribute__((always_inline)) {
      V const a = decay_of(dt, V::load(rate + n * V::lanes));
      h[n] = selective_scan_math::advance(a, h[n], rounded(dt_u * V(B[t * States + n])));
      sum[n % 2] = fma(h[n], V(C[t * States + n]), sum[n % 2]);
    });
    (sum[0] + sum[1]).store(y + t * V::lanes);
  }
  unroll<States>([&](auto n) __attribute__((always_inline)) { h[n].store(h_memory + n * V::lanes); });
}

/// Runs sequences through one group of channels.
template <class T, int N>
class forward_worker {
 public:
  using A = accum_t<T>;
  using V = simd::pack<A>;
  /// Packs of channels that are worked on chunk by chunk: 256 channels, whose rows are pieces of 1 KiB of float, and at
  /// most 16 KiB of states.
  static constexpr int most_packs = std::clamp(16384 / (N * simd::register_bytes), 1, 256 / V::lanes);

  forward_worker(selective_scan::inputs<device::cpu, T, N> const& in, host_view<T, dyn, dyn, dyn> y,
                 selective_scan::results<device::cpu, T> const& keep)
      : in_(in), y_(y), keep_(keep) {}

  /// The channels that the following sequences are run through, at most most_packs packs.
  void take_channels(std::int64_t first, std::int64_t count) {
    first_ = first;
    packs_ = static_cast<int>((count + V::lanes - 1) / V::lanes);
    for (int p = 0; p < packs_; ++p) {
      at_[p].count = static_cast<int>(std::min<std::int64_t>(count - p * V::lanes, V::lanes));
      load_rates<N>(in_.A, in_.A_is_log, channel(p), at_[p].count, at_[p].rate).store(at_[p].largest_rate);
    }
  }
  void run(cpu::sequences const& sequences, std::int64_t s) {
    for (int p = 0; p < packs_; ++p) load_states<N>(in_.initial_state, s, channel(p), at_[p].count, at_[p].h);
    sequences.blocks_of_sequence(s, [&](cpu::sequences::block const& block) {
      std::int64_t const b = block.of.batch, first = block.of.first + block.begin;
      int const steps = static_cast<int>(block.end - block.begin);
      if (steps > 0) {
        load_projection<N, forward_states>(rows_at(in_.B, b, first, 0), steps, B_);
        load_projection<N, forward_states>(rows_at(in_.C, b, first, 0), steps, C_);
      }
      for (int p = 0; p < packs_; ++p)
        with_lanes<A>(at_[p].count, [&](auto count) {
          if (keep_.checkpoints.present()) keep_states(block.number, p, count);
          if (steps == 0) return;
          // What comes next: the following pack, then the following chunk.
          bool const wrap = p + 1 == packs_;
          std::int64_t const next = wrap ? std::min(first + steps, block.of.first + block.of.length - steps) : first;
          run_chunk(tensors(b, first, channel(p)), tensors(b, next, channel(wrap ? 0 : p + 1)), steps, p, count);
        });
    });
    for (int p = 0; p < packs_; ++p) store_states<N>(at_[p].h, keep_.final_state, s, channel(p), at_[p].count);
  }

 private:
  struct rows {
    strided_rows<T const> u, delta, z;
    strided_rows<T> y;
  };
  rows tensors(std::int64_t b, std::int64_t first, std::int64_t channel) const {
    return {rows_at(in_.u, b, first, channel), rows_at(in_.delta, b, first, channel), rows_at(in_.z, b, first, channel),
            rows_at(y_, b, first, channel)};
  }
  std::int64_t channel(int p) const { return first_ + p * V::lanes; }

  template <class Count>
  void keep_states(std::int64_t number, int p, Count count) {
    std::int64_t const channels = y_.extent(2);
    A* const to = keep_.checkpoints.data() + number * N * channels + channel(p);
    for (int n = 0; n < N; ++n) simd::store(V::load(at_[p].h + n * V::lanes), to + n * channels, count);
  }

  template <class Count>
  void run_chunk(rows const& now, rows const& next, int steps, int p, Count count) {
    power_of_two<V> const power;
    V const bias = in_.delta_bias.present() ? simd::load<V>(in_.delta_bias.data() + channel(p), count) : V(0);
    V const skip = in_.D.present() ? simd::load<V>(in_.D.data() + channel(p), count) : V(0);
    V longest = 0;
    for (int t = 0; t < steps; ++t) {
      V const u = simd::load<V>(now.u[t], count);
      V dt = simd::load<V>(now.delta[t], count) + bias;
      if (in_.delta_softplus) dt = selective_scan_math::softplus(dt, power);
      dt.store(dt_ + t * V::lanes);
      (dt * u).store(dt_u_ + t * V::lanes);
      (skip * u).store(sum_ + t * V::lanes);
      longest = max(longest, abs(dt));
    }
    bool const bounded =
        simd::max_lane(longest * V::load(at_[p].largest_rate)) <= A(-selective_scan_math::least_exponent);
    prefetch_.start((N + forward_states - 1) / forward_states);
    prefetch_.add(next.u);
    prefetch_.add(next.delta);
    prefetch_.add(next.z);
    prefetch_.add(next.y);
    state_tiles<N, forward_states>([&](int n, auto states) {
      auto const run_tile = [&](auto is_bounded) {
        advance_states<states, is_bounded>(at_[p].rate + n * V::lanes, at_[p].h + n * V::lanes, B_ + n * chunk,
                                           C_ + n * chunk, dt_, dt_u_, sum_, steps, prefetch_.share());
      };
      bounded ? run_tile(std::true_type{}) : run_tile(std::false_type{});
    });
    for (int t = 0; t < steps; ++t) {
      V y = V::load(sum_ + t * V::lanes);
      if (in_.z.present()) {
        V const z = simd::load<V>(now.z[t], count);
        y *= z * selective_scan_math::sigmoid(z, power);
      }
      simd::store(y, now.y[t], count);
    }
  }

  struct pack_state {
    alignas(64) A rate[std::size_t{N * V::lanes}];
    alignas(64) A h[std::size_t{N * V::lanes}];
    alignas(64) A largest_rate[V::size];
    int count;
  };

  selective_scan::inputs<device::cpu, T, N> const& in_;
  host_view<T, dyn, dyn, dyn> y_;
  selective_scan::results<device::cpu, T> const& keep_;
  std::int64_t first_ = 0;
  int packs_ = 0;
  prefetch_list<4> prefetch_;
  pack_state at_[std::size_t{most_packs}];
  alignas(64) A B_[std::size_t{chunk * N}];
  alignas(64) A C_[std::size_t{chunk * N}];
  alignas(64) A dt_[std::size_t{chunk * V::lanes}];
  alignas(64) A dt_u_[std::size_t{chunk * V::lanes}];
  alignas(64) A sum_[std::size_t{chunk * V::lanes}];
};

}  // namespace blackmamba::selective_scan_tiles

namespace blackmamba {

template <class T, int N>
void backend<selective_scan, device::cpu>::forward(device::cpu const& policy,
                                                   selective_scan::inputs<device::cpu, T, N> const& in,
                                                   host_view<T, dyn, dyn, dyn> y,
                                                   selective_scan::results<device::cpu, T> const& keep) {
  using worker = selective_scan_tiles::forward_worker<T, N>;
  std::int64_t const channels = y.extent(2);
  cpu::sequences const sequences("selective_scan", y.extent(0), y.extent(1), in.cu_seqlens,
                                 selective_scan::chunk_length);
  // Work is shared out by groups of channels, and within them by sequences. Groups are made narrower where the threads
  // would not all get work; no result depends on it.
  constexpr int lanes = worker::V::lanes;
  std::int64_t const width = selective_scan_tiles::group_width<lanes>(
      worker::most_packs * lanes, channels, sequences.count(), 2 * cpu::thread_count(policy.threads));
  std::int64_t const groups = (channels + width - 1) / width;
  cpu::parallel_for(policy.threads, groups * sequences.count(), 1, [&](std::int64_t begin, std::int64_t end) {
    worker w(in, y, keep);
    std::int64_t group = -1;
    for (std::int64_t i = begin; i < end; ++i) {
      if (i / sequences.count() != group) {
        group = i / sequences.count();
        w.take_channels(group * width, std::min(width, channels - group * width));
      }
      w.run(sequences, i % sequences.count());
    }
  });
}

}  // namespace blackmamba
