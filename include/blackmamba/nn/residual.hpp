#pragma once
#include <blackmamba/core/memory.hpp>
#include <blackmamba/nn/module.hpp>
#include <blackmamba/nn/norm.hpp>
#include <blackmamba/ops/add/add.hpp>

#include <type_traits>

namespace blackmamba {

/// The residual stream between two layers: its value is hidden + residual, where hidden is the newest mixer's output in
/// storage precision and residual the sum before it in accum_t<T> (absent before the first layer).
template <class S, storage T>
struct residual_stream {
  view<S, T, dyn, dyn> hidden;               // (tokens, d_model)
  view<S, accum_t<T>, dyn, dyn> residual;    // (tokens, d_model)
  view<S, accum_t<T>, dyn, dyn> buffer;      // (tokens, d_model)  inference: where every layer's sum goes
};

namespace detail {

/// Where a layer keeps its sum: memory of its own in training, for backward needs it; the shared buffer in inference.
template <device_policy P, storage T, class S>
view<S, accum_t<T>, dyn, dyn> sum_of(context<P> const& c, residual_stream<S, T> const& stream) {
  if (!c.training) return stream.buffer;
  return c.template allocate<accum_t<T>>(stream.hidden.extent(0), stream.hidden.extent(1));
}

/// The gradient of a mixer's output: that of the stream, in storage precision.
template <storage T, device_policy P, class S, storage A>
view<S, T, dyn, dyn> gradient_as(context<P> const& c, view<S, A, dyn, dyn> d_stream) {
  if constexpr (std::is_same_v<T, A>) {
    return d_stream;
  } else {
    auto rounded = c.template allocate<T>(d_stream.extent(0), d_stream.extent(1));
    memory::copy(c.policy, d_stream, rounded);
    return rounded;
  }
}

}  // namespace detail

/// One pre-normalised residual layer: stream += Mixer(Norm(stream)).
template <class Norm, class Mixer>
struct prenorm {
  static_assert(mixer<Mixer>, "blackmamba: prenorm: the second argument is no mixer; give it the members that "
                              "blackmamba::mixer in nn/module.hpp asks for");
  static constexpr int d_model = Mixer::d_model;
  using norm = norm_layer<Norm, d_model>;

  template <class S, storage T>
  struct parameters {
    typename norm::template parameters<S, T> norm_parameters;
    typename Mixer::template parameters<S, T> mixer_parameters;
  };
  template <class S, storage T>
  struct saved {
    typename norm::template saved<S, T> norm_saved;
    typename Mixer::template saved<S, T> mixer_saved;
  };
  template <class S, storage T>
  using state = typename Mixer::template state<S, T>;

  template <class Parameters, class Visitor>
  static void visit(Parameters& p, layer_names& names, Visitor&& v) {
    std::string const prefix = names.next();
    norm::visit(p.norm_parameters, prefix + "norm.", v);
    Mixer::visit(p.mixer_parameters, prefix + "mixer.", v);
  }
  template <class Visitor>
  static void describe(layer_names& names, Visitor&& v) {
    std::string const prefix = names.next();
    detail::describe_part<norm>(prefix + "norm.", v);
    detail::describe_part<Mixer>(prefix + "mixer.", v);
  }
  template <class State, class Visitor>
  static void visit_state(State& s, std::int64_t batch, std::int64_t capacity, Visitor&& v) {
    Mixer::visit_state(s, batch, capacity, v);
  }

  template <device_policy P, storage T, class S>
  static void forward(context<P> const& c, parameters<S, T> const& p, residual_stream<S, T>& stream, saved<S, T>& keep,
                      state<S, T>* carried) {
    auto const scope = c.layer_scope();
    keep.norm_saved.sum = detail::sum_of(c, stream);
    auto const normalised = c.template allocate<T>(stream.hidden.extent(0), stream.hidden.extent(1));
    norm::template forward<P, T, S>(c, p.norm_parameters, stream.hidden, stream.residual, normalised, keep.norm_saved);
    Mixer::template forward<P, T, S>(c, p.mixer_parameters, normalised, stream.hidden, keep.mixer_saved, carried);
    stream.residual = keep.norm_saved.sum;
  }
  /// d_stream in: with respect to the stream after this layer; out: before it.
  template <device_policy P, storage T, class S>
  static void backward(context<P> const& c, parameters<S, T> const& p, saved<S, T> const& keep,
                       view<S, accum_t<T>, dyn, dyn> d_stream, parameters<S, accum_t<T>> const& d) {
    auto const scope = c.scope();
    auto const d_y = detail::gradient_as<T>(c, d_stream);
    auto const d_normalised = c.template allocate<T>(d_stream.extent(0), d_stream.extent(1));
    Mixer::template backward<P, T, S>(c, p.mixer_parameters, keep.mixer_saved, d_y, d_normalised, d.mixer_parameters);
    norm::template backward<P, T, S>(c, p.norm_parameters, keep.norm_saved, d_normalised, d_stream, d_stream,
                                     d.norm_parameters);
  }
  template <device_policy P, storage T, class S>
  static void step(context<P> const& c, parameters<S, T> const& p, residual_stream<S, T>& stream,
                   state<S, T>& carried) {
    auto const scope = c.scope();
    typename norm::template saved<S, T> keep;
    keep.sum = stream.buffer;
    auto const normalised = c.template allocate<T>(stream.hidden.extent(0), stream.hidden.extent(1));
    norm::template forward<P, T, S>(c, p.norm_parameters, stream.hidden, stream.residual, normalised, keep);
    Mixer::template step<P, T, S>(c, p.mixer_parameters, carried, normalised, stream.hidden);
    stream.residual = stream.buffer;
  }
};

/// Two mixers side by side on one stream: stream += A(Norm(stream)) + B(Norm'(stream)), each with a norm of its own.
/// The parallel variant of BlackMamba's reference code, where B is an mlp or an moe.
template <class Norm, class A, class B>
struct parallel {
  static_assert(mixer<A> && mixer<B>, "blackmamba: parallel: the second and third argument must be mixers; give them "
                                      "the members that blackmamba::mixer in nn/module.hpp asks for");
  static_assert(A::d_model == B::d_model,
                "blackmamba: parallel: the two mixers differ in d_model; give both the same");
  static constexpr int d_model = A::d_model;
  using norm = norm_layer<Norm, d_model>;

  template <class S, storage T>
  struct parameters {
    typename norm::template parameters<S, T> norm_a, norm_b;
    typename A::template parameters<S, T> a;
    typename B::template parameters<S, T> b;
  };
  template <class S, storage T>
  struct saved {
    typename norm::template saved<S, T> norm_a, norm_b;
    typename A::template saved<S, T> a;
    typename B::template saved<S, T> b;
  };
  template <class S, storage T>
  struct state {
    typename A::template state<S, T> a;
    typename B::template state<S, T> b;
  };

  template <class Parameters, class Visitor>
  static void visit(Parameters& p, layer_names& names, Visitor&& v) {
    std::string const prefix = names.next();
    norm::visit(p.norm_a, prefix + "norm.", v);
    A::visit(p.a, prefix + "mixer.", v);
    norm::visit(p.norm_b, prefix + "norm_moe.", v);
    B::visit(p.b, prefix + "moe.", v);
  }
  template <class Visitor>
  static void describe(layer_names& names, Visitor&& v) {
    std::string const prefix = names.next();
    detail::describe_part<norm>(prefix + "norm.", v);
    detail::describe_part<A>(prefix + "mixer.", v);
    detail::describe_part<norm>(prefix + "norm_moe.", v);
    detail::describe_part<B>(prefix + "moe.", v);
  }
  template <class State, class Visitor>
  static void visit_state(State& s, std::int64_t batch, std::int64_t capacity, Visitor&& v) {
    A::visit_state(s.a, batch, capacity, v);
    B::visit_state(s.b, batch, capacity, v);
  }

  template <device_policy P, storage T, class S>
  static void forward(context<P> const& c, parameters<S, T> const& p, residual_stream<S, T>& stream, saved<S, T>& keep,
                      state<S, T>* carried) {
    auto const scope = c.layer_scope();
    run(c, p, stream, keep, [&](auto const& x_a, auto const& x_b, auto const& y_a, auto const& y_b) {
      A::template forward<P, T, S>(c, p.a, x_a, y_a, keep.a, carried ? &carried->a : nullptr);
      B::template forward<P, T, S>(c, p.b, x_b, y_b, keep.b, carried ? &carried->b : nullptr);
    });
  }
  template <device_policy P, storage T, class S>
  static void backward(context<P> const& c, parameters<S, T> const& p, saved<S, T> const& keep,
                       view<S, accum_t<T>, dyn, dyn> d_stream, parameters<S, accum_t<T>> const& d) {
    auto const scope = c.scope();
    auto const rows = d_stream.extent(0), width = d_stream.extent(1);
    auto const d_y = detail::gradient_as<T>(c, d_stream);
    auto const d_x_a = c.template allocate<T>(rows, width);
    auto const d_x_b = c.template allocate<T>(rows, width);
    A::template backward<P, T, S>(c, p.a, keep.a, d_y, d_x_a, d.a);
    B::template backward<P, T, S>(c, p.b, keep.b, d_y, d_x_b, d.b);
    norm::template backward<P, T, S>(c, p.norm_a, keep.norm_a, d_x_a, d_stream, d_stream, d.norm_a);
    norm::template backward<P, T, S>(c, p.norm_b, keep.norm_b, d_x_b, d_stream, d_stream, d.norm_b);
  }
  template <device_policy P, storage T, class S>
  static void step(context<P> const& c, parameters<S, T> const& p, residual_stream<S, T>& stream,
                   state<S, T>& carried) {
    auto const scope = c.scope();
    saved<S, T> keep;
    run(c, p, stream, keep, [&](auto const& x_a, auto const& x_b, auto const& y_a, auto const& y_b) {
      A::template step<P, T, S>(c, p.a, carried.a, x_a, y_a);
      B::template step<P, T, S>(c, p.b, carried.b, x_b, y_b);
    });
  }

 private:
  /// Both norms of the stream, both mixers, and their sum as the new hidden.
  template <device_policy P, storage T, class S, class Mixers>
  static void run(context<P> const& c, parameters<S, T> const& p, residual_stream<S, T>& stream, saved<S, T>& keep,
                  Mixers&& mixers) {
    auto const rows = stream.hidden.extent(0), width = stream.hidden.extent(1);
    auto const x_a = c.template allocate<T>(rows, width);
    auto const x_b = c.template allocate<T>(rows, width);
    auto const y_b = c.template allocate<T>(rows, width);
    // The second norm reads the same addends; the sum is written once, by the first norm, into memory that the second
    // does not read: in inference the buffer is the residual itself, so the second norm goes first.
    norm::template forward<P, T, S>(c, p.norm_b, stream.hidden, stream.residual, x_b, keep.norm_b);
    keep.norm_a.sum = detail::sum_of(c, stream);
    norm::template forward<P, T, S>(c, p.norm_a, stream.hidden, stream.residual, x_a, keep.norm_a);
    keep.norm_b.sum = keep.norm_a.sum;
    mixers(x_a, x_b, stream.hidden, y_b);
    add::forward<P, T>(c.policy, stream.hidden, y_b, stream.hidden);
    stream.residual = keep.norm_a.sum;
  }
};

}  // namespace blackmamba
