#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/slots.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_cpu.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_tiles_cpu.hpp>

namespace blackmamba::selective_scan_tiles {

/// Moves sequences by a token or some, for a few hundred channels at a time: a pack holds states of one channel, which
/// lie side by side in memory. What a token costs is to read and write the state once.
template <class T, int N, class State>
class step_worker {
 public:
  using A = accum_t<T>;
  using V = simd::pack<A>;
  /// States in a pack: a whole register where there are so many, else a power of two.
  static constexpr int width = N >= V::lanes ? V::lanes : std::min(V::lanes, N >= 8 ? 8 : N >= 4 ? 4 : 2);
  static constexpr int padded = (N + width - 1) / width * width;
  using S = simd::pack<A, width>;
  /// Channels whose rates are kept for all sequences: 16 KiB of them.
  static constexpr int most_channels =
      std::max(V::lanes, 16384 / (padded * static_cast<int>(sizeof(A))) / V::lanes * V::lanes);

  explicit step_worker(selective_scan::token_inputs<device::cpu, T, N> const& in) : in_(in) {}

  void take_channels(std::int64_t first, int count) {
    power_of_two<S> const power;
    first_ = first;
    count_ = count;
    for (int c = 0; c < count; ++c)
      simd::for_packs<width>(N, [&](std::int64_t n, auto states) {
        S const a = simd::load<S>(in_.A.row(first + c) + n, states);
        selective_scan_math::rate(a, in_.A_is_log, power).store(rate_ + c * padded + n);
      });
  }
  void run(std::int64_t b, host_view<State, dyn, dyn, dyn> pool, host_view<T, dyn, dyn, dyn> y) {
    std::int64_t const own = slot_of(in_.slots, b, pool.extent(0)), length = y.extent(1);
    if (own < 0) return;
    auto const row = [&](std::int64_t slot) { return state_rows{pool.row(slot, first_), pool.stride(1)}; };
    state_rows from = row(own);
    for (std::int64_t t = 0; t < length; ++t) {
      std::int64_t const kept = kept_slot_of(in_.kept_slots, b, t, length, own, pool.extent(0));
      state_rows const to = kept >= 0 ? row(kept) : state_rows{between_, N};
      for (int n = 0; n < N; ++n) B_[n] = widen(in_.B(b, t, n));
      for (int n = 0; n < N; ++n) C_[n] = widen(in_.C(b, t, n));
      for (int c = 0; c < count_; c += V::lanes)
        with_lanes<A>(count_ - c, [&](auto count) { run_pack(b, t, c, from, to, y.row(b, t), count); });
      from = to;
    }
  }

 private:
  /// States of the channels from first_ on.
  struct state_rows {
    State* first;
    std::int64_t stride;
    State* operator[](std::int64_t c) const { return first + c * stride; }
  };

  template <class Count>
  void run_pack(std::int64_t b, std::int64_t t, int c, state_rows from, state_rows to, T* y, Count count) {
    power_of_two<V> const power;
    decay<S, false> const decay_of;
    std::int64_t const channel = first_ + c;
    auto const at = [&](auto const& x) { return x.present() ? simd::load<V>(x.data() + channel, count) : V(0); };
    V const u = simd::load<V>(in_.u.row(b, t) + channel, count);
    V dt = simd::load<V>(in_.delta.row(b, t) + channel, count) + at(in_.delta_bias);
    if (in_.delta_softplus) dt = selective_scan_math::softplus(dt, power);
    V const dt_u = dt * u;
    for (int lane = 0; lane < count; ++lane) {
      State* const h = from[c + lane];
      State* const next_h = to[c + lane];
      S products = 0;
      simd::for_packs<width>(N, [&](std::int64_t n, auto states) {
        S const a = decay_of(S(dt[lane]), S::load(rate_ + (c + lane) * padded + n));
        S const drive = rounded(S(dt_u[lane]) * S::load(B_ + n));
        S const next = selective_scan_math::advance(a, simd::load<S>(h + n, states), drive);
        simd::store(next, next_h + n, states);
        products = fma(next, S::load(C_ + n), products);
      });
      products.store(products_ + lane * width);
    }
    V sum;
    if constexpr (width == V::lanes) {
      sum = lane_sums<V::lanes>(products_);
    } else {
      for (int lane = 0; lane < V::lanes; ++lane) sum.v[lane] = simd::sum(S::load(products_ + lane * width));
    }
    sum = fma(at(in_.D), u, sum);
    if (in_.z.present()) {
      V const z = simd::load<V>(in_.z.row(b, t) + channel, count);
      sum *= z * selective_scan_math::sigmoid(z, power);
    }
    simd::store(sum, y + channel, count);
  }

  selective_scan::token_inputs<device::cpu, T, N> const& in_;
  std::int64_t first_ = 0;
  int count_ = 0;
  alignas(64) A rate_[std::size_t{most_channels * padded}];
  alignas(64) A B_[std::size_t{padded}] = {};
  alignas(64) A C_[std::size_t{padded}] = {};
  alignas(64) A products_[std::size_t{V::lanes * width}] = {};
  State between_[std::size_t{most_channels * N}];  // the state after a token that is not kept
};

}  // namespace blackmamba::selective_scan_tiles

namespace blackmamba {

template <class T, int N, class State>
void backend<selective_scan, device::cpu>::step(device::cpu const& policy,
                                                selective_scan::step_inputs<device::cpu, T, N> const& in,
                                                host_view<State, dyn, dyn, dyn> state, host_view<T, dyn, dyn> y) {
  steps(policy,
        selective_scan::token_inputs<device::cpu, T, N>{.u = as_one_token(in.u),
                                                        .delta = as_one_token(in.delta),
                                                        .A = in.A,
                                                        .B = as_one_token(in.B),
                                                        .C = as_one_token(in.C),
                                                        .D = in.D,
                                                        .z = as_one_token(in.z),
                                                        .delta_bias = in.delta_bias,
                                                        .delta_softplus = in.delta_softplus,
                                                        .A_is_log = in.A_is_log,
                                                        .slots = in.slots},
        state, as_one_token(y));
}

template <class T, int N, class State>
void backend<selective_scan, device::cpu>::steps(device::cpu const& policy,
                                                 selective_scan::token_inputs<device::cpu, T, N> const& in,
                                                 host_view<State, dyn, dyn, dyn> state, host_view<T, dyn, dyn, dyn> y) {
  using worker = selective_scan_tiles::step_worker<T, N, State>;
  std::int64_t const batch = y.extent(0), channels = y.extent(2);
  std::int64_t const width = selective_scan_tiles::group_width<worker::V::lanes>(worker::most_channels, channels, batch,
                                                                                 4 * cpu::thread_count(policy.threads));
  std::int64_t const groups = (channels + width - 1) / width;
  cpu::parallel_for(policy.threads, groups * batch, 1, [&](std::int64_t begin, std::int64_t end) {
    worker w(in);
    std::int64_t group = -1;
    for (std::int64_t i = begin; i < end; ++i) {
      if (i / batch != group) {
        group = i / batch;
        w.take_channels(group * width, static_cast<int>(std::min(width, channels - group * width)));
      }
      w.run(i % batch, state, y);
    }
  });
}

}  // namespace blackmamba
