#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>

#include <cstddef>
#include <cstdint>
#include <type_traits>

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

  /// d_table[v,:] += sum of d_y[r,:] over the r with token[r] = v.
  ///
  /// token (R), d_y (R, H), d_table (V, H). Touches only rows of d_table that occur. The order of a sum depends on
  /// nothing but token: a token's rows, in the order of r, form runs of run_rows (the last takes what is left, fewer
  /// than twice as many), its runs form groups of group_runs (the last may have fewer). A run is summed row by row, a
  /// group run by run, the sum group by group. On cuda R is at most 2^31. scratch_bytes of scratch.
  /// @throws value_error (cpu) as forward; d_table is then unchanged. On cuda such a token adds nothing.
  template <device_policy P, storage T>
  static void backward(P const& policy, in<P, std::int32_t, dyn> token, in<P, T, dyn, dyn> d_y,
                       std::type_identity_t<out<P, accum_t<T>, dyn, dyn>> d_table) {
    auto const rows = d_y.extent(0), width = d_y.extent(1), vocabulary = d_table.extent(0);
    check_shape("embedding.backward", "token", token, {rows});
    check_shape("embedding.backward", "d_table", d_table, {-1, width});
    if (d_y.size() == 0) return;
    using space = typename P::memory_space;
    scratch<P> memory(policy, scratch_bytes<T, space>(rows, width, vocabulary));
    sorted_rows<space, accum_t<T>> sorted{.order = memory.template allocate<index<space>>(rows),
                                          .first = memory.template allocate<index<space>>(bounds<space>(vocabulary))};
    if constexpr (on_device<space>) {
      sorted.token = memory.template allocate<std::uint32_t>(rows);
      sorted.partial = memory.template allocate<accum_t<T>>(split_runs(rows), width);
      sorted.arrived = memory.template allocate<std::uint32_t>(counters(rows, width));
    }
    backend_of<embedding, P>::backward(policy, token, d_y, d_table, sorted);
  }

  static constexpr std::int64_t run_rows = 64;
  static constexpr std::int64_t group_runs = 32;

  template <class Space>
  static constexpr bool on_device = !std::is_same_v<Space, space::host>;
  template <class Space>
  using index = std::conditional_t<on_device<Space>, std::uint32_t, std::int64_t>;

  /// Scratch of backward. On a device the runs of a token are summed at the same time.
  template <class Space, class A>
  struct sorted_rows {
    view<Space, index<Space>, dyn> order;          // (R)          rows by token
    view<Space, index<Space>, dyn> first;          // (V+1)        where in order each token's begin; device: (V, 2),
                                                   //              where they begin and end
    view<Space, std::uint32_t, dyn> token = {};    // (R)          device: the tokens in that order
    view<Space, A, dyn, dyn> partial = {};         // (R/64+1, H)  device: sums of runs
    view<Space, std::uint32_t, dyn> arrived = {};  // device: how many of a group's runs, of a token's groups are done
  };
  template <class T, class Space>
  static constexpr std::size_t scratch_bytes(std::int64_t rows, std::int64_t width, std::int64_t vocabulary) {
    auto const bytes = [](std::size_t each, std::int64_t n) { return each * static_cast<std::size_t>(n); };
    std::size_t const order =
        scratch_sum(bytes(sizeof(index<Space>), rows), bytes(sizeof(index<Space>), bounds<Space>(vocabulary)));
    if (!on_device<Space>) return order;
    return order + scratch_sum(bytes(sizeof(std::uint32_t), rows),
                               bytes(sizeof(accum_t<T>), split_runs(rows) * width),
                               bytes(sizeof(std::uint32_t), counters(rows, width)));
  }

 private:
  template <class Space>
  static constexpr std::int64_t bounds(std::int64_t vocabulary) {
    return on_device<Space> ? 2 * vocabulary : vocabulary + 1;
  }
  /// Where a run of a token with several begins, divided by run_rows, is less, and no other's.
  static constexpr std::int64_t split_runs(std::int64_t rows) {
    return rows < 2 * run_rows ? 0 : rows / run_rows + 1;
  }
  /// Two for each of those and for each tile of columns, which has 32 or more.
  static constexpr std::int64_t counters(std::int64_t rows, std::int64_t width) {
    return 2 * split_runs(rows) * ((width + 31) / 32);
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/embedding/embedding_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/embedding/embedding_cuda.cuh>
#endif
