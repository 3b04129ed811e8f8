#pragma once
#include <blackmamba/core/config.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>

#include <cstdint>

/// What a dense product on the device is asked for, and how it is cut into tiles.
namespace blackmamba::cuda {

/// Whether an operand is used as stored or transposed; operands are row-major with a row stride.
enum class transpose { no, yes };

/// Which dimension of a product the groups share among themselves: its rows (m), so that each group has a B and rows of
/// C of its own, or its depth (k), so that each group has a C of its own.
enum class grouping { none, rows, depth };

/// Groups [offsets[e], offsets[e + 1]) of that dimension; the offsets lie on the device. `apart`: elements from one
/// group's operand to the next one's.
struct product_groups {
  grouping by = grouping::none;
  std::int64_t count = 1;
  std::int64_t const* offsets = nullptr;
  std::int64_t b_apart = 0;     // by rows
  std::int64_t bias_apart = 0;  // by rows
  std::int64_t c_apart = 0;     // by depth
};

/// What becomes of a product: it is C.
struct as_is {};

/// It is (G U) (m, 2 n), for B and the bias have what belongs to G, then what belongs to U; each is rounded to C's
/// type, and C (m, n) = Function::of(G, U), element by element. Where `both` is not null, (G U) is stored there too.
template <class Function, class T>
struct gated_units {
  using function = Function;
  T* both = nullptr;
  std::int64_t both_stride = 0;
};

/// It is rounded to C's type; row r times gate[t] is row t = source[r] of y (tokens, n), and a token t with row[t] < 0
/// has zeros there. Where C is not null, it gets the rows before that.
template <class T>
struct rows_to_tokens {
  T* y = nullptr;
  std::int64_t y_stride = 0, tokens = 0;
  std::int32_t const *source = nullptr, *row = nullptr;
  float const* gate = nullptr;
  std::int64_t gate_apart = 0;
};

/// It is the gradient of gated units: rounded to C's type, it is multiplied by the derivatives of act(G) U at the
/// (G U) (m, 2 n) of `both`: d_both (m, 2 n). There is no C.
template <class Function, class T>
struct gated_units_gradient {
  using function = Function;
  T const* both = nullptr;
  std::int64_t both_stride = 0;
  T* d_both = nullptr;
  std::int64_t d_both_stride = 0;
};

template <class Result>
inline constexpr bool is_gated = false;
template <class Function, class T>
inline constexpr bool is_gated<gated_units<Function, T>> = true;
template <class Result>
inline constexpr bool is_gated_gradient = false;
template <class Function, class T>
inline constexpr bool is_gated_gradient<gated_units_gradient<Function, T>> = true;
template <class Result>
inline constexpr bool goes_to_tokens = false;
template <class T>
inline constexpr bool goes_to_tokens<rows_to_tokens<T>> = true;

/// C (m, n) = op(A) (m, k) op(B) (k, n) + bias (n), or C += it, or what Result makes of it. Row strides lda, ldb, ldc
/// in elements; bias may be null. An empty group of the depth leaves its C as it is.
template <class TA, class TB, class TC, class Result = as_is>
struct product {
  transpose ta = transpose::no, tb = transpose::no;
  std::int64_t m, n, k;
  TA const* a;
  std::int64_t lda;
  TB const* b;
  std::int64_t ldb;
  TC* c;
  std::int64_t ldc;
  update mode = update::overwrite;
  accum_t<TC> const* bias = nullptr;
  product_groups groups = {};
  Result result = {};
  /// B, bias, groups and what Result reads are older than the kernel before on the stream: what reads them may begin
  /// before that has ended. Not with groups of the depth.
  bool early = false;
};

namespace detail {

/// A tile of C: rows [row, row_end) from `row` on, columns from `column` on, and the part of the depth that it sums.
struct product_tile {
  std::int64_t group, row, row_end, column, depth, depth_end;
};

/// Where the groups end, as far as the host knows: the most tiles of Rows x Columns that the product can have.
template <int Rows, int Columns, class Product>
std::int64_t most_tiles(Product const& x) {
  std::int64_t const across = (x.n + Columns - 1) / Columns;
  std::int64_t const down = (x.m + Rows - 1) / Rows;
  if (x.groups.by == grouping::rows) return (x.m / Rows + x.groups.count) * across;
  return x.groups.count * down * across;
}

/// The index-th tile of `down` x `across`: bands of 16 tiles' rows, so that tiles that run together share rows of A and
/// columns of B in the second-level cache.
__device__ __forceinline__ void tile_in_bands(std::int64_t index, std::int64_t down, std::int64_t across,
                                              std::int64_t& i, std::int64_t& j) {
  constexpr std::int64_t height = 16;
  std::int64_t const band = index / (height * across), within = index - band * height * across;
  std::int64_t const rows = down - band * height < height ? down - band * height : height;
  j = within / rows;
  i = band * height + within - j * rows;
}

/// Whether there is an index-th tile, and where. Tiles of groups follow each other.
template <int Rows, int Columns, class Product>
__device__ __forceinline__ bool find_tile(Product const& x, std::int64_t index, product_tile& t) {
  std::int64_t const across = (x.n + Columns - 1) / Columns;
  std::int64_t i, j;
  if (x.groups.by == grouping::rows) {
    std::int64_t begin = 0;
    for (t.group = 0; t.group < x.groups.count; ++t.group) {
      std::int64_t const end = x.groups.offsets[t.group + 1];
      std::int64_t const down = (end - begin + Rows - 1) / Rows;
      if (index < down * across) {
        tile_in_bands(index, down, across, i, j);
        t.row = begin + i * Rows;
        t.row_end = t.row + Rows < end ? t.row + Rows : end;
        t.column = j * Columns;
        t.depth = 0;
        t.depth_end = x.k;
        return true;
      }
      index -= down * across;
      begin = end;
    }
    return false;
  }
  std::int64_t const down = (x.m + Rows - 1) / Rows;
  t.group = index / (down * across);
  if (t.group >= x.groups.count) return false;
  tile_in_bands(index - t.group * down * across, down, across, i, j);
  t.row = i * Rows;
  t.row_end = t.row + Rows < x.m ? t.row + Rows : x.m;
  t.column = j * Columns;
  t.depth = x.groups.by == grouping::depth ? x.groups.offsets[t.group] : 0;
  t.depth_end = x.groups.by == grouping::depth ? x.groups.offsets[t.group + 1] : x.k;
  return true;
}

}  // namespace detail
}  // namespace blackmamba::cuda
