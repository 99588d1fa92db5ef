//! Durable notes, one file for each sandbox, written before the sandbox is made.
//!
//! A `delete` that runs when the shim is dead learns from them what to kill and how it had ended.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use trenv_config::Config;

use crate::error::{Result, ShimError};

/// What is known of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub id: String,
    /// 0 until pid 1 exists.
    pub init_pid: u32,
    /// When pid 1 started, in the kernel's ticks: tells a reused pid from ours.
    pub init_started: u64,
    /// How the task ended, if it has.
    pub exit_status: Option<u32>,
}

/// The records of one containerd namespace.
#[derive(Debug, Clone)]
pub struct Records {
    directory: PathBuf,
}

impl Records {
    pub fn new(config: &Config, namespace: &str) -> Self {
        Self {
            directory: config.state_dir.join("sandboxes").join(namespace),
        }
    }

    /// Writes a record; it is on disk when this returns.
    pub fn write(&self, record: &Record) -> Result<()> {
        let path = self.path(&record.id);
        let action = || ShimError::io(format!("write {}", path.display()));
        let text = serde_json::to_vec(record)
            .map_err(|err| ShimError::Fault(format!("a record does not encode: {err}")))?;
        std::fs::create_dir_all(&self.directory).map_err(action())?;
        let new = path.with_extension("new");
        let mut file = std::fs::File::create(&new).map_err(action())?;
        file.write_all(&text)
            .and_then(|()| file.sync_data())
            .map_err(action())?;
        std::fs::rename(&new, &path).map_err(action())
    }

    /// Reads a record; a missing or damaged one is none.
    pub fn read(&self, id: &str) -> Option<Record> {
        serde_json::from_slice(&std::fs::read(self.path(id)).ok()?).ok()
    }

    /// Removes a record; a missing one is fine.
    pub fn remove(&self, id: &str) -> Result<()> {
        let path = self.path(id);
        match std::fs::remove_file(&path) {
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                Err(ShimError::io(format!("remove {}", path.display()))(err))
            }
            _ => Ok(()),
        }
    }

    fn path(&self, id: &str) -> PathBuf {
        self.directory
            .join(format!("{}.json", id.replace('/', "_")))
    }
}

impl Record {
    /// Kills pid 1 if it is still the recorded one; the kernel then ends all the others.
    pub fn kill_init(&self) {
        let alive = self.init_pid != 0 && started(self.init_pid) == Some(self.init_started);
        if alive {
            // It may end by itself meanwhile.
            let _ = crate::runc::signal_process(self.init_pid, libc::SIGKILL.cast_unsigned());
        }
    }
}

/// When a process started, in the kernel's ticks.
pub fn started(pid: u32) -> Option<u64> {
    let stat =
        std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    // The 22nd field; the second may hold anything.
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_kept_until_it_is_removed() {
        let state = tempfile::tempdir().unwrap();
        let config = Config {
            state_dir: state.path().into(),
            ..Config::default()
        };
        let records = Records::new(&config, "ns");
        let record = Record {
            id: "a".into(),
            init_pid: 1,
            init_started: 2,
            exit_status: Some(3),
        };
        assert_eq!(records.read("a"), None);
        records.write(&record).unwrap();
        assert_eq!(records.read("a"), Some(record));
        records.remove("a").unwrap();
        records.remove("a").unwrap();
        assert_eq!(records.read("a"), None);
    }

    #[test]
    fn a_reused_pid_is_not_killed() {
        let pid = std::process::id();
        let record = Record {
            id: "a".into(),
            init_pid: pid,
            init_started: 0,
            exit_status: None,
        };
        record.kill_init();
        assert!(started(pid).is_some_and(|at| at > 0));
    }
}
