#include "support/files.hpp"
#include "support/models.hpp"

using namespace blackmamba;

namespace {

template <class T = float, class Arch = test::tiny_blackmamba>
using tiny_network = network<Arch, test_policy, T>;

training_options const options = {.batch = 4,
                                  .length = 16,
                                  .learning_rate = {.peak = 1e-2, .final = 1e-3, .warmup = 5, .steps = 60}};

/// The k-th batch of a text that has something to learn.
test::tokens batch(std::int64_t k, std::int64_t rows = options.batch) {
  test::tokens t(rows, options.length + 1);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t i = 0; i <= options.length; ++i)
      t(r, i) = static_cast<std::int32_t>((i * (1 + (r + k) % 3) + r + k) % 11);
  return t;
}

}  // namespace

TEST_CASE_TEMPLATE("trainer: learns", T, TRAINED_TYPES) {
  tiny_network<T> net(1, make_policy());
  trainer train(net, options);
  double const before = train.evaluate(batch(0));
  CHECK(std::abs(before - std::log(11.0)) < 0.2);
  step_report report;
  for (std::int64_t k = 0; k < 60; ++k) report = train.step(batch(k));
  CHECK(report.step == 60);
  CHECK(report.loss < 0.5 * before);
  CHECK(train.evaluate(batch(0)) < 0.6 * before);
}

TEST_CASE("trainer: two micro-batches give the gradient of one batch of both") {
  tiny_network<double, test::tiny_mamba> net(1, make_policy());
  auto once = test::still(4, 16);
  auto twice = test::still(2, 16);
  twice.accumulation = 2;
  trainer whole(net, once), halves(net, twice);
  auto const a = whole.step(batch(0)), b = halves.step(batch(0));
  CHECK(std::abs(a.loss - b.loss) < 1e-12);
  test::check_close(test::download(halves.gradient().flat()), test::download(whole.gradient().flat()), 1e-11);
}

TEST_CASE_TEMPLATE("trainer: the same bits in two runs, for any number of threads", P, test_policy) {
  auto const run = [](int threads) {
    P policy = make_policy();
    if constexpr (requires(P p) { p.threads; }) policy.threads = threads;
    network<test::tiny_blackmamba, P> net(1, policy);
    trainer train(net, options);
    for (std::int64_t k = 0; k < 10; ++k) train.step(batch(k));
    return test::weights_of(net);
  };
  auto const first = run(1);
  test::check_equal(run(1), first);
  test::check_equal(run(2), first);
  test::check_equal(run(3), first);
}

TEST_CASE_TEMPLATE("trainer: a run that is saved and loaded goes on bit for bit", T, float, bfloat16) {
  test::temporary_file file;
  tiny_network<T> straight(1, make_policy()), before(1, make_policy()), after(99, make_policy());
  trainer a(straight, options), b(before, options), c(after, options);
  for (std::int64_t k = 0; k < 12; ++k) a.step(batch(k));
  for (std::int64_t k = 0; k < 6; ++k) b.step(batch(k));
  b.save(file.path);
  c.load(file.path);
  CHECK(c.step_count() == 6);
  for (std::int64_t k = 6; k < 12; ++k) c.step(batch(k));
  test::check_equal(test::download(after.memory().matrices()), test::download(straight.memory().matrices()),
                    "matrices");
  test::check_equal(test::download(after.memory().vectors()), test::download(straight.memory().vectors()), "vectors");
  test::check_equal(test::download(after.memory().buffers()), test::download(straight.memory().buffers()), "buffers");
}

TEST_CASE("trainer: loss is a mean over tokens, evaluation needs whole batches") {
  tiny_network<> net(1, make_policy());
  trainer train(net, options);
  CHECK(std::abs(train.evaluate(batch(0, 8)) - 0.5 * (train.evaluate(batch(0)) + train.evaluate([] {
                                                        test::tokens all = batch(0, 8), second(4, options.length + 1);
                                                        for (std::int64_t i = 0; i < second.size(); ++i)
                                                          second.data()[i] = all.data()[second.size() + i];
                                                        return second;
                                                      }()))) < 1e-6);
  CHECK(test::message_of<shape_error>([&] { train.evaluate(batch(0, 5)); }) ==
        "trainer.evaluate: tokens: got 5 rows, expected a multiple of 4");
  CHECK(test::message_of<shape_error>([&] { train.step(test::tokens(4, 9)); }) ==
        "trainer.step: tokens: got (4, 9), expected (4, 17)");
}

TEST_CASE("trainer: a token outside the vocabulary is named before anything is done") {
  tiny_network<> net(1, make_policy());
  trainer train(net, options);
  auto tokens = batch(0);
  tokens(2, 5) = 11;
  CHECK(test::message_of<value_error>([&] { train.step(tokens); }) ==
        "trainer.step: tokens: row 2, position 5 holds 11, expected 0 to 10");
  CHECK(test::message_of<value_error>([&] { train.evaluate(tokens); }) ==
        "trainer.evaluate: tokens: row 2, position 5 holds 11, expected 0 to 10");
  CHECK(train.step_count() == 0);
}

TEST_CASE("trainer: a loss that is not finite is reported and changes nothing") {
  tiny_network<> net(1, make_policy());
  trainer train(net, options);
  train.step(batch(0));
  // A NaN in the final norm reaches every logit.
  auto poisoned = test::weights_of(net);
  poisoned[poisoned.size() - 64] = std::nan("");
  auto const good = test::weights_of(net);
  net.memory().visit([&](entry const& e, auto& x) {
    if (e.name == "decoder.final_layernorm.weight") {
      auto const nans = test::upload<float>(test::values(static_cast<std::size_t>(x.size()), std::nan("")), x.size());
      if constexpr (std::is_same_v<typename std::remove_reference_t<decltype(x)>::value_type, float>)
        memory::copy(make_policy(), nans.as_view(), x);
    }
  });
  auto const message = test::message_of<value_error>([&] { train.step(batch(1)); });
  CHECK(message.starts_with("trainer.step: step 2: loss is "));
  CHECK(message.ends_with("expected finite numbers; the weights are unchanged"));
  CHECK(train.step_count() == 1);
  auto const after = test::weights_of(net);
  std::size_t same = 0;
  for (std::size_t i = 0; i < after.size(); ++i) same += after[i] == good[i];
  CHECK(same == after.size() - 8);
}
