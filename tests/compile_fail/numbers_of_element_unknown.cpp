// The gradient of elements that are structs, of which the operator does not say what numbers they consist of.
#include <blackmamba/ops/associative_scan/associative_scan.hpp>

struct complex {
  float re, im;
};
struct product {
#ifdef CORRECTED
  using scalar = float;
#endif
  complex operator()(complex a, complex b) const {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
  }
  static complex identity() { return {1, 0}; }
  blackmamba::scan_gradient<complex> backward(complex a, complex b, complex d) const {
    return {{d.re * b.re + d.im * b.im, d.im * b.re - d.re * b.im},
            {d.re * a.re + d.im * a.im, d.im * a.re - d.re * a.im}};
  }
};

void differentiate(blackmamba::host_view<complex, -1, -1> x, blackmamba::host_view<complex, -1, -1> y,
                   blackmamba::host_view<complex, -1, -1> d) {
  blackmamba::associative_scan::backward(blackmamba::device::cpu{}, product{}, {.x = x, .y = y, .d_y = d}, d);
}

// expected-error: blackmamba: associative_scan.backward: the element's numbers are not known; write 'using scalar
