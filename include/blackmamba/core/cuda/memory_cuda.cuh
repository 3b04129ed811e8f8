#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/core/memory.hpp>

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <unordered_map>

namespace blackmamba {

namespace cuda {

/// Bytes that this program's tensors and arenas hold on its devices, now and at most so far.
struct memory_usage {
  std::size_t current = 0;
  std::size_t peak = 0;
  std::size_t allocations = 0;  ///< how many were ever made
};

namespace detail {

class memory_ledger {
 public:
  void add(void* p, std::size_t bytes) {
    std::lock_guard const lock(mutex_);
    blocks_.emplace(p, bytes);
    usage_.current += bytes;
    usage_.peak = std::max(usage_.peak, usage_.current);
    ++usage_.allocations;
  }
  void remove(void* p) noexcept {
    std::lock_guard const lock(mutex_);
    auto const found = blocks_.find(p);
    if (found == blocks_.end()) return;
    usage_.current -= found->second;
    blocks_.erase(found);
  }
  memory_usage usage() {
    std::lock_guard const lock(mutex_);
    return usage_;
  }
  static memory_ledger& instance() {
    // Never destroyed: tensors of static storage may outlive it.
    static auto* const ledger = new memory_ledger;
    return *ledger;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<void*, std::size_t> blocks_;
  memory_usage usage_;
};

}  // namespace detail

inline memory_usage device_memory() { return detail::memory_ledger::instance().usage(); }

}  // namespace cuda

/// Device memory by cudaMalloc, on the current device.
template <>
struct memory_resource<space::device> {
  static constexpr std::size_t alignment = 256;

  static void* allocate(std::size_t bytes) {
    cuda::require_supported_device();
    void* p = nullptr;
    cudaError_t const status = cudaMalloc(&p, bytes);
    if (status == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();
      std::size_t free = 0, total = 0;
      cuda::check("memory", cudaMemGetInfo(&free, &total));
      throw workspace_error("memory: out of device memory: asked for " + std::to_string(bytes) + " bytes, " +
                            std::to_string(free) + " of " + std::to_string(total) + " bytes are free");
    }
    cuda::check("memory", status);
    try {
      cuda::detail::memory_ledger::instance().add(p, bytes);
    } catch (...) {
      (void)cudaFree(p);
      throw;
    }
    return p;
  }
  /// Waits for the work that may use the memory.
  static void deallocate(void* p) noexcept {
    cuda::detail::memory_ledger::instance().remove(p);
    (void)cudaFree(p);
  }
  static void fill(void* p, int byte, std::size_t bytes) {
    cuda::check("memory", cudaMemset(p, byte, bytes));
    cuda::check("memory", cudaDeviceSynchronize());
  }
  static void read(void* to, void const* from, std::size_t bytes) {
    cuda::check("memory", cudaDeviceSynchronize());
    cuda::check("memory", cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
  }
};

namespace cuda::detail {

template <class From, class To>
__global__ void convert_elements(From const* from, To* to, std::int64_t n) {
  std::int64_t const stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride)
    to[i] = convert<To>(from[i]);
}
template <int N, class From, class To>
__global__ void convert_packs(From const* from, To* to, std::int64_t n) {
  std::int64_t const stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n / N; i += stride)
    store_pack<N>(to + i * N, load_pack<N>(from + i * N));
  std::int64_t const tail = n / N * N + std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (tail < n) to[tail] = convert<To>(from[tail]);
}

}  // namespace cuda::detail

/// Within the device, nothing waits. Between host and device, upload returns when the host memory may be reused and
/// download when the data is there; both are for the edges of a program, never for the inside of a step.
template <>
struct backend<memory, device::cuda> {
  template <class V>
  static void zero(device::cuda const& policy, V const& x) {
    cuda::check("memory::zero", cudaMemsetAsync(x.data(), 0, bytes_of(x), policy.stream));
  }
  template <class From, class To>
  static void copy(device::cuda const& policy, From const& from, To const& to) {
    using from_type = typename From::value_type;
    using to_type = typename To::value_type;
    if constexpr (std::is_same_v<from_type, to_type>) {
      if (from.data() != to.data())
        cuda::check("memory::copy", cudaMemcpyAsync(to.data(), from.data(), bytes_of(to), cudaMemcpyDeviceToDevice,
                                                    policy.stream));
    } else if constexpr (storage<from_type> && storage<to_type>) {
      constexpr int n = 16 / (sizeof(from_type) > sizeof(to_type) ? sizeof(from_type) : sizeof(to_type));
      if (cuda::pack_aligned<n>(from.data()) && cuda::pack_aligned<n>(to.data()))
        cuda::launch("memory::copy", policy, {cuda::strided_blocks_for(to.size(), 256 * n, 8, 4), 256},
                     cuda::detail::convert_packs<n, from_type, to_type>, from.data(), to.data(), to.size());
      else
        convert_each<from_type, to_type>(policy, from, to);
    } else {
      convert_each<from_type, to_type>(policy, from, to);
    }
  }
  template <class From, class To>
  static void upload(device::cuda const& policy, From const& from, To const& to) {
    cuda::check("memory::upload",
                cudaMemcpyAsync(to.data(), from.data(), bytes_of(to), cudaMemcpyHostToDevice, policy.stream));
    cuda::check("memory::upload", cudaStreamSynchronize(policy.stream));
  }
  template <class From, class To>
  static void download(device::cuda const& policy, From const& from, To const& to) {
    cuda::check("memory::download",
                cudaMemcpyAsync(to.data(), from.data(), bytes_of(to), cudaMemcpyDeviceToHost, policy.stream));
    cuda::check("memory::download", cudaStreamSynchronize(policy.stream));
  }

 private:
  template <class V>
  static std::size_t bytes_of(V const& x) {
    return static_cast<std::size_t>(x.size()) * sizeof(typename V::value_type);
  }
  template <class F, class T, class From, class To>
  static void convert_each(device::cuda const& policy, From const& from, To const& to) {
    cuda::launch("memory::copy", policy, {cuda::strided_blocks_for(to.size(), 256, 8, 4), 256},
                 cuda::detail::convert_elements<F, T>, from.data(), to.data(), to.size());
  }
};

}  // namespace blackmamba
