#pragma once
#include <cstdint>

/// The quickstart's model and batch, which the benchmark of a training step measures too.
struct quickstart_config {
  static constexpr int d_model = 128, layers = 8, d_state = 16, d_conv = 4, expand = 2, d_ff = 256, experts = 8,
                       vocab = 256;
};
inline constexpr std::int64_t quickstart_batch = 16;
inline constexpr std::int64_t quickstart_length = 128;
