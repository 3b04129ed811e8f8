#pragma once
#include <blackmamba/core/error.hpp>

#include <cstdint>
#include <string>
#include <string_view>

namespace blackmamba {

/// The number of sequences in (B, L): B, or where offsets cu_seqlens (S + 1) are present the S sequences that one row
/// is packed with. The offsets themselves are read by who works with them: on a device they are not known here.
/// @throws shape_error
template <class View>
std::int64_t check_packed(std::string_view op, std::int64_t batch, std::int64_t length, View const& cu_seqlens) {
  if (!cu_seqlens.present()) return batch;
  if (batch != 1)
    detail::throw_shape_error(op, "cu_seqlens", "a batch of " + std::to_string(batch) + " rows",
                              "one row of packed sequences");
  check_that(cu_seqlens.extent(0) >= 1, op, "cu_seqlens", "(0)", "(sequences + 1)");
  std::int64_t const sequences = cu_seqlens.extent(0) - 1;
  if (sequences == 0 && length != 0)
    detail::throw_shape_error(op, "cu_seqlens", "no sequences", "some for " + std::to_string(length) + " steps");
  return sequences;
}

}  // namespace blackmamba
