#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>

namespace blackmamba {

struct quantile_balance_options {
  std::int64_t top_k = 1;
  double beta = 2;  ///< weight of the logits, as router has it
  int rounds = 8;
};

/// Balances counts (J. Su, "MoE odyssey 6: optimal allocation", kexue.fm/archives/11619; Kimi K3 report, section
/// 2.3.3): finds offsets g with which every expert is among the top k of q = M k / E tokens. A round is one step of
/// block coordinate descent on the dual of that assignment problem:
///
///   t_i = (k+1)-th largest over j of beta x_ij + g_j    the score that a token asks for
///   g_j = q-quantile over i of t_i - beta x_ij          the offset that q tokens would follow; then max_j g_j = 0
///
/// Quantiles lie half way between the q-th and the next smallest value (q rounded down, at least 1). The work is
/// known before: a fixed number of rounds, without a stop rule; the incoming offset is the start, so that one round a
/// step will do in training. Offsets that are not finite start from 0. Rows with a logit that is not finite are left
/// out. With k = E every token goes everywhere, and the offset stays. Bitwise repeatable, independent of the number
/// of threads. Asynchronous on cuda.
struct quantile_balance {
  using options = quantile_balance_options;

  /// @param logits  (M, E) A
  /// @param offset  (E) A     in: where to start; out: g
  /// scratch_bytes<A, memory space>(M, E) of scratch.
  template <device_policy P, storage A>
  static void forward(P const& policy, in<P, A, dyn, dyn> logits, out<P, A, dyn> offset, options const& how = {}) {
    static_assert(std::is_same_v<A, accum_t<A>>,
                  "blackmamba: quantile_balance: offset is float or double; keep router logits in accum_t<T>");
    auto const experts = logits.extent(1);
    check_shape("quantile_balance", "offset", offset, {experts});
    if (logits.size() == 0) return;
    check_that(how.top_k >= 1 && how.top_k <= experts, "quantile_balance", "top_k", std::to_string(how.top_k),
               "1 to " + std::to_string(experts));
    check_that(how.rounds >= 0, "quantile_balance", "rounds", std::to_string(how.rounds), "0 or more");
    scratch<P> memory(policy, scratch_bytes<A, typename P::memory_space>(logits.extent(0), experts));
    auto wanted = memory.template allocate<A>(experts, logits.extent(0));
    if constexpr (counts_digits<typename P::memory_space>) {
      auto counts = memory.template allocate<std::uint64_t>(digit_counts<A>(experts));
      backend_of<quantile_balance, P>::forward(policy, logits, offset, how, wanted, counts);
    } else {
      auto threshold = memory.template allocate<A>(logits.extent(0));
      backend_of<quantile_balance, P>::forward(policy, logits, offset, how, wanted, threshold);
    }
  }

  template <storage A, class Space = space::host>
  static constexpr std::size_t scratch_bytes(std::int64_t rows, std::int64_t experts) {
    return scratch_sum(sizeof(A) * static_cast<std::size_t>(rows * experts),
                       counts_digits<Space> ? sizeof(std::uint64_t) * static_cast<std::size_t>(digit_counts<A>(experts))
                                            : sizeof(A) * static_cast<std::size_t>(rows));
  }

  /// Where quantiles are found by counting digits of 8 bits: two sets of a count for each value of each digit of each
  /// expert, as pairs of 32 bits, and a key for each expert.
  template <class Space>
  static constexpr bool counts_digits = std::is_same_v<Space, space::device>;
  template <storage A>
  static constexpr std::int64_t digit_counts(std::int64_t experts) {
    return 2 * experts * (static_cast<std::int64_t>(sizeof(A)) * 128 + 1);
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/router/quantile_balance_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/router/quantile_balance_cuda.cuh>
#endif
