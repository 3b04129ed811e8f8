#pragma once
#include <blackmamba/core/memory.hpp>
#include <blackmamba/nn/module.hpp>
#include <blackmamba/nn/norm.hpp>
#include <blackmamba/nn/residual.hpp>
#include <blackmamba/ops/cross_entropy/cross_entropy.hpp>
#include <blackmamba/ops/embedding/embedding.hpp>
#include <blackmamba/ops/linear/linear.hpp>

namespace blackmamba {

/// A decoder-only language model: embedding, blocks, final norm, and the embedding again as the output layer (tied).
///
///   stream = embedding[token];  stream = Blocks(stream);  logits = FinalNorm(stream) embedding^T
///
/// An architecture is a type; network<Arch, Policy, T> is one that runs.
template <class Config, class Blocks, class FinalNorm = layer_norm>
struct language_model {
  static_assert(block<Blocks>, "blackmamba: language_model: the second argument must be a block: stack or repeat of "
                               "prenorm layers, or a type with the members that blackmamba::block asks for");
  using config = Config;
  static constexpr int d_model = Config::d_model;
  static_assert(detail::block_width<Blocks>() == 0 || detail::block_width<Blocks>() == d_model,
                "blackmamba: language_model: the layers' d_model is not that of the model's configuration; give both "
                "the same");
  static constexpr int vocab = Config::vocab;
  using final_norm = norm_layer<FinalNorm, d_model>;

  template <class S, storage T>
  struct parameters {
    view<S, T, dyn, dyn> embedding;  // (vocab, d_model)
    typename Blocks::template parameters<S, T> blocks;
    typename final_norm::template parameters<S, T> norm;
  };
  template <class S, storage T>
  struct saved {
    typename Blocks::template saved<S, T> blocks;
    typename final_norm::template saved<S, T> norm;
    view<S, T, dyn, dyn> normalised;  // (rows, d_model)
  };
  template <class S, storage T>
  using state = typename Blocks::template state<S, T>;

  template <class Parameters, class Visitor>
  static void visit(Parameters& p, Visitor&& v) {
    layer_names names;
    v(entry{"embedding.word_embeddings.weight", kind::matrix, {vocab, d_model}, initial::normal(0.02)}, p.embedding);
    Blocks::visit(p.blocks, names, v);
    final_norm::visit(p.norm, "decoder.final_layernorm.", v);
  }
  /// What tells this architecture from others whose tensors have the same shapes: v(trait) for each.
  template <class Visitor>
  static void describe(Visitor&& v) {
    layer_names names;
    detail::describe_block<Blocks>(names, v);
    detail::describe_part<final_norm>("decoder.final_layernorm.", v);
  }
  /// Residual layers.
  static int layer_count() {
    layer_names names;
    typename Blocks::template parameters<space::host, float> views{};
    Blocks::visit(views, names, detail::ignore_visits{});
    return names.count();
  }
  template <class State, class Visitor>
  static void visit_state(State& s, std::int64_t batch, std::int64_t capacity, Visitor&& v) {
    Blocks::visit_state(s, batch, capacity, v);
  }

  /// Which rows the logits are wanted of.
  enum class rows { all, last };

  /// logits (B L, vocab), or of the last token of each sequence alone (B, vocab); of packed sequences there are all.
  /// With a state, continues from it. Y is T or accum_t<T>.
  template <device_policy P, storage T, storage Y, class S>
  static void forward(context<P> const& c, parameters<S, T> const& p, in<P, std::int32_t, dyn> token, rows which,
                      out<P, Y, dyn, dyn> logits, saved<S, T>& keep, state<S, T>* carried = nullptr) {
    constexpr char const* op = "language_model.forward";
    check_shape(op, "token", token, {c.tokens()});
    if (which == rows::last) {
      check_that(!c.cu_seqlens.present(), op, "cu_seqlens", "packed sequences",
                 "none where logits of the last rows are wanted; ask for rows::all");
      check_that(c.length > 0, op, "length", std::to_string(c.length),
                 "a token at least where logits of the last rows are wanted");
    }
    residual_stream<S, T> stream = open_stream<P, T>(c, p, token);
    Blocks::template forward<P, T, S>(c, p.blocks, stream, keep.blocks, carried);
    if (which == rows::last) {
      // Row (b, L-1) of every sequence: a column range of the stream seen as (B, L d_model).
      auto const last = [&](auto const& x) {
        return x.reshape(c.batch, c.length * d_model).columns((c.length - 1) * d_model, d_model);
      };
      close_stream<P, T, Y>(c, p, residual_stream<S, T>{last(stream.hidden), last(stream.residual), {}}, logits, keep);
    } else {
      close_stream<P, T, Y>(c, p, stream, logits, keep);
    }
  }

  /// One token for each sequence: token (B), logits (B, vocab). The state moves on in place.
  template <device_policy P, storage T, storage Y, class S>
  static void step(context<P> const& c, parameters<S, T> const& p, in<P, std::int32_t, dyn> token,
                   out<P, Y, dyn, dyn> logits, state<S, T>& carried) {
    auto const scope = c.scope();
    saved<S, T> keep;
    residual_stream<S, T> stream = open_stream<P, T>(c, p, token);
    Blocks::template step<P, T, S>(c, p.blocks, stream, carried);
    close_stream<P, T, Y>(c, p, stream, logits, keep);
  }

  /// Gradient of everything, from the logits' gradient d_logits (B L, vocab); d += gradients of the parameters.
  template <device_policy P, storage T, class S>
  static void backward(context<P> const& c, parameters<S, T> const& p, saved<S, T> const& keep,
                       in<P, std::int32_t, dyn> token, in<P, T, dyn, dyn> d_logits,
                       parameters<S, accum_t<T>> const& d) {
    auto const scope = c.scope();
    auto const d_stream = c.template allocate<accum_t<T>>(token.extent(0), d_model);
    {
      auto const inner = c.scope();
      auto const d_normalised = c.template allocate<T>(token.extent(0), d_model);
      linear::backward<P, T>(c.policy, {.x = keep.normalised, .weight = p.embedding, .d_y = d_logits},
                             {.d_x = d_normalised, .d_weight = d.embedding});
      final_norm::template backward<P, T, S>(c, p.norm, keep.norm, d_normalised, d_stream, {}, d.norm);
    }
    Blocks::template backward<P, T, S>(c, p.blocks, keep.blocks, d_stream, d.blocks);
    embedding::backward<P, T>(c.policy, token, detail::gradient_as<T>(c, d_stream), d.embedding);
  }

 private:
  template <device_policy P, storage T, class S>
  static residual_stream<S, T> open_stream(context<P> const& c, parameters<S, T> const& p,
                                           in<P, std::int32_t, dyn> token) {
    residual_stream<S, T> stream;
    stream.hidden = c.template allocate<T>(token.extent(0), d_model);
    if (!c.training) stream.buffer = c.template allocate<accum_t<T>>(token.extent(0), d_model);
    blackmamba::embedding::forward<P, T>(c.policy, token, p.embedding, stream.hidden);
    return stream;
  }
  template <device_policy P, storage T, storage Y, class S>
  static void close_stream(context<P> const& c, parameters<S, T> const& p, residual_stream<S, T> const& stream,
                           out<P, Y, dyn, dyn> logits, saved<S, T>& keep) {
    auto const rows = stream.hidden.extent(0);
    if (c.training) keep.norm.sum = c.template allocate<accum_t<T>>(rows, d_model);
    keep.normalised = c.template allocate<T>(rows, d_model);
    final_norm::template forward<P, T, S>(c, p.norm, stream.hidden, stream.residual, keep.normalised, keep.norm);
    linear::forward<P, Y, T>(c.policy, {.x = keep.normalised, .weight = p.embedding}, logits);
  }
};

}  // namespace blackmamba
