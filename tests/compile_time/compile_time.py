#!/usr/bin/env python3
"""Holds the cost of including each header to a budget.

usage: compile_time.py --include DIR --json FILE --cxx COMPILER [--nvcc COMPILER] [--isystem DIR ...]

budget.json beside this script says what each kind of header may cost, in seconds of an idle machine that compiles the
reference unit (a few standard headers) in `reference_seconds`; a slower machine gets proportionally more. What is
measured is the processor time of the compiler and its children, of the best of up to three compilations, so that other
work on the machine counts little. Shared caches and clock rates still make a busy machine slower: a header fails above
`tolerance` times its budget, and is marked "over" between once and `tolerance` times.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

REFERENCE = "#include <cmath>\n#include <concepts>\n#include <span>\n#include <vector>\n"
RUNS = 3
HERE = Path(__file__).resolve().parent


class Compiler:
    def __init__(self, command, extension, directory):
        self.command, self.extension, self.directory = command, extension, directory

    def seconds(self, text, enough=0.0):
        """(best processor time, files read), of up to three compilations; one is enough where it is below `enough`.
        Infinite where the text does not compile."""
        source = os.path.join(self.directory, "unit" + self.extension)
        depfile = os.path.join(self.directory, "unit.d")
        Path(source).write_text(text, encoding="utf-8")
        best = float("inf")
        for _ in range(RUNS):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([*self.command, "-MD", "-MF", depfile, source], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, check=False)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if done.returncode != 0:
                print(done.stdout.decode("utf-8", "replace"))
                return float("inf"), ""
            best = min(best, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
            if best <= enough:
                break
        return best, Path(depfile).read_text(encoding="utf-8")


def headers_of(include, pattern):
    """The headers of a pattern; {folder} stands for the name of the folder that a header lies in."""
    if "{folder}" not in pattern:
        return [pattern] if (include / pattern).is_file() else []
    found = include.glob(pattern.replace("{folder}", "*"))
    return sorted(p.relative_to(include).as_posix() for p in found
                  if p.name == Path(pattern).name.replace("{folder}", p.parent.name))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--include", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cxx", required=True)
    parser.add_argument("--nvcc")
    parser.add_argument("--isystem", action="append", default=[])
    parser.add_argument("--budget", type=Path, default=HERE / "budget.json")
    arguments = parser.parse_args()
    table = json.loads(arguments.budget.read_text(encoding="utf-8"))

    with tempfile.TemporaryDirectory() as directory:
        flags = ["-std=c++20", f"-I{arguments.include}"]
        for system in arguments.isystem:
            flags += ["-isystem", system]
        compilers = {"cxx": Compiler([arguments.cxx, *flags, "-fsyntax-only"], ".cpp", directory)}
        if arguments.nvcc:
            output = os.path.join(directory, "unit.o")
            compilers["nvcc"] = Compiler([arguments.nvcc, *flags, "-arch=sm_90a", "-c", "-o", output], ".cu", directory)

        reference, _ = compilers["cxx"].seconds(REFERENCE)
        if reference == float("inf"):
            sys.exit("the reference unit does not compile")
        scale = max(1.0, reference / table["reference_seconds"])
        print(f"reference unit: {reference:.2f} s; budgets are multiplied by {scale:.2f}, and fail above "
              f"{table['tolerance']:g} times that")
        print(f"{'seconds':>8} {'budget':>8}         header")

        rows, failed = [], 0
        for budget in table["budgets"]:
            compiler = compilers.get(budget["compiler"])
            for header in headers_of(arguments.include, budget["headers"]) if compiler else []:
                seconds, read = compiler.seconds(f"#include <{header}>\n",
                                                 scale * budget["seconds"] * table["tolerance"])
                allowed = budget["seconds"]
                if "seconds_with_eigen" in budget and "/Eigen/" in read:
                    allowed = budget["seconds_with_eigen"]
                allowed *= scale
                limit = allowed * table["tolerance"]
                verdict = "ok" if seconds <= allowed else "over" if seconds <= limit else "FAILED"
                failed += verdict == "FAILED"
                print(f"{seconds:8.2f} {allowed:8.2f} {verdict:<7} {header} ({budget['compiler']})")
                rows.append({"header": header, "compiler": budget["compiler"],
                             "seconds": round(seconds, 3) if seconds < float("inf") else None,
                             "budget_seconds": round(allowed, 3), "verdict": verdict})

    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"reference_seconds": round(reference, 3), "scale": round(scale, 3),
                                          "headers": rows}, indent=1) + "\n", encoding="utf-8")
    if not rows:
        sys.exit("no header was measured")
    if failed:
        sys.exit(f"{failed} of {len(rows)} headers do not compile, or cost more than {table['tolerance']:g} times "
                 "their budget")


if __name__ == "__main__":
    main()
