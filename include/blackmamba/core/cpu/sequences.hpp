#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/view.hpp>

#include <algorithm>
#include <cstdint>
#include <string>

namespace blackmamba::cpu {

/// The sequences of a (B, L, …) tensor: its B rows, or with cu_seqlens (S + 1) the S pieces of its one row; cut into
/// blocks of a fixed number of steps.
///
/// Blocks are counted from each sequence's own beginning, so that what is computed of a sequence does not depend on its
/// neighbours. They are numbered in order, with gaps where packed sequences end early: a number is found from the
/// offsets alone, without a table.
class sequences {
 public:
  struct sequence {
    std::int64_t index;   ///< row of the states
    std::int64_t batch;   ///< row of the tensor
    std::int64_t first;   ///< its first step in that row
    std::int64_t length;  ///< steps
  };
  struct block {
    sequence of;
    std::int64_t number;  ///< below blocks(); its predecessor in the same sequence is number - 1
    std::int64_t begin, end;
    bool first() const { return begin == 0; }
    bool last() const { return end == of.length; }
  };

  /// Throws value_error where cu_seqlens does not rise from 0 to the length.
  sequences(char const* op, std::int64_t batch, std::int64_t length, host_view<std::int64_t const, dyn> cu_seqlens,
            std::int64_t block_length)
      : batch_(batch), length_(length), cu_seqlens_(cu_seqlens), block_(block_length), longest_(length) {
    if (!cu_seqlens.present()) return;
    longest_ = 0;
    std::int64_t const last = cu_seqlens.extent(0) - 1;
    check(op, cu_seqlens(0) == 0, 0);
    for (std::int64_t s = 0; s < last; ++s) {
      check(op, cu_seqlens(s + 1) >= cu_seqlens(s), s + 1);
      longest_ = std::max(longest_, cu_seqlens(s + 1) - cu_seqlens(s));
    }
    check(op, cu_seqlens(last) == length, last);
  }

  /// Block numbers that (B, L) or S packed sequences take. An empty sequence has one empty block.
  static constexpr std::int64_t block_count(std::int64_t batch, std::int64_t length, std::int64_t packed,
                                            std::int64_t block_length) {
    return packed > 0 ? length / block_length + packed : batch * blocks_of(length, block_length);
  }

  std::int64_t count() const { return packed() ? cu_seqlens_.extent(0) - 1 : batch_; }
  std::int64_t longest() const { return longest_; }
  std::int64_t steps() const { return packed() ? length_ : batch_ * length_; }
  std::int64_t blocks() const {
    return packed() ? length_ / block_ + count() : batch_ * blocks_of(length_, block_);
  }

  sequence operator[](std::int64_t s) const {
    if (!packed()) return {s, s, 0, length_};
    return {s, 0, cu_seqlens_(s), cu_seqlens_(s + 1) - cu_seqlens_(s)};
  }
  /// Number of the first block of sequence s.
  std::int64_t first_block(std::int64_t s) const {
    return packed() ? cu_seqlens_(s) / block_ + s : s * blocks_of(length_, block_);
  }
  /// Calls body(block) for the blocks of one sequence in order.
  template <class Body>
  void blocks_of_sequence(std::int64_t s, Body&& body) const {
    sequence const q = (*this)[s];
    std::int64_t const count = blocks_of(q.length, block_), number = first_block(s);
    for (std::int64_t k = 0; k < count; ++k)
      body(block{q, number + k, k * block_, std::min(q.length, (k + 1) * block_)});
  }
  /// Calls body(block) for the blocks with numbers in [begin, end) in order.
  template <class Body>
  void blocks_in(std::int64_t begin, std::int64_t end, Body&& body) const {
    for (std::int64_t s = owner(begin); begin < end && s < count(); ++s) {
      sequence const q = (*this)[s];
      std::int64_t const number = first_block(s), stop = std::min(end, number + blocks_of(q.length, block_));
      for (; begin < stop; ++begin) {
        std::int64_t const k = begin - number;
        body(block{q, begin, k * block_, std::min(q.length, (k + 1) * block_)});
      }
      if (s + 1 < count()) begin = std::max(begin, first_block(s + 1));
    }
  }

 private:
  static constexpr std::int64_t blocks_of(std::int64_t length, std::int64_t block) {
    return std::max<std::int64_t>(1, (length + block - 1) / block);
  }
  bool packed() const { return cu_seqlens_.present(); }
  /// The last sequence whose first block's number is at most n.
  std::int64_t owner(std::int64_t n) const {
    if (!packed()) return n / blocks_of(length_, block_);
    std::int64_t low = 0, high = count();
    while (low + 1 < high) {
      std::int64_t const middle = (low + high) / 2;
      (first_block(middle) <= n ? low : high) = middle;
    }
    return low;
  }
  void check(char const* op, bool good, std::int64_t i) const {
    if (!good)
      throw value_error(std::string(op) + ": cu_seqlens: got " + std::to_string(cu_seqlens_(i)) + " at index " +
                        std::to_string(i) + ", expected offsets that rise from 0 to " + std::to_string(length_));
  }

  std::int64_t batch_, length_;
  host_view<std::int64_t const, dyn> cu_seqlens_;
  std::int64_t block_, longest_;
};

}  // namespace blackmamba::cpu
