#!/usr/bin/env python3
"""Consumes the library as a user does, and says which header was used.

usage: package_test.py install       --build DIR --work DIR --cmake CMAKE
       package_test.py find_package|add_subdirectory|fetch_content|fetched_eigen|cuda
                                     --root DIR --work DIR --cmake CMAKE --generator NAME --cxx COMPILER [--cuda NVCC]
                                     [--eigen DIR]
       package_test.py pkg_config    --root DIR --work DIR --cxx COMPILER --pkg-config PROGRAM

`install` installs from the build tree --build into --work/prefix; find_package, pkg_config and cuda use that prefix.
Every consumer is compiled with strict warnings as errors, and the header that its compiler read must lie where this way
of using the library says. fetched_eigen is add_subdirectory on a machine without Eigen's package: Eigen is fetched, here
from --eigen.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wsign-conversion", "-Wshadow", "-Werror"]


def run(command, **options):
    """Runs a command and returns what it printed; a failure ends the test."""
    print("+", " ".join(map(str, command)), flush=True)
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                          **options)
    output = done.stdout.decode("utf-8", "replace")
    if done.returncode != 0:
        print(output)
        sys.exit(f"exit status {done.returncode}")
    return output


def require(condition, what):
    if not condition:
        sys.exit(f"package test: {what}")


def check_headers(output, expected):
    """The compiler's list of headers (-H) names version.hpp, and everything of ours comes from the expected folder."""
    used = set(re.findall(r"^\.+ (\S*/blackmamba/\S+\.(?:hpp|cuh))$", output, flags=re.MULTILINE))
    require(used, "the compiler named no header of blackmamba")
    print(f"header used: {sorted(p for p in used if p.endswith('version.hpp'))[0]} ({len(used)} of ours)")
    elsewhere = [p for p in sorted(used) if not os.path.realpath(p).startswith(os.path.realpath(expected) + os.sep)]
    require(not elsewhere, f"{elsewhere} do not lie in {expected}")


def install(arguments):
    prefix = arguments.work / "prefix"
    shutil.rmtree(prefix, ignore_errors=True)
    print(run([arguments.cmake, "--install", arguments.build, "--prefix", prefix]))
    source = {p.relative_to(arguments.root / "include") for p in (arguments.root / "include").rglob("*")
              if p.suffix in (".hpp", ".cuh")}
    installed = {p.relative_to(prefix / "include") for p in (prefix / "include").rglob("*") if p.is_file()}
    require(source == installed, f"installed headers differ: {sorted(map(str, source ^ installed))}")
    for path in prefix.rglob("*"):
        if path.is_file() and path.suffix in (".cmake", ".pc"):
            require(str(arguments.root) not in path.read_text(encoding="utf-8"), f"{path} names the source tree")


def cmake_consumer(arguments):
    prefix, build = arguments.work / "prefix", arguments.work / arguments.kind
    shutil.rmtree(build, ignore_errors=True)
    project = "add_subdirectory" if arguments.kind == "fetched_eigen" else arguments.kind
    configure = [arguments.cmake, "-S", HERE / project, "-B", build, "-G", arguments.generator,
                 f"-DCMAKE_CXX_COMPILER={arguments.cxx}", "-DCMAKE_BUILD_TYPE=Debug",
                 "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", f"-DCONSUMER_FLAGS={';'.join(STRICT)};-H"]
    expected = arguments.root / "include"
    if arguments.kind in ("find_package", "cuda"):
        configure.append(f"-DCMAKE_PREFIX_PATH={prefix}")
        expected = prefix / "include"
    elif project == "add_subdirectory":
        configure.append(f"-DBLACKMAMBA_SOURCE={arguments.root}")
    else:
        configure.append(f"-DFETCHCONTENT_SOURCE_DIR_BLACKMAMBA={arguments.root}")
    if arguments.kind == "cuda":
        configure += [f"-DCMAKE_CUDA_COMPILER={arguments.cuda}", "-DCMAKE_CUDA_ARCHITECTURES=90"]
    if arguments.kind == "fetched_eigen":
        configure += ["-DCMAKE_DISABLE_FIND_PACKAGE_Eigen3=ON", f"-DFETCHCONTENT_SOURCE_DIR_EIGEN={arguments.eigen}"]
    configured = run(configure)
    if arguments.kind == "fetched_eigen":
        require(re.search(r"eigen is not installed; fetching https://\S+ at [0-9a-f]{40}", configured),
                "the revision of Eigen that is fetched is not said, or is not pinned")
    output = run([arguments.cmake, "--build", build])

    commands = (build / "compile_commands.json").read_text(encoding="utf-8")
    require(not re.search(rf"-isystem[ =]*{re.escape(str(expected))}(?![\w/])", commands),
            f"{expected} is a system directory, where nvcc and warnings do not look")
    require(f"-I{expected}" in commands, f"-I{expected} is not in the compile commands")
    if arguments.kind == "cuda":
        print(f"header used: {expected}/blackmamba/version.hpp (by -I; linked, not run)")
        return
    check_headers(output, expected)
    print(run([build / "consumer"]).strip())
    if arguments.kind == "find_package":
        run([build / "umbrella"])
        print("umbrella in two units: linked and run")


def pkg_config(arguments):
    prefix, build = arguments.work / "prefix", arguments.work / "pkg_config"
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir(parents=True)
    # The prefix has been moved since the files were written: the .pc file must not mind.
    moved = build / "moved_prefix"
    shutil.copytree(prefix, moved)
    environment = dict(os.environ, PKG_CONFIG_PATH=str(moved / "share/pkgconfig"))
    version = run([arguments.pkg_config, "--modversion", "blackmamba"], env=environment).strip()
    flags = run([arguments.pkg_config, "--cflags", "--libs", "blackmamba"], env=environment).split()
    text = (arguments.root / "include/blackmamba/version.hpp").read_text(encoding="utf-8")
    require(version == ".".join(re.findall(r"#define BLACKMAMBA_VERSION_\w+ (\d+)", text)), f"version is {version}")
    program = build / "consumer"
    sources = [HERE / "consumer/main.cpp", HERE / "consumer/second.cpp"]
    output = run([arguments.cxx, "-std=c++20", "-O2", "-march=native", *STRICT, "-H", *sources, *flags, "-o", program])
    check_headers(output, moved / "include")
    print(run([program]).strip())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["install", "find_package", "add_subdirectory", "fetch_content",
                                         "fetched_eigen", "cuda", "pkg_config"])
    for name in ("root", "work", "build", "eigen"):
        parser.add_argument(f"--{name}", type=Path)
    for name in ("cmake", "generator", "cxx", "cuda", "pkg-config"):
        parser.add_argument(f"--{name}")
    arguments = parser.parse_args()
    # The user's environment decides nothing here.
    for name in ("CXXFLAGS", "CUDAFLAGS", "LDFLAGS", "CPATH", "CPLUS_INCLUDE_PATH", "CMAKE_PREFIX_PATH", "DESTDIR"):
        os.environ.pop(name, None)
    {"install": install, "pkg_config": pkg_config}.get(arguments.kind, cmake_consumer)(arguments)


if __name__ == "__main__":
    main()
