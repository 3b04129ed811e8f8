#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>

namespace blackmamba {

/// Balance without an auxiliary loss (Wang et al., arXiv 2408.15664, algorithm 1): after a step, an expert with less
/// than the mean load becomes more attractive by a fixed amount, and one with more becomes less so:
///
///   offset[j] += rate sign(mean load - load_j),   load_j = offsets[j+1] - offsets[j]
///
/// One step of a feedback over many training steps, not a solution: two experts that stand d apart in beta logit meet
/// after d / (2 rate) steps. The paper adds its bias to sigmoid scores and takes the rate 0.001; router adds it to
/// beta logit, where the same push at logit 0 takes 4 beta times that rate. Loads are those of the plan: where a
/// capacity drops slots, an expert's load ends there. Bitwise repeatable. Asynchronous on cuda.
struct load_bias {
  /// @param offsets  (E+1)  first row of each expert, as expert_dispatch::plan leaves them, for the step that is over
  /// @param offset   (E)    in and out: the router's offset
  template <device_policy P, storage A>
  static void forward(P const& policy, in<P, std::int64_t, dyn> offsets, out<P, A, dyn> offset, double rate) {
    static_assert(std::is_same_v<A, accum_t<A>>,
                  "blackmamba: load_bias: offset is float or double, as router takes it; keep it in accum_t<T>");
    check_shape("load_bias", "offsets", offsets, {offset.extent(0) + 1});
    if (offset.size() > 0) backend_of<load_bias, P>::forward(policy, offsets, offset, rate);
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/router/load_bias_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/router/load_bias_cuda.cuh>
#endif
