#!/usr/bin/env bash
# Installs what is missing (Debian, Ubuntu), builds the quickstart and runs it: trains a small BlackMamba on the King
# James Bible, or on what --text names, and generates from it: on the GPU where there is one, else on the CPU. Works from
# any folder. Arguments go to the quickstart:
#
#   examples/run.sh --text novels.txt:3 --text letters.txt
#   examples/run.sh --device cuda --size large
#
# What this script says goes to the error stream; standard output is the program's.
set -euo pipefail
export LC_ALL=C.UTF-8
unset CXXFLAGS LDFLAGS

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../.ci/packages.sh
source "$root/.ci/packages.sh"

own_text=no
for argument in "$@"; do
  if [[ $argument == --text ]]; then own_text=yes; fi
done

needed=(g++:g++ cmake:cmake ninja:ninja-build xz:xz-utils libeigen3-dev)
if [[ $own_text == no ]]; then needed+=(bible:bible-kjv); fi
install_missing "${needed[@]}"

# The GPU where there is one that can be compiled for, else the CPU; --device says otherwise.
asked=auto
previous=
for argument in "$@"; do
  if [[ $previous == --device ]]; then asked=$argument; fi
  previous=$argument
done
device=cpu
cuda=OFF
if [[ $asked != cpu ]]; then
  export PATH=$PATH:/usr/local/cuda/bin
  gpu=$( (nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null || true) | head -n 1)
  if ! command -v nvcc > /dev/null; then
    if [[ -n $gpu ]]; then echo "there is a GPU ($gpu), but no CUDA toolkit (nvcc) to compile for it" >&2; fi
  elif [[ -n $gpu || $asked == cuda ]]; then
    device=cuda
    cuda=ON
  fi
fi

build=$root/build/examples
log=$build/build.log
mkdir -p "$build"
echo "building the quickstart for device::$device (output in $log)" >&2
if ! { cmake -S "$root" -B "$build" -G Ninja -DCMAKE_CXX_COMPILER=g++ -DCMAKE_BUILD_TYPE=Release \
  -DBLACKMAMBA_CUDA=$cuda -DBLACKMAMBA_BUILD_TESTS=OFF -DBLACKMAMBA_BUILD_BENCH=OFF &&
  cmake --build "$build" --target quickstart; } > "$log" 2>&1; then
  cat "$log" >&2
  exit 1
fi

arguments=("$@")
if [[ $own_text == no ]]; then
  text=$build/king_james.txt
  if [[ ! -s $text ]]; then
    # The program talks around the text; verses alone are wanted, each once.
    printf 'gen1:1-rev22:21\n' | bible -f |
      awk '/^[1-3]?[A-Za-z]+[0-9]+:[0-9]+ / && $0 != last { print; last = $0 }' > "$text.part"
    mv "$text.part" "$text"
  fi
  arguments=(--text "$text" "$@")
fi

if [[ $device == cuda ]]; then
  echo "running on device::cuda, ${gpu:-no GPU found}" >&2
else
  echo "running on device::cpu, $(nproc) cores" >&2
fi
own_checkpoint=no
for argument in "$@"; do
  if [[ $argument == --checkpoint ]]; then own_checkpoint=yes; fi
done
if [[ $own_checkpoint == no ]]; then arguments+=(--checkpoint "$build/quickstart.safetensors"); fi

exec "$build/examples/quickstart" "${arguments[@]}"
