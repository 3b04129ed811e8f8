#pragma once
#include <blackmamba/core/cuda/copy_async_cuda.cuh>
#include <blackmamba/core/cuda/elementwise_cuda.cuh>
#include <blackmamba/core/cuda/launch_cuda.cuh>
#include <blackmamba/core/cuda/stored_pack_cuda.cuh>
#include <blackmamba/ops/embedding/embedding.hpp>
#include <blackmamba/ops/embedding/embedding_order_cuda.cuh>

#include <cstdint>
#include <string>

namespace blackmamba {

namespace detail {

template <class T>
struct embedding_elements {
  view<space::device, std::int32_t const, dyn> token;
  view<space::device, T const, dyn, dyn> table;
  view<space::device, T, dyn, dyn> y;

  template <int N>
  __device__ cuda::stored_pack<N, T> load(std::int64_t r, std::int64_t c, std::int64_t left) const {
    std::int32_t const v = token(r);
    cuda::stored_pack<N, T> x;
    if (v >= 0 && v < table.extent(0))
      x.load(table.row(v) + c, left);
    else
      x.poison();
    return x;
  }
  template <int N>
  __device__ void finish(cuda::stored_pack<N, T> const& x, std::int64_t r, std::int64_t c, std::int64_t left) const {
    x.store(y.row(r) + c, left);
  }
};

/// A block of embedding_add, one warp, takes the runs that begin among so many sorted positions, which reach into two
/// times as many more; rows are on their way in `stages` groups of `stage_rows`.
struct embedding_add_shape {
  static constexpr int slot = static_cast<int>(embedding::run_rows), window = 3 * slot;
  static constexpr int stages = 4, stage_rows = 4, rows = stages * stage_rows;
};

template <class T>
struct embedding_sums {
  using A = accum_t<T>;
  view<space::device, T const, dyn, dyn> d_y;
  view<space::device, A, dyn, dyn> d_table;
  embedding::sorted_rows<space::device, A> sorted;
  std::uint32_t tiles;  // of columns
};

/// Adds one to a counter and says whether that makes `count`: then all lanes see what the warps before have stored.
__device__ __forceinline__ bool embedding_arrives_last(std::uint32_t* counter, std::uint32_t count, int lane) {
  std::uint32_t before = 0;
  __syncwarp();
  if (lane == 0) {
    __threadfence();
    before = atomicAdd(counter, 1u);
    __threadfence();
  }
  before = __shfl_sync(0xffffffffu, before, 0);
  __syncwarp();
  return before + 1 == count;
}

/// A warp sums runs over a tile of columns, each lane for N of them: row after row, with many rows on their way to
/// shared memory, where a lane reads what it alone copied. A run that is all of its token goes to the table. Of the
/// others the sums are stored; the warp that is the last of a group with its run adds the group's, and the last with
/// its group adds those.
template <bool Packs, class T>
__global__ void __launch_bounds__(32) embedding_add(__grid_constant__ embedding_sums<T> const a) {
  using A = accum_t<T>;
  using shape = embedding_add_shape;
  constexpr int N = Packs ? cuda::pack_width<T> : 1, stage_rows = shape::stage_rows;
  constexpr unsigned all = 0xffffffffu;
  __shared__ __align__(16) T rows_here[shape::rows][32 * N];
  __shared__ __align__(16) std::uint32_t position_of[shape::window];
  __shared__ std::uint32_t token_of[shape::window];
  __shared__ std::uint8_t run_at[shape::slot + 8];  // where in the window runs begin, and where the last ends
  int const lane = static_cast<int>(threadIdx.x);
  std::int64_t const rows = a.d_y.extent(0), begin = std::int64_t{blockIdx.x / a.tiles} * shape::slot;
  std::uint32_t const tile = blockIdx.x % a.tiles;
  std::int64_t const column = (std::int64_t{tile} * 32 + lane) * N;
  bool const live = column < a.d_y.extent(1);
  cuda::wait_for_launch_ahead();

  // The window's runs: those whose first position is in the slot.
  int runs = 0, start = 0, stop = shape::window;
  {
    std::uint32_t position[shape::window / 32], token[shape::window / 32];
#pragma unroll
    for (int u = 0; u < shape::window / 32; ++u) {
      std::int64_t const i = begin + u * 32 + lane;
      position[u] = i < rows ? a.sorted.order.data()[i] : embedding_nothing;
      token[u] = i < rows ? a.sorted.token.data()[i] : embedding_nothing;
    }
#pragma unroll
    for (int u = 0; u < shape::window / 32; ++u) {
      position_of[u * 32 + lane] = position[u] & ~embedding_mark;
      token_of[u * 32 + lane] = token[u];
      bool const head = (position[u] & embedding_mark) != 0;
      bool const ours = head && u * 32 < shape::slot && token[u] != embedding_nothing;
      unsigned const heads = __ballot_sync(all, head), our_heads = __ballot_sync(all, ours);
      if (ours) run_at[runs + __popc(our_heads & ((1u << lane) - 1))] = static_cast<std::uint8_t>(u * 32 + lane);
      if (runs == 0 && our_heads != 0) start = u * 32 + __ffs(static_cast<int>(our_heads)) - 1;
      runs += __popc(our_heads);
      unsigned const ends = heads & ~our_heads;  // the first head that is not ours ends the last run that is
      if (stop == shape::window && ends != 0) stop = u * 32 + __ffs(static_cast<int>(ends)) - 1;
    }
    if (runs == 0) return;
    if (lane == 0) run_at[runs] = static_cast<std::uint8_t>(stop);
    __syncwarp();
  }

  // A stage is the rows of four places in the window; the last holds the place after the last row.
  int const first_stage = start / stage_rows, last_stage = stop / stage_rows;
  auto const in_memory = [&](int stage) { return &rows_here[stage % shape::stages * stage_rows][lane * N]; };
  auto const* const base = reinterpret_cast<unsigned char const*>(a.d_y.data() + column);
  std::uint64_t const stride = static_cast<std::uint64_t>(a.d_y.stride(0)) * sizeof(T);
  auto const ask = [&](int stage) {
    int const i = stage * stage_rows;
    if (live && i < stop) {
      uint4 const four = *reinterpret_cast<uint4 const*>(&position_of[i]);
      std::uint32_t const position[stage_rows] = {four.x, four.y, four.z, four.w};
      bool const whole = i >= start && i + stage_rows <= stop;
#pragma unroll
      for (int u = 0; u < stage_rows; ++u) {
        if (!whole && (i + u < start || i + u >= stop)) continue;
        T* const to = in_memory(stage) + u * 32 * N;
        T const* const from = reinterpret_cast<T const*>(base + position[u] * stride);
        if constexpr (Packs)
          cuda::copy_async(cuda::shared_address(to), from);
        else
          *to = *from;
      }
    }
    cuda::commit_copies();  // an empty group at the end keeps the count
  };

  cuda::pack<A, N> sum;
  auto const clear = [&] {
#pragma unroll
    for (int n = 0; n < N; ++n) sum[n] = 0;
  };
  // A lane's sums are wider than 16 bytes where T is narrower than A. Then two neighbours exchange halves, so that what
  // lanes access at once has no gaps within 32 bytes: sums are of the M columns at column_of(0), the M at column_of(1).
  constexpr int M = N * sizeof(A) > 16 ? N / 2 : N, parts = N / M;
  auto const column_of = [&](int part) {
    return parts == 1 ? column : column / (2 * N) * (2 * N) + part * N + lane % 2 * M;
  };
  auto const exchange = [&] {
    if constexpr (parts == 2) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        A const other = __shfl_xor_sync(all, lane % 2 == 0 ? sum[M + m] : sum[m], 1);
        (lane % 2 == 0 ? sum.v[M + m] : sum.v[m]) = other;
      }
    }
  };
  auto const each_part = [&](auto&& body) {
#pragma unroll
    for (int part = 0; part < parts; ++part)
      if (column_of(part) < a.d_y.extent(1)) body(part, column_of(part));
  };
  struct table_row {
    cuda::stored_pack<M, A> part[parts];
  };
  auto const load_row = [&](table_row& to, std::uint32_t v) {
    each_part([&](int part, std::int64_t c) { to.part[part].load(a.d_table.row(v) + c); });
  };
  auto const add_to_table = [&](table_row const& before, cuda::pack<A, N> const& sum, std::uint32_t v) {
    each_part([&](int part, std::int64_t c) {
      auto total = before.part[part].widened();
#pragma unroll
      for (int m = 0; m < M; ++m) total[m] += sum[part * M + m];
      cuda::store_pack_whole<M>(a.d_table.row(v) + c, total);
    });
  };
  auto const keep_partial = [&](cuda::pack<A, N> const& sum, std::int64_t row) {
    each_part([&](int part, std::int64_t c) {
      cuda::pack<A, M> some;
#pragma unroll
      for (int m = 0; m < M; ++m) some[m] = sum[part * M + m];
      cuda::store_pack_whole<M>(a.sorted.partial.row(row) + c, some);
    });
  };
  auto const sum_partial = [&](std::int64_t from, std::int64_t apart, std::uint32_t count) {
    constexpr std::uint32_t several = 4;
    cuda::pack<A, N> sum{};
#pragma unroll 1
    for (std::uint32_t k = 0; k < count; k += several) {
      table_row some[several];
#pragma unroll
      for (std::uint32_t u = 0; u < several; ++u)
        if (k + u < count)
          each_part([&](int part, std::int64_t c) {
            some[u].part[part].load(a.sorted.partial.row(from + (k + u) * apart) + c);
          });
#pragma unroll
      for (std::uint32_t u = 0; u < several; ++u)
        if (k + u < count)
          each_part([&](int part, std::int64_t) {
            auto const x = some[u].part[part].widened();
#pragma unroll
            for (int m = 0; m < M; ++m) sum[part * M + m] += x[m];
          });
    }
    return sum;
  };
  // The end of a run that is not all of its token.
  auto const finish_split = [&](cuda::pack<A, N> total, int from, std::uint32_t v) {
    constexpr std::uint32_t run_rows = embedding::run_rows, group_runs = embedding::group_runs;
    uint2 const bounds = reinterpret_cast<uint2 const*>(a.sorted.first.data())[v];
    std::uint32_t const count = (bounds.y - bounds.x) / run_rows, slot = bounds.x / run_rows;
    std::uint32_t const run =
        (static_cast<std::uint32_t>(begin) + static_cast<std::uint32_t>(from) - bounds.x) / run_rows;
    std::uint32_t const group = run / group_runs, groups = (count + group_runs - 1) / group_runs;
    std::uint32_t const of_group = group + 1 < groups ? group_runs : count - group * group_runs;
    std::int64_t const group_slot = std::int64_t{slot} + group * group_runs;
    auto const counter = [&](std::int64_t i) { return a.sorted.arrived.data() + i * a.tiles + tile; };
    keep_partial(total, std::int64_t{slot} + run);
    if (!embedding_arrives_last(counter(group_slot), of_group, lane)) return;
    table_row before;
    load_row(before, v);
    total = sum_partial(group_slot, 1, of_group);
    if (groups > 1) {
      keep_partial(total, group_slot);
      if (!embedding_arrives_last(counter(a.sorted.partial.extent(0) + slot), groups, lane)) return;
      load_row(before, v);
      total = sum_partial(slot, group_runs, groups);
    }
    add_to_table(before, total, v);
  };

#pragma unroll 1
  for (int stage = 0; stage < shape::stages - 1; ++stage) ask(first_stage + stage);
  clear();
  int run = 0, run_begin = start, run_end = run_at[1];
  for (int stage = first_stage; stage <= last_stage; ++stage) {
    int const i = stage * stage_rows;
    auto const add = [&](int u) {
      auto const x = cuda::load_pack<N>(in_memory(stage) + u * 32 * N);
#pragma unroll
      for (int n = 0; n < N; ++n) sum[n] += x[n];
    };
    if (i >= run_begin && i + stage_rows <= run_end) {  // within a run
      ask(stage + shape::stages - 1);
      cuda::wait_for_copies<shape::stages - 1>();
#pragma unroll
      for (int u = 0; u < stage_rows; ++u) add(u);
      continue;
    }
    // Runs end here. Of those that are all of their tokens the table's rows come together; of the others, which are
    // long, no two can.
    std::uint32_t token[stage_rows], split_token = 0;  // whose run ends before the stage's row u
    bool ends[stage_rows];
    int split_from = -1;
    table_row before[stage_rows];
    cuda::pack<A, N> split_sum;
#pragma unroll
    for (int u = 0; u < stage_rows; ++u) {
      ends[u] = i + u == run_end;
      if (!ends[u]) continue;
      token[u] = token_of[run_begin];
      if ((token[u] & embedding_mark) == 0)
        load_row(before[u], token[u]);
      else
        split_from = run_begin;
      run_begin = run_end;
      run_end = ++run < runs ? run_at[run + 1] : 2 * shape::window;
    }
    ask(stage + shape::stages - 1);
    cuda::wait_for_copies<shape::stages - 1>();
#pragma unroll
    for (int u = 0; u < stage_rows; ++u) {
      if (ends[u]) {
        exchange();
        if ((token[u] & embedding_mark) == 0) {
          add_to_table(before[u], sum, token[u]);
        } else {
          split_sum = sum;
          split_token = token[u] & ~embedding_mark;
        }
        clear();
      }
      if (i + u >= start && i + u < stop) add(u);
    }
    if (split_from >= 0) finish_split(split_sum, split_from, split_token);
  }
}

}  // namespace detail

/// Bytes: forward two of T for each element of y; backward T for each of d_y, and accum_t<T> read and written for each
/// element of a row of d_table that occurs. Backward is a sort of the positions (its tokens come from the L2 cache) and
/// a kernel that adds. Kernels for each T: forward and the latter, each for packs and for single elements.
template <>
struct backend<embedding, device::cuda> {
  template <class T>
  static void forward(device::cuda const& policy, view<space::device, std::int32_t const, dyn> token,
                      view<space::device, T const, dyn, dyn> table, view<space::device, T, dyn, dyn> y) {
    constexpr int n = cuda::pack_width<T>;
    std::int64_t const rows = y.extent(0), width = y.extent(1);
    detail::embedding_elements<T> const op{token, table, y};
    if (cuda::rows_in_packs<n>(table) && cuda::rows_in_packs<n>(y))
      cuda::launch_elements<n, 4>("embedding", policy, rows, width, op);
    else
      cuda::launch_elements<1, 4>("embedding", policy, rows, width, op);
  }

  template <class T>
  static void backward(device::cuda const& policy, view<space::device, std::int32_t const, dyn> token,
                       view<space::device, T const, dyn, dyn> d_y, view<space::device, accum_t<T>, dyn, dyn> d_table,
                       embedding::sorted_rows<space::device, accum_t<T>> const& sorted) {
    char const* const op = "embedding.backward";
    std::int64_t const rows = d_y.extent(0), vocabulary = d_table.extent(0);
    check_that(rows <= std::int64_t{1} << 31, op, "token", std::to_string(rows) + " rows", "at most 2^31 on cuda");
    if (vocabulary == 0) return;
    constexpr int n = cuda::pack_width<T>;
    bool const packs = cuda::rows_in_packs<n>(d_y) && cuda::rows_in_packs<n>(d_table);
    std::int64_t const tile = 32 * (packs ? n : 1), tiles = (d_y.extent(1) + tile - 1) / tile;
    detail::embedding_launch_order<embedding::run_rows>(op, policy, token.data(), rows, vocabulary,
                                                        {.order = sorted.order.data(),
                                                         .token = sorted.token.data(),
                                                         .first = sorted.first.data(),
                                                         .cleared = sorted.arrived.data(),
                                                         .clear_count = 2 * sorted.partial.extent(0) * tiles});
    detail::embedding_sums<T> const sums{d_y, d_table, sorted, static_cast<std::uint32_t>(tiles)};
    std::int64_t const slots = (rows + embedding::run_rows - 1) / embedding::run_rows;
    cuda::launch(op, policy, {.blocks = cuda::blocks_for(slots * tiles, 1), .threads = 32, .early = true},
                 packs ? detail::embedding_add<true, T> : detail::embedding_add<false, T>, sums);
  }
};

}  // namespace blackmamba
