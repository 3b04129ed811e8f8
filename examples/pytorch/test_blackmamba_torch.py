#!/usr/bin/env python3
"""Compares the PyTorch functions with float64 references: values, every gradient, and layouts. Needs a CUDA device.

usage: test_blackmamba_torch.py      exits with 77 where there is no CUDA device
"""
import sys

import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    print("skipped: no CUDA device")
    sys.exit(77)

from blackmamba_torch import associative_scan, causal_conv1d_fn, selective_scan_fn, selective_state_update

DEVICE = "cuda"


def scan_reference(u, delta, A, B, C, D, z, delta_bias, initial_state):
    """The definition, step by step, in the inputs' precision."""
    dt = F.softplus(delta + delta_bias[:, None])
    h = initial_state
    ys = []
    for t in range(u.size(2)):
        h = torch.exp(dt[:, :, t, None] * A) * h + dt[:, :, t, None] * B[:, None, :, t] * u[:, :, t, None]
        ys.append((h * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    return torch.stack(ys, 2) * F.silu(z), h


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def compare(what, outputs, expected, tolerance):
    for i, (a, e) in enumerate(zip(outputs, expected)):
        found = error(a, e)
        print(f"  {what} {i}: {found:.1e}")
        assert found < tolerance, f"{what} {i}: error {found} above {tolerance}"


def check(function, reference, inputs, tolerance, what):
    """Same values and same gradients of a random weighting of all outputs."""
    print(what)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    narrow = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    expected, actual = reference(*wide), function(*narrow)
    compare("output", actual, expected, tolerance)
    weights = [torch.randn_like(e) for e in expected]
    compare("gradient", torch.autograd.grad(sum((a.double() * w).sum() for a, w in zip(actual, weights)), narrow),
            torch.autograd.grad(sum((e * w).sum() for e, w in zip(expected, weights)), wide), tolerance)


def main():
    torch.manual_seed(1)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        def random(*shape):
            return torch.randn(*shape, device=DEVICE).to(dtype)

        for batch, channels, length, states in ((2, 64, 70, 16), (1, 40, 300, 16), (3, 96, 33, 16)):
            A = -torch.rand(channels, states, device=DEVICE) * 3 - 0.1
            inputs = [random(batch, channels, length), random(batch, channels, length), A,
                      random(batch, states, length), random(batch, states, length),
                      torch.randn(channels, device=DEVICE), random(batch, channels, length),
                      torch.randn(channels, device=DEVICE) - 2, torch.randn(batch, channels, states, device=DEVICE)]

            def ours(u, delta, A, B, C, D, z, bias, first):
                return selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=True, return_last_state=True,
                                         initial_state=first)

            check(ours, scan_reference, inputs, tolerance, f"selective_scan_fn {dtype} {(batch, channels, length, states)}")
            # Channel-last memory and a group dimension give the same bits.
            last = [x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 3 else x for x in inputs[:8]]
            assert torch.equal(ours(*last, inputs[8])[0], ours(*inputs)[0])

            state = torch.zeros(batch, channels, states, device=DEVICE)
            whole = selective_scan_fn(*inputs[:8], delta_softplus=True)
            u, delta, A, B, C, D, z, bias, _ = inputs
            steps = [selective_state_update(state, u[:, :, t], delta[:, :, t], A, B[:, :, t], C[:, :, t], D, z[:, :, t],
                                            bias, dt_softplus=True) for t in range(length)]
            assert error(torch.stack(steps, 2), whole.double()) < tolerance

            # States in a pool: the same bits, and no other row is touched. One of them may be missing.
            def step(state, **slots):
                return selective_state_update(state, u[:, :, 0], delta[:, :, 0], A, B[:, :, 0], C[:, :, 0], D,
                                              z[:, :, 0], bias, dt_softplus=True, **slots)

            for kept_as in {torch.float32, dtype}:
                pool = torch.randn(7, channels, states, device=DEVICE).to(kept_as)
                rows = torch.tensor([5, 0, 3][:batch], device=DEVICE)
                alone, before, start = pool[rows].clone(), pool.clone(), pool.clone()
                expected = step(alone)
                assert torch.equal(step(pool, state_batch_indices=rows), expected)
                before[rows] = alone
                assert torch.equal(pool, before)
                rows[0] = -1
                found = step(start, state_batch_indices=rows)
                assert torch.equal(found[1:], expected[1:])

        for taps in (2, 3, 4):
            inputs = [random(2, 72, 50), torch.randn(72, taps, device=DEVICE), torch.randn(72, device=DEVICE),
                      random(2, 72, taps - 1)]

            def conv(x, weight, bias, first):
                return causal_conv1d_fn(x, weight, bias, initial_states=first, return_final_states=True,
                                        activation="silu")

            def conv_reference(x, weight, bias, first):
                x = torch.cat([first, x], 2)
                return F.silu(F.conv1d(x, weight[:, None], bias, groups=x.size(1))), x[:, :, 1 - taps:]

            check(conv, conv_reference, inputs, tolerance, f"causal_conv1d_fn {dtype}, {taps} taps")

        def recurrence_reference(a, b):
            h, hs = torch.zeros_like(b[..., 0]), []
            for t in range(b.size(-1)):
                h = a[..., t] * h + b[..., t]
                hs.append(h)
            return (torch.stack(hs, -1),)

        check(lambda a, b: (associative_scan(a, b),), recurrence_reference,
              [torch.rand(2, 5, 333, device=DEVICE).to(dtype), random(2, 5, 333)], tolerance, f"associative_scan {dtype}")
    print("all agree")


if __name__ == "__main__":
    main()
