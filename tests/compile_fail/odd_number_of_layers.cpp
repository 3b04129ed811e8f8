// Layers that alternate, and an odd number of them.
#include <blackmamba/model/architectures.hpp>

#ifdef CORRECTED
inline constexpr int count = 4;
#else
inline constexpr int count = 5;
#endif

struct config {
  static constexpr int d_model = 8, layers = count, d_ff = 16, experts = 4, vocab = 16;
};

blackmamba::blackmamba_model<config>::parameters<blackmamba::space::host, float> views;

// expected-error: blackmamba: layers counts mixers and feed-forward layers, which alternate; make it an even number
