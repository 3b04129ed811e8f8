#!/usr/bin/env python3
"""Draws what scan_sweep.py has kept: how many times as fast as the peer, over the length, for every shape.

usage: draw_sweep.py SWEEP.json PICTURE.svg

The background is transparent, and lines and text are of a grey that can be read on white and on black.
"""
import json
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullLocator  # noqa: E402

INK = "#808890"
# By batch x channels, from few to many.
GROUPS = [(1024, "#d97706", "batch x channels up to 1024"), (4096, "#0ea5a4", "up to 4096"),
          (None, "#6d7df0", "more")]


def group_of(row):
    width = row["batch"] * row["channels"]
    return next(i for i, (most, _, _) in enumerate(GROUPS) if most is None or width <= most)


def in_whole_chunks(length):
    """Whether the peer's fast path takes the length: chunks of 128 to 2048 steps, as many as hold the whole, or 2048."""
    return length % min(2048, max(128, 1 << (length - 1).bit_length())) == 0


def draw(axes, rows, title):
    for i, (_, colour, label) in enumerate(GROUPS):
        for dtype, marker in (("bfloat16", "o"), ("float32", "s")):
            here = [r for r in rows if group_of(r) == i and r["dtype"] == dtype]
            for whole in (True, False):
                points = [r for r in here if in_whole_chunks(r["length"]) == whole]
                axes.scatter([r["length"] for r in points], [r["ratio"] for r in points], s=26, marker=marker,
                             facecolors=colour if whole else "none", edgecolors=colour, linewidths=1.3,
                             label=label if whole and dtype == "bfloat16" else None)
    axes.axhline(1, color=INK, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks([t for t in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50)
                     if min(1, *(r["ratio"] for r in rows)) * 0.8 <= t <= max(r["ratio"] for r in rows) * 1.25])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}K" if x >= 1024 else f"{x:g}"))
    least = min(rows, key=lambda r: r["ratio"])
    axes.annotate(f"{least['batch']} x {least['channels']} x {least['length']}: {least['ratio']:.2f}x",
                  (least["length"], least["ratio"]), xytext=(6, -11), textcoords="offset points", color=INK, fontsize=8)
    axes.set_title(f"{title}, {len(rows)} shapes", color=INK, fontsize=11)
    axes.set_xlabel("length", color=INK)
    axes.tick_params(colors=INK, which="both")
    axes.grid(color=INK, alpha=0.2, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_color(INK)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[1], encoding="utf-8") as file:
        kept = json.load(file)
    rows = [dict(r, ratio=r["peer_us"] / r["ours_us"]) for r in kept["rows"] if r["peer_us"]]
    if not rows:
        sys.exit(f"{sys.argv[1]}: the peer was not timed")
    matplotlib.rcParams["svg.hashsalt"] = "sweep"
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.4), sharey=True)
    for side, direction in zip(axes, ("forward", "backward")):
        draw(side, [r for r in rows if r["direction"] == direction], direction)
    axes[0].set_ylabel("peer's time / ours", color=INK)
    legend = figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_color(INK)
    figure.suptitle(f"selective scan beside selective_scan_cuda on {kept['device']}; squares: float32, others bfloat16; "
                    "hollow: not in whole chunks of the peer", color=INK, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(sys.argv[2], transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
