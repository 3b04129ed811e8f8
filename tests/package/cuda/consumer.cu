// CUDA beside C++: this unit sees device::cuda, the other one is compiled by the host compiler alone.
#include <blackmamba/ops/rms_norm/rms_norm.hpp>

#include <cstdio>

float first_of_normalised(float a, float b);

int main() {
  blackmamba::device::cuda const policy;
  std::printf("%f on stream %p\n", static_cast<double>(first_of_normalised(3.0f, 4.0f)),
              static_cast<void*>(policy.stream));
  return 0;
}
