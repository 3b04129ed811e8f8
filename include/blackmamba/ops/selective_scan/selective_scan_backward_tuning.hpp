#pragma once
#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

/// How the backward pass of the selective scan is cut on a CUDA device. As in selective_scan_tuning.hpp, every choice
/// is a function of sizes alone.
namespace blackmamba::selective_scan_tuning {

/// The block of the backward kernel for N states in arithmetic of so many bytes: `lanes` neighbouring lanes of a warp
/// share `lane_channels` channels and hold `lane_states` states of each. States beyond N are zero.
template <int N, std::size_t Bytes>
struct backward_block {
  static constexpr int threads = N <= 8 || Bytes > 4 ? 64 : 128;
  static constexpr int warps = threads / 32;
  static constexpr int states = std::max(4, static_cast<int>(std::bit_ceil(static_cast<unsigned>(N))));
  static constexpr int lane_states = states > 128 ? 8 : 4;
  static constexpr int lane_channels = lane_states == 8 && Bytes <= 4 ? 1 : 2;
  static constexpr int lanes = states / lane_states;
  /// Channels that a block works on at a time, and how often it takes as many, so that it sums d_B and d_C over 64
  /// channels at least.
  static constexpr int channels = threads / lanes * lane_channels;
  static constexpr int rounds = std::max(1, 64 / channels);
  static constexpr int group_channels = channels * rounds;
  /// Blocks of a multiprocessor that registers are shared out for: 12 warps.
  static constexpr int resident = Bytes > 4 ? 1 : 384 / threads;
  /// Steps that are run through forward and back with states and decays in registers.
  static constexpr int steps = 4;
};

/// Chunks, numbered in order over all sequences, are dealt out to blocks in parts that follow each other. A unit is
/// what parts do not reach across: a row where rows are cut, else everything.
struct backward_plan {
  std::int64_t groups = 0;       ///< of channels
  std::int64_t unit = 1;         ///< chunks
  std::int64_t part_chunks = 1;  ///< at most
  std::int64_t unit_parts = 1;
  std::int64_t parts = 1;
  bool cut = false;  ///< parts may end within a sequence: the gradients of the states between them come first
};

/// @param row_chunks chunks of a row
/// @param sequences  rows of the batch, or sequences packed in one
constexpr backward_plan plan_backward(std::int64_t batch, std::int64_t row_chunks, std::int64_t sequences,
                                      std::int64_t channels, std::int64_t group_channels) {
  constexpr std::int64_t resident = 396;  // blocks of 128 threads that run at once on a large device: 3 on each of 132
  // Few chunks stay together, so that short sequences come out the same in any company.
  bool const together = row_chunks < (sequences > batch ? sequences + 24 : 8);
  std::int64_t const fewest = together ? row_chunks : 2;
  backward_plan plan{.groups = (channels + group_channels - 1) / group_channels};
  std::int64_t const blocks = std::max<std::int64_t>(plan.groups * batch, 1);
  std::int64_t const pieces =
      std::clamp<std::int64_t>(resident / blocks, 1, std::max<std::int64_t>(row_chunks / fewest, 1));
  auto const divided = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  if (pieces > 1) {
    plan.unit = row_chunks;
    plan.part_chunks = divided(row_chunks, pieces);
    plan.cut = true;
  } else {
    plan.unit = batch * row_chunks;
    plan.part_chunks = row_chunks * std::clamp<std::int64_t>(blocks / (8 * resident), 1, batch);
  }
  plan.unit_parts = divided(plan.unit, plan.part_chunks);
  plan.parts = batch * row_chunks / plan.unit * plan.unit_parts;
  return plan;
}

}  // namespace blackmamba::selective_scan_tuning
