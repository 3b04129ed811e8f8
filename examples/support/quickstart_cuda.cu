#include "support/quickstart_run.hpp"

#include <cuda_runtime.h>

namespace quickstart {

bool cuda_is_here() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
}

int run_on_cuda(arguments const& a) {
  int current = 0;
  cudaDeviceProp device{};
  bm::cuda::check("quickstart", cudaGetDevice(&current));
  bm::cuda::check("quickstart", cudaGetDeviceProperties(&device, current));
  auto const peak = [] { return bm::cuda::device_memory().peak; };
#if defined(QUICKSTART_SMALL_ONLY)
  if (a.size == "large") throw bm::value_error("quickstart: --size large: built for the tests; use examples/run.sh");
#else
  if (a.size == "large") return run<quickstart_large, bm::device::cuda, bm::bfloat16>(a, device.name, peak);
#endif
  return run<quickstart_small, bm::device::cuda, bm::bfloat16>(a, device.name, peak);
}

}  // namespace quickstart
