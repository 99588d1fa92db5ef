//! `trenv-pool`: look after the page store by hand. `report` turns what the library says into text.

mod report;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use trenv_config::Config;
use trenv_pool::{Backend, Pool, PoolError, PoolOptions, TemplateId};

/// Looks after the pool, where the memory of functions' templates is stored.
#[derive(Debug, Parser)]
#[command(name = "trenv-pool", version, about)]
struct Arguments {
    /// Directory of the pool; the configuration's when absent.
    #[arg(long, global = true, value_name = "DIR")]
    pool: Option<PathBuf>,
    /// Print JSON instead of text.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a pool.
    Format {
        /// `file` (durable), `memfd` (memory, lost at a reboot) or `dax` (a device); the configuration's
        /// when absent.
        #[arg(long)]
        backend: Option<Backend>,
        /// Device of a dax pool, e.g. /dev/dax0.0, which is taken whole; the configuration's when absent.
        #[arg(long)]
        device: Option<PathBuf>,
        /// Also if the device holds a pool, which is lost.
        #[arg(long)]
        overwrite: bool,
        /// Bytes, with K, M, G or T for powers of 1024; the configuration's when absent.
        #[arg(long, value_parser = bytes)]
        size: Option<u64>,
    },
    /// List the device-dax of this machine, and whether each can hold a pool.
    Devices,
    /// List the templates.
    Ls,
    /// Show sizes: of the pool, its templates and what is free.
    Stat,
    /// Check every record and every page. Ends with status 1 when something is damaged.
    Verify,
    /// Show one template with its extents.
    Show {
        /// Its id, or the start of it.
        template: String,
        /// Write the manifest's bytes to standard output, and nothing else.
        #[arg(long)]
        manifest: bool,
    },
    /// Remove templates and free the pages that no other template has.
    Rm {
        /// Their ids, or the starts of them.
        #[arg(required = true)]
        templates: Vec<String>,
        /// Seconds to wait for a template's readers.
        #[arg(long, default_value_t = 10)]
        wait: u64,
    },
    /// Remove the whole pool.
    Destroy {
        /// Really.
        #[arg(long)]
        yes: bool,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("trenv-pool: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let config = Config::load().context("Failed to read the configuration")?;
    let path = arguments.pool.clone().unwrap_or_else(|| config.pool_path());
    let json = arguments.json;
    match &arguments.command {
        Command::Format {
            backend,
            device,
            overwrite,
            size,
        } => {
            let backend = match backend {
                Some(backend) => *backend,
                None => config.pool.backend.parse()?,
            };
            let options = PoolOptions {
                backend,
                path,
                size: size.unwrap_or(config.pool.size),
                device: device.clone().or(config.pool.device),
            };
            let pool = options.format(*overwrite)?;
            report::stat(&pool.stat()?, json)?;
        }
        Command::Devices => {
            let devices = trenv_devices::list().context("Failed to list the devices")?;
            report::devices(&devices, json)?;
        }
        Command::Ls => report::list(&Pool::open(&path)?.usage()?, json)?,
        Command::Stat => report::stat(&Pool::open(&path)?.stat()?, json)?,
        Command::Verify => return verify(&path, json),
        Command::Show { template, manifest } => {
            let pool = Pool::open(&path)?;
            let reader = pool.template(&find(&pool, template)?, None)?;
            report::template(&reader, *manifest, json)?;
        }
        Command::Rm { templates, wait } => {
            let pool = Pool::open(&path)?;
            let mut removed = Vec::new();
            for text in templates {
                let id = find(&pool, text)?;
                if !pool.delete_within(&id, Duration::from_secs(*wait))? {
                    return Err(PoolError::NoSuchTemplate { id }.into());
                }
                removed.push(id);
            }
            report::removed(&removed, json)?;
        }
        Command::Destroy { yes } => {
            if !yes {
                bail!(
                    "Destroying {} loses every template in it; add --yes to do it",
                    path.display()
                );
            }
            Pool::destroy(&path)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn verify(path: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let pool = Pool::open(path)?;
    let found = pool.verify(|info, fault| {
        if !json {
            report::checked(info, fault);
        }
    })?;
    report::verification(&found, json)?;
    Ok(if found.faults.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The template whose id is, or starts with, `text`. A whole id is taken as it is, so that a
/// template with a damaged record can be removed.
fn find(pool: &Pool, text: &str) -> anyhow::Result<TemplateId> {
    if let Ok(id) = text.parse() {
        return Ok(id);
    }
    let ids: Vec<TemplateId> = pool.list()?.iter().map(|info| info.id).collect();
    let start = text.to_ascii_lowercase();
    let matching: Vec<&TemplateId> = ids
        .iter()
        .filter(|id| id.to_string().starts_with(&start))
        .collect();
    match matching.as_slice() {
        [id] => Ok(**id),
        [] => bail!("No template's id starts with {text:?}; `trenv-pool ls` lists them"),
        several => bail!(
            "{} templates' ids start with {text:?}; give more digits",
            several.len()
        ),
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        Some(b'T' | b't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text:?} is no size; write for example 512M or 8G"))
}
