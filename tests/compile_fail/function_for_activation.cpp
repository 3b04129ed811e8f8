// An activation function where the hidden layer's activation is asked for, which also says whether it is gated.
#include <blackmamba/nn/mlp.hpp>

struct config {
  static constexpr int d_model = 8, d_ff = 16;
};

#ifdef CORRECTED
using activation = blackmamba::swiglu;
#else
using activation = blackmamba::activation::silu;
#endif

template struct blackmamba::mlp<config, activation>;

// expected-error: blackmamba: mlp, moe: the activation does not say whether it is gated; write swiglu
