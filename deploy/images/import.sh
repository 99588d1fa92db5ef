#!/bin/bash
# Imports the built images into containerd.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=
# shellcheck source=deploy/images/progress.sh
. "$here/progress.sh"
# shellcheck source=deploy/images/functions.sh
. "$here/functions.sh"

usage() {
    cat <<EOF
Usage: import.sh [OPTION]... [FUNCTION]...

Imports the images that build.sh made, all when none is named.

  --address SOCKET    containerd's; default /run/containerd/containerd.sock
  --namespace NAME    containerd namespace; default openfaas-fn
  --snapshotter NAME  for which the images are unpacked; default overlayfs
  --out DIR           where build.sh keeps them; default /var/cache/trenv/images
EOF
}

address=/run/containerd/containerd.sock
namespace=openfaas-fn
snapshotter=overlayfs
out=/var/cache/trenv/images
chosen=()
while [ $# -gt 0 ]; do
    case $1 in
        --address) address=${2:?--address needs a socket}; shift ;;
        --namespace) namespace=${2:?--namespace needs a name}; shift ;;
        --snapshotter) snapshotter=${2:?--snapshotter needs a name}; shift ;;
        --out) out=${2:?--out needs a directory}; shift ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "unknown option $1; --help lists them" ;;
        *) chosen+=("$1") ;;
    esac
    shift
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${all_functions[@]}")
command -v ctr >/dev/null || fail "ctr is missing; it comes with containerd"

ctr_here() {
    ctr --address "$address" --namespace "$namespace" "$@"
}

ctr_here version >/dev/null 2>&1 || fail "no containerd answers at $address"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for name in "${chosen[@]}"; do
    known "$name" || fail "no function $name; there are: ${all_functions[*]}"
    file=$out/$name.tar
    [ -e "$file" ] || fail "$file is not there; run build.sh $name first"
    image=$(image_name "$name")
    # An image is there when its manifest is the one in the file.
    wanted=$(tar --extract --to-stdout --file "$file" index.json | sed -n 's/.*"digest": *"\([^"]*\)".*/\1/p' | head -n 1)
    found=$(ctr_here images ls "name==$image" | awk 'NR == 2 { print $3 }')
    if [ "$wanted" = "$found" ]; then
        say "$image is there already"
        continue
    fi
    run_quietly "importing $image" ctr_here images import --snapshotter "$snapshotter" "$file" ||
        fail "containerd did not take $file"
done
say "${#chosen[@]} image(s) in namespace $namespace"
