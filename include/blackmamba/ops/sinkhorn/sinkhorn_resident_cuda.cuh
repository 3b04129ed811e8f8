#pragma once
#include <blackmamba/core/cuda/exponential_cuda.cuh>
#include <blackmamba/ops/sinkhorn/sinkhorn_sweeps_cuda.cuh>

#include <algorithm>
#include <cstdint>
#include <utility>

/// Sound mode for at most 8 experts in float, up to about a million rows: K stays in registers and shared memory from
/// the first sweep to the last. One launch; instantiated once.
///
/// Floors of a pass over M rows: 20 instructions a row (36 more for Newton's pairs, on a sample of the rows), and the
/// way of the partial sums from every block to every block. That way costs no grid barrier: a sum travels together with
/// the number of its sweep in one word of 64 bits, and who needs it reads until the number is right. Two sets of words
/// take turns, so that nobody overwrites what a late block still reads: who writes for sweep n + 2 has read all of
/// n + 1, which every block wrote after it had read all of n. All blocks add the sums in one order and decide the same.
namespace blackmamba::cuda::detail {

struct sinkhorn_resident {
  static constexpr int experts = 8;
  static constexpr int pairs = experts * (experts - 1) / 2;
  static constexpr int sums = experts + 1 + pairs;  // columns, rows without a vote, pairs
  static constexpr int threads = 512, warps = threads / 32;
  static constexpr int register_rows = 4;  // of a thread; the next ones are in shared memory
  static constexpr int batch = 4;          // rows that are loaded side by side
  static constexpr int most_blocks = 160;  // five words for each lane of the warp that reads a sum
  static constexpr std::int64_t rows_of_one_block = 2048;
  static constexpr std::size_t bytes_of_shared_row = threads * experts * sizeof(float);
};

struct sinkhorn_resident_arguments {
  sinkhorn_arguments<float> of;
  int rows_per_thread;
  bool packs;  // a row of logits is two packs of four
};

/// Sums N values, a power of two, over the 32 lanes of a warp: lane l ends with the sum of value l N / 32. Every step
/// halves the values of a lane and the lanes of a value.
template <int N, int Distance = 16>
__device__ __forceinline__ float sinkhorn_scatter_sum(float const (&v)[N], int lane) {
  if constexpr (Distance == 0) {
    return v[0];
  } else if constexpr (N == 1) {
    float const sum[1] = {v[0] + __shfl_xor_sync(0xffffffffu, v[0], Distance)};
    return sinkhorn_scatter_sum<1, Distance / 2>(sum, lane);
  } else {
    bool const upper = lane & Distance;
    float half[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      float const sent = upper ? v[i] : v[i + N / 2];
      half[i] = (upper ? v[i + N / 2] : v[i]) + __shfl_xor_sync(0xffffffffu, sent, Distance);
    }
    return sinkhorn_scatter_sum<N / 2, Distance / 2>(half, lane);
  }
}

/// math::sinkhorn_newton_step for n <= 8, in registers and in float: nothing is subtracted, so that its rounding stays
/// a relative one. pair(j, k) gives s_jk, d the right-hand side.
template <class Pair>
__device__ __forceinline__ bool sinkhorn_newton_in_registers(int n, Pair&& pair, float (&d)[8]) {
  float s[8][8], inverse[8];
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int k = 0; k < 8; ++k) s[j][k] = k > j && k < n ? pair(j, k) : 0.0f;
  bool solved = true;
#pragma unroll
  for (int k = 0; k < 7; ++k) {
    float const degree = ((s[k][1] + s[k][2]) + (s[k][3] + s[k][4])) + ((s[k][5] + s[k][6]) + s[k][7]);
    bool const used = k + 1 < n;
    solved = solved && (!used || degree > 1e-30f);
    inverse[k] = used ? reciprocal(degree) : 0.0f;
#pragma unroll
    for (int j = k + 1; j < 8; ++j) {
      float const share = s[k][j] * inverse[k];
      d[j] = math::fma(share, d[k], d[j]);
#pragma unroll
      for (int i = j + 1; i < 8; ++i) s[j][i] = math::fma(share, s[k][i], s[j][i]);
    }
  }
#pragma unroll
  for (int k = 7; k >= 0; --k) {
    float sum = d[k];
#pragma unroll
    for (int j = 7; j > k; --j) sum = math::fma(s[k][j], d[j], sum);  // the latest one last
    d[k] = k + 1 < n ? sum * inverse[k] : 0.0f;
    solved = solved && math::abs(d[k]) < 1e30f;
  }
  return solved;
}

/// What all threads do next; a new base is followed by a sweep.
enum sinkhorn_command { sinkhorn_stop, sinkhorn_sweep, sinkhorn_rebase, sinkhorn_log };

/// What the first warp keeps from one sweep to the next, for each lane; not in registers, which the rows need.
struct sinkhorn_resident_state {
  math::basic_sinkhorn_progress<float> progress{};
  math::sinkhorn_action next{};
  int stride = 1, swept_stride = 1;
  bool pairs = false, waiting = false;  // whether the sweep has pairs; whether Newton's step waits for them
  float g = 0, base = 0, saved_g = 0, marginal = 0, saved_marginal = 0, error = 0;
  float per_voter = 0;  // 0 before the first sweep
};

/// Shared memory besides the rows.
struct sinkhorn_resident_shared {
  using as = sinkhorn_resident;
  float part[as::sums][as::warps + 1];
  float sums[as::sums];
  double g[as::experts], log_marginal[as::experts], merge[2 * as::warps];
  float base[as::experts], w[as::experts];
  sinkhorn_command command;
  bool pairs;
  int stride;
  sinkhorn_resident_state states[32];
  static_assert(sizeof(sinkhorn_resident_state) / 4 % 2 == 1, "odd: lanes spread over the banks");
};

/// The rows of a thread and the sweeps over them.
class sinkhorn_resident_rows {
  using as = sinkhorn_resident;

 public:
  __device__ __forceinline__ sinkhorn_resident_rows(sinkhorn_resident_arguments const& p,
                                                    sinkhorn_resident_shared& shared, float4* rows)
      : p_(p),
        shared_(shared),
        rows_(rows),
        thread_(static_cast<int>(threadIdx.x)),
        warp_(thread_ / 32),
        lane_(thread_ % 32),
        first_(std::int64_t{blockIdx.x} * p.rows_per_thread * as::threads),
        words_(reinterpret_cast<unsigned long long*>(p.of.kernel)) {}

  __device__ __forceinline__ std::int64_t first() const { return first_ < p_.of.rows ? first_ : p_.of.rows; }
  __device__ __forceinline__ std::int64_t last() const {
    std::int64_t const end = first_ + std::int64_t{p_.rows_per_thread} * as::threads;
    return end < p_.of.rows ? end : p_.of.rows;
  }

  /// No word of this block's is one that somebody waits for.
  __device__ __forceinline__ void clear_words() {
    for (int i = thread_; i < 2 * as::sums; i += as::threads) words_[std::int64_t{i} * gridDim.x + blockIdx.x] = 0;
  }
  /// Brings in the logits of the rows that stay in registers; build follows.
  __device__ __forceinline__ void load_ahead() {
#pragma unroll
    for (int r = 0; r < as::register_rows; ++r) load(r, kernel_[r]);
  }
  /// K_ij = e^(beta (x_ij - max_j x_ij) + base_j - m_i) with m_i such that the largest K of a row is 1. Returns how
  /// many of the thread's rows have no vote.
  __device__ __forceinline__ int build() {
    float base[as::experts];
#pragma unroll
    for (int j = 0; j < as::experts; ++j) base[j] = shared_.base[j];
    int refused = build_rows(0, kernel_, base);
    for (int r = as::register_rows; r < p_.rows_per_thread; r += as::batch) {
      float k[as::batch][as::experts];
#pragma unroll
      for (int b = 0; b < as::batch; ++b) load(r + b, k[b]);
      refused += build_rows(r, k, base);
#pragma unroll
      for (int b = 0; b < as::batch; ++b)
        if (r + b < p_.rows_per_thread) store(r + b, k[b]);
    }
    return refused;
  }
  __device__ __forceinline__ void tell_refused(int refused) {
    refused = warp_sum(refused);
    if (lane_ == 0) shared_.part[as::experts][warp_] = static_cast<float>(refused);
  }
  /// sums_j = sum_i p_ij with p_ij = K_ij w_j / sum_j K_ij w_j, and with pairs the sums of p_ij p_ik over the rows of
  /// every `stride`-th warp. In shared memory, the same in every block.
  __device__ __forceinline__ void sweep(bool with_pairs, int stride) {
    float w[as::experts], column[as::experts];
#pragma unroll
    for (int j = 0; j < as::experts; ++j) {
      w[j] = shared_.w[j];
      column[j] = 0;
    }
    // Warps that are looked at are spread over the four schedulers.
    bool const looked_at = with_pairs && (warp_ - warp_ / 8) % stride == 0;
    if (looked_at) {
      float pair[32];
#pragma unroll
      for (int i = 0; i < 32; ++i) pair[i] = 0;
      each_row([&](float const(&k)[as::experts], int) {
        float share[as::experts];
        shares(k, w, share);
#pragma unroll
        for (int j = 0; j < as::experts; ++j) column[j] += share[j];
        int at = 0;
#pragma unroll
        for (int j = 0; j < as::experts; ++j)
#pragma unroll
          for (int i = j + 1; i < as::experts; ++i, ++at) pair[at] = math::fma(share[j], share[i], pair[at]);
      });
      float const sum = sinkhorn_scatter_sum(pair, lane_);
      if (lane_ < as::pairs) shared_.part[as::experts + 1 + lane_][warp_] = sum;
    } else {
      each_row([&](float const(&k)[as::experts], int) {
        float share[as::experts];
        shares(k, w, share);
#pragma unroll
        for (int j = 0; j < as::experts; ++j) column[j] += share[j];
      });
      if (with_pairs && lane_ < as::pairs) shared_.part[as::experts + 1 + lane_][warp_] = 0;
    }
    float const sum = sinkhorn_scatter_sum(column, lane_);
    if (lane_ % 4 == 0) shared_.part[lane_ / 4][warp_] = sum;
    exchange(with_pairs ? as::sums : as::experts + 1);
  }
  __device__ __forceinline__ void write_plan(float mass) {
    float w[as::experts];
#pragma unroll
    for (int j = 0; j < as::experts; ++j) w[j] = shared_.w[j];
    each_row([&](float const(&k)[as::experts], int r) {
      if (row(r) >= p_.of.rows) return;
      float share[as::experts];
      shares(k, w, share);
#pragma unroll
      for (int j = 0; j < as::experts; ++j)
        if (j < p_.of.experts) p_.of.plan[row(r) * p_.of.plan_stride + j] = share[j] * mass;
    });
  }

 private:
  __device__ __forceinline__ std::int64_t row(int r) const { return first_ + std::int64_t{r} * as::threads + thread_; }

  __device__ __forceinline__ void load(int r, float (&x)[as::experts]) const {
#pragma unroll
    for (int j = 0; j < as::experts; ++j) x[j] = 0;
    if (r >= p_.rows_per_thread || row(r) >= p_.of.rows) return;
    float const* const from = p_.of.logits + row(r) * p_.of.logits_stride;
    if (p_.packs) {
      float4 const low = *reinterpret_cast<float4 const*>(from), high = *reinterpret_cast<float4 const*>(from + 4);
      x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
      x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    } else {
#pragma unroll
      for (int j = 0; j < as::experts; ++j)
        if (j < p_.of.experts) x[j] = from[j];
    }
  }
  /// Turns the logits of rows from r on into K; returns how many of them have no vote.
  template <int Rows>
  __device__ __forceinline__ int build_rows(int r, float (&k)[Rows][as::experts],
                                            float const (&base)[as::experts]) const {
    int refused = 0;
#pragma unroll
    for (int b = 0; b < Rows; ++b) {
      bool const here = r + b < p_.rows_per_thread && row(r + b) < p_.of.rows;
      bool const votes = here && build_row(k[b], base);
      refused += here && !votes ? 1 : 0;
#pragma unroll
      for (int j = 0; j < as::experts; ++j) k[b][j] = votes ? k[b][j] : 0.0f;
    }
    return refused;
  }
  /// Turns logits into K; returns whether the row has a vote.
  __device__ __forceinline__ bool build_row(float (&x)[as::experts], float const (&base)[as::experts]) const {
    float test = 0, largest = -INFINITY, shift = -INFINITY;
#pragma unroll
    for (int j = 0; j < as::experts; ++j)
      if (j < p_.of.experts) {
        test += x[j] * 0.0f;
        largest = math::max(largest, x[j]);
      }
#pragma unroll
    for (int j = 0; j < as::experts; ++j) {
      x[j] = j < p_.of.experts ? math::fma(p_.of.beta, x[j] - largest, base[j]) : -INFINITY;
      shift = math::max(shift, x[j]);
    }
#pragma unroll
    for (int j = 0; j < as::experts; ++j) x[j] = power_of_two((x[j] - shift) * 1.44269504f);
    return test == 0.0f;
  }

  __device__ __forceinline__ float4* in_shared(int r, int half) const {
    return rows_ + ((r - as::register_rows) * 2 + half) * as::threads + thread_;
  }
  __device__ __forceinline__ void store(int r, float const (&k)[as::experts]) const {
    *in_shared(r, 0) = make_float4(k[0], k[1], k[2], k[3]);
    *in_shared(r, 1) = make_float4(k[4], k[5], k[6], k[7]);
  }
  /// Calls body(K of a row, number of the row).
  template <class Body>
  __device__ __forceinline__ void each_row(Body&& body) const {
#pragma unroll
    for (int r = 0; r < as::register_rows; ++r)
      if (r < p_.rows_per_thread) body(kernel_[r], r);
#pragma unroll 2
    for (int r = as::register_rows; r < p_.rows_per_thread; ++r) {
      float4 const low = *in_shared(r, 0), high = *in_shared(r, 1);
      float const k[as::experts] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      body(k, r);
    }
  }
  __device__ __forceinline__ static void shares(float const (&k)[as::experts], float const (&w)[as::experts],
                                                float (&share)[as::experts]) {
#pragma unroll
    for (int j = 0; j < as::experts; ++j) share[j] = k[j] * w[j];
    float const sum = ((share[0] + share[1]) + (share[2] + share[3])) + ((share[4] + share[5]) + (share[6] + share[7]));
    float const scale = reciprocal(sum + math::sinkhorn_no_vote);
#pragma unroll
    for (int j = 0; j < as::experts; ++j) share[j] *= scale;
  }

  /// Adds the parts of the warps, and then those of the blocks.
  __device__ __forceinline__ void exchange(int count) {
    __syncthreads();
    ++number_;
    unsigned long long* const words = words_ + (number_ & 1) * std::int64_t{as::sums} * gridDim.x;
    if (thread_ < count) {
      float sum[as::warps];
#pragma unroll
      for (int v = 0; v < as::warps; ++v) sum[v] = shared_.part[thread_][v];
#pragma unroll
      for (int n = as::warps / 2; n > 0; n /= 2)
#pragma unroll
        for (int v = 0; v < n; ++v) sum[v] += sum[v + n];
      if (gridDim.x == 1)
        shared_.sums[thread_] = sum[0];
      else
        asm volatile(
            "st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(words + std::int64_t{thread_} * gridDim.x + blockIdx.x),
            "l"(static_cast<unsigned long long>(number_) << 32 | __float_as_uint(sum[0]))
            : "memory");
    }
    if (gridDim.x > 1) {
      constexpr int own = (as::sums + as::warps - 1) / as::warps, reads = as::most_blocks / 32;
      unsigned long long word[own][reads];
      bool ready;
      do {
        ready = true;
#pragma unroll
        for (int q = 0; q < own; ++q)
#pragma unroll
          for (int i = 0; i < reads; ++i) {
            auto const b = static_cast<unsigned>(lane_ + 32 * i);
            int const v = warp_ + as::warps * q;
            word[q][i] = static_cast<unsigned long long>(number_) << 32;  // zero
            if (v < count && b < gridDim.x)
              asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];"
                           : "=l"(word[q][i])
                           : "l"(words + std::int64_t{v} * gridDim.x + b)
                           : "memory");
          }
#pragma unroll
        for (int q = 0; q < own; ++q)
#pragma unroll
          for (int i = 0; i < reads; ++i) ready = ready && static_cast<unsigned>(word[q][i] >> 32) == number_;
      } while (!ready);
      __syncwarp();
#pragma unroll
      for (int q = 0; q < own; ++q) {
        int const v = warp_ + as::warps * q;
        if (v >= count) break;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < reads; ++i) sum += __uint_as_float(static_cast<unsigned>(word[q][i]));
        sum = warp_sum(sum);
        if (lane_ == 0) shared_.sums[v] = sum;
      }
    }
    __syncthreads();
  }

  sinkhorn_resident_arguments const& p_;
  sinkhorn_resident_shared& shared_;
  float4* rows_;
  int thread_, warp_, lane_;
  std::int64_t first_;
  unsigned long long* words_;
  unsigned number_ = 0;  // of the sweep; a launch makes fewer than 2^32
  float kernel_[as::register_rows][as::experts];
};

/// What the first warp decides between sweeps. Lane l stands for expert l % 8.
class sinkhorn_resident_control {
  using as = sinkhorn_resident;
  using action = math::sinkhorn_action;
  using state = sinkhorn_resident_state;

 public:
  __device__ __forceinline__ sinkhorn_resident_control(sinkhorn_arguments<float> const& p,
                                                       sinkhorn_resident_shared& shared)
      : p_(p), shared_(shared), j_(static_cast<int>(threadIdx.x % as::experts)), real_(j_ < p.experts) {}

  __device__ __forceinline__ void start() {
    s_ = state{};
    s_.progress.tolerance = p_.fixed ? -1.0f : static_cast<float>(p_.tolerance);
    s_.progress.limit = p_.limit;
    if (!p_.newton) s_.progress.newton_below = 0;
    s_.stride = static_cast<int>(p_.sample_stride);
    float const x = real_ ? p_.offset[j_] : 0.0f;
    s_.g = __all_sync(0xffffffffu, isfinite(x)) ? x : 0.0f;
    normalise();
    rebase();
    // A cold start is too far from the solution for Newton's step.
    s_.pairs = p_.newton && smallest(real_ ? s_.g : 0.0f) < 0;
    publish(sinkhorn_rebase);
  }
  /// After a sweep.
  __device__ __forceinline__ void decide() {
    s_ = shared_.states[threadIdx.x];
    if (s_.per_voter == 0) {  // the first
      float const voters = static_cast<float>(p_.rows) - shared_.sums[as::experts];
      if (!(voters > 0)) return stop(0);
      s_.per_voter = 1 / voters;
    }
    float least = 0;  // of the marginals
    if (!s_.waiting) {
      s_.marginal = shared_.sums[j_] * s_.per_voter;
      s_.error = real_ ? math::abs(static_cast<float>(p_.experts) * s_.marginal - 1.0f) : 0.0f;
      float spread = real_ ? s_.g : 0.0f;
      least = real_ ? s_.marginal : 1.0f;
      extremes(s_.error, spread, least);
      float const rounding = 8 * 0x1p-23f * (1 - spread);
      if (!p_.fixed) s_.progress.tolerance = math::max(static_cast<float>(p_.tolerance), rounding);
      if (s_.progress.trial && !(s_.error < s_.progress.saved_error / 4)) s_.stride = 1;
      s_.next = s_.progress.next(s_.error);
      if (s_.progress.reach == 0) s_.stride = 1;
      if (s_.next == action::stop) return stop(s_.error);
      if (s_.next == action::stop_at_saved || s_.next == action::fixed_point_from_saved) {
        s_.g = s_.saved_g;
        s_.marginal = s_.saved_marginal;
        s_.error = s_.progress.saved_error;
        if (s_.next == action::stop_at_saved) {
          weigh();
          return stop(s_.error);
        }
        s_.next = action::fixed_point;
        least = smallest(real_ ? s_.marginal : 1.0f);
      }
    }
    s_.waiting = false;
    if (s_.next == action::newton) {
      if (!s_.pairs || s_.swept_stride != s_.stride) {  // the step waits for a sweep over the pairs
        s_.pairs = s_.waiting = true;
        return publish(sinkhorn_sweep);
      }
      s_.saved_g = s_.g;
      s_.saved_marginal = s_.marginal;
      if (!newton()) {
        s_.progress.refuse_newton();
        s_.next = action::fixed_point;
        least = smallest(real_ ? s_.marginal : 1.0f);
      }
    }
    if (s_.next == action::fixed_point) {
      // An expert that all rows shun by far has lost its marginal to underflow: take the logarithm's way once.
      if (least < 1e-17f) {
        if (threadIdx.x < as::experts) shared_.g[j_] = static_cast<double>(s_.g);
        return publish(sinkhorn_log);
      }
      // Of E c, near 1, single precision has the logarithm to better than the rounding of g.
      if (real_) s_.g -= math::log(s_.marginal * static_cast<float>(p_.experts));
    }
    go_on();
  }
  /// After a sweep in logarithms.
  __device__ __forceinline__ void continue_from_log() {
    s_ = shared_.states[threadIdx.x];
    if (real_)
      s_.g = static_cast<float>(shared_.g[j_] + math::sinkhorn_column_step(shared_.log_marginal[j_], p_.experts));
    go_on();
  }

 private:
  template <class F>
  __device__ __forceinline__ static float over_experts(float x, F&& combine) {
    return warp_reduce<as::experts>(x, combine);
  }
  __device__ __forceinline__ static float smallest(float x) {
    return over_experts(x, [](float a, float b) { return math::min(a, b); });
  }
  __device__ __forceinline__ static float largest(float x) {
    return over_experts(x, [](float a, float b) { return math::max(a, b); });
  }

  /// The largest of the first, the smallest of the others, over the experts, side by side.
  __device__ __forceinline__ static void extremes(float& high, float& low, float& least) {
#pragma unroll
    for (int distance = as::experts / 2; distance > 0; distance /= 2) {
      high = math::max(high, __shfl_xor_sync(0xffffffffu, high, distance));
      low = math::min(low, __shfl_xor_sync(0xffffffffu, low, distance));
      least = math::min(least, __shfl_xor_sync(0xffffffffu, least, distance));
    }
  }

  /// The offsets have moved: weights for the next sweep, and what to look at in it.
  __device__ __forceinline__ void go_on() {
    normalise();
    bool const near = weigh();
    if (!near) rebase();
    // Newton's step needs the pairs if the next error is below newton_below and above the tolerance. A fixed-point step
    // takes about half of the error away, and Newton's more than nine tenths of it; a wrong guess costs a sweep.
    float const guess = s_.error * (s_.next == action::newton ? 0.05f : 0.6f);
    s_.pairs = guess < s_.progress.newton_below && (p_.fixed || guess > s_.progress.tolerance) &&
               s_.progress.passes < s_.progress.limit;
    publish(near ? sinkhorn_sweep : sinkhorn_rebase);
  }
  __device__ __forceinline__ bool newton() {
    float const factor = static_cast<float>(s_.stride) * s_.per_voter;
    float d[as::experts];
    float const b = real_ ? 1 / static_cast<float>(p_.experts) - s_.marginal : 0.0f;
#pragma unroll
    for (int k = 0; k < as::experts; ++k) d[k] = __shfl_sync(0xffffffffu, b, k);
    float const* const pairs = shared_.sums + as::experts + 1;
    bool const solved = sinkhorn_newton_in_registers(
        p_.experts, [&](int j, int k) { return pairs[j * (2 * as::experts - j - 1) / 2 + k - j - 1] * factor; }, d);
    if (!solved) return false;
    float step = 0;
#pragma unroll
    for (int k = 0; k < as::experts; ++k) step = k == j_ ? d[k] : step;
    float high = math::max(step, 0.0f), low = math::min(step, 0.0f), unused = 0;
    extremes(high, low, unused);
    s_.g += math::sinkhorn_damping(high - low, s_.progress.reach) * step;
    return true;
  }
  __device__ __forceinline__ void normalise() { s_.g -= largest(real_ ? s_.g : -INFINITY); }
  __device__ __forceinline__ void rebase() {
    s_.base = s_.g;
    if (threadIdx.x < as::experts) {
      shared_.base[j_] = s_.g;
      shared_.w[j_] = 1;
    }
  }
  /// w = e^(g - base). Returns whether g is near enough to the base.
  __device__ __forceinline__ bool weigh() {
    float const moved = real_ ? s_.g - s_.base : 0.0f;
    if (threadIdx.x < as::experts) shared_.w[j_] = math::exp(moved);
    return __all_sync(0xffffffffu, math::abs(moved) < 30.0f);
  }
  __device__ __forceinline__ void publish(sinkhorn_command command) {
    s_.swept_stride = s_.stride;
    if (threadIdx.x == 0) {
      shared_.command = command;
      shared_.pairs = s_.pairs;
      shared_.stride = s_.stride;
    }
    shared_.states[threadIdx.x] = s_;
  }
  __device__ __forceinline__ void stop(float error) {
    float const refused = shared_.sums[as::experts];
    if (threadIdx.x == 0) shared_.command = sinkhorn_stop;
    if (blockIdx.x != 0) return;
    if (threadIdx.x < static_cast<unsigned>(p_.experts)) p_.offset[j_] = s_.g;
    if (threadIdx.x == 0) *p_.result = {s_.progress.passes, static_cast<std::int32_t>(refused), error};
  }

  sinkhorn_arguments<float> const& p_;
  sinkhorn_resident_shared& shared_;
  int j_;
  bool real_;  // whether there is an expert j
  state s_;
};

template <int>
__global__ void __launch_bounds__(sinkhorn_resident::threads, 1)
    sinkhorn_resident_sound(__grid_constant__ sinkhorn_resident_arguments const p) {
  extern __shared__ __align__(16) unsigned char sinkhorn_memory[];
  __shared__ sinkhorn_resident_shared shared;
  sinkhorn_resident_rows rows(p, shared, reinterpret_cast<float4*>(sinkhorn_memory));
  bool const decides = threadIdx.x < 32;

  rows.load_ahead();
  if (gridDim.x > 1) rows.clear_words();
  if (decides) sinkhorn_resident_control(p.of, shared).start();
  __syncthreads();
  bool begun = false;
  do {
    if (shared.command == sinkhorn_rebase) {
      unsigned cleared = 0;
      if (gridDim.x > 1 && !begun) cleared = cooperative_groups::this_grid().barrier_arrive();
      if (begun) rows.load_ahead();
      rows.tell_refused(rows.build());
      if (gridDim.x > 1 && !begun) cooperative_groups::this_grid().barrier_wait(std::move(cleared));
      begun = true;
    }
    rows.sweep(shared.pairs, shared.stride);
    if (decides) sinkhorn_resident_control(p.of, shared).decide();
    __syncthreads();
    if (shared.command == sinkhorn_log) {
      sinkhorn_log_sweep(p.of, rows.first(), rows.last(),
                         static_cast<double>(p.of.rows - static_cast<std::int64_t>(shared.sums[8])), shared.g,
                         p.of.sums, shared.merge, shared.log_marginal);
      if (decides) sinkhorn_resident_control(p.of, shared).continue_from_log();
      __syncthreads();
    }
  } while (shared.command != sinkhorn_stop);
  if (p.of.plan) {
    float const voters = static_cast<float>(p.of.rows) - shared.sums[8];
    rows.write_plan(voters > 0 ? 1.0f / voters : 0.0f);
  }
}

}  // namespace blackmamba::cuda::detail
