//! Watches of an inotify. The kernel tells inodes only; what path each had is found by looking.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::libc;
use rustix::fs::inotify::{CreateFlags, WatchFlags};

use super::{DumpError, proc_text};
use crate::manifest::Watch;

/// Files and directories that are looked at for the one that is watched.
const MOST_CANDIDATES: usize = 65_536;
/// How many are looked at at once: a user may have a limited number of watches.
const AT_ONCE: usize = 1024;
/// Bits of a watch that inotify_add_watch(2) takes: events, IN_EXCL_UNLINK, IN_ONESHOT.
const SETTABLE: u32 = libc::IN_ALL_EVENTS | libc::IN_EXCL_UNLINK | libc::IN_ONESHOT;
/// Directories that have no place in a file system's tree, or too many files.
const ELSEWHERE: [&str; 2] = ["/proc", "/sys"];

/// Device and inode, as the kernel tells them of a watch.
type Identity = (u64, u64);

/// The watches of the inotify that is `what`, whose /proc/PID/fdinfo is `info`.
pub fn watches(copy: &OwnedFd, info: &str, root: i32, what: &str) -> Result<Vec<Watch>, DumpError> {
    let mut queued: i32 = 0;
    // SAFETY: FIONREAD writes one int.
    let asked = unsafe { libc::ioctl(copy.as_raw_fd(), libc::FIONREAD, &raw mut queued) };
    nix::errno::Errno::result(asked).map_err(DumpError::errno(format!("reading {what}")))?;
    if queued > 0 {
        return Err(DumpError::Refused(format!(
            "{what} is an inotify with {queued} bytes of events not read yet"
        )));
    }
    let wanted = parse(info).ok_or_else(|| DumpError::Io {
        doing: format!("reading the watches of {what}"),
        source: std::io::ErrorKind::InvalidData.into(),
    })?;
    let mut paths = BTreeMap::new();
    if !wanted.is_empty() {
        find(wanted.iter().map(|one| one.1).collect(), root, &mut paths)?;
    }
    let mut watches = Vec::new();
    for (wd, identity, mask) in wanted {
        let Some(path) = paths.get(&identity) else {
            return Err(DumpError::Refused(format!(
                "{what} is an inotify that watches inode {} of device {:#x}, which has no path",
                identity.1, identity.0
            )));
        };
        watches.push(Watch {
            wd,
            mask: mask & SETTABLE,
            path: path.clone(),
        });
    }
    watches.sort_unstable_by_key(|watch| watch.wd);
    Ok(watches)
}

/// Number, identity and mask of each watch (proc_pid_fdinfo(5)).
fn parse(info: &str) -> Option<Vec<(i32, Identity, u32)>> {
    let lines = info.lines().filter(|line| line.starts_with("inotify wd:"));
    lines
        .map(|line| {
            let hex = |key: &str| {
                let value = line
                    .split_whitespace()
                    .find_map(|word| word.strip_prefix(key))?;
                u64::from_str_radix(value, 16).ok()
            };
            let wd = i32::try_from(hex("wd:")?).ok()?;
            Some((wd, (hex("sdev:")?, hex("ino:")?), hex("mask:")? as u32))
        })
        .collect()
}

/// Walks the sandbox's file system, shallow places first, until every wanted inode has a path. What
/// is found is watched for a moment, since a file system may tell stat(2) other numbers.
fn find(
    mut wanted: Vec<Identity>,
    root: i32,
    paths: &mut BTreeMap<Identity, String>,
) -> Result<(), DumpError> {
    let top = format!("/proc/{root}/root");
    let mut directories = VecDeque::from([PathBuf::from("/")]);
    let mut candidates = vec![PathBuf::from("/")];
    let mut seen = 0;
    loop {
        let next = directories.pop_front();
        if candidates.len() >= AT_ONCE || next.is_none() {
            seen += candidates.len();
            look_at(&candidates, &top, &mut wanted, paths)?;
            candidates.clear();
        }
        let Some(directory) = next.filter(|_| !wanted.is_empty() && seen < MOST_CANDIDATES) else {
            return Ok(());
        };
        if ELSEWHERE.iter().any(|place| directory == Path::new(place)) {
            continue;
        }
        // A directory that is gone or closed to us holds nothing that can be found.
        let inside = within(&top, &directory);
        for entry in std::fs::read_dir(inside).into_iter().flatten().flatten() {
            let path = directory.join(entry.file_name());
            let kind = entry.file_type();
            if kind.as_ref().is_ok_and(std::fs::FileType::is_dir) {
                directories.push_back(path.clone());
            }
            if kind.is_ok_and(|kind| !kind.is_symlink()) {
                candidates.push(path);
            }
        }
    }
}

fn within(top: &str, path: &Path) -> PathBuf {
    Path::new(top).join(path.strip_prefix("/").unwrap_or(path))
}

fn look_at(
    candidates: &[PathBuf],
    top: &str,
    wanted: &mut Vec<Identity>,
    paths: &mut BTreeMap<Identity, String>,
) -> Result<(), DumpError> {
    for part in candidates.chunks(AT_ONCE) {
        let own = rustix::fs::inotify::init(CreateFlags::CLOEXEC)
            .map_err(|errno| DumpError::io("making an inotify to compare with")(errno.into()))?;
        let mut by_number = BTreeMap::new();
        for path in part {
            let how = WatchFlags::DELETE_SELF | WatchFlags::DONT_FOLLOW;
            // What is gone in the meantime is not what is looked for.
            let Ok(wd) = rustix::fs::inotify::add_watch(&own, within(top, path), how) else {
                continue;
            };
            by_number.entry(wd).or_insert(path);
        }
        let info = proc_text(&format!("/proc/thread-self/fdinfo/{}", own.as_raw_fd()))?;
        for (wd, identity, _) in parse(&info).unwrap_or_default() {
            if let Some(path) = by_number.get(&wd).and_then(|path| path.to_str())
                && wanted.contains(&identity)
            {
                wanted.retain(|one| *one != identity);
                paths.insert(identity, path.to_owned());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watches_are_read_from_proc() {
        let info = "pos:\t0\nflags:\t00\ninotify wd:2 ino:9e7e sdev:800013 mask:800afce \
                    ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e\n";
        let watches = parse(info).unwrap();
        assert_eq!(watches, [(2, (0x80_0013, 0x9e7e), 0x0800_afce)]);
        assert!(parse("inotify wd:2 ino:x").is_none());
    }
}
