# shellcheck shell=bash
# Debian packages by name, and the Rust compiler. Uses: here.
# shellcheck disable=SC2034,SC2154

# What trenv needs to run.
run_packages=(containerd runc containernetworking-plugins nftables iproute2 curl)
# What building trenv and its sample images needs.
build_packages=(gcc libc6-dev protobuf-compiler mmdebstrap umoci jq git ca-certificates)
# What a dax pool needs besides: tools that show and mend its device, what is built with libdaxctl, and kmod.
dax_packages=(kmod ndctl daxctl libdaxctl-dev libclang-dev)
# What the tests need besides.
test_packages=(shellcheck procps golang-go python3 python3-numpy nodejs libjemalloc2 make ruby php-cli php-fpm
    nginx redis-server openjdk-17-jdk-headless)
# What `cargo xtask vm` needs: the emulator, and what its VMs run of the machine's own root.
vm_packages=(qemu-system-x86 kmod xz-utils zstd ndctl daxctl iproute2
    ibverbs-providers ibverbs-utils librdmacm-dev libibverbs-dev criu)
# What building a kernel or a module for them needs besides.
kernel_packages=(make gcc flex bison bc libelf-dev libssl-dev patch dkms pahole)

# The oldest compiler that the workspace accepts.
oldest_rust() {
    sed -n 's/^rust-version = "\(.*\)"/\1/p' "$here/Cargo.toml" | head -n 1
}

# install_packages NAME...: installs those that are not there.
install_packages() {
    local name missing=()
    for name in "$@"; do
        if ! dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q 'ok installed'; then
            missing+=("$name")
        fi
    done
    if [ ${#missing[@]} -eq 0 ]; then
        note "all there"
        return
    fi
    note "apt-get install ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q >/dev/null || note "apt-get update failed; the package lists at hand are used"
    # policy-rc.d stays as it is: whether installing starts a service is the administrator's choice.
    apt-get install -q -y --no-install-recommends "${missing[@]}" >/dev/null
}

# install_without_services NAME...: the same, for servers that only tests start: Debian would start
# them with the machine's own.
install_without_services() {
    local policy=/usr/sbin/policy-rc.d
    if [ -e "$policy" ]; then
        install_packages "$@"
        return
    fi
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    install_packages "$@"
    rm -f "$policy"
}

# Puts cargo on PATH, or ends with what to do.
find_cargo() {
    if [ -d "$HOME/.cargo/bin" ]; then
        PATH=$HOME/.cargo/bin:$PATH
    fi
    local oldest found
    oldest=$(oldest_rust)
    if ! command -v cargo >/dev/null; then
        found=$(apt-cache policy rustc 2>/dev/null | sed -n 's/.*Candidate: \([0-9.]*\).*/\1/p')
        if [ -n "$found" ] && at_least "$oldest" "$found"; then
            install_packages rustc cargo
            return
        fi
        fail "There is no cargo, and Debian's rustc is ${found:-absent}, older than $oldest. Install Rust $oldest or newer, e.g. from https://rustup.rs, and run this again."
    fi
    found=$(rustc --version | cut -d' ' -f2)
    at_least "$oldest" "$found" || fail "rustc is $found, but $oldest or newer is needed; rustup update stable brings one."
}

# at_least OLDEST FOUND
at_least() {
    [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]
}

# install_if_changed FROM TO: replaces a program in one step, so that a running one is never half.
install_if_changed() {
    if ! cmp -s "$1" "$2"; then
        install -m 755 "$1" "$2.new"
        mv -f "$2.new" "$2"
    fi
}
