#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace blackmamba {

/// Learning rate over steps: linear warm-up from zero to the peak, then half a cosine down to the final rate
/// (Loshchilov and Hutter, arXiv 1608.03983, eq. 5, without restarts).
struct warmup_cosine {
  double peak = 3e-3;
  double final = 3e-4;
  std::int64_t warmup = 100;
  std::int64_t steps = 1000;

  /// @param step 1 for the first
  double operator()(std::int64_t step) const {
    if (step <= warmup)
      return peak * static_cast<double>(step) / static_cast<double>(std::max<std::int64_t>(warmup, 1));
    double const t = std::min(1.0, static_cast<double>(step - warmup) /
                                       static_cast<double>(std::max<std::int64_t>(steps - warmup, 1)));
    return final + (peak - final) * 0.5 * (1 + std::cos(3.14159265358979323846 * t));
  }
};

}  // namespace blackmamba
