#include "support/files.hpp"
#include "support/models.hpp"

using namespace blackmamba;

namespace {
using net_type = network<test::tiny_blackmamba, test_policy>;
struct fewer_taps : test::tiny {
  static constexpr int d_conv = 3;
};
struct deeper : test::tiny {
  static constexpr int layers = 6;
};
std::vector<std::int32_t> const prompt = {1, 2, 3, 4, 5};
}  // namespace

TEST_CASE("generator: a state is a fork: two continuations of it agree") {
  net_type net(1, make_policy());
  generator from(net);
  from.prefill(prompt);
  auto const fork = from.state();
  std::int32_t const next = 7;
  from.step({&next, 1});
  auto const once = test::logits_of(from);
  from.step({&next, 1});
  from.restore(fork);
  CHECK(from.position() == 5);
  from.step({&next, 1});
  test::check_equal(test::logits_of(from), once);
}

TEST_CASE("generator: a state that is saved and loaded goes on bit for bit") {
  test::temporary_file const place;
  std::string const& path = place.path;
  net_type net(1, make_policy());
  generator from(net), again(net);
  from.prefill(prompt);
  from.state().save(path);
  auto loaded = again.state();
  loaded.load(path);
  again.restore(loaded);
  std::int32_t const next = 7;
  from.step({&next, 1});
  again.step({&next, 1});
  test::check_equal(test::logits_of(again), test::logits_of(from));
  CHECK(again.position() == 6);

  generator two(net, {.batch = 2});
  auto other = two.state();
  CHECK(test::message_of<file_error>([&] { other.load(path); }) ==
        path + ": a state of 1 sequences with capacity 0, expected 2 with 0");
  network<test::tiny_blackmamba, test_policy, double> wide(1, make_policy());
  generator in_double(wide);
  auto third = in_double.state();
  CHECK(test::message_of<file_error>([&] { third.load(path); }) == path + ": a state in float32, expected float64");
}

TEST_CASE("generator: a file with another state in it is turned away, and the state stays") {
  test::temporary_file const file;
  auto const& path = file.path;
  net_type net(1, make_policy());
  generator from(net);
  from.prefill(prompt);
  from.state().save(path);

  // Fewer taps: a tensor takes a multiple of 128 words, so the sizes do not tell.
  network<blackmamba_model<fewer_taps>, test_policy> other(1, make_policy());
  generation_state in_other(other);
  CHECK(test::message_of<file_error>([&] { in_other.load(path); }) ==
        path + ": a state of another model: tensor 0: got conv (1, 3, 16), expected conv (1, 2, 16)");
  CHECK(in_other.position() == 0);
  network<blackmamba_model<deeper>, test_policy> deep(1, make_policy());
  generation_state in_deep(deep);
  CHECK(test::message_of<file_error>([&] { in_deep.load(path); }) ==
        path + ": a state of another model: tensor 4: got none, expected conv (1, 3, 16)");
  in_deep.save(path);
  auto kept = from.state();
  CHECK(test::message_of<file_error>([&] { kept.load(path); }) ==
        path + ": a state of another model: tensor 4: got conv (1, 3, 16), expected none");
  CHECK(kept.position() == 5);

  kept.save(path);
  test::change_header(path, [](std::string& header) { test::replace_after(header, "format", "state 2", "state 9"); });
  CHECK(test::message_of<file_error>([&] { kept.load(path); }) ==
        path + ": a file of format 'blackmamba state 9', expected 'blackmamba state 2'");

  network<blackmamba_model<test::tiny, geglu>, test_policy> of_geglu(1, make_policy());
  generation_state in_geglu(of_geglu);
  kept.save(path);
  CHECK(test::message_of<file_error>([&] { in_geglu.load(path); }) ==
        path + ": of another architecture: decoder.layers.1.mixer.activation: got silu, expected gelu");

  auto advanced = from.state();
  advanced.advance(-6);
  advanced.save(path);
  CHECK(test::message_of<file_error>([&] { kept.load(path); }) ==
        path + ": a state after -1 tokens, expected 0 to any number");
  network<test::tiny_transformer, test_policy> attentive(1, make_policy());
  generation_state full(attentive, 1, 4);
  full.advance(5);
  full.save(path);
  generation_state again(attentive, 1, 4);
  CHECK(test::message_of<file_error>([&] { again.load(path); }) == path + ": a state after 5 tokens, expected 0 to 4");
  CHECK(again.position() == 0);
}

TEST_CASE("generator: the state's size does not depend on the text's length") {
  net_type net(1, make_policy());
  generator from(net);
  auto const bytes = from.state().bytes();
  std::int32_t const next = 7;
  for (std::uint64_t i = 0; i < test::trials(100); ++i) from.step({&next, 1});
  CHECK(from.state().bytes() == bytes);
  CHECK(bytes >= 2 * (3 * 16 + 16 * 3) * 4);  // two mamba layers: 3 steps of 16 channels, 16 channels of 3 states
}

TEST_CASE("generate: streams what it returns, repeats with its seed, stops when told") {
  net_type net(1, make_policy());
  generator from(net);
  auto const fresh = from.state();
  std::vector<std::int32_t> streamed;
  auto const made = generate(from, prompt, 20, {.temperature = 2, .seed = 5}, [&](std::int32_t t) {
    streamed.push_back(t);
    return true;
  });
  CHECK(made.size() == 20);
  CHECK(streamed == made);
  from.restore(fresh);
  CHECK(generate(from, prompt, 20, {.temperature = 2, .seed = 5}) == made);
  from.restore(fresh);
  CHECK(generate(from, prompt, 20, {.temperature = 2, .seed = 6}, [](std::int32_t) { return true; }) != made);
  from.restore(fresh);
  int count = 0;
  CHECK(generate(from, prompt, 20, {.temperature = 2, .seed = 5}, [&](std::int32_t) { return ++count < 3; }).size() ==
        3);
  from.restore(fresh);
  CHECK(generate(from, prompt, 0, {}, [](std::int32_t) { return true; }).empty());
}

TEST_CASE("generate: a model without attention goes on for as long as it is asked") {
  net_type net(1, make_policy());
  generator from(net);
  CHECK(!from.grows());
  constexpr auto without_end = std::numeric_limits<std::int64_t>::max();
  for (std::size_t const n : {3u, 4u}) {
    std::size_t count = 0;
    CHECK(generate(from, prompt, without_end, {}, [&](std::int32_t) { return ++count < n; }).size() == n);
  }
  network<test::tiny_transformer, test_policy> attentive(1, make_policy());
  generator bounded(attentive, {.capacity = 25});
  CHECK(bounded.grows());
  CHECK(test::message_of<value_error>([&] { generate(bounded, prompt, without_end); })
            .starts_with("generate: capacity: got 0 tokens, a prompt of 5 and 9223372036854775807 to be made"));
}

TEST_CASE("generate: a text in several calls is the text in one") {
  net_type net(1, make_policy());
  network<test::tiny_transformer, test_policy> attentive(1, make_policy());
  auto const check = [](auto const& of) {
    sampling_options const how{.temperature = 2, .seed = 5};
    generator one(of, {.capacity = 25}), several(of, {.capacity = 25});
    auto const whole = generate(one, prompt, 20, how);
    auto made = generate(several, prompt, 1, how);
    CHECK(several.position() == 6);
    // As many times as asked for, without a token in between.
    for (int const more : {0, 7, 12})
      for (auto const token : generate(several, {}, more, how)) made.push_back(token);
    CHECK(made == whole);
    CHECK(one.position() == 25);
    test::check_equal(test::logits_of(several), test::logits_of(one));
  };
  check(net);
  check(attentive);

  // A text that was told to stop has seen its last token too.
  generator stopped(net), whole(net);
  auto made = generate(stopped, prompt, 9, {.seed = 2}, [](std::int32_t) { return false; });
  CHECK(made.size() == 1);
  for (auto const token : generate(stopped, {}, 8, {.seed = 2})) made.push_back(token);
  CHECK(made == generate(whole, prompt, 9, {.seed = 2}));
}

TEST_CASE("generate: without logits to go on from it wants a prompt") {
  net_type net(1, make_policy());
  generator from(net);
  std::string const expected =
      "generate: prompt: got no token, expected one at least where nothing was read since the "
      "generator was built or its state restored; a state goes on with a token that it has not read";
  CHECK(test::message_of<value_error>([&] { generate(from, {}, 1); }) == expected);
  from.prefill(prompt);
  auto const fork = from.state();
  CHECK(generate(from, {}, 1).size() == 1);
  from.restore(fork);
  CHECK(test::message_of<value_error>([&] { generate(from, {}, 1); }) == expected);
  CHECK(test::message_of<value_error>([&] { generate(from, prompt, -1); }) ==
        "generate: count: got -1, expected at least 0");
}

TEST_CASE("generator: logits that are not there are named") {
  net_type net(1, make_policy());
  generator from(net, {.batch = 2});
  std::string const none =
      "generator.logits: got none since the generator was built or its state restored, expected prefill or step first";
  CHECK(test::message_of<value_error>([&] { (void)from.logits(); }) == none);
  CHECK(test::message_of<value_error>([&] { (void)from.logits_view(); }) == none);
  from.step(std::vector<std::int32_t>{1, 2});
  CHECK(from.logits(1).size() == 11);
  for (std::int64_t b : {-1, 2})
    CHECK(test::message_of<value_error>([&] { (void)from.logits(b); }) ==
          "generator.logits: sequence: got " + std::to_string(b) + ", expected 0 to 1");
  from.restore(generation_state(net, 2));
  CHECK(test::message_of<value_error>([&] { (void)from.logits(); }) == none);
  CHECK(test::message_of<value_error>([&] { generate(from, prompt, 1); }) ==
        "generate: generator: got 2 sequences, expected one; several advance by prefill and step");
  static_assert(!std::is_constructible_v<generator<net_type>, net_type>);
}

TEST_CASE("generate: a text that attention's cache can't hold is turned away before anything is read") {
  network<test::tiny_transformer, test_policy> attentive(1, make_policy());
  generator from(attentive, {.capacity = 24});
  auto const message = [&](std::span<std::int32_t const> with, std::int64_t count) {
    int made = 0;
    auto const text =
        test::message_of<value_error>([&] { generate(from, with, count, {}, [&](int) { return ++made > 0; }); });
    CHECK(made == 0);
    return text;
  };
  std::string const rest =
      ", expected at most 24 in all; a model with attention holds as many tokens as generation_options::capacity says";
  CHECK(message(prompt, 20) == "generate: capacity: got 0 tokens, a prompt of 5 and 20 to be made" + rest);
  CHECK(message(std::vector<std::int32_t>(25), 0) ==
        "generate: capacity: got 0 tokens, a prompt of 25 and 0 to be made" + rest);
  CHECK(message(prompt, std::numeric_limits<std::int64_t>::max()).ends_with(rest));
  CHECK(from.position() == 0);
  CHECK(generate(from, prompt, 9).size() == 9);
  CHECK(from.room() == 10);
  CHECK(message({}, 11) == "generate: capacity: got 14 tokens, a prompt of 0 and 11 to be made" + rest);
  CHECK(generate(from, {}, 10).size() == 10);
  CHECK(from.room() == 0);
}

TEST_CASE("generator: options outside their domain are named") {
  net_type net(1, make_policy());
  auto const message = [&](generation_options const& options) {
    return test::message_of<value_error>([&] { generator from(net, options); });
  };
  CHECK(message({.prefill_chunk = 0}) == "generator: prefill_chunk: got 0, expected at least 1");
  CHECK(message({.batch = 0}) == "generator: batch: got 0, expected at least 1");
  CHECK(message({.capacity = -1}) == "generator: capacity: got -1, expected at least 0");
}

TEST_CASE("generator: greedy text is that of the whole forward pass, token by token") {
  net_type net(1, make_policy());
  generator from(net);
  auto text = prompt;
  for (auto t : generate(from, prompt, 12, {.temperature = 0}, [](std::int32_t) { return true; })) text.push_back(t);
  for (std::size_t n = prompt.size(); n < text.size(); ++n) {
    generator whole(net);
    whole.prefill(std::span(text).first(n));
    sampler greedy({.temperature = 0});
    CHECK(greedy(whole.logits(), 0) == text[n]);
  }
}

TEST_CASE("generator: bad tokens, prompts and a full cache are named") {
  net_type net(1, make_policy());
  generator from(net);
  std::vector<std::int32_t> const bad = {1, 11}, none;
  CHECK(test::message_of<value_error>([&] { from.prefill(bad); }) ==
        "generator: token 1 of sequence 0: got 11, expected 0 to 10");
  CHECK(test::message_of<shape_error>([&] { from.prefill(none); }) ==
        "generator.prefill: tokens: got an empty prompt, expected at least one token");
  CHECK(test::message_of<shape_error>([&] { from.step(bad); }) ==
        "generator.step: tokens: got (2, 1), expected (1, 1)");
  CHECK(from.position() == 0);

  network<test::tiny_transformer, test_policy> attentive(1, make_policy());
  generator full(attentive, {.capacity = 4});
  CHECK(test::message_of<value_error>([&] { full.prefill(prompt); })
            .ends_with("more, expected at most 4; a model with attention holds as many tokens as "
                       "generation_options::capacity says"));
}
