#pragma once
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

/// A progress bar where standard output is a terminal; a plain line now and then where it is a pipe.
class progress {
 public:
  using clock = std::chrono::steady_clock;

  progress(std::int64_t steps, std::int64_t tokens_per_step)
      : steps_(steps), tokens_per_step_(tokens_per_step), terminal_(isatty(STDOUT_FILENO) != 0) {}

  void update(std::int64_t step, double loss) {
    smooth_ = step <= 1 ? loss : smooth_ + (loss - smooth_) * std::max(0.02, 1.0 / static_cast<double>(step));
    double const now = seconds();
    bool const last = step == steps_;
    if (!last && now - shown_ < (terminal_ ? 0.1 : 10.0)) return;
    shown_ = now;
    double const rate = static_cast<double>(step * tokens_per_step_) / now;
    double const left = now * static_cast<double>(steps_ - step) / static_cast<double>(step);
    if (terminal_) {
      int const filled = static_cast<int>(24 * step / steps_);
      std::string bar;
      for (int i = 0; i < 24; ++i) bar += i < filled ? "█" : "░";
      std::printf("\r%s ", bar.c_str());
    }
    std::printf("step %*lld/%lld  loss %.3f  %.3f bits/byte  %.0f tokens/s  %02d:%02d left%s", terminal_ ? 0 : 5,
                static_cast<long long>(step), static_cast<long long>(steps_), smooth_, smooth_ / std::log(2.0), rate,
                static_cast<int>(left) / 60, static_cast<int>(left) % 60, terminal_ && !last ? "   " : "\n");
    std::fflush(stdout);
  }
  double seconds() const { return std::chrono::duration<double>(clock::now() - start_).count(); }

 private:
  std::int64_t steps_;
  std::int64_t tokens_per_step_;
  bool terminal_;
  clock::time_point start_ = clock::now();
  double shown_ = -1e9;
  double smooth_ = 0;
};
