//! `trenv snapshot diff`: how much of the memory of two snapshots is equal, page by page.

use std::collections::BTreeMap;

use serde_json::json;
use trenv_config::Config;
use trenv_pool::PAGE_SIZE;
use trenv_snapshot::manifest::Process;

use super::stored::{Stored, all, find, name_of};
use crate::table::Table;

/// Pages of what both processes call by one name.
#[derive(Debug, Default, Clone, Copy)]
struct Pages {
    equal: u64,
    different: u64,
    first_only: u64,
    second_only: u64,
}

impl Pages {
    fn add(&mut self, other: Self) {
        self.equal += other.equal;
        self.different += other.different;
        self.first_only += other.first_only;
        self.second_only += other.second_only;
    }

    fn json(self) -> serde_json::Value {
        json!({
            "equalPages": self.equal,
            "differentPages": self.different,
            "firstOnlyPages": self.first_only,
            "secondOnlyPages": self.second_only,
        })
    }

    fn cells(self) -> [String; 4] {
        [
            self.equal,
            self.different,
            self.first_only,
            self.second_only,
        ]
        .map(|n| n.to_string())
    }
}

pub async fn run(
    config: &Config,
    namespace: &str,
    names: [&str; 2],
    json: bool,
) -> anyhow::Result<()> {
    let (pool, templates, saved) = all(config, namespace).await?;
    let [first, second] =
        names.map(|name| find(&templates, &saved, name).and_then(|info| Stored::open(&pool, info)));
    let (first, second) = (first?, second?);
    let mut pids: Vec<i32> = Vec::new();
    for process in first
        .manifest
        .processes
        .iter()
        .chain(&second.manifest.processes)
    {
        if !pids.contains(&process.pid) {
            pids.push(process.pid);
        }
    }
    let mut total = Pages::default();
    let mut rows = Vec::new();
    for pid in pids {
        for (mapping, pages) in compare(&first, &second, pid)? {
            total.add(pages);
            rows.push((pid, mapping, pages));
        }
    }
    if json {
        let mappings: Vec<_> = rows
            .iter()
            .map(|(pid, mapping, pages)| {
                let mut row = pages.json();
                row["pid"] = (*pid).into();
                row["mapping"] = mapping.as_str().into();
                row
            })
            .collect();
        let mut report = total.json();
        report["mappings"] = mappings.into();
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    let mut table = Table::new([
        "MAPPING",
        "PID",
        "EQUAL",
        "DIFFERENT",
        "FIRST ONLY",
        "SECOND ONLY",
    ]);
    for (pid, mapping, pages) in rows {
        let [equal, different, first, second] = pages.cells();
        table.row([mapping, pid.to_string(), equal, different, first, second]);
    }
    let [equal, different, first, second] = total.cells();
    table.row([
        "all".to_owned(),
        "-".to_owned(),
        equal,
        different,
        first,
        second,
    ]);
    print!("{table}");
    Ok(())
}

/// Compares the processes with one pid, by address.
fn compare(first: &Stored, second: &Stored, pid: i32) -> anyhow::Result<BTreeMap<String, Pages>> {
    let index = |stored: &Stored| stored.manifest.processes.iter().position(|p| p.pid == pid);
    let pages = |stored: &Stored, index: Option<usize>| -> BTreeMap<u64, (u64, Option<u64>)> {
        let all = index.map(|index| stored.pages(index)).unwrap_or_default();
        all.into_iter()
            .map(|(at, number, place)| (at, (number, place)))
            .collect()
    };
    let (of_first, of_second) = (index(first), index(second));
    let (ours, mut theirs) = (pages(first, of_first), pages(second, of_second));
    let mut found: BTreeMap<String, Pages> = BTreeMap::new();
    for (address, (number, place)) in ours {
        let process = of_first.map(|index| &first.manifest.processes[index]);
        let count = found.entry(mapping_at(process, address)).or_default();
        match theirs.remove(&address) {
            None => count.first_only += 1,
            // One place in the pool; equal pages may have two.
            Some((_, other)) if other == place => count.equal += 1,
            Some((other, _)) => {
                let (mut a, mut b) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
                first.reader.read_pages(number, &mut a)?;
                second.reader.read_pages(other, &mut b)?;
                if a == b {
                    count.equal += 1;
                } else {
                    count.different += 1;
                }
            }
        }
    }
    for address in theirs.into_keys() {
        let process = of_second.map(|index| &second.manifest.processes[index]);
        found
            .entry(mapping_at(process, address))
            .or_default()
            .second_only += 1;
    }
    Ok(found)
}

fn mapping_at(process: Option<&Process>, address: u64) -> String {
    let found = process.and_then(|process| {
        let after = process.mappings.partition_point(|m| m.end <= address);
        Some(name_of(process.mappings.get(after)?, process))
    });
    found.unwrap_or_default()
}
