#pragma once
#include <blackmamba/nn/module.hpp>
#include <blackmamba/nn/residual.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <tuple>
#include <utility>

namespace blackmamba {

/// Blocks one after the other.
template <class... Blocks>
struct stack {
  static_assert((block<Blocks> && ...), "blackmamba: stack: every argument must be a block: prenorm, parallel, stack, "
                                        "repeat, or a type with the members that blackmamba::block asks for");
  static constexpr int d_model = std::max({0, detail::block_width<Blocks>()...});
  static_assert(((detail::block_width<Blocks>() == 0 || detail::block_width<Blocks>() == d_model) && ...),
                "blackmamba: stack: the blocks differ in d_model; give all of them the same");

  template <class S, storage T>
  struct parameters {
    std::tuple<typename Blocks::template parameters<S, T>...> part;
  };
  template <class S, storage T>
  struct saved {
    std::tuple<typename Blocks::template saved<S, T>...> part;
  };
  template <class S, storage T>
  struct state {
    std::tuple<typename Blocks::template state<S, T>...> part;
  };

  template <class Parameters, class Visitor>
  static void visit(Parameters& p, layer_names& names, Visitor&& v) {
    each([&]<class Block, std::size_t I>() { Block::visit(std::get<I>(p.part), names, v); });
  }
  template <class Visitor>
  static void describe(layer_names& names, Visitor&& v) {
    (detail::describe_block<Blocks>(names, v), ...);
  }
  template <class State, class Visitor>
  static void visit_state(State& s, std::int64_t batch, std::int64_t capacity, Visitor&& v) {
    each([&]<class Block, std::size_t I>() { Block::visit_state(std::get<I>(s.part), batch, capacity, v); });
  }
  template <device_policy P, storage T, class S>
  static void forward(context<P> const& c, parameters<S, T> const& p, residual_stream<S, T>& stream, saved<S, T>& keep,
                      state<S, T>* carried) {
    each([&]<class Block, std::size_t I>() {
      Block::template forward<P, T, S>(c, std::get<I>(p.part), stream, std::get<I>(keep.part),
                                       carried ? &std::get<I>(carried->part) : nullptr);
    });
  }
  template <device_policy P, storage T, class S>
  static void backward(context<P> const& c, parameters<S, T> const& p, saved<S, T> const& keep,
                       view<S, accum_t<T>, dyn, dyn> d_stream, parameters<S, accum_t<T>> const& d) {
    each_reversed([&]<class Block, std::size_t I>() {
      Block::template backward<P, T, S>(c, std::get<I>(p.part), std::get<I>(keep.part), d_stream, std::get<I>(d.part));
    });
  }
  template <device_policy P, storage T, class S>
  static void step(context<P> const& c, parameters<S, T> const& p, residual_stream<S, T>& stream,
                   state<S, T>& carried) {
    each([&]<class Block, std::size_t I>() {
      Block::template step<P, T, S>(c, std::get<I>(p.part), stream, std::get<I>(carried.part));
    });
  }

 private:
  template <class F>
  static void each(F&& f) {
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      (f.template operator()<Blocks, I>(), ...);
    }(std::index_sequence_for<Blocks...>{});
  }
  template <class F>
  static void each_reversed(F&& f) {
    constexpr std::size_t last = sizeof...(Blocks) - 1;
    using all = std::tuple<Blocks...>;
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      (f.template operator()<std::tuple_element_t<last - I, all>, last - I>(), ...);
    }(std::index_sequence_for<Blocks...>{});
  }
};

/// The same block N times, each with parameters of its own. Compiled once.
template <int N, class Block>
struct repeat {
  static_assert(N >= 1, "blackmamba: repeat: the count must be at least 1");
  static_assert(block<Block>, "blackmamba: repeat: the second argument must be a block: prenorm, parallel, stack, "
                              "repeat, or a type with the members that blackmamba::block asks for");
  static constexpr int d_model = detail::block_width<Block>();

  template <class S, storage T>
  struct parameters {
    std::array<typename Block::template parameters<S, T>, static_cast<std::size_t>(N)> part;
  };
  template <class S, storage T>
  struct saved {
    std::array<typename Block::template saved<S, T>, static_cast<std::size_t>(N)> part;
  };
  template <class S, storage T>
  struct state {
    std::array<typename Block::template state<S, T>, static_cast<std::size_t>(N)> part;
  };

  template <class Parameters, class Visitor>
  static void visit(Parameters& p, layer_names& names, Visitor&& v) {
    for (auto& part : p.part) Block::visit(part, names, v);
  }
  template <class Visitor>
  static void describe(layer_names& names, Visitor&& v) {
    for (int i = 0; i < N; ++i) detail::describe_block<Block>(names, v);
  }
  template <class State, class Visitor>
  static void visit_state(State& s, std::int64_t batch, std::int64_t capacity, Visitor&& v) {
    for (auto& part : s.part) Block::visit_state(part, batch, capacity, v);
  }
  template <device_policy P, storage T, class S>
  static void forward(context<P> const& c, parameters<S, T> const& p, residual_stream<S, T>& stream, saved<S, T>& keep,
                      state<S, T>* carried) {
    for (std::size_t i = 0; i < N; ++i)
      Block::template forward<P, T, S>(c, p.part[i], stream, keep.part[i], carried ? &carried->part[i] : nullptr);
  }
  template <device_policy P, storage T, class S>
  static void backward(context<P> const& c, parameters<S, T> const& p, saved<S, T> const& keep,
                       view<S, accum_t<T>, dyn, dyn> d_stream, parameters<S, accum_t<T>> const& d) {
    for (std::size_t i = N; i-- > 0;)
      Block::template backward<P, T, S>(c, p.part[i], keep.part[i], d_stream, d.part[i]);
  }
  template <device_policy P, storage T, class S>
  static void step(context<P> const& c, parameters<S, T> const& p, residual_stream<S, T>& stream,
                   state<S, T>& carried) {
    for (std::size_t i = 0; i < N; ++i) Block::template step<P, T, S>(c, p.part[i], stream, carried.part[i]);
  }
};

}  // namespace blackmamba
