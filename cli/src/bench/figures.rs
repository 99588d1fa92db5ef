//! What was measured, and how it is printed.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::memory::MemoryFigures;
use crate::table::{Table, bytes, micros};

/// How a function came to answer; the names are those of `X-Trenv-Start`, and stock runc.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    ColdRunc,
    ColdTrenv,
    Evicted,
    Repurposed,
    Parked,
    Warm,
}

impl Kind {
    pub const ALL: [Self; 6] = [
        Self::ColdRunc,
        Self::ColdTrenv,
        Self::Evicted,
        Self::Repurposed,
        Self::Parked,
        Self::Warm,
    ];

    pub fn key(self) -> &'static str {
        match self {
            Self::ColdRunc => "cold_runc",
            Self::ColdTrenv => "cold_trenv",
            Self::Evicted => "evicted",
            Self::Repurposed => "repurposed",
            Self::Parked => "parked",
            Self::Warm => "warm",
        }
    }

    /// The kind that a reply names in `X-Trenv-Start`.
    pub fn of_header(value: &str) -> Option<Self> {
        match value {
            "cold" => Some(Self::ColdTrenv),
            "evicted" => Some(Self::Evicted),
            "repurposed" => Some(Self::Repurposed),
            "parked" => Some(Self::Parked),
            "warm" => Some(Self::Warm),
            _ => None,
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::ColdRunc => "cold through runc",
            Self::ColdTrenv => "cold through trenv",
            Self::Evicted => "evicted",
            Self::Repurposed => "repurposed",
            Self::Parked => "parked",
            Self::Warm => "warm",
        }
    }
}

/// Times of one thing, in microseconds, and how often it failed.
#[derive(Debug, Default)]
pub struct Series {
    times: Option<Histogram<u64>>,
    pub failed: u64,
}

impl Series {
    pub fn record(&mut self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1);
        if self.times.is_none() {
            // Three digits; it grows as far as the times do.
            self.times = Histogram::new(3).ok();
        }
        if let Some(times) = &mut self.times {
            // It grows, so that this cannot fail.
            let _ = times.record(micros);
        }
    }

    pub fn add(&mut self, other: &Self) {
        self.failed += other.failed;
        match (&mut self.times, &other.times) {
            (Some(mine), Some(theirs)) => {
                // Both were made with the same digits and grow, so that this cannot fail.
                let _ = mine.add(theirs);
            }
            (None, Some(theirs)) => self.times = Some(theirs.clone()),
            (_, None) => {}
        }
    }

    pub fn count(&self) -> u64 {
        self.times.as_ref().map_or(0, Histogram::len)
    }

    pub fn quantile(&self, quantile: f64) -> Option<u64> {
        let times = self.times.as_ref().filter(|times| !times.is_empty())?;
        Some(times.value_at_quantile(quantile))
    }
}

impl Serialize for Series {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(5))?;
        map.serialize_entry("n", &self.count())?;
        map.serialize_entry("failed", &self.failed)?;
        for (key, quantile) in [("p50_us", 0.5), ("p90_us", 0.9), ("p99_us", 0.99)] {
            map.serialize_entry(key, &self.quantile(quantile))?;
        }
        map.end()
    }
}

/// The series of every kind, of one function or of all.
#[derive(Debug, Default)]
pub struct Kinds(BTreeMap<Kind, Series>);

impl Kinds {
    pub fn of(&mut self, kind: Kind) -> &mut Series {
        self.0.entry(kind).or_default()
    }

    pub fn get(&self, kind: Kind) -> Option<&Series> {
        self.0.get(&kind)
    }
}

impl Serialize for Kinds {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let none = Series::default();
        let mut map = serializer.serialize_map(None)?;
        for kind in Kind::ALL {
            map.serialize_entry(kind.key(), self.get(kind).unwrap_or(&none))?;
        }
        map.end()
    }
}

/// Where the calls' bodies were measured, so that figures can be compared.
#[derive(Debug, Default, Serialize)]
pub struct Machine {
    pub kernel: String,
    pub cpu: String,
    pub cpus: usize,
    pub memory_kb: u64,
}

/// Everything that one run measured.
#[derive(Debug, Default)]
pub struct Report {
    pub machine: Machine,
    pub seed: u64,
    pub sandboxes: usize,
    /// Bytes of each function's image in containerd, packed.
    pub images: BTreeMap<String, u64>,
    pub functions: BTreeMap<String, Kinds>,
    /// Steps of repurposed starts, in the shim's words.
    pub steps: BTreeMap<String, Series>,
    pub memory: BTreeMap<String, MemoryFigures>,
    /// Memory that each parked instance of a function has to itself, in KiB.
    pub parked_kb: BTreeMap<String, u64>,
    /// Why calls failed, each reason once.
    pub failures: Vec<String>,
    /// Calls that were to start one way and started another; they count where they belong.
    pub otherwise: u64,
}

impl Report {
    pub fn record(&mut self, function: &str, kind: Kind, outcome: Result<Duration, String>) {
        let series = self
            .functions
            .entry(function.to_owned())
            .or_default()
            .of(kind);
        match outcome {
            Ok(time) => series.record(time),
            Err(reason) => {
                series.failed += 1;
                let line = format!("{function} {}: {reason}", kind.key());
                if !self.failures.contains(&line) {
                    self.failures.push(line);
                }
            }
        }
    }

    pub fn total(&self) -> Kinds {
        let mut total = Kinds::default();
        for kinds in self.functions.values() {
            for (kind, series) in &kinds.0 {
                total.of(*kind).add(series);
            }
        }
        total
    }

    pub fn failed(&self) -> u64 {
        self.total().0.values().map(|series| series.failed).sum()
    }
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let total = self.total();
        let none = Series::default();
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("machine", &self.machine)?;
        map.serialize_entry("seed", &self.seed)?;
        map.serialize_entry("sandboxes", &self.sandboxes)?;
        map.serialize_entry("image_bytes", &self.images)?;
        for kind in Kind::ALL {
            map.serialize_entry(kind.key(), total.get(kind).unwrap_or(&none))?;
        }
        map.serialize_entry("functions", &self.functions)?;
        map.serialize_entry("steps", &self.steps)?;
        map.serialize_entry("memory", &self.memory)?;
        map.serialize_entry("parked_kb_each", &self.parked_kb)?;
        map.serialize_entry("started_otherwise", &self.otherwise)?;
        map.serialize_entry("failures", &self.failures)?;
        map.end()
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{} CPUs ({}), Linux {}, {} sandboxes, seed {}\n",
            self.machine.cpus, self.machine.cpu, self.machine.kernel, self.sandboxes, self.seed
        )?;
        let mut table = Table::new(["START", "P50", "P90", "P99", "N", "FAILED"]);
        let total = self.total();
        for kind in Kind::ALL {
            if let Some(series) = total.get(kind) {
                table.row(series_row(kind.title().to_owned(), series));
            }
        }
        write!(f, "{table}")?;
        let slow = total.get(Kind::ColdRunc).and_then(|s| s.quantile(0.5));
        let fast = total.get(Kind::Repurposed).and_then(|s| s.quantile(0.5));
        if let (Some(slow), Some(fast)) = (slow, fast) {
            let ratio = slow as f64 / fast.max(1) as f64;
            writeln!(
                f,
                "\nA repurposed start is {ratio:.0} times faster than one through runc (P50)."
            )?;
        }
        let mut table = Table::new([
            "FUNCTION", "IMAGE", "START", "P50", "P90", "P99", "N", "FAILED",
        ]);
        for (name, kinds) in &self.functions {
            let image = self
                .images
                .get(name)
                .map_or("-".into(), |size| bytes(*size));
            for (kind, series) in &kinds.0 {
                let [start, p50, p90, p99, n, failed] = series_row(kind.title().to_owned(), series);
                table.row([name.clone(), image.clone(), start, p50, p90, p99, n, failed]);
            }
        }
        if !table.is_empty() {
            write!(f, "\n{table}")?;
        }
        let mut table = Table::new(["STEP OF A REPURPOSED START", "P50", "P90", "P99", "N"]);
        for (name, series) in &self.steps {
            let [name, p50, p90, p99, n, _] = series_row(name.clone(), series);
            table.row([name, p50, p90, p99, n]);
        }
        if !table.is_empty() {
            write!(f, "\n{table}")?;
        }
        if !self.memory.is_empty() {
            write!(f, "\n{}", super::memory::table(&self.memory))?;
        }
        for (name, kilobytes) in &self.parked_kb {
            let own = bytes(kilobytes << 10);
            writeln!(f, "\nA parked instance of {name} has {own} to itself.")?;
        }
        if self.otherwise > 0 {
            writeln!(
                f,
                "\n{} calls started in another way than was asked for; they count where they belong.",
                self.otherwise
            )?;
        }
        for failure in &self.failures {
            writeln!(f, "failed: {failure}")?;
        }
        Ok(())
    }
}

pub fn series_row(name: String, series: &Series) -> [String; 6] {
    let time = |quantile| series.quantile(quantile).map_or("-".into(), micros);
    [
        name,
        time(0.5),
        time(0.9),
        time(0.99),
        series.count().to_string(),
        series.failed.to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_the_documented_keys() {
        let mut report = Report::default();
        report.record("f", Kind::Warm, Ok(Duration::from_micros(500)));
        report.record("f", Kind::Warm, Err("no reply".into()));
        report.record("g", Kind::Warm, Ok(Duration::from_micros(700)));
        let json = serde_json::to_value(&report).unwrap();
        for kind in Kind::ALL {
            assert!(json[kind.key()]["n"].is_u64(), "{}", kind.key());
        }
        assert_eq!(json["warm"]["n"], 2);
        assert_eq!(json["warm"]["failed"], 1);
        assert_eq!(json["functions"]["f"]["warm"]["p50_us"], 500);
        assert_eq!(json["cold_runc"]["p50_us"], serde_json::Value::Null);
        assert!(json["steps"].is_object() && json["memory"].is_object());
        assert_eq!(report.failed(), 1);
    }

    #[test]
    fn long_times_do_not_overflow_a_series() {
        let mut series = Series::default();
        series.record(Duration::from_secs(100_000));
        series.record(Duration::ZERO);
        assert_eq!(series.count(), 2);
        assert!(series.quantile(1.0).unwrap() > 99_000_000_000);
    }
}
