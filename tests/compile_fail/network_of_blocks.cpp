// Blocks without the embedding and the output layer around them, in an architecture's place.
#include <blackmamba/model/language_model.hpp>
#include <blackmamba/model/network.hpp>
#include <blackmamba/nn/mlp.hpp>
#include <blackmamba/nn/stack.hpp>

struct config {
  static constexpr int d_model = 8, d_ff = 16, vocab = 16;
};
using blocks = blackmamba::repeat<2, blackmamba::prenorm<blackmamba::rms_norm, blackmamba::mlp<config>>>;

#ifdef CORRECTED
using arch = blackmamba::language_model<config, blocks>;
#else
using arch = blocks;
#endif

using network_type = blackmamba::network<arch, blackmamba::device::cpu>;
static_assert(sizeof(network_type) > 0);

// expected-error: blackmamba: network: the first argument is no architecture; blocks become one as language_model<
