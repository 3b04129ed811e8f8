#include "support/support.hpp"

using namespace blackmamba;

namespace {

struct known_answer {
  std::uint32_t counter[4], key[2], expected[4];
};

/// philox4x32-10 in the file kat_vectors of the authors' Random123 library.
constexpr known_answer known_answers[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     {0xffffffff, 0xffffffff},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

constexpr std::uint32_t first_word(known_answer k) {
  philox::block(k.counter, k.key[0], k.key[1]);
  return k.counter[0];
}

struct moments {
  double mean = 0, variance = 0, skewness = 0, kurtosis = 0;
};
template <class F>
moments moments_of(F f, std::int64_t n) {
  moments m;
  for (std::int64_t i = 0; i < n; ++i) m.mean += f(i) / static_cast<double>(n);
  for (std::int64_t i = 0; i < n; ++i) {
    double const d = f(i) - m.mean;
    m.variance += d * d / static_cast<double>(n);
    m.skewness += d * d * d / static_cast<double>(n);
    m.kurtosis += d * d * d * d / static_cast<double>(n);
  }
  return m;
}

}  // namespace

TEST_CASE("random: the published known answers") {
  for (auto k : known_answers) {
    philox::block(k.counter, k.key[0], k.key[1]);
    for (int i = 0; i < 4; ++i) CHECK(k.counter[i] == k.expected[i]);
  }
  static_assert(first_word(known_answers[2]) == 0xd16cfe09);
}
TEST_CASE("random: four numbers from each block, the stream in the upper half of the counter, the seed as key") {
  std::uint64_t const seed = 0x299f31d0a4093822, stream = 0x0370734413198a2e;
  philox const random(seed, stream);
  std::uint64_t const start = (std::uint64_t{0x05a308d3} << 34) + (std::uint64_t{0x243f6a88} << 2);
  std::uint32_t counter[4] = {0x243f6a88, 0x05a308d3, 0x13198a2e, 0x03707344};
  philox::block(counter, 0xa4093822, 0x299f31d0);
  for (std::uint64_t i = 0; i < 4; ++i) CHECK(random.bits(start + i) == counter[i]);
  CHECK(philox(0).bits(0) == 0x6627e8d5);
  CHECK(philox(0).bits(3) == 0x9b00dbd8);
}
TEST_CASE("random: seeds and streams are unrelated, numbers repeat") {
  philox const random(1);
  int equal = 0, same_bit = 0;
  for (std::uint64_t i = 0; i < 10000; ++i) {
    CHECK_MESSAGE(random.bits(i) == philox(1).bits(i), i);
    equal += random.bits(i) == philox(2).bits(i);
    equal += random.bits(i) == philox(1, 1).bits(i);
    same_bit += (random.bits(i) & 1u) == (philox(1, 1).bits(i) & 1u);
  }
  CHECK(equal <= 1);
  CHECK(std::abs(same_bit - 5000) < 250);  // 5 standard deviations
}
TEST_CASE("random: uniform numbers lie inside (0, 1) and fill it evenly") {
  philox const random(3);
  std::int64_t const n = 1 << 20, bins = 64;
  std::vector<std::int64_t> count(bins);
  bool inside = true;
  for (std::int64_t i = 0; i < n; ++i) {
    float const u = random.uniform(static_cast<std::uint64_t>(i));
    inside = inside && u > 0 && u < 1;
    ++count[static_cast<std::size_t>(u * static_cast<float>(bins))];
  }
  CHECK(inside);
  double const expected = static_cast<double>(n) / static_cast<double>(bins);
  double chi_square = 0;
  for (auto c : count)
    chi_square += (static_cast<double>(c) - expected) * (static_cast<double>(c) - expected) / expected;
  CHECK(chi_square < 63 + 5 * std::sqrt(2.0 * 63));
  CHECK(random.uniform(5, -2.0f, 6.0f) == -2.0f + 8.0f * random.uniform(5));
}
TEST_CASE("random: moments of the normal distribution") {
  philox const random(4);
  std::int64_t const n = 1 << 20;
  auto const m =
      moments_of([&](std::int64_t i) { return static_cast<double>(random.normal(static_cast<std::uint64_t>(i))); }, n);
  double const deviation = 1 / std::sqrt(static_cast<double>(n));
  CHECK(std::abs(m.mean) < 5 * deviation);
  CHECK(std::abs(m.variance - 1) < 5 * std::sqrt(2.0) * deviation);
  CHECK(std::abs(m.skewness) < 5 * std::sqrt(15.0) * deviation);
  CHECK(std::abs(m.kurtosis - 3) < 5 * std::sqrt(96.0) * deviation);
  double product = 0;
  for (std::int64_t i = 0; i + 1 < n; ++i)
    product += static_cast<double>(random.normal(static_cast<std::uint64_t>(i))) *
               static_cast<double>(random.normal(static_cast<std::uint64_t>(i + 1)));
  CHECK(std::abs(product / static_cast<double>(n)) < 5 * deviation);
}
