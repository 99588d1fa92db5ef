//! What both versions need: lists of pids, waiting, removal.

use std::{
    io,
    path::Path,
    time::{Duration, Instant},
};

use super::CgroupError;

/// Writes one value to one control file.
pub(super) fn set(dir: &Path, file: &str, value: &str) -> Result<(), CgroupError> {
    let path = dir.join(file);
    std::fs::write(&path, value).map_err(|source| CgroupError::Set {
        path,
        value: value.to_owned(),
        source,
    })
}

/// The pids in a cgroup; a cgroup that does not exist has none.
pub(super) fn pids_of(dir: &Path) -> Result<Vec<i32>, CgroupError> {
    let path = dir.join("cgroup.procs");
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(text
            .lines()
            .filter_map(|line| line.parse().ok())
            .filter(|pid| *pid > 0)
            .collect()),
        Err(error) if is_gone(&error) => Ok(Vec::new()),
        Err(source) => Err(CgroupError::file("read", path)(source)),
    }
}

pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// Sends SIGKILL; a process that is gone already is fine.
pub(super) fn kill(pid: i32) {
    // SAFETY: kill takes no pointers.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// Asks `done` again and again, soon at first, until it is true or the limit is over.
pub(super) fn wait_until(
    limit: Duration,
    mut done: impl FnMut() -> Result<bool, CgroupError>,
) -> Result<bool, CgroupError> {
    let start = Instant::now();
    let mut pause = Duration::from_micros(50);
    while !done()? {
        if start.elapsed() > limit {
            return Ok(false);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
    Ok(true)
}

/// Removes one directory, waiting for the kernel to let go of processes that have just died.
pub(super) fn remove_dir(dir: &Path, limit: Duration) -> Result<(), CgroupError> {
    let mut last = None;
    let removed = wait_until(limit, || match std::fs::remove_dir(dir) {
        Ok(()) => Ok(true),
        Err(error) if is_gone(&error) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            last = Some(error);
            Ok(false)
        }
        Err(source) => Err(CgroupError::file("remove", dir)(source)),
    })?;
    match (removed, last) {
        (false, Some(_)) => Err(CgroupError::Timeout {
            path: dir.to_owned(),
            what: "become empty",
            pids: pids_of(dir).unwrap_or_default(),
        }),
        _ => Ok(()),
    }
}
