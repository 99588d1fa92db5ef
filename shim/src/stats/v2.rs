//! Figures of control groups version 2.

use std::path::Path;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use containerd_shim_protos::protobuf::MessageField;

use super::{number, table};

/// Reads what the enabled controllers offer.
pub fn read(path: &Path) -> Metrics {
    let file = |name: &str| number(&path.join(name)).unwrap_or(0);
    Metrics {
        pids: MessageField::some(PidsStat {
            current: file("pids.current"),
            limit: file("pids.max"),
            ..PidsStat::default()
        }),
        cpu: MessageField::some(cpu(path)),
        memory: MessageField::some(memory(path)),
        memory_events: MessageField::some(events(path)),
        io: MessageField::some(IOStat {
            usage: io(&std::fs::read_to_string(path.join("io.stat")).unwrap_or_default()),
            ..IOStat::default()
        }),
        ..Metrics::default()
    }
}

fn cpu(path: &Path) -> CPUStat {
    let values = table(&path.join("cpu.stat"));
    let value = |name: &str| values.get(name).copied().unwrap_or(0);
    CPUStat {
        usage_usec: value("usage_usec"),
        user_usec: value("user_usec"),
        system_usec: value("system_usec"),
        nr_periods: value("nr_periods"),
        nr_throttled: value("nr_throttled"),
        throttled_usec: value("throttled_usec"),
        ..CPUStat::default()
    }
}

fn memory(path: &Path) -> MemoryStat {
    let values = table(&path.join("memory.stat"));
    let value = |name: &str| values.get(name).copied().unwrap_or(0);
    let limit = |name: &str| number(&path.join(name)).unwrap_or(u64::MAX);
    let file = |name: &str| number(&path.join(name)).unwrap_or(0);
    MemoryStat {
        anon: value("anon"),
        file: value("file"),
        kernel_stack: value("kernel_stack"),
        slab: value("slab"),
        sock: value("sock"),
        shmem: value("shmem"),
        file_mapped: value("file_mapped"),
        file_dirty: value("file_dirty"),
        file_writeback: value("file_writeback"),
        anon_thp: value("anon_thp"),
        inactive_anon: value("inactive_anon"),
        active_anon: value("active_anon"),
        inactive_file: value("inactive_file"),
        active_file: value("active_file"),
        unevictable: value("unevictable"),
        slab_reclaimable: value("slab_reclaimable"),
        slab_unreclaimable: value("slab_unreclaimable"),
        pgfault: value("pgfault"),
        pgmajfault: value("pgmajfault"),
        thp_fault_alloc: value("thp_fault_alloc"),
        thp_collapse_alloc: value("thp_collapse_alloc"),
        usage: file("memory.current"),
        usage_limit: limit("memory.max"),
        swap_usage: file("memory.swap.current"),
        swap_limit: limit("memory.swap.max"),
        max_usage: file("memory.peak"),
        ..MemoryStat::default()
    }
}

fn events(path: &Path) -> MemoryEvents {
    let values = table(&path.join("memory.events"));
    let value = |name: &str| values.get(name).copied().unwrap_or(0);
    MemoryEvents {
        low: value("low"),
        high: value("high"),
        max: value("max"),
        oom: value("oom"),
        oom_kill: value("oom_kill"),
        ..MemoryEvents::default()
    }
}

/// Lines "major:minor name=value ...".
fn io(text: &str) -> Vec<IOEntry> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (major, minor) = words.next()?.split_once(':')?;
            let mut entry = IOEntry {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                ..IOEntry::default()
            };
            for (name, value) in words.filter_map(|word| word.split_once('=')) {
                let value = value.parse().unwrap_or(0);
                match name {
                    "rbytes" => entry.rbytes = value,
                    "wbytes" => entry.wbytes = value,
                    "rios" => entry.rios = value,
                    "wios" => entry.wios = value,
                    _ => {}
                }
            }
            Some(entry)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn io_figures_are_read_by_device() {
        let entries = super::io("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5\n\nbroken\n");
        assert_eq!(entries.len(), 1);
        assert_eq!(
            (entries[0].major, entries[0].rbytes, entries[0].wios),
            (8, 1, 4)
        );
    }
}
