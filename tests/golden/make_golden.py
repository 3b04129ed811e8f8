#!/usr/bin/env python3
"""Writes the golden files of the operators, *.txt beside this script: what tests/ops/golden*_test.hpp compare with.

An implementation of each operator's published definition in float64 that shares no code with the library: plain loops
over time, full attention matrices, experts one by one; gradients by automatic differentiation. Inputs are not stored:
both sides compute them from values(seed, n), below.

Run again:  python3 -m venv /tmp/golden && /tmp/golden/bin/pip install torch && /tmp/golden/bin/python make_golden.py
The files must not change, except in the last digits where PyTorch's elementary functions do.

A line of a file is a name and numbers, row-major, 17 significant digits.
"""
import math
import os

import torch
import torch.nn.functional as F

torch.set_default_dtype(torch.float64)
HERE = os.path.dirname(os.path.abspath(__file__))


# ---- inputs -------------------------------------------------------------------------------------------------------

def mixed(i, seed):
    """A 32-bit integer hash (Wellons, lowbias32) of i + 2654435769 seed."""
    x = (i + 2654435769 * seed) % 2**32
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def values(seed, shape, scale=1.0, offset=0.0):
    """offset + scale (u - 1/2), with u of 20 bits in [0, 1): with scales and offsets that are powers of two, float32
    holds every input exactly."""
    n = math.prod(shape)
    u = [(mixed(i, seed) >> 12) / 2**20 for i in range(n)]
    return torch.tensor([offset + scale * (x - 0.5) for x in u]).reshape(shape).requires_grad_(True)


class Golden:
    """One file."""

    def __init__(self, name):
        self.path = os.path.join(HERE, name + ".txt")
        self.lines = []

    def put(self, name, tensor):
        numbers = torch.as_tensor(tensor).detach().to(torch.float64).flatten().tolist()
        self.lines.append(" ".join([name] + ["%.17g" % x for x in numbers]))

    def put_gradients(self, case, loss, inputs):
        """d_<name> of the loss for each named input."""
        gradients = torch.autograd.grad(loss, list(inputs.values()))
        for name, gradient in zip(inputs, gradients):
            self.put(f"{case}.d_{name}", gradient)

    def write(self):
        with open(self.path, "w") as file:
            file.write("\n".join(self.lines) + "\n")


def pieces(lengths):
    """Begin and end of packed sequences."""
    begin = 0
    for n in lengths:
        yield begin, begin + n
        begin += n


# ---- causal_conv1d ------------------------------------------------------------------------------------------------

def convolve(x, weight, bias, state, silu):
    """x (L, D), weight (D, K), state (K-1, D): y (L, D) and the last K-1 inputs."""
    taps = weight.shape[1]
    padded = torch.cat([state, x])
    rows = []
    for t in range(x.shape[0]):
        p = (padded[t:t + taps] * weight.T).sum(0)
        if bias is not None:
            p = p + bias
        rows.append(p * torch.sigmoid(p) if silu else p)
    y = torch.stack(rows) if rows else x
    return y, padded[padded.shape[0] - (taps - 1):]


def causal_conv1d():
    g = Golden("causal_conv1d")
    # A batch, four taps, SiLU, bias, states in and out.
    x, w, b = values(1, (2, 5, 3), 2), values(2, (3, 4), 2), values(3, (3,))
    s, d_y, d_s = values(4, (2, 3, 3), 2), values(5, (2, 5, 3)), values(6, (2, 3, 3))
    rows = [convolve(x[i], w, b, s[i], True) for i in range(2)]
    y, last = torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
    g.put("silu.y", y)
    g.put("silu.final_state", last)
    g.put_gradients("silu", (y * d_y).sum() + (last * d_s).sum(),
                    {"x": x, "weight": w, "bias": b, "initial_state": s})
    # Packed, three taps, nothing optional.
    x, w, d_y = values(7, (6, 2), 2), values(8, (2, 3), 2), values(9, (6, 2))
    rows = [convolve(x[i:j], w, None, torch.zeros(2, 2), False) for i, j in pieces([1, 0, 5])]
    y = torch.cat([r[0] for r in rows])
    g.put("packed.y", y)
    g.put("packed.final_state", torch.stack([r[1] for r in rows]))
    g.put_gradients("packed", (y * d_y).sum(), {"x": x, "weight": w})
    g.write()


# ---- selective_scan -----------------------------------------------------------------------------------------------

def scan(u, delta, rate, B, C, D, z, bias, state, softplus):
    """u, delta, z (L, D); rate (D, N), negative; B, C (L, N); state (D, N). y (L, D) and the last state."""
    h, rows = state, []
    for t in range(u.shape[0]):
        dt = delta[t] if bias is None else delta[t] + bias
        if softplus:
            dt = torch.log(1 + torch.exp(dt))
        h = torch.exp(dt[:, None] * rate) * h + dt[:, None] * B[t][None, :] * u[t][:, None]
        y = h @ C[t]
        if D is not None:
            y = y + D * u[t]
        if z is not None:
            y = y * z[t] * torch.sigmoid(z[t])
        rows.append(y)
    return (torch.stack(rows) if rows else u), h


def selective_scan():
    g = Golden("selective_scan")
    # Everything that Mamba has: A as a logarithm, softplus, bias, D, z, states in and out.
    n = 4
    u, delta, A = values(1, (2, 4, 2), 2), values(2, (2, 4, 2), 4), values(3, (2, n), 2)
    B, C, D = values(4, (2, 4, n), 2), values(5, (2, 4, n), 2), values(6, (2,), 2, 1)
    z, bias, h0 = values(7, (2, 4, 2), 4), values(8, (2,), 2, -1), values(9, (2, 2, n), 2)
    d_y, d_h = values(10, (2, 4, 2)), values(11, (2, 2, n))
    rows = [scan(u[i], delta[i], -torch.exp(A), B[i], C[i], D, z[i], bias, h0[i], True) for i in range(2)]
    y, h = torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
    g.put("mamba.y", y)
    g.put("mamba.final_state", h)
    g.put_gradients("mamba", (y * d_y).sum() + (h * d_h).sum(),
                    {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": bias,
                     "initial_state": h0})
    # The recurrence alone, packed, with the rates themselves.
    u, delta, A = values(12, (6, 3), 2), values(13, (6, 3), 0.5, 0.5), values(14, (3, n), 1, -1)
    B, C, d_y = values(15, (6, n), 2), values(16, (6, n), 2), values(17, (6, 3))
    rows = [scan(u[i:j], delta[i:j], A, B[i:j], C[i:j], None, None, None, torch.zeros(3, n), False)
            for i, j in pieces([2, 0, 4])]
    y = torch.cat([r[0] for r in rows])
    g.put("packed.y", y)
    g.put("packed.final_state", torch.stack([r[1] for r in rows]))
    g.put_gradients("packed", (y * d_y).sum(), {"u": u, "delta": delta, "A": A, "B": B, "C": C})
    g.write()


# ---- recurrence and embedding ------------------------------------------------------------------------------------

def first_order_recurrence():
    g = Golden("first_order_recurrence")
    a, b, h0 = values(1, (2, 5, 2), 2), values(2, (2, 5, 2), 2), values(3, (2, 2), 2)
    d_h, d_last = values(4, (2, 5, 2)), values(5, (2, 2))
    for name, times in ("forward", range(5)), ("reverse", range(4, -1, -1)):
        state, rows = h0, [None] * 5
        for t in times:
            state = a[:, t] * state + b[:, t]
            rows[t] = state
        h = torch.stack(rows, 1)
        g.put(f"{name}.h", h)
        g.put(f"{name}.final_state", state)
        g.put_gradients(name, (h * d_h).sum() + (state * d_last).sum(), {"a": a, "b": b, "initial_state": h0})
    g.write()


def embedding():
    g = Golden("embedding")
    table, d_y = values(1, (6, 3), 2), values(2, (5, 3))
    y = table[torch.tensor([4, 0, 4, 5, 4])]
    g.put("table.y", y)
    g.put_gradients("table", (y * d_y).sum(), {"table": table})
    g.write()


# ---- norms --------------------------------------------------------------------------------------------------------

def norms():
    eps = 1e-5
    x, residual, w, b = values(1, (3, 5), 2), values(2, (3, 5), 4), values(3, (5,), 1, 1), values(4, (5,))
    d_y, d_past = values(5, (3, 5)), values(6, (3, 5))
    s = x + residual
    g = Golden("rms_norm")
    y = s / torch.sqrt((s * s).mean(1, keepdim=True) + eps) * w
    g.put("residual.y", y)
    g.put("residual.sum", s)
    g.put_gradients("residual", (y * d_y).sum() + (s * d_past).sum(), {"s": x, "weight": w})
    g.write()
    g = Golden("layer_norm")
    y = F.layer_norm(s, (5,), w, b, eps)
    g.put("residual.y", y)
    g.put("residual.sum", s)
    g.put_gradients("residual", (y * d_y).sum() + (s * d_past).sum(), {"s": x, "weight": w, "bias": b})
    g.write()


# ---- gated activations --------------------------------------------------------------------------------------------

def swiglu(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def geglu(gate, up):
    return gate * (1 + torch.erf(gate / math.sqrt(2))) / 2 * up


def gated_activation():
    g = Golden("gated_activation")
    gate, up, d_y = values(1, (3, 7), 8), values(2, (3, 7), 2), values(3, (3, 7))
    for name, f in ("silu", swiglu), ("gelu", geglu):
        y = f(gate, up)
        g.put(f"{name}.y", y)
        g.put_gradients(name, (y * d_y).sum(), {"gate": gate, "up": up})
    g.write()


# ---- router and experts -------------------------------------------------------------------------------------------

def router():
    g = Golden("router")
    # BlackMamba's layer: the expert with the largest beta logit + offset, weighted with the sigmoid of its logit; the
    # choice has no gradient.
    tokens, width, hidden, experts, beta = 7, 4, 3, 3, 2.0
    x, d_y = values(1, (tokens, width), 4), values(2, (tokens, width))
    w, b = values(3, (experts, width), 2), values(4, (experts,))
    fc1, fc2 = values(5, (experts, 2 * hidden, width), 2), values(6, (experts, width, hidden), 2)
    offset = values(7, (experts,), 2).detach()
    for name, act in ("swiglu", swiglu), ("geglu", geglu):
        logits = x @ w.T + b
        score = (beta * logits + offset).detach()
        chosen = score.argmax(1)
        top = score.sort(1, descending=True).values
        assert float((top[:, 0] - top[:, 1]).min()) > 1e-3  # float32 must choose the same
        assert len(set(chosen.tolist())) == experts and bool((chosen != logits.argmax(1)).any())
        rows = []
        for i in range(tokens):
            e = int(chosen[i])
            h = fc1[e] @ x[i]
            rows.append(torch.sigmoid(logits[i, e]) * (fc2[e] @ act(h[:hidden], h[hidden:])))
        y = torch.stack(rows)
        g.put(f"{name}.expert", chosen)
        g.put(f"{name}.y", y)
        g.put_gradients(name, (y * d_y).sum(), {"x": x, "weight": w, "bias": b, "fc1": fc1, "fc2": fc2})
    # Other gates, two experts for a token.
    logits, d_gate = values(8, (5, 4), 4), values(9, (5, 2))
    top = logits.detach().sort(1, descending=True)
    assert float((top.values[:, :-1] - top.values[:, 1:]).min()) > 1e-3
    chosen = top.indices[:, :2]
    for name, gate in (("sigmoid", torch.sigmoid(logits).gather(1, chosen)),
                       ("softmax", torch.softmax(logits, 1).gather(1, chosen)),
                       ("softmax_selected", torch.softmax(logits.gather(1, chosen), 1))):
        g.put(f"{name}.expert", chosen)
        g.put(f"{name}.gate", gate)
        g.put_gradients(name, (gate * d_gate).sum(), {"logits": logits})
    g.write()


# ---- attention ----------------------------------------------------------------------------------------------------

def rotated(x, base):
    """x (L, heads, dh): elements m and m + dh/2 are the parts of a complex number that turns by i base^(-2m/dh)."""
    length, _, dim = x.shape
    if base == 0:
        return x
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None, :]
    turned = torch.complex(x[..., :dim // 2], x[..., dim // 2:]) * turn
    return torch.cat([turned.real, turned.imag], -1)


def attend(q, k, v, base):
    """q (L, Hq, dh), k and v (L, Hkv, dh): y (L, Hq, dh), lse (Hq, L)."""
    length, heads, dim = q.shape
    share = heads // k.shape[1]
    k, v = (torch.repeat_interleave(t, share, dim=1) for t in (rotated(k, base), v))
    score = torch.einsum("ihd,jhd->hij", rotated(q, base), k) / math.sqrt(dim)
    score = score.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("hij,jhd->ihd", torch.softmax(score, -1), v), torch.logsumexp(score, -1)


def attention():
    g = Golden("attention")
    # Packed, two query heads for one key/value head.
    q, k, v = values(1, (6, 2, 4), 4), values(2, (6, 1, 4), 4), values(3, (6, 1, 4), 2)
    d_y = values(4, (6, 2, 4))
    for name, base in ("packed", 10000.0), ("packed_without_rotary", 0.0):
        rows = [attend(q[i:j], k[i:j], v[i:j], base) for i, j in pieces([2, 0, 4])]
        y = torch.cat([r[0] for r in rows])
        g.put(f"{name}.y", y)
        g.put(f"{name}.lse", torch.cat([r[1] for r in rows], 1))
        g.put_gradients(name, (y * d_y).sum(), {"q": q, "k": k, "v": v})
    # Longer than a tile: the last row of y, and two numbers of every gradient.
    shape, kv_shape = (150, 4, 8), (150, 2, 8)
    q, k, v = values(5, shape, 4), values(6, kv_shape, 4), values(7, kv_shape, 2)
    y, lse = attend(q, k, v, 10000.0)
    g.put("long.last_y", y[-1])
    g.put("long.last_lse", lse[:, -1])
    gradients = torch.autograd.grad((y * values(8, shape)).sum(), [q, k, v])
    for name, gradient, probe in zip("qkv", gradients, (values(9, shape), values(10, kv_shape), values(11, kv_shape))):
        g.put(f"long.d_{name}", torch.stack([(gradient * probe).sum(), gradient.norm()]))
    g.write()


# ---- cross entropy ------------------------------------------------------------------------------------------------

def cross_entropy():
    g = Golden("cross_entropy")
    logits, target = values(1, (5, 7), 16), torch.tensor([3, -1, 0, 6, 3])
    loss = F.cross_entropy(logits, target, reduction="sum", ignore_index=-1)
    g.put("sum.loss", loss)
    g.put("sum.row_loss", F.cross_entropy(logits, target, reduction="none", ignore_index=-1))
    g.put_gradients("sum", 0.25 * loss, {"logits": logits})
    g.write()


# ---- adamw --------------------------------------------------------------------------------------------------------

def adamw():
    g = Golden("adamw")
    # Two groups: six parameters that decay, four that do not and learn at half the rate. Three steps.
    for name, max_norm in ("clipped", 0.5), ("unclipped", 0.0):
        start = values(1, (10,), 2).detach()
        decaying, others = start[:6].clone().requires_grad_(True), start[6:].clone().requires_grad_(True)
        optimizer = torch.optim.AdamW(
            [{"params": [decaying], "weight_decay": 0.125}, {"params": [others], "weight_decay": 0.0, "lr": 2**-8}],
            lr=2**-7, betas=(0.9, 0.95), eps=1e-8)
        for step in range(3):
            gradient = values(2 + step, (10,), 1.0).detach()
            norm = gradient.norm()
            g.put(f"{name}.norm{step + 1}", norm)
            if max_norm > 0:
                assert norm > max_norm
                gradient = gradient * min(1.0, max_norm / float(norm))
            decaying.grad, others.grad = gradient[:6].clone(), gradient[6:].clone()
            optimizer.step()
        for key, state in ("first_moment", "exp_avg"), ("second_moment", "exp_avg_sq"):
            g.put(f"{name}.{key}", torch.cat([optimizer.state[p][state] for p in (decaying, others)]))
        g.put(f"{name}.parameter", torch.cat([decaying, others]))
    g.write()


# ---- sinkhorn -----------------------------------------------------------------------------------------------------

def sinkhorn():
    g = Golden("sinkhorn")
    rows, experts, beta = 12, 3, 2.0
    x = (values(1, (rows, experts), 2) + torch.tensor([0.5, 0.0, -0.25])).detach()

    def error(offset):
        mass = torch.softmax(beta * x + offset, 1).mean(0)
        return (experts * mass - 1).abs().max()

    # The released loop, as published: its initial value and the classical one, its epsilon and stop rule.
    K = torch.exp(beta * x)
    for name, d1 in ("reference", 1 / (experts * K.sum(0))), ("ones", torch.ones(experts)):
        passes = 0
        while True:
            d0 = (1 / rows) / (K @ d1 + 1e-8)
            old, d1 = d1, (1 / experts) / (K.T @ d0 + 1e-8)
            passes += 1
            if (d1 - old).abs().mean() <= 1e-4:
                break
        offset = torch.log(d1) - torch.log(d1).max()
        g.put(f"{name}.passes", passes)
        g.put(f"{name}.offset", offset)
        g.put(f"{name}.error", error(offset))
        g.put(f"{name}.plan", d0[:, None] * K * d1[None, :])
    # The limit: rows exact, columns balanced to the last digit.
    offset = torch.zeros(experts)
    for _ in range(10000):
        offset = offset - torch.log(experts * torch.softmax(beta * x + offset, 1).mean(0))
    offset = offset - offset.max()
    assert error(offset) < 1e-14
    g.put("sound.offset", offset)
    g.put("sound.plan", torch.softmax(beta * x + offset, 1) / rows)
    g.write()


for make in (causal_conv1d, selective_scan, first_order_recurrence, embedding, norms, gated_activation, router, attention,
             cross_entropy, adamw, sinkhorn):
    make()
