#!/usr/bin/env python3
"""Where the time of a step goes: sums the kernels' times that Nsight Compute measured.

usage: ncu --csv --clock-control none --metrics gpu__time_duration.sum PROGRAM ... > times.csv
       kernel_times.py times.csv [--json FILE]

Prints a Markdown table: kernel (without its template arguments), launches, microseconds, share.
"""
import argparse
import csv
import json
import re
import sys
from pathlib import Path


def short_name(signature):
    """The kernel's name: no arguments, no template arguments, no namespaces."""
    name = signature
    while True:  # innermost template arguments first
        shorter = re.sub(r"<[^<>]*>", "", name)
        if shorter == name:
            break
        name = shorter
    name = name.split("(")[0].strip()
    name = name.split(" ")[-1]
    return name.split("::")[-1] or signature[:60]


def read(path):
    """{kernel: [launches, microseconds]}"""
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        sys.exit(f"{path}: no table; was it made with ncu --csv?")
    scale = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}
    kernels = {}
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name") != "gpu__time_duration.sum":
            continue
        entry = kernels.setdefault(short_name(row["Kernel Name"]), [0, 0.0])
        entry[0] += 1
        entry[1] += float(row["Metric Value"].replace(",", "")) * scale[row["Metric Unit"]]
    return kernels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kernels = read(arguments.csv)
    total = sum(us for _, us in kernels.values())
    print("| kernel | launches | us | share |\n|---|---|---|---|")
    for name, (launches, us) in sorted(kernels.items(), key=lambda item: -item[1][1]):
        print(f"| {name} | {launches} | {us:.1f} | {100 * us / total:.1f}% |")
    print(f"| all | {sum(n for n, _ in kernels.values())} | {total:.1f} | |")
    if arguments.json:
        arguments.json.write_text(json.dumps({name: {"launches": n, "us": round(us, 3)} for name, (n, us)
                                              in kernels.items()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
