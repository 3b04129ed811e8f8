#pragma once
#include <blackmamba/core/cpu/column_sums.hpp>
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/core/view.hpp>

#include <algorithm>
#include <cstdint>

/// What normalisations of rows have in common.
namespace blackmamba::cpu {

/// Packs of x[r,:] + residual[r,:], where there is a residual: the row that is normalised.
template <class V, class T>
class fused_row {
 public:
  using A = typename V::value_type;

  fused_row(host_view<T const, dyn, dyn> x, host_view<A const, dyn, dyn> residual, std::int64_t r)
      : x_(x.row(r)), residual_(residual.present() ? residual.row(r) : nullptr) {}
  template <class Lanes>
  BLACKMAMBA_INLINE V operator()(std::int64_t i, Lanes lanes) const {
    V const x = simd::load<V>(x_ + i, lanes);
    return residual_ ? x + simd::load<V>(residual_ + i, lanes) : x;
  }

 private:
  T const* x_;
  A const* residual_;
};

/// Calls body(r, sums) for each row r, where sums points to the partial sums over rows of its block: a row of
/// `partial`, zero before the block's first row. Blocks of rows_per_block rows are shared among threads; within one,
/// rows come in order, so that no sum depends on the number of threads. add_column_sums over `partial` is the second
/// half.
template <class A, class Body>
void for_row_blocks(int threads, std::int64_t rows, std::int64_t rows_per_block, host_view<A, dyn, dyn> partial,
                    Body&& body) {
  parallel_for(threads, partial.extent(0), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) {
      std::fill_n(partial.row(block), partial.extent(1), A(0));
      std::int64_t const last = std::min(rows, (block + 1) * rows_per_block);
      for (std::int64_t r = block * rows_per_block; r < last; ++r) body(r, partial.row(block));
    }
  });
}

}  // namespace blackmamba::cpu
