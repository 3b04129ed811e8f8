#!/usr/bin/env bash
# Runs every test program of the GPU under compute-sanitizer's four tools, and with guarded workspaces. Needs a GPU, and
# the programs that tests/run.sh has built. Arguments choose programs by name, as in: tests/sanitize_cuda.sh scan router
#
#   memcheck    every block of a workspace is an allocation of its own, so that a byte beyond it is found
#   racecheck, synccheck
#   initcheck   without the products whose stores the tool does not see: they leave through the copy engine
#   guard       no tool: bands around every block are looked at when it is given back
#
# The programs of large sizes run the kernels of the others over gigabytes: under memcheck alone, to which sizes matter.
#
# Under a tool a program runs 10 to 1000 times longer: it is given a few of the random problems
# (BLACKMAMBA_TEST_TRIALS_PERCENT).
# PROGRAMS names another folder of programs, TOOLS some of the five, JOBS how many run at a time, LIMIT the seconds for
# each, LOGS a folder.
set -euo pipefail
export LC_ALL=C.UTF-8

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export LOGS=${LOGS:-$root/build/sanitize_cuda} LIMIT=${LIMIT:-1200} PATH=$PATH:/usr/local/cuda/bin
mkdir -p "$LOGS"

# Several GPUs share the programs: those of CUDA_VISIBLE_DEVICES, or all.
gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | paste -sd, || true)
if [[ -n $gpus ]]; then gpus=${CUDA_VISIBLE_DEVICES-$gpus}; fi
if [[ -z $gpus || $gpus == -* ]]; then echo "skipped: no CUDA device"; exit 0; fi
export gpus
command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is missing; it comes with the CUDA toolkit" >&2; exit 1; }

# check <tool> <program>: one line, "<tool> <program> <verdict> <seconds>"
check() {
  local tool=$1 program=$2 name log begin=$SECONDS status=0 verdict
  name=$(basename "$program") log=$LOGS/$name.$tool.log
  local run=(compute-sanitizer --tool "$tool" --error-exitcode 99 --print-limit 20)
  local -a devices
  IFS=, read -ra devices <<< "$gpus"
  local -x CUDA_VISIBLE_DEVICES=${devices[${place:-0} % ${#devices[@]}]}
  local -x BLACKMAMBA_TEST_TRIALS_PERCENT=${BLACKMAMBA_TEST_TRIALS_PERCENT:-2}
  case $tool in
    memcheck) local -x BLACKMAMBA_TEST_GUARD=own_memory ;;
    initcheck) local -x BLACKMAMBA_TEST_PORTABLE_PRODUCTS=1 ;;
    guard) local -x BLACKMAMBA_TEST_GUARD=band BLACKMAMBA_TEST_TRIALS_PERCENT=100; run=() ;;
  esac
  local folder
  folder=$(mktemp -d)  # for the files that tests write
  (cd "$folder" && timeout "$LIMIT" ${run[@]+"${run[@]}"} "$program" --duration=true) > "$log" 2>&1 || status=$?
  rm -rf "$folder"
  case $status in
    0) verdict=clean ;;
    77) verdict=skipped ;;
    99) verdict="ERRORS" ;;
    124) verdict="over_$LIMIT"_s ;;
    *) verdict="FAILED_($status)" ;;
  esac
  printf '%-10s %-44s %-14s %4d s\n' "$tool" "$name" "$verdict" $((SECONDS - begin))
}
export -f check

# The folder given, or what ctest labels "gpu".
if [[ -n ${PROGRAMS:-} ]]; then
  mapfile -t all < <(find "$PROGRAMS" -maxdepth 1 -type f -executable | sort)
else
  mapfile -t all < <(ctest --test-dir "$root/build/tests" -L gpu --show-only=json-v1 2> /dev/null |
    python3 -c 'import json, sys; print("\n".join(t["command"][0] for t in json.load(sys.stdin)["tests"] if "command" in t))')
fi
chosen=()
for program in ${all[@]+"${all[@]}"}; do
  for pattern in "${@:-.}"; do
    if [[ $(basename "$program") =~ $pattern ]]; then chosen+=("$program"); break; fi
  done
done
if ((${#chosen[@]} == 0)); then echo "no test program of the GPU in ${PROGRAMS:-build/tests}: run tests/run.sh first" >&2; exit 1; fi

# The slowest tool first, so that the last minutes are not one program's.
runs=()
for tool in ${TOOLS:-racecheck memcheck initcheck synccheck guard}; do
  for program in "${chosen[@]}"; do
    if [[ $(basename "$program") == *_large_* && $tool != memcheck ]]; then continue; fi
    runs+=("$tool" "$program")
  done
done
if ((${#runs[@]} == 0)); then echo "nothing to run"; exit 1; fi
printf '%s\0' "${runs[@]}" |
  xargs -0 -n 2 --process-slot-var=place -P "${JOBS:-$(($(nproc) / 2 + 1))}" bash -c 'check "$@"' check |
  tee "$LOGS/summary.txt"

count() { grep -c " $1 " "$LOGS/summary.txt" || true; }
clean=$(count clean) skipped=$(count skipped)
echo "$clean of $((${#runs[@]} / 2)) clean, $skipped skipped; logs in $LOGS"
((clean + skipped == ${#runs[@]} / 2))
