#!/usr/bin/env bash
# Builds the benchmarks and runs them, one after the other, each for itself; writes what they measured, with date, commit
# and machine, to bench/results/<name>.json. Arguments name benchmarks; without any, all are run, those of CUDA where
# there is a GPU and a CUDA toolkit. Leave the machine to it.
set -euo pipefail
export LC_ALL=C.UTF-8

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
build=$root/build/bench
export PATH=$PATH:/usr/local/cuda/bin
cuda=OFF
targets=(all)
if nvidia-smi > /dev/null 2>&1 && command -v nvcc > /dev/null; then
  cuda=ON
  targets+=(cuda_benchmarks)
fi
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_CXX_COMPILER=g++ -DCMAKE_BUILD_TYPE=Release -DBLACKMAMBA_CUDA=$cuda \
  -DBLACKMAMBA_BUILD_TESTS=OFF -DBLACKMAMBA_BUILD_EXAMPLES=OFF -DBLACKMAMBA_BUILD_BENCH=ON > /dev/null
cmake --build "$build" --target "${targets[@]}" > /dev/null

commit=$(git -C "$root" rev-parse --short HEAD)
changed=$(git -C "$root" status --porcelain -- include cmake bench CMakeLists.txt ':!bench/results')
if [[ -n $changed ]]; then commit+="+changes"; fi
machine=$(awk -F': ' '/^model name/ { print $2; exit }' /proc/cpuinfo)

for program in "$build"/bench/*_bench; do
  name=$(basename "$program")
  if (($#)) && [[ " $* " != *" $name "* ]]; then continue; fi
  echo "== $name"
  "$program" --benchmark_out="$root/bench/results/$name.json" --benchmark_out_format=json \
    --benchmark_context=commit="$commit",machine="$machine with $(nproc) cores"
  # What says nothing of the measurement.
  sed -i '/"host_name"/d; /"executable"/d' "$root/bench/results/$name.json"
done
