//! Children that have ended and that their parents may still wait for.

use super::process::{Entry, Stat, Status, threads};
use super::{DumpError, proc_text};
use crate::manifest::Zombie;

/// Set in a status when a core was written (wait(2), WCOREDUMP).
const CORE: i32 = 0x80;

/// The zombies of a tree. Every other child must be one of its processes: a dead one is in no cgroup
/// any more.
pub fn of_tree(tree: &[Entry]) -> Result<Vec<Zombie>, DumpError> {
    let mut zombies = Vec::new();
    for (index, parent) in tree.iter().enumerate() {
        for tid in threads(parent.host_pid)? {
            let list = proc_text(&format!("/proc/{}/task/{tid}/children", parent.host_pid))?;
            let children = list.split_whitespace();
            for child in children.filter_map(|child| child.parse::<i32>().ok()) {
                if !tree.iter().any(|entry| entry.host_pid == child) {
                    zombies.push(zombie(child, index, parent)?);
                }
            }
        }
    }
    Ok(zombies)
}

fn zombie(child: i32, index: usize, parent: &Entry) -> Result<Zombie, DumpError> {
    let status = Status::read(child, child)?;
    let pid = status.inner_pid()?;
    let refuse = |what: String| {
        Err(DumpError::Refused(format!(
            "process {pid} ({}), a child of process {}, {what}",
            status.text("Name").unwrap_or_default(),
            parent.pid
        )))
    };
    if !status.text("State")?.starts_with('Z') {
        return refuse("left the function's cgroup".into());
    }
    let stat = Stat::read(child)?;
    let (ended_by, exit_signal) = (stat.field(52) as i32, stat.field(38) as i32);
    if exit_signal != nix::libc::SIGCHLD {
        return refuse(format!(
            "is a zombie that tells its end by signal {exit_signal} instead of SIGCHLD"
        ));
    }
    if ended_by & CORE != 0 {
        return refuse("is a zombie that has left a core file".into());
    }
    Ok(Zombie {
        pid,
        parent: index,
        group: status.inner("NSpgid")?,
        session: status.inner("NSsid")?,
        uid: status.ids("Uid")?[0],
        status: ended_by,
    })
}
