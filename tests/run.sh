#!/usr/bin/env bash
# Installs what is missing (Debian, Ubuntu), builds everything and runs every test. Works from any folder; what is built
# is kept in build/, so that a second run is quick. Arguments go to ctest, as in: tests/run.sh -R ops
#
#   build/tests     g++, Release, for this machine: tests, examples, benchmarks; CUDA too where a toolkit is found
#   build/sanitize  clang++, AddressSanitizer and UndefinedBehaviorSanitizer: every test program
#   build/tsan      clang++, ThreadSanitizer: the test programs of the parallel parts
#
# One ctest run at the end covers all three, and its closing lines are the last that are printed.
set -euo pipefail
export LC_ALL=C.UTF-8
unset CXXFLAGS CUDAFLAGS LDFLAGS DESTDIR

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../.ci/packages.sh
source "$root/.ci/packages.sh"

install_missing g++:g++ clang++:clang cmake:cmake ninja:ninja-build pkg-config:pkg-config python3:python3 \
  setarch:util-linux libeigen3-dev doctest-dev libbenchmark-dev

build=$root/build
mkdir -p "$build"

# The sanitizers' run-time library is a package of its own in some releases and part of clang in others.
if ! clang++ -x c++ -fsanitize=address -o "$build/sanitizer-check" - <<< 'int main() {}' 2> /dev/null; then
  install_missing libclang-rt-dev || install_missing "libclang-rt-$(clang++ -dumpversion | cut -d. -f1)-dev"
fi
rm -f "$build/sanitizer-check"

# A compiler takes up to 1.5 GB: no more of them at once than the memory holds.
memory_jobs=$(awk '/^MemAvailable/ { n = int($2 / 1500000); print n < 1 ? 1 : n }' /proc/meminfo)
jobs=$(nproc)
if ((memory_jobs < jobs)); then jobs=$memory_jobs; fi

# configure <folder> <option>...
configure() {
  local folder=$1 log=$build/$1-configure.log
  shift
  echo "== $folder: configuring"
  if ! cmake -S "$root" -B "$build/$folder" -G Ninja -DBLACKMAMBA_WERROR=ON "$@" > "$log" 2>&1; then
    cat "$log"
    exit 1
  fi
}

# Benchmarks are compiled and examples run for seconds: optimising them takes longer.
configure tests -DCMAKE_CXX_COMPILER=g++ -DCMAKE_BUILD_TYPE=Release -DBLACKMAMBA_CUDA=AUTO -DBLACKMAMBA_OPTIMISE=OFF
sanitizer=(-DCMAKE_CXX_COMPILER=clang++ -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O1 -DBLACKMAMBA_CUDA=OFF
  -DBLACKMAMBA_BUILD_EXAMPLES=OFF -DBLACKMAMBA_BUILD_BENCH=OFF)
configure sanitize "${sanitizer[@]}" -DBLACKMAMBA_SANITIZE=address,undefined
configure tsan "${sanitizer[@]}" -DBLACKMAMBA_SANITIZE=thread

# A failed build does not end the run: whatever could be built is tested, and the build is a test itself.
for folder in sanitize tsan tests; do
  echo "== $folder: building"
  cmake --build "$build/$folder" --parallel "$jobs" -- -k 0 || echo "== $folder: the build FAILED"
done

mkdir -p "$build/all"
{
  for folder in tests sanitize tsan; do
    echo "subdirs(\"../$folder\")"
    echo "add_test(build.$folder cmake --build \"$build/$folder\")"
    echo "set_tests_properties(build.$folder PROPERTIES RUN_SERIAL ON TIMEOUT 900)"
  done
} > "$build/all/CTestTestfile.cmake"

echo "== testing"
exec ctest --test-dir "$build/all" --output-on-failure --no-tests=error --no-label-summary --parallel "$jobs" "$@"
