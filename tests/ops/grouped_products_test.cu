#include "support/policy_cuda.hpp"

#include "support/support.hpp"

#include <blackmamba/core/cuda/gemm_cuda.cuh>

#include <vector>

using namespace blackmamba;
using cuda::grouping;
using cuda::transpose;

/// gemm_groups in every layout, for groups that begin and end anywhere: also those that no operator asks for, and that
/// the kernels for tensor cores must leave alone.
namespace {

template <class T, transpose TA, transpose TB>
void check_groups(grouping by, std::vector<double> const& offsets, std::int64_t m, std::int64_t n, std::int64_t k) {
  INFO("by ", by == grouping::rows ? "rows" : "depth", ", A ", TA == transpose::no ? "along" : "across", ", B ",
       TB == transpose::yes ? "along" : "across", ", ", m, " x ", n, " x ", k);
  bool const rows = by == grouping::rows;
  auto const groups = static_cast<std::int64_t>(offsets.size()) - 1;
  std::int64_t const of_b = rows ? groups : 1, of_c = rows ? 1 : groups;
  std::int64_t const lda = TA == transpose::no ? k : m, ldb = TB == transpose::yes ? k : n;
  // Operands are rounded before the sums that they are compared with.
  auto const a = test::upload<T>(test::random_normal(m * k, 1), m * k);
  auto const b = test::upload<T>(test::random_normal(of_b * n * k, 2), of_b * n * k);
  auto const c = test::upload<float>(test::random_normal(of_c * m * n, 3), of_c * m * n);
  auto const offset = test::upload<std::int64_t>(offsets, groups + 1);
  auto const u = test::download(a), v = test::download(b);
  auto expected = test::download(c);
  auto const at = [](std::int64_t i) { return static_cast<std::size_t>(i); };
  for (std::int64_t e = 0; e < groups; ++e) {
    auto const begin = static_cast<std::int64_t>(offsets[at(e)]), end = static_cast<std::int64_t>(offsets[at(e + 1)]);
    for (std::int64_t i = rows ? begin : 0; i < (rows ? end : m); ++i)
      for (std::int64_t j = 0; j < n; ++j) {
        double sum = 0;
        for (std::int64_t p = rows ? 0 : begin; p < (rows ? k : end); ++p)
          sum += u[at(TA == transpose::no ? i * lda + p : p * lda + i)] *
                 v[at((rows ? e * n * k : 0) + (TB == transpose::yes ? j * ldb + p : p * ldb + j))];
        expected[at((rows ? 0 : e * m * n) + i * n + j)] += sum;
      }
  }
  cuda::gemm_groups<TA, TB>("grouped products", make_policy(),
                            cuda::product<T, T, float>{.m = m,
                                                       .n = n,
                                                       .k = k,
                                                       .a = a.data(),
                                                       .lda = lda,
                                                       .b = b.data(),
                                                       .ldb = ldb,
                                                       .c = c.data(),
                                                       .ldc = n,
                                                       .mode = update::accumulate,
                                                       .groups = {.by = by,
                                                                  .count = groups,
                                                                  .offsets = offset.data(),
                                                                  .b_apart = rows ? n * k : 0,
                                                                  .c_apart = rows ? 0 : m * n}});
  test::check_close(test::download(c), expected, test::tolerance<float>(k), "c");
}

template <class T>
void check_layouts(grouping by, std::vector<double> const& offsets, std::int64_t m, std::int64_t n, std::int64_t k) {
  check_groups<T, transpose::no, transpose::yes>(by, offsets, m, n, k);
  check_groups<T, transpose::no, transpose::no>(by, offsets, m, n, k);
  check_groups<T, transpose::yes, transpose::no>(by, offsets, m, n, k);
  check_groups<T, transpose::yes, transpose::yes>(by, offsets, m, n, k);
}

}  // namespace

TEST_CASE_TEMPLATE("gemm_groups: rows shared among groups, in every layout", T, bfloat16, blackmamba::half, float) {
  check_layouts<T>(grouping::rows, {0, 3, 3, 68, 199}, 200, 136, 72);
  check_layouts<T>(grouping::rows, {0, 1, 6, 8}, 8, 40, 64);  // few rows
}
TEST_CASE_TEMPLATE("gemm_groups: the depth shared among groups, in every layout", T, bfloat16, blackmamba::half,
                   float) {
  check_layouts<T>(grouping::depth, {0, 3, 3, 68, 199}, 136, 72, 200);
  check_layouts<T>(grouping::depth, {0, 1, 6, 128}, 8, 40, 128);
}
