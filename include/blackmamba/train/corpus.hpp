#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/random.hpp>
#include <blackmamba/core/tensor.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace blackmamba {

/// Token ids of a batch, one row for each sequence, in host memory.
using token_batch = tensor<space::host, std::int32_t, dyn, dyn>;

/// The bytes of a text as token ids, 0 to 255.
inline std::vector<std::int32_t> byte_tokens(std::string_view text) {
  std::vector<std::int32_t> tokens;
  tokens.reserve(text.size());
  for (char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}

/// A weighted mixture of byte texts. The tail of every text is held out from training. Which window a training example
/// is depends on the seed and the example's number alone, so a resumed run sees the same examples.
class corpus {
 public:
  struct options {
    double held_out = 0.1;                ///< share of each text that is kept apart, at its end; in [0, 1)
    std::int64_t held_out_most = 1 << 18; ///< but at most this many bytes of each
  };

  explicit corpus(std::uint64_t seed) : seed_(seed) {}
  /// @throws value_error where an option is outside its domain
  corpus(std::uint64_t seed, options const& o) : seed_(seed), options_(o) {
    if (!(o.held_out >= 0 && o.held_out < 1))
      throw value_error("corpus: held_out: got " + std::to_string(o.held_out) + ", expected in [0, 1)");
    if (o.held_out_most < 0)
      throw value_error("corpus: held_out_most: got " + std::to_string(o.held_out_most) + ", expected at least 0");
  }

  /// @param weight share of training examples, relative to the other texts
  /// @throws value_error where the text is empty or the weight is not positive or not finite, or the sum of all is not
  void add(std::string name, std::string text, double weight = 1) {
    if (text.empty()) throw value_error("corpus: " + name + ": the text is empty, expected at least one byte");
    if (!(weight > 0))
      throw value_error("corpus: " + name + ": weight: got " + std::to_string(weight) + ", expected > 0");
    if (!std::isfinite(total_weight_ + weight))
      throw value_error("corpus: " + name + ": weight: got " + std::to_string(weight) +
                        ", expected a finite number, and so for the sum of all");
    auto const tail = std::min(static_cast<std::int64_t>(options_.held_out * static_cast<double>(text.size())),
                               options_.held_out_most);
    source s{std::move(name), std::move(text), weight, 0};
    s.training = static_cast<std::int64_t>(s.text.size()) - tail;
    total_weight_ += weight;
    sources_.push_back(std::move(s));
  }
  /// Reads a file. @throws file_error where it can't be read
  void add_file(std::string const& path, double weight = 1) {
    std::error_code failed;
    auto const size = std::filesystem::file_size(path, failed);  // fails on directories too
    std::ifstream in(path, std::ios::binary);
    std::string text(failed ? 0 : static_cast<std::size_t>(size), '\0');
    if (failed || !in || !in.read(text.data(), static_cast<std::streamsize>(text.size())))
      throw file_error(path + ": can't be read");
    add(path, std::move(text), weight);
  }

  /// Fills each row of tokens (rows, length) with a window of consecutive bytes: example first, first + 1, ...
  /// @throws value_error where a text's training part is shorter than a row
  void sample(std::uint64_t first, host_view<std::int32_t, dyn, dyn> tokens) const {
    std::int64_t const length = tokens.extent(1);
    check_length(length);
    philox const random(seed_, 0x636f72707573u);
    for (std::int64_t r = 0; r < tokens.extent(0); ++r) {
      std::uint64_t const example = first + static_cast<std::uint64_t>(r);
      double pick = static_cast<double>(random.uniform(4 * example)) * total_weight_;
      std::size_t s = 0;
      while (s + 1 < sources_.size() && pick >= sources_[s].weight) pick -= sources_[s++].weight;
      // 53 random bits scale to any text's length without a visible bias.
      double const u = (static_cast<double>(random.bits(4 * example + 1)) +
                        static_cast<double>(random.bits(4 * example + 2) >> 11) * 0x1p-21) * 0x1p-32;
      auto const span = sources_[s].training - length + 1;
      auto const at = std::min(static_cast<std::int64_t>(u * static_cast<double>(span)), span - 1);
      for (std::int64_t i = 0; i < length; ++i)
        tokens(r, i) = static_cast<unsigned char>(sources_[s].text[static_cast<std::size_t>(at + i)]);
    }
  }

  token_batch sample(std::uint64_t first, std::int64_t rows, std::int64_t length) const {
    token_batch tokens(rows, length);
    sample(first, tokens);
    return tokens;
  }

  /// Throws value_error that names the text where a training part is shorter than `length` bytes.
  void check_length(std::int64_t length) const {
    if (sources_.empty()) throw value_error("corpus: no text was added");
    for (auto const& s : sources_)
      if (s.training < length)
        throw value_error("corpus: " + s.name + ": its training part has " + std::to_string(s.training) +
                          " bytes, expected at least " + std::to_string(length) + " (one context and its next byte)");
  }

  std::int64_t texts() const { return static_cast<std::int64_t>(sources_.size()); }
  std::int64_t training_bytes() const {
    std::int64_t n = 0;
    for (auto const& s : sources_) n += s.training;
    return n;
  }
  /// The parts that training never sees, one after the other.
  std::string held_out() const {
    std::string out;
    for (auto const& s : sources_) out += s.text.substr(static_cast<std::size_t>(s.training));
    return out;
  }
  std::string const& text(std::size_t i) const { return sources_.at(i).text; }

 private:
  struct source {
    std::string name;
    std::string text;
    double weight;
    std::int64_t training;  // bytes before the held-out tail
  };
  std::uint64_t seed_;
  options options_{};
  std::vector<source> sources_;
  double total_weight_ = 0;
};

}  // namespace blackmamba
