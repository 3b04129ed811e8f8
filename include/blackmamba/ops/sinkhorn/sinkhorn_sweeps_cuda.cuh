#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/reduce_cuda.cuh>
#include <blackmamba/ops/sinkhorn/sinkhorn.hpp>
#include <blackmamba/ops/sinkhorn/sinkhorn_math.hpp>

#include <cooperative_groups.h>

#include <cstdint>

namespace blackmamba::cuda::detail {

template <class A>
struct sinkhorn_arguments {
  std::int64_t rows;
  int experts;
  A const* logits;
  std::int64_t logits_stride;
  A* offset;
  sinkhorn_report* result;
  A* plan;  // null: none
  std::int64_t plan_stride;
  A beta;
  sinkhorn_mode mode;
  double tolerance;
  std::int32_t limit;
  bool fixed;  // make `limit` passes, whatever the error
  bool newton;
  std::int64_t sample_stride;  // of the rows that Newton's step looks at
  std::int64_t kernel_rows;    // padded
  A* kernel;                   // (padded rows * E)
  double* sums;
  double* pairs;
  double* state;
};

__device__ __forceinline__ void sinkhorn_barrier() {
  if (gridDim.x > 1)
    cooperative_groups::this_grid().sync();
  else
    __syncthreads();
}

/// log c_j of the offset g, exactly at any spread of the logits. Rows [first, last) are the block's; `partial` holds 2E
/// numbers for each block, and every block has passed a barrier since they were last read. Rare, and slow: each row's
/// sum is found anew for every expert. @param merge  two numbers for each warp, in shared memory
template <class A>
__device__ __noinline__ void sinkhorn_log_sweep(sinkhorn_arguments<A> const& p, std::int64_t first, std::int64_t last,
                                                double voters, double const* g, double* partial, double* merge,
                                                double* log_marginal) {
  int const e = p.experts, warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  auto const across = [lane](math::log_sum s) {
    for (int distance = 16; distance > 0; distance /= 2) {
      math::log_sum const other{__shfl_xor_sync(0xffffffffu, s.largest, distance),
                                __shfl_xor_sync(0xffffffffu, s.sum, distance)};
      // Both lanes of a pair merge in one order, so that all lanes end with the same bits.
      math::log_sum low = lane & distance ? other : s;
      low.merge(lane & distance ? s : other);
      s = low;
    }
    return s;
  };
  sinkhorn_barrier();
  for (int j = 0; j < e; ++j) {
    math::log_sum column;
    for (std::int64_t r = first + threadIdx.x; r < last; r += blockDim.x) {
      A const* const x = p.logits + r * p.logits_stride;
      A test = 0;
      math::log_sum row;
      for (int i = 0; i < e; ++i) {
        test += x[i] * A(0);
        row.add(static_cast<double>(p.beta) * static_cast<double>(x[i]) + g[i]);
      }
      if (test == A(0)) column.add(static_cast<double>(p.beta) * static_cast<double>(x[j]) + g[j] - row.value());
    }
    column = across(column);
    if (lane == 0) {
      merge[2 * warp] = column.largest;
      merge[2 * warp + 1] = column.sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      math::log_sum all;
      for (unsigned w = 0; w < blockDim.x / 32; ++w) all.merge({merge[2 * w], merge[2 * w + 1]});
      double* const mine = partial + (std::int64_t{blockIdx.x} * e + j) * 2;
      mine[0] = all.largest;
      mine[1] = all.sum;
    }
    __syncthreads();
  }
  sinkhorn_barrier();
  for (int j = static_cast<int>(threadIdx.x); j < e; j += static_cast<int>(blockDim.x)) {
    math::log_sum all;
    for (unsigned b = 0; b < gridDim.x; ++b) {
      double const* const theirs = partial + (std::int64_t{b} * e + j) * 2;
      all.merge({theirs[0], theirs[1]});
    }
    log_marginal[j] = all.value() - log(voters);
  }
  sinkhorn_barrier();
}

/// Largest f(j) over j in [0, n), 0 at least; every thread gets it.
template <class F>
__device__ __forceinline__ double sinkhorn_largest(int n, F&& f) {
  double largest = 0;
  for (int j = static_cast<int>(threadIdx.x % 32); j < n; j += 32) largest = math::max(largest, f(j));
  return warp_max(largest);
}
/// Smallest and largest f(j).
struct sinkhorn_range {
  double low, high;
};
template <class F>
__device__ __forceinline__ sinkhorn_range sinkhorn_range_of(int n, F&& f) {
  double low = INFINITY, high = -INFINITY;
  for (int j = static_cast<int>(threadIdx.x % 32); j < n; j += 32) {
    low = math::min(low, f(j));
    high = math::max(high, f(j));
  }
  return {warp_reduce(low, [](double a, double b) { return a < b ? a : b; }), warp_max(high)};
}

}  // namespace blackmamba::cuda::detail
