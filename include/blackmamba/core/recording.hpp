#pragma once
#include <blackmamba/core/policy.hpp>

#include <utility>

namespace blackmamba {

/// A step that is run many times with the same memory: where a device can, it is recorded once and then replayed, so
/// that the host issues one call instead of hundreds. The first run goes as it is. The general case just runs it.
///
/// The step must do the same work on the same addresses every time: it takes what differs from device memory, allocates
/// nothing but from the policy's workspace, which stays the same, and does not wait.
template <device_policy P>
class recording {
 public:
  /// Runs step(policy), or replays what it did.
  template <class Step>
  void run(P const& policy, Step&& step) {
    std::forward<Step>(step)(policy);
  }
  /// Forgets what was recorded.
  void reset() {}
  /// Whether the next run is a replay.
  bool recorded() const { return false; }
};

}  // namespace blackmamba

#if BLACKMAMBA_CUDA
#include <blackmamba/core/cuda/recording_cuda.cuh>
#endif
