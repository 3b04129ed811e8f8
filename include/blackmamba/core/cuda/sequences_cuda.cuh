#pragma once
#include <blackmamba/core/view.hpp>

#include <cstdint>

namespace blackmamba::cuda {

/// The sequences of a (B, L, …) tensor on the device: its B rows, or with cu_seqlens (S + 1) the S pieces of its one
/// row; cut into blocks of 2^shift steps, which are counted from each sequence's own beginning.
///
/// Blocks are numbered in order, with gaps where packed sequences end early: a kernel finds what a number stands for
/// from the offsets alone, which only the device has read. An empty sequence has one empty block.
class sequences {
 public:
  struct block {
    std::int64_t index;       ///< row of the states
    std::int64_t batch;       ///< row of the tensor
    std::int64_t first;       ///< the sequence's first step in that row
    std::int64_t length;      ///< the sequence's steps
    std::int64_t place;       ///< how many blocks of its sequence stand before this one
    std::int64_t begin, end;  ///< this block's steps, counted from the sequence's first
  };

  sequences(std::int64_t batch, std::int64_t length, view<space::device, std::int64_t const, dyn> cu_seqlens, int shift)
      : cu_seqlens_(cu_seqlens.data()),
        count_(cu_seqlens.present() ? cu_seqlens.extent(0) - 1 : batch),
        length_(length),
        shift_(shift) {}

  bool packed() const { return cu_seqlens_ != nullptr; }
  /// How many numbers there are.
  std::int64_t blocks() const { return packed() ? (length_ >> shift_) + count_ : count_ * blocks_of(length_); }

  /// The block of this number; false for a gap.
  __device__ __forceinline__ bool find(std::int64_t number, block& b) const {
    if (cu_seqlens_ == nullptr) {
      std::int64_t const each = blocks_of(length_);
      b.index = b.batch = each == 1 ? number : number / each;
      b.first = 0;
      b.length = length_;
      b.place = number - b.index * each;
    } else {
      // The last sequence whose first block's number is at most this one.
      std::int64_t low = 0, high = count_;
      while (low + 1 < high) {
        std::int64_t const middle = (low + high) / 2;
        (first_block(middle) <= number ? low : high) = middle;
      }
      b.index = low;
      b.batch = 0;
      b.first = cu_seqlens_[low];
      b.length = cu_seqlens_[low + 1] - b.first;
      b.place = number - first_block(low);
      if (b.place >= blocks_of(b.length)) return false;
    }
    b.begin = b.place << shift_;
    b.end = b.begin + (std::int64_t{1} << shift_);
    if (b.end > b.length) b.end = b.length;
    return true;
  }

 private:
  __host__ __device__ std::int64_t blocks_of(std::int64_t length) const {
    std::int64_t const blocks = (length + (std::int64_t{1} << shift_) - 1) >> shift_;
    return blocks > 0 ? blocks : 1;
  }
  __device__ std::int64_t first_block(std::int64_t s) const { return (cu_seqlens_[s] >> shift_) + s; }

  std::int64_t const* cu_seqlens_;
  std::int64_t count_, length_;
  int shift_;
};

}  // namespace blackmamba::cuda
