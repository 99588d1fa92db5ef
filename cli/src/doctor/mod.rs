//! `trenv doctor`: what this machine can do, and the command for everything that it cannot yet.
//!
//! A check looks and never changes anything. What is *needed* and missing makes the command fail;
//! what is *useful* and missing is said with what it would bring.

mod devices;
mod kernel;
mod software;

use serde::Serialize;
use trenv_config::Config;

use crate::table::Table;

#[derive(Debug, clap::Args)]
pub struct DoctorOptions {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It is there.
    Ok,
    /// It is not there, and trenv works without it.
    Absent,
    /// It is not there or not right, and trenv needs it.
    Missing,
}

/// One thing looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    pub name: String,
    pub outcome: Outcome,
    pub found: String,
    /// What to run, or to do, when it is not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Check {
    pub fn ok(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            outcome: Outcome::Ok,
            found: found.into(),
            advice: None,
        }
    }

    pub fn absent(
        name: impl Into<String>,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            outcome: Outcome::Absent,
            advice: Some(advice.into()),
            ..Self::ok(name, found)
        }
    }

    pub fn missing(
        name: impl Into<String>,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            outcome: Outcome::Missing,
            ..Self::absent(name, found, advice)
        }
    }
}

/// Looks at everything; `false` when something needed is missing.
pub fn run(config: &Config, options: &DoctorOptions) -> anyhow::Result<bool> {
    let mut checks = kernel::checks();
    checks.extend(devices::checks());
    checks.extend(software::checks(config));
    let missing = checks
        .iter()
        .filter(|check| check.outcome == Outcome::Missing)
        .count();
    if options.json {
        let report = serde_json::json!({ "ok": missing == 0, "checks": checks });
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(missing == 0);
    }
    let mut table = Table::new(["", "CHECK", "FOUND"]);
    for check in &checks {
        let mark = match check.outcome {
            Outcome::Ok => "ok",
            Outcome::Absent => "-",
            Outcome::Missing => "MISSING",
        };
        table.row([mark.into(), check.name.clone(), check.found.clone()]);
    }
    print!("{table}");
    for (outcome, title) in [
        (Outcome::Missing, "Needed:"),
        (Outcome::Absent, "Useful, but not needed:"),
    ] {
        let mut advice = Table::new(["", ""]);
        for check in checks.iter().filter(|check| check.outcome == outcome) {
            advice.row([
                format!("  {}", check.name),
                check.advice.clone().unwrap_or_default(),
            ]);
        }
        if !advice.is_empty() {
            print!("\n{title}{advice}");
        }
    }
    if missing == 0 {
        println!("\nThis machine can run trenv.");
    } else {
        println!("\n{missing} needed things are missing.");
    }
    Ok(missing == 0)
}

/// A small file's text without the white space around it.
fn read(path: impl AsRef<std::path::Path>) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}
