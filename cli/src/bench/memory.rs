//! The memory of idle instances of one function, as the kernel accounts for it.

use std::collections::{BTreeMap, BTreeSet};

use procfs::process::{Process, all_processes};
use serde::Serialize;

use crate::table::{Table, bytes};

/// What some instances of one function cost.
#[derive(Debug, Default, Clone, Serialize)]
pub struct MemoryFigures {
    pub instances: u64,
    /// The function's memory image as it was dumped.
    pub image_kb: u64,
    /// Resident set of one instance: what it would cost without sharing.
    pub resident_kb_each: u64,
    /// Pages that one instance has to itself: what it wrote.
    pub private_kb_each: u64,
    /// Proportional share of all instances and of what holds the template's pages, together.
    pub pss_total_kb: u64,
    /// Proportional share of the processes that hold the template's pages: the zygote, and the clones
    /// that wait for their starts.
    pub template_pss_kb: u64,
    /// What the tenancies' cgroups are charged.
    pub cgroup_total_kb: u64,
    /// `pss_total_kb` by (`image_kb` + `instances` x `private_kb_each`).
    pub ratio: Option<f64>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Usage {
    rss: u64,
    pss: u64,
    private: u64,
}

/// Weighs the sandboxes whose pid 1 are given, with what holds their template's memory.
pub fn weigh(init_pids: &[i32], holders: &[i32], image_kb: u64) -> anyhow::Result<MemoryFigures> {
    let instances = u64::try_from(init_pids.len())?;
    let mut all = Usage::default();
    let mut groups = BTreeSet::new();
    for pid in members(init_pids)? {
        let Ok(process) = Process::new(pid) else {
            continue;
        };
        let usage = usage(&process);
        all.rss += usage.rss;
        all.pss += usage.pss;
        all.private += usage.private;
        // Pid 1 sits in a cgroup beside the tenancy's.
        if !init_pids.contains(&pid) {
            groups.extend(memory_group(&process));
        }
    }
    let template: u64 = holders
        .iter()
        .filter_map(|pid| Process::new(*pid).ok())
        .map(|process| usage(&process).pss)
        .sum();
    let pss_total_kb = all.pss + template;
    let private_kb_each = all.private / instances.max(1);
    let expected = image_kb + instances * private_kb_each;
    Ok(MemoryFigures {
        instances,
        image_kb,
        resident_kb_each: all.rss / instances.max(1),
        private_kb_each,
        pss_total_kb,
        template_pss_kb: template,
        cgroup_total_kb: groups.iter().filter_map(|path| charged(path)).sum::<u64>() / 1024,
        ratio: (expected > 0).then(|| pss_total_kb as f64 / expected as f64),
    })
}

/// Page faults of a sandbox's function since its processes were made: all of them but pid 1, with
/// those that have ended and that a parent has waited for. A fault that userfaultfd serves counts.
pub fn faults(init_pid: i32) -> anyhow::Result<u64> {
    let mut faults = 0;
    for pid in members(&[init_pid])? {
        if pid == init_pid {
            continue;
        }
        if let Ok(stat) = Process::new(pid).and_then(|process| process.stat()) {
            faults += stat.minflt + stat.cminflt + stat.majflt + stat.cmajflt;
        }
    }
    Ok(faults)
}

/// All processes of the sandboxes, by their pid namespace.
fn members(init_pids: &[i32]) -> anyhow::Result<Vec<i32>> {
    let namespace = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let ours: Vec<_> = init_pids.iter().filter_map(|pid| namespace(*pid)).collect();
    Ok(all_processes()?
        .flatten()
        .map(|process| process.pid())
        .filter(|pid| namespace(*pid).is_some_and(|found| ours.contains(&found)))
        .collect())
}

/// The processes that hold a template's memory: its zygote, which sits in the cgroup that the shim
/// names after it, and the clones that wait for their starts. Agents, the zygote's children, have the
/// zygote's memory, not more of it; a clone is an agent's child.
pub fn holders(template: &str) -> anyhow::Result<Vec<i32>> {
    let short: String = template.chars().take(16).collect();
    let name = format!("/zygotes/{short}");
    let mut parents = BTreeMap::new();
    let mut members = BTreeSet::new();
    for process in all_processes()?.flatten() {
        let Ok(stat) = process.stat() else { continue };
        parents.insert(stat.pid, stat.ppid);
        let groups = process.cgroups().map(|groups| groups.0).unwrap_or_default();
        if groups.iter().any(|group| group.pathname.contains(&name)) {
            members.insert(stat.pid);
        }
    }
    let parent = |pid: &i32| parents.get(pid).copied().unwrap_or_default();
    let is_zygote = |pid: i32| members.contains(&pid) && !members.contains(&parent(&pid));
    Ok(parents
        .keys()
        .copied()
        .filter(|pid| is_zygote(*pid) || is_zygote(parent(&parent(pid))))
        .collect())
}

/// What the largest of these processes has on huge pages.
pub fn huge_kb(pids: &[i32]) -> u64 {
    let rollups = pids
        .iter()
        .filter_map(|pid| Process::new(*pid).ok()?.smaps_rollup().ok());
    let huge = rollups.map(|rollup| {
        let maps = rollup.memory_map_rollup.into_iter();
        let kb = maps.filter_map(|map| map.extension.map.get("AnonHugePages").copied());
        kb.sum::<u64>() / 1024
    });
    huge.max().unwrap_or(0)
}

fn usage(process: &Process) -> Usage {
    let Ok(rollup) = process.smaps_rollup() else {
        return Usage::default();
    };
    let mut usage = Usage::default();
    for map in &rollup.memory_map_rollup {
        let kb = |key: &str| map.extension.map.get(key).copied().unwrap_or(0) / 1024;
        usage.rss += kb("Rss");
        usage.pss += kb("Pss");
        usage.private += kb("Private_Dirty") + kb("Private_Clean");
    }
    usage
}

/// The memory cgroup of a process, as a directory.
fn memory_group(process: &Process) -> Option<String> {
    for group in process.cgroups().ok()?.0 {
        if group.controllers.iter().any(|name| name == "memory") {
            return Some(format!("/sys/fs/cgroup/memory{}", group.pathname));
        }
        if group.hierarchy == 0 {
            let path = format!("/sys/fs/cgroup{}", group.pathname);
            if std::path::Path::new(&path).join("memory.current").exists() {
                return Some(path);
            }
        }
    }
    None
}

fn charged(path: &str) -> Option<u64> {
    ["memory.current", "memory.usage_in_bytes"]
        .iter()
        .find_map(|file| std::fs::read_to_string(format!("{path}/{file}")).ok())
        .and_then(|text| text.trim().parse().ok())
}

/// The figures of all functions as a table.
pub fn table(figures: &BTreeMap<String, MemoryFigures>) -> Table {
    let mut table = Table::new([
        "MEMORY OF IDLE INSTANCES",
        "N",
        "IMAGE",
        "OWN PAGES EACH",
        "TOGETHER",
        "N X ONE",
        "RATIO",
    ]);
    for (name, figure) in figures {
        table.row([
            name.clone(),
            figure.instances.to_string(),
            bytes(figure.image_kb * 1024),
            bytes(figure.private_kb_each * 1024),
            bytes(figure.pss_total_kb * 1024),
            bytes(figure.resident_kb_each * figure.instances * 1024),
            figure
                .ratio
                .map_or("-".into(), |ratio| format!("{ratio:.2}")),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_weighs_something() {
        let own = Process::myself().unwrap();
        let usage = usage(&own);
        assert!(usage.rss > 0 && usage.pss > 0);
        assert!(usage.private <= usage.rss);
    }

    #[test]
    fn processes_that_are_gone_weigh_nothing() {
        let figures = weigh(&[i32::MAX - 1], &[], 100).unwrap();
        assert_eq!(figures.pss_total_kb, 0);
        assert_eq!(figures.image_kb, 100);
    }
}
