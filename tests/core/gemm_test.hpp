#include <blackmamba/core/cpu/column_sums.hpp>
#include <blackmamba/core/cpu/gemm.hpp>

#include "support/sums.hpp"
#include "support/support.hpp"

#include <limits>
#include <string>
#include <thread>
#include <vector>

using namespace blackmamba;
using cpu::transpose;

namespace {

/// A matrix in host memory whose rows are `stride` apart; what lies between them must stay as it is.
template <class T>
struct matrix {
  std::int64_t rows, cols, stride;
  std::vector<T> memory;

  static constexpr double gap = 77;  // exact in every type
  matrix(std::int64_t r, std::int64_t c, std::int64_t apart) : rows(r), cols(c), stride(c + apart) {
    memory.assign(static_cast<std::size_t>(rows * stride + 1), convert<T>(gap));
  }
  matrix(std::int64_t r, std::int64_t c, std::int64_t apart, std::uint64_t seed) : matrix(r, c, apart) {
    auto const v = test::random_normal(r * c, seed);
    for (std::int64_t i = 0; i < r; ++i)
      for (std::int64_t j = 0; j < c; ++j) at(i, j) = convert<T>(v[static_cast<std::size_t>(i * c + j)]);
  }
  T& at(std::int64_t i, std::int64_t j) { return memory[static_cast<std::size_t>(i * stride + j)]; }
  double operator()(std::int64_t i, std::int64_t j) const {
    return static_cast<double>(widen(memory[static_cast<std::size_t>(i * stride + j)]));
  }
  test::values values() const {
    test::values v;
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < cols; ++j) v.push_back((*this)(i, j));
    return v;
  }
  bool gaps_untouched() const {
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = cols; j < stride; ++j)
        if ((*this)(i, j) != gap) return false;
    return memory.empty() || static_cast<double>(widen(memory.back())) == gap;
  }
};

/// A product with operands of its own.
template <class TA, class TB, class TC>
struct problem {
  transpose ta, tb;
  std::int64_t m, n, k;
  update mode;
  matrix<TA> a;
  matrix<TB> b;
  matrix<TC> c;
  std::vector<accum_t<TC>> bias;

  problem(transpose left, transpose right, std::int64_t m_, std::int64_t n_, std::int64_t k_, std::int64_t apart = 0,
          update how = update::overwrite, bool with_bias = false, std::uint64_t seed = 1)
      : ta(left),
        tb(right),
        m(m_),
        n(n_),
        k(k_),
        mode(how),
        a(ta == transpose::no ? m : k, ta == transpose::no ? k : m, apart, seed),
        b(tb == transpose::no ? k : n, tb == transpose::no ? n : k, 2 * apart, seed + 1),
        c(m, n, 3 * apart, seed + 2) {
    if (with_bias)
      for (double x : test::random_normal(n, seed + 3)) bias.push_back(static_cast<accum_t<TC>>(x));
  }

  /// The definition, in double.
  test::sums expected() const {
    test::sums v(static_cast<std::size_t>(m * n));
    for (std::int64_t i = 0; i < m; ++i)
      for (std::int64_t j = 0; j < n; ++j) {
        auto& s = v[static_cast<std::size_t>(i * n + j)];
        if (mode == update::accumulate) s.add(c(i, j));
        if (!bias.empty()) s.add(static_cast<double>(bias[static_cast<std::size_t>(j)]));
        for (std::int64_t p = 0; p < k; ++p)
          s.add((ta == transpose::no ? a(i, p) : a(p, i)) * (tb == transpose::no ? b(p, j) : b(j, p)));
      }
    return v;
  }
  cpu::product<TA, TB, TC> product() {
    return {ta,
            tb,
            m,
            n,
            k,
            a.memory.data(),
            a.stride,
            b.memory.data(),
            b.stride,
            c.memory.data(),
            c.stride,
            mode,
            bias.empty() ? nullptr : bias.data()};
  }
  void check(test::sums const& reference, std::string const& what) const {
    test::check_sums<TC>(c.values(), reference, k + 2, what);
    CHECK_MESSAGE(c.gaps_untouched(), what);
  }
};

template <class TA, class TB, class TC>
std::string name_of(problem<TA, TB, TC> const& x) {
  std::string s = x.ta == transpose::yes ? "A^T (" : "A (";
  s += std::to_string(x.m) + ", " + std::to_string(x.k) + (x.tb == transpose::yes ? ") B^T (" : ") B (");
  return s + std::to_string(x.k) + ", " + std::to_string(x.n) + ")";
}

template <class TA, class TB = TA, class TC = TA>
void check_product(transpose ta, transpose tb, std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t apart,
                   update mode, bool bias, std::uint64_t seed = 1) {
  problem<TA, TB, TC> x(ta, tb, m, n, k, apart, mode, bias, seed);
  auto const expected = x.expected();
  cpu::gemm(0, x.product());
  x.check(expected, name_of(x));
}

}  // namespace

TEST_CASE_TEMPLATE("gemm: equals its definition at every edge of its tiles", T, STORAGE_TYPES) {
  for (auto ta : {transpose::no, transpose::yes})
    for (auto tb : {transpose::no, transpose::yes}) {
      for (std::int64_t m : {0, 1, 2, 3, 4, 5, 7, 8, 9, 17})
        for (std::int64_t n : {0, 1, 7, 15, 16, 17, 31, 33, 47, 48, 49, 64, 65})
          for (std::int64_t k : {0, 1, 3, 15, 16, 17, 40})
            check_product<T>(ta, tb, m, n, k, (m + n + k) % 3, n % 2 ? update::accumulate : update::overwrite,
                             k % 2 == 0);
      for (std::int64_t m : {63, 64, 65, 127, 128, 129})
        for (std::int64_t n : {95, 96, 97, 127, 128, 129, 240, 257})
          check_product<T>(ta, tb, m, n, 20, 5, update::overwrite, true);
      for (std::int64_t k : {127, 128, 129, 255, 256, 257, 385, 769, 2000})  // blocks of the depth
        for (std::int64_t m : {5, 21})
          for (auto mode : {update::overwrite, update::accumulate})
            check_product<T>(ta, tb, m, 50, k, 1, mode, k % 2 == 0);
    }
}

TEST_CASE("gemm: equals its definition at random shapes") {
  for (std::uint64_t i = 0; i < 400; ++i) {
    auto const pick = [&](std::uint64_t what, std::int64_t low, std::int64_t high) {
      return test::random_integer(100 + what, i, low, high);
    };
    bool const large = i % 8 == 0;
    std::int64_t const m = pick(0, 1, large ? 300 : 40), n = pick(1, 1, large ? 500 : 80),
                       k = pick(2, 0, large ? 900 : 90);
    auto const ta = pick(3, 0, 1) ? transpose::yes : transpose::no, tb = pick(4, 0, 1) ? transpose::yes : transpose::no;
    auto const mode = pick(5, 0, 1) ? update::accumulate : update::overwrite;
    bool const bias = pick(6, 0, 1) == 1;
    std::int64_t const apart = pick(7, 0, 9);
    switch (i % 4) {  // the combinations that linear uses, forward and backward
      case 0:
        check_product<float>(ta, tb, m, n, k, apart, mode, bias, i);
        break;
      case 1:
        check_product<bfloat16, bfloat16, float>(ta, tb, m, n, k, apart, mode, bias, i);
        break;
      case 2:
        check_product<float, bfloat16, bfloat16>(ta, tb, m, n, k, apart, mode, bias, i);
        break;
      default:
        check_product<float, half, float>(ta, tb, m, n, k, apart, mode, bias, i);
        break;
    }
  }
}

TEST_CASE("gemm: overwriting does not read what was there") {
  for (std::int64_t m : {1, 8, 9, 40})
    for (std::int64_t k : {0, 5, 800}) {
      problem<bfloat16, bfloat16, bfloat16> x(transpose::no, transpose::yes, m, 50, k);
      auto const expected = x.expected();
      x.c.memory.assign(x.c.memory.size(), convert<bfloat16>(std::numeric_limits<float>::quiet_NaN()));
      cpu::gemm(0, x.product());
      test::check_sums<bfloat16>(x.c.values(), expected, k, "c");
    }
}

TEST_CASE("gemm: infinities and NaNs stay in their row and column") {
  double const infinity = std::numeric_limits<double>::infinity();
  for (std::int64_t m : {3, 30}) {
    problem<float, float, float> x(transpose::no, transpose::yes, m, 70, 33);
    x.a.at(1, 32) = std::numeric_limits<float>::infinity();
    x.b.at(69, 0) = std::numeric_limits<float>::quiet_NaN();
    cpu::gemm(0, x.product());
    for (std::int64_t i = 0; i < m; ++i)
      for (std::int64_t j = 0; j < 70; ++j) {
        if (j == 69)
          CHECK(std::isnan(x.c(i, j)));
        else
          CHECK((std::abs(x.c(i, j)) == infinity) == (i == 1));
      }
  }
}

TEST_CASE("gemm: the same bits for any number of threads") {
  for (auto ta : {transpose::no, transpose::yes})
    for (std::int64_t m : {1, 6, 40, 300}) {
      problem<float, bfloat16, float> x(ta, transpose::yes, m, 700, 500, 1, update::overwrite, true);
      test::values one;
      for (int threads : {1, 2, 3, 8}) {
        x.c.memory.assign(x.c.memory.size(), 0.0f);
        cpu::gemm(threads, x.product());
        if (threads == 1) one = x.c.values();
        test::check_equal(x.c.values(), one, name_of(x));
      }
    }
}

TEST_CASE("gemm: a row of more than eight has the same bits in any company") {
  for (auto ta : {transpose::no, transpose::yes})
    for (std::int64_t n : {2, 7, 42, 333})
      for (std::int64_t k : {3, 30, 450}) {
        problem<float, float, float> all(ta, transpose::yes, 300, n, k, 0, update::overwrite, true);
        cpu::gemm(0, all.product());
        for (std::int64_t first : {0, 1, 130})
          for (std::int64_t rows : {9, 64, 170}) {
            matrix<float> c(rows, n, 0);
            auto part = all.product();
            part.m = rows;
            part.a += first * (ta == transpose::yes ? 1 : part.lda);
            part.c = c.memory.data();
            cpu::gemm(0, part);
            for (std::int64_t i = 0; i < rows; ++i)
              for (std::int64_t j = 0; j < n; ++j) REQUIRE(c(i, j) == all.c(first + i, j));
          }
      }
}

TEST_CASE("gemm_deep: equals its definition in any number of parts, and does not depend on the threads") {
  for (std::int64_t parts : {1, 2, 3, 7})
    for (std::int64_t k : {0, 1, 5, 600, 1111}) {
      problem<bfloat16, bfloat16, float> x(transpose::yes, transpose::no, 42, 130, k, 3, update::accumulate);
      auto const expected = x.expected();
      auto const before = x.c;
      std::vector<float> memory(static_cast<std::size_t>(parts * 42 * 130), std::numeric_limits<float>::quiet_NaN());
      host_view<float, dyn, dyn, dyn> const partial(memory.data(), parts - 1, 42, 130);
      test::values one;
      for (int threads : {1, 2, 5}) {
        x.c = before;
        cpu::gemm_deep(threads, x.product(), partial);
        x.check(expected, name_of(x));
        if (threads == 1) one = x.c.values();
        test::check_equal(x.c.values(), one, name_of(x));
      }
    }
}

TEST_CASE("gemm_groups: products of different sizes in one row of tasks") {
  std::vector<problem<float, float, float>> group;
  std::vector<test::sums> expected;
  for (std::int64_t m : {0, 3, 0, 0, 65, 1, 8, 9, 200, 0}) {
    group.emplace_back(transpose::no, transpose::yes, m, 100 + m, 70, 2, update::overwrite, m % 2 == 1, 10 + m);
    expected.push_back(group.back().expected());
  }
  for (int threads : {1, 2, 5}) {
    for (auto& g : group) g.c = matrix<float>(g.c.rows, g.c.cols, 6, 3);
    cpu::gemm_groups(threads, static_cast<std::int64_t>(group.size()),
                     [&](std::int64_t i) { return group[static_cast<std::size_t>(i)].product(); });
    for (std::size_t i = 0; i < group.size(); ++i) group[i].check(expected[i], name_of(group[i]));
  }
  cpu::gemm_groups(2, 0, [&](std::int64_t) { return group[0].product(); });
}

TEST_CASE("gemm: called within a parallel region and from several threads at once") {
  std::vector<problem<float, float, float>> group;
  for (std::uint64_t i = 0; i < 6; ++i)
    group.emplace_back(transpose::yes, transpose::no, 70, 90, 400, 1, update::overwrite, false, i);
  auto const check = [&] {
    for (auto const& g : group) g.check(g.expected(), name_of(g));
  };
  cpu::parallel_for(3, 6, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) cpu::gemm(3, group[static_cast<std::size_t>(i)].product());
  });
  check();
  std::vector<std::thread> callers;
  for (auto& g : group) {
    g.c = matrix<float>(70, 90, 3);
    callers.emplace_back([&g] { cpu::gemm(2, g.product()); });
  }
  for (auto& c : callers) c.join();
  check();
}

TEST_CASE_TEMPLATE("add_column_sums: equals its definition, for any number of threads", T, STORAGE_TYPES) {
  using A = accum_t<T>;
  for (std::int64_t rows : {0, 1, 63, 64, 65, 300})
    for (std::int64_t cols : {0, 1, 15, 16, 17, 130}) {
      matrix<T> const x(rows, cols, 3, 1);
      test::sums expected(static_cast<std::size_t>(cols), test::sum{1, 1});
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < cols; ++j) expected[static_cast<std::size_t>(j)].add(x(i, j));
      test::values one;
      for (int threads : {1, 3}) {
        std::vector<A> sum(static_cast<std::size_t>(cols), A(1));
        cpu::add_column_sums(threads, rows, cols, x.memory.data(), x.stride, sum.data());
        test::values const actual(sum.begin(), sum.end());
        test::check_sums<A>(actual, expected, rows + 1, "sums");
        if (threads == 1) one = actual;
        test::check_equal(actual, one, "sums");
      }
    }
}
