#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/memory.hpp>
#include <blackmamba/core/policy.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace blackmamba {

/// How the blocks of an arena are kept apart. Anything but `none` is for tests: slow, waits for the device at each
/// block, and steps are not recorded. Sizes are counted as without it.
enum class workspace_guard {
  none,
  own_memory,  ///< each block is an allocation of its own, filled with 0xff (floating-point: NaN), so that tools which
               ///< watch the ends of allocations watch the ends of blocks
  band,        ///< and is followed by a band; a program that has written there is ended with a message at its release
};
/// What arenas do that are made from now on. Not to be changed while another thread makes one.
inline workspace_guard guard_workspaces = workspace_guard::none;

namespace detail {

/// A block of a guarded arena.
template <class Space>
class guarded_block {
 public:
  guarded_block(std::size_t offset, std::size_t bytes, std::size_t band) : offset_(offset), bytes_(bytes), band_(band) {
    memory_ = memory_resource<Space>::allocate(std::max<std::size_t>(bytes + band, 1));
    memory_resource<Space>::fill(memory_, 0xff, bytes + band);
  }
  guarded_block(guarded_block&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)),
        offset_(other.offset_),
        bytes_(other.bytes_),
        band_(other.band_) {}
  guarded_block& operator=(guarded_block&&) = delete;
  ~guarded_block() {
    if (memory_) memory_resource<Space>::deallocate(memory_);
  }

  std::byte* data() const { return static_cast<std::byte*>(memory_); }
  std::size_t offset() const { return offset_; }
  /// What was written past the end, as a sentence; empty where nothing was.
  std::string damage() const {
    std::vector<unsigned char> band(band_);
    memory_resource<Space>::read(band.data(), data() + bytes_, band_);
    for (std::size_t i = 0; i < band_; ++i)
      if (band[i] != 0xff)
        return "workspace: a block of " + std::to_string(bytes_) + " bytes at " + std::to_string(offset_) +
               " was written past its end, at byte " + std::to_string(bytes_ + i);
    return {};
  }

 private:
  void* memory_ = nullptr;
  std::size_t offset_, bytes_, band_;
};

}  // namespace detail

/// A stack of scratch memory: allocations are a pointer bump, released in reverse order by scopes. One arena serves one
/// step at a time. Blocks are aligned to 256 bytes and not initialised.
///
/// A measuring arena owns nothing and hands out addresses that must not be dereferenced: run a step under
/// device::dry<P> with it, and peak() is the exact size that the step needs.
template <class Space>
class arena {
 public:
  static constexpr std::size_t alignment = 256;

  explicit arena(std::size_t bytes)
      : memory_(static_cast<std::byte*>(memory_resource<Space>::allocate(std::max<std::size_t>(bytes, 1)))),
        capacity_(bytes) {}
  static arena measuring() { return arena(); }
  /// Over memory of another owner, which outlives the arena: aligned to 256 bytes, in this space.
  static arena borrowing(void* memory, std::size_t bytes) {
    arena a;
    a.memory_ = static_cast<std::byte*>(memory);
    a.capacity_ = bytes;
    a.borrowed_ = true;
    return a;
  }

  arena(arena&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)),
        borrowed_(std::exchange(other.borrowed_, false)),
        capacity_(std::exchange(other.capacity_, 0)),
        used_(std::exchange(other.used_, 0)),
        peak_(std::exchange(other.peak_, 0)),
        guard_(other.guard_),
        guarded_(std::move(other.guarded_)) {}
  arena& operator=(arena&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(borrowed_, other.borrowed_);
    std::swap(capacity_, other.capacity_);
    std::swap(used_, other.used_);
    std::swap(peak_, other.peak_);
    std::swap(guard_, other.guard_);
    std::swap(guarded_, other.guarded_);
    return *this;
  }
  ~arena() {
    release_to(0);
    if (memory_ && !borrowed_) memory_resource<Space>::deallocate(memory_);
  }

  /// A contiguous block of the given shape. Throws workspace_error that names the bytes asked for and the size.
  template <class T, class... Ints>
  auto allocate(Ints... extents) {
    std::size_t bytes = sizeof(T);
    ((bytes *= static_cast<std::size_t>(extents)), ...);
    std::size_t const rounded = rounded_bytes(bytes);
    if (memory_ && used_ + rounded > capacity_)
      throw workspace_error("workspace: asked for " + std::to_string(bytes) + " bytes with " + std::to_string(used_) +
                            " in use, but the arena has " + std::to_string(capacity_) + " bytes");
    // A measuring arena hands out its offsets, moved away from null, as addresses.
    auto* block = memory_ ? memory_ + used_ : reinterpret_cast<std::byte*>(used_ + alignment);
    if (memory_ && guard_ != workspace_guard::none) {
      guarded_.emplace_back(used_, bytes, guard_ == workspace_guard::band ? alignment : 0);
      block = guarded_.back().data();
    }
    used_ += rounded;
    peak_ = std::max(peak_, used_);
    return view<Space, T, (static_cast<void>(extents), dyn)...>(reinterpret_cast<T*>(block), extents...);
  }

  /// Bytes that a block of this many bytes takes.
  static constexpr std::size_t rounded_bytes(std::size_t bytes) {
    return (bytes + alignment - 1) / alignment * alignment;
  }

  std::size_t used() const { return used_; }
  std::size_t peak() const { return peak_; }
  std::size_t capacity() const { return capacity_; }
  /// Of a guarded arena: what was written past the end of a block that is in use; empty where nothing was.
  std::string damage() const {
    for (auto const& block : guarded_)
      if (std::string found = block.damage(); !found.empty()) return found;
    return {};
  }
  void release_to(std::size_t mark) {
    used_ = mark;
    while (!guarded_.empty() && guarded_.back().offset() >= mark) {
      if (std::string const found = guarded_.back().damage(); !found.empty()) {
        std::fprintf(stderr, "blackmamba: %s\n", found.c_str());
        std::abort();  // a scope's end cannot throw
      }
      guarded_.pop_back();
    }
  }

 private:
  arena() = default;

  std::byte* memory_ = nullptr;
  bool borrowed_ = false;
  std::size_t capacity_ = 0;
  std::size_t used_ = 0;
  std::size_t peak_ = 0;
  workspace_guard guard_ = guard_workspaces;
  std::vector<detail::guarded_block<Space>> guarded_;
};

/// Scratch memory for the duration of a C++ scope: from the policy's workspace where it has one (released on scope
/// exit), else an allocation of its own of `bytes`.
template <device_policy P>
class scratch {
 public:
  using memory_space = typename P::memory_space;

  /// @param bytes what allocate() will be asked for in all; ignored where the policy has a workspace
  scratch(P const& policy, std::size_t bytes)
      : own_(policy.workspace ? nullptr : std::make_unique<arena<memory_space>>(bytes)),
        arena_(policy.workspace ? policy.workspace : own_.get()),
        mark_(arena_->used()) {}
  scratch(scratch const&) = delete;
  scratch& operator=(scratch const&) = delete;
  ~scratch() { arena_->release_to(mark_); }

  template <class T, class... Ints>
  auto allocate(Ints... extents) {
    return arena_->template allocate<T>(extents...);
  }

 private:
  std::unique_ptr<arena<memory_space>> own_;
  arena<memory_space>* arena_;
  std::size_t mark_;
};

/// Bytes of scratch that blocks of these many bytes take together.
template <class... Sizes>
constexpr std::size_t scratch_sum(Sizes... bytes) {
  return (arena<space::host>::rounded_bytes(static_cast<std::size_t>(bytes)) + ... + 0);
}

}  // namespace blackmamba
