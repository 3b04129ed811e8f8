// The backward pass of a scan by an operator that does not tell its gradient.
#include <blackmamba/ops/associative_scan/associative_scan.hpp>

struct hypotenuse {
  float operator()(float a, float b) const { return std::sqrt(a * a + b * b); }
  static float identity() { return 0; }
#ifdef CORRECTED
  blackmamba::scan_gradient<float> backward(float a, float b, float d_c) const {
    float const c = (*this)(a, b);
    return {d_c * a / c, d_c * b / c};
  }
#endif
};

void differentiate(blackmamba::host_view<float, -1, -1> x, blackmamba::host_view<float, -1, -1> y,
                   blackmamba::host_view<float, -1, -1> d) {
  blackmamba::associative_scan::backward(blackmamba::device::cpu{}, hypotenuse{}, {.x = x, .y = y, .d_y = d}, d);
}

// expected-error: blackmamba: associative_scan.backward: the operator does not tell its gradient; give it
// expected-error: scan_gradient<E> backward(E a, E b, E d_c) const
