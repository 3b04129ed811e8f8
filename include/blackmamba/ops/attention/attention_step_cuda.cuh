#pragma once
#include <blackmamba/core/cuda/reduce_cuda.cuh>
#include <blackmamba/ops/attention/attention.hpp>
#include <blackmamba/ops/attention/attention_rows_cuda.cuh>

#include <cmath>

/// One query for each sequence against its cache: 2 L Hkv dh elements are read once, which bounds it; the arithmetic is
/// a few operations for each element. A sequence is divided into parts (attention::step_part, by its own length alone);
/// a block takes one part of one key/value head for up to Group query heads, and leaves maximum, sum and weighted
/// values; a second kernel adds the parts in order.
///
/// Lanes = 8, 16, 32 lanes share a key, 8 elements each (dh up to 64, 128, 256): scores take shuffles, no shared
/// memory, and every lane has its elements of several keys and values in flight. Group = 1, 4.
namespace blackmamba::attention_cuda {

template <class T>
struct step_arguments {
  heads_view<T const> q, k, v;  // row: none
  heads_view<T> key, value, y;
  std::int32_t* length = nullptr;  // (B)  tokens before this one; the second kernel counts it in
  std::int32_t* held = nullptr;    // (B)  the same, for the second kernel; at most capacity - 1
  accum_t<T>* partial = nullptr;   // (B, splits, Hq, dh + 2)  weighted values, then maximum and sum
  std::int64_t batch = 0, splits = 0, capacity = 0;
  int heads = 0, share = 0, head_dim = 0;
  accum_t<T> scale = 0;  // log2(e) / sqrt(dh)
  rotary turn;           // base 0: none
  bool vectorised = false;
};

/// Eight elements as they lie in memory.
template <class T>
union eight {
  static constexpr int words = static_cast<int>(sizeof(T) / 2);
  uint4 word[words];
  T element[8];
  __device__ __forceinline__ eight() {}
  /// The first `count` at p, zeros beyond.
  __device__ __forceinline__ void load(T const* p, int count, bool vectorised) {
    if (vectorised && count == 8) {
#pragma unroll
      for (int i = 0; i < words; ++i) word[i] = reinterpret_cast<uint4 const*>(p)[i];
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) element[i] = i < count ? p[i] : convert<T>(0.0f);
    }
  }
};

inline constexpr int step_threads = 128;

template <class T, int Lanes, int Group>
__global__ void __launch_bounds__(step_threads) step_parts(step_arguments<T> const a) {
  using A = accum_t<T>;
  constexpr int teams = step_threads / Lanes;
  constexpr int unrolled = sizeof(T) == 2 ? 4 : sizeof(T) == 4 ? 2 : 1;
  constexpr A nothing = -static_cast<A>(INFINITY);
  __shared__ A angles[attention::max_head_dim];
  __shared__ A queries[Group][Lanes * 8];
  __shared__ A team_sums[teams][Lanes * 8];
  __shared__ A team_tops[teams], team_totals[teams];

  int const kv_heads = a.heads / a.share, groups = (a.share + Group - 1) / Group, head_dim = a.head_dim;
  unsigned const units = static_cast<unsigned>(kv_heads * groups);
  int const unit = static_cast<int>(blockIdx.x % units), kv_head = unit / groups, group = unit % groups;
  std::int64_t const split = blockIdx.x / units % a.splits, b = blockIdx.x / units / a.splits;
  // Where the cache is full the new token is dropped, and the last key an old one.
  std::int64_t const before = a.length[b], last = min(before, a.capacity - 1);
  std::int64_t const part = attention::step_part(last + 1, kv_heads), first = split * part;
  if (first > last) return;
  std::int64_t const end = first + part <= last ? first + part : last + 1;
  int const thread = static_cast<int>(threadIdx.x), team = thread / Lanes, column = thread % Lanes * 8;
  int const elements = head_dim - column < 0 ? 0 : head_dim - column < 8 ? head_dim - column : 8;
  int const first_head = kv_head * a.share + group * Group;
  int const count = a.share - group * Group < Group ? a.share - group * Group : Group;
  if (split == 0 && unit == 0 && thread == 0) a.held[b] = static_cast<std::int32_t>(last);

  T* const keys = a.key.at(b, 0, kv_head);
  T* const values = a.value.at(b, 0, kv_head);
  eight<T> k[unrolled], v[unrolled];
  bool const has_new = before < a.capacity && end > last;
  auto const load = [&](eight<T>(&to)[unrolled], T const* from, std::int64_t row, std::int64_t key, std::int64_t held) {
#pragma unroll
    for (int u = 0; u < unrolled; ++u) {
      std::int64_t const j = key + u * teams + team;
      to[u].load(from + j * row + column, j < held ? elements : 0, a.vectorised);
    }
  };
  load(k, keys, a.key.row, first, has_new ? last : end);
  load(v, values, a.value.row, first, has_new ? last : end);

  // While these are under way: angles, the new key and value, the queries.
  int const half = head_dim / 2;
  bool const turned = a.turn.base != 0;
  for (int m = thread; turned && m < half; m += step_threads) {
    auto const pair = a.turn.template at<A>(before, m);
    angles[m] = pair.first;
    angles[half + m] = pair.second;
  }
  __syncthreads();
  for (int m = thread; has_new && m < half; m += step_threads) {
    T const* const new_key = a.k.at(b, 0, kv_head);
    T const* const new_value = a.v.at(b, 0, kv_head);
    T first_element = new_key[m], second_element = new_key[m + half];
    if (turned) turn_pair(first_element, second_element, angles[m], angles[half + m], first_element, second_element);
    keys[last * a.key.row + m] = first_element;
    keys[last * a.key.row + m + half] = second_element;
    values[last * a.value.row + m] = new_value[m];
    values[last * a.value.row + m + half] = new_value[m + half];
  }
  for (int i = thread; i < count * half; i += step_threads) {
    int const g = i / half, m = i % half;
    T const* const q = a.q.at(b, 0, first_head + g);
    attention_math::pair_of<A> pair{widen(q[m]), widen(q[m + half])};
    if (turned) pair = attention_math::rotate<A>(pair, angles[m], angles[half + m]);
    queries[g][m] = pair.first * a.scale;
    queries[g][m + half] = pair.second * a.scale;
  }
  for (int i = thread; i < Group * (Lanes * 8 - head_dim); i += step_threads)
    queries[i / (Lanes * 8 - head_dim)][head_dim + i % (Lanes * 8 - head_dim)] = 0;
  __syncthreads();
  if (has_new) {  // again: the new token's may be among them
    load(k, keys, a.key.row, first, end);
    load(v, values, a.value.row, first, end);
  }
  A q[Group][8];
#pragma unroll
  for (int g = 0; g < Group; ++g)
#pragma unroll
    for (int i = 0; i < 8; ++i) q[g][i] = g < count ? queries[g][column + i] : A(0);

  A top[Group], total[Group] = {}, sums[Group][8] = {};
#pragma unroll
  for (int g = 0; g < Group; ++g) top[g] = nothing;
  for (std::int64_t key = first; key < end; key += unrolled * teams) {
    A scores[Group][unrolled];
#pragma unroll
    for (int u = 0; u < unrolled; ++u) {
      A x[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = widen(k[u].element[i]);
#pragma unroll
      for (int g = 0; g < Group; ++g) {
        if (g >= count) continue;
        A sum = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = math::fma(q[g][i], x[i], sum);
        scores[g][u] = sum;
      }
    }
    if (key + unrolled * teams < end) load(k, keys, a.key.row, key + unrolled * teams, end);
#pragma unroll
    for (int g = 0; g < Group; ++g) {
      if (g >= count) continue;
      A most = top[g];
#pragma unroll
      for (int u = 0; u < unrolled; ++u) {
        scores[g][u] = cuda::warp_sum<Lanes>(scores[g][u]);
        if (key + u * teams + team >= end) scores[g][u] = nothing;
        most = math::max(most, scores[g][u]);
      }
      A const shift = most == nothing ? A(0) : most, factor = math::exp2(top[g] - shift);
      top[g] = most;
      total[g] *= factor;
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[g][i] *= factor;
#pragma unroll
      for (int u = 0; u < unrolled; ++u) {
        scores[g][u] = math::exp2(scores[g][u] - shift);
        total[g] += scores[g][u];
      }
    }
#pragma unroll
    for (int u = 0; u < unrolled; ++u) {
      A x[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = widen(v[u].element[i]);
#pragma unroll
      for (int g = 0; g < Group; ++g) {
        if (g >= count) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[g][i] = math::fma(scores[g][u], x[i], sums[g][i]);
      }
    }
    if (key + unrolled * teams < end) load(v, values, a.value.row, key + unrolled * teams, end);
  }

#pragma unroll
  for (int g = 0; g < Group; ++g) {
    if (g >= count) continue;
    if (column == 0) {
      team_tops[team] = top[g];
      team_totals[team] = total[g];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) team_sums[team][column + i] = sums[g][i];
    __syncthreads();
    A most = team_tops[0];
#pragma unroll
    for (int i = 1; i < teams; ++i) most = math::max(most, team_tops[i]);
    A* const out = a.partial + ((b * a.splits + split) * a.heads + first_head + g) * (head_dim + 2);
    for (int d = thread; d < head_dim + 1; d += step_threads) {
      A sum = 0;
#pragma unroll
      for (int i = 0; i < teams; ++i)
        sum = math::fma(math::exp2(team_tops[i] - most), d < head_dim ? team_sums[i][d] : team_totals[i], sum);
      out[d < head_dim ? d : head_dim + 1] = sum;
    }
    if (thread == 0) out[head_dim] = most;
    __syncthreads();
  }
}

/// The parts of one head, weighted by their maxima and added: in slices of the parts, each in order, then the slices.
template <class T>
__global__ void __launch_bounds__(256) add_step_parts(step_arguments<T> const a) {
  using A = accum_t<T>;
  constexpr int threads = 256;
  __shared__ A weights[attention::step_parts];
  __shared__ A slice_sums[threads];
  __shared__ A warp_memory[threads / 32];
  int const head_dim = a.head_dim, thread = static_cast<int>(threadIdx.x);
  int const head = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.heads));
  std::int64_t const b = blockIdx.x / static_cast<unsigned>(a.heads), keys = std::int64_t{a.held[b]} + 1;
  std::int64_t const part = attention::step_part(keys, a.heads / a.share);
  int const parts = static_cast<int>((keys + part - 1) / part);
  std::int64_t const pitch = std::int64_t{a.heads} * (head_dim + 2);
  A const* const from = a.partial + b * a.splits * pitch + head * (head_dim + 2);
  A most = -static_cast<A>(INFINITY);
  for (int p = thread; p < parts; p += threads) most = math::max(most, from[p * pitch + head_dim]);
  most = cuda::block_reduce<threads>(most, warp_memory, [](A x, A y) { return math::max(x, y); });
  A total = 0;
  for (int p = thread; p < parts; p += threads) {
    A const weight = math::exp2(from[p * pitch + head_dim] - most);
    weights[p] = weight;
    total = math::fma(weight, from[p * pitch + head_dim + 1], total);
  }
  total = cuda::block_sum<threads>(total, warp_memory);  // has a barrier, behind which the weights are there
  int const width = head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
  int const slices = threads / width, slice = thread / width, d = thread % width;
  A sum = 0;
  if (d < head_dim)
#pragma unroll 8
    for (int p = slice; p < parts; p += slices) sum = math::fma(weights[p], from[p * pitch + d], sum);
  slice_sums[thread] = sum;
  __syncthreads();
  if (slice == 0 && d < head_dim) {
    for (int i = 1; i < slices; ++i) sum += slice_sums[i * width + d];
    a.y.at(b, 0, head)[d] = convert<T>(sum / total);
  }
  if (head == 0 && thread == 0) a.length[b] = static_cast<std::int32_t>(keys);
}

}  // namespace blackmamba::attention_cuda
