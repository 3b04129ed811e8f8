// A text where tokens are asked for.
#include <blackmamba/generate/generator.hpp>
#include <blackmamba/model/language_model.hpp>
#include <blackmamba/nn/mlp.hpp>
#include <blackmamba/nn/stack.hpp>

struct config {
  static constexpr int d_model = 8, d_ff = 16, vocab = 256;
};
using arch = blackmamba::language_model<config, blackmamba::prenorm<blackmamba::rms_norm, blackmamba::mlp<config>>>;

void speak(blackmamba::generator<blackmamba::network<arch, blackmamba::device::cpu>>& from) {
#ifdef CORRECTED
  blackmamba::generate(from, std::vector<std::int32_t>{65, 108, 108}, 3);
#else
  blackmamba::generate(from, "All", 3);
#endif
}

// expected-error: blackmamba: generate: the prompt is a text, and a model reads tokens; write byte_tokens(text)
