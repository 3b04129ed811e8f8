#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/view.hpp>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

namespace blackmamba::cpu {

/// As parallel_for, but ranges of one grain are handed out one after the other, in order, as threads become free: for
/// uneven work, and for work that waits for lower indices (whatever is waited for has been taken by a running thread).
template <class Body>
void for_in_order(int threads, std::int64_t n, std::int64_t grain, Body&& body) {
  std::int64_t const shares = std::min<std::int64_t>(thread_count(threads), (n + grain - 1) / grain);
  std::atomic<std::int64_t> next{0};
  parallel_for(static_cast<int>(shares), shares, 1, [&](std::int64_t, std::int64_t) {
    for (;;) {
      std::int64_t const begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n) return;
      body(begin, std::min(n, begin + grain));
    }
  });
}

/// Flags by which blocks of one sequence, computed on different threads, hand a value from each to the next. The value
/// itself stands elsewhere: written before publish(i), read after wait(i).
class carry_chain {
 public:
  /// @param flags one for each block; set to zero here
  explicit carry_chain(host_view<std::int32_t, dyn> flags) : flags_(flags) {
    std::fill_n(flags.data(), flags.extent(0), 0);
  }

  bool ready(std::int64_t i) const { return flag(i).load(std::memory_order_acquire) != 0; }
  /// Returns when i has been published; false where it never will be, because its thread failed.
  bool wait(std::int64_t i) const {
    for (int spin = 0; !ready(i); ++spin) {
      if (failed_.load(std::memory_order_relaxed)) return false;
      if (spin < 20000)  // a fraction of a millisecond: a block takes less, and who yields may wait for longer
        detail::pause();
      else
        std::this_thread::yield();
    }
    return true;
  }
  void publish(std::int64_t i) { flag(i).store(1, std::memory_order_release); }
  /// Lets every waiting thread go: to be called where an exception ends the work on a block.
  void fail() { failed_.store(true, std::memory_order_relaxed); }

 private:
  std::atomic_ref<std::int32_t> flag(std::int64_t i) const { return std::atomic_ref<std::int32_t>(flags_(i)); }

  host_view<std::int32_t, dyn> flags_;
  std::atomic<bool> failed_{false};
};

}  // namespace blackmamba::cpu
