// Two layers of different widths, one after the other.
#include <blackmamba/nn/mlp.hpp>
#include <blackmamba/nn/stack.hpp>

struct config {
  static constexpr int d_model = 8, d_ff = 16;
};
#ifdef CORRECTED
struct other : config {};
#else
struct other : config {
  static constexpr int d_model = 12;
};
#endif

template <class Config>
using layer = blackmamba::prenorm<blackmamba::rms_norm, blackmamba::mlp<Config>>;
template struct blackmamba::stack<layer<config>, layer<other>>;

// expected-error: blackmamba: stack: the blocks differ in d_model; give all of them the same
