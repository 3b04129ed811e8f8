#include "support/models.hpp"

#include <fstream>
#include <map>
#include <sstream>

using namespace blackmamba;

/// A tiny BlackMamba against an independent implementation in PyTorch (golden/make_model_golden.py).

namespace {

struct golden {
  double loss = 0;
  test::values logits;
  std::map<std::string, std::pair<double, double>> gradients;  // random projection, norm
};

golden read_golden(std::string const& model) {
  std::string const path = std::string(BLACKMAMBA_TEST_DATA) + "/golden/model.txt";
  std::ifstream in(path);
  REQUIRE_MESSAGE(in.good(), path);
  golden g;
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string key;
    words >> key;
    if (key == model + ".loss") words >> g.loss;
    if (key == model + ".logits")
      for (double x; words >> x;) g.logits.push_back(x);
    if (key == model + ".gradient") {
      std::string name;
      words >> name;
      words >> g.gradients[name].first >> g.gradients[name].second;
    }
  }
  REQUIRE(!g.logits.empty());
  return g;
}

/// The script's formula for weights and probes.
double value(std::uint64_t hash, std::int64_t i) {
  std::uint64_t const mixed = static_cast<std::uint64_t>(i + 1) * 2654435761u + hash;
  return static_cast<double>(mixed & 0xffffffffu) * 0x1p-32 - 0.5;
}
std::uint64_t hash_of(std::string const& name) {
  std::uint64_t h = 14695981039346656037u;
  for (char c : name) h = (h ^ static_cast<unsigned char>(c)) * 1099511628211u;
  return h;
}
/// Scale and offset of a weight by the last words of its name, as the script has them.
std::pair<double, double> range_of(std::string const& name) {
  auto const ends = [&](char const* tail) { return name.ends_with(tail); };
  if (ends("norm.weight") || ends("layernorm.weight") || ends(".D")) return {1.0, 1.0};
  if (ends("dt_proj.bias")) return {1.0, -2.0};
  if (ends("A_log")) return {1.0, 0.5};
  if (ends("router.weight")) return {3.0, 0.0};
  if (ends("bias")) return {0.5, 0.0};
  return {1.0, 0.0};
}

template <class Arch, class T>
void check_against(std::string const& model, double logits_tolerance, double gradient_tolerance) {
  golden const expected = read_golden(model);
  network<Arch, test_policy, T> net(1, make_policy());
  net.each_tensor([&](entry const& e, auto const& x) {
    using element = typename std::remove_cvref_t<decltype(x)>::value_type;
    if constexpr (storage<element>) {
      if (e.what != kind::matrix && e.what != kind::vector) return;
      auto const [scale, offset] = range_of(e.name);
      test::values v(static_cast<std::size_t>(x.size()));
      for (std::size_t i = 0; i < v.size(); ++i)
        v[i] = offset + scale * value(hash_of(e.name), static_cast<std::int64_t>(i));
      auto const t = test::upload<element>(v, x.size());
      memory::copy(make_policy(), t.as_view(), x.reshape(x.size()));
    }
  });

  std::int64_t const batch = 2, length = 6;
  test::tokens tokens(batch, length + 1);
  for (std::int64_t r = 0; r < batch; ++r)
    for (std::int64_t i = 0; i <= length; ++i)
      tokens(r, i) = static_cast<std::int32_t>((7 * i + 3 * r + i * i) % Arch::vocab);

  // Without a balance rule the routes of training are those of inference.
  trainer train(net, test::still(batch, length));
  auto const report = train.step(tokens);
  CHECK(std::abs(report.loss - expected.loss) <= logits_tolerance * expected.loss);
  std::size_t compared = 0;
  double largest = 0;
  for (auto const& [name, g] : expected.gradients) largest = std::max(largest, g.second);
  network<Arch, test_policy, T>::each_tensor_of(train.gradient(), [&](entry const& e, auto const& x) {
    if constexpr (storage<typename std::remove_cvref_t<decltype(x)>::value_type>) {
      if (e.what != kind::matrix && e.what != kind::vector) return;
      REQUIRE_MESSAGE(expected.gradients.contains(e.name), e.name);
      auto const g = test::download(x.reshape(x.size()));
      double projection = 0, squares = 0;
      for (std::size_t i = 0; i < g.size(); ++i) {
        projection += g[i] * 2 * value(hash_of(e.name + "/probe"), static_cast<std::int64_t>(i));
        squares += g[i] * g[i];
      }
      auto const [p, norm] = expected.gradients.at(e.name);
      double const allowed = gradient_tolerance * (norm + 1e-3 * largest);
      CHECK_MESSAGE(std::abs(std::sqrt(squares) - norm) <= allowed, e.name << " norm");
      CHECK_MESSAGE(std::abs(projection - p) <= 2 * allowed, e.name << " projection");
      ++compared;
    }
  });
  CHECK(compared == expected.gradients.size());

  // Logits of every position: token by token, and the whole text at once for the last.
  generator from(net, {.batch = batch});
  for (std::int64_t i = 0; i < length; ++i) {
    std::int32_t const pair[] = {tokens(0, i), tokens(1, i)};
    from.step(pair);
    test::values at;
    for (std::int64_t r = 0; r < batch; ++r)
      for (std::int64_t j = 0; j < Arch::vocab; ++j)
        at.push_back(expected.logits[static_cast<std::size_t>((r * length + i) * Arch::vocab + j)]);
    test::check_close(test::logits_of(from), at, logits_tolerance, "logits at " + std::to_string(i));
  }
}

}  // namespace

TEST_CASE("golden: a tiny BlackMamba with SwiGLU experts") {
  check_against<blackmamba_model<test::tiny, swiglu, no_balance>, double>("swiglu", 1e-12, 1e-10);
  check_against<blackmamba_model<test::tiny, swiglu, no_balance>, float>("swiglu", 2e-5, 2e-4);
}
TEST_CASE("golden: a tiny BlackMamba with GEGLU experts") {
  check_against<blackmamba_model<test::tiny, geglu, no_balance>, double>("geglu", 1e-12, 1e-10);
  check_against<blackmamba_model<test::tiny, geglu, no_balance>, float>("geglu", 2e-5, 2e-4);
}
