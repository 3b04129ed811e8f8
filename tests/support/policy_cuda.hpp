#pragma once
#include "support/device_gate.hpp"

#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/policy.hpp>

#include <cuda_runtime.h>

#include <cstdlib>

/// The policy that a test body is compiled against; the build includes one such file before the body.
using test_policy = blackmamba::device::cuda;
inline test_policy make_policy() { return {}; }

inline bool const gated = test::require_device("CUDA device", [] {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
});

/// The environment's BLACKMAMBA_TEST_PORTABLE_PRODUCTS, set to anything, keeps the whole program from products whose
/// stores initcheck does not see.
inline bool const products_portable = [] {
  return blackmamba::cuda::portable_products = std::getenv("BLACKMAMBA_TEST_PORTABLE_PRODUCTS") != nullptr;
}();

/// The storage types that whole networks are trained in: a network costs nvcc a minute for each.
#define TRAINED_TYPES float, blackmamba::bfloat16
