#!/usr/bin/env python3
"""Tests expect_error.py itself. usage: expect_error_test.py COMPILER"""
import os
import sys
import tempfile

from expect_error import check

MESSAGE = "blackmamba: example: too many states; use fewer"
CASES = [
    # what, source, words that the complaint must hold (none: must pass)
    ("rejected as quoted", f'// expected-error: {MESSAGE}\nstatic_assert(false, "{MESSAGE}");', None),
    ("two messages", '// expected-error: one\n// expected-error: two\nstatic_assert(false, "one");\n'
                     'static_assert(false, "two");', None),
    ("corrected version compiles",
     '// expected-error: one\n#ifndef CORRECTED\nstatic_assert(false, "one");\n#endif', None),
    ("accepted", f"// expected-error: {MESSAGE}\nint x;", "was accepted"),
    ("another error", f"// expected-error: {MESSAGE}\nint x = y;", "did not say"),
    ("the comment on the failing line", f"int x = y;  // expected-error: {MESSAGE}", "did not say"),
    ("one of two messages", '// expected-error: one\n// expected-error: two\nstatic_assert(false, "one");', "two"),
    ("nothing quoted", 'static_assert(false, "one");', "no line"),
    ("an empty quotation", '// expected-error:\nstatic_assert(false, "one");', "no line"),
    ("corrected version fails", '// expected-error: one\n// CORRECTED\nstatic_assert(false, "one");', "rejected too"),
]


def main():
    failures = 0
    with tempfile.TemporaryDirectory() as directory:
        for index, (what, source, complaint) in enumerate(CASES):
            path = os.path.join(directory, f"case{index}.cpp")
            with open(path, "w", encoding="utf-8") as file:
                file.write(source + "\n")
            complaints, _ = check(path, [sys.argv[1], "-std=c++20", "-fsyntax-only"])
            text = "\n".join(complaints)
            good = not complaints if complaint is None else complaint in text
            print(f"{'ok' if good else 'FAILED'}: {what}: {text or 'passes'}")
            failures += not good
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
