// A decoding step of a scan whose elements can't be copied as bytes.
#include <blackmamba/ops/associative_scan/associative_scan.hpp>

#include <string>

#ifdef CORRECTED
using element = int;
#else
using element = std::string;
#endif

struct concatenation {
  element operator()(element const& a, element const& b) const { return a + b; }
  static element identity() { return {}; }
};

void step(blackmamba::host_view<element, -1, -1> x, blackmamba::host_view<element, -1, -1> state,
          blackmamba::host_view<element, -1, -1> y) {
  blackmamba::associative_scan::step(blackmamba::device::cpu{}, concatenation{}, x, state, y);
}

// expected-error: blackmamba: associative_scan: the element type is not trivially copyable; scan indices or handles
