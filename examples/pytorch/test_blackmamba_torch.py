#!/usr/bin/env python3
"""Compares the PyTorch functions with float64 references: values, every gradient, and layouts. Needs a CUDA device.

usage: test_blackmamba_torch.py [sequences] [experts]      exits with 77 where there is no CUDA device
"""
import os
import sys

import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    print("skipped: no CUDA device")
    sys.exit(77)

from blackmamba_torch import (associative_scan, causal_conv1d_fn, moe_forward, route, selective_scan_fn,
                              selective_state_update, sinkhorn)

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


def sequences():
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
                assert torch.equal(found[1:], expected[1:]) and not found[0].any()

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


def gates_reference(logits, expert, gate):
    """Of the chosen experts; zeros where a token has none."""
    chosen = expert.clamp(min=0).long()
    values = logits.gather(1, chosen)
    found = (torch.sigmoid(values) if gate == "sigmoid" else torch.softmax(values, 1) if gate == "softmax_selected" else
             torch.softmax(logits, 1).gather(1, chosen))
    return found * (expert >= 0)


def moe_reference(expert, row, gate, x, router_weight, fc1, fc2, router_bias, fc1_bias, fc2_bias):
    """The definition, for the choice of experts that is given."""
    gates = gates_reference(x @ router_weight.T + router_bias, expert, gate)
    y = torch.zeros_like(x)
    for e in range(fc1.size(0)):
        for a in range(expert.size(1)):
            mine = (expert[:, a] == e) & (row.view(expert.shape)[:, a] >= 0)
            h = x[mine] @ fc1[e].T + fc1_bias[e]
            left, right = h.chunk(2, 1)
            y = y.index_add(0, mine.nonzero()[:, 0],
                            gates[mine, a, None] * ((F.silu(left) * right) @ fc2[e].T + fc2_bias[e]))
    return (y,)


def check_plan(way, experts, capacity):
    """A stable sort of the slots by expert, up to the capacity."""
    slots, source, offsets = way.expert.flatten().tolist(), [], [0]
    for e in range(experts):
        mine = [s for s, of in enumerate(slots) if of == e]
        source += mine[:capacity or None]
        offsets.append(len(source))
    assert way.offsets.tolist() == offsets
    assert way.source.tolist() == source + [-1] * (len(slots) - len(source))
    assert all(way.source[r] == s for s, r in enumerate(way.row.tolist()) if r >= 0)
    assert sum(r >= 0 for r in way.row.tolist()) == len(source)


def experts():
    for tokens, count in ((1, 8), (300, 8), (5000, 8), (3000, 20)):
        logits = 2 * torch.randn(tokens, count, device=DEVICE) + torch.randn(count, device=DEVICE)
        offset, report = sinkhorn(logits)
        shares = torch.softmax(2 * logits.double() + offset.double(), 1).mean(0)
        found = (count * shares - 1).abs().max().item()
        print(f"sinkhorn {tokens} {count}: {report[0].item()} passes, error {found:.1e}")
        assert found < 1.1e-3 and report[1] == 0 and abs(report[2:].view(torch.float32).item() - found) < 1e-4
        for k, capacity, gate in ((1, 0, "sigmoid"), (2, tokens // 6, "softmax"), (3, 0, "softmax_selected")):
            way = route(logits, k, offset, gate=gate, capacity=capacity)
            scores = 2 * logits.double() + offset.double()
            # Among scores that are equal but for rounding any will do; one token balances itself to such.
            assert (scores.gather(1, way.expert.long()) - scores.topk(k, 1).values).abs().max() < 1e-5
            assert (way.expert.sort(1).values.diff(dim=1) > 0).all()
            assert error(way.gate, gates_reference(logits.double(), way.expert, gate)) < 1e-6
            check_plan(way, count, capacity)
    spoilt = torch.randn(40, 8, device=DEVICE)
    spoilt[3, 5], spoilt[17] = float("nan"), float("inf")
    assert sinkhorn(spoilt)[1][1] == 2
    assert (route(spoilt).expert[[3, 17]] == -1).all() and (route(spoilt).expert >= 0).sum() == 38

    def problem(dtype, tokens, width, inner, count):
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def random(*shape, of=dtype, scale=1.0):
            return (scale * torch.randn(*shape, device=DEVICE, dtype=torch.float64)).to(of)

        return [random(tokens, width), random(count, width, scale=width ** -0.5),
                random(count, 2 * inner, width, scale=width ** -0.5), random(count, width, inner, scale=inner ** -0.5),
                random(count, of=wide), random(count, 2 * inner, of=wide), random(count, width, of=wide)]

    def layer(x, router_weight, fc1, fc2, router_bias, fc1_bias, fc2_bias, **how):
        return moe_forward(x, router_weight, fc1, fc2, router_bias=router_bias, fc1_bias=fc1_bias, fc2_bias=fc2_bias,
                           **how)

    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-2),
                             (torch.float16, 3e-3)):
        if not compiled(dtype):
            continue
        for tokens, width, inner, count, how in ((1, 64, 96, 4, {}), (5, 72, 40, 8, {"k": 2, "gate": "softmax"}),
                                                 (300, 64, 96, 8, {"balance": "sinkhorn"}),
                                                 (1000, 136, 72, 8, {"balance": "sinkhorn", "capacity": 110}),
                                                 (700, 40, 24, 5, {"k": 2, "gate": "softmax_selected"})):
            inputs = problem(dtype, tokens, width, inner, count)
            way = layer(*inputs, **how, return_route=True)[1]
            check(lambda *t: (layer(*t, **how),),
                  lambda *t: moe_reference(way.expert, way.row, how.get("gate", "sigmoid"), *t), inputs, tolerance,
                  f"moe_forward {dtype} {(tokens, width, inner, count)} {how}")
            assert torch.equal(layer(*inputs, **how), layer(*inputs, **how))
    if compiled(torch.float64):
        for how in ({}, {"k": 2, "gate": "softmax"}, {"k": 2, "gate": "softmax_selected"}):
            inputs = [x.requires_grad_() for x in problem(torch.float64, 6, 5, 4, 3)]
            assert torch.autograd.gradcheck(lambda *t: layer(*t, **how), inputs, eps=1e-6, atol=1e-7)


def compiled(dtype):
    """Whether the extension has experts of this type."""
    bit = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 4, torch.float64: 8}[dtype]
    return int(os.environ.get("BLACKMAMBA_TORCH_EXPERT_TYPES", "15")) & bit != 0


def main():
    torch.manual_seed(1)
    for test in (sequences, experts):
        if len(sys.argv) == 1 or test.__name__ in sys.argv[1:]:
            test()
    print("all agree")


if __name__ == "__main__":
    main()
