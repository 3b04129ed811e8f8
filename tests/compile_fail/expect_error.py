#!/usr/bin/env python3
"""Checks that a source file is rejected by a compiler, and with the right words.

usage: expect_error.py FILE -- COMPILER FLAGS...

FILE holds one or more lines `// expected-error: <text>`. The test passes where the compiler fails and its output holds
every text (runs of white space count as one blank, quotation marks of any kind as one kind).

A file that mentions CORRECTED (`#ifdef CORRECTED` ... `#else` ... `#endif`) holds the right spelling too: it is
compiled again with -DCORRECTED, and must then be accepted. So the error is known to come from where it is meant to.
"""
import os
import re
import subprocess
import sys

TIMEOUT_SECONDS = 240


def normalized(text):
    text = re.sub("[\u2018\u2019`\"\u201c\u201d]", "'", text)
    return re.sub(r"\s+", " ", text)


def compile_with(command):
    environment = dict(os.environ, LC_ALL="C.UTF-8")
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
                          timeout=TIMEOUT_SECONDS, check=False)
    # Compilers quote source lines: a quotation of the comment is no message.
    lines = done.stdout.decode("utf-8", "replace").splitlines(keepends=True)
    return done.returncode, "".join(line for line in lines if "expected-error:" not in line)


def check(path, compiler):
    """Returns a list of complaints and the compiler's output."""
    with open(path, encoding="utf-8") as file:
        source = file.read()
    expected = [e.strip() for e in re.findall(r"//\s*expected-error:(.*)", source)]
    if not expected or not all(expected):
        return [f"{path}: no line '// expected-error: <text>'"], ""
    code, output = compile_with([*compiler, path])
    complaints = []
    if code == 0:
        complaints.append(f"{path}: was accepted, and should have been rejected")
    elif code < 0:
        complaints.append(f"{path}: the compiler died of signal {-code}")
    else:
        complaints += [f"{path}: the compiler did not say: {text}" for text in expected
                       if normalized(text) not in normalized(output)]
    if re.search(r"\bCORRECTED\b", source):
        code, corrected_output = compile_with([*compiler, "-DCORRECTED", path])
        if code != 0:
            complaints.append(f"{path}: the corrected version was rejected too")
            output += corrected_output
    return complaints, output


def main():
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        sys.exit(__doc__)
    complaints, output = check(sys.argv[1], sys.argv[3:])
    if complaints:
        print(output)
        sys.exit("\n".join(complaints))
    print(output)


if __name__ == "__main__":
    main()
