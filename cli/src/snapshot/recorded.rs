//! The working sets of a snapshot as `trenv snapshot show` tells them: what the starts of each method
//! have learnt of the calls of each input.
//!
//! The shim writes a file after each tenancy that taught it something; here it is read.

use std::fmt::Write;

use anyhow::Context;
use serde_json::{Value, json};
use trenv_config::Config;
use trenv_pool::TemplateInfo;
use trenv_snapshot::manifest::Manifest;
use trenv_snapshot::methods::Method;
use trenv_snapshot::recording::{self, Range, Recorded, Touch};

use super::stored::name_of;
use crate::table::Table;

/// Ranges of a working set that text shows.
const SHOWN: usize = 12;

/// All that is recorded of a snapshot.
#[derive(Debug)]
pub struct WorkingSets(Vec<(Method, Recorded)>);

impl WorkingSets {
    pub fn read(config: &Config, info: &TemplateInfo) -> anyhow::Result<Self> {
        let directory = recording::directory(&config.state_dir);
        let all = recording::all(&directory, &info.id, info.generation).with_context(|| {
            format!(
                "Failed to read the working sets of {} in {}; remove its files there, they are recorded anew",
                info.id,
                directory.display()
            )
        })?;
        let all = all.into_iter().flat_map(|(method, recorded)| {
            recorded.into_iter().map(move |recorded| (method, recorded))
        });
        Ok(Self(all.collect()))
    }

    /// Whole.
    pub fn json(&self, manifest: &Manifest) -> Value {
        let ranges = |recorded: &Recorded| -> Vec<Value> {
            let all = recorded.ranges.iter().map(|range| {
                json!({
                    "pid": pid(manifest, range),
                    "start": range.start,
                    "pages": range.pages,
                    "touch": range.touch,
                    "mapping": mapping(manifest, range),
                })
            });
            all.collect()
        };
        let all = self.0.iter().map(|(method, recorded)| {
            json!({
                "method": method.name(),
                "input": recorded.input,
                "rounds": recorded.rounds,
                "stable": recorded.stable,
                "drift": recorded.drift,
                "firstUse": recorded.first_use,
                "pages": recorded.count(),
                "ranges": ranges(recorded),
            })
        });
        all.collect()
    }

    /// A table, then the ranges that come first of each; empty when nothing was recorded.
    pub fn text(&self, manifest: &Manifest) -> String {
        if self.0.is_empty() {
            return String::new();
        }
        let mut table = Table::new(["METHOD", "INPUT", "ROUNDS", "STABLE", "PAGES", "ORDER"]);
        for (method, recorded) in &self.0 {
            table.row([
                method.name().to_owned(),
                input(recorded).to_owned(),
                recorded.rounds.to_string(),
                if recorded.stable { "yes" } else { "no" }.to_owned(),
                recorded.count().to_string(),
                order(recorded).to_owned(),
            ]);
        }
        let mut text = format!("\n{table}");
        for (method, recorded) in &self.0 {
            // Writing to a string does not fail.
            let _ = write!(
                text,
                "\n{method}, input {}, by {}:\n{}",
                input(recorded),
                order(recorded),
                first_ranges(manifest, recorded)
            );
        }
        text
    }
}

fn first_ranges(manifest: &Manifest, recorded: &Recorded) -> String {
    let mut table = Table::new(["PID", "START", "PAGES", "TOUCH", "MAPPING"]);
    for range in recorded.ranges.iter().take(SHOWN) {
        table.row([
            pid(manifest, range).map_or("?".to_owned(), |pid| pid.to_string()),
            format!("{:x}", range.start),
            range.pages.to_string(),
            touch(range.touch).to_owned(),
            mapping(manifest, range).unwrap_or_default(),
        ]);
    }
    let mut text = table.to_string();
    let left = recorded.ranges.get(SHOWN..).unwrap_or_default();
    if !left.is_empty() {
        let pages: u64 = left.iter().map(|range| range.pages).sum();
        let _ = writeln!(
            text,
            "and {} ranges more, {pages} pages: --json tells all",
            left.len()
        );
    }
    text
}

fn input(recorded: &Recorded) -> &str {
    match recorded.input.as_str() {
        "" => "(none)",
        input => input,
    }
}

fn order(recorded: &Recorded) -> &'static str {
    if recorded.first_use {
        "first use"
    } else {
        "address"
    }
}

fn touch(touch: Touch) -> &'static str {
    match touch {
        Touch::Written => "written",
        Touch::Read => "read",
        Touch::Used => "used",
    }
}

fn pid(manifest: &Manifest, range: &Range) -> Option<i32> {
    Some(manifest.processes.get(range.process)?.pid)
}

/// The mapping that the range begins in.
fn mapping(manifest: &Manifest, range: &Range) -> Option<String> {
    let process = manifest.processes.get(range.process)?;
    let mut all = process.mappings.iter();
    let found = all.find(|one| one.start <= range.start && range.start < one.end)?;
    Some(name_of(found, process))
}
