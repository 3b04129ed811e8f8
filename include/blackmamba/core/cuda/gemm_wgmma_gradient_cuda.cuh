#pragma once
#include <blackmamba/core/cuda/gemm_wgmma_result_cuda.cuh>
#include <blackmamba/core/cuda/tensor_core_cuda.cuh>

#include <cstdint>

/// How the gradients of gated units leave a warpgroup of gemm_wgmma_cuda.cuh.
namespace blackmamba::cuda::detail::wgmma {

/// As departure. For each 64 columns, the copy engine fetches the gates and what they gate into the warp's buffers;
/// both are replaced there by their gradients, and the engine takes them away.
template <int Fragments, class T, class Result>
class gradient_departure {
 public:
  /// loaded: a barrier of the warp's own.
  __device__ __forceinline__ gradient_departure(arguments<T, T, Result> const& args, std::uint32_t memory,
                                                std::uint32_t loaded)
      : args_(args), gates_(memory), loaded_(loaded) {}

  __device__ __forceinline__ void take(float (&sum)[Fragments][4], note const& t, int row) {
    row_ = row;
    rows_left_ = t.row_end - row;
    column_ = t.column;
    columns_left_ = static_cast<int>(args_.x.n) - t.column;
    next_ = 0;
    end_ = rows_left_ > 0 ? slices : 0;
#pragma unroll
    for (int j = 0; j < Fragments; ++j) {
      word_[j][0] = packed_pair<T>(sum[j][0], sum[j][1]);
      word_[j][1] = packed_pair<T>(sum[j][2], sum[j][3]);
    }
  }
  __device__ __forceinline__ void advance() {
    if (next_ < end_) slice(next_++);
  }
  __device__ __forceinline__ void finish() {
#pragma unroll 1
    while (next_ < end_) slice(next_++);
  }

 private:
  /// Of a unit of 64 columns: one to fetch, one in which that is under way, four to compute.
  static constexpr int slices_of_unit = 6, slices = slices_of_unit * (Fragments / 8);

  __device__ __forceinline__ void slice(int i) {
    int const unit = i / slices_of_unit, q = i - unit * slices_of_unit - 2;
    int const lane = static_cast<int>(threadIdx.x) % 32, column = column_ + 64 * unit;
    if (64 * unit >= columns_left_) return;
    if (q >= 0) {
      if (q == 0) {
        phase_barrier::wait(loaded_, parity_);
        parity_ ^= 1;
      }
      part(4 * unit + q, q);
      if (q == 3) send(column, columns_left_ - 64 * unit);
    } else if (q == -2 && lane == 0) {
      wait_for_copies_out<0>();
      phase_barrier::arrive_expecting(loaded_, 2 * buffer_bytes);
      copy_box(gates_, &args_.both, loaded_, column, row_, 0);
      copy_box(gates_ + buffer_bytes, &args_.both, loaded_, column, row_, 1);
    }
  }
  __device__ __forceinline__ void part(int pair, int q) {
    std::uint32_t d[4], gate[4], up[4];
    select_pair<0, Fragments / 2>(word_, pair, d);
    std::uint32_t const gates = staged_part(gates_, q), ups = staged_part(gates_ + buffer_bytes, q);
    load_matrices<false>(gate, gates);
    load_matrices<false>(up, ups);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float g[2], u[2], y[2];
      unpack_pair<T>(gate[k], g[0], g[1]);
      unpack_pair<T>(up[k], u[0], u[1]);
      unpack_pair<T>(d[k], y[0], y[1]);
#pragma unroll
      for (int e = 0; e < 2; ++e) Result::function::gradient(g[e], u[e], y[e]);
      gate[k] = packed_pair<T>(g[0], g[1]);
      up[k] = packed_pair<T>(u[0], u[1]);
    }
    store_matrices(gates, gate);
    store_matrices(ups, up);
  }
  __device__ __forceinline__ void send(int column, int left) {
    int const lane = static_cast<int>(threadIdx.x) % 32;
    publish_shared_writes();
    __syncwarp();
    if (rows_left_ >= 16) {
      if (lane == 0) {
        copy_box_out(&args_.c, gates_, column, row_, 0);
        copy_box_out(&args_.c, gates_ + buffer_bytes, column, row_, 1);
        commit_copies_out();
      }
      return;
    }
    auto const& to = args_.x.result;
    int const chunk = lane % 8;
    T* const first = to.d_both + row_ * to.d_both_stride + column + 8 * chunk;
#pragma unroll 1
    for (int r = lane / 8; r < rows_left_; r += 4)
#pragma unroll 1
      for (int up = 0; up < 2; ++up)
        store_staged(gates_ + up * buffer_bytes, r, first + r * to.d_both_stride + up * args_.x.n, left - 8 * chunk,
                     true);
    publish_shared_writes();  // what was read here is overwritten by the engine
    __syncwarp();
  }

  arguments<T, T, Result> const& args_;
  std::uint32_t gates_, loaded_, parity_ = 0;
  std::uint32_t word_[Fragments][2];
  int row_ = 0, rows_left_ = 0, column_ = 0, columns_left_ = 0, next_ = 0, end_ = 0;
};

}  // namespace blackmamba::cuda::detail::wgmma
