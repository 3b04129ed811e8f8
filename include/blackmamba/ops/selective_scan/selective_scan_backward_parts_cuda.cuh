#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_exponential_cuda.cuh>

#include <cmath>
#include <cstdint>
#include <type_traits>

/// What the kernels of the backward pass share, and those beside the main one. Instantiated for each T and N in use:
/// scan_adjoint_ends and scan_adjoint_carry, where sequences are cut into parts; scan_projection_sums and
/// scan_parameter_sums.
namespace blackmamba::cuda::detail {

template <class T, int N>
using adjoint_block = selective_scan_tuning::backward_block<N, sizeof(accum_t<T>)>;

inline constexpr int adjoint_chunk = static_cast<int>(selective_scan::chunk_length);
/// Steps whose inputs a thread has on their way, where threads are `turn` steps apart: at most `most`.
__host__ __device__ constexpr int adjoint_batch(int turn, int most) {
  return turn >= adjoint_chunk ? 1 : adjoint_chunk / turn < most ? adjoint_chunk / turn : most;
}

/// Up to chunk_length steps of one sequence.
struct scan_chunk {
  std::int64_t number;    ///< of its checkpoint
  std::int64_t sequence;  ///< row of the states
  std::int64_t batch;     ///< row of the tensors
  std::int64_t first;     ///< its first step in that row
  int steps;
  bool begins, ends;  ///< the sequence
};

/// Chunks in order of their numbers, which have gaps where packed sequences end early.
struct scan_chunks {
  std::int64_t const* cu_seqlens;
  std::int64_t length, sequences, row_chunks;
  selective_scan_tuning::backward_plan plan;

  __device__ std::int64_t begin(std::int64_t part) const {
    return part / plan.unit_parts * plan.unit + part % plan.unit_parts * plan.part_chunks;
  }
  __device__ std::int64_t end(std::int64_t part) const {
    std::int64_t const unit_end = (part / plan.unit_parts + 1) * plan.unit, end = begin(part) + plan.part_chunks;
    return end < unit_end ? end : unit_end;
  }
  __device__ std::int64_t first_number(std::int64_t s) const { return cu_seqlens[s] / adjoint_chunk + s; }
  /// The last sequence whose first chunk's number is at most this one.
  __device__ std::int64_t owner(std::int64_t number) const {
    if (cu_seqlens == nullptr) return number / row_chunks;
    std::int64_t low = 0;
    for (std::int64_t high = sequences; low + 1 < high;) {
      std::int64_t const middle = (low + high) / 2;
      (first_number(middle) <= number ? low : high) = middle;
    }
    return low;
  }
  /// Finds a chunk of sequence s or of one before it; moves s there. @returns false where no chunk has the number
  __device__ bool find(std::int64_t number, std::int64_t& s, scan_chunk& chunk) const {
    if (sequences == 0) return false;
    std::int64_t begin = 0, size = length, k = 0;
    if (cu_seqlens == nullptr) {
      s = number / row_chunks;
      k = number % row_chunks;
    } else {
      while (s > 0 && number < first_number(s)) --s;
      k = number - first_number(s);
      begin = cu_seqlens[s];
      size = cu_seqlens[s + 1] - begin;
    }
    std::int64_t const rest = size - k * adjoint_chunk;
    if (k > 0 && rest <= 0) return false;
    chunk = {.number = number,
             .sequence = s,
             .batch = cu_seqlens == nullptr ? s : 0,
             .first = begin + k * adjoint_chunk,
             .steps = static_cast<int>(rest < adjoint_chunk ? rest : adjoint_chunk),
             .begins = k == 0,
             .ends = rest <= adjoint_chunk};
    return true;
  }
};

/// Four neighbouring channels of a (B, L, D) tensor, by step of a chunk; `count` of them exist. With Packs, all or none
/// of them do, and they are one access.
template <class T, bool Packs>
struct channel_quad {
  using A = accum_t<T>;
  using raw = raw_pack<std::remove_const_t<T>, 4>;
  char* first;
  unsigned stride;  ///< bytes
  int count;

  template <class View>
  __device__ __forceinline__ channel_quad(View const& x, scan_chunk const& chunk, std::int64_t channel, int n)
      : first(const_cast<char*>(reinterpret_cast<char const*>(x.row(chunk.batch, chunk.first) + channel))),
        stride(static_cast<unsigned>(x.stride(1)) * static_cast<unsigned>(sizeof(T))),
        count(n) {}
  __device__ __forceinline__ T* at(int t) const {
    return reinterpret_cast<T*>(first + std::uint64_t{static_cast<unsigned>(t)} * stride);
  }
  /// What stands there, zeros where nothing does or `within` is false; widened only when it is used, so that several
  /// can be on their way.
  __device__ __forceinline__ raw fetch(int t, bool within) const {
    raw x;
#pragma unroll
    for (int w = 0; w < raw::words; ++w) x.w[w] = {};
    if constexpr (Packs) {
      if (within && count > 0) {
#pragma unroll
        for (int w = 0; w < raw::words; ++w) x.w[w] = reinterpret_cast<typename raw::word const*>(at(t))[w];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (within && i < count) x.e[i] = at(t)[i];
    }
    return x;
  }
  __device__ __forceinline__ void put(int t, pack<A, 4> const& x) const {
    if constexpr (Packs) {
      if (count > 0) store_pack<4>(at(t), x);
    } else {
      store_some<4>(at(t), x, count);
    }
  }
};

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
/// silu(z) and its derivative s + z s (1 - s), where 1 - s = s e^-z. Without a gate, one.
template <class A>
struct gate {
  A value, slope;
  __device__ __forceinline__ gate(A z, choice<A> gated) {
    A const e = power_of_two(A(-1.44269504088896340736) * magnitude(z));
    A const r = reciprocal(A(1) + e), er = e * r, s = z < A(0) ? er : r;
    value = gated(z * s, A(1));
    slope = s + z * (r * er);
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

/// Rows of a projection of a chunk, B or C, on their way to shared memory: (steps, states), zeros where there is
/// nothing.
template <class T, int N, int States, int Threads, bool Packs>
struct projection_rows {
  using A = accum_t<T>;
  using raw = raw_pack<T, 4>;
  static constexpr int quads = States / 4, all = adjoint_chunk * quads, each = (all + Threads - 1) / Threads;
  static constexpr int batch = each < 4 ? each : 4;
  raw x[batch];

  template <class View>
  __device__ __forceinline__ void fetch(View const& from, scan_chunk const& chunk, int first) {
    T const* const rows = from.row(chunk.batch, chunk.first);
    std::int64_t const stride = from.stride(1);
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      int const i = first + k * Threads, t = i / quads, n = i % quads * 4;
#pragma unroll
      for (int w = 0; w < raw::words; ++w) x[k].w[w] = {};
      if (t >= chunk.steps) continue;
      T const* const p = rows + t * stride + n;
      if constexpr (Packs && N % 4 == 0) {
        if (n < N) {
#pragma unroll
          for (int w = 0; w < raw::words; ++w) x[k].w[w] = reinterpret_cast<typename raw::word const*>(p)[w];
        }
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (n + e < N) x[k].e[e] = p[e];
      }
    }
  }
  __device__ __forceinline__ void put(A* to, int first) const {
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      int const i = first + k * Threads;
      if (all % (batch * Threads) != 0 && i >= all) continue;
      store_pack<4>(to + 4 * i, pack<A, 4>{widen(x[k].e[0]), widen(x[k].e[1]), widen(x[k].e[2]), widen(x[k].e[3])});
    }
  }
};

/// Asks for the lines of a row to be brought to the second-level cache.
__device__ __forceinline__ void prefetch_line(void const* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

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
    channel_quad<T const, Packs> const delta_of(in.delta, chunk, c, count), d_y_of(in.d_y, chunk, c, count);
    auto const z_of = gated ? channel_quad<T const, Packs>(in.z, chunk, c, count) : d_y_of;
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
        pack<A, 8> x;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          A const dt = time_step<A>(widen(delta[k].e[i]) + bias[i], softplus).dt;
          x[2 * i] = t < chunk.steps ? dt : A(0);
          x[2 * i + 1] = widen(d_y[k].e[i]) * gate<A>(widen(z[k].e[i]), gating).value;
        }
        store_pack<8>(times + (t * width + 4 * q) * 2, x);
      }
    }
    using projection = projection_rows<T, N, block::states, block::threads, Packs>;
#pragma unroll 1
    for (int i = thread; i < projection::all; i += projection::batch * block::threads) {
      projection rows;
      rows.fetch(in.C, chunk, i);
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
