#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>

namespace blackmamba {

/// The weight of a chosen expert's output.
enum class gate_function {
  sigmoid,          ///< 1 / (1 + e^-logit): BlackMamba, top-1
  softmax,          ///< e^logit / sum over all experts: Switch Transformer (arXiv 2101.03961, eq. 1)
  softmax_selected  ///< e^logit / sum over the k selected: Mixtral (arXiv 2401.04088, eq. 1); constant 1 for k = 1
};
struct router_options {
  gate_function gate = gate_function::sigmoid;
  double beta = 2;
};

/// Chooses experts for tokens: the one selector that every balance rule shares. For token i,
///
///   expert[i,:] = the k experts with the largest  beta logits[i,j] + offset[j],  descending, of equals the lower
///   gate[i,a]   = a function of the raw logits (see gate_function): the weight of that expert's output
///
/// The offset is what a balance rule computes: none (absent), sinkhorn, load_bias, quantile_balance. It moves the
/// choice alone; gates and gradients see the raw logits. beta = 2 is what BlackMamba's Sinkhorn uses (arXiv
/// 2402.01771, section 3; released code); without an offset beta is without effect. An expert whose offset is
/// -infinity is chosen last.
///
/// A row with a logit that is not finite is routed nowhere: expert -1, gate 0, gradient 0; such rows are counted. The
/// choice is piecewise constant and has no gradient: the router learns through the gates (a sigmoid gate trains the
/// chosen experts' logits only).
///
/// A row's result does not depend on other rows. Bitwise repeatable, independent of the number of threads.
/// Asynchronous on cuda.
struct router {
  using gate_function = blackmamba::gate_function;
  using options = router_options;
  static constexpr char const* name_of(gate_function gate) {
    return gate == gate_function::sigmoid ? "sigmoid" : gate == gate_function::softmax ? "softmax" : "softmax_selected";
  }
  template <device_policy P, storage T>
  struct inputs {
    in<P, accum_t<T>, dyn, dyn> logits;  // (M, E)
    in<P, accum_t<T>, dyn> offset = {};  // (E)     optional
  };
  /// k is the second extent of expert; 1 <= k <= E.
  template <device_policy P, storage T>
  struct selection {
    out<P, std::int32_t, dyn, dyn> expert;           // (M, k)
    out<P, accum_t<T>, dyn, dyn> gate;               // (M, k)
    out<P, std::int32_t, dyn> non_finite_rows = {};  // (1)     optional: number of rows that are routed nowhere
  };
  /// T is deduced where the selection is an object, and float where it stands in braces: router::forward(policy,
  /// {.logits = logits, .offset = offset}, {.expert = expert, .gate = gate}).
  /// scratch_bytes<memory space>(M) of scratch.
  template <device_policy P, storage T = float>
  static void forward(P const& policy, std::type_identity_t<inputs<home<P>, T>> const& in,
                      selection<home<P>, T> const& chosen, options const& options = {}) {
    auto const rows = in.logits.extent(0), experts = in.logits.extent(1), k = chosen.expert.extent(1);
    check_shape("router", "expert", chosen.expert, {rows, -1});
    check_shape("router", "gate", chosen.gate, {rows, k});
    check_optional_shape("router", "offset", in.offset, {experts});
    check_optional_shape("router", "non_finite_rows", chosen.non_finite_rows, {1});
    check_that(rows == 0 || (k >= 1 && k <= experts), "router", "expert", std::to_string(k) + " experts for a token",
               "1 to " + std::to_string(experts));
    if constexpr (counts_in_parts<typename P::memory_space>) {
      scratch<P> memory(policy, scratch_bytes(rows));
      auto counts = memory.template allocate<std::int32_t>(count_rows(rows));
      backend_of<router, P>::forward(policy, in, chosen, options, counts);
    } else {
      backend_of<router, P>::forward(policy, in, chosen, options);
    }
  }

  template <device_policy P, storage T>
  struct gradient_inputs {
    in<P, accum_t<T>, dyn, dyn> logits;    // (M, E)
    in<P, std::int32_t, dyn, dyn> expert;  // (M, k)  as forward left it
    in<P, accum_t<T>, dyn, dyn> d_gate;    // (M, k)
  };
  /// d_logits (M, E) is overwritten. With s = sigmoid(logit), p the softmax over all experts (over the selected), and
  /// sums over the selected experts e:
  ///   sigmoid            d_logits[i,e] = d_gate[i,e] s (1 - s), else 0
  ///   softmax            d_logits[i,j] = p[i,j] (d_gate[i,j] - sum_e p[i,e] d_gate[i,e]), d_gate = 0 off the selection
  ///   softmax_selected   the same among the selected, else 0
  /// d_logits must not alias logits. T is deduced from d_logits.
  template <device_policy P, storage A>
  static void backward(P const& policy, std::type_identity_t<gradient_inputs<home<P>, A>> const& in,
                       out<P, A, dyn, dyn> d_logits, gate_function gate = gate_function::sigmoid) {
    static_assert(std::is_same_v<A, accum_t<A>>,
                  "blackmamba: router.backward: d_logits is float or double; keep router logits in accum_t<T>");
    auto const rows = d_logits.extent(0), experts = d_logits.extent(1), k = in.expert.extent(1);
    check_shape("router.backward", "logits", in.logits, {rows, experts});
    check_shape("router.backward", "expert", in.expert, {rows, -1});
    check_shape("router.backward", "d_gate", in.d_gate, {rows, k});
    check_that(k <= experts || rows == 0, "router.backward", "expert", std::to_string(k) + " experts for a token",
               "1 to " + std::to_string(experts));
    if (d_logits.size() > 0) backend_of<router, P>::backward(policy, in, d_logits, gate);
  }

  /// On the host, rows that are routed nowhere are counted over blocks of this many rows, then over blocks.
  static constexpr std::int64_t rows_per_count = 1024;
  static constexpr std::int64_t count_rows(std::int64_t rows) { return (rows + rows_per_count - 1) / rows_per_count; }
  template <class Space>
  static constexpr bool counts_in_parts = std::is_same_v<Space, space::host>;
  template <class Space = space::host>
  static constexpr std::size_t scratch_bytes(std::int64_t rows) {
    return counts_in_parts<Space> ? scratch_sum(sizeof(std::int32_t) * static_cast<std::size_t>(count_rows(rows))) : 0;
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/router/router_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/router/router_cuda.cuh>
#endif
