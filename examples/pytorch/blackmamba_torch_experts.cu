// Routed experts for PyTorch: Sinkhorn, the choice of experts and its plan, the experts' products, with their
// gradients. blackmamba_torch.py builds this by itself when one of them is first used.
//
// Tensors come in as (tokens, ...), the last dimension contiguous.
#include "blackmamba_torch.cuh"

#include <blackmamba/ops/expert_mlp/expert_mlp.hpp>
#include <blackmamba/ops/linear/linear.hpp>
#include <blackmamba/ops/router_dispatch/router_dispatch.hpp>
#include <blackmamba/ops/sinkhorn/sinkhorn.hpp>

#include <string>
#include <tuple>
#include <vector>

namespace {

/// The storage types that the experts are compiled for, as a sum: float32 1, bfloat16 2, float16 4, and 8 float64, for
/// tests of gradients. Each costs the compiler about 20 s.
#ifndef BLACKMAMBA_TORCH_EXPERT_TYPES
#define BLACKMAMBA_TORCH_EXPERT_TYPES 15
#endif

/// Calls f with a value of the tensor's storage type.
template <class F>
void for_expert_type(tensor const& x, F&& f) {
  bool found = false;
  auto const offer = [&]<int Bit, class T>(std::integral_constant<int, Bit>, T) {
    if constexpr ((BLACKMAMBA_TORCH_EXPERT_TYPES & Bit) != 0)
      if (x.scalar_type() == scalar_type<T>()) {
        f(T{});
        found = true;
      }
  };
  offer(std::integral_constant<int, 1>{}, float{});
  offer(std::integral_constant<int, 2>{}, bm::bfloat16{});
  offer(std::integral_constant<int, 4>{}, bm::half{});
  offer(std::integral_constant<int, 8>{}, double{});
  TORCH_CHECK(found, "got ", x.scalar_type(),
              ", which the experts are not compiled for; see "
              "BLACKMAMBA_TORCH_EXPERT_TYPES");
}
/// Of numbers that are summed up, as logits and gates are.
template <class F>
void for_sums(tensor const& x, F&& f) {
  if (x.scalar_type() == at::kDouble) return f(double{});
  TORCH_CHECK(x.scalar_type() == at::kFloat, "got ", x.scalar_type(), ", expected float32 or float64");
  f(float{});
}
at::TensorOptions sums_of(tensor const& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}
optional_tensor zeros_like(optional_tensor const& x) {
  return x ? optional_tensor(at::zeros(x->sizes(), x->options())) : optional_tensor();
}
tensor or_empty(optional_tensor const& x, tensor const& like) { return x ? *x : at::empty({0}, like.options()); }

bm::gate_function gate_of(std::string const& name) {
  if (name == "sigmoid") return bm::gate_function::sigmoid;
  if (name == "softmax") return bm::gate_function::softmax;
  TORCH_CHECK(name == "softmax_selected", "gate: got ", name, ", expected sigmoid, softmax or softmax_selected");
  return bm::gate_function::softmax_selected;
}

/// @returns x weight^T + bias, unrounded
tensor logits_forward(tensor x, tensor weight, optional_tensor bias) {
  c10::cuda::CUDAGuard const guard(x.device());
  auto logits = at::empty({x.size(0), weight.size(0)}, sums_of(x));
  for_expert_type(x, [&]<class T>(T) {
    using A = bm::accum_t<T>;
    with_scratch(x, [&]<class P>(P const& policy) {
      bm::linear::forward<P, A, T>(policy,
                                   {.x = view_of<T const, dyn, dyn>("x", x),
                                    .weight = view_of<T const, dyn, dyn>("router_weight", weight),
                                    .bias = view_of<A const, dyn>("router_bias", bias)},
                                   view_of<A, dyn, dyn>("logits", logits));
    });
  });
  return logits;
}
/// @returns the gradients of x, weight and bias, the latter two unrounded
std::tuple<tensor, tensor, tensor> logits_backward(tensor x, tensor weight, tensor d_logits) {
  c10::cuda::CUDAGuard const guard(x.device());
  auto d_x = at::empty(x.sizes(), x.options()), d_weight = at::zeros(weight.sizes(), sums_of(x));
  auto d_bias = at::zeros({weight.size(0)}, sums_of(x));
  for_expert_type(x, [&]<class T>(T) {
    using A = bm::accum_t<T>;
    with_scratch(x, [&]<class P>(P const& policy) {
      bm::linear::backward<P, T, A>(policy,
                                    {.x = view_of<T const, dyn, dyn>("x", x),
                                     .weight = view_of<T const, dyn, dyn>("router_weight", weight),
                                     .d_y = view_of<A const, dyn, dyn>("d_logits", d_logits)},
                                    {.d_x = view_of<T, dyn, dyn>("d_x", d_x),
                                     .d_weight = view_of<A, dyn, dyn>("d_weight", d_weight),
                                     .d_bias = view_of<A, dyn>("d_bias", d_bias)});
    });
  });
  return {d_x, d_weight, d_bias};
}

/// The offset moves on in place. @returns passes, rows without a vote and the bits of the error, as int32
tensor sinkhorn_forward(tensor logits, tensor offset, double tolerance, std::int64_t max_passes, double beta) {
  c10::cuda::CUDAGuard const guard(logits.device());
  static_assert(sizeof(bm::sinkhorn::report) == 12);
  auto told = at::zeros({3}, logits.options().dtype(at::kInt));
  bm::view<on_device, bm::sinkhorn::report, dyn> const report(static_cast<bm::sinkhorn::report*>(told.data_ptr()), 1);
  for_sums(logits, [&]<class A>(A) {
    with_scratch(logits, [&](auto const& policy) {
      bm::sinkhorn::forward(
          policy, view_of<A const, dyn, dyn>("logits", logits), view_of<A, dyn>("offset", offset), report,
          {.tolerance = tolerance, .max_passes = static_cast<std::int32_t>(max_passes), .beta = beta});
    });
  });
  return told;
}

/// @returns expert and gate (tokens, k), and the plan: offsets (experts + 1), source and row (tokens k)
std::vector<tensor> route_forward(tensor logits, optional_tensor offset, std::int64_t k, double beta, std::string gate,
                                  std::int64_t capacity) {
  c10::cuda::CUDAGuard const guard(logits.device());
  std::int64_t const tokens = logits.size(0), experts = logits.size(1);
  auto const whole = logits.options().dtype(at::kInt);
  auto expert = at::empty({tokens, k}, whole), gates = at::empty({tokens, k}, logits.options());
  auto offsets = at::empty({experts + 1}, logits.options().dtype(at::kLong));
  auto source = at::empty({tokens * k}, whole), row = at::empty({tokens * k}, whole);
  for_sums(logits, [&]<class A>(A) {
    with_scratch(logits, [&]<class P>(P const& policy) {
      bm::router_dispatch::from_logits<P, A>(
          policy,
          {.logits = view_of<A const, dyn, dyn>("logits", logits), .offset = view_of<A const, dyn>("offset", offset)},
          {.expert = view_of<std::int32_t, dyn, dyn>("expert", expert), .gate = view_of<A, dyn, dyn>("gate", gates)},
          {.offsets = view_of<std::int64_t, dyn>("offsets", offsets),
           .source = view_of<std::int32_t, dyn>("source", source),
           .row = view_of<std::int32_t, dyn>("row", row)},
          {.gate = gate_of(gate), .beta = beta}, capacity);
    });
  });
  return {expert, gates, offsets, source, row};
}
tensor route_backward(tensor logits, tensor expert, tensor d_gate, std::string gate) {
  c10::cuda::CUDAGuard const guard(logits.device());
  auto d_logits = at::empty(logits.sizes(), logits.options());
  for_sums(logits, [&]<class A>(A) {
    with_scratch(logits, [&](auto const& policy) {
      bm::router::backward(policy,
                           {.logits = view_of<A const, dyn, dyn>("logits", logits),
                            .expert = view_of<std::int32_t const, dyn, dyn>("expert", expert),
                            .d_gate = view_of<A const, dyn, dyn>("d_gate", d_gate)},
                           view_of<A, dyn, dyn>("d_logits", d_logits), gate_of(gate));
    });
  });
  return d_logits;
}

template <class P>
bm::expert_dispatch::routing<bm::device::cuda> plan_of(P const&, tensor const& offsets, tensor const& source,
                                                       tensor const& row) {
  return {.offsets = view_of<std::int64_t, dyn>("offsets", offsets),
          .source = view_of<std::int32_t, dyn>("source", source),
          .row = view_of<std::int32_t, dyn>("row", row)};
}

/// @returns y, and with `keep` what backward needs: permuted, h, activated, rows
std::vector<tensor> experts_forward(tensor x, tensor gate, tensor offsets, tensor source, tensor row, tensor fc1,
                                    tensor fc2, optional_tensor fc1_bias, optional_tensor fc2_bias, bool keep) {
  c10::cuda::CUDAGuard const guard(x.device());
  std::int64_t const slots = row.size(0);
  auto y = at::empty(x.sizes(), x.options());
  std::vector<tensor> kept{y};
  if (keep)
    for (std::int64_t columns : {x.size(1), fc1.size(1), fc2.size(2), x.size(1)})
      kept.push_back(at::empty({slots, columns}, x.options()));
  for_expert_type(x, [&]<class T>(T) {
    using A = bm::accum_t<T>;
    with_scratch(x, [&]<class P>(P const& policy) {
      bm::expert_mlp::kept<bm::device::cuda, T> to;
      if (keep)
        to = {.permuted = view_of<T, dyn, dyn>("permuted", kept[1]),
              .h = view_of<T, dyn, dyn>("h", kept[2]),
              .activated = view_of<T, dyn, dyn>("activated", kept[3]),
              .rows = view_of<T, dyn, dyn>("rows", kept[4])};
      bm::expert_mlp::forward<bm::swiglu, P, T>(policy,
                                                {.x = view_of<T const, dyn, dyn>("x", x),
                                                 .gate = view_of<A const, dyn, dyn>("gate", gate),
                                                 .plan = plan_of(policy, offsets, source, row),
                                                 .fc1 = view_of<T const, dyn, dyn, dyn>("fc1", fc1),
                                                 .fc2 = view_of<T const, dyn, dyn, dyn>("fc2", fc2),
                                                 .fc1_bias = view_of<A const, dyn, dyn>("fc1_bias", fc1_bias),
                                                 .fc2_bias = view_of<A const, dyn, dyn>("fc2_bias", fc2_bias)},
                                                view_of<T, dyn, dyn>("y", y), to);
    });
  });
  return kept;
}
/// @returns the gradients of x, gate, fc1, fc2 and, where there are biases, of those; weights' and biases' unrounded
std::vector<tensor> experts_backward(tensor gate, tensor offsets, tensor source, tensor row, tensor fc1, tensor fc2,
                                     optional_tensor fc1_bias, optional_tensor fc2_bias, tensor permuted, tensor h,
                                     tensor activated, tensor rows, tensor d_y) {
  c10::cuda::CUDAGuard const guard(d_y.device());
  auto d_x = at::empty(d_y.sizes(), d_y.options()), d_gate = at::empty(gate.sizes(), gate.options());
  auto d_fc1 = at::zeros(fc1.sizes(), sums_of(d_y)), d_fc2 = at::zeros(fc2.sizes(), sums_of(d_y));
  auto d_fc1_bias = zeros_like(fc1_bias), d_fc2_bias = zeros_like(fc2_bias);
  for_expert_type(d_y, [&]<class T>(T) {
    using A = bm::accum_t<T>;
    with_scratch(d_y, [&]<class P>(P const& policy) {
      bm::expert_mlp::backward<bm::swiglu, P, T>(policy,
                                                 {.gate = view_of<A const, dyn, dyn>("gate", gate),
                                                  .plan = plan_of(policy, offsets, source, row),
                                                  .fc1 = view_of<T const, dyn, dyn, dyn>("fc1", fc1),
                                                  .fc2 = view_of<T const, dyn, dyn, dyn>("fc2", fc2),
                                                  .permuted = view_of<T const, dyn, dyn>("permuted", permuted),
                                                  .h = view_of<T const, dyn, dyn>("h", h),
                                                  .activated = view_of<T const, dyn, dyn>("activated", activated),
                                                  .rows = view_of<T const, dyn, dyn>("rows", rows),
                                                  .d_y = view_of<T const, dyn, dyn>("d_y", d_y)},
                                                 {.d_x = view_of<T, dyn, dyn>("d_x", d_x),
                                                  .d_gate = view_of<A, dyn, dyn>("d_gate", d_gate),
                                                  .d_fc1 = view_of<A, dyn, dyn, dyn>("d_fc1", d_fc1),
                                                  .d_fc2 = view_of<A, dyn, dyn, dyn>("d_fc2", d_fc2),
                                                  .d_fc1_bias = view_of<A, dyn, dyn>("d_fc1_bias", d_fc1_bias),
                                                  .d_fc2_bias = view_of<A, dyn, dyn>("d_fc2_bias", d_fc2_bias)});
    });
  });
  return {d_x, d_gate, d_fc1, d_fc2, or_empty(d_fc1_bias, d_gate), or_empty(d_fc2_bias, d_gate)};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("logits_forward", &logits_forward);
  m.def("logits_backward", &logits_backward);
  m.def("sinkhorn_forward", &sinkhorn_forward);
  m.def("route_forward", &route_forward);
  m.def("route_backward", &route_backward);
  m.def("experts_forward", &experts_forward);
  m.def("experts_backward", &experts_backward);
}
