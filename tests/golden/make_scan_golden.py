#!/usr/bin/env python3
"""Writes associative_scan.txt and add.txt beside this script: what tests/ops/golden*_test.hpp compare with.

Folds over Python's own floats (float64), element by element: no library is needed. Inputs are not stored: both sides
compute them from values(seed, n), the hash of make_golden.py. A line of a file is a name and numbers, row-major, 17
significant digits.
"""
import operator
import os

HERE = os.path.dirname(os.path.abspath(__file__))


def mixed(i, seed):
    """A 32-bit integer hash (Wellons, lowbias32) of i + 2654435769 seed."""
    x = (i + 2654435769 * seed) % 2**32
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def values(seed, n, scale=1.0, offset=0.0):
    return [offset + scale * ((mixed(i, seed) >> 12) / 2**20 - 0.5) for i in range(n)]


def write(name, lines):
    with open(os.path.join(HERE, name + ".txt"), "w", encoding="utf-8") as file:
        for key, numbers in lines:
            file.write(" ".join([key] + ["%.17g" % x for x in numbers]) + "\n")


def scan(combine, start, row, exclusive, reverse):
    """The scan of one row, and what is left after it."""
    results, state = [0.0] * len(row), start
    for t in range(len(row) - 1, -1, -1) if reverse else range(len(row)):
        before, state = state, combine(state, row[t])
        results[t] = before if exclusive else state
    return results, state


def scan_channels(combine, starts, x, sequences, length, channels, exclusive, reverse):
    """x (sequences, length, channels), starts (sequences, channels)."""
    y, total = [0.0] * len(x), [0.0] * len(starts)
    for s in range(sequences):
        for c in range(channels):
            at = [(s * length + t) * channels + c for t in range(length)]
            results, total[s * channels + c] = scan(combine, starts[s * channels + c], [x[i] for i in at], exclusive,
                                                    reverse)
            for i, result in zip(at, results):
                y[i] = result
    return y, total


def associative_scan():
    lines = []
    # Rows of 37 elements, from a start of their own.
    x, starts = values(1, 2 * 37, 2), values(2, 2, 4)
    for name, combine in ("sum", operator.add), ("maximum", max), ("minimum", min):
        for kind, exclusive, reverse in (("inclusive", False, False), ("exclusive", True, False),
                                         ("reverse", False, True), ("exclusive_reverse", True, True)):
            y, total = scan_channels(combine, starts, x, 2, 37, 1, exclusive, reverse)
            lines += [(f"{name}.{kind}.y", y), (f"{name}.{kind}.total", total)]
    # Factors around one, in channels.
    x, starts = values(3, 2 * 9 * 3, 1, 1), values(4, 2 * 3, 2)
    y, total = scan_channels(operator.mul, starts, x, 2, 9, 3, False, False)
    lines += [("product.channels.y", y), ("product.channels.total", total)]
    # Packed sequences of 4, 0 and 8, from zero.
    x, y, totals = values(5, 12, 2), [], []
    for begin, end in (0, 4), (4, 4), (4, 12):
        results, total = scan(operator.add, 0.0, x[begin:end], False, False)
        y += results
        totals.append(total)
    lines += [("sum.packed.y", y), ("sum.packed.total", totals)]
    write("associative_scan", lines)


def add():
    write("add", [("rows.y", [a + b for a, b in zip(values(1, 3 * 5, 2), values(2, 3 * 5, 8))])])


associative_scan()
add()
