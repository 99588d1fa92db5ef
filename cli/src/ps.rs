//! `trenv ps`: the sandboxes of this machine, by state.

use serde_json::json;
use trenv_config::Config;
use trenv_sandbox_proto::SandboxInfo;

use crate::shim::{namespaces, sandboxes};
use crate::table::Table;

#[derive(Debug, clap::Args)]
pub struct PsOptions {
    /// containerd namespace; all that have a shim when absent
    #[arg(long)]
    namespace: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub async fn run(config: &Config, options: &PsOptions) -> anyhow::Result<()> {
    let names = match &options.namespace {
        Some(name) => vec![name.clone()],
        None => namespaces(config),
    };
    let mut rows: Vec<(String, SandboxInfo)> = Vec::new();
    for name in names {
        let found = sandboxes(config, &name).await?;
        rows.extend(found.into_iter().map(|sandbox| (name.clone(), sandbox)));
    }
    rows.sort_by(|a, b| (state(&a.1), &a.0, &a.1.id).cmp(&(state(&b.1), &b.0, &b.1.id)));
    if options.json {
        let list: Vec<_> = rows
            .iter()
            .map(|(namespace, sandbox)| {
                json!({
                    "namespace": namespace,
                    "id": sandbox.id,
                    "state": state(sandbox),
                    "tenancy": sandbox.tenancy,
                    "address": sandbox.address,
                    "initPid": sandbox.init_pid,
                    "template": sandbox.template_id,
                })
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&list)?);
        return Ok(());
    }
    let mut table = Table::new([
        "SANDBOX",
        "STATE",
        "TENANCY",
        "ADDRESS",
        "PID",
        "TEMPLATE",
        "NAMESPACE",
    ]);
    for (namespace, sandbox) in &rows {
        let short: String = sandbox.template_id.chars().take(12).collect();
        table.row([
            sandbox.id.clone(),
            state(sandbox).to_owned(),
            or_dash(&sandbox.tenancy),
            or_dash(&sandbox.address),
            sandbox.init_pid.to_string(),
            or_dash(&short),
            namespace.clone(),
        ]);
    }
    if table.is_empty() {
        println!("No sandboxes.");
    } else {
        print!("{table}");
    }
    Ok(())
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-" } else { text }.to_owned()
}

/// The state's name as people read it.
pub fn state(sandbox: &SandboxInfo) -> &'static str {
    use trenv_sandbox_proto::State;
    match sandbox.state.enum_value() {
        Ok(State::IDLE) => "idle",
        Ok(State::RESETTING) => "resetting",
        Ok(State::RESTORING) => "restoring",
        Ok(State::READY) => "ready",
        Ok(State::PARKED) => "parked",
        Ok(State::DEAD) => "dead",
        Ok(State::STATE_UNSPECIFIED) | Err(_) => "unknown",
    }
}
