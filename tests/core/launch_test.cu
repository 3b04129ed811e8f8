#include "support/policy_cuda.hpp"

#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/error.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <cstddef>
#include <string>
#include <thread>
#include <vector>

using namespace blackmamba;

namespace launch_test {

constexpr std::size_t own_bytes = 4096;

/// Counts the words of its dynamic shared memory that it could write and read back.
__global__ void count_words(unsigned words, unsigned* count) {
  extern __shared__ unsigned dynamic[];
  __shared__ unsigned own[own_bytes / sizeof(unsigned)];
  own[threadIdx.x] = 0;
  for (unsigned i = threadIdx.x; i < words; i += blockDim.x) dynamic[i] = i ^ 0x5a5au;
  __syncthreads();
  for (unsigned i = (threadIdx.x + 1) % blockDim.x; i < words; i += blockDim.x)
    own[threadIdx.x] += dynamic[i] == (i ^ 0x5a5au) ? 1u : 0u;
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned all = 0;
    for (unsigned t = 0; t < blockDim.x; ++t) all += own[t];
    *count = all;
  }
}

void check_words(device::cuda const& policy, unsigned* count, std::size_t bytes) {
  auto const words = static_cast<unsigned>(bytes / sizeof(unsigned));
  cuda::launch("count", policy, {1, 128, bytes}, count_words, words, count);
  unsigned counted = 0;
  cuda::check("count", cudaMemcpyAsync(&counted, count, sizeof counted, cudaMemcpyDeviceToHost, policy.stream));
  cuda::check("count", cudaStreamSynchronize(policy.stream));
  if (counted != words) throw cuda_error("counted " + std::to_string(counted) + " of " + std::to_string(words));
}

struct words_on_device {
  words_on_device() { cuda::check("count", cudaMalloc(&at, sizeof *at)); }
  words_on_device(words_on_device const&) = delete;
  words_on_device& operator=(words_on_device const&) = delete;
  ~words_on_device() { (void)cudaFree(at); }
  unsigned* at = nullptr;
};

}  // namespace launch_test
using namespace launch_test;

TEST_CASE("launch: shared memory up to the last byte, a kernel's own counted") {
  words_on_device const count;
  auto const most = static_cast<std::size_t>(cuda::properties().shared_bytes_per_block) - own_bytes;
  for (std::size_t bytes : {std::size_t{0}, 48 * 1024 - own_bytes, 48 * 1024 - own_bytes + 4, std::size_t{48 * 1024},
                            std::size_t{48 * 1024 + 4}, most, std::size_t{1024}})
    CHECK_NOTHROW(check_words(make_policy(), count.at, bytes));
  std::string said;
  try {
    check_words(make_policy(), count.at, most + 4);
  } catch (cuda_error const& e) {
    said = e.what();
  }
  CHECK(said.find("count: shared memory of a block: needs " + std::to_string(most + own_bytes + 4) + " bytes, ") == 0);
}

TEST_CASE("launch: threads launch one kernel with different sizes, each on its stream") {
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < 4; ++t)
    threads.emplace_back([&failures, t] {
      try {
        cudaStream_t stream = nullptr;
        cuda::check("stream", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        words_on_device const count;
        for (std::size_t i = 0; i < 500; ++i)
          check_words({.stream = stream}, count.at, (40 + (13 * i + 17 * t) % 50) * 1024);
        cuda::check("stream", cudaStreamDestroy(stream));
      } catch (...) {
        ++failures;
      }
    });
  for (auto& thread : threads) thread.join();
  CHECK(failures == 0);
}
