#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/reduce_cuda.cuh>
#include <blackmamba/core/cuda/stored_pack_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/core/math.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/row_blocks.hpp>
#include <blackmamba/core/view.hpp>

#include <algorithm>
#include <cstdint>

/// What normalisations of rows have in common on CUDA: rms_norm, and with Centred layer_norm.
///
/// Every operand is read once and every result written once: a row lives in the registers of the threads that share it
/// (some lanes of a warp, or several whole warps). Rows too long for that, or not aligned for packs, are read again for
/// each pass over them, element by element.
///
/// Kernels: (forward, backward) x (in registers, passing) for each Centred, T and, backward, S.
namespace blackmamba::cuda {

template <class T, int... E>
using device_view = view<space::device, T, E...>;

/// x, weight and y are present; the others may be absent. mean and bias without Centred: absent.
template <class T>
struct norm_forward_arguments {
  using A = accum_t<T>;
  device_view<T const, dyn, dyn> x;         // (R, D)
  device_view<A const, dyn> weight;         // (D)
  device_view<A const, dyn> bias;           // (D)
  device_view<A const, dyn, dyn> residual;  // (R, D)
  device_view<T, dyn, dyn> y;               // (R, D)
  device_view<A, dyn, dyn> sum;             // (R, D)
  device_view<A, dyn> rstd;                 // (R)
  device_view<A, dyn> mean;                 // (R)
  A eps;
};

namespace detail {

/// Sums each x[i] over the blockDim.x threads that share a row: a power of two up to 32, or whole warps. All of the
/// block call it, and every thread gets the sums. `memory`: M elements for each warp of the block, which no call may
/// have used since the last but one: two halves in turn save a barrier.
template <int M, class A>
__device__ __forceinline__ void sum_over_lanes(A (&x)[M], A* memory) {
  int const lanes = static_cast<int>(blockDim.x);
  for (int distance = (lanes < 32 ? lanes : 32) / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int i = 0; i < M; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], distance);
  if (lanes <= 32) return;
  int const lane = static_cast<int>(threadIdx.x) % 32, warps = lanes / 32;
  A* const of_row = memory + static_cast<int>(threadIdx.y) * warps * M;
  if (lane == 0)
#pragma unroll
    for (int i = 0; i < M; ++i) of_row[static_cast<int>(threadIdx.x) / 32 * M + i] = x[i];
  __syncthreads();
  // Each lane takes one warp's sums; log2 of the warps' number of steps add them.
#pragma unroll
  for (int i = 0; i < M; ++i) x[i] = lane < warps ? of_row[lane * M + i] : A(0);
  for (int distance = 1; distance < warps; distance *= 2)
#pragma unroll
    for (int i = 0; i < M; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], distance);
#pragma unroll
  for (int i = 0; i < M; ++i) x[i] = __shfl_sync(0xffffffffu, x[i], 0);
}

/// Whether the scalar of a row belongs to this thread to write.
template <class A>
__device__ __forceinline__ void store_scalar(device_view<A, dyn> const& to, std::int64_t r, A value) {
  if (threadIdx.x == 0 && to.present()) to(r) = value;
}

/// A row in registers, K packs of N for each of its threads, as memory holds them: each pass widens them again. Without
/// Sum: x alone in and y alone out.
template <bool Centred, bool Sum, int N, int K, class T>
__global__ void __launch_bounds__(1024) norm_forward_in_registers(norm_forward_arguments<T> a, accum_t<T> inverse) {
  using A = accum_t<T>;
  __shared__ A memory[2][32];
  std::int64_t const r = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  bool const live = r < a.y.extent(0);
  // The thread's columns: N from mine + k step on, below width. Unsigned: an address is one instruction.
  unsigned const mine = threadIdx.x * N, step = blockDim.x * N, width = live ? static_cast<unsigned>(a.y.extent(1)) : 0;
  stored_pack<N, T> x[K];
  stored_pack<N, A> residual[K];
  T const* const x_row = a.x.row(live ? r : 0);
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (mine + k * step < width) x[k].load(x_row + (mine + k * step));
  if (Sum && a.residual.present()) {
    A const* const residual_row = a.residual.row(live ? r : 0);
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (mine + k * step < width) residual[k].load(residual_row + (mine + k * step));
  }
  auto const s_of = [&](int k) {
    auto s = x[k].widened();
    if (Sum && a.residual.present()) {
      auto const other = residual[k].widened();
#pragma unroll
      for (int i = 0; i < N; ++i) s[i] += other[i];
    }
    return s;
  };
  A total[1], mean = 0;
  if constexpr (Centred) {
    A sum[2] = {0, 0};  // in two chains, for half the latency
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (mine + k * step < width) {
        auto const s = s_of(k);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i % 2] += s[i];
      }
    total[0] = sum[0] + sum[1];
    sum_over_lanes(total, memory[0]);
    mean = total[0] * inverse;
  }
  A squares[2] = {0, 0};
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (mine + k * step < width) {
      auto const s = s_of(k);
#pragma unroll
      for (int i = 0; i < N; ++i) squares[i % 2] = math::fma(s[i] - mean, s[i] - mean, squares[i % 2]);
    }
  total[0] = squares[0] + squares[1];
  sum_over_lanes(total, memory[1]);
  if (!live) return;
  A const rstd = A(1) / math::sqrt(math::fma(total[0], inverse, a.eps));
  T* const y = a.y.row(r);
  A* const sum = Sum && a.sum.present() ? a.sum.row(r) : nullptr;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    unsigned const c = mine + k * step;
    if (c >= width) continue;
    auto s = s_of(k);
    if (Sum && sum) store_pack<N>(sum + c, s);
    auto const weight = load_pack<N>(a.weight.data() + c);
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = (s[i] - mean) * rstd * weight[i];
    if (Centred && a.bias.present()) {
      auto const bias = load_pack<N>(a.bias.data() + c);
#pragma unroll
      for (int i = 0; i < N; ++i) s[i] += bias[i];
    }
    store_pack<N>(y + c, s);
  }
  store_scalar(a.rstd, r, rstd);
  if constexpr (Centred) store_scalar(a.mean, r, mean);
}

/// Rows of any length and alignment. Each thread reads again what it alone writes, so that results may alias operands.
template <bool Centred, class T>
__global__ void __launch_bounds__(512) norm_forward_passing(norm_forward_arguments<T> a) {
  using A = accum_t<T>;
  __shared__ A memory[2][16];
  std::int64_t const r = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  bool const live = r < a.y.extent(0);
  std::int64_t const width = live ? a.y.extent(1) : 0;
  T const* const x = live ? a.x.row(r) : nullptr;
  A const* const residual = live && a.residual.present() ? a.residual.row(r) : nullptr;
  auto const s = [&](std::int64_t c) { return residual ? widen(x[c]) + residual[c] : widen(x[c]); };
  A total[1] = {0}, mean = 0;
  if constexpr (Centred) {
    for (std::int64_t c = threadIdx.x; c < width; c += blockDim.x) total[0] += s(c);
    sum_over_lanes(total, memory[0]);
    mean = total[0] / static_cast<A>(a.y.extent(1));
    total[0] = 0;
  }
  for (std::int64_t c = threadIdx.x; c < width; c += blockDim.x) {
    A const v = s(c) - mean;
    total[0] = math::fma(v, v, total[0]);
  }
  sum_over_lanes(total, memory[1]);
  if (!live) return;
  A const rstd = A(1) / math::sqrt(total[0] / static_cast<A>(width) + a.eps);
  for (std::int64_t c = threadIdx.x; c < width; c += blockDim.x) {
    A const v = s(c);
    A y = (v - mean) * rstd * a.weight.data()[c];
    if (Centred && a.bias.present()) y += a.bias.data()[c];
    a.y.row(r)[c] = convert<T>(y);
    if (a.sum.present()) a.sum.row(r)[c] = v;
  }
  store_scalar(a.rstd, r, rstd);
  if constexpr (Centred) store_scalar(a.mean, r, mean);
}

/// Threads that share a row of `packs` packs, `each` for one thread.
inline int lanes_for(std::int64_t packs, int each) {
  int const wanted = static_cast<int>((packs + each - 1) / each);
  if (wanted > 32) return (wanted + 31) / 32 * 32;
  int lanes = 1;
  while (lanes < wanted) lanes *= 2;
  return lanes;
}
/// As many threads for a row as take its packs, `each` at most, and as many rows as make up a block of `threads`.
inline dim3 norm_block(std::int64_t packs, int each, int threads) {
  int const lanes = lanes_for(packs, each), groups = std::max(1, threads / lanes);
  return {static_cast<unsigned>(lanes), static_cast<unsigned>(groups)};
}
/// Packs are as wide as 16 bytes of the accumulation type: what a thread reads and writes of any operand is then a
/// whole transaction, and what a warp does has no gaps.
template <class T>
inline constexpr int norm_pack = pack_width<accum_t<T>>;
inline constexpr int norm_forward_packs = 4;  // of a thread, at most

template <bool Centred, bool Sum, int N, int K, class T>
void launch_norm_forward(char const* op, device::cuda const& policy, norm_forward_arguments<T> const& a, int threads) {
  std::int64_t const rows = a.y.extent(0), width = a.y.extent(1);
  dim3 const block = norm_block(width / N, K, threads);
  launch(op, policy, {blocks_for(rows, block.y), block}, norm_forward_in_registers<Centred, Sum, N, K, T>, a,
         accum_t<T>(1) / static_cast<accum_t<T>>(width));
}

}  // namespace detail

template <bool Centred, class T>
void norm_forward(char const* op, device::cuda const& policy, norm_forward_arguments<T> const& a) {
  constexpr int n = detail::norm_pack<T>, each = detail::norm_forward_packs;
  std::int64_t const rows = a.y.extent(0), width = a.y.extent(1);
  auto const in_packs = [&]<int N>() {
    return rows_in_packs<N>(a.x) && rows_in_packs<N>(a.weight) && rows_in_packs<N>(a.bias) &&
           rows_in_packs<N>(a.residual) && rows_in_packs<N>(a.y) && rows_in_packs<N>(a.sum);
  };
  if constexpr (sizeof(T) == 2) {
    constexpr int wide = pack_width<T>;
    if (width <= 1024 * wide * 8 && !a.residual.present() && !a.sum.present() && in_packs.template operator()<wide>())
      return width <= 32 * wide * 4 ? detail::launch_norm_forward<Centred, false, wide, 4>(op, policy, a, 128)
                                    : detail::launch_norm_forward<Centred, false, wide, 8>(op, policy, a, 128);
  }
  if (width <= 1024 * n * each && in_packs.template operator()<n>())
    return detail::launch_norm_forward<Centred, true, n, each>(op, policy, a, 256);
  dim3 const block = detail::norm_block(std::min<std::int64_t>(width, 512), 1, 256);
  launch(op, policy, {blocks_for(rows, block.y), block}, detail::norm_forward_passing<Centred, T>, a);
}

}  // namespace blackmamba::cuda
