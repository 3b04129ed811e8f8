#pragma once
#include <blackmamba/nn/configuration.hpp>
#include <blackmamba/nn/module.hpp>
#include <blackmamba/ops/attention/attention.hpp>
#include <blackmamba/ops/linear/linear.hpp>

#include <cmath>

namespace blackmamba {

/// Causal multi-head self-attention with rotary positions (Vaswani et al., arXiv 1706.03762; Su et al., arXiv
/// 2104.09864):
///
///   q, k, v = qkv_proj(hidden)     out = out_proj(attention(q, k, v))
template <class Config>
struct self_attention {
  static constexpr int d_model = Config::d_model;
  static constexpr int heads = Config::heads;
  static constexpr int kv_heads = configuration::kv_heads<Config>();
  static constexpr int d_head = d_model / heads;
  static constexpr int d_q = heads * d_head, d_kv = kv_heads * d_head, d_qkv = d_q + 2 * d_kv;
  static_assert(d_model % heads == 0, "blackmamba: attention: d_model is no multiple of heads; change either");
  static_assert(heads % kv_heads == 0, "blackmamba: attention: heads is no multiple of kv_heads; change either");
  static_assert(d_head >= 2 && d_head <= attention::max_head_dim && d_head % 2 == 0,
                "blackmamba: attention: d_model / heads must be an even number from 2 to 256; change either");

  template <class S, storage T>
  struct parameters {
    view<S, T, dyn, dyn> qkv_proj;            // (d_q + 2 d_kv, d_model)
    view<S, accum_t<T>, dyn> qkv_proj_bias;   // (d_q + 2 d_kv)  only with Config::add_bias_linear
    view<S, T, dyn, dyn> out_proj;            // (d_model, d_q)
    view<S, accum_t<T>, dyn> out_proj_bias;   // (d_model)       only with Config::add_bias_linear
  };
  template <class S, storage T>
  struct saved {
    view<S, T const, dyn, dyn> hidden;            // (tokens, d_model)
    view<S, T, dyn, dyn> qkv;                     // (tokens, d_qkv)
    view<S, T, dyn, dyn> y;                       // (tokens, d_q)
    view<S, accum_t<T>, dyn, dyn, dyn> lse;       // (B, heads, L)
  };
  template <class S, storage T>
  struct state {
    view<S, T, dyn, dyn, dyn, dyn> key;    // (B, capacity, kv_heads, d_head)
    view<S, T, dyn, dyn, dyn, dyn> value;  // (B, capacity, kv_heads, d_head)
    view<S, std::int32_t, dyn> length;     // (B)
  };

  template <class Parameters, class Visitor>
  static void visit(Parameters& p, std::string const& prefix, Visitor&& v) {
    auto const fan_in = [](int n) { return initial::uniform(1 / std::sqrt(static_cast<double>(n))); };
    constexpr bool biased = configuration::add_bias_linear<Config>();
    v(entry{prefix + "qkv_proj.weight", kind::matrix, {d_qkv, d_model}, fan_in(d_model)}, p.qkv_proj);
    if (biased) v(entry{prefix + "qkv_proj.bias", kind::vector, {d_qkv}, initial::constant(0)}, p.qkv_proj_bias);
    v(entry{prefix + "out_proj.weight", kind::matrix, {d_model, d_q}, fan_in(d_q).residual()}, p.out_proj);
    if (biased) v(entry{prefix + "out_proj.bias", kind::vector, {d_model}, initial::constant(0)}, p.out_proj_bias);
  }
  template <class Visitor>
  static void describe(std::string const& prefix, Visitor&& v) {
    v(trait{prefix + "kind", "self_attention"});
    v(trait{prefix + "heads", std::to_string(heads)});
    v(trait{prefix + "kv_heads", std::to_string(kv_heads)});
    v(trait{prefix + "rotary_base", detail::number_text(configuration::rotary_base<Config>())});
  }
  template <class State, class Visitor>
  static void visit_state(State& s, std::int64_t batch, std::int64_t capacity, Visitor&& v) {
    v(entry{"key", kind::matrix, {batch, capacity, kv_heads, d_head}}, s.key);
    v(entry{"value", kind::matrix, {batch, capacity, kv_heads, d_head}}, s.value);
    v(entry{"length", kind::statistic, {batch}}, s.length);
  }

  template <device_policy P, storage T, class S>
  static void forward(context<P> const& c, parameters<S, T> const& p, in<P, T, dyn, dyn> x, out<P, T, dyn, dyn> y,
                      saved<S, T>& keep, state<S, T>* carried) {
    keep.hidden = x;
    keep.qkv = c.template allocate<T>(x.extent(0), d_qkv);
    keep.y = c.template allocate<T>(x.extent(0), d_q);
    if (c.training) keep.lse = c.template allocate<accum_t<T>>(c.batch, heads, c.length);
    linear::forward<P, T>(c.policy, {.x = x, .weight = p.qkv_proj, .bias = p.qkv_proj_bias}, keep.qkv);
    typename attention::cache<home<P>, T> cache;
    if (carried) cache = {.key = carried->key, .value = carried->value, .length = carried->length};
    attention::forward<P, T>(c.policy,
                             {.q = heads_of(c, keep.qkv, 0, heads),
                              .k = heads_of(c, keep.qkv, d_q, kv_heads),
                              .v = heads_of(c, keep.qkv, d_q + d_kv, kv_heads),
                              .cu_seqlens = c.cu_seqlens,
                              .rotary_base = base},
                             heads_of(c, keep.y, 0, heads), {.lse = keep.lse, .cache = cache});
    linear::forward<P, T>(c.policy, {.x = keep.y, .weight = p.out_proj, .bias = p.out_proj_bias}, y);
  }

  template <device_policy P, storage T, class S>
  static void backward(context<P> const& c, parameters<S, T> const& p, saved<S, T> const& keep,
                       in<P, T, dyn, dyn> d_out, out<P, T, dyn, dyn> d_x, parameters<S, accum_t<T>> const& d) {
    auto const scope = c.scope();
    auto const d_y = c.template allocate<T>(d_out.extent(0), d_q);
    auto const d_qkv_rows = c.template allocate<T>(d_out.extent(0), d_qkv);
    linear::backward<P, T>(c.policy, {.x = keep.y, .weight = p.out_proj, .d_y = d_out},
                           {.d_x = d_y, .d_weight = d.out_proj, .d_bias = d.out_proj_bias});
    attention::backward<P, T>(c.policy,
                              {.q = heads_of(c, keep.qkv, 0, heads),
                               .k = heads_of(c, keep.qkv, d_q, kv_heads),
                               .v = heads_of(c, keep.qkv, d_q + d_kv, kv_heads),
                               .y = heads_of(c, keep.y, 0, heads),
                               .lse = keep.lse,
                               .d_y = heads_of(c, d_y, 0, heads),
                               .cu_seqlens = c.cu_seqlens,
                               .rotary_base = base},
                              {.d_q = heads_of(c, d_qkv_rows, 0, heads),
                               .d_k = heads_of(c, d_qkv_rows, d_q, kv_heads),
                               .d_v = heads_of(c, d_qkv_rows, d_q + d_kv, kv_heads)});
    linear::backward<P, T>(c.policy, {.x = keep.hidden, .weight = p.qkv_proj, .d_y = d_qkv_rows},
                           {.d_x = d_x, .d_weight = d.qkv_proj, .d_bias = d.qkv_proj_bias});
  }

  template <device_policy P, storage T, class S>
  static void step(context<P> const& c, parameters<S, T> const& p, state<S, T>& carried, in<P, T, dyn, dyn> x,
                   out<P, T, dyn, dyn> y) {
    auto const scope = c.scope();
    auto const qkv = c.template allocate<T>(c.batch, d_qkv);
    auto const mixed = c.template allocate<T>(c.batch, d_q);
    linear::forward<P, T>(c.policy, {.x = x, .weight = p.qkv_proj, .bias = p.qkv_proj_bias}, qkv);
    attention::step<P, T>(c.policy,
                          {.q = token_heads(qkv, 0, heads),
                           .k = token_heads(qkv, d_q, kv_heads),
                           .v = token_heads(qkv, d_q + d_kv, kv_heads),
                           .rotary_base = base},
                          {.key = carried.key, .value = carried.value, .length = carried.length},
                          token_heads(mixed, 0, heads));
    linear::forward<P, T>(c.policy, {.x = mixed, .weight = p.out_proj, .bias = p.out_proj_bias}, y);
  }

 private:
  static constexpr float base = static_cast<float>(configuration::rotary_base<Config>());

  /// Columns [first, first + n d_head) of (tokens, width) as (B, L, n, d_head).
  template <class P, class S, class T>
  static view<S, T, dyn, dyn, dyn, dyn> heads_of(context<P> const& c, view<S, T, dyn, dyn> x, int first, int n) {
    return {x.data() + first,
            {c.batch, c.length, n, d_head},
            {c.length * x.stride(0), x.stride(0), std::int64_t{d_head}, std::int64_t{1}}};
  }
  /// The same of one token for each sequence, as (B, n, d_head).
  template <class S, class T>
  static view<S, T, dyn, dyn, dyn> token_heads(view<S, T, dyn, dyn> x, int first, int n) {
    return {x.data() + first, {x.extent(0), n, d_head}, {x.stride(0), std::int64_t{d_head}, std::int64_t{1}}};
  }
};

}  // namespace blackmamba
