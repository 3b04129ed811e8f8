/// Pieces from outside the library in the places of its own: a recurrence, a balance rule, and a device policy.
#include <blackmamba/blackmamba.hpp>

#include <cstdio>
#include <map>
#include <string>
#include <typeinfo>

namespace bm = blackmamba;

// A recurrence for the state-space layer: y_t = h_t = 0.9 h_{t-1} + u_t; what else the layer offers is ignored.
// Operators are nouns that hand on to the backend of their policy, so that every policy is served, the dry run too.
struct leaky_integrator {
  template <int N, class P, class T>
  static void forward(P const& policy, std::type_identity_t<bm::selective_scan::inputs<bm::home<P>, T, N>> const& in,
                      bm::out<P, T, bm::dyn, bm::dyn, bm::dyn> y,
                      std::type_identity_t<bm::selective_scan::results<bm::home<P>, T>> const& = {}) {
    bm::backend_of<leaky_integrator, P>::forward(policy, in, y);
  }
  template <int N, class P, class T>
  static void backward(P const& policy,
                       std::type_identity_t<bm::selective_scan::gradient_inputs<bm::home<P>, T, N>> const& in,
                       std::type_identity_t<bm::selective_scan::gradients<bm::home<P>, T>> const& d) {
    bm::backend_of<leaky_integrator, P>::backward(policy, in, d);
  }
  template <int N>
  static constexpr std::int64_t checkpoint_size(std::int64_t, std::int64_t, std::int64_t, std::int64_t) { return 0; }
};
template <>
struct bm::backend<leaky_integrator, bm::device::cpu> {
  static constexpr auto forward = [](auto const&, auto const& in, auto const& y) {
    for (std::int64_t b = 0; b < y.extent(0); ++b)
      for (std::int64_t t = 0; t < y.extent(1); ++t)
        for (std::int64_t i = 0; i < y.extent(2); ++i)
          y(b, t, i) = in.u(b, t, i) + (t > 0 ? 0.9f * y(b, t - 1, i) : 0.0f);
  };
  static constexpr auto backward = [](auto const& policy, auto const& in, auto const& d) {
    auto const last = in.u.extent(1) - 1;
    for (std::int64_t b = 0; b < in.u.extent(0); ++b)
      for (std::int64_t t = last; t >= 0; --t) {
        for (std::int64_t i = 0; i < in.u.extent(2); ++i) {
          d.d_u(b, t, i) = in.d_y(b, t, i) + (t < last ? 0.9f * d.d_u(b, t + 1, i) : 0.0f);
          d.d_z(b, t, i) = 0;
        }
        for (std::int64_t n = 0; n < in.B.extent(2); ++n) d.d_B(b, t, n) = d.d_C(b, t, n) = 0;
      }
    bm::memory::zero(policy, d.d_delta);
  };
};

// A balance rule: every token goes where its logit is largest, but the last expert is closed.
struct last_expert_closed : bm::no_balance {
  template <bm::device_policy P, bm::storage A>
  static void before(bm::context<P> const& c, bm::in<P, A, bm::dyn, bm::dyn>, bm::out<P, A, bm::dyn> offset, int,
                     bm::out<P, bm::sinkhorn::report, bm::dyn>) {
    bm::memory::zero(c.policy, offset);
    bm::tensor<bm::space::host, A, bm::dyn> closed(std::int64_t{1});
    closed(0) = A(-1e9);
    bm::memory::upload(c.policy, closed.as_view(), offset.slice(offset.size() - 1, 1));
  }
};

// A device policy: the CPU, and a note of every operator that runs. Its backends are one template.
struct noting : bm::device::cpu {};
inline std::map<std::string, int> notes;
template <class Op>
struct bm::backend<Op, noting> : bm::backend<Op, bm::device::cpu> {
  using inner = bm::backend<Op, bm::device::cpu>;
  template <class... Arguments>
  static void forward(Arguments const&... arguments) {
    ++notes[typeid(Op).name()];
    inner::forward(arguments...);
  }
};

struct config {
  static constexpr int d_model = 16, d_ff = 32, experts = 3, vocab = 64;
};
using layers = bm::stack<bm::prenorm<bm::rms_norm, bm::mamba<config, leaky_integrator>>,
                         bm::prenorm<bm::rms_norm, bm::moe<config, bm::top1<last_expert_closed>, bm::geglu>>>;

int main() {
  bm::network<bm::language_model<config, bm::repeat<2, layers>>, noting> net(/*seed=*/1);
  bm::trainer train(net, {.batch = 2, .length = 16, .learning_rate = {.peak = 1e-2, .warmup = 5, .steps = 40}});
  bm::token_batch tokens(2, 17);
  for (std::int64_t i = 0; i < tokens.size(); ++i) tokens.data()[i] = static_cast<std::int32_t>(i % 17 % 5 * 7);
  double const first = train.step(tokens).loss;
  double last = first;
  for (int step = 1; step < 40; ++step) last = train.step(tokens).loss;
  std::printf("loss %.3f at first, %.3f after 40 steps\n", first, last);
  auto const closed = bm::expert_statistics_of(net).front().load.back();
  std::printf("tokens of the closed expert: %lld\n", static_cast<long long>(closed));
  for (auto const& [name, count] : notes) std::printf("%6d  %s\n", count, name.c_str());
  return closed == 0 && last < first / 2 ? 0 : 1;
}
