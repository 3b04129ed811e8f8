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
/// d_residual may be absent. mean without Centred: absent.
template <class T, class S>
struct norm_backward_arguments {
  using A = accum_t<T>;
  device_view<S const, dyn, dyn> sum;         // (R, D)
  device_view<A const, dyn> rstd;             // (R)
  device_view<A const, dyn> mean;             // (R)
  device_view<A const, dyn> weight;           // (D)
  device_view<T const, dyn, dyn> d_y;         // (R, D)
  device_view<A const, dyn, dyn> d_residual;  // (R, D)
  device_view<S, dyn, dyn> d_s;               // (R, D)
  device_view<A, dyn, dyn> partial;           // (row_blocks, D), with Centred (row_blocks, 2 D): weight, then bias
};

namespace detail {

/// Sums each x[i] over the `lanes` neighbouring threads that share a row: a power of two up to 32, or whole warps. All
/// of the block call it, and every thread gets the sums. `memory`: M elements for each warp of the block, which no call
/// may have used since the last but one: two halves in turn save a barrier.
template <int M, class A>
__device__ __forceinline__ void sum_over_lanes(A (&x)[M], int lanes, A* memory) {
  for (int distance = (lanes < 32 ? lanes : 32) / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int i = 0; i < M; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], distance);
  if (lanes <= 32) return;
  int const warp = static_cast<int>(threadIdx.x) / 32, warps = lanes / 32, first = warp / warps * warps;
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int i = 0; i < M; ++i) memory[warp * M + i] = x[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < M; ++i) {
    x[i] = memory[first * M + i];
    for (int w = 1; w < warps; ++w) x[i] += memory[(first + w) * M + i];
  }
}

/// The sum of a row's elements and the sum of their squares, or with Centred of the squares of their differences from
/// the mean, with one barrier of the block. For that each warp takes differences from the mean of its own part, and
/// sum (s - mean)^2 = sum over warps of [sum (s - mean_w)^2 + count_w (mean_w - mean)^2].
template <bool Centred, class A>
struct row_moments {
  A count, sum, squares;

  /// Of the part that the thread, then that the warp has.
  __device__ __forceinline__ A mean() const { return Centred && count > 0 ? sum / count : A(0); }
  __device__ __forceinline__ void sum_over_warp(int lanes) {
    for (int distance = (lanes < 32 ? lanes : 32) / 2; distance > 0; distance /= 2) {
      count += __shfl_xor_sync(0xffffffffu, count, distance);
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
  }
  /// `memory`: three elements for each warp of the block, used this once.
  __device__ __forceinline__ void squares_over_row(int lanes, A* memory) {
    for (int distance = (lanes < 32 ? lanes : 32) / 2; distance > 0; distance /= 2)
      squares += __shfl_xor_sync(0xffffffffu, squares, distance);
    if (lanes <= 32) return;
    int const warp = static_cast<int>(threadIdx.x) / 32, warps = lanes / 32, first = warp / warps * warps;
    if (threadIdx.x % 32 == 0) {
      memory[warp] = squares;
      if constexpr (Centred) {
        memory[32 + warp] = sum;
        memory[64 + warp] = count;
      }
    }
    __syncthreads();
    squares = 0;
    for (int w = first; w < first + warps; ++w) squares += memory[w];
    if constexpr (Centred) {
      count = sum = 0;
      for (int w = first; w < first + warps; ++w) {
        sum += memory[32 + w];
        count += memory[64 + w];
      }
      A const of_row = mean();
      for (int w = first; w < first + warps; ++w) {
        A const of_warp = memory[64 + w] > 0 ? memory[32 + w] / memory[64 + w] - of_row : A(0);
        squares = math::fma(of_warp * of_warp, memory[64 + w], squares);
      }
    }
  }
};

/// Whether the scalar of a row belongs to this thread to write.
template <class A>
__device__ __forceinline__ void store_scalar(device_view<A, dyn> const& to, std::int64_t r, int lane, A value) {
  if (lane == 0 && to.present()) to(r) = value;
}

/// A row in registers: K packs of N for each of its threads.
template <bool Centred, int N, int K, class T>
__global__ void __launch_bounds__(1024) norm_forward_in_registers(norm_forward_arguments<T> a, int lanes) {
  using A = accum_t<T>;
  __shared__ A memory[96];
  int const lane = static_cast<int>(threadIdx.x) % lanes, width = static_cast<int>(a.y.extent(1));
  std::int64_t const r =
      std::int64_t{blockIdx.x} * (static_cast<int>(blockDim.x) / lanes) + static_cast<int>(threadIdx.x) / lanes;
  bool const live = r < a.y.extent(0);
  int const mine = lane * N, step = lanes * N;  // the thread's columns: N from mine + k step on
  stored_pack<N, T> x[K];
  stored_pack<N, A> residual[K];
  T const* const x_row = a.x.row(live ? r : 0);
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (live && mine + k * step < width) x[k].load(x_row + mine + k * step);
  if (a.residual.present()) {
    A const* const residual_row = a.residual.row(live ? r : 0);
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (live && mine + k * step < width) residual[k].load(residual_row + mine + k * step);
  }
  pack<A, N> s[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (live && mine + k * step < width) {
      s[k] = x[k].widened();
      if (a.residual.present()) {
        auto const other = residual[k].widened();
#pragma unroll
        for (int i = 0; i < N; ++i) s[k][i] += other[i];
      }
    }
  }
  row_moments<Centred, A> moments{0, 0, 0};
  if constexpr (Centred) {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (live && mine + k * step < width) {
        moments.count += N;
#pragma unroll
        for (int i = 0; i < N; ++i) moments.sum += s[k][i];
      }
    moments.sum_over_warp(lanes);
  }
  A const centre = moments.mean();
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (live && mine + k * step < width)
#pragma unroll
      for (int i = 0; i < N; ++i) moments.squares = math::fma(s[k][i] - centre, s[k][i] - centre, moments.squares);
  moments.squares_over_row(lanes, memory);
  A mean = 0;
  if constexpr (Centred) mean = moments.sum / static_cast<A>(width);
  if (!live) return;
  A const rstd = A(1) / math::sqrt(moments.squares / static_cast<A>(width) + a.eps);
  T* const y = a.y.row(r);
  A* const sum = a.sum.present() ? a.sum.row(r) : nullptr;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    int const c = mine + k * step;
    if (c >= width) continue;
    if (sum) store_pack<N>(sum + c, s[k]);
    auto const weight = load_pack<N>(a.weight.data() + c);
#pragma unroll
    for (int i = 0; i < N; ++i) s[k][i] = (s[k][i] - mean) * rstd * weight[i];
    if (Centred && a.bias.present()) {
      auto const bias = load_pack<N>(a.bias.data() + c);
#pragma unroll
      for (int i = 0; i < N; ++i) s[k][i] += bias[i];
    }
    store_pack<N>(y + c, s[k]);
  }
  store_scalar(a.rstd, r, lane, rstd);
  if constexpr (Centred) store_scalar(a.mean, r, lane, mean);
}

/// Rows of any length and alignment. Each thread reads again what it alone writes, so that results may alias operands.
template <bool Centred, class T>
__global__ void __launch_bounds__(512) norm_forward_passing(norm_forward_arguments<T> a, int lanes) {
  using A = accum_t<T>;
  __shared__ A memory[2][16];
  int const lane = static_cast<int>(threadIdx.x) % lanes;
  std::int64_t const r =
      std::int64_t{blockIdx.x} * (static_cast<int>(blockDim.x) / lanes) + static_cast<int>(threadIdx.x) / lanes;
  bool const live = r < a.y.extent(0);
  std::int64_t const width = live ? a.y.extent(1) : 0;
  T const* const x = live ? a.x.row(r) : nullptr;
  A const* const residual = live && a.residual.present() ? a.residual.row(r) : nullptr;
  auto const s = [&](std::int64_t c) { return residual ? widen(x[c]) + residual[c] : widen(x[c]); };
  A total[1] = {0}, mean = 0;
  if constexpr (Centred) {
    for (std::int64_t c = lane; c < width; c += lanes) total[0] += s(c);
    sum_over_lanes(total, lanes, memory[0]);
    mean = total[0] / static_cast<A>(a.y.extent(1));
    total[0] = 0;
  }
  for (std::int64_t c = lane; c < width; c += lanes) {
    A const v = s(c) - mean;
    total[0] = math::fma(v, v, total[0]);
  }
  sum_over_lanes(total, lanes, memory[1]);
  if (!live) return;
  A const rstd = A(1) / math::sqrt(total[0] / static_cast<A>(width) + a.eps);
  for (std::int64_t c = lane; c < width; c += lanes) {
    A const v = s(c);
    A y = (v - mean) * rstd * a.weight.data()[c];
    if (Centred && a.bias.present()) y += a.bias.data()[c];
    a.y.row(r)[c] = convert<T>(y);
    if (a.sum.present()) a.sum.row(r)[c] = v;
  }
  store_scalar(a.rstd, r, lane, rstd);
  if constexpr (Centred) store_scalar(a.mean, r, lane, mean);
}

/// One block of rows of `partial`. The block's threads form groups of `lanes` that take its rows in turn; the columns'
/// sums stay in registers until the groups' are added, in order, through shared memory.
template <bool Centred, int N, int K, class T, class S>
__global__ void __launch_bounds__(1024)
    norm_backward_in_registers(norm_backward_arguments<T, S> a, int lanes, std::int64_t rows_per_block) {
  using A = accum_t<T>;
  constexpr int M = Centred ? 2 : 1;
  extern __shared__ __align__(16) unsigned char norm_shared_bytes[];
  __shared__ A memory[2][32 * M];
  int const lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  int const groups = static_cast<int>(blockDim.x) / lanes, width = static_cast<int>(a.d_s.extent(1));
  std::int64_t const first = std::int64_t{blockIdx.x} * rows_per_block;
  std::int64_t const last = first + rows_per_block < a.d_s.extent(0) ? first + rows_per_block : a.d_s.extent(0);
  int const mine = lane * N, step = lanes * N;  // the thread's columns: N from mine + k step on
  pack<A, N> d_parameter[M][K];                 // of the weight, of the bias
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int i = 0; i < N; ++i) d_parameter[m][k][i] = 0;
  int turn = 0;
  for (std::int64_t base = first; base < last; base += groups, turn ^= 1) {
    std::int64_t const r = base + group;
    bool const live = r < last;
    stored_pack<N, S> s[K];
    stored_pack<N, T> d_y[K];
    stored_pack<N, A> d_residual[K];
    S const* const s_row = a.sum.row(live ? r : first);
    T const* const d_y_row = a.d_y.row(live ? r : first);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      int const c = mine + k * step;
      if (live && c < width) {
        s[k].load(s_row + c);
        d_y[k].load(d_y_row + c);
      }
    }
    if (a.d_residual.present()) {
      A const* const d_residual_row = a.d_residual.row(live ? r : first);
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (live && mine + k * step < width) d_residual[k].load(d_residual_row + mine + k * step);
    }
    A const rstd = live ? a.rstd(r) : A(0);
    A mean = 0;
    if constexpr (Centred) mean = live ? a.mean(r) : A(0);
    pack<A, N> normalised[K], g[K];
    A total[M] = {};  // of g normalised, of g
#pragma unroll
    for (int k = 0; k < K; ++k) {
      int const c = mine + k * step;
      if (live && c < width) {
        normalised[k] = s[k].widened();
        g[k] = d_y[k].widened();
        auto const weight = load_pack<N>(a.weight.data() + c);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          normalised[k][i] = (normalised[k][i] - mean) * rstd;
          d_parameter[0][k][i] = math::fma(g[k][i], normalised[k][i], d_parameter[0][k][i]);
          if constexpr (Centred) d_parameter[1][k][i] += g[k][i];
          g[k][i] *= weight[i];
          total[0] = math::fma(g[k][i], normalised[k][i], total[0]);
          if constexpr (Centred) total[1] += g[k][i];
        }
      }
    }
    sum_over_lanes(total, lanes, memory[turn]);
    A const mean_gn = total[0] / static_cast<A>(width);
    A mean_g = 0;
    if constexpr (Centred) mean_g = total[1] / static_cast<A>(width);
    S* const d_s = a.d_s.row(live ? r : first);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      int const c = mine + k * step;
      if (live && c < width) {
#pragma unroll
        for (int i = 0; i < N; ++i) g[k][i] = (g[k][i] - mean_g - normalised[k][i] * mean_gn) * rstd;
        if (a.d_residual.present()) {
          auto const through = d_residual[k].widened();
#pragma unroll
          for (int i = 0; i < N; ++i) g[k][i] += through[i];
        }
        store_pack<N>(d_s + c, g[k]);
      }
    }
  }
  A* const partial = a.partial.row(std::int64_t{blockIdx.x});
  if (groups == 1) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int k = 0; k < K; ++k) {
        int const c = mine + k * step;
        if (c < width) store_pack<N>(partial + m * width + c, d_parameter[m][k]);
      }
    return;
  }
  A* const column_sums = reinterpret_cast<A*>(norm_shared_bytes);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    if (m > 0) __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) store_pack<N>(column_sums + (group * K + k) * step + mine, d_parameter[m][k]);
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); c < width; c += static_cast<int>(blockDim.x)) {
      A sum = column_sums[c];
      for (int other = 1; other < groups; ++other) sum += column_sums[other * K * step + c];
      partial[m * width + c] = sum;
    }
  }
}

/// Rows of any length and alignment. A thread owns its columns of the block's row of `partial`.
template <bool Centred, class T, class S>
__global__ void __launch_bounds__(256)
    norm_backward_passing(norm_backward_arguments<T, S> a, std::int64_t rows_per_block) {
  using A = accum_t<T>;
  constexpr int M = Centred ? 2 : 1;
  __shared__ A memory[2][8 * M];
  std::int64_t const width = a.d_s.extent(1), first = std::int64_t{blockIdx.x} * rows_per_block;
  std::int64_t const last = first + rows_per_block < a.d_s.extent(0) ? first + rows_per_block : a.d_s.extent(0);
  A* const d_weight = a.partial.row(std::int64_t{blockIdx.x});
  for (std::int64_t r = first; r < last; ++r) {
    S const* const s = a.sum.row(r);
    T const* const d_y = a.d_y.row(r);
    A const rstd = a.rstd(r);
    A mean = 0;
    if constexpr (Centred) mean = a.mean(r);
    A total[M] = {};
    for (std::int64_t c = threadIdx.x; c < width; c += 256) {
      A const g = widen(d_y[c]) * a.weight.data()[c];
      total[0] = math::fma(g, (widen(s[c]) - mean) * rstd, total[0]);
      if constexpr (Centred) total[1] += g;
    }
    sum_over_lanes(total, 256, memory[(r - first) % 2]);
    A const mean_gn = total[0] / static_cast<A>(width);
    A mean_g = 0;
    if constexpr (Centred) mean_g = total[1] / static_cast<A>(width);
    for (std::int64_t c = threadIdx.x; c < width; c += 256) {
      A const through = a.d_residual.present() ? a.d_residual.row(r)[c] : A(0);
      A const normalised = (widen(s[c]) - mean) * rstd, d = widen(d_y[c]);
      d_weight[c] = math::fma(d, normalised, r == first ? A(0) : d_weight[c]);
      if constexpr (Centred) d_weight[width + c] = d + (r == first ? A(0) : d_weight[width + c]);
      a.d_s.row(r)[c] = convert<S>(through + (d * a.weight.data()[c] - mean_g - normalised * mean_gn) * rstd);
    }
  }
}

/// Threads that share a row of `packs` packs, `each` for one thread.
inline int lanes_for(std::int64_t packs, int each) {
  int const wanted = static_cast<int>((packs + each - 1) / each);
  if (wanted > 32) return (wanted + 31) / 32 * 32;
  int lanes = 1;
  while (lanes < wanted) lanes *= 2;
  return lanes;
}
/// Packs are as wide as 16 bytes of the accumulation type: what a thread reads and writes of any operand is then a
/// whole transaction, and what a warp does has no gaps.
template <class T>
inline constexpr int norm_pack = pack_width<accum_t<T>>;
inline constexpr int norm_forward_packs = 4, norm_backward_packs = 2;  // of a thread, at most

}  // namespace detail

template <bool Centred, class T>
void norm_forward(char const* op, device::cuda const& policy, norm_forward_arguments<T> const& a) {
  constexpr int n = detail::norm_pack<T>, each = detail::norm_forward_packs;
  std::int64_t const rows = a.y.extent(0), width = a.y.extent(1);
  if (width <= 1024 * n * each && rows_in_packs<n>(a.x) && rows_in_packs<n>(a.weight) && rows_in_packs<n>(a.bias) &&
      rows_in_packs<n>(a.residual) && rows_in_packs<n>(a.y) && rows_in_packs<n>(a.sum)) {
    int const lanes = detail::lanes_for(width / n, each), groups = std::max(1, 256 / lanes);
    launch(op, policy, {blocks_for(rows, groups), static_cast<unsigned>(groups * lanes)},
           detail::norm_forward_in_registers<Centred, n, each, T>, a, lanes);
  } else {
    int const lanes = detail::lanes_for(std::min<std::int64_t>(width, 512), 1), groups = std::max(1, 256 / lanes);
    launch(op, policy, {blocks_for(rows, groups), static_cast<unsigned>(groups * lanes)},
           detail::norm_forward_passing<Centred, T>, a, lanes);
  }
}

/// Leaves the parameters' gradients in a.partial, (row_blocks::count(R), D or 2 D).
template <bool Centred, class T, class S>
void norm_backward(char const* op, device::cuda const& policy, norm_backward_arguments<T, S> const& a) {
  constexpr int n = detail::norm_pack<T>, each = detail::norm_backward_packs;
  std::int64_t const rows = a.d_s.extent(0), width = a.d_s.extent(1);
  std::int64_t const rows_per_block = row_blocks<space::device>::rows_per_block(rows);
  unsigned const blocks = blocks_for(rows, rows_per_block);
  if (width <= 1024 * n * each && rows_in_packs<n>(a.sum) && rows_in_packs<n>(a.weight) && rows_in_packs<n>(a.d_y) &&
      rows_in_packs<n>(a.d_residual) && rows_in_packs<n>(a.d_s)) {
    int const lanes = detail::lanes_for(width / n, each);
    int const groups = static_cast<int>(std::clamp<std::int64_t>(256 / lanes, 1, rows_per_block));
    int const threads = (groups * lanes + 31) / 32 * 32;  // lanes below 32 divide it
    std::size_t const shared = threads > lanes ? static_cast<std::size_t>(threads * each * n) * sizeof(accum_t<T>) : 0;
    launch(op, policy, {blocks, static_cast<unsigned>(threads), shared},
           detail::norm_backward_in_registers<Centred, n, each, T, S>, a, lanes, rows_per_block);
  } else {
    launch(op, policy, {blocks, 256}, detail::norm_backward_passing<Centred, T, S>, a, rows_per_block);
  }
}

}  // namespace blackmamba::cuda
