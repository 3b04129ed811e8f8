#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>

namespace blackmamba {

/// Balance without an auxiliary loss (Wang et al., arXiv 2408.15664, algorithm 1): after a step, an expert with less than the
/// mean load becomes more attractive by a fixed amount, one with more becomes less so,
///
///   offset[j] += rate sign(mean load - load_j),   load_j = number of slots with expert j
///
/// One step of a feedback over many training steps, not a solution: an imbalance of b in the logits takes beta b / rate steps.
/// The paper adds its bias to sigmoid scores and takes the rate 0.001; router adds it to beta logit, so that the same push is
/// larger there by the slope of beta logit over sigmoid, 4 beta at logit 0.
/// Slots without an expert (-1) count for none. Bitwise repeatable, independent of the number of threads.
struct load_bias {
  /// @param expert  (M, k)  as router leaves it, for the step that is over
  /// @param offset  (E)     in and out
  /// scratch_bytes(M*k, E) of scratch.
  template <device_policy P, storage A>
  static void forward(P const& policy, in<P, std::int32_t, dyn, dyn> expert, out<P, A, dyn> offset, double rate) {
    static_assert(std::is_same_v<A, accum_t<A>>, "blackmamba: load_bias: offset is float or double, as router takes it");
    if (offset.size() == 0) return;
    scratch<P> memory(policy, scratch_bytes(expert.size(), offset.extent(0)));
    auto counts = memory.template allocate<std::int64_t>(chunks(expert.size()), offset.extent(0));
    backend_of<load_bias, P>::forward(policy, expert, offset, rate, counts);
  }

  /// Slots are counted over chunks of rows with about this many slots, then over chunks.
  static constexpr std::int64_t slots_per_chunk = 4096;
  static constexpr std::int64_t chunks(std::int64_t slots) { return (slots + slots_per_chunk - 1) / slots_per_chunk; }
  static constexpr std::size_t scratch_bytes(std::int64_t slots, std::int64_t experts) {
    return scratch_sum(sizeof(std::int64_t) * static_cast<std::size_t>(chunks(slots) * experts));
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/router/load_bias_cpu.hpp>
