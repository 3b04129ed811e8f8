#include "support/policy_cuda.hpp"

#include "support/support.hpp"

#include <blackmamba/core/cuda/gemm_cuda.cuh>
#include <blackmamba/core/cuda/recording_cuda.cuh>
#include <blackmamba/core/workspace.hpp>
#include <blackmamba/ops/grouped_linear/grouped_linear.hpp>
#include <blackmamba/ops/linear/linear.hpp>

#include <string>
#include <vector>

using namespace blackmamba;

namespace {

/// The switch holds its value for the duration of a scope.
struct portable {
  explicit portable(bool value) { cuda::portable_products = value; }
  portable(portable const&) = delete;
  portable& operator=(portable const&) = delete;
  ~portable() { cuda::portable_products = products_portable; }
};

struct grouped_problem {
  std::vector<double> offsets;
  std::int64_t rows, width, outputs;
  std::int64_t groups() const { return static_cast<std::int64_t>(offsets.size()) - 1; }
};

struct grouped_result {
  test::values y, d_x, d_weight;
};

template <class T>
grouped_result run(grouped_problem const& p, bool with_bias) {
  auto const x = test::upload<T>(test::random_normal(p.rows * p.width, 1), p.rows, p.width);
  auto const weight =
      test::upload<T>(test::random_normal(p.groups() * p.outputs * p.width, 2), p.groups(), p.outputs, p.width);
  auto const bias = test::upload<float>(test::random_normal(p.groups() * p.outputs, 3), p.groups(), p.outputs);
  auto const d_y = test::upload<T>(test::random_normal(p.rows * p.outputs, 4), p.rows, p.outputs);
  auto const offsets = test::upload<std::int64_t>(p.offsets, p.groups() + 1);
  auto y = zeros<T>(make_policy(), p.rows, p.outputs);
  auto d_x = zeros<T>(make_policy(), p.rows, p.width);
  auto d_weight =
      test::upload<float>(test::random_normal(p.groups() * p.outputs * p.width, 5), p.groups(), p.outputs, p.width);
  grouped_linear::inputs<device::cuda, T> in{.x = x, .weight = weight, .offsets = offsets};
  if (with_bias) in.bias = bias;
  grouped_linear::forward(make_policy(), in, y.as_view());
  grouped_linear::backward<device::cuda, T>(make_policy(), {.x = x, .weight = weight, .offsets = offsets, .d_y = d_y},
                                            {.d_x = d_x, .d_weight = d_weight});
  return {test::download(y), test::download(d_x), test::download(d_weight)};
}

template <class T>
void check_twins(grouped_problem const& p) {
  grouped_result here, there;
  {
    portable const off(false);
    here = run<T>(p, true);
  }
  {
    portable const on(true);
    there = run<T>(p, true);
  }
  // Sums of the same products in another order.
  test::check_close(here.y, there.y, 2 * test::tolerance<T>(p.width), "y");
  test::check_close(here.d_x, there.d_x, 2 * test::tolerance<T>(p.outputs), "d_x");
  test::check_close(here.d_weight, there.d_weight, 2 * test::tolerance<float>(p.rows), "d_weight");
}

}  // namespace

// Without it the cases below compare a path with itself.
TEST_CASE_TEMPLATE("tensor-core products: a program for a Hopper holds its warpgroups' instructions (sm_90a)", T,
                   bfloat16, blackmamba::half) {
  if (cuda::properties().major != 9) return test::skip_case("a Hopper");
  REQUIRE(cuda::warpgroup_products_exist<T>());
}

TEST_CASE_TEMPLATE("tensor-core products: both paths agree", T, bfloat16, blackmamba::half) {
  check_twins<T>({{0, 700, 700, 701, 1500}, 1500, 328, 520});
  check_twins<T>({{0, 64, 191, 447}, 450, 1472, 136});
  check_twins<T>({{0, 1000}, 1000, 64, 256});
}

TEST_CASE("tensor-core products: many tiles on every multiprocessor, whatever the groups") {
  std::int64_t const rows = 6000;
  for (std::vector<double> const& offsets : {std::vector<double>{0, 750, 1500, 2250, 3000, 3750, 4500, 5250, 6000},
                                             {0, 0, 3000, 3001, 3128, 3129, 3129, 5990}})
    check_twins<bfloat16>({offsets, rows, 968, 1936});
}

TEST_CASE("tensor-core products: groups that end anywhere in a tile") {
  check_twins<bfloat16>({{0, 0, 1, 8, 71, 135, 200, 327, 455, 584, 1084}, 1100, 136, 1472});
  check_twins<bfloat16>({{0, 0, 30, 80, 80, 101}, 110, 1472, 520});
}

TEST_CASE("tensor-core products: two runs give the same bits") {
  grouped_problem const p{{0, 0, 3000, 3001, 3128, 3129, 3129, 5990}, 6000, 968, 1936};
  auto const first = run<bfloat16>(p, true), second = run<bfloat16>(p, true);
  test::check_equal(second.y, first.y, "y");
  test::check_equal(second.d_x, first.d_x, "d_x");
  test::check_equal(second.d_weight, first.d_weight, "d_weight");
}

TEST_CASE("linear: a recorded product gives the bits of the first run") {
  std::int64_t const rows = 300, width = 264, outputs = 520;
  auto const x = test::upload<bfloat16>(test::random_normal(rows * width, 1), rows, width);
  auto const weight = test::upload<bfloat16>(test::random_normal(outputs * width, 2), outputs, width);
  auto const bias = test::upload<float>(test::random_normal(outputs, 3), outputs);
  auto const d_y = test::upload<float>(test::random_normal(rows * outputs, 4), rows, outputs);
  auto y = test::poisoned<bfloat16>(rows, outputs);
  auto logits = test::poisoned<float>(rows, outputs);
  auto d_x = test::poisoned<bfloat16>(rows, width);
  auto d_weight = zeros<float>(make_policy(), outputs, width);
  auto d_bias = zeros<float>(make_policy(), outputs);
  arena<space::device> workspace(std::size_t{64} << 20);
  device::cuda policy = make_policy();
  policy.workspace = &workspace;
  recording<device::cuda> step;
  std::vector<test::values> first;
  for (int i = 0; i < 4; ++i) {
    step.run(policy, [&](device::cuda const& p) {
      memory::zero(p, d_weight.as_view());
      memory::zero(p, d_bias.as_view());
      linear::forward(p, {.x = x, .weight = weight, .bias = bias}, y.as_view());
      linear::forward<device::cuda, float, bfloat16>(p, {.x = x, .weight = weight, .bias = bias}, logits.as_view());
      linear::backward<device::cuda, bfloat16, float>(p, {.x = x, .weight = weight, .d_y = d_y},
                                                      {.d_x = d_x, .d_weight = d_weight, .d_bias = d_bias});
    });
    std::vector<test::values> const now{test::download(y), test::download(logits), test::download(d_x),
                                        test::download(d_weight), test::download(d_bias)};
    if (i == 0) first = now;
    for (std::size_t j = 0; j < now.size(); ++j) test::check_equal(now[j], first[j], std::to_string(j));
  }
  CHECK(step.recorded() == !test::workspaces_guarded);  // with guards, blocks are allocated
}
