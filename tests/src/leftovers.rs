//! What a machine has made and must take away again.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Everything found that belongs to one machine of the tests, by kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leftovers(BTreeMap<&'static str, Vec<String>>);

/// By what a machine's things are told from everybody else's.
#[derive(Debug, Clone)]
pub struct Marks {
    /// Its directory: in command lines, environments, mounts.
    pub directory: PathBuf,
    /// The parent of its cgroups.
    pub cgroup_parent: String,
    /// Its bridge.
    pub bridge: String,
}

impl Leftovers {
    /// Looks at the whole system.
    #[must_use]
    pub fn find(marks: &Marks) -> Self {
        let mut found = BTreeMap::new();
        found.insert("processes", processes(marks));
        found.insert("mounts", mounts(&marks.directory));
        found.insert("cgroups", cgroups(&marks.cgroup_parent));
        found.insert("network", network(&marks.bridge));
        let records = marks.directory.join("state/network");
        let mut addresses = files(&records);
        // What the address plugin keeps of its own.
        addresses.retain(|path| !path.ends_with("/lock") && !path.contains("/last_reserved_ip."));
        found.insert("addresses", addresses);
        found.retain(|_, list| !list.is_empty());
        Self(found)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn list(&self, kind: &str) -> &[String] {
        self.0.get(kind).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn mounts(&self) -> &[String] {
        self.list("mounts")
    }

    pub(crate) fn cgroups(&self) -> &[String] {
        self.list("cgroups")
    }

    /// Ids of the processes found.
    #[must_use]
    pub fn pids(&self) -> Vec<i32> {
        self.list("processes")
            .iter()
            .filter_map(|line| line.split(' ').next()?.parse().ok())
            .collect()
    }

    /// Ids of the processes found that run a program; the kernel keeps 15 bytes of its name.
    #[must_use]
    pub fn pids_of(&self, program: &str) -> Vec<i32> {
        let short = program.get(..15).unwrap_or(program);
        self.list("processes")
            .iter()
            .filter_map(|line| {
                let mut words = line.split(' ');
                let pid = words.next()?.parse().ok()?;
                (words.next() == Some(short)).then_some(pid)
            })
            .collect()
    }

    /// Whether there is no more of anything than in `other`.
    #[must_use]
    pub fn within(&self, other: &Self) -> bool {
        let mut kinds = self.0.keys();
        kinds.all(|kind| self.count(kind) <= other.count(kind))
    }

    /// How many things of a kind there are.
    #[must_use]
    pub fn count(&self, kind: &str) -> usize {
        self.list(kind).len()
    }
}

impl std::fmt::Display for Leftovers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (kind, list) in &self.0 {
            writeln!(f, "{kind} ({}):", list.len())?;
            for item in list {
                writeln!(f, "  {item}")?;
            }
        }
        Ok(())
    }
}

/// Processes that name the directory, or sit in a cgroup of the machine.
fn processes(marks: &Marks) -> Vec<String> {
    let own = std::process::id().to_string();
    let directory = marks.directory.to_string_lossy();
    let group = format!("/{}/", marks.cgroup_parent);
    let mut found = Vec::new();
    for entry in entries(Path::new("/proc")) {
        let pid = entry.file_name().unwrap_or_default().to_string_lossy();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) || pid == own {
            continue;
        }
        let read = |name: &str| {
            let bytes = fs::read(entry.join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).replace('\0', " ")
        };
        let command = read("cmdline");
        let ours = command.contains(&*directory)
            || read("environ").contains(&*directory)
            || read("cgroup")
                .lines()
                .any(|line| format!("{line}/").contains(&group));
        // The dead that wait to be reaped by their parent hold nothing.
        if ours && !read("stat").contains(") Z ") {
            found.push(format!("{pid} {} {command}", read("comm").trim()));
        }
    }
    found
}

fn mounts(directory: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|target| Path::new(target).starts_with(directory))
        // A machine's own file system goes last.
        .filter(|target| Path::new(target) != directory)
        .map(str::to_owned)
        .collect()
}

/// Directories of the parent in every hierarchy.
fn cgroups(parent: &str) -> Vec<String> {
    let mut roots = entries(Path::new("/sys/fs/cgroup"));
    roots.push("/sys/fs/cgroup".into());
    let mut found = Vec::new();
    for root in roots {
        collect(&root.join(parent), &mut found);
    }
    found
}

fn collect(directory: &Path, found: &mut Vec<String>) {
    if !directory.is_dir() {
        return;
    }
    found.push(directory.display().to_string());
    for inner in entries(directory) {
        collect(&inner, found);
    }
}

/// The bridge and what is plugged into it.
fn network(bridge: &str) -> Vec<String> {
    let path = Path::new("/sys/class/net").join(bridge);
    if !path.exists() {
        return Vec::new();
    }
    let mut found = vec![bridge.to_owned()];
    for port in entries(&path.join("brif")) {
        found.push(port.display().to_string());
    }
    found
}

fn files(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in entries(directory) {
        if entry.is_dir() {
            found.extend(files(&entry));
        } else {
            found.push(entry.display().to_string());
        }
    }
    found
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_that_names_the_directory_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let marks = Marks {
            directory: directory.path().into(),
            cgroup_parent: "no-such-parent-of-ours".into(),
            bridge: "no-such-bridge".into(),
        };
        assert!(Leftovers::find(&marks).is_empty());
        let mut child = Command::new("cat")
            .env("MARK", directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Only a program that runs has its environment in place: `spawn` returns in the middle of
        // execve, as soon as the new process has left the memory of this one.
        child.stdin.as_mut().unwrap().write_all(b"!").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        assert_eq!(Leftovers::find(&marks).count("processes"), 1);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(Leftovers::find(&marks).is_empty());
    }
}
