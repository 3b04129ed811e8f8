#pragma once
#include <blackmamba/core/config.hpp>
#include <blackmamba/core/cpu/gemm_kernel.hpp>
#include <blackmamba/core/cpu/matvec.hpp>
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/memory.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

/// Dense products on the host.
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

/// How a product is cut: tiles of C, each the work of one thread, and blocks of the depth, whose packed operands stay
/// in the second-level cache. Depends on the shape alone, so that results do not depend on the number of threads.
struct tiling {
  static constexpr std::int64_t most_rows = 128, most_cols = 240;
  /// Deepest block of a depth of elements of this size.
  static constexpr std::int64_t most_depth(std::size_t element) { return 1536 / static_cast<std::int64_t>(element); }

  std::int64_t rows = most_rows, cols = most_cols, depth = 0;
  std::int64_t down = 0, across = 0, blocks = 1;

  /// @param siblings  how many products of about this shape run together
  tiling(std::int64_t m, std::int64_t n, std::int64_t k, std::size_t element, std::int64_t siblings) {
    // 16 tiles share well among a few threads; smaller ones pay more for packing.
    constexpr std::int64_t enough = 16, least_rows = 32, least_cols = 96;
    auto const cut = [](std::int64_t extent, std::int64_t most, std::int64_t multiple) {
      std::int64_t const parts = std::max<std::int64_t>(1, (extent + most - 1) / most);
      return ((extent + parts - 1) / parts + multiple - 1) / multiple * multiple;
    };
    auto const fit = [&] {
      rows = cut(m, rows, register_rows);
      cols = cut(n, cols, 48);
      down = (m + rows - 1) / rows;
      across = (n + cols - 1) / cols;
    };
    for (fit(); down * across * siblings < enough && (rows > least_rows || cols > least_cols); fit())
      (rows > least_rows && (rows >= cols || cols <= least_cols) ? rows : cols) /= 2;
    depth = cut(k, most_depth(element), 16);
    if (depth > 0) blocks = (k + depth - 1) / depth;
  }
};

/// One thread's packed operands, and a tile of C where C is narrower than the arithmetic.
template <class A>
class gemm_buffers {
  static constexpr std::int64_t left_size = tiling::most_rows * (tiling::most_depth(sizeof(A)) + 16);
  static constexpr std::int64_t right_size = tiling::most_cols * tiling::most_depth(sizeof(A));

 public:
  /// Elements from left() on, where all of it serves as one buffer.
  static constexpr std::int64_t size = left_size + right_size + tiling::most_rows * tiling::most_cols;
  /// Between packed rows of the left operand: no power of two, so that rows don't meet in the same lines of the cache.
  static constexpr std::int64_t left_stride = left_size / tiling::most_rows;

  gemm_buffers(gemm_buffers const&) = delete;
  gemm_buffers& operator=(gemm_buffers const&) = delete;
  /// Allocated when the thread first asks, kept until it ends.
  static gemm_buffers& mine() {
    static thread_local gemm_buffers buffers;
    return buffers;
  }

  A* left() const { return memory_; }
  A* right() const { return memory_ + left_size; }
  A* tile() const { return memory_ + left_size + right_size; }

 private:
  gemm_buffers()
      : memory_(static_cast<A*>(memory_resource<space::host>::allocate(sizeof(A) * static_cast<std::size_t>(size)))) {}
  ~gemm_buffers() { memory_resource<space::host>::deallocate(memory_); }

  A* memory_;
};

/// Computes tiles of products on one thread.
template <class TA, class TB, class TC>
class tile_worker {
  using A = accum_t<TC>;
  using buffers = gemm_buffers<A>;
  static constexpr std::int64_t width = simd::pack<A>::lanes;

 public:
  explicit tile_worker(product<TA, TB, TC> const&) {}  // names the types

  /// To be called before the tiles of another product.
  void forget() {
    left_ = nullptr;
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
    if constexpr (std::is_same_v<A, TA>) {
      left_ = x.a;
      left_stride_ = x.lda;
    } else if (!left_) {
      left_ = buffers_.left();
      left_stride_ = x.k;
      pack_left_rows(x.a, x.lda, x.m, x.k, buffers_.left(), x.k);
    }
    matvec(x.m, cols, x.k, left_, left_stride_, x.b + j * x.ldb, x.ldb, x.c + j, x.ldc, x.bias ? x.bias + j : nullptr);
  }
  /// The index-th tile; tiles that share columns of B follow each other, so that packed columns serve several.
  void run(product<TA, TB, TC> const& x, tiling const& t, std::int64_t index) {
    std::int64_t const i = index % t.down * t.rows, j = index / t.down * t.cols;
    std::int64_t const rows = std::min(t.rows, x.m - i), cols = std::min(t.cols, x.n - j);
    // Where C is narrower than the arithmetic, sums over several blocks are kept apart until they are complete.
    bool const direct = std::is_same_v<A, TC> || t.blocks == 1;
    for (std::int64_t block = 0; block < t.blocks; ++block) {
      std::int64_t const p = block * t.depth, depth = std::min(t.depth, x.k - p);
      A const* const bias = block == 0 && x.bias ? x.bias + j : nullptr;
      select_left(x, i, p, rows, depth);
      select_right(x, j, p);
      if (direct)
        multiply(x, rows, cols, depth, bias, x.c + i * x.ldc + j, x.ldc, block > 0 || x.mode == update::accumulate);
      else
        multiply(x, rows, cols, depth, bias, buffers_.tile(), tiling::most_cols, block > 0);
    }
    if (!direct)
      store_tile(buffers_.tile(), tiling::most_cols, rows, cols, x.c + i * x.ldc + j, x.ldc,
                 x.mode == update::accumulate);
  }

 private:
  /// Points left_ at rows [i, i + rows), depth [p, p + depth) of op(A): in place where the memory suits the register
  /// tile.
  void select_left(product<TA, TB, TC> const& x, std::int64_t i, std::int64_t p, std::int64_t rows,
                   std::int64_t depth) {
    left_ = buffers_.left();
    left_stride_ = buffers_.left_stride;
    if (x.ta == transpose::yes) {
      pack_left_interleaved(x.a + p * x.lda + i, x.lda, rows, depth, buffers_.left());
    } else if constexpr (std::is_same_v<A, TA>) {
      left_ = x.a + i * x.lda + p;
      left_stride_ = x.lda;
    } else {
      pack_left_rows(x.a + i * x.lda + p, x.lda, rows, depth, buffers_.left(), left_stride_);
    }
  }
  /// Sets right_ to op(B) from (p, j) on; it is packed where it is first used.
  void select_right(product<TA, TB, TC> const& x, std::int64_t j, std::int64_t p) {
    TB const* const b = x.tb == transpose::yes ? x.b + j * x.ldb + p : x.b + p * x.ldb + j;
    if (b == right_) return;
    right_ = b;
    right_packed_ = 0;
  }

  template <class T>
  void multiply(product<TA, TB, TC> const& x, std::int64_t rows, std::int64_t cols, std::int64_t depth, A const* bias,
                T* out, std::int64_t out_stride, bool add) {
    // Panels of three packs; four packs are two and two.
    for (std::int64_t j = 0; j < cols;) {
      std::int64_t const packs = (cols - j + width - 1) / width;
      A const* const b = bias ? bias + j : nullptr;
      if (packs >= 3 && packs != 4) {
        panel<3>(x, j, rows, std::min(cols - j, 3 * width), depth, b, out + j, out_stride, add);
        j += 3 * width;
      } else if (packs >= 2) {
        panel<2>(x, j, rows, std::min(cols - j, 2 * width), depth, b, out + j, out_stride, add);
        j += 2 * width;
      } else {
        panel<1>(x, j, rows, std::min(cols - j, width), depth, b, out + j, out_stride, add);
        j += width;
      }
    }
  }

  template <int Packs, class T>
  void panel(product<TA, TB, TC> const& x, std::int64_t j, std::int64_t rows, std::int64_t cols, std::int64_t depth,
             A const* bias, T* out, std::int64_t out_stride, bool add) {
    constexpr std::int64_t full = Packs * width;
    A const* right = buffers_.right() + j * depth;
    std::int64_t right_stride = full;
    bool in_place = false;
    if constexpr (std::is_same_v<A, TB>)
      if (x.tb == transpose::no && rows <= register_rows && cols == full) {  // read once: packing would not pay
        right = right_ + j;
        right_stride = x.ldb;
        in_place = true;
      }
    if (!in_place && j >= right_packed_) {
      A* const to = buffers_.right() + j * depth;
      if (x.tb == transpose::yes)
        pack_right_transposed(right_ + j * x.ldb, x.ldb, cols, depth, to, full);
      else
        pack_right_rows(right_ + j, x.ldb, cols, depth, to, full);
      right_packed_ = j + full;
    }
    A initial[std::size_t{full}], tile[std::size_t{register_rows * full}];
    if (bias && cols < full) {
      std::copy_n(bias, cols, initial);
      std::fill(initial + cols, initial + full, A(0));
      bias = initial;
    }
    for (std::int64_t i = 0; i < rows; i += register_rows) {
      int const strip = static_cast<int>(std::min<std::int64_t>(register_rows, rows - i));
      auto const into = [&](A* target, std::int64_t stride, bool sum) {
        if (x.ta == transpose::yes)
          register_tile<A, Packs, left_order::interleaved>(depth, left_ + i * depth, 1, strip, right, right_stride,
                                                           bias, target, stride, sum);
        else
          register_tile<A, Packs, left_order::rows>(depth, left_ + i * left_stride_, left_stride_, strip, right,
                                                    right_stride, bias, target, stride, sum);
      };
      if constexpr (std::is_same_v<A, T>)
        if (cols == full) {
          into(out + i * out_stride, out_stride, add);
          continue;
        }
      into(tile, full, false);
      store_tile(tile, full, strip, cols, out + i * out_stride, out_stride, add);
    }
  }

  buffers& buffers_ = buffers::mine();
  A const* left_ = nullptr;
  std::int64_t left_stride_ = 0;
  TB const* right_ = nullptr;      // the part of op(B) that the right buffer holds
  std::int64_t right_packed_ = 0;  // and how many of its columns
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
/// in an order that depends on k alone; a product of at most eight rows with a transposed B, as decoding has it, sums
/// in an order of its own. Results do not depend on the number of threads.
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
