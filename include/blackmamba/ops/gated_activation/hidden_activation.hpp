#pragma once
#include <blackmamba/ops/gated_activation/gated_activation.hpp>

#include <cstdint>

namespace blackmamba {

/// How the hidden layer of an mlp or of an expert is activated: gated ones take twice the width from the first product,
/// gate rows first.
template <class Function, bool Gated>
struct hidden_activation {
  using function = Function;
  static constexpr bool gated = Gated;
};
using swiglu = hidden_activation<activation::silu, true>;  ///< silu(gate) up, Shazeer, arXiv 2002.05202
using geglu = hidden_activation<activation::gelu, true>;   ///< gelu(gate) up, with the exact erf
using plain_silu = hidden_activation<activation::silu, false>;
using plain_gelu = hidden_activation<activation::gelu, false>;

namespace detail {

/// The activation on the first product's output h (rows, d_ff or 2 d_ff), of all rows or of the first row_count.
template <class Activation, device_policy P, storage T>
void activate(P const& policy, view<typename P::memory_space, T, dyn, dyn> h, std::int64_t d_ff,
              view<typename P::memory_space, T, dyn, dyn> y, in<P, std::int64_t, dyn> row_count = {}) {
  if constexpr (Activation::gated)
    gated_activation::forward<typename Activation::function, P, T>(policy, h.columns(0, d_ff), h.columns(d_ff, d_ff), y,
                                                                   row_count);
  else
    gated_activation::forward<typename Activation::function, P, T>(policy, h, {}, y, row_count);
}
template <class Activation, device_policy P, storage T>
void activate_backward(P const& policy, view<typename P::memory_space, T const, dyn, dyn> h, std::int64_t d_ff,
                       view<typename P::memory_space, T const, dyn, dyn> d_y,
                       view<typename P::memory_space, T, dyn, dyn> d_h, in<P, std::int64_t, dyn> row_count = {}) {
  if constexpr (Activation::gated)
    gated_activation::backward<typename Activation::function, P, T>(
        policy, {.gate = h.columns(0, d_ff), .up = h.columns(d_ff, d_ff), .d_y = d_y, .row_count = row_count},
        {.d_gate = d_h.columns(0, d_ff), .d_up = d_h.columns(d_ff, d_ff)});
  else
    gated_activation::backward<typename Activation::function, P, T>(
        policy, {.gate = h, .up = {}, .d_y = d_y, .row_count = row_count}, {.d_gate = d_h, .d_up = {}});
}

}  // namespace detail

}  // namespace blackmamba
