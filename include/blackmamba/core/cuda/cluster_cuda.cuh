#pragma once
#include <blackmamba/core/cuda/copy_async_cuda.cuh>

#include <cstdint>

/// Blocks of a cluster (sm_90 and later), which may read each other's shared memory. Before sm_90, and in a launch
/// without clusters, each block is a cluster of its own.
namespace blackmamba::cuda {

__device__ __forceinline__ unsigned cluster_size() {
#if __CUDA_ARCH__ >= 900
  unsigned n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return n;
#else
  return 1;
#endif
}
/// The block's number in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
#else
  return 0;
#endif
}

/// A barrier for all threads of the cluster, in two parts: what is written before a thread arrives is seen by those
/// that have waited.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

/// What block `rank` of the cluster has where this block has *p, in shared memory.
__device__ __forceinline__ std::uint32_t load_of_cluster(std::uint32_t const* p, [[maybe_unused]] unsigned rank) {
#if __CUDA_ARCH__ >= 900
  std::uint32_t at, value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(p)), "r"(rank));
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
  return value;
#else
  return *p;
#endif
}

}  // namespace blackmamba::cuda
