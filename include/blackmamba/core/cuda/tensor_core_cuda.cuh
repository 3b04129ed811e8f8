#pragma once
#include <blackmamba/core/numeric.hpp>

#include <cstdint>
#include <type_traits>

/// The instructions around the tensor cores that sm_80 and later have: asynchronous copies into shared memory, matrix
/// fragments, and their product.
namespace blackmamba::cuda {

template <class T>
inline constexpr bool tensor_core_operand = std::is_same_v<T, bfloat16> || std::is_same_v<T, half>;

__device__ __forceinline__ std::uint32_t shared_address(void const* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

/// Starts the copy of 16 bytes; of the source only the first `valid` are read, the rest become zeros.
__device__ __forceinline__ void copy_async(std::uint32_t to, void const* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
}
/// As copy_async, of 8 or 4 bytes.
template <int Bytes>
__device__ __forceinline__ void copy_async_small(std::uint32_t to, void const* from, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(Bytes), "r"(valid) : "memory");
}
/// Closes a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `Pending` of this thread's latest groups are under way.
template <int Pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

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
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Two values as 16-bit elements in one word, the first in the lower half.
template <class T>
__device__ __forceinline__ std::uint32_t packed_pair(float low, float high) {
  return static_cast<std::uint32_t>(T(low).bits) | static_cast<std::uint32_t>(T(high).bits) << 16;
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
