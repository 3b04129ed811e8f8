#!/usr/bin/env python3
"""Errors of the selective scan against its definition in float64 on the same inputs, ours beside the peer's.

usage: scan_precision.py [--json FILE]

An error is |result - reference| / |reference|, norms over the whole tensor. Cases: ordinary inputs; steps near zero,
softplus of about -12; a long memory, a decay of 0.9999 at each of 65536 steps. Of each the output and the gradients of u,
delta, A, B and C, in float32 and in bfloat16 (whose own rounding of a result is 1.7e-3 on average). Where
selective_scan_cuda of state-spaces/mamba is not installed, that is said, and ours stands alone.
"""
import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from compare import ours, peer

DEVICE = "cuda"
STATES = 16
RESULTS = ("y", "d_u", "d_delta", "d_A", "d_B", "d_C")


def inputs(case, dtype):
    """u, delta, z, B, C and the gradient of y as (batch, length, channels) or (batch, length, states); A, D, bias."""
    batch, channels, length = {"ordinary": (2, 64, 2000), "steps near zero": (2, 64, 2000),
                               "long memory": (1, 32, 65536)}[case]

    def random(n, spread=1.0, centre=0.0):
        return (torch.randn(batch, length, n, device=DEVICE) * spread + centre).to(dtype)

    u, z, B, C, d_y = random(channels), random(channels), random(STATES), random(STATES), random(channels)
    A = -torch.rand(channels, STATES, device=DEVICE) * 8 - 0.5
    bias = torch.rand(channels, device=DEVICE) - 4
    delta = random(channels)
    if case == "steps near zero":
        delta, bias = random(channels, 0.25), bias * 0 - 12
    if case == "long memory":  # steps of 0.01 at rates about -0.01
        delta, bias = random(channels, 0.05), bias * 0 + math.log(math.expm1(0.01))
        A = -0.01 * (1 + 0.1 * torch.randn(channels, STATES, device=DEVICE)).abs()
    return u, delta, z, B, C, d_y, A, torch.randn(channels, device=DEVICE), bias


def reference(u, delta, z, B, C, d_y, A, D, bias):
    """The definition and its derivatives by the chain rule, step by step, in float64."""
    u, delta, z, B, C, d_y, A, D, bias = (x.double() for x in (u, delta, z, B, C, d_y, A, D, bias))
    batch, length, channels = u.shape
    raw = delta + bias
    dt = F.softplus(raw, threshold=1e9)
    # Time first: a step is one row of each.
    decay = torch.exp(dt.transpose(0, 1)[..., None] * A)
    h = (dt * u).transpose(0, 1)[..., None] * B.transpose(0, 1)[:, :, None, :]
    for t in range(1, length):
        h[t].addcmul_(decay[t], h[t - 1])
    before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
    gate = F.silu(z)
    y = torch.einsum("lbdn,bln->bld", h, C) + D * u
    g_y = (d_y * gate).transpose(0, 1)
    d_C = torch.einsum("lbdn,lbd->bln", h, g_y)
    g = g_y[..., None] * C.transpose(0, 1)[:, :, None, :]
    for t in range(length - 2, -1, -1):
        g[t].addcmul_(decay[t + 1], g[t + 1])
    of_exponent = g * decay * before  # the gradient of dt A
    d_driven = torch.einsum("lbdn,bln->bld", g, B)  # of dt u
    d_dt = d_driven * u + torch.einsum("lbdn,dn->bld", of_exponent, A)
    return {"y": y * gate, "d_u": d_driven * dt + D * d_y * gate, "d_delta": d_dt * torch.sigmoid(raw),
            "d_A": torch.einsum("lbdn,bld->dn", of_exponent, dt),
            "d_B": torch.einsum("lbdn,bld->bln", g, dt * u), "d_C": d_C}


def run_ours(u, delta, z, B, C, d_y, A, D, bias):
    run = ours._extension()
    y, _, kept = run.scan_forward(u, delta, A, B, C, D, z, bias, None, True, True)
    return dict(zip(RESULTS, [y, *run.scan_backward(u, delta, A, B, C, D, z, bias, None, kept, d_y, None, True)]))


def run_theirs(library, u, delta, z, B, C, d_y, A, D, bias):
    u, delta, z, B, C, d_y = (x.transpose(1, 2).contiguous() for x in (u, delta, z, B, C, d_y))
    out, x, y = library.fwd(u, delta, A, B[:, None], C[:, None], D, z, bias, True)
    d_u, d_delta, d_A, d_B, d_C = library.bwd(u, delta, A, B[:, None], C[:, None], D, z, bias, d_y, x, out, None, True,
                                              False)[:5]
    turned = [x.transpose(1, 2) for x in (y, d_u, d_delta)]
    return dict(zip(RESULTS, [*turned, d_A, d_B.squeeze(1).transpose(1, 2), d_C.squeeze(1).transpose(1, 2)]))


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(1)
    library = peer("selective_scan_cuda")
    rows = []
    for case in ("ordinary", "steps near zero", "long memory"):
        for dtype in (torch.float32, torch.bfloat16):
            given = inputs(case, dtype)
            expected = reference(*given)
            mine = run_ours(*given)
            other = run_theirs(library, *given) if library else {}
            for what in RESULTS:
                row = {"case": case, "dtype": str(dtype)[6:], "result": what, "ours": error(mine[what], expected[what]),
                       "peer": error(other[what], expected[what]) if library else None}
                beside = f"peer {row['peer']:.2e}" if library else ""
                worse = "  worse" if library and row["ours"] > 1.02 * row["peer"] else ""
                print(f"{case:16s} {row['dtype']:9s} {what:8s} ours {row['ours']:.2e}  {beside}{worse}", flush=True)
                rows.append(row)
            del expected, mine, other
            torch.cuda.empty_cache()
    if arguments.json:
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        arguments.json.write_text(f'{{"device": {json.dumps(torch.cuda.get_device_name())},\n "rows": [\n{lines}\n ]}}\n',
                                  encoding="utf-8")


if __name__ == "__main__":
    main()
