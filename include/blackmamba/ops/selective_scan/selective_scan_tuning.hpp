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

/// `lanes` neighbouring lanes of a warp share a channel and hold N / lanes states each.
struct forward_plan {
  int lanes = 1;
  bool narrow = false;       ///< one channel for each lane in place of two, where sixteen states allow the choice
  std::int64_t segment = 0;  ///< steps after which a sequence is cut, to run its pieces side by side; 0: uncut
  /// Whether scan_forward_roles, where it takes the call, leaves sequences whole all the same, narrow. For packed ones
  /// the plan of one sequence must say so too: the longest of them may be nearly all.
  bool whole = false;
};

/// Lanes for N states.
constexpr int lanes_for(int states) {
  return states <= 2 ? 1 : states <= 4 ? 2 : states <= 32 ? 4 : states <= 64 ? 8 : 16;
}

/// @param sequences rows of the batch, or sequences packed in one
constexpr forward_plan plan_forward(int states, std::int64_t length, std::int64_t channels, std::int64_t sequences) {
  forward_plan plan{.lanes = lanes_for(states)};
  // Blocks of 128 lanes with two channels each. Where there are fewer than the 132 multiprocessors of a large device, a
  // second pass over the exponentials costs less than what stands idle; pieces are made for three blocks on each.
  std::int64_t const width = 256 / plan.lanes, blocks = sequences * ((channels + width - 1) / width);
  if (length >= 512 && blocks < 132) {
    std::int64_t const pieces = std::min<std::int64_t>(396 / std::max<std::int64_t>(blocks, 1), length / 64);
    plan.segment = (length / pieces + 31) / 32 * 32;
  }
  // A narrow block alone on its multiprocessor takes 66 clocks for a step. Pieces, which take a second pass and two
  // launches more, take as many where there are 92 narrow blocks, fewer where there are fewer, and 7 us in any case.
  if (states == 16 && plan.segment != 0) plan.whole = length * (92 - sequences * ((channels + 31) / 32)) < 19000;
  // Between one and two such blocks on each, twice as many of half the channels are spread more evenly.
  plan.narrow = states == 16 && plan.segment == 0 && blocks >= 132 && blocks < 264;
  return plan;
}

/// Pieces, numbered with gaps where packed sequences end early.
constexpr std::int64_t pieces_of_forward(forward_plan const& plan, std::int64_t batch, std::int64_t length,
                                         std::int64_t sequences) {
  if (plan.segment == 0) return 0;
  return batch == 1 ? length / plan.segment + sequences : batch * ((length + plan.segment - 1) / plan.segment);
}

}  // namespace blackmamba::selective_scan_tuning
