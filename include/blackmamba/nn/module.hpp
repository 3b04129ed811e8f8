#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

/// The vocabulary of modules.
///
/// A *mixer* maps hidden states x (tokens, d_model) to y (tokens, d_model): mamba, moe, mlp, attention. A *block* moves
/// the residual stream one or more layers on: prenorm, parallel, stack, repeat. Both are types without data. What they
/// own is described by nested templates on memory space and storage type, plain structs of views:
///
///   parameters<S, T>   weights; parameters<S, accum_t<T>> is the type of their gradients
///   saved<S, T>        what forward hands to backward
///   state<S, T>        what a sequence carries from one call to the next
///
/// and by visit functions that name every view with its shape: allocation, initialisation, optimisation, counting and
/// checkpoints all follow from those.
///
/// What a module computes depends on more than its weights: an activation, a rotary base. A mixer (and a norm) that has
///
///   template <class Visitor>
///   static void describe(std::string const& prefix, Visitor&& v) { v(trait{prefix + "activation", "silu"}); }
///
/// says so, and weights in a file that says otherwise are turned away. Blocks hand describe(names, v) on to what they
/// are made of, as they do visit.
///
/// forward, backward and step are also called under device::dry<P>, which measures what they take from the workspace:
/// there the views have sizes, but no memory that may be touched. Use operators, which do nothing under that policy, or
/// put what touches memory under `if constexpr (!is_dry<P>)`; allocate the same in both.
namespace blackmamba {

namespace detail {
[[noreturn]] inline void throw_no_workspace() {
  throw value_error(
      "context: policy.workspace: got none, expected an arena, from which modules take their memory; a dry run with "
      "arena::measuring() tells its size");
}
}  // namespace detail

/// What a module is told about a call. Everything that it allocates comes from the policy's workspace: the caller
/// releases it, after the backward pass in training, after the layer in inference.
template <device_policy P>
struct context {
  using space_type = typename P::memory_space;

  P policy;                                   ///< with a workspace
  std::int64_t batch = 1;                     ///< sequences, where all have the same length
  std::int64_t length = 1;                    ///< tokens of each; all tokens where packed
  in<P, std::int64_t, dyn> cu_seqlens = {};   ///< (S+1) packed sequences; batch is 1 then
  bool training = false;                      ///< keep what backward needs; balance the experts
  bool observe = false;                       ///< record statistics (tokens per expert) in the network

  std::int64_t tokens() const { return batch * length; }
  std::int64_t sequences() const { return cu_seqlens.present() ? cu_seqlens.extent(0) - 1 : batch; }

  template <class T, class... Ints>
  auto allocate(Ints... extents) const {
    if (!policy.workspace) detail::throw_no_workspace();
    return policy.workspace->template allocate<T>(extents...);
  }
  /// A scope: what is allocated during its life is released at its end.
  scratch<P> scope() const { return scratch<P>(policy, 0); }
  /// A scope in inference; in training nothing, for backward needs what the layer allocates.
  class layer_scope_type {
   public:
    explicit layer_scope_type(context const& c) {
      if (!c.training) scope_.emplace(c.policy, std::size_t{0});
    }

   private:
    std::optional<scratch<P>> scope_;
  };
  layer_scope_type layer_scope() const { return layer_scope_type(*this); }
};

/// What kind of memory a described view belongs to.
enum class kind {
  matrix,     ///< operand of a matrix product, stored as T; decays
  vector,     ///< every other parameter, in accum_t<T>; does not decay
  buffer,     ///< state of training that no gradient reaches, in accum_t<T>; part of a checkpoint
  statistic,  ///< observation of the last step; not part of a checkpoint
};

/// How a parameter starts. The i-th value depends on the seed, the parameter's name and i alone.
struct initial {
  enum class rule { constant, uniform, normal, log_index, inverse_softplus };
  rule kind = rule::constant;
  double a = 0;  ///< constant: the value; uniform: the bound; normal: the deviation; inverse_softplus: least dt
  double b = 0;  ///< inverse_softplus: largest dt
  bool scaled_by_depth = false;  ///< divided by sqrt(layers): the products that write to the residual stream

  static initial constant(double value) { return {rule::constant, value}; }
  /// Uniform on (-bound, bound).
  static initial uniform(double bound) { return {rule::uniform, bound}; }
  static initial normal(double deviation) { return {rule::normal, deviation}; }
  /// log(1), log(2), ... along the last dimension.
  static initial log_index() { return {rule::log_index}; }
  /// x with softplus(x) log-uniform on [least, most].
  static initial inverse_softplus(double least, double most) { return {rule::inverse_softplus, least, most}; }
  initial residual() const {
    initial r = *this;
    r.scaled_by_depth = true;
    return r;
  }
};

/// One named tensor of a model. A "{e}" in the name stands for the index of the first dimension, along which the tensor
/// is stored as several.
struct entry {
  std::string name;
  kind what = kind::vector;
  std::vector<std::int64_t> extents;
  initial start = {};
  double active = 1;  ///< share of the tensor that takes part for one token

  std::int64_t size() const {
    std::int64_t n = 1;
    for (auto e : extents) n *= e;
    return n;
  }
};

/// Something that changes what a module computes, and no tensor's shape. Checkpoints carry it, and are compared by it
/// where both the file and the network tell that name.
struct trait {
  std::string name;       ///< begins with the prefix that the module's tensors have
  std::string value;
  bool training = false;  ///< changes how a model trains, not what it computes afterwards: weights alone go without it
};

/// Names of layers, in order; blocks take the next one for each residual layer.
class layer_names {
 public:
  std::string next() { return "decoder.layers." + std::to_string(count_++) + "."; }
  int count() const { return count_; }

 private:
  int count_ = 0;
};

namespace detail {

/// The shortest decimal text that reads back as the number, the same in every locale.
inline std::string number_text(double x) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, x, std::chars_format::general).ptr};
}

/// Says a part's name where it has one: a user's activation or recurrence need not.
template <class Part, class Visitor>
void describe_name(std::string const& name, Visitor&& v, bool training = false) {
  if constexpr (requires { std::string(Part::name); }) v(trait{name, std::string(Part::name), training});
}
/// A mixer's or a norm's traits, where it tells them.
template <class Part, class Visitor>
void describe_part(std::string const& prefix, Visitor&& v) {
  if constexpr (requires { Part::describe(prefix, v); }) Part::describe(prefix, v);
}

}  // namespace detail

/// For modules that keep nothing.
struct nothing {};

/// A module without state has this.
struct stateless {
  template <class S, storage T>
  using state = nothing;
  template <class State, class Visitor>
  static void visit_state(State&, std::int64_t, std::int64_t, Visitor&&) {}
};

namespace detail {
struct ignore_visits {
  template <class E, class V>
  void operator()(E const&, V&) const {}
};
}  // namespace detail

/// Maps hidden states to hidden states of the same shape. Checked with host memory and float.
template <class M>
concept mixer = requires(typename M::template parameters<space::host, float> p,
                         typename M::template saved<space::host, float> s,
                         typename M::template state<space::host, float> q, context<device::cpu> c,
                         host_view<float, dyn, dyn> x) {
  M::visit(p, std::string(), detail::ignore_visits{});
  M::visit_state(q, std::int64_t{1}, std::int64_t{1}, detail::ignore_visits{});
  M::forward(c, p, x, x, s, &q);
  M::backward(c, p, s, x, x, p);
  M::step(c, p, q, x, x);
};

/// Moves the residual stream on.
template <class B>
concept block = requires(typename B::template parameters<space::host, float> p, layer_names& names) {
  typename B::template saved<space::host, float>;
  typename B::template state<space::host, float>;
  B::visit(p, names, detail::ignore_visits{});
};

namespace detail {
/// A block's traits. Of one that tells none, the names of its layers pass by.
template <class Block, class Visitor>
void describe_block(layer_names& names, Visitor&& v) {
  if constexpr (requires { Block::describe(names, v); }) {
    Block::describe(names, v);
  } else {
    typename Block::template parameters<space::host, float> views{};
    Block::visit(views, names, ignore_visits{});
  }
}

/// A block's width where it tells one (prenorm and what is made of it do), else 0: any.
template <class Block>
constexpr int block_width() {
  if constexpr (requires { Block::d_model; })
    return Block::d_model;
  else
    return 0;
}
}  // namespace detail

}  // namespace blackmamba
