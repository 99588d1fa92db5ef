//! What `bench restore` measured, and how it is printed.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::super::figures::{Machine, Series, series_row};
use crate::table::{Table, bytes};

/// Times by the shim's name of the step; a name with a dot is a part of the one before it.
pub type Steps = BTreeMap<String, Series>;

/// Everything that one run measured.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub machine: Machine,
    pub subject: Subject,
    pub sandboxes: usize,
    /// One start after another, with a pause between.
    pub single: Starts,
    pub saturation: Saturation,
    /// A clone of the zygote, made ahead of a start: a process with all of the template's memory.
    pub attach: Series,
    /// Why starts failed, each reason once.
    pub failures: Vec<String>,
}

/// What was restored.
#[derive(Debug, Default, Serialize)]
pub struct Subject {
    pub processes: u32,
    pub threads: u32,
    pub image_bytes: u64,
    pub stored_bytes: u64,
    pub zygote_bytes: u64,
    /// What of them lies on huge pages.
    pub zygote_huge_bytes: u64,
}

/// Starts and the resets after them.
#[derive(Debug, Default, Serialize)]
pub struct Starts {
    /// As the caller sees it.
    pub repurpose: Series,
    /// What the shim says that the steps of each took together.
    pub restore_path: Series,
    pub steps: Steps,
    pub reset: Series,
    pub reset_steps: Steps,
    /// A writable snapshot, and its root mounted ahead.
    pub next_root: Series,
}

/// Starts as fast as they come.
#[derive(Debug, Default, Serialize)]
pub struct Saturation {
    pub workers: usize,
    pub spares: u32,
    pub seconds: f64,
    pub starts: u64,
    pub failed: u64,
    pub starts_per_second: f64,
    /// What all processors of the machine did meanwhile, by the number of starts.
    pub cpu_ms_per_start: f64,
    #[serde(flatten)]
    pub times: Starts,
}

impl Report {
    pub fn fail(&mut self, reason: &anyhow::Error) {
        let line = format!("{reason:#}");
        if !self.failures.contains(&line) {
            self.failures.push(line);
        }
    }

    pub fn failed(&self) -> u64 {
        self.single.failed() + self.saturation.times.failed()
    }
}

impl Starts {
    pub fn failed(&self) -> u64 {
        self.repurpose.failed + self.reset.failed + self.next_root.failed
    }

    /// Takes in what another has filed.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in [
            (&mut self.repurpose, &other.repurpose),
            (&mut self.restore_path, &other.restore_path),
            (&mut self.reset, &other.reset),
            (&mut self.next_root, &other.next_root),
        ] {
            mine.add(theirs);
        }
        for (mine, theirs) in [
            (&mut self.steps, &other.steps),
            (&mut self.reset_steps, &other.reset_steps),
        ] {
            for (name, series) in theirs {
                mine.entry(name.clone()).or_default().add(series);
            }
        }
    }

    /// Files a start, by the caller's clock and by the shim's.
    pub fn record(&mut self, time: Duration, steps: &[(String, Duration)]) {
        self.repurpose.record(time);
        let whole = steps.iter().filter(|(name, _)| !name.contains('.'));
        self.restore_path.record(whole.map(|(_, took)| *took).sum());
        file(&mut self.steps, steps);
    }

    /// Files a reset.
    pub fn record_reset(&mut self, time: Duration, steps: &[(String, Duration)]) {
        self.reset.record(time);
        file(&mut self.reset_steps, steps);
    }

    fn rows(&self, table: &mut Table, title: &str) {
        for (name, series) in [
            ("start", &self.repurpose),
            ("start, in the shim", &self.restore_path),
            ("reset", &self.reset),
            ("next root", &self.next_root),
        ] {
            table.row(series_row(format!("{title}: {name}"), series));
        }
    }
}

fn file(all: &mut Steps, steps: &[(String, Duration)]) {
    for (name, took) in steps {
        all.entry(name.clone()).or_default().record(*took);
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{} CPUs ({}), Linux {}, {} sandboxes\n{} processes, {} threads, {} stored in the pool\n",
            self.machine.cpus,
            self.machine.cpu,
            self.machine.kernel,
            self.sandboxes,
            self.subject.processes,
            self.subject.threads,
            bytes(self.subject.stored_bytes),
        )?;
        let mut table = Table::new(["WHAT", "P50", "P90", "P99", "N", "FAILED"]);
        self.single.rows(&mut table, "single");
        self.saturation.times.rows(&mut table, "saturated");
        if self.attach.count() > 0 {
            table.row(series_row("a clone, made ahead".into(), &self.attach));
        }
        write!(f, "{table}")?;
        let loaded = &self.saturation;
        writeln!(
            f,
            "\n{:.0} starts per second: {} in {:.1} s by {} workers, {} failed, {:.2} ms of the processors for each.",
            loaded.starts_per_second,
            loaded.starts,
            loaded.seconds,
            loaded.workers,
            loaded.failed,
            loaded.cpu_ms_per_start
        )?;
        for (title, steps) in [
            ("STEP OF A SINGLE START", &self.single.steps),
            ("STEP OF A SINGLE RESET", &self.single.reset_steps),
            ("STEP OF A SATURATED START", &loaded.times.steps),
            ("STEP OF A SATURATED RESET", &loaded.times.reset_steps),
        ] {
            let mut table = Table::new([title, "P50", "P90", "P99", "N"]);
            for (name, series) in steps {
                let [name, p50, p90, p99, n, _] = series_row(name.clone(), series);
                table.row([name, p50, p90, p99, n]);
            }
            if !table.is_empty() {
                write!(f, "\n{table}")?;
            }
        }
        for failure in &self.failures {
            writeln!(f, "failed: {failure}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_step_does_not_count_twice() {
        let mut starts = Starts::default();
        let steps = [("rootfs", 300), ("rootfs.mount", 100), ("restore", 700)]
            .map(|(name, micros)| (name.to_owned(), Duration::from_micros(micros)));
        starts.record(Duration::from_micros(1500), &steps);
        assert_eq!(starts.repurpose.quantile(0.5), Some(1500));
        assert_eq!(starts.restore_path.quantile(0.5), Some(1000));
        assert_eq!(starts.steps["rootfs.mount"].quantile(0.5), Some(100));
    }

    #[test]
    fn a_report_has_the_documented_keys() {
        let mut report = Report::default();
        report.single.repurpose.failed = 1;
        report.saturation.times.reset.failed = 2;
        assert_eq!(report.failed(), 3);
        let json = serde_json::to_value(&report).unwrap();
        for key in ["repurpose", "restore_path", "reset", "next_root"] {
            for part in ["single", "saturation"] {
                assert!(json[part][key]["n"].is_u64(), "{part}.{key}: {json:#}");
            }
        }
        for key in ["starts_per_second", "cpu_ms_per_start", "seconds"] {
            assert!(json["saturation"][key].is_f64(), "{key}: {json:#}");
        }
        assert!(json["single"]["steps"].is_object());
    }
}
