#pragma once
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/stored_pack_cuda.cuh>
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/view.hpp>

#include <algorithm>
#include <cstdint>
#include <string>

/// Work on each element of matrices of one shape, whose rows may be strided.
namespace blackmamba::cuda {

/// The pack at row r, column c, of which the row has `left` elements; zeros beyond.
template <int N, class T>
__device__ __forceinline__ auto load_element_pack(view<space::device, T const, dyn, dyn> const& x, std::int64_t r,
                                                  std::int64_t c, std::int64_t left) {
  stored_pack<N, T> p;
  p.load(x.row(r) + c, left);
  return p;
}
template <int N, class View, class A>
__device__ __forceinline__ void store_element_pack(View const& x, std::int64_t r, std::int64_t c, std::int64_t left,
                                                   pack<A, N> const& value) {
  auto* const p = x.row(r) + c;
  if (left >= N)
    store_pack<N>(p, value);
  else
    store_some<N>(p, value, left);
}

namespace detail {

/// A tile is as many rows as the block has in y, and as many packs of N columns as it has in x. Each thread takes Tiles
/// packs, and loads all of them before it stores the first.
template <int N, int Tiles, class Op>
__global__ void __launch_bounds__(256)
    element_tiles(Op op, std::int64_t rows, std::int64_t width, std::uint32_t column_tiles, std::uint32_t tiles) {
  using operands = decltype(op.template load<N>(std::int64_t{}, std::int64_t{}, std::int64_t{}));
  if constexpr (requires { op.row_count; })
    if (op.row_count != nullptr) rows = *op.row_count < rows ? *op.row_count : rows;
  operands x[Tiles];
  std::int64_t row[Tiles], column[Tiles];
  bool live[Tiles];
#pragma unroll
  for (int j = 0; j < Tiles; ++j) {
    std::uint32_t const tile = blockIdx.x * Tiles + static_cast<std::uint32_t>(j);
    row[j] = std::int64_t{tile / column_tiles} * blockDim.y + threadIdx.y;
    column[j] = (std::int64_t{tile % column_tiles} * blockDim.x + threadIdx.x) * N;
    live[j] = tile < tiles && row[j] < rows && column[j] < width;
    // Said twice so that a whole pack's operands are loaded without a question between them.
    if (live[j] && width - column[j] >= N) x[j] = op.template load<N>(row[j], column[j], N);
    if (live[j] && width - column[j] < N) x[j] = op.template load<N>(row[j], column[j], width - column[j]);
  }
#pragma unroll
  for (int j = 0; j < Tiles; ++j) {
    if (live[j] && width - column[j] >= N) op.template finish<N>(x[j], row[j], column[j], N);
    if (live[j] && width - column[j] < N) op.template finish<N>(x[j], row[j], column[j], width - column[j]);
  }
}

}  // namespace detail

/// Calls op for packs of N columns of rows x width: operands = op.load<N>(r, c, left), then op.finish<N>(operands, r,
/// c, left), where `left` is how many columns of the row begin at c. A thread's loads come before its results: results
/// may alias operands element by element. Where op.row_count exists and is not null, rows from *op.row_count on, a
/// number in the device's memory, are left out.
template <int N, int TilesOfAThread = 2, class Op>
void launch_elements(char const* name, device::cuda const& policy, std::int64_t rows, std::int64_t width,
                     Op const& op) {
  if (rows <= 0 || width <= 0) return;
  std::int64_t const packs = (width + N - 1) / N, column_tiles = (packs + 255) / 256;
  std::int64_t const across = (packs + column_tiles - 1) / column_tiles;  // even shares: no tile is nearly empty
  std::int64_t const down = std::max<std::int64_t>(1, 256 / across);
  std::int64_t const tiles = column_tiles * ((rows + down - 1) / down);
  // Of more than 128 elements each: no device's memory holds so many.
  if (tiles > 0xffffffff - TilesOfAThread)
    throw shape_error(std::string(name) + ": got " + std::to_string(rows) + " rows of " + std::to_string(width) +
                      " elements, expected fewer on a device");
  launch(name, policy,
         {blocks_for(tiles, TilesOfAThread), dim3(static_cast<unsigned>(across), static_cast<unsigned>(down))},
         detail::element_tiles<N, TilesOfAThread, Op>, op, rows, width, static_cast<std::uint32_t>(column_tiles),
         static_cast<std::uint32_t>(tiles));
}

/// How matrices of one shape (absent views among them) are gone through: as they are, or, where none has gaps, as one
/// long row; in packs of N where their rows begin at a multiple of a pack.
template <int N>
struct element_shape {
  std::int64_t rows, width;
  bool packs;

  template <class View, class... Views>
  explicit element_shape(View const& first, Views const&... others) : element_shape(true, first, others...) {}
  /// As they are.
  template <class View, class... Views>
  static element_shape row_by_row(View const& first, Views const&... others) {
    return element_shape(false, first, others...);
  }

 private:
  template <class View, class... Views>
  explicit element_shape(bool joined, View const& first, Views const&... others)
      : rows(first.extent(0)), width(first.extent(1)) {
    if (joined && gapless(first) && (gapless(others) && ...)) {
      width *= rows;
      rows = 1;
    }
    packs = aligned(first) && (aligned(others) && ...);
  }
  template <class View>
  static bool gapless(View const& x) {
    return !x.present() || x.contiguous();
  }
  template <class View>
  bool aligned(View const& x) const {
    return !x.present() || (pack_aligned<N>(x.data()) && (rows == 1 || x.stride(0) % N == 0));
  }
};

/// launch_elements in packs of N, or one by one where the shape does not allow them.
template <int N, class Op>
void launch_elements(char const* name, device::cuda const& policy, element_shape<N> const& shape, Op const& op) {
  if (shape.packs)
    launch_elements<N>(name, policy, shape.rows, shape.width, op);
  else
    launch_elements<1>(name, policy, shape.rows, shape.width, op);
}

}  // namespace blackmamba::cuda
