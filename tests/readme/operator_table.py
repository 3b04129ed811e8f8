#!/usr/bin/env python3
"""The table of operators and policies in README.md, generated from the code.

usage: operator_table.py [--write] README PROGRAM...

Each PROGRAM (operators_cpu, operators_cuda; built from operator_table.cpp.in) prints for each operator a line
"<operator> <policy> yes|no", from implemented_on<Op, Policy>. The table stands between <!-- operators:begin --> and
<!-- operators:end -->. Without --write it is compared, for the policies that this build knows: a machine without CUDA
leaves the column of cuda as it is.
"""
import re
import subprocess
import sys
from pathlib import Path

POLICIES = ["cpu", "cuda"]
SECTION = re.compile(r"(<!-- operators:begin -->\n)(.*?)(<!-- operators:end -->)", re.DOTALL)


def parse(table):
    """{(operator, policy): "yes" or "no"} of a Markdown table."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()
            if line.strip().startswith("|")]
    if len(rows) < 2:
        return {}
    policies = [cell.strip("`").replace("device::", "") for cell in rows[0][1:]]
    return {(row[0].strip("`"), policy): cell for row in rows[2:] for policy, cell in zip(policies, row[1:])}


def render(cells):
    operators = sorted({operator for operator, _ in cells})
    lines = ["| operator | " + " | ".join(f"`device::{p}`" for p in POLICIES) + " |",
             "|---" * (len(POLICIES) + 1) + "|"]
    for operator in operators:
        lines.append(f"| `{operator}` | " + " | ".join(cells.get((operator, p), "no") for p in POLICIES) + " |")
    return "\n".join(lines) + "\n"


def main():
    arguments = sys.argv[1:]
    write = arguments[:1] == ["--write"]
    if write:
        arguments = arguments[1:]
    if len(arguments) < 2:
        sys.exit(__doc__)
    readme = Path(arguments[0])
    code = {}
    for program in arguments[1:]:
        for line in subprocess.run([program], stdout=subprocess.PIPE, check=True).stdout.decode().splitlines():
            operator, policy, answer = line.split()
            code[operator, policy] = answer
    if not code:
        sys.exit("the programs name no operator")
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    section = SECTION.search(text)
    if not section:
        sys.exit(f"{readme} has no section <!-- operators:begin --> ... <!-- operators:end -->")

    known_policies, operators = {policy for _, policy in code}, {operator for operator, _ in code}
    kept = {key: cell for key, cell in parse(section.group(2)).items()
            if key[1] not in known_policies and key[0] in operators}
    table = render({**kept, **code})
    if write:
        readme.write_text(text[:section.start(2)] + table + text[section.end(2):], encoding="utf-8")
        print(f"{readme}: {len(operators)} operators")
    elif table != section.group(2):
        print(f"the code says:\n{table}\n{readme} says:\n{section.group(2)}")
        sys.exit(f"{readme} is not up to date; build the target readme_operator_table to rewrite its table")
    else:
        print(table)


if __name__ == "__main__":
    main()
