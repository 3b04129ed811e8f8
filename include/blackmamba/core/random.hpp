#pragma once
#include <blackmamba/core/config.hpp>

#include <cmath>
#include <cstdint>

namespace blackmamba {

/// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
///
/// The i-th number of a stream is a pure function of (seed, stream, i): the same on every device, in any order, with
/// nothing to store. bits() and uniform() are bitwise equal on host and device; normal() evaluates logarithm and cosine
/// in double and rounds to float, so it is equal but for a rare last bit.
class philox {
 public:
  BLACKMAMBA_HD constexpr explicit philox(std::uint64_t seed, std::uint64_t stream = 0)
      : seed_(seed), stream_(stream) {}

  /// The cipher itself: replaces the 128-bit counter by 128 random bits under the key.
  BLACKMAMBA_HD static constexpr void block(std::uint32_t (&counter)[4], std::uint32_t key0, std::uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
      std::uint64_t const p0 = std::uint64_t{0xD2511F53u} * counter[0];
      std::uint64_t const p1 = std::uint64_t{0xCD9E8D57u} * counter[2];
      std::uint32_t const next[4] = {
          static_cast<std::uint32_t>(p1 >> 32) ^ counter[1] ^ key0, static_cast<std::uint32_t>(p1),
          static_cast<std::uint32_t>(p0 >> 32) ^ counter[3] ^ key1, static_cast<std::uint32_t>(p0)};
      for (int j = 0; j < 4; ++j) counter[j] = next[j];
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
  }

  /// 32 random bits.
  BLACKMAMBA_HD constexpr std::uint32_t bits(std::uint64_t i) const {
    std::uint32_t c[4] = {static_cast<std::uint32_t>(i >> 2), static_cast<std::uint32_t>(i >> 34),
                          static_cast<std::uint32_t>(stream_), static_cast<std::uint32_t>(stream_ >> 32)};
    block(c, static_cast<std::uint32_t>(seed_), static_cast<std::uint32_t>(seed_ >> 32));
    return c[i & 3u];
  }
  /// Uniform on (0, 1): 23 bits and a half, so that neither 0 nor 1 can come out of rounding.
  BLACKMAMBA_HD constexpr float uniform(std::uint64_t i) const {
    return (static_cast<float>(bits(i) >> 9) + 0.5f) * 0x1p-23f;
  }
  /// Uniform on (low, high).
  BLACKMAMBA_HD constexpr float uniform(std::uint64_t i, float low, float high) const {
    return low + (high - low) * uniform(i);
  }
  /// Standard normal (Box-Muller; number i uses bits 2i and 2i + 1).
  BLACKMAMBA_HD float normal(std::uint64_t i) const {
    double const u = (static_cast<double>(bits(2 * i)) + 0.5) * 0x1p-32;
    double const v = (static_cast<double>(bits(2 * i + 1)) + 0.5) * 0x1p-32;
    return static_cast<float>(std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586476925 * v));
  }

 private:
  std::uint64_t seed_;
  std::uint64_t stream_;
};

}  // namespace blackmamba
