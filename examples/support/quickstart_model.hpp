#pragma once
#include <cstdint>

/// The quickstart's model and batch, which the benchmark of a training step measures too.
struct quickstart_config {
  static constexpr int d_model = 128, layers = 8, d_state = 16, d_conv = 4, expand = 2, d_ff = 256, experts = 8,
                       vocab = 256;
};
inline constexpr std::int64_t quickstart_batch = 16;
inline constexpr std::int64_t quickstart_length = 128;

/// How a model is trained: what goes with its size.
struct quickstart_small : quickstart_config {
  static constexpr std::int64_t batch = quickstart_batch, length = quickstart_length, steps = 1500;
  static constexpr double peak = 6e-3, final = 3e-4;
};
/// About 100 million parameters active for a token, half a billion in all: for a GPU.
struct quickstart_large {
  static constexpr int d_model = 768, layers = 24, d_state = 16, d_conv = 4, expand = 2, d_ff = 2048, experts = 8,
                       vocab = 256;
  static constexpr std::int64_t batch = 32, length = 512, steps = 400;
  static constexpr double peak = 1e-3, final = 1e-4;
};
