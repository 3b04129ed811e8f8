#include "support/support.hpp"

#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/core/math.hpp>

#include <bit>

using namespace blackmamba;

namespace {

using pack = simd::pack<float>;
constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();
constexpr double smallest_normal = 0x1p-126;

/// Distance of neighbouring floats at |y|.
double ulp(double y) { return std::abs(y) < smallest_normal ? 0x1p-149 : std::ldexp(1.0, std::ilogb(y) - 23); }

struct domain {
  float low, high;
};

/// Largest error of f in units in the last place over a walk through all floats in the domain, and where. A result that
/// is too small to be normal need only be as small.
template <class F, class Reference>
void check_ulp(std::string const& name, F f, Reference reference, domain over, double bound) {
  double worst = 0;
  float at = 0;
  float x[pack::size], y[pack::size];
  int filled = 0;
  std::int64_t seen = 0;
  for (std::uint64_t bits = 0; bits < std::uint64_t{1} << 32; bits += 2039) {
    float const candidate = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    if (!(candidate >= over.low && candidate <= over.high)) continue;
    x[filled++] = candidate;
    if (filled < pack::lanes) continue;
    filled = 0;
    seen += pack::lanes;
    f(pack::load(x)).store(y);
    for (std::size_t i = 0; i < pack::size; ++i) {
      double const expected = reference(static_cast<double>(x[i]));
      double const difference = std::abs(static_cast<double>(y[i]) - expected);
      double const error =
          std::abs(expected) < smallest_normal ? difference / smallest_normal : difference / ulp(expected);
      if (!(error <= worst)) {
        worst = error;
        at = x[i];
      }
    }
  }
  REQUIRE(seen > 100000);
  CHECK_MESSAGE(worst <= bound, name << "(" << at << ") is off by " << worst << " ulp, above " << bound);
}

/// f at one value, in every lane the same.
template <class F>
float at(F f, float x) {
  auto const y = f(pack(x));
  for (int i = 1; i < pack::lanes; ++i)
    REQUIRE(std::bit_cast<std::uint32_t>(y[i]) == std::bit_cast<std::uint32_t>(y[0]));
  return y[0];
}
/// -0 and 0 are told apart.
bool is(float a, float b) { return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b); }

}  // namespace

TEST_CASE("simd: exp within 2 ulp, exact at the ends") {
  auto const f = [](pack x) { return exp(x); };
  check_ulp(
      "exp", f, [](double x) { return std::exp(x); }, {-87.3f, 88.722831f}, 2);
  CHECK(at(f, 0.0f) == 1);
  CHECK(at(f, -0.0f) == 1);
  CHECK(at(f, 0x1p-149f) == 1);
  CHECK(at(f, 88.722831f) < infinity);
  CHECK(at(f, 88.722840f) == infinity);
  CHECK(at(f, infinity) == infinity);
  CHECK(is(at(f, -87.4f), 0.0f));
  CHECK(is(at(f, -infinity), 0.0f));
  CHECK(std::isnan(at(f, not_a_number)));
  CHECK(std::isnan(at(f, std::bit_cast<float>(0x7f800001u))));
}
TEST_CASE("simd: exp2 within 2 ulp, exact at integers") {
  auto const f = [](pack x) { return exp2(x); };
  check_ulp(
      "exp2", f, [](double x) { return std::exp2(x); }, {-126.0f, 127.99999f}, 2);
  for (int n = -126; n < 128; ++n) CHECK(at(f, static_cast<float>(n)) == std::ldexp(1.0f, n));
  CHECK(at(f, 128.0f) == infinity);
  CHECK(at(f, infinity) == infinity);
  CHECK(is(at(f, -126.1f), 0.0f));
  CHECK(is(at(f, -infinity), 0.0f));
  CHECK(std::isnan(at(f, not_a_number)));
}
TEST_CASE("simd: log within 1 ulp, subnormal numbers included") {
  auto const f = [](pack x) { return log(x); };
  check_ulp(
      "log", f, [](double x) { return std::log(x); }, {0x1p-149f, 3.4028235e38f}, 1);
  CHECK(is(at(f, 1.0f), 0.0f));
  CHECK(at(f, 0.0f) == -infinity);
  CHECK(at(f, -0.0f) == -infinity);
  CHECK(at(f, infinity) == infinity);
  CHECK(std::isnan(at(f, -1.0f)));
  CHECK(std::isnan(at(f, -infinity)));
  CHECK(std::isnan(at(f, not_a_number)));
}
TEST_CASE("simd: log1p within 2 ulp") {
  auto const f = [](pack x) { return log1p(x); };
  auto const reference = [](double x) { return std::log1p(x); };
  check_ulp("log1p", f, reference, {-0.99999994f, 3.4028235e38f}, 2);
  check_ulp(
      "log1p_unit", [](pack x) { return log1p_unit(x); }, reference, {0.0f, 1.0f}, 2);
  CHECK(at(f, 0.0f) == 0);
  CHECK(at(f, 0x1p-149f) == 0x1p-149f);
  CHECK(at(f, -1.0f) == -infinity);
  CHECK(at(f, infinity) == infinity);
  CHECK(std::isnan(at(f, -1.5f)));
  CHECK(std::isnan(at(f, not_a_number)));
}
TEST_CASE("simd: erf within 3 ulp") {
  auto const f = [](pack x) { return erf(x); };
  check_ulp(
      "erf", f, [](double x) { return std::erf(x); }, {-3.4e38f, 3.4e38f}, 3);
  CHECK(is(at(f, 0.0f), 0.0f));
  CHECK(is(at(f, -0.0f), -0.0f));
  CHECK(at(f, infinity) == 1);
  CHECK(at(f, -infinity) == -1);
  CHECK(std::isnan(at(f, not_a_number)));
}
TEST_CASE("simd: the normal distribution within 8 ulp far into its tail, its density within 3") {
  double const root_half = std::sqrt(0.5), root_two_pi = std::sqrt(2 * 3.14159265358979323846);
  auto const cdf = [](pack x) { return normal_cdf(x); };
  auto const pdf = [](pack x) { return normal_pdf(x); };
  check_ulp(
      "normal_cdf", cdf, [=](double x) { return 0.5 * std::erfc(-x * root_half); }, {-3.4e38f, 3.4e38f}, 8);
  check_ulp(
      "normal_pdf", pdf, [=](double x) { return std::exp(-0.5 * x * x) / root_two_pi; }, {-3.4e38f, 3.4e38f}, 3);
  CHECK(at(cdf, 0.0f) == 0.5f);
  CHECK(is(at(cdf, -infinity), 0.0f));
  CHECK(at(cdf, infinity) == 1);
  CHECK(at(pdf, infinity) == 0);
  CHECK(std::isnan(at(cdf, not_a_number)));
  CHECK(std::isnan(at(pdf, not_a_number)));
}
TEST_CASE("simd: sqrt is correctly rounded") {
  auto const f = [](pack x) { return sqrt(x); };
  check_ulp(
      "sqrt", f, [](double x) { return std::sqrt(x); }, {0.0f, 3.4028235e38f}, 0.500001);
  CHECK(is(at(f, -0.0f), -0.0f));
  CHECK(at(f, infinity) == infinity);
  CHECK(std::isnan(at(f, -1.0f)));
  CHECK(sqrt(simd::pack<double>(2.0))[0] == std::sqrt(2.0));
  CHECK(sqrt(simd::pack<float, 2>(2.0f))[1] == std::sqrt(2.0f));
  CHECK(sqrt(simd::pack<float, 4>(3.0f))[3] == std::sqrt(3.0f));
}

TEST_CASE("math: sigmoid, silu and softplus within 3 ulp, gelu within 8") {
  double const root_half = std::sqrt(0.5);
  auto const sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  auto const softplus = [](double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); };
  auto const gelu = [=](double x) { return 0.5 * x * std::erfc(-x * root_half); };
  check_ulp(
      "sigmoid", [](pack x) { return math::sigmoid(x); }, sigmoid, {-87.3f, 3.4e38f}, 3);
  check_ulp(
      "silu", [](pack x) { return math::silu(x); }, [=](double x) { return x * sigmoid(x); }, {-80.0f, 3.4e38f}, 3);
  check_ulp(
      "softplus", [](pack x) { return math::softplus(x); }, softplus, {-87.3f, 3.4e38f}, 3);
  check_ulp(
      "gelu", [](pack x) { return math::gelu(x); }, gelu, {-12.9f, 3.4e38f}, 8);

  CHECK(at([](pack x) { return math::sigmoid(x); }, -infinity) == 0);
  CHECK(at([](pack x) { return math::sigmoid(x); }, infinity) == 1);
  CHECK(at([](pack x) { return math::softplus(x); }, -infinity) == 0);
  CHECK(at([](pack x) { return math::softplus(x); }, infinity) == infinity);
  for (float x : {-100.0f, -1e30f}) {
    CHECK(at([](pack v) { return math::silu(v); }, x) == 0);
    CHECK(at([](pack v) { return math::gelu(v); }, x) == 0);
  }
  CHECK(at([](pack x) { return math::silu(x); }, infinity) == infinity);
  CHECK(at([](pack x) { return math::gelu(x); }, infinity) == infinity);
  CHECK(std::isnan(at([](pack x) { return math::sigmoid(x); }, not_a_number)));
  CHECK(std::isnan(at([](pack x) { return math::softplus(x); }, not_a_number)));
  CHECK(std::isnan(at([](pack x) { return math::silu(x); }, not_a_number)));
  CHECK(std::isnan(at([](pack x) { return math::gelu(x); }, not_a_number)));
}
TEST_CASE("simd: every NaN stays one, whatever bits it carries") {
  auto const check = [](std::string const& name, auto f) {
    for (std::uint32_t bits : {0x7f800001u, 0x7fc00000u, 0x7fc00001u, 0x7fffffffu, 0xff800001u, 0xffc001ffu})
      CHECK_MESSAGE(std::isnan(at(f, std::bit_cast<float>(bits))), name << " of " << bits);
  };
  check("exp", [](pack x) { return exp(x); });
  check("exp2", [](pack x) { return exp2(x); });
  check("log", [](pack x) { return log(x); });
  check("log1p", [](pack x) { return log1p(x); });
  check("erf", [](pack x) { return erf(x); });
  check("sqrt", [](pack x) { return sqrt(x); });
  check("normal_cdf", [](pack x) { return normal_cdf(x); });
  check("normal_pdf", [](pack x) { return normal_pdf(x); });
  check("sigmoid", [](pack x) { return math::sigmoid(x); });
  check("softplus", [](pack x) { return math::softplus(x); });
  check("silu", [](pack x) { return math::silu(x); });
  check("silu_derivative", [](pack x) { return math::silu_derivative(x); });
  check("gelu", [](pack x) { return math::gelu(x); });
  check("gelu_derivative", [](pack x) { return math::gelu_derivative(x); });
}
TEST_CASE("math: derivatives equal central differences, packs equal scalars") {
  auto const check = [](auto f, auto derivative, std::string const& name) {
    for (double x = -6; x <= 6; x += 0.37) {
      double const h = 1e-3;
      double const numeric = (8 * (f(x + h) - f(x - h)) - (f(x + 2 * h) - f(x - 2 * h))) / (12 * h);
      CHECK_MESSAGE(std::abs(derivative(x) - numeric) < 1e-10, name << " at " << x);
      float const single = static_cast<float>(x);
      CHECK(std::abs(static_cast<double>(derivative(pack(single))[0]) - derivative(static_cast<double>(single))) <
            3e-7);
      CHECK(std::abs(static_cast<double>(derivative(single)) - derivative(static_cast<double>(single))) < 3e-7);
      CHECK(std::abs(derivative(simd::pack<double>(x))[1] - derivative(x)) < 1e-15);
    }
  };
  check([](auto x) { return math::silu(x); }, [](auto x) { return math::silu_derivative(x); }, "silu");
  check([](auto x) { return math::gelu(x); }, [](auto x) { return math::gelu_derivative(x); }, "gelu");
  check([](auto x) { return math::softplus(x); }, [](auto x) { return math::softplus_derivative(x); }, "softplus");
  using math::normal_cdf, math::normal_pdf;
  check([](auto x) { return normal_cdf(x); }, [](auto x) { return normal_pdf(x); }, "normal_cdf");
}

TEST_CASE("simd: scalars in all lanes, arithmetic, comparison, selection") {
  using small = simd::pack<float, 4>;
  float const values[] = {1, -2, 3, -4};
  auto const x = small::load(values);
  CHECK((x + x)[1] == -4);
  CHECK((x - 1)[2] == 2);
  CHECK((2.0f * x)[3] == -8);
  CHECK((x / 2.0f)[0] == 0.5f);
  CHECK((-x)[0] == -1);
  CHECK(fma(x, x, small(1))[3] == 17);
  CHECK(max(x, small(0))[1] == 0);
  CHECK(min(x, small(0))[2] == 0);
  CHECK(abs(x)[3] == 4);
  CHECK(is(abs(small(-0.0f))[0], 0.0f));
  CHECK(is(small(-0.0f)[0], -0.0f));
  CHECK(select(x > small(0), x, small(9))[1] == 9);
  CHECK(select((x > small(0)) & (x < small(2)), x, small(9))[2] == 9);
  CHECK(select((x < small(0)) | (x >= small(3)), x, small(9))[0] == 9);
  CHECK(select(!(x <= small(1)), x, small(9))[2] == 3);
  CHECK(select(x == small(3), small(1), small(0))[2] == 1);
  CHECK(sum(x) == -2);
  CHECK(max_lane(x) == 3);
}

TEST_CASE_TEMPLATE("simd: loads and stores of parts touch nothing else", T, STORAGE_TYPES) {
  using V = simd::pack<accum_t<T>>;
  constexpr std::size_t lanes = V::size;
  T source[lanes];
  for (std::size_t i = 0; i < lanes; ++i) source[i] = convert<T>(static_cast<float>(i) + 1.0f);
  for (int n = 1; n <= V::lanes; ++n) {
    std::vector<T> exact(source, source + n);  // AddressSanitizer guards its ends
    V const x = n == V::lanes ? V::load(exact.data()) : V::load(exact.data(), n);
    for (int i = 0; i < V::lanes; ++i) CHECK(x[i] == (i < n ? accum_t<T>(i + 1) : accum_t<T>(0)));
    std::vector<T> target(static_cast<std::size_t>(n));
    if (n == V::lanes)
      (x * 2).store(target.data());
    else
      (x * 2).store(target.data(), n);
    for (int i = 0; i < n; ++i) CHECK(widen(target[static_cast<std::size_t>(i)]) == accum_t<T>(2 * (i + 1)));
    V const part = simd::first(V(7), n);
    for (int i = 0; i < V::lanes; ++i) CHECK(part[i] == accum_t<T>(i < n ? 7 : 0));
  }
  for (std::int64_t n : {std::int64_t{0}, std::int64_t{1}, std::int64_t{V::lanes}, std::int64_t{3 * V::lanes - 1}}) {
    std::vector<T> values(static_cast<std::size_t>(n), convert<T>(3.0f));
    std::int64_t covered = 0;
    simd::for_packs<V::lanes>(n, [&](std::int64_t i, auto count) {
      CHECK(i == covered);
      covered += count;
      simd::store(simd::load<V>(values.data() + i, count) + 1, values.data() + i, count);
    });
    CHECK(covered == n);
    for (T v : values) CHECK(widen(v) == 4);
  }
}

TEST_CASE_TEMPLATE("simd: sums over any number of values count no lane past the end", T, float, double) {
  using V = simd::pack<T>;
  for (std::int64_t n = 0; n < 11 * V::lanes; ++n) {
    // The value past the end that a lane sees is one, not zero.
    T const counted = simd::sum_packs<V>(n, [](std::int64_t, auto) { return V(1); });
    CHECK(counted == static_cast<T>(n));
    std::vector<T> values(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<T>(i * i);
    T const squares =
        simd::sum_packs<V>(n, [&](std::int64_t i, auto lanes) { return simd::load<V>(values.data() + i, lanes); });
    CHECK(squares == static_cast<T>((n - 1) * n * (2 * n - 1) / 6));
  }
}

TEST_CASE_TEMPLATE("simd: 16-bit types convert as one by one", T, bfloat16, half) {
  std::int64_t wrong = 0;
  T stored[pack::size];
  float wide[pack::size];
  for (std::uint32_t pattern = 0; pattern < 65536; pattern += pack::lanes) {
    for (std::uint32_t i = 0; i < pack::size; ++i) stored[i].bits = static_cast<std::uint16_t>(pattern + i);
    pack::load(stored).store(wide);
    for (std::size_t i = 0; i < pack::size; ++i) wrong += !is(wide[i], static_cast<float>(stored[i]));
  }
  CHECK(wrong == 0);
  for (std::uint64_t bits = 0; bits + pack::size * 131 < std::uint64_t{1} << 32; bits += pack::size * 131) {
    for (std::uint32_t i = 0; i < pack::size; ++i)
      wide[i] = std::bit_cast<float>(static_cast<std::uint32_t>(bits) + i * 131);
    pack::load(wide).store(stored);
    for (std::size_t i = 0; i < pack::size; ++i) wrong += stored[i] != T(wide[i]);
  }
  CHECK(wrong == 0);
}

TEST_CASE("simd: float and double convert into each other") {
  float const single[] = {0.1f, -3.0f, 1e30f, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  auto const x = simd::pack<double, 16>::load(single);
  float back[16];
  x.store(back);
  for (int i = 0; i < 16; ++i) {
    CHECK(x[i] == static_cast<double>(single[i]));
    CHECK(back[i] == single[i]);
  }
}
