#pragma once
#include <blackmamba/core/config.hpp>
#include <blackmamba/core/cpu/gemm_eigen.hpp>
#include <blackmamba/core/cpu/matvec.hpp>
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/core/memory.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

/// Dense products on the host, over Eigen: here they are cut into tasks, 16-bit operands are widened, results rounded.
/// Products of a few rows, as decoding has them, read their weights in the storage type (matvec.hpp).
namespace blackmamba::cpu {

/// Whether an operand is used as stored or transposed; operands are row-major with a row stride.
enum class transpose { no, yes };

/// C (m, n) = op(A) (m, k) op(B) (k, n) + bias (n), or C += it. Row strides lda, ldb, ldc in elements; bias may be
/// null.
template <class TA, class TB, class TC>
struct product {
  transpose ta, tb;
  std::int64_t m, n, k;
  TA const* a;
  std::int64_t lda;
  TB const* b;
  std::int64_t ldb;
  TC* c;
  std::int64_t ldc;
  update mode = update::overwrite;
  accum_t<TC> const* bias = nullptr;
};

namespace detail {

/// How a product is cut: tiles of C, each the work of one thread, and blocks of the depth. Depends on the shape alone,
/// so that results do not depend on the number of threads. What Eigen packs of a tile's operands it has on the stack;
/// twice the rows and columns would be 5% faster, and allocate for each tile.
struct tiling {
  static constexpr std::int64_t most_rows = 128, most_cols = 128;
  /// Deepest block of a depth of elements of this size.
  static constexpr std::int64_t most_depth(std::size_t element) {
    return static_cast<std::int64_t>(gemm_packed_bytes / element) / most_rows;
  }
  /// Rows of a tile are a multiple of this, as Eigen takes them: no row is summed in an order of its own.
  static constexpr std::int64_t row_multiple = 4;

  std::int64_t rows = most_rows, cols = most_cols, depth = 0;
  std::int64_t down = 0, across = 0, blocks = 1;

  /// @param siblings  how many products of about this shape run together
  tiling(std::int64_t m, std::int64_t n, std::int64_t k, std::size_t element, std::int64_t siblings) {
    // 16 tiles share well among a few threads; smaller ones pay more for packing.
    constexpr std::int64_t enough = 16, least_rows = 32;
    auto const cut = [](std::int64_t extent, std::int64_t most, std::int64_t multiple) {
      std::int64_t const parts = std::max<std::int64_t>(1, (extent + most - 1) / most);
      return ((extent + parts - 1) / parts + multiple - 1) / multiple * multiple;
    };
    // The columns of a tile depend on n alone, the rows on what is left to share.
    cols = cut(n, cols, 16);
    across = (n + cols - 1) / cols;
    auto const fit = [&] {
      rows = cut(m, rows, row_multiple);
      down = (m + rows - 1) / rows;
    };
    for (fit(); down * across * siblings < enough && rows > least_rows; fit()) rows /= 2;
    depth = cut(k, most_depth(element), 16);
    if (depth > 0) blocks = (k + depth - 1) / depth;
  }
};

/// One thread's copies of operands that Eigen cannot take as they are, and a tile of C where it is not C itself.
template <class A>
class gemm_buffers {
  static constexpr std::int64_t operand_size = static_cast<std::int64_t>(gemm_packed_bytes / sizeof(A));

 public:
  /// Elements from left() on, where all of it serves as one buffer.
  static constexpr std::int64_t size = 2 * operand_size + tiling::most_rows * tiling::most_cols;

  gemm_buffers(gemm_buffers const&) = delete;
  gemm_buffers& operator=(gemm_buffers const&) = delete;
  /// Allocated when the thread first asks, kept until it ends.
  static gemm_buffers& mine() {
    static thread_local gemm_buffers buffers;
    return buffers;
  }

  A* left() const { return memory_; }
  A* right() const { return memory_ + operand_size; }
  A* tile() const { return memory_ + 2 * operand_size; }

 private:
  gemm_buffers()
      : memory_(static_cast<A*>(memory_resource<space::host>::allocate(sizeof(A) * static_cast<std::size_t>(size)))) {}
  ~gemm_buffers() { memory_resource<space::host>::deallocate(memory_); }

  A* memory_;
};

/// Copies n values, widened.
template <class A, class T>
BLACKMAMBA_INLINE void copy_widened(T const* from, std::int64_t n, A* to) {
  using V = simd::pack<A>;
  std::int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) V::load(from + i).store(to + i);
  for (; i < n; ++i) to[i] = convert<A>(from[i]);
}

/// Copies a block (rows, cols) of an operand, widened, and fills it up with zeros to (all_rows, all_cols), contiguous.
template <class A, class T>
void copy_block(T const* from, std::int64_t stride, std::int64_t rows, std::int64_t cols, A* to, std::int64_t all_rows,
                std::int64_t all_cols) {
  for (std::int64_t i = 0; i < rows; ++i, to += all_cols) {
    copy_widened(from + i * stride, cols, to);
    std::fill(to + cols, to + all_cols, A(0));
  }
  std::fill_n(to, (all_rows - rows) * all_cols, A(0));
}

/// C (rows, cols) = bias, or 0 where there is none.
template <class A>
void fill_rows(std::int64_t rows, std::int64_t cols, A const* bias, A* c, std::int64_t stride) {
  for (std::int64_t i = 0; i < rows; ++i, c += stride)
    if (bias)
      std::copy_n(bias, cols, c);
    else
      std::fill_n(c, cols, A(0));
}

/// c (rows, cols) = sums, or c += sums; rounded to the type of c.
template <class A, class T>
void store_tile(A const* sums, std::int64_t sums_stride, std::int64_t rows, std::int64_t cols, T* c,
                std::int64_t stride, bool add) {
  using V = simd::pack<A>;
  for (std::int64_t i = 0; i < rows; ++i, sums += sums_stride, c += stride) {
    std::int64_t j = 0;
    for (; j + V::lanes <= cols; j += V::lanes) {
      V const s = V::load(sums + j);
      (add ? V::load(c + j) + s : s).store(c + j);
    }
    for (; j < cols; ++j) c[j] = convert<T>(add ? convert<A>(c[j]) + sums[j] : sums[j]);
  }
}

/// Computes tiles of products on one thread.
template <class TA, class TB, class TC>
class tile_worker {
  using A = accum_t<TC>;
  using buffers = gemm_buffers<A>;

 public:
  explicit tile_worker(product<TA, TB, TC> const&) {}  // names the types

  /// To be called before the tiles of another product.
  void forget() {
    widened_rows_ = nullptr;
    right_ = nullptr;
  }
  /// Whether this is a product of few rows with a transposed B, which matvec computes: widened rows of A fit the
  /// buffers.
  static bool is_matvec(product<TA, TB, TC> const& x) {
    return x.m <= matvec_rows && x.ta == transpose::no && x.tb == transpose::yes && x.mode == update::overwrite &&
           (std::is_same_v<A, TA> || x.m * x.k <= buffers::size);
  }
  /// Columns [j, j + cols) of such a product.
  void run_matvec(product<TA, TB, TC> const& x, std::int64_t j, std::int64_t cols) {
    std::int64_t stride = x.lda;
    if constexpr (std::is_same_v<A, TA>) {
      widened_rows_ = x.a;
    } else {
      stride = x.k;
      if (!widened_rows_) copy_block(x.a, x.lda, x.m, x.k, buffers_.left(), x.m, x.k);
      widened_rows_ = buffers_.left();
    }
    matvec(x.m, cols, x.k, widened_rows_, stride, x.b + j * x.ldb, x.ldb, x.c + j, x.ldc,
           x.bias ? x.bias + j : nullptr);
  }
  /// The index-th tile; tiles that share columns of B follow each other, so that widened columns serve several.
  void run(product<TA, TB, TC> const& x, tiling const& t, std::int64_t index) {
    std::int64_t const i = index % t.down * t.rows, j = index / t.down * t.cols;
    std::int64_t const rows = std::min(t.rows, x.m - i), cols = std::min(t.cols, x.n - j);
    // Few rows are filled up, so that every row is summed alike: Eigen computes what has less than 20 rows, columns
    // and depth together in another way.
    std::int64_t const last_depth = x.k - (t.blocks - 1) * t.depth;
    std::int64_t const least = std::max(rows, std::int64_t{20} - cols - last_depth);
    std::int64_t const all_rows = (least + tiling::row_multiple - 1) / tiling::row_multiple * tiling::row_multiple;
    TC* const c = x.c + i * x.ldc + j;
    A const* const bias = x.bias ? x.bias + j : nullptr;
    bool const add = x.mode == update::accumulate;

    A* sums = buffers_.tile();
    std::int64_t stride = cols;
    bool direct = false;
    if constexpr (std::is_same_v<A, TC>)
      if (all_rows == rows && !(add && bias)) {
        sums = c;
        stride = x.ldc;
        direct = true;
      }
    if (!direct || !add) fill_rows(all_rows, cols, bias, sums, stride);
    for (std::int64_t block = 0; block < t.blocks; ++block) {
      std::int64_t const p = block * t.depth, depth = std::min(t.depth, x.k - p);
      std::int64_t lda = x.lda, ldb = x.ldb;
      A const* const a = left(x, i, p, rows, all_rows, depth, lda);
      A const* const b = right(x, j, p, cols, depth, ldb);
      eigen_multiply(x.ta == transpose::yes, x.tb == transpose::yes, all_rows, cols, depth, a, lda, b, ldb, sums,
                     stride);
    }
    if (!direct) store_tile(sums, stride, rows, cols, c, x.ldc, add);
  }

 private:
  /// Rows [i, i + rows), depth [p, p + depth) of op(A), stored as A is: in place, or copied and filled up.
  A const* left(product<TA, TB, TC> const& x, std::int64_t i, std::int64_t p, std::int64_t rows, std::int64_t all_rows,
                std::int64_t depth, std::int64_t& lda) {
    TA const* const a = x.ta == transpose::yes ? x.a + p * x.lda + i : x.a + i * x.lda + p;
    if constexpr (std::is_same_v<A, TA>)
      if (all_rows == rows) return a;
    if (x.ta == transpose::yes)
      copy_block(a, x.lda, depth, rows, buffers_.left(), depth, all_rows);
    else
      copy_block(a, x.lda, rows, depth, buffers_.left(), all_rows, depth);
    lda = x.ta == transpose::yes ? all_rows : depth;
    return buffers_.left();
  }
  /// Depth [p, p + depth), columns [j, j + cols) of op(B), stored as B is: in place, or widened.
  A const* right(product<TA, TB, TC> const& x, std::int64_t j, std::int64_t p, std::int64_t cols, std::int64_t depth,
                 std::int64_t& ldb) {
    TB const* const b = x.tb == transpose::yes ? x.b + j * x.ldb + p : x.b + p * x.ldb + j;
    if constexpr (std::is_same_v<A, TB>) {
      return b;
    } else {
      std::int64_t const rows = x.tb == transpose::yes ? cols : depth;
      std::int64_t const width = x.tb == transpose::yes ? depth : cols;
      if (b != right_) copy_block(b, x.ldb, rows, width, buffers_.right(), rows, width);
      right_ = b;
      ldb = width;
      return buffers_.right();
    }
  }

  buffers& buffers_ = buffers::mine();
  A const* widened_rows_ = nullptr;  // of matvec
  TB const* right_ = nullptr;        // the block of op(B) that the right buffer holds
};

/// Outputs of one task of matvec: at least 64 KiB of weights, at most 64 tasks.
template <class TA, class TB, class TC>
std::int64_t matvec_outputs(product<TA, TB, TC> const& x) {
  std::int64_t const bytes = std::max<std::int64_t>(1, x.k * static_cast<std::int64_t>(sizeof(TB)));
  return (std::max((std::int64_t{1} << 16) / bytes, x.n / 64) + 16) / 16 * 16;
}

}  // namespace detail

/// The products of(0), ..., of(count - 1), each a product<...>; none may overlap what another one writes.
///
/// Arithmetic in float (double where C is double); 16-bit operands are widened tile by tile. An element of C is summed
/// in an order that n, k and its column decide (n > 1), whatever other rows there are; a product of at most eight rows
/// with a transposed B, as decoding has it, sums in an order of its own. Results do not depend on the number of
/// threads. Allocates nothing but buffers of a third of a MiB for each thread, once.
///
/// In a program compiled with OpenMP, Eigen starts threads of its own in each of ours, unless EIGEN_DONT_PARALLELIZE is
/// defined.
template <class Of>
void gemm_groups(int threads, std::int64_t count, Of const& of) {
  using worker_type = decltype(detail::tile_worker(of(0)));
  auto const tiling_of = [&](auto const& x) {
    return detail::tiling(x.m, x.n, x.k, sizeof(accum_t<std::remove_reference_t<decltype(*x.c)>>), count);
  };
  auto const tasks_of = [&](auto const& x) -> std::int64_t {
    if (x.m <= 0 || x.n <= 0) return 0;
    if (worker_type::is_matvec(x)) return (x.n - 1) / detail::matvec_outputs(x) + 1;
    auto const t = tiling_of(x);
    return t.down * t.across;
  };
  std::int64_t tasks = 0;
  for (std::int64_t g = 0; g < count; ++g) tasks += tasks_of(of(g));
  parallel_tasks(threads, tasks, [&](auto const& next) {
    // Each thread takes tasks in ascending order, so one walk over the products finds them all.
    std::int64_t group = 0, first = 0;
    auto x = of(0);
    std::int64_t size = tasks_of(x);
    worker_type worker(x);
    for (std::int64_t task = next(); task < tasks; task = next()) {
      while (task >= first + size) {
        first += size;
        x = of(++group);
        size = tasks_of(x);
        worker.forget();
      }
      if (worker_type::is_matvec(x)) {
        std::int64_t const outputs = detail::matvec_outputs(x), j = (task - first) * outputs;
        worker.run_matvec(x, j, std::min(outputs, x.n - j));
      } else {
        worker.run(x, tiling_of(x), task - first);
      }
    }
  });
}

/// One product.
template <class TA, class TB, class TC>
void gemm(int threads, product<TA, TB, TC> const& x) {
  gemm_groups(threads, 1, [&](std::int64_t) { return x; });
}
template <class TA, class TB, class TC>
void gemm(int threads, transpose ta, transpose tb, std::int64_t m, std::int64_t n, std::int64_t k, TA const* a,
          std::int64_t lda, TB const* b, std::int64_t ldb, TC* c, std::int64_t ldc, update mode = update::overwrite,
          accum_t<TC> const* bias = nullptr) {
  gemm(threads, product<TA, TB, TC>{ta, tb, m, n, k, a, lda, b, ldb, c, ldc, mode, bias});
}

/// One product of few elements of C and a great depth, which is cut in partial.extent(0) + 1 parts that run together:
/// the first goes to C, the others to `partial` (parts - 1, m, n), whence they are added in order.
template <class TA, class TB, class TC>
void gemm_deep(int threads, product<TA, TB, TC> const& x, host_view<TC, dyn, dyn, dyn> partial) {
  static_assert(std::is_same_v<TC, accum_t<TC>>, "blackmamba: gemm_deep: C is of an accumulation type");
  std::int64_t const parts = partial.extent(0) + 1, depth = (x.k + parts - 1) / parts;
  gemm_groups(threads, parts, [&](std::int64_t part) {
    auto y = x;
    std::int64_t const p = std::min(part * depth, x.k);
    y.k = std::min(depth, x.k - p);
    y.a += x.ta == transpose::yes ? p * x.lda : p;
    y.b += x.tb == transpose::yes ? p : p * x.ldb;
    if (part > 0) {
      y.c = partial.row(part - 1, 0);
      y.ldc = partial.stride(1);
      y.mode = update::overwrite;
      y.bias = nullptr;
    }
    return y;
  });
  if (parts == 1) return;
  using V = simd::pack<TC>;
  parallel_for(threads, x.m, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      simd::for_packs<V::lanes>(x.n, [&](std::int64_t j, auto lanes) {
        TC* const c = x.c + i * x.ldc + j;
        V sum = simd::load<V>(c, lanes);
        for (std::int64_t part = 0; part + 1 < parts; ++part) sum += simd::load<V>(partial.row(part, i) + j, lanes);
        simd::store(sum, c, lanes);
      });
  });
}

}  // namespace blackmamba::cpu
