# shellcheck shell=bash
# install_missing <what>...: installs through apt what is missing, and says so; says nothing where all is there.
#
# Each argument is "<program>:<package>", missing where there is no such program, or "<package>", missing where dpkg does
# not list it as installed.
install_missing() {
  local wanted program package missing=()
  for wanted in "$@"; do
    program=${wanted%%:*} package=${wanted#*:}
    if [[ $wanted == *:* ]]; then
      command -v "$program" > /dev/null || missing+=("$package")
    elif [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2> /dev/null) != installed ]]; then
      missing+=("$package")
    fi
  done
  if ((${#missing[@]} == 0)); then return; fi

  if ! command -v apt-get > /dev/null; then
    echo "missing: ${missing[*]}. Only apt is known here; please install them." >&2
    return 1
  fi
  local as_root=()
  if ((EUID != 0)); then
    if ! command -v sudo > /dev/null; then
      echo "missing: ${missing[*]}. Please run as root: apt-get install ${missing[*]}" >&2
      return 1
    fi
    as_root=(sudo)
  fi
  echo "installing through apt: ${missing[*]}" >&2
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq update >&2
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >&2
}
