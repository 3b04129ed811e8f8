#pragma once
#include <blackmamba/core/cuda/gemm_mma_cuda.cuh>
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
inline constexpr int buffer_bytes = 2048, buffers = 2;  // of each warp, for results on their way out
/// Of 384 threads with 168 registers each, the warpgroup that copies gives some to the two that multiply.
inline constexpr int producer_registers = 40, consumer_registers = 232;

/// Columns of a tile: 256, or 128 where that leaves most multiprocessors without a tile.
template <int Columns>
struct shape {
  static constexpr int columns = Columns, stages = Columns == 256 ? 4 : 6;
  static constexpr int b_bytes = columns * depth * 2, stage_bytes = a_bytes + b_bytes;
  static constexpr int shared_bytes = stages * stage_bytes + 8 * buffers * buffer_bytes + 1024;
};

/// The descriptions of matrices, and the product for all else. by_engine: the copy engine stores C.
template <class T, class TC>
struct arguments {
  CUtensorMap a, b, c;
  product<T, T, TC> x;
  bool wide, by_engine;
};

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
template <class Shape, class Product>
__device__ __forceinline__ bool find(Product const& x, group_table const& groups, unsigned& index, place& t) {
  constexpr unsigned height = 16;
  bool const by_depth = x.groups.by == grouping::depth;
  unsigned const count = static_cast<unsigned>(x.groups.count);
  unsigned const across = (static_cast<unsigned>(x.n) + Shape::columns - 1) / Shape::columns;
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
    t.column = static_cast<int>(j * Shape::columns);
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

/// What those that multiply have to know of a tile; no steps: there are no more tiles. Written before the tile's first
/// stage is announced, read before that stage is free: twice as many notes as stages suffice.
struct alignas(16) note {
  int row, row_end, column, group, steps, unused[3];
};

/// The thread that has the copy engine fill the ring, and fetch into the second-level cache what is to be added to.
template <class Shape, bool AlongA, bool AlongB, class T, class TC>
__device__ __forceinline__ void produce(arguments<T, TC> const& args, group_table const& groups, note* told,
                                        std::uint32_t memory, ring const& at) {
  constexpr int c_boxes = Shape::columns * static_cast<int>(sizeof(TC)) / 128;  // across a tile
  auto const& x = args.x;
  bool const by_depth = x.groups.by == grouping::depth;
  bool const adds = sizeof(TC) == 4 && x.mode == update::accumulate && args.by_engine;
  int stage = 0, told_of = 0;
  std::uint32_t parity = 1;  // a new barrier's phase before the first counts as over
  unsigned index = blockIdx.x;
  for (place t; find<Shape>(x, groups, index, t); index += gridDim.x) {
    int const steps = t.steps(), group = by_depth ? 0 : t.group, own = by_depth ? t.group : 0;
    int const a_boxes = (t.row_end - t.row + 63) / 64;  // what has no rows nobody reads
    told[told_of % (2 * Shape::stages)] = {t.row, t.row_end, t.column, t.group, steps, {}};
    ++told_of;
    int fetched = 0;
    for (int s = 0; s < steps; ++s) {
      int const p = t.depth + s * depth;
      phase_barrier::wait(at.free + 8 * stage, parity);
      bool const ends = !AlongA && !AlongB && by_depth && p + depth > t.depth_end;
      std::uint32_t const barrier = (ends ? at.end : at.full) + 8 * stage;
      std::uint32_t const a = memory + stage * Shape::stage_bytes, b = a + a_bytes;
      phase_barrier::arrive_expecting(barrier, a_boxes * block_bytes + Shape::b_bytes);
#pragma unroll
      for (int i = 0; i < rows / 64; ++i)
        if (i < a_boxes)
          copy_box(a + i * block_bytes, &args.a, barrier, AlongA ? p : t.row + 64 * i, AlongA ? t.row + 64 * i : p, 0);
      if constexpr (AlongB) {
        copy_box(b, &args.b, barrier, p, t.column, group);
      } else {
#pragma unroll
        for (int i = 0; i < Shape::columns / 64; ++i)
          copy_box(b + i * block_bytes, &args.b, barrier, t.column + 64 * i, p, group);
      }
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
  }
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
  for (place t; find<Shape>(x, groups, index, t); index += gridDim.x) {
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

/// Has the copy engine store a warp's 16 rows of the result, or add them to C, through two buffers of 2048 bytes.
template <class TC, int Tiles>
__device__ __forceinline__ void copy_out(float (&sum)[Tiles][4], CUtensorMap const& map, std::uint32_t memory, int row,
                                         int column, int group, int columns_left, bool add) {
  constexpr int wide = 128 / sizeof(TC);  // columns of a buffer
  int const lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 8 * Tiles / wide; ++i) {
    if (i * wide >= columns_left) break;
    std::uint32_t const to = memory + i % buffers * buffer_bytes;
    if (lane == 0) wait_for_copies_out<buffers - 1>();
    __syncwarp();
    if constexpr (sizeof(TC) == 2) {
      int const r = lane % 16, chunk = lane / 16;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        auto const& s = sum[8 * i + j];
        auto const& next = sum[8 * i + j + 1];
        std::uint32_t const w[4] = {packed_pair<TC>(s[0], s[1]), packed_pair<TC>(s[2], s[3]),
                                    packed_pair<TC>(next[0], next[1]), packed_pair<TC>(next[2], next[3])};
        store_matrices(to + static_cast<std::uint32_t>(r * 128 + ((j + chunk) ^ (r & 7)) * 16), w);
      }
    } else {
      int const r = lane / 4, chunk = lane % 4 / 2;
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int high = 0; high < 2; ++high) {
          int const at = (r + 8 * high) * 128 + ((2 * j + chunk) ^ r) * 16 + lane % 2 * 8;
          asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + at), "f"(sum[4 * i + j][2 * high]),
                       "f"(sum[4 * i + j][2 * high + 1])
                       : "memory");
        }
    }
    publish_shared_writes();
    __syncwarp();
    if (lane == 0) {
      if (sizeof(TC) == 4 && add)
        add_box_out(&map, to, column + i * wide, row, group);
      else
        copy_box_out(&map, to, column + i * wide, row, group);
      commit_copies_out();
    }
  }
}

/// A warpgroup that multiplies rows [64 part, 64 part + 64) of each tile.
template <class Shape, bool AlongA, bool AlongB, class T, class TC>
__device__ __forceinline__ void consume(arguments<T, TC> const& args, note const* told, std::uint32_t memory,
                                        ring const& at, int part) {
  constexpr int tiles = Shape::columns / 8;
  auto const& x = args.x;
  int const lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32 % 4;
  std::uint32_t const own = memory + Shape::stages * Shape::stage_bytes + (4 * part + warp) * buffers * buffer_bytes;
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
    }
    wait_for_warpgroup_products<0>();
    release(last);
    int const row = t.row + 64 * part + 16 * warp, rows_left = t.row_end - row;
    int const columns_left = static_cast<int>(x.n) - t.column, group = x.groups.by == grouping::depth ? t.group : 0;
    float const* const bias = x.bias ? x.bias + t.group * x.groups.bias_apart + t.column : nullptr;
    if (args.by_engine && rows_left >= 16) {
      if (bias)
#pragma unroll
        for (int j = 0; j < tiles; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            int const column = 8 * j + lane % 4 * 2 + e;
            float const plus = column < columns_left ? bias[column] : 0.0f;
            sum[j][e] += plus;
            sum[j][2 + e] += plus;
          }
      copy_out<TC>(sum, args.c, own, row, t.column, group, columns_left, x.mode == update::accumulate);
    } else {
      TC* const c = x.c + group * x.groups.c_apart + row * x.ldc + t.column;
      store_fragments<sizeof(TC) == 4>(sum, c, x.ldc, rows_left, columns_left, bias, x.mode == update::accumulate,
                                       args.wide);
    }
  }
  if (lane == 0) wait_for_copies_out<0, true>();
}

}  // namespace wgmma

template <class Shape, bool AlongA, bool AlongB, class T, class TC>
__global__ void __launch_bounds__(wgmma::threads, 1)
    wgmma_product([[maybe_unused]] __grid_constant__ wgmma::arguments<T, TC> const args) {
  if constexpr (warpgroup_instructions) {
    // The host knows by the barriers' bytes that this program has the kernel's code.
    __shared__ alignas(8) std::uint64_t barriers[3 * Shape::stages];
    __shared__ wgmma::group_table groups;
    __shared__ wgmma::note told[2 * Shape::stages];
    extern __shared__ unsigned char wgmma_memory[];
    unsigned char* const memory = wgmma_memory + (0u - shared_address(wgmma_memory)) % 1024;
    std::uint32_t const first = shared_address(barriers);
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
    } else {
      request_registers<wgmma::consumer_registers>();
      wgmma::consume<Shape, AlongA, AlongB>(args, told, shared_address(memory), at,
                                            static_cast<int>(threadIdx.x) / 128 - 1);
    }
  }
}

/// Whether the current device is a Hopper and this program has the kernel's code for it.
template <class Shape, bool AlongA, bool AlongB, class T, class TC>
bool wgmma_product_exists() {
  if (properties().major != 9) return false;
  static bool const exists = [] {
    cudaFuncAttributes attributes{};
    check("wgmma_product", cudaFuncGetAttributes(&attributes, wgmma_product<Shape, AlongA, AlongB, T, TC>));
    return attributes.sharedSizeBytes > 0;
  }();
  return exists;
}

/// Enqueues the product on a Hopper where the copy engine takes its operands. False elsewhere.
template <bool AlongA, bool AlongB, class Shape, class T, class TC>
bool wgmma_product_of_shape(char const* op, device::cuda const& policy, product<T, T, TC> const& x) {
  if (x.k <= 0 || !wgmma_product_exists<Shape, AlongA, AlongB, T, TC>()) return false;
  // The registers do not suffice for sums with 16-bit elements of C.
  if (sizeof(TC) == 2 && x.mode == update::accumulate) return false;
  // An operand of one group that is cut along the depth must lie across, so that groups end between its rows.
  bool const by_depth = x.groups.by == grouping::depth;
  if (by_depth && (AlongA || AlongB)) return false;
  std::int64_t const tiles = most_tiles<wgmma::rows, Shape::columns>(x);
  if (x.groups.count > wgmma::most_groups || tiles >= std::int64_t{1} << 30) return false;
  wgmma::arguments<T, TC> args{};
  std::int64_t const count = x.groups.by == grouping::rows ? x.groups.count : 1;
  if (!describe_matrices(args.a, x.a, 1, AlongA ? x.m : x.k, AlongA ? x.k : x.m, x.lda, 0, 64) ||
      !describe_matrices(args.b, x.b, count, AlongB ? x.n : x.k, AlongB ? x.k : x.n, x.ldb, x.groups.b_apart,
                         AlongB ? Shape::columns : wgmma::depth))
    return false;
  args.x = x;
  args.by_engine = describe_matrices(args.c, x.c, by_depth ? x.groups.count : 1, x.m, x.n, x.ldc,
                                     by_depth ? x.groups.c_apart : 0, 16);
  args.wide = stores_wide(x.c, x.ldc, x.groups.c_apart);
  auto const blocks = static_cast<unsigned>(std::min<std::int64_t>(tiles, properties().multiprocessors));
  launch(op, policy, {blocks, wgmma::threads, Shape::shared_bytes}, wgmma_product<Shape, AlongA, AlongB, T, TC>, args);
  return true;
}

template <bool AlongA, bool AlongB, class T, class TC>
bool wgmma_product_if_possible(char const* op, device::cuda const& policy, product<T, T, TC> const& x) {
  // Narrower tiles where few tokens meet the groups of a layer.
  if constexpr (AlongA && AlongB) {
    std::int64_t const groups = std::max<std::int64_t>(x.groups.count, 1);
    std::int64_t const down = groups * ((x.m / groups + wgmma::rows - 1) / wgmma::rows);
    if (x.groups.by == grouping::rows && 2 * down * ((x.n + 255) / 256) <= properties().multiprocessors)
      return wgmma_product_of_shape<AlongA, AlongB, wgmma::shape<128>>(op, policy, x);
  }
  return wgmma_product_of_shape<AlongA, AlongB, wgmma::shape<256>>(op, policy, x);
}

}  // namespace blackmamba::cuda::detail
