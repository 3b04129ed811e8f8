#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/core/cpu/transpose.hpp>
#include <blackmamba/ops/sinkhorn/sinkhorn.hpp>
#include <blackmamba/ops/sinkhorn/sinkhorn_math.hpp>

#include <algorithm>
#include <cmath>
#include <utility>

namespace blackmamba {

namespace detail {

/// The matrix K on the host and the sweeps over it. Rows lie side by side, one in each lane: the block of L rows from
/// row b L on holds its E columns one after another, L values each. A row without a vote is 0, and so are rows past
/// the last.
template <class A>
class sinkhorn_sweeps {
  using V = simd::pack<A>;
  static constexpr std::int64_t L = V::lanes;
  static constexpr std::int64_t rows_per_chunk = sinkhorn::rows_per_chunk;
  static constexpr int group = 4;  // blocks whose row sums run side by side
  static constexpr int tile = 4;   // columns on each side of a tile of pairs
  static_assert(64 % L == 0, "padding makes whole blocks");

 public:
  sinkhorn_sweeps(device::cpu const& policy, host_view<A const, dyn, dyn> logits, double beta,
                  sinkhorn::work<device::cpu, A> const& space)
      : threads_(policy.threads), logits_(logits), beta_(static_cast<A>(beta)), space_(space) {}

  std::int64_t rows() const { return logits_.extent(0); }
  std::int64_t experts() const { return logits_.extent(1); }
  /// Known once K is built.
  std::int64_t voters() const { return voters_; }

  /// K_ij = e^(beta (x_ij - max_j x_ij) + base_j - m_i) with m_i such that the largest K of a row is 1.
  void build_shifted(A const* base) {
    build([&](A* block, V largest) {
      using math::max;
      V shift = V(-INFINITY);
      for (std::int64_t j = 0; j < experts(); ++j) {
        V const t = fma(V(beta_), V::load(block + j * L) - largest, V(base[j]));
        t.store(block + j * L);
        shift = max(shift, t);
      }
      return [shift](V t) { return exp(t - shift); };
    });
  }
  /// K_ij = e^(beta x_ij), as published.
  void build_published() {
    build([&](A*, V) { return [b = V(beta_)](V x) { return exp(b * x); }; });
  }

  /// sums_j = sum_i K_ij
  void column_sums(double* sums) {
    over_chunks(sums, [&](chunk const& c, double* partial) {
      alignas(64) A ones[rows_per_chunk];
      std::fill_n(ones, rows_per_chunk, A(1));
      add_columns(c, ones, partial);
    });
  }
  /// sums_j = sum_i K_ij d_i with d_i = mass / (sum_j K_ij w_j + epsilon)
  void sweep(A const* w, A mass, A epsilon, double* sums) {
    over_chunks(sums, [&](chunk const& c, double* partial) {
      alignas(64) A scale[rows_per_chunk];
      row_scales(c, w, mass, epsilon, scale);
      add_columns(c, scale, partial);
    });
  }
  /// s_jk = s_kj = mean_i p_ij p_ik for j != k, with p_ij = K_ij w_j / sum_j K_ij w_j; s (E, E). The mean is over the
  /// rows of every `stride`-th block.
  void pair_sweep(A const* w, double* s, std::int64_t stride) {
    std::int64_t const e = experts();
    cpu::parallel_for(threads_, chunks(), grain(e * e / 2), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        alignas(64) A scale[rows_per_chunk];
        chunk const c = chunk_at(i);
        row_scales(c, w, A(1), A(math::sinkhorn_no_vote), scale, stride);
        add_pairs(c, scale, stride, space_.pairs.row(i));
      }
    });
    std::int64_t at = 0;
    for (std::int64_t j = 0; j < e; ++j)
      for (std::int64_t k = j + 1; k < e; ++k, ++at) {
        double sum = 0;
        for (std::int64_t i = 0; i < chunks(); ++i) sum += space_.pairs(i, at);
        double const mean = sum * static_cast<double>(stride) / static_cast<double>(voters_);
        s[j * e + k] = s[k * e + j] = mean * static_cast<double>(w[j]) * static_cast<double>(w[k]);
      }
  }
  /// log c_j, exactly at any spread of the logits: nothing underflows.
  void log_sweep(double const* g, double* log_marginal) {
    std::int64_t const e = experts();
    cpu::parallel_for(threads_, chunks(), 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        double* const partial = space_.sums.row(i);
        for (std::int64_t j = 0; j < e; ++j) put(partial, j, math::log_sum{});
        std::int64_t const first = i * rows_per_chunk, last = std::min(first + rows_per_chunk, rows());
        for (std::int64_t r = first; r < last; ++r) {
          A const* const x = logits_.row(r);
          if (!std::all_of(x, x + e, [](A v) { return std::isfinite(v); })) continue;
          auto const score = [&](std::int64_t j) {
            return static_cast<double>(beta_) * static_cast<double>(x[j]) + g[j];
          };
          math::log_sum row;
          for (std::int64_t j = 0; j < e; ++j) row.add(score(j));
          for (std::int64_t j = 0; j < e; ++j) {
            auto column = get(partial, j);
            column.add(score(j) - row.value());
            put(partial, j, column);
          }
        }
      }
    });
    for (std::int64_t j = 0; j < e; ++j) {
      math::log_sum column;
      for (std::int64_t i = 0; i < chunks(); ++i) column.merge(get(space_.sums.row(i), j));
      log_marginal[j] = column.value() - std::log(static_cast<double>(voters_));
    }
  }
  /// plan_ij = factor_j K_ij d_i with d_i as in sweep
  void write_plan(A const* w, A mass, A epsilon, A const* factor, host_view<A, dyn, dyn> plan) {
    std::int64_t const e = experts();
    cpu::parallel_for(threads_, chunks(), grain(e), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        alignas(64) A scale[rows_per_chunk];
        chunk const c = chunk_at(i);
        row_scales(c, w, mass, epsilon, scale);
        std::int64_t const first = i * rows_per_chunk, n = std::min(rows_per_chunk, rows() - first);
        for (std::int64_t r = 0; r < n; ++r)
          for (std::int64_t j = 0; j < e; ++j)
            plan(first + r, j) = factor[j] * c.kernel[(r / L * e + j) * L + r % L] * scale[r];
      }
    });
  }

 private:
  struct chunk {
    A const* kernel;
    std::int64_t blocks;
  };
  std::int64_t chunks() const { return space_.sums.extent(0); }
  chunk chunk_at(std::int64_t i) const {
    std::int64_t const first = i * rows_per_chunk;
    return {space_.kernel.data() + first * experts(),
            sinkhorn::padded_rows(std::min(rows_per_chunk, rows() - first)) / L};
  }
  /// Chunks that are worth a thread's while at this many operations for a row.
  static std::int64_t grain(std::int64_t operations) {
    return std::max<std::int64_t>(1, 65536 / (rows_per_chunk * std::max<std::int64_t>(operations, 1)));
  }
  static math::log_sum get(double const* partial, std::int64_t j) { return {partial[2 * j], partial[2 * j + 1]}; }
  static void put(double* partial, std::int64_t j, math::log_sum s) {
    partial[2 * j] = s.largest;
    partial[2 * j + 1] = s.sum;
  }

  /// Fills K. prepare(block, largest logit of each row) may rewrite the block of logits, and returns the function
  /// that turns what stands there into K.
  template <class Prepare>
  void build(Prepare&& prepare) {
    std::int64_t const e = experts();
    cpu::parallel_for(threads_, chunks(), grain(e), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        std::int64_t const first = i * rows_per_chunk, last = std::min(first + rows_per_chunk, rows());
        std::int64_t refused = 0;
        A* const kernel = space_.kernel.data() + first * e;
        std::int64_t const blocks = chunk_at(i).blocks;
        // All rows are brought side by side before any is worked on: loads that overlap fresh narrow stores are slow.
        for (std::int64_t b = 0; b < blocks; ++b) {
          std::int64_t const r = std::min(first + b * L, last), n = std::min(last - r, L);
          simd::rows_to_lanes<V>(logits_.row(r), logits_.stride(0), n, e, static_cast<A>(NAN), kernel + b * e * L);
        }
        for (std::int64_t b = 0; b < blocks; ++b) refused += fill_block(kernel + b * e * L, prepare);
        refused -= blocks * L - (last - first);
        space_.sums(i, 0) = static_cast<double>(refused);
      }
    });
    double refused = 0;
    for (std::int64_t i = 0; i < chunks(); ++i) refused += space_.sums(i, 0);
    voters_ = rows() - static_cast<std::int64_t>(refused);
  }
  /// Logits in, K out. Returns the number of rows without a vote.
  template <class Prepare>
  std::int64_t fill_block(A* block, Prepare&& prepare) {
    using math::max;
    V test = 0, largest = V(-INFINITY);
    for (std::int64_t j = 0; j < experts(); ++j) {
      V const x = V::load(block + j * L);
      test += x * V(A(0));
      largest = max(largest, x);
    }
    auto const votes = test == V(A(0));
    auto const kernel = prepare(block, largest);
    for (std::int64_t j = 0; j < experts(); ++j)
      select(votes, kernel(V::load(block + j * L)), V(A(0))).store(block + j * L);
    return L - static_cast<std::int64_t>(simd::sum(select(votes, V(A(1)), V(A(0)))));
  }

  /// Calls body(chunk, its E sums) for every chunk and adds the sums up in order.
  template <class Body>
  void over_chunks(double* sums, Body&& body) {
    cpu::parallel_for(threads_, chunks(), grain(experts()), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) body(chunk_at(i), space_.sums.row(i));
    });
    for (std::int64_t j = 0; j < experts(); ++j) {
      sums[j] = 0;
      for (std::int64_t i = 0; i < chunks(); ++i) sums[j] += space_.sums(i, j);
    }
  }

  /// scale_i = mass / (sum_j K_ij w_j + epsilon), for the rows of every `stride`-th block.
  void row_scales(chunk const& c, A const* w, A mass, A epsilon, A* scale, std::int64_t stride = 1) const {
    std::int64_t const e = experts();
    for (std::int64_t b = 0; b < c.blocks; b += group * stride) {
      std::int64_t at[group];
      for (int q = 0; q < group; ++q) at[q] = std::min(b + q * stride, c.blocks - 1);
      V sum[group] = {};
      for (std::int64_t j = 0; j < e; ++j)
        for (int q = 0; q < group; ++q) sum[q] = fma(V::load(c.kernel + (at[q] * e + j) * L), V(w[j]), sum[q]);
      for (int q = 0; q < group; ++q) math::sinkhorn_scale(sum[q], V(mass), V(epsilon)).store(scale + at[q] * L);
    }
  }
  void add_columns(chunk const& c, A const* scale, double* partial) const {
    std::int64_t const e = experts();
    std::int64_t j = 0;
    for (; j + 8 <= e; j += 8) add_columns<8>(c, scale, j, partial);
    if (e & 4) add_columns<4>(c, scale, j, partial), j += 4;
    if (e & 2) add_columns<2>(c, scale, j, partial), j += 2;
    if (e & 1) add_columns<1>(c, scale, j, partial);
  }
  template <int Columns>
  void add_columns(chunk const& c, A const* scale, std::int64_t first, double* partial) const {
    std::int64_t const e = experts();
    V sum[static_cast<std::size_t>(Columns)] = {};
    for (std::int64_t b = 0; b < c.blocks; ++b) {
      A const* const k = c.kernel + (b * e + first) * L;
      V const d = V::load(scale + b * L);
      for (int q = 0; q < Columns; ++q) sum[q] = fma(V::load(k + q * L), d, sum[q]);
    }
    for (int q = 0; q < Columns; ++q) partial[first + q] = static_cast<double>(simd::sum(sum[q]));
  }
  /// partial = sum_i (K_ij d_i) (K_ik d_i) for j < k, row after row of the upper triangle, over every `stride`-th
  /// block.
  void add_pairs(chunk const& c, A const* scale, std::int64_t stride, double* partial) const {
    std::int64_t const e = experts();
    for (std::int64_t j = 0; j < e; j += tile)
      for (std::int64_t k = j; k < e; k += tile)
        add_pairs(c, scale, stride, j, k, partial, std::make_index_sequence<tile>{},
                  std::make_index_sequence<tile * tile>{});
  }
  /// The tile from (first, second) on; the index sequences keep its sums in registers. Columns past the last repeat
  /// it, and their sums are not kept.
  template <std::size_t... C, std::size_t... S>
  void add_pairs(chunk const& c, A const* scale, std::int64_t stride, std::int64_t first, std::int64_t second,
                 double* partial, std::index_sequence<C...>, std::index_sequence<S...>) const {
    std::int64_t const e = experts();
    std::int64_t const left[] = {std::min<std::int64_t>(first + static_cast<std::int64_t>(C), e - 1) * L...};
    std::int64_t const right[] = {std::min<std::int64_t>(second + static_cast<std::int64_t>(C), e - 1) * L...};
    V sum[tile * tile] = {};
    for (std::int64_t b = 0; b < c.blocks; b += stride) {
      A const* const block = c.kernel + b * e * L;
      V const d = V::load(scale + b * L);
      V const x[] = {V::load(block + left[C]) * d * d...};  // not d d first: that may overflow
      V const y[] = {V::load(block + right[C])...};
      ((sum[S] = fma(x[S / tile], y[S % tile], sum[S])), ...);
    }
    for (std::int64_t q = 0; q < tile; ++q)
      for (std::int64_t p = 0; p < tile; ++p) {
        std::int64_t const j = first + q, k = second + p;
        if (j < k && k < e)
          partial[j * (2 * e - j - 1) / 2 + k - j - 1] = static_cast<double>(simd::sum(sum[q * tile + p]));
      }
  }

  int threads_;
  host_view<A const, dyn, dyn> logits_;
  A beta_;
  sinkhorn::work<device::cpu, A> space_;
  std::int64_t voters_ = 0;
};

}  // namespace detail

template <>
struct backend<sinkhorn, device::cpu> {
  template <class A>
  static void forward(device::cpu const& policy, host_view<A const, dyn, dyn> logits, host_view<A, dyn> offset,
                      host_view<sinkhorn::report, dyn> result, sinkhorn::options const& how,
                      host_view<A, dyn, dyn> plan, sinkhorn::work<device::cpu, A> const& space) {
    state<A> s(space, offset.extent(0));
    detail::sinkhorn_sweeps<A> sweeps(policy, logits, how.beta, space);
    if (how.mode == sinkhorn::mode::sound)
      result(0) = sound(sweeps, s, offset, how, plan);
    else
      result(0) = published(sweeps, s, offset, how, plan);
  }

 private:
  /// E numbers each, in the order of their use.
  template <class A>
  struct state {
    double *s, *g, *marginal, *saved_g, *saved_marginal, *step;
    A *base, *w, *previous, *d1;

    state(sinkhorn::work<device::cpu, A> const& space, std::int64_t e) {
      s = space.state.data();
      g = s + (e <= sinkhorn::newton_experts ? e * e : 0);
      marginal = g + e;
      saved_g = marginal + e;
      saved_marginal = saved_g + e;
      step = saved_marginal + e;
      base = reinterpret_cast<A*>(step + e);
      w = base + e;
      previous = w + e;
      d1 = previous + e;
    }
  };
  using action = math::sinkhorn_progress::action;

  template <class A>
  static sinkhorn::report sound(detail::sinkhorn_sweeps<A>& sweeps, state<A> const& s, host_view<A, dyn> offset,
                                sinkhorn::options const& how, host_view<A, dyn, dyn> plan) {
    std::int64_t const e = offset.extent(0);
    bool warm = true;
    for (std::int64_t j = 0; j < e; ++j) warm = warm && std::isfinite(offset(j));
    for (std::int64_t j = 0; j < e; ++j) s.g[j] = warm ? static_cast<double>(offset(j)) : 0;
    normalise<A>(s.g, e);
    rebase(sweeps, s, e);

    math::sinkhorn_progress progress{how.fixed_passes > 0 ? -1.0 : how.tolerance > 0 ? how.tolerance : 1e-3,
                                     how.fixed_passes > 0 ? how.fixed_passes : how.max_passes};
    if (!how.newton || e > sinkhorn::newton_experts) progress.newton_below = 0;
    double const tolerance = progress.tolerance;
    double error = 0;
    std::int64_t stride = sinkhorn::sample_stride(sweeps.rows(), e);
    while (sweeps.voters() > 0) {
      error = measure(sweeps, s, e);
      if (tolerance > 0) progress.tolerance = std::max(tolerance, rounding<A>(s.g, e));
      // A step that gains little may owe that to its sample of the rows.
      if (progress.trial && !(error < progress.saved_error / 4)) stride = 1;
      auto next = progress.next(error);
      if (progress.reach == 0) stride = 1;
      if (next == action::stop) break;
      if (next == action::stop_at_saved || next == action::fixed_point_from_saved) {
        std::copy_n(s.saved_g, e, s.g);
        std::copy_n(s.saved_marginal, e, s.marginal);
        error = progress.saved_error;
        if (next == action::stop_at_saved) {
          weigh(s, e);
          break;
        }
        next = action::fixed_point;
      }
      if (next == action::newton) {
        std::copy_n(s.g, e, s.saved_g);
        std::copy_n(s.marginal, e, s.saved_marginal);
        sweeps.pair_sweep(s.w, s.s, stride);
        for (std::int64_t j = 0; j < e; ++j) s.step[j] = 1 / static_cast<double>(e) - s.marginal[j];
        if (math::sinkhorn_newton_step(e, s.s, s.step)) {
          double const part = math::sinkhorn_damping(e, s.step, progress.reach);
          for (std::int64_t j = 0; j < e; ++j) s.g[j] += part * s.step[j];
        } else {
          progress.refuse_newton();
          next = action::fixed_point;
        }
      }
      if (next == action::fixed_point) fixed_point(sweeps, s, e);
      normalise<A>(s.g, e);
      if (!weigh(s, e)) rebase(sweeps, s, e);
    }

    for (std::int64_t j = 0; j < e; ++j) offset(j) = static_cast<A>(s.g[j]);
    if (plan.present() && sweeps.rows() > 0) {
      A const each = sweeps.voters() > 0 ? A(1) / static_cast<A>(sweeps.voters()) : A(0);
      sweeps.write_plan(s.w, each, A(math::sinkhorn_no_vote), s.w, plan);
    }
    return {progress.passes, static_cast<std::int32_t>(sweeps.rows() - sweeps.voters()), static_cast<float>(error)};
  }

  template <class A>
  static sinkhorn::report published(detail::sinkhorn_sweeps<A>& sweeps, state<A> const& s, host_view<A, dyn> offset,
                                    sinkhorn::options const& how, host_view<A, dyn, dyn> plan) {
    std::int64_t const e = offset.extent(0);
    A const epsilon = static_cast<A>(math::sinkhorn_epsilon);
    sweeps.build_published();
    sinkhorn::report report{0, static_cast<std::int32_t>(sweeps.rows() - sweeps.voters()), 0};
    if (sweeps.voters() == 0) {
      for (std::int64_t j = 0; j < e; ++j) offset(j) = 0;
      if (plan.present() && sweeps.rows() > 0) sweeps.write_plan(s.w, A(0), epsilon, s.w, plan);
      return report;
    }
    A const row_mass = A(1) / static_cast<A>(sweeps.voters()), column_mass = A(1) / static_cast<A>(e);
    A const tolerance = static_cast<A>(how.tolerance > 0 ? how.tolerance : 1e-4);
    sweeps.column_sums(s.marginal);
    for (std::int64_t j = 0; j < e; ++j) {
      s.w[j] = how.mode == sinkhorn::mode::ones ? A(1) : A(1) / (static_cast<A>(e) * static_cast<A>(s.marginal[j]));
      s.previous[j] = s.w[j];
    }
    A moved = A(INFINITY);
    std::int32_t const limit = how.fixed_passes > 0 ? how.fixed_passes : how.max_passes;
    while (report.passes < limit && (how.fixed_passes > 0 || moved > tolerance)) {
      std::copy_n(s.w, e, s.previous);
      sweeps.sweep(s.previous, row_mass, epsilon, s.marginal);
      moved = 0;
      for (std::int64_t j = 0; j < e; ++j) {
        s.w[j] = math::sinkhorn_scale(static_cast<A>(s.marginal[j]), column_mass, epsilon);
        moved += std::abs(s.previous[j] - s.w[j]) / static_cast<A>(e);
      }
      ++report.passes;
    }

    bool sane = true;
    std::copy_n(s.w, e, s.d1);
    for (std::int64_t j = 0; j < e; ++j) {
      s.g[j] = std::log(static_cast<double>(s.d1[j]));
      sane = sane && std::isfinite(s.g[j]);
    }
    if (sane) {
      normalise<A>(s.g, e);
      rebase(sweeps, s, e);
      report.error = static_cast<float>(measure(sweeps, s, e));
    } else {
      report.error = INFINITY;
    }
    for (std::int64_t j = 0; j < e; ++j) offset(j) = static_cast<A>(s.g[j]);
    if (plan.present()) {  // last, for it may overwrite the logits that the error is measured on
      sweeps.build_published();
      sweeps.write_plan(s.previous, row_mass, epsilon, s.d1, plan);
    }
    return report;
  }

  /// The largest becomes 0; every g is then a value of A, so that what is measured is what is returned.
  template <class A>
  static void normalise(double* g, std::int64_t e) {
    double const largest = *std::max_element(g, g + e);
    for (std::int64_t j = 0; j < e; ++j) g[j] = static_cast<double>(static_cast<A>(g[j] - largest));
  }
  /// Error that rounding g to A alone can make.
  template <class A>
  static double rounding(double const* g, std::int64_t e) {
    double const spread = -*std::min_element(g, g + e);
    return 8 * static_cast<double>(std::numeric_limits<A>::epsilon()) * (1 + spread);
  }

  /// K is built around an offset, and what g has moved since stands in the weights: K w stays in range as long as
  /// that is not much.
  template <class A>
  static void rebase(detail::sinkhorn_sweeps<A>& sweeps, state<A> const& s, std::int64_t e) {
    for (std::int64_t j = 0; j < e; ++j) s.base[j] = static_cast<A>(s.g[j]);
    for (std::int64_t j = 0; j < e; ++j) s.w[j] = 1;
    sweeps.build_shifted(s.base);
  }
  /// w = e^(g - base). Returns whether g is near enough to the base.
  template <class A>
  static bool weigh(state<A> const& s, std::int64_t e) {
    bool near = true;
    for (std::int64_t j = 0; j < e; ++j) {
      double const moved = s.g[j] - static_cast<double>(s.base[j]);
      near = near && std::abs(moved) < 30;
      s.w[j] = static_cast<A>(std::exp(moved));
    }
    return near;
  }
  /// Finds the marginals c_j of the offset g; returns the error.
  template <class A>
  static double measure(detail::sinkhorn_sweeps<A>& sweeps, state<A> const& s, std::int64_t e) {
    sweeps.sweep(s.w, A(1), A(math::sinkhorn_no_vote), s.marginal);
    double error = 0;
    for (std::int64_t j = 0; j < e; ++j) {
      s.marginal[j] *= static_cast<double>(s.w[j]) / static_cast<double>(sweeps.voters());
      error = std::max(error, math::sinkhorn_error(s.marginal[j], e));
    }
    return error;
  }
  template <class A>
  static void fixed_point(detail::sinkhorn_sweeps<A>& sweeps, state<A> const& s, std::int64_t e) {
    // An expert that all rows shun by far has lost its marginal to underflow: take the logarithm's way once.
    bool const lost = *std::min_element(s.marginal, s.marginal + e) < 1e-17;
    if (lost)
      sweeps.log_sweep(s.g, s.step);
    else
      for (std::int64_t j = 0; j < e; ++j) s.step[j] = std::log(s.marginal[j]);
    for (std::int64_t j = 0; j < e; ++j) s.g[j] += math::sinkhorn_column_step(s.step[j], e);
  }
};

}  // namespace blackmamba
