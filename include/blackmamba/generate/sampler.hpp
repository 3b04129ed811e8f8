#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/random.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <vector>

namespace blackmamba {

struct sampling_options {
  double temperature = 1;   ///< 0: the most likely token, always
  std::int32_t top_k = 0;   ///< only the k most likely; 0: all
  double top_p = 1;         ///< only the least set of most likely tokens whose probability reaches p
  std::uint64_t seed = 0;
};

/// Chooses a token by its logits. Draw number i depends on the seed and i alone.
class sampler {
 public:
  /// @throws value_error where an option is outside its domain
  explicit sampler(sampling_options const& options) : options_(options), random_(options.seed, 0x73616d706c65u) {
    auto const check = [](bool good, char const* name, double got, char const* expected) {
      if (!good)
        throw value_error("sampler: " + std::string(name) + ": got " + std::to_string(got) + ", expected " + expected);
    };
    check(options.temperature >= 0 && std::isfinite(options.temperature), "temperature", options.temperature,
          "at least 0");
    check(options.top_k >= 0, "top_k", options.top_k, "at least 0");
    check(options.top_p > 0 && options.top_p <= 1, "top_p", options.top_p, "in (0, 1]");
  }

  /// @throws value_error where a logit is NaN, or none is finite
  std::int32_t operator()(std::span<float const> logits, std::uint64_t draw) {
    check_finite(logits);
    auto const best = std::max_element(logits.begin(), logits.end());  // of equals the first
    if (options_.temperature == 0) return static_cast<std::int32_t>(best - logits.begin());

    order_.resize(logits.size());
    std::iota(order_.begin(), order_.end(), 0);
    auto const more_likely = [&](std::int32_t a, std::int32_t b) {
      float const x = logits[static_cast<std::size_t>(a)], y = logits[static_cast<std::size_t>(b)];
      return x > y || (x == y && a < b);
    };
    std::size_t kept = order_.size();
    if (options_.top_k > 0) kept = std::min(kept, static_cast<std::size_t>(options_.top_k));
    auto const at = [&](std::size_t n) { return order_.begin() + static_cast<std::ptrdiff_t>(n); };
    if (kept < order_.size()) std::nth_element(order_.begin(), at(kept - 1), order_.end(), more_likely);
    if (options_.top_p < 1) std::sort(order_.begin(), at(kept), more_likely);

    probability_.resize(kept);
    double total = 0;
    for (std::size_t i = 0; i < kept; ++i) {
      double const x = static_cast<double>(logits[static_cast<std::size_t>(order_[i])]) - static_cast<double>(*best);
      total += probability_[i] = std::exp(x / options_.temperature);
    }
    if (options_.top_p < 1) {
      double reached = 0;
      std::size_t n = 0;
      while (n < kept && reached < options_.top_p * total) reached += probability_[n++];
      kept = n;
      total = reached;
    }
    double left = static_cast<double>(random_.uniform(draw)) * total;
    for (std::size_t i = 0; i + 1 < kept; ++i) {
      left -= probability_[i];
      if (left < 0) return order_[i];
    }
    return order_[kept - 1];
  }

 private:
  static void check_finite(std::span<float const> logits) {
    bool some = false;
    for (std::size_t i = 0; i < logits.size(); ++i) {
      if (std::isnan(logits[i]) || logits[i] == INFINITY)
        throw value_error("sampler: logits: got " + std::to_string(logits[i]) + " for token " + std::to_string(i) +
                          ", expected finite numbers");
      some = some || logits[i] != -INFINITY;
    }
    if (!some) throw value_error("sampler: logits: got no finite number, expected at least one");
  }

  sampling_options options_;
  philox random_;
  std::vector<std::int32_t> order_;
  std::vector<double> probability_;
};

}  // namespace blackmamba
