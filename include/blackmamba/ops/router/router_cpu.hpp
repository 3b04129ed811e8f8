#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/core/cpu/transpose.hpp>
#include <blackmamba/ops/router/router.hpp>
#include <blackmamba/ops/router/router_math.hpp>

#include <algorithm>
#include <cmath>

namespace blackmamba {

template <>
struct backend<router, device::cpu> {
  template <class T>
  static void forward(device::cpu const& policy, router::inputs<device::cpu, T> const& in,
                      router::selection<device::cpu, T> const& chosen, router::options const& options,
                      host_view<std::int32_t, dyn> counts) {
    using A = accum_t<T>;
    using V = simd::pack<A>;
    std::int64_t const rows = in.logits.extent(0), experts = in.logits.extent(1);
    cpu::parallel_for(policy.threads, counts.extent(0), 1, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t c = first; c < last; ++c) {
        std::int64_t const begin = c * router::rows_per_count, end = std::min(begin + router::rows_per_count, rows);
        std::int32_t refused = 0;
        if (experts <= widest) {  // a row in each lane
          alignas(64) A transposed[widest * V::lanes];
          for (std::int64_t r = begin; r < end; r += V::lanes) {
            int const lanes = static_cast<int>(std::min<std::int64_t>(V::lanes, end - r));
            simd::rows_to_lanes<V>(in.logits.row(r), in.logits.stride(0), lanes, experts, A(0), transposed);
            refused += route<V>(in, chosen, options, r, lanes,
                                [&](std::int64_t j) { return V::load(transposed + j * V::lanes); });
          }
        } else {
          for (std::int64_t r = begin; r < end; ++r)
            refused += route<A>(in, chosen, options, r, 1, [&](std::int64_t j) { return in.logits.row(r)[j]; });
        }
        counts(c) = refused;
      }
    });
    if (!chosen.non_finite_rows.present()) return;
    chosen.non_finite_rows(0) = 0;
    for (std::int64_t c = 0; c < counts.extent(0); ++c) chosen.non_finite_rows(0) += counts(c);
  }

  template <class A>
  static void backward(device::cpu const& policy, router::gradient_inputs<device::cpu, A> const& in,
                       host_view<A, dyn, dyn> d_logits, gate_function gate) {
    using V = simd::pack<A, std::min(8, simd::width<A>)>;  // 8 experts are the usual number
    std::int64_t const rows = d_logits.extent(0), experts = d_logits.extent(1), k = in.expert.extent(1);
    cpu::parallel_for(policy.threads, rows, 256, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        std::int32_t const* const expert = in.expert.row(r);
        A const* const logits = in.logits.row(r);
        A const* const d_gate = in.d_gate.row(r);
        A* const d = d_logits.row(r);
        auto const selected = [&](std::int64_t a) { return logits[expert[a]]; };
        std::fill_n(d, experts, A(0));
        if (k == 0 || expert[0] < 0) continue;
        if (gate == gate_function::sigmoid) {
          for (std::int64_t a = 0; a < k; ++a) {
            A const s = math::sigmoid(selected(a));
            d[expert[a]] = d_gate[a] * s * (1 - s);
          }
        } else if (gate == gate_function::softmax) {
          A const largest = *std::max_element(logits, logits + experts);
          V sums = 0;
          simd::for_packs<V::lanes>(experts, [&](std::int64_t j, auto lanes) {
            V const e = exp(simd::load<V>(logits + j, lanes) - V(largest));
            simd::store(e, d + j, lanes);
            sums += simd::first(e, lanes);
          });
          A const scale = 1 / simd::sum(sums);
          A mean = 0;
          for (std::int64_t a = 0; a < k; ++a) mean += d_gate[a] * d[expert[a]] * scale;
          simd::for_packs<V::lanes>(experts, [&](std::int64_t j, auto lanes) {
            simd::store(simd::load<V>(d + j, lanes) * V(-mean * scale), d + j, lanes);
          });
          for (std::int64_t a = 0; a < k; ++a) d[expert[a]] += d_gate[a] * math::exp(selected(a) - largest) * scale;
        } else {
          auto const over = math::softmax_over<A>(k, selected);
          auto const p = [&](std::int64_t a) { return math::exp(selected(a) - over.largest) / over.sum; };
          A mean = 0;
          for (std::int64_t a = 0; a < k; ++a) mean += d_gate[a] * p(a);
          for (std::int64_t a = 0; a < k; ++a) d[expert[a]] = p(a) * (d_gate[a] - mean);
        }
      }
    });
  }

 private:
  /// Up to this many experts, rows are routed side by side, one in each lane.
  static constexpr std::int64_t widest = 128;

  /// Routes `lanes` rows from row r on; logit(j) gives their logits of expert j. Returns how many go nowhere.
  template <class V, class T, class Logit>
  static std::int32_t route(router::inputs<device::cpu, T> const& in, router::selection<device::cpu, T> const& chosen,
                            router::options const& options, std::int64_t r, int lanes, Logit&& logit) {
    using A = accum_t<T>;
    using math::exp;
    std::int64_t const experts = in.logits.extent(1), k = chosen.expert.extent(1);
    A const* const g = in.offset.data();
    auto const offset = [&](std::int64_t j) { return V(g ? g[j] : A(0)); };
    V const refused = math::finite_test<V>(experts, logit);
    auto const write = [&](std::int64_t a, V expert, V gate) {
      for (int i = 0; i < lanes; ++i) {
        bool const routed = lane(refused, i) == A(0);
        chosen.expert(r + i, a) = routed ? static_cast<std::int32_t>(lane(expert, i)) : -1;
        chosen.gate(r + i, a) = routed ? lane(gate, i) : A(0);
      }
    };
    math::softmax_sums<V> over{V(A(0)), V(A(1))};
    if (options.gate == gate_function::softmax) over = math::softmax_over<V>(experts, logit);
    auto choice = math::no_choice<V>();
    V largest = V(A(-INFINITY));
    for (std::int64_t a = 0; a < k; ++a) {
      choice = math::next_choice(choice, experts, V(static_cast<A>(options.beta)), logit, offset);
      switch (options.gate) {
        case gate_function::sigmoid: write(a, choice.expert, math::sigmoid(choice.logit)); break;
        case gate_function::softmax: write(a, choice.expert, exp(choice.logit - over.largest) / over.sum); break;
        case gate_function::softmax_selected: {
          using math::max;
          write(a, choice.expert, choice.logit);
          largest = max(largest, choice.logit);
        }
      }
    }
    if (options.gate == gate_function::softmax_selected)
      for (int i = 0; i < lanes; ++i) {
        if (lane(refused, i) != A(0)) continue;
        A* const gate = chosen.gate.row(r + i);
        A sum = 0;
        for (std::int64_t a = 0; a < k; ++a) sum += gate[a] = math::exp(gate[a] - lane(largest, i));
        for (std::int64_t a = 0; a < k; ++a) gate[a] /= sum;
      }
    std::int32_t nowhere = 0;
    for (int i = 0; i < lanes; ++i) nowhere += lane(refused, i) == A(0) ? 0 : 1;
    return nowhere;
  }

  template <class A>
  static A lane(A x, int) {
    return x;
  }
  template <class A, int N>
  static A lane(simd::pack<A, N> const& x, int i) {
    return x[i];
  }
};

}  // namespace blackmamba
