#include "support/policy_cpu.hpp"
#include "support/support.hpp"

#include <blackmamba/generate/sampler.hpp>

#include <vector>

using namespace blackmamba;

namespace {

std::vector<double> frequencies(std::vector<float> const& logits, sampling_options const& options, int draws = 40000) {
  sampler choose(options);
  std::vector<double> share(logits.size());
  for (int i = 0; i < draws; ++i)
    share[static_cast<std::size_t>(choose(logits, static_cast<std::uint64_t>(i)))] += 1.0 / draws;
  return share;
}

std::vector<float> const logits = {1, 3, 2, -1, 3};

void check_distribution(std::vector<double> const& got, std::vector<double> weights) {
  double total = 0;
  for (double w : weights) total += w;
  for (std::size_t i = 0; i < got.size(); ++i) {
    double const p = weights[i] / total;
    CHECK(std::abs(got[i] - p) <= 5 * std::sqrt(p * (1 - p) / 40000) + 1e-9);
  }
}

}  // namespace

TEST_CASE("sampler: draws from the softmax of the logits over the temperature") {
  for (double t : {0.5, 1.0, 2.0}) {
    std::vector<double> w;
    for (float x : logits) w.push_back(std::exp(static_cast<double>(x) / t));
    check_distribution(frequencies(logits, {.temperature = t, .seed = 3}), w);
  }
}

TEST_CASE("sampler: temperature zero takes the first of the most likely") {
  sampler choose({.temperature = 0});
  CHECK(choose(logits, 0) == 1);
  CHECK(choose(logits, 1) == 1);
}

TEST_CASE("sampler: top_k and top_p keep the most likely tokens") {
  double const e1 = std::exp(1.0), e2 = std::exp(2.0), e3 = std::exp(3.0);
  check_distribution(frequencies(logits, {.top_k = 3}), {0, e3, e2, 0, e3});
  check_distribution(frequencies(logits, {.top_k = 1}), {0, 1, 0, 0, 0});
  check_distribution(frequencies(logits, {.top_k = 99}), {e1, e3, e2, std::exp(-1.0), e3});
  check_distribution(frequencies(logits, {.top_p = 0.3}), {0, 1, 0, 0, 0});
  check_distribution(frequencies(logits, {.top_p = 0.7}), {0, e3, 0, 0, e3});
  check_distribution(frequencies(logits, {.top_p = 0.9}), {0, e3, e2, 0, e3});
  check_distribution(frequencies(logits, {.top_k = 2, .top_p = 0.99}), {0, e3, 0, 0, e3});
}

TEST_CASE("sampler: a draw depends on the seed and its number alone") {
  sampler a({.seed = 1}), b({.seed = 1}), c({.seed = 2});
  int differ = 0;
  for (std::uint64_t i = 0; i < 100; ++i) {
    CHECK(a(logits, i) == b(logits, i));
    differ += a(logits, i) != c(logits, i);
  }
  CHECK(differ > 0);
}

TEST_CASE("sampler: bad options and logits are named") {
  CHECK(test::message_of<value_error>([] { sampler({.temperature = -1}); }) ==
        "sampler: temperature: got -1.000000, expected at least 0");
  CHECK(test::message_of<value_error>([] { sampler({.top_p = 0}); }) ==
        "sampler: top_p: got 0.000000, expected in (0, 1]");
  CHECK(test::message_of<value_error>([] { sampler({.top_k = -2}); }) ==
        "sampler: top_k: got -2.000000, expected at least 0");
  sampler choose({});
  std::vector<float> const nan = {0, NAN}, none = {-INFINITY, -INFINITY}, masked = {-INFINITY, 1};
  CHECK(test::message_of<value_error>([&] { choose(nan, 0); }) ==
        "sampler: logits: got nan for token 1, expected finite numbers");
  CHECK(test::message_of<value_error>([&] { choose(none, 0); }) ==
        "sampler: logits: got no finite number, expected at least one");
  CHECK(choose(masked, 0) == 1);
}
