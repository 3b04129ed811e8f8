#!/usr/bin/env python3
"""The selective scan beside selective_scan_cuda of state-spaces/mamba, forward and backward, at many shapes.

usage: scan_sweep.py [--json FILE] [--part I/N]

Shapes are those with batch x channels >= 512 and length >= 64, odd ones among them: lengths that are no multiple of
anything, an odd number of channels, a single channel. 16 states, z, D, delta_bias and softplus on. Each side works in its
own layout, without transposes; times are taken as compare.py takes them, and results are compared before. Where the peer
is not installed, that is said, and ours is timed alone. draw_sweep.py draws what --json has kept. --part takes a share of
the shapes.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from compare import Report, agree, input_sets, microseconds, ours, peer

DEVICE = "cuda"
STATES = 16
# (batch, channels): lengths
SHAPES = {
    (1, 512): [64, 1000, 4096, 65536],
    (1, 777): [333, 5000],
    (1, 1536): [64, 128, 1000, 2048, 16384],
    (1, 2944): [65, 512, 2049, 8192, 32768],
    (1, 5120): [100, 1024, 4096],
    (1, 8192): [2048, 7777],
    (2, 256): [64, 999, 8192],
    (2, 1024): [128, 1500, 2048],
    (2, 2560): [300, 4096],
    (3, 171): [201, 4097],
    (3, 1001): [127, 2000],
    (4, 768): [100, 512, 2048, 10000],
    (4, 2048): [64, 1024, 3001],
    (8, 64): [256, 4096, 131072],
    (8, 1536): [197, 1024, 2048, 5000],
    (8, 2944): [64, 500, 2048],
    (16, 33): [1000, 20000],
    (16, 1024): [128, 1023, 2048],
    (32, 768): [64, 196, 1024],
    (32, 2944): [99, 512],
    (64, 8): [512, 3000],
    (64, 2944): [64, 100, 256],
    (128, 256): [64, 197, 512],
    (256, 384): [65, 196],
    (512, 1): [64, 1000],
    (1024, 96): [64, 128],
}
FLOAT_SHAPES = {
    (1, 1536): [100, 2048],
    (1, 2944): [1023, 8192],
    (2, 256): [64, 8192],
    (3, 1001): [777],
    (4, 768): [2048],
    (8, 2944): [512],
    (32, 768): [196],
    (64, 8): [3000],
    (256, 384): [64],
}


def shapes():
    for dtype, table in ((torch.bfloat16, SHAPES), (torch.float32, FLOAT_SHAPES)):
        for (batch, channels), lengths in table.items():
            for length in lengths:
                assert batch * channels >= 512 and length >= 64
                yield dtype, batch, channels, length


def time_shape(report, library, dtype, batch, channels, length):
    element = torch.finfo(dtype).bits // 8
    size = batch * channels * length
    A = -torch.rand(channels, STATES, device=DEVICE) * 8 - 0.5
    D = torch.randn(channels, device=DEVICE)
    bias = torch.rand(channels, device=DEVICE) - 4
    run = ours._extension()

    def make():  # u, delta, z, B, C and the gradient of y, channels first
        return [torch.randn(batch, n, length, device=DEVICE, dtype=dtype)
                for n in (channels, channels, channels, STATES, STATES, channels)]

    sets = input_sets(make, 4 * size * element)
    turned = [[x.transpose(1, 2).contiguous() for x in s] for s in sets]

    def our_forward(s, checkpoints=False):
        u, delta, z, B, C, _ = s
        return run.scan_forward(u, delta, A, B, C, D, z, bias, None, True, checkpoints)

    def our_backward(s, kept):
        u, delta, z, B, C, g = s
        return run.scan_backward(u, delta, A, B, C, D, z, bias, None, kept[2], g, None, True)

    def their_forward(s):
        u, delta, z, B, C, _ = s
        return library.fwd(u, delta, A, B[:, None], C[:, None], D, z, bias, True)

    def their_backward(s, kept):
        u, delta, z, B, C, g = s
        return library.bwd(u, delta, A, B[:, None], C[:, None], D, z, bias, g, kept[1], kept[0], None, True, False)

    kept = [our_forward(s, True) for s in turned]
    theirs = [their_forward(s) for s in sets] if library else None
    name = f"{str(dtype)[6:]} {batch} {channels} {length}"
    if library:
        agree(name, kept[0][0].transpose(1, 2), theirs[0][2], 2e-2 if element == 2 else 1e-4)
        agree(name + " d_u", our_backward(turned[0], kept[0])[0].transpose(1, 2), their_backward(sets[0], theirs[0])[0],
              3e-2 if element == 2 else 1e-3)
    exponentials = 20 * size / report.exponentials * 1e6
    projections = batch * length * STATES
    for direction, mine, other, bytes_moved in (
            ("forward", [lambda s=s: our_forward(s) for s in turned],
             [lambda s=s: their_forward(s) for s in sets], (4 * size + 2 * projections) * element),
            ("backward", [lambda s=s, k=k: our_backward(s, k) for s, k in zip(turned, kept)],
             [lambda s=s, k=k: their_backward(s, k) for s, k in zip(sets, theirs or kept)],
             (8 * size + 4 * projections) * element)):
        report.add(f"{name} {direction}", microseconds(mine), microseconds(other) if library else None,
                   max(bytes_moved / report.copy * 1e6, exponentials))
        row = report.rows[-1]
        row.update(dtype=str(dtype)[6:], batch=batch, channels=channels, length=length, direction=direction)


def summarise(rows):
    for direction in ("forward", "backward"):
        compared = [r for r in rows if r["direction"] == direction and r["peer_us"]]
        if not compared:
            continue
        ratios = {r["what"]: r["peer_us"] / r["ours_us"] for r in compared}
        slowest = min(ratios, key=ratios.get)
        print(f"{direction}: {len(ratios)} shapes, {sum(r < 1 for r in ratios.values())} slower than the peer, median "
              f"{statistics.median(ratios.values()):.2f}x, least {ratios[slowest]:.2f}x at {slowest}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", default="1/1")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    torch.manual_seed(1)
    report = Report()
    library = peer("selective_scan_cuda")
    wrong = []
    for i, shape in enumerate(shapes()):
        if i % parts != part - 1:
            continue
        try:
            time_shape(report, library, *shape)
        except AssertionError as disagreement:
            wrong.append(str(disagreement))
            print(wrong[-1], flush=True)
        torch.cuda.empty_cache()
    summarise(report.rows)
    if arguments.json:
        lines = ",\n".join("  " + json.dumps(row) for row in report.rows)
        arguments.json.write_text(f'{{"device": {json.dumps(torch.cuda.get_device_name())}, "copy_bytes_per_second": '
                                  f'{report.copy:.4g},\n "rows": [\n{lines}\n ]}}\n', encoding="utf-8")
    if wrong:
        sys.exit(f"{len(wrong)} shapes disagree with the peer")


if __name__ == "__main__":
    main()
