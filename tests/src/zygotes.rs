//! The memory of templates' zygotes, by page frames.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::Context;
use serde_json::Value;

use crate::machine::Machine;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

impl Machine {
    /// The zygote of a function, as `describe` tells about it.
    ///
    /// # Errors
    /// When it has no template, or none stands.
    pub fn zygote(&self, function: &Value) -> anyhow::Result<i32> {
        let id = function["templateId"].as_str().context("no template")?;
        let group = format!("/zygotes/{}", id.get(..16).context("a short id")?);
        let belongs = |pid: &i32| {
            let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            groups.contains(&group)
        };
        let pids = self.leftovers().pids();
        pids.into_iter().find(belongs).context("no zygote")
    }

    /// Page frames of a function's zygote, without those of files.
    ///
    /// # Errors
    /// As [`Machine::zygote`], or when the kernel does not tell.
    pub fn zygote_frames(&self, function: &Value) -> anyhow::Result<BTreeSet<u64>> {
        let pid = self.zygote(function)?;
        let map = File::open(format!("/proc/{pid}/pagemap"))?;
        let mut frames = BTreeSet::new();
        for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
            let (range, _) = line.split_once(' ').context("no range")?;
            let (start, end) = range.split_once('-').context("no range")?;
            let (start, end) = (
                u64::from_str_radix(start, 16)?,
                u64::from_str_radix(end, 16)?,
            );
            if start >> 47 != 0 {
                continue;
            }
            let mut entries = vec![0; usize::try_from((end - start) / PAGE * 8)?];
            map.read_exact_at(&mut entries, start / PAGE * 8)?;
            for entry in entries.chunks_exact(8) {
                let entry = u64::from_ne_bytes(entry.try_into()?);
                if entry >> 63 == 1 && entry >> 61 & 1 == 0 {
                    frames.insert(entry & ((1 << 55) - 1));
                }
            }
        }
        Ok(frames)
    }
}
