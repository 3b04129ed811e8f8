#pragma once
#include "support/support.hpp"

#include <blackmamba/generate/generator.hpp>
#include <blackmamba/model/architectures.hpp>
#include <blackmamba/model/network.hpp>
#include <blackmamba/train/trainer.hpp>

/// Small architectures, one of each kind, that the tests of models, training and generation share.
namespace test {

struct tiny {
  static constexpr int d_model = 8, layers = 4, d_state = 3, d_conv = 4, expand = 2, d_ff = 12, experts = 3, heads = 2,
                       vocab = 11;
};
/// Every bias, fewer taps, grouped key/value heads, a rank of its own.
struct tiny_biased : tiny {
  static constexpr int d_conv = 2, dt_rank = 3, kv_heads = 1;
  static constexpr bool bias = true, add_bias_linear = true;
};

using tiny_blackmamba = blackmamba::blackmamba_model<tiny>;
using tiny_unbalanced = blackmamba::blackmamba_model<tiny, blackmamba::swiglu, blackmamba::no_balance>;
using tiny_geglu = blackmamba::blackmamba_model<tiny_biased, blackmamba::geglu, blackmamba::no_balance>;
using tiny_mamba = blackmamba::dense_mamba<tiny>;
using tiny_transformer = blackmamba::transformer<tiny_biased>;
using tiny_transformer_moe = blackmamba::transformer_moe<tiny, blackmamba::plain_gelu, blackmamba::no_balance>;
/// Mamba and a top-2 mixture side by side.
using tiny_parallel = blackmamba::language_model<
    tiny,
    blackmamba::repeat<2, blackmamba::parallel<blackmamba::rms_norm, blackmamba::mamba<tiny>,
                                               blackmamba::moe<tiny, blackmamba::top_k<2, blackmamba::no_balance>>>>>;
/// Experts that take half of a balanced load: every second token or more finds no place.
using tiny_dropping = blackmamba::language_model<
    tiny,
    blackmamba::repeat<
        2, blackmamba::stack<
               blackmamba::prenorm<blackmamba::rms_norm, blackmamba::mamba<tiny>>,
               blackmamba::prenorm<blackmamba::rms_norm,
                                   blackmamba::moe<tiny, blackmamba::top_k<1, blackmamba::no_balance,
                                                                           blackmamba::gate_function::sigmoid, 50>>>>>>;

using tokens = blackmamba::tensor<blackmamba::space::host, std::int32_t, blackmamba::dyn, blackmamba::dyn>;

inline tokens random_tokens(std::int64_t rows, std::int64_t length, std::int64_t vocab, std::uint64_t seed) {
  tokens t(rows, length);
  for (std::int64_t i = 0; i < t.size(); ++i)
    t.data()[i] = static_cast<std::int32_t>(random_integer(seed, static_cast<std::uint64_t>(i), 0, vocab - 1));
  return t;
}

/// Every parameter of a network, as one vector. For storage types that accumulate in themselves.
template <class Network>
values weights_of(Network const& network) {
  return download(network.memory().flat());
}
template <class Network>
void set_weights(Network const& network, values const& v) {
  using T = typename Network::storage_type;
  auto const t = upload<T>(v, static_cast<std::int64_t>(v.size()));
  blackmamba::memory::copy(network.policy(), t.as_view(), network.memory().flat());
}

/// Options of a trainer that computes loss and gradient and leaves the weights as they are.
inline blackmamba::training_options still(std::int64_t batch, std::int64_t length) {
  return {.batch = batch, .length = length, .learning_rate = {.peak = 0, .final = 0}, .max_norm = 0};
}

template <class Network>
values logits_of(blackmamba::generator<Network> const& from) {
  auto const v = from.logits_view();
  values out(static_cast<std::size_t>(v.size()));
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<double>(v.data()[i]);
  return out;
}

}  // namespace test
