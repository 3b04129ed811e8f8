#pragma once
#include <blackmamba/core/config.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/core/cpu/simd_lanes.hpp>
#include <blackmamba/core/numeric.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

/// Products of a few rows with a whole weight matrix, as decoding has them: bound by reading the weights, which are
/// therefore read once, in order, and widened in registers. Summation: each lane of a pack over the depth, then the
/// lanes pairwise, then what the depth has beyond whole packs.
namespace blackmamba::cpu::detail {

/// Most rows that matvec takes.
inline constexpr int matvec_rows = 8;

/// Calls body(integral_constant<int, 0>), ..., (N - 1): a loop whose indices are constants, so that what they index can
/// live in registers.
template <int N, int First = 0, class Body>
BLACKMAMBA_INLINE void unrolled(Body const& body) {
  if constexpr (First < N) {
    body(std::integral_constant<int, First>{});
    unrolled<N, First + 1>(body);
  }
}

template <int N, int Distance>
struct even_blocks {
  static constexpr int at(int i) { return (i & Distance) ? N + i - Distance : i; }
};
template <int N, int Distance>
struct odd_blocks {
  static constexpr int at(int i) { return (i & Distance) ? N + i : i + Distance; }
};
/// Exchanges blocks of Distance lanes between two packs: a keeps its blocks of even index and gets b's, b keeps those
/// of odd index and gets a's.
template <int Distance, class A, int N>
BLACKMAMBA_INLINE void exchange_blocks(simd::pack<A, N>& a, simd::pack<A, N>& b) {
  auto const even = simd::detail::shuffle<even_blocks<N, Distance>>(a, b);
  b = simd::detail::shuffle<odd_blocks<N, Distance>>(a, b);
  a = even;
}

/// Folds x to N lanes: the sums of the lanes whose indices are equal modulo N.
template <int N, class A, int Lanes>
BLACKMAMBA_INLINE simd::pack<A, N> folded(simd::pack<A, Lanes> x) {
  if constexpr (Lanes == N)
    return x;
  else
    return folded<N>(simd::half_of(x, false) + simd::half_of(x, true));
}
template <int Distance, class A>
BLACKMAMBA_INLINE void merge_packs(simd::pack<A>* x) {
  unrolled<Distance>([&](auto i) {
    exchange_blocks<Distance>(x[i], x[i + Distance]);
    x[i] += x[i + Distance];
  });
  if constexpr (Distance > 1) merge_packs<Distance / 2>(x);
}
/// sums[i] = sum of the lanes of x[i], for N packs, N a power of two: as in a transposition, but what meets is added.
template <int N, class A>
BLACKMAMBA_INLINE void lane_sums(simd::pack<A>* x, A* sums) {
  constexpr int width = simd::pack<A>::lanes;
  if constexpr (N > width) {
    lane_sums<N / 2>(x, sums);
    lane_sums<N / 2>(x + N / 2, sums + N / 2);
  } else if constexpr (N == 1) {
    sums[0] = simd::sum(x[0]);
  } else {
    merge_packs<N / 2>(x);
    folded<N>(x[0]).store(sums);
  }
}

/// y (rows, outputs) = x (rows, depth) weight (outputs, depth)^T + bias (outputs): dot products along contiguous
/// memory. There are at most Rows and Outputs of them; the last is read again in place of those that are missing.
///
/// @param ahead  prefetch what lies this many elements on, unless 0: rows are too short for the hardware to see far
///               ahead where arithmetic fills the time
template <int Rows, int Outputs, bool Prefetch, class A, class T, class Y>
BLACKMAMBA_INLINE void dot_block(int rows, int outputs, std::int64_t depth, A const* x, std::int64_t x_stride,
                                 T const* weight, std::int64_t weight_stride, std::int64_t ahead, Y* y,
                                 std::int64_t y_stride, A const* bias) {
  using V = simd::pack<A>;
  A const* row[std::size_t{Rows}];
  T const* column[std::size_t{Outputs}];
  V sum[std::size_t{Rows * Outputs}];
  unrolled<Outputs>([&](auto o) { column[o] = weight + std::min<int>(o, outputs - 1) * weight_stride; });
  unrolled<Rows>([&](auto r) {
    row[r] = x + std::min<int>(r, rows - 1) * x_stride;
    unrolled<Outputs>([&](auto o) { sum[r * Outputs + o] = V(0); });
  });
  std::int64_t p = 0;
  for (; p + V::lanes <= depth; p += V::lanes) {
    V w[std::size_t{Outputs}];
    unrolled<Outputs>([&](auto o) {
      w[o] = V::load(column[o] + p);
      if constexpr (Prefetch) __builtin_prefetch(column[o] + ahead + p);
    });
    unrolled<Rows>([&](auto r) {
      V const v = V::load(row[r] + p);
      unrolled<Outputs>([&](auto o) { sum[r * Outputs + o] = fma(v, w[o], sum[r * Outputs + o]); });
    });
  }
  A total[std::size_t{Rows * Outputs}];
  lane_sums<Rows * Outputs>(sum, total);
  for (int r = 0; r < rows; ++r) {
    A* const t = total + r * Outputs;
    for (std::int64_t rest = p; rest < depth; ++rest)
      for (int o = 0; o < outputs; ++o) t[o] += x[r * x_stride + rest] * convert<A>(weight[o * weight_stride + rest]);
    if (bias)
      for (int o = 0; o < outputs; ++o) t[o] += bias[o];
    if (outputs == Outputs)
      simd::pack<A, Outputs>::load(t).store(y + r * y_stride);
    else
      for (int o = 0; o < outputs; ++o) y[r * y_stride + o] = convert<Y>(t[o]);
  }
}

/// y (rows, outputs) = x (rows, depth) weight (outputs, depth)^T + bias (outputs), bias may be null.
template <class A, class T, class Y>
void matvec(std::int64_t rows, std::int64_t outputs, std::int64_t depth, A const* x, std::int64_t x_stride,
            T const* weight, std::int64_t weight_stride, Y* y, std::int64_t y_stride, A const* bias) {
  constexpr bool narrow = sizeof(T) < sizeof(A);
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int block = 8;  // outputs at a time: 32 registers hold them for four rows, halved
#else
  constexpr int block = 4;
#endif
  auto const blocks = [&](std::int64_t size, auto const& run) {
    for (std::int64_t o = 0; o < outputs; o += size)
      run(static_cast<int>(std::min(size, outputs - o)), weight + o * weight_stride, y + o, bias ? bias + o : nullptr);
  };
  auto const ahead = [&](std::int64_t outputs_of_block) {
    std::int64_t const size = std::max<std::int64_t>(1, outputs_of_block * weight_stride);
    return (8192 / static_cast<std::int64_t>(sizeof(T)) + size - 1) / size * size;
  };
  if (rows == 1)
    blocks(block, [&](int some, T const* w, Y* to, A const* b) {
      dot_block<1, block, narrow>(1, some, depth, x, x_stride, w, weight_stride, ahead(block), to, y_stride, b);
    });
  else if (rows == 2)
    blocks(block, [&](int some, T const* w, Y* to, A const* b) {
      dot_block<2, block, true>(2, some, depth, x, x_stride, w, weight_stride, ahead(block), to, y_stride, b);
    });
  else
    blocks(block / 2, [&](int some, T const* w, Y* to, A const* b) {
      // The rows beyond four find the weights in the cache.
      for (std::int64_t r = 0; r < rows; r += 4)
        dot_block<4, block / 2, true>(static_cast<int>(std::min<std::int64_t>(4, rows - r)), some, depth,
                                      x + r * x_stride, x_stride, w, weight_stride, ahead(block / 2), to + r * y_stride,
                                      y_stride, b);
    });
}

}  // namespace blackmamba::cpu::detail
