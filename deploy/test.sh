#!/usr/bin/env bash
# Everything that a change must pass, on a fresh Debian 12 machine as root: installs what the tests
# need, builds once, checks, tests each crate, then tests the whole on a containerd and a provider
# of its own. Ends with the counts; fails when anything failed.
#
#   bash deploy/test.sh            everything
#   bash deploy/test.sh --quick    without the end-to-end tests
#   bash deploy/test.sh --all      also what takes long, in virtual machines
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly here
# shellcheck source=deploy/lib/steps.sh
. "$here/deploy/lib/steps.sh"
# shellcheck source=deploy/lib/packages.sh
. "$here/deploy/lib/packages.sh"
cd "$here" || exit 1

passed=0
failed=0
skipped=0
failures=()

# check TITLE COMMAND...: one check that passes or fails as a whole.
check() {
    local title=$1 begin=$SECONDS
    shift
    printf '[%s] check: %s\n' "$(elapsed)" "$title"
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        failures+=("$title")
        printf '[%s] FAILED: %s\n' "$(elapsed)" "$title"
    fi
    printf '[%s] %s took %d s\n' "$(elapsed)" "$title" $((SECONDS - begin))
}

skip() {
    skipped=$((skipped + 1))
    printf '[%s] SKIPPED: %s (%s)\n' "$(elapsed)" "$1" "$2"
}

# tests TITLE CARGO-ARGUMENTS...: runs tests of cargo and counts each by what it printed.
tests() {
    local title=$1
    shift
    counted "$title" cargo test --locked --no-fail-fast "$@" -- --test-threads=1
}

# counted TITLE COMMAND...: counts the tests of a command by what it printed.
counted() {
    local title=$1 begin=$SECONDS log status count name
    shift
    printf '[%s] tests: %s\n' "$(elapsed)" "$title"
    log=$(mktemp)
    "$@" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    # The usual harness, and those of our own that end with "N passed, N failed".
    count=$(sum 's/^test result: .* \([0-9]*\) passed;.*/\1/p; s/^\([0-9]*\) passed, [0-9]* failed.*/\1/p' "$log")
    passed=$((passed + count))
    count=$(sum 's/^test result: .* \([0-9]*\) failed;.*/\1/p; s/^[0-9]* passed, \([0-9]*\) failed.*/\1/p' "$log")
    failed=$((failed + count))
    while read -r name; do
        failures+=("$title: $name")
    done < <(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$log")
    # A test took its whole program down.
    while read -r name; do
        count=$((count + 1))
        failed=$((failed + 1))
        failures+=("$title: $name")
    done < <(sed -n "s/.*process didn't exit successfully: \(.*(signal.*\)/\1/p" "$log")
    if [ "$count" -eq 0 ] && [ "$status" -ne 0 ]; then
        # It did not compile, or the machine that it ran on failed.
        failed=$((failed + 1))
        failures+=("$title: it ended with status $status: $(tail -n 3 "$log" | tr '\n' ' ')")
    fi
    count=$(sum 's/^test result: .* \([0-9]*\) ignored;.*/\1/p' "$log")
    skipped=$((skipped + count))
    rm -f "$log"
    printf '[%s] %s took %d s\n' "$(elapsed)" "$title" $((SECONDS - begin))
}

# sum EXPRESSION FILE: adds up the numbers that the expression prints.
sum() {
    sed -n "$1" "$2" | awk '{ total += $1 } END { print total + 0 }'
}

shell_scripts() {
    local scripts
    # Those that can be run; what they source is read with them.
    mapfile -t scripts < <(find . -path ./target -prune -o -name '*.sh' -print | sort | xargs grep -l '^#!')
    shellcheck -x "${scripts[@]}" .ci/run
}

modules_of_functions() {
    python3 -m unittest discover functions/modules/python &&
        node --test functions/modules/node/test.js
}

documentation() {
    RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps --document-private-items --quiet
}

main() {
    case ${1:-} in
        '' | --quick | --all) ;;
        *) fail "$1 is not an option; there are --quick and --all" ;;
    esac
    [ "$(id -u)" = 0 ] || fail "Run this as root: the tests make namespaces, mounts and cgroups."
    step "Installing packages" install_packages "${run_packages[@]}" "${build_packages[@]}" \
        "${dax_packages[@]}" ||
        fail "Packages cannot be installed"
    step "Installing what tests start" install_without_services "${test_packages[@]}" ||
        fail "Packages cannot be installed"
    find_cargo
    check "build" cargo build --locked --workspace --all-targets
    check "what is linked with libdaxctl" bash pool/devices/build.sh
    if cargo fmt --version >/dev/null 2>&1; then
        check "format" cargo fmt --all --check
    else
        skip "format" "this toolchain has no rustfmt"
    fi
    if cargo clippy --version >/dev/null 2>&1; then
        check "lints" cargo clippy --locked --workspace --all-targets --all-features --quiet -- -D warnings
    else
        skip "lints" "this toolchain has no clippy"
    fi
    check "documentation" documentation
    check "shell scripts" shell_scripts
    check "modules of functions" modules_of_functions
    check "layers" cargo xtask layers
    check "licences" cargo xtask licences
    tests "crates" --workspace --exclude trenv-tests
    virtual_machines
    if [ "${1:-}" = --quick ]; then
        skip "end to end" "--quick"
    else
        end_to_end
    fi
    if [ "${1:-}" = --all ]; then
        check "functions started by CRIU" by_criu
        patched_kernels
    else
        skip "functions started by CRIU" "--all runs it"
        skip "pseudo_mm in the patched kernels" "--all builds and runs them"
    fi
    report
}

# What this machine's kernel lacks, on Debian's kernels in QEMU; some minutes.
virtual_machines() {
    local kernel
    step "Installing what virtual machines need" install_without_services "${vm_packages[@]}" ||
        fail "Packages cannot be installed"
    tests "virtual machines" -p xtask --features vm --test vm
    step "Installing what a module is built with" install_packages "${kernel_packages[@]}" ||
        fail "Packages cannot be installed"
    for kernel in stock stock-6.12; do
        check "dkms on $kernel" dkms_build "$kernel"
        driver "$kernel"
        # With the module that was just built.
        if [ "$kernel" = stock ]; then
            # Each access to the CXL memory is emulated: the tests with the fewest.
            selftests "pseudo_mm with CXL memory" --kernel "$kernel" --dax cxl --dax-size 256 -- \
                kernel-patch/selftests/run.sh attach_
            device_tests trenv-pool device "$kernel"
            device_tests trenv-snapshot device "$kernel" bash snapshot/tests/on-device.sh
            # Discards, forks and moves of what a program has from the device.
            device_tests trenv-snapshot restore:memory_keeps "$kernel" bash snapshot/tests/on-device.sh
        else
            device_tests trenv-snapshot families "$kernel" bash snapshot/tests/on-device.sh
            check "functions with memory of a device" by_device "$kernel"
        fi
    done
}

dkms_build() {
    local headers
    headers=$(cargo xtask vm headers --kernel "$1") && bash kernel-patch/dkms.sh "$headers"
}

# device_tests PACKAGE TEST[:FILTER] KERNEL [COMMAND...]: a test program with a device-dax, by COMMAND if there
# is one; of its tests those whose names have FILTER.
device_tests() {
    local package=$1 test=${2%%:*} filter=() kernel=$3 program
    [[ $2 != *:* ]] || filter=("${2#*:}")
    shift 3
    program=$(cargo test --locked -p "$package" --features device --test "$test" --no-run \
        --message-format=json | jq -r "select(.target.name == \"$test\") | .executable // empty")
    counted "$package: $test on a device-dax of $kernel" cargo xtask vm run --kernel "$kernel" \
        --dax nvdimm --dax-size 512 --memory 3072 --timeout 900 -- \
        env "PATH=$here/target/x86_64-unknown-linux-gnu/debug:$PATH" "$@" "$program" "${filter[@]}" --test-threads=1
}

# driver KERNEL: the module of kernel-patch on a kernel of Debian's, with a device-dax of QEMU's.
driver() {
    local headers
    # If it cannot be built the tests find none.
    rm -f kernel-patch/driver/pseudo_mm.ko
    headers=$(cargo xtask vm headers --kernel "$1") &&
        make -s -C kernel-patch/driver KDIR="$headers" clean &&
        make -s -C kernel-patch/driver KDIR="$headers"
    selftests "pseudo_mm on $1" --kernel "$1" --dax nvdimm --numa --timeout 1200 -- \
        kernel-patch/selftests/run.sh
}

# The driver built into a kernel, which is built first and kept: a quarter of an hour, and more for the
# one that looks for faults.
patched_kernels() {
    check "selftests with the kernel's harness" kernels_harness
    # More random steps than elsewhere: memory that is filled at its first use has more ways to be wrong.
    selftests "pseudo_mm in the patched kernel" --kernel patched --dax nvdimm --numa --rdma --timeout 1200 \
        --env PSEUDO_MM_STEPS=40000 -- kernel-patch/selftests/run.sh
    device_tests trenv-snapshot device patched bash snapshot/tests/on-device.sh
    device_tests trenv-snapshot families patched bash snapshot/tests/on-device.sh
    selftests "pseudo_mm in the debug kernel" --kernel debug --dax nvdimm --numa --rdma --memory 4096 \
        --timeout 3600 -- kernel-patch/selftests/run.sh
}

# The selftests, built with the harness that they have in a kernel's tree.
kernels_harness() {
    local folder source=linux-source-6.1 status=0
    folder=$(mktemp -d)
    (cd "$folder" && apt-get download -q "$source") &&
        dpkg-deb --fsys-tarfile "$folder/$source"_*.deb | tar -xO "./usr/src/$source.tar.xz" |
        tar -xJ -C "$folder" --strip-components=1 --wildcards '*/tools/testing/selftests/kselftest*.h' &&
        make -s -C kernel-patch/selftests KSELFTEST="$folder/tools/testing/selftests" OUTPUT="$folder" || status=1
    rm -rf "$folder"
    return "$status"
}

# selftests TITLE VM-ARGUMENTS...: builds and runs those of kernel-patch, and counts them.
selftests() {
    local title=$1 begin=$SECONDS log status=0 passes failures_here skips name
    shift
    printf '[%s] tests: %s\n' "$(elapsed)" "$title"
    log=$(mktemp)
    { make -s -C kernel-patch/selftests && cargo xtask vm run "$@"; } 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    skips=$(grep -c '^ok .*# SKIP' "$log")
    passes=$(($(grep -c '^ok ' "$log") - skips))
    failures_here=$(grep -c '^not ok ' "$log")
    while read -r name; do
        failures+=("$title: $name")
    done < <(sed -n 's/^not ok [0-9]* //p' "$log")
    if [ "$failures_here" -eq 0 ] && { [ "$status" -ne 0 ] || [ "$passes" -eq 0 ]; }; then
        # It was not built, the machine did not boot, or the kernel complained.
        failures_here=1
        failures+=("$title: it ended with status $status: $(tail -n 3 "$log" | tr '\n' ' ')")
    fi
    passed=$((passed + passes))
    failed=$((failed + failures_here))
    skipped=$((skipped + skips))
    rm -f "$log"
    printf '[%s] %s took %d s\n' "$(elapsed)" "$title" $((SECONDS - begin))
}

# A prepared machine with its pool on a device, and its demo.
by_device() {
    bash deploy/images/build.sh --fwatchdog target/x86_64-unknown-linux-gnu/debug/fwatchdog &&
        cargo xtask vm run --kernel "$1" --dax nvdimm --memory 4096 --tmpfs /var/lib/trenv \
            --timeout 1800 -- bash deploy/vm/dax.sh target/x86_64-unknown-linux-gnu/debug
}

# The whole, with the binaries just built, on a containerd and a provider of the tests' own.
end_to_end() {
    check "sample images" bash deploy/images/build.sh \
        --fwatchdog target/x86_64-unknown-linux-gnu/debug/fwatchdog
    tests "end to end" -p trenv-tests
}

# CRIU knows Debian's own kernel. The processor is emulated, so it takes some minutes.
by_criu() {
    local program
    program=$(cargo test --locked -p trenv-tests --test criu --no-run 2>&1 |
        sed -n 's/.*Executable.*(\(.*\))$/\1/p')
    cargo xtask vm run --kernel stock --memory 6144 --timeout 3600 -- \
        "$here/$program" --nocapture --test-threads=1
}

report() {
    local name
    for name in "${failures[@]}"; do
        printf 'failed: %s\n' "$name"
    done
    [ "$skipped" -eq 0 ] || printf '%d skipped\n' "$skipped"
    printf 'took %s\n' "$(elapsed)"
    printf '%d passed, %d failed\n' "$passed" "$failed"
    [ "$failed" -eq 0 ]
}

main "$@"
