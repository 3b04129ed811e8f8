#!/usr/bin/env bash
# Installs what is missing (Debian, Ubuntu), builds the quickstart and runs it: trains a small BlackMamba on the King
# James Bible, or on what --text names, and generates from it. Works from any folder. Arguments go to the quickstart:
#
#   examples/run.sh --text novels.txt:3 --text letters.txt
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
  if [[ $argument == --text || $argument == --text=* ]]; then own_text=yes; fi
done

needed=(g++:g++ cmake:cmake ninja:ninja-build xz:xz-utils libeigen3-dev)
if [[ $own_text == no ]]; then needed+=(bible:bible-kjv); fi
install_missing "${needed[@]}"

build=$root/build/examples
log=$build/build.log
mkdir -p "$build"
echo "building the quickstart (output in $log)" >&2
if ! { cmake -S "$root" -B "$build" -G Ninja -DCMAKE_CXX_COMPILER=g++ -DCMAKE_BUILD_TYPE=Release -DBLACKMAMBA_CUDA=OFF \
  -DBLACKMAMBA_BUILD_TESTS=OFF -DBLACKMAMBA_BUILD_BENCH=OFF &&
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

echo "running on device::cpu, $(nproc) cores" >&2
own_checkpoint=no
for argument in "$@"; do
  if [[ $argument == --checkpoint ]]; then own_checkpoint=yes; fi
done
if [[ $own_checkpoint == no ]]; then arguments+=(--checkpoint "$build/quickstart.safetensors"); fi

exec "$build/examples/quickstart" "${arguments[@]}"
