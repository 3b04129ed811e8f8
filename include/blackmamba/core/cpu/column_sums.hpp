#pragma once
#include <blackmamba/core/config.hpp>
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/core/numeric.hpp>

#include <algorithm>
#include <cstdint>

namespace blackmamba::cpu {

/// Columns that one task of add_column_sums takes.
inline constexpr std::int64_t column_sums_grain = 64;

/// sum (cols) += the sums of the columns of x (rows, cols) with row stride ldx. On the calling thread. Each column is
/// summed over blocks of 64 rows, then over blocks, in order.
template <class A, class T>
void add_column_sums(std::int64_t rows, std::int64_t cols, T const* x, std::int64_t ldx, A* sum) {
  using V = simd::pack<A>;
  constexpr std::int64_t block = 64;
  simd::for_packs<V::lanes>(cols, [&](std::int64_t j, auto lanes) {
    V total = simd::load<V>(sum + j, lanes);
    for (std::int64_t first = 0; first < rows; first += block) {
      V part = 0;
      for (std::int64_t r = first; r < std::min(rows, first + block); ++r)
        part += simd::load<V>(x + r * ldx + j, lanes);
      total += part;
    }
    simd::store(total, sum + j, lanes);
  });
}

/// The same, shared among threads; results do not depend on their number.
template <class A, class T>
void add_column_sums(int threads, std::int64_t rows, std::int64_t cols, T const* x, std::int64_t ldx, A* sum) {
  parallel_for(threads, cols, column_sums_grain, [&](std::int64_t begin, std::int64_t end) {
    add_column_sums(rows, end - begin, x + begin, ldx, sum + begin);
  });
}

}  // namespace blackmamba::cpu
