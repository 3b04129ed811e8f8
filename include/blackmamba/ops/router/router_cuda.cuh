#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/router/router.hpp>
#include <blackmamba/ops/router/router_math.hpp>

#include <algorithm>
#include <type_traits>

/// Instantiations: router_forward and router_backward for float and double, and the former for 8 experts in float. Both
/// are bound by their bytes, E values in and k pairs out for each row: a block brings a tile of rows into shared memory
/// with wide accesses, and then a thread works on each row. Rows that are too wide for that stay where they are.
namespace blackmamba::cuda::detail {

inline constexpr int router_threads = 128;

/// Rows of a block that fit in shared memory, and the distance from one to the next there, odd to spread over the
/// banks.
struct router_tile {
  int rows = router_threads;
  int stride = 0;  // 0: no tile

  template <class A>
  static router_tile of(std::int64_t experts) {
    std::int64_t const stride = experts | 1;
    std::int64_t const fitting = properties().shared_bytes_per_block / (static_cast<std::int64_t>(sizeof(A)) * stride);
    if (fitting < 32) return {};
    return {static_cast<int>(std::min<std::int64_t>(router_threads, fitting / 32 * 32)), static_cast<int>(stride)};
  }
  template <class A>
  std::size_t bytes() const {
    return sizeof(A) * static_cast<std::size_t>(stride) * static_cast<std::size_t>(rows);
  }
};

/// Brings rows [first, first + rows) of x into the tile.
template <class A>
__device__ __forceinline__ void router_load(A const* x, std::int64_t x_stride, std::int64_t rows, int experts,
                                            bool packs, A* tile, int stride) {
  auto const elements = static_cast<unsigned>(rows * experts), width = static_cast<unsigned>(experts);
  if (packs) {  // four neighbours of one row
    for (unsigned i = threadIdx.x * 4; i < elements; i += blockDim.x * 4) {
      unsigned const r = i / width, j = i % width;
      auto const v = load_pack<4>(x + r * x_stride + j);
      A* const to = tile + r * static_cast<unsigned>(stride) + j;
#pragma unroll
      for (int n = 0; n < 4; ++n) to[n] = v[n];
    }
  } else {
    for (unsigned i = threadIdx.x; i < elements; i += blockDim.x) {
      unsigned const r = i / width, j = i % width;
      tile[r * static_cast<unsigned>(stride) + j] = x[r * x_stride + j];
    }
  }
}
template <class A>
__device__ __forceinline__ void router_store(A const* tile, int stride, std::int64_t rows, int experts, bool packs,
                                             A* x, std::int64_t x_stride) {
  auto const elements = static_cast<unsigned>(rows * experts), width = static_cast<unsigned>(experts);
  if (packs) {
    for (unsigned i = threadIdx.x * 4; i < elements; i += blockDim.x * 4) {
      unsigned const r = i / width, j = i % width;
      A const* const from = tile + r * static_cast<unsigned>(stride) + j;
      pack<A, 4> v;
#pragma unroll
      for (int n = 0; n < 4; ++n) v[n] = from[n];
      store_pack<4>(x + r * x_stride + j, v);
    }
  } else {
    for (unsigned i = threadIdx.x; i < elements; i += blockDim.x) {
      unsigned const r = i / width, j = i % width;
      x[r * x_stride + j] = tile[r * static_cast<unsigned>(stride) + j];
    }
  }
}

template <class A>
struct router_forward_arguments {
  std::int64_t rows;
  int experts, k;
  gate_function gate_rule;
  A beta;
  A const* logits;
  std::int64_t logits_stride;
  bool packs;
  A const* offset;
  std::int32_t* expert;
  std::int64_t expert_stride;
  A* gate;
  std::int64_t gate_stride;
  std::int32_t* non_finite_rows;  // null: not counted. Zeroed before where blocks are several.
  router_tile tile;
};

/// Routes the row whose logits are logit(j), and tells its experts to tell(a, expert); returns whether it goes nowhere.
template <class A, class Logit, class Tell>
__device__ __forceinline__ bool router_row(router_forward_arguments<A> const& p, std::int64_t r, std::int64_t experts,
                                           Logit&& logit, Tell&& tell) {
  std::int32_t* const expert = p.expert + r * p.expert_stride;
  A* const gate = p.gate + r * p.gate_stride;
  if (!(math::finite_test<A>(experts, logit) == A(0))) {
    for (int a = 0; a < p.k; ++a) {
      expert[a] = -1;
      gate[a] = 0;
    }
    return true;
  }
  auto const offset = [&](std::int64_t j) { return p.offset ? p.offset[j] : A(0); };
  math::softmax_sums<A> over{0, 1};
  if (p.gate_rule == gate_function::softmax) over = math::softmax_over<A>(experts, logit);
  auto choice = math::no_choice<A>();
  A largest = A(-INFINITY), sum = 0;
  for (int a = 0; a < p.k; ++a) {
    choice = math::next_choice(choice, experts, p.beta, logit, offset);
    auto const e = static_cast<std::int32_t>(choice.expert);
    expert[a] = e;
    tell(a, e);
    if (p.gate_rule == gate_function::sigmoid)
      gate[a] = math::sigmoid(choice.logit);
    else if (p.gate_rule == gate_function::softmax)
      gate[a] = math::exp(choice.logit - over.largest) / over.sum;
    else
      largest = math::max(largest, gate[a] = choice.logit);
  }
  if (p.gate_rule == gate_function::softmax_selected) {
    for (int a = 0; a < p.k; ++a) sum += gate[a] = math::exp(gate[a] - largest);
    for (int a = 0; a < p.k; ++a) gate[a] /= sum;
  }
  return false;
}

template <class A, class Logit>
__device__ __forceinline__ bool router_row(router_forward_arguments<A> const& p, std::int64_t r, std::int64_t experts,
                                           Logit&& logit) {
  return router_row(p, r, experts, logit, [](int, std::int32_t) {});
}

/// Experts is 8, the usual number, where the rows are two packs of four: they stay in registers. Else 0.
template <class A, int Experts>
__global__ void __launch_bounds__(router_threads) router_forward(router_forward_arguments<A> p) {
  wait_for_launch_ahead();
  let_next_launch_begin();
  extern __shared__ __align__(16) unsigned char router_memory[];
  std::int64_t const first = std::int64_t{blockIdx.x} * p.tile.rows;
  std::int64_t const rows = p.rows - first < p.tile.rows ? p.rows - first : p.tile.rows;
  std::int64_t const r = first + threadIdx.x;
  bool refused = false;
  if constexpr (Experts == 8) {
    if (threadIdx.x < rows) {
      A const* const from = p.logits + r * p.logits_stride;
      auto const low = load_pack<4>(from), high = load_pack<4>(from + 4);
      A const x[8] = {low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
      refused = router_row(p, r, 8, [&](std::int64_t j) { return x[j]; });
    }
  } else {
    A* const tile = reinterpret_cast<A*>(router_memory);
    A const* x = p.logits + r * p.logits_stride;
    if (p.tile.stride > 0) {
      router_load(p.logits + first * p.logits_stride, p.logits_stride, rows, p.experts, p.packs, tile, p.tile.stride);
      __syncthreads();
      x = tile + static_cast<int>(threadIdx.x) * p.tile.stride;
    }
    if (threadIdx.x < rows) refused = router_row(p, r, p.experts, [x](std::int64_t j) { return x[j]; });
  }
  if (!p.non_finite_rows) return;
  int const count = __syncthreads_count(refused);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1)
    *p.non_finite_rows = count;
  else if (count > 0)
    atomicAdd(p.non_finite_rows, count);  // of integers: the order is of no consequence
}

template <class A>
struct router_backward_arguments {
  std::int64_t rows;
  int experts, k;
  gate_function gate_rule;
  A const* logits;
  std::int64_t logits_stride;
  std::int32_t const* expert;
  std::int64_t expert_stride;
  A const* d_gate;
  std::int64_t d_gate_stride;
  A* d_logits;
  std::int64_t d_logits_stride;
  bool packs_in, packs_out;
  router_tile tile;
};

template <class A>
__global__ void __launch_bounds__(router_threads) router_backward(router_backward_arguments<A> p) {
  extern __shared__ __align__(16) unsigned char router_memory[];
  A* const tile = reinterpret_cast<A*>(router_memory);
  std::int64_t const first = std::int64_t{blockIdx.x} * p.tile.rows;
  std::int64_t const rows = p.rows - first < p.tile.rows ? p.rows - first : p.tile.rows;
  std::int64_t const r = first + threadIdx.x;
  bool const softmax = p.gate_rule == gate_function::softmax, staged = p.tile.stride > 0;
  A const* const logits = p.logits + r * p.logits_stride;
  A* const d = staged ? tile + static_cast<int>(threadIdx.x) * p.tile.stride : p.d_logits + r * p.d_logits_stride;
  // Softmax turns the tile of logits into that of their gradients, in place; the others read the selected logits only.
  if (staged && softmax)
    router_load(p.logits + first * p.logits_stride, p.logits_stride, rows, p.experts, p.packs_in, tile, p.tile.stride);
  __syncthreads();
  if (threadIdx.x < rows) {
    std::int32_t const* const expert = p.expert + r * p.expert_stride;
    A const* const d_gate = p.d_gate + r * p.d_gate_stride;
    auto const selected = [&](std::int64_t a) { return logits[expert[a]]; };
    if (p.k == 0 || expert[0] < 0 || !softmax)
      for (int j = 0; j < p.experts; ++j) d[j] = 0;
    if (p.k == 0 || expert[0] < 0) {
    } else if (p.gate_rule == gate_function::sigmoid) {
      for (int a = 0; a < p.k; ++a) {
        A const s = math::sigmoid(selected(a));
        d[expert[a]] = d_gate[a] * s * (1 - s);
      }
    } else if (softmax) {
      A const* const x = staged ? d : logits;
      auto const over = math::softmax_over<A>(p.experts, [x](std::int64_t j) { return x[j]; });
      A const scale = 1 / over.sum;
      A mean = 0;
      for (int a = 0; a < p.k; ++a) mean += d_gate[a] * math::exp(selected(a) - over.largest) * scale;
      for (int j = 0; j < p.experts; ++j) d[j] = math::exp(x[j] - over.largest) * (-mean * scale);
      for (int a = 0; a < p.k; ++a) d[expert[a]] += d_gate[a] * math::exp(selected(a) - over.largest) * scale;
    } else {
      auto const over = math::softmax_over<A>(p.k, selected);
      auto const share = [&](std::int64_t a) { return math::exp(selected(a) - over.largest) / over.sum; };
      A mean = 0;
      for (int a = 0; a < p.k; ++a) mean += d_gate[a] * share(a);
      for (int a = 0; a < p.k; ++a) d[expert[a]] = share(a) * (d_gate[a] - mean);
    }
  }
  if (!staged) return;
  __syncthreads();
  router_store(tile, p.tile.stride, rows, p.experts, p.packs_out, p.d_logits + first * p.d_logits_stride,
               p.d_logits_stride);
}

}  // namespace blackmamba::cuda::detail

namespace blackmamba {

template <>
struct backend<router, device::cuda> {
  template <class T>
  static void forward(device::cuda const& policy, router::inputs<device::cuda, T> const& in,
                      router::selection<device::cuda, T> const& chosen, router::options const& options) {
    using A = accum_t<T>;
    std::int64_t const rows = in.logits.extent(0), experts = in.logits.extent(1);
    cuda::detail::router_tile const tile = cuda::detail::router_tile::of<A>(experts);
    unsigned const blocks = cuda::blocks_for(rows, tile.rows);
    if (chosen.non_finite_rows.present() && blocks != 1)
      cuda::check("router", cudaMemsetAsync(chosen.non_finite_rows.data(), 0, sizeof(std::int32_t), policy.stream));
    cuda::detail::router_forward_arguments<A> const arguments{.rows = rows,
                                                              .experts = static_cast<int>(experts),
                                                              .k = static_cast<int>(chosen.expert.extent(1)),
                                                              .gate_rule = options.gate,
                                                              .beta = static_cast<A>(options.beta),
                                                              .logits = in.logits.data(),
                                                              .logits_stride = in.logits.stride(0),
                                                              .packs = cuda::rows_in_packs<4>(in.logits),
                                                              .offset = in.offset.data(),
                                                              .expert = chosen.expert.data(),
                                                              .expert_stride = chosen.expert.stride(0),
                                                              .gate = chosen.gate.data(),
                                                              .gate_stride = chosen.gate.stride(0),
                                                              .non_finite_rows = chosen.non_finite_rows.data(),
                                                              .tile = tile};
    if constexpr (std::is_same_v<A, float>)
      if (experts == 8 && arguments.packs)
        return cuda::launch("router", policy,
                            {.blocks = blocks, .threads = cuda::detail::router_threads, .early = true},
                            cuda::detail::router_forward<A, 8>, arguments);
    cuda::launch(
        "router", policy,
        {.blocks = blocks, .threads = cuda::detail::router_threads, .shared_bytes = tile.bytes<A>(), .early = true},
        cuda::detail::router_forward<A, 0>, arguments);
  }

  template <class A>
  static void backward(device::cuda const& policy, router::gradient_inputs<device::cuda, A> const& in,
                       view<space::device, A, dyn, dyn> d_logits, gate_function gate) {
    std::int64_t const rows = d_logits.extent(0), experts = d_logits.extent(1);
    cuda::detail::router_tile const tile = cuda::detail::router_tile::of<A>(experts);
    cuda::detail::router_backward_arguments<A> const arguments{.rows = rows,
                                                               .experts = static_cast<int>(experts),
                                                               .k = static_cast<int>(in.expert.extent(1)),
                                                               .gate_rule = gate,
                                                               .logits = in.logits.data(),
                                                               .logits_stride = in.logits.stride(0),
                                                               .expert = in.expert.data(),
                                                               .expert_stride = in.expert.stride(0),
                                                               .d_gate = in.d_gate.data(),
                                                               .d_gate_stride = in.d_gate.stride(0),
                                                               .d_logits = d_logits.data(),
                                                               .d_logits_stride = d_logits.stride(0),
                                                               .packs_in = cuda::rows_in_packs<4>(in.logits),
                                                               .packs_out = cuda::rows_in_packs<4>(d_logits),
                                                               .tile = tile};
    cuda::launch("router.backward", policy,
                 {cuda::blocks_for(rows, tile.rows), cuda::detail::router_threads, tile.bytes<A>()},
                 cuda::detail::router_backward<A>, arguments);
  }
};

}  // namespace blackmamba
