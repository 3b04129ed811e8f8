#include "support/models.hpp"

#include <blackmamba/model/expert_statistics.hpp>

#include <map>

using namespace blackmamba;

namespace {

struct config {
  static constexpr int d_model = 32, layers = 6, d_state = 5, d_conv = 4, d_ff = 48, experts = 3, vocab = 512;
};
/// Tensors by name, as a checkpoint has them.
template <class Network>
std::map<std::string, test::values> tensors_of(Network const& network) {
  std::map<std::string, test::values> tensors;
  network.each_tensor([&](entry const& e, auto const& x) {
    if constexpr (storage<typename std::remove_cvref_t<decltype(x)>::value_type>)
      if (e.what == kind::matrix || e.what == kind::vector) tensors[e.name] = test::download(x);
  });
  return tensors;
}
double mean_square(test::values const& v) { return test::weighted_sum(v, v) / static_cast<double>(v.size()); }
/// Uniform on (-bound, bound): its ends, and its variance bound^2 / 3 within five deviations.
void check_uniform(test::values const& v, double bound, std::string const& name) {
  double most = 0;
  for (double x : v) most = std::max(most, std::abs(x));
  CHECK_MESSAGE(most <= bound * (1 + 1e-6), name);
  CHECK_MESSAGE(most >= 0.8 * bound, name);
  double const n = static_cast<double>(v.size());
  CHECK_MESSAGE(std::abs(3 * mean_square(v) / (bound * bound) - 1) <= 5 * std::sqrt(0.8 / n), name);
}

template <class S, storage T>
struct observed_parameters : mlp<test::tiny>::parameters<S, T> {
  view<S, accum_t<T>, dyn> inner_norm;
  view<S, std::int32_t, dyn> seen;
  view<S, sinkhorn::report, dyn> report;
  view<S, std::int64_t, dyn> visits;
};
/// A dense layer with a norm inside and observations of its own.
struct observed_mlp : mlp<test::tiny> {
  template <class S, storage T>
  using parameters = observed_parameters<S, T>;
  template <class Parameters, class Visitor>
  static void visit(Parameters& p, std::string const& prefix, Visitor&& v) {
    v(entry{prefix + "seen", kind::statistic, {1}}, p.seen);
    v(entry{prefix + "report", kind::statistic, {1}}, p.report);
    v(entry{prefix + "visits", kind::statistic, {4}}, p.visits);
    v(entry{prefix + "norm.weight", kind::vector, {d_model}, initial::constant(1)}, p.inner_norm);
    mlp<test::tiny>::visit(p, prefix, v);
  }
};
using observed =
    language_model<test::tiny, stack<prenorm<rms_norm, observed_mlp>,
                                     prenorm<rms_norm, moe<test::tiny, top1<no_balance>>>>>;

}  // namespace

TEST_CASE("network: parameters start as published") {
  network<blackmamba_model<config>, test_policy> net(3, make_policy());
  auto const all = tensors_of(net);
  auto const fan_in = [](int n) { return 1 / std::sqrt(static_cast<double>(n)); };
  double const deep = 1 / std::sqrt(6.0);  // of what writes to the residual stream
  for (auto const& tensor : all) {
    // Not a structured binding: clang 14 captures none in lambdas, as CHECK has them.
    auto const& name = tensor.first;
    auto const& v = tensor.second;
    auto const is = [&](char const* end) { return name.ends_with(end); };
    double const n = static_cast<double>(v.size());
    if (is("word_embeddings.weight")) {
      double const sum = test::weighted_sum(v, test::values(v.size(), 1.0));
      CHECK(std::abs(sum / n) <= 5 * 0.02 / std::sqrt(n));
      CHECK(std::abs(mean_square(v) / (0.02 * 0.02) - 1) <= 5 * std::sqrt(2 / n));
    } else if (is("norm.weight") || is(".D")) {
      test::check_equal(v, test::values(v.size(), 1.0), name);
    } else if (is("layernorm.bias") || is("router.bias")) {
      test::check_equal(v, test::values(v.size(), 0.0), name);
    } else if (is("A_log")) {
      test::values expected;
      for (std::size_t i = 0; i < v.size(); ++i) expected.push_back(std::log(static_cast<double>(i % 5 + 1)));
      test::check_close(v, expected, test::unit_roundoff<float>(), name);
    } else if (is("dt_proj.bias")) {
      // softplus of it is log-uniform on [1e-3, 0.1].
      double sum = 0, least = 1, most = 0;
      for (double x : v) {
        double const dt = std::log1p(std::exp(x));
        least = std::min(least, dt);
        most = std::max(most, dt);
        sum += std::log(dt);
      }
      CHECK_MESSAGE(least >= 1e-3 * (1 - 1e-5), name);
      CHECK_MESSAGE(least <= 2e-3, name);
      CHECK_MESSAGE(most <= 0.1 * (1 + 1e-5), name);
      CHECK_MESSAGE(most >= 0.05, name);
      CHECK_MESSAGE(std::abs(sum / n - std::log(0.01)) <= 5 * std::log(100.0) / std::sqrt(12 * n), name);
    } else if (is("in_proj.weight") || is("linear_fc1.weight") || is("router.weight")) {
      check_uniform(v, fan_in(32), name);
    } else if (is("conv1d.weight") || is("conv1d.bias")) {
      check_uniform(v, fan_in(4), name);
    } else if (is("x_proj.weight")) {
      check_uniform(v, fan_in(64), name);
    } else if (is("dt_proj.weight")) {
      check_uniform(v, fan_in(2), name);
    } else if (is("out_proj.weight")) {
      check_uniform(v, deep * fan_in(64), name);
    } else if (is("linear_fc2.weight")) {
      check_uniform(v, deep * fan_in(48), name);
    } else {
      FAIL_CHECK(name << " has no expected distribution");
    }
  }
}

TEST_CASE("network: a parameter starts by the seed and its name, whatever stands around it") {
  auto const of = [](auto tag, std::uint64_t seed) {
    network<typename decltype(tag)::type, test_policy> const net(seed, make_policy());
    return tensors_of(net);
  };
  auto const large = of(std::type_identity<blackmamba_model<config>>{}, 3);
  auto const alone = of(std::type_identity<dense_mamba<config>>{}, 3);
  auto const other = of(std::type_identity<dense_mamba<config>>{}, 4);
  std::string const name = "decoder.layers.2.mixer.in_proj.weight";
  test::check_equal(alone.at(name), large.at(name));
  CHECK(alone.at(name) != other.at(name));
  CHECK(alone.at(name) != alone.at("decoder.layers.1.mixer.in_proj.weight"));
}

TEST_CASE("network: layers are counted by the layer, whatever its tensors are called") {
  CHECK(count_parameters<observed>().layers == 2);
  CHECK(count_parameters<test::tiny_parallel>().layers == 2);
  CHECK(count_parameters<dense_mamba<config>>().layers == 6);
}

TEST_CASE("network: experts' statistics are found among others") {
  network<observed, test_policy> net(1, make_policy());
  trainer train(net, test::still(2, 8));
  train.step(test::random_tokens(2, 9, observed::vocab, 5));
  auto const found = expert_statistics_of(net);
  REQUIRE(found.size() == 1);
  CHECK(found[0].layer == "decoder.layers.1.mixer");
  CHECK(found[0].load.size() == 3);
  CHECK(found[0].load[0] + found[0].load[1] + found[0].load[2] == 16);
  CHECK(found[0].unrouted == 0);
}
