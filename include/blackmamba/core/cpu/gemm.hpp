#pragma once
#include <blackmamba/core/config.hpp>
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>

// Eigen serves the host alone here, and its device annotations make nvcc warn. Who wants Eigen inside kernels includes
// it before this library.
#if BLACKMAMBA_CUDA && !defined(EIGEN_NO_CUDA) && !defined(EIGEN_CORE_H)
#define EIGEN_NO_CUDA
#endif
#include <Eigen/Core>

#include <algorithm>
#include <cstdint>

/// Dense products on the host, over Eigen.
namespace blackmamba::cpu {

/// Whether an operand is used as stored or transposed; operands are row-major with a row stride.
enum class transpose { no, yes };

/// C (m, n) = op(A) (m, k) op(B) (k, n) + bias (n), or C += it. Row strides lda, ldb, ldc in elements; bias may be null.
///
/// Arithmetic in float (double where C is double); 16-bit operands are widened tile by tile. C is computed in tiles whose size
/// depends on m, n and k alone: results do not depend on the number of threads.
template <class TA, class TB, class TC>
void gemm(int threads, transpose ta, transpose tb, std::int64_t m, std::int64_t n, std::int64_t k, TA const* a,
          std::int64_t lda, TB const* b, std::int64_t ldb, TC* c, std::int64_t ldc, update mode = update::overwrite,
          accum_t<TC> const* bias = nullptr);

namespace detail {

template <class T>
using row_major = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T>
using strided_map = Eigen::Map<row_major<T> const, 0, Eigen::OuterStride<>>;

/// A tile of an operand in the computing type: the memory itself, or a widened copy in `storage`.
template <class A, class T>
strided_map<A> operand(T const* p, std::int64_t ld, std::int64_t rows, std::int64_t cols, row_major<A>& storage) {
  if constexpr (std::is_same_v<A, T>) {
    return strided_map<A>(p, rows, cols, Eigen::OuterStride<>(ld));
  } else {
    storage.resize(rows, cols);
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < cols; ++j) storage(i, j) = convert<A>(p[i * ld + j]);
    return strided_map<A>(storage.data(), rows, cols, Eigen::OuterStride<>(cols));
  }
}

}  // namespace detail

template <class TA, class TB, class TC>
void gemm(int threads, transpose ta, transpose tb, std::int64_t m, std::int64_t n, std::int64_t k, TA const* a,
          std::int64_t lda, TB const* b, std::int64_t ldb, TC* c, std::int64_t ldc, update mode,
          accum_t<TC> const* bias) {
  using A = accum_t<TC>;
  if (m <= 0 || n <= 0) return;
  // Tiles of at least 64 x 64, about 16 of them where the product is large: enough for the threads to share.
  auto const tile_of = [](std::int64_t extent) { return std::max<std::int64_t>(64, (extent / 4 + 15) / 16 * 16); };
  std::int64_t const tile_m = tile_of(m), tile_n = n > 4 * m ? tile_of(n) : n;
  std::int64_t const tiles_m = (m + tile_m - 1) / tile_m, tiles_n = (n + tile_n - 1) / tile_n;
  parallel_for(threads, tiles_m * tiles_n, 1, [&](std::int64_t begin, std::int64_t end) {
    detail::row_major<A> wide_a, wide_b, product;
    for (std::int64_t tile = begin; tile < end; ++tile) {
      std::int64_t const i = tile / tiles_n * tile_m, j = tile % tiles_n * tile_n;
      std::int64_t const rows = std::min(tile_m, m - i), cols = std::min(tile_n, n - j);
      auto const left = ta == transpose::no ? detail::operand<A>(a + i * lda, lda, rows, k, wide_a)
                                            : detail::operand<A>(a + i, lda, k, rows, wide_a);
      auto const right = tb == transpose::no ? detail::operand<A>(b + j, ldb, k, cols, wide_b)
                                             : detail::operand<A>(b + j * ldb, ldb, cols, k, wide_b);
      auto const multiply = [&](auto&& target) {
        auto const into = [&](auto const& expression) {
          if (mode == update::accumulate && std::is_same_v<A, TC>)
            target.noalias() += expression;
          else
            target.noalias() = expression;
          if (bias)
            target.rowwise() += Eigen::Map<Eigen::Matrix<A, 1, Eigen::Dynamic> const>(bias + j, cols);
        };
        if (ta == transpose::no && tb == transpose::no) into(left * right);
        if (ta == transpose::no && tb == transpose::yes) into(left * right.transpose());
        if (ta == transpose::yes && tb == transpose::no) into(left.transpose() * right);
        if (ta == transpose::yes && tb == transpose::yes) into(left.transpose() * right.transpose());
      };
      if constexpr (std::is_same_v<A, TC>) {
        multiply(Eigen::Map<detail::row_major<A>, 0, Eigen::OuterStride<>>(c + i * ldc + j, rows, cols,
                                                                          Eigen::OuterStride<>(ldc)));
      } else {
        product.resize(rows, cols);
        multiply(product);
        for (std::int64_t r = 0; r < rows; ++r)
          for (std::int64_t s = 0; s < cols; ++s) {
            TC& target = c[(i + r) * ldc + j + s];
            target = convert<TC>(mode == update::accumulate ? widen(target) + product(r, s) : product(r, s));
          }
      }
    }
  });
}

}  // namespace blackmamba::cpu
