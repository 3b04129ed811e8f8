#include "support/models.hpp"

using namespace blackmamba;

namespace {
std::string shape_line(entry const& e) {
  std::string line = e.name;
  for (auto n : e.extents) line += " " + std::to_string(n);
  return line;
}
}  // namespace

TEST_CASE("language model: the published models have the published numbers of parameters") {
  auto const small = count_parameters<blackmamba_model<blackmamba_340m_1_5b>>();
  CHECK(small.total == 1458462072);
  CHECK(small.active == 343694712);
  CHECK(small.tensors == 438);
  CHECK(small.layers == 30);
  auto const large = count_parameters<blackmamba_model<blackmamba_630m_2_8b, geglu>>();
  CHECK(large.total == 2783213584);
  CHECK(large.active == 628770832);
  CHECK(large.tensors == 525);
  CHECK(large.layers == 36);
}

TEST_CASE("language model: tensors have the published names and shapes") {
  std::vector<std::string> lines;
  parameter_memory<test::tiny_blackmamba, space::host, float> const memory(device::cpu{});
  network<test::tiny_blackmamba, device::cpu>::each_tensor_of(memory, [&](entry const& e, auto const&) {
    if (e.what == kind::matrix || e.what == kind::vector) lines.push_back(shape_line(e));
  });
  std::vector<std::string> const expected = {
      "embedding.word_embeddings.weight 11 8",
      "decoder.layers.0.norm.weight 8",
      "decoder.layers.0.mixer.in_proj.weight 32 8",
      "decoder.layers.0.mixer.conv1d.weight 16 4",
      "decoder.layers.0.mixer.conv1d.bias 16",
      "decoder.layers.0.mixer.x_proj.weight 7 16",
      "decoder.layers.0.mixer.dt_proj.weight 16 1",
      "decoder.layers.0.mixer.dt_proj.bias 16",
      "decoder.layers.0.mixer.A_log 16 3",
      "decoder.layers.0.mixer.D 16",
      "decoder.layers.0.mixer.out_proj.weight 8 16",
      "decoder.layers.1.norm.weight 8",
      "decoder.layers.1.mixer.router.weight 3 8",
      "decoder.layers.1.mixer.router.bias 3",
      "decoder.layers.1.mixer.local_experts.0.linear_fc1.weight 24 8",
      "decoder.layers.1.mixer.local_experts.1.linear_fc1.weight 24 8",
      "decoder.layers.1.mixer.local_experts.2.linear_fc1.weight 24 8",
      "decoder.layers.1.mixer.local_experts.0.linear_fc2.weight 8 12",
      "decoder.layers.1.mixer.local_experts.1.linear_fc2.weight 8 12",
      "decoder.layers.1.mixer.local_experts.2.linear_fc2.weight 8 12",
      "decoder.layers.2.norm.weight 8"};
  REQUIRE(lines.size() > expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) CHECK(lines[i] == expected[i]);
  CHECK(lines[lines.size() - 2] == "decoder.final_layernorm.weight 8");
  CHECK(lines.back() == "decoder.final_layernorm.bias 8");
}

// Without balance: a balance rule moves the router's choice, which has no gradient, with the weights.
TEST_CASE_TEMPLATE("language model: every gradient equals central differences", Arch, test::tiny_unbalanced,
                   test::tiny_geglu, test::tiny_mamba, test::tiny_transformer, test::tiny_transformer_moe,
                   test::tiny_parallel, test::tiny_dropping) {
  network<Arch, test_policy, double> net(3, make_policy());
  trainer train(net, test::still(2, 5));
  auto const tokens = test::random_tokens(2, 6, Arch::vocab, 5);

  // Larger weights than the initial ones, so that every path carries a gradient that can be seen.
  auto weights = test::weights_of(net);
  auto const noise = test::random_normal(static_cast<std::int64_t>(weights.size()), 17, 0.25);
  for (std::size_t i = 0; i < weights.size(); ++i)
    if (weights[i] != 0) weights[i] += noise[i];
  test::set_weights(net, weights);
  train.step(tokens);
  auto const gradient = test::download(train.gradient().flat());

  auto const loss_at = [&](std::size_t i, double offset) {
    auto moved = weights;
    moved[i] += offset;
    test::set_weights(net, moved);
    return train.step(tokens).loss;
  };
  // Some coordinates of every tensor; under tools of some tensors.
  int const one_in = test::trials_percent() < 10 ? 40 : 1;
  int tensors = 0;
  std::int64_t first = 0;
  double const step = 1e-4;
  net.memory().visit([&](entry const& e, auto const& x) {
    if (e.what != kind::matrix && e.what != kind::vector) return;
    first = static_cast<std::int64_t>(
        reinterpret_cast<double const*>(x.data()) - reinterpret_cast<double const*>(net.memory().flat().data()));
    double scale = 0;
    for (std::int64_t i = 0; i < x.size(); ++i)
      scale = std::max(scale, std::abs(gradient[static_cast<std::size_t>(first + i)]));
    CHECK_MESSAGE(scale > 0, e.name);
    if (tensors++ % one_in != 0) return;
    auto const samples = static_cast<std::int64_t>(test::trials(5));
    for (std::int64_t sample = 0; sample < samples; ++sample) {
      auto const i = static_cast<std::size_t>(
          first + test::random_integer(23, static_cast<std::uint64_t>(first + sample), 0, x.size() - 1));
      double const numeric =
          (8 * (loss_at(i, step) - loss_at(i, -step)) - (loss_at(i, 2 * step) - loss_at(i, -2 * step))) / (12 * step);
      CHECK_MESSAGE(std::abs(gradient[i] - numeric) <= 1e-7 * std::max(scale, 1e-3),
                    e.name << " element " << i - static_cast<std::size_t>(first) << ": got " << gradient[i]
                           << ", expected " << numeric);
    }
  });
}

TEST_CASE_TEMPLATE("language model: reading at once, in pieces and token by token agree", Arch, test::tiny_blackmamba,
                   test::tiny_geglu, test::tiny_mamba, test::tiny_transformer, test::tiny_transformer_moe,
                   test::tiny_parallel) {
  network<Arch, test_policy, double> net(3, make_policy());
  for (std::int64_t length : {1, 2, 3, 17}) {
    auto const tokens = test::random_tokens(2, length, Arch::vocab, 6);
    generator whole(net, {.batch = 2, .capacity = 32});
    generator pieces(net, {.batch = 2, .capacity = 32, .prefill_chunk = 5});
    generator single(net, {.batch = 2, .capacity = 32});
    whole.prefill(tokens);
    pieces.prefill(tokens);
    for (std::int64_t i = 0; i < length; ++i) {
      std::int32_t const pair[] = {tokens(0, i), tokens(1, i)};
      single.step(pair);
    }
    CHECK(whole.position() == length);
    test::check_close(test::logits_of(pieces), test::logits_of(whole), 1e-12, "in pieces");
    test::check_close(test::logits_of(single), test::logits_of(whole), 1e-12, "token by token");
  }
}

TEST_CASE_TEMPLATE("language model: a row's logits do not depend on its neighbours", Arch, test::tiny_blackmamba,
                   test::tiny_transformer_moe) {
  network<Arch, test_policy, double> net(3, make_policy());
  auto const tokens = test::random_tokens(3, 9, Arch::vocab, 6);
  generator together(net, {.batch = 3, .capacity = 32});
  together.prefill(tokens);
  auto const all = test::logits_of(together);
  for (std::int64_t b = 0; b < 3; ++b) {
    generator alone(net, {.capacity = 32});
    alone.prefill(std::span<std::int32_t const>(&tokens(b, 0), 9));
    auto const first = all.begin() + static_cast<std::ptrdiff_t>(b * Arch::vocab);
    test::check_close(test::logits_of(alone), test::values(first, first + Arch::vocab), 1e-12);
  }
}

TEST_CASE("language model: packed sequences give what they give one by one") {
  using arch = test::tiny_blackmamba;
  network<arch, test_policy, double> net(3, make_policy());
  std::vector<std::int64_t> const cu = {0, 4, 5, 5, 12};
  auto const tokens = test::random_tokens(1, 12, arch::vocab, 6);
  arena<test::test_space> workspace(std::size_t{1} << 22);
  test_policy policy = make_policy();
  policy.workspace = &workspace;
  auto const run = [&](std::int64_t first, std::int64_t length, bool packed) {
    test::values v, offsets;
    for (std::int64_t i = 0; i < length; ++i) v.push_back(tokens(0, first + i));
    for (auto n : cu) offsets.push_back(static_cast<double>(n));
    auto const token = test::upload<std::int32_t>(v, length);
    auto const cu_seqlens = test::upload<std::int64_t>(offsets, static_cast<std::int64_t>(cu.size()));
    auto logits = test::poisoned<double>(length, std::int64_t{arch::vocab});
    context<test_policy> c{.policy = policy, .length = length};
    if (packed) c.cu_seqlens = cu_seqlens;
    auto const scope = c.scope();
    typename arch::saved<test::test_space, double> keep;
    arch::forward<test_policy, double, double, test::test_space>(c, net.parameters(), token, arch::rows::all, logits,
                                                                 keep);
    return test::download(logits);
  };
  auto const together = run(0, 12, true);
  for (std::size_t s = 0; s + 1 < cu.size(); ++s) {
    if (cu[s] == cu[s + 1]) continue;
    auto const alone = run(cu[s], cu[s + 1] - cu[s], false);
    auto const first = together.begin() + static_cast<std::ptrdiff_t>(cu[s] * arch::vocab);
    test::check_close(test::values(first, first + static_cast<std::ptrdiff_t>(alone.size())), alone, 1e-12);
  }
}

TEST_CASE("language model: what a call can't do is named") {
  using arch = test::tiny_blackmamba;
  network<arch, test_policy, double> net(3, make_policy());
  arena<test::test_space> workspace(std::size_t{1} << 22);
  auto const token = test::upload<std::int32_t>({1, 2, 3}, std::int64_t{3});
  auto const cu_seqlens = test::upload<std::int64_t>({0, 1, 3}, std::int64_t{3});
  auto const call = [&](context<test_policy> c, std::int64_t tokens) {
    auto logits = test::poisoned<double>(std::int64_t{1}, std::int64_t{arch::vocab});
    typename arch::saved<test::test_space, double> keep;
    arch::forward<test_policy, double, double, test::test_space>(c, net.parameters(), token.slice(0, tokens),
                                                                 arch::rows::last, logits, keep);
  };
  test_policy policy = make_policy();
  CHECK(test::message_of<value_error>([&] { call({.policy = policy, .length = 3}, 3); }) ==
        "context: policy.workspace: got none, expected an arena, from which modules take their memory; a dry run with "
        "arena::measuring() tells its size");
  policy.workspace = &workspace;
  CHECK(test::message_of<shape_error>([&] { call({.policy = policy, .length = 3, .cu_seqlens = cu_seqlens}, 3); }) ==
        "language_model.forward: cu_seqlens: got packed sequences, expected none where logits of the last rows are "
        "wanted; ask for rows::all");
  CHECK(test::message_of<shape_error>([&] { call({.policy = policy, .length = 0}, 0); }) ==
        "language_model.forward: length: got 0, expected a token at least where logits of the last rows are wanted");
  CHECK(test::message_of<shape_error>([&] { call({.policy = policy, .length = 2}, 3); }) ==
        "language_model.forward: token: got (3), expected (2)");
}
