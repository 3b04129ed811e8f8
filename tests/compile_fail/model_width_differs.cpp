// Layers of one width in a model of another.
#include <blackmamba/model/language_model.hpp>
#include <blackmamba/nn/mlp.hpp>
#include <blackmamba/nn/stack.hpp>

struct config {
  static constexpr int d_model = 8, d_ff = 16, vocab = 32;
};
#ifdef CORRECTED
struct other : config {};
#else
struct other : config {
  static constexpr int d_model = 12;
};
#endif

using layers = blackmamba::repeat<2, blackmamba::prenorm<blackmamba::rms_norm, blackmamba::mlp<other>>>;
template struct blackmamba::language_model<config, layers>;

// expected-error: blackmamba: language_model: the layers' d_model is not that of the model's configuration; give both
