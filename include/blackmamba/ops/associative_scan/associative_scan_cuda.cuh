#pragma once
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/associative_scan/associative_scan.hpp>
#include <blackmamba/ops/associative_scan/scan_channels_cuda.cuh>
#include <blackmamba/ops/associative_scan/scan_rows_cuda.cuh>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

/// Kernels, for each operator and pair of types that are read and written: scan_rows, or scan_channels for (B, L, D);
/// backward: scan_gradient_pass twice, and what scans the maps; associative_scan_step.
/// The operator's functions are called on the device: declare them __host__ __device__ (BLACKMAMBA_HD).
namespace blackmamba::cuda::detail {

template <class To, class From>
__device__ __forceinline__ To scan_converted(From const& value) {
  if constexpr (std::is_same_v<To, From>)
    return value;
  else if constexpr (storage<To> && storage<From>)
    return convert<To>(value);
  else
    return static_cast<To>(value);
}

/// A row of a sequence as it is visited, N elements at a time where memory allows: element j is row[j], or in reverse
/// row[length - 1 - j].
template <class T, int N>
struct scan_line {
  static constexpr bool can_pack = N > 1 && N * sizeof(T) <= 16 && std::has_single_bit(N * sizeof(T));
  T* row;
  std::int64_t length;
  bool reverse;
  bool packs;

  __device__ __forceinline__ scan_line(T* first, std::int64_t count, bool backwards)
      : row(first), length(count), reverse(backwards) {
    packs = false;
    if constexpr (can_pack) packs = pack_aligned<N>(first + (backwards ? count - N : 0));
  }
  __device__ __forceinline__ T* at(std::int64_t j) const { return row + (reverse ? length - 1 - j : j); }
  /// Calls each(i, element j + i) for i below count, the number of elements that there are.
  template <class Each>
  __device__ __forceinline__ void read(std::int64_t j, int count, Each&& each) const {
    using V = std::remove_const_t<T>;
    if constexpr (can_pack)
      if (packs && count == N) {
        raw_pack<V, N> r;
        auto const* const from =
            reinterpret_cast<typename raw_pack<V, N>::word const*>(reverse ? at(j) - (N - 1) : at(j));
        r.w[0] = *from;
#pragma unroll
        for (int i = 0; i < N; ++i) each(i, reverse ? r.e[N - 1 - i] : r.e[i]);
        return;
      }
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) each(i, *at(j + i));
  }
  /// Element j + i = value(i) for i below count.
  template <class Value>
  __device__ __forceinline__ void write(std::int64_t j, int count, Value&& value) const {
    if constexpr (can_pack)
      if (packs && count == N) {
        raw_pack<T, N> r;
#pragma unroll
        for (int i = 0; i < N; ++i) r.e[i] = reverse ? value(N - 1 - i) : value(i);
        *reinterpret_cast<typename raw_pack<T, N>::word*>(reverse ? at(j) - (N - 1) : at(j)) = r.w[0];
        return;
      }
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) *at(j + i) = value(i);
  }
};

/// What the rules for rows and for channels have in common: of an operator, map and state are both the element.
template <class Operator, class E>
struct associative_rule {
  using map = E;
  using state = E;
  static constexpr int blocks_per_multiprocessor = sizeof(E) <= 8 ? 3 : sizeof(E) <= 16 ? 2 : 1;
  Operator op;
  __device__ __forceinline__ E identity() const { return op.identity(); }
  __device__ __forceinline__ E operator()(E const& a, E const& b) const { return op(a, b); }
  __device__ __forceinline__ E advance(E const& a, E const& b) const { return op(a, b); }
};

template <class Operator, class E, class X, class Y>
struct associative_rows : associative_rule<Operator, E> {
  static constexpr int packs = scan_tiles::packs<E>;
  static constexpr int items =
      std::min(scan_tiles::pack_width<std::conditional_t<(sizeof(X) > sizeof(Y)), X, Y>>,
               static_cast<int>(std::bit_floor(std::max<std::size_t>(1, 128 / (sizeof(E) * packs)))));
  view<space::device, X const, dyn, dyn> x;
  view<space::device, Y, dyn, dyn> y;
  associative_scan::options<device::cuda, E, 2> how;

  struct line {
    scan_line<X const, items> x;
    scan_line<Y, items> y;
  };
  struct data {
    E e[items];
  };
  __device__ __forceinline__ int count(line const& l, std::int64_t j) const {
    return static_cast<int>(max(std::int64_t{0}, min(std::int64_t{items}, l.x.length - j)));
  }
  __device__ __forceinline__ line start(sequences::block const& at) const {
    return {{x.row(at.batch) + at.first, at.length, how.reverse}, {y.row(at.batch) + at.first, at.length, how.reverse}};
  }
  __device__ __forceinline__ E initial(sequences::block const& at) const {
    return how.initial.present() ? how.initial.data()[at.index] : this->identity();
  }
  __device__ __forceinline__ data load(line const& l, std::int64_t j, int) const {
    data d;
    l.x.read(j, count(l, j), [&](int i, X const& value) { d.e[i] = scan_converted<E>(value); });
    return d;
  }
  __device__ __forceinline__ E fold(line const& l, std::int64_t j, data const& d) const {
    int const n = count(l, j);
    E sum = n > 0 ? d.e[0] : this->identity();
#pragma unroll
    for (int i = 1; i < items; ++i)
      if (i < n) sum = this->op(sum, d.e[i]);
    return sum;
  }
  __device__ __forceinline__ E emit(line const& l, std::int64_t j, data& d, E reached, int) const {
    int const n = count(l, j);
#pragma unroll
    for (int i = 0; i < items; ++i)
      if (i < n) {
        E const next = this->op(reached, d.e[i]);
        d.e[i] = how.exclusive ? reached : next;
        reached = next;
      }
    l.y.write(j, n, [&](int i) { return scan_converted<Y>(d.e[i]); });
    return reached;
  }
  __device__ __forceinline__ void final(sequences::block const& at, line const&, E const& value) const {
    if (how.total.present()) how.total.data()[at.index] = value;
  }
};

template <class Operator, class E, class X, class Y>
struct associative_channels : associative_rule<Operator, E> {
  static constexpr int steps = scan_tiles::steps<E>, warps = scan_tiles::warps<E>;
  view<space::device, X const, dyn, dyn, dyn> x;
  view<space::device, Y, dyn, dyn, dyn> y;
  associative_scan::options<device::cuda, E, 3> how;

  struct line {
    X const* x;
    Y* y;
    std::int64_t x_stride, y_stride;
  };
  using data = E;
  __device__ __forceinline__ line start(sequences::block const& at, std::int64_t channel) const {
    std::int64_t const first = at.first + (how.reverse && at.length > 0 ? at.length - 1 : 0);
    return {x.row(at.batch, first) + channel, y.row(at.batch, first) + channel,
            how.reverse ? -x.stride(1) : x.stride(1), how.reverse ? -y.stride(1) : y.stride(1)};
  }
  __device__ __forceinline__ E initial(sequences::block const& at, std::int64_t channel) const {
    return how.initial.present() ? how.initial.row(at.index)[channel] : this->identity();
  }
  struct reader {
    X const* x;
    std::int64_t stride;
    template <bool Full>
    __device__ __forceinline__ E load(int) {
      E const e = scan_converted<E>(*x);
      x += stride;
      return e;
    }
  };
  struct writer {
    Operator const& op;
    Y* y;
    std::int64_t stride;
    bool exclusive;
    template <bool Full>
    __device__ __forceinline__ E emit(int, E const& e, E const& reached) {
      E const next = op(reached, e);
      *y = scan_converted<Y>(exclusive ? reached : next);
      y += stride;
      return next;
    }
  };
  __device__ __forceinline__ reader source(line const& l, std::int64_t j) const {
    return {l.x + j * l.x_stride, l.x_stride};
  }
  __device__ __forceinline__ writer target(line const& l, std::int64_t j) const {
    return {this->op, l.y + j * l.y_stride, l.y_stride, how.exclusive};
  }
  __device__ __forceinline__ E fold(E const& e) const { return e; }
  __device__ __forceinline__ E append(E const& a, E const& e) const { return this->op(a, e); }
  __device__ __forceinline__ void final(sequences::block const& at, line const&, std::int64_t channel,
                                        E const& value) const {
    if (how.total.present()) how.total.row(at.index)[channel] = value;
  }
};

/// A pass of the gradient: 256 threads take a tile of a sequence's steps and 2^channel_shift channels, 1024 elements.
inline constexpr int gradient_tile_shift = 10;
template <class Work>
__global__ void __launch_bounds__(256)
    scan_gradient_pass(Work work, sequences list, int channel_shift, std::int64_t channel_tiles) {
  std::int64_t const tile = blockIdx.x, channels = work.y.extent(2);
  std::int64_t const first = tile % channel_tiles << channel_shift;
  sequences::block b;
  if (!list.find(tile / channel_tiles, b)) return;
  auto const steps = work.at(b);
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < 1 << gradient_tile_shift; i += 256) {
    std::int64_t const j = b.begin + (i >> channel_shift), d = first + (i & ((1 << channel_shift) - 1));
    if (j < b.end && d < channels) work.step(b, steps, j, d, work.exclusive, true);
  }
  if (b.length == 0)
    for (std::int64_t d = first + threadIdx.x; d < channels && d < first + (1 << channel_shift); d += 256)
      work.empty(b, d);
}

template <class Operator, class X, class Y, class E>
__global__ void __launch_bounds__(256)
    associative_scan_step(Operator op, view<space::device, X const, dyn, dyn> x, view<space::device, E, dyn, dyn> state,
                          view<space::device, Y, dyn, dyn> y) {
  std::int64_t const i = std::int64_t{blockIdx.x} * 256 + threadIdx.x;
  std::int64_t const row = i / y.extent(1), d = i % y.extent(1);
  if (row >= y.extent(0)) return;
  E const next = op(state.row(row)[d], scan_converted<E>(x.row(row)[d]));
  state.row(row)[d] = next;
  y.row(row)[d] = scan_converted<Y>(next);
}

}  // namespace blackmamba::cuda::detail

namespace blackmamba {

template <>
struct backend<associative_scan, device::cuda> {
  using flags = view<space::device, std::int32_t, dyn>;

  template <class Operator, class X, class Y, class E>
  static void forward(device::cuda const& policy, Operator const& op, view<space::device, X const, dyn, dyn> x,
                      view<space::device, Y, dyn, dyn> y, associative_scan::options<device::cuda, E, 2> const& how,
                      view<space::device, E, dyn, dyn> carries, flags ready) {
    cuda::detail::associative_rows<Operator, E, X, Y> const rule{{op}, x, y, how};
    cuda::detail::launch_scan_rows("associative_scan", policy, rule, y.extent(0), y.extent(1), how.cu_seqlens, carries,
                                   ready);
  }
  template <class Operator, class X, class Y, class E>
  static void forward(device::cuda const& policy, Operator const& op, view<space::device, X const, dyn, dyn, dyn> x,
                      view<space::device, Y, dyn, dyn, dyn> y, associative_scan::options<device::cuda, E, 3> const& how,
                      view<space::device, E, dyn, dyn> carries, flags ready) {
    cuda::detail::associative_channels<Operator, E, X, Y> const rule{{op}, x, y, how};
    cuda::detail::launch_scan_channels("associative_scan", policy, rule, y.extent(0), y.extent(1), y.extent(2),
                                       how.cu_seqlens, carries, ready);
  }

  /// A pass of the gradient over each step and channel of each sequence.
  template <class Work>
  static void backward(device::cuda const& policy, Work const& work) {
    std::int64_t const channels = work.y.extent(2);
    int const channel_shift = std::min(5, static_cast<int>(std::bit_width(static_cast<std::uint64_t>(channels - 1))));
    cuda::sequences const list(work.y.extent(0), work.y.extent(1), work.cu_seqlens,
                               cuda::detail::gradient_tile_shift - channel_shift);
    std::int64_t const channel_tiles = ((channels - 1) >> channel_shift) + 1;
    cuda::launch("associative_scan.backward", policy, {cuda::blocks_for(list.blocks() * channel_tiles, 1), 256},
                 cuda::detail::scan_gradient_pass<Work>, work, list, channel_shift, channel_tiles);
  }

  template <class Operator, class X, class Y, class E>
  static void step(device::cuda const& policy, Operator const& op, view<space::device, X const, dyn, dyn> x,
                   view<space::device, E, dyn, dyn> state, view<space::device, Y, dyn, dyn> y) {
    cuda::launch("associative_scan.step", policy, {cuda::blocks_for(y.size(), 256), 256},
                 cuda::detail::associative_scan_step<Operator, X, Y, E>, op, x, state, y);
  }
};

}  // namespace blackmamba
