#pragma once
#include <blackmamba/nn/module.hpp>
#include <blackmamba/ops/layer_norm/layer_norm.hpp>
#include <blackmamba/ops/rms_norm/rms_norm.hpp>

namespace blackmamba {

/// A normalisation as part of a network: its parameters, what it saves, forward with the residual add, backward.
/// Specialised for rms_norm and layer_norm; a norm of one's own is one more specialisation (describe may be left out).
template <class Norm, int Width>
struct norm_layer;

template <int Width>
struct norm_layer<rms_norm, Width> {
  template <class S, storage T>
  struct parameters {
    view<S, accum_t<T>, dyn> weight;  // (D)
  };
  template <class S, storage T>
  struct saved {
    view<S, accum_t<T>, dyn, dyn> sum;  // (tokens, D)
    view<S, accum_t<T>, dyn> rstd;      // (tokens)
  };
  template <class Parameters, class Visitor>
  static void visit(Parameters& p, std::string const& prefix, Visitor&& v) {
    v(entry{prefix + "weight", kind::vector, {Width}, initial::constant(1)}, p.weight);
  }
  template <class Visitor>
  static void describe(std::string const& prefix, Visitor&& v) {
    v(trait{prefix + "kind", "rms_norm"});
    v(trait{prefix + "eps", detail::number_text(rms_norm::inputs<device::cpu, float>{}.eps)});
  }
  /// y = norm(x + residual); the sum goes to keep.sum where that is present.
  template <device_policy P, storage T, class S>
  static void forward(context<P> const& c, parameters<S, T> const& p, in<P, T, dyn, dyn> x,
                      in<P, accum_t<T>, dyn, dyn> residual, out<P, T, dyn, dyn> y, saved<S, T>& keep) {
    if (c.training) keep.rstd = c.template allocate<accum_t<T>>(x.extent(0));
    rms_norm::forward(c.policy, {.x = x, .weight = p.weight, .residual = residual}, y,
                      {.sum = keep.sum, .rstd = keep.rstd});
  }
  /// d_sum = d_sum + the norm's gradient
  template <device_policy P, storage T, class S>
  static void backward(context<P> const& c, parameters<S, T> const& p, saved<S, T> const& keep, in<P, T, dyn, dyn> d_y,
                       out<P, accum_t<T>, dyn, dyn> d_sum, in<P, accum_t<T>, dyn, dyn> d_residual,
                       parameters<S, accum_t<T>> const& d) {
    rms_norm::backward<P, T, accum_t<T>>(
        c.policy, {.sum = keep.sum, .rstd = keep.rstd, .weight = p.weight, .d_y = d_y, .d_residual = d_residual}, d_sum,
        d.weight);
  }
};

template <int Width>
struct norm_layer<layer_norm, Width> {
  template <class S, storage T>
  struct parameters {
    view<S, accum_t<T>, dyn> weight;  // (D)
    view<S, accum_t<T>, dyn> bias;    // (D)
  };
  template <class S, storage T>
  struct saved {
    view<S, accum_t<T>, dyn, dyn> sum;  // (tokens, D)
    view<S, accum_t<T>, dyn> rstd;      // (tokens)
    view<S, accum_t<T>, dyn> mean;      // (tokens)
  };
  template <class Parameters, class Visitor>
  static void visit(Parameters& p, std::string const& prefix, Visitor&& v) {
    v(entry{prefix + "weight", kind::vector, {Width}, initial::constant(1)}, p.weight);
    v(entry{prefix + "bias", kind::vector, {Width}, initial::constant(0)}, p.bias);
  }
  template <class Visitor>
  static void describe(std::string const& prefix, Visitor&& v) {
    v(trait{prefix + "kind", "layer_norm"});
    v(trait{prefix + "eps", detail::number_text(layer_norm::inputs<device::cpu, float>{}.eps)});
  }
  template <device_policy P, storage T, class S>
  static void forward(context<P> const& c, parameters<S, T> const& p, in<P, T, dyn, dyn> x,
                      in<P, accum_t<T>, dyn, dyn> residual, out<P, T, dyn, dyn> y, saved<S, T>& keep) {
    if (c.training) {
      keep.rstd = c.template allocate<accum_t<T>>(x.extent(0));
      keep.mean = c.template allocate<accum_t<T>>(x.extent(0));
    }
    layer_norm::forward(c.policy, {.x = x, .weight = p.weight, .bias = p.bias, .residual = residual}, y,
                        {.sum = keep.sum, .rstd = keep.rstd, .mean = keep.mean});
  }
  template <device_policy P, storage T, class S>
  static void backward(context<P> const& c, parameters<S, T> const& p, saved<S, T> const& keep, in<P, T, dyn, dyn> d_y,
                       out<P, accum_t<T>, dyn, dyn> d_sum, in<P, accum_t<T>, dyn, dyn> d_residual,
                       parameters<S, accum_t<T>> const& d) {
    layer_norm::backward<P, T, accum_t<T>>(c.policy,
                                           {.sum = keep.sum,
                                            .rstd = keep.rstd,
                                            .mean = keep.mean,
                                            .weight = p.weight,
                                            .d_y = d_y,
                                            .d_residual = d_residual},
                                           d_sum, d.weight, d.bias);
  }
};

}  // namespace blackmamba
