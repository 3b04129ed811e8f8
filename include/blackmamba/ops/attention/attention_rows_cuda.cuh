#pragma once
#include <blackmamba/ops/attention/attention_tiles_cuda.cuh>

#include <cmath>
#include <numbers>

/// What attention does row by row around its products: angles, turning, the cache, d_y . y. A block for each token;
/// bound by memory, small beside the products.
namespace blackmamba::attention_cuda {

/// The angles of rotary positions; made in double, without a table.
struct rotary {
  double base = 0, exponent = 0;  // frequency m is base^(-2m / dh) = 2^(m exponent)
  int head_dim = 0;

  rotary() = default;
  rotary(float b, std::int64_t dh)
      : base(b),
        exponent(b > 0 ? -2 * std::log2(static_cast<double>(b)) / static_cast<double>(dh) : 0),
        head_dim(static_cast<int>(dh)) {}

  /// Cosine and sine of frequency m at a position.
  template <class A>
  __device__ __forceinline__ attention_math::pair_of<A> at(std::int64_t position, int m) const {
    double sine, cosine;
    if constexpr (std::is_same_v<A, double>) {
      ::sincos(static_cast<double>(position) * attention_math::rotary_frequency(m, head_dim, base), &sine, &cosine);
    } else {
      // In turns, so that whole ones drop out exactly: what is left is as precise as float wants it, in a few terms.
      double const turns = static_cast<double>(position) * ::exp2(m * exponent) * (0.5 * std::numbers::inv_pi);
      ::sincospi(2 * (turns - ::rint(turns)), &sine, &cosine);
    }
    return {static_cast<A>(cosine), static_cast<A>(sine)};
  }
};

/// Where a row of the tensors stands in its sequence.
struct token {
  std::int64_t sequence, index;
};
__device__ __forceinline__ token token_at(sequence_map const& map, std::int64_t row) {
  if (!map.offsets) return {row / map.length, row % map.length};
  std::int64_t const sequence = map.sequence_of(row);
  return {sequence, row - map.offsets[sequence]};
}

/// Angles of positions 0, 1, ...: (rows, dh), cosines then sines. With `past`, of the rows of a call that continues.
template <class A>
__global__ void __launch_bounds__(256)
    fill_angles(rotary const turn, sequence_map const map, std::int32_t const* past, std::int64_t rows, A* angles) {
  int const half = turn.head_dim / 2;
  std::int64_t const i = std::int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i >= rows * half) return;
  std::int64_t const row = i / half;
  int const m = static_cast<int>(i % half);
  std::int64_t position = row;
  if (past) {
    token const at = token_at(map, row);
    position = past[at.sequence] + at.index;
  }
  auto const pair = turn.at<A>(position, m);
  angles[row * turn.head_dim + m] = pair.first;
  angles[row * turn.head_dim + half + m] = pair.second;
}

/// One row of all heads, turned, to contiguous rows of all heads.
template <class T>
__device__ __forceinline__ void turn_heads(T const* from, std::int64_t from_head, T* to, std::int64_t to_head,
                                           int heads, int head_dim, accum_t<T> const* angles, bool vectorised) {
  constexpr int width = cuda::pack_width<T>;
  using A = accum_t<T>;
  int const half = head_dim / 2, threads = static_cast<int>(blockDim.x);
  if (vectorised) {
    int const pieces = half / width;
    for (int i = static_cast<int>(threadIdx.x); i < heads * pieces; i += threads) {
      int const head = i / pieces, m = i % pieces * width;
      T const* const source = from + head * from_head + m;
      auto a = cuda::load_pack<width>(source), b = cuda::load_pack<width>(source + half);
      auto const cosine = cuda::load_pack<width>(angles + m), sine = cuda::load_pack<width>(angles + half + m);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        auto const turned = attention_math::rotate<A>({a[j], b[j]}, cosine[j], sine[j]);
        a[j] = turned.first;
        b[j] = turned.second;
      }
      cuda::store_pack<width>(to + head * to_head + m, a);
      cuda::store_pack<width>(to + head * to_head + m + half, b);
    }
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < heads * half; i += threads) {
      int const head = i / half, m = i % half;
      T const* const source = from + head * from_head + m;
      T* const target = to + head * to_head + m;
      if (angles)
        turn_pair(source[0], source[half], angles[m], angles[half + m], target[0], target[half]);
      else {
        target[0] = source[0];
        target[half] = source[half];
      }
    }
  }
}

/// x (B, L, H, dh), turned, into contiguous rows.
template <class T>
__global__ void __launch_bounds__(128) turn_rows(heads_view<T const> const x, T* to, int heads, int head_dim,
                                                 sequence_map const map, accum_t<T> const* angles, bool vectorised) {
  std::int64_t const row = blockIdx.x, index = map.offsets ? token_at(map, row).index : row % map.length;
  turn_heads(x.at(row / map.length, row % map.length, 0), x.head, to + row * heads * head_dim, head_dim, heads,
             head_dim, angles + index * head_dim, vectorised);
}

/// Keys, turned, and values behind those that the cache holds; those beyond its capacity are dropped.
template <class T>
__global__ void __launch_bounds__(128)
    append_rows(heads_view<T const> const k, heads_view<T const> const v, heads_view<T> const key,
                heads_view<T> const value, std::int32_t const* held, std::int64_t capacity, int kv_heads, int head_dim,
                sequence_map const map, accum_t<T> const* angles) {
  std::int64_t const row = blockIdx.x;
  token const at = token_at(map, row);
  std::int64_t const to = held[at.sequence] + at.index;
  if (to >= capacity) return;
  std::int64_t const batch = row / map.length, i = row % map.length;
  turn_heads(k.at(batch, i, 0), k.head, key.at(at.sequence, to, 0), key.head, kv_heads, head_dim,
             angles ? angles + row * head_dim : nullptr, false);
  turn_heads<T>(v.at(batch, i, 0), v.head, value.at(at.sequence, to, 0), value.head, kv_heads, head_dim, nullptr,
                false);
}

template <int>
__global__ void __launch_bounds__(256)
    advance_lengths(sequence_map const map, std::int64_t capacity, std::int32_t* held) {
  std::int64_t const s = std::int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (s < map.count)
    held[s] = static_cast<std::int32_t>(
        min(held[s] + (map.offsets ? map.offsets[s + 1] - map.offsets[s] : map.length), capacity));
}

/// delta[b, h, i] = d_y[b, i, h] . y[b, i, h]: eight lanes for each head.
template <class T>
__global__ void __launch_bounds__(128)
    fill_delta(heads_view<T const> const y, heads_view<T const> const d_y, int heads, int head_dim, std::int64_t length,
               accum_t<T>* delta, bool vectorised) {
  constexpr int width = cuda::pack_width<T>;
  std::int64_t const row = blockIdx.x, batch = row / length, i = row % length;
  int const lane = static_cast<int>(threadIdx.x % 8);
  for (int first = 0; first < heads; first += 16) {
    int const head = first + static_cast<int>(threadIdx.x / 8);
    accum_t<T> sum = 0;
    if (head < heads) {
      T const *const a = y.at(batch, i, head), *const b = d_y.at(batch, i, head);
      if (vectorised)
        for (int d = lane * width; d < head_dim; d += 8 * width) {
          auto const x = cuda::load_pack<width>(a + d), z = cuda::load_pack<width>(b + d);
#pragma unroll
          for (int j = 0; j < width; ++j) sum = math::fma(x[j], z[j], sum);
        }
      else
        for (int d = lane; d < head_dim; d += 8) sum = math::fma(widen(a[d]), widen(b[d]), sum);
    }
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (head < heads && lane == 0) delta[(batch * heads + head) * length + i] = sum;
  }
}

}  // namespace blackmamba::attention_cuda
