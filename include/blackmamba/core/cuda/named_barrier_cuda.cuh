#pragma once

namespace blackmamba::cuda {

/// A barrier among `Threads` threads of the block, whole warps, by number; 0 is that of __syncthreads(). Unlike with
/// that, warps may come to it at different places of the program, and the lanes of a warp one after the other.
template <int Number, int Threads>
__device__ __forceinline__ void named_barrier() {
  static_assert(Number > 0 && Number < 16 && Threads % 32 == 0);
  asm volatile("barrier.sync %0, %1;" ::"n"(Number), "n"(Threads) : "memory");
}

}  // namespace blackmamba::cuda
