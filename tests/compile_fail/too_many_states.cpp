// More states of a channel than the scan is written for.
#include <blackmamba/nn/mamba.hpp>

#ifdef CORRECTED
inline constexpr int states = 256;
#else
inline constexpr int states = 257;
#endif

struct config {
  static constexpr int d_model = 8, d_state = states;
};

template struct blackmamba::mamba<config>;

// expected-error: blackmamba: mamba: d_state must lie in 1 to 256
