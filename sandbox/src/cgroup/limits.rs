//! What a tenancy may use, from the resources of an OCI spec.

use std::fmt;

use oci_spec::runtime::{LinuxDeviceType, LinuxResources};

use super::CgroupError;

/// The limits that we apply; absent means none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Limits {
    pub memory: Option<i64>,
    pub memory_reservation: Option<i64>,
    /// Memory and swap together, as OCI counts.
    pub memory_and_swap: Option<i64>,
    pub cpu_shares: Option<u64>,
    pub cpu_quota_us: Option<i64>,
    pub cpu_period_us: Option<u64>,
    pub cpuset_cpus: Option<String>,
    pub cpuset_mems: Option<String>,
    pub pids: Option<i64>,
    pub blkio_weight: Option<u16>,
    /// In order, on top of "nothing is allowed"; [`DeviceRule::ALWAYS`] follow.
    pub devices: Vec<DeviceRule>,
}

/// Allows or denies access to devices. `None` means any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceRule {
    pub allow: bool,
    pub kind: DeviceKind,
    pub major: Option<u32>,
    pub minor: Option<u32>,
    pub read: bool,
    pub write: bool,
    pub mknod: bool,
}

/// The type of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    Any,
    Block,
    Char,
}

const fn always(kind: DeviceKind, major: Option<u32>, minor: Option<u32>, io: bool) -> DeviceRule {
    DeviceRule {
        allow: true,
        kind,
        major,
        minor,
        read: io,
        write: io,
        mknod: true,
    }
}

impl DeviceRule {
    /// What every container may do: make any node, and use the standard devices and terminals.
    pub const ALWAYS: [Self; 10] = [
        always(DeviceKind::Char, None, None, false),
        always(DeviceKind::Block, None, None, false),
        always(DeviceKind::Char, Some(1), Some(3), true),
        always(DeviceKind::Char, Some(1), Some(5), true),
        always(DeviceKind::Char, Some(1), Some(7), true),
        always(DeviceKind::Char, Some(1), Some(8), true),
        always(DeviceKind::Char, Some(1), Some(9), true),
        always(DeviceKind::Char, Some(5), Some(0), true),
        always(DeviceKind::Char, Some(5), Some(2), true),
        always(DeviceKind::Char, Some(136), None, true),
    ];
}

/// As the v1 files devices.allow and devices.deny read it.
impl fmt::Display for DeviceRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |number: Option<u32>| number.map_or("*".to_owned(), |n| n.to_string());
        f.write_str(match self.kind {
            DeviceKind::Any => "a",
            DeviceKind::Block => "b",
            DeviceKind::Char => "c",
        })?;
        write!(f, " {}:{} ", number(self.major), number(self.minor))?;
        for (on, letter) in [(self.read, "r"), (self.write, "w"), (self.mknod, "m")] {
            if on {
                f.write_str(letter)?;
            }
        }
        Ok(())
    }
}

impl Limits {
    /// Takes what an OCI spec asks for.
    ///
    /// # Errors
    /// When it asks for something that would not be applied.
    pub fn from_oci(resources: &LinuxResources) -> Result<Self, CgroupError> {
        let mut limits = Self::default();
        let unsupported = |field: &str| CgroupError::Unsupported {
            field: field.to_owned(),
        };
        if let Some(memory) = resources.memory() {
            limits.memory = memory.limit().filter(|limit| *limit != 0);
            limits.memory_reservation = memory.reservation().filter(|limit| *limit != 0);
            limits.memory_and_swap = memory.swap().filter(|limit| *limit != 0);
            let asked = [
                (memory.kernel().is_some(), "memory.kernel"),
                (memory.kernel_tcp().is_some(), "memory.kernelTCP"),
                (memory.swappiness().is_some(), "memory.swappiness"),
                (
                    memory.disable_oom_killer() == Some(true),
                    "memory.disableOOMKiller",
                ),
            ];
            refuse(&asked)?;
        }
        if let Some(cpu) = resources.cpu() {
            limits.cpu_shares = cpu.shares().filter(|shares| *shares != 0);
            limits.cpu_quota_us = cpu.quota().filter(|quota| *quota != 0);
            limits.cpu_period_us = cpu.period().filter(|period| *period != 0);
            limits.cpuset_cpus = cpu.cpus().clone().filter(|cpus| !cpus.is_empty());
            limits.cpuset_mems = cpu.mems().clone().filter(|mems| !mems.is_empty());
            let asked = [
                (
                    cpu.realtime_runtime().is_some_and(|v| v != 0),
                    "cpu.realtimeRuntime",
                ),
                (
                    cpu.realtime_period().is_some_and(|v| v != 0),
                    "cpu.realtimePeriod",
                ),
                (cpu.idle().is_some_and(|v| v != 0), "cpu.idle"),
                (cpu.burst().is_some_and(|v| v != 0), "cpu.burst"),
            ];
            refuse(&asked)?;
        }
        limits.pids = resources.pids().map(|pids| pids.limit());
        if let Some(io) = resources.block_io() {
            limits.blkio_weight = io.weight().filter(|weight| *weight != 0);
            let lists = [
                io.weight_device().as_ref().map_or(0, Vec::len),
                io.throttle_read_bps_device().as_ref().map_or(0, Vec::len),
                io.throttle_write_bps_device().as_ref().map_or(0, Vec::len),
                io.throttle_read_iops_device().as_ref().map_or(0, Vec::len),
                io.throttle_write_iops_device().as_ref().map_or(0, Vec::len),
            ];
            if lists.iter().any(|len| *len != 0) {
                return Err(unsupported("blockIO of single devices"));
            }
        }
        if resources
            .hugepage_limits()
            .as_ref()
            .is_some_and(|l| !l.is_empty())
        {
            return Err(unsupported("hugepageLimits"));
        }
        if resources.network().is_some() {
            return Err(unsupported("network"));
        }
        if resources.rdma().as_ref().is_some_and(|r| !r.is_empty()) {
            return Err(unsupported("rdma"));
        }
        if resources.unified().as_ref().is_some_and(|u| !u.is_empty()) {
            return Err(unsupported("unified"));
        }
        for rule in resources.devices().iter().flatten() {
            limits.devices.push(device_rule(rule)?);
        }
        Ok(limits)
    }

    /// All device rules, in the order in which they count.
    pub(super) fn device_rules(&self) -> impl DoubleEndedIterator<Item = DeviceRule> + '_ {
        self.devices.iter().copied().chain(DeviceRule::ALWAYS)
    }
}

fn refuse(asked: &[(bool, &str)]) -> Result<(), CgroupError> {
    match asked.iter().find(|(asked, _)| *asked) {
        Some((_, field)) => Err(CgroupError::Unsupported {
            field: (*field).to_owned(),
        }),
        None => Ok(()),
    }
}

fn device_rule(rule: &oci_spec::runtime::LinuxDeviceCgroup) -> Result<DeviceRule, CgroupError> {
    let number = |number: Option<i64>| match number {
        None | Some(-1) => Ok(None),
        Some(number) => u32::try_from(number)
            .map(Some)
            .map_err(|_| CgroupError::Unsupported {
                field: format!("device number {number}"),
            }),
    };
    let access = rule.access().as_deref().unwrap_or("rwm");
    Ok(DeviceRule {
        allow: rule.allow(),
        kind: match rule.typ() {
            None | Some(LinuxDeviceType::A) => DeviceKind::Any,
            Some(LinuxDeviceType::B) => DeviceKind::Block,
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => DeviceKind::Char,
            Some(LinuxDeviceType::P) => {
                return Err(CgroupError::Unsupported {
                    field: "device type p".to_owned(),
                });
            }
        },
        major: number(rule.major())?,
        minor: number(rule.minor())?,
        read: access.contains('r'),
        write: access.contains('w'),
        mknod: access.contains('m'),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_read_as_the_kernel_wants_them() {
        let rules: Vec<String> = DeviceRule::ALWAYS.iter().map(ToString::to_string).collect();
        assert_eq!(rules[0], "c *:* m");
        assert_eq!(rules[2], "c 1:3 rwm");
        assert_eq!(rules[9], "c 136:* rwm");
    }

    #[test]
    fn what_is_not_applied_is_refused_by_name() {
        let resources: LinuxResources =
            serde_json::from_str(r#"{"unified": {"memory.high": "1"}}"#).unwrap();
        let error = Limits::from_oci(&resources).unwrap_err();
        assert!(error.to_string().contains("unified"), "{error}");
    }

    #[test]
    fn a_default_spec_is_taken() {
        let resources: LinuxResources = serde_json::from_str(
            r#"{"devices": [{"allow": false, "access": "rwm"}], "memory": {"limit": 1048576},
                "cpu": {"shares": 1024, "quota": 50000, "period": 100000}, "pids": {"limit": 9}}"#,
        )
        .unwrap();
        let limits = Limits::from_oci(&resources).unwrap();
        assert_eq!(limits.memory, Some(1 << 20));
        assert_eq!(limits.cpu_quota_us, Some(50_000));
        assert_eq!(limits.pids, Some(9));
        assert_eq!(limits.devices[0].to_string(), "a *:* rwm");
    }
}
