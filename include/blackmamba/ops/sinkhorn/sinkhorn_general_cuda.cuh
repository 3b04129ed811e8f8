#pragma once
#include <blackmamba/ops/sinkhorn/sinkhorn_sweeps_cuda.cuh>

#include <algorithm>
#include <limits>

/// Any number of experts, float or double, every mode: K lies in memory (in the L2 cache, as a rule), columns apart, so
/// that neighbouring threads read neighbouring rows. Instantiations: sinkhorn_general for float and double.
///
/// One launch of a cooperative grid; a sweep ends in one grid barrier, a Newton step in two more. Every block sums all
/// partial sums in the same order and decides the same.
namespace blackmamba::cuda::detail {

inline constexpr int sinkhorn_warps = 16;  // at most

/// Numbers of a block in shared memory.
template <class A>
struct sinkhorn_shared {
  double *columns, *g, *marginal, *saved_g, *saved_marginal, *step, *merge;
  A *base, *w, *previous, *d1, *s, *tile;

  static constexpr int tile_rows = 32;
  static std::size_t bytes(std::int64_t experts, std::int64_t warps, bool newton) {
    auto const e = static_cast<std::size_t>(experts), all_warps = static_cast<std::size_t>(warps);
    return sizeof(double) * (all_warps * e + 5 * e + 2 * all_warps) +
           sizeof(A) * (4 * e + (newton ? e * e + tile_rows * (e + 1) : 0));
  }
  __device__ sinkhorn_shared(unsigned char* memory, int e, int warps, bool newton) {
    columns = reinterpret_cast<double*>(memory);
    g = columns + warps * e;
    marginal = g + e;
    saved_g = marginal + e;
    saved_marginal = saved_g + e;
    step = saved_marginal + e;
    merge = step + e;
    base = reinterpret_cast<A*>(merge + 2 * warps);
    w = base + e;
    previous = w + e;
    d1 = previous + e;
    s = d1 + e;
    tile = s + (newton ? e * e : 0);
  }
};

template <class A>
class sinkhorn_general_sweeps {
 public:
  __device__ sinkhorn_general_sweeps(sinkhorn_arguments<A> const& p, sinkhorn_shared<A> const& shared)
      : p_(p),
        shared_(shared),
        e_(p.experts),
        threads_(static_cast<int>(blockDim.x)),
        thread_(static_cast<int>(threadIdx.x)),
        warps_(threads_ / 32),
        warp_(thread_ / 32),
        lane_(thread_ % 32),
        column_stride_(p.kernel_rows) {
    std::int64_t const each = ((p.rows + gridDim.x - 1) / gridDim.x + 31) / 32 * 32;
    first_ = min(p.rows, each * blockIdx.x);
    last_ = min(p.rows, first_ + each);
  }

  __device__ std::int64_t voters() const { return voters_; }
  __device__ std::int64_t first() const { return first_; }
  __device__ std::int64_t last() const { return last_; }

  __device__ void count_voters() {
    int refused = 0;
    for (std::int64_t r = first_ + thread_; r < last_; r += threads_) {
      A const* const x = p_.logits + r * p_.logits_stride;
      A test = 0;
      for (int j = 0; j < e_; ++j) test += x[j] * A(0);
      refused += test == A(0) ? 0 : 1;
    }
    for (int j = lane_; j < e_; j += 32) shared_.columns[warp_ * e_ + j] = 0;
    __syncwarp();
    refused = warp_sum(refused);
    if (lane_ == 0) shared_.columns[warp_ * e_] = refused;
    reduce_columns(shared_.step);
    voters_ = p_.rows - static_cast<std::int64_t>(shared_.step[0]);
    __syncthreads();
  }
  /// K_ij = e^(beta (x_ij - max_j x_ij) + base_j - m_i) with m_i such that the largest K of a row is 1.
  __device__ void build_shifted(A const* base) {
    each_row([&](std::int64_t r, A const* x, A* k, bool votes) {
      A largest = x[0];
      for (int j = 1; j < e_; ++j) largest = math::max(largest, x[j]);
      A shift = A(-INFINITY);
      for (int j = 0; j < e_; ++j) shift = math::max(shift, math::fma(p_.beta, x[j] - largest, base[j]));
      for (int j = 0; j < e_; ++j)
        k[j * column_stride_] = votes ? math::exp(math::fma(p_.beta, x[j] - largest, base[j]) - shift) : A(0);
    });
  }
  /// K_ij = e^(beta x_ij), as published.
  __device__ void build_published() {
    each_row([&](std::int64_t, A const* x, A* k, bool votes) {
      for (int j = 0; j < e_; ++j) k[j * column_stride_] = votes ? math::exp(p_.beta * x[j]) : A(0);
    });
  }
  /// sums_j = sum_i K_ij d_i with d_i = mass / (sum_j K_ij w_j + epsilon), or 1 where there is no w.
  __device__ void sweep(A const* w, A mass, A epsilon, double* sums) {
    double* const columns = shared_.columns + warp_ * e_;
    for (int j = lane_; j < e_; j += 32) columns[j] = 0;
    __syncwarp();
    constexpr int group = 2;  // rows of a thread side by side
    for (std::int64_t r = first_ + warp_ * 32 * group; r < last_; r += std::int64_t{threads_} * group) {
      A d[group], k[group];
      std::int64_t const row = r + lane_;
#pragma unroll
      for (int u = 0; u < group; ++u) d[u] = 0;
      if (w) {
#pragma unroll 4
        for (int j = 0; j < e_; ++j) {
          load(k, j, row);
#pragma unroll
          for (int u = 0; u < group; ++u) d[u] = math::fma(k[u], w[j], d[u]);
        }
      }
#pragma unroll
      for (int u = 0; u < group; ++u) d[u] = w ? math::sinkhorn_scale(d[u], mass, epsilon) : A(1);
#pragma unroll 4
      for (int j = 0; j < e_; ++j) {
        load(k, j, row);
        A sum = 0;
#pragma unroll
        for (int u = 0; u < group; ++u) sum = math::fma(k[u], d[u], sum);
        sum = warp_sum(sum);
        if (lane_ == j % 32) columns[j] += static_cast<double>(sum);
      }
    }
    reduce_columns(sums);
  }
  /// s_jk = mean_i p_ij p_ik for j < k, with p_ij = K_ij w_j / sum_j K_ij w_j, over every `stride`-th tile of rows.
  __device__ void pair_sweep(A const* w, std::int64_t stride) {
    constexpr int tile_rows = sinkhorn_shared<A>::tile_rows, own = 4;  // pairs of a thread: 64 * 63 / 2 / 512
    int const count = e_ * (e_ - 1) / 2;
    int left[own], right[own];
    A sum[own];
#pragma unroll
    for (int q = 0; q < own; ++q) {
      int j = 0, at = thread_ + q * threads_;
      if (at >= count) at = 0;
      while (at >= e_ - 1 - j) at -= e_ - 1 - j++;
      left[q] = j;
      right[q] = e_ > 1 ? j + 1 + at : 0;
      sum[q] = 0;
    }
    for (std::int64_t r = first_; r < last_; r += tile_rows) {
      if (r / tile_rows % stride != 0) continue;
      std::int64_t const row = r + lane_;
      A d = 0;
      if (row < last_)
        for (int j = 0; j < e_; ++j) d = math::fma(p_.kernel[j * column_stride_ + row], w[j], d);
      d = math::sinkhorn_scale(d, A(1), A(math::sinkhorn_no_vote));
      for (int j = warp_; j < e_; j += warps_)
        shared_.tile[lane_ * (e_ + 1) + j] = row < last_ ? p_.kernel[j * column_stride_ + row] * w[j] * d : A(0);
      __syncthreads();
      for (int i = 0; i < tile_rows; ++i) {
        A const* const share = shared_.tile + i * (e_ + 1);
#pragma unroll
        for (int q = 0; q < own; ++q) sum[q] = math::fma(share[left[q]], share[right[q]], sum[q]);
      }
      __syncthreads();
    }
#pragma unroll
    for (int q = 0; q < own; ++q)
      if (thread_ + q * threads_ < count)
        p_.pairs[std::int64_t{blockIdx.x} * count + thread_ + q * threads_] = static_cast<double>(sum[q]);
    sinkhorn_barrier();
    std::int64_t const tiles = (p_.rows + tile_rows - 1) / tile_rows, sampled = (tiles + stride - 1) / stride;
    std::int64_t const past = (tiles - 1) % stride == 0 ? tiles * tile_rows - p_.rows : 0;
    double const factor =
        static_cast<double>(p_.rows) / static_cast<double>(sampled * tile_rows - past) / static_cast<double>(voters_);
    for (int at = static_cast<int>(blockIdx.x) * threads_ + thread_; at < count;
         at += static_cast<int>(gridDim.x) * threads_) {
      double total = 0;
#pragma unroll 8
      for (unsigned b = 0; b < gridDim.x; ++b) total += p_.pairs[std::int64_t{b} * count + at];
      p_.state[at] = total * factor;
    }
    sinkhorn_barrier();
    for (int i = thread_; i < e_ * e_; i += threads_) {
      int const j = i / e_, k = i % e_;
      if (j < k) shared_.s[i] = static_cast<A>(p_.state[j * (2 * e_ - j - 1) / 2 + k - j - 1]);
    }
    __syncthreads();
  }
  /// math::sinkhorn_newton_step by a block: shared s and step. In A: nothing is subtracted, so that its rounding stays
  /// a relative one.
  __device__ bool newton_step() {
    A* const s = shared_.s;
    A const least = sizeof(A) == 4 ? A(1e-30) : A(1e-300);
    for (int k = 0; k + 1 < e_; ++k) {
      A degree = 0;
      for (int j = k + 1 + lane_; j < e_; j += 32) degree += s[k * e_ + j];
      degree = warp_sum(degree);
      if (!(degree > least)) return false;
      A const inverse = 1 / degree;
      if (thread_ == 0) s[k * e_ + k] = inverse;
      for (int j = k + 1 + warp_; j < e_; j += warps_) {
        A const share = s[k * e_ + j] * inverse;
        if (lane_ == 0) shared_.step[j] += static_cast<double>(share) * shared_.step[k];
        for (int i = j + 1 + lane_; i < e_; i += 32) s[j * e_ + i] = math::fma(share, s[k * e_ + i], s[j * e_ + i]);
      }
      __syncthreads();
    }
    // Back: every warp solves all of it, column after column; a lane has two unknowns.
    A low = lane_ < e_ ? static_cast<A>(shared_.step[lane_]) : A(0);
    A high = lane_ + 32 < e_ ? static_cast<A>(shared_.step[lane_ + 32]) : A(0);
    A solution_low = 0, solution_high = 0;
    bool solved = true;
    for (int k = e_ - 2; k >= 0; --k) {
      A const solution = __shfl_sync(0xffffffffu, k < 32 ? low : high, k % 32) * s[k * e_ + k];
      solved = solved && math::abs(solution) * least < 1;
      if (k % 32 == lane_) (k < 32 ? solution_low : solution_high) = solution;
      if (lane_ < k) low = math::fma(s[lane_ * e_ + k], solution, low);
      if (lane_ + 32 < k) high = math::fma(s[(lane_ + 32) * e_ + k], solution, high);
    }
    __syncthreads();
    if (warp_ == 0) {
      if (lane_ < e_) shared_.step[lane_] = static_cast<double>(solution_low);
      if (lane_ + 32 < e_) shared_.step[lane_ + 32] = static_cast<double>(solution_high);
    }
    __syncthreads();
    return solved;
  }
  /// log c_j of the offset g.
  __device__ void log_sweep(double const* g, double* log_marginal) {
    sinkhorn_log_sweep(p_, first_, last_, static_cast<double>(voters_), g, p_.sums, shared_.merge, log_marginal);
  }
  /// plan_ij = factor_j K_ij d_i with d_i as in sweep
  __device__ void write_plan(A const* w, A mass, A epsilon, A const* factor) {
    __syncthreads();
    for (std::int64_t r = first_ + thread_; r < last_; r += threads_) {
      A d = 0;
      for (int j = 0; j < e_; ++j) d = math::fma(p_.kernel[j * column_stride_ + r], w[j], d);
      d = math::sinkhorn_scale(d, mass, epsilon);
      for (int j = 0; j < e_; ++j) p_.plan[r * p_.plan_stride + j] = factor[j] * p_.kernel[j * column_stride_ + r] * d;
    }
  }

 private:
  template <int Group>
  __device__ __forceinline__ void load(A (&k)[Group], int j, std::int64_t row) const {
#pragma unroll
    for (int u = 0; u < Group; ++u) k[u] = row + 32 * u < last_ ? p_.kernel[j * column_stride_ + row + 32 * u] : A(0);
  }
  template <class Build>
  __device__ void each_row(Build&& build) {
    __syncthreads();
    for (std::int64_t r = first_ + thread_; r < last_; r += threads_) {
      A const* const x = p_.logits + r * p_.logits_stride;
      A test = 0;
      for (int j = 0; j < e_; ++j) test += x[j] * A(0);
      build(r, x, p_.kernel + r, test == A(0));
    }
    __syncthreads();
  }
  /// The warps' columns are added up over the block and over the grid. Two halves of the partial sums take turns: a
  /// block that is late may still read the last ones.
  __device__ void reduce_columns(double* sums) {
    __syncthreads();
    double* const mine = p_.sums + (std::int64_t{blockIdx.x} * 2 + half_) * e_;
    for (int j = thread_; j < e_; j += threads_) {
      double sum = 0;
      for (int v = 0; v < warps_; ++v) sum += shared_.columns[v * e_ + j];
      (gridDim.x > 1 ? mine : sums)[j] = sum;
    }
    if (gridDim.x > 1) {
      sinkhorn_barrier();
      for (int j = warp_; j < e_; j += warps_) {
        double sum = 0;
        for (unsigned b = static_cast<unsigned>(lane_); b < gridDim.x; b += 32)
          sum += p_.sums[(std::int64_t{b} * 2 + half_) * e_ + j];
        sum = warp_sum(sum);
        if (lane_ == 0) sums[j] = sum;
      }
      half_ ^= 1;
    }
    __syncthreads();
  }

  sinkhorn_arguments<A> const& p_;
  sinkhorn_shared<A> const& shared_;
  int e_, threads_, thread_, warps_, warp_, lane_;
  std::int64_t column_stride_, first_, last_, voters_ = 0;
  int half_ = 0;
};

/// What a block does between the sweeps, for both kinds of loop: the same as the host's.
template <class A>
class sinkhorn_general_loop {
 public:
  __device__ sinkhorn_general_loop(sinkhorn_arguments<A> const& p, sinkhorn_shared<A> const& shared)
      : p_(p), s_(shared), e_(p.experts), sweeps_(p, shared) {}

  __device__ void sound() {
    bool warm = true;
    for (int j = 0; j < e_; ++j) warm = warm && isfinite(p_.offset[j]);
    each([&](int j) { s_.g[j] = warm ? static_cast<double>(p_.offset[j]) : 0.0; });
    normalise();
    sweeps_.count_voters();
    rebase();
    double const voters = static_cast<double>(sweeps_.voters());

    math::sinkhorn_progress progress{p_.fixed ? -1.0 : p_.tolerance, p_.limit};
    if (!p_.newton) progress.newton_below = 0;
    double error = 0;
    std::int64_t stride = p_.sample_stride;
    using action = math::sinkhorn_progress::action;
    while (sweeps_.voters() > 0) {
      error = measure();
      if (!p_.fixed) progress.tolerance = math::max(p_.tolerance, rounding());
      if (progress.trial && !(error < progress.saved_error / 4)) stride = 1;
      auto next = progress.next(error);
      if (progress.reach == 0) stride = 1;
      if (next == action::stop) break;
      if (next == action::stop_at_saved || next == action::fixed_point_from_saved) {
        each([&](int j) {
          s_.g[j] = s_.saved_g[j];
          s_.marginal[j] = s_.saved_marginal[j];
        });
        error = progress.saved_error;
        if (next == action::stop_at_saved) {
          weigh();
          break;
        }
        next = action::fixed_point;
      }
      if (next == action::newton) {
        each([&](int j) {
          s_.saved_g[j] = s_.g[j];
          s_.saved_marginal[j] = s_.marginal[j];
          s_.step[j] = 1 / static_cast<double>(e_) - s_.marginal[j];
        });
        sweeps_.pair_sweep(s_.w, stride);
        if (sweeps_.newton_step()) {
          double const part = math::sinkhorn_damping(e_, s_.step, progress.reach);
          each([&](int j) { s_.g[j] += part * s_.step[j]; });
        } else {
          progress.refuse_newton();
          next = action::fixed_point;
        }
      }
      if (next == action::fixed_point) fixed_point();
      normalise();
      if (!weigh()) rebase();
    }
    finish(progress.passes, error);
    if (p_.plan) {
      A const each_row = sweeps_.voters() > 0 ? A(1) / static_cast<A>(sweeps_.voters()) : A(0);
      sweeps_.write_plan(s_.w, each_row, A(math::sinkhorn_no_vote), s_.w);
    }
  }

  __device__ void published() {
    A const epsilon = static_cast<A>(math::sinkhorn_epsilon);
    sweeps_.count_voters();
    sweeps_.build_published();
    each([&](int j) {
      s_.g[j] = 0;
      s_.w[j] = s_.previous[j] = s_.d1[j] = 0;
    });
    if (sweeps_.voters() == 0) {
      finish(0, 0);
      if (p_.plan) sweeps_.write_plan(s_.w, A(0), epsilon, s_.w);
      return;
    }
    A const row_mass = A(1) / static_cast<A>(sweeps_.voters()), column_mass = A(1) / static_cast<A>(e_);
    A const tolerance = static_cast<A>(p_.tolerance);
    sweeps_.sweep(nullptr, A(1), A(0), s_.marginal);
    each([&](int j) {
      s_.d1[j] = p_.mode == sinkhorn_mode::ones ? A(1) : A(1) / (static_cast<A>(e_) * static_cast<A>(s_.marginal[j]));
      s_.previous[j] = s_.d1[j];
    });
    A moved = A(INFINITY);
    std::int32_t passes = 0;
    while (passes < p_.limit && (p_.fixed || moved > tolerance)) {
      each([&](int j) { s_.previous[j] = s_.d1[j]; });
      sweeps_.sweep(s_.previous, row_mass, epsilon, s_.marginal);
      each([&](int j) { s_.d1[j] = math::sinkhorn_scale(static_cast<A>(s_.marginal[j]), column_mass, epsilon); });
      moved = 0;
      for (int j = 0; j < e_; ++j) moved += math::abs(s_.previous[j] - s_.d1[j]) / static_cast<A>(e_);
      ++passes;
    }
    each([&](int j) { s_.g[j] = log(static_cast<double>(s_.d1[j])); });
    bool sane = true;
    for (int j = 0; j < e_; ++j) sane = sane && isfinite(s_.g[j]);
    double error = INFINITY;
    if (sane) {
      normalise();
      rebase();
      error = measure();
    }
    finish(passes, error);
    if (p_.plan) {
      sweeps_.build_published();
      sweeps_.write_plan(s_.previous, row_mass, epsilon, s_.d1);
    }
  }

 private:
  /// body(j) for every expert, by all threads; everything before and after is visible to everyone.
  template <class Body>
  __device__ void each(Body&& body) {
    __syncthreads();
    for (int j = static_cast<int>(threadIdx.x); j < e_; j += static_cast<int>(blockDim.x)) body(j);
    __syncthreads();
  }
  __device__ void finish(std::int32_t passes, double error) {
    if (blockIdx.x != 0) return;
    each([&](int j) { p_.offset[j] = static_cast<A>(s_.g[j]); });
    if (threadIdx.x == 0)
      *p_.result = {passes, static_cast<std::int32_t>(p_.rows - sweeps_.voters()), static_cast<float>(error)};
  }
  __device__ void normalise() {
    double const largest = sinkhorn_range_of(e_, [&](int j) { return s_.g[j]; }).high;
    each([&](int j) { s_.g[j] = static_cast<double>(static_cast<A>(s_.g[j] - largest)); });
  }
  __device__ double rounding() const {
    double const spread = -sinkhorn_range_of(e_, [&](int j) { return s_.g[j]; }).low;
    return 8 * (sizeof(A) == 4 ? 0x1p-23 : 0x1p-52) * (1 + spread);
  }
  __device__ void rebase() {
    each([&](int j) {
      s_.base[j] = static_cast<A>(s_.g[j]);
      s_.w[j] = 1;
    });
    sweeps_.build_shifted(s_.base);
  }
  __device__ bool weigh() {
    double const moved =
        sinkhorn_largest(e_, [&](int j) { return math::abs(s_.g[j] - static_cast<double>(s_.base[j])); });
    each([&](int j) { s_.w[j] = static_cast<A>(exp(s_.g[j] - static_cast<double>(s_.base[j]))); });
    return moved < 30;
  }
  __device__ double measure() {
    sweeps_.sweep(s_.w, A(1), A(math::sinkhorn_no_vote), s_.marginal);
    double const voters = static_cast<double>(sweeps_.voters());
    each([&](int j) { s_.marginal[j] *= static_cast<double>(s_.w[j]) / voters; });
    return sinkhorn_largest(e_, [&](int j) { return math::sinkhorn_error(s_.marginal[j], e_); });
  }
  __device__ void fixed_point() {
    bool const lost = sinkhorn_range_of(e_, [&](int j) { return s_.marginal[j]; }).low < 1e-17;
    if (lost)
      sweeps_.log_sweep(s_.g, s_.step);
    else
      each([&](int j) { s_.step[j] = log(s_.marginal[j]); });
    each([&](int j) { s_.g[j] += math::sinkhorn_column_step(s_.step[j], e_); });
  }

  sinkhorn_arguments<A> const& p_;
  sinkhorn_shared<A> const& s_;
  int e_;
  sinkhorn_general_sweeps<A> sweeps_;
};

template <class A>
__global__ void __launch_bounds__(32 * sinkhorn_warps)
    sinkhorn_general(__grid_constant__ sinkhorn_arguments<A> const p) {
  extern __shared__ __align__(16) unsigned char sinkhorn_memory[];
  sinkhorn_shared<A> const shared(sinkhorn_memory, p.experts, static_cast<int>(blockDim.x / 32), p.newton);
  sinkhorn_general_loop<A> loop(p, shared);
  if (p.mode == sinkhorn_mode::sound)
    loop.sound();
  else
    loop.published();
}

}  // namespace blackmamba::cuda::detail
