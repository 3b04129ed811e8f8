#pragma once
#include <blackmamba/core/cuda/gemm_mma_cuda.cuh>
#include <blackmamba/core/cuda/gemm_wgmma_gradient_cuda.cuh>
#include <blackmamba/core/cuda/gemm_wgmma_result_cuda.cuh>
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/product_cuda.cuh>
#include <blackmamba/core/cuda/tensor_map_cuda.cuh>
#include <blackmamba/core/cuda/warpgroup_cuda.cuh>
#include <blackmamba/core/numeric.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

/// Products of 16-bit operands on Hopper's tensor cores, with and without groups; gemm_mma_cuda.cuh has their twin for
/// other devices. Instantiated once for each element type, result type and layout that is asked for, with code only
/// where the compilation is one for sm_90a.
///
/// One block on each multiprocessor walks over the tiles (128 x 256). A thread has the copy engine fill a ring of
/// stages, 64 steps of the depth each, in one stream over all tiles; two warpgroups multiply them, 64 rows each, and
/// hand the result to the copy engine while the next tile's operands arrive. Only rows at a group's end, which no box
/// of the engine fits, are stored by the threads themselves. An element of C is summed in ascending order of the depth;
/// what is accumulated is added to memory once for each element, so that no order of additions is left open.
///
/// Nothing here may call a function or assert between the products: it would serialise them; so do branches around
/// them, or sequences of several widths that share the sums' registers.
///
/// What was tried and measured: bench/results/grouped_linear_cuda.md.
namespace blackmamba::cuda::detail {

namespace wgmma {

inline constexpr int depth = 64;
inline constexpr int rows = 128, threads = 384;
inline constexpr int producers = 128;               // threads of the warpgroup that copies
inline constexpr int most_groups = 128;             // whose places are held in shared memory
inline constexpr int block_bytes = 64 * depth * 2;  // of 64 rows of an operand in a stage
inline constexpr int a_bytes = rows * depth * 2;
/// Of 384 threads with 168 registers each, the warpgroup that copies gives some to the two that multiply.
inline constexpr int producer_registers = 24, consumer_registers = 240;

/// Columns of a tile: 256, or 128 where that leaves most multiprocessors without a tile.
template <int Columns>
struct shape {
  static constexpr int columns = Columns, stages = Columns == 256 ? 4 : 6;
  static constexpr int b_bytes = columns * depth * 2, stage_bytes = a_bytes + b_bytes;
  static constexpr int shared_bytes = stages * stage_bytes + 8 * buffers * buffer_bytes + 1024;
};

/// Columns of C that a tile has: gated units take two columns of the product for one.
template <class Shape, class Result>
inline constexpr int result_columns = is_gated<Result> ? Shape::columns / 2 : Shape::columns;

/// Where the groups lie, in shared memory: group e has [begin[e], begin[e + 1]) and, by rows, the rows of tiles from
/// first[e] on.
struct group_table {
  int begin[most_groups + 1], first[most_groups + 1];
};
template <class Product>
__device__ __forceinline__ void fill(group_table& groups, Product const& x) {
  int const count = static_cast<int>(x.groups.count);
  for (int e = static_cast<int>(threadIdx.x); e <= count; e += threads)
    groups.begin[e] =
        x.groups.by == grouping::none ? (e > 0 ? static_cast<int>(x.m) : 0) : static_cast<int>(x.groups.offsets[e]);
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e <= count; e += threads) {
    int tiles = 0;
    for (int f = 0; f < e; ++f) tiles += (groups.begin[f + 1] - groups.begin[f] + rows - 1) / rows;
    groups.first[e] = tiles;
  }
  __syncthreads();
}

/// A block's tile, as product_tile has it.
struct place {
  int group, row, row_end, column, depth, depth_end;
  __device__ __forceinline__ int steps() const { return (depth_end - depth + wgmma::depth - 1) / wgmma::depth; }
};

/// The index-th place, or the first one after it that has something to add, in steps of gridDim.x; false where there is
/// none left. Bands of 16 tiles' rows, as tile_in_bands; by rows they go on from group to group. Where at most half of
/// the blocks would have a tile in the last round, two share each of these, 64 rows each.
template <int Columns, class Product>
__device__ __forceinline__ bool find(Product const& x, group_table const& groups, unsigned& index, place& t) {
  constexpr unsigned height = 16;
  bool const by_depth = x.groups.by == grouping::depth;
  unsigned const count = static_cast<unsigned>(x.groups.count);
  unsigned const across = (static_cast<unsigned>(x.n) + Columns - 1) / Columns;
  unsigned const down =
      by_depth ? (static_cast<unsigned>(x.m) + rows - 1) / rows : static_cast<unsigned>(groups.first[count]);
  unsigned const each = down * across, total = by_depth ? count * each : each, spare = total % gridDim.x;
  unsigned const whole = 2 * spare <= gridDim.x ? total - spare : total;  // tiles that are not shared
  for (;; index += gridDim.x) {
    unsigned const tile = index < whole ? index : whole + (index - whole) / 2;
    if (tile >= total) return false;
    t.group = by_depth ? static_cast<int>(tile / each) : 0;
    if (by_depth && groups.begin[t.group] == groups.begin[t.group + 1]) continue;
    unsigned const within = tile - static_cast<unsigned>(t.group) * each;
    unsigned const band = within / (height * across), inside = within - band * height * across;
    unsigned const tall = down - band * height < height ? down - band * height : height;
    unsigned const j = inside / tall;
    int const i = static_cast<int>(band * height + inside - j * tall);
    t.column = static_cast<int>(j * Columns);
    if (by_depth) {
      t.row = i * rows;
      t.row_end = min(t.row + rows, static_cast<int>(x.m));
      t.depth = groups.begin[t.group];
      t.depth_end = groups.begin[t.group + 1];
    } else {
      while (i >= groups.first[t.group + 1]) ++t.group;
      t.row = groups.begin[t.group] + (i - groups.first[t.group]) * rows;
      t.row_end = min(t.row + rows, groups.begin[t.group + 1]);
      t.depth = 0;
      t.depth_end = static_cast<int>(x.k);
    }
    if (index < whole) return true;
    if ((index - whole) % 2 == 0)
      t.row_end = min(t.row_end, t.row + 64);
    else
      t.row += 64;
    if (t.row < t.row_end) return true;
  }
}

/// The addresses of barriers, one for each stage of each kind: its operands are there; nothing reads it any more; its
/// operands are there up to a group's end, and beyond it the next group's, which do not belong to it.
struct ring {
  std::uint32_t full, free, end;
};

/// Has the copy engine fetch B of a tile's step of the depth, from p on.
template <class Shape, bool AlongB, class T, class TC, class Result>
__device__ __forceinline__ void copy_right_operand(arguments<T, TC, Result> const& args, std::uint32_t to,
                                                   std::uint32_t barrier, int p, int column, int group) {
  if constexpr (is_gated<Result>) {
    copy_box(to, &args.b, barrier, p, column, group);
    copy_box(to + Shape::b_bytes / 2, &args.b, barrier, p, static_cast<int>(args.x.n) + column, group);
  } else if constexpr (AlongB) {
    copy_box(to, &args.b, barrier, p, column, group);
  } else {
#pragma unroll
    for (int i = 0; i < Shape::columns / 64; ++i)
      copy_box(to + i * block_bytes, &args.b, barrier, column + 64 * i, p, group);
  }
}

/// The thread that has the copy engine fill the ring, and fetch into the second-level cache what is to be added to.
template <class Shape, bool AlongA, bool AlongB, class T, class TC, class Result>
__device__ __forceinline__ void produce(arguments<T, TC, Result> const& args, group_table const& groups, note* told,
                                        std::uint32_t memory, ring const& at) {
  constexpr int c_boxes = Shape::columns * static_cast<int>(sizeof(TC)) / 128;  // across a tile
  auto const& x = args.x;
  bool const by_depth = x.groups.by == grouping::depth;
  bool const adds = sizeof(TC) == 4 && x.mode == update::accumulate && args.by_engine;
  int stage = 0, told_of = 0, begun = 0;
  std::uint32_t parity = 1;  // a new barrier's phase before the first counts as over
  unsigned index = blockIdx.x;
  for (place t; find<result_columns<Shape, Result>>(x, groups, index, t); index += gridDim.x) {
    int const steps = t.steps(), group = by_depth ? 0 : t.group, own = by_depth ? t.group : 0;
    int const a_boxes = (t.row_end - t.row + 63) / 64;  // what has no rows nobody reads
    told[told_of % (2 * Shape::stages)] = {t.row, t.row_end, t.column, t.group, steps, {}};
    if (told_of++ == 0 && x.early) {
      // B does not come from the kernel before, as A does.
      begun = min(steps, Shape::stages);
      for (int s = 0; s < begun; ++s) {
        phase_barrier::arrive_expecting(at.full + 8 * s, a_boxes * block_bytes + Shape::b_bytes);
        copy_right_operand<Shape, AlongB>(args, memory + s * Shape::stage_bytes + a_bytes, at.full + 8 * s,
                                          t.depth + s * depth, t.column, group);
      }
      wait_for_launch_ahead();
    }
    int fetched = 0;
    for (int s = 0; s < steps; ++s) {
      int const p = t.depth + s * depth;
      bool const ends = !AlongA && !AlongB && by_depth && p + depth > t.depth_end;
      std::uint32_t const barrier = (ends ? at.end : at.full) + 8 * stage;
      std::uint32_t const a = memory + stage * Shape::stage_bytes;
      if (s >= begun) {
        phase_barrier::wait(at.free + 8 * stage, parity);
        phase_barrier::arrive_expecting(barrier, a_boxes * block_bytes + Shape::b_bytes);
        copy_right_operand<Shape, AlongB>(args, a + a_bytes, barrier, p, t.column, group);
      }
#pragma unroll
      for (int i = 0; i < rows / 64; ++i)
        if (i < a_boxes)
          copy_box(a + i * block_bytes, &args.a, barrier, AlongA ? p : t.row + 64 * i, AlongA ? t.row + 64 * i : p, 0);
      if (adds)
        for (; fetched * steps < (s + 1) * (rows / 16) * c_boxes; ++fetched)
          if (t.row + fetched / c_boxes * 16 < t.row_end)
            prefetch_box(&args.c, t.column + fetched % c_boxes * (128 / static_cast<int>(sizeof(TC))),
                         t.row + fetched / c_boxes * 16, own);
      if (++stage == Shape::stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    begun = 0;
  }
  if (told_of == 0 && x.early) wait_for_launch_ahead();  // who comes next may rely on it
  told[told_of % (2 * Shape::stages)] = {};
  phase_barrier::wait(at.free + 8 * stage, parity);
  phase_barrier::arrive(at.full + 8 * stage);
}

/// The warps that put zeros where a stage has operands of the next group.
template <class Shape, class Product>
__device__ __forceinline__ void clear_ends(Product const& x, group_table const& groups, unsigned char* memory,
                                           ring const& at) {
  constexpr int clearing = producers - 32;
  int const thread = static_cast<int>(threadIdx.x) - 32;
  int passed = 0;
  std::uint32_t parities = 0;
  unsigned index = blockIdx.x;
  for (place t; find<Shape::columns>(x, groups, index, t); index += gridDim.x) {
    passed += t.steps();
    int const valid = (t.depth_end - t.depth) % depth;
    if (valid == 0) continue;
    int const stage = (passed - 1) % Shape::stages;
    phase_barrier::wait(at.end + 8 * stage, parities >> stage & 1);
    parities ^= 1u << stage;
    // In every block of 64 rows of A or B, a step of the depth is a row of 128 bytes.
    unsigned char* const first = memory + stage * Shape::stage_bytes;
    for (int i = valid * 128 + thread * 16; i < block_bytes; i += 16 * clearing)
#pragma unroll
      for (int block = 0; block < Shape::stage_bytes / block_bytes; ++block)
        *reinterpret_cast<uint4*>(first + block * block_bytes + i) = make_uint4(0, 0, 0, 0);
    publish_shared_writes();
    named_barrier<1, clearing>();
    if (thread == 0) phase_barrier::arrive(at.full + 8 * stage);
  }
}

/// The warps that put zeros where a token has no row.
template <class Product>
__device__ __forceinline__ void clear_tokens(Product const& x, bool wide) {
  auto const& r = x.result;
  wait_for_launch_ahead();
  int const lane = static_cast<int>(threadIdx.x) % 32;
  std::int64_t const every = std::int64_t{gridDim.x} * (producers - 32);
  for (std::int64_t first = std::int64_t{blockIdx.x} * (producers - 32) + threadIdx.x / 32 * 32 - 32; first < r.tokens;
       first += every) {
    unsigned without = __ballot_sync(0xffffffffu, first + lane < r.tokens && r.row[first + lane] < 0);
    for (; without != 0; without &= without - 1) {
      auto* const to = r.y + (first + __ffs(static_cast<int>(without)) - 1) * r.y_stride;
      std::int64_t const whole = wide ? x.n / 8 : 0;
      for (std::int64_t i = lane; i < whole; i += 32) reinterpret_cast<uint4*>(to)[i] = make_uint4(0, 0, 0, 0);
      for (std::int64_t i = 8 * whole + lane; i < x.n; i += 32) to[i].bits = 0;
    }
  }
}

/// A warpgroup that multiplies rows [64 part, 64 part + 64) of each tile.
template <class Shape, bool AlongA, bool AlongB, class T, class TC, class Result>
__device__ __forceinline__ void consume(arguments<T, TC, Result> const& args, note const* told, std::uint32_t memory,
                                        ring const& at, std::uint32_t loaded, int part) {
  constexpr int tiles = Shape::columns / 8;
  int const lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32 % 4;
  std::uint32_t const own = memory + Shape::stages * Shape::stage_bytes + (4 * part + warp) * buffers * buffer_bytes;
  auto out = [&] {
    if constexpr (is_gated_gradient<Result>)
      return gradient_departure<tiles, T, Result>(args, own, loaded + 8 * (4 * part + warp));
    else if constexpr (sizeof(TC) == 2)
      return departure<tiles, T, Result>(args, own);
    else
      return no_departure<tiles, T, TC, Result>(args, own);
  }();
  int stage = 0, told_of = 0;
  std::uint32_t parity = 0;
  auto const release = [&](int which) {
    if (lane == 0) phase_barrier::arrive(at.free + 8 * which);
  };
  auto const next_stage = [&] {
    if (++stage == Shape::stages) {
      stage = 0;
      parity ^= 1;
    }
  };
  for (;;) {
    phase_barrier::wait(at.full + 8 * stage, parity);
    note const t = told[told_of++ % (2 * Shape::stages)];
    if (t.steps == 0) break;
    if (t.row + 64 * part >= t.row_end) {  // nothing for this warpgroup
#pragma unroll 1
      for (int s = 0; s < t.steps; ++s) {
        phase_barrier::wait(at.full + 8 * stage, parity);
        release(stage);
        next_stage();
      }
      continue;
    }
    float sum[tiles][4];
    int last = 0;
#pragma unroll 1
    for (int s = 0; s < t.steps; ++s) {
      phase_barrier::wait(at.full + 8 * stage, parity);
      std::uint32_t const address = memory + stage * Shape::stage_bytes;
      std::uint64_t a = shared_operand<!AlongA>(address + part * block_bytes, block_bytes);
      std::uint64_t b = shared_operand<!AlongB>(address + a_bytes, block_bytes);
      begin_warpgroup_products();
#pragma unroll
      for (int q = 0; q < depth / 16; ++q) {
        multiply_in_warpgroup<T, !AlongA, !AlongB>(sum, a, b, s + q > 0);
        a += shared_operand_step<!AlongA>;
        b += shared_operand_step<!AlongB>;
      }
      commit_warpgroup_products();
      wait_for_warpgroup_products<1>();
      // All products but the latest step's are done: the stage before is free.
      if (s > 0) release(last);
      last = stage;
      next_stage();
      out.advance();
    }
    wait_for_warpgroup_products<0>();
    release(last);
    out.finish();
    out.take(sum, t, t.row + 64 * part + 16 * warp);
  }
  out.finish();
  if (lane == 0) wait_for_copies_out<0, true>();
}

}  // namespace wgmma

template <class Shape, bool AlongA, bool AlongB, class T, class TC, class Result>
__global__ void __launch_bounds__(wgmma::threads, 1)
    wgmma_product([[maybe_unused]] __grid_constant__ wgmma::arguments<T, TC, Result> const args) {
  if constexpr (warpgroup_instructions) {
    // The host knows by the barriers' bytes that this program has the kernel's code.
    __shared__ alignas(8) std::uint64_t barriers[3 * Shape::stages];
    __shared__ wgmma::group_table groups;
    __shared__ wgmma::note told[2 * Shape::stages];
    extern __shared__ unsigned char wgmma_memory[];
    unsigned char* const memory = wgmma_memory + (0u - shared_address(wgmma_memory)) % 1024;
    std::uint32_t const first = shared_address(barriers);
    let_next_launch_begin();
    std::uint32_t loaded = 0;
    if constexpr (is_gated_gradient<Result>) {
      __shared__ alignas(8) std::uint64_t of_warps[8];
      loaded = shared_address(of_warps);
      if (threadIdx.x < 8) phase_barrier::init(loaded + 8 * threadIdx.x, 1);
      if (threadIdx.x < 8) phase_barrier::publish_init();
    }
    wgmma::ring const at{first, first + 8 * Shape::stages, first + 16 * Shape::stages};
    if (threadIdx.x == 0) {
      for (int s = 0; s < Shape::stages; ++s) {
        phase_barrier::init(at.full + 8 * s, 1);
        phase_barrier::init(at.free + 8 * s, 8);  // a warp that multiplies arrives once
        phase_barrier::init(at.end + 8 * s, 1);
      }
      phase_barrier::publish_init();
    }
    wgmma::fill(groups, args.x);
    if (threadIdx.x < wgmma::producers) {
      release_registers<wgmma::producer_registers>();
      if (threadIdx.x == 0)
        wgmma::produce<Shape, AlongA, AlongB>(args, groups, told, shared_address(memory), at);
      else if (!AlongA && !AlongB && args.x.groups.by == grouping::depth && threadIdx.x >= 32)
        wgmma::clear_ends<Shape>(args.x, groups, memory, at);
      else if constexpr (goes_to_tokens<Result>) {
        if (threadIdx.x >= 32) wgmma::clear_tokens(args.x, args.wide);
      }
    } else {
      request_registers<wgmma::consumer_registers>();
      wgmma::consume<Shape, AlongA, AlongB>(args, told, shared_address(memory), at, loaded,
                                            static_cast<int>(threadIdx.x) / 128 - 1);
    }
  }
}

/// Whether the current device is a Hopper and this program has the kernel's code for it.
template <class Shape, bool AlongA, bool AlongB, class T, class TC, class Result>
bool wgmma_product_exists() {
  if (properties().major != 9) return false;
  static bool const exists = [] {
    cudaFuncAttributes attributes{};
    check("wgmma_product", cudaFuncGetAttributes(&attributes, wgmma_product<Shape, AlongA, AlongB, T, TC, Result>));
    return attributes.sharedSizeBytes > 0;
  }();
  return exists;
}

/// Enqueues the product on a Hopper where the copy engine takes its operands. False elsewhere.
template <bool AlongA, bool AlongB, class Shape, class T, class TC, class Result>
bool wgmma_product_of_shape(char const* op, device::cuda const& policy, product<T, T, TC, Result> const& x) {
  static_assert(std::is_same_v<Result, as_is> ||
                (AlongA && AlongB != is_gated_gradient<Result> && std::is_same_v<T, TC>));
  if (x.k <= 0 || !wgmma_product_exists<Shape, AlongA, AlongB, T, TC, Result>()) return false;
  // An operand of one group that is cut along the depth must lie across, so that groups end between its rows.
  bool const by_depth = x.groups.by == grouping::depth;
  if (by_depth && (AlongA || AlongB)) return false;
  // What produce() fetches before it waits counts as whole stages of one group.
  BLACKMAMBA_ASSERT(!(x.early && by_depth));
  // The registers do not suffice for sums with 16-bit elements of C.
  if (sizeof(TC) == 2 && (by_depth || x.mode == update::accumulate)) return false;
  constexpr int columns = wgmma::result_columns<Shape, Result>;
  std::int64_t const tiles = most_tiles<wgmma::rows, columns>(x);
  if (x.groups.count > wgmma::most_groups || tiles >= std::int64_t{1} << 30) return false;
  wgmma::arguments<T, TC, Result> args{};
  std::int64_t const count = x.groups.by == grouping::rows ? x.groups.count : 1;
  if (!describe_matrices(args.a, x.a, 1, AlongA ? x.m : x.k, AlongA ? x.k : x.m, x.lda, 0, 64) ||
      !describe_matrices(args.b, x.b, count, AlongB ? (is_gated<Result> ? 2 : 1) * x.n : x.k, AlongB ? x.k : x.n, x.ldb,
                         x.groups.b_apart, AlongB ? columns : wgmma::depth))
    return false;
  args.x = x;
  if constexpr (is_gated_gradient<Result>) {
    auto const& r = x.result;
    if (!describe_matrices(args.both, r.both, 2, x.m, x.n, r.both_stride, x.n, 16) ||
        !describe_matrices(args.c, r.d_both, 2, x.m, x.n, r.d_both_stride, x.n, 16))
      return false;
  }
  args.by_engine = !x.c || describe_matrices(args.c, x.c, by_depth ? x.groups.count : 1, x.m, x.n, x.ldc,
                                             by_depth ? x.groups.c_apart : 0, 16);
  args.wide = stores_wide(x.c, x.ldc, x.groups.c_apart);
  if constexpr (is_gated<Result>) {
    auto const& r = x.result;
    if (!args.by_engine || (r.both && !describe_matrices(args.both, r.both, 2, x.m, x.n, r.both_stride, x.n, 16)))
      return false;
  }
  if constexpr (goes_to_tokens<Result>) args.wide = args.wide && stores_wide(x.result.y, x.result.y_stride, 0);
  auto const blocks = static_cast<unsigned>(std::min<std::int64_t>(tiles, properties().multiprocessors));
  launch(op, policy,
         {.blocks = blocks, .threads = wgmma::threads, .shared_bytes = Shape::shared_bytes, .early = x.early},
         wgmma_product<Shape, AlongA, AlongB, T, TC, Result>, args);
  return true;
}

template <bool AlongA, bool AlongB, class T, class TC, class Result>
bool wgmma_product_if_possible(char const* op, device::cuda const& policy, product<T, T, TC, Result> const& x) {
  // Narrower tiles where few tokens meet the groups of a layer: reading B takes longer than multiplying with it, and
  // goes on more evenly in smaller pieces; or where the wider ones would leave most multiprocessors without a tile.
  if constexpr (AlongA && AlongB)
    if (x.groups.by == grouping::rows) {
      std::int64_t const groups = std::max<std::int64_t>(x.groups.count, 1), rows = x.m / groups;
      std::int64_t const down = groups * ((rows + wgmma::rows - 1) / wgmma::rows);
      std::int64_t const across = (x.n + 255) / 256 * (is_gated<Result> ? 2 : 1);
      if (rows <= wgmma::rows || 2 * down * across <= properties().multiprocessors)
        return wgmma_product_of_shape<AlongA, AlongB, wgmma::shape<128>>(op, policy, x);
    }
  return wgmma_product_of_shape<AlongA, AlongB, wgmma::shape<256>>(op, policy, x);
}

}  // namespace blackmamba::cuda::detail
