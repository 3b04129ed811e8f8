#!/usr/bin/env python3
"""Runs the quickstart for a few steps in a pipe, and holds what it prints to what README.md and scripts rely on.

usage: quickstart_test.py PROGRAM WORK_DIR
"""
import json
import re
import subprocess
import sys
from pathlib import Path

KEYS = ["held_out_bits_per_byte", "order1_entropy", "order2_entropy", "tokens_per_second", "max_over_mean_expert_load",
        "decode_us_per_token_at_100", "decode_us_per_token_at_20000", "state_bytes", "parameters", "active_parameters"]


def run(program, *arguments, seconds=280):
    try:
        return subprocess.run([program, "--device", "cpu", *map(str, arguments)], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        sys.exit(f"quickstart_test: {arguments}: not done in {seconds} seconds")


def require(condition, what):
    if not condition:
        sys.exit(f"quickstart_test: {what}")


def main():
    program, work = str(Path(sys.argv[1]).resolve()), Path(sys.argv[2])
    work.mkdir(parents=True, exist_ok=True)
    prose, letters, little, short, empty = (
        work / f"{name}.txt" for name in ("prose", "letters", "little", "short", "empty"))
    prose.write_text("".join(f"All {n} roads lead to Rome, and none of them is short. " for n in range(1000)))
    letters.write_text("abcdefghijklmnopqrstuvwxyz\n" * 1000)
    little.write_text(prose.read_text()[:5000])
    short.write_text("too short")
    empty.write_text("")
    checkpoint = work / "weights.safetensors"
    checkpoint.unlink(missing_ok=True)

    done = run(program, "--text", f"{prose}:3", "--text", letters, "--steps", 12, "--checkpoint", checkpoint)
    out = done.stdout.decode("utf-8", "replace")  # a sample is whatever bytes the model makes
    require(done.returncode == 0, f"returned {done.returncode}: {done.stderr.decode('utf-8', 'replace')}")
    lines = out.split("\n")[:-1]
    result = json.loads(lines[-1])
    for key in KEYS:
        require(isinstance(result.get(key), (int, float)), f"the last line has no number {key}: {lines[-1]}")
        require(result[key] > 0, f"{key} is {result[key]}")
    before_sample = out[:out.find("\nIn the beginning ")]
    require("\r" not in before_sample and "\x1b" not in before_sample, "a progress bar was drawn into a pipe")
    require(re.search(r"^step +12/12  loss .* bits/byte .* tokens/s  00:00 left$", before_sample, re.MULTILINE),
            "no line of progress")
    require("read back, logits are the same bits" in out, "the checkpoint was not checked")
    measured = re.search(r"^bits per byte: .* on (\d+) of (\d+) held-out bytes; ", out, re.MULTILINE)
    require(measured, "the output does not say how much was measured")
    batch = 16 * 128
    tail = sum(path.stat().st_size // 10 for path in (prose, letters))
    require(measured.groups() == (str((tail - 1) // batch * batch), str(tail)),
            f"{measured.group(0)!r}, expected all whole batches of {tail} bytes")
    layers = [line for line in lines if re.search(r"[▁▂▃▄▅▆▇█].*passes, error", line)]
    require(len(layers) >= 4, f"{len(layers)} layers of experts, expected at least 4")
    require("\nIn the beginning " in out, "no sample")
    require(checkpoint.stat().st_size > 4 * result["parameters"], "the checkpoint is smaller than the weights")

    for arguments, message in (
            (["--text", work / "none.txt"], "none.txt: can't be read"),
            (["--text", empty], "the text is empty, expected at least one byte"),
            (["--text", short], "expected at least 129 (one context and its next byte)"),
            # Enough to train on, not to measure; said before 1500 steps of training.
            (["--text", little], "the texts' held-out tenth has 500 bytes, expected at least 2049 (one batch)"),
            (["--text", f"{prose}:0"], "weight: got 0.000000, expected > 0"),
            (["--text", f"{prose}:-1"], "weight: got -1.000000, expected > 0"),
            (["--text"], "got '--text', expected --text FILE[:WEIGHT]"),
            (["--text", prose, "--steps", "many"], "--steps: got 'many', expected a number from 1"),
            ([], "no text; give --text FILE")):
        done = run(program, *arguments, seconds=30)
        said = done.stderr.decode("utf-8", "replace")
        require(done.returncode != 0, f"{arguments} was accepted")
        require(message in said, f"{arguments}: got {said!r}, expected {message!r}")
        require(len(said.splitlines()) == 1, f"{arguments}: more than one line: {said!r}")
    print(lines[-1])


if __name__ == "__main__":
    main()
