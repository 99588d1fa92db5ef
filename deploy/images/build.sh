#!/bin/bash
# Builds the sample functions' OCI images from Debian packages, without a registry.
#
# A base (python, numpy, node) is made once with mmdebstrap; each function adds the watchdog's layer
# and its own. Everything is cached by content, so a second run only looks.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source=deploy/images/progress.sh
. "$here/progress.sh"
# shellcheck source=deploy/images/layers.sh
. "$here/layers.sh"
# shellcheck source=deploy/images/functions.sh
. "$here/functions.sh"

usage() {
    cat <<EOF
Usage: build.sh [OPTION]... [FUNCTION]...

Builds OCI images of the named functions, of all when none is named:
  ${all_functions[*]}

  --out DIR         where images and bases are kept; default /var/cache/trenv/images
  --fwatchdog FILE  the watchdog's binary; default \$FWATCHDOG, else the newest in target/
  --suite NAME      Debian release of the base; default bookworm
  --mirror URL      Debian mirror; default http://deb.debian.org/debian
  --refresh         build the bases again, for newer packages
  --list            print "NAME IMAGE FILE" of each function and build nothing
EOF
}

out=/var/cache/trenv/images
fwatchdog=${FWATCHDOG:-}
suite=bookworm
mirror=http://deb.debian.org/debian
refresh=
list=
chosen=()
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?--out needs a directory}; shift ;;
        --fwatchdog) fwatchdog=${2:?--fwatchdog needs a file}; shift ;;
        --suite) suite=${2:?--suite needs a name}; shift ;;
        --mirror) mirror=${2:?--mirror needs a URL}; shift ;;
        --refresh) refresh=1 ;;
        --list) list=1 ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "unknown option $1; --help lists them" ;;
        *) chosen+=("$1") ;;
    esac
    shift
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${all_functions[@]}")
for name in "${chosen[@]}"; do
    known "$name" || fail "no function $name; there are: ${all_functions[*]}"
done

if [ -n "$list" ]; then
    for name in "${chosen[@]}"; do
        echo "$name $(image_name "$name") $out/$name.tar"
    done
    exit 0
fi

missing=()
for tool in mmdebstrap umoci jq; do
    command -v "$tool" >/dev/null || missing+=("$tool")
done
for name in "${chosen[@]}"; do
    [ "$(base_of "$name")" != go ] || command -v go >/dev/null || missing+=(golang-go)
    [ "$(base_of "$name")" != node ] || command -v cc >/dev/null || missing+=(gcc libc6-dev)
done
[ ${#missing[@]} -eq 0 ] || fail "missing: ${missing[*]}; install with: apt-get install ${missing[*]}"
[ "$(id -u)" = 0 ] || fail "building a base needs root"

find_fwatchdog
mkdir -p "$out"
out=$(cd "$out" && pwd)
exec 9>"$out/.lock"
flock -n 9 || { say "another build uses $out; waiting for it"; flock 9; }
work=$(mktemp -d "$out/.work.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT

[ -z "$refresh" ] || rm -rf "$out"/base-*
built=0
for name in "${chosen[@]}"; do
    build_function "$name"
done
say "${#chosen[@]} image(s) in $out, $built built now"
