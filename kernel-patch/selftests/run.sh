#!/usr/bin/env bash
# run.sh [FILTER]: loads the module and runs every test program on this machine, as root.
#
# It needs the module and the programs built, and a device-dax of 4 KiB alignment whose bytes may be
# lost: PSEUDO_MM_DAX, /dev/dax0.0 by default. The programs' TAP goes to standard output. A fault in
# the kernel's log fails the run too.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
output=${OUTPUT:-$here}
module=${PSEUDO_MM_MODULE:-$here/../driver/pseudo_mm.ko}
export PSEUDO_MM_DAX=${PSEUDO_MM_DAX:-/dev/dax0.0}
filter=${1:-}
failed=()

[[ -c $PSEUDO_MM_DAX ]] || {
    echo "run.sh: $PSEUDO_MM_DAX is no device; name a device-dax in PSEUDO_MM_DAX" >&2
    exit 2
}

# Direct I/O needs a file system that has it: a small one in a file. A slow file is one of FUSE.
disk=$(mktemp -d /tmp/pseudo_mm.disk.XXXXXX)
swap=
cleanup() {
    if [[ -n $swap ]]; then
        swapoff "$swap" && zramctl --reset "$swap"
    fi
    umount "$disk/mnt" 2>/dev/null || true
    rm -rf "$disk"
}
trap cleanup EXIT
mkdir "$disk/mnt"
modprobe -qa loop ext4 fuse || true
truncate -s 32M "$disk/image"
if mke2fs -q -F -t ext4 "$disk/image" 2>/dev/null && mount -o loop "$disk/image" "$disk/mnt" 2>/dev/null; then
    export PSEUDO_MM_DISK=$disk/mnt
else
    echo "# no ext4 on a loop device here: direct I/O is tried in /var/tmp"
fi

# Swap, of compressed memory if the machine has none.
if [[ $(wc -l </proc/swaps) -lt 2 ]]; then
    modprobe -q zram num_devices=0 || true
    if swap=$(zramctl --find --size 512M 2>/dev/null); then
        mkswap -q "$swap" && swapon "$swap"
    else
        swap=
        echo "# no zram here: nothing is swapped"
    fi
fi

# A kernel that is built to find faults has to be looking for them. The log says so once, at the start.
checks() {
    local said
    for said in 'KernelAddressSanitizer initialized' 'Lock dependency validator' 'PAGE_POISONING is on'; do
        if ! grep -q "$said" "$disk/boot"; then
            echo "# the kernel's log does not say \"$said\""
            failed+=("the debug kernel's checks")
        fi
    done
}
if zgrep -qs '^CONFIG_KASAN=y' /proc/config.gz; then
    dmesg >"$disk/boot"
    checks
fi

if [[ ! -e /dev/pseudo_mm ]]; then
    insmod "$module"
fi
dmesg --clear 2>/dev/null || dmesg -c >/dev/null

# What ends the device runs last.
for program in abi_test attach_test process_test wait_test memory_test access_test lazy_test remote_test \
    rdma_test promote_test figures_test system_test fault_test random_test published_test unbind_test \
    namespace_test; do
    echo "# == $program"
    "$output/$program" ${filter:+"$filter"} || failed+=("$program")
done

echo "# == the kernel's log"
if dmesg | grep -E 'BUG|WARNING|Oops|Bad rss|Bad page|KASAN|INFO: possible|hung task|rcu.*stall'; then
    failed+=("the kernel's log")
fi
if grep -q '^pseudo_mm ' /proc/modules; then
    echo "# == unloading"
    rmmod pseudo_mm || failed+=("unloading the module")
fi

if ((${#failed[@]})); then
    printf '# failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "# everything passed"
