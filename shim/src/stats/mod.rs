//! Figures of control groups in containerd's metrics types, for both versions.

mod v1;
mod v2;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;

use crate::error::{Result, ShimError};

/// Where a process's control groups are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Groups {
    /// One directory for each controller.
    V1(HashMap<String, PathBuf>),
    V2(PathBuf),
}

impl Groups {
    /// The groups that a process sits in now.
    pub fn of_process(pid: u32) -> Result<Self> {
        let read = |path: String| {
            std::fs::read_to_string(&path).map_err(ShimError::io(format!("read {path}")))
        };
        let mounts = read("/proc/self/mountinfo".into())?;
        Ok(Self::parse(&read(format!("/proc/{pid}/cgroup"))?, &mounts))
    }

    /// The groups of these directories, as a sandbox's cgroup names them.
    pub fn of_dirs(dirs: &[PathBuf]) -> Result<Self> {
        let unified = dirs
            .iter()
            .find(|dir| dir.join("cgroup.controllers").exists());
        let v1: HashMap<String, PathBuf> = ["cpu", "cpuacct", "memory", "pids", "blkio"]
            .into_iter()
            .filter_map(|name| {
                let own = |dir: &&PathBuf| {
                    dir.join(probe(name)).exists() && !dir.join("cgroup.controllers").exists()
                };
                let dir = dirs.iter().find(own)?;
                Some((name.to_owned(), dir.clone()))
            })
            .collect();
        match (v1.is_empty(), unified) {
            (false, _) => Ok(Self::V1(v1)),
            (true, Some(dir)) => Ok(Self::V2(dir.clone())),
            (true, None) => Err(ShimError::NotFound {
                kind: "cgroup",
                id: dirs
                    .first()
                    .map(|dir| dir.display().to_string())
                    .unwrap_or_default(),
            }),
        }
    }

    fn parse(membership: &str, mounts: &str) -> Self {
        let mut v1 = HashMap::new();
        let mut v2 = PathBuf::from("/sys/fs/cgroup");
        let lines: Vec<(&str, &str)> = membership
            .lines()
            .filter_map(|line| line.split_once(':')?.1.split_once(':'))
            .collect();
        let path_of = |controller: &str| {
            lines
                .iter()
                .find(|(controllers, _)| {
                    if controller.is_empty() {
                        controllers.is_empty()
                    } else {
                        controllers.split(',').any(|name| name == controller)
                    }
                })
                .map(|(_, path)| path.trim_start_matches('/'))
        };
        for line in mounts.lines() {
            let Some((left, right)) = line.split_once(" - ") else {
                continue;
            };
            let Some(place) = left.split(' ').nth(4) else {
                continue;
            };
            let right: Vec<&str> = right.split(' ').collect();
            match right.as_slice() {
                ["cgroup2", ..] => {
                    if let Some(path) = path_of("") {
                        v2 = Path::new(place).join(path);
                    }
                }
                ["cgroup", _, options] => {
                    for controller in options.split(',') {
                        if let Some(path) = path_of(controller).filter(|_| !controller.is_empty()) {
                            v1.insert(controller.to_owned(), Path::new(place).join(path));
                        }
                    }
                }
                _ => {}
            }
        }
        if v1.contains_key("memory") || v1.contains_key("cpu") {
            Self::V1(v1)
        } else {
            Self::V2(v2)
        }
    }

    /// How many processes the kernel has killed here for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let file = match self {
            Self::V1(paths) => paths
                .get("memory")
                .map(|path| path.join("memory.oom_control")),
            Self::V2(path) => Some(path.join("memory.events")),
        };
        file.and_then(|file| table(&file).get("oom_kill").copied())
            .unwrap_or(0)
    }

    /// Reads the figures.
    pub fn metrics(&self) -> Result<Any> {
        let (type_url, value) = match self {
            Self::V1(paths) => (
                "io.containerd.cgroups.v1.Metrics",
                v1::read(paths).write_to_bytes(),
            ),
            Self::V2(path) => (
                "io.containerd.cgroups.v2.Metrics",
                v2::read(path).write_to_bytes(),
            ),
        };
        let value = value.map_err(ShimError::engine("encode the figures"))?;
        Ok(Any {
            type_url: type_url.into(),
            value,
            ..Any::default()
        })
    }
}

/// A file that only this controller of version 1 has.
fn probe(controller: &str) -> &'static str {
    match controller {
        "cpu" => "cpu.shares",
        "cpuacct" => "cpuacct.usage",
        "memory" => "memory.limit_in_bytes",
        "blkio" => "blkio.throttle.io_serviced_recursive",
        _ => "pids.max",
    }
}

/// A file that holds one number; "max", or a missing file, is none.
fn number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A file of lines "name number".
fn table(path: &Path) -> HashMap<String, u64> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, value)| Some((name.to_owned(), value.trim().parse().ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1_MOUNTS: &str = "\
30 1 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
31 1 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 1 0:28 / /sys/fs/cgroup/unified rw - cgroup2 none rw";

    #[test]
    fn a_process_of_version_1_has_a_directory_for_each_controller() {
        let groups = Groups::parse("5:memory:/a/b\n4:cpu,cpuacct:/c\n0::/\n", V1_MOUNTS);
        let Groups::V1(paths) = groups else {
            panic!("version 1 expected")
        };
        assert_eq!(paths["memory"], Path::new("/sys/fs/cgroup/memory/a/b"));
        assert_eq!(paths["cpuacct"], Path::new("/sys/fs/cgroup/cpu,cpuacct/c"));
    }

    #[test]
    fn a_process_of_version_2_has_one_directory() {
        let mounts = "32 1 0:28 / /sys/fs/cgroup rw - cgroup2 none rw,nsdelegate";
        assert_eq!(
            Groups::parse("0::/x/y\n", mounts),
            Groups::V2("/sys/fs/cgroup/x/y".into())
        );
    }

    #[test]
    fn figures_of_this_very_process_are_read() {
        let any = Groups::of_process(std::process::id())
            .unwrap()
            .metrics()
            .unwrap();
        assert!(
            any.type_url.starts_with("io.containerd.cgroups.v"),
            "{}",
            any.type_url
        );
    }
}
