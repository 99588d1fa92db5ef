# shellcheck shell=bash
# The kernel module by which zygotes map the device of a dax pool. Uses: here, bin, state.
# shellcheck disable=SC2154

readonly module_list=/etc/modules-load.d/pseudo_mm.conf

# Loads the module, building it where the one at hand is another kernel's, and has it loaded at boot.
load_driver() {
    if [ -e /dev/pseudo_mm ]; then
        note "it is loaded"
        return
    fi
    local kernel module=$here/kernel-patch/driver/pseudo_mm.ko
    kernel=$(uname -r)
    if [ "$(modinfo -F vermagic "$module" 2>/dev/null | cut -d' ' -f1)" != "$kernel" ]; then
        install_packages make gcc "linux-headers-$kernel"
        make -s -C "$here/kernel-patch/driver" KDIR="/lib/modules/$kernel/build" ||
            fail "The driver does not build for kernel $kernel; it is made for Debian's 6.1 and 6.12."
    fi
    insmod "$module" || fail "The driver cannot be loaded; the last lines of dmesg say why."
    if has_systemd; then
        install -D -m 644 "$module" "/lib/modules/$kernel/extra/pseudo_mm.ko"
        depmod "$kernel"
        echo pseudo_mm >"$module_list"
    fi
    note "it is loaded"
}

# The device of the pool holds no pool any more, and the module goes.
release_device() {
    if [ ! -L "$state/pool/device" ]; then
        note "the pool has no device"
        return
    fi
    "$bin/trenv-pool" destroy --yes || note "the pool stays on $(readlink "$state/pool/device")"
    if [ -e "$module_list" ]; then
        rm -f "$module_list" "/lib/modules/$(uname -r)/extra/pseudo_mm.ko"
        depmod
    fi
    rmmod pseudo_mm 2>/dev/null || note "the module pseudo_mm stays loaded; something uses it"
}
