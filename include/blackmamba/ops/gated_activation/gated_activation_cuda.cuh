#pragma once
#include <blackmamba/core/cuda/elementwise_cuda.cuh>
#include <blackmamba/core/cuda/exponential_cuda.cuh>
#include <blackmamba/ops/gated_activation/gated_activation.hpp>

namespace blackmamba {

namespace detail {

/// What an activation makes of a gate whose results are rounded to T.
template <class Activation, class T>
struct activation_for {
  using A = accum_t<T>;
  A gate;
  __device__ __forceinline__ explicit activation_for(A x) : gate(x) {}
  __device__ __forceinline__ A value() const { return Activation::apply(gate); }
  __device__ __forceinline__ A derivative() const { return Activation::derivative(gate); }
};

/// SiLU for results of 16 bits: the exponential's argument comes with a rounding error that the exponential enlarges by
/// |x|, at most 88, so that the relative error stays below 2^-16.
template <class T>
requires(sizeof(T) == 2) struct activation_for<activation::silu, T> {
  float gate, sigmoid;
  __device__ __forceinline__ explicit activation_for(float x) : gate(x) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1.0f + e));
  }
  __device__ __forceinline__ float value() const { return gate * sigmoid; }
  /// s + x s (1 - s)
  __device__ __forceinline__ float derivative() const { return math::fma(gate * sigmoid, 1.0f - sigmoid, sigmoid); }
};

/// GELU for results of 16 bits, where the float's would be half of the kernel: x Phi(x) = max(x, 0) - a Phi(-a) with
/// a = |x|, and Phi(-a) = e^(-a^2 / 2) t P(t) with t = 1 / (1 + 0.362 a), where P is the polynomial of degree 6 whose
/// relative error over 0 <= a <= 14 is smallest: 2^-20.3. With the rounding of the exponent, which grows with a^2, the
/// relative error stays below 2^-17, a sixtieth of half's rounding. Phi(-15) is 0 in float.
template <class T>
requires(sizeof(T) == 2) struct activation_for<activation::gelu, T> {
  float gate, distance, bell, tail;  // x, min(|x|, 15), e^(-a^2 / 2), Phi(-a)
  __device__ __forceinline__ explicit activation_for(float x) : gate(x), distance(fminf(fabsf(x), 15.0f)) {
    float const t = cuda::reciprocal(math::fma(distance, 0.362f, 1.0f));
    bell = cuda::power_of_two(distance * -0.721347520f * distance);
    float p = 0.0479383533f;
    p = math::fma(p, t, -0.180009855f);
    p = math::fma(p, t, 0.176617428f);
    p = math::fma(p, t, 0.0288314417f);
    p = math::fma(p, t, 0.139429679f);
    p = math::fma(p, t, 0.142689318f);
    p = math::fma(p, t, 0.144503906f);
    tail = p * (t * bell);
  }
  __device__ __forceinline__ float value() const {
    float positive;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(positive) : "f"(gate));
    return math::fma(-distance, tail, positive);
  }
  /// Phi(x) + x phi(x)
  __device__ __forceinline__ float derivative() const {
    return math::fma(gate, 0.398942280f * bell, gate < 0 ? tail : 1.0f - tail);
  }
};

template <class Activation, class T>
struct gated_activation_elements {
  view<space::device, T const, dyn, dyn> gate, up;  // up: may be absent
  view<space::device, T, dyn, dyn> y;
  std::int64_t const* row_count;  // may be null

  template <int N>
  struct operands {
    cuda::stored_pack<N, T> gate, up;
  };
  template <int N>
  __device__ operands<N> load(std::int64_t r, std::int64_t c, std::int64_t left) const {
    operands<N> x;
    x.gate = cuda::load_element_pack<N>(gate, r, c, left);
    if (up.present()) x.up = cuda::load_element_pack<N>(up, r, c, left);
    return x;
  }
  template <int N>
  __device__ void finish(operands<N> const& x, std::int64_t r, std::int64_t c, std::int64_t left) const {
    auto v = x.gate.widened();
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = activation_for<Activation, T>(v[i]).value();
    if (up.present()) {
      auto const other = x.up.widened();
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] *= other[i];
    }
    cuda::store_element_pack<N>(y, r, c, left, v);
  }
};

template <class Activation, class T>
struct gated_activation_gradient_elements {
  view<space::device, T const, dyn, dyn> gate, up, d_y;  // up and d_up: may be absent
  view<space::device, T, dyn, dyn> d_gate, d_up;
  std::int64_t const* row_count;  // may be null

  template <int N>
  struct operands {
    cuda::stored_pack<N, T> gate, up, d_y;
  };
  template <int N>
  __device__ operands<N> load(std::int64_t r, std::int64_t c, std::int64_t left) const {
    operands<N> x;
    x.gate = cuda::load_element_pack<N>(gate, r, c, left);
    x.d_y = cuda::load_element_pack<N>(d_y, r, c, left);
    if (up.present()) x.up = cuda::load_element_pack<N>(up, r, c, left);
    return x;
  }
  template <int N>
  __device__ void finish(operands<N> const& x, std::int64_t r, std::int64_t c, std::int64_t left) const {
    auto const g = x.gate.widened(), d = x.d_y.widened();
    cuda::pack<accum_t<T>, N> of_gate;
    if (!up.present()) {
#pragma unroll
      for (int i = 0; i < N; ++i) of_gate[i] = d[i] * activation_for<Activation, T>(g[i]).derivative();
    } else {
      auto const other = x.up.widened();
      cuda::pack<accum_t<T>, N> of_up;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        activation_for<Activation, T> const act(g[i]);
        of_gate[i] = d[i] * act.derivative() * other[i];
        of_up[i] = d[i] * act.value();
      }
      cuda::store_element_pack<N>(d_up, r, c, left, of_up);
    }
    cuda::store_element_pack<N>(d_gate, r, c, left, of_gate);
  }
};

}  // namespace detail

/// Bytes of an element: forward three of T, backward five. An activation's apply and derivative run on the device: mark
/// one's own BLACKMAMBA_HD. Kernels: (forward, backward) x (packs, single elements), for each Activation and T.
template <>
struct backend<gated_activation, device::cuda> {
  template <class Activation, class T>
  static void forward(device::cuda const& policy, std::type_identity<Activation>,
                      view<space::device, T const, dyn, dyn> gate, view<space::device, T const, dyn, dyn> up,
                      view<space::device, T, dyn, dyn> y, view<space::device, std::int64_t const, dyn> row_count) {
    cuda::launch_elements("gated_activation", policy, shape_of<T>(row_count.present(), y, gate, up),
                          detail::gated_activation_elements<Activation, T>{gate, up, y, row_count.data()});
  }

  template <class Activation, class T>
  static void backward(device::cuda const& policy, std::type_identity<Activation>,
                       gated_activation::gradient_inputs<device::cuda, T> const& in,
                       gated_activation::gradients<device::cuda, T> const& out) {
    cuda::launch_elements("gated_activation.backward", policy,
                          shape_of<T>(in.row_count.present(), out.d_gate, out.d_up, in.gate, in.up, in.d_y),
                          detail::gated_activation_gradient_elements<Activation, T>{in.gate, in.up, in.d_y, out.d_gate,
                                                                                    out.d_up, in.row_count.data()});
  }

 private:
  /// Rows that are counted on the device keep their own.
  template <class T, class... Views>
  static auto shape_of(bool counted, Views const&... views) {
    using shape = cuda::element_shape<cuda::pack_width<T>>;
    return counted ? shape::row_by_row(views...) : shape(views...);
  }
};

}  // namespace blackmamba
