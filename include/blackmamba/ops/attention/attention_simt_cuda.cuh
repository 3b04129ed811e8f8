#pragma once
#include <blackmamba/core/math.hpp>
#include <blackmamba/ops/attention/attention_backward_cuda.cuh>
#include <blackmamba/ops/attention/attention_forward_cuda.cuh>

/// Attention without tensor cores, for T = float and double and any head dimension: what the tensor core kernels are
/// compared with. A block of 256 threads owns 16 rows of one head and goes over the other side 16 rows at a time;
/// thread (r, c) has the score of row r with row c, and of the sums of row r the elements c, c + 16, ...
namespace blackmamba::attention_cuda {

inline constexpr int simt_rows = 16, simt_threads = simt_rows * simt_rows, simt_columns = 16;

template <class A>
std::size_t simt_shared_bytes(int tiles, std::int64_t head_dim) {
  return sizeof(A) * static_cast<std::size_t>(tiles * simt_rows * (head_dim + 1) + 2 * simt_rows * (simt_rows + 1));
}

/// Rows [0, count) of one head, zeros beyond; turned where there are angles.
template <class A>
__device__ __forceinline__ void load_simt_tile(A* to, A const* from, std::int64_t stride, std::int64_t count,
                                               int head_dim, A const* angles = nullptr) {
  int const half = head_dim / 2, pitch = head_dim + 1;
  for (int i = static_cast<int>(threadIdx.x); i < simt_rows * half; i += simt_threads) {
    int const row = i / half, m = i % half;
    A a = 0, b = 0;
    if (row < count) {
      a = from[row * stride + m];
      b = from[row * stride + m + half];
      if (angles)
        turn_pair(a, b, angles[std::int64_t{row} * head_dim + m], angles[std::int64_t{row} * head_dim + half + m], a,
                  b);
    }
    to[row * pitch + m] = a;
    to[row * pitch + m + half] = b;
  }
}
template <class A>
__device__ __forceinline__ A row_product(A const* a, A const* b, int head_dim) {
  A sum = 0;
  for (int d = 0; d < head_dim; ++d) sum = math::fma(a[d], b[d], sum);
  return sum;
}
/// sums[i] += sum over j of weights[j] rows[j][c + 16 i].
template <class A>
__device__ __forceinline__ void add_rows(A (&sums)[simt_columns], A const* weights, A const* rows, int head_dim,
                                         int column) {
  for (int j = 0; j < simt_rows; ++j) {
    A const weight = weights[j];
#pragma unroll
    for (int i = 0; i < simt_columns; ++i)
      if (column + 16 * i < head_dim) sums[i] = math::fma(weight, rows[j * (head_dim + 1) + column + 16 * i], sums[i]);
  }
}
template <class A>
__device__ __forceinline__ void stage_sums(A* to, A const (&sums)[simt_columns], int head_dim, int row, int column) {
#pragma unroll
  for (int i = 0; i < simt_columns; ++i)
    if (column + 16 * i < head_dim) to[row * (head_dim + 1) + column + 16 * i] = sums[i];
}

template <class A>
__global__ void __launch_bounds__(simt_threads) forward_simt(forward_arguments<A> const a) {
  extern __shared__ uint4 attention_memory[];
  int const head_dim = a.head_dim, pitch = head_dim + 1;
  A* const q_tile = reinterpret_cast<A*>(attention_memory);
  A* const kv_tile = q_tile + simt_rows * pitch;
  A* const weights = kv_tile + simt_rows * pitch;
  int const head = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.heads));
  tile const t = a.map.find<simt_rows>(blockIdx.x / static_cast<unsigned>(a.heads));
  if (t.rows == 0) return;
  std::int64_t const past = a.past ? a.past[t.sequence] : 0;
  std::int64_t const all_keys = min(past + t.begin + t.rows, a.capacity);
  A const* const k = a.past ? a.k.at(t.sequence, 0, head / a.share) : a.k.at(t.batch, t.first, head / a.share);
  A const* const v = a.past ? a.v.at(t.sequence, 0, head / a.share) : a.v.at(t.batch, t.first, head / a.share);
  std::int64_t const angle_row = a.past ? t.batch * a.map.length + t.first + t.begin : t.begin;
  load_simt_tile(q_tile, a.q.at(t.batch, t.first + t.begin, head), a.q.row, t.rows, head_dim,
                 a.angles ? a.angles + angle_row * head_dim : nullptr);
  int const row = static_cast<int>(threadIdx.x) / simt_rows, column = static_cast<int>(threadIdx.x) % simt_rows;
  A sums[simt_columns] = {};
  attention_math::running_softmax<A> softmax{-static_cast<A>(INFINITY), 0};
  for (std::int64_t key = 0; key < all_keys; key += simt_rows) {
    load_simt_tile(kv_tile, k + key * a.k.row, a.k.row, all_keys - key, head_dim);
    __syncthreads();
    A score = row_product(q_tile + row * pitch, kv_tile + column * pitch, head_dim) * a.scale;
    if (key + column > past + t.begin + row) score = -static_cast<A>(INFINITY);
    A top = score;
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2) top = math::max(top, __shfl_xor_sync(~0u, top, distance));
    top = math::max(top, softmax.maximum);
    A const factor = attention_math::rescaling(softmax.maximum, top), weight = math::exp2(score - top);
    A total = weight;
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2) total += __shfl_xor_sync(~0u, total, distance);
    softmax = {top, softmax.sum * factor + total};
    weights[row * (simt_rows + 1) + column] = weight;
    __syncthreads();
    load_simt_tile(kv_tile, v + key * a.v.row, a.v.row, all_keys - key, head_dim);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < simt_columns; ++i) sums[i] *= factor;
    add_rows(sums, weights + row * (simt_rows + 1), kv_tile, head_dim, column);
    __syncthreads();
  }
  if (row >= t.rows) return;
  std::int64_t const at = t.first + t.begin + row;
  if (a.lse && column == 0) a.lse[t.batch * a.lse_batch + head * a.lse_head + at] = softmax.log_sum();
  A* const y = a.y.at(t.batch, at, head);
#pragma unroll
  for (int i = 0; i < simt_columns; ++i)
    if (column + 16 * i < head_dim) y[column + 16 * i] = sums[i] / softmax.sum;
}

template <class A>
__global__ void __launch_bounds__(simt_threads) query_gradient_simt(gradient_arguments<A> const a) {
  extern __shared__ uint4 attention_memory[];
  int const head_dim = a.head_dim, pitch = head_dim + 1;
  A* const q_tile = reinterpret_cast<A*>(attention_memory);
  A* const d_y_tile = q_tile + simt_rows * pitch;
  A* const k_tile = d_y_tile + simt_rows * pitch;
  A* const v_tile = k_tile + simt_rows * pitch;
  A* const d_scores = v_tile + simt_rows * pitch;
  int const head = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.heads));
  tile const t = a.map.find<simt_rows>(blockIdx.x / static_cast<unsigned>(a.heads));
  if (t.rows == 0) return;
  std::int64_t const all_keys = t.begin + t.rows, first = t.first + t.begin;
  load_simt_tile(q_tile, a.q.at(t.batch, first, head), a.q.row, t.rows, head_dim);
  load_simt_tile(d_y_tile, a.d_y.at(t.batch, first, head), a.d_y.row, t.rows, head_dim);
  int const row = static_cast<int>(threadIdx.x) / simt_rows, column = static_cast<int>(threadIdx.x) % simt_rows;
  A lse = 0, delta = 0;
  if (row < t.rows) {
    lse = a.lse[t.batch * a.lse_batch + head * a.lse_head + first + row] * static_cast<A>(attention_math::log2_e);
    delta = a.delta[t.batch * a.delta_batch + head * a.delta_head + first + row];
  }
  A const* const k = a.k.at(t.batch, t.first, head / a.share);
  A const* const v = a.v.at(t.batch, t.first, head / a.share);
  A sums[simt_columns] = {};
  for (std::int64_t key = 0; key < all_keys; key += simt_rows) {
    load_simt_tile(k_tile, k + key * a.k.row, a.k.row, all_keys - key, head_dim);
    load_simt_tile(v_tile, v + key * a.v.row, a.v.row, all_keys - key, head_dim);
    __syncthreads();
    A const score = row_product(q_tile + row * pitch, k_tile + column * pitch, head_dim) * a.scale;
    A const d_weight = row_product(d_y_tile + row * pitch, v_tile + column * pitch, head_dim);
    bool const seen = row < t.rows && key + column <= t.begin + row;
    d_scores[row * (simt_rows + 1) + column] = seen ? math::exp2(score - lse) * (d_weight - delta) : A(0);
    __syncthreads();
    add_rows(sums, d_scores + row * (simt_rows + 1), k_tile, head_dim, column);
    __syncthreads();
  }
  stage_sums(q_tile, sums, head_dim, row, column);
  __syncthreads();
  write_turned_back<simt_threads>(q_tile, pitch, t.rows, head_dim, a.inverse_root,
                                  a.angles ? a.angles + t.begin * head_dim : nullptr, a.d_q.at(t.batch, first, head),
                                  a.d_q.row);
}

template <class A>
__global__ void __launch_bounds__(simt_threads) key_gradient_simt(gradient_arguments<A> const a) {
  extern __shared__ uint4 attention_memory[];
  int const head_dim = a.head_dim, pitch = head_dim + 1;
  A* const k_tile = reinterpret_cast<A*>(attention_memory);
  A* const v_tile = k_tile + simt_rows * pitch;
  A* const q_tile = v_tile + simt_rows * pitch;
  A* const d_y_tile = q_tile + simt_rows * pitch;
  A* const weights = d_y_tile + simt_rows * pitch;
  A* const d_scores = weights + simt_rows * (simt_rows + 1);
  int const kv_heads = a.heads / a.share;
  int const kv_head = static_cast<int>(blockIdx.x % static_cast<unsigned>(kv_heads));
  tile const t = a.map.find<simt_rows>(blockIdx.x / static_cast<unsigned>(kv_heads));
  if (t.rows == 0) return;
  std::int64_t const first = t.first + t.begin;
  load_simt_tile(k_tile, a.k.at(t.batch, first, kv_head), a.k.row, t.rows, head_dim);
  load_simt_tile(v_tile, a.v.at(t.batch, first, kv_head), a.v.row, t.rows, head_dim);
  int const row = static_cast<int>(threadIdx.x) / simt_rows, column = static_cast<int>(threadIdx.x) % simt_rows;
  A d_k[simt_columns] = {}, d_v[simt_columns] = {};
  for (int head = kv_head * a.share; head < (kv_head + 1) * a.share; ++head)
    for (std::int64_t query = t.begin; query < t.length; query += simt_rows) {
      load_simt_tile(q_tile, a.q.at(t.batch, t.first + query, head), a.q.row, t.length - query, head_dim);
      load_simt_tile(d_y_tile, a.d_y.at(t.batch, t.first + query, head), a.d_y.row, t.length - query, head_dim);
      __syncthreads();
      A weight = 0, d_score = 0;
      if (query + column < t.length && t.begin + row <= query + column) {
        std::int64_t const at = t.first + query + column;
        A const lse = a.lse[t.batch * a.lse_batch + head * a.lse_head + at] * static_cast<A>(attention_math::log2_e);
        A const delta = a.delta[t.batch * a.delta_batch + head * a.delta_head + at];
        weight = math::exp2(row_product(k_tile + row * pitch, q_tile + column * pitch, head_dim) * a.scale - lse);
        d_score = weight * (row_product(v_tile + row * pitch, d_y_tile + column * pitch, head_dim) - delta);
      }
      weights[row * (simt_rows + 1) + column] = weight;
      d_scores[row * (simt_rows + 1) + column] = d_score;
      __syncthreads();
      add_rows(d_v, weights + row * (simt_rows + 1), d_y_tile, head_dim, column);
      add_rows(d_k, d_scores + row * (simt_rows + 1), q_tile, head_dim, column);
      __syncthreads();
    }
  stage_sums(q_tile, d_k, head_dim, row, column);
  stage_sums(d_y_tile, d_v, head_dim, row, column);
  __syncthreads();
  write_turned_back<simt_threads>(q_tile, pitch, t.rows, head_dim, a.inverse_root,
                                  a.angles ? a.angles + t.begin * head_dim : nullptr, a.d_k.at(t.batch, first, kv_head),
                                  a.d_k.row);
  write_turned_back<simt_threads>(d_y_tile, pitch, t.rows, head_dim, A(1), static_cast<A const*>(nullptr),
                                  a.d_v.at(t.batch, first, kv_head), a.d_v.row);
}

}  // namespace blackmamba::attention_cuda
