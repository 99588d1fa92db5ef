//! A tenancy's cgroup, on cgroup v1 and v2, found out once per process.
//!
//! A [`TenancyCgroup`] is made ahead with its limits, gets processes by [`TenancyCgroup::add`] (v1:
//! in every hierarchy, which may wait for an RCU grace period) or by CLONE_INTO_CGROUP on its
//! [`TenancyCgroup::dir_fd`] (v2), and is removed when the tenancy is over.

use std::{
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
    time::Duration,
};

mod devices;
mod error;
mod hierarchy;
mod kill;
mod limits;
mod stats;
mod v1;
mod v2;

pub use error::CgroupError;
pub use hierarchy::{Version, version};
pub use limits::{DeviceRule, Limits};
pub use stats::{BlockIo, Stats};

/// The cgroup of one tenancy, in every hierarchy there is.
#[derive(Debug)]
pub struct TenancyCgroup {
    inner: Inner,
}

#[derive(Debug)]
enum Inner {
    V1(v1::Group),
    V2(v2::Group),
}

/// How long to wait for a cgroup to freeze before giving up.
const FREEZE_LIMIT: Duration = Duration::from_secs(2);
/// How long to wait for processes to die, or for the kernel to let go of an empty cgroup.
const EMPTY_LIMIT: Duration = Duration::from_secs(10);

impl TenancyCgroup {
    /// Makes `parent/name` in every hierarchy and sets its limits. `parent` is relative to the
    /// hierarchies' roots and is made when missing.
    ///
    /// # Errors
    /// When a directory cannot be made or a limit is refused; what was made is removed again.
    pub fn create(parent: &str, name: &str, limits: &Limits) -> Result<Self, CgroupError> {
        Self::create_in(version()?, parent, name, limits)
    }

    /// As [`TenancyCgroup::create`], in the given hierarchies instead of those that were found.
    ///
    /// # Errors
    /// As [`TenancyCgroup::create`].
    pub fn create_in(
        version: &'static Version,
        parent: &str,
        name: &str,
        limits: &Limits,
    ) -> Result<Self, CgroupError> {
        let group = Self::named(version, &join(parent, name)?);
        let made = match &group.inner {
            Inner::V1(group) => group.create(limits),
            Inner::V2(group) => group.create(limits),
        };
        if let Err(error) = made {
            // The first error is the one to report.
            let _ = group.remove();
            return Err(error);
        }
        group.opened()
    }

    /// An existing cgroup by its name, for cleaning up after a process that made it; all operations
    /// on one that does not exist find it empty.
    ///
    /// # Errors
    /// When the name is not valid or there is no hierarchy.
    pub fn existing(parent: &str, name: &str) -> Result<Self, CgroupError> {
        Ok(Self::named(version()?, &join(parent, name)?))
    }

    fn named(version: &'static Version, path: &str) -> Self {
        let inner = match version {
            Version::V1(hierarchies) => Inner::V1(v1::Group::new(hierarchies, path)),
            Version::V2(mount) => Inner::V2(v2::Group::new(mount, path)),
        };
        Self { inner }
    }

    fn opened(mut self) -> Result<Self, CgroupError> {
        if let Inner::V2(group) = &mut self.inner {
            group.open_dir()?;
        }
        Ok(self)
    }

    /// The path below the hierarchies' roots.
    #[must_use]
    pub fn path(&self) -> &str {
        match &self.inner {
            Inner::V1(group) => group.path(),
            Inner::V2(group) => group.path(),
        }
    }

    /// The directory to give to CLONE_INTO_CGROUP; v2 only.
    #[must_use]
    pub fn dir_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.inner {
            Inner::V1(_) => None,
            Inner::V2(group) => group.dir_fd(),
        }
    }

    /// Moves a process, with all its threads, into this cgroup.
    ///
    /// # Errors
    /// When the process is gone or a hierarchy refuses it.
    pub fn add(&self, pid: i32) -> Result<(), CgroupError> {
        match &self.inner {
            Inner::V1(group) => group.add(pid),
            Inner::V2(group) => group.add(pid),
        }
    }

    /// Replaces the limits.
    ///
    /// # Errors
    /// When a limit is refused.
    pub fn update(&self, limits: &Limits) -> Result<(), CgroupError> {
        match &self.inner {
            Inner::V1(group) => group.apply(limits),
            Inner::V2(group) => group.apply(limits),
        }
    }

    /// Host pids of the processes inside.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub fn pids(&self) -> Result<Vec<i32>, CgroupError> {
        kill::pids_of(&self.leader_dir())
    }

    /// Stops every process and returns when all have stopped.
    ///
    /// # Errors
    /// When they have not stopped within two seconds; they are then running again.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        match &self.inner {
            Inner::V1(group) => group.freeze(FREEZE_LIMIT),
            Inner::V2(group) => group.freeze(FREEZE_LIMIT),
        }
    }

    /// Lets the processes run again.
    ///
    /// # Errors
    /// When the freezer refuses.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        match &self.inner {
            Inner::V1(group) => group.thaw(),
            Inner::V2(group) => group.thaw(),
        }
    }

    /// Kills every process, frozen ones too, and returns when none is left. Their parents still
    /// have to reap them.
    ///
    /// # Errors
    /// When one is still there after ten seconds.
    pub fn kill_all(&self) -> Result<(), CgroupError> {
        match &self.inner {
            Inner::V1(group) => group.kill_all(EMPTY_LIMIT),
            Inner::V2(group) => group.kill_all(EMPTY_LIMIT),
        }
    }

    /// Sets peaks, fail counts and CPU time to zero. Answers false where the kernel cannot do that
    /// (v2): a new tenancy needs a new cgroup there.
    ///
    /// # Errors
    /// When a counter refuses.
    pub fn reset_counters(&self) -> Result<bool, CgroupError> {
        match &self.inner {
            Inner::V1(group) => group.reset_counters().map(|()| true),
            Inner::V2(_) => Ok(false),
        }
    }

    /// What the processes use.
    ///
    /// # Errors
    /// When a figure cannot be read.
    pub fn stats(&self) -> Result<Stats, CgroupError> {
        match &self.inner {
            Inner::V1(group) => stats::read_v1(group),
            Inner::V2(group) => stats::read_v2(group),
        }
    }

    /// Keeps memory that this group is charged with out of swap, where the kernel has a limit for it.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn keep_from_swap(&self) -> Result<(), CgroupError> {
        for dir in self.dirs() {
            for file in ["memory.swap.max", "memory.swappiness"] {
                if dir.join(file).exists() {
                    kill::set(&dir, file, "0")?;
                }
            }
        }
        Ok(())
    }

    /// Removes the empty cgroup from every hierarchy; none there is fine.
    ///
    /// # Errors
    /// When it stays busy for ten seconds.
    pub fn remove(&self) -> Result<(), CgroupError> {
        for dir in self.dirs() {
            kill::remove_dir(&dir, EMPTY_LIMIT)?;
        }
        Ok(())
    }

    /// Its directories, one for each hierarchy.
    #[must_use]
    pub fn dirs(&self) -> Vec<PathBuf> {
        match &self.inner {
            Inner::V1(group) => group.dirs(),
            Inner::V2(group) => vec![group.dir().to_owned()],
        }
    }

    fn leader_dir(&self) -> PathBuf {
        match &self.inner {
            Inner::V1(group) => group.leader_dir(),
            Inner::V2(group) => group.dir().to_owned(),
        }
    }
}

/// Kills and removes every cgroup below `parent`, and `parent` itself when that leaves it empty.
/// For the start of the only owner of `parent`, after its predecessor died. Answers how many there
/// were.
///
/// # Errors
/// When one cannot be killed or removed; the others are still tried.
pub fn sweep(parent: &str) -> Result<usize, CgroupError> {
    let version = version()?;
    let top = TenancyCgroup::named(version, &join(parent, "")?);
    let mut names = std::collections::BTreeSet::new();
    for dir in top.dirs() {
        collect(&dir, &dir, &mut names)?;
    }
    let mut first_error = None;
    // Children sort after their parents; they have to go first.
    for name in names.iter().rev() {
        let group = TenancyCgroup::named(version, &join(parent, name)?);
        if let Err(error) = group.kill_all().and_then(|()| group.remove()) {
            first_error.get_or_insert(error);
        }
    }
    if let Some(error) = first_error {
        return Err(error);
    }
    top.remove()?;
    Ok(names.len())
}

fn collect(
    top: &Path,
    dir: &Path,
    names: &mut std::collections::BTreeSet<String>,
) -> Result<(), CgroupError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(CgroupError::file("list", dir)(source)),
    };
    for entry in entries {
        let entry = entry.map_err(CgroupError::file("list", dir))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let path = entry.path();
            if let Ok(name) = path.strip_prefix(top) {
                names.insert(name.display().to_string());
            }
            collect(top, &path, names)?;
        }
    }
    Ok(())
}

/// A path below the hierarchies' roots that cannot leave them.
fn join(parent: &str, name: &str) -> Result<String, CgroupError> {
    let path = format!("{}/{name}", parent.trim_matches('/'));
    let path = path.trim_matches('/');
    let ok = !path.is_empty()
        && path
            .split('/')
            .all(|part| !part.is_empty() && part != "." && part != ".." && !part.contains('\0'));
    if ok {
        Ok(path.to_owned())
    } else {
        Err(CgroupError::Name {
            name: path.to_owned(),
        })
    }
}
