//! The OCI specs of the benchmark's sandboxes: what the provider asks for, without a function's own.

use serde_json::{Value, json};

const SANDBOX_ANNOTATION: &str = "dev.trenv.sandbox";
const TENANCY_ANNOTATION: &str = "dev.trenv.tenancy";

/// A sandbox in which nothing runs yet.
pub fn idle() -> Value {
    json!({
        "ociVersion": "1.0.2",
        // containerd wants a process in every spec; the shim starts none for an idle sandbox.
        "process": { "user": { "uid": 0, "gid": 0 }, "args": ["idle"], "cwd": "/" },
        "root": { "path": "rootfs" },
        "annotations": { SANDBOX_ANNOTATION: "idle" },
        "linux": linux(),
    })
}

/// A sandbox in which a program runs as `tenancy`.
pub fn running(tenancy: &str, arguments: &[String]) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": arguments,
            "cwd": "/",
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs" },
        "annotations": { SANDBOX_ANNOTATION: "function", TENANCY_ANNOTATION: tenancy },
        "linux": linux(),
    })
}

fn linux() -> Value {
    json!({
        "namespaces": [
            { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
            { "type": "network" },
        ],
        "maskedPaths": [
            "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
            "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware",
            "/proc/scsi",
        ],
        "readonlyPaths": [
            "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
        ],
    })
}
