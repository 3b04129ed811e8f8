#pragma once
#include <blackmamba/core/cuda/copy_async_cuda.cuh>
#include <blackmamba/core/cuda/norm_rows_cuda.cuh>
#include <blackmamba/core/row_blocks.hpp>

#include <cstddef>

/// The gradients of normalisations of rows.
///
/// Every operand is read once and every result written once. A row lives in the registers of the threads that share it,
/// and the next one is on its way meanwhile, by asynchronous copies into shared memory: threads read back what they
/// alone have copied, so that no barrier is needed for it. Rows too long for that, or not aligned for packs, are read
/// again for each pass over them, element by element.
///
/// Kernels: (in registers, passing) for each Centred, T and S.
namespace blackmamba::cuda {

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

/// What the threads of a block have of one row each: for each thread and pack, packs of s, d_y and d_residual.
template <int N, int K, class T, class S>
struct norm_backward_stage {
  using A = accum_t<T>;
  static constexpr std::size_t bytes_of_thread = K * N * (sizeof(S) + sizeof(A) + sizeof(T));
  unsigned char* memory;
  unsigned threads, thread;

  __device__ __forceinline__ S* s(int k) const { return reinterpret_cast<S*>(memory) + (k * threads + thread) * N; }
  __device__ __forceinline__ A* d_residual(int k) const {
    return reinterpret_cast<A*>(memory + threads * (K * N * sizeof(S))) + (k * threads + thread) * N;
  }
  __device__ __forceinline__ T* d_y(int k) const {
    return reinterpret_cast<T*>(memory + threads * (K * N * (sizeof(S) + sizeof(A)))) + (k * threads + thread) * N;
  }
};

/// One block of rows of `partial`. The block's groups of blockDim.x threads take its rows in turn; the columns' sums
/// stay in registers until the groups' are added, in order, through shared memory. `stages`: rows of a group that
/// shared memory holds: 2, or 1 where that is all there is room for.
template <bool Centred, int N, int K, class T, class S>
__global__ void __launch_bounds__(1024)
    norm_backward_in_registers(norm_backward_arguments<T, S> a, std::int64_t rows_per_block, int stages,
                               accum_t<T> inverse) {
  using A = accum_t<T>;
  using stage = norm_backward_stage<N, K, T, S>;
  constexpr int M = Centred ? 2 : 1;
  extern __shared__ __align__(16) unsigned char norm_shared_bytes[];
  unsigned const threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
  int const group = static_cast<int>(threadIdx.y), groups = static_cast<int>(blockDim.y);
  std::int64_t const first = std::int64_t{blockIdx.x} * rows_per_block;
  std::int64_t const last = first + rows_per_block < a.d_s.extent(0) ? first + rows_per_block : a.d_s.extent(0);
  // The thread's columns: N from mine + k step on, below width. Unsigned: an address is one instruction.
  unsigned const mine = threadIdx.x * N, step = blockDim.x * N, width = static_cast<unsigned>(a.d_s.extent(1));
  bool const through = a.d_residual.present();

  std::size_t const row_bytes = threads * stage::bytes_of_thread;
  auto const stage_of = [&](int turn) {
    return stage{norm_shared_bytes + (turn % 2 < stages ? turn % 2 : 0) * row_bytes, threads, thread};
  };
  A* const memory = reinterpret_cast<A*>(norm_shared_bytes + stages * row_bytes);  // (2, 32 M)
  auto const fetch = [&](std::int64_t r, stage const& to) {
    if (r < last) {
      S const* const s = a.sum.row(r);
      T const* const d_y = a.d_y.row(r);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        unsigned const c = mine + k * step;
        if (c >= width) continue;
        copy_async<N * sizeof(S)>(shared_address(to.s(k)), s + c);
        copy_async<N * sizeof(T)>(shared_address(to.d_y(k)), d_y + c);
        if (through) copy_async<N * sizeof(A)>(shared_address(to.d_residual(k)), a.d_residual.row(r) + c);
      }
    }
    commit_copies();
  };
  A next_rstd = 0, next_mean = 0;
  auto const fetch_scalars = [&](std::int64_t r) {
    if (r >= last) return;
    next_rstd = a.rstd(r);
    if constexpr (Centred) next_mean = a.mean(r);
  };

  pack<A, N> d_parameter[M][K], weight[K];  // of the weight, of the bias
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < N; ++i) d_parameter[m][k][i] = 0;
    if (mine + k * step < width) weight[k] = load_pack<N>(a.weight.data() + (mine + k * step));
  }
  if (stages > 1) fetch(first + group, stage_of(0));
  fetch_scalars(first + group);
  int turn = 0;
  for (std::int64_t base = first; base < last; base += groups, turn ^= 1) {
    std::int64_t const r = base + group;
    bool const live = r < last;
    A const rstd = next_rstd, mean = next_mean;
    stage const here = stage_of(turn);
    if (stages > 1) {
      fetch(r + groups, stage_of(turn + 1));  // where the row before this one was
      wait_for_copies<1>();
    } else {
      fetch(r, here);
      wait_for_copies<0>();
    }
    fetch_scalars(r + groups);
    pack<A, N> normalised[K], g[K];
    A total[M] = {};  // of g normalised, of g
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (live && mine + k * step < width) {
        normalised[k] = load_pack<N>(here.s(k));
        g[k] = load_pack<N>(here.d_y(k));
#pragma unroll
        for (int i = 0; i < N; ++i) {
          normalised[k][i] = (normalised[k][i] - mean) * rstd;
          d_parameter[0][k][i] = math::fma(g[k][i], normalised[k][i], d_parameter[0][k][i]);
          if constexpr (Centred) d_parameter[1][k][i] += g[k][i];
          g[k][i] *= weight[k][i];
          total[0] = math::fma(g[k][i], normalised[k][i], total[0]);
          if constexpr (Centred) total[1] += g[k][i];
        }
      }
    sum_over_lanes(total, memory + turn * (32 * M));
    A const mean_gn = total[0] * inverse;
    A mean_g = 0;
    if constexpr (Centred) mean_g = total[1] * inverse;
    S* const d_s = a.d_s.row(live ? r : first);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      unsigned const c = mine + k * step;
      if (live && c < width) {
#pragma unroll
        for (int i = 0; i < N; ++i) g[k][i] = (g[k][i] - mean_g - normalised[k][i] * mean_gn) * rstd;
        if (through) {
          auto const more = load_pack<N>(here.d_residual(k));
#pragma unroll
          for (int i = 0; i < N; ++i) g[k][i] += more[i];
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
        unsigned const c = mine + k * step;
        if (c < width) store_pack<N>(partial + (m * width + c), d_parameter[m][k]);
      }
    return;
  }
  A* const column_sums = reinterpret_cast<A*>(norm_shared_bytes);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    __syncthreads();  // other threads' rows, and sums before these, have been read
#pragma unroll
    for (int k = 0; k < K; ++k)
      store_pack<N>(column_sums + ((threadIdx.y * K + static_cast<unsigned>(k)) * step + mine), d_parameter[m][k]);
    __syncthreads();
    for (unsigned c = thread; c < width; c += threads) {
      A sum = column_sums[c];
      for (int other = 1; other < groups; ++other) sum += column_sums[static_cast<unsigned>(other * K) * step + c];
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
    sum_over_lanes(total, memory[(r - first) % 2]);
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

inline constexpr int norm_backward_packs = 2;  // of a thread, at most

}  // namespace detail

/// Leaves the parameters' gradients in a.partial, (row_blocks::count(R), D or 2 D).
template <bool Centred, class T, class S>
void norm_backward(char const* op, device::cuda const& policy, norm_backward_arguments<T, S> const& a) {
  constexpr int n = detail::norm_pack<T>, each = detail::norm_backward_packs;
  std::int64_t const rows = a.d_s.extent(0), width = a.d_s.extent(1);
  std::int64_t const rows_per_block = row_blocks<space::device>::rows_per_block(rows);
  unsigned const blocks = blocks_for(rows, rows_per_block);
  if (width <= 1024 * n * each && rows_in_packs<n>(a.sum) && rows_in_packs<n>(a.weight) && rows_in_packs<n>(a.d_y) &&
      rows_in_packs<n>(a.d_residual) && rows_in_packs<n>(a.d_s)) {
    dim3 block = detail::norm_block(width / n, each, 256);
    block.y = std::min(block.y, static_cast<unsigned>(rows_per_block));
    while (block.x * block.y % 32 != 0) ++block.y;  // whole warps: lanes below 32 divide it
    std::size_t const row = block.x * block.y * detail::norm_backward_stage<n, each, T, S>::bytes_of_thread;
    std::size_t const sums = 2 * 32 * (Centred ? 2 : 1) * sizeof(accum_t<T>);
    auto const room = static_cast<std::size_t>(properties().shared_bytes_per_block);
    int const stages = 2 * row + sums <= room ? 2 : 1;
    if (row + sums <= room)
      return launch(op, policy, {blocks, block, static_cast<std::size_t>(stages) * row + sums},
                    detail::norm_backward_in_registers<Centred, n, each, T, S>, a, rows_per_block, stages,
                    accum_t<T>(1) / static_cast<accum_t<T>>(width));
  }
  launch(op, policy, {blocks, 256}, detail::norm_backward_passing<Centred, T, S>, a, rows_per_block);
}

}  // namespace blackmamba::cuda
