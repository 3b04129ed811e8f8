#pragma once
#include <blackmamba/core/recording.hpp>
#include <blackmamba/core/workspace.hpp>
#include <blackmamba/generate/generation_state.hpp>
#include <blackmamba/generate/sampler.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace blackmamba {

struct generation_options {
  std::int64_t batch = 1;          ///< sequences that advance together
  std::int64_t capacity = 0;       ///< tokens that attention layers can hold; 0 where there are none
  std::int64_t prefill_chunk = 512;  ///< prompts are read in pieces of at most this many tokens
};

/// Reads prompts and gives the next token's logits, one step per token in constant time and memory. All memory is taken
/// when the generator is built, its size found by a dry run.
template <class Network>
class generator {
 public:
  using P = typename Network::policy_type;
  using T = typename Network::storage_type;
  using A = accum_t<T>;
  using S = typename Network::space_type;
  using arch = typename Network::arch;
  using state_type = generation_state<Network>;

  /// @throws value_error where an option is outside its domain
  explicit generator(Network const& network, generation_options const& options = {})
      : network_(network),
        options_(checked(options)),
        state_(network, options.batch, options.capacity),
        token_(options.batch * options.prefill_chunk),
        logits_(zeros<A>(network.policy(), options.batch, std::int64_t{arch::vocab})),
        host_logits_(options.batch, std::int64_t{arch::vocab}),
        workspace_(measure()) {}
  /// The network must outlive its generator.
  explicit generator(Network const&& network, generation_options const& options = {}) = delete;

  /// Continues every sequence with the tokens (batch, n); logits() are then those after the last.
  /// @throws shape_error; value_error for a token outside the vocabulary, or where attention's capacity is exceeded
  void prefill(host_view<std::int32_t const, dyn, dyn> tokens) {
    check_shape("generator.prefill", "tokens", tokens, {options_.batch, -1});
    std::int64_t const n = tokens.extent(1);
    check_that(n > 0, "generator.prefill", "tokens", "an empty prompt", "at least one token");
    check_tokens(tokens);
    check_capacity(n);
    for (std::int64_t at = 0; at < n; at += options_.prefill_chunk) {
      std::int64_t const length = std::min(options_.prefill_chunk, n - at);
      stage(tokens, at, length);
      context<P> const c{.policy = device(), .batch = options_.batch, .length = length};
      read<P>(c, length);
      state_.advance(length);
    }
    fetch();
  }
  void prefill(std::span<std::int32_t const> tokens) {
    prefill(host_view<std::int32_t const, dyn, dyn>(tokens.data(), std::int64_t{1},
                                                    static_cast<std::int64_t>(tokens.size())));
  }
  /// Whether step() is one replay of a recorded graph by now; on cuda, from the second step on.
  bool recorded() const { return recorded_.recorded(); }
  /// One token for each sequence.
  void step(std::span<std::int32_t const> tokens) {
    host_view<std::int32_t const, dyn, dyn> const one(tokens.data(), static_cast<std::int64_t>(tokens.size()), 1);
    check_shape("generator.step", "tokens", one, {options_.batch, 1});
    check_tokens(one);
    check_capacity(1);
    stage(one, 0, 1);
    recorded_.run(device(), [this](P const& policy) {
      advance<P>({.policy = policy, .batch = options_.batch});
    });
    state_.advance(1);
    fetch();
  }

  /// Whether logits() are those of the present state: after a token was read, until a state is restored.
  bool has_logits() const { return has_logits_; }
  /// Logits of the next token of sequence b, on the host.
  /// @throws value_error where there are none, or no such sequence
  std::span<float const> logits(std::int64_t b = 0) const {
    check_logits();
    if (b < 0 || b >= options_.batch)
      throw value_error("generator.logits: sequence: got " + std::to_string(b) + ", expected 0 to " +
                        std::to_string(options_.batch - 1));
    return {narrowed_.data() + b * arch::vocab, static_cast<std::size_t>(arch::vocab)};
  }
  /// Logits (batch, vocab) in the accumulation type, on the host.
  /// @throws value_error where there are none
  host_view<A const, dyn, dyn> logits_view() const {
    check_logits();
    return host_logits_;
  }

  /// The states of all layers: copy it to fork a text, restore() one to go back.
  state_type const& state() const { return state_; }
  void restore(state_type const& state) {
    check_that(state.batch() == options_.batch && state.capacity() == options_.capacity, "generator.restore", "state",
               std::to_string(state.batch()) + " sequences with capacity " + std::to_string(state.capacity()),
               std::to_string(options_.batch) + " with " + std::to_string(options_.capacity));
    state_.copy_from(state);
    has_logits_ = false;
  }
  std::int64_t position() const { return state_.position(); }
  /// Whether the state grows with the text, as attention's does, up to the capacity.
  bool grows() const { return grows_; }
  /// Tokens that can be read yet: what attention's capacity leaves; without attention layers any number.
  std::int64_t room() const {
    return grows_ ? options_.capacity - state_.position() : std::numeric_limits<std::int64_t>::max();
  }
  std::size_t workspace_bytes() const { return workspace_.capacity(); }
  Network const& network() const { return network_; }

 private:
  static generation_options const& checked(generation_options const& options) {
    auto const check = [](char const* name, std::int64_t got, std::int64_t least) {
      if (got < least)
        throw value_error("generator: " + std::string(name) + ": got " + std::to_string(got) + ", expected at least " +
                          std::to_string(least));
    };
    check("batch", options.batch, 1);
    check("capacity", options.capacity, 0);
    check("prefill_chunk", options.prefill_chunk, 1);
    return options;
  }
  P device() {
    P policy = network_.policy();
    policy.workspace = &workspace_;
    return policy;
  }
  template <device_policy Q>
  void read(context<Q> const& c, std::int64_t length) {
    auto const scope = c.scope();
    typename arch::template saved<S, T> keep;
    arch::template forward<Q, T, A, S>(c, network_.parameters(), token_.slice(0, c.batch * length), arch::rows::last,
                                       logits_, keep, &state_.views());
  }
  template <device_policy Q>
  void advance(context<Q> const& c) {
    arch::template step<Q, T, A, S>(c, network_.parameters(), token_.slice(0, c.batch), logits_, state_.views());
  }
  arena<S> measure() {
    using dry = device::dry<P>;
    auto measuring = arena<S>::measuring();
    context<dry> c{.policy = {.workspace = &measuring}, .batch = options_.batch, .length = options_.prefill_chunk};
    read<dry>(c, options_.prefill_chunk);
    c.length = 1;
    advance<dry>(c);
    return arena<S>(measuring.peak());
  }

  void check_logits() const {
    if (!has_logits_)
      throw value_error("generator.logits: got none since the generator was built or its state restored, expected "
                        "prefill or step first");
  }
  void check_tokens(host_view<std::int32_t const, dyn, dyn> tokens) const {
    for (std::int64_t b = 0; b < tokens.extent(0); ++b)
      for (std::int64_t i = 0; i < tokens.extent(1); ++i)
        if (tokens(b, i) < 0 || tokens(b, i) >= arch::vocab)
          throw value_error("generator: token " + std::to_string(i) + " of sequence " + std::to_string(b) + ": got " +
                            std::to_string(tokens(b, i)) + ", expected 0 to " + std::to_string(arch::vocab - 1));
  }
  /// Attention layers hold `capacity` tokens; on a device only the host knows how many are there.
  void check_capacity(std::int64_t more) const {
    if (more > room())
      throw value_error("generator: capacity: got " + std::to_string(state_.position()) + " tokens and " +
                        std::to_string(more) + " more, expected at most " + std::to_string(options_.capacity) +
                        "; a model with attention holds as many tokens as generation_options::capacity says");
  }
  void stage(host_view<std::int32_t const, dyn, dyn> tokens, std::int64_t first, std::int64_t length) {
    tensor<space::host, std::int32_t, dyn> host(options_.batch * length);
    for (std::int64_t b = 0; b < options_.batch; ++b)
      for (std::int64_t i = 0; i < length; ++i) host(b * length + i) = tokens(b, first + i);
    memory::upload(network_.policy(), host.as_view(), token_.slice(0, options_.batch * length));
  }
  void fetch() {
    has_logits_ = true;
    memory::download(network_.policy(), logits_.as_view(), host_logits_.as_view());
    narrowed_.resize(static_cast<std::size_t>(host_logits_.size()));
    for (std::size_t i = 0; i < narrowed_.size(); ++i) narrowed_[i] = static_cast<float>(host_logits_.data()[i]);
  }

  Network const& network_;
  generation_options options_;
  state_type state_;
  tensor<S, std::int32_t, dyn> token_;
  tensor<S, A, dyn, dyn> logits_;
  tensor<space::host, A, dyn, dyn> host_logits_;
  std::vector<float> narrowed_;
  arena<S> workspace_;
  recording<P> recorded_;  // the decoding step
  bool grows_ = state_type::grows();
  bool has_logits_ = false;
};

/// Continues a prompt by `count` tokens. Calls emit(token) for each as it is made; emit returning false ends the text.
///
/// The state has seen every token that was made, the last one too (attention's capacity must hold them all): an empty
/// prompt goes on from there, and the text is the same in one call or in several. The draw for a token depends on the
/// seed and on the token's position in the text.
/// @return the new tokens
/// @throws value_error before anything is read, where the generator has several sequences, where the prompt is empty
/// and there are no logits to go on from, and where attention's capacity does not hold the prompt and count more tokens
template <class Network, class Emit>
std::vector<std::int32_t> generate(generator<Network>& from, std::span<std::int32_t const> prompt, std::int64_t count,
                                   sampling_options const& options, Emit&& emit) {
  sampler choose(options);
  if (from.state().batch() != 1)
    throw value_error("generate: generator: got " + std::to_string(from.state().batch()) +
                      " sequences, expected one; several advance by prefill and step");
  if (count < 0) throw value_error("generate: count: got " + std::to_string(count) + ", expected at least 0");
  if (prompt.empty() && !from.has_logits())
    throw value_error("generate: prompt: got no token, expected one at least where nothing was read since the "
                      "generator was built or its state restored; a state goes on with a token that it has not read");
  auto const read = static_cast<std::int64_t>(prompt.size());
  if (from.grows() && (read > from.room() || count > from.room() - read))
    throw value_error("generate: capacity: got " + std::to_string(from.position()) + " tokens, a prompt of " +
                      std::to_string(read) + " and " + std::to_string(count) + " to be made, expected at most " +
                      std::to_string(from.state().capacity()) +
                      " in all; a model with attention holds as many tokens as generation_options::capacity says");
  std::vector<std::int32_t> made;
  if (!prompt.empty()) from.prefill(prompt);
  for (bool more = true; more && static_cast<std::int64_t>(made.size()) < count;) {
    std::int32_t const next = choose(from.logits(), static_cast<std::uint64_t>(from.position()));
    made.push_back(next);
    more = emit(next);
    from.step(std::span<std::int32_t const>(&next, 1));
  }
  return made;
}
template <class Network>
std::vector<std::int32_t> generate(generator<Network>& from, std::span<std::int32_t const> prompt, std::int64_t count,
                                   sampling_options const& options = {}) {
  return generate(from, prompt, count, options, [](std::int32_t) { return true; });
}
/// A text is no prompt yet.
template <class Network, class Text, class... Rest>
  requires std::is_convertible_v<Text const&, std::string_view>
void generate(generator<Network>&, Text const&, Rest&&...) {
  static_assert(!std::is_convertible_v<Text const&, std::string_view>,
                "blackmamba: generate: the prompt is a text, and a model reads tokens; write byte_tokens(text)");
}

}  // namespace blackmamba
