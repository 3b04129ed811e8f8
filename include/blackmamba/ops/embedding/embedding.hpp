#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>

namespace blackmamba {

/// Rows of a table: y[r,:] = table[token[r],:]. The table may be the weight of the output projection too (tied
/// embedding: Press and Wolf, arXiv 1608.05859).
///
/// Bitwise repeatable, independent of the number of threads. Asynchronous on cuda.
struct embedding {
  /// token (R), table (V, H), y (R, H).
  /// @throws value_error (cpu) naming position, value and vocabulary where a token is outside [0, V); y is then
  /// unchanged. On cuda such a row of y is NaN.
  template <device_policy P, storage T>
  static void forward(P const& policy, in<P, std::int32_t, dyn> token, in<P, T, dyn, dyn> table,
                      out<P, T, dyn, dyn> y) {
    auto const rows = y.extent(0), width = y.extent(1);
    check_shape("embedding", "token", token, {rows});
    check_shape("embedding", "table", table, {-1, width});
    if (y.size() > 0) backend_of<embedding, P>::forward(policy, token, table, y);
  }

  /// d_table[v,:] += sum of d_y[r,:] over the r with token[r] = v, in the order of r.
  ///
  /// token (R), d_y (R, H), d_table (V, H). Touches only rows of d_table that occur. scratch_bytes<memory space>(R, V)
  /// of scratch.
  /// @throws value_error (cpu) as forward; d_table is then unchanged. On cuda such a token adds nothing.
  template <device_policy P, storage T>
  static void backward(P const& policy, in<P, std::int32_t, dyn> token, in<P, T, dyn, dyn> d_y,
                       std::type_identity_t<out<P, accum_t<T>, dyn, dyn>> d_table) {
    auto const rows = d_y.extent(0), width = d_y.extent(1), vocabulary = d_table.extent(0);
    check_shape("embedding.backward", "token", token, {rows});
    check_shape("embedding.backward", "d_table", d_table, {-1, width});
    if (d_y.size() == 0) return;
    using space = typename P::memory_space;
    scratch<P> memory(policy, scratch_bytes<space>(rows, vocabulary));
    auto order = memory.template allocate<std::int64_t>(rows);
    auto first = memory.template allocate<std::int64_t>(vocabulary + 1);
    auto lists = memory.template allocate<std::int32_t>(lists_size<space>(rows));
    backend_of<embedding, P>::backward(policy, token, d_y, d_table, order, first, lists);
  }

  /// Positions sorted by token, where each token's begin, and, on a device, the tokens in that order and a list of
  /// those that occur often.
  template <class Space = space::host>
  static constexpr std::size_t scratch_bytes(std::int64_t rows, std::int64_t vocabulary) {
    return scratch_sum(sizeof(std::int64_t) * static_cast<std::size_t>(rows),
                       sizeof(std::int64_t) * static_cast<std::size_t>(vocabulary + 1),
                       sizeof(std::int32_t) * static_cast<std::size_t>(lists_size<Space>(rows)));
  }

  /// A token that occurs more often than this is summed by a block of threads of its own.
  static constexpr std::int64_t seldom = 64;

 private:
  template <class Space>
  static constexpr std::int64_t lists_size(std::int64_t rows) {
    return std::is_same_v<Space, space::host> ? 0 : rows + 1 + rows / seldom;  // of those: how many, and which
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/embedding/embedding_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/embedding/embedding_cuda.cuh>
#endif
