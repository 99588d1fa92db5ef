//! `trenv snapshot list`: what is in the pool, with the names that were given by hand.

use std::collections::HashSet;

use serde_json::json;
use trenv_config::Config;
use trenv_pool::PAGE_SIZE;

use super::stored::{Stored, all, places, unique_and_shared};
use crate::table::{Table, bytes};

pub async fn run(config: &Config, namespace: &str, json: bool) -> anyhow::Result<()> {
    let (pool, templates, saved) = all(config, namespace).await?;
    let opened: Vec<anyhow::Result<Stored>> = templates
        .iter()
        .map(|info| Stored::open(&pool, info))
        .collect();
    let places: Vec<HashSet<u64>> = opened
        .iter()
        .map(|one| {
            one.as_ref()
                .map_or_else(|_| HashSet::new(), |one| places(&one.reader))
        })
        .collect();
    let mut table = Table::new([
        "NAME",
        "PROCESSES",
        "THREADS",
        "MEMORY",
        "STORED",
        "UNIQUE",
        "SHARED",
        "IMAGE",
        "TEMPLATE",
    ]);
    let mut list = Vec::new();
    for (index, (info, opened)) in templates.iter().zip(&opened).enumerate() {
        let id = info.id.to_string();
        let named = saved.iter().find(|one| one.template == id);
        let others: Vec<&HashSet<u64>> = (0..places.len())
            .filter(|other| *other != index)
            .map(|other| &places[other])
            .collect();
        let (unique, shared) = unique_and_shared(&places[index], &others);
        let counts = opened
            .as_ref()
            .map(|one| (one.manifest.processes.len(), one.manifest.threads()));
        let image = named.map(|one| one.record.image.clone());
        let page = PAGE_SIZE as u64;
        list.push(json!({
            "name": named.map(|one| &one.name),
            "template": id,
            "generation": info.generation,
            "created": info.created,
            "image": image,
            "key": info.key,
            "processes": counts.as_ref().ok().map(|one| one.0),
            "threads": counts.as_ref().ok().map(|one| one.1),
            "bytes": info.pages * page,
            "storedBytes": info.stored_pages * page,
            "uniqueBytes": unique,
            "sharedBytes": shared,
            "error": counts.as_ref().err().map(|err| format!("{err:#}")),
        }));
        let count = |value: Option<usize>| value.map_or_else(|| "-".to_owned(), |n| n.to_string());
        table.row([
            named.map_or_else(|| "-".to_owned(), |one| one.name.clone()),
            count(counts.as_ref().ok().map(|one| one.0)),
            count(counts.as_ref().ok().map(|one| one.1)),
            bytes(info.pages * page),
            bytes(info.stored_pages * page),
            bytes(unique),
            bytes(shared),
            image.unwrap_or_else(|| "-".to_owned()),
            id.chars().take(12).collect(),
        ]);
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&list)?);
    } else if table.is_empty() {
        println!("No snapshots.");
    } else {
        print!("{table}");
    }
    Ok(())
}
