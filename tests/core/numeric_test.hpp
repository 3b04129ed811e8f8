#include "support/support.hpp"

#include <bit>

using namespace blackmamba;

namespace {

/// x rounded to nearest even among the numbers with `digits` significant bits, exponents from `lowest` and `largest` as
/// the last finite one: the definition of a storage type, in double.
double nearest(double x, int digits, int lowest, double largest) {
  if (std::isnan(x) || std::isinf(x) || x == 0) return x;
  int const exponent = std::max(std::ilogb(x), lowest);
  double const spacing = std::ldexp(1.0, exponent - digits + 1);
  double const rounded = std::nearbyint(x / spacing) * spacing;  // the default rounding mode is to nearest even
  return std::abs(rounded) > largest ? std::copysign(std::numeric_limits<double>::infinity(), x) : rounded;
}

struct bfloat16_format {
  using type = bfloat16;
  static double value(std::uint16_t bits) {
    return static_cast<double>(std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16));
  }
  static double round(double x) { return nearest(x, 8, -126, 0x1.fep127); }
};
struct half_format {
  using type = half;
  static double value(std::uint16_t bits) {
    int const exponent = (bits >> 10) & 31, fraction = bits & 1023;
    double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    if (exponent == 31)
      magnitude = fraction == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
    return bits & 0x8000 ? -magnitude : magnitude;
  }
  static double round(double x) { return nearest(x, 11, -14, 65504.0); }
};

/// The same number, and zeros with the same sign; or both NaN.
bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

template <class Format>
void check_rounding(float x, std::int64_t& wrong) {
  auto const stored = typename Format::type(x);
  double const expected = Format::round(static_cast<double>(x));
  if (!same(static_cast<double>(static_cast<float>(stored)), expected)) {
    ++wrong;
    CHECK_MESSAGE(wrong > 3, static_cast<double>(x)
                                 << " becomes " << static_cast<float>(stored) << ", expected " << expected);
  }
}

}  // namespace

TEST_CASE_TEMPLATE("numeric: all 65,536 patterns of a 16-bit type widen to their value and come back", Format,
                   bfloat16_format, half_format) {
  std::int64_t wrong = 0;
  for (std::uint32_t pattern = 0; pattern < 65536; ++pattern) {
    typename Format::type x;
    x.bits = static_cast<std::uint16_t>(pattern);
    float const wide = static_cast<float>(x);
    wrong += !same(static_cast<double>(wide), Format::value(x.bits));
    auto const back = typename Format::type(wide);
    wrong += std::isnan(wide) ? !std::isnan(static_cast<float>(back)) : back.bits != x.bits;
  }
  CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE("numeric: floats round to the nearest number, ties to even", Format, bfloat16_format, half_format) {
  std::int64_t wrong = 0;
  // Every midpoint of two neighbours, and the floats beside it.
  for (std::uint32_t pattern = 0; pattern < 65535; ++pattern) {
    double const low = Format::value(static_cast<std::uint16_t>(pattern));
    double const high = Format::value(static_cast<std::uint16_t>(pattern + 1));
    if (!std::isfinite(low) || !std::isfinite(high)) continue;
    float const middle = static_cast<float>((low + high) / 2);
    for (float x : {middle, std::nextafter(middle, INFINITY), std::nextafter(middle, -INFINITY)})
      check_rounding<Format>(x, wrong);
  }
  // A walk over all floats: normal, subnormal, infinities, NaNs, both signs.
  for (std::uint64_t bits = 0; bits < std::uint64_t{1} << 32; bits += 2039)
    check_rounding<Format>(std::bit_cast<float>(static_cast<std::uint32_t>(bits)), wrong);
  for (float x : {65504.0f, 65519.996f, 65520.0f, 0x1.fep127f, 0x1.fefffep127f, 0x1.ffp127f, 3.4028235e38f, INFINITY,
                  -INFINITY, NAN, 0x1p-149f, 0x1p-25f, 0x1.000002p-25f, 0x1p-14f, 0.0f, -0.0f})
    check_rounding<Format>(x, wrong);
  CHECK(wrong == 0);
}

TEST_CASE("numeric: conversions between storage types") {
  CHECK(convert<float>(2.5) == 2.5f);
  CHECK(convert<double>(half(0.333251953125f)) == 0.333251953125);
  CHECK(convert<bfloat16>(half(1.0f)).bits == 0x3f80);
  CHECK(convert<half>(bfloat16(-2.0f)).bits == 0xc000);
  CHECK(convert<half>(1e6).bits == 0x7c00);
  CHECK(widen(bfloat16(3.0f)) == 3.0f);
  static_assert(std::is_same_v<decltype(widen(bfloat16(0.0f))), float>);
  static_assert(std::is_same_v<decltype(widen(1.0)), double>);
  static_assert(std::is_same_v<accum_t<half const>, float> && std::is_same_v<accum_t<double const>, double>);
  static_assert(storage<float> && storage<double> && storage<bfloat16> && storage<half>);
  static_assert(!storage<int> && !storage<float const> && !storage<long double>);
  static_assert(sizeof(bfloat16) == 2 && sizeof(half) == 2 && std::is_trivially_copyable_v<half>);
}

TEST_CASE("numeric: type names") {
  CHECK(std::string(type_name<float>()) == "float32");
  CHECK(std::string(type_name<double>()) == "float64");
  CHECK(std::string(type_name<bfloat16>()) == "bfloat16");
  CHECK(std::string(type_name<half>()) == "float16");
}
