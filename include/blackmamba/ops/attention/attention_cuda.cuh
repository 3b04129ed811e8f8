#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/ops/attention/attention.hpp>
#include <blackmamba/ops/attention/attention_backward_cuda.cuh>
#include <blackmamba/ops/attention/attention_forward_cuda.cuh>
#include <blackmamba/ops/attention/attention_rows_cuda.cuh>
#include <blackmamba/ops/attention/attention_simt_cuda.cuh>
#include <blackmamba/ops/attention/attention_step_cuda.cuh>

#include <cmath>
#include <type_traits>

namespace blackmamba {

/// bfloat16 and half run on tensor cores, float and double do not; on one kind of device, which kernel runs depends on
/// the type and the head dimension alone, and a query meets the keys in the same order wherever it stands: packed
/// sequences, pieces of a prompt and the whole give the same bits.
template <>
struct backend<attention, device::cuda> {
  using policy_type = device::cuda;
  template <class T>
  static void forward(policy_type const& policy, attention::inputs<policy_type, T> const& in,
                      out<policy_type, T, dyn, dyn, dyn, dyn> y, attention::results<policy_type, T> const& keep,
                      attention::rotary_tables<policy_type, T> const& tables) {
    auto const& held = keep.cache;
    bool const cached = held.key.present(), turned = tables.angles.present();
    auto const map = map_of(in.q, in.cu_seqlens);
    std::int64_t const rows = in.q.extent(0) * in.q.extent(1), head_dim = in.q.extent(3);
    if (turned)
      fill<accum_t<T>>("attention", policy, in.rotary_base, map, cached ? held.length.data() : nullptr, tables.angles);
    if (cached)
      cuda::launch("attention", policy, {cuda::blocks_for(rows, 1), 128}, attention_cuda::append_rows<T>,
                   attention_cuda::heads_of<T const>(in.k), attention_cuda::heads_of<T const>(in.v),
                   attention_cuda::heads_of<T>(held.key), attention_cuda::heads_of<T>(held.value),
                   static_cast<std::int32_t const*>(held.length.data()), held.key.extent(1),
                   static_cast<int>(in.k.extent(2)), static_cast<int>(head_dim), map,
                   static_cast<accum_t<T> const*>(tables.angles.data()));
    else if (turned)
      turn("attention", policy, in.k, map, tables.angles, tables.k);

    attention_cuda::forward_arguments<T> a;
    a.q = attention_cuda::heads_of<T const>(in.q);
    if (cached) {
      a.k = attention_cuda::heads_of<T const>(held.key);
      a.v = attention_cuda::heads_of<T const>(held.value);
      a.past = held.length.data();
      a.capacity = held.key.extent(1);
      a.kv_vectorised = cuda::rows_in_packs<8>(held.key) && cuda::rows_in_packs<8>(held.value);
    } else {
      a.k = turned ? attention_cuda::heads_of<T const>(tables.k) : attention_cuda::heads_of<T const>(in.k);
      a.v = attention_cuda::heads_of<T const>(in.v);
      a.kv_vectorised =
          (turned ? cuda::rows_in_packs<8>(tables.k) : cuda::rows_in_packs<8>(in.k)) && cuda::rows_in_packs<8>(in.v);
    }
    a.y = attention_cuda::heads_of<T>(y);
    a.lse = keep.lse.data();
    a.lse_batch = keep.lse.stride(0);
    a.lse_head = keep.lse.stride(1);
    a.angles = tables.angles.data();
    a.map = map;
    a.heads = static_cast<int>(in.q.extent(2));
    a.share = static_cast<int>(in.q.extent(2) / in.k.extent(2));
    a.head_dim = static_cast<int>(head_dim);
    a.scale = scale_of<T>(head_dim);
    a.q_vectorised = cuda::rows_in_packs<8>(in.q);
    a.y_paired = cuda::rows_in_packs<2>(y);
    if constexpr (sizeof(T) == 2)
      with_head_dim(head_dim, [&](auto padded) {
        auto const run = [&](auto keys) {
          using shape = attention_cuda::forward_shape<padded, keys>;
          cuda::launch("attention", policy, {blocks(map, shape::queries, a.heads), shape::threads, shape::shared_bytes},
                       attention_cuda::forward_tiles<T, padded, keys>, a);
        };
        if constexpr (padded >= 128)
          if (attention_cuda::forward_shape<padded>::shared_bytes >
              static_cast<std::size_t>(cuda::properties().shared_bytes_per_block))
            return run(std::integral_constant<int, 32>{});
        run(std::integral_constant<int, 64>{});
      });
    else
      cuda::launch("attention", policy,
                   {blocks(map, attention_cuda::simt_rows, a.heads), attention_cuda::simt_threads,
                    attention_cuda::simt_shared_bytes<T>(2, head_dim)},
                   attention_cuda::forward_simt<T>, a);
    if (cached)
      cuda::launch("attention", policy, {cuda::blocks_for(map.count, 256), 256}, attention_cuda::advance_lengths<0>,
                   map, held.key.extent(1), held.length.data());
  }

  template <class T>
  static void backward(policy_type const& policy, attention::gradient_inputs<policy_type, T> const& in,
                       attention::gradients<policy_type, T> const& grad,
                       attention::rotary_tables<policy_type, T> const& tables,
                       out<policy_type, accum_t<T>, dyn, dyn, dyn> delta) {
    char const* const op = "attention.backward";
    auto const map = map_of(in.q, in.cu_seqlens);
    std::int64_t const rows = in.q.extent(0) * in.q.extent(1), heads = in.q.extent(2), kv_heads = in.k.extent(2),
                       head_dim = in.q.extent(3);
    bool const turned = tables.angles.present();
    if (turned) {
      fill<accum_t<T>>(op, policy, in.rotary_base, map, nullptr, tables.angles);
      turn(op, policy, in.q, map, tables.angles, tables.q);
      turn(op, policy, in.k, map, tables.angles, tables.k);
    }
    constexpr int width = cuda::pack_width<T>;
    cuda::launch(op, policy, {cuda::blocks_for(rows, 1), 128}, attention_cuda::fill_delta<T>,
                 attention_cuda::heads_of<T const>(in.y), attention_cuda::heads_of<T const>(in.d_y),
                 static_cast<int>(heads), static_cast<int>(head_dim), in.q.extent(1), delta.data(),
                 cuda::rows_in_packs<width>(in.y) && cuda::rows_in_packs<width>(in.d_y));

    attention_cuda::gradient_arguments<T> a;
    a.q = turned ? attention_cuda::heads_of<T const>(tables.q) : attention_cuda::heads_of<T const>(in.q);
    a.k = turned ? attention_cuda::heads_of<T const>(tables.k) : attention_cuda::heads_of<T const>(in.k);
    a.v = attention_cuda::heads_of<T const>(in.v);
    a.d_y = attention_cuda::heads_of<T const>(in.d_y);
    a.d_q = attention_cuda::heads_of<T>(grad.d_q);
    a.d_k = attention_cuda::heads_of<T>(grad.d_k);
    a.d_v = attention_cuda::heads_of<T>(grad.d_v);
    a.lse = in.lse.data();
    a.lse_batch = in.lse.stride(0);
    a.lse_head = in.lse.stride(1);
    a.delta = delta.data();
    a.delta_batch = delta.stride(0);
    a.delta_head = delta.stride(1);
    a.angles = tables.angles.data();
    a.map = map;
    a.heads = static_cast<int>(heads);
    a.share = static_cast<int>(heads / kv_heads);
    a.head_dim = static_cast<int>(head_dim);
    a.scale = scale_of<T>(head_dim);
    a.inverse_root = static_cast<accum_t<T>>(1 / std::sqrt(static_cast<double>(head_dim)));
    a.q_vectorised = turned ? cuda::rows_in_packs<8>(tables.q) : cuda::rows_in_packs<8>(in.q);
    a.kv_vectorised =
        (turned ? cuda::rows_in_packs<8>(tables.k) : cuda::rows_in_packs<8>(in.k)) && cuda::rows_in_packs<8>(in.v);
    a.d_y_vectorised = cuda::rows_in_packs<8>(in.d_y);
    if constexpr (sizeof(T) == 2) {
      with_head_dim(head_dim, [&](auto padded) {
        using of_queries = attention_cuda::query_gradient_shape<padded>;
        using of_keys = attention_cuda::key_gradient_shape<padded>;
        cuda::launch(op, policy,
                     {blocks(map, of_queries::queries, heads), of_queries::threads, of_queries::shared_bytes},
                     attention_cuda::query_gradient_tiles<T, padded>, a);
        cuda::launch(op, policy, {blocks(map, of_keys::keys, kv_heads), of_keys::threads, of_keys::shared_bytes},
                     attention_cuda::key_gradient_tiles<T, padded>, a);
      });
    } else {
      auto const shared = attention_cuda::simt_shared_bytes<T>(4, head_dim);
      cuda::launch(op, policy, {blocks(map, attention_cuda::simt_rows, heads), attention_cuda::simt_threads, shared},
                   attention_cuda::query_gradient_simt<T>, a);
      cuda::launch(op, policy, {blocks(map, attention_cuda::simt_rows, kv_heads), attention_cuda::simt_threads, shared},
                   attention_cuda::key_gradient_simt<T>, a);
    }
  }

  template <class T>
  static void step(policy_type const& policy, attention::step_inputs<policy_type, T> const& in,
                   attention::cache<policy_type, T> const& state, out<policy_type, T, dyn, dyn, dyn> y,
                   out<policy_type, std::int32_t, dyn> held, out<policy_type, accum_t<T>, dyn, dyn, dyn, dyn> partial) {
    attention_cuda::step_arguments<T> a;
    a.q = one_row<T const>(in.q);
    a.k = one_row<T const>(in.k);
    a.v = one_row<T const>(in.v);
    a.key = attention_cuda::heads_of<T>(state.key);
    a.value = attention_cuda::heads_of<T>(state.value);
    a.y = one_row<T>(y);
    a.length = state.length.data();
    a.held = held.data();
    a.partial = partial.data();
    a.batch = y.extent(0);
    a.capacity = state.key.extent(1);
    if (a.capacity == 0) return;
    a.splits = partial.extent(1);
    a.heads = static_cast<int>(y.extent(1));
    a.share = static_cast<int>(y.extent(1) / in.k.extent(1));
    a.head_dim = static_cast<int>(y.extent(2));
    a.scale = scale_of<T>(y.extent(2));
    a.turn = attention_cuda::rotary(in.rotary_base, y.extent(2));
    a.vectorised = cuda::rows_in_packs<8>(state.key) && cuda::rows_in_packs<8>(state.value);
    auto const launch_parts = [&](auto lanes) {
      auto const run = [&](auto group) {
        std::int64_t const groups = (a.share + group - 1) / group;
        cuda::launch("attention.step", policy,
                     {cuda::blocks_for(a.batch * a.splits * in.k.extent(1) * groups, 1), attention_cuda::step_threads},
                     attention_cuda::step_parts<T, lanes, group>, a);
      };
      if (a.share == 1)
        run(std::integral_constant<int, 1>{});
      else
        run(std::integral_constant<int, 4>{});
    };
    if (a.head_dim <= 64)
      launch_parts(std::integral_constant<int, 8>{});
    else if (a.head_dim <= 128)
      launch_parts(std::integral_constant<int, 16>{});
    else
      launch_parts(std::integral_constant<int, 32>{});
    cuda::launch("attention.step", policy, {cuda::blocks_for(a.batch * a.heads, 1), 256},
                 attention_cuda::add_step_parts<T>, a);
  }

 private:
  template <class Q, class Offsets>
  static attention_cuda::sequence_map map_of(Q const& q, Offsets const& offsets) {
    return {.offsets = offsets.data(),
            .count = offsets.present() ? offsets.extent(0) - 1 : q.extent(0),
            .length = q.extent(1)};
  }
  template <class T>
  static accum_t<T> scale_of(std::int64_t head_dim) {
    return static_cast<accum_t<T>>(attention_math::log2_e / std::sqrt(static_cast<double>(head_dim)));
  }
  static unsigned blocks(attention_cuda::sequence_map const& map, std::int64_t rows, std::int64_t heads) {
    return cuda::blocks_for(map.tiles(rows) * heads, 1);
  }
  /// (B, H, dh) as (B, 1, H, dh).
  template <class T, class View>
  static attention_cuda::heads_view<T> one_row(View const& x) {
    return {x.data(), x.stride(0), 0, x.stride(1)};
  }
  template <class F>
  static void with_head_dim(std::int64_t head_dim, F&& f) {
    if (head_dim <= 32)
      f(std::integral_constant<int, 32>{});
    else if (head_dim <= 64)
      f(std::integral_constant<int, 64>{});
    else if (head_dim <= 96)
      f(std::integral_constant<int, 96>{});
    else if (head_dim <= 128)
      f(std::integral_constant<int, 128>{});
    else
      f(std::integral_constant<int, 256>{});
  }
  template <class A, class Angles>
  static void fill(char const* op, policy_type const& policy, float base, attention_cuda::sequence_map const& map,
                   std::int32_t const* past, Angles const& angles) {
    std::int64_t const head_dim = angles.extent(1);
    cuda::launch(op, policy, {cuda::blocks_for(angles.extent(0) * head_dim / 2, 256), 256},
                 attention_cuda::fill_angles<A>, attention_cuda::rotary(base, head_dim), map, past, angles.extent(0),
                 angles.data());
  }
  template <class X, class Angles, class Turned>
  static void turn(char const* op, policy_type const& policy, X const& x, attention_cuda::sequence_map const& map,
                   Angles const& angles, Turned const& to) {
    using T = typename X::value_type;
    constexpr int width = cuda::pack_width<T>;
    std::int64_t const head_dim = x.extent(3);
    bool const vectorised = cuda::rows_in_packs<width>(x) && head_dim / 2 % width == 0;
    cuda::launch(op, policy, {cuda::blocks_for(x.extent(0) * x.extent(1), 1), 128}, attention_cuda::turn_rows<T>,
                 attention_cuda::heads_of<T const>(x), to.data(), static_cast<int>(x.extent(2)),
                 static_cast<int>(head_dim), map, static_cast<accum_t<T> const*>(angles.data()), vectorised);
  }
};

}  // namespace blackmamba
