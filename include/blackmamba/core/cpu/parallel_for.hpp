#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace blackmamba::cpu {

namespace detail {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();  // <immintrin.h> for this one would cost every includer a quarter of a second
#endif
}

/// Helper threads that wait for work: first spinning, for a model's step is a row of short parallel regions, then
/// asleep. The calling thread takes a share itself. One region at a time; whoever finds the team busy works alone.
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

  /// Calls work(context, i) for i in [0, shares), each once, on up to `shares` threads; returns when all are done.
  void run(int shares, void (*work)(void*, int), void* context) {
    std::unique_lock<std::mutex> one_at_a_time(busy_, std::try_to_lock);
    if (!one_at_a_time.owns_lock() || shares <= 1 || inside_) {
      for (int i = 0; i < shares; ++i) work(context, i);
      return;
    }
    grow(shares - 1);
    work_ = work;
    context_ = context;
    shares_ = shares;
    pending_.store(static_cast<int>(helpers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    inside_ = true;
    work(context, 0);
    inside_ = false;
    for (int spin = 0; pending_.load(std::memory_order_acquire) != 0; ++spin)
      if (spin < spins)
        pause();
      else
        std::this_thread::yield();
  }

 private:
  static constexpr int spins = 4000;

  thread_team() = default;
  ~thread_team() {
    {
      std::lock_guard<std::mutex> lock(sleep_);
      stop_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (auto& t : helpers_) t.join();
  }

  void grow(int helpers) {
    while (static_cast<int>(helpers_.size()) < helpers) {
      int const share = static_cast<int>(helpers_.size()) + 1;
      helpers_.emplace_back([this, share, seen = generation_.load()] { serve(share, seen); });
    }
  }

  void serve(int share, std::uint64_t seen) {
    inside_ = true;
    for (;;) {
      int spin = 0;
      while (generation_.load(std::memory_order_acquire) == seen && spin < spins) {
        pause();
        ++spin;
      }
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      }
      ++seen;
      if (stop_) return;
      if (share < shares_) work_(context_, share);
      pending_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  inline static thread_local bool inside_ = false;  // nested regions run on the thread that opens them

  std::mutex busy_;
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<int> pending_{0};
  void (*work_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int shares_ = 0;
  bool stop_ = false;
  std::vector<std::thread> helpers_;
};

}  // namespace detail

/// Number of threads that a policy's `threads` asks for.
inline int thread_count(int threads) { return threads > 0 ? threads : detail::thread_team::cores(); }

/// Calls body(begin, end) on disjoint ranges that cover [0, n), on up to `threads` threads (0: all cores). Ranges begin at
/// multiples of `grain`, so that what one grain computes does not depend on the number of threads. The first exception that a
/// body throws is rethrown here. Nested calls run serially.
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

}  // namespace blackmamba::cpu
