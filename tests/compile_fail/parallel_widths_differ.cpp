// Two mixers of different widths on one stream.
#include <blackmamba/nn/mlp.hpp>
#include <blackmamba/nn/residual.hpp>

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

template struct blackmamba::parallel<blackmamba::rms_norm, blackmamba::mlp<config>, blackmamba::mlp<other>>;

// expected-error: blackmamba: parallel: the two mixers differ in d_model; give both the same
