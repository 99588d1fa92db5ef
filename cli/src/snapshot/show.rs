//! `trenv snapshot show`: the process tree of a snapshot, its mappings, pages by kind, and what is
//! recorded of the pages that calls touch.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Value, json};
use trenv_config::Config;
use trenv_pool::PAGE_SIZE;
use trenv_snapshot::manifest::Manifest;

use super::mappings::{self, Count};
use super::recorded::WorkingSets;
use super::stored::{Kind, Stored, all, find, places, unique_and_shared};
use crate::table::{Table, bytes};

/// How much is shown.
#[derive(Debug, clap::Args)]
pub struct ShowOptions {
    /// Name, or the first digits of the template's id
    snapshot: String,
    /// Print each mapping, as /proc/PID/maps does; JSON has them anyway
    #[arg(long)]
    mappings: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub async fn run(config: &Config, namespace: &str, options: &ShowOptions) -> anyhow::Result<()> {
    let name = &options.snapshot;
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
    let others: Vec<&HashSet<u64>> = others.iter().collect();
    let (unique, shared) = unique_and_shared(&places(&stored.reader), &others);
    let counts: Vec<Vec<Count>> = (0..stored.manifest.processes.len())
        .map(|index| mappings::counts(&stored, index, &others))
        .collect();
    let sets = WorkingSets::read(config, info)?;
    let page = PAGE_SIZE as u64;
    if options.json {
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
    let mut table = Table::new(["KIND", "MAPPINGS", "MAPPED", "PAGES", "ZERO", "SHARED"]);
    let mut total: BTreeMap<Kind, Count> = BTreeMap::new();
    for (process, counts) in stored.manifest.processes.iter().zip(&counts) {
        for (kind, count) in mappings::by_kind(process, counts) {
            total.entry(kind).or_default().add(count);
        }
    }
    for kind in Kind::ALL {
        let total = total.get(&kind).copied().unwrap_or_default();
        table.row([
            kind.name().to_owned(),
            total.mappings.to_string(),
            bytes(total.mapped),
            total.pages.to_string(),
            total.zero.to_string(),
            total.shared.to_string(),
        ]);
    }
    print!("{table}{}", sets.text(&stored.manifest));
    if options.mappings {
        for (process, counts) in stored.manifest.processes.iter().zip(&counts) {
            println!("\nmappings of {} ({})", process.pid, process.exe);
            print!("{}", mappings::text(process, counts));
        }
    }
    Ok(())
}

/// How many ancestors a process has in the tree.
fn depth(manifest: &Manifest, index: usize) -> usize {
    let parent = |index: &usize| manifest.processes[*index].parent;
    std::iter::successors(parent(&index), parent).count()
}

fn processes(manifest: &Manifest, counts: &[Vec<Count>]) -> Vec<Value> {
    let all = manifest.processes.iter().zip(counts);
    all.map(|(process, counts)| {
        let kinds: BTreeMap<&str, Value> = mappings::by_kind(process, counts)
            .into_iter()
            .map(|(kind, count)| {
                let value = json!({
                    "mappings": count.mappings,
                    "mappedBytes": count.mapped,
                    "pages": count.pages,
                    "zeroPages": count.zero,
                    "sharedPages": count.shared,
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
            "mappings": mappings::json(process, counts),
        })
    })
    .collect()
}
