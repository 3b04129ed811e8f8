#pragma once
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/core/math.hpp>
#include <blackmamba/ops/associative_scan/first_order_recurrence.hpp>
#include <blackmamba/ops/associative_scan/scan_channels_cuda.cuh>
#include <blackmamba/ops/associative_scan/scan_rows_cuda.cuh>

#include <cstdint>
#include <type_traits>

/// Kernels, for each storage type T: scan_rows and scan_channels, forward and backward, scan_rows for either direction;
/// and step, in packs of 4 or element by element.
namespace blackmamba::cuda::detail {

/// What the rules have in common: elements combine to affine maps of the state.
template <class T>
struct recurrence_rule {
  using A = accum_t<T>;
  using map = affine<A>;
  using state = A;
  static constexpr int blocks_per_multiprocessor = sizeof(A) == 4 ? 3 : 2;
  static constexpr bool total = true;
  static __device__ __forceinline__ map identity() { return {A(1), A(0)}; }
  /// A state of zero stays out of a product that overflowed.
  __device__ __forceinline__ map operator()(map const& a, map const& b) const {
    return {a.a * b.a, a.b == A(0) ? b.b : math::fma(b.a, a.b, b.b)};
  }
  /// With one element more, whose coefficient is no product.
  static __device__ __forceinline__ map composed(map const& m, A a, A b) { return {m.a * a, math::fma(a, m.b, b)}; }
  __device__ __forceinline__ A advance(A h, map const& m) const { return h == A(0) ? m.b : math::fma(m.a, h, m.b); }
  static __device__ __forceinline__ A state_of(view<space::device, A const, dyn> const& states, std::int64_t index) {
    return states.present() ? states.data()[index] : A(0);
  }
  static __device__ __forceinline__ A state_of(view<space::device, A const, dyn, dyn> const& states, std::int64_t index,
                                               std::int64_t channel) {
    return states.present() ? states.row(index)[channel] : A(0);
  }
};

/// N elements of a row in the order of memory, whatever order they are visited in; `fill` where there are none.
template <class T, int N, bool Reverse>
struct recurrence_pack {
  raw_pack<std::remove_const_t<T>, N> raw;
  __device__ __forceinline__ accum_t<T> operator[](int i) const { return widen(raw.e[Reverse ? N - 1 - i : i]); }
  __device__ __forceinline__ void set(int i, accum_t<T> value) {
    raw.e[Reverse ? N - 1 - i : i] = convert<std::remove_const_t<T>>(value);
  }
};
template <class T, int N, bool Reverse>
struct recurrence_line {
  T* row;
  std::int64_t length;
  using pack = recurrence_pack<T, N, Reverse>;

  __device__ __forceinline__ T* at(std::int64_t j) const { return row + (Reverse ? length - 1 - j : j); }
  /// Whether elements j, j + 1, … can be accessed as one, for all multiples j of N.
  __device__ __forceinline__ bool aligned() const { return pack_aligned<N>(row + (Reverse ? length - N : 0)); }
  __device__ __forceinline__ pack load(std::int64_t j, bool packs, accum_t<T> fill) const {
    pack x;
    if (packs && j + N <= length) {
      x.raw.w[0] = *reinterpret_cast<typename decltype(x.raw)::word const*>(Reverse ? at(j) - (N - 1) : at(j));
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) x.set(i, j + i < length ? widen(*at(j + i)) : fill);
    }
    return x;
  }
  __device__ __forceinline__ void store(std::int64_t j, bool packs, pack const& x) const {
    if (packs && j + N <= length) {
      *reinterpret_cast<typename decltype(x.raw)::word*>(Reverse ? at(j) - (N - 1) : at(j)) = x.raw.w[0];
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (j + i < length) *at(j + i) = x.raw.e[Reverse ? N - 1 - i : i];
    }
  }
};

template <class T, bool Reverse>
struct recurrence_forward_rows : recurrence_rule<T> {
  static constexpr int blocks_per_multiprocessor = sizeof(accum_t<T>) == 4 ? 4 : 2;
  using typename recurrence_rule<T>::A;
  using typename recurrence_rule<T>::map;
  static constexpr int items = pack_width<T>, packs = 4;
  first_order_recurrence::inputs<device::cuda, T, 2> in;
  view<space::device, T, dyn, dyn> h;
  view<space::device, A, dyn> final_state;

  struct line {
    recurrence_line<T const, items, Reverse> a, b;
    recurrence_line<T, items, Reverse> h;
    bool packs;
  };
  struct data {
    recurrence_pack<T const, items, Reverse> a, b;
  };
  __device__ __forceinline__ line start(sequences::block const& at) const {
    line l{{in.a.row(at.batch) + at.first, at.length},
           {in.b.row(at.batch) + at.first, at.length},
           {h.row(at.batch) + at.first, at.length},
           true};
    l.packs = l.a.aligned() && l.b.aligned() && l.h.aligned();
    return l;
  }
  __device__ __forceinline__ A initial(sequences::block const& at) const {
    return this->state_of(in.initial_state, at.index);
  }
  __device__ __forceinline__ data load(line const& l, std::int64_t j, int) const {
    return {l.a.load(j, l.packs, A(1)), l.b.load(j, l.packs, A(0))};
  }
  __device__ __forceinline__ map fold(line const&, std::int64_t, data const& d) const {
    map m{d.a[0], d.b[0]};
#pragma unroll
    for (int i = 1; i < items; ++i) m = this->composed(m, d.a[i], d.b[i]);
    return m;
  }
  __device__ __forceinline__ A emit(line const& l, std::int64_t j, data const& d, A reached, int) const {
    recurrence_pack<T, items, Reverse> result;
#pragma unroll
    for (int i = 0; i < items; ++i) {
      reached = math::fma(d.a[i], reached, d.b[i]);
      result.set(i, reached);
    }
    l.h.store(j, l.packs, result);
    return reached;
  }
  __device__ __forceinline__ void final(sequences::block const& at, line const&, A value) const {
    if (final_state.present()) final_state.data()[at.index] = value;
  }
};

/// Visits a row against the recurrence: Reverse where that goes forward. The coefficient of an element is the a of the
/// one visited before, and 1 for the first.
template <class T, bool Reverse>
struct recurrence_backward_rows : recurrence_rule<T> {
  static constexpr int blocks_per_multiprocessor = sizeof(accum_t<T>) == 4 ? 4 : 2;
  using typename recurrence_rule<T>::A;
  using typename recurrence_rule<T>::map;
  static constexpr int items = pack_width<T>, packs = 2;
  first_order_recurrence::gradient_inputs<device::cuda, T, 2> in;
  view<space::device, T, dyn, dyn> d_a, d_b;
  view<space::device, A, dyn> d_initial_state;

  struct line {
    recurrence_line<T const, items, Reverse> a, h, d_h;
    recurrence_line<T, items, Reverse> d_a, d_b;
    A before;  // the first element: the initial state
    bool packs;
  };
  struct data {
    recurrence_pack<T const, items, Reverse> a, h, d_h;
    A coefficient;  // of element j
    A state;        // h of element j + items
  };
  __device__ __forceinline__ line start(sequences::block const& at) const {
    line l{{in.a.row(at.batch) + at.first, at.length},
           {in.h.row(at.batch) + at.first, at.length},
           {in.d_h.row(at.batch) + at.first, at.length},
           {d_a.row(at.batch) + at.first, at.length},
           {d_b.row(at.batch) + at.first, at.length},
           this->state_of(in.initial_state, at.index),
           true};
    l.packs = l.a.aligned() && l.h.aligned() && l.d_h.aligned() && l.d_a.aligned() && l.d_b.aligned();
    return l;
  }
  __device__ __forceinline__ A initial(sequences::block const& at) const {
    return this->state_of(in.d_final_state, at.index);
  }
  __device__ __forceinline__ data load(line const& l, std::int64_t j, int lane) const {
    data d{l.a.load(j, l.packs, A(1)), l.h.load(j, l.packs, A(0)), l.d_h.load(j, l.packs, A(0)), A(1), A(0)};
    // The neighbours' elements; those of other warps from memory, which the caches hold.
    if (lane == 0 && j > 0 && j <= l.a.length) d.coefficient = widen(*l.a.at(j - 1));
    if (lane == 31 && j + items < l.h.length) d.state = widen(*l.h.at(j + items));
    A const left = __shfl_up_sync(0xffffffffu, d.a[items - 1], 1), right = __shfl_down_sync(0xffffffffu, d.h[0], 1);
    if (lane > 0) d.coefficient = left;
    if (lane < 31) d.state = right;
    return d;
  }
  __device__ __forceinline__ A coefficient(line const& l, std::int64_t j, data const& d, int i) const {
    A const a = i == 0 ? d.coefficient : d.a[i > 0 ? i - 1 : 0];
    return j + i < l.a.length ? a : A(1);  // past the end nothing must change the state
  }
  __device__ __forceinline__ map fold(line const& l, std::int64_t j, data const& d) const {
    map m{coefficient(l, j, d, 0), d.d_h[0]};
#pragma unroll
    for (int i = 1; i < items; ++i) m = this->composed(m, coefficient(l, j, d, i), d.d_h[i]);
    return m;
  }
  __device__ __forceinline__ A emit(line const& l, std::int64_t j, data const& d, A reached, int) const {
    recurrence_pack<T, items, Reverse> d_b_pack, d_a_pack;
#pragma unroll
    for (int i = 0; i < items; ++i) {
      reached = math::fma(coefficient(l, j, d, i), reached, d.d_h[i]);
      A const h = j + i + 1 < l.h.length ? (i + 1 < items ? d.h[i + 1 < items ? i + 1 : 0] : d.state) : l.before;
      d_b_pack.set(i, reached);
      d_a_pack.set(i, reached * h);
    }
    l.d_b.store(j, l.packs, d_b_pack);
    l.d_a.store(j, l.packs, d_a_pack);
    return reached;
  }
  __device__ __forceinline__ void final(sequences::block const& at, line const& l, A value) const {
    if (d_initial_state.present())
      d_initial_state.data()[at.index] = at.length > 0 ? widen(*l.a.at(at.length - 1)) * value : value;
  }
};

/// One channel of (B, L, D) from the element that is visited first.
template <class T>
struct recurrence_column {
  T* first;
  std::int64_t stride;
  template <class View>
  __device__ __forceinline__ recurrence_column(View const& v, sequences::block const& at, std::int64_t channel,
                                               bool reverse)
      : first(v.row(at.batch, at.first + (reverse && at.length > 0 ? at.length - 1 : 0)) + channel),
        stride(reverse ? -v.stride(1) : v.stride(1)) {}
  __device__ __forceinline__ T& operator[](std::int64_t j) const { return first[j * stride]; }
  /// The same from element j on.
  __device__ __forceinline__ recurrence_column from(std::int64_t j) const { return {first + j * stride, stride}; }
  /// The first element; then the next ones are left.
  __device__ __forceinline__ T& take() {
    T* const here = first;
    first += stride;
    return *here;
  }
  __device__ __forceinline__ recurrence_column(T* p, std::int64_t distance) : first(p), stride(distance) {}
};

template <class T>
struct recurrence_forward_channels : recurrence_rule<T> {
  using typename recurrence_rule<T>::A;
  using typename recurrence_rule<T>::map;
  static constexpr int steps = scan_tiles::steps<map>, warps = scan_tiles::warps<map>;
  first_order_recurrence::inputs<device::cuda, T, 3> in;
  view<space::device, T, dyn, dyn, dyn> h;
  view<space::device, A, dyn, dyn> final_state;

  struct line {
    recurrence_column<T const> a, b;
    recurrence_column<T> h;
  };
  struct data {
    T a, b;
  };
  __device__ __forceinline__ line start(sequences::block const& at, std::int64_t channel) const {
    return {{in.a, at, channel, in.reverse}, {in.b, at, channel, in.reverse}, {h, at, channel, in.reverse}};
  }
  __device__ __forceinline__ A initial(sequences::block const& at, std::int64_t channel) const {
    return this->state_of(in.initial_state, at.index, channel);
  }
  struct reader {
    recurrence_column<T const> a, b;
    template <bool Full>
    __device__ __forceinline__ data load(int) {
      return {a.take(), b.take()};
    }
  };
  struct writer {
    recurrence_column<T> h;
    template <bool Full>
    __device__ __forceinline__ A emit(int, data const& d, A reached) {
      reached = math::fma(widen(d.a), reached, widen(d.b));
      h.take() = convert<T>(reached);
      return reached;
    }
  };
  __device__ __forceinline__ reader source(line const& l, std::int64_t j) const { return {l.a.from(j), l.b.from(j)}; }
  __device__ __forceinline__ writer target(line const& l, std::int64_t j) const { return {l.h.from(j)}; }
  __device__ __forceinline__ map fold(data const& d) const { return {widen(d.a), widen(d.b)}; }
  __device__ __forceinline__ map append(map const& m, data const& d) const {
    return this->composed(m, widen(d.a), widen(d.b));
  }
  __device__ __forceinline__ void final(sequences::block const& at, line const&, std::int64_t channel, A value) const {
    if (final_state.present()) final_state.row(at.index)[channel] = value;
  }
};

template <class T>
struct recurrence_backward_channels : recurrence_rule<T> {
  using typename recurrence_rule<T>::A;
  using typename recurrence_rule<T>::map;
  static constexpr int steps = scan_tiles::steps<map> / 2, warps = scan_tiles::warps<map>;
  first_order_recurrence::gradient_inputs<device::cuda, T, 3> in;
  view<space::device, T, dyn, dyn, dyn> d_a, d_b;
  view<space::device, A, dyn, dyn> d_initial_state;

  struct line {
    recurrence_column<T const> a, h, d_h;
    recurrence_column<T> d_a, d_b;
    std::int64_t last;  // element
    A before;           // the first element: the initial state
  };
  struct data {
    T a, d_h, h;  // of the elements before, here and after
  };
  __device__ __forceinline__ line start(sequences::block const& at, std::int64_t channel) const {
    bool const against = !in.reverse;
    return {{in.a, at, channel, against},
            {in.h, at, channel, against},
            {in.d_h, at, channel, against},
            {d_a, at, channel, against},
            {d_b, at, channel, against},
            at.length - 1,
            this->state_of(in.initial_state, at.index, channel)};
  }
  __device__ __forceinline__ A initial(sequences::block const& at, std::int64_t channel) const {
    return this->state_of(in.d_final_state, at.index, channel);
  }
  struct reader {
    recurrence_column<T const> a, h, d_h;  // a from the element before on, h from the one after
    std::int64_t j, last;
    template <bool Full>
    __device__ __forceinline__ data load(int i) {
      data d{convert<T>(1.0f), d_h.take(), convert<T>(0.0f)};
      T const& before = a.take();
      T const& after = h.take();
      if (i > 0 || j > 0) d.a = before;
      if ((Full && i + 1 < steps) || j + i < last) d.h = after;
      return d;
    }
  };
  struct writer {
    recurrence_column<T> d_a, d_b;
    std::int64_t j, last;
    A before;
    template <bool Full>
    __device__ __forceinline__ A emit(int i, data const& d, A reached) {
      reached = math::fma(widen(d.a), reached, widen(d.d_h));
      d_b.take() = convert<T>(reached);
      d_a.take() = convert<T>(reached * ((Full && i + 1 < steps) || j + i < last ? widen(d.h) : before));
      return reached;
    }
  };
  __device__ __forceinline__ reader source(line const& l, std::int64_t j) const {
    return {l.a.from(j - 1), l.h.from(j + 1), l.d_h.from(j), j, l.last};
  }
  __device__ __forceinline__ writer target(line const& l, std::int64_t j) const {
    return {l.d_a.from(j), l.d_b.from(j), j, l.last, l.before};
  }
  __device__ __forceinline__ map fold(data const& d) const { return {widen(d.a), widen(d.d_h)}; }
  __device__ __forceinline__ map append(map const& m, data const& d) const {
    return this->composed(m, widen(d.a), widen(d.d_h));
  }
  __device__ __forceinline__ void final(sequences::block const& at, line const& l, std::int64_t channel,
                                        A value) const {
    if (d_initial_state.present())
      d_initial_state.row(at.index)[channel] = at.length > 0 ? widen(l.a[l.last]) * value : value;
  }
};

template <class T, int N>
__global__ void __launch_bounds__(256)
    first_order_recurrence_step(first_order_recurrence::step_inputs<device::cuda, T> in,
                                view<space::device, accum_t<T>, dyn, dyn> state, view<space::device, T, dyn, dyn> h) {
  std::int64_t const i = std::int64_t{blockIdx.x} * 256 + threadIdx.x, packs = h.extent(1) / N;
  std::int64_t const row = i / packs, channel = i % packs * N;
  if (row >= h.extent(0)) return;
  auto const a = load_pack<N>(in.a.row(row) + channel), b = load_pack<N>(in.b.row(row) + channel);
  auto next = load_pack<N>(state.row(row) + channel);
#pragma unroll
  for (int k = 0; k < N; ++k) next[k] = math::fma(a[k], next[k], b[k]);
  store_pack<N>(state.row(row) + channel, next);
  store_pack<N>(h.row(row) + channel, next);
}

}  // namespace blackmamba::cuda::detail

namespace blackmamba {

template <>
struct backend<first_order_recurrence, device::cuda> {
  using op = first_order_recurrence;
  using flags = view<space::device, std::int32_t, dyn>;
  template <class T, int... N>
  using tensor_view = view<space::device, T, N...>;
  template <class T>
  using carries = view<space::device, affine<accum_t<T>>, dyn, dyn>;

  template <class T>
  static void forward(device::cuda const& policy, op::inputs<device::cuda, T, 2> const& in, tensor_view<T, dyn, dyn> h,
                      tensor_view<accum_t<T>, dyn> final_state, carries<T> memory, flags ready) {
    auto const scan = [&]<bool Reverse>(std::bool_constant<Reverse>) {
      cuda::detail::recurrence_forward_rows<T, Reverse> const rule{{}, in, h, final_state};
      cuda::detail::launch_scan_rows("first_order_recurrence", policy, rule, h.extent(0), h.extent(1), in.cu_seqlens,
                                     memory, ready);
    };
    in.reverse ? scan(std::true_type{}) : scan(std::false_type{});
  }
  template <class T>
  static void forward(device::cuda const& policy, op::inputs<device::cuda, T, 3> const& in,
                      tensor_view<T, dyn, dyn, dyn> h, tensor_view<accum_t<T>, dyn, dyn> final_state, carries<T> memory,
                      flags ready) {
    cuda::detail::recurrence_forward_channels<T> const rule{{}, in, h, final_state};
    cuda::detail::launch_scan_channels("first_order_recurrence", policy, rule, h.extent(0), h.extent(1), h.extent(2),
                                       in.cu_seqlens, memory, ready);
  }

  template <class T>
  static void backward(device::cuda const& policy, op::gradient_inputs<device::cuda, T, 2> const& in,
                       tensor_view<T, dyn, dyn> d_a, tensor_view<T, dyn, dyn> d_b,
                       tensor_view<accum_t<T>, dyn> d_initial_state, carries<T> memory, flags ready) {
    auto const scan = [&]<bool Reverse>(std::bool_constant<Reverse>) {
      cuda::detail::recurrence_backward_rows<T, Reverse> const rule{{}, in, d_a, d_b, d_initial_state};
      cuda::detail::launch_scan_rows("first_order_recurrence.backward", policy, rule, d_a.extent(0), d_a.extent(1),
                                     in.cu_seqlens, memory, ready);
    };
    in.reverse ? scan(std::false_type{}) : scan(std::true_type{});  // gradients flow against the recurrence
  }
  template <class T>
  static void backward(device::cuda const& policy, op::gradient_inputs<device::cuda, T, 3> const& in,
                       tensor_view<T, dyn, dyn, dyn> d_a, tensor_view<T, dyn, dyn, dyn> d_b,
                       tensor_view<accum_t<T>, dyn, dyn> d_initial_state, carries<T> memory, flags ready) {
    cuda::detail::recurrence_backward_channels<T> const rule{{}, in, d_a, d_b, d_initial_state};
    cuda::detail::launch_scan_channels("first_order_recurrence.backward", policy, rule, d_a.extent(0), d_a.extent(1),
                                       d_a.extent(2), in.cu_seqlens, memory, ready);
  }

  template <class T>
  static void step(device::cuda const& policy, op::step_inputs<device::cuda, T> const& in,
                   tensor_view<accum_t<T>, dyn, dyn> state, tensor_view<T, dyn, dyn> h) {
    bool const packs = cuda::rows_in_packs<4>(in.a) && cuda::rows_in_packs<4>(in.b) && cuda::rows_in_packs<4>(state) &&
                       cuda::rows_in_packs<4>(h);
    cuda::launch(
        "first_order_recurrence.step", policy, {cuda::blocks_for(packs ? h.size() / 4 : h.size(), 256), 256},
        packs ? cuda::detail::first_order_recurrence_step<T, 4> : cuda::detail::first_order_recurrence_step<T, 1>, in,
        state, h);
  }
};

}  // namespace blackmamba
