// A type that lacks a mixer's members, in a mixer's place: the block says what it needs.
#include <blackmamba/nn/mlp.hpp>
#include <blackmamba/nn/stack.hpp>

struct config {
  static constexpr int d_model = 8, d_ff = 16;
};
struct nearly : blackmamba::stateless {
  static constexpr int d_model = 8;
  template <class S, blackmamba::storage T>
  using parameters = blackmamba::nothing;
};

#ifdef CORRECTED
using mixer = blackmamba::mlp<config>;
#else
using mixer = nearly;
#endif

template struct blackmamba::prenorm<blackmamba::rms_norm, mixer>;

// expected-error: blackmamba: prenorm: the second argument is no mixer; give it the members that
