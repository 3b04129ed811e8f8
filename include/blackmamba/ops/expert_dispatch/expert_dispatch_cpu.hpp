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
    std::int64_t const slots = expert.size(), experts = to.offsets.extent(0) - 1, k = expert.extent(1);
    constexpr std::int64_t chunk = expert_dispatch::slots_per_chunk;
    auto const each_slot = [&](std::int64_t c, auto&& body) {
      std::int64_t const begin = c * chunk, end = std::min(begin + chunk, slots);
      if (expert.contiguous())
        for (std::int64_t s = begin; s < end; ++s) body(s, expert.data()[s]);
      else
        for (std::int64_t s = begin; s < end; ++s) body(s, expert(s / k, s % k));
    };

    cpu::parallel_for(policy.threads, counts.extent(0), 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t c = begin; c < end; ++c) {
        std::int64_t* const count = counts.row(c);
        std::fill_n(count, experts, 0);
        each_slot(c, [&](std::int64_t s, std::int32_t e) {
          if (e >= 0 && e < experts)
            ++count[e];
          else if (e != -1)
            throw value_error("expert_dispatch.plan: expert: slot " + std::to_string(s) + " has expert " +
                              std::to_string(e) + ", expected -1 or 0 to " + std::to_string(experts - 1));
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

    cpu::parallel_for(policy.threads, counts.extent(0), 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t c = begin; c < end; ++c) {
        std::int64_t* const next = counts.row(c);
        each_slot(c, [&](std::int64_t s, std::int32_t e) {
          std::int64_t const r = e < 0 ? 0 : next[e]++;
          bool const kept = e >= 0 && r < to.offsets(e + 1);
          to.row(s) = kept ? static_cast<std::int32_t>(r) : -1;
          if (kept) to.source(r) = static_cast<std::int32_t>(s);
        });
      }
    });
    std::fill_n(to.source.data() + row, slots - row, -1);
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
  /// Rows of this width that are worth a thread's while.
  static std::int64_t grain(std::int64_t width) { return std::max<std::int64_t>(1, 16384 / std::max<std::int64_t>(width, 1)); }

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
