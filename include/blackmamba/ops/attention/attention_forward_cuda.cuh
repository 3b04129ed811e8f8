#pragma once
#include <blackmamba/ops/attention/attention_tiles_cuda.cuh>

#include <cmath>
#include <limits>

/// Attention forward on tensor cores, for T = bfloat16 and half, HeadDim = 32, 64, 96, 128, 256 (heads are padded with
/// zeros in shared memory to the next of these). A block of four warps owns 128 queries of one head (64 beyond 128
/// elements) and goes over the keys that they see, 64 at a time from the sequence's first on, two tiles in flight. On
/// devices whose shared memory does not hold those for HeadDim = 128 or 256, the tiles have 32 keys.
///
/// Operations bound it: 4 dh L^2 / 2 for a head. mma.sync reads its right operand from shared memory for every 16 rows
/// of the left one; two row groups for each warp halve that traffic, without which it would bind at half the rate.
namespace blackmamba::attention_cuda {

template <class T>
struct forward_arguments {
  heads_view<T const> q, k, v;
  heads_view<T> y;
  accum_t<T>* lse = nullptr;  // (B, Hq, L), or null
  std::int64_t lse_batch = 0, lse_head = 0;
  accum_t<T> const* angles = nullptr;  // of the queries: a row for each position, or with a cache for each token
  sequence_map map;
  std::int32_t const* past = nullptr;  // tokens in the cache before these, for each sequence; k and v are the cache
  std::int64_t capacity = std::numeric_limits<std::int64_t>::max();  // of the cache
  int heads = 0, share = 0, head_dim = 0;
  accum_t<T> scale = 0;  // log2(e) / sqrt(dh)
  bool q_vectorised = false, kv_vectorised = false, y_paired = false;
};

template <int HeadDim, int Keys = 64>
struct forward_shape {
  static constexpr int threads = 128;
  static constexpr int groups = HeadDim > 128 ? 1 : 2;  // of 16 queries, for each warp
  static constexpr int queries = 64 * groups, keys = Keys;
  static constexpr std::size_t shared_bytes = (queries + 4 * keys) * row_pitch<HeadDim> * std::size_t{2};
};

template <class T, int HeadDim, int Keys = 64>
__global__ void __launch_bounds__(128) forward_tiles(forward_arguments<T> const a) {
  using shape = forward_shape<HeadDim, Keys>;
  constexpr int groups = shape::groups, keys = shape::keys, pitch = row_pitch<HeadDim>;
  extern __shared__ uint4 attention_memory[];
  T* const q_tile = reinterpret_cast<T*>(attention_memory);
  T* const k_tiles = q_tile + shape::queries * pitch;
  T* const v_tiles = k_tiles + 2 * keys * pitch;

  int const head = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.heads));
  tile const t = a.map.find<shape::queries>(blockIdx.x / static_cast<unsigned>(a.heads));
  if (t.rows == 0) return;
  std::int64_t const past = a.past ? a.past[t.sequence] : 0;
  std::int64_t const all_keys = min(past + t.begin + t.rows, a.capacity);
  T const* const k = a.past ? a.k.at(t.sequence, 0, head / a.share) : a.k.at(t.batch, t.first, head / a.share);
  T const* const v = a.past ? a.v.at(t.sequence, 0, head / a.share) : a.v.at(t.batch, t.first, head / a.share);
  auto const load_keys = [&](std::int64_t key) {
    int const stage = static_cast<int>(key / keys % 2);
    std::int64_t const left = all_keys - key;
    int const count = left < keys ? static_cast<int>(left) : keys;
    load_tile<HeadDim, keys, 128>(k_tiles + stage * keys * pitch, k + key * a.k.row, a.k.row, count, a.head_dim,
                                  a.kv_vectorised);
    load_tile<HeadDim, keys, 128>(v_tiles + stage * keys * pitch, v + key * a.v.row, a.v.row, count, a.head_dim,
                                  a.kv_vectorised);
    cuda::commit_copies();
  };
  load_keys(0);
  T const* const q = a.q.at(t.batch, t.first + t.begin, head);
  if (a.angles) {
    std::int64_t const row = a.past ? t.batch * a.map.length + t.first + t.begin : t.begin;
    load_tile_turned<HeadDim, shape::queries, 128>(q_tile, q, a.q.row, t.rows, a.head_dim, a.q_vectorised,
                                                   a.angles + row * a.head_dim);
  } else {
    load_tile<HeadDim, shape::queries, 128>(q_tile, q, a.q.row, t.rows, a.head_dim, a.q_vectorised);
    cuda::commit_copies();
  }

  int const warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  int const warp_row = warp * 16 * groups;
  float sums[groups][HeadDim / 8][4] = {};
  float top[groups][2], total[groups][2] = {};
#pragma unroll
  for (int g = 0; g < groups; ++g) top[g][0] = top[g][1] = -INFINITY;

  for (std::int64_t key = 0; key < all_keys; key += keys) {
    cuda::wait_for_copies<0>();
    __syncthreads();
    if (key + keys < all_keys) load_keys(key + keys);
    T const* const k_tile = k_tiles + key / keys % 2 * keys * pitch;
    T const* const v_tile = v_tiles + key / keys % 2 * keys * pitch;
    // Query i of the tile sees keys up to past + begin + i, those up to ahead + i of this tile of keys.
    int const ahead = static_cast<int>(past + t.begin - key < keys ? past + t.begin - key : keys);
    if (ahead + warp_row + 16 * groups - 1 < 0) continue;

    float scores[groups][keys / 8][4] = {};
#pragma unroll
    for (int d = 0; d < HeadDim; d += 16) {
      std::uint32_t left[groups][4];
#pragma unroll
      for (int g = 0; g < groups; ++g) load_left<HeadDim>(left[g], q_tile, warp_row + 16 * g, d);
#pragma unroll
      for (int j = 0; j < keys / 16; ++j) {
        std::uint32_t right[4];
        load_right_rows<HeadDim>(right, k_tile, 16 * j, d);
        multiply_pair<T>(scores, left, right, j);
      }
    }
    if (ahead + warp_row < keys - 1) {
#pragma unroll
      for (int g = 0; g < groups; ++g)
#pragma unroll
        for (int j = 0; j < keys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            int const row = warp_row + 16 * g + lane / 4 + e / 2 * 8, column = 8 * j + lane % 4 * 2 + e % 2;
            if (column > ahead + row) scores[g][j][e] = -INFINITY;
          }
    }
#pragma unroll
    for (int g = 0; g < groups; ++g)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float most = top[g][h];
#pragma unroll
        for (int j = 0; j < keys / 8; ++j) most = fmaxf(most, fmaxf(scores[g][j][2 * h], scores[g][j][2 * h + 1]));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        float const factor = cuda::power_of_two((top[g][h] - most) * a.scale), shift = most * a.scale;
        top[g][h] = most;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < keys / 8; ++j)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            scores[g][j][e] = cuda::power_of_two(fmaf(scores[g][j][e], a.scale, -shift));
            sum += scores[g][j][e];
          }
        total[g][h] = fmaf(total[g][h], factor, sum);
#pragma unroll
        for (int d = 0; d < HeadDim / 8; ++d) {
          sums[g][d][2 * h] *= factor;
          sums[g][d][2 * h + 1] *= factor;
        }
      }
#pragma unroll
    for (int j = 0; j < keys / 16; ++j) {
      std::uint32_t left[groups][4];
#pragma unroll
      for (int g = 0; g < groups; ++g) as_left<T>(left[g], scores[g][2 * j], scores[g][2 * j + 1]);
#pragma unroll
      for (int d = 0; d < HeadDim / 16; ++d) {
        std::uint32_t right[4];
        load_right_columns<HeadDim>(right, v_tile, 16 * j, 16 * d);
        multiply_pair<T>(sums, left, right, d);
      }
    }
  }

#pragma unroll
  for (int g = 0; g < groups; ++g)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = total[g][h];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      int const row = warp_row + 16 * g + lane / 4 + 8 * h;
      if (row >= t.rows) continue;
      std::int64_t const at = t.first + t.begin + row;
      if (a.lse && lane % 4 == 0)
        a.lse[t.batch * a.lse_batch + head * a.lse_head + at] =
            fmaf(top[g][h] * a.scale, static_cast<float>(attention_math::ln_2), logf(sum));
      T* const y = a.y.at(t.batch, at, head);
      float const inverse = 1.0f / sum;
#pragma unroll
      for (int d = 0; d < HeadDim / 8; ++d) {
        int const column = 8 * d + lane % 4 * 2;
        if (column >= a.head_dim) continue;
        float const low = sums[g][d][2 * h] * inverse, high = sums[g][d][2 * h + 1] * inverse;
        if (a.y_paired) {
          *reinterpret_cast<std::uint32_t*>(y + column) = cuda::packed_pair<T>(low, high);
        } else {
          y[column] = convert<T>(low);
          y[column + 1] = convert<T>(high);
        }
      }
    }
}

}  // namespace blackmamba::attention_cuda
