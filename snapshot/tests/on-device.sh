#!/usr/bin/env bash
# on-device.sh PROGRAM [ARGUMENT...]: a test program of this folder, with its pools on the device-dax of a
# virtual machine and with the module of kernel-patch, which is built before:
#
#   cargo test -p trenv-snapshot --features device --test device --no-run
#   cargo xtask vm run --dax nvdimm -- bash snapshot/tests/on-device.sh PROGRAM --test-threads=1
#
# WITHOUT_DRIVER=1 leaves the module out.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -z "${WITHOUT_DRIVER:-}" ] && [ ! -e /dev/pseudo_mm ]; then
    insmod "$here/kernel-patch/driver/pseudo_mm.ko"
fi
export TRENV_TEST_DAX=/dev/dax0.0
# The functions of the tests have the machine's root without what is mounted on it.
export TMPDIR=/var/tmp
exec "$@"
