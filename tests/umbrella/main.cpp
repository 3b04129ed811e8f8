/// Both units in one program: everything that a header defines is there twice. Without a CUDA device it is skipped.
#include <cmath>
#include <cstdio>
#include <exception>
#include <string>

double first_unit();
double second_unit();

int main() {
  try {
    double const first = first_unit(), second = second_unit();
    std::printf("%f and %f\n", first, second);
    return std::isfinite(first) && std::isfinite(second) ? 0 : 1;
  } catch (std::exception const& e) {
    std::printf("%s\n", e.what());
    return std::string(e.what()).find("no usable CUDA device") != std::string::npos ? 77 : 1;
  }
}
