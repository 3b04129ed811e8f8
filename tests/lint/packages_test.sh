#!/usr/bin/env bash
# Tests .ci/packages.sh with a dpkg-query, an apt-get and a sudo that only say what they were asked.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/bin"
printf '#!/bin/sh\ncase "$*" in *installed-one*) printf installed;; *) exit 1;; esac\n' > "$work/bin/dpkg-query"
printf '#!/bin/sh\necho "apt-get $*"\n' > "$work/bin/apt-get"
printf '#!/bin/sh\necho "sudo $*"\n' > "$work/bin/sudo"
chmod +x "$work"/bin/*

failures=0
# expect <what> <pattern of the whole output, a shell pattern> <argument of install_missing>...
expect() {
  local what=$1 pattern=$2 output
  shift 2
  output=$(PATH=$work/bin:$PATH bash -euo pipefail -c 'source "$0/.ci/packages.sh"; install_missing "$@"' "$root" "$@" 2>&1) ||
    output+="(exit $?)"
  # shellcheck disable=SC2053
  if [[ $output == $pattern ]]; then
    echo "ok: $what"
  else
    echo "FAILED: $what: $output"
    failures=$((failures + 1))
  fi
}

expect "all is there" "" sh:dash installed-one
expect "a package is missing" "installing through apt: absent*apt-get -qq update*install -y*--no-install-recommends absent" \
  sh:dash absent installed-one
expect "a program is missing" "installing through apt: its-package*recommends its-package" no-such-program:its-package
printf '#!/bin/sh\necho "no network"; exit 100\n' > "$work/bin/apt-get"
expect "apt fails" "*no network*exit 100*" absent
exit $((failures > 0))
