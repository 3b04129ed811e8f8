#include <blackmamba/core/tensor.hpp>
#include <blackmamba/ops/linear/linear.hpp>
#include <blackmamba/ops/rms_norm/rms_norm.hpp>

float first_of_normalised(float a, float b);

float first_of_normalised(float a, float b) {
  blackmamba::device::cpu const policy;
  auto x = blackmamba::zeros<float>(policy, 1, 2), y = blackmamba::zeros<float>(policy, 1, 2);
  auto weight = blackmamba::zeros<float>(policy, 2);
  x(0, 0) = a;
  x(0, 1) = b;
  weight(0) = weight(1) = 1.0f;
  blackmamba::rms_norm::forward(policy, {.x = x, .weight = weight, .eps = 0.0}, y);
  // A product, which brings Eigen's headers into this strict build.
  auto first = blackmamba::zeros<float>(policy, 1, 2), z = blackmamba::zeros<float>(policy, 1, 1);
  first(0, 0) = 1.0f;
  blackmamba::linear::forward(policy, {.x = y, .weight = first}, z.as_view());
  return z(0, 0);
}
