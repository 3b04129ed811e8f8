#pragma once
#include <blackmamba/core/cuda/elementwise_cuda.cuh>
#include <blackmamba/core/cuda/exponential_cuda.cuh>
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/reduce_cuda.cuh>
#include <blackmamba/core/cuda/stored_pack_cuda.cuh>
#include <blackmamba/ops/cross_entropy/cross_entropy.hpp>

#include <limits>

namespace blackmamba {

namespace detail {

/// e^x for x <= 0. In float: x log2(e) carries half a unit of its own last place, and 2^x two of its result, so that
/// the error is at most |x| + 3 roundings; below 2^-126 the result is 0.
__device__ __forceinline__ float exp_of_difference(float x) { return cuda::power_of_two(x * 1.44269504088896340736f); }
__device__ __forceinline__ double exp_of_difference(double x) { return exp(x); }
/// The larger number; a NaN is passed over.
__device__ __forceinline__ float larger_number(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger_number(double a, double b) { return fmax(a, b); }

template <class A>
inline constexpr A smallest_number = -std::numeric_limits<A>::max();
inline constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

template <class T>
struct cross_entropy_arguments {
  using A = accum_t<T>;
  view<space::device, T const, dyn, dyn> logits;
  view<space::device, std::int32_t const, dyn> target;
  view<space::device, A, dyn> row_loss, lse;  // may be absent
  double* partial;                            // (blocks)
};

/// Reads the logits once: each thread keeps the largest of its logits so far, and the sum of the exponentials of their
/// differences from it. `lanes` threads share a row: a power of two up to 32, or the whole block.
template <int N, class T>
__global__ void __launch_bounds__(256) cross_entropy_rows(cross_entropy_arguments<T> a, int lanes) {
  using A = accum_t<T>;
  constexpr int unroll = 4;
  __shared__ double memory[8];
  int const lane = static_cast<int>(threadIdx.x) % lanes;
  std::int64_t const r = std::int64_t{blockIdx.x} * (256 / lanes) + static_cast<int>(threadIdx.x) / lanes;
  std::int32_t const target = r < a.logits.extent(0) ? a.target(r) : -1;
  std::int64_t const classes = a.logits.extent(1), packs = target >= 0 ? classes / N : 0;
  T const* const row = a.logits.row(target >= 0 ? r : 0);

  // Beginning from the smallest finite number, a difference of two infinities comes only where one is a logit.
  A largest = smallest_number<A>, sum = 0;
  for (std::int64_t base = lane; base < packs; base += lanes * unroll) {
    cuda::stored_pack<N, T> stored[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u)
      if (base + u * lanes < packs) stored[u].load(row + (base + u * lanes) * N);
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      if (base + u * lanes >= packs) continue;
      auto const x = stored[u].widened();
      A top = x[0];
#pragma unroll
      for (int i = 1; i < N; ++i) top = larger_number(top, x[i]);
      if (top > largest) {
        sum *= exp_of_difference(largest - top);
        largest = top;
      }
#pragma unroll
      for (int i = 0; i < N; ++i) sum += exp_of_difference(x[i] - largest);
    }
  }

  auto const over_row = [&](auto x, auto combine) {
    if (lanes == 256) return cuda::block_reduce<256>(x, reinterpret_cast<decltype(x)*>(memory), combine);
    for (int distance = lanes / 2; distance > 0; distance /= 2)
      x = combine(x, __shfl_xor_sync(0xffffffffu, x, distance));
    return x;
  };
  A const shift = over_row(largest, [](A p, A q) { return larger_number(p, q); });
  double const total =
      over_row(static_cast<double>(sum * exp_of_difference(largest - shift)), [](double p, double q) { return p + q; });
  double loss = 0;
  if (lane == 0 && r < a.logits.extent(0)) {
    double lse = 0;
    if (target >= 0) {
      // Nothing but -inf has no sum, and a target beyond the classes no logit.
      bool const known = total != 0 && target < classes;
      double const log_sum = known ? log(total) : not_a_number;
      lse = static_cast<double>(shift) + log_sum;
      // Not lse - logit: the difference of the two logits is exact where the sum of a large and a small is not.
      loss = known ? (static_cast<double>(shift) - static_cast<double>(widen(row[target]))) + log_sum : log_sum;
    }
    if (a.row_loss.present()) a.row_loss(r) = static_cast<A>(loss);
    if (a.lse.present()) a.lse(r) = static_cast<A>(lse);
  }
  double const of_block = cuda::block_sum<256>(loss, memory);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = of_block;
}

template <class A>
__global__ void __launch_bounds__(1024) cross_entropy_total(double const* partial, std::int64_t count, A* loss) {
  __shared__ double memory[32];
  double sum = 0;
#pragma unroll 8
  for (std::int64_t i = threadIdx.x; i < count; i += 1024) sum += partial[i];
  sum = cuda::block_sum<1024>(sum, memory);
  if (threadIdx.x == 0) *loss = static_cast<A>(sum);
}

template <class T>
struct cross_entropy_gradient_elements {
  using A = accum_t<T>;
  view<space::device, T const, dyn, dyn> logits;
  view<space::device, std::int32_t const, dyn> target;
  view<space::device, A const, dyn> lse;
  view<space::device, T, dyn, dyn> d_logits;
  A scale;

  template <int N>
  struct operands {
    cuda::stored_pack<N, T> logits;
    A lse;
    std::int32_t target;
  };
  template <int N>
  __device__ operands<N> load(std::int64_t r, std::int64_t c, std::int64_t left) const {
    operands<N> x;
    x.logits.load(logits.row(r) + c, left);
    x.target = target(r);
    x.lse = lse(r);
    return x;
  }
  template <int N>
  __device__ void finish(operands<N> const& x, std::int64_t r, std::int64_t c, std::int64_t left) const {
    auto d = x.logits.widened();
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] = x.target < 0 ? A(0) : exp_of_difference(d[i] - x.lse);
    std::int64_t const at = x.target - c;
    if (at >= 0 && at < N) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (i == at) d[i] -= 1;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] *= scale;
    cuda::store_element_pack<N>(d_logits, r, c, left, d);
  }
};

}  // namespace detail

/// Bytes of a logit: forward one of T, backward two. Forward computes one exponential for each logit (for T of 16 bits
/// the unit for these is more than half as busy as memory). Kernels for each T: (forward, backward) x (packs, single
/// elements), and a sum over the blocks' losses.
template <>
struct backend<cross_entropy, device::cuda> {
  template <class T>
  static void forward(device::cuda const& policy, cross_entropy::inputs<device::cuda, T> const& in,
                      cross_entropy::results<device::cuda, T> const& out, view<space::device, double, dyn> partial) {
    detail::cross_entropy_arguments<T> const a{in.logits, in.target, out.row_loss, out.lse, partial.data()};
    constexpr int n = cuda::pack_width<T>;
    unsigned const blocks = cuda::rows_in_packs<n>(in.logits) ? launch_rows<n>(policy, a) : launch_rows<1>(policy, a);
    cuda::launch("cross_entropy", policy, {1, 1024}, detail::cross_entropy_total<accum_t<T>>, partial.data(),
                 std::int64_t{blocks}, out.loss.data());
  }

  template <class T>
  static void backward(device::cuda const& policy, cross_entropy::gradient_inputs<device::cuda, T> const& in,
                       view<space::device, T, dyn, dyn> d_logits) {
    constexpr int n = cuda::pack_width<T>;
    std::int64_t const rows = d_logits.extent(0), classes = d_logits.extent(1);
    detail::cross_entropy_gradient_elements<T> const op{in.logits, in.target, in.lse, d_logits, in.scale};
    if (cuda::rows_in_packs<n>(in.logits) && cuda::rows_in_packs<n>(d_logits))
      cuda::launch_elements<n>("cross_entropy.backward", policy, rows, classes, op);
    else
      cuda::launch_elements<1>("cross_entropy.backward", policy, rows, classes, op);
  }

 private:
  /// @returns the number of blocks
  template <int N, class T>
  static unsigned launch_rows(device::cuda const& policy, detail::cross_entropy_arguments<T> const& a) {
    std::int64_t const packs = a.logits.extent(1) / N;
    int lanes = 1;
    while (lanes < 32 && lanes * 8 < packs) lanes *= 2;  // each row ends in a logarithm, which one lane takes
    if (packs > 32 * 16) lanes = 256;
    unsigned const blocks = cuda::blocks_for(a.logits.extent(0), 256 / lanes);
    cuda::launch("cross_entropy", policy, {blocks, 256}, detail::cross_entropy_rows<N, T>, a, lanes);
    return blocks;
  }
};

}  // namespace blackmamba
