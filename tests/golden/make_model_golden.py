#!/usr/bin/env python3
"""Writes model.txt: loss, logits and gradient norms of a tiny BlackMamba, computed in float64 by PyTorch.

An implementation of the published forward pass that shares no code with the library: plain loops over time and experts, gradients by
automatic differentiation. Weights follow from a formula on their name and index, so that nothing but results is stored.

Run: pip install torch, then python3 make_model_golden.py > model.txt
"""
import math
import torch

torch.set_default_dtype(torch.float64)

D_MODEL, LAYERS, N, K, EXPAND, F, E, V = 8, 4, 3, 4, 2, 12, 3, 11
D_INNER, R = EXPAND * D_MODEL, math.ceil(D_MODEL / 16)
BATCH, LENGTH = 2, 6


def name_hash(name):
    h = 14695981039346656037
    for c in name.encode():
        h = ((h ^ c) * 1099511628211) % 2**64
    return h


def values(name, count, scale, offset=0.0):
    """offset + scale * u, u in [-1/2, 1/2): the formula that the test repeats."""
    h = name_hash(name)
    return torch.tensor(
        [offset + scale * ((((i + 1) * 2654435761 + h) % 2**32) / 2**32 - 0.5) for i in range(count)])


def weight(params, name, shape, scale, offset=0.0):
    w = values(name, math.prod(shape), scale, offset).reshape(shape).requires_grad_(True)
    params[name] = w
    return w


def rms_norm(x, w):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w


def layer_norm(x, w, b):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * w + b


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def mamba(params, prefix, x):
    in_proj = weight(params, prefix + "in_proj.weight", (2 * D_INNER, D_MODEL), 1.0)
    conv_w = weight(params, prefix + "conv1d.weight", (D_INNER, K), 1.0)
    conv_b = weight(params, prefix + "conv1d.bias", (D_INNER,), 0.5)
    x_proj = weight(params, prefix + "x_proj.weight", (R + 2 * N, D_INNER), 1.0)
    dt_proj = weight(params, prefix + "dt_proj.weight", (D_INNER, R), 1.0)
    dt_bias = weight(params, prefix + "dt_proj.bias", (D_INNER,), 1.0, -2.0)
    a_log = weight(params, prefix + "A_log", (D_INNER, N), 1.0, 0.5)
    d_skip = weight(params, prefix + "D", (D_INNER,), 1.0, 1.0)
    out_proj = weight(params, prefix + "out_proj.weight", (D_MODEL, D_INNER), 1.0)

    batch, length, _ = x.shape
    xz = x @ in_proj.T
    u, z = xz[..., :D_INNER], xz[..., D_INNER:]
    convolved = []
    for t in range(length):
        s = conv_b.expand(batch, D_INNER)
        for tap in range(K):
            past = t - (K - 1) + tap
            if past >= 0:
                s = s + conv_w[:, tap] * u[:, past]
        convolved.append(silu(s))
    u = torch.stack(convolved, 1)
    projected = u @ x_proj.T
    dt, b, c = projected[..., :R], projected[..., R:R + N], projected[..., R + N:]
    delta = torch.log1p(torch.exp(dt @ dt_proj.T + dt_bias))
    a = -torch.exp(a_log)
    h = torch.zeros(batch, D_INNER, N)
    ys = []
    for t in range(length):
        h = torch.exp(delta[:, t, :, None] * a) * h + (delta[:, t] * u[:, t])[:, :, None] * b[:, t, None, :]
        ys.append((h * c[:, t, None, :]).sum(-1) + d_skip * u[:, t])
    y = torch.stack(ys, 1) * silu(z)
    return y @ out_proj.T


def moe(params, prefix, x, activation):
    router = weight(params, prefix + "router.weight", (E, D_MODEL), 3.0)
    router_b = weight(params, prefix + "router.bias", (E,), 0.5)
    experts = [(weight(params, f"{prefix}local_experts.{e}.linear_fc1.weight", (2 * F, D_MODEL), 1.0),
                weight(params, f"{prefix}local_experts.{e}.linear_fc2.weight", (D_MODEL, F), 1.0)) for e in range(E)]
    flat = x.reshape(-1, D_MODEL)
    logits = flat @ router.T + router_b
    chosen = logits.argmax(-1)
    rows = []
    for i in range(flat.shape[0]):
        e = int(chosen[i])
        gate_up = flat[i] @ experts[e][0].T
        hidden = activation(gate_up[:F]) * gate_up[F:]
        rows.append((hidden @ experts[e][1].T) / (1 + torch.exp(-logits[i, e])))
    return torch.stack(rows).reshape(x.shape), chosen


def run(name, activation):
    params = {}
    embedding = weight(params, "embedding.word_embeddings.weight", (V, D_MODEL), 1.0)
    token = torch.tensor([[(7 * i + 3 * r + i * i) % V for i in range(LENGTH + 1)] for r in range(BATCH)])
    stream = embedding[token[:, :-1]]
    routes = []
    for layer in range(LAYERS):
        norm_w = weight(params, f"decoder.layers.{layer}.norm.weight", (D_MODEL,), 1.0, 1.0)
        mixed = rms_norm(stream, norm_w)
        if layer % 2 == 0:
            mixed = mamba(params, f"decoder.layers.{layer}.mixer.", mixed)
        else:
            mixed, chosen = moe(params, f"decoder.layers.{layer}.mixer.", mixed, activation)
            routes += chosen.tolist()
        stream = stream + mixed
    final_w = weight(params, "decoder.final_layernorm.weight", (D_MODEL,), 1.0, 1.0)
    final_b = weight(params, "decoder.final_layernorm.bias", (D_MODEL,), 0.5)
    logits = layer_norm(stream, final_w, final_b) @ embedding.T
    flat = logits.reshape(-1, V)
    target = token[:, 1:].reshape(-1)
    loss = (torch.logsumexp(flat, -1) - flat[torch.arange(flat.shape[0]), target]).mean()
    loss.backward()

    print(f"{name}.loss {loss.item():.17g}")
    print(f"{name}.routes", *routes)
    print(f"{name}.logits", *(f"{v:.17g}" for v in flat.detach().reshape(-1).tolist()))
    for key, p in params.items():
        weights = values(key + "/probe", p.numel(), 2.0)
        g = p.grad if p.grad is not None else torch.zeros_like(p)
        # A random projection and the norm: both change with any element.
        print(f"{name}.gradient {key} {(g.reshape(-1) * weights).sum().item():.17g} {g.norm().item():.17g}")


if __name__ == "__main__":
    run("swiglu", silu)
    run("geglu", gelu)
