#!/usr/bin/env bash
# Makes a fresh Debian 12 machine run trenv: packages, programs, configuration, pool, images,
# containerd, provider; then shows the demo. Run it again at any time: what is done stays as it is.
# `--clean` puts the machine back. Nothing that is not ours is touched.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly here
readonly bin=/usr/local/bin
readonly libexec=/usr/local/libexec/trenv
readonly config=/etc/trenv/trenv.toml
readonly secrets=/etc/trenv/secrets
readonly state=/var/lib/trenv
readonly run=/run/trenv
readonly programs=(containerd-shim-trenv-v2 trenv-provider trenv trenv-pool)
# Where the pool is on a device, beside those.
readonly dax_programs=(trenv-devices)
readonly helpers=(trenv-init trenv-zygote fwatchdog)
samples=(hello-python hello-node json-python image-node numpy-python)

# shellcheck source=deploy/lib/steps.sh
. "$here/deploy/lib/steps.sh"
# shellcheck source=deploy/lib/packages.sh
. "$here/deploy/lib/packages.sh"
# shellcheck source=deploy/lib/services.sh
. "$here/deploy/lib/services.sh"
# shellcheck source=deploy/lib/driver.sh
. "$here/deploy/lib/driver.sh"

mem_pool='file'
pool_size=4G
profile=release
built=
functions=
calls=
demo=yes
clean=no
dax_dev=
nic=

usage() {
    cat <<'USAGE'
Usage: bash deploy/machine-prepare.sh [options]

  --mem-pool KIND   where templates are stored: file (default), memfd, dax, rdma
  --dax-dev PATH    device of a dax pool, e.g. /dev/dax0.0
  --nic NAME        network interface of an rdma pool
  --pool-size SIZE  size of the pool, e.g. 4G (default) or 512M
  --profile NAME    how to build: release (default), or dev, which builds quicker and runs slower
  --programs DIR    where the programs are built already; nothing is built
  --functions A,B   sample functions to prepare and to show, instead of all
  --calls N         calls of each kind of start in the demo
  --no-demo         prepare only
  --clean           stop everything of trenv and remove it from this machine
  --help            this text
USAGE
}

parse() {
    while [ $# -gt 0 ]; do
        case $1 in
            --mem-pool | --dax-dev | --nic | --pool-size | --profile | --programs | --functions | --calls)
                [ $# -ge 2 ] || fail "$1 needs a value; see --help"
                case $1 in
                    --mem-pool) mem_pool=$2 ;;
                    --dax-dev) dax_dev=$2 ;;
                    --nic) nic=$2 ;;
                    --pool-size) pool_size=$2 ;;
                    --profile) profile=$2 ;;
                    --programs) built=$2 ;;
                    --functions) functions=$2 ;;
                    --calls) calls=$2 ;;
                esac
                shift 2
                ;;
            --no-demo) demo=no && shift ;;
            --clean) clean=yes && shift ;;
            --help | -h) usage && exit 0 ;;
            *) fail "$1 is not an option; see --help" ;;
        esac
    done
    case $mem_pool in
        file | memfd) [ -z "$dax_dev" ] || fail "--dax-dev belongs to --mem-pool dax" ;;
        dax) [ -n "$dax_dev" ] || [ "$clean" = yes ] || fail "--mem-pool dax needs --dax-dev, e.g. /dev/dax0.0; \`daxctl list\` shows what there is" ;;
        rdma) fail "An rdma pool${nic:+ over $nic} is not built into this version yet; use --mem-pool file or memfd." ;;
        *) fail "--mem-pool $mem_pool is unknown; choose file, memfd, dax or rdma" ;;
    esac
    case $profile in
        release) target=$here/target/x86_64-unknown-linux-gnu/release ;;
        dev) target=$here/target/x86_64-unknown-linux-gnu/debug ;;
        *) fail "--profile $profile is unknown; choose release or dev" ;;
    esac
    [ -z "$nic" ] || fail "--nic belongs to --mem-pool rdma"
    [ -z "$built" ] || target=$(cd "$built" && pwd) || fail "--programs $built is no folder"
    [ -z "$functions" ] || IFS=, read -r -a samples <<<"$functions"
    pool_bytes=$(numfmt --from=iec "$pool_size" 2>/dev/null) || fail "--pool-size $pool_size is not a size such as 4G or 512M"
}

check_machine() {
    [ "$(id -u)" = 0 ] || fail "Run this as root: sandboxes need namespaces, mounts and cgroups."
    [ "$(uname -m)" = x86_64 ] || fail "trenv runs on x86_64; this machine is $(uname -m)."
    if ! grep -qs '^VERSION_ID="12"' /etc/os-release; then
        note "This is not Debian 12; package names may differ."
    fi
}

build() {
    if [ -n "$built" ]; then
        note "those in $target are taken"
        return
    fi
    find_cargo
    (cd "$here" && cargo build --profile "$profile" --locked --workspace --bins --exclude xtask --exclude trenv-tests)
    [ "$mem_pool" != dax ] || bash "$here/pool/devices/build.sh" "$profile"
}

install_programs() {
    install -d "$bin" "$libexec"
    local name wanted=("${programs[@]}")
    [ "$mem_pool" != dax ] || wanted+=("${dax_programs[@]}")
    for name in "${wanted[@]}"; do
        install_if_changed "$target/$name" "$bin/$name"
    done
    for name in "${helpers[@]}"; do
        install_if_changed "$target/$name" "$libexec/$name"
    done
}

write_config() {
    install -d -m 755 /etc/trenv "$state" "$run"
    install -d -m 700 "$secrets"
    if [ ! -s "$secrets/basic-auth-password" ]; then
        (
            umask 077
            printf 'admin\n' >"$secrets/basic-auth-user"
            head -c 24 /dev/urandom | base64 | tr -d '/+=\n' >"$secrets/basic-auth-password"
        )
    fi
    if [ -e "$config" ]; then
        note "$config is kept"
        return
    fi
    local device=
    [ -z "$dax_dev" ] || device="device = \"$dax_dev\""
    cat >"$config" <<CONFIG
# trenv on this machine; docs/user-guide.md explains every key.
state_dir = "$state"
run_dir = "$run"
libexec_dir = "$libexec"

[containerd]
address = "$(containerd_address)"

[pool]
backend = "$mem_pool"
size = $pool_bytes
$device

[provider]
listen = "127.0.0.1:8080"
secrets_dir = "$secrets"
# Each takes a few MiB when idle. The demo fills them all once.
max_sandboxes = 32
CONFIG
}

format_pool() {
    if [ -e "$state/pool/pool.data" ]; then
        note "the pool in $state/pool is kept"
        return
    fi
    "$bin/trenv-pool" format
}

images() {
    bash "$here/deploy/images/build.sh" --fwatchdog "$libexec/fwatchdog" "${samples[@]}"
    bash "$here/deploy/images/import.sh" --address "$(containerd_address)" "${samples[@]}"
}

finish() {
    cat <<NEXT

trenv is ready after $(elapsed). What to do next:

  trenv list                            the functions that are deployed
  trenv invoke hello-python -i          call one; X-Trenv-Start says how it was started
  trenv ps                              the sandboxes and what is in them
  trenv deploy --image IMAGE --name N   deploy any image that containerd has
  trenv bench start                     measure every kind of start
  trenv doctor                          what this machine can and cannot do

The gateway is http://127.0.0.1:8080, user admin, password in $secrets/basic-auth-password.
Configuration: $config. Logs: $(provider_log). Back to before: bash deploy/machine-prepare.sh --clean
NEXT
}

run_demo() {
    local options=()
    [ -z "$functions" ] || options+=(--functions "$functions")
    [ -z "$calls" ] || options+=(--calls "$calls" --instances "$calls")
    if ! "$bin/trenv" demo --file "$here/functions/stack.yml" "${options[@]}"; then
        fail "The demo found something wrong; see above and $(provider_log)."
    fi
}

main() {
    parse "$@"
    check_machine
    if [ "$clean" = yes ]; then
        step "Stopping trenv" stop_services
        step "Giving the pool's device back" release_device
        step "Removing trenv" remove_everything
        echo "trenv is gone from this machine; packages that apt installed stay."
        return
    fi
    step "Installing packages" install_packages "${run_packages[@]}" "${build_packages[@]}"
    if [ "$mem_pool" = dax ]; then
        step "Installing what a dax pool needs" install_packages "${dax_packages[@]}"
        step "Loading the driver pseudo_mm" load_driver
    fi
    step "Building trenv (minutes the first time)" build
    step "Installing programs" install_programs
    step "Finding or starting containerd" start_containerd
    step "Writing the configuration" write_config
    step "Preparing the pool" format_pool
    step "Building and importing the sample images" images
    step "Starting the provider" start_provider
    if [ "$demo" = yes ]; then
        step "Running the demo" run_demo
    fi
    finish
}

main "$@"
