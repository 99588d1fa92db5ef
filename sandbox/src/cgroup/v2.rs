//! A cgroup in the unified hierarchy.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    CgroupError, Limits, devices,
    kill::{is_gone, kill, pids_of, set, wait_until},
};

/// What a tenancy's parents must hand down.
const CONTROLLERS: &[&str] = &["cpu", "cpuset", "io", "memory", "pids"];

#[derive(Debug)]
pub(super) struct Group {
    mount: &'static Path,
    path: String,
    dir: PathBuf,
    open: Option<OwnedFd>,
}

impl Group {
    pub(super) fn new(mount: &'static Path, path: &str) -> Self {
        Self {
            mount,
            path: path.to_owned(),
            dir: mount.join(path),
            open: None,
        }
    }

    pub(super) fn path(&self) -> &str {
        &self.path
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn dir_fd(&self) -> Option<BorrowedFd<'_>> {
        self.open.as_ref().map(AsFd::as_fd)
    }

    pub(super) fn open_dir(&mut self) -> Result<(), CgroupError> {
        let dir = File::open(&self.dir).map_err(CgroupError::file("open", &self.dir))?;
        self.open = Some(dir.into());
        Ok(())
    }

    pub(super) fn create(&self, limits: &Limits) -> Result<(), CgroupError> {
        let mut dir = self.mount.to_owned();
        for part in self.path.split('/') {
            hand_down(&dir)?;
            dir.push(part);
            match std::fs::create_dir(&dir) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(CgroupError::file("make", dir)(source)),
            }
        }
        self.apply(limits)?;
        let rules: Vec<_> = limits.device_rules().collect();
        devices::attach(&self.dir, &rules)
    }

    pub(super) fn apply(&self, limits: &Limits) -> Result<(), CgroupError> {
        let bytes = |limit: i64| {
            if limit < 0 {
                "max".to_owned()
            } else {
                limit.to_string()
            }
        };
        self.apply_value("memory.max", limits.memory.map(bytes))?;
        self.apply_value("memory.low", limits.memory_reservation.map(bytes))?;
        if let Some(both) = limits.memory_and_swap {
            let swap = if both < 0 {
                "max".to_owned()
            } else {
                (both - limits.memory.unwrap_or(0).max(0))
                    .max(0)
                    .to_string()
            };
            // Without swap accounting there is nothing that the limit could count.
            if self.dir.join("memory.swap.max").exists() {
                self.apply_value("memory.swap.max", Some(swap))?;
            }
        }
        self.apply_value("cpu.weight", limits.cpu_shares.map(weight))?;
        if limits.cpu_quota_us.is_some() || limits.cpu_period_us.is_some() {
            let quota = limits
                .cpu_quota_us
                .filter(|quota| *quota > 0)
                .map_or("max".to_owned(), |quota| quota.to_string());
            let period = limits.cpu_period_us.unwrap_or(100_000);
            self.apply_value("cpu.max", Some(format!("{quota} {period}")))?;
        }
        self.apply_value("cpuset.cpus", limits.cpuset_cpus.clone())?;
        self.apply_value("cpuset.mems", limits.cpuset_mems.clone())?;
        let pids = limits.pids.map(|limit| {
            if limit > 0 {
                limit.to_string()
            } else {
                "max".to_owned()
            }
        });
        self.apply_value("pids.max", pids)?;
        self.apply_value(
            "io.weight",
            limits.blkio_weight.map(|weight| weight.to_string()),
        )
    }

    fn apply_value(&self, file: &str, value: Option<String>) -> Result<(), CgroupError> {
        match value {
            Some(value) => set(&self.dir, file, &value),
            None => Ok(()),
        }
    }

    pub(super) fn add(&self, pid: i32) -> Result<(), CgroupError> {
        let path = self.dir.join("cgroup.procs");
        std::fs::write(&path, pid.to_string()).map_err(|source| CgroupError::Add {
            pid,
            path,
            source,
        })
    }

    pub(super) fn freeze(&self, limit: Duration) -> Result<(), CgroupError> {
        set(&self.dir, "cgroup.freeze", "1")?;
        if wait_until(limit, || self.event("frozen"))? {
            return Ok(());
        }
        self.thaw()?;
        Err(CgroupError::Timeout {
            path: self.dir.clone(),
            what: "freeze",
            pids: pids_of(&self.dir).unwrap_or_default(),
        })
    }

    pub(super) fn thaw(&self) -> Result<(), CgroupError> {
        set(&self.dir, "cgroup.freeze", "0")
    }

    /// Kills by cgroup.kill, or one by one on kernels before 5.14.
    pub(super) fn kill_all(&self, limit: Duration) -> Result<(), CgroupError> {
        let at_once = match set(&self.dir, "cgroup.kill", "1") {
            Ok(()) => true,
            Err(CgroupError::Set { source, .. }) if is_gone(&source) => false,
            Err(error) => return Err(error),
        };
        let gone = wait_until(limit, || {
            let pids = pids_of(&self.dir)?;
            if !at_once {
                pids.iter().for_each(|pid| kill(*pid));
            }
            Ok(pids.is_empty())
        })?;
        if gone {
            return Ok(());
        }
        Err(CgroupError::Timeout {
            path: self.dir.clone(),
            what: "die",
            pids: pids_of(&self.dir).unwrap_or_default(),
        })
    }

    fn event(&self, name: &str) -> Result<bool, CgroupError> {
        let path = self.dir.join("cgroup.events");
        let text = std::fs::read_to_string(&path).map_err(CgroupError::file("read", path))?;
        Ok(text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .any(|(key, value)| key == name && value == "1"))
    }
}

/// Makes the controllers that a directory has available in its children.
fn hand_down(dir: &Path) -> Result<(), CgroupError> {
    let read = |file: &str| {
        let path = dir.join(file);
        std::fs::read_to_string(&path).map_err(CgroupError::file("read", path))
    };
    let there = read("cgroup.controllers")?;
    let on = read("cgroup.subtree_control")?;
    let missing: Vec<String> = CONTROLLERS
        .iter()
        .filter(|name| there.split_whitespace().any(|word| word == **name))
        .filter(|name| !on.split_whitespace().any(|word| word == **name))
        .map(|name| format!("+{name}"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    set(dir, "cgroup.subtree_control", &missing.join(" "))
}

/// cpu.weight for v1's cpu.shares, by the mapping that container runtimes agree on.
fn weight(shares: u64) -> String {
    let shares = shares.clamp(2, 262_144);
    (1 + (shares - 2) * 9999 / 262_142).to_string()
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::{super::kill::remove_dir, *};

    /// A group in the unified hierarchy, if one is mounted, even beside v1 ones.
    fn group(name: &str) -> Option<Group> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find(|fields| fields[2] == "cgroup2")
            .map(|fields| fields[1].to_owned());
        let Some(mount) = mount else {
            println!("skipped: no cgroup v2 hierarchy is mounted");
            return None;
        };
        let path = format!("trenv-test-{}-{name}", std::process::id());
        let mut group = Group::new(Path::new(mount.leak()), &path);
        group.create(&Limits::default()).unwrap();
        group.open_dir().unwrap();
        Some(group)
    }

    fn end(group: &Group, child: &mut Child) {
        group.kill_all(Duration::from_secs(5)).unwrap();
        child.wait().unwrap();
        remove_dir(group.dir(), Duration::from_secs(5)).unwrap();
    }

    #[test]
    fn processes_are_frozen_thawed_and_killed() {
        let Some(group) = group("freeze") else { return };
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        group.add(child.id().cast_signed()).unwrap();
        assert_eq!(pids_of(group.dir()).unwrap(), [child.id().cast_signed()]);
        group.freeze(Duration::from_secs(2)).unwrap();
        assert!(group.event("frozen").unwrap());
        group.thaw().unwrap();
        group.freeze(Duration::from_secs(2)).unwrap();
        end(&group, &mut child);
    }

    #[test]
    fn device_rules_hold() {
        let Some(group) = group("devices") else {
            return;
        };
        let dir = tempfile::tempdir().unwrap();
        let node = dir.path().join("disk");
        let script = format!(
            "read go; mknod {node} b 254 0 && echo made; cat /dev/null && echo null
             head -c 1 {node} 2>&1",
            node = node.display()
        );
        let mut child = Command::new("sh")
            .args(["-c", &script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        group.add(child.id().cast_signed()).unwrap();
        drop(child.stdin.take());
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.starts_with("made\nnull\n"), "{text}");
        assert!(text.contains("Operation not permitted"), "{text}");
        remove_dir(group.dir(), Duration::from_secs(5)).unwrap();
    }

    #[test]
    fn shares_become_weights() {
        assert_eq!(weight(2), "1");
        assert_eq!(weight(1024), "39");
        assert_eq!(weight(262_144), "10000");
    }
}
