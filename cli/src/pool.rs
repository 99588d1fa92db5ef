//! `trenv pool`: the templates that are stored on this machine.

use anyhow::Context;
use serde_json::json;
use trenv_config::Config;
use trenv_pool::{PAGE_SIZE, Pool, Source, Usage};

use crate::table::{Table, bytes};

#[derive(Debug, clap::Args)]
pub struct PoolArguments {
    #[command(subcommand)]
    verb: PoolVerb,
}

#[derive(Debug, clap::Subcommand)]
enum PoolVerb {
    /// List the templates
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show how full the pool is
    Stat {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one template: its key and where its pages are
    Show {
        /// Template, or the first digits of its id
        id: String,
    },
}

pub fn run(config: &Config, arguments: &PoolArguments) -> anyhow::Result<()> {
    let path = config.pool_path();
    let pool = Pool::open(&path)?;
    match &arguments.verb {
        PoolVerb::Ls { json } => list(&pool, *json),
        PoolVerb::Stat { json } => stat(&pool, *json),
        PoolVerb::Show { id } => show(&pool, id),
    }
}

fn list(pool: &Pool, json: bool) -> anyhow::Result<()> {
    let templates = pool.usage()?;
    if json {
        let list: Vec<_> = templates.iter().map(usage_json).collect();
        println!("{}", serde_json::to_string_pretty(&list)?);
        return Ok(());
    }
    let mut table = Table::new([
        "TEMPLATE",
        "GENERATION",
        "MEMORY",
        "STORED",
        "UNIQUE",
        "KEY",
    ]);
    for Usage {
        info,
        unshared_bytes,
    } in &templates
    {
        table.row([
            info.id.to_string().chars().take(12).collect(),
            info.generation.to_string(),
            bytes(info.pages * PAGE_SIZE as u64),
            bytes(info.stored_pages * PAGE_SIZE as u64),
            bytes(*unshared_bytes),
            info.key
                .lines()
                .next()
                .unwrap_or_default()
                .chars()
                .take(60)
                .collect(),
        ]);
    }
    if table.is_empty() {
        println!("No templates.");
    } else {
        print!("{table}");
    }
    Ok(())
}

fn usage_json(usage: &Usage) -> serde_json::Value {
    let info = &usage.info;
    json!({
        "id": info.id.to_string(),
        "generation": info.generation,
        "key": info.key,
        "bytes": info.pages * PAGE_SIZE as u64,
        "storedBytes": info.stored_pages * PAGE_SIZE as u64,
        "uniqueBytes": usage.unshared_bytes,
        "manifestBytes": info.manifest_bytes,
        "created": info.created,
    })
}

fn stat(pool: &Pool, json: bool) -> anyhow::Result<()> {
    let stat = pool.stat()?;
    let counts = [
        ("size", stat.size),
        ("free", stat.free_bytes),
        ("logical", stat.logical_bytes),
        ("stored", stat.stored_bytes),
        ("shared", stat.shared_bytes),
        ("zero", stat.zero_bytes),
        ("manifests", stat.manifest_bytes),
    ];
    if json {
        let mut report = json!({
            "path": stat.path,
            "backend": stat.backend.to_string(),
            "uuid": stat.uuid,
            "templates": stat.templates,
            "damagedRecords": stat.damaged_records,
        });
        for (name, count) in counts {
            report[format!("{name}Bytes")] = count.into();
        }
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    println!("path       {}", stat.path.display());
    println!("backend    {}", stat.backend);
    println!("templates  {}", stat.templates);
    for (name, count) in counts {
        println!("{name:<9}  {}", bytes(count));
    }
    if stat.damaged_records > 0 {
        println!(
            "damaged    {} records; `trenv-pool verify` names them",
            stat.damaged_records
        );
    }
    Ok(())
}

fn show(pool: &Pool, id: &str) -> anyhow::Result<()> {
    let templates = pool.list()?;
    let mut found = templates
        .iter()
        .filter(|info| info.id.to_string().starts_with(id));
    let info = found
        .next()
        .with_context(|| format!("The pool has no template {id}; `trenv pool ls` lists them"))?;
    if found.next().is_some() {
        anyhow::bail!("{id} is the beginning of several templates; give more digits");
    }
    let reader = pool.template(&info.id, Some(info.generation))?;
    println!("template    {}", info.id);
    println!("generation  {}", info.generation);
    println!("memory      {}", bytes(info.pages * PAGE_SIZE as u64));
    println!(
        "stored      {}",
        bytes(info.stored_pages * PAGE_SIZE as u64)
    );
    println!("manifest    {}", bytes(info.manifest_bytes));
    println!("key         {}", info.key);
    let data = reader
        .extents()
        .iter()
        .filter(|extent| matches!(extent.source, Source::Data { .. }))
        .count();
    println!("extents     {} ({data} with data)", reader.extents().len());
    Ok(())
}
