#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>

#include <cmath>
#include <string>

namespace blackmamba {

enum class sinkhorn_mode {
  sound,      ///< the default: see sinkhorn
  reference,  ///< the published loop with its initial value
  ones        ///< the published loop with the classical initial value, all ones
};
struct sinkhorn_options {
  sinkhorn_mode mode = sinkhorn_mode::sound;
  double tolerance = 0;           ///< 0: the mode's own, 1e-3 (sound) or 1e-4 (reference, ones: of another quantity)
  std::int32_t max_passes = 500;  ///< the loop ends here in any case
  std::int32_t fixed_passes = 0;  ///< so many passes whatever the error is: the cost is known; 0: until tolerance
  bool newton = true;             ///< sound mode: Newton steps where they help
  double beta = 2;                ///< weight of the logits; 2 in BlackMamba, 1 in Megatron-LM
};
/// How it went.
struct sinkhorn_report {
  std::int32_t passes;           ///< steps made; each sweeps all rows once, and one more sweep measures the error
  std::int32_t non_finite_rows;  ///< rows without a vote
  float error;                   ///< max_j |E c_j - 1| of the returned offset; infinity where a published loop broke
};

/// Balances experts: finds E numbers g such that the plan  p_ij = softmax_j(beta x_ij + g_j)  gives every expert the
/// same mass,  c_j = mean_i p_ij = 1/E.  The expert of a token is argmax_j(beta x_ij + g_j): router with the same
/// offset. Row scalings can't change an argmax over j, so the plan itself is never needed. (Balance is of mass;
/// counts follow it closely where tokens are many.)
///
/// Mode sound (entropic optimal transport, Cuturi 2013, with the rows eliminated): a pass makes the rows exact by a
/// max-shifted softmax and takes the fixed-point step g_j += log(1/E) - log(c_j), or a safeguarded Newton step on the
/// concave dual (see math::sinkhorn_progress); the loop stops when max_j |E c_j - 1| <= tolerance. It starts from the
/// offset that comes in: the previous step's makes one or two passes enough; zeros are a cold start, and so is an
/// offset that is not finite. The result does not depend on constants added to a row, nor is there an epsilon. The
/// tolerance is not taken below 8 units of rounding of 1 + max_j |g_j|.
///
/// Modes reference and ones (BlackMamba, arXiv 2402.01771, section 3, and its released code) for parity, in A:
///   K_ij = e^(beta x_ij);  d1_j = 1 / (E sum_i K_ij), or 1;  repeat  d0_i = (1/M) / (sum_j K_ij d1_j + 1e-8),
///   d1_j = (1/E) / (sum_i K_ij d0_i + 1e-8)  until  mean_j |d1_j - previous d1_j| <= tolerance;   g = log d1.
/// The incoming offset is not read. That stop rule is no statement about balance: with the published initial value d1
/// is so small that it holds after one pass, as a rule, where tokens are many, whatever balance was reached; epsilon
/// in turn makes the loop crawl on shifted or widespread logits. Read the report. Logits above 44 overflow in float:
/// then d1 is not a number, as published, and the error is infinite.
///
/// A row with a logit that is not finite has no vote in any mode, and is counted; M above is the number of voting
/// rows. Without any the offset stays (sound) or is zero, and the error is 0. Bitwise repeatable, independent of the
/// number of threads. Asynchronous on cuda. No gradient flows through g.
struct sinkhorn {
  using mode = sinkhorn_mode;
  using options = sinkhorn_options;
  using report = sinkhorn_report;
  static constexpr char const* name_of(mode m) {
    return m == mode::sound ? "sound" : m == mode::reference ? "reference" : "ones";
  }

  /// @param logits  (M, E) A
  /// @param offset  (E) A     in: where to start; out: g, with max_j g_j = 0
  /// @param result  (1)
  /// @param plan    (M, E) A  optional: scaled to rows of 1/M and columns of 1/E (in reference and ones: d1 K d0
  ///                          as the loop leaves it); 0 in rows without a vote; may alias logits
  /// scratch_bytes<A>(M, E) of scratch. A is float or double.
  template <device_policy P, storage A>
  static void forward(P const& policy, in<P, A, dyn, dyn> logits, out<P, A, dyn> offset, out<P, report, dyn> result,
                      options const& how = {}, optional_out<P, A, dyn, dyn> plan = {}) {
    static_assert(std::is_same_v<A, accum_t<A>>,
                  "blackmamba: sinkhorn: offset is float or double; keep router logits in accum_t<T>");
    auto const rows = logits.extent(0), experts = logits.extent(1);
    check_shape("sinkhorn", "offset", offset, {experts});
    check_shape("sinkhorn", "result", result, {1});
    check_optional_shape("sinkhorn", "plan", plan, {rows, experts});
    check_option(how.tolerance >= 0, "tolerance", how.tolerance, "0 or more");
    check_option(how.max_passes >= 0, "max_passes", how.max_passes, "0 or more");
    check_option(how.fixed_passes >= 0, "fixed_passes", how.fixed_passes, "0 or more");
    check_option(std::isfinite(how.beta), "beta", how.beta, "a finite number");
    if (experts == 0) return;
    scratch<P> memory(policy, scratch_bytes<A>(rows, experts));
    work<home<P>, A> space{memory.template allocate<A>(padded_rows(rows) * experts),
                     memory.template allocate<double>(chunks(rows), column_sums(experts)),
                     memory.template allocate<double>(chunks(rows), pair_sums(experts)),
                     memory.template allocate<double>(state_size(experts))};
    backend_of<sinkhorn, P>::forward(policy, logits, offset, result, how, plan, space);
  }

  /// Scratch. Rows are padded to whole vectors; sums run over chunks of rows, then over chunks, in order.
  template <device_policy P, storage A>
  struct work {
    out<P, A, dyn> kernel;            // (padded rows * E)   K, in an order of the backend's
    out<P, double, dyn, dyn> sums;    // (chunks, 2E)        partial column sums
    out<P, double, dyn, dyn> pairs;   // (chunks, E(E-1)/2)  partial sums of p_ij p_ik, j < k; none above newton_experts
    out<P, double, dyn> state;        // (E E + 9 E)
  };
  static constexpr std::int64_t rows_per_chunk = 1024;
  static constexpr std::int64_t newton_experts = 64;  ///< with more experts every step is a fixed-point step
  static constexpr std::int64_t padded_rows(std::int64_t rows) { return (rows + 63) / 64 * 64; }
  static constexpr std::int64_t chunks(std::int64_t rows) { return (rows + rows_per_chunk - 1) / rows_per_chunk; }
  static constexpr std::int64_t column_sums(std::int64_t experts) { return 2 * experts; }
  static constexpr std::int64_t pair_sums(std::int64_t experts) {
    return experts <= newton_experts ? experts * (experts - 1) / 2 : 0;
  }
  static constexpr std::int64_t state_size(std::int64_t experts) {
    return (experts <= newton_experts ? experts * experts : 0) + 9 * experts;
  }
  /// Newton's step needs no more than a sample of the rows: the stride at which a sweep over their pairs costs about
  /// as much as one over the rows, as long as enough are left for the step to be good. With 128 E rows it still
  /// divides the error by ten and more.
  static constexpr std::int64_t sample_stride(std::int64_t rows, std::int64_t experts) {
    std::int64_t const most = rows / (128 * experts);
    return most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1;
  }
  template <storage A>
  static constexpr std::size_t scratch_bytes(std::int64_t rows, std::int64_t experts) {
    auto const bytes = [](std::size_t size, std::int64_t n) { return size * static_cast<std::size_t>(n); };
    return scratch_sum(bytes(sizeof(A), padded_rows(rows) * experts),
                       bytes(sizeof(double), chunks(rows) * column_sums(experts)),
                       bytes(sizeof(double), chunks(rows) * pair_sums(experts)),
                       bytes(sizeof(double), state_size(experts)));
  }

 private:
  template <class T>
  static void check_option(bool right, char const* name, T got, char const* domain) {
    if (!right)
      throw value_error(std::string("sinkhorn: ") + name + ": got " + std::to_string(got) + ", expected " + domain);
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/sinkhorn/sinkhorn_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/sinkhorn/sinkhorn_cuda.cuh>
#endif
