#!/usr/bin/env python3
"""Ours beside each installed peer, in one process, on the same inputs' sizes: microseconds, floor, ratio.

usage: compare.py [scan] [conv] [recurrence] [--json FILE]

Peers that are not installed are named and passed over. Each side works in its own layout, without transposes. Times are
those of CUDA graphs that hold one call on each of several input sets, together larger than the L2 cache, divided by
their number: the median of repeated replays. Results are compared with each other before anything is timed.

Floors: bytes are every input read once and every output written once, at the rate of a device-to-device copy in this
run; exponentials are 20 for each channel and step of the scan (16 decays, softplus, silu) at 16 a clock for each
multiprocessor at the highest clock that the device reports.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "pytorch"))
import blackmamba_torch as ours  # noqa: E402

DEVICE = "cuda"
SHAPES = [(8, 2944, 2048), (8, 1536, 16384), (1, 2944, 2048), (1, 2944, 8192), (1, 2944, 65536), (64, 2944, 512),
          (8, 2944, 3000), (64, 2944, 100), (1, 64, 1048576), (8, 1536, 2048), (4, 768, 2048), (1, 1536, 1000),
          (32, 2944, 64)]


def peer(module):
    try:
        return __import__(module)
    except ImportError:
        print(f"{module} is not installed: no comparison with it")
        return None


def launched(call):
    """Median time of a call by itself."""
    times = []
    for _ in range(11):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times[2:])[len(times[2:]) // 2]


def microseconds(calls):
    """Median time of one of the calls, recorded one after the other."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return launched(graph.replay) / len(calls)


def input_sets(make, bytes_each):
    """As many input sets as exceed four times the L2, at least one, at most 16."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [make() for _ in range(max(1, min(16, -(-4 * l2 // bytes_each))))]


class Report:
    def __init__(self):
        self.rows = []
        big = torch.empty(1 << 28, device=DEVICE)
        other = torch.empty_like(big)
        self.copy = 2 * big.numel() * 4 / launched(lambda: other.copy_(big)) * 1e6
        self.properties = torch.cuda.get_device_properties(0)
        clock = subprocess.run(["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"],
                               stdout=subprocess.PIPE, check=True).stdout.decode().split()[0]
        self.exponentials = 16 * self.properties.multi_processor_count * float(clock) * 1e6
        print(f"{torch.cuda.get_device_name()}: copy {self.copy / 1e12:.2f} TB/s")

    def add(self, what, ours_us, peer_us, floor_us):
        ratio = f"{peer_us / ours_us:.2f}x" if peer_us else "-"
        peer_text = f"{peer_us:9.1f}" if peer_us else "        -"
        print(f"{what:52s} ours {ours_us:9.1f} us  peer {peer_text} us  {ratio:>6s}  floor {floor_us:8.1f} us "
              f"{100 * floor_us / ours_us:3.0f}%", flush=True)
        self.rows.append({"what": what, "ours_us": ours_us, "peer_us": peer_us, "floor_us": floor_us})


def agree(what, a, b, tolerance):
    found = ((a.double() - b.double()).norm() / b.double().norm()).item()
    assert found < tolerance, f"{what}: results differ by {found}"


def compare_scan(report):
    library = peer("selective_scan_cuda")
    states = 16
    for dtype in (torch.bfloat16, torch.float32):
        for batch, channels, length in SHAPES:
            size = batch * channels * length
            element = torch.finfo(dtype).bits // 8
            name = f"selective_scan {str(dtype)[6:]} {batch} {channels} {length}"
            A = -torch.rand(channels, states, device=DEVICE) * 8 - 0.5
            D = torch.randn(channels, device=DEVICE)
            bias = torch.rand(channels, device=DEVICE) - 4

            def make():
                return [torch.randn(batch, n, length, device=DEVICE, dtype=dtype)
                        for n in (channels, channels, channels, states, states, channels)]

            sets = input_sets(make, 4 * size * element)
            turned = [[x.transpose(1, 2).contiguous() for x in s] for s in sets]
            floor_bytes = (4 * size + 2 * batch * length * states) * element / report.copy * 1e6
            floor = max(floor_bytes, 20 * size / report.exponentials * 1e6)
            run = ours._extension()

            def our_forward(s, checkpoints=False):
                u, delta, z, B, C, _ = s
                return run.scan_forward(u, delta, A, B, C, D, z, bias, None, True, checkpoints)

            def their_forward(s):
                u, delta, z, B, C, _ = s
                return library.fwd(u, delta, A, B[:, None], C[:, None], D, z, bias, True)

            kept = [our_forward(s, True) for s in turned]
            theirs = [their_forward(s) for s in sets] if library else None
            if theirs:
                agree(name, kept[0][0].transpose(1, 2), theirs[0][2], 2e-2 if element == 2 else 1e-4)
            report.add(name + " forward", microseconds([lambda s=s: our_forward(s) for s in turned]),
                       microseconds([lambda s=s: their_forward(s) for s in sets]) if library else None, floor)

            def our_backward(s, k):
                u, delta, z, B, C, g = s
                return run.scan_backward(u, delta, A, B, C, D, z, bias, None, k[2], g, None, True)

            def their_backward(s, k):
                u, delta, z, B, C, g = s
                return library.bwd(u, delta, A, B[:, None], C[:, None], D, z, bias, g, k[1], k[0], None, True, False)

            if theirs:
                mine, other = our_backward(turned[0], kept[0]), their_backward(sets[0], theirs[0])
                agree(name + " d_u", mine[0].transpose(1, 2), other[0], 3e-2 if element == 2 else 1e-3)
            bytes_backward = (8 * size + 4 * batch * length * states) * element / report.copy * 1e6
            report.add(name + " backward",
                       microseconds([lambda s=s, k=k: our_backward(s, k) for s, k in zip(turned, kept)]),
                       microseconds([lambda s=s, k=k: their_backward(s, k) for s, k in zip(sets, theirs)])
                       if library else None, max(bytes_backward, 20 * size / report.exponentials * 1e6))
            del sets, turned, kept, theirs


def compare_conv(report):
    library = peer("causal_conv1d_cuda")
    for batch, channels, length in ((8, 2944, 2048), (1, 2944, 2048), (1, 2944, 8192)):
        weight = torch.randn(channels, 4, device=DEVICE)
        bias = torch.randn(channels, device=DEVICE)
        size = batch * channels * length

        def make():
            wide = torch.randn(batch, length, 2 * channels, device=DEVICE, dtype=torch.bfloat16)
            return wide[:, :, :channels], torch.randn(batch, length, channels, device=DEVICE, dtype=torch.bfloat16)

        sets = input_sets(make, 4 * size)
        run = ours._extension()
        w, b = weight.bfloat16(), bias.bfloat16()
        outs = [torch.empty_like(g) for _, g in sets]

        def their_forward(s, y):
            library.causal_conv1d_fwd(s[0].transpose(1, 2), w, b, None, None, y.transpose(1, 2), None, True)

        def their_backward(s, y, d_w, d_b):
            library.causal_conv1d_bwd(s[0].transpose(1, 2), w, b, s[1].transpose(1, 2), None, None, None,
                                      y.transpose(1, 2), d_w, d_b, None, True)

        name = f"causal_conv1d bfloat16 {batch} {channels} {length}"
        if library:
            their_forward(sets[0], outs[0])
            agree(name, run.conv_forward(sets[0][0], w.float(), b.float(), None, True)[0], outs[0], 1e-2)
        report.add(name + " forward",
                   microseconds([lambda s=s: run.conv_forward(s[0], weight, bias, None, True) for s in sets]),
                   microseconds([lambda s=s, y=y: their_forward(s, y) for s, y in zip(sets, outs)]) if library else None,
                   4 * size / report.copy * 1e6)
        d_w, d_b = torch.zeros(channels, 4, device=DEVICE), torch.zeros(channels, device=DEVICE)
        report.add(name + " backward",
                   microseconds([lambda s=s: run.conv_backward(s[0], weight, bias, None, s[1], None, True)
                                 for s in sets]),
                   microseconds([lambda s=s, y=y: their_backward(s, y, d_w, d_b) for s, y in zip(sets, outs)])
                   if library else None, 6 * size / report.copy * 1e6)


def compare_recurrence(report):
    try:
        from accelerated_scan.scalar import backward_scan, forward_scan
    except ImportError:
        print("accelerated_scan is not installed: no comparison with it")
        forward_scan = None
    for dtype in (torch.float32, torch.bfloat16):
        for batch, channels, length in ((8, 1536, 2048), (8, 1536, 16384), (1, 512, 65536)):
            element = torch.finfo(dtype).bits // 8
            size = batch * channels * length

            def make():
                return (torch.rand(batch, channels, length, device=DEVICE).to(dtype),
                        torch.randn(batch, channels, length, device=DEVICE).to(dtype))

            sets = input_sets(make, 3 * size * element)
            run = ours._extension()
            outs = [torch.empty_like(b) for _, b in sets]

            def our_forward(a, b):
                return run.recurrence_forward(a.view(-1, length), b.view(-1, length))

            def their_forward(a, b, h):
                forward_scan[(batch, channels)](a, b, h, seqlen=length, enable_fp_fusion=False)

            name = f"first_order_recurrence {str(dtype)[6:]} {batch} {channels} {length}"
            if forward_scan:
                their_forward(*sets[0], outs[0])
                agree(name, our_forward(*sets[0]).view(-1), outs[0].view(-1), 2e-2 if element == 2 else 1e-4)
            report.add(name + " forward", microseconds([lambda s=s: our_forward(*s) for s in sets]),
                       microseconds([lambda s=s, h=h: their_forward(*s, h) for s, h in zip(sets, outs)])
                       if forward_scan else None, 3 * size * element / report.copy * 1e6)
            hs = [our_forward(*s) for s in sets]
            scratch = [torch.empty_like(b) for _, b in sets]

            def their_backward(a, b, h, d_a, d_b):
                backward_scan[(batch, channels)](a, h, b, d_b, d_a, seqlen=length, enable_fp_fusion=False)

            report.add(name + " backward",
                       microseconds([lambda s=s, h=h: run.recurrence_backward(s[0].view(-1, length), h,
                                                                              s[1].view(-1, length))
                                     for s, h in zip(sets, hs)]),
                       microseconds([lambda s=s, h=h, x=x, y=y: their_backward(*s, h, x, y)
                                     for s, h, x, y in zip(sets, hs, outs, scratch)]) if forward_scan else None,
                       5 * size * element / report.copy * 1e6)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["scan", "conv", "recurrence", []])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(1)
    report = Report()
    for name, compare in (("scan", compare_scan), ("conv", compare_conv), ("recurrence", compare_recurrence)):
        if not arguments.what or name in arguments.what:
            compare(report)
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "copy_bytes_per_second":
                                              report.copy, "rows": report.rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
