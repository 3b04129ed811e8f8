#pragma once

/// Configurations are named types with static members; these traits read them and fill in what is left out.
///
///   d_model          width of the residual stream                           required
///   vocab            rows of the embedding                                  language_model
///   layers           residual layers                                        the architectures of model/
///   d_state          states of a channel                                    mamba; default 16
///   d_conv           taps of the convolution                                mamba; default 4
///   expand           inner channels of mamba / d_model                      mamba; default 2
///   dt_rank          rank of the step size's projection                     mamba; default ceil(d_model / 16)
///   bias             whether in_proj has a bias                             mamba; default false
///   conv_bias        whether the convolution has one                        mamba; default true
///   add_bias_linear  whether out_proj and the experts' products have one    mamba, moe, mlp, attention; default false
///   d_ff             width of an expert or of the mlp                       moe, mlp
///   experts          experts of a layer                                     moe
///   heads            attention heads                                        attention
///   kv_heads         key/value heads                                        attention; default heads
///   rotary_base      base of the rotary embedding                           attention; default 10000
namespace blackmamba::configuration {

template <class C>
constexpr int d_state() {
  if constexpr (requires { C::d_state; })
    return C::d_state;
  else
    return 16;
}

template <class C>
constexpr int d_conv() {
  if constexpr (requires { C::d_conv; })
    return C::d_conv;
  else
    return 4;
}

template <class C>
constexpr int expand() {
  if constexpr (requires { C::expand; })
    return C::expand;
  else
    return 2;
}

template <class C>
constexpr int dt_rank() {
  if constexpr (requires { C::dt_rank; })
    return C::dt_rank;
  else
    return (C::d_model + 15) / 16;
}

template <class C>
constexpr int kv_heads() {
  if constexpr (requires { C::kv_heads; })
    return C::kv_heads;
  else
    return C::heads;
}

template <class C>
constexpr double rotary_base() {
  if constexpr (requires { C::rotary_base; })
    return C::rotary_base;
  else
    return 10000.0;
}

template <class C>
constexpr bool bias() {
  if constexpr (requires { C::bias; })
    return C::bias;
  else
    return false;
}

template <class C>
constexpr bool conv_bias() {
  if constexpr (requires { C::conv_bias; })
    return C::conv_bias;
  else
    return true;
}

template <class C>
constexpr bool add_bias_linear() {
  if constexpr (requires { C::add_bias_linear; })
    return C::add_bias_linear;
  else
    return false;
}

template <class C>
constexpr int d_inner() {
  return expand<C>() * C::d_model;
}

}  // namespace blackmamba::configuration
