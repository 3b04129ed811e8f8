#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/ops/router/quantile_balance.hpp>
#include <blackmamba/ops/router/router_math.hpp>

#include <algorithm>
#include <cmath>

namespace blackmamba {

template <>
struct backend<quantile_balance, device::cpu> {
  template <class A>
  static void forward(device::cpu const& policy, host_view<A const, dyn, dyn> logits, host_view<A, dyn> offset,
                      quantile_balance::options const& how, host_view<A, dyn, dyn> wanted,
                      host_view<A, dyn> threshold) {
    std::int64_t const rows = logits.extent(0), experts = logits.extent(1), k = how.top_k;
    A const beta = static_cast<A>(how.beta);
    bool finite = true;
    for (std::int64_t j = 0; j < experts; ++j) finite = finite && std::isfinite(offset(j));
    for (std::int64_t j = 0; j < experts && !finite; ++j) offset(j) = 0;

    for (int round = 0; round < how.rounds && k < experts; ++round) {
      cpu::parallel_for(policy.threads, rows, 1024, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t r = begin; r < end; ++r) {
          A const* const x = logits.row(r);
          auto const logit = [x](std::int64_t j) { return x[j]; };
          auto choice = math::no_choice<A>();
          for (std::int64_t a = 0; a <= k; ++a)
            choice = math::next_choice(choice, experts, beta, logit, [&](std::int64_t j) { return offset(j); });
          // Not a number where a logit is not finite: the row is left out below.
          threshold(r) = choice.score + math::finite_test<A>(experts, logit);
        }
      });
      cpu::parallel_for(policy.threads, experts, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t j = begin; j < end; ++j) {
          A* const w = wanted.row(j);
          std::int64_t n = 0;
          for (std::int64_t r = 0; r < rows; ++r) {
            A const t = threshold(r) - beta * logits(r, j);
            if (std::isfinite(t)) w[n++] = t;
          }
          if (n > 0) offset(j) = quantile(w, n, std::max<std::int64_t>(1, n * k / experts));
        }
      });
      A const largest = *std::max_element(offset.data(), offset.data() + experts);
      for (std::int64_t j = 0; j < experts; ++j) offset(j) -= largest;
    }
  }

 private:
  /// Half way between the q-th smallest and the next. Reorders w.
  template <class A>
  static A quantile(A* w, std::int64_t n, std::int64_t q) {
    std::nth_element(w, w + q - 1, w + n);
    A const below = w[q - 1];
    return q < n ? below + (*std::min_element(w + q, w + n) - below) / 2 : below;
  }
};

}  // namespace blackmamba
