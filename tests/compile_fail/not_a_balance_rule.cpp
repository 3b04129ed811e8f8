// A type that lacks a balance rule's members, where one is asked for.
#include <blackmamba/nn/moe.hpp>

struct config {
  static constexpr int d_model = 8, d_ff = 16, experts = 4;
};
struct nearly {
  static constexpr double beta = 1;
};

#ifdef CORRECTED
using rule = blackmamba::no_balance;
#else
using rule = nearly;
#endif

template struct blackmamba::moe<config, blackmamba::top1<rule>>;

// expected-error: blackmamba: moe: the argument of top_k is no balance rule; give it the members that
