#pragma once
#include <blackmamba/core/config.hpp>
#include <blackmamba/core/cpu/gemm_kernel.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/core/numeric.hpp>

#include <cstdint>

/// Products of a few rows with a whole weight matrix, as decoding has them: bound by reading the weights, which are
/// therefore read once, in order, and widened in registers.
namespace blackmamba::cpu::detail {

/// Most rows that matvec takes.
inline constexpr int matvec_rows = 8;

/// y (Rows, Outputs) = x (Rows, depth) weight (Outputs, depth)^T + bias (Outputs): dot products along contiguous memory.
template <int Rows, int Outputs, class A, class TX, class TW, class TY>
BLACKMAMBA_INLINE void dot_block(std::int64_t depth, TX const* x, std::int64_t x_stride, TW const* weight,
                                 std::int64_t weight_stride, TY* y, std::int64_t y_stride, A const* bias) {
  using V = simd::pack<A>;
  V sum[std::size_t{Rows}][std::size_t{Outputs}];
  unrolled<Rows>([&](auto r) { unrolled<Outputs>([&](auto o) { sum[r][o] = V(0); }); });
  std::int64_t p = 0;
  for (; p + V::lanes <= depth; p += V::lanes) {
    V w[std::size_t{Outputs}];
    unrolled<Outputs>([&](auto o) { w[o] = V::load(weight + o * weight_stride + p); });
    unrolled<Rows>([&](auto r) {
      V const v = V::load(x + r * x_stride + p);
      unrolled<Outputs>([&](auto o) { sum[r][o] = fma(v, w[o], sum[r][o]); });
    });
  }
  unrolled<Rows>([&](auto r) {
    unrolled<Outputs>([&](auto o) {
      A s = simd::sum(sum[r][o]);
      for (std::int64_t t = p; t < depth; ++t)
        s += convert<A>(x[r * x_stride + t]) * convert<A>(weight[o * weight_stride + t]);
      y[r * y_stride + o] = convert<TY>(bias ? s + bias[o] : s);
    });
  });
}

template <int Rows, class A, class TX, class TW, class TY>
void dot_rows(std::int64_t outputs, std::int64_t depth, TX const* x, std::int64_t x_stride, TW const* weight,
              std::int64_t weight_stride, TY* y, std::int64_t y_stride, A const* bias) {
  constexpr int block = Rows <= 2 ? 4 : 2;  // at most 16 accumulators
  std::int64_t o = 0;
  for (; o + block <= outputs; o += block)
    dot_block<Rows, block>(depth, x, x_stride, weight + o * weight_stride, weight_stride, y + o, y_stride,
                           bias ? bias + o : nullptr);
  for (; o < outputs; ++o)
    dot_block<Rows, 1>(depth, x, x_stride, weight + o * weight_stride, weight_stride, y + o, y_stride,
                       bias ? bias + o : nullptr);
}

/// y (rows, outputs) = x (rows, depth) weight (outputs, depth)^T + bias (outputs), bias may be null; rows at most
/// matvec_rows.
template <class A, class TX, class TW, class TY>
void matvec(std::int64_t rows, std::int64_t outputs, std::int64_t depth, TX const* x, std::int64_t x_stride,
            TW const* weight, std::int64_t weight_stride, TY* y, std::int64_t y_stride, A const* bias) {
  auto const run = [&](auto count) {
    dot_rows<count, A>(outputs, depth, x, x_stride, weight, weight_stride, y, y_stride, bias);
  };
  switch (rows) {
    case 1: return run(std::integral_constant<int, 1>{});
    case 2: return run(std::integral_constant<int, 2>{});
    case 3: return run(std::integral_constant<int, 3>{});
    case 4: return run(std::integral_constant<int, 4>{});
    case 5: return run(std::integral_constant<int, 5>{});
    case 6: return run(std::integral_constant<int, 6>{});
    case 7: return run(std::integral_constant<int, 7>{});
    case 8: return run(std::integral_constant<int, 8>{});
    default: return;
  }
}

}  // namespace blackmamba::cpu::detail
