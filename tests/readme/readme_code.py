#!/usr/bin/env python3
"""Compiles and runs the program that README.md prints, exactly as printed.

usage: readme_code.py README WORK_DIR -- COMPILER FLAGS...

The program is the first ```cpp block right after a line `<!-- tested -->`. It must compile, run and return 0.
"""
import re
import subprocess
import sys
from pathlib import Path


def tested_block(text):
    block = r"^<!-- tested -->[ \t]*\n(?:[ \t]*\n)*```cpp\n(.*?)^```[ \t]*$"
    match = re.search(block, text, flags=re.MULTILINE | re.DOTALL)
    return match.group(1) if match else None


def main():
    if len(sys.argv) < 5 or sys.argv[3] != "--":
        sys.exit(__doc__)
    readme, work = Path(sys.argv[1]), Path(sys.argv[2])
    if not readme.is_file():
        sys.exit(f"{readme} does not exist")
    code = tested_block(readme.read_text(encoding="utf-8"))
    if not code:
        sys.exit(f"{readme} holds no ```cpp block after a line <!-- tested -->")
    work.mkdir(parents=True, exist_ok=True)
    source, program = work / "readme.cpp", work / "readme"
    source.write_text(code, encoding="utf-8")
    program.unlink(missing_ok=True)
    print(f"{len(code.splitlines())} lines", flush=True)
    built = subprocess.run([*sys.argv[4:], str(source), "-o", str(program)], check=False)
    if built.returncode != 0:
        sys.exit("the README's program does not compile")
    ran = subprocess.run([str(program)], cwd=work, check=False)
    if ran.returncode != 0:
        sys.exit(f"the README's program returned {ran.returncode}")


if __name__ == "__main__":
    main()
