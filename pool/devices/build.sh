#!/usr/bin/env bash
# build.sh [PROFILE]: builds trenv-devices and puts it beside the other programs of the profile. Those are linked
# statically and Debian has libdaxctl as a shared library only, so this one has a folder and flags of its own.
# Needs libdaxctl-dev and libclang-dev.
set -euo pipefail

profile=${1:-dev}
cd "$(dirname "$0")/../.."
folder=$profile
[ "$profile" != dev ] || folder=debug
RUSTFLAGS='-C target-feature=-crt-static' cargo build --locked --quiet --package trenv-devices \
    --features libdaxctl --bins --profile "$profile" --target-dir target/dynamic
programs=target/x86_64-unknown-linux-gnu/$folder
install -D -m 755 "target/dynamic/x86_64-unknown-linux-gnu/$folder/trenv-devices" "$programs/trenv-devices.new"
mv -f "$programs/trenv-devices.new" "$programs/trenv-devices"
