#pragma once
#include <cstdint>

/// Copies from global into shared memory that go on in the background (cp.async, sm_80 and later). A thread's copies
/// form groups, in order.
namespace blackmamba::cuda {

__device__ __forceinline__ std::uint32_t shared_address(void const* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

/// Starts the copy of Bytes = 4, 8 or 16 bytes, both sides aligned to as many.
template <int Bytes = 16>
__device__ __forceinline__ void copy_async(std::uint32_t to, void const* from) {
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(Bytes) : "memory");
}
/// The same; of the source only the first `valid` bytes are read, the rest become zeros.
template <int Bytes = 16>
__device__ __forceinline__ void copy_async(std::uint32_t to, void const* from, int valid) {
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(Bytes), "r"(valid)
                 : "memory");
}
/// Closes a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `Pending` of this thread's latest groups are under way.
template <int Pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace blackmamba::cuda
