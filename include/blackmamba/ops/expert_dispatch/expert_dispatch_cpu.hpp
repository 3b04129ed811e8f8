#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/ops/expert_dispatch/expert_dispatch.hpp>

#include <cstring>

namespace blackmamba {

template <>
struct backend<expert_dispatch, device::cpu> {
  using routing = expert_dispatch::routing<device::cpu>;

  static void plan(device::cpu const& policy, host_view<std::int32_t const, dyn, dyn> expert, routing const& to,
                   std::int64_t capacity, host_view<std::int64_t, dyn, dyn> counts) {
    std::int64_t const slots = expert.size(), experts = to.offsets.extent(0) - 1;
    constexpr std::int64_t chunk = expert_dispatch::slots_per_chunk;
    /// Calls body(slot that the run begins with, experts of its slots, their number) for the runs of a chunk's slots.
    auto const each_run = [&](std::int64_t c, auto&& body) {
      std::int64_t const begin = c * chunk, end = std::min(begin + chunk, slots);
      if (expert.contiguous()) return body(begin, expert.data() + begin, end - begin);
      std::int32_t copy[run_length];
      for (std::int64_t s = begin; s < end; s += run_length) {
        std::int64_t const n = std::min(run_length, end - s), k = expert.extent(1);
        for (std::int64_t i = 0; i < n; ++i) copy[i] = expert((s + i) / k, (s + i) % k);
        body(s, copy, n);
      }
    };

    cpu::parallel_for(policy.threads, counts.extent(0), 4, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t c = begin; c < end; ++c) {
        std::fill_n(counts.row(c), experts, 0);
        each_run(c, [&](std::int64_t first, std::int32_t const* e, std::int64_t n) {
          check(first, e, n, experts);
          ranks_of<false>(experts, counts.row(c), e, n, [](std::int64_t, std::int32_t, std::int64_t) {});
        });
      }
    });

    // Counts become the first position of each chunk among its expert's slots, from the expert's first row on.
    std::int64_t row = 0;
    for (std::int64_t e = 0; e < experts; ++e) {
      to.offsets(e) = row;
      std::int64_t next = row;
      for (std::int64_t c = 0; c < counts.extent(0); ++c) {
        std::int64_t const n = counts(c, e);
        counts(c, e) = next;
        next += n;
      }
      row = capacity > 0 ? std::min(next, row + capacity) : next;
    }
    to.offsets(experts) = row;

    std::int32_t* const row_of = to.row.data();
    std::int32_t* const source = to.source.data();
    std::int64_t const* const end_of = to.offsets.data() + 1;
    cpu::parallel_for(policy.threads, counts.extent(0), 4, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t c = begin; c < end; ++c)
        each_run(c, [&](std::int64_t first, std::int32_t const* e, std::int64_t n) {
          auto const place = [&](std::int64_t i, std::int64_t r) {
            row_of[first + i] = static_cast<std::int32_t>(r);
            source[r] = static_cast<std::int32_t>(first + i);
          };
          std::int32_t lowest = 0;
          for (std::int64_t i = 0; i < n; ++i) lowest = std::min(lowest, e[i]);
          if (capacity == 0 && lowest >= 0)
            return ranks_of<true>(experts, counts.row(c), e, n,
                                  [&](std::int64_t i, std::int32_t, std::int64_t r) { place(i, r); });
          ranks_of<false>(experts, counts.row(c), e, n, [&](std::int64_t i, std::int32_t which, std::int64_t r) {
            if (which >= 0 && r < end_of[which])
              place(i, r);
            else
              row_of[first + i] = -1;
          });
        });
    });
    std::fill_n(source + row, slots - row, -1);
  }

  template <class T>
  static void permute(device::cpu const& policy, routing const& plan, host_view<T const, dyn, dyn> x,
                      host_view<T, dyn, dyn> rows) {
    std::int64_t const k = rows.extent(0) / x.extent(0), width = x.extent(1);
    std::int64_t const used = plan.offsets(plan.offsets.extent(0) - 1);
    cpu::parallel_for(policy.threads, used, grain(width), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r)
        std::memcpy(static_cast<void*>(rows.row(r)), x.row(plan.source(r) / k),
                    static_cast<std::size_t>(width) * sizeof(T));
    });
  }

  template <class T>
  static void combine(device::cpu const& policy, routing const& plan, host_view<T const, dyn, dyn> rows,
                      host_view<accum_t<T> const, dyn, dyn> gate, host_view<T, dyn, dyn> y) {
    gather_sum(policy, plan, rows, y, [&](std::int64_t t, std::int64_t a) { return gate(t, a); });
  }

  template <class T>
  static void permute_backward(device::cpu const& policy, routing const& plan, host_view<T const, dyn, dyn> d_rows,
                               host_view<T, dyn, dyn> d_x) {
    gather_sum(policy, plan, d_rows, d_x, [](std::int64_t, std::int64_t) { return accum_t<T>(1); });
  }

  template <class T>
  static void combine_backward(device::cpu const& policy, routing const& plan,
                               expert_dispatch::combine_gradient_inputs<device::cpu, T> const& in,
                               expert_dispatch::combine_gradients<device::cpu, T> const& d) {
    using A = accum_t<T>;
    using V = simd::pack<A>;
    std::int64_t const tokens = in.gate.extent(0), k = in.gate.extent(1), width = in.d_y.extent(1);
    cpu::parallel_for(policy.threads, tokens, grain(width), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t)
        for (std::int64_t a = 0; a < k; ++a) {
          std::int64_t const r = plan.row(t * k + a);
          if (r < 0) {
            d.d_gate(t, a) = 0;
            continue;
          }
          V const gate = in.gate(t, a);
          T const* const row = in.rows.row(r);
          T const* const d_y = in.d_y.row(t);
          T* const d_row = d.d_rows.row(r);
          V dot = 0;
          simd::for_packs<V::lanes>(width, [&](std::int64_t i, auto lanes) {
            V const g = simd::load<V>(d_y + i, lanes);
            dot = fma(simd::load<V>(row + i, lanes), g, dot);
            simd::store(gate * g, d_row + i, lanes);
          });
          d.d_gate(t, a) = simd::sum(dot);
        }
    });
  }

 private:
  static constexpr std::int64_t run_length = 255;

  static void check(std::int64_t first, std::int32_t const* e, std::int64_t n, std::int64_t experts) {
    std::int32_t lowest = -1, highest = -1;
    for (std::int64_t i = 0; i < n; ++i) {
      lowest = std::min(lowest, e[i]);
      highest = std::max(highest, e[i]);
    }
    if (lowest == -1 && highest < experts) return;
    for (std::int64_t i = 0; i < n; ++i)
      if (e[i] < -1 || e[i] >= experts)
        throw value_error("expert_dispatch.plan: expert: slot " + std::to_string(first + i) + " has expert " +
                          std::to_string(e[i]) + ", expected -1 or 0 to " + std::to_string(experts - 1));
  }
  /// Calls body(i, e[i], next[e[i]]++) for each slot of a run in order; without an expert, the third is of no
  /// meaning.
  template <bool AllRouted, class Body>
  static void ranks_of(std::int64_t experts, std::int64_t* next, std::int32_t const* e, std::int64_t n, Body&& body) {
    if (experts == 0 || experts > 8) {
      for (std::int64_t i = 0; i < n; ++i) body(i, e[i], AllRouted || e[i] >= 0 ? next[e[i]]++ : 0);
      return;
    }
    // 1 to 8 experts: a byte of one register counts for each of them, which no slot has to wait for; before a byte
    // can overflow, the counts go to next.
    for (std::int64_t start = 0; start < n; start += run_length) {
      std::uint64_t seen = 0;
      for (std::int64_t i = start; i < std::min(start + run_length, n); ++i) {
        auto const shift = static_cast<unsigned>(e[i]) * 8 % 64;
        body(i, e[i], next[AllRouted || e[i] >= 0 ? e[i] : 0] + static_cast<std::int64_t>(seen >> shift & 0xff));
        seen += static_cast<std::uint64_t>(AllRouted || e[i] >= 0) << shift;
      }
      for (std::int64_t j = 0; j < experts; ++j) next[j] += static_cast<std::int64_t>(seen >> (8 * j) & 0xff);
    }
  }

  /// Rows of this width that are worth a thread's while.
  static std::int64_t grain(std::int64_t width) {
    return std::max<std::int64_t>(1, 16384 / std::max<std::int64_t>(width, 1));
  }

  /// to[t,:] = sum over a of weight(t, a) from[row[t k + a], :].
  template <class T, class Weight>
  static void gather_sum(device::cpu const& policy, routing const& plan, host_view<T const, dyn, dyn> from,
                         host_view<T, dyn, dyn> to, Weight&& weight) {
    using V = simd::pack<accum_t<T>>;
    std::int64_t const tokens = to.extent(0), width = to.extent(1), k = plan.row.extent(0) / tokens;
    cpu::parallel_for(policy.threads, tokens, grain(width), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t)
        simd::for_packs<V::lanes>(width, [&](std::int64_t i, auto lanes) {
          V sum = 0;
          for (std::int64_t a = 0; a < k; ++a) {
            std::int64_t const r = plan.row(t * k + a);
            if (r >= 0) sum = fma(V(weight(t, a)), simd::load<V>(from.row(r) + i, lanes), sum);
          }
          simd::store(sum, to.row(t) + i, lanes);
        });
    });
  }
};

}  // namespace blackmamba
