#!/usr/bin/env bash
# dkms.sh HEADERS: builds the module by DKMS against a kernel's headers, as root. Source and result
# lie in a folder of their own: nothing is installed. Prints what DKMS then has.
set -euo pipefail

if (($# != 1)) || [[ ! -d $1/include ]]; then
    echo "dkms.sh: name a folder with a kernel's headers, such as /usr/src/linux-headers-6.1.0-56-amd64" >&2
    exit 2
fi
command -v dkms >/dev/null || {
    echo "dkms.sh: there is no dkms; apt-get install dkms" >&2
    exit 2
}
headers=$(realpath "$1")
driver=$(cd "$(dirname "$0")/driver" && pwd)
kernel=$(sed -n 's/^#define UTS_RELEASE "\(.*\)"/\1/p' "$headers/include/generated/utsrelease.h")
version=$(sed -n 's/^PACKAGE_VERSION="\(.*\)"/\1/p' "$driver/dkms.conf")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
source=$work/source/pseudo_mm-$version
mkdir -p "$source" "$work/tree"
# What DKMS needs is what the folder has without anything that a build left there.
cp -r "$driver"/{*.c,*.h,Kbuild,Makefile,dkms.conf,include} "$source"

module=(-m pseudo_mm -v "$version" --sourcetree "$work/source" --dkmstree "$work/tree")
dkms add "${module[@]}"
dkms build "${module[@]}" -k "$kernel" --kernelsourcedir "$headers" || {
    find "$work/tree" -name make.log -exec cat {} + >&2
    exit 1
}
modinfo "$work/tree/pseudo_mm/$version/$kernel"/*/module/pseudo_mm.ko* | grep -E '^(filename|vermagic)'
dkms status --sourcetree "$work/source" --dkmstree "$work/tree" | grep "$kernel.*: built"
