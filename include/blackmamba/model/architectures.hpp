#pragma once
#include <blackmamba/model/language_model.hpp>
#include <blackmamba/nn/mamba.hpp>
#include <blackmamba/nn/mlp.hpp>
#include <blackmamba/nn/moe.hpp>
#include <blackmamba/nn/self_attention.hpp>
#include <blackmamba/nn/stack.hpp>

/// The four architectures of the BlackMamba paper (arXiv 2402.01771) over one set of parts. Config::layers counts
/// residual layers; the alternating ones have pairs of them.
namespace blackmamba {

namespace detail {

/// How often a pair of a mixer and a feed-forward layer is repeated.
template <class Config>
constexpr int layer_pairs() {
  static_assert(Config::layers % 2 == 0,
                "blackmamba: layers counts mixers and feed-forward layers, which alternate; make it an even number");
  return Config::layers / 2;
}

}  // namespace detail

/// Mamba layers and mixture-of-experts layers in turn.
template <class Config, class Activation = swiglu, class Balance = sinkhorn>
using blackmamba_model = language_model<
    Config, repeat<detail::layer_pairs<Config>(),
                   stack<prenorm<rms_norm, mamba<Config>>, prenorm<rms_norm, moe<Config, top1<Balance>, Activation>>>>>;

/// Mamba layers alone.
template <class Config>
using dense_mamba = language_model<Config, repeat<Config::layers, prenorm<rms_norm, mamba<Config>>>, rms_norm>;

/// Attention layers and dense layers in turn.
template <class Config, class Activation = swiglu>
using transformer =
    language_model<Config, repeat<detail::layer_pairs<Config>(), stack<prenorm<rms_norm, self_attention<Config>>,
                                                                       prenorm<rms_norm, mlp<Config, Activation>>>>>;

/// Attention layers and mixture-of-experts layers in turn.
template <class Config, class Activation = swiglu, class Balance = sinkhorn>
using transformer_moe = language_model<
    Config, repeat<detail::layer_pairs<Config>(), stack<prenorm<rms_norm, self_attention<Config>>,
                                                        prenorm<rms_norm, moe<Config, top1<Balance>, Activation>>>>>;

/// The published models, 340M active of 1.5B and 630M of 2.8B parameters. Their checkpoints compute GEGLU experts,
/// although paper and configuration say SwiGLU: instantiate blackmamba_model<blackmamba_630m_2_8b, geglu> for them.
struct blackmamba_340m_1_5b {
  static constexpr int d_model = 1152, layers = 30, d_state = 16, d_conv = 4, expand = 2, d_ff = 3072, experts = 8,
                       vocab = 50304;
};
struct blackmamba_630m_2_8b {
  static constexpr int d_model = 1472, layers = 36, d_state = 16, d_conv = 4, expand = 2, d_ff = 3872, experts = 8,
                       vocab = 50304;
};

}  // namespace blackmamba
