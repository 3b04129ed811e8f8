#!/usr/bin/env python3
"""Tests lint.py: a clean tree breaks no rule, and each rule is broken by what it forbids."""
import sys
import tempfile
from pathlib import Path

from lint import RULES, violations

CLEAN = {
    "include/blackmamba/blackmamba.hpp": "#pragma once\n#include <blackmamba/model/network.hpp>\n"
                                         "#include <blackmamba/ops/norm/norm.hpp>\n",
    "include/blackmamba/version.hpp": "#pragma once\n#define BLACKMAMBA_VERSION_MAJOR 0\n",
    "include/blackmamba/core/config.hpp": "#pragma once\n#define BLACKMAMBA_HD\n",
    "include/blackmamba/core/cpu/gemm_eigen.hpp": "#pragma once\n#include <Eigen/Core>\n",
    "include/blackmamba/ops/norm/norm.hpp": "#pragma once\n#include <blackmamba/core/config.hpp>\n"
                                            "// a comment may say: using namespace, <<<, TO" "DO it may not\n"
                                            "#include <blackmamba/ops/norm/norm_cpu.hpp>\n",
    "include/blackmamba/ops/norm/norm_cpu.hpp": "#pragma once\n#include <blackmamba/core/cpu/gemm.hpp>\n",
    "include/blackmamba/nn/block.hpp": "#pragma once\n#include <blackmamba/ops/norm/norm.hpp>\n/* no <<< here */\n",
    "include/blackmamba/model/network.hpp": "#pragma once\n#include <blackmamba/nn/block.hpp>\n",
    "tests/ops/norm_test.hpp": '#include "support/support.hpp"\n#include <blackmamba/ops/norm/norm.hpp>\n',
    "examples/01_norm.cpp": "#include <blackmamba/blackmamba.hpp>\nusing namespace blackmamba;\n",
}
CLEAN["include/blackmamba/ops/norm/norm.hpp"] = CLEAN["include/blackmamba/ops/norm/norm.hpp"].replace(
    "TO" "DO it may not", "so")

# rule, file, what is appended to it (None: the file is removed)
BROKEN = [
    ("hardware_below", "include/blackmamba/nn/block.hpp", "#include <blackmamba/core/cuda/launch.cuh>\n"),
    ("hardware_below", "include/blackmamba/nn/block.hpp", "#if BLACKMAMBA_CUDA\n#endif\n"),
    ("hardware_below", "include/blackmamba/model/network.hpp", "#ifdef __CUDACC__\n#endif\n"),
    ("hardware_below", "include/blackmamba/model/network.hpp", "cudaStream_t stream;\n"),
    ("hardware_below", "include/blackmamba/train/step.hpp", "#pragma once\n__global__ void f();\n"),
    ("hardware_below", "include/blackmamba/generate/sample.hpp", "#pragma once\nvoid g() { f<<<1, 1>>>(); }\n"),
    ("dependencies_point_down", "include/blackmamba/core/config.hpp", "#include <blackmamba/ops/norm/norm.hpp>\n"),
    ("dependencies_point_down", "include/blackmamba/ops/norm/norm.hpp", "#include <blackmamba/nn/block.hpp>\n"),
    ("dependencies_point_down", "include/blackmamba/generate/sample.hpp",
     "#pragma once\n#include <blackmamba/train/step.hpp>\n"),
    ("dependencies_point_down", "include/blackmamba/nn/block.hpp", "#include <blackmamba/blackmamba.hpp>\n"),
    ("operators_keep_apart", "include/blackmamba/ops/other/other.hpp",
     "#pragma once\n#include <blackmamba/ops/norm/norm_cpu.hpp>\n"),
    ("operators_are_complete", "include/blackmamba/ops/norm/norm.hpp", None),
    ("operators_are_complete", "tests/ops/norm_test.hpp", None),
    ("operators_are_complete", "include/blackmamba/blackmamba.hpp", None),
    ("umbrella_is_complete", "include/blackmamba/train/step.hpp", "#pragma once\n"),
    ("macros_have_one_home", "include/blackmamba/ops/norm/norm.hpp", "#define BLACKMAMBA_NORM 1\n"),
    ("macros_have_one_home", "include/blackmamba/core/config.hpp", "#  define NORM 1\n"),
    ("macros_have_one_home", "include/blackmamba/core/cpu/simd.hpp", "#pragma once\n#define EIGEN_NO_CUDA\n"),
    ("no_using_namespace", "include/blackmamba/ops/norm/norm_cpu.hpp", "using namespace std;\n"),
    ("no_heavy_includes", "include/blackmamba/ops/norm/norm_cuda.cuh", "#pragma once\n#include <thrust/scan.h>\n"),
    ("no_heavy_includes", "include/blackmamba/ops/norm/norm_cuda.cuh", "#pragma once\n#include <cub/cub.cuh>\n"),
    ("no_heavy_includes", "include/blackmamba/core/cuda/block.cuh",
     "#pragma once\n#include <cub/block/block_scan.cuh>\n"),
    ("gemm_libraries_behind_core", "include/blackmamba/ops/norm/norm_cpu.hpp", "#include <Eigen/Core>\n"),
    ("public_headers_only", "tests/ops/norm_test.hpp", "int x = blackmamba::detail::f();\n"),
    ("public_headers_only", "bench/ops/norm_bench.cpp", "#include <blackmamba/ops/norm/norm_cpu.hpp>\n"),
    ("stems_are_unique", "include/blackmamba/nn/norm.hpp", "#pragma once\n"),
    ("files_are_short", "tests/ops/norm_test.hpp", "\n" * 600),
    ("files_are_short", "examples/01_norm.cpp", "\n" * 99),
    ("files_are_short", "include/blackmamba/nn/block.hpp", "//" + "x" * 119 + "\n"),
    ("headers_are_guarded", "include/blackmamba/nn/mixer.hpp", "struct x;\n"),
    ("headers_are_guarded", "include/blackmamba/nn/block.hpp", '#include "../core/config.hpp"\n'),
    ("cuda_namespace_is_global", "include/blackmamba/ops/norm/norm.hpp", "using t = cuda::std::true_type;\n"),
    ("nothing_unfinished", "include/blackmamba/nn/block.hpp", "// TO" "DO\n"),
]
ALLOWED = [
    ("include/blackmamba/core/cpu/gemm_eigen.hpp", "#define EIGEN_NO_CUDA\n"),
    ("include/blackmamba/ops/norm/norm_cuda.cuh", "#pragma once\n#include <cub/block/block_scan.cuh>\n"),
    ("include/blackmamba/core/cuda/launch.cuh", "#pragma once\n#if 1\nvoid f(cudaStream_t);\n#endif\n"),
    ("include/blackmamba/ops/norm/norm.hpp", "using t = ::cuda::std::true_type;\n"),
    ("tests/ops/norm_test.hpp", "using namespace blackmamba;  // in a test it is fine\n"),
]


def run(change=None):
    files = dict(CLEAN)
    if change:
        name, text = change
        if text is None:
            del files[name]
        else:
            files[name] = files.get(name, "") + text
    with tempfile.TemporaryDirectory() as root:
        for name, text in files.items():
            path = Path(root) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return {(rule, file) for file, _, rule, _ in violations(root)[0]}


def main():
    failures = []
    if run():
        failures.append(f"the clean tree breaks {run()}")
    for rule, name, text in BROKEN:
        rules = {r for r, _ in run((name, text))}
        if rule not in rules:
            failures.append(f"{rule} does not catch {text!r} in {name}; caught: {rules}")
    for name, text in ALLOWED:
        found = run((name, text))
        if found:
            failures.append(f"{text!r} in {name} is allowed, and breaks {found}")
    untested = set(RULES) - {rule for rule, _, _ in BROKEN}
    failures += [f"no case breaks the rule {rule}" for rule in sorted(untested)]
    print("\n".join(failures) or f"{len(RULES)} rules, {len(BROKEN)} broken trees, {len(ALLOWED)} allowed ones: ok")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
