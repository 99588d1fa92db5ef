#!/usr/bin/env bash
# dax.sh PROGRAMS [COMMAND...]: in a virtual machine with a device-dax, prepares trenv with a pool on it, lets
# the demo run, and looks where the memory of the functions is; then runs the command, if there is one, such as
# a `trenv bench methods`. PROGRAMS is the folder of the programs.
#
#   make -C kernel-patch/driver KDIR="$(cargo xtask vm headers --kernel stock-6.12)"
#   cargo build --workspace --bins
#   cargo xtask vm run --kernel stock-6.12 --dax nvdimm --memory 4096 --tmpfs /var/lib/trenv --timeout 3600 -- \
#       bash deploy/vm/dax.sh target/x86_64-unknown-linux-gnu/debug
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
functions=hello-python,json-python

fail() {
    echo "dax.sh: $*" >&2
    exit 1
}

# What the daemons said, if anything failed: it goes with the virtual machine.
logs() {
    local status=$?
    [ "$status" -eq 0 ] || tail -n 40 /var/lib/trenv/log/*.log /run/trenv/logs/* >&2 || true
    return "$status"
}
trap logs EXIT

# attached PID FIELD: kilobytes of a field of smaps, over all that is mapped from the pool's device.
attached() {
    awk -v field="$2:" '
        $1 ~ /^[0-9a-f]+-[0-9a-f]+$/ { ours = index($0, "/pseudo_mm:") }
        ours && $1 == field { total += $2 }
        END { print total + 0 }' "/proc/$1/smaps"
}

bash "$here/deploy/machine-prepare.sh" --mem-pool dax --dax-dev /dev/dax0.0 \
    --programs "$1" --functions "$functions" --no-demo
# One after the other: an emulated machine is slow, and the gateway gives a connection up in time.
for name in ${functions//,/ }; do
    trenv deploy --file "$here/functions/stack.yml" "$name" ||
        trenv deploy --file "$here/functions/stack.yml" "$name"
done
trenv-pool stat

starts=
for _ in 1 2; do
    for name in ${functions//,/ }; do
        reply=$(curl -fsS -i "http://127.0.0.1:8080/function/$name")
        start=$(grep -i -o '^x-trenv-start: [a-z]*' <<<"$reply")
        echo "$name: $start"
        starts="$starts $start"
    done
done
[[ $starts == *repurposed* ]] || fail "no call was served by a repurposed sandbox"

zygotes=0
while read -r procs; do
    memory=$(cat "${procs%/*}/memory.current")
    while read -r pid; do
        present=$(attached "$pid" Rss)
        copied=$(attached "$pid" Anonymous)
        echo "zygote $pid: $present kB of the device, $copied kB of them copied; its cgroup has $((memory / 1024)) kB"
        [ "$present" -gt 4096 ] || fail "the zygote has no pages of the device"
        [ "$copied" -eq 0 ] || fail "the zygote has copies of the device's pages"
        [ "$((memory / 1024))" -lt "$present" ] || fail "the zygote's cgroup has paid for pages of the device"
        zygotes=$((zygotes + 1))
    done <"$procs"
done <<<"$(find /sys/fs/cgroup -path '*/zygotes/*' -name cgroup.procs)"
[ "$zygotes" -gt 0 ] || fail "there is no zygote"

# Of these functions json-python writes most, a quarter of its memory: a third is what nobody writes. A cgroup
# pays for the copies and a megabyte of its own, page tables and the like, and not for what is attached.
instances=0
for status in /proc/[0-9]*/smaps; do
    pid=${status#/proc/}
    pid=${pid%/smaps}
    # Instances are what is not a zygote and has pages of the device; a clone made ahead keeps the zygote's name.
    grep -q /zygotes/ "/proc/$pid/cgroup" 2>/dev/null && continue
    present=$(attached "$pid" Rss 2>/dev/null || echo 0)
    [ "$present" -gt 0 ] || continue
    name=$(cat "/proc/$pid/comm")
    copied=$(attached "$pid" Anonymous)
    memory=$(($(cat "/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$pid/cgroup")/memory.current") / 1024))
    echo "process $pid ($name): $present kB of the device, $copied kB of them written; its cgroup has $memory kB"
    [ "$((copied * 3))" -lt "$present" ] || fail "the process has copied a third of its memory"
    [ "$copied" -le "$memory" ] || fail "the process's cgroup has not paid for its copies"
    [ "$memory" -lt "$((copied + 4096))" ] || fail "the process's cgroup has paid for more than its copies"
    [ "$name" = trenv-zygote ] || instances=$((instances + 1))
done
[ "$instances" -gt 0 ] || fail "no instance has memory of the device"
echo "$zygotes zygotes and $instances processes have their memory from the device"

trenv demo --file "$here/functions/stack.yml" --functions "$functions" --calls 2 --instances 0
shift
[ $# -eq 0 ] || "$@"
