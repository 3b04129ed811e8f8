// The operators for PyTorch: a small extension that includes the headers and nothing else. blackmamba_torch.py builds
// it with PyTorch's own loader and offers the functions under the names, layouts and defaults that people use.
//
// Tensors come in as (batch, length, channels) with channels contiguous; the Python side turns and copies where it
// must.
#include "blackmamba_torch.cuh"

#include <blackmamba/ops/associative_scan/first_order_recurrence.hpp>
#include <blackmamba/ops/causal_conv1d/causal_conv1d.hpp>
#include <blackmamba/ops/selective_scan/selective_scan.hpp>

#include <string>
#include <tuple>
#include <vector>

namespace {

/// The numbers of states that the scan is compiled for; each costs the compiler about half a minute.
#ifndef BLACKMAMBA_TORCH_STATES
#define BLACKMAMBA_TORCH_STATES 8, 16, 64
#endif
using d_states = std::integer_sequence<int, BLACKMAMBA_TORCH_STATES>;

/// Calls f with the number of states as a constant.
template <int... N, class F>
void for_states(std::integer_sequence<int, N...>, std::int64_t states, F&& f) {
  std::string known;
  ((known += " " + std::to_string(N)), ...);
  bool const found = ((states == N && (f(std::integral_constant<int, N>{}), true)) || ...);
  TORCH_CHECK(found, "selective_scan: got ", states, " states, compiled for", known,
              "; set BLACKMAMBA_TORCH_STATES to a list with yours");
}

tensor empty_states(tensor const& u, std::int64_t states) {
  return at::empty({u.size(0), u.size(2), states}, u.options().dtype(at::kFloat));
}

/// @returns y, the final state, and where wanted the checkpoints that backward needs
std::tuple<tensor, tensor, tensor> scan_forward(tensor u, tensor delta, tensor A, tensor B, tensor C, optional_tensor D,
                                                optional_tensor z, optional_tensor delta_bias,
                                                optional_tensor initial_state, bool delta_softplus, bool checkpoints) {
  c10::cuda::CUDAGuard const guard(u.device());
  auto y = at::empty({u.size(0), u.size(1), u.size(2)}, u.options());
  auto final_state = empty_states(u, A.size(1));
  tensor kept = at::empty({0}, A.options());
  for_type(u, [&]<class T>(T) {
    for_states(d_states{}, A.size(1), [&]<int N>(std::integral_constant<int, N>) {
      if (checkpoints)
        kept = at::empty({bm::selective_scan::checkpoint_size<N>(u.size(0), u.size(1), u.size(2), u.size(0))},
                         A.options());
      with_scratch(u, [&](auto const& policy) {
        bm::selective_scan::forward<N>(
            policy,
            {.u = view_of<T const, dyn, dyn, dyn>("u", u),
             .delta = view_of<T const, dyn, dyn, dyn>("delta", delta),
             .A = view_of<float const, dyn, dyn>("A", A),
             .B = view_of<T const, dyn, dyn, dyn>("B", B),
             .C = view_of<T const, dyn, dyn, dyn>("C", C),
             .D = view_of<float const, dyn>("D", D),
             .z = view_of<T const, dyn, dyn, dyn>("z", z),
             .delta_bias = view_of<float const, dyn>("delta_bias", delta_bias),
             .initial_state = view_of<float const, dyn, dyn, dyn>("initial_state", initial_state),
             .delta_softplus = delta_softplus},
            view_of<T, dyn, dyn, dyn>("y", y),
            {.final_state = view_of<float, dyn, dyn, dyn>("final_state", final_state),
             .checkpoints = view_of<float, dyn>("checkpoints", checkpoints ? optional_tensor(kept) : std::nullopt)});
      });
    });
  });
  return {y, final_state, kept};
}

/// @returns the gradients of u, delta, A, B, C, D, z, delta_bias and the initial state, in this order; empty where
/// absent
std::vector<tensor> scan_backward(tensor u, tensor delta, tensor A, tensor B, tensor C, optional_tensor D,
                                  optional_tensor z, optional_tensor delta_bias, optional_tensor initial_state,
                                  tensor checkpoints, tensor d_y, optional_tensor d_final_state, bool delta_softplus) {
  c10::cuda::CUDAGuard const guard(u.device());
  auto const like = [](tensor const& x) { return at::empty(x.sizes(), x.options()); };
  auto const optional_zeros = [](optional_tensor const& x) {
    return x ? optional_tensor(at::zeros(x->sizes(), x->options())) : optional_tensor();
  };
  auto d_u = like(u), d_delta = like(u), d_B = like(B), d_C = like(C), d_A = at::zeros(A.sizes(), A.options());
  auto d_D = optional_zeros(D), d_bias = optional_zeros(delta_bias), d_initial = optional_zeros(initial_state);
  optional_tensor d_z = z ? optional_tensor(like(u)) : optional_tensor();
  for_type(u, [&]<class T>(T) {
    for_states(d_states{}, A.size(1), [&]<int N>(std::integral_constant<int, N>) {
      with_scratch(u, [&]<class P>(P const& policy) {
        bm::selective_scan::backward<N, P, T>(
            policy,
            {.u = view_of<T const, dyn, dyn, dyn>("u", u),
             .delta = view_of<T const, dyn, dyn, dyn>("delta", delta),
             .A = view_of<float const, dyn, dyn>("A", A),
             .B = view_of<T const, dyn, dyn, dyn>("B", B),
             .C = view_of<T const, dyn, dyn, dyn>("C", C),
             .D = view_of<float const, dyn>("D", D),
             .z = view_of<T const, dyn, dyn, dyn>("z", z),
             .delta_bias = view_of<float const, dyn>("delta_bias", delta_bias),
             .initial_state = view_of<float const, dyn, dyn, dyn>("initial_state", initial_state),
             .delta_softplus = delta_softplus,
             .checkpoints = view_of<float const, dyn>("checkpoints", checkpoints),
             .d_y = view_of<T const, dyn, dyn, dyn>("d_y", d_y),
             .d_final_state = view_of<float const, dyn, dyn, dyn>("d_final_state", d_final_state)},
            {.d_u = view_of<T, dyn, dyn, dyn>("d_u", d_u),
             .d_delta = view_of<T, dyn, dyn, dyn>("d_delta", d_delta),
             .d_A = view_of<float, dyn, dyn>("d_A", d_A),
             .d_B = view_of<T, dyn, dyn, dyn>("d_B", d_B),
             .d_C = view_of<T, dyn, dyn, dyn>("d_C", d_C),
             .d_D = view_of<float, dyn>("d_D", d_D),
             .d_z = view_of<T, dyn, dyn, dyn>("d_z", d_z),
             .d_delta_bias = view_of<float, dyn>("d_delta_bias", d_bias),
             .d_initial_state = view_of<float, dyn, dyn, dyn>("d_initial_state", d_initial)});
      });
    });
  });
  auto const or_empty = [&](optional_tensor const& x) { return x ? *x : at::empty({0}, A.options()); };
  return {d_u, d_delta, d_A, d_B, d_C, or_empty(d_D), or_empty(d_z), or_empty(d_bias), or_empty(d_initial)};
}

/// One token: the state (batch, channels, states), float32 or like u, moves on in place; with slots (batch), int32, it
/// is a pool, and slots[b] the row of sequence b. @returns y (batch, channels), zero where a slot is negative or beyond
/// the pool
tensor state_update(tensor state, tensor u, tensor delta, tensor A, tensor B, tensor C, optional_tensor D,
                    optional_tensor z, optional_tensor delta_bias, bool delta_softplus, optional_tensor slots) {
  c10::cuda::CUDAGuard const guard(u.device());
  auto y = slots ? at::zeros(u.sizes(), u.options()) : at::empty(u.sizes(), u.options());
  for_type(u, [&]<class T>(T) {
    for_states(d_states{}, A.size(1), [&]<int N>(std::integral_constant<int, N>) {
      bm::selective_scan::step_inputs<bm::device::cuda, T, N> const in{
          .u = view_of<T const, dyn, dyn>("x", u),
          .delta = view_of<T const, dyn, dyn>("dt", delta),
          .A = view_of<float const, dyn, dyn>("A", A),
          .B = view_of<T const, dyn, dyn>("B", B),
          .C = view_of<T const, dyn, dyn>("C", C),
          .D = view_of<float const, dyn>("D", D),
          .z = view_of<T const, dyn, dyn>("z", z),
          .delta_bias = view_of<float const, dyn>("dt_bias", delta_bias),
          .delta_softplus = delta_softplus,
          .slots = view_of<std::int32_t const, dyn>("state_batch_indices", slots)};
      bm::device::cuda const policy{.stream = at::cuda::getCurrentCUDAStream().stream()};
      auto const update = [&]<class State>(State) {
        bm::selective_scan::step<N, State>(policy, in, view_of<State, dyn, dyn, dyn>("state", state),
                                           view_of<T, dyn, dyn>("y", y));
      };
      state.scalar_type() == at::kFloat ? update(float{}) : update(T{});
    });
  });
  return y;
}

/// @returns y, and the final state (batch, taps - 1, channels)
std::tuple<tensor, tensor> conv_forward(tensor x, tensor weight, optional_tensor bias, optional_tensor initial_state,
                                        bool silu) {
  c10::cuda::CUDAGuard const guard(x.device());
  auto y = at::empty(x.sizes(), x.options());
  auto final_state = at::empty({x.size(0), weight.size(1) - 1, x.size(2)}, x.options());
  for_type(x, [&]<class T>(T) {
    with_scratch(x, [&](auto const& policy) {
      bm::causal_conv1d::forward(policy,
                                 {.x = view_of<T const, dyn, dyn, dyn>("x", x),
                                  .weight = view_of<float const, dyn, dyn>("weight", weight),
                                  .bias = view_of<float const, dyn>("bias", bias),
                                  .initial_state = view_of<T const, dyn, dyn, dyn>("initial_states", initial_state),
                                  .silu = silu},
                                 view_of<T, dyn, dyn, dyn>("y", y),
                                 view_of<T, dyn, dyn, dyn>("final_state", final_state));
    });
  });
  return {y, final_state};
}

/// @returns the gradients of x, weight, bias and the initial state; empty where absent
std::vector<tensor> conv_backward(tensor x, tensor weight, optional_tensor bias, optional_tensor initial_state,
                                  tensor d_y, optional_tensor d_final_state, bool silu) {
  c10::cuda::CUDAGuard const guard(x.device());
  auto d_x = at::empty(x.sizes(), x.options());
  auto d_weight = at::zeros(weight.sizes(), weight.options());
  auto d_bias = bias ? optional_tensor(at::zeros(bias->sizes(), bias->options())) : optional_tensor();
  auto d_initial = initial_state ? optional_tensor(at::empty(initial_state->sizes(), initial_state->options()))
                                 : optional_tensor();
  for_type(x, [&]<class T>(T) {
    with_scratch(x, [&]<class P>(P const& policy) {
      bm::causal_conv1d::backward<P, T>(
          policy,
          {.x = view_of<T const, dyn, dyn, dyn>("x", x),
           .weight = view_of<float const, dyn, dyn>("weight", weight),
           .bias = view_of<float const, dyn>("bias", bias),
           .initial_state = view_of<T const, dyn, dyn, dyn>("initial_states", initial_state),
           .silu = silu,
           .d_y = view_of<T const, dyn, dyn, dyn>("d_y", d_y),
           .d_final_state = view_of<T const, dyn, dyn, dyn>("d_final_state", d_final_state)},
          {.d_x = view_of<T, dyn, dyn, dyn>("d_x", d_x),
           .d_weight = view_of<float, dyn, dyn>("d_weight", d_weight),
           .d_bias = view_of<float, dyn>("d_bias", d_bias),
           .d_initial_state = view_of<T, dyn, dyn, dyn>("d_initial_state", d_initial)});
    });
  });
  auto const or_empty = [&](optional_tensor const& t) { return t ? *t : at::empty({0}, weight.options()); };
  return {d_x, d_weight, or_empty(d_bias), or_empty(d_initial)};
}

/// h_t = a_t h_{t-1} + b_t along the last dimension of (rows, length).
tensor recurrence_forward(tensor a, tensor b) {
  c10::cuda::CUDAGuard const guard(a.device());
  auto h = at::empty(b.sizes(), b.options());
  for_type(a, [&]<class T>(T) {
    with_scratch(a, [&](auto const& policy) {
      bm::first_order_recurrence::forward(
          policy, {.a = view_of<T const, dyn, dyn>("a", a), .b = view_of<T const, dyn, dyn>("b", b)},
          view_of<T, dyn, dyn>("h", h));
    });
  });
  return h;
}

/// @returns the gradients of a and b
std::tuple<tensor, tensor> recurrence_backward(tensor a, tensor h, tensor d_h) {
  c10::cuda::CUDAGuard const guard(a.device());
  auto d_a = at::empty(a.sizes(), a.options()), d_b = at::empty(a.sizes(), a.options());
  for_type(a, [&]<class T>(T) {
    with_scratch(a, [&](auto const& policy) {
      bm::first_order_recurrence::backward(policy,
                                           {.a = view_of<T const, dyn, dyn>("a", a),
                                            .h = view_of<T const, dyn, dyn>("h", h),
                                            .d_h = view_of<T const, dyn, dyn>("d_h", d_h)},
                                           view_of<T, dyn, dyn>("d_a", d_a), view_of<T, dyn, dyn>("d_b", d_b));
    });
  });
  return {d_a, d_b};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("scan_forward", &scan_forward);
  m.def("scan_backward", &scan_backward);
  m.def("state_update", &state_update);
  m.def("conv_forward", &conv_forward);
  m.def("conv_backward", &conv_backward);
  m.def("recurrence_forward", &recurrence_forward);
  m.def("recurrence_backward", &recurrence_backward);
}
