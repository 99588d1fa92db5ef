//! The OCI runtime spec of a sandbox: what containerd stores and the shim reads.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::containerd::Mount;
use crate::functions::{Limits, Process};

/// The annotation that tells the shim what kind of sandbox is wanted.
pub const SANDBOX_ANNOTATION: &str = "dev.trenv.sandbox";
/// The annotation with the function's name.
pub const FUNCTION_ANNOTATION: &str = "dev.trenv.function";
/// The annotation with the tenancy's id.
pub const TENANCY_ANNOTATION: &str = "dev.trenv.tenancy";

/// containerd's default capabilities of a container.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// Where a function finds its secrets.
pub const SECRETS_DIRECTORY: &str = "/var/openfaas/secrets";

/// A function's side of a spec.
#[derive(Debug, Clone)]
pub struct FunctionSpec<'a> {
    pub function: &'a str,
    pub tenancy: &'a str,
    pub process: &'a Process,
    pub limits: Limits,
    pub read_only: bool,
    /// Bind mounts besides the usual file systems.
    pub binds: &'a [Mount],
}

/// The files of ours that every function sees.
#[derive(Debug, Clone)]
pub struct SharedFiles {
    pub hosts: PathBuf,
    pub resolv_conf: PathBuf,
}

/// The bind mounts of a function: names, resolver and secrets, all read-only.
pub fn binds(files: &SharedFiles, secrets_dir: &Path, secrets: &[String]) -> Vec<Mount> {
    let mut binds = vec![
        bind(&files.hosts, "/etc/hosts"),
        bind(&files.resolv_conf, "/etc/resolv.conf"),
    ];
    for name in secrets {
        binds.push(bind(
            &secrets_dir.join(name),
            &format!("{SECRETS_DIRECTORY}/{name}"),
        ));
    }
    binds
}

fn bind(source: &Path, target: &str) -> Mount {
    Mount {
        kind: "bind".to_owned(),
        source: source.display().to_string(),
        target: target.to_owned(),
        options: ["rbind", "ro", "nosuid", "nodev", "noexec"]
            .map(str::to_owned)
            .to_vec(),
    }
}

/// The spec of a sandbox that serves a function.
pub fn function_spec(spec: &FunctionSpec<'_>) -> PreparedSpec {
    let process = spec.process;
    let mut mounts = base_mounts();
    for bind in spec.binds {
        mounts.push(json!({
            "destination": bind.target, "type": bind.kind, "source": bind.source,
            "options": bind.options,
        }));
    }
    PreparedSpec(json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {
                "uid": process.uid, "gid": process.gid, "additionalGids": process.groups,
            },
            "args": process.args,
            "env": process.env,
            "cwd": process.cwd,
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": if process.uid == 0 { &CAPABILITIES[..] } else { &[] },
                "permitted": if process.uid == 0 { &CAPABILITIES[..] } else { &[] },
            },
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": spec.read_only },
        "mounts": mounts,
        "annotations": {
            SANDBOX_ANNOTATION: "function",
            FUNCTION_ANNOTATION: spec.function,
            TENANCY_ANNOTATION: spec.tenancy,
        },
        "linux": linux(spec.limits),
    }))
}

/// A function's spec in which only the sandbox is wanting: made ahead, since that takes as long as a
/// swap of roots.
#[derive(Debug, Clone, PartialEq)]
pub struct PreparedSpec(Value);

impl PreparedSpec {
    /// The spec, as JSON, in a sandbox of this name.
    pub fn in_sandbox(mut self, hostname: &str) -> Vec<u8> {
        self.0["hostname"] = hostname.into();
        self.0.to_string().into_bytes()
    }
}

/// The spec of a sandbox without a function.
pub fn idle_spec(hostname: &str) -> Vec<u8> {
    let document = json!({
        "ociVersion": "1.0.2",
        // containerd wants a process in every spec; the shim starts none for an idle sandbox.
        "process": { "user": { "uid": 0, "gid": 0 }, "args": ["idle"], "cwd": "/" },
        "root": { "path": "rootfs" },
        "hostname": hostname,
        "mounts": base_mounts(),
        "annotations": { SANDBOX_ANNOTATION: "idle" },
        "linux": linux(Limits::default()),
    });
    document.to_string().into_bytes()
}

fn linux(limits: Limits) -> Value {
    let mut resources = json!({});
    if limits.memory_bytes > 0 {
        resources["memory"] = json!({ "limit": limits.memory_bytes });
    }
    if limits.cpu_millis > 0 {
        resources["cpu"] = json!({ "quota": limits.cpu_millis * 100, "period": 100_000 });
    }
    json!({
        "resources": resources,
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

fn base_mounts() -> Vec<Value> {
    let mount = |destination: &str, kind: &str, options: &[&str]| {
        json!({
            "destination": destination, "type": kind,
            "source": if kind == "devpts" { "devpts" } else if kind == "mqueue" { "mqueue" }
                else if destination == "/dev/shm" { "shm" } else { kind },
            "options": options,
        })
    };
    vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "/dev/shm",
            "tmpfs",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
        mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount(
            "/run",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(process: &Process, limits: Limits, binds: &[Mount]) -> Value {
        let prepared = function_spec(&FunctionSpec {
            function: "hello",
            tenancy: "t1",
            process,
            limits,
            read_only: true,
            binds,
        });
        serde_json::from_slice(&prepared.in_sandbox("sb1")).unwrap()
    }

    #[test]
    fn a_function_spec_carries_process_limits_and_annotations() {
        let process = Process {
            args: vec!["a".into()],
            env: vec!["B=1".into()],
            cwd: "/app".into(),
            uid: 5,
            gid: 6,
            groups: vec![7],
        };
        let limits = Limits {
            memory_bytes: 1 << 20,
            cpu_millis: 500,
        };
        let spec = spec(&process, limits, &[]);
        assert_eq!(spec["hostname"], "sb1");
        assert_eq!(spec["process"]["args"][0], "a");
        assert_eq!(spec["process"]["user"]["additionalGids"][0], 7);
        assert_eq!(spec["process"]["capabilities"]["effective"], json!([]));
        assert_eq!(spec["linux"]["resources"]["memory"]["limit"], 1 << 20);
        assert_eq!(spec["linux"]["resources"]["cpu"]["quota"], 50_000);
        assert_eq!(spec["root"]["readonly"], true);
        assert_eq!(spec["annotations"][TENANCY_ANNOTATION], "t1");
        assert_eq!(spec["annotations"][SANDBOX_ANNOTATION], "function");
    }

    #[test]
    fn secrets_are_bound_read_only() {
        let files = SharedFiles {
            hosts: "/x/hosts".into(),
            resolv_conf: "/x/resolv.conf".into(),
        };
        let binds = binds(&files, Path::new("/s"), &["token".to_owned()]);
        let spec = spec(&Process::default(), Limits::default(), &binds);
        let mounts = spec["mounts"].as_array().unwrap();
        let secret = mounts
            .iter()
            .find(|m| m["destination"] == "/var/openfaas/secrets/token")
            .unwrap();
        assert_eq!(secret["source"], "/s/token");
        assert!(secret["options"].as_array().unwrap().contains(&json!("ro")));
    }

    #[test]
    fn an_idle_spec_asks_for_no_function() {
        let spec: Value = serde_json::from_slice(&idle_spec("sb1")).unwrap();
        assert_eq!(spec["annotations"][SANDBOX_ANNOTATION], "idle");
        assert!(spec["annotations"].get(FUNCTION_ANNOTATION).is_none());
    }
}
