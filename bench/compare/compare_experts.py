#!/usr/bin/env python3
"""A layer of routed experts, from tokens to tokens, beside what people have instead, in one process: microseconds and
TFLOP/s over the number of tokens.

usage: compare_experts.py [--width 1472] [--inner 3872] [--experts 8] [--tokens 1 64 ...] [--json FILE]

ours      moe_forward of examples/pytorch: router, choice of one expert, plan, SwiGLU experts, weighted combination
loop      the published layer: for each expert, the tokens that chose it are looked up, gathered, multiplied, put back
grouped   the same by torch._grouped_mm: a sort by expert, two grouped products, SwiGLU, a scatter
dense     no experts: a SwiGLU MLP of one expert's size, which has the layer's operations

bfloat16, inference, top-1 by the logits. ours, grouped and dense are replayed from CUDA graphs; the loop waits for the
device and can't be recorded. Up to 64 tokens the calls go round several layers, together larger than the L2 cache. The
sides take turns of some 20 ms, five each, and the median counts: a device lowers its clock under load. `product` is the
rate of an 8192^3 product in turns with them. MegaBlocks and ScatterMoE take part where they are installed and have a
path for the shape; else a sentence says why not.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "pytorch"))
import blackmamba_torch as ours  # noqa: E402

DEVICE, DTYPE = "cuda", torch.bfloat16


class Layer:
    def __init__(self, experts, width, inner):
        def random(*shape, scale):
            return (torch.rand(*shape, device=DEVICE) * 2 - 1).mul_(scale).to(DTYPE)

        self.router = random(experts, width, scale=0.1)
        self.fc1 = random(experts, 2 * inner, width, scale=0.05)
        self.fc2 = random(experts, width, inner, scale=0.05)


def swiglu(h):
    left, right = h.chunk(2, -1)
    return F.silu(left) * right


def ours_forward(x, p):
    return ours.moe_forward(x, p.router, p.fc1, p.fc2)


def published(x, p):
    """Gates and experts by logits of the model's type."""
    return torch.sigmoid(F.linear(x, p.router).float()).max(1)


def exact(x, p):
    """By unrounded ones, as ours are: rounded, two experts may be as good for a token, and results are another's."""
    return torch.sigmoid(F.linear(x.float(), p.router.float())).max(1)


def loop(x, p, choice=published):
    gate, expert = choice(x, p)
    y = torch.empty_like(x)
    for e in range(p.fc1.size(0)):
        mine = (expert == e).nonzero()[:, 0]
        y[mine] = F.linear(swiglu(F.linear(x[mine], p.fc1[e])), p.fc2[e])
    return y * gate[:, None].to(DTYPE)


def grouped(x, p, choice=published):
    gate, expert = choice(x, p)
    order = torch.argsort(expert, stable=True)
    numbers = torch.arange(p.fc1.size(0), device=DEVICE)
    ends = (expert[:, None] == numbers).sum(0).cumsum(0).to(torch.int32)
    h = torch._grouped_mm(x[order], p.fc1.transpose(1, 2), offs=ends)
    rows = torch._grouped_mm(swiglu(h), p.fc2.transpose(1, 2), offs=ends)
    y = torch.empty_like(x)
    y[order] = rows * gate[order, None].to(DTYPE)
    return y


def dense(x, p):
    return F.linear(swiglu(F.linear(x, p.fc1[0])), p.fc2[0])


def recorded(calls):
    """One replay of all calls, in order."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def microseconds(run, repeats):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / repeats


def in_turns(runs, turns=5, stretch_us=20000):
    """Median microseconds of each run, in turns; half a stretch warms up before each."""
    repeats = {name: max(2, int(stretch_us / max(microseconds(run, 2), 1))) for name, run in runs.items()}
    found = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            microseconds(run, max(1, repeats[name] // 2))
            found[name].append(microseconds(run, repeats[name]))
    return {name: sorted(times)[len(times) // 2] for name, times in found.items()}


def others(width, inner):
    """Sentences about the peers that do not take part."""
    for name, module, multiple in (("MegaBlocks", "megablocks", 128), ("ScatterMoE", "scattermoe", 1)):
        try:
            __import__(module)
        except ImportError:
            print(f"{name} is not installed: no comparison with it")
            continue
        if width % multiple or inner % multiple:
            print(f"{name} wants sizes that are multiples of {multiple}: no comparison at {width} x {inner}")
        else:
            print(f"{name} is installed, but this program has no adapter for it yet: no comparison with it")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1472)
    parser.add_argument("--inner", type=int, default=3872)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+",
                        default=[1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--json", type=Path)
    how = parser.parse_args()
    torch.manual_seed(1)
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    others(how.width, how.inner)
    has_grouped = hasattr(torch, "_grouped_mm")
    if not has_grouped:
        print("this PyTorch has no _grouped_mm: no comparison with it")
    layers = [Layer(how.experts, how.width, how.inner) for _ in range(4)]
    big = [torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE) for _ in range(3)]
    rows = []
    for tokens in how.tokens:
        x = (torch.rand(tokens, how.width, device=DEVICE) * 2 - 1).to(DTYPE)
        used = layers if tokens <= 64 else layers[:1]
        expected = loop(x, used[0], exact).float()
        sides = {"ours": ours_forward, **({"grouped": grouped} if has_grouped else {}), "dense": dense}
        found = {"ours": ours_forward(x, used[0]), **({"grouped": grouped(x, used[0], exact)} if has_grouped else {})}
        for name, y in found.items():
            error = ((y.float() - expected).norm() / expected.norm()).item()
            assert error < 2e-2, f"{name}: results differ by {error}"
        runs = {name: recorded([lambda p=p, side=side: side(x, p) for p in used]) for name, side in sides.items()}
        runs["loop"] = lambda: [loop(x, p) for p in used]
        runs["product"] = lambda: torch.mm(big[0], big[1], out=big[2])
        times = in_turns(runs)
        product = 2 * 8192**3 / times.pop("product") * 1e-6
        times = {name: us / len(used) for name, us in times.items()}
        operations = 6 * tokens * how.width * how.inner
        rates = {name: operations / us * 1e-6 for name, us in times.items()}
        print(f"{tokens:6d} tokens  " + "  ".join(f"{name} {us:8.1f} us {rates[name]:6.1f}" for name, us in times.items())
              + f"  product {product:.0f} TFLOP/s, ours {100 * rates['ours'] / product:.0f}%", flush=True)
        rows.append({"tokens": tokens, "us": times, "tflops": rates, "product_tflops": product})
        del runs
    if how.json:
        how.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                                        "width": how.width, "inner": how.inner, "experts": how.experts, "rows": rows},
                                       indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
