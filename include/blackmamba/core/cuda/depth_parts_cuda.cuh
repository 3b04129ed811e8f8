#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/product_cuda.cuh>
#include <blackmamba/core/numeric.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>

/// Sums over a great depth that are cut into parts, to keep all multiprocessors busy: the parts' sums go to scratch
/// memory, and are added in order.
namespace blackmamba::cuda::detail {

/// Parts that a sum over `depth` elements is cut into: about 512 blocks in all, at least `least` deep each, and no more
/// than the workspace holds.
template <class A>
std::int64_t parts_of_depth(std::int64_t depth, std::int64_t least, std::int64_t blocks, std::int64_t results,
                            std::size_t workspace_bytes) {
  return std::min({depth / least, std::max<std::int64_t>(1, 512 / blocks),
                   static_cast<std::int64_t>(workspace_bytes / sizeof(A)) / results});
}

/// C = bias + the parts, in their order, or C += it.
template <class TC, class A>
__global__ void __launch_bounds__(256) add_parts(A const* partial, std::int64_t parts, std::int64_t m, std::int64_t n,
                                                 A const* bias, TC* c, std::int64_t ldc, bool accumulate) {
  std::int64_t const index = std::int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (index >= m * n) return;
  std::int64_t const row = index / n, column = index - row * n;
  A sum = bias ? bias[column] : A(0);
  TC* const to = c + row * ldc + column;
  if (accumulate) sum += convert<A>(*to);
#pragma unroll 4
  for (std::int64_t part = 0; part < parts; ++part) sum += partial[part * m * n + index];
  *to = convert<TC>(sum);
}

/// Enqueues the sum of a product's parts (parts, m, n).
template <class TA, class TB, class TC>
void add_parts_of(char const* op, device::cuda const& policy, product<TA, TB, TC> const& x, accum_t<TC> const* partial,
                  std::int64_t parts) {
  launch(op, policy, {blocks_for(x.m * x.n, 256), 256}, add_parts<TC, accum_t<TC>>, partial, parts, x.m, x.n, x.bias,
         x.c, x.ldc, x.mode == update::accumulate);
}

}  // namespace blackmamba::cuda::detail
