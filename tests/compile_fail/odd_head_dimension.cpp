// Heads whose dimension has no halves to rotate.
#include <blackmamba/nn/self_attention.hpp>

#ifdef CORRECTED
inline constexpr int width = 16;
#else
inline constexpr int width = 18;
#endif

struct config {
  static constexpr int d_model = width, heads = 2;
};

template struct blackmamba::self_attention<config>;

// expected-error: blackmamba: attention: d_model / heads must be an even number from 2 to 256; change either
