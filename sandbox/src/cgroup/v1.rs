//! A cgroup in every v1 hierarchy.

use std::{path::PathBuf, time::Duration};

use super::{
    CgroupError, Limits,
    hierarchy::Hierarchy,
    kill::{is_gone, kill, pids_of, set, wait_until},
};

/// How long killed processes may take before the cgroup is frozen to kill them again.
const QUICK_DEATH: Duration = Duration::from_millis(5);

/// The same path in every hierarchy.
#[derive(Debug)]
pub(super) struct Group {
    hierarchies: &'static [Hierarchy],
    path: String,
}

impl Group {
    pub(super) fn new(hierarchies: &'static [Hierarchy], path: &str) -> Self {
        Self {
            hierarchies,
            path: path.to_owned(),
        }
    }

    pub(super) fn path(&self) -> &str {
        &self.path
    }

    pub(super) fn dirs(&self) -> Vec<PathBuf> {
        self.hierarchies
            .iter()
            .map(|hierarchy| hierarchy.mount.join(&self.path))
            .collect()
    }

    /// The directory in the hierarchy of a controller, if there is one.
    pub(super) fn dir_of(&self, controller: &str) -> Option<PathBuf> {
        self.hierarchies
            .iter()
            .find(|hierarchy| hierarchy.controllers.contains(&controller))
            .map(|hierarchy| hierarchy.mount.join(&self.path))
    }

    /// The hierarchy whose list of pids counts.
    pub(super) fn leader_dir(&self) -> PathBuf {
        self.dir_of("freezer")
            .unwrap_or_else(|| PathBuf::from("/nonexistent"))
    }

    pub(super) fn create(&self, limits: &Limits) -> Result<(), CgroupError> {
        for hierarchy in self.hierarchies {
            let mut dir = hierarchy.mount.clone();
            for part in self.path.split('/') {
                let above = dir.clone();
                dir.push(part);
                match std::fs::create_dir(&dir) {
                    Ok(()) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                    Err(source) => return Err(CgroupError::file("make", dir)(source)),
                }
                if hierarchy.controllers.contains(&"cpuset") {
                    // A new cpuset is empty, and takes no process until it is not.
                    for file in ["cpuset.cpus", "cpuset.mems"] {
                        let path = dir.join(file);
                        let own = std::fs::read_to_string(&path)
                            .map_err(CgroupError::file("read", &path))?;
                        if own.trim().is_empty() {
                            let path = above.join(file);
                            let from = std::fs::read_to_string(&path)
                                .map_err(CgroupError::file("read", &path))?;
                            set(&dir, file, from.trim())?;
                        }
                    }
                }
            }
        }
        self.apply(limits)?;
        if let Some(dir) = self.dir_of("devices") {
            set(&dir, "devices.deny", "a")?;
            for rule in limits.device_rules() {
                let file = if rule.allow {
                    "devices.allow"
                } else {
                    "devices.deny"
                };
                set(&dir, file, &rule.to_string())?;
            }
        }
        Ok(())
    }

    pub(super) fn apply(&self, limits: &Limits) -> Result<(), CgroupError> {
        self.apply_memory(limits)?;
        self.apply_value("cpu", "cpu.shares", limits.cpu_shares, "cpu.shares")?;
        self.apply_value(
            "cpu",
            "cpu.cfs_period_us",
            limits.cpu_period_us,
            "cpu.period",
        )?;
        self.apply_value("cpu", "cpu.cfs_quota_us", limits.cpu_quota_us, "cpu.quota")?;
        self.apply_value(
            "cpuset",
            "cpuset.cpus",
            limits.cpuset_cpus.as_ref(),
            "cpu.cpus",
        )?;
        self.apply_value(
            "cpuset",
            "cpuset.mems",
            limits.cpuset_mems.as_ref(),
            "cpu.mems",
        )?;
        let pids = limits.pids.map(|limit| {
            if limit > 0 {
                limit.to_string()
            } else {
                "max".to_owned()
            }
        });
        self.apply_value("pids", "pids.max", pids, "pids.limit")?;
        self.apply_value(
            "blkio",
            "blkio.weight",
            limits.blkio_weight,
            "blockIO.weight",
        )
    }

    fn apply_value(
        &self,
        controller: &str,
        file: &str,
        value: Option<impl ToString>,
        field: &str,
    ) -> Result<(), CgroupError> {
        let Some(value) = value else { return Ok(()) };
        let dir = self
            .dir_of(controller)
            .ok_or_else(|| CgroupError::Unsupported {
                field: format!("{field} (the controller {controller} is not mounted)"),
            })?;
        set(&dir, file, &value.to_string())
    }

    fn apply_memory(&self, limits: &Limits) -> Result<(), CgroupError> {
        const LIMIT: &str = "memory.limit_in_bytes";
        const SWAP: &str = "memory.memsw.limit_in_bytes";
        let swap_file = self
            .dir_of("memory")
            .is_some_and(|dir| dir.join(SWAP).exists());
        // Without swap accounting there is nothing that the limit could count.
        let swap = limits.memory_and_swap.filter(|_| swap_file);
        let memory = |value| self.apply_value("memory", LIMIT, value, "memory.limit");
        let both = |value| self.apply_value("memory", SWAP, value, "memory.swap");
        // Memory may never exceed memory and swap, so the order depends on the direction.
        if memory(limits.memory).is_ok() {
            both(swap)?;
        } else {
            both(swap)?;
            memory(limits.memory)?;
        }
        self.apply_value(
            "memory",
            "memory.soft_limit_in_bytes",
            limits.memory_reservation,
            "memory.reservation",
        )
    }

    pub(super) fn add(&self, pid: i32) -> Result<(), CgroupError> {
        for dir in self.dirs() {
            let path = dir.join("cgroup.procs");
            std::fs::write(&path, pid.to_string()).map_err(|source| CgroupError::Add {
                pid,
                path,
                source,
            })?;
        }
        Ok(())
    }

    pub(super) fn freeze(&self, limit: Duration) -> Result<(), CgroupError> {
        let dir = self.leader_dir();
        let path = dir.join("freezer.state");
        set(&dir, "freezer.state", "FROZEN")?;
        let frozen = wait_until(limit, || {
            let state = std::fs::read_to_string(&path).map_err(CgroupError::file("read", &path))?;
            if state.trim() == "FROZEN" {
                return Ok(true);
            }
            // A process forked meanwhile is only caught by asking again.
            set(&dir, "freezer.state", "FROZEN")?;
            Ok(false)
        })?;
        if frozen {
            return Ok(());
        }
        self.thaw()?;
        Err(CgroupError::Timeout {
            path: dir.clone(),
            what: "freeze",
            pids: pids_of(&dir).unwrap_or_default(),
        })
    }

    pub(super) fn thaw(&self) -> Result<(), CgroupError> {
        set(&self.leader_dir(), "freezer.state", "THAWED")
    }

    pub(super) fn kill_all(&self, limit: Duration) -> Result<(), CgroupError> {
        let dir = self.leader_dir();
        // Without freezing first: that is quicker, and misses only what forks at this moment.
        for pid in pids_of(&dir)? {
            kill(pid);
        }
        match set(&dir, "freezer.state", "THAWED") {
            Err(CgroupError::Set { source, .. }) if is_gone(&source) => return Ok(()),
            result => result?,
        }
        if wait_until(QUICK_DEATH, || Ok(pids_of(&dir)?.is_empty()))? {
            return Ok(());
        }
        let gone = wait_until(limit, || {
            // Frozen processes cannot fork, and die only when thawed.
            if let Err(error) = set(&dir, "freezer.state", "FROZEN") {
                return match &error {
                    CgroupError::Set { source, .. } if is_gone(source) => Ok(true),
                    _ => Err(error),
                };
            }
            for pid in pids_of(&dir)? {
                kill(pid);
            }
            set(&dir, "freezer.state", "THAWED")?;
            Ok(pids_of(&dir)?.is_empty())
        })?;
        if gone {
            return Ok(());
        }
        Err(CgroupError::Timeout {
            path: dir.clone(),
            what: "die",
            pids: pids_of(&dir).unwrap_or_default(),
        })
    }

    pub(super) fn reset_counters(&self) -> Result<(), CgroupError> {
        let counters = [
            ("memory", "memory.max_usage_in_bytes", "0"),
            ("memory", "memory.failcnt", "0"),
            ("memory", "memory.memsw.max_usage_in_bytes", "0"),
            ("memory", "memory.memsw.failcnt", "0"),
            ("cpuacct", "cpuacct.usage", "0"),
            ("blkio", "blkio.reset_stats", "1"),
        ];
        for (controller, file, value) in counters {
            if let Some(dir) = self.dir_of(controller)
                && dir.join(file).exists()
            {
                set(&dir, file, value)?;
            }
        }
        Ok(())
    }
}
