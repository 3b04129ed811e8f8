"""blackmamba's operators for PyTorch, under the names, layouts and defaults of the packages that people use today:

    from blackmamba_torch import selective_scan_fn, selective_state_update, causal_conv1d_fn, associative_scan

selective_scan_fn        as mamba_ssm.ops.selective_scan_interface.selective_scan_fn
selective_state_update   as mamba_ssm.ops.triton.selective_state_update.selective_state_update (one head, one group)
causal_conv1d_fn         as causal_conv1d.causal_conv1d_fn
associative_scan         as accelerated_scan's scan(gates, tokens)

The extension is built on first use by torch.utils.cpp_extension (nvcc and a C++20 host compiler are needed), for the
GPU at hand. The scan is compiled for 8, 16 and 64 states; BLACKMAMBA_TORCH_STATES="16" in the environment builds less,
or others. Activations are float32, bfloat16 or float16; A, D and biases are taken in float32.

Layout: the functions take (batch, channels, length) as those packages do. The library works on (batch, length,
channels): a tensor whose memory is channel-last (x.transpose(1, 2).contiguous().transpose(1, 2), or a slice of a linear
layer's output, transposed) is used as it is, any other is copied once. Results are channel-last.

Differences: gradients also flow through the last state; results are bitwise repeatable, forward and backward.
"""
import functools
import os
from pathlib import Path

import torch

__all__ = ["associative_scan", "causal_conv1d_fn", "selective_scan_fn", "selective_state_update"]

_HERE = Path(__file__).resolve().parent


@functools.lru_cache(maxsize=None)
def _extension():
    from torch.utils.cpp_extension import load

    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        major, minor = torch.cuda.get_device_capability()
        os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}" + ("a" if major == 9 else "")
    return load(name="blackmamba_torch_extension", sources=[str(_HERE / "blackmamba_torch.cu")],
                extra_include_paths=[str(_HERE.parent.parent / "include")],
                extra_cuda_cflags=["-O3", "-std=c++20"]
                + [f"-DBLACKMAMBA_TORCH_STATES={states}" for states in [os.environ.get("BLACKMAMBA_TORCH_STATES")] if states])


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
    pool (rows, channels, states) of which sequence b has row state_batch_indices[b]; where that is negative nothing is
    read, and the row of the result is not written. Returns (batch, channels). No gradient."""
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
