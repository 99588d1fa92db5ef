//! Which cgroup hierarchies this machine has.

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

use super::CgroupError;

/// The controllers that a tenancy has something to do with.
const CONTROLLERS: &[&str] = &[
    "freezer", "memory", "cpu", "cpuacct", "cpuset", "devices", "blkio", "pids",
];

/// One mounted v1 hierarchy and those of our controllers that it carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    pub mount: PathBuf,
    pub controllers: Vec<&'static str>,
}

/// The machine's cgroups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Version {
    /// Controllers on v1 hierarchies, whether or not a bare v2 one is mounted beside them.
    V1(Vec<Hierarchy>),
    /// The unified hierarchy's mount point.
    V2(PathBuf),
}

/// Finds the hierarchies, once per process.
///
/// # Errors
/// When neither a v1 freezer nor a v2 hierarchy is mounted.
pub fn version() -> Result<&'static Version, CgroupError> {
    static FOUND: OnceLock<Version> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(found);
    }
    let path = Path::new("/proc/self/mountinfo");
    let text = std::fs::read_to_string(path).map_err(CgroupError::file("read", path))?;
    let found = parse(&text).ok_or(CgroupError::NoHierarchy)?;
    Ok(FOUND.get_or_init(|| found))
}

fn parse(mountinfo: &str) -> Option<Version> {
    let mut hierarchies: Vec<Hierarchy> = Vec::new();
    let mut unified = None;
    for line in mountinfo.lines() {
        let Some((place, kind)) = line.split_once(" - ") else {
            continue;
        };
        let Some(mount) = place.split(' ').nth(4) else {
            continue;
        };
        let mut kind = kind.split(' ');
        match (kind.next(), kind.nth(1)) {
            (Some("cgroup2"), _) => {
                unified.get_or_insert_with(|| PathBuf::from(mount));
            }
            (Some("cgroup"), Some(options)) => {
                let controllers: Vec<&'static str> = CONTROLLERS
                    .iter()
                    .copied()
                    .filter(|name| options.split(',').any(|option| option == *name))
                    // A hierarchy may be mounted twice.
                    .filter(|name| !hierarchies.iter().any(|h| h.controllers.contains(name)))
                    .collect();
                if !controllers.is_empty() {
                    hierarchies.push(Hierarchy {
                        mount: mount.into(),
                        controllers,
                    });
                }
            }
            _ => {}
        }
    }
    if hierarchies
        .iter()
        .any(|hierarchy| hierarchy.controllers.contains(&"freezer"))
    {
        return Some(Version::V1(hierarchies));
    }
    unified.map(Version::V2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v1_beside_a_bare_v2_is_v1() {
        let text = "\
30 25 0:26 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw,nsdelegate
31 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct
32 25 0:28 / /sys/fs/cgroup/freezer rw shared:11 - cgroup cgroup rw,freezer
33 25 0:29 / /sys/fs/cgroup/systemd rw shared:12 - cgroup cgroup rw,xattr,name=systemd
";
        let Some(Version::V1(found)) = parse(text) else {
            panic!("v1 expected");
        };
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].controllers, ["cpu", "cpuacct"]);
        assert_eq!(found[1].mount, Path::new("/sys/fs/cgroup/freezer"));
    }

    #[test]
    fn v2_alone_is_v2() {
        let text = "30 25 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(parse(text), Some(Version::V2("/sys/fs/cgroup".into())));
        assert_eq!(parse(""), None);
    }
}
