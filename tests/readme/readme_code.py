#!/usr/bin/env python3
"""Compiles and runs the programs that README.md prints, exactly as printed.

usage: readme_code.py README WORK_DIR -- COMPILER FLAGS...

The programs are the ```cpp blocks right after a line `<!-- tested -->`. Each must compile, run and return 0.
"""
import re
import subprocess
import sys
from pathlib import Path


def tested_blocks(text):
    block = r"^<!-- tested -->[ \t]*\n(?:[ \t]*\n)*```cpp\n(.*?)^```[ \t]*$"
    return re.findall(block, text, flags=re.MULTILINE | re.DOTALL)


def main():
    if len(sys.argv) < 5 or sys.argv[3] != "--":
        sys.exit(__doc__)
    readme, work = Path(sys.argv[1]), Path(sys.argv[2])
    if not readme.is_file():
        sys.exit(f"{readme} does not exist")
    text = readme.read_text(encoding="utf-8")
    programs = tested_blocks(text)
    if not programs or len(programs) != text.count("<!-- tested -->"):
        sys.exit(f"{readme} holds no ```cpp block after a line <!-- tested -->")
    work.mkdir(parents=True, exist_ok=True)
    for number, code in enumerate(programs, 1):
        source, program = work / f"readme{number}.cpp", work / f"readme{number}"
        source.write_text(code, encoding="utf-8")
        program.unlink(missing_ok=True)
        print(f"program {number}: {len(code.splitlines())} lines", flush=True)
        built = subprocess.run([*sys.argv[4:], str(source), "-o", str(program)], check=False)
        if built.returncode != 0:
            sys.exit(f"program {number} of the README does not compile")
        ran = subprocess.run([str(program)], cwd=work, check=False)
        if ran.returncode != 0:
            sys.exit(f"program {number} of the README returned {ran.returncode}")


if __name__ == "__main__":
    main()
