#pragma once
#include <blackmamba/core/view.hpp>

#include <cstdint>
#include <type_traits>

namespace blackmamba {

/// The gradient of a parameter that all rows share is summed over blocks of rows, then over blocks, in order. How many
/// rows a block has depends on the memory space and the number of rows alone, so that sums are the same in every run.
///
/// On the host a block is what stays in a cache. On a device each is a thread block: no more than the largest GPUs run
/// at once (four on each of 132 multiprocessors), and no fewer than that where there are rows enough.
template <class Space>
struct row_blocks {
  static constexpr std::int64_t rows_per_block(std::int64_t rows) {
    if constexpr (std::is_same_v<Space, space::host>) return 64;
    std::int64_t const share = (rows + 527) / 528;
    return share > 4 ? share : 4;
  }
  static constexpr std::int64_t count(std::int64_t rows) {
    return (rows + rows_per_block(rows) - 1) / rows_per_block(rows);
  }
};

}  // namespace blackmamba
