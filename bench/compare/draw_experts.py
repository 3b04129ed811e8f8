#!/usr/bin/env python3
"""Draws the rate of a layer of experts over the number of tokens, from what compare_experts.py measured.

usage: draw_experts.py JSON SVG
"""
import json
import math
import sys
from pathlib import Path

LEFT, TOP, WIDTH, HEIGHT = 64, 56, 600, 340
SIDES = [("ours", "blackmamba"), ("dense", "dense SwiGLU MLP, PyTorch"), ("grouped", "torch._grouped_mm"),
         ("loop", "loop over experts")]
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f }
  .small { font-size: 11px; fill: #57606a }
  .grid { stroke: #d0d7de; stroke-width: 1 }
  .line { fill: none; stroke-width: 2 }
  .ours { stroke: #0969da; stroke-width: 3 } .dense { stroke: #6e7781 } .grouped { stroke: #bc4c00 }
  .loop { stroke: #8250df } .product { stroke: #6e7781; stroke-dasharray: 3 4 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 } .grid { stroke: #3d444d }
    .ours { stroke: #4493f8 } .dense { stroke: #9198a1 } .grouped { stroke: #f0883e } .loop { stroke: #ab7df8 }
    .product { stroke: #9198a1 }
  }
"""


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rows = found["rows"]
    tokens = [row["tokens"] for row in rows]
    low_x, high_x = math.log2(tokens[0]), math.log2(tokens[-1])
    least = min(rate for row in rows for rate in row["tflops"].values())
    low_y, high_y = math.floor(math.log10(least)), 3

    def x(count):
        return LEFT + WIDTH * (math.log2(count) - low_x) / (high_x - low_x)

    def y(rate):
        return TOP + HEIGHT * (high_y - math.log10(rate)) / (high_y - low_y)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 24} {TOP + HEIGHT + 92}" role="img">',
           f"<title>Rate of a layer of routed experts over the number of tokens, {found['device']}</title>",
           f"<style>{STYLE}</style>",
           f'<text x="{LEFT}" y="20">Layer of {found["experts"]} experts, {found["width"]} wide, {found["inner"]} inside, '
           f'top-1, bfloat16, inference</text>',
           f'<text class="small" x="{LEFT}" y="38">TFLOP/s, {found["device"]}; dotted: an 8192³ product by cuBLAS in '
           f'turns with them</text>']
    for power in range(low_y, high_y + 1):
        at = y(10**power)
        out.append(f'<path class="grid" d="M{LEFT} {at:.1f}h{WIDTH}"/>')
        out.append(f'<text class="small" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{10**power:g}</text>')
    for count in tokens:
        if math.log2(count) % 2 == 0:
            out.append(f'<text class="small" x="{x(count):.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{count}'
                       f"</text>")
    out.append(f'<text class="small" x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 36}" text-anchor="middle">tokens</text>')
    points = " ".join(f"{x(row['tokens']):.1f},{y(row['product_tflops']):.1f}" for row in rows)
    out.append(f'<polyline class="line product" points="{points}"/>')
    for i, (name, label) in enumerate(SIDES):
        if any(name not in row["tflops"] for row in rows):
            continue
        points = " ".join(f"{x(row['tokens']):.1f},{y(row['tflops'][name]):.1f}" for row in rows)
        out.append(f'<polyline class="line {name}" points="{points}"/>')
        column, line = LEFT + i % 2 * 300, TOP + HEIGHT + 58 + i // 2 * 20
        out.append(f'<path class="line {name}" d="M{column} {line - 4}h28"/><text x="{column + 36}" y="{line}">{label}'
                   f"</text>")
    Path(sys.argv[2]).write_text("\n".join(out) + "\n</svg>\n", encoding="utf-8")


if __name__ == "__main__":
    main()
