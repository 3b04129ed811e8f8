#pragma once
#include <blackmamba/core/cuda/reduce_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/adamw/adamw.hpp>

#include <algorithm>
#include <array>
#include <span>

// Kernels: adamw_update for each storage type, in packs of 16 bytes or (where an array is not aligned for them, as an
// offset of a view can make it) element by element; adamw_squares and adamw_norm for float and double.
namespace blackmamba::cuda::detail {

/// Parameters [end of the group before, end) and what they multiply.
template <class A>
struct adamw_group {
  std::int64_t end;
  A learning_rate_scale;
  A weight_decay;
};
inline constexpr int adamw_most_groups = 8;

template <class T>
struct adamw_arguments {
  using A = accum_t<T>;
  A* parameter;
  A const* gradient;
  A* first_moment;
  A* second_moment;
  T* copy;                 // may be null
  A const* norm;           // may be null
  double const* schedule;  // may be null: schedule_values then
  double schedule_values[3];
  std::int64_t begin, end;
  adamw_group<A> groups[adamw_most_groups];
  int group_count;
  A beta1, beta2, rest1, rest2, eps;
  double max_norm;
};

template <int N, class T>
__global__ void __launch_bounds__(256) adamw_update(adamw_arguments<T> const arg) {
  using A = accum_t<T>;
  double clip = 1;
  if (arg.norm) {
    double const length = static_cast<double>(*arg.norm);
    if (!isfinite(length)) return;
    if (arg.max_norm > 0 && length > arg.max_norm) clip = arg.max_norm / length;
  }
  double const* const schedule = arg.schedule ? arg.schedule : arg.schedule_values;
  A const scale = static_cast<A>(clip), rate = static_cast<A>(schedule[0]);
  A const first_correction = static_cast<A>(schedule[1]), second_correction = static_cast<A>(schedule[2]);

  std::int64_t const stride = std::int64_t{gridDim.x} * blockDim.x * N;
  for (std::int64_t i = arg.begin + (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N; i < arg.end;
       i += stride) {
    bool const whole = i + N <= arg.end;
    std::int64_t const count = whole ? N : arg.end - i;
    auto const load = [&](A const* x) { return whole ? load_pack_streaming<N>(x + i) : load_some<N>(x + i, count); };
    pack<A, N> const g = load(arg.gradient);
    pack<A, N> p = load(arg.parameter), m = load(arg.first_moment), v = load(arg.second_moment);
    int group = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      while (group + 1 < arg.group_count && i + j >= arg.groups[group].end) ++group;
      A const eta = rate * arg.groups[group].learning_rate_scale;
      A const decay = eta * arg.groups[group].weight_decay;
      A const clipped = g[j] * scale;
      m[j] = fma(m[j], arg.beta1, clipped * arg.rest1);
      v[j] = fma(v[j], arg.beta2, clipped * clipped * arg.rest2);
      p[j] -= fma(p[j], decay, m[j] * (eta * first_correction) / fma(sqrt(v[j]), second_correction, arg.eps));
    }
    auto const store = [&](auto* x, pack<A, N> const& values) {
      if (whole)
        store_pack<N>(x + i, values);
      else
        store_some<N>(x + i, values, count);
    };
    store(arg.first_moment, m);
    store(arg.second_moment, v);
    store(arg.parameter, p);
    if (arg.copy) store(arg.copy, p);
  }
}

/// partial[block] = sum of the squares of the block's values.
template <int Values, class A>
__global__ void __launch_bounds__(256) adamw_squares(A const* gradient, std::int64_t n, bool aligned, double* partial) {
  __shared__ double memory[8];
  constexpr int width = pack_width<A>;
  std::int64_t const first = std::int64_t{blockIdx.x} * Values;
  double sum = 0;
#pragma unroll 4
  for (int k = 0; k < Values / (256 * width); ++k) {
    std::int64_t const i = first + (k * 256 + static_cast<int>(threadIdx.x)) * width;
    auto const x =
        aligned && i + width <= n ? load_pack<width>(gradient + i) : load_some<width>(gradient + i, i < n ? n - i : 0);
#pragma unroll
    for (int j = 0; j < width; ++j) sum = fma(static_cast<double>(x[j]), static_cast<double>(x[j]), sum);
  }
  sum = block_sum<256>(sum, memory);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
template <class A>
__global__ void __launch_bounds__(256) adamw_norm(double const* partial, std::int64_t blocks, A* norm) {
  __shared__ double memory[8];
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < blocks; i += 256) sum += partial[i];
  sum = block_sum<256>(sum, memory);
  if (threadIdx.x == 0) *norm = static_cast<A>(sqrt(sum));
}

}  // namespace blackmamba::cuda::detail

namespace blackmamba {

/// Bytes of a parameter, each once: gradient read, parameter and two moments read and written, the copy written: 28 in
/// float, 30 with a 16-bit copy.
template <>
struct backend<adamw, device::cuda> {
  template <class T>
  static void step(device::cuda const& policy, adamw::tensors<device::cuda, T> const& on,
                   view<space::device, accum_t<T> const, dyn> norm, std::span<adamw::group const> groups,
                   adamw::options const& how) {
    using A = accum_t<T>;
    constexpr int width = cuda::pack_width<A>;
    auto const schedule = adamw::schedule_of(how);
    cuda::detail::adamw_arguments<T> arg{.parameter = on.parameter.data(),
                                         .gradient = on.gradient.data(),
                                         .first_moment = on.first_moment.data(),
                                         .second_moment = on.second_moment.data(),
                                         .copy = on.copy.data(),
                                         .norm = norm.data(),
                                         .schedule = on.schedule.data(),
                                         .schedule_values = {schedule[0], schedule[1], schedule[2]},
                                         .begin = 0,
                                         .end = 0,
                                         .groups = {},
                                         .group_count = 0,
                                         .beta1 = static_cast<A>(how.beta1),
                                         .beta2 = static_cast<A>(how.beta2),
                                         .rest1 = static_cast<A>(1 - how.beta1),
                                         .rest2 = static_cast<A>(1 - how.beta2),
                                         .eps = static_cast<A>(how.eps),
                                         .max_norm = how.max_norm};
    // One launch for everything, but where there are more groups than its arguments hold.
    while (!groups.empty()) {
      auto const some = groups.first(std::min<std::size_t>(groups.size(), cuda::detail::adamw_most_groups));
      groups = groups.subspan(some.size());
      arg.group_count = static_cast<int>(some.size());
      for (std::size_t i = 0; i < some.size(); ++i)
        arg.groups[i] = {some[i].end, static_cast<A>(some[i].learning_rate_scale),
                         static_cast<A>(some[i].weight_decay)};
      arg.end = some.back().end;
      std::int64_t const n = arg.end - arg.begin;
      auto const aligned = [&](auto const* x) { return x == nullptr || cuda::pack_aligned<width>(x + arg.begin); };
      if (n > 0 && aligned(arg.parameter) && aligned(arg.gradient) && aligned(arg.first_moment) &&
          aligned(arg.second_moment) && aligned(arg.copy))
        cuda::launch("adamw", policy, {cuda::strided_blocks_for(n, 256 * width, 8, 4), 256},
                     cuda::detail::adamw_update<width, T>, arg);
      else if (n > 0)
        cuda::launch("adamw", policy, {cuda::strided_blocks_for(n, 256, 8, 4), 256}, cuda::detail::adamw_update<1, T>,
                     arg);
      arg.begin = arg.end;
    }
  }

  template <class A>
  static void norm(device::cuda const& policy, view<space::device, A const, dyn> gradient,
                   view<space::device, A, dyn> norm, view<space::device, double, dyn> partial) {
    cuda::launch("adamw.norm", policy, {cuda::blocks_for(gradient.extent(0), adamw::values_per_partial), 256},
                 cuda::detail::adamw_squares<adamw::values_per_partial, A>, gradient.data(), gradient.extent(0),
                 cuda::pack_aligned<cuda::pack_width<A>>(gradient.data()), partial.data());
    cuda::launch("adamw.norm", policy, {1, 256}, cuda::detail::adamw_norm<A>, partial.data(), partial.extent(0),
                 norm.data());
  }
};

}  // namespace blackmamba
