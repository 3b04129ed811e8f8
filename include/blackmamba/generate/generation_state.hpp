#pragma once
#include <blackmamba/core/memory.hpp>
#include <blackmamba/core/tensor.hpp>
#include <blackmamba/model/checkpoint.hpp>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace blackmamba {

/// Everything that a batch of sequences carries from token to token: the states of all layers in one run of memory. Its
/// size is constant in the length of the text (but for attention layers, whose caches hold `capacity` tokens). It can
/// be copied, saved and read back: the text then goes on from there, as often as one likes. What was read is in it, the
/// logits for the next token are not: take it before the last token of a text is read, and go on with that token.
template <class Network>
class generation_state {
 public:
  using P = typename Network::policy_type;
  using T = typename Network::storage_type;
  using S = typename Network::space_type;
  using arch = typename Network::arch;
  using views_type = typename arch::template state<S, T>;

  /// The state before the first token.
  /// @throws shape_error where there is no sequence, or less than no capacity
  explicit generation_state(Network const& network, std::int64_t batch = 1, std::int64_t capacity = 0)
      : policy_(network.policy()), batch_(batch), capacity_(capacity) {
    check_that(batch >= 1, "generation_state", "batch", std::to_string(batch), "at least 1");
    check_that(capacity >= 0, "generation_state", "capacity", std::to_string(capacity), "at least 0");
    memory_ = zeros<std::int64_t>(policy_, bind(views_, batch, capacity, nullptr));
    bind(views_, batch, capacity, memory_.data());
  }
  generation_state(generation_state const& other)
      : policy_(other.policy_), batch_(other.batch_), capacity_(other.capacity_), position_(other.position_) {
    memory_ = tensor<S, std::int64_t, dyn>(other.memory_.size());
    memory::copy(policy_, other.memory_.as_view(), memory_.as_view());
    bind(views_, batch_, capacity_, memory_.data());
  }
  generation_state& operator=(generation_state other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(batch_, other.batch_);
    std::swap(capacity_, other.capacity_);
    std::swap(position_, other.position_);
    std::swap(views_, other.views_);
    return *this;
  }
  generation_state(generation_state&&) noexcept = default;

  /// The values of another state of the same shape, in this one's memory: addresses stay, as recorded steps need it.
  void copy_from(generation_state const& other) {
    check_that(other.batch_ == batch_ && other.capacity_ == capacity_, "generation_state.copy_from", "other",
               std::to_string(other.batch_) + " sequences with capacity " + std::to_string(other.capacity_),
               std::to_string(batch_) + " with " + std::to_string(capacity_));
    memory::copy(policy_, other.memory_.as_view(), memory_.as_view());
    position_ = other.position_;
  }

  views_type& views() { return views_; }
  std::int64_t batch() const { return batch_; }
  std::int64_t capacity() const { return capacity_; }
  /// Tokens seen so far.
  std::int64_t position() const { return position_; }
  void advance(std::int64_t tokens) { position_ += tokens; }
  std::int64_t bytes() const { return memory_.size() * 8; }
  /// Whether its size depends on the capacity: there are attention layers.
  static bool grows() {
    views_type unbound{};
    return bind(unbound, 1, 128, nullptr) > bind(unbound, 1, 0, nullptr);
  }

  /// @throws file_error
  void save(std::string const& path) const {
    safetensors::writer file(path);
    tensor<space::host, std::int64_t, dyn> host(memory_.size());
    memory::download(policy_, memory_.as_view(), host.as_view());
    file.metadata("format", file_format);
    file.metadata("storage", type_name<T>());
    detail::write_traits<arch>(file, false);
    std::vector<std::string> const lines = layout();
    for (std::size_t i = 0; i < lines.size(); ++i) file.metadata("tensor " + std::to_string(i), lines[i]);
    file.declare<std::int64_t>("position", {1});
    file.declare<std::int64_t>("shape", {2});
    file.declare<std::int64_t>("state", {host.size()});
    std::int64_t const shape[] = {batch_, capacity_};
    file.write(&position_, 1);
    file.write(shape, 2);
    file.write(host.data(), host.size());
    file.finish();
  }
  /// On error nothing has changed. @throws file_error naming what differs, got and expected
  void load(std::string const& path) {
    safetensors::reader file(path);
    if (file.metadata("format") != file_format)
      throw file_error(path + ": a file of format '" + file.metadata("format") + "', expected '" + file_format + "'");
    if (file.metadata("storage") != type_name<T>())
      throw file_error(path + ": a state in " + file.metadata("storage") + ", expected " + type_name<T>());
    std::int64_t position = 0, shape[2] = {};
    file.read("position", &position, 1);
    file.read("shape", shape, 2);
    if (shape[0] != batch_ || shape[1] != capacity_)
      throw file_error(path + ": a state of " + std::to_string(shape[0]) + " sequences with capacity " +
                       std::to_string(shape[1]) + ", expected " + std::to_string(batch_) + " with " +
                       std::to_string(capacity_));
    check_layout(file);
    detail::check_traits<arch>(file, false);
    if (position < 0 || (grows() && position > capacity_))
      throw file_error(path + ": a state after " + std::to_string(position) + " tokens, expected 0 to " +
                       (grows() ? std::to_string(capacity_) : "any number"));
    tensor<space::host, std::int64_t, dyn> host(memory_.size());
    file.read("state", host.data(), host.size());
    memory::upload(policy_, host.as_view(), memory_.as_view());
    position_ = position;
  }

 private:
  static constexpr char const* file_format = "blackmamba state 2";

  /// Name and shape of every tensor, in order.
  std::vector<std::string> layout() const {
    std::vector<std::string> lines;
    views_type views = views_;
    arch::visit_state(views, batch_, capacity_, [&](entry const& e, auto const&) {
      lines.push_back(e.name + " " + detail::shape_text(e.extents));
    });
    return lines;
  }
  /// Compares a file's tensors with this state's; the first difference is the message.
  void check_layout(safetensors::reader const& file) const {
    std::vector<std::string> const expected = layout();
    for (std::size_t i = 0;; ++i) {
      auto const& metadata = file.header().metadata;
      auto const line = metadata.find("tensor " + std::to_string(i));
      std::string const got = line == metadata.end() ? "none" : line->second;
      std::string const wanted = i < expected.size() ? expected[i] : "none";
      if (got != wanted)
        throw file_error(file.path() + ": a state of another model: tensor " + std::to_string(i) + ": got " + got +
                         ", expected " + wanted);
      if (i >= expected.size()) return;
    }
  }
  static std::int64_t bind(views_type& views, std::int64_t batch, std::int64_t capacity, std::int64_t* base) {
    std::int64_t words = 0;
    arch::visit_state(views, batch, capacity, [&](entry const& e, auto& v) { detail::bind_view(v, e, base, words); });
    return words;
  }

  P policy_;
  tensor<S, std::int64_t, dyn> memory_;
  std::int64_t batch_;
  std::int64_t capacity_;
  std::int64_t position_ = 0;
  views_type views_{};
};

}  // namespace blackmamba
