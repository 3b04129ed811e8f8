#include "ops/selective_scan_problem.hpp"
#include "support/support.hpp"

#include <blackmamba/ops/selective_scan/selective_scan.hpp>

#include <algorithm>
#include <string>
#include <vector>

using namespace blackmamba;
using namespace selective_scan_problem;

namespace {

/// Random numbers of one case, drawn one after the other.
class draw {
 public:
  explicit draw(std::uint64_t seed) : seed_(seed) {}
  std::int64_t between(std::int64_t low, std::int64_t high) { return test::random_integer(seed_, i_++, low, high); }
  bool coin() { return between(0, 1) == 1; }

 private:
  std::uint64_t seed_, i_ = 0;
};

/// Any combination of sizes, options and packing.
template <int N>
problem random_problem(draw& d, std::uint64_t seed) {
  bool const packed = d.coin();
  // Lengths around one and two chunks as often as shorter ones.
  std::int64_t const length = d.coin() ? d.between(0, 12) : d.between(30, 70), channels = d.between(1, 20);
  options o;
  if (packed) {
    for (std::int64_t s = d.between(0, 5); s > 0; --s) o.offsets.push_back(d.between(0, length));
    o.offsets.push_back(0);
    o.offsets.push_back(length);
    std::sort(o.offsets.begin(), o.offsets.end());
  }
  problem p = make<float>(packed ? 1 : d.between(1, 3), length, channels, N, o, seed);
  if (d.coin()) p.D = {};
  if (d.coin()) p.z = {};
  if (d.coin()) p.bias = {};
  if (d.coin()) p.initial = {};
  if (d.coin()) {
    p.log = false;
    for (auto& a : p.A) a = static_cast<float>(-std::exp(a));
  }
  if (d.coin()) {
    p.softplus = false;
    p.bias = {};
    for (auto& x : p.delta) x = std::abs(x);
  }
  // Steps that forget everything, here and there.
  if (d.between(0, 3) == 0)
    for (std::size_t i = index(d.between(0, 9)); i < p.delta.size(); i += 10) p.delta[i] = 1000;
  return p;
}

template <int N>
void check_case(std::uint64_t seed) {
  draw d(seed);
  problem const p = random_problem<N>(d, seed);
  outputs magnitude;
  outputs const expected = reference(p, &magnitude), actual = run<float, N>(p);
  std::string const text = "case " + std::to_string(seed) + ": N " + std::to_string(N) + ", B " +
                           std::to_string(p.batch) + ", L " + std::to_string(p.length) + ", D " +
                           std::to_string(p.channels) + ": ";
  test::check_within<float>(actual.y, expected.y, magnitude.y, 16 * p.length + N, text + "y");
  test::check_within<float>(actual.final_state, expected.final_state, magnitude.final_state, 16 * p.length + 16,
                            text + "final_state");
  if (seed / 6 % 16 != 0) return;
  values const d_y = test::rounded<float>(test::random_normal(p.batch * p.length * p.channels, seed + 21));
  values const d_final = test::rounded<float>(test::random_normal(p.sequences() * p.channels * N, seed + 22));
  check_gradients<float, N>(p, d_y, d_final, run_backward<float, N>(p, d_y, d_final),
                            reference_backward(p, d_y, d_final), text);
}

}  // namespace

TEST_CASE("selective_scan: equals its definition with any number of states") {
  check_forward<float, 1>(make<float>(1, 65, 17, 1));
  check_forward<float, 2>(make<float>(1, 65, 17, 2));
  check_forward<float, 3>(make<float>(3, 65, 17, 3));
  check_forward<float, 8>(make<float>(1, 65, 300, 8));
  check_forward<float, 17>(make<float>(2, 65, 17, 17));
  check_forward<float, 64>(make<float>(1, 65, 33, 64));
  check_forward<float, 256>(make<float>(1, 33, 17, 256));
}

TEST_CASE("selective_scan: gradients equal the chain rule with any number of states") {
  check_backward<float, 1>(make<float>(1, 65, 17, 1));
  check_backward<float, 3>(make<float>(1, 65, 17, 3));
  check_backward<float, 8>(make<float>(2, 65, 17, 8));
  check_backward<float, 17>(make<float>(1, 65, 17, 17));
  check_backward<float, 64>(make<float>(1, 33, 33, 64));
  check_backward<float, 128>(make<float>(2, 40, 17, 128));
  check_backward<float, 256>(make<float>(1, 33, 17, 256));
}

TEST_CASE("selective_scan: step equals forward with any number of states") {
  check_step<float, 1>(2, 17, true);
  check_step<float, 3>(2, 17, true);
  check_step<float, 8>(2, 17, true);
  check_step<float, 17>(2, 17, true);
  check_step<float, 64>(2, 17, true);
  check_step<float, 256>(1, 3, true);
}

TEST_CASE("selective_scan: groups of channels are whole packs") {
  // 24 states: ten packs of 16 channels at most, which halving alone would split.
  for (std::int64_t most : {160, 128, 48, 16})
    for (std::int64_t wanted = 1; wanted <= 96; ++wanted) {
      auto const width = selective_scan_tiles::group_width<16>(most, 1000, 2, wanted);
      CHECK(width % 16 == 0);
      CHECK(width >= 16);
      CHECK(width <= most);
      bool const shared_out = (1000 + width - 1) / width * 2 >= wanted || width == 16;
      CHECK(shared_out);
    }
  CHECK(selective_scan_tiles::group_width<16>(160, 1000, 2, 40) == 48);
}

TEST_CASE("selective_scan: equals its definition in 10,000 random cases, its gradients in 630 of them") {
  for (std::uint64_t seed = 1; seed <= test::trials(10000); ++seed) switch (seed % 6) {
      case 0: check_case<1>(seed); break;
      case 1: check_case<3>(seed); break;
      case 2: check_case<8>(seed); break;
      case 3: check_case<17>(seed); break;
      case 4: seed % 60 == 4 ? check_case<256>(seed) : check_case<16>(seed); break;
      default: check_case<64>(seed); break;
    }
}
