#pragma once
#include <blackmamba/nn/configuration.hpp>
#include <blackmamba/nn/module.hpp>
#include <blackmamba/ops/causal_conv1d/causal_conv1d.hpp>
#include <blackmamba/ops/linear/linear.hpp>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>

#include <type_traits>

namespace blackmamba {

/// The Mamba mixer (Gu and Dao, arXiv 2312.00752, section 3.4):
///
///   x, z = in_proj(hidden)                     u = silu(causal_conv1d(x))
///   dt, B, C = x_proj(u)                       delta = softplus(dt_proj(dt) + dt_bias)
///   y = recurrence(u, delta, A = -exp(A_log), B, C, D) silu(z)
///   out = out_proj(y)
///
/// Recurrence is selective_scan or a type with the same members; where it has a name, checkpoints are told apart by it.
template <class Config, class Recurrence = selective_scan>
struct mamba {
  static constexpr int d_model = Config::d_model;
  static constexpr int d_inner = configuration::d_inner<Config>();
  static constexpr int d_state = configuration::d_state<Config>();
  static constexpr int d_conv = configuration::d_conv<Config>();
  static constexpr int dt_rank = configuration::dt_rank<Config>();
  static constexpr int projected = dt_rank + 2 * d_state;
  static_assert(!std::is_same_v<Recurrence, selective_scan> || (d_state >= 1 && d_state <= 256),
                "blackmamba: mamba: d_state must lie in 1 to 256; change it");
  static_assert(d_conv >= 2 && d_conv <= 4, "blackmamba: mamba: d_conv must lie in 2 to 4; change it");

  template <class S, storage T>
  struct parameters {
    view<S, T, dyn, dyn> in_proj;                 // (2 d_inner, d_model)           rows: x, then z
    view<S, accum_t<T>, dyn> in_proj_bias;        // (2 d_inner)                    only with Config::bias
    view<S, accum_t<T>, dyn, dyn> conv_weight;    // (d_inner, d_conv)
    view<S, accum_t<T>, dyn> conv_bias;           // (d_inner)                      only with Config::conv_bias
    view<S, T, dyn, dyn> x_proj;                  // (dt_rank + 2 d_state, d_inner) rows: dt, B, C
    view<S, T, dyn, dyn> dt_proj;                 // (d_inner, dt_rank)
    view<S, accum_t<T>, dyn> dt_bias;             // (d_inner)
    view<S, accum_t<T>, dyn, dyn> A_log;          // (d_inner, d_state)
    view<S, accum_t<T>, dyn> D;                   // (d_inner)
    view<S, T, dyn, dyn> out_proj;                // (d_model, d_inner)
    view<S, accum_t<T>, dyn> out_proj_bias;       // (d_model)                      only with Config::add_bias_linear
  };
  template <class S, storage T>
  struct saved {
    view<S, T const, dyn, dyn> hidden;        // (tokens, d_model)
    view<S, T, dyn, dyn, dyn> xz;             // (B, L, 2 d_inner)
    view<S, T, dyn, dyn, dyn> u;              // (B, L, d_inner)
    view<S, T, dyn, dyn, dyn> projections;    // (B, L, dt_rank + 2 d_state)
    view<S, T, dyn, dyn, dyn> delta;          // (B, L, d_inner)
    view<S, T, dyn, dyn, dyn> y;              // (B, L, d_inner)
    view<S, accum_t<T>, dyn> checkpoints;     // the recurrence's own
  };
  template <class S, storage T>
  struct state {
    view<S, T, dyn, dyn, dyn> conv;           // (B, d_conv - 1, d_inner)
    view<S, accum_t<T>, dyn, dyn, dyn> ssm;   // (B, d_inner, d_state)
  };

  template <class Parameters, class Visitor>
  static void visit(Parameters& p, std::string const& prefix, Visitor&& v) {
    // Uniform bounds are 1/sqrt(fan-in); dt and A start as published (section 3.6 of the Mamba paper).
    auto const fan_in = [](int n) { return initial::uniform(1 / std::sqrt(static_cast<double>(n))); };
    v(entry{prefix + "in_proj.weight", kind::matrix, {2 * d_inner, d_model}, fan_in(d_model)}, p.in_proj);
    if (configuration::bias<Config>())
      v(entry{prefix + "in_proj.bias", kind::vector, {2 * d_inner}, initial::constant(0)}, p.in_proj_bias);
    v(entry{prefix + "conv1d.weight", kind::vector, {d_inner, d_conv}, fan_in(d_conv)}, p.conv_weight);
    if (configuration::conv_bias<Config>())
      v(entry{prefix + "conv1d.bias", kind::vector, {d_inner}, fan_in(d_conv)}, p.conv_bias);
    v(entry{prefix + "x_proj.weight", kind::matrix, {projected, d_inner}, fan_in(d_inner)}, p.x_proj);
    v(entry{prefix + "dt_proj.weight", kind::matrix, {d_inner, dt_rank}, fan_in(dt_rank)}, p.dt_proj);
    v(entry{prefix + "dt_proj.bias", kind::vector, {d_inner}, initial::inverse_softplus(1e-3, 0.1)}, p.dt_bias);
    v(entry{prefix + "A_log", kind::vector, {d_inner, d_state}, initial::log_index()}, p.A_log);
    v(entry{prefix + "D", kind::vector, {d_inner}, initial::constant(1)}, p.D);
    v(entry{prefix + "out_proj.weight", kind::matrix, {d_model, d_inner}, fan_in(d_inner).residual()}, p.out_proj);
    if (configuration::add_bias_linear<Config>())
      v(entry{prefix + "out_proj.bias", kind::vector, {d_model}, initial::constant(0)}, p.out_proj_bias);
  }
  template <class Visitor>
  static void describe(std::string const& prefix, Visitor&& v) {
    v(trait{prefix + "kind", "mamba"});
    if constexpr (std::is_same_v<Recurrence, selective_scan>)
      v(trait{prefix + "recurrence", "selective_scan"});
    else
      detail::describe_name<Recurrence>(prefix + "recurrence", v);
  }
  template <class State, class Visitor>
  static void visit_state(State& s, std::int64_t batch, std::int64_t, Visitor&& v) {
    v(entry{"conv", kind::matrix, {batch, d_conv - 1, d_inner}}, s.conv);
    v(entry{"ssm", kind::vector, {batch, d_inner, d_state}}, s.ssm);
  }

  /// y = mixer(x); with a state, continues from it and leaves the new one there.
  template <device_policy P, storage T, class S>
  static void forward(context<P> const& c, parameters<S, T> const& p, in<P, T, dyn, dyn> x, out<P, T, dyn, dyn> y,
                      saved<S, T>& keep, state<S, T>* carried) {
    auto const B = c.batch, L = c.length;
    keep.hidden = x;
    keep.xz = c.template allocate<T>(B, L, 2 * d_inner);
    linear::forward<P, T>(c.policy, {.x = x, .weight = p.in_proj, .bias = p.in_proj_bias}, keep.xz.rows());

    keep.u = c.template allocate<T>(B, L, d_inner);
    keep.projections = c.template allocate<T>(B, L, projected);
    keep.delta = c.template allocate<T>(B, L, d_inner);
    keep.y = c.template allocate<T>(B, L, d_inner);
    if (c.training)
      keep.checkpoints = c.template allocate<accum_t<T>>(
          Recurrence::template checkpoint_size<d_state>(B, L, d_inner, c.sequences()));

    auto const scope = c.scope();
    state<S, T> next;
    if (carried) {
      next.conv = c.template allocate<T>(c.sequences(), d_conv - 1, d_inner);
      next.ssm = c.template allocate<accum_t<T>>(c.sequences(), d_inner, d_state);
    } else {
      carried = &next;  // absent views: start from zero, keep nothing
    }
    causal_conv1d::forward(c.policy,
                           {.x = keep.xz.columns(0, d_inner),
                            .weight = p.conv_weight,
                            .bias = p.conv_bias,
                            .initial_state = carried->conv,
                            .cu_seqlens = c.cu_seqlens,
                            .silu = true},
                           keep.u, next.conv);
    linear::forward<P, T>(c.policy, {.x = keep.u.rows(), .weight = p.x_proj}, keep.projections.rows());
    linear::forward<P, T>(c.policy, {.x = keep.projections.rows().columns(0, dt_rank), .weight = p.dt_proj},
                          keep.delta.rows());
    Recurrence::template forward<d_state>(c.policy,
                                          {.u = keep.u,
                                           .delta = keep.delta,
                                           .A = p.A_log,
                                           .B = keep.projections.columns(dt_rank, d_state),
                                           .C = keep.projections.columns(dt_rank + d_state, d_state),
                                           .D = p.D,
                                           .z = keep.xz.columns(d_inner, d_inner),
                                           .delta_bias = p.dt_bias,
                                           .initial_state = carried->ssm,
                                           .cu_seqlens = c.cu_seqlens,
                                           .delta_softplus = true,
                                           .A_is_log = true},
                                          keep.y, {.final_state = next.ssm, .checkpoints = keep.checkpoints});
    if (next.conv.present()) {
      memory::copy(c.policy, next.conv, carried->conv);
      memory::copy(c.policy, next.ssm, carried->ssm);
    }
    linear::forward<P, T>(c.policy, {.x = keep.y.rows(), .weight = p.out_proj, .bias = p.out_proj_bias}, y);
  }

  /// d_x = gradient with respect to x; d += gradients of the parameters.
  template <device_policy P, storage T, class S>
  static void backward(context<P> const& c, parameters<S, T> const& p, saved<S, T> const& keep,
                       in<P, T, dyn, dyn> d_out, out<P, T, dyn, dyn> d_x, parameters<S, accum_t<T>> const& d) {
    auto const B = c.batch, L = c.length;
    auto const scope = c.scope();
    auto const d_xz = c.template allocate<T>(B, L, 2 * d_inner);
    auto const d_u = c.template allocate<T>(B, L, d_inner);
    auto const d_projections = c.template allocate<T>(B, L, projected);
    auto const d_delta = c.template allocate<T>(B, L, d_inner);
    auto const d_y = c.template allocate<T>(B, L, d_inner);
    linear::backward<P, T>(c.policy, {.x = keep.y.rows(), .weight = p.out_proj, .d_y = d_out},
                           {.d_x = d_y.rows(), .d_weight = d.out_proj, .d_bias = d.out_proj_bias});
    Recurrence::template backward<d_state, P, T>(c.policy,
                                           {.u = keep.u,
                                            .delta = keep.delta,
                                            .A = p.A_log,
                                            .B = keep.projections.columns(dt_rank, d_state),
                                            .C = keep.projections.columns(dt_rank + d_state, d_state),
                                            .D = p.D,
                                            .z = keep.xz.columns(d_inner, d_inner),
                                            .delta_bias = p.dt_bias,
                                            .cu_seqlens = c.cu_seqlens,
                                            .delta_softplus = true,
                                            .A_is_log = true,
                                            .checkpoints = keep.checkpoints,
                                            .d_y = d_y},
                                           {.d_u = d_u,
                                            .d_delta = d_delta,
                                            .d_A = d.A_log,
                                            .d_B = d_projections.columns(dt_rank, d_state),
                                            .d_C = d_projections.columns(dt_rank + d_state, d_state),
                                            .d_D = d.D,
                                            .d_z = d_xz.columns(d_inner, d_inner),
                                            .d_delta_bias = d.dt_bias});
    auto const d_dt = d_projections.rows().columns(0, dt_rank);
    linear::backward<P, T>(
        c.policy, {.x = keep.projections.rows().columns(0, dt_rank), .weight = p.dt_proj, .d_y = d_delta.rows()},
        {.d_x = d_dt, .d_weight = d.dt_proj});
    linear::backward<P, T>(c.policy, {.x = keep.u.rows(), .weight = p.x_proj, .d_y = d_projections.rows()},
                           {.d_x = d_u.rows(), .d_weight = d.x_proj, .d_x_update = update::accumulate});
    causal_conv1d::backward<P, T>(c.policy,
                            {.x = keep.xz.columns(0, d_inner),
                             .weight = p.conv_weight,
                             .bias = p.conv_bias,
                             .cu_seqlens = c.cu_seqlens,
                             .silu = true,
                             .d_y = d_u},
                            {.d_x = d_xz.columns(0, d_inner), .d_weight = d.conv_weight, .d_bias = d.conv_bias});
    linear::backward<P, T>(c.policy, {.x = keep.hidden, .weight = p.in_proj, .d_y = d_xz.rows()},
                           {.d_x = d_x, .d_weight = d.in_proj, .d_bias = d.in_proj_bias});
  }

  /// One token for each sequence: x, y (B, d_model). The state moves on in place.
  template <device_policy P, storage T, class S>
  static void step(context<P> const& c, parameters<S, T> const& p, state<S, T>& carried, in<P, T, dyn, dyn> x,
                   out<P, T, dyn, dyn> y) {
    auto const B = c.batch;
    auto const scope = c.scope();
    auto const xz = c.template allocate<T>(B, 2 * d_inner);
    auto const u = c.template allocate<T>(B, d_inner);
    auto const projections = c.template allocate<T>(B, projected);
    auto const delta = c.template allocate<T>(B, d_inner);
    auto const gated = c.template allocate<T>(B, d_inner);
    linear::forward<P, T>(c.policy, {.x = x, .weight = p.in_proj, .bias = p.in_proj_bias}, xz);
    causal_conv1d::step(c.policy,
                        {.x = xz.columns(0, d_inner), .weight = p.conv_weight, .bias = p.conv_bias, .silu = true},
                        carried.conv, u);
    linear::forward<P, T>(c.policy, {.x = u, .weight = p.x_proj}, projections);
    linear::forward<P, T>(c.policy, {.x = projections.columns(0, dt_rank), .weight = p.dt_proj}, delta);
    Recurrence::template step<d_state>(c.policy,
                                       {.u = u,
                                        .delta = delta,
                                        .A = p.A_log,
                                        .B = projections.columns(dt_rank, d_state),
                                        .C = projections.columns(dt_rank + d_state, d_state),
                                        .D = p.D,
                                        .z = xz.columns(d_inner, d_inner),
                                        .delta_bias = p.dt_bias,
                                        .delta_softplus = true,
                                        .A_is_log = true},
                                       carried.ssm, gated);
    linear::forward<P, T>(c.policy, {.x = gated, .weight = p.out_proj, .bias = p.out_proj_bias}, y);
  }
};

}  // namespace blackmamba
