//! What a tenancy uses, in the same figures for both versions.

use std::{collections::BTreeMap, path::Path};

use super::{CgroupError, kill::is_gone, v1, v2};

/// Figures of one tenancy. A figure that the kernel does not give is zero, a limit `None`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stats {
    pub memory_bytes: u64,
    pub memory_peak_bytes: u64,
    pub memory_limit_bytes: Option<u64>,
    /// memory.stat as the kernel names its lines.
    pub memory: BTreeMap<String, u64>,
    pub oom_kills: u64,
    pub cpu_ns: u64,
    pub cpu_user_ns: u64,
    pub cpu_system_ns: u64,
    pub cpu_periods: u64,
    pub cpu_throttled_periods: u64,
    pub cpu_throttled_ns: u64,
    pub pids: u64,
    pub pids_limit: Option<u64>,
    pub block_io: Vec<BlockIo>,
}

/// Bytes and operations on one block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockIo {
    pub major: u64,
    pub minor: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

fn text(dir: &Path, file: &str) -> Result<Option<String>, CgroupError> {
    let path = dir.join(file);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if is_gone(&error) || error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
        Err(source) => Err(CgroupError::file("read", path)(source)),
    }
}

/// A file that holds one number; "max" and values that v1 means as none give `None`.
fn number(dir: &Path, file: &str) -> Result<Option<u64>, CgroupError> {
    Ok(text(dir, file)?
        .and_then(|text| text.trim().parse().ok())
        .filter(|value| *value < 1 << 60))
}

/// A file of "name number" lines.
fn table(dir: &Path, file: &str) -> Result<BTreeMap<String, u64>, CgroupError> {
    Ok(text(dir, file)?
        .unwrap_or_default()
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        })
        .collect())
}

fn get(table: &BTreeMap<String, u64>, name: &str) -> u64 {
    table.get(name).copied().unwrap_or(0)
}

pub(super) fn read_v1(group: &v1::Group) -> Result<Stats, CgroupError> {
    let mut stats = Stats::default();
    if let Some(dir) = group.dir_of("memory") {
        stats.memory_bytes = number(&dir, "memory.usage_in_bytes")?.unwrap_or(0);
        stats.memory_peak_bytes = number(&dir, "memory.max_usage_in_bytes")?.unwrap_or(0);
        stats.memory_limit_bytes = number(&dir, "memory.limit_in_bytes")?;
        stats.memory = table(&dir, "memory.stat")?;
        stats.oom_kills = get(&table(&dir, "memory.oom_control")?, "oom_kill");
    }
    if let Some(dir) = group.dir_of("cpuacct") {
        stats.cpu_ns = number(&dir, "cpuacct.usage")?.unwrap_or(0);
        stats.cpu_user_ns = number(&dir, "cpuacct.usage_user")?.unwrap_or(0);
        stats.cpu_system_ns = number(&dir, "cpuacct.usage_sys")?.unwrap_or(0);
    }
    if let Some(dir) = group.dir_of("cpu") {
        let cpu = table(&dir, "cpu.stat")?;
        stats.cpu_periods = get(&cpu, "nr_periods");
        stats.cpu_throttled_periods = get(&cpu, "nr_throttled");
        stats.cpu_throttled_ns = get(&cpu, "throttled_time");
    }
    if let Some(dir) = group.dir_of("pids") {
        stats.pids = number(&dir, "pids.current")?.unwrap_or(0);
        stats.pids_limit = number(&dir, "pids.max")?;
    }
    if let Some(dir) = group.dir_of("blkio") {
        let bytes = text(&dir, "blkio.throttle.io_service_bytes")?.unwrap_or_default();
        let operations = text(&dir, "blkio.throttle.io_serviced")?.unwrap_or_default();
        stats.block_io = block_io_v1(&bytes, &operations);
    }
    Ok(stats)
}

/// Lines such as "8:0 Read 4096".
fn block_io_v1(bytes: &str, operations: &str) -> Vec<BlockIo> {
    let mut devices: BTreeMap<(u64, u64), BlockIo> = BTreeMap::new();
    for (text, counts_bytes) in [(bytes, true), (operations, false)] {
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let [device, what, value] = words[..] else {
                continue;
            };
            let (Some((major, minor)), Ok(value)) = (device_number(device), value.parse::<u64>())
            else {
                continue;
            };
            let entry = devices.entry((major, minor)).or_insert(BlockIo {
                major,
                minor,
                ..BlockIo::default()
            });
            match (what, counts_bytes) {
                ("Read", true) => entry.read_bytes = value,
                ("Write", true) => entry.written_bytes = value,
                ("Read", false) => entry.reads = value,
                ("Write", false) => entry.writes = value,
                _ => {}
            }
        }
    }
    devices.into_values().collect()
}

fn device_number(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

pub(super) fn read_v2(group: &v2::Group) -> Result<Stats, CgroupError> {
    let dir = group.dir();
    let cpu = table(dir, "cpu.stat")?;
    Ok(Stats {
        memory_bytes: number(dir, "memory.current")?.unwrap_or(0),
        memory_peak_bytes: number(dir, "memory.peak")?.unwrap_or(0),
        memory_limit_bytes: number(dir, "memory.max")?,
        memory: table(dir, "memory.stat")?,
        oom_kills: get(&table(dir, "memory.events")?, "oom_kill"),
        cpu_ns: get(&cpu, "usage_usec") * 1000,
        cpu_user_ns: get(&cpu, "user_usec") * 1000,
        cpu_system_ns: get(&cpu, "system_usec") * 1000,
        cpu_periods: get(&cpu, "nr_periods"),
        cpu_throttled_periods: get(&cpu, "nr_throttled"),
        cpu_throttled_ns: get(&cpu, "throttled_usec") * 1000,
        pids: number(dir, "pids.current")?.unwrap_or(0),
        pids_limit: number(dir, "pids.max")?,
        block_io: block_io_v2(&text(dir, "io.stat")?.unwrap_or_default()),
    })
}

/// Lines such as "8:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0".
fn block_io_v2(text: &str) -> Vec<BlockIo> {
    text.lines()
        .filter_map(|line| {
            let (device, fields) = line.split_once(' ')?;
            let (major, minor) = device_number(device)?;
            let field = |name: &str| {
                fields
                    .split(' ')
                    .filter_map(|field| field.split_once('='))
                    .find(|(key, _)| *key == name)
                    .and_then(|(_, value)| value.parse().ok())
                    .unwrap_or(0)
            };
            Some(BlockIo {
                major,
                minor,
                read_bytes: field("rbytes"),
                written_bytes: field("wbytes"),
                reads: field("rios"),
                writes: field("wios"),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_io_reads_the_same_from_both_versions() {
        let v1 = block_io_v1(
            "8:0 Read 4096\n8:0 Write 512\n8:0 Total 4608\nTotal 4608\n",
            "8:0 Read 2\n8:0 Write 1\n",
        );
        let v2 = block_io_v2("8:0 rbytes=4096 wbytes=512 rios=2 wios=1 dbytes=0 dios=0\n");
        assert_eq!(v1, v2);
        assert_eq!(v1[0].written_bytes, 512);
    }
}
