#pragma once
#include <blackmamba/ops/attention/attention_tiles_cuda.cuh>

#include <cmath>

/// Attention backward on tensor cores, for T = bfloat16 and half, HeadDim as forward. Scores are computed again in two
/// kernels: one whose blocks own queries and sum d_q over keys, one whose blocks own keys and sum d_k and d_v over
/// queries and over the heads that share them. Every sum has one owner and one order: 7 products for each pair of
/// tiles, where adding d_q up across blocks by atomics would take 5.
namespace blackmamba::attention_cuda {

template <class T>
struct gradient_arguments {
  heads_view<T const> q, k, v, d_y;  // q and k as the scores use them: turned
  heads_view<T> d_q, d_k, d_v;
  accum_t<T> const* lse = nullptr;    // (B, Hq, L)
  accum_t<T> const* delta = nullptr;  // (B, Hq, L)  d_y . y
  std::int64_t lse_batch = 0, lse_head = 0, delta_batch = 0, delta_head = 0;
  accum_t<T> const* angles = nullptr;  // (L, dh), or null
  sequence_map map;
  int heads = 0, share = 0, head_dim = 0;
  accum_t<T> scale = 0;         // log2(e) / sqrt(dh)
  accum_t<T> inverse_root = 0;  // 1 / sqrt(dh)
  bool q_vectorised = false, kv_vectorised = false, d_y_vectorised = false;
};

template <int HeadDim>
struct query_gradient_shape {
  static constexpr int threads = 128;
  static constexpr int groups = HeadDim > 128 ? 1 : 2;
  static constexpr int queries = 64 * groups, keys = 32;
  static constexpr std::size_t shared_bytes = (2 * queries + 4 * keys) * row_pitch<HeadDim> * std::size_t{2};
  static_assert(queries * (HeadDim + 4) * sizeof(float) <= shared_bytes);
};

template <class T, int HeadDim>
__global__ void __launch_bounds__(128) query_gradient_tiles(gradient_arguments<T> const a) {
  using shape = query_gradient_shape<HeadDim>;
  constexpr int groups = shape::groups, keys = shape::keys, pitch = row_pitch<HeadDim>;
  extern __shared__ uint4 attention_memory[];
  T* const q_tile = reinterpret_cast<T*>(attention_memory);
  T* const d_y_tile = q_tile + shape::queries * pitch;
  T* const k_tiles = d_y_tile + shape::queries * pitch;
  T* const v_tiles = k_tiles + 2 * keys * pitch;

  int const head = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.heads));
  tile const t = a.map.find<shape::queries>(blockIdx.x / static_cast<unsigned>(a.heads));
  if (t.rows == 0) return;
  std::int64_t const all_keys = t.begin + t.rows;
  T const* const k = a.k.at(t.batch, t.first, head / a.share);
  T const* const v = a.v.at(t.batch, t.first, head / a.share);
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
  load_tile<HeadDim, shape::queries, 128>(q_tile, a.q.at(t.batch, t.first + t.begin, head), a.q.row, t.rows, a.head_dim,
                                          a.q_vectorised);
  load_tile<HeadDim, shape::queries, 128>(d_y_tile, a.d_y.at(t.batch, t.first + t.begin, head), a.d_y.row, t.rows,
                                          a.head_dim, a.d_y_vectorised);
  cuda::commit_copies();

  int const warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  int const warp_row = warp * 16 * groups;
  float lse[groups][2], delta[groups][2];
#pragma unroll
  for (int g = 0; g < groups; ++g)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int const row = warp_row + 16 * g + lane / 4 + 8 * h;
      std::int64_t const at = t.first + t.begin + row;
      bool const real = row < t.rows;
      lse[g][h] =
          real ? a.lse[t.batch * a.lse_batch + head * a.lse_head + at] * static_cast<float>(attention_math::log2_e)
               : INFINITY;
      delta[g][h] = real ? a.delta[t.batch * a.delta_batch + head * a.delta_head + at] : 0.0f;
    }
  float sums[groups][HeadDim / 8][4] = {};

  for (std::int64_t key = 0; key < all_keys; key += keys) {
    cuda::wait_for_copies<0>();
    __syncthreads();
    if (key + keys < all_keys) load_keys(key + keys);
    T const* const k_tile = k_tiles + key / keys % 2 * keys * pitch;
    T const* const v_tile = v_tiles + key / keys % 2 * keys * pitch;
    int const ahead = static_cast<int>(t.begin - key < keys ? t.begin - key : keys);
    if (ahead + warp_row + 16 * groups - 1 < 0) continue;  // no query of this warp sees a key of the tile

    float scores[groups][keys / 8][4] = {}, d_weights[groups][keys / 8][4] = {};
#pragma unroll
    for (int d = 0; d < HeadDim; d += 16) {
      std::uint32_t queries[groups][4], d_y[groups][4];
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        load_left<HeadDim>(queries[g], q_tile, warp_row + 16 * g, d);
        load_left<HeadDim>(d_y[g], d_y_tile, warp_row + 16 * g, d);
      }
#pragma unroll
      for (int j = 0; j < keys / 16; ++j) {
        std::uint32_t right[4];
        load_right_rows<HeadDim>(right, k_tile, 16 * j, d);
        multiply_pair<T>(scores, queries, right, j);
        load_right_rows<HeadDim>(right, v_tile, 16 * j, d);
        multiply_pair<T>(d_weights, d_y, right, j);
      }
    }
    bool const masked = ahead + warp_row < keys - 1;
#pragma unroll
    for (int g = 0; g < groups; ++g)
#pragma unroll
      for (int j = 0; j < keys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          int const row = warp_row + 16 * g + lane / 4 + e / 2 * 8, column = 8 * j + lane % 4 * 2 + e % 2;
          float const weight = cuda::power_of_two(fmaf(scores[g][j][e], a.scale, -lse[g][e / 2]));
          float const d_score = weight * (d_weights[g][j][e] - delta[g][e / 2]);
          scores[g][j][e] = masked && column > ahead + row ? 0.0f : d_score;
        }
#pragma unroll
    for (int j = 0; j < keys / 16; ++j) {
      std::uint32_t left[groups][4];
#pragma unroll
      for (int g = 0; g < groups; ++g) as_left<T>(left[g], scores[g][2 * j], scores[g][2 * j + 1]);
#pragma unroll
      for (int d = 0; d < HeadDim / 16; ++d) {
        std::uint32_t right[4];
        load_right_columns<HeadDim>(right, k_tile, 16 * j, 16 * d);
        multiply_pair<T>(sums, left, right, d);
      }
    }
  }

  __syncthreads();
  float* const out = reinterpret_cast<float*>(attention_memory);
  constexpr int out_pitch = HeadDim + 4;
#pragma unroll
  for (int g = 0; g < groups; ++g)
#pragma unroll
    for (int d = 0; d < HeadDim / 8; ++d)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        out[(warp_row + 16 * g + lane / 4 + e / 2 * 8) * out_pitch + 8 * d + lane % 4 * 2 + e % 2] = sums[g][d][e];
  __syncthreads();
  write_turned_back<128>(out, out_pitch, t.rows, a.head_dim, a.inverse_root,
                         a.angles ? a.angles + t.begin * a.head_dim : nullptr,
                         a.d_q.at(t.batch, t.first + t.begin, head), a.d_q.row);
}

template <int HeadDim>
struct key_gradient_shape {
  static constexpr int parts = HeadDim > 128 ? 2 : 1;  // warps that share rows divide the columns of the sums
  static constexpr int threads = 128 * parts;
  static constexpr int groups = HeadDim > 64 ? 1 : 2;
  static constexpr int keys = 64 * groups, queries = HeadDim == 96 || HeadDim == 128 ? 64 : 32;
  static constexpr std::size_t tile_bytes = (2 * keys + 4 * queries) * row_pitch<HeadDim> * std::size_t{2};
  static constexpr std::size_t shared_bytes = tile_bytes + 4 * queries * sizeof(float);
  static_assert(keys * (HeadDim + 4) * sizeof(float) <= tile_bytes);
};

template <class T, int HeadDim>
__global__ void __launch_bounds__(key_gradient_shape<HeadDim>::threads)
    key_gradient_tiles(gradient_arguments<T> const a) {
  using shape = key_gradient_shape<HeadDim>;
  constexpr int groups = shape::groups, count = shape::queries, pitch = row_pitch<HeadDim>, threads = shape::threads;
  constexpr int columns = HeadDim / shape::parts;
  extern __shared__ uint4 attention_memory[];
  T* const k_tile = reinterpret_cast<T*>(attention_memory);
  T* const v_tile = k_tile + shape::keys * pitch;
  T* const q_tiles = v_tile + shape::keys * pitch;
  T* const d_y_tiles = q_tiles + 2 * count * pitch;
  float* const lse_tiles = reinterpret_cast<float*>(d_y_tiles + 2 * count * pitch);
  float* const delta_tiles = lse_tiles + 2 * count;

  int const kv_heads = a.heads / a.share;
  int const kv_head = static_cast<int>(blockIdx.x % static_cast<unsigned>(kv_heads));
  // The first keys have the most queries: tiles are numbered from the other end.
  std::int64_t const number =
      gridDim.x / static_cast<unsigned>(kv_heads) - 1 - blockIdx.x / static_cast<unsigned>(kv_heads);
  tile const t = a.map.find<shape::keys>(number);
  if (t.rows == 0) return;
  std::int64_t const tiles = (t.length - t.begin + count - 1) / count;  // of queries, for each head
  std::int64_t const steps = tiles * a.share;
  auto const load_queries = [&](std::int64_t step) {
    int const stage = static_cast<int>(step % 2), head = kv_head * a.share + static_cast<int>(step / tiles);
    std::int64_t const query = t.begin + step % tiles * count, left = t.length - query;
    int const rows = left < count ? static_cast<int>(left) : count;
    load_tile<HeadDim, count, threads>(q_tiles + stage * count * pitch, a.q.at(t.batch, t.first + query, head), a.q.row,
                                       rows, a.head_dim, a.q_vectorised);
    load_tile<HeadDim, count, threads>(d_y_tiles + stage * count * pitch, a.d_y.at(t.batch, t.first + query, head),
                                       a.d_y.row, rows, a.head_dim, a.d_y_vectorised);
    cuda::commit_copies();
    int const i = static_cast<int>(threadIdx.x);
    if (i < count) {
      std::int64_t const at = t.first + query + i;
      lse_tiles[stage * count + i] =
          i < rows ? a.lse[t.batch * a.lse_batch + head * a.lse_head + at] * static_cast<float>(attention_math::log2_e)
                   : INFINITY;
      delta_tiles[stage * count + i] = i < rows ? a.delta[t.batch * a.delta_batch + head * a.delta_head + at] : 0.0f;
    }
  };
  load_tile<HeadDim, shape::keys, threads>(k_tile, a.k.at(t.batch, t.first + t.begin, kv_head), a.k.row, t.rows,
                                           a.head_dim, a.kv_vectorised);
  load_tile<HeadDim, shape::keys, threads>(v_tile, a.v.at(t.batch, t.first + t.begin, kv_head), a.v.row, t.rows,
                                           a.head_dim, a.kv_vectorised);
  load_queries(0);

  int const warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  int const warp_row = warp % 4 * 16 * groups, first_column = warp / 4 * columns;
  float d_k[groups][columns / 8][4] = {}, d_v[groups][columns / 8][4] = {};

  for (std::int64_t step = 0; step < steps; ++step) {
    cuda::wait_for_copies<0>();
    __syncthreads();
    if (step + 1 < steps) load_queries(step + 1);
    int const stage = static_cast<int>(step % 2);
    T const* const q_tile = q_tiles + stage * count * pitch;
    T const* const d_y_tile = d_y_tiles + stage * count * pitch;
    float const* const lse = lse_tiles + stage * count;
    float const* const delta = delta_tiles + stage * count;
    // Rows are keys, columns queries: key j reaches query i where j <= ahead + i.
    std::int64_t const distance = step % tiles * count;
    int const ahead = static_cast<int>(distance < shape::keys ? distance : shape::keys);
    if (ahead + count - 1 < warp_row) continue;

    float scores[groups][count / 8][4] = {}, d_weights[groups][count / 8][4] = {};
#pragma unroll
    for (int d = 0; d < HeadDim; d += 16) {
      std::uint32_t k[groups][4], v[groups][4];
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        load_left<HeadDim>(k[g], k_tile, warp_row + 16 * g, d);
        load_left<HeadDim>(v[g], v_tile, warp_row + 16 * g, d);
      }
#pragma unroll
      for (int j = 0; j < count / 16; ++j) {
        std::uint32_t right[4];
        load_right_rows<HeadDim>(right, q_tile, 16 * j, d);
        multiply_pair<T>(scores, k, right, j);
        load_right_rows<HeadDim>(right, d_y_tile, 16 * j, d);
        multiply_pair<T>(d_weights, v, right, j);
      }
    }
    bool const masked = ahead < warp_row + 16 * groups - 1;
#pragma unroll
    for (int j = 0; j < count / 8; ++j) {
      int const column = 8 * j + lane % 4 * 2;
      float2 const lse_pair = *reinterpret_cast<float2 const*>(lse + column);
      float2 const delta_pair = *reinterpret_cast<float2 const*>(delta + column);
#pragma unroll
      for (int g = 0; g < groups; ++g)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          int const row = warp_row + 16 * g + lane / 4 + e / 2 * 8;
          float weight = cuda::power_of_two(fmaf(scores[g][j][e], a.scale, -(e % 2 ? lse_pair.y : lse_pair.x)));
          if (masked && row > ahead + column + e % 2) weight = 0;
          scores[g][j][e] = weight;
          d_weights[g][j][e] = weight * (d_weights[g][j][e] - (e % 2 ? delta_pair.y : delta_pair.x));
        }
    }
#pragma unroll
    for (int j = 0; j < count / 16; ++j) {
      std::uint32_t weights[groups][4], d_scores[groups][4];
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        as_left<T>(weights[g], scores[g][2 * j], scores[g][2 * j + 1]);
        as_left<T>(d_scores[g], d_weights[g][2 * j], d_weights[g][2 * j + 1]);
      }
#pragma unroll
      for (int d = 0; d < columns / 16; ++d) {
        std::uint32_t right[4];
        load_right_columns<HeadDim>(right, d_y_tile, 16 * j, first_column + 16 * d);
        multiply_pair<T>(d_v, weights, right, d);
        load_right_columns<HeadDim>(right, q_tile, 16 * j, first_column + 16 * d);
        multiply_pair<T>(d_k, d_scores, right, d);
      }
    }
  }

  float* const out = reinterpret_cast<float*>(attention_memory);
  constexpr int out_pitch = HeadDim + 4;
  auto const write = [&](float const(&sums)[groups][columns / 8][4], float factor, float const* angles,
                         heads_view<T> const& to) {
    __syncthreads();
#pragma unroll
    for (int g = 0; g < groups; ++g)
#pragma unroll
      for (int d = 0; d < columns / 8; ++d)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          out[(warp_row + 16 * g + lane / 4 + e / 2 * 8) * out_pitch + first_column + 8 * d + lane % 4 * 2 + e % 2] =
              sums[g][d][e];
    __syncthreads();
    write_turned_back<threads>(out, out_pitch, t.rows, a.head_dim, factor, angles,
                               to.at(t.batch, t.first + t.begin, kv_head), to.row);
  };
  write(d_v, 1.0f, nullptr, a.d_v);
  write(d_k, a.inverse_root, a.angles ? a.angles + t.begin * a.head_dim : nullptr, a.d_k);
}

}  // namespace blackmamba::attention_cuda
