#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/packed.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>

#include <algorithm>
#include <cstdint>
#include <string>

namespace blackmamba {

/// Causal multi-head attention with rotary positions (Vaswani et al., arXiv 1706.03762, eq. 1; Su et al., arXiv
/// 2104.09864) and grouped key/value heads (Ainslie et al., arXiv 2305.13245): query head h reads key/value head
/// h / (Hq / Hkv).
///
///   y[i] = sum_{j <= i} p_ij v[j],  p_ij = exp(s_ij - lse_i),  s_ij = R_i q[i] . R_j k[j] / sqrt(dh),
///   lse_i = log sum_{j <= i} exp(s_ij)
///
/// R_i turns elements (m, m + dh/2) of a head by the angle i rotary_base^(-2m/dh). Positions i, j count from 0 in each
/// sequence, or go on from what the cache holds. The softmax is streamed over tiles of keys (Dao et al., arXiv
/// 2205.14135): memory grows with L, not L^2.
///
/// Sequences are rows of the batch, or with cu_seqlens the pieces [cu_seqlens[s], cu_seqlens[s+1]) of the one row;
/// attention never crosses them. S stands for the number of sequences.
/// Bitwise repeatable, independent of the number of threads and of the other sequences. Arithmetic in accum_t<T>; the
/// angles are made in double. On CUDA, products of bfloat16 and half take their operands in T, as tensor cores do:
/// rotated queries and keys, weights and the gradients of scores are rounded to T once, and summed in float.
/// Asynchronous on cuda.
struct attention {
  template <device_policy P, storage T>
  struct inputs {
    in<P, T, dyn, dyn, dyn, dyn> q;            // (B, L, Hq, dh)   dh even, 2..256; slices of one projection are fine
    in<P, T, dyn, dyn, dyn, dyn> k;            // (B, L, Hkv, dh)  Hkv divides Hq
    in<P, T, dyn, dyn, dyn, dyn> v;            // (B, L, Hkv, dh)
    in<P, std::int64_t, dyn> cu_seqlens = {};  // (S + 1)  optional; B = 1; from 0 to L, non-decreasing
    float rotary_base = 10000;                 // 0: no rotary positions
  };
  /// Keys and values of the tokens seen so far. Keys are kept as the scores use them: rotated, then rounded to T.
  template <device_policy P, storage T>
  struct cache {
    out<P, T, dyn, dyn, dyn, dyn> key = {};    // (S, capacity, Hkv, dh)
    out<P, T, dyn, dyn, dyn, dyn> value = {};  // (S, capacity, Hkv, dh)
    out<P, std::int32_t, dyn> length = {};     // (S)  tokens held; zero to begin with
  };
  template <device_policy P, storage T>
  struct results {
    out<P, accum_t<T>, dyn, dyn, dyn> lse = {};  // (B, Hq, L)  optional; what backward needs
    attention::cache<P, T> cache = {};           // optional; see forward
  };
  /// y (B, L, Hq, dh); may be strided, aliases nothing.
  ///
  /// With a cache, the L tokens of each sequence are appended to it, and attend over everything that it holds: a
  /// prompt may come in pieces, and gives the same bits as whole.
  /// The length never exceeds the capacity. Tokens that would: value_error, nothing is changed (cpu). On a device
  /// nothing sees how full the cache is before the kernels run: there such tokens are dropped, and their y is
  /// unspecified; the sequence's other tokens, and the other sequences, are as ever.
  /// Scratch: scratch_bytes<T, memory space>(B, L, Hkv, dh, rotary, cached).
  template <device_policy P, storage T>
  static void forward(P const& policy, inputs<home<P>, T> const& in, out<P, T, dyn, dyn, dyn, dyn> y,
                      results<home<P>, T> const& keep = {}) {
    auto const batch = y.extent(0), length = y.extent(1), heads = y.extent(2), head_dim = y.extent(3);
    bool const cached = keep.cache.key.present() || keep.cache.value.present() || keep.cache.length.present();
    check_inputs("attention", in, batch, length, heads, head_dim);
    check_optional_shape("attention", "lse", keep.lse, {batch, heads, length});
    if (cached) check_cache("attention", keep.cache, sequences(batch, in.cu_seqlens), in.k.extent(2), head_dim);
    if (y.size() == 0) return;
    bool const rotary = in.rotary_base != 0;
    scratch<P> memory(
        policy, scratch_bytes<T, typename P::memory_space>(batch, length, in.k.extent(2), head_dim, rotary, cached));
    auto tables = allocate_rotary<T>(memory, rotary ? (cached ? batch * length : length) : 0, head_dim);
    if constexpr (on_device<P>)
      if (rotary && !cached) tables.k = memory.template allocate<T>(batch, length, in.k.extent(2), head_dim);
    backend_of<attention, P>::forward(policy, in, y, keep, tables);
  }

  template <device_policy P, storage T>
  struct gradient_inputs {
    in<P, T, dyn, dyn, dyn, dyn> q;            // (B, L, Hq, dh)
    in<P, T, dyn, dyn, dyn, dyn> k;            // (B, L, Hkv, dh)
    in<P, T, dyn, dyn, dyn, dyn> v;            // (B, L, Hkv, dh)
    in<P, T, dyn, dyn, dyn, dyn> y;            // (B, L, Hq, dh)  from forward, without a cache
    in<P, accum_t<T>, dyn, dyn, dyn> lse;      // (B, Hq, L)      from forward
    in<P, T, dyn, dyn, dyn, dyn> d_y;          // (B, L, Hq, dh)
    in<P, std::int64_t, dyn> cu_seqlens = {};  // (S + 1)  optional
    float rotary_base = 10000;
  };
  /// Overwritten. They may be slices of one d_qkv; they alias no input.
  template <device_policy P, storage T>
  struct gradients {
    out<P, T, dyn, dyn, dyn, dyn> d_q;  // (B, L, Hq, dh)
    out<P, T, dyn, dyn, dyn, dyn> d_k;  // (B, L, Hkv, dh)
    out<P, T, dyn, dyn, dyn, dyn> d_v;  // (B, L, Hkv, dh)
  };
  /// With dp_ij = d_y[i] . v[j] and ds_ij = p_ij (dp_ij - d_y[i] . y[i]) / sqrt(dh):
  ///   d_v[j] = sum_i p_ij d_y[i],  d_q[i] = R_i^T sum_j ds_ij R_j k[j],  d_k[j] = R_j^T sum_i ds_ij R_i q[i]
  /// where d_k and d_v also sum over the query heads that share a key/value head. The scores are computed again.
  /// Scratch: backward_scratch_bytes<T, memory space>(B, L, Hq, Hkv, dh, S, rotary).
  /// T is deduced where in or grad is an object, and float where both stand in braces.
  template <device_policy P, storage T = float>
  static void backward(P const& policy, gradient_inputs<home<P>, T> const& in, gradients<home<P>, T> const& grad) {
    auto const batch = grad.d_q.extent(0), length = grad.d_q.extent(1), heads = grad.d_q.extent(2),
               head_dim = grad.d_q.extent(3);
    check_inputs("attention.backward", in, batch, length, heads, head_dim);
    auto const kv_heads = in.k.extent(2);
    check_shape("attention.backward", "y", in.y, {batch, length, heads, head_dim});
    check_shape("attention.backward", "lse", in.lse, {batch, heads, length});
    check_shape("attention.backward", "d_y", in.d_y, {batch, length, heads, head_dim});
    check_shape("attention.backward", "d_k", grad.d_k, {batch, length, kv_heads, head_dim});
    check_shape("attention.backward", "d_v", grad.d_v, {batch, length, kv_heads, head_dim});
    if (grad.d_q.size() == 0) return;
    auto const count = sequences(batch, in.cu_seqlens);
    bool const rotary = in.rotary_base != 0;
    scratch<P> memory(policy, backward_scratch_bytes<T, typename P::memory_space>(batch, length, heads, kv_heads,
                                                                                  head_dim, count, rotary));
    auto tables = allocate_rotary<T>(memory, rotary ? length : 0, head_dim);
    auto const delta = memory.template allocate<accum_t<T>>(batch, heads, length);
    if constexpr (on_device<P>) {
      if (rotary) {
        tables.q = memory.template allocate<T>(batch, length, heads, head_dim);
        tables.k = memory.template allocate<T>(batch, length, kv_heads, head_dim);
      }
      backend_of<attention, P>::backward(policy, in, grad, tables, delta);
    } else {
      auto const d_q =
          memory.template allocate<accum_t<T>>(heads, gradient_rows(batch, length, count), gradient_columns(head_dim));
      backend_of<attention, P>::backward(policy, in, grad, tables, delta, d_q);
    }
  }

  template <device_policy P, storage T>
  struct step_inputs {
    in<P, T, dyn, dyn, dyn> q;  // (B, Hq, dh)
    in<P, T, dyn, dyn, dyn> k;  // (B, Hkv, dh)
    in<P, T, dyn, dyn, dyn> v;  // (B, Hkv, dh)
    float rotary_base = 10000;
  };
  /// One token for each sequence: forward with L = 1, reading the cache once; the same holds at a full cache.
  /// y (B, Hq, dh).
  /// Scratch: step_scratch_bytes<T, memory space>(B, Hq, Hkv, dh, capacity).
  template <device_policy P, storage T>
  static void step(P const& policy, step_inputs<home<P>, T> const& in, attention::cache<home<P>, T> const& state,
                   out<P, T, dyn, dyn, dyn> y) {
    auto const batch = y.extent(0), heads = y.extent(1), head_dim = y.extent(2), kv_heads = in.k.extent(1);
    check_heads("attention.step", heads, kv_heads, head_dim, in.rotary_base);
    check_shape("attention.step", "q", in.q, {batch, heads, head_dim});
    check_shape("attention.step", "k", in.k, {batch, kv_heads, head_dim});
    check_shape("attention.step", "v", in.v, {batch, kv_heads, head_dim});
    check_cache("attention.step", state, batch, kv_heads, head_dim);
    if (y.size() == 0) return;
    auto const capacity = state.key.extent(1);
    scratch<P> memory(policy,
                      step_scratch_bytes<T, typename P::memory_space>(batch, heads, kv_heads, head_dim, capacity));
    if constexpr (on_device<P>) {
      auto const held = memory.template allocate<std::int32_t>(batch);
      auto const partial =
          memory.template allocate<accum_t<T>>(batch, step_splits(capacity, kv_heads), heads, head_dim + 2);
      backend_of<attention, P>::step(policy, in, state, y, held, partial);
    } else {
      auto const angles = memory.template allocate<accum_t<T>>(batch, head_dim);
      auto const partial = memory.template allocate<accum_t<T>>(batch, step_chunks(capacity), heads, head_dim + 2);
      backend_of<attention, P>::step(policy, in, state, y, angles, partial);
    }
  }

  /// Largest head dimension.
  static constexpr std::int64_t max_head_dim = 256;
  /// Positions whose angles are built from one another.
  static constexpr std::int64_t rotary_block = 64;
  /// A step divides the keys of a sequence into chunks of this many, so that one long sequence occupies all cores.
  static constexpr std::int64_t step_chunk = 128;
  static constexpr std::int64_t step_chunks(std::int64_t keys) { return (keys + step_chunk - 1) / step_chunk; }
  /// On a device, into parts of whole blocks of step_block keys: as many blocks, until all heads together have about
  /// step_parts parts; then parts grow with the sequence.
  static constexpr std::int64_t step_block = 64, step_parts = 512;
  BLACKMAMBA_HD static constexpr std::int64_t step_part(std::int64_t keys, std::int64_t kv_heads) {
    std::int64_t const most = step_parts / kv_heads > 0 ? step_parts / kv_heads : 1;
    std::int64_t const blocks = (keys + step_block - 1) / step_block;
    return (blocks + most - 1) / most * step_block;
  }
  /// The most parts of any sequence that a cache of this capacity holds.
  static constexpr std::int64_t step_splits(std::int64_t capacity, std::int64_t kv_heads) {
    std::int64_t const most = std::max<std::int64_t>(step_parts / std::max<std::int64_t>(kv_heads, 1), 1);
    return std::min((capacity + step_block - 1) / step_block, most);
  }

  /// d_q is summed in accum_t<T>, in rows that are padded to whole vectors; each sequence's rows end in padding.
  static constexpr std::int64_t gradient_row_padding = 8, gradient_column_padding = 16;
  static constexpr std::int64_t gradient_rows(std::int64_t batch, std::int64_t length, std::int64_t sequences) {
    return batch * length + sequences * gradient_row_padding;
  }
  static constexpr std::int64_t gradient_columns(std::int64_t head_dim) {
    return (head_dim + gradient_column_padding - 1) / gradient_column_padding * gradient_column_padding;
  }

  /// Cosines (first half of a row) and sines (second half) of the rotary angles, scratch.
  /// On a device also queries (backward) and keys (where no cache keeps them) that are turned already: many tiles read
  /// each.
  template <device_policy P, storage T>
  struct rotary_tables {
    out<P, accum_t<T>, dyn, dyn> angles;   // (positions, dh)
    out<P, double, dyn, dyn> steps;        // (rotary_block, dh)  of the first positions, in double
    out<P, T, dyn, dyn, dyn, dyn> q = {};  // (B, L, Hq, dh)
    out<P, T, dyn, dyn, dyn, dyn> k = {};  // (B, L, Hkv, dh)
  };

  template <storage T, class Space = space::host>
  static constexpr std::size_t scratch_bytes(std::int64_t batch, std::int64_t length, std::int64_t kv_heads,
                                             std::int64_t head_dim, bool rotary, bool cached) {
    if (!rotary) return 0;
    return rotary_bytes<T>(cached ? batch * length : length, head_dim) +
           (is_device<Space> && !cached ? scratch_sum(bytes<T>(batch * length * kv_heads * head_dim)) : 0);
  }
  template <storage T, class Space = space::host>
  static constexpr std::size_t backward_scratch_bytes(std::int64_t batch, std::int64_t length, std::int64_t heads,
                                                      std::int64_t kv_heads, std::int64_t head_dim,
                                                      std::int64_t sequences, bool rotary) {
    std::size_t const common =
        (rotary ? rotary_bytes<T>(length, head_dim) : 0) + scratch_sum(bytes<accum_t<T>>(batch * heads * length));
    if constexpr (is_device<Space>)
      return common + (rotary ? scratch_sum(bytes<T>(batch * length * heads * head_dim),
                                            bytes<T>(batch * length * kv_heads * head_dim))
                              : 0);
    else
      return common + scratch_sum(bytes<accum_t<T>>(heads * gradient_rows(batch, length, sequences) *
                                                    gradient_columns(head_dim)));
  }
  template <storage T, class Space = space::host>
  static constexpr std::size_t step_scratch_bytes(std::int64_t batch, std::int64_t heads, std::int64_t kv_heads,
                                                  std::int64_t head_dim, std::int64_t capacity) {
    if constexpr (is_device<Space>)
      return scratch_sum(bytes<std::int32_t>(batch),
                         bytes<accum_t<T>>(batch * step_splits(capacity, kv_heads) * heads * (head_dim + 2)));
    else
      return scratch_sum(bytes<accum_t<T>>(batch * head_dim),
                         bytes<accum_t<T>>(batch * heads * step_chunks(capacity) * (head_dim + 2)));
  }

 private:
  template <class Space>
  static constexpr bool is_device = std::is_same_v<Space, space::device>;
  template <device_policy P>
  static constexpr bool on_device = is_device<typename P::memory_space>;
  template <class T>
  static constexpr std::size_t bytes(std::int64_t n) {
    return sizeof(T) * static_cast<std::size_t>(n);
  }
  template <storage T>
  static constexpr std::size_t rotary_bytes(std::int64_t positions, std::int64_t head_dim) {
    return scratch_sum(bytes<accum_t<T>>(positions * head_dim), bytes<double>(rotary_block * head_dim));
  }
  template <storage T, device_policy P>
  static rotary_tables<home<P>, T> allocate_rotary(scratch<P>& memory, std::int64_t positions, std::int64_t head_dim) {
    if (positions == 0) return {};
    auto const angles = memory.template allocate<accum_t<T>>(positions, head_dim);
    auto const steps = memory.template allocate<double>(rotary_block, head_dim);
    return {.angles = angles, .steps = steps};
  }
  template <class Offsets>
  static std::int64_t sequences(std::int64_t batch, Offsets const& cu_seqlens) {
    return cu_seqlens.present() ? cu_seqlens.extent(0) - 1 : batch;
  }
  static void check_heads(char const* op, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim,
                          float base) {
    check_that(head_dim >= 2 && head_dim <= max_head_dim && head_dim % 2 == 0, op, "head dimension",
               std::to_string(head_dim), "an even number from 2 to " + std::to_string(max_head_dim));
    check_that(kv_heads > 0 ? heads > 0 && heads % kv_heads == 0 : heads == 0, op, "k",
               std::to_string(kv_heads) + " key/value heads",
               "a divisor of the " + std::to_string(heads) + " query heads");
    if (!(base >= 0))
      throw value_error(std::string(op) + ": rotary_base: got " + std::to_string(base) +
                        ", expected a positive number, or 0 for none");
  }
  template <class Inputs>
  static void check_inputs(char const* op, Inputs const& in, std::int64_t batch, std::int64_t length,
                           std::int64_t heads, std::int64_t head_dim) {
    auto const kv_heads = in.k.extent(2);
    check_heads(op, heads, kv_heads, head_dim, in.rotary_base);
    check_shape(op, "q", in.q, {batch, length, heads, head_dim});
    check_shape(op, "k", in.k, {batch, length, kv_heads, head_dim});
    check_shape(op, "v", in.v, {batch, length, kv_heads, head_dim});
    check_packed(op, batch, length, in.cu_seqlens);
  }
  template <class Cache>
  static void check_cache(char const* op, Cache const& held, std::int64_t sequences, std::int64_t kv_heads,
                          std::int64_t head_dim) {
    check_shape(op, "cache.key", held.key, {sequences, -1, kv_heads, head_dim});
    check_shape(op, "cache.value", held.value, {sequences, held.key.extent(1), kv_heads, head_dim});
    check_shape(op, "cache.length", held.length, {sequences});
  }
};

}  // namespace blackmamba

#include <blackmamba/ops/attention/attention_cpu.hpp>

#if BLACKMAMBA_CUDA
#include <blackmamba/ops/attention/attention_cuda.cuh>
#endif
