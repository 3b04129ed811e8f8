#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/packed.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/workspace.hpp>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <string>
#include <type_traits>

/// What the contracts of this folder share: views by rank, shape checks, the fixed block structure and its scratch.
namespace blackmamba {

/// (R, L) or (B, L, D).
template <class P, class T, int Rank>
using scan_view = std::conditional_t<Rank == 2, view<typename P::memory_space, T, dyn, dyn>,
                                     view<typename P::memory_space, T, dyn, dyn, dyn>>;
/// The same without L: (R) or (B, D). Of packed sequences, one row for each.
template <class P, class T, int Rank>
using scan_state = std::conditional_t<Rank == 2, view<typename P::memory_space, T, dyn>,
                                      view<typename P::memory_space, T, dyn, dyn>>;

/// Whether a value of one type becomes one of the other where it is loaded or stored.
template <class From, class To>
concept scan_convertible = (storage<From> && storage<To>) || std::is_constructible_v<To, From>;

/// Lengths over which results are combined before they are handed on. They depend on nothing but the element's size and
/// the number of channels, so neither do the results.
struct scan_blocks {
  /// Channels that are scanned together.
  template <class E>
  static constexpr std::int64_t channel_tile =
      std::max<std::int64_t>(1, 256 * 8 / std::max<std::int64_t>(8, static_cast<std::int64_t>(sizeof(E))));
  /// Steps of a block of rows: what is read for it (two operands at most) stays in half of a small second-level cache.
  template <class E>
  static constexpr std::int64_t of_rows() {
    return 65536 / size<E>();
  }
  /// Steps of a block of channels.
  template <class E>
  static constexpr std::int64_t of_channels(std::int64_t channels) {
    std::int64_t const elements = 262144 / size<E>();
    auto const together = static_cast<std::int64_t>(
        std::bit_ceil(static_cast<std::uint64_t>(std::clamp<std::int64_t>(channels, 1, channel_tile<E>))));
    return std::clamp<std::int64_t>(elements / together, 16, 8192);
  }

 private:
  template <class E>
  static constexpr std::int64_t size() {
    return std::clamp<std::int64_t>(static_cast<std::int64_t>(std::bit_ceil(sizeof(E))), 8, 1024);
  }
};

/// The same on a device, where a tile is what a block of threads holds in registers. Tiles hand on through three levels
/// of totals (32 tiles are a group, 32 groups the third), whose shape depends on nothing but a tile's place in its
/// sequence.
struct scan_tiles {
  static constexpr int levels = 3;
  static constexpr std::int64_t threads = 256;
  /// Packs that a thread holds of a row, and how many elements make one of 16 bytes.
  template <class E>
  static constexpr int packs = sizeof(E) <= 16 ? 4 : sizeof(E) <= 32 ? 2 : 1;
  template <class X>
  static constexpr int pack_width = sizeof(X) <= 8 && std::has_single_bit(sizeof(X)) ? static_cast<int>(16 / sizeof(X))
                                                                                    : 1;
  /// Steps that a thread holds of a channel, and how many warps share a tile of 32 channels.
  template <class E>
  static constexpr int steps = sizeof(E) <= 8 ? 16 : sizeof(E) <= 16 ? 8 : sizeof(E) <= 64 ? 4 : 1;
  template <class E>
  static constexpr int warps = sizeof(E) <= 64 ? 8 : 1;
  /// The shortest tiles of any scan with elements E: of rows, of channels.
  template <class E>
  static constexpr std::int64_t of_rows = threads * packs<E> / 2;
  template <class E>
  static constexpr std::int64_t of_channels = std::max(1, warps<E> * steps<E> / 2);
  /// Rows: elements so small are handed on together with their flags, each 4 bytes with their own as one word of 8.
  template <class E>
  static constexpr bool with_flag = sizeof(E) <= 8;
  /// Rows: flags of an element, those of small ones and the elements themselves.
  template <class E>
  static constexpr std::int64_t flags_of_row = with_flag<E> ? 2 * static_cast<std::int64_t>((sizeof(E) + 3) / 4) : 1;
  /// Flags ahead of the others, the first of which counts tiles that blocks took; as many as keep the others aligned.
  static constexpr std::int64_t tickets = 4;
};

/// Extents of a scan, taken from its result, against which the other arguments are checked.
class scan_shape {
 public:
  template <class View>
  scan_shape(char const* op, View const& result, view<typename View::space_type, std::int64_t const, dyn> cu_seqlens)
      : op_(op), rank_(View::rank), batch_(result.extent(0)), length_(result.extent(1)) {
    if constexpr (View::rank == 3) channels_ = result.extent(2);
    if (!cu_seqlens.present()) return;
    packed_ = check_packed(op, batch_, length_, cu_seqlens);
    is_packed_ = true;
  }
  scan_shape(int rank, std::int64_t batch, std::int64_t length, std::int64_t channels, std::int64_t packed)
      : rank_(rank), batch_(batch), length_(length), channels_(channels), packed_(packed), is_packed_(packed > 0) {}

  template <class View>
  void check(char const* argument, View const& v) const {
    if constexpr (View::rank == 2)
      check_shape(op_, argument, v, {batch_, length_});
    else
      check_shape(op_, argument, v, {batch_, length_, channels_});
  }
  template <class View>
  void check_state(char const* argument, View const& v) const {
    if constexpr (View::rank == 1)
      check_optional_shape(op_, argument, v, {sequences()});
    else
      check_optional_shape(op_, argument, v, {sequences(), channels_});
  }

  std::int64_t sequences() const { return is_packed_ ? packed_ : batch_; }
  /// Elements of a state: without any there is nothing to do.
  std::int64_t states() const { return sequences() * channels_; }

  /// Blocks that hand a value on; none where every sequence is one block.
  template <class E, class Space = space::host>
  std::int64_t blocks() const {
    std::int64_t steps = 0;
    if constexpr (std::is_same_v<Space, space::host>)
      steps = rank_ == 2 ? scan_blocks::of_rows<E>() : scan_blocks::of_channels<E>(channels_);
    else
      steps = rank_ == 2 ? scan_tiles::of_rows<E> : scan_tiles::of_channels<E>;
    if (length_ <= steps) return 0;
    return is_packed_ ? length_ / steps + packed_ : batch_ * ((length_ + steps - 1) / steps);
  }
  std::int64_t channels() const { return channels_; }
  /// Rows of `channels` elements that blocks hand on, and their flags.
  template <class E, class Space = space::host>
  std::int64_t carries() const {
    if constexpr (std::is_same_v<Space, space::host>) return blocks<E>();
    return scan_tiles::with_flag<E> && rank_ == 2 ? 0 : scan_tiles::levels * blocks<E, Space>();
  }
  template <class E, class Space = space::host>
  std::int64_t flags() const {
    if constexpr (std::is_same_v<Space, space::host>)
      return blocks<E>() * ((channels_ + scan_blocks::channel_tile<E> - 1) / scan_blocks::channel_tile<E>);
    std::int64_t const each = rank_ == 2 ? scan_tiles::flags_of_row<E> : (channels_ + 31) / 32;
    return scan_tiles::tickets + scan_tiles::levels * blocks<E, Space>() * each;
  }
  template <class E, class Space = space::host>
  std::size_t scratch_bytes() const {
    if (blocks<E, Space>() == 0) return 0;
    return scratch_sum(sizeof(E) * static_cast<std::size_t>(carries<E, Space>() * channels_),
                       sizeof(std::int32_t) * static_cast<std::size_t>(flags<E, Space>()));
  }

 private:
  char const* op_ = "";
  int rank_ = 2;
  std::int64_t batch_, length_, channels_ = 1, packed_ = 0;
  bool is_packed_ = false;
};

/// What blocks hand on: for each block and channel an element, and for each block and channel tile a flag.
template <device_policy P, class E>
struct scan_scratch {
  using space_type = typename P::memory_space;
  scan_scratch(P const& policy, scan_shape const& shape) : memory_(policy, shape.scratch_bytes<E, space_type>()) {
    if (shape.blocks<E, space_type>() == 0) return;
    carries = memory_.template allocate<E>(shape.carries<E, space_type>(), shape.channels());
    flags = memory_.template allocate<std::int32_t>(shape.flags<E, space_type>());
  }
  view<space_type, E, dyn, dyn> carries;
  view<space_type, std::int32_t, dyn> flags;

 private:
  scratch<P> memory_;
};

}  // namespace blackmamba
