#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>

namespace blackmamba {

/// y[r,:] = a[r,:] + b[r,:], in accum_t<T>, rounded once. y may alias a or b. Its gradient is the identity for both.
/// Asynchronous on cuda.
struct add {
  template <device_policy P, storage T>
  static void forward(P const& policy, in<P, T, dyn, dyn> a, in<P, T, dyn, dyn> b, out<P, T, dyn, dyn> y) {
    check_shape("add", "a", a, {y.extent(0), y.extent(1)});
    check_shape("add", "b", b, {y.extent(0), y.extent(1)});
    if (y.size() > 0) backend_of<add, P>::forward(policy, a, b, y);
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/add/add_cpu.hpp>
#if BLACKMAMBA_CUDA
#include <blackmamba/ops/add/add_cuda.cuh>
#endif
