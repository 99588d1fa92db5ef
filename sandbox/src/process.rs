//! A process to start in a sandbox: the part of an OCI process that we apply, as plain numbers.
//!
//! [`ProcessSpec::from_oci`] refuses by name what we do not apply, so that nothing of a spec is
//! dropped silently. Seccomp profiles are compiled here, outside the sandbox.

use oci_spec::runtime::{Capability, LinuxSeccomp, PosixRlimitType, Process};
use serde::{Deserialize, Serialize};

pub mod seccomp;
mod syscall_table;

pub use seccomp::{Program, SeccompError};

/// The pid inside the sandbox of the first process of a function.
pub const ROOT_PID: i32 = 2;

/// Pids from here on belong to our helpers and to processes that exec adds, so that the pids of a
/// template's processes stay free.
pub const HIGH_PIDS: i32 = 30_001;

/// Whether a process is a function's root or was added to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    Root,
    Exec,
}

/// Rows and columns of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TerminalSize {
    pub rows: u16,
    pub columns: u16,
}

/// The five capability sets as bit masks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CapabilitySets {
    pub bounding: u64,
    pub effective: u64,
    pub inheritable: u64,
    pub permitted: u64,
    pub ambient: u64,
}

/// One resource limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    pub resource: u32,
    pub soft: u64,
    pub hard: u64,
}

/// Everything that a process is started with, but its descriptors and its cgroup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSpec {
    pub role: Role,
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: String,
    /// A new terminal of the sandbox instead of the three given descriptors.
    pub terminal: Option<TerminalSize>,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub umask: u32,
    /// `None` keeps no capability at all.
    pub capabilities: Option<CapabilitySets>,
    pub no_new_privileges: bool,
    pub rlimits: Vec<Rlimit>,
    pub oom_score_adj: Option<i32>,
    pub seccomp: Option<Program>,
}

/// Why an OCI process cannot be started as its spec says.
#[derive(Debug, thiserror::Error)]
pub enum ProcessSpecError {
    #[error("The process has no args; give the image a command or the container an argument")]
    NoArgs,
    #[error("The working directory {cwd:?} is not an absolute path")]
    Cwd { cwd: String },
    #[error("The process sets {field}, which is not supported in a trenv sandbox; remove it")]
    Unsupported { field: &'static str },
    #[error("The process's {field} holds a zero byte")]
    ZeroByte { field: &'static str },
    #[error("The seccomp profile cannot be applied")]
    Seccomp(#[from] SeccompError),
}

impl ProcessSpec {
    /// Takes what an OCI process says, and the seccomp profile of the spec it stands in.
    ///
    /// # Errors
    /// When something is asked that would not be applied.
    pub fn from_oci(
        process: &Process,
        seccomp: Option<&LinuxSeccomp>,
        role: Role,
    ) -> Result<Self, ProcessSpecError> {
        let args = process.args().clone().unwrap_or_default();
        if args.is_empty() {
            return Err(ProcessSpecError::NoArgs);
        }
        let env = process.env().clone().unwrap_or_default();
        for (field, strings) in [("args", &args), ("env", &env)] {
            if strings.iter().any(|string| string.contains('\0')) {
                return Err(ProcessSpecError::ZeroByte { field });
            }
        }
        let cwd = process.cwd().display().to_string();
        if !cwd.starts_with('/') || cwd.contains('\0') {
            return Err(ProcessSpecError::Cwd { cwd });
        }
        refuse_unsupported(process)?;
        let user = process.user();
        Ok(Self {
            role,
            args,
            env,
            cwd,
            terminal: process.terminal().unwrap_or(false).then(|| {
                let size = process.console_size();
                TerminalSize {
                    rows: size.map_or(0, |size| clamp(size.height())),
                    columns: size.map_or(0, |size| clamp(size.width())),
                }
            }),
            uid: user.uid(),
            gid: user.gid(),
            groups: user.additional_gids().clone().unwrap_or_default(),
            umask: user.umask().unwrap_or(0o022),
            capabilities: process.capabilities().as_ref().map(|sets| CapabilitySets {
                bounding: mask(sets.bounding().as_ref()),
                effective: mask(sets.effective().as_ref()),
                inheritable: mask(sets.inheritable().as_ref()),
                permitted: mask(sets.permitted().as_ref()),
                ambient: mask(sets.ambient().as_ref()),
            }),
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            rlimits: process
                .rlimits()
                .iter()
                .flatten()
                .map(|limit| Rlimit {
                    resource: resource(limit.typ()),
                    soft: limit.soft(),
                    hard: limit.hard(),
                })
                .collect(),
            oom_score_adj: process.oom_score_adj(),
            seccomp: seccomp.map(seccomp::compile).transpose()?,
        })
    }
}

impl ProcessSpec {
    /// The capability, if it has one, with which a process can leave traces that no purge finds:
    /// firewall rules, sysctls, kernel modules, mounts of the host's devices. A sandbox that such a
    /// process was in is destroyed after the tenancy and not used again.
    #[must_use]
    pub fn unfit_for_reuse(&self) -> Option<&'static str> {
        const POWERS: [(u32, &str); 10] = [
            (12, "CAP_NET_ADMIN"),
            (16, "CAP_SYS_MODULE"),
            (17, "CAP_SYS_RAWIO"),
            (19, "CAP_SYS_PTRACE"),
            (21, "CAP_SYS_ADMIN"),
            (22, "CAP_SYS_BOOT"),
            (25, "CAP_SYS_TIME"),
            (32, "CAP_MAC_OVERRIDE"),
            (33, "CAP_MAC_ADMIN"),
            (39, "CAP_BPF"),
        ];
        // Nobody gets beyond the bounding set, not even by a program with file capabilities.
        let bounding = self.capabilities?.bounding;
        POWERS
            .iter()
            .find(|(capability, _)| bounding & 1 << capability != 0)
            .map(|(_, name)| *name)
    }
}

fn refuse_unsupported(process: &Process) -> Result<(), ProcessSpecError> {
    let set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    let unsupported = [
        (set(process.apparmor_profile()), "apparmorProfile"),
        (set(process.selinux_label()), "selinuxLabel"),
        (process.io_priority().is_some(), "ioPriority"),
        (process.scheduler().is_some(), "scheduler"),
        (process.exec_cpu_affinity().is_some(), "execCPUAffinity"),
    ];
    match unsupported.into_iter().find(|(asked, _)| *asked) {
        Some((_, field)) => Err(ProcessSpecError::Unsupported { field }),
        None => Ok(()),
    }
}

fn clamp(cells: u64) -> u16 {
    u16::try_from(cells).unwrap_or(u16::MAX)
}

fn mask(set: Option<&oci_spec::runtime::Capabilities>) -> u64 {
    set.into_iter()
        .flatten()
        .fold(0, |mask, capability| mask | 1 << number(*capability))
}

/// The kernel's number of a capability (linux/capability.h).
fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

/// The kernel's number of a resource (asm-generic/resource.h).
fn resource(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => 0,
        PosixRlimitType::RlimitFsize => 1,
        PosixRlimitType::RlimitData => 2,
        PosixRlimitType::RlimitStack => 3,
        PosixRlimitType::RlimitCore => 4,
        PosixRlimitType::RlimitRss => 5,
        PosixRlimitType::RlimitNproc => 6,
        PosixRlimitType::RlimitNofile => 7,
        PosixRlimitType::RlimitMemlock => 8,
        PosixRlimitType::RlimitAs => 9,
        PosixRlimitType::RlimitLocks => 10,
        PosixRlimitType::RlimitSigpending => 11,
        PosixRlimitType::RlimitMsgqueue => 12,
        PosixRlimitType::RlimitNice => 13,
        PosixRlimitType::RlimitRtprio => 14,
        PosixRlimitType::RlimitRttime => 15,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<ProcessSpec, ProcessSpecError> {
        ProcessSpec::from_oci(&serde_json::from_str(json).unwrap(), None, Role::Root)
    }

    const USER: &str = r#""user": {"uid": 0, "gid": 0}, "cwd": "/""#;

    #[test]
    fn what_is_not_applied_is_refused_by_name() {
        let error = parse(&format!(
            r#"{{{USER}, "args": ["x"], "apparmorProfile": "p"}}"#
        ))
        .unwrap_err();
        assert!(error.to_string().contains("apparmorProfile"), "{error}");
        let error = parse(&format!(r#"{{{USER}, "args": []}}"#)).unwrap_err();
        assert!(matches!(error, ProcessSpecError::NoArgs));
        let error = parse(r#"{"user": {"uid": 0, "gid": 0}, "cwd": "x", "args": ["x"]}"#);
        assert!(matches!(error, Err(ProcessSpecError::Cwd { .. })));
        let error = parse(&format!("{{{USER}, \"args\": [\"x\\u0000y\"]}}"));
        assert!(matches!(error, Err(ProcessSpecError::ZeroByte { .. })));
    }

    #[test]
    fn powerful_processes_are_noticed() {
        let with = |bounding: &str| {
            parse(&format!(
                r#"{{{USER}, "args": ["x"], "capabilities": {{"bounding": [{bounding}]}}}}"#
            ))
            .unwrap()
            .unfit_for_reuse()
        };
        assert_eq!(with(r#""CAP_CHOWN", "CAP_NET_RAW", "CAP_MKNOD""#), None);
        assert_eq!(
            with(r#""CAP_CHOWN", "CAP_SYS_ADMIN""#),
            Some("CAP_SYS_ADMIN")
        );
    }

    #[test]
    fn a_spec_survives_the_wire() {
        let spec = parse(&format!(
            r#"{{{USER}, "args": ["x", "y"], "terminal": true}}"#
        ))
        .unwrap();
        let bytes = postcard::to_stdvec(&spec).unwrap();
        assert_eq!(postcard::from_bytes::<ProcessSpec>(&bytes).unwrap(), spec);
    }
}
