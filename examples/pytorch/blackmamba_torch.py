"""blackmamba's operators for PyTorch, under the names, layouts and defaults of the packages that people use today:

    from blackmamba_torch import selective_scan_fn, selective_state_update, causal_conv1d_fn, associative_scan
    from blackmamba_torch import sinkhorn, route, moe_forward

selective_scan_fn        as mamba_ssm.ops.selective_scan_interface.selective_scan_fn
selective_state_update   as mamba_ssm.ops.triton.selective_state_update.selective_state_update (one head, one group)
causal_conv1d_fn         as causal_conv1d.causal_conv1d_fn
associative_scan         as accelerated_scan's scan(gates, tokens)
sinkhorn, route          balance of experts, and the choice of a token's experts with its plan; no package has these
moe_forward              a layer of routed SwiGLU experts, from tokens to tokens

Extensions (one for the first four, one for the experts) are built on first use by torch.utils.cpp_extension (nvcc and a
C++20 host compiler are needed), for the GPU at hand. The scan is compiled for 8, 16 and 64 states;
BLACKMAMBA_TORCH_STATES="16" in the environment builds less, or others. Activations are float32, bfloat16 or float16; A,
D and biases are taken in float32. The experts also take float64, for tests of gradients;
BLACKMAMBA_TORCH_EXPERT_TYPES builds fewer types: the sum of float32 1, bfloat16 2, float16 4, float64 8. They need
Eigen's headers, in /usr/include/eigen3 or where BLACKMAMBA_EIGEN says.

Layout: the functions take (batch, channels, length) as those packages do. The library works on (batch, length,
channels): a tensor whose memory is channel-last (x.transpose(1, 2).contiguous().transpose(1, 2), or a slice of a linear
layer's output, transposed) is used as it is, any other is copied once. Results are channel-last.

Differences: gradients also flow through the last state; results are bitwise repeatable, forward and backward.
"""
import functools
import os
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["Route", "associative_scan", "causal_conv1d_fn", "moe_forward", "route", "selective_scan_fn",
           "selective_state_update", "sinkhorn"]

_HERE = Path(__file__).resolve().parent


def _load(name, source, macros, include=(), libraries=()):
    from torch.utils.cpp_extension import load

    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        major, minor = torch.cuda.get_device_capability()
        os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}" + ("a" if major == 9 else "")
    return load(name=name, sources=[str(_HERE / source)],
                extra_include_paths=[str(_HERE.parent.parent / "include"), *include],
                extra_cuda_cflags=["-O3", "-std=c++20"]
                + [f"-D{macro}={os.environ[macro]}" for macro in macros if os.environ.get(macro)],
                extra_ldflags=list(libraries))


@functools.lru_cache(maxsize=None)
def _extension():
    return _load("blackmamba_torch_extension", "blackmamba_torch.cu", ["BLACKMAMBA_TORCH_STATES"])


@functools.lru_cache(maxsize=None)
def _experts():
    # The library comes with PyTorch, which has loaded it already where it is none of the system's.
    return _load("blackmamba_torch_experts", "blackmamba_torch_experts.cu", ["BLACKMAMBA_TORCH_EXPERT_TYPES"],
                 [os.path.abspath(os.environ.get("BLACKMAMBA_EIGEN", "/usr/include/eigen3"))], _cublas_lt())


def _cublas_lt():
    """What the linker is told of cuBLASLt: the file that PyTorch has loaded, or its name."""
    torch.cuda.init()
    torch.cuda.current_blas_handle()
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            for line in maps:
                if "libcublasLt.so" in line:
                    return [line.split(maxsplit=5)[5].strip()]
    except OSError:
        pass
    return ["-lcublasLt"]


def _rows(x):
    """(batch, channels, length) as (batch, length, channels) with contiguous channels; copies where it must."""
    if x is None:
        return None
    x = x.transpose(1, 2)
    return x if x.stride(2) == 1 or x.size(2) <= 1 else x.contiguous()


def _float(x):
    return None if x is None else x.float().contiguous()


def _projection(name, x, like):
    """B and C: (batch, states, length), or with a group dimension of one."""
    if x.is_complex():
        raise TypeError(f"selective_scan_fn: {name}: complex states are not supported")
    if x.dim() == 4:
        if x.size(1) != 1:
            raise ValueError(f"selective_scan_fn: {name}: got {x.size(1)} groups, expected 1")
        x = x.squeeze(1)
    if x.dim() != 3:
        raise ValueError(f"selective_scan_fn: {name}: got {x.dim()} dimensions, expected (batch, states, length)")
    return x.to(like.dtype)


class _SelectiveScan(torch.autograd.Function):
    # All in (batch, length, channels).
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, initial_state, softplus):
        wanted = any(ctx.needs_input_grad)
        y, last, checkpoints = _extension().scan_forward(u, delta, A, B, C, D, z, delta_bias, initial_state, softplus,
                                                         wanted)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, checkpoints)
        ctx.softplus = softplus
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(ctx, d_y, d_last):
        u, delta, A, B, C, D, z, delta_bias, initial_state, checkpoints = ctx.saved_tensors
        if d_y is None:
            d_y = torch.zeros_like(u)
        if d_y.stride(2) != 1:
            d_y = d_y.contiguous()
        if d_last is not None:
            d_last = d_last.contiguous()
        gradients = _extension().scan_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, checkpoints, d_y,
                                               d_last, ctx.softplus)
        present = (u, delta, A, B, C, D, z, delta_bias, initial_state)
        return (*(g if x is not None else None for g, x in zip(gradients, present)), None)


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False, initial_state=None):
    """u, delta, z: (batch, channels, length); A: (channels, states); B, C: (batch, states, length) or with a group
    dimension of one; D, delta_bias: (channels); initial_state: (batch, channels, states).
    Returns (batch, channels, length), with return_last_state also (batch, channels, states) in float32."""
    if A.is_complex():
        raise TypeError("selective_scan_fn: A: complex states are not supported")
    y, last = _SelectiveScan.apply(_rows(u), _rows(delta.to(u.dtype)), _float(A), _rows(_projection("B", B, u)),
                                   _rows(_projection("C", C, u)), _float(D),
                                   _rows(None if z is None else z.to(u.dtype)), _float(delta_bias),
                                   _float(initial_state), bool(delta_softplus))
    y = y.transpose(1, 2)
    return (y, last) if return_last_state else y


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False,
                           state_batch_indices=None):
    """state: (batch, channels, states), float32 or like x, moved on in place; x, dt, z: (batch, channels);
    A: (channels, states); B, C: (batch, states); D, dt_bias: (channels). With state_batch_indices (batch), the state is a
    pool (rows, channels, states) of which sequence b has row state_batch_indices[b]; where that is negative or beyond
    the pool, no state is moved on, and the row of the result is zero. Returns (batch, channels). No gradient."""
    if state.dtype not in (torch.float32, x.dtype) or state.stride(2) != 1:
        raise TypeError(f"selective_state_update: state: got {state.dtype}, stride {state.stride(2)}, expected float32 "
                        f"or {x.dtype}, stride 1")
    with torch.no_grad():
        return _extension().state_update(state, x.contiguous(), dt.to(x.dtype).contiguous(), _float(A),
                                         B.to(x.dtype).contiguous(), C.to(x.dtype).contiguous(), _float(D),
                                         None if z is None else z.to(x.dtype).contiguous(), _float(dt_bias),
                                         bool(dt_softplus), None if state_batch_indices is None
                                         else state_batch_indices.to(torch.int32).contiguous())


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, silu):
        y, last = _extension().conv_forward(x, weight, bias, initial_state, silu)
        ctx.save_for_backward(x, weight, bias, initial_state)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(ctx, d_y, d_last):
        x, weight, bias, initial_state = ctx.saved_tensors
        if d_y is None:
            d_y = torch.zeros_like(x)
        if d_y.stride(2) != 1:
            d_y = d_y.contiguous()
        if d_last is not None:
            d_last = d_last.contiguous()
        gradients = _extension().conv_backward(x, weight, bias, initial_state, d_y, d_last, ctx.silu)
        return (*(g if t is not None else None for g, t in zip(gradients, (x, weight, bias, initial_state))), None)


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
                     final_states_out=None, activation=None):
    """x: (batch, channels, length); weight: (channels, taps), 2 to 4 taps; bias: (channels); initial_states: (batch,
    channels, taps - 1); activation: None, "silu" or "swish".
    Returns (batch, channels, length), with return_final_states also (batch, channels, taps - 1)."""
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError("causal_conv1d_fn: activation must be None, silu, or swish")
    if seq_idx is not None:
        raise NotImplementedError("causal_conv1d_fn: seq_idx is not supported; call it for each sequence")
    y, last = _CausalConv1d.apply(_rows(x), _float(weight), _float(bias),
                                  None if initial_states is None else _rows(initial_states.to(x.dtype)).contiguous(),
                                  activation is not None)
    y, last = y.transpose(1, 2), last.transpose(1, 2)
    if final_states_out is not None:
        final_states_out.copy_(last)
        last = final_states_out
    return (y, last) if return_final_states else y


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        h = _extension().recurrence_forward(a, b)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, d_h):
        a, h = ctx.saved_tensors
        return _extension().recurrence_backward(a, h, d_h.contiguous())


def associative_scan(gates, tokens):
    """h_t = gates_t h_{t-1} + tokens_t along the last dimension, from zero; any leading dimensions."""
    if gates.shape != tokens.shape or gates.dtype != tokens.dtype:
        raise ValueError(f"associative_scan: got {tuple(gates.shape)} {gates.dtype} and {tuple(tokens.shape)} "
                         f"{tokens.dtype}, expected two tensors alike")
    length = gates.size(-1)
    h = _Recurrence.apply(gates.reshape(-1, length).contiguous(), tokens.reshape(-1, length).contiguous())
    return h.view(tokens.shape)


def _sums(x):
    """A dtype for sums of x's elements."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sinkhorn(logits, offset=None, *, tolerance=1e-3, max_passes=500, beta=2.0):
    """Balances experts: offsets g (experts) such that the mean over tokens of softmax(beta logits + g) is the same for
    every expert, to a relative error of `tolerance`. logits: (..., experts), float32 or float64. offset: where to start,
    as the step before left it; None: a cold start. Rows that are not finite have no vote.
    Returns the offsets and a report, an int32 tensor (passes, rows without a vote, bits of the float32 error); nothing
    waits for the device. No gradient: use the offsets in route."""
    logits = logits.detach().reshape(-1, logits.size(-1))
    offset = logits.new_zeros(logits.size(1)) if offset is None else offset.detach().to(logits.dtype).clone()
    return offset, _experts().sinkhorn_forward(logits.contiguous(), offset, tolerance, max_passes, beta)


class Route(NamedTuple):
    """Which experts tokens go to, and the plan that brings them there. Slot s = token k + a is a token's a-th choice."""
    expert: torch.Tensor   # (tokens, k) int32   -1: none
    gate: torch.Tensor     # (tokens, k)         weight of that expert's output; has a gradient
    offsets: torch.Tensor  # (experts + 1) int64 first row of each expert, then the number of rows
    source: torch.Tensor   # (tokens k) int32    slot that a row holds, -1 beyond the last row
    row: torch.Tensor      # (tokens k) int32    row of a slot, -1 where it was dropped


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, offset, k, beta, gate, capacity):
        expert, gates, *plan = _experts().route_forward(logits, offset, k, beta, gate, capacity)
        ctx.save_for_backward(logits, expert)
        ctx.gate = gate
        ctx.mark_non_differentiable(expert, *plan)
        return (expert, gates, *plan)

    @staticmethod
    def backward(ctx, _, d_gate, *__):
        logits, expert = ctx.saved_tensors
        return (_experts().route_backward(logits, expert, d_gate.contiguous(), ctx.gate), *(None,) * 5)


def route(logits, k=1, offset=None, *, beta=2.0, gate="sigmoid", capacity=0):
    """Each token's k experts of the largest beta logits + offset, of equals the lower number first, and their gates by
    the logits alone: "sigmoid", "softmax" over all experts, or "softmax_selected" over the chosen ones. logits:
    (tokens, experts), float32 or float64. capacity: most rows of an expert; 0: all. Gradients reach the logits through
    the gates. A token whose logits are not finite goes nowhere. Returns a Route."""
    return Route(*_Route.apply(logits.contiguous(), None if offset is None else offset.to(logits.dtype), k, beta, gate,
                               capacity))


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _experts().logits_forward(x, weight, bias)

    @staticmethod
    def backward(ctx, d_logits):
        x, weight = ctx.saved_tensors
        d_x, d_weight, d_bias = _experts().logits_backward(x, weight, d_logits.contiguous())
        return d_x, d_weight.to(weight.dtype), d_bias if ctx.biased else None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, fc1, fc2, fc1_bias, fc2_bias, offsets, source, row):
        wanted = any(ctx.needs_input_grad)
        y, *kept = _experts().experts_forward(x, gate, offsets, source, row, fc1, fc2, fc1_bias, fc2_bias, wanted)
        ctx.save_for_backward(gate, fc1, fc2, fc1_bias, fc2_bias, offsets, source, row, *kept)
        return y

    @staticmethod
    def backward(ctx, d_y):
        gate, fc1, fc2, fc1_bias, fc2_bias, offsets, source, row, *kept = ctx.saved_tensors
        d_x, d_gate, d_fc1, d_fc2, d_bias1, d_bias2 = _experts().experts_backward(
            gate, offsets, source, row, fc1, fc2, fc1_bias, fc2_bias, *kept, d_y.contiguous())
        return (d_x, d_gate, d_fc1.to(fc1.dtype), d_fc2.to(fc2.dtype), None if fc1_bias is None else d_bias1,
                None if fc2_bias is None else d_bias2, None, None, None)


def moe_forward(x, router_weight, fc1, fc2, *, router_bias=None, fc1_bias=None, fc2_bias=None, k=1, offset=None,
                balance=None, beta=2.0, gate="sigmoid", capacity=0, return_route=False):
    """A layer of routed experts: y[t] = sum over the token's k experts e of gate[t,e] fc2_e(silu(a) b), where (a, b) =
    fc1_e(x[t]) is split into halves, gates first.

    x: (..., width); router_weight: (experts, width); fc1: (experts, 2 inner, width); fc2: (experts, width, inner), all
    of one type; router_bias: (experts); fc1_bias: (experts, 2 inner); fc2_bias: (experts, width), taken in float32.
    balance: None (the largest logits win, moved by `offset` where it is given) or "sinkhorn": offsets that balance
    these tokens, starting from `offset`. Other arguments: as route. Gradients reach x, every weight and every bias.
    Returns y, with return_route also the Route and the offsets (None without balance). Nothing waits for the device."""
    sums = _sums(x)

    def wide(t):
        return None if t is None else t.to(sums).contiguous()

    rows = x.reshape(-1, x.size(-1)).contiguous()
    logits = _RouterLogits.apply(rows, router_weight.contiguous(), wide(router_bias))
    if balance == "sinkhorn":
        offset = sinkhorn(logits, offset, beta=beta)[0]
    elif balance is not None:
        raise ValueError(f"moe_forward: balance: got {balance!r}, expected None or 'sinkhorn'")
    way = route(logits, k, offset, beta=beta, gate=gate, capacity=capacity)
    y = _Experts.apply(rows, way.gate, fc1.contiguous(), fc2.contiguous(), wide(fc1_bias), wide(fc2_bias), way.offsets,
                       way.source, way.row).view(x.shape)
    return (y, way, offset) if return_route else y
