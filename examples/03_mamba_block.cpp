/// A stack of Mamba layers as a type: its parameters, a text read at once, and the same text read token by token.
#include <blackmamba/blackmamba.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace bm = blackmamba;

struct config {
  static constexpr int d_model = 64, d_state = 16, vocab = 256;
};
// Two residual layers: stream += mamba(rms_norm(stream)). The type says nothing about device or precision.
using arch = bm::language_model<config, bm::repeat<2, bm::prenorm<bm::rms_norm, bm::mamba<config>>>>;

int main() {
  bm::network<arch, bm::device::cpu> net(/*seed=*/1);
  std::printf("the first layer's tensors:\n");
  net.each_tensor([](bm::entry const& e, auto const&) {
    if (!e.name.starts_with("decoder.layers.0.")) return;
    std::printf("  %-44s", e.name.c_str());
    for (auto n : e.extents) std::printf(" %lld", static_cast<long long>(n));
    std::printf("\n");
  });

  auto const text = bm::byte_tokens("the quick brown fox jumps over the lazy dog");

  // At once: the selective scan runs over the whole text.
  bm::generator whole(net);
  whole.prefill(text);
  // Token by token: the same recurrence, one step at a time, in constant memory.
  bm::generator stepwise(net);
  for (auto token : text) stepwise.step({&token, 1});

  float worst = 0;
  for (std::size_t i = 0; i < whole.logits().size(); ++i)
    worst = std::max(worst, std::abs(whole.logits()[i] - stepwise.logits()[i]));
  std::printf("\n%zu tokens at once and one by one: logits differ by at most %.1e; the state has %lld bytes\n",
              text.size(), static_cast<double>(worst), static_cast<long long>(whole.state().bytes()));
  return worst < 1e-4f ? 0 : 1;
}
