//! What an OCI spec asks of a sandbox. A field that we would not apply is refused by name.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxNamespaceType, LinuxSeccomp, Mount, Process, Spec};
use trenv_sandbox::cgroup::Limits;
use trenv_sandbox::generation;
use trenv_sandbox::process::Role;
use trenv_sandbox::rootfs::{self, BindFlags};
use trenv_sandbox::{Part, ProcessSpec};

use crate::error::{Result, ShimError};
use crate::group::SANDBOX;

const TENANCY: &str = "dev.trenv.tenancy";

/// Mounts that every sandbox has in any case.
const STANDARD: [(&str, &str); 8] = [
    ("proc", "/proc"),
    ("tmpfs", "/dev"),
    ("devpts", "/dev/pts"),
    ("tmpfs", "/dev/shm"),
    ("mqueue", "/dev/mqueue"),
    ("sysfs", "/sys"),
    ("tmpfs", "/run"),
    ("cgroup", "/sys/fs/cgroup"),
];

/// What a container with our annotation shall be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only pid 1, until a function is given to it.
    Idle,
    /// The spec's process, in a fresh sandbox.
    Function,
}

/// The part of a spec that makes a tenancy's root.
#[derive(Debug, Clone, Default)]
pub struct RootSpec {
    pub read_only: bool,
    pub hostname: String,
    pub mounts: Vec<PartSpec>,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
}

/// A mount that the spec asks for beside the standard ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PartSpec {
    Bind {
        source: PathBuf,
        destination: PathBuf,
        flags: BindFlags,
    },
    Tmpfs {
        destination: PathBuf,
        options: Vec<(String, String)>,
        flags: BindFlags,
    },
}

/// A whole spec, checked.
#[derive(Debug, Clone)]
pub struct SandboxSpec {
    pub kind: Kind,
    pub tenancy: String,
    pub root: RootSpec,
    pub limits: Limits,
    pub process: Option<ProcessSpec>,
    pub seccomp: Option<LinuxSeccomp>,
}

fn refuse(field: &str) -> ShimError {
    ShimError::InvalidArgument(format!(
        "The spec sets {field}, which a trenv sandbox does not apply; remove it, or the annotation {SANDBOX}"
    ))
}

impl SandboxSpec {
    /// Reads and checks the spec of a bundle.
    pub fn load(bundle: &Path, id: &str) -> Result<Self> {
        let path = bundle.join("config.json");
        let spec = Spec::load(&path).map_err(|err| {
            ShimError::InvalidArgument(format!("{} is not an OCI spec: {err}", path.display()))
        })?;
        Self::of(&spec, id)
    }

    /// Checks a spec.
    pub fn of(spec: &Spec, id: &str) -> Result<Self> {
        let annotation = |name: &str| spec.annotations().as_ref().and_then(|all| all.get(name));
        let kind = match annotation(SANDBOX).map(String::as_str) {
            Some("idle") => Kind::Idle,
            Some("function") => Kind::Function,
            other => {
                return Err(ShimError::InvalidArgument(format!(
                    "The annotation {SANDBOX} is {other:?}; use \"function\" or \"idle\""
                )));
            }
        };
        refuse_unsupported(spec)?;
        let linux = spec.linux().clone().unwrap_or_default();
        let seccomp = linux.seccomp().clone();
        let process = match (kind, spec.process()) {
            (Kind::Idle, _) => None,
            (Kind::Function, Some(process)) => {
                Some(process_of(process, seccomp.as_ref(), Role::Root)?)
            }
            (Kind::Function, None) => {
                return Err(ShimError::InvalidArgument("The spec has no process".into()));
            }
        };
        let limits = linux
            .resources()
            .as_ref()
            .map_or_else(|| Ok(Limits::default()), Limits::from_oci);
        Ok(Self {
            kind,
            tenancy: annotation(TENANCY).map_or(id, String::as_str).to_owned(),
            root: RootSpec::of(spec, id)?,
            limits: limits.map_err(|err| ShimError::InvalidArgument(err.to_string()))?,
            process,
            seccomp,
        })
    }
}

/// An OCI process as JSON, checked, for exec.
pub fn exec_process(json: &[u8], seccomp: Option<&LinuxSeccomp>) -> Result<ProcessSpec> {
    let process: Process = serde_json::from_slice(json).map_err(|err| {
        ShimError::InvalidArgument(format!("The process is not an OCI process: {err}"))
    })?;
    process_of(&process, seccomp, Role::Exec)
}

fn process_of(
    process: &Process,
    seccomp: Option<&LinuxSeccomp>,
    role: Role,
) -> Result<ProcessSpec> {
    let mut process = ProcessSpec::from_oci(process, seccomp, role).map_err(|err| {
        let mut text = err.to_string();
        if let Some(cause) = std::error::Error::source(&err) {
            text.push_str(": ");
            text.push_str(&cause.to_string());
        }
        ShimError::InvalidArgument(text)
    })?;
    let variable = format!("{}=", generation::VARIABLE);
    if !process.env.iter().any(|entry| entry.starts_with(&variable)) {
        process.env.push(variable + generation::PATH);
    }
    Ok(process)
}

impl RootSpec {
    fn of(spec: &Spec, id: &str) -> Result<Self> {
        let linux = spec.linux().clone().unwrap_or_default();
        let hostname = spec.hostname().clone().filter(|name| !name.is_empty());
        let mut mounts = Vec::new();
        for mount in spec.mounts().iter().flatten() {
            mounts.extend(PartSpec::of(mount)?);
        }
        Ok(Self {
            read_only: spec
                .root()
                .as_ref()
                .is_some_and(|root| root.readonly().unwrap_or(false)),
            hostname: hostname.unwrap_or_else(|| hostname_of(id)),
            mounts,
            masked_paths: linux.masked_paths().clone().unwrap_or_default(),
            readonly_paths: linux.readonly_paths().clone().unwrap_or_default(),
        })
    }

    /// Makes the detached mounts.
    pub fn parts(&self) -> Result<Vec<Part>> {
        self.mounts.iter().map(PartSpec::make).collect()
    }
}

/// A hostname from an id: at most the 64 bytes that the kernel takes.
pub fn hostname_of(id: &str) -> String {
    id.chars().filter(char::is_ascii).take(63).collect()
}

impl PartSpec {
    /// `None` for a mount that every sandbox has.
    fn of(mount: &Mount) -> Result<Option<Self>> {
        let destination = mount.destination().clone();
        let options = mount.options().clone().unwrap_or_default();
        let kind = mount.typ().clone().unwrap_or_default();
        let bind = kind == "bind"
            || options
                .iter()
                .any(|option| option == "bind" || option == "rbind");
        if bind {
            let source = mount.source().clone().unwrap_or_default();
            return Self::bind(source, destination, &options).map(Some);
        }
        let place = destination
            .to_str()
            .unwrap_or_default()
            .trim_end_matches('/');
        if STANDARD.contains(&(kind.as_str(), place)) {
            return Ok(None);
        }
        if kind == "tmpfs" {
            return Self::tmpfs(destination, &options).map(Some);
        }
        Err(refuse(&format!(
            "a mount of type {kind:?} at {}",
            destination.display()
        )))
    }

    /// A bind mount with OCI's options.
    pub fn bind(source: PathBuf, destination: PathBuf, options: &[String]) -> Result<Self> {
        if !source.is_absolute() || !destination.is_absolute() {
            return Err(ShimError::InvalidArgument(format!(
                "The bind mount from {} to {} needs absolute paths",
                source.display(),
                destination.display()
            )));
        }
        let (flags, rest) = flags_of(options);
        match rest.first() {
            Some(option) => Err(refuse(&format!(
                "the option {option:?} of the bind mount at {}",
                destination.display()
            ))),
            None => Ok(Self::Bind {
                source,
                destination,
                flags,
            }),
        }
    }

    fn tmpfs(destination: PathBuf, options: &[String]) -> Result<Self> {
        let (flags, rest) = flags_of(options);
        let pairs = rest
            .iter()
            .map(|option| match option.split_once('=') {
                Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
                None => Err(refuse(&format!(
                    "the option {option:?} of the tmpfs at {}",
                    destination.display()
                ))),
            })
            .collect::<Result<_>>()?;
        Ok(Self::Tmpfs {
            destination,
            options: pairs,
            flags,
        })
    }

    fn make(&self) -> Result<Part> {
        let made = match self {
            Self::Bind {
                source,
                destination,
                flags,
            } => Part::bind(source, destination, *flags),
            Self::Tmpfs {
                destination,
                options,
                flags,
            } => {
                let options: Vec<(&str, &str)> = options
                    .iter()
                    .map(|(name, value)| (name.as_str(), value.as_str()))
                    .collect();
                rootfs::tmpfs(&options, *flags).map(|mount| Part {
                    mount,
                    destination: destination.clone(),
                    directory: true,
                })
            }
        };
        made.map_err(ShimError::engine("make a mount of the sandbox"))
    }
}

/// Takes the flags out of a mount's options; the rest is the file system's.
fn flags_of(options: &[String]) -> (BindFlags, Vec<String>) {
    let mut flags = BindFlags::default();
    let mut rest = Vec::new();
    for option in options {
        match option.as_str() {
            "rbind" => flags.recursive = true,
            "ro" => flags.read_only = true,
            "rw" => flags.read_only = false,
            "nosuid" => flags.no_suid = true,
            "nodev" => flags.no_dev = true,
            "noexec" => flags.no_exec = true,
            // What a mount is anyway; a sandbox's mounts never propagate anywhere.
            "bind" | "suid" | "dev" | "exec" | "private" | "rprivate" | "slave" | "rslave"
            | "relatime" | "noatime" | "strictatime" | "defaults" => {}
            _ => rest.push(option.clone()),
        }
    }
    (flags, rest)
}

fn refuse_unsupported(spec: &Spec) -> Result<()> {
    let linux = spec.linux().clone().unwrap_or_default();
    let text = |value: &Option<String>| value.as_ref().is_some_and(|text| !text.is_empty());
    let hooks = spec.hooks().as_ref().is_some_and(|hooks| {
        [
            hooks.create_runtime(),
            hooks.create_container(),
            hooks.start_container(),
            hooks.poststart(),
            hooks.poststop(),
        ]
        .iter()
        .any(|list| list.as_ref().is_some_and(|list| !list.is_empty()))
    });
    let unsupported = [
        (hooks, "hooks"),
        (text(spec.domainname()), "domainname"),
        (spec.solaris().is_some(), "solaris"),
        (spec.windows().is_some(), "windows"),
        (spec.vm().is_some(), "vm"),
        (
            spec.uid_mappings()
                .as_ref()
                .is_some_and(|list| !list.is_empty()),
            "uidMappings",
        ),
        (
            spec.gid_mappings()
                .as_ref()
                .is_some_and(|list| !list.is_empty()),
            "gidMappings",
        ),
        (
            linux
                .uid_mappings()
                .as_ref()
                .is_some_and(|list| !list.is_empty()),
            "linux.uidMappings",
        ),
        (
            linux
                .gid_mappings()
                .as_ref()
                .is_some_and(|list| !list.is_empty()),
            "linux.gidMappings",
        ),
        (
            linux.sysctl().as_ref().is_some_and(|map| !map.is_empty()),
            "linux.sysctl",
        ),
        (
            linux
                .devices()
                .as_ref()
                .is_some_and(|list| !list.is_empty()),
            "linux.devices",
        ),
        (text(linux.mount_label()), "linux.mountLabel"),
        (linux.intel_rdt().is_some(), "linux.intelRdt"),
        (linux.personality().is_some(), "linux.personality"),
        (linux.memory_policy().is_some(), "linux.memoryPolicy"),
        (
            linux
                .net_devices()
                .as_ref()
                .is_some_and(|map| !map.is_empty()),
            "linux.netDevices",
        ),
    ];
    if let Some((_, field)) = unsupported.into_iter().find(|(set, _)| *set) {
        return Err(refuse(field));
    }
    check_namespaces(&linux)
}

fn check_namespaces(linux: &Linux) -> Result<()> {
    let given = linux.namespaces().clone().unwrap_or_default();
    for namespace in &given {
        if namespace.path().is_some() {
            return Err(refuse(&format!(
                "the path of the {} namespace",
                namespace.typ()
            )));
        }
        if matches!(
            namespace.typ(),
            LinuxNamespaceType::User | LinuxNamespaceType::Time
        ) {
            return Err(refuse(&format!("a {} namespace", namespace.typ())));
        }
    }
    let needed = [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Network,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Mount,
    ];
    for kind in needed {
        if !given.iter().any(|namespace| namespace.typ() == kind) {
            return Err(refuse(&format!("the host's {kind} namespace")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn base() -> Value {
        json!({
            "ociVersion": "1.0.2",
            "annotations": {SANDBOX: "function"},
            "hostname": "h",
            "root": {"path": "rootfs", "readonly": true},
            "process": {"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "mounts": [
                {"type": "proc", "source": "proc", "destination": "/proc"},
                {"type": "bind", "source": "/etc/hosts", "destination": "/etc/hosts", "options": ["rbind", "ro"]}
            ],
            "linux": {"namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}
            ]}
        })
    }

    fn of(value: Value) -> Result<SandboxSpec> {
        SandboxSpec::of(&serde_json::from_value(value).unwrap(), "c1")
    }

    #[test]
    fn an_ordinary_spec_is_taken() {
        let spec = of(base()).unwrap();
        assert_eq!(spec.kind, Kind::Function);
        assert_eq!(spec.tenancy, "c1");
        assert!(spec.root.read_only);
        assert_eq!(spec.root.mounts.len(), 1);
        assert!(matches!(&spec.root.mounts[0], PartSpec::Bind { flags, .. } if flags.read_only));
    }

    #[test]
    fn every_process_is_told_where_its_generation_page_is() {
        let place = format!("TRENV_GENERATION={}", trenv_snapshot::generation::PATH);
        let process = of(base()).unwrap().process.unwrap();
        assert!(process.env.contains(&place), "{:?}", process.env);
        // Who sets it has a reason, and keeps it.
        let mut own = base();
        own["process"]["env"] = json!(["TRENV_GENERATION="]);
        assert_eq!(of(own).unwrap().process.unwrap().env, ["TRENV_GENERATION="]);
    }

    #[test]
    fn what_would_not_be_applied_is_named() {
        let cases = [
            (
                "/linux/sysctl",
                json!({"net.core.somaxconn": "1"}),
                "linux.sysctl",
            ),
            ("/hooks", json!({"poststart": [{"path": "/x"}]}), "hooks"),
            ("/linux/namespaces", json!([{"type": "pid"}]), "host's net"),
            (
                "/mounts",
                json!([{"type": "nfs", "source": "s", "destination": "/d"}]),
                "nfs",
            ),
            ("/annotations", json!({SANDBOX: "yes"}), "function"),
        ];
        for (place, value, word) in cases {
            let mut spec = base();
            let (parent, name) = place.rsplit_once('/').unwrap();
            spec.pointer_mut(parent).unwrap()[name] = value;
            let err = of(spec).unwrap_err().to_string();
            assert!(err.contains(word), "{place}: {err}");
        }
    }

    #[test]
    fn an_idle_sandbox_ignores_the_process() {
        let mut spec = base();
        spec["annotations"] = json!({SANDBOX: "idle"});
        assert!(of(spec).unwrap().process.is_none());
    }
}
