//! `trenv snapshot show`: the process tree of a snapshot, its mappings and pages by kind, and what is
//! recorded of the pages that calls touch.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use trenv_config::Config;
use trenv_pool::PAGE_SIZE;
use trenv_snapshot::manifest::Manifest;

use super::recorded::WorkingSets;
use super::stored::{Kind, Stored, all, find, places, unique_and_shared};
use crate::table::{Table, bytes};

/// Mappings and pages of one kind.
#[derive(Debug, Default, Clone, Copy)]
struct Count {
    mappings: u64,
    mapped: u64,
    stored: u64,
    zero: u64,
}

pub async fn run(config: &Config, namespace: &str, name: &str, json: bool) -> anyhow::Result<()> {
    let (pool, templates, saved) = all(config, namespace).await?;
    let info = find(&templates, &saved, name)?;
    let stored = Stored::open(&pool, info)?;
    let mut others = Vec::new();
    for other in templates.iter().filter(|other| other.id != info.id) {
        // One that has just been removed shares nothing.
        if let Ok(reader) = pool.template(&other.id, Some(other.generation)) {
            others.push(places(&reader));
        }
    }
    let (unique, shared) =
        unique_and_shared(&places(&stored.reader), &others.iter().collect::<Vec<_>>());
    let counts: Vec<BTreeMap<Kind, Count>> = (0..stored.manifest.processes.len())
        .map(|index| count(&stored, index))
        .collect();
    let sets = WorkingSets::read(config, info)?;
    let page = PAGE_SIZE as u64;
    if json {
        let report = json!({
            "template": info.id.to_string(),
            "generation": info.generation,
            "key": info.key,
            "bytes": info.pages * page,
            "storedBytes": info.stored_pages * page,
            "uniqueBytes": unique,
            "sharedBytes": shared,
            "processes": processes(&stored.manifest, &counts),
            "workingSets": sets.json(&stored.manifest),
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    println!("template   {}", info.id);
    println!("memory     {}", bytes(info.pages * page));
    println!("stored     {}", bytes(info.stored_pages * page));
    println!("unique     {}", bytes(unique));
    println!("shared     {}", bytes(shared));
    println!();
    let mut table = Table::new([
        "PROCESS",
        "PID",
        "THREADS",
        "MAPPINGS",
        "MEMORY",
        "EXECUTABLE",
    ]);
    for (index, process) in stored.manifest.processes.iter().enumerate() {
        let pages: u64 = process.pages.iter().map(|run| run.pages).sum();
        let indent = "  ".repeat(depth(&stored.manifest, index));
        let comm = process.threads.first().map_or("", |thread| &thread.name);
        table.row([
            format!("{indent}{comm}"),
            process.pid.to_string(),
            process.threads.len().to_string(),
            process.mappings.len().to_string(),
            bytes(pages * page),
            process.exe.clone(),
        ]);
    }
    println!("{table}");
    let mut table = Table::new(["KIND", "MAPPINGS", "MAPPED", "PAGES", "ZERO"]);
    for kind in Kind::ALL {
        let total =
            counts
                .iter()
                .filter_map(|all| all.get(&kind))
                .fold(Count::default(), |sum, one| Count {
                    mappings: sum.mappings + one.mappings,
                    mapped: sum.mapped + one.mapped,
                    stored: sum.stored + one.stored,
                    zero: sum.zero + one.zero,
                });
        table.row([
            kind.name().to_owned(),
            total.mappings.to_string(),
            bytes(total.mapped),
            total.stored.to_string(),
            total.zero.to_string(),
        ]);
    }
    print!("{table}{}", sets.text(&stored.manifest));
    Ok(())
}

fn count(stored: &Stored, index: usize) -> BTreeMap<Kind, Count> {
    let process = &stored.manifest.processes[index];
    let mut counts: BTreeMap<Kind, Count> = BTreeMap::new();
    let mut pages = stored.pages(index).into_iter().peekable();
    for mapping in &process.mappings {
        let count = counts.entry(Kind::of(mapping, process)).or_default();
        count.mappings += 1;
        count.mapped += mapping.end - mapping.start;
        while let Some((.., place)) = pages.next_if(|page| page.0 < mapping.end) {
            count.stored += 1;
            count.zero += u64::from(place.is_none());
        }
    }
    counts
}

/// How many ancestors a process has in the tree.
fn depth(manifest: &Manifest, index: usize) -> usize {
    let parent = |index: &usize| manifest.processes[*index].parent;
    std::iter::successors(parent(&index), parent).count()
}

fn processes(manifest: &Manifest, counts: &[BTreeMap<Kind, Count>]) -> Vec<Value> {
    let all = manifest.processes.iter().zip(counts);
    all.map(|(process, counts)| {
        let kinds: BTreeMap<&str, Value> = counts
            .iter()
            .map(|(kind, count)| {
                let value = json!({
                    "mappings": count.mappings,
                    "mappedBytes": count.mapped,
                    "pages": count.stored,
                    "zeroPages": count.zero,
                });
                (kind.name(), value)
            })
            .collect();
        json!({
            "pid": process.pid,
            "parent": process.parent.map(|parent| manifest.processes[parent].pid),
            "comm": process.threads.first().map(|thread| &thread.name),
            "exe": process.exe,
            "cwd": process.cwd,
            "threads": process.threads.iter().map(|t| json!({ "tid": t.tid, "comm": t.name })).collect::<Vec<_>>(),
            "descriptors": process.descriptors.len(),
            "kinds": kinds,
        })
    })
    .collect()
}
