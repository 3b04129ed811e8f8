// A mixer where a block is asked for: it has no norm and no residual stream.
#include <blackmamba/nn/mlp.hpp>
#include <blackmamba/nn/stack.hpp>

struct config {
  static constexpr int d_model = 8, d_ff = 16;
};

#ifdef CORRECTED
using block = blackmamba::prenorm<blackmamba::rms_norm, blackmamba::mlp<config>>;
#else
using block = blackmamba::mlp<config>;
#endif

template struct blackmamba::repeat<2, block>;

// expected-error: blackmamba: repeat: the second argument must be a block: prenorm, parallel, stack
