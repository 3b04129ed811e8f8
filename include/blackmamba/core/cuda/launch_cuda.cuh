#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/policy.hpp>

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace blackmamba::cuda {

/// Debugging: with true, every operator waits for its kernels, so that a fault is reported by the operator that made it
/// and not by a later one. Set it before the first call; a graph capture fails with it.
inline bool synchronise_each_launch = false;

/// Debugging: with true, products are left neither to the library nor to the kernels that write through the copy engine
/// of newer devices, whose stores initcheck does not see: they take the path that every device has (sm_80 and later).
inline bool portable_products = false;

namespace detail {

template <int>  // a template may be defined in every translation unit
__global__ void supported_device_probe() {}

/// "NVIDIA H200 (compute capability 9.0)"
inline std::string device_text() {
  int device = 0;
  cudaDeviceProp properties{};
  if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&properties, device) != cudaSuccess)
    return "the current device";
  return std::string(properties.name) + " (compute capability " + std::to_string(properties.major) + "." +
         std::to_string(properties.minor) + ")";
}

[[noreturn]] inline void throw_cuda_error(char const* op, cudaError_t status) {
  (void)cudaGetLastError();  // the error is reported here, once
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion)
    throw cuda_error(std::string(op) + ": this program holds no code for " + device_text() +
                     "; compile it for that architecture (CMAKE_CUDA_ARCHITECTURES, nvcc -arch)");
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver)
    throw cuda_error(std::string(op) + ": no usable CUDA device: " + cudaGetErrorString(status));
  throw cuda_error(std::string(op) + ": CUDA: " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

}  // namespace detail

/// Throws cuda_error that names the operator unless the call succeeded.
inline void check(char const* op, cudaError_t status) {
  if (status != cudaSuccess) detail::throw_cuda_error(op, status);
}

/// What launchers ask of the current device.
struct device_properties {
  int multiprocessors = 0;
  int shared_bytes_per_block = 0;  ///< the most that a block may ask for
  int l2_bytes = 0;
  int major = 0;  ///< compute capability
  int minor = 0;
};
/// Properties of the current device, read once.
inline device_properties const& properties() {
  static auto const all = [] {
    std::array<device_properties, 64> table{};
    int devices = 0;
    check("device", cudaGetDeviceCount(&devices));
    for (int d = 0; d < devices && d < static_cast<int>(table.size()); ++d) {
      auto const read = [d](cudaDeviceAttr attribute) {
        int value = 0;
        check("device", cudaDeviceGetAttribute(&value, attribute, d));
        return value;
      };
      table[static_cast<std::size_t>(d)] = {.multiprocessors = read(cudaDevAttrMultiProcessorCount),
                                            .shared_bytes_per_block = read(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                                            .l2_bytes = read(cudaDevAttrL2CacheSize),
                                            .major = read(cudaDevAttrComputeCapabilityMajor),
                                            .minor = read(cudaDevAttrComputeCapabilityMinor)};
    }
    return table;
  }();
  int device = 0;
  check("device", cudaGetDevice(&device));
  return all.at(static_cast<std::size_t>(device));
}

/// Throws, in one sentence, where the current device is none that this program holds code for. Asks once for each.
inline void require_supported_device() {
  static std::array<std::atomic<bool>, 64> supported{};
  int device = 0;
  check("device", cudaGetDevice(&device));
  auto const place = static_cast<std::size_t>(device);
  if (place < supported.size() && supported[place].load(std::memory_order_relaxed)) return;
  cudaFuncAttributes attributes{};
  check("device", cudaFuncGetAttributes(&attributes, detail::supported_device_probe<0>));
  if (place < supported.size()) supported[place].store(true, std::memory_order_relaxed);
}

/// The shape of a launch.
struct grid {
  dim3 blocks = 1;
  dim3 threads = 1;
  std::size_t shared_bytes = 0;  ///< dynamic shared memory of a block
  unsigned cluster = 1;          ///< blocks of a cluster, along x
  bool cooperative = false;      ///< all blocks are resident at once and may wait for each other
  bool early = false;            ///< may begin before the launch ahead has ended, for which its threads wait themselves
};

/// In a kernel: the launch behind this one may begin, where it is an early one. In an early one: waits until the launch
/// ahead has ended and its results are there.
__device__ __forceinline__ void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_launch_ahead() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

namespace detail {
/// Lets a kernel have this much dynamic shared memory. Without being asked, a device gives a block 48 KB, the kernel's
/// own included; what is asked for is state of the function, so it is asked for once, and all that there is: threads
/// may launch one kernel with different sizes. @throws cuda_error with both sizes where the device has less
inline void allow_shared_bytes(char const* op, void const* kernel, std::size_t bytes) {
  struct seen {
    std::size_t own = 0;
    bool asked = false;
  };
  static std::mutex mutex;
  static std::map<std::pair<void const*, int>, seen> kernels;
  if (bytes == 0) return;
  int device = 0;
  check(op, cudaGetDevice(&device));
  std::lock_guard const lock(mutex);
  auto const [place, is_new] = kernels.try_emplace({kernel, device});
  seen& known = place->second;
  if (is_new) {
    cudaFuncAttributes attributes{};
    cudaError_t const status = cudaFuncGetAttributes(&attributes, kernel);
    if (status != cudaSuccess) kernels.erase(place);
    check(op, status);
    known.own = attributes.sharedSizeBytes;
  }
  if (known.own + bytes <= 48 * 1024) return;
  auto const most = static_cast<std::size_t>(properties().shared_bytes_per_block);
  if (known.own + bytes > most)
    throw cuda_error(std::string(op) + ": shared memory of a block: needs " + std::to_string(known.own + bytes) +
                     " bytes, " + device_text() + " has " + std::to_string(most));
  if (known.asked) return;
  check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(most - known.own)));
  known.asked = true;
}
}  // namespace detail

/// Enqueues a kernel on the policy's stream. Zero blocks launch nothing. @throws cuda_error naming the operator
template <class... Parameters, class... Arguments>
void launch(char const* op, device::cuda const& policy, grid const& shape, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  if (shape.blocks.x == 0 || shape.blocks.y == 0 || shape.blocks.z == 0) return;
  detail::allow_shared_bytes(op, reinterpret_cast<void const*>(kernel), shape.shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = policy.stream;
  cudaLaunchAttribute attributes[3]{};
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = shape.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (shape.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count].val.cooperative = 1;
    ++count;
  }
  if (shape.early && properties().major >= 9) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  config.attrs = attributes;
  config.numAttrs = count;
  check(op, cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
  if (synchronise_each_launch) check(op, cudaStreamSynchronize(policy.stream));
}

/// Blocks that cover n with `each` per block. @throws shape_error where that is more than a grid's x dimension holds
inline unsigned blocks_for(std::int64_t n, std::int64_t each) {
  std::int64_t const blocks = (n + each - 1) / each;
  if (blocks > 0x7fffffff)
    throw shape_error("launch: " + std::to_string(n) + " elements: got " + std::to_string(blocks) +
                      " blocks, expected at most 2147483647");
  return static_cast<unsigned>(blocks);
}
/// As blocks_for, but at most `waves` times what the device runs with `resident` blocks on a multiprocessor: for
/// kernels whose blocks walk over their share in grid-sized strides.
inline unsigned strided_blocks_for(std::int64_t n, std::int64_t each, int resident, int waves = 1) {
  std::int64_t const most = std::int64_t{properties().multiprocessors} * resident * waves;
  std::int64_t const blocks = (n + each - 1) / each;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

}  // namespace blackmamba::cuda
