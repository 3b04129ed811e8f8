#pragma once
#include <blackmamba/core/cuda/reduce_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/adamw/adamw.hpp>
#include <blackmamba/ops/adamw/adamw_math.hpp>

#include <algorithm>
#include <cstdint>
#include <span>

// Kernels: adamw_update for each storage type; adamw_squares and adamw_norm for float and double.
namespace blackmamba::cuda::detail {

inline constexpr int adamw_most_segments = 16;  // of a launch
inline constexpr int adamw_threads = 256;

/// A segment in tiles of a pack for each thread, and what its parameters multiply.
template <class T>
struct adamw_tiles {
  using A = accum_t<T>;
  A* parameter;
  A const* gradient;
  A* first_moment;
  A* second_moment;
  T* copy;  // may be null
  std::int64_t n;
  std::int64_t first_tile, end_tile;
  A learning_rate_scale, weight_decay;
  int lead;     // elements between the place of a line or pack of memory before the segment and its beginning
  bool packed;  // the same for all five arrays: else a thread's elements lie as far apart as there are threads
};

template <class T>
struct adamw_arguments {
  using A = accum_t<T>;
  A const* norm;           // may be null
  double const* schedule;  // may be null: schedule_values then
  double schedule_values[3];
  double max_norm;
  A beta1, beta2, rest1, rest2, eps;
  std::int64_t tiles;
  adamw_tiles<T> segments[adamw_most_segments];
};

template <class T>
__global__ void __launch_bounds__(adamw_threads) adamw_update(__grid_constant__ adamw_arguments<T> const arg) {
  using A = accum_t<T>;
  constexpr int N = pack_width<A>;
  double clip = 1;
  if (arg.norm) {
    double const length = static_cast<double>(*arg.norm);
    if (!isfinite(length)) return;
    clip = math::adamw_clip(length, arg.max_norm);
  }
  double const* const schedule = arg.schedule ? arg.schedule : arg.schedule_values;
  A const rate = static_cast<A>(schedule[0]), first_correction = static_cast<A>(schedule[1]);
  math::adamw_factors<A> f{.clip = static_cast<A>(clip),
                           .beta1 = arg.beta1,
                           .rest1 = arg.rest1,
                           .beta2 = arg.beta2,
                           .rest2 = arg.rest2,
                           .step_size = 0,
                           .second_correction = static_cast<A>(schedule[2]),
                           .eps = arg.eps,
                           .decay = 0};

  int segment = 0;
  for (std::int64_t tile = blockIdx.x; tile < arg.tiles; tile += gridDim.x) {
    while (tile >= arg.segments[segment].end_tile) ++segment;
    adamw_tiles<T> const& s = arg.segments[segment];
    A const eta = rate * s.learning_rate_scale;
    f.step_size = eta * first_correction;
    f.decay = eta * s.weight_decay;

    std::int64_t const first = (tile - s.first_tile) * (adamw_threads * N) - s.lead;
    std::int64_t const at = first + static_cast<int>(threadIdx.x) * (s.packed ? N : 1);
    auto const update = [&](auto&& load, auto&& store) {
      pack<A, N> const g = load(s.gradient);
      pack<A, N> p = load(s.parameter), m = load(s.first_moment), v = load(s.second_moment);
#pragma unroll
      for (int j = 0; j < N; ++j) math::adamw_update(p[j], m[j], v[j], g[j], f);
      store(s.first_moment, m);
      store(s.second_moment, v);
      store(s.parameter, p);
      if (s.copy) store(s.copy, p);
    };
    if (s.packed && at >= 0 && at + N <= s.n) {
      update([&](A const* x) { return load_pack_streaming<N>(x + at); },
             [&](auto* x, pack<A, N> const& values) { store_pack_whole<N>(x + at, values); });
    } else {  // one by one
      int const apart = s.packed ? 1 : adamw_threads;
      auto const each = [&](auto&& body) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          std::int64_t const i = at + j * apart;
          if (i >= 0 && i < s.n) body(i, j);
        }
      };
      update(
          [&](A const* x) {
            pack<A, N> some{};
            each([&](std::int64_t i, int j) { some[j] = x[i]; });
            return some;
          },
          [&]<class X>(X* x, pack<A, N> const& values) {
            each([&](std::int64_t i, int j) { x[i] = convert<X>(values[j]); });
          });
    }
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
  static void step(device::cuda const& policy, std::span<adamw::segment<device::cuda, T> const> segments,
                   view<space::device, accum_t<T> const, dyn> norm, adamw::options const& how,
                   view<space::device, double const, dyn> schedule) {
    using A = accum_t<T>;
    auto const now = adamw::schedule_of(how);
    cuda::detail::adamw_arguments<T> arg{.norm = norm.data(),
                                         .schedule = schedule.data(),
                                         .schedule_values = {now[0], now[1], now[2]},
                                         .max_norm = how.max_norm,
                                         .beta1 = static_cast<A>(how.beta1),
                                         .beta2 = static_cast<A>(how.beta2),
                                         .rest1 = static_cast<A>(1 - how.beta1),
                                         .rest2 = static_cast<A>(1 - how.beta2),
                                         .eps = static_cast<A>(how.eps),
                                         .tiles = 0,
                                         .segments = {}};
    // One launch for everything, but where there are more segments than its arguments hold.
    while (!segments.empty()) {
      int count = 0;
      arg.tiles = 0;
      for (; !segments.empty() && count < cuda::detail::adamw_most_segments; segments = segments.subspan(1)) {
        if (segments.front().parameter.extent(0) == 0) continue;
        arg.segments[count] = tiles_of<T>(segments.front(), arg.tiles);
        arg.tiles = arg.segments[count++].end_tile;
      }
      cuda::launch("adamw", policy, {cuda::strided_blocks_for(arg.tiles, 1, 8, 4), cuda::detail::adamw_threads},
                   cuda::detail::adamw_update<T>, arg);
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

 private:
  template <class T>
  static cuda::detail::adamw_tiles<T> tiles_of(adamw::segment<device::cuda, T> const& s, std::int64_t first_tile) {
    using A = accum_t<T>;
    constexpr int width = cuda::pack_width<A>;
    // How many elements lie between the last place before x that is a multiple of `unit`, and x, where that is the same
    // for all five arrays.
    auto const after = [&](int unit) {
      auto const of = [&](auto const* x) {
        return static_cast<int>(reinterpret_cast<std::uintptr_t>(x) / sizeof(*x) % static_cast<std::uintptr_t>(unit));
      };
      int const lead = of(s.parameter.data());
      bool const same = of(s.gradient.data()) == lead && of(s.first_moment.data()) == lead &&
                        of(s.second_moment.data()) == lead && (!s.copy.present() || of(s.copy.data()) == lead);
      return same ? lead : -1;
    };
    // Packs of a warp that begin with a line of 128 bytes touch the fewest.
    int const of_line = after(8 * width), lead = of_line >= 0 ? of_line : after(width);
    std::int64_t const n = s.parameter.extent(0), tile = cuda::detail::adamw_threads * width;
    return {.parameter = s.parameter.data(),
            .gradient = s.gradient.data(),
            .first_moment = s.first_moment.data(),
            .second_moment = s.second_moment.data(),
            .copy = s.copy.data(),
            .n = n,
            .first_tile = first_tile,
            .end_tile = first_tile + (n + std::max(lead, 0) + tile - 1) / tile,
            .learning_rate_scale = static_cast<A>(s.learning_rate_scale),
            .weight_decay = static_cast<A>(s.weight_decay),
            .lead = std::max(lead, 0),
            .packed = lead >= 0};
  }
};

}  // namespace blackmamba
