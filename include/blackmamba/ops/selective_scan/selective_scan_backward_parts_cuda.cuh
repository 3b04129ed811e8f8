#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_backward_chunks_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan_exponential_cuda.cuh>

#include <cmath>
#include <cstdint>
#include <type_traits>

/// What the kernels of the backward pass share, and those beside the main one. Instantiated for each T and N in use:
/// scan_adjoint_ends and scan_adjoint_carry, where sequences are cut into parts; scan_projection_sums and
/// scan_parameter_sums.
namespace blackmamba::cuda::detail {

/// All bits, or none, to choose between two values that are both computed: a branch would keep the compiler from
/// interleaving what is done for one element with the next.
template <class A>
struct choice {
  using word = std::conditional_t<sizeof(A) == 4, int, long long>;
  word mask;
  __device__ __forceinline__ explicit choice(bool first) : mask(first ? -1 : 0) {
    if constexpr (sizeof(A) == 4)
      asm("" : "+r"(mask));  // unknown to the compiler, which would make a branch of it
    else
      asm("" : "+l"(mask));
  }
  __device__ __forceinline__ A operator()(A a, A b) const {
    using blackmamba::detail::bits_as;
    return bits_as<A>((bits_as<word>(a) & mask) | (bits_as<word>(b) & ~mask));
  }
};

__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return ::fabs(x); }
__device__ __forceinline__ float positive_part(float x) { return fmaxf(x, 0.0f); }
__device__ __forceinline__ double positive_part(double x) { return ::fmax(x, 0.0); }

/// dt and the derivative of dt with respect to delta: softplus and its slope, 1 / (1 + e^-x) without cancellation.
template <class A>
struct time_step {
  A dt, slope;
  __device__ __forceinline__ time_step(A x, choice<A> softplus) {
    A const e = power_of_two(A(-1.44269504088896340736) * magnitude(x));
    A const r = reciprocal(A(1) + e);
    dt = softplus(positive_part(x) + log1p_unit(e), x);  // NaN comes by way of the second term
    slope = softplus(x < A(0) ? e * r : r, A(1));
  }
};
/// silu(z) and its derivative, s + z s (1 - s), for s = 1 / (1 + e^-z). Without a gate, the value is one.
template <class A>
struct gate {
  A value, slope;
  __device__ __forceinline__ gate(A z, choice<A> gated) {
    A const s = reciprocal(A(1) + power_of_two(A(-1.44269504088896340736) * z)), silu = z * s;
    value = gated(silu, A(1));
    slope = s + silu * (A(1) - s);
  }
};

/// The states of one channel that a lane holds; p points at the channel's first.
template <int N, int Count, class A>
__device__ __forceinline__ void load_lane_states(A const* p, int first, bool present, A* h) {
  if (N % 4 == 0 && pack_aligned<4>(p)) {
#pragma unroll
    for (int n = 0; n < Count; n += 4) {
      bool const within = present && first + n < N;
      auto const x = within ? load_pack<4>(p + first + n) : pack<A, 4>{};
#pragma unroll
      for (int i = 0; i < 4; ++i) h[n + i] = x[i];
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < Count; ++n) h[n] = present && first + n < N ? p[first + n] : A(0);
}
template <int N, int Count, class A>
__device__ __forceinline__ void store_lane_states(A* p, int first, bool present, A const* h) {
  if (N % 4 == 0 && pack_aligned<4>(p)) {
#pragma unroll
    for (int n = 0; n < Count; n += 4)
      if (present && first + n < N) store_pack<4>(p + first + n, pack<A, 4>{h[n], h[n + 1], h[n + 2], h[n + 3]});
    return;
  }
#pragma unroll
  for (int n = 0; n < Count; ++n)
    if (present && first + n < N) p[first + n] = h[n];
}

/// The gradient that reaches the state before each part's first step, where that lies within a sequence: from zero at
/// the part's end, or from d_final_state where the sequence ends in the part; and the sum of dt, by which what comes
/// from beyond the part decays: NaN where nothing does.
template <class T, int N, bool Packs>
__global__ void __launch_bounds__(adjoint_block<T, N>::threads, 512 / adjoint_block<T, N>::threads)
    scan_adjoint_ends(selective_scan::gradient_inputs<device::cuda, T, N> const in,
                      selective_scan::workspace<device::cuda, T> const work, scan_chunks const chunks,
                      unsigned const tiles) {
  using block = adjoint_block<T, N>;
  using A = accum_t<T>;
  constexpr int J = block::lane_channels, Q = block::lane_states, width = block::channels, quads = width / 4;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  A* const times = reinterpret_cast<A*>(shared_bytes);  // (chunk, channels, 2)  dt, gradient of y before the gate
  A* const C = times + 2 * adjoint_chunk * width;       // (chunk, states)
  int const thread = static_cast<int>(threadIdx.x), lane = thread % block::lanes, pair = thread / block::lanes;
  std::int64_t const part = blockIdx.x / tiles, first_channel = std::int64_t{blockIdx.x % tiles} * width;
  std::int64_t const channels = in.d_y.extent(2), channel = first_channel + J * pair;

  std::int64_t const begin = chunks.begin(part), part_end = chunks.end(part);
  std::int64_t s = chunks.owner(begin);
  scan_chunk chunk{};
  bool const linked = chunks.find(begin, s, chunk) && !chunk.begins;
  std::int64_t last = begin;
  if (linked)
    while (!chunk.ends && last + 1 < part_end) chunks.find(++last, s, chunk);
  bool const ends = chunk.ends;

  A rate[J][Q], reaching[J][Q], sum[J];
#pragma unroll
  for (int j = 0; j < J; ++j) {
    bool const present = channel + j < channels;
    std::int64_t const c = present ? channel + j : 0;
    sum[j] = 0;
    load_lane_states<N, Q>(in.A.row(c), lane * Q, present, rate[j]);
#pragma unroll
    for (int n = 0; n < Q; ++n) {
      rate[j][n] = present && lane * Q + n < N ? scan_rate(rate[j][n], in.A_is_log) : A(0);
      reaching[j][n] = A(0);
    }
    if (linked && ends && in.d_final_state.present())
      load_lane_states<N, Q>(in.d_final_state.row(chunk.sequence, c), lane * Q, present, reaching[j]);
  }
  for (std::int64_t number = last; linked && number >= begin; --number) {
    chunks.find(number, s, chunk);
    int const q = thread % quads;
    std::int64_t const c = first_channel + 4 * q;
    int const count = static_cast<int>(min(channels - c, std::int64_t{4}));
    auto const bias = in.delta_bias.present() ? load_some<4>(in.delta_bias.data() + c, count) : pack<A, 4>{};
    bool const gated = in.z.present();
    choice<A> const softplus(in.delta_softplus), gating(gated);
    auto const quad_of = [&](auto const& v) {
      return channel_quad<T const, Packs>(
          v, (chunk.batch * v.stride(0) + chunk.first * v.stride(1) + c) * static_cast<std::int64_t>(sizeof(T)), count);
    };
    auto const delta_of = quad_of(in.delta), d_y_of = quad_of(in.d_y), z_of = gated ? quad_of(in.z) : d_y_of;
    constexpr int step = block::threads / quads, batch = adjoint_batch(step, 4);
#pragma unroll 1
    for (int t0 = thread / quads; t0 < adjoint_chunk; t0 += batch * step) {
      raw_pack<T, 4> delta[batch], d_y[batch], z[batch];
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        int const t = t0 + k * step;
        bool const within = t < chunk.steps;
        delta[k] = delta_of.fetch(t, within), d_y[k] = d_y_of.fetch(t, within), z[k] = z_of.fetch(t, within);
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        int const t = t0 + k * step;
        auto const delta_t = delta[k].widened(), d_y_t = d_y[k].widened(), z_t = z[k].widened();
        pack<A, 8> x;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          A const dt = time_step<A>(delta_t[i] + bias[i], softplus).dt;
          x[2 * i] = t < chunk.steps ? dt : A(0);
          x[2 * i + 1] = d_y_t[i] * gate<A>(z_t[i], gating).value;
        }
        store_pack<8>(times + (t * width + 4 * q) * 2, x);
      }
    }
    using projection = projection_rows<T, N, block::states, block::threads, Packs>;
#pragma unroll 1
    for (int i = thread; i < projection::all; i += projection::batch * block::threads) {
      projection rows;
      rows.fetch(in.C.row(chunk.batch, chunk.first), in.C.stride(1), chunk.steps, i);
      rows.put(C, i);
    }
    __syncthreads();
    // Steps beyond the chunk's last have dt = 0 and gradient zero: they change nothing.
    int const steps = (chunk.steps + 3) / 4 * 4;
#pragma unroll 4
    for (int t = steps - 1; t >= 0; --t) {
      auto const x = load_pack<2 * J>(times + (t * width + J * pair) * 2);
      auto const c_row = load_pack<Q>(C + t * block::states + lane * Q);
#pragma unroll
      for (int j = 0; j < J; ++j) {
        sum[j] += x[2 * j];
#pragma unroll
        for (int n = 0; n < Q; ++n)
          reaching[j][n] = (x[2 * j + 1] * c_row[n] + reaching[j][n]) * power_of_two(x[2 * j] * rate[j][n]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < J; ++j) {
    bool const present = channel + j < channels;
    if (!present) continue;
    store_lane_states<N, Q>(work.carry.row(part, channel + j), lane * Q, present, reaching[j]);
    if (lane == 0) work.steps.row(part)[channel + j] = linked && !ends ? sum[j] : A(NAN);
  }
}

/// Turns those gradients into the ones that reach the last state of each part from the parts after it, last part first.
/// One thread for each state of a channel.
template <class T, int N>
__global__ void __launch_bounds__(64)
    scan_adjoint_carry(view<space::device, accum_t<T> const, dyn, dyn> const rates, bool const A_is_log,
                       selective_scan::workspace<device::cuda, T> const work) {
  using A = accum_t<T>;
  constexpr int ahead = 8;
  std::int64_t const i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x, parts = work.carry.extent(0);
  std::int64_t const channels = work.carry.extent(1), channel = i / N, n = i % N;
  if (channel >= channels) return;
  A const rate = scan_rate(rates(channel, n), A_is_log);
  A reaching = 0;
  for (std::int64_t end = parts; end > 0; end -= ahead) {
    A own[ahead], sum[ahead];
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      std::int64_t const part = end - 1 - k;
      own[k] = part >= 0 ? work.carry(part, channel, n) : A(0);
      sum[k] = part >= 0 ? work.steps(part, channel) : A(0);
    }
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      std::int64_t const part = end - 1 - k;
      if (part < 0) continue;
      work.carry(part, channel, n) = reaching;
      reaching = isnan(sum[k]) ? own[k] : own[k] + power_of_two(rate * sum[k]) * reaching;
    }
  }
}

/// d_B and d_C: sums over groups of channels, in order. One thread for Width neighbouring elements of a row.
template <int Width, class T, int N>
__global__ void __launch_bounds__(128) scan_projection_sums(view<space::device, accum_t<T>, dyn, dyn, dyn> const parts,
                                                            view<space::device, T, dyn, dyn, dyn> const d_B,
                                                            view<space::device, T, dyn, dyn, dyn> const d_C) {
  using A = accum_t<T>;
  std::int64_t const i = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * Width;
  std::int64_t const length = d_B.extent(1), rows = d_B.extent(0) * length, row = i / (2 * N);
  int const column = static_cast<int>(i % (2 * N));
  if (row >= rows) return;
  std::int64_t const groups = parts.extent(0), stride = parts.stride(0);
  A const* const from = parts.data() + i;
  pack<A, Width> sum{};
#pragma unroll 8
  for (std::int64_t g = 0; g < groups; ++g) {
    auto const x = load_pack_streaming<Width>(from + g * stride);
#pragma unroll
    for (int k = 0; k < Width; ++k) sum[k] += x[k];
  }
  T* const p =
      column < N ? d_B.row(row / length, row % length) + column : d_C.row(row / length, row % length) + column - N;
#pragma unroll
  for (int k = 0; k < Width; ++k) p[k] = convert<T>(sum[k]);
}

/// Gradients of A, D and delta_bias: sums over parts, in an order that their number fixes. Each block has 32 columns,
/// first those of A, (D, N), then D, then delta_bias.
template <class T, int N>
__global__ void __launch_bounds__(256)
    scan_parameter_sums(view<space::device, accum_t<T> const, dyn, dyn> const rates, bool const A_is_log,
                        selective_scan::gradients<device::cuda, T> const d,
                        selective_scan::workspace<device::cuda, T> const work) {
  using A = accum_t<T>;
  __shared__ A shared[8][32];
  std::int64_t const channels = work.d_A.extent(1), parts = work.d_A.extent(0), states = channels * N;
  std::int64_t const i = std::int64_t{blockIdx.x} * 32 + threadIdx.x;
  A sum = 0;
  if (i < states + 2 * channels) {
    bool const of_A = i < states;
    A const* const from = of_A ? work.d_A.data() + i : work.d_channel.data() + (i - states);
    std::int64_t const stride = of_A ? states : 2 * channels;
#pragma unroll 4
    for (std::int64_t part = threadIdx.y; part < parts; part += 8) sum += from[part * stride];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || i >= states + 2 * channels) return;
  A total = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) total += shared[k][threadIdx.x];
  if (i < states) {
    if (!d.d_A.present()) return;
    std::int64_t const channel = i / N, n = i % N;
    A const a = rates(channel, n);
    d.d_A(channel, n) += A_is_log ? total * -math::exp(a) : total;
  } else {
    std::int64_t const k = i - states;
    if (k < channels) {
      if (d.d_D.present()) d.d_D(k) += total;
    } else if (d.d_delta_bias.present()) {
      d.d_delta_bias(k - channels) += total;
    }
  }
}

}  // namespace blackmamba::cuda::detail
