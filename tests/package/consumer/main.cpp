// A user's program: one operator through its own header, and a second translation unit that includes it too.
#include <blackmamba/core/tensor.hpp>
#include <blackmamba/ops/rms_norm/rms_norm.hpp>
#include <blackmamba/version.hpp>

#include <cmath>
#include <cstdio>

float first_of_normalised(float a, float b);

int main() {
  blackmamba::device::cpu const policy;
  auto x = blackmamba::zeros<float>(policy, 1, 2), y = blackmamba::zeros<float>(policy, 1, 2);
  auto weight = blackmamba::zeros<float>(policy, 2);
  x(0, 0) = 3.0f;
  x(0, 1) = 4.0f;
  weight(0) = weight(1) = 1.0f;
  blackmamba::rms_norm::forward(policy, {.x = x, .weight = weight, .eps = 0.0}, y);

  float const expected = 3.0f / std::sqrt(12.5f);
  float const other_unit = first_of_normalised(3.0f, 4.0f);
  std::printf("blackmamba %d.%d.%d: %.6f, from the other unit %.6f, expected %.6f\n", blackmamba::version.major_part,
              blackmamba::version.minor_part, blackmamba::version.patch_part, static_cast<double>(y(0, 0)),
              static_cast<double>(other_unit), static_cast<double>(expected));
  return std::abs(y(0, 0) - expected) < 1e-6f && std::abs(other_unit - expected) < 1e-6f ? 0 : 1;
}
