#include "support/policy_cuda.hpp"

#include "support/support.hpp"

#include <blackmamba/ops/expert_dispatch/expert_dispatch.hpp>
#include <blackmamba/ops/expert_mlp/expert_mlp.hpp>
#include <blackmamba/ops/grouped_linear/grouped_linear.hpp>

#include <cstddef>
#include <string>
#include <vector>

using namespace blackmamba;

namespace {

/// The switch holds its value for the duration of a scope.
struct portable {
  explicit portable(bool value) { blackmamba::cuda::portable_products = value; }
  portable(portable const&) = delete;
  portable& operator=(portable const&) = delete;
  ~portable() { blackmamba::cuda::portable_products = products_portable; }
};

/// y and the gradients of a layer of experts, of tokens that fall on them as the counts say and some on none.
template <class T>
std::vector<test::values> run_experts(std::vector<std::int64_t> const& counts, std::int64_t width, std::int64_t inner) {
  auto const experts = static_cast<std::int64_t>(counts.size());
  std::vector<double> expert(3, -1.0);
  for (std::size_t e = 0; e < counts.size(); ++e)
    expert.insert(expert.begin() + static_cast<std::ptrdiff_t>(expert.size() / 3), static_cast<std::size_t>(counts[e]),
                  static_cast<double>(e));
  auto const tokens = static_cast<std::int64_t>(expert.size());
  auto const x = test::upload<T>(test::random_normal(tokens * width, 1), tokens, width);
  auto const gate = test::upload<float>(test::random_uniform(tokens, 2, 0.0, 1.0), tokens, std::int64_t{1});
  auto const fc1 = test::upload<T>(test::random_normal(experts * 2 * inner * width, 3, 0.1), experts, 2 * inner, width);
  auto const fc2 = test::upload<T>(test::random_normal(experts * width * inner, 4, 0.1), experts, width, inner);
  auto const d_y = test::upload<T>(test::random_normal(tokens * width, 5), tokens, width);
  auto const offsets = test::poisoned<std::int64_t>(experts + 1);
  auto const source = test::poisoned<std::int32_t>(tokens), row = test::poisoned<std::int32_t>(tokens);
  expert_dispatch::routing<device::cuda> const plan{.offsets = offsets, .source = source, .row = row};
  expert_dispatch::plan(make_policy(), test::upload<std::int32_t>(expert, tokens, std::int64_t{1}), plan);
  auto const permuted = zeros<T>(make_policy(), tokens, width), rows = zeros<T>(make_policy(), tokens, width);
  auto const h = zeros<T>(make_policy(), tokens, 2 * inner), activated = zeros<T>(make_policy(), tokens, inner);
  auto y = test::poisoned<T>(tokens, width), d_x = test::poisoned<T>(tokens, width);
  auto d_gate = test::poisoned<float>(tokens, std::int64_t{1});
  auto d_fc1 = zeros<float>(make_policy(), experts, 2 * inner, width);
  auto d_fc2 = zeros<float>(make_policy(), experts, width, inner);
  expert_mlp::forward<swiglu>(make_policy(), {.x = x, .gate = gate, .plan = plan, .fc1 = fc1, .fc2 = fc2}, y.as_view(),
                              {.permuted = permuted, .h = h, .activated = activated, .rows = rows});
  expert_mlp::backward<swiglu, device::cuda, T>(make_policy(),
                                                {.gate = gate,
                                                 .plan = plan,
                                                 .fc1 = fc1,
                                                 .fc2 = fc2,
                                                 .permuted = permuted,
                                                 .h = h,
                                                 .activated = activated,
                                                 .rows = rows,
                                                 .d_y = d_y},
                                                {.d_x = d_x, .d_gate = d_gate, .d_fc1 = d_fc1, .d_fc2 = d_fc2});
  return {test::download(h),   test::download(activated), test::download(rows),  test::download(y),
          test::download(d_x), test::download(d_gate),    test::download(d_fc1), test::download(d_fc2)};
}

}  // namespace

TEST_CASE_TEMPLATE("expert_mlp: the paths of different devices agree", T, bfloat16, blackmamba::half) {
  for (std::vector<std::int64_t> const& counts :
       test::sizes<std::vector<std::int64_t>>({{700, 0, 1, 799}, {64, 127, 256}, {1100}, {250, 250, 250, 250}}))
    for (std::int64_t inner : {136, 520, 1024}) {
      std::int64_t const width = 1608 - inner;
      std::vector<test::values> here, there;
      {
        portable const off(false);
        here = run_experts<T>(counts, width, inner);
      }
      {
        portable const on(true);
        there = run_experts<T>(counts, width, inner);
      }
      // Sums in another order, and what is made of their roundings.
      for (std::size_t i = 0; i < here.size(); ++i)
        test::check_close(here[i], there[i], 8 * test::tolerance<T>(4096), std::to_string(i));
    }
}

TEST_CASE("grouped_linear: tiles that follow each other closely leave each other's results alone") {
  // Groups of one row, so that a tile is one step; columns that take an odd number of the copy engine's boxes.
  std::int64_t const groups = 60, width = 968, outputs = 1936;
  test::values offsets;
  for (std::int64_t e = 0; e <= groups; ++e) offsets.push_back(static_cast<double>(e));
  auto const x = test::upload<bfloat16>(test::random_normal(groups * width, 1), groups, width);
  auto const d_y = test::upload<bfloat16>(test::random_normal(groups * outputs, 2), groups, outputs);
  auto const weight = zeros<bfloat16>(make_policy(), groups, outputs, width);
  auto const ends = test::upload<std::int64_t>(offsets, groups + 1);
  auto const run = [&] {
    auto d_weight = zeros<float>(make_policy(), groups, outputs, width);
    grouped_linear::backward<device::cuda, bfloat16>(
        make_policy(), {.x = x, .weight = weight, .offsets = ends, .d_y = d_y}, {.d_weight = d_weight});
    return test::download(d_weight);
  };
  auto const first = run();
  auto const rows = test::download(x), gradients = test::download(d_y);
  test::values expected(first.size());
  for (std::int64_t e = 0; e < groups; ++e)
    for (std::int64_t o = 0; o < outputs; ++o)
      for (std::int64_t i = 0; i < width; ++i)
        expected[static_cast<std::size_t>((e * outputs + o) * width + i)] =
            gradients[static_cast<std::size_t>(e * outputs + o)] * rows[static_cast<std::size_t>(e * width + i)];
  test::check_equal(first, expected, "d_weight");  // products of 8 bits by 8 bits
  for (std::uint64_t i = 0; i < test::trials(10); ++i) test::check_equal(run(), first, "d_weight again");
}
