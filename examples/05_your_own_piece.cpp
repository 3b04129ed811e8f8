/// Pieces from outside the library in the places of its own: a recurrence, a balance rule, and a device policy.
#include "support/name_of.hpp"

#include <blackmamba/blackmamba.hpp>
#include <algorithm>
#include <cstdio>
#include <map>

namespace bm = blackmamba;
using bm::dyn;
using scan = bm::selective_scan;
template <class T> using given = std::type_identity_t<T> const&;  // takes no part in deduction: braces will do for it

// A recurrence for the state-space layer: y_t = h_t = 0.9 h_{t-1} + u_t; what else the layer offers is ignored.
// Operators are nouns that hand on to the backend of their policy, so that every policy is served, the dry run too.
struct leaky_integrator {
  template <int N, class P, class T>
  static void forward(P const& policy, given<scan::inputs<bm::home<P>, T, N>> in, bm::out<P, T, dyn, dyn, dyn> y,
                      given<scan::results<bm::home<P>, T>> keep = {}) {
    bm::check_that(!in.cu_seqlens.present(), "leaky_integrator", "cu_seqlens", "packed sequences", "none");
    bm::backend_of<leaky_integrator, P>::forward(policy, in, y, keep);
  }
  template <int N, class P, class T>
  static void backward(P const& policy, given<scan::gradient_inputs<bm::home<P>, T, N>> in,
                       given<scan::gradients<bm::home<P>, T>> d) {
    bm::backend_of<leaky_integrator, P>::backward(policy, in, d);
  }
  template <int N, class P, class T>
  static void step(P const& policy, given<scan::step_inputs<bm::home<P>, T, N>> in,
                   given<bm::out<P, bm::accum_t<T>, dyn, dyn, dyn>> state, bm::out<P, T, dyn, dyn> y) {
    bm::backend_of<leaky_integrator, P>::step(policy, in, state, y);
  }
  template <int N>
  static constexpr std::int64_t checkpoint_size(auto...) { return 0; }  // backward needs nothing kept
};
template <>
struct bm::backend<leaky_integrator, bm::device::cpu> {
  static constexpr auto forward = [](auto const&, auto const& in, auto const& y, auto const& keep) {
    for (std::int64_t b = 0; b < y.extent(0); ++b)
      for (std::int64_t i = 0; i < y.extent(2); ++i) {
        float h = in.initial_state.present() ? in.initial_state(b, i, 0) : 0.0f;
        for (std::int64_t t = 0; t < y.extent(1); ++t) y(b, t, i) = h = 0.9f * h + in.u(b, t, i);
        for (std::int64_t n = 0; n < keep.final_state.extent(2); ++n) keep.final_state(b, i, n) = h;
      }
  };
  static constexpr auto step = [](auto const&, auto const& in, auto const& state, auto const& y) {
    for (std::int64_t b = 0; b < y.extent(0); ++b)
      for (std::int64_t i = 0; i < y.extent(1); ++i) y(b, i) = state(b, i, 0) = 0.9f * state(b, i, 0) + in.u(b, i);
  };
  static constexpr auto backward = [](auto const&, auto const& in, auto const& d) {
    for (std::int64_t b = 0; b < in.u.extent(0); ++b)
      for (std::int64_t last = in.u.extent(1) - 1, t = last; t >= 0; --t) {
        for (std::int64_t i = 0; i < in.u.extent(2); ++i)
          d.d_u(b, t, i) = in.d_y(b, t, i) + (t < last ? 0.9f * d.d_u(b, t + 1, i) : 0.0f);
        for (auto const& none : {d.d_delta, d.d_B, d.d_C, d.d_z}) std::fill_n(none.row(b, t), none.extent(2), 0.0f);
      }
  };
};

// A balance rule: every token goes where its logit is largest, but the last expert is closed.
struct last_expert_closed : bm::no_balance {
  template <bm::device_policy P, bm::storage A>
  static void before(bm::context<P> const& c, bm::in<P, A, dyn, dyn>, bm::out<P, A, dyn> offset, int,
                     bm::out<P, bm::sinkhorn::report, dyn>) {
    auto const closed = bm::zeros<A>(bm::device::cpu(), offset.size());
    closed(offset.size() - 1) = A(-1e9);
    bm::memory::upload(c.policy, closed.as_view(), offset);
  }
};

// A device policy: the CPU, and a count of every operator's forward passes. Its backends are one template.
struct counting : bm::device::cpu {};
inline std::map<std::string, int> counts;
template <class Op>
struct bm::backend<Op, counting> : bm::backend<Op, bm::device::cpu> {
  static void forward(auto const&... arguments) {
    ++counts[name_of<Op>()];
    bm::backend<Op, bm::device::cpu>::forward(arguments...);
  }
};

struct config { static constexpr int d_model = 16, d_ff = 32, experts = 3, vocab = 64; };
using layers = bm::stack<bm::prenorm<bm::rms_norm, bm::mamba<config, leaky_integrator>>,
                         bm::prenorm<bm::rms_norm, bm::moe<config, bm::top1<last_expert_closed>, bm::geglu>>>;

int main() {
  bm::network<bm::language_model<config, bm::repeat<2, layers>>, counting> net(/*seed=*/1);
  bm::trainer train(net, {.batch = 2, .length = 16, .learning_rate = {.peak = 1e-2, .warmup = 5, .steps = 100}});
  bm::token_batch tokens(2, 17);
  for (std::int64_t i = 0; i < tokens.size(); ++i) tokens.data()[i] = static_cast<std::int32_t>(i % 17 % 5 * 7);
  for (int step = 0; step < 100; ++step) train.step(tokens);
  auto const closed = bm::expert_statistics_of(net).front().load.back();
  bm::generator speak(net);
  auto const made = bm::generate(speak, {tokens.data(), 6}, 10, {.temperature = 0});
  bool const learned = std::equal(made.begin(), made.end(), tokens.data() + 6);
  std::printf("closed expert: %lld tokens; text %s\n", static_cast<long long>(closed), learned ? "learned" : "lost");
  for (auto const& [name, count] : counts) std::printf("%6d  %s\n", count, name.c_str());
  return closed == 0 && learned ? 0 : 1;
}
