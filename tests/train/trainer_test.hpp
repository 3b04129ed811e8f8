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
  auto const steps = static_cast<std::int64_t>(test::trials(60));
  for (std::int64_t k = 0; k < steps; ++k) report = train.step(batch(k));
  CHECK(report.step == steps);
  if (steps < 60) return;
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

TEST_CASE("trainer: Sinkhorn's options, as a layer has them, reach the operator") {
  static constexpr sinkhorn::options how{.mode = sinkhorn::mode::ones, .fixed_passes = 3, .beta = 1};
  using rule = moe<test::tiny, top1<sinkhorn_balance<how>>>::balance;
  static_assert(rule::beta == 1 && moe<test::tiny, top1<sinkhorn>>::balance::beta == 2);
  auto const logits = test::upload<float>(test::random_normal(64 * 5, 3), 64, 5);
  auto const report = zeros<sinkhorn::report>(make_policy(), 1);
  auto const by_rule = zeros<float>(make_policy(), 5), by_operator = zeros<float>(make_policy(), 5);
  arena<test::test_space> workspace(1 << 20);
  context<test_policy> c{.policy = make_policy()};
  c.policy.workspace = &workspace;
  rule::before<test_policy, float>(c, logits, by_rule, 1, report);
  sinkhorn::forward(c.policy, logits, by_operator, report, how);
  test::check_equal(test::download(by_rule.as_view()), test::download(by_operator.as_view()));
  tensor<space::host, sinkhorn::report, dyn> host(1);
  memory::download(make_policy(), report.as_view(), host.as_view());
  CHECK(host(0).passes == 3);
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

TEST_CASE_TEMPLATE("trainer: a file that does not fit is named, and changes nothing, bit for bit", T, float, bfloat16) {
  test::temporary_file file, before, after;
  tiny_network<T> net(1, make_policy()), other(2, make_policy());
  trainer train(net, options), another(other, options);
  train.step(batch(0));
  for (std::int64_t k = 0; k < 3; ++k) another.step(batch(k));
  train.save(before.path);
  auto const attempt = [&](std::string const& behind, std::string const& from, std::string const& to) {
    another.save(file.path);
    test::change_header(file.path, [&](std::string& header) { test::replace_after(header, behind, from, to); });
    auto const message = test::message_of<file_error>([&] { train.load(file.path); });
    train.save(after.path);
    bool const same = test::bytes_of(after.path) == test::bytes_of(before.path);
    CHECK_MESSAGE(same, "something changed: " << message);
    REQUIRE(message.starts_with(file.path + ": "));
    return message.substr(file.path.size() + 2);
  };
  CHECK(attempt("", "blackmamba training 2", "blackmamba training 1") ==
        "format: got 'blackmamba training 1', expected 'blackmamba training 2'");
  CHECK(attempt("", "\"step\":\"3\"", "\"step\":\"-3\"") == "step: got '-3', expected a whole number");
  CHECK(attempt("", "\"step\":\"3\"", "\"step\":\"\"") == "step: got '', expected a whole number");
  CHECK(attempt("\"storage\":", type_name<T>(), "int8") ==
        "storage: got 'int8', expected float32, float64, bfloat16 or float16");
  std::string const what = "; build the trainer with the file's, or load its weights alone with load_weights";
  CHECK(attempt("\"batch\":", "4", "8") == "batch: got 8, expected 4" + what);
  CHECK(attempt("\"length\":", "16", "32") == "length: got 32, expected 16" + what);
  CHECK(attempt("\"accumulation\":", "1", "2") == "accumulation: got 2, expected 1" + what);
  std::string const layer = "decoder.layers.1.mixer.";
  CHECK(attempt("architecture." + layer + "router.balance\"", "sinkhorn", "none") ==
        "of another architecture: " + layer + "router.balance: got none, expected sinkhorn");
  CHECK(attempt("architecture." + layer + "router.balance.mode", "sound", "ones") ==
        "of another architecture: " + layer + "router.balance.mode: got ones, expected sound");
  CHECK(attempt("architecture." + layer + "router.beta\"", "\"2\"", "\"1\"") ==
        "of another architecture: " + layer + "router.beta: got 1, expected 2");
  CHECK(attempt("architecture." + layer + "activation", "silu", "gelu") ==
        "of another architecture: " + layer + "activation: got gelu, expected silu");
  // The last tensors that are read.
  std::string const name = "second_moment/decoder.final_layernorm.weight";
  CHECK(attempt("\"" + name, "F32", "I32") ==
        "tensor '" + name + "': got dtype I32, expected F32, F64, BF16 or F16");
  if constexpr (std::is_same_v<T, bfloat16>) {
    auto const count = net.memory().matrices().size();
    CHECK(attempt("\"master/matrices", "F32", "I32") ==
          "tensor 'master/matrices': got dtype I32, expected F32, F64, BF16 or F16");
    CHECK(attempt("\"master/matrices", "F32\",\"shape\":[" + std::to_string(count),
                  "F64\",\"shape\":[" + std::to_string(count / 2)) ==
          "tensor 'master/matrices': got " + std::to_string(count / 2) + " elements, expected " +
              std::to_string(count));
    CHECK(attempt("", "\"master/matrices", "\"master/matrix") == "has no tensor 'master/matrices'");
  }
  another.save(file.path);
  train.load(file.path);  // nothing of all that is in the way
  CHECK(train.step_count() == 3);
}

TEST_CASE("trainer: weights of 16 bits that are loaded are those that it goes on from") {
  test::temporary_file weights, state;
  tiny_network<bfloat16> from(1, make_policy()), net(2, make_policy()), again(3, make_policy());
  trainer train(net, test::still(options.batch, options.length)), resumed(again, train.options());
  train.step(batch(0));
  save_weights(from, weights.path);
  load_weights(net, weights.path);
  auto const matrices = [](auto const& n) { return test::download(n.memory().matrices()); };
  SUBCASE("in the next step") {}
  SUBCASE("in a file that is saved before it") {
    train.save(state.path);
    resumed.load(state.path);
    resumed.step(batch(1));  // without learning, it writes its masters
    test::check_equal(matrices(again), matrices(from));
  }
  train.step(batch(1));
  test::check_equal(matrices(net), matrices(from));
}

TEST_CASE("trainer: two of one network with masters of their own go on from each other's weights") {
  tiny_network<bfloat16> net(1, make_policy());
  trainer a(net, options), b(net, test::still(options.batch, options.length));
  for (std::int64_t k = 0; k < 3; ++k) a.step(batch(k));
  auto const trained = test::download(net.memory().matrices());
  b.step(batch(3));
  test::check_equal(test::download(net.memory().matrices()), trained);
}

TEST_CASE("trainer: a file goes on in another storage type; masters, where it has them, are the weights") {
  test::temporary_file file;
  tiny_network<bfloat16> narrow(1, make_policy()), narrow_again(2, make_policy());
  tiny_network<> wide(3, make_policy());
  trainer train_narrow(narrow, options), train_narrow_again(narrow_again, options);
  trainer train_wide(wide, options);
  auto const matrices = [](auto const& n) { return test::download(n.memory().matrices()); };
  for (std::int64_t k = 0; k < 3; ++k) train_narrow.step(batch(k));
  train_narrow.save(file.path);
  train_wide.load(file.path);
  CHECK(train_wide.step_count() == 3);
  auto const masters = matrices(wide), weights = matrices(narrow);
  test::check_equal(test::rounded<bfloat16>(masters), weights);
  CHECK(masters != weights);

  train_wide.save(file.path);
  train_narrow_again.load(file.path);
  test::check_equal(matrices(narrow_again), weights);
  test::check_equal(test::download(narrow_again.memory().vectors()), test::download(wide.memory().vectors()));
  // Its masters are the file's weights, rounded: three roundings of 2^-9 lie between the two's next weights.
  auto const expected = train_narrow.step(batch(3)), actual = train_narrow_again.step(batch(3));
  CHECK(actual.loss == expected.loss);
  CHECK(actual.step == 4);
  test::check_close(matrices(narrow_again), matrices(narrow), 0x1p-7);
}

TEST_CASE("trainer: options outside their domain are named") {
  tiny_network<> net(1, make_policy());
  auto const message = [&](auto&& change) {
    training_options o = options;
    change(o);
    return test::message_of<value_error>([&] { trainer(net, o); });
  };
  CHECK(message([](auto& o) { o.batch = 0; }) == "trainer: batch: got 0, expected at least 1");
  CHECK(message([](auto& o) { o.length = 0; }) == "trainer: length: got 0, expected at least 1");
  CHECK(message([](auto& o) { o.accumulation = 0; }) == "trainer: accumulation: got 0, expected at least 1");
  CHECK(message([](auto& o) { o.learning_rate.peak = -1; }) ==
        "trainer: learning_rate.peak: got -1.000000, expected a finite number from 0");
  CHECK(message([](auto& o) { o.learning_rate.final = std::nan(""); }) ==
        "trainer: learning_rate.final: got nan, expected a finite number from 0");
  CHECK(message([](auto& o) { o.learning_rate.warmup = -1; }) ==
        "trainer: learning_rate.warmup: got -1, expected at least 0");
  CHECK(message([](auto& o) { o.learning_rate.steps = -1; }) ==
        "trainer: learning_rate.steps: got -1, expected at least 0");
  CHECK(message([](auto& o) { o.weight_decay = -0.1; }) ==
        "trainer: weight_decay: got -0.100000, expected a finite number from 0");
  CHECK(message([](auto& o) { o.beta1 = 1; }) == "trainer: beta1: got 1.000000, expected in [0, 1)");
  CHECK(message([](auto& o) { o.beta2 = -1; }) == "trainer: beta2: got -1.000000, expected in [0, 1)");
  CHECK(message([](auto& o) { o.eps = INFINITY; }) == "trainer: eps: got inf, expected a finite number from 0");
  CHECK(message([](auto& o) { o.max_norm = -1; }) ==
        "trainer: max_norm: got -1.000000, expected a finite number from 0");
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
