#include "support/policy_cpu.hpp"
#include "support/support.hpp"

#include <blackmamba/train/corpus.hpp>
#include <blackmamba/train/schedule.hpp>

using namespace blackmamba;

namespace {
using tokens = tensor<space::host, std::int32_t, dyn, dyn>;
}

TEST_CASE("corpus: windows are consecutive bytes of the training part") {
  std::string text;
  for (int i = 0; i < 250; ++i) text += static_cast<char>(i);
  corpus c(1, {.held_out = 0.2});
  c.add("bytes", text);
  CHECK(c.training_bytes() == 200);
  CHECK(c.held_out() == text.substr(200));
  tokens t(500, 10);
  c.sample(0, t);
  bool first = false, last = false;
  for (std::int64_t r = 0; r < 500; ++r) {
    for (std::int64_t i = 1; i < 10; ++i) REQUIRE(t(r, i) == t(r, 0) + i);
    REQUIRE(t(r, 9) < 200);
    first = first || t(r, 0) == 0;
    last = last || t(r, 9) == 199;
  }
  CHECK(first);
  CHECK(last);
}

TEST_CASE("corpus: an example depends on the seed and its number alone") {
  corpus a(1), b(1), other(2);
  for (auto* c : {&a, &b, &other}) c->add("text", std::string(1000, 'x') + std::string(1000, 'y'));
  tokens all(8, 5), second(4, 5), third(8, 5);
  a.sample(0, all);
  b.sample(4, second);
  other.sample(0, third);
  int differ = 0;
  for (std::int64_t r = 0; r < 4; ++r)
    for (std::int64_t i = 0; i < 5; ++i) {
      CHECK(second(r, i) == all(4 + r, i));
      differ += third(r, i) != all(r, i);
    }
  CHECK(differ > 0);
}

TEST_CASE("corpus: texts are drawn by their weights") {
  corpus c(1);
  c.add("a", std::string(50, 'a'), 3);
  c.add("b", std::string(5000, 'b'), 1);
  tokens t(4000, 2);
  c.sample(0, t);
  int a = 0;
  for (std::int64_t r = 0; r < 4000; ++r) a += t(r, 0) == 'a';
  CHECK(a > 2880);  // 3000 +- 4.4 standard deviations
  CHECK(a < 3120);
}

TEST_CASE("corpus: bad texts are named") {
  corpus c(1);
  CHECK(test::message_of<value_error>([&] { c.check_length(1); }) == "corpus: no text was added");
  CHECK(test::message_of<value_error>([&] { c.add("empty.txt", ""); }) ==
        "corpus: empty.txt: the text is empty, expected at least one byte");
  CHECK(test::message_of<value_error>([&] { c.add("t", "x", 0); }) == "corpus: t: weight: got 0.000000, expected > 0");
  CHECK(test::message_of<value_error>([&] { c.add("t", "x", INFINITY); }) ==
        "corpus: t: weight: got inf, expected a finite number, and so for the sum of all");
  CHECK(test::message_of<file_error>([&] { c.add_file("/no/such/file"); }) == "/no/such/file: can't be read");
  CHECK(test::message_of<file_error>([&] { c.add_file("/"); }) == "/: can't be read");
  c.add("short.txt", "0123456789");
  CHECK(test::message_of<value_error>([&] {
          tokens t(1, 10);
          c.sample(0, t);
        }) == "corpus: short.txt: its training part has 9 bytes, expected at least 10 (one context and its next byte)");
}

TEST_CASE("corpus: options outside their domain are named") {
  auto const message = [](corpus::options const& o) { return test::message_of<value_error>([&] { corpus(1, o); }); };
  CHECK(message({.held_out = 1.5}) == "corpus: held_out: got 1.500000, expected in [0, 1)");
  CHECK(message({.held_out = -0.1}) == "corpus: held_out: got -0.100000, expected in [0, 1)");
  CHECK(message({.held_out_most = -1}) == "corpus: held_out_most: got -1, expected at least 0");
}

TEST_CASE("schedule: warms up to the peak, then half a cosine") {
  warmup_cosine const rate{.peak = 1, .final = 0.1, .warmup = 10, .steps = 110};
  CHECK(rate(1) == doctest::Approx(0.1));
  CHECK(rate(10) == doctest::Approx(1));
  CHECK(rate(60) == doctest::Approx(0.55));
  CHECK(rate(110) == doctest::Approx(0.1));
  CHECK(rate(1000) == doctest::Approx(0.1));
}
