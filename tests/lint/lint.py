#!/usr/bin/env python3
"""The rules of the source tree that a compiler does not check.

usage: lint.py ROOT        prints file:line: rule: what, and exits with 1 where a rule is broken
       lint.py --rules     prints the rules

A rule is a function over the tree, registered with its name; its docstring is the rule. lint_test.py breaks each one.
"""
import re
import sys
from pathlib import Path

RULES = {}
CODE = {".hpp", ".cuh", ".cpp", ".cu"}
MAX_LINES = 600
MAX_EXAMPLE_LINES = 99
MAX_COLUMNS = 120
# What may include what: a layer includes itself and those below. train and generate stand side by side.
BELOW = {
    "core": {"core"},
    "ops": {"core", "ops"},
    "nn": {"core", "ops", "nn"},
    "model": {"core", "ops", "nn", "model"},
    "train": {"core", "ops", "nn", "model", "train"},
    "generate": {"core", "ops", "nn", "model", "generate"},
}
MACRO_FILES = {"core/config.hpp", "version.hpp"}
# Macros that configure a third-party header, where it is included.
FOREIGN_MACROS = {("core/cpu/gemm_eigen.hpp", "EIGEN_NO_CUDA")}


def rule(function):
    RULES[function.__name__] = function
    return function


def without_comments(text):
    """The text with comments blanked, line breaks kept. String literals stay as they are."""
    pattern = r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'|//[^\n]*|/\*.*?\*/'

    def blank(match):
        found = match.group(0)
        return re.sub(r"[^\n]", " ", found) if found.startswith("/") else found

    return re.sub(pattern, blank, text, flags=re.DOTALL)


class File:
    def __init__(self, root, path):
        self.path = path
        self.name = path.relative_to(root).as_posix()
        self.text = path.read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        self.code = without_comments(self.text).splitlines()
        # Path under include/blackmamba/, and the layer that it belongs to.
        prefix = "include/blackmamba/"
        self.header = self.name[len(prefix):] if self.name.startswith(prefix) else None
        self.layer = self.header.split("/")[0] if self.header and "/" in self.header else None

    def find(self, pattern):
        """(line number, match) of each code line that matches."""
        return [(number, match) for number, line in enumerate(self.code, 1) for match in [re.search(pattern, line)]
                if match]

    def includes(self):
        """(line number, path) of each include."""
        return [(number, match.group(1)) for number, match in self.find(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]')]


class Tree:
    def __init__(self, root):
        self.root = Path(root)
        self.files = []
        for top in ("include", "tests", "bench", "examples"):
            self.files += [File(self.root, p) for p in sorted((self.root / top).rglob("*"))
                           if p.suffix in CODE and p.is_file()]
        self.headers = [f for f in self.files if f.header is not None]
        self.users = [f for f in self.files if f.header is None]
        ops = self.root / "include/blackmamba/ops"
        self.operators = sorted(p.name for p in ops.iterdir() if p.is_dir()) if ops.is_dir() else []


@rule
def hardware_below(tree):
    """Above ops/ there is no device: no .cuh, no conditional compilation, no stream, no kernel."""
    pattern = (r"\.cuh|^\s*#\s*(if|ifdef|ifndef|elif|else)\b|\bcuda[A-Z]\w*|__(global|device|host|shared)__|<<<"
               r"|\bBLACKMAMBA_CUDA\b")
    for file in tree.headers:
        if file.layer in ("nn", "model", "train", "generate"):
            for number, match in file.find(pattern):
                yield file, number, f"'{match.group(0).strip()}' belongs in ops/ or core/"


@rule
def dependencies_point_down(tree):
    """core <- ops <- nn <- model <- {train, generate}; nothing inside includes the umbrella."""
    for file in tree.headers:
        for number, path in file.includes():
            if path == "blackmamba/blackmamba.hpp":
                yield file, number, "the umbrella is for users; include what is used"
            match = re.match(r"blackmamba/(\w+)/", path)
            if match and file.layer and match.group(1) not in BELOW.get(file.layer, set()):
                yield file, number, f"{file.layer}/ must not include {path}"


@rule
def operators_keep_apart(tree):
    """No operator includes another operator's backend; a fused operator is a new operator."""
    for file in tree.headers:
        if file.layer != "ops":
            continue
        own = file.header.split("/")[1]
        for number, path in file.includes():
            match = re.match(r"blackmamba/ops/(\w+)/\w+_(cpu|cuda|tuning)\.", path)
            if match and match.group(1) != own:
                yield file, number, f"{path} is the backend of another operator"


@rule
def operators_are_complete(tree):
    """Every operator folder has its contract, a test body, and a line in the umbrella."""
    umbrella = next((f for f in tree.headers if f.header == "blackmamba.hpp"), None)
    included = {path for _, path in umbrella.includes()} if umbrella else set()
    for op in tree.operators:
        contract = f"blackmamba/ops/{op}/{op}.hpp"
        if not (tree.root / "include" / contract).is_file():
            yield f"include/blackmamba/ops/{op}", 1, f"has no contract {op}.hpp"
        if not (tree.root / f"tests/ops/{op}_test.hpp").is_file():
            yield f"include/blackmamba/ops/{op}", 1, f"has no test body tests/ops/{op}_test.hpp"
        if contract not in included:
            yield "include/blackmamba/blackmamba.hpp", 1, f"does not include <{contract}>"


@rule
def umbrella_is_complete(tree):
    """The umbrella includes every header of nn, model, train and generate, itself or through another of them."""
    by_name = {f"blackmamba/{f.header}": f for f in tree.headers}
    reached, todo = set(), ["blackmamba/blackmamba.hpp"]
    while todo:
        name = todo.pop()
        if name in by_name and name not in reached:
            reached.add(name)
            todo += [path for _, path in by_name[name].includes()]
    for file in tree.headers:
        if file.layer in ("nn", "model", "train", "generate") and f"blackmamba/{file.header}" not in reached:
            yield file, 1, "is not reached from blackmamba.hpp"


@rule
def macros_have_one_home(tree):
    """Macros are defined in core/config.hpp and version.hpp alone, and begin with BLACKMAMBA_."""
    for file in tree.headers:
        for number, match in file.find(r"^\s*#\s*define\s+(\w+)"):
            if (file.header, match.group(1)) in FOREIGN_MACROS:
                continue
            if file.header not in MACRO_FILES:
                yield file, number, f"macro {match.group(1)} outside core/config.hpp"
            elif not match.group(1).startswith("BLACKMAMBA_"):
                yield file, number, f"macro {match.group(1)} without the prefix BLACKMAMBA_"


@rule
def no_using_namespace(tree):
    """No using-directive in a header of the library."""
    for file in tree.headers:
        for number, _ in file.find(r"\busing\s+namespace\b"):
            yield file, number, "using namespace"


@rule
def no_heavy_includes(tree):
    """No <thrust/...>, <cub/cub.cuh>, <cute/...>, <matx...>; <cub/block/...> and <cub/warp/...> in *_cuda.cuh alone."""
    for file in tree.headers:
        for number, path in file.includes():
            if re.match(r"thrust/|cub/cub\.cuh|cute/|cutlass/|matx", path):
                yield file, number, f"<{path}> costs seconds in every file that includes it"
            elif path.startswith("cub/") and not file.name.endswith("_cuda.cuh"):
                yield file, number, f"<{path}> outside a *_cuda.cuh"


@rule
def gemm_libraries_behind_core(tree):
    """Third-party matrix libraries sit behind core/*/gemm."""
    for file in tree.headers:
        if re.match(r"core/\w+/gemm", file.header):
            continue
        for number, path in file.includes():
            if re.match(r"Eigen/|unsupported/Eigen|cublas|mkl|cblas", path):
                yield file, number, f"<{path}> outside core/*/gemm"


@rule
def public_headers_only(tree):
    """Tests, benchmarks and examples use the public interface: no detail namespace, no backend file."""
    for file in tree.users:
        for number, match in file.find(r"\b(detail::|namespace\s+(\w+::)*detail\b)"):
            yield file, number, f"'{match.group(0)}' is not public"
        for number, path in file.includes():
            if re.match(r"blackmamba/.*(/detail/|_(cpu|tuning)\.hpp$)", path):
                yield file, number, f"<{path}> is not public; include the operator"


@rule
def stems_are_unique(tree):
    """File stems are unique in include/: a diagnostic that says a file's name says which."""
    seen = {}
    for file in tree.headers:
        stem = file.path.stem
        if stem in seen:
            yield file, 1, f"has the stem of {seen[stem].name}"
        else:
            seen[stem] = file


@rule
def files_are_short(tree):
    """At most 600 lines in a file, less than 100 in an example, 120 columns in a line."""
    for file in tree.files:
        most = MAX_EXAMPLE_LINES if re.fullmatch(r"examples/\w+\.(cpp|cu)", file.name) else MAX_LINES
        if len(file.lines) > most:
            yield file, len(file.lines), f"{len(file.lines)} lines; at most {most}"
        for number, line in enumerate(file.lines, 1):
            if len(line) > MAX_COLUMNS:
                yield file, number, f"{len(line)} columns; at most {MAX_COLUMNS}"


@rule
def headers_are_guarded(tree):
    """Every header begins with #pragma once and includes the library's files as <blackmamba/...>."""
    for file in tree.headers:
        if not file.lines or file.lines[0] != "#pragma once":
            yield file, 1, "the first line is not #pragma once"
        for number, match in file.find(r'^\s*#\s*include\s*"([^"]+)"'):
            yield file, number, f'"{match.group(1)}": include as <blackmamba/...>'


@rule
def cuda_namespace_is_global(tree):
    """The toolkit's namespace is written ::cuda::std; blackmamba::cuda and blackmamba::device::cuda would hide it."""
    for file in tree.headers:
        for number, _ in file.find(r"(?<!::)\bcuda::std\b"):
            yield file, number, "write ::cuda::std"


@rule
def nothing_unfinished(tree):
    """No marks of unfinished work."""
    for file in tree.files:
        for number, line in enumerate(file.lines, 1):
            match = re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line)
            if match:
                yield file, number, match.group(1)


def violations(root):
    """(file name, line, rule, what), sorted."""
    tree = Tree(root)
    found = []
    for name, function in RULES.items():
        for file, line, what in function(tree):
            found.append((file if isinstance(file, str) else file.name, line, name, what))
    return sorted(found), tree


def main():
    if sys.argv[1:] == ["--rules"]:
        for name, function in RULES.items():
            print(f"{name}: {function.__doc__}")
        return
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    found, tree = violations(sys.argv[1])
    for name, line, rule_name, what in found:
        print(f"{name}:{line}: {rule_name}: {what}")
    print(f"{len(RULES)} rules over {len(tree.files)} files: {len(found)} violations")
    if not tree.headers:
        sys.exit(f"no headers under {sys.argv[1]}/include/blackmamba")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
