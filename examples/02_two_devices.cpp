/// One operator on every device that this build has: the policy is the first argument, and the only thing that changes.
#include <blackmamba/ops/rms_norm/rms_norm.hpp>

#include <blackmamba/core/random.hpp>
#include <blackmamba/core/tensor.hpp>

#include <cmath>
#include <cstdio>

namespace bm = blackmamba;

/// Normalises 4 rows of 1000 numbers, prints what came out and says whether it is right. Compiled once for each policy.
template <bm::device_policy P>
bool normalise_on(P const& policy, char const* name) {
  constexpr std::int64_t rows = 4, width = 1000;
  bm::philox const random(1);
  bm::tensor<bm::space::host, float, bm::dyn, bm::dyn> x(rows, width), y(rows, width);
  bm::tensor<bm::space::host, float, bm::dyn> ones(width);
  for (std::int64_t i = 0; i < x.size(); ++i) x.data()[i] = 3 * random.normal(static_cast<std::uint64_t>(i));
  for (std::int64_t i = 0; i < width; ++i) ones(i) = 1;

  // Memory belongs to a space, and a view's type says which: a host view does not convert to a device view.
  auto const device_x = bm::zeros<float>(policy, rows, width), device_y = bm::zeros<float>(policy, rows, width);
  auto const weight = bm::zeros<float>(policy, width);
  bm::memory::upload(policy, x.as_view(), device_x.as_view());
  bm::memory::upload(policy, ones.as_view(), weight.as_view());
  bm::rms_norm::forward(policy, {.x = device_x, .weight = weight}, device_y);
  bm::memory::download(policy, device_y.as_view(), y.as_view());

  std::printf("%-12s mean square of each row after the norm:", name);
  bool right = true;
  for (std::int64_t r = 0; r < rows; ++r) {
    double squares = 0;
    for (std::int64_t i = 0; i < width; ++i) squares += static_cast<double>(y(r, i)) * static_cast<double>(y(r, i));
    std::printf(" %.6f", squares / width);
    right = right && std::abs(squares / width - 1) < 1e-5;
  }
  std::printf("\n");
  return right;
}

int main() {
  bool right = normalise_on(bm::device::cpu{.threads = 1}, "one core");
  right = normalise_on(bm::device::cpu{}, "all cores") && right;
#if BLACKMAMBA_CUDA
  try {
    right = normalise_on(bm::device::cuda{}, "cuda") && right;
  } catch (bm::cuda_error const& e) {
    std::printf("%s\n", e.what());  // this build has CUDA, and this machine no GPU
  }
#endif
  return right ? 0 : 1;
}
