#pragma once
#include <algorithm>
#include <cstdint>

/// How the selective scan's work is cut on a CUDA device. Every choice is a function of sizes alone, never of the
/// device, so that results are the same bits on all of them.
///
/// Checkpoints have one layout there: in accum_t<T>, (selective_scan::chunks per row, D, N), N fastest,
///
///   element(row b, chunk k of its sequence, d, n) = ((number * D) + d) * N + n,
///   number = b * chunks(B, L, S) + k, or with cu_seqlens: cu_seqlens[s] / chunk_length + s + k,
///
/// with the state of channel d before step k * chunk_length of the sequence. A sequence of no steps has chunk 0.
namespace blackmamba::selective_scan_tuning {

/// States, steps and lanes of a kernel: `lanes` neighbouring lanes of a warp share a channel and hold N / lanes states
/// each.
struct forward_plan {
  int lanes = 1;
  std::int64_t segment = 0;  ///< steps after which a sequence is cut, to run the pieces side by side; 0: uncut
};

/// Lanes for N states.
constexpr int lanes_for(int states) { return states <= 2 ? 1 : states <= 8 ? 2 : states <= 32 ? 4 : 16; }

/// @param sequences rows of the batch, or sequences packed in one
constexpr forward_plan plan_forward(int states, std::int64_t length, std::int64_t channels, std::int64_t sequences) {
  forward_plan plan{.lanes = lanes_for(states)};
  // Few channels: a second pass over the exponentials pays as soon as fewer than a third of the lanes have work.
  std::int64_t const lanes = channels * sequences * plan.lanes;
  if (lanes < 12 * 1024 && length >= 4096) {
    std::int64_t const pieces = std::clamp<std::int64_t>(8 * 12 * 1024 / std::max<std::int64_t>(lanes, 1), 2, 1024);
    plan.segment = std::max<std::int64_t>((length / pieces + 127) / 128 * 128, 256);
  }
  return plan;
}

}  // namespace blackmamba::selective_scan_tuning
