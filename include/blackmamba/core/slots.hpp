#pragma once
#include <blackmamba/core/config.hpp>
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/policy.hpp>
#include <blackmamba/core/view.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

/// Continuous batching: states of many sequences lie in one pool, rows of its first dimension, and a batch names the
/// rows that its sequences have. Sequences come and go, and no state moves.
namespace blackmamba {

/// The row of a pool that sequence i of a batch has: slots[i], or i where there are none. Negative where the sequence
/// has no state: a batch of fixed size, in a graph for one, is filled up so.
template <class Slots>
BLACKMAMBA_HD constexpr std::int64_t slot_of(Slots const& slots, std::int64_t i, std::int64_t pool) {
  if (!slots.present()) return i;
  std::int64_t const slot = slots.data()[i];
  return slot < pool ? slot : -1;
}

/// The row that the state after token t of a sequence, whose own row is `slot`, is left in: kept[b, t], or without
/// kept_slots its own after the last token. Negative where that state isn't kept.
template <class Kept, class Index>
BLACKMAMBA_HD constexpr std::int64_t kept_slot_of(Kept const& kept, std::int64_t b, Index t, Index length,
                                                  std::int64_t slot, std::int64_t pool) {
  std::int64_t to = t + 1 < length ? -1 : slot;
  if (kept.present()) {
    to = kept.row(b)[t];
    if (to >= pool) to = -1;
  }
  return to;
}

/// Tokens of a sequence that one call moves its state on by.
inline constexpr std::int64_t most_tokens = 8;

/// One token of each sequence, (B, D), as tokens (B, 1, D); absent where it is.
template <class Space, class T>
constexpr view<Space, T, dyn, dyn, dyn> as_one_token(view<Space, T, dyn, dyn> const& x) {
  if (!x.present()) return {};
  return {x.data(), {x.extent(0), 1, x.extent(1)}, {x.stride(0), x.stride(0), 1}};
}

/// What the numbers themselves must be, where they can be read: below the pool's rows; no row that two sequences have;
/// and none to keep a state in that another sequence has, or that is named twice. A sequence may keep one state in its
/// own row. What a sequence without a state would keep is not looked at.
/// @throws shape_error
template <class Kept>
void check_slot_numbers(std::string_view op, host_view<std::int32_t const, dyn> slots, Kept const& kept,
                        std::int64_t pool) {
  if (!slots.present()) return;
  std::int64_t const batch = slots.extent(0), length = kept.present() ? kept.extent(1) : 0;
  std::vector<std::int32_t> rows;
  rows.reserve(static_cast<std::size_t>(batch * (1 + length)));
  auto const take = [&](char const* argument, std::int32_t slot, std::int64_t b) {
    if (slot >= pool)
      check_that(false, op, argument, std::to_string(slot) + " for sequence " + std::to_string(b),
                 "rows of " + std::to_string(pool) + " states, or less than 0");
    rows.push_back(slot);
  };
  auto const check_once = [&](char const* argument) {
    std::sort(rows.begin(), rows.end());
    auto const twice = std::adjacent_find(rows.begin(), rows.end());
    if (twice != rows.end())
      check_that(false, op, argument, std::to_string(*twice) + " twice", "each row of states once");
  };
  for (std::int64_t b = 0; b < batch; ++b)
    if (slots(b) >= 0) take("slots", slots(b), b);
  check_once("slots");
  for (std::int64_t b = 0; b < batch; ++b) {
    bool in_own_row = false;
    for (std::int64_t t = 0; slots(b) >= 0 && t < length; ++t) {
      bool const own = kept(b, t) == slots(b);
      if (kept(b, t) >= 0 && !(own && !in_own_row)) take("kept_slots", kept(b, t), b);
      in_own_row = in_own_row || own;
    }
  }
  check_once("kept_slots");
}

/// The pool, with rows of second x third; slots (B) and kept_slots (B, L), both optional, the second only where the
/// first is there; and, on a host, what they say.
/// @throws shape_error
template <device_policy P, class Slots, class Kept, class Pool>
void check_slots(std::string_view op, Slots const& slots, Kept const& kept, Pool const& pool, std::int64_t batch,
                 std::int64_t length, std::int64_t second, std::int64_t third) {
  check_that(length <= most_tokens, op, "y", std::to_string(length) + " tokens",
             "at most " + std::to_string(most_tokens) + "; forward takes more");
  check_optional_shape(op, "slots", slots, {batch});
  check_optional_shape(op, "kept_slots", kept, {batch, length});
  check_that(slots.present() || !kept.present(), op, "kept_slots", "rows to keep states in",
             "none, for slots is absent");
  check_shape(op, "state", pool, {slots.present() ? -1 : batch, second, third});
  if constexpr (std::is_same_v<typename P::memory_space, space::host> && !is_dry<P>)
    check_slot_numbers(op, slots, kept, pool.extent(0));
}

}  // namespace blackmamba
