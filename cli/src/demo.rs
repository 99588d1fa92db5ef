//! `trenv demo`: four functions, one sandbox, and the figures.
//!
//! It deploys the sample functions and calls each. Then one sandbox serves them in turn, and after
//! every turn containerd's own tools are asked what runs in it ([`crate::turn`]). In the end every
//! kind of start is measured, as `trenv bench start` does.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::bail;
use serde_json::json;
use trenv_config::Config;

use crate::bench::start::{StartOptions, call, measure};
use crate::deploy::deploy_all;
use crate::functions::scale;
use crate::gateway::Gateway;
use crate::shim::sandboxes;
use crate::stack::Stack;
use crate::table::{Table, micros};
use crate::turn::{self, Turn};

#[derive(Debug, clap::Args)]
pub struct DemoOptions {
    /// Stack file with the functions
    #[arg(long, short = 'f', default_value = "functions/stack.yml")]
    file: PathBuf,
    /// Functions that take turns
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "hello-python,hello-node,json-python,image-node"
    )]
    functions: Vec<String>,
    /// Calls of each kind of start; fewer through runc
    #[arg(long, default_value_t = 40)]
    calls: u64,
    /// Idle instances to weigh, of each function; 0 leaves it out
    #[arg(long, default_value_t = 20)]
    instances: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How long one function may take to be deployed or scaled.
const PATIENCE: Duration = Duration::from_secs(180);

/// From the shim's answer to the provider's table.
const SETTLED: Duration = Duration::from_millis(20);

/// Calls until a function is expected to have met the chosen sandbox.
const ATTEMPTS: usize = 50;

/// Runs the demo; `false` when a check or a call failed.
pub async fn run(
    gateway: &Gateway,
    config: &Config,
    options: &DemoOptions,
) -> anyhow::Result<bool> {
    let stack = Stack::read(&options.file)?;
    let directory = options.file.parent().unwrap_or(Path::new("."));
    let deployments = stack.deployments(directory, &options.functions)?;
    eprintln!("Deploying {} functions", deployments.len());
    deploy_all(gateway, &deployments, Some(PATIENCE)).await?;
    let calls = first_calls(gateway, options).await?;
    eprintln!("One sandbox serves them in turn");
    let turns = turns(gateway, config, options).await?;
    let same = turns.windows(2).all(|pair| pair[0].same_sandbox(&pair[1]));
    let killed = turn::kill(config, turns.last()).await?;
    eprintln!("Measuring every kind of start");
    let bench = StartOptions {
        functions: options.functions.clone(),
        repurposed: options.calls,
        warm: options.calls,
        evicted: options.calls,
        cold: options.calls / 2,
        runc: options.calls / 4,
        sandboxes: 10,
        input: None,
        pause_ms: 50,
        weigh: Vec::new(),
        instances: options.instances,
        seed: 1,
        json: options.json,
    };
    let report = measure(gateway, config, &bench).await?;
    let good = same && killed && report.failed() == 0 && turns.iter().all(Turn::good);
    if options.json {
        let all = json!({
            "ok": good,
            "calls": calls,
            "one_sandbox": { "namespaces_unchanged": same, "kill_ends_it": killed, "turns": turns },
            "bench": report,
        });
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(good);
    }
    println!("\n{}", turn::table(&turns));
    println!(
        "Network and pid namespace stayed the same: {}. `ctr task kill` ended the function: {}.\n",
        turn::yes(same),
        turn::yes(killed)
    );
    print!("{report}");
    if !good {
        println!("\nNot everything went as it should: look for \"NO\" and \"failed\" above.");
    }
    Ok(good)
}

/// Calls every function once and shows what it says.
async fn first_calls(
    gateway: &Gateway,
    options: &DemoOptions,
) -> anyhow::Result<Vec<serde_json::Value>> {
    let mut table = Table::new(["FUNCTION", "START", "FIRST BYTE", "REPLY"]);
    let mut calls = Vec::new();
    for name in &options.functions {
        let reply = call(gateway, name, None).await?;
        let text = String::from_utf8_lossy(&reply.body);
        let line: String = text
            .lines()
            .next()
            .unwrap_or_default()
            .chars()
            .take(60)
            .collect();
        let time = u64::try_from(reply.first_byte.as_micros())?;
        let start = reply.header("x-trenv-start").to_owned();
        calls.push(
            json!({ "function": name, "start": start, "first_byte_us": time, "reply": line }),
        );
        table.row([name.clone(), start, micros(time), line]);
    }
    eprint!("{table}");
    Ok(calls)
}

/// Lets one sandbox serve every function in turn.
async fn turns(
    gateway: &Gateway,
    config: &Config,
    options: &DemoOptions,
) -> anyhow::Result<Vec<Turn>> {
    for name in &options.functions {
        scale(gateway, name, None, 0, PATIENCE).await?;
    }
    let mut turns: Vec<Turn> = Vec::new();
    for name in &options.functions {
        let sandbox = turns.first().map(|turn| turn.sandbox.clone());
        let turn = one_turn(gateway, config, name, sandbox.as_deref()).await?;
        give_up(gateway, config, name, &turn.sandbox).await?;
        turns.push(turn);
    }
    // The last one stays, so that it can be ended from outside.
    if let Some(name) = options.functions.last() {
        call(gateway, name, None).await?;
    }
    Ok(turns)
}

/// Calls a function until the chosen sandbox serves it.
async fn one_turn(
    gateway: &Gateway,
    config: &Config,
    name: &str,
    wanted: Option<&str>,
) -> anyhow::Result<Turn> {
    for _ in 0..ATTEMPTS {
        let reply = call(gateway, name, None).await?;
        let serving = sandboxes(config, &config.provider.namespace)
            .await?
            .into_iter()
            .find(|sandbox| sandbox.id == reply.header("x-trenv-instance"));
        let Some(serving) = serving else {
            bail!("The function {name} answered from a sandbox that the shim does not list");
        };
        if wanted.is_none_or(|wanted| wanted == serving.id) {
            return turn::look(config, name, &serving, &reply);
        }
        give_up(gateway, config, name, &serving.id).await?;
    }
    bail!(
        "After {ATTEMPTS} calls the sandbox {} has not served {name}",
        wanted.unwrap_or_default()
    )
}

/// Ends the function's instances; waits until its sandbox is idle, so that it is the next to be taken.
async fn give_up(gateway: &Gateway, config: &Config, name: &str, id: &str) -> anyhow::Result<()> {
    scale(gateway, name, None, 0, PATIENCE).await?;
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        let idle = sandboxes(config, &config.provider.namespace)
            .await?
            .iter()
            .any(|sandbox| sandbox.id == id && crate::ps::state(sandbox) == "idle");
        tokio::time::sleep(SETTLED).await;
        if idle {
            return Ok(());
        }
    }
    bail!("The sandbox {id} did not become idle")
}
