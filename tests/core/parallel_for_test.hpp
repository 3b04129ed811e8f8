#include <blackmamba/core/cpu/parallel_for.hpp>

#include "support/support.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <utility>

using namespace blackmamba;

namespace {

using ranges = std::vector<std::pair<std::int64_t, std::int64_t>>;

/// The ranges that parallel_for hands out, in ascending order.
ranges ranges_of(int threads, std::int64_t n, std::int64_t grain) {
  std::mutex mutex;
  ranges all;
  cpu::parallel_for(threads, n, grain, [&](std::int64_t begin, std::int64_t end) {
    std::lock_guard<std::mutex> const lock(mutex);
    all.emplace_back(begin, end);
  });
  std::sort(all.begin(), all.end());
  return all;
}

/// Adds up 0 .. n - 1 in parallel, each thread into elements of its own range.
std::int64_t parallel_sum(int threads, std::int64_t n) {
  std::vector<std::int64_t> part(static_cast<std::size_t>(n));
  cpu::parallel_for(threads, n, 3, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) part[static_cast<std::size_t>(i)] = i;
  });
  return std::accumulate(part.begin(), part.end(), std::int64_t{0});
}

}  // namespace

TEST_CASE("parallel_for: ranges cover [0, n) once and begin at multiples of the grain") {
  for (int threads : {0, 1, 2, 3, 7, 16})
    for (std::int64_t n : {1, 2, 5, 16, 17, 63, 64, 65, 1000})
      for (std::int64_t grain : {1, 3, 16, 64, 2000}) {
        std::int64_t next = 0;
        auto const all = ranges_of(threads, n, grain);
        CHECK(static_cast<int>(all.size()) <= cpu::thread_count(threads));
        for (auto const& [begin, end] : all) {
          CHECK(begin == next);
          CHECK(begin % grain == 0);
          CHECK(end > begin);
          next = end;
        }
        CHECK(next == n);
      }
}

TEST_CASE("parallel_for: nothing to do calls nothing") {
  CHECK(ranges_of(4, 0, 1).empty());
  CHECK(ranges_of(4, -3, 1).empty());
  bool called = false;
  cpu::parallel_tasks(4, 0, [&](auto const&) { called = true; });
  CHECK_FALSE(called);
}

TEST_CASE("parallel_for: what one region writes, the next one reads on any thread") {
  std::vector<int> x(1 << 12, 0), y(x.size(), 0);
  auto const n = static_cast<std::int64_t>(x.size());
  for (int round = 0; round < 200; ++round) {
    cpu::parallel_for(4, n, 1, [&](std::int64_t begin, std::int64_t end) {
      for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) x[i] = y[i] + 1;
    });
    cpu::parallel_for(3, n, 16, [&](std::int64_t begin, std::int64_t end) {
      for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) y[i] = x[x.size() - 1 - i];
    });
  }
  CHECK(std::all_of(y.begin(), y.end(), [](int v) { return v == 200; }));
}

TEST_CASE("parallel_for: threads that have gone to sleep come back") {
  for (int round = 0; round < 3; ++round) {
    CHECK(parallel_sum(4, 100) == 4950);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

TEST_CASE("parallel_for: the first exception of a body is rethrown, and the team works on") {
  for (int threads : {1, 2, 5}) {
    auto const throwing = [&](std::int64_t at) {
      cpu::parallel_for(threads, 10, 1, [&](std::int64_t begin, std::int64_t end) {
        if (begin <= at && at < end) throw std::runtime_error("range with " + std::to_string(at));
      });
    };
    for (std::int64_t at : {0, 4, 9})
      CHECK(test::message_of<std::runtime_error>([&] { throwing(at); }) == "range with " + std::to_string(at));
    CHECK_THROWS_AS(cpu::parallel_for(threads, 10, 1, [](std::int64_t, std::int64_t) { throw 1; }), int);
    CHECK(parallel_sum(threads, 100) == 4950);
  }
}

TEST_CASE("parallel_for: nested regions run on the thread that opens them") {
  for (int threads : {1, 2, 5}) {
    std::vector<std::int64_t> sum(7, 0);
    std::atomic<int> strangers{0};
    cpu::parallel_for(threads, 7, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        auto const owner = std::this_thread::get_id();
        cpu::parallel_for(threads, 50, 1, [&](std::int64_t first, std::int64_t last) {
          if (threads > 1 && std::this_thread::get_id() != owner) ++strangers;
          for (std::int64_t j = first; j < last; ++j) sum[static_cast<std::size_t>(i)] += i * j;
        });
      }
    });
    CHECK(strangers == 0);
    for (std::size_t i = 0; i < sum.size(); ++i) CHECK(sum[i] == static_cast<std::int64_t>(i) * 1225);
  }
}

TEST_CASE("parallel_for: an exception of a nested region passes through both") {
  CHECK(test::message_of<std::runtime_error>([] {
          cpu::parallel_for(3, 6, 1, [](std::int64_t, std::int64_t) {
            cpu::parallel_for(3, 6, 1, [](std::int64_t begin, std::int64_t) {
              if (begin > 0) throw std::runtime_error("inner");
            });
          });
        }) == "inner");
  CHECK(parallel_sum(3, 100) == 4950);
}

TEST_CASE("parallel_for: several threads call at once, with and without exceptions") {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 6; ++caller)
    callers.emplace_back([&, caller] {
      for (int round = 0; round < 200; ++round) {
        if (parallel_sum(1 + caller % 4, 300) != 44850) ++wrong;
        try {
          cpu::parallel_for(3, 9, 1, [&](std::int64_t begin, std::int64_t) {
            if (begin == 0) throw caller;
          });
          ++wrong;
        } catch (int thrown) {
          if (thrown != caller) ++wrong;
        }
      }
    });
  for (auto& c : callers) c.join();
  CHECK(wrong == 0);
}

TEST_CASE("parallel_tasks: each task is handed out once, in ascending order on each thread") {
  for (int threads : {0, 1, 2, 5})
    for (std::int64_t n : {1, 2, 3, 100, 5000}) {
      std::vector<int> count(static_cast<std::size_t>(n), 0);
      std::atomic<int> bodies{0}, descents{0};
      cpu::parallel_tasks(threads, n, [&](auto const& next) {
        ++bodies;
        std::int64_t last = -1;
        for (std::int64_t task = next(); task < n; task = next()) {
          if (task <= last) ++descents;
          last = task;
          ++count[static_cast<std::size_t>(task)];
        }
        if (next() != n) ++descents;  // the end stays the end
      });
      CHECK(bodies <= cpu::thread_count(threads));
      CHECK(descents == 0);
      CHECK(std::all_of(count.begin(), count.end(), [](int c) { return c == 1; }));
    }
}

TEST_CASE("parallel_tasks: an exception leaves the other threads their tasks") {
  CHECK(test::message_of<std::runtime_error>([] {
          cpu::parallel_tasks(4, 100, [](auto const& next) {
            for (std::int64_t task = next(); task < 100; task = next())
              if (task == 17) throw std::runtime_error("task 17");
          });
        }) == "task 17");
  CHECK(parallel_sum(4, 100) == 4950);
}
