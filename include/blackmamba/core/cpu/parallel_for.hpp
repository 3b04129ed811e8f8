#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace blackmamba::cpu {

namespace detail {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();  // <immintrin.h> for this one would cost every includer a quarter of a second
#endif
}

/// Helper threads that wait for work: first spinning, for a model's step is a row of short parallel regions, then
/// asleep. The calling thread takes a share itself, and then the shares of helpers that have not woken up by then: a
/// region never waits for a thread that the system does not run. One region at a time; whoever finds the team busy
/// works alone.
class thread_team {
 public:
  static thread_team& instance() {
    static thread_team team;
    return team;
  }
  static int cores() {
    static int const n = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    return n;
  }

  /// Calls work(context, i) for i in [0, shares), each once, on up to `shares` threads; returns when all are done. work
  /// must not throw.
  void run(int shares, void (*work)(void*, int), void* context) {
    // A thread inside a region may hold the lock, and must not try to take it again.
    std::unique_lock<std::mutex> one_at_a_time(busy_, std::defer_lock);
    if (shares <= 1 || inside_ || !one_at_a_time.try_lock()) {
      for (int i = 0; i < shares; ++i) work(context, i);
      return;
    }
    int const helping = std::min(shares - 1, grow(shares - 1));
    work_ = work;
    context_ = context;
    for (int i = 0; i < helping; ++i) {
      helpers_[static_cast<std::size_t>(i)]->state.store(posted, std::memory_order_release);
      helpers_[static_cast<std::size_t>(i)]->state.notify_one();
    }
    inside_ = true;
    work(context, 0);
    for (int i = helping; i < shares - 1; ++i) work(context, i + 1);
    for (int i = 0; i < helping; ++i) {
      auto& state = helpers_[static_cast<std::size_t>(i)]->state;
      int expected = posted;
      if (state.compare_exchange_strong(expected, idle, std::memory_order_acquire)) work(context, i + 1);
    }
    inside_ = false;
    for (int i = 0; i < helping; ++i)
      for (int spin = 0; helpers_[static_cast<std::size_t>(i)]->state.load(std::memory_order_acquire) != idle; ++spin)
        if (spin < spins)
          pause();
        else
          std::this_thread::yield();
    context_ = nullptr;  // it may lie on the caller's stack
  }

 private:
  static constexpr int spins = 4000;
  /// A helper's share waits to be taken, by the helper or by the caller; the helper works on it; there is none.
  enum : int { idle, posted, working, stopping };
  struct alignas(64) helper {
    std::atomic<int> state{idle};
    std::thread thread;
  };

  thread_team() = default;
  ~thread_team() {
    for (auto& h : helpers_) {
      h->state.store(stopping, std::memory_order_release);
      h->state.notify_one();
    }
    for (auto& h : helpers_) h->thread.join();
  }

  /// Up to `helpers` helpers, fewer where the system gives no more threads; returns how many there are.
  int grow(int helpers) {
    try {
      helpers_.reserve(static_cast<std::size_t>(helpers));
      while (static_cast<int>(helpers_.size()) < helpers) {
        auto h = std::make_unique<helper>();
        h->thread = std::thread(
            [this, &state = h->state, share = static_cast<int>(helpers_.size()) + 1] { serve(state, share); });
        helpers_.push_back(std::move(h));
      }
    } catch (std::system_error const&) {
    }
    return static_cast<int>(helpers_.size());
  }

  void serve(std::atomic<int>& state, int share) {
    inside_ = true;
    for (;;) {
      for (int spin = 0; spin < spins && state.load(std::memory_order_relaxed) == idle; ++spin) pause();
      state.wait(idle, std::memory_order_relaxed);
      int expected = posted;
      if (state.compare_exchange_strong(expected, working, std::memory_order_acquire)) {
        work_(context_, share);
        state.store(idle, std::memory_order_release);
      } else if (expected == stopping) {
        return;
      }
    }
  }

  inline static thread_local bool inside_ = false;  // nested regions run on the thread that opens them

  std::mutex busy_;
  void (*work_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::vector<std::unique_ptr<helper>> helpers_;
};

}  // namespace detail

/// Number of threads that a policy's `threads` asks for.
inline int thread_count(int threads) { return threads > 0 ? threads : detail::thread_team::cores(); }

/// Calls body(begin, end) on disjoint ranges that cover [0, n), on up to `threads` threads (0: all cores). Ranges begin
/// at multiples of `grain`, so that what one grain computes does not depend on the number of threads. The first
/// exception that a body throws is rethrown here. Nested calls run serially.
template <class Body>
void parallel_for(int threads, std::int64_t n, std::int64_t grain, Body&& body) {
  if (n <= 0) return;
  std::int64_t const grains = (n + grain - 1) / grain;
  int const shares = static_cast<int>(std::min<std::int64_t>(thread_count(threads), grains));
  if (shares <= 1) {
    body(std::int64_t{0}, n);
    return;
  }
  struct region {
    Body& body;
    std::int64_t n, grain, grains;
    int shares;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr failure = nullptr;
  } shared{body, n, grain, grains, shares};
  detail::thread_team::instance().run(
      shares,
      [](void* context, int i) {
        auto& r = *static_cast<region*>(context);
        std::int64_t const begin = r.grains * i / r.shares * r.grain;
        std::int64_t const end = std::min(r.grains * (i + 1) / r.shares * r.grain, r.n);
        try {
          if (begin < end) r.body(begin, end);
        } catch (...) {
          if (!r.failed.test_and_set()) r.failure = std::current_exception();
        }
      },
      &shared);
  if (shared.failure) std::rethrow_exception(shared.failure);
}

/// Calls body(next) once on each of up to `threads` threads (0: all cores). next() hands out 0, 1, ..., n - 1, each to
/// one thread, and from then on n: for tasks of unequal size, and for bodies that keep something from one task to the
/// next. What a task computes must not depend on the thread that takes it. Exceptions and nesting as in parallel_for.
template <class Body>
void parallel_tasks(int threads, std::int64_t n, Body&& body) {
  if (n <= 0) return;
  std::atomic<std::int64_t> claimed{0};
  auto const next = [&] { return std::min(claimed.fetch_add(1, std::memory_order_relaxed), n); };
  std::int64_t const shares = std::min<std::int64_t>(thread_count(threads), n);
  parallel_for(static_cast<int>(shares), shares, 1, [&](std::int64_t, std::int64_t) { body(next); });
}

}  // namespace blackmamba::cpu
