//! Figures of control groups version 1.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use containerd_shim_protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, MemoryEntry, MemoryOomControl, MemoryStat, Metrics,
    PidsStat, Throttle,
};
use containerd_shim_protos::protobuf::MessageField;

use super::{number, table};

/// Nanoseconds of one tick in cpuacct.stat.
const TICK: u64 = 10_000_000;

/// Reads what the mounted controllers offer.
pub fn read(paths: &HashMap<String, PathBuf>) -> Metrics {
    let part = |controller: &str| paths.get(controller).map(PathBuf::as_path);
    let mut metrics = Metrics::default();
    if let Some(path) = part("pids") {
        metrics.pids = MessageField::some(PidsStat {
            current: number(&path.join("pids.current")).unwrap_or(0),
            limit: number(&path.join("pids.max")).unwrap_or(0),
            ..PidsStat::default()
        });
    }
    metrics.cpu = MessageField::some(cpu(part("cpu"), part("cpuacct")));
    if let Some(path) = part("memory") {
        metrics.memory = MessageField::some(memory(path));
        let oom = table(&path.join("memory.oom_control"));
        let oom = |name: &str| oom.get(name).copied().unwrap_or(0);
        metrics.memory_oom_control = MessageField::some(MemoryOomControl {
            oom_kill_disable: oom("oom_kill_disable"),
            under_oom: oom("under_oom"),
            oom_kill: oom("oom_kill"),
            ..MemoryOomControl::default()
        });
    }
    if let Some(path) = part("blkio") {
        metrics.blkio = MessageField::some(BlkIOStat {
            io_service_bytes_recursive: throttled(
                &path.join("blkio.throttle.io_service_bytes_recursive"),
            ),
            io_serviced_recursive: throttled(&path.join("blkio.throttle.io_serviced_recursive")),
            ..BlkIOStat::default()
        });
    }
    metrics
}

fn cpu(cpu: Option<&Path>, account: Option<&Path>) -> CPUStat {
    let mut stat = CPUStat::default();
    if let Some(path) = account {
        let ticks = table(&path.join("cpuacct.stat"));
        let time = |name: &str| ticks.get(name).copied().unwrap_or(0) * TICK;
        let per_cpu =
            std::fs::read_to_string(path.join("cpuacct.usage_percpu")).unwrap_or_default();
        stat.usage = MessageField::some(CPUUsage {
            total: number(&path.join("cpuacct.usage")).unwrap_or(0),
            kernel: time("system"),
            user: time("user"),
            per_cpu: per_cpu
                .split_whitespace()
                .filter_map(|value| value.parse().ok())
                .collect(),
            ..CPUUsage::default()
        });
    }
    if let Some(path) = cpu {
        let values = table(&path.join("cpu.stat"));
        let value = |name: &str| values.get(name).copied().unwrap_or(0);
        stat.throttling = MessageField::some(Throttle {
            periods: value("nr_periods"),
            throttled_periods: value("nr_throttled"),
            throttled_time: value("throttled_time"),
            ..Throttle::default()
        });
    }
    stat
}

fn memory(path: &Path) -> MemoryStat {
    let values = table(&path.join("memory.stat"));
    let value = |name: &str| values.get(name).copied().unwrap_or(0);
    let entry = |prefix: &str| {
        let file = |suffix: &str| number(&path.join(format!("{prefix}.{suffix}"))).unwrap_or(0);
        MessageField::some(MemoryEntry {
            limit: file("limit_in_bytes"),
            usage: file("usage_in_bytes"),
            max: file("max_usage_in_bytes"),
            failcnt: file("failcnt"),
            ..MemoryEntry::default()
        })
    };
    MemoryStat {
        cache: value("cache"),
        rss: value("rss"),
        rss_huge: value("rss_huge"),
        mapped_file: value("mapped_file"),
        dirty: value("dirty"),
        writeback: value("writeback"),
        pg_pg_in: value("pgpgin"),
        pg_pg_out: value("pgpgout"),
        pg_fault: value("pgfault"),
        pg_maj_fault: value("pgmajfault"),
        inactive_anon: value("inactive_anon"),
        active_anon: value("active_anon"),
        inactive_file: value("inactive_file"),
        active_file: value("active_file"),
        unevictable: value("unevictable"),
        hierarchical_memory_limit: value("hierarchical_memory_limit"),
        hierarchical_swap_limit: value("hierarchical_memsw_limit"),
        total_cache: value("total_cache"),
        total_rss: value("total_rss"),
        total_rss_huge: value("total_rss_huge"),
        total_mapped_file: value("total_mapped_file"),
        total_dirty: value("total_dirty"),
        total_writeback: value("total_writeback"),
        total_pg_pg_in: value("total_pgpgin"),
        total_pg_pg_out: value("total_pgpgout"),
        total_pg_fault: value("total_pgfault"),
        total_pg_maj_fault: value("total_pgmajfault"),
        total_inactive_anon: value("total_inactive_anon"),
        total_active_anon: value("total_active_anon"),
        total_inactive_file: value("total_inactive_file"),
        total_active_file: value("total_active_file"),
        total_unevictable: value("total_unevictable"),
        usage: entry("memory"),
        swap: entry("memory.memsw"),
        kernel: entry("memory.kmem"),
        kernel_tcp: entry("memory.kmem.tcp"),
        ..MemoryStat::default()
    }
}

/// Lines "major:minor operation value".
fn throttled(path: &Path) -> Vec<BlkIOEntry> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let [device, op, value] = line.split(' ').collect::<Vec<_>>()[..] else {
                return None;
            };
            let (major, minor) = device.split_once(':')?;
            Some(BlkIOEntry {
                op: op.to_owned(),
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                value: value.parse().ok()?,
                ..BlkIOEntry::default()
            })
        })
        .collect()
}
