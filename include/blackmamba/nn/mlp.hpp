#pragma once
#include <blackmamba/nn/configuration.hpp>
#include <blackmamba/nn/module.hpp>
#include <blackmamba/ops/gated_activation/hidden_activation.hpp>
#include <blackmamba/ops/linear/linear.hpp>

#include <cmath>

namespace blackmamba {

namespace detail {

/// Columns of the first product. Where a function stands for a hidden activation, silu for swiglu, it is found here.
template <class Activation>
constexpr int first_product_width(int d_ff) {
  constexpr bool complete = requires {
    typename Activation::function;
    Activation::gated;
  };
  static_assert(complete, "blackmamba: mlp, moe: the activation does not say whether it is gated; write swiglu, geglu, "
                          "plain_silu, plain_gelu or hidden_activation<Function, Gated>");
  if constexpr (complete)
    return Activation::gated ? 2 * d_ff : d_ff;
  else
    return d_ff;
}

template <class Activation, class Visitor>
void describe_activation(std::string const& prefix, Visitor&& v) {
  describe_name<typename Activation::function>(prefix + "activation", v);
  v(trait{prefix + "gated", Activation::gated ? "yes" : "no"});
}

}  // namespace detail

/// out = linear_fc2(act(linear_fc1(hidden))): the dense layer that an expert is one of.
template <class Config, class Activation = swiglu>
struct mlp : stateless {
  static constexpr int d_model = Config::d_model;
  static constexpr int d_ff = Config::d_ff;
  static constexpr int d_fc1 = detail::first_product_width<Activation>(d_ff);

  template <class S, storage T>
  struct parameters {
    view<S, T, dyn, dyn> fc1;            // (d_fc1, d_model)  rows: gate, then up
    view<S, accum_t<T>, dyn> fc1_bias;   // (d_fc1)           only with Config::add_bias_linear
    view<S, T, dyn, dyn> fc2;            // (d_model, d_ff)
    view<S, accum_t<T>, dyn> fc2_bias;   // (d_model)         only with Config::add_bias_linear
  };
  template <class S, storage T>
  struct saved {
    view<S, T const, dyn, dyn> hidden;   // (tokens, d_model)
    view<S, T, dyn, dyn> h;              // (tokens, d_fc1)
    view<S, T, dyn, dyn> activated;      // (tokens, d_ff)
  };

  template <class Parameters, class Visitor>
  static void visit(Parameters& p, std::string const& prefix, Visitor&& v) {
    auto const fan_in = [](int n) { return initial::uniform(1 / std::sqrt(static_cast<double>(n))); };
    constexpr bool biased = configuration::add_bias_linear<Config>();
    v(entry{prefix + "linear_fc1.weight", kind::matrix, {d_fc1, d_model}, fan_in(d_model)}, p.fc1);
    if (biased) v(entry{prefix + "linear_fc1.bias", kind::vector, {d_fc1}, initial::constant(0)}, p.fc1_bias);
    v(entry{prefix + "linear_fc2.weight", kind::matrix, {d_model, d_ff}, fan_in(d_ff).residual()}, p.fc2);
    if (biased) v(entry{prefix + "linear_fc2.bias", kind::vector, {d_model}, initial::constant(0)}, p.fc2_bias);
  }

  template <class Visitor>
  static void describe(std::string const& prefix, Visitor&& v) {
    v(trait{prefix + "kind", "mlp"});
    detail::describe_activation<Activation>(prefix, v);
  }

  template <device_policy P, storage T, class S>
  static void forward(context<P> const& c, parameters<S, T> const& p, in<P, T, dyn, dyn> x, out<P, T, dyn, dyn> y,
                      saved<S, T>& keep, nothing*) {
    keep.hidden = x;
    keep.h = c.template allocate<T>(x.extent(0), d_fc1);
    keep.activated = c.template allocate<T>(x.extent(0), d_ff);
    linear::forward<P, T>(c.policy, {.x = x, .weight = p.fc1, .bias = p.fc1_bias}, keep.h);
    detail::activate<Activation, P, T>(c.policy, keep.h, d_ff, keep.activated);
    linear::forward<P, T>(c.policy, {.x = keep.activated, .weight = p.fc2, .bias = p.fc2_bias}, y);
  }

  template <device_policy P, storage T, class S>
  static void backward(context<P> const& c, parameters<S, T> const& p, saved<S, T> const& keep, in<P, T, dyn, dyn> d_y,
                       out<P, T, dyn, dyn> d_x, parameters<S, accum_t<T>> const& d) {
    auto const scope = c.scope();
    auto const d_h = c.template allocate<T>(d_y.extent(0), d_fc1);
    auto const d_activated = c.template allocate<T>(d_y.extent(0), d_ff);
    linear::backward<P, T>(c.policy, {.x = keep.activated, .weight = p.fc2, .d_y = d_y},
                           {.d_x = d_activated, .d_weight = d.fc2, .d_bias = d.fc2_bias});
    detail::activate_backward<Activation, P, T>(c.policy, keep.h, d_ff, d_activated, d_h);
    linear::backward<P, T>(c.policy, {.x = keep.hidden, .weight = p.fc1, .d_y = d_h},
                           {.d_x = d_x, .d_weight = d.fc1, .d_bias = d.fc1_bias});
  }

  template <device_policy P, storage T, class S>
  static void step(context<P> const& c, parameters<S, T> const& p, nothing&, in<P, T, dyn, dyn> x,
                   out<P, T, dyn, dyn> y) {
    auto const scope = c.scope();
    saved<S, T> keep;
    forward<P, T, S>(c, p, x, y, keep, nullptr);
  }
};

}  // namespace blackmamba
