/// A routed mixture of experts: the router's logits, balanced and unbalanced choices, and what each expert gets.
#include <blackmamba/core/random.hpp>
#include <blackmamba/core/tensor.hpp>
#include <blackmamba/ops/expert_dispatch/expert_dispatch.hpp>
#include <blackmamba/ops/router/router.hpp>
#include <blackmamba/ops/sinkhorn/sinkhorn.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdio>

namespace bm = blackmamba;

int main() {
  constexpr std::int64_t tokens = 4096, experts = 8;
  bm::device::cpu const cpu;

  // Logits of a router that prefers some experts over others.
  auto const logits = bm::zeros<float>(cpu, tokens, experts);
  bm::philox const random(1);
  for (std::int64_t i = 0; i < tokens; ++i)
    for (std::int64_t j = 0; j < experts; ++j)
      logits(i, j) = random.normal(static_cast<std::uint64_t>(i * experts + j)) + 0.3f * static_cast<float>(j);

  // The selector is argmax_j(beta x_ij + g_j). Without balance g is absent; Sinkhorn finds the g that fills all
  // experts.
  auto const offset = bm::zeros<float>(cpu, experts);
  auto const report = bm::zeros<bm::sinkhorn::report>(cpu, 1);
  bm::sinkhorn::forward(cpu, logits, offset, report);
  std::printf("Sinkhorn: %d passes, largest relative error of an expert's share %.1e\n\n", report(0).passes,
              static_cast<double>(report(0).error));

  auto const expert = bm::zeros<std::int32_t>(cpu, tokens, 1);
  auto const gate = bm::zeros<float>(cpu, tokens, 1);
  auto const offsets = bm::zeros<std::int64_t>(cpu, experts + 1);
  auto const source = bm::zeros<std::int32_t>(cpu, tokens), row = bm::zeros<std::int32_t>(cpu, tokens);
  std::int64_t most = 0, placed = 0;  // tokens of the busiest expert, and of all
  for (bool balanced : {false, true}) {
    bm::router::forward(cpu, {.logits = logits, .offset = balanced ? offset.as_view() : decltype(offset.as_view()){}},
                        {.expert = expert, .gate = gate});
    bm::expert_dispatch::plan(cpu, expert, {.offsets = offsets, .source = source, .row = row});
    std::printf("%s\n", balanced ? "balanced by Sinkhorn" : "each token to its best expert");
    most = placed = 0;
    for (std::int64_t e = 0; e < experts; ++e) {
      auto const load = offsets(e + 1) - offsets(e);
      most = std::max(most, load);
      placed += load;
      std::printf("  expert %lld %5lld ", static_cast<long long>(e), static_cast<long long>(load));
      for (std::int64_t i = 0; i < load; i += 32) std::printf("#");
      std::printf("\n");
    }
  }
  // Shares differ yet by a few of a hundred, for a token goes to one expert whole; unbalanced, one had three times its
  // share.
  return placed == tokens && 10 * most * experts < 11 * tokens ? 0 : 1;
}
