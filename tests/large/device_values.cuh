#pragma once
#include "support/policy_cuda.hpp"
#include "support/support.hpp"

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <string>

/// Tensors too large to come from the host: filled on the device, and compared with the host's results in part.
namespace test::large {

using namespace blackmamba;

template <class T, int... Extents>
using device_tensor = tensor<space::device, T, Extents...>;
template <class T, int... Extents>
using host_tensor = tensor<space::host, T, Extents...>;

inline device::cpu const host;

template <class T>
__global__ void fill(T* x, std::int64_t n, std::uint64_t seed, float low, float high) {
  std::int64_t const stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride) {
    std::uint64_t h = (static_cast<std::uint64_t>(i) + 1) * 0x9E3779B97F4A7C15u + seed * 0xD1B54A32D192ED03u;
    h = (h ^ (h >> 31)) * 0xBF58476D1CE4E5B9u;
    h = (h ^ (h >> 29)) * 0x94D049BB133111EBu;
    float const value = low + (high - low) * (static_cast<float>(h >> 40) * 0x1p-24f);
    if constexpr (storage<T>)
      x[i] = convert<T>(value);
    else
      x[i] = static_cast<T>(value);
  }
}

/// Uniform in [low, high), different everywhere, the same for the same seed.
template <class T, class... Ints>
auto uniform(std::uint64_t seed, float low, float high, Ints... extents) {
  device_tensor<T, (static_cast<void>(extents), dyn)...> t(extents...);
  if (t.size() > 0)
    cuda::launch("test", device::cuda{}, {cuda::strided_blocks_for(t.size(), 256, 8), 256}, fill<T>, t.data(), t.size(),
                 seed, low, high);
  return t;
}
/// Every bit set: NaN where nothing is written.
template <class T, class... Ints>
auto unwritten(Ints... extents) {
  device_tensor<T, (static_cast<void>(extents), dyn)...> t(extents...);
  cuda::check("test", cudaMemsetAsync(t.data(), 0xff, sizeof(T) * static_cast<std::size_t>(t.size())));
  return t;
}

/// `rows` pieces of `width` elements, `stride` apart, on the host without gaps.
template <class T>
auto pieces(T const* from, std::int64_t rows, std::int64_t width, std::int64_t stride) {
  host_tensor<T, dyn, dyn> to(rows, width);
  auto const bytes = [](std::int64_t n) { return static_cast<std::size_t>(n) * sizeof(T); };
  if (to.size() > 0)
    cuda::check("test", cudaMemcpy2D(to.data(), bytes(width), from, bytes(stride), bytes(width),
                                     static_cast<std::size_t>(rows), cudaMemcpyDeviceToHost));
  return to;
}
/// Rows [first, first + count) of a tensor without gaps, as (count, elements of a row).
template <class T, int... E>
auto rows_of(view<space::device, T, E...> x, std::int64_t first, std::int64_t count) {
  std::int64_t const width = x.extent(0) > 0 ? x.size() / x.extent(0) : 0;
  return pieces<std::remove_const_t<T>>(x.data() + first * width, count, width, width);
}
template <class T, int... E>
auto all_of(view<space::device, T, E...> x) {
  return rows_of(x, 0, x.extent(0));
}

/// How many results were wrong so far.
inline int wrong_results = 0;

/// Checks |actual - expected| <= tolerance (largest |expected|), without copies in double.
template <class A, class E>
void check_same(std::string const& what, A const& actual, E const& expected, double tolerance) {
  REQUIRE_MESSAGE(actual.size() == expected.size(), what);
  double scale = 0, worst = 0;
  for (std::int64_t i = 0; i < expected.size(); ++i)
    scale = std::max(scale, std::abs(static_cast<double>(widen(expected.data()[i]))));
  for (std::int64_t i = 0; i < expected.size(); ++i) {
    double const error =
        std::abs(static_cast<double>(widen(actual.data()[i])) - static_cast<double>(widen(expected.data()[i])));
    if (!(error <= worst)) worst = error;
    if (std::isnan(error)) break;
  }
  if (!(worst <= tolerance * scale)) ++wrong_results;
  CHECK_MESSAGE(worst <= tolerance * scale, what << ": off by " << worst << " of " << scale);
}

/// Prints a line for a case: what it was, whether its results were right, and how long it took.
class report {
 public:
  explicit report(std::string what)
      : what_(std::move(what)), wrong_before_(wrong_results), begin_(std::chrono::steady_clock::now()) {}
  ~report() {
    bool const right = wrong_results == wrong_before_ && std::uncaught_exceptions() == 0;
    std::printf("%-5s %s, %.2f s\n", right ? "ok" : "WRONG", what_.c_str(),
                std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count());
    std::fflush(stdout);
  }
  report(report const&) = delete;
  report& operator=(report const&) = delete;

 private:
  std::string what_;
  int wrong_before_;
  std::chrono::steady_clock::time_point begin_;
};

/// Rounding of a result in T, for operators whose inner arithmetic is in float on both sides.
template <class T>
constexpr double rounding() {
  return sizeof(T) == 2 ? unit_roundoff<T>() * 2 : 1e-5;
}

}  // namespace test::large
