#pragma once
// Eigen's headers are not ours to keep quiet in a strict build: what a system header includes counts as one too.
#if defined(__GNUC__)
#pragma GCC system_header
#endif
#include <blackmamba/core/config.hpp>

// Eigen serves the host alone here, and its device annotations make nvcc warn. Who wants Eigen inside kernels includes
// it before this library.
#if BLACKMAMBA_CUDA && !defined(EIGEN_NO_CUDA) && !defined(EIGEN_CORE_H)
#define EIGEN_NO_CUDA
#endif
// GCC 12 takes the operands that its own AVX-512 intrinsics leave undefined on purpose for forgotten ones (GCC bug
// 105593), and looks here, where they are inlined, for whether to say so.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if !defined(__CUDA_ARCH__)  // nvcc's pass over the device's code need not read it
#include <Eigen/Core>
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cstddef>
#include <cstdint>

namespace blackmamba::cpu::detail {

/// Eigen packs operands of at most this size on the stack, larger ones in memory that it allocates (by default:
/// EIGEN_STACK_ALLOCATION_LIMIT).
inline constexpr std::size_t gemm_packed_bytes = 128 * 1024;

/// C (rows, cols) += op(A) (rows, depth) op(B) (depth, cols), one thread, row-major with row strides; A is float or
/// double.
template <class A>
void eigen_multiply(bool transpose_a, bool transpose_b, std::int64_t rows, std::int64_t cols, std::int64_t depth,
                    A const* a, std::int64_t lda, A const* b, std::int64_t ldb, A* c, std::int64_t ldc)
#if defined(__CUDA_ARCH__)
    ;
#else
{
  using matrix = Eigen::Matrix<A, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using stride = Eigen::OuterStride<>;
  using operand = Eigen::Map<matrix const, Eigen::Unaligned, stride>;
  operand const left(a, transpose_a ? depth : rows, transpose_a ? rows : depth, stride(lda));
  operand const right(b, transpose_b ? cols : depth, transpose_b ? depth : cols, stride(ldb));
  Eigen::Map<matrix, Eigen::Unaligned, stride> target(c, rows, cols, stride(ldc));
  if (transpose_a && transpose_b)
    target.noalias() += left.transpose() * right.transpose();
  else if (transpose_a)
    target.noalias() += left.transpose() * right;
  else if (transpose_b)
    target.noalias() += left * right.transpose();
  else
    target.noalias() += left * right;
}
#endif

}  // namespace blackmamba::cpu::detail
