#pragma once
#include <blackmamba/core/cuda/copy_async_cuda.cuh>
#include <blackmamba/core/numeric.hpp>

#include <cstdint>
#include <type_traits>

/// The instructions around the tensor cores that sm_80 and later have: matrix fragments and their product.
namespace blackmamba::cuda {

template <class T>
inline constexpr bool tensor_core_operand = std::is_same_v<T, bfloat16> || std::is_same_v<T, half>;

/// Four 8 x 8 matrices of 16-bit elements; lane l names the address of row l % 8 of matrix l / 8. Each lane gets of
/// each matrix the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; Transposed: of column l / 4.
template <bool Transposed>
__device__ __forceinline__ void load_matrices(std::uint32_t (&to)[4], std::uint32_t address) {
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

/// d (16, 8) += a (16, 16) b (16, 8). Of d, lane l has elements 2 (l % 4) and 2 (l % 4) + 1 of rows l / 4 and
/// l / 4 + 8; of a, those of rows l / 4, l / 4 + 8, then the same 8 columns on; of b, rows 2 (l % 4), 2 (l % 4) + 1,
/// then 8 rows on, of column l / 4.
template <class T>
__device__ __forceinline__ void multiply_matrices(float (&d)[4], std::uint32_t const (&a)[4], std::uint32_t b0,
                                                  std::uint32_t b1) {
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Two values rounded to T, of 16 bits, in one word: the first in the lower half.
template <class T>
__device__ __forceinline__ std::uint32_t packed_pair(float low, float high) {
  std::uint32_t x;
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

/// Among four neighbouring lanes, word j of lane i goes to lane j, word i.
__device__ __forceinline__ void transpose_in_quad(std::uint32_t (&w)[4]) {
  int const lane = static_cast<int>(threadIdx.x) % 4;
  auto const exchange = [&](std::uint32_t& low, std::uint32_t& high, int distance) {
    bool const upper = (lane & distance) != 0;
    std::uint32_t const got = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
    if (upper)
      low = got;
    else
      high = got;
  };
  exchange(w[0], w[1], 1);
  exchange(w[2], w[3], 1);
  exchange(w[0], w[2], 2);
  exchange(w[1], w[3], 2);
}

}  // namespace blackmamba::cuda
