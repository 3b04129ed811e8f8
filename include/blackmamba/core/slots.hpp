#pragma once
#include <blackmamba/core/config.hpp>
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/view.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
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

/// Shapes of slots (B) and kept_slots (B, L), both optional, the second only where the first is there; and of the pool.
/// @param rest extents of the pool from its second on
/// @throws shape_error
template <class Slots, class Kept, class Pool>
void check_slots(std::string_view op, Slots const& slots, Kept const& kept, Pool const& pool, std::int64_t batch,
                 std::int64_t length, std::int64_t second, std::int64_t third) {
  check_optional_shape(op, "slots", slots, {batch});
  check_optional_shape(op, "kept_slots", kept, {batch, length});
  check_that(slots.present() || !kept.present(), op, "kept_slots", "rows to keep states in",
             "none, for slots is absent");
  check_shape(op, "state", pool, {slots.present() ? -1 : batch, second, third});
}

/// What the numbers themselves must be, where they can be read: below the pool's rows, and no row that two sequences
/// write, or that one writes twice. A sequence may keep a state in its own row.
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
  for (std::int64_t b = 0; b < batch; ++b) {
    if (slots(b) < 0) continue;
    take("slots", slots(b), b);
    for (std::int64_t t = 0; t < length; ++t)
      if (kept(b, t) >= 0 && kept(b, t) != slots(b)) take("kept_slots", kept(b, t), b);
  }
  std::sort(rows.begin(), rows.end());
  auto const twice = std::adjacent_find(rows.begin(), rows.end());
  if (twice != rows.end())
    check_that(false, op, length > 0 ? "kept_slots" : "slots", std::to_string(*twice) + " twice",
               "each row of states once");
}

}  // namespace blackmamba
