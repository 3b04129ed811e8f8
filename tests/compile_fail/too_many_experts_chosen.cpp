// More experts for a token than there are.
#include <blackmamba/nn/moe.hpp>

struct config {
  static constexpr int d_model = 8, d_ff = 16, experts = 4;
};

#ifdef CORRECTED
inline constexpr int k = 4;
#else
inline constexpr int k = 5;
#endif

template struct blackmamba::moe<config, blackmamba::top_k<k, blackmamba::no_balance>>;

// expected-error: blackmamba: moe: top_k is larger than the number of experts; lower it
