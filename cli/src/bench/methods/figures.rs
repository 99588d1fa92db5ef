//! What was measured of each start method, and how it is printed.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::super::figures::{Machine, Series};
use crate::table::{Table, bytes, micros};

/// The rows there can be, in the order in which they are shown: the start methods, what
/// `template` becomes where the provider parks instances, and the cold starts beside them.
pub const ROWS: [&str; 13] = [
    "template",
    "parked",
    "attach",
    "copy",
    "copy-base",
    "lazy",
    "reap",
    "faasnap",
    "spice",
    "criu",
    "criu-lazy",
    "cold",
    "runc",
];

/// Those of the rows that are no methods.
pub const BESIDE: [&str; 3] = ["parked", "cold", "runc"];

/// One start with all that followed.
#[derive(Debug, Default, Clone)]
pub struct Start {
    /// To the first byte of the first call's reply.
    pub first_byte: Duration,
    pub steps: Vec<(String, Duration)>,
    /// The second call's first byte.
    pub second: Option<Duration>,
    pub memory: Option<Memory>,
}

impl Start {
    /// What is not a step of the start, if steps are known.
    fn call(&self) -> Option<Duration> {
        let whole = self.steps.iter().filter(|(name, _)| is_whole(name));
        let starting: Duration = whole.map(|(_, time)| *time).sum();
        (!starting.is_zero()).then(|| self.first_byte.saturating_sub(starting))
    }
}

/// A name with a dot is a part of another step.
fn is_whole(step: &str) -> bool {
    !step.contains('.')
}

/// What an instance had after its second call.
#[derive(Debug, Default, Clone, Copy)]
pub struct Memory {
    pub private_kb: u64,
    pub shared_kb: u64,
    pub faults: u64,
}

/// All starts of one function by one method, or of all functions.
#[derive(Debug, Default)]
pub struct Starts {
    pub start: Series,
    first_call: Series,
    second_call: Series,
    /// Page faults of first calls, after starts without one.
    first_faults: Vec<u64>,
    steps: BTreeMap<String, Series>,
    /// Each by itself, so that a slow one can be told from the others.
    all: Vec<Start>,
}

fn median(mut all: Vec<u64>) -> Option<u64> {
    all.sort_unstable();
    all.get(all.len().saturating_sub(1) / 2).copied()
}

/// Whole steps and what comes after them, in one line.
fn line<'a>(steps: impl Iterator<Item = (&'a str, u64)>, call: Option<u64>) -> String {
    let whole = steps.filter(|(name, _)| is_whole(name));
    let mut parts: Vec<String> = whole
        .map(|(name, time)| format!("{name} {}", micros(time)))
        .collect();
    parts.extend(call.map(|call| format!("then the call {}", micros(call))));
    parts.join(", ")
}

fn in_micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Starts {
    pub fn record(&mut self, start: Start) {
        self.start.record(start.first_byte);
        if let Some(call) = start.call() {
            self.first_call.record(call);
        }
        for (name, time) in &start.steps {
            self.steps.entry(name.clone()).or_default().record(*time);
        }
        if let Some(second) = start.second {
            self.second_call.record(second);
        }
        self.all.push(start);
    }

    pub fn add(&mut self, other: &Self) {
        self.start.add(&other.start);
        self.first_call.add(&other.first_call);
        self.second_call.add(&other.second_call);
        for (name, series) in &other.steps {
            self.steps.entry(name.clone()).or_default().add(series);
        }
        self.first_faults.extend_from_slice(&other.first_faults);
        self.all.extend_from_slice(&other.all);
    }

    fn median(&self, of: impl Fn(&Memory) -> u64) -> Option<u64> {
        let memory = self.all.iter().filter_map(|start| start.memory.as_ref());
        median(memory.map(of).collect())
    }

    /// The whole steps of a start and their medians.
    fn usual(&self) -> String {
        let steps = self.steps.iter();
        let medians =
            steps.filter_map(|(name, series)| Some((name.as_str(), series.quantile(0.5)?)));
        line(medians, self.first_call.quantile(0.5))
    }

    /// The steps of the start that took as long as P99 says.
    fn at_p99(&self) -> Option<&Start> {
        let limit = self.start.quantile(0.99)?;
        let all = self.all.iter();
        all.filter(|one| in_micros(one.first_byte) <= limit)
            .max_by_key(|one| one.first_byte)
    }

    fn slow(&self) -> String {
        let Some(start) = self.at_p99() else {
            return String::new();
        };
        let steps = start.steps.iter();
        line(
            steps.map(|(name, time)| (name.as_str(), in_micros(*time))),
            start.call().map(in_micros),
        )
    }
}

impl Serialize for Starts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("n", &self.start.count())?;
        map.serialize_entry("failed", &self.start.failed)?;
        map.serialize_entry("p50_us", &self.start.quantile(0.5))?;
        map.serialize_entry("p99_us", &self.start.quantile(0.99))?;
        map.serialize_entry("first_call_us", &self.first_call.quantile(0.5))?;
        map.serialize_entry("second_call_us", &self.second_call.quantile(0.5))?;
        map.serialize_entry("private_kb", &self.median(|m| m.private_kb))?;
        map.serialize_entry("shared_kb", &self.median(|m| m.shared_kb))?;
        map.serialize_entry("faults", &self.median(|m| m.faults))?;
        map.serialize_entry("first_call_faults", &median(self.first_faults.clone()))?;
        let steps: BTreeMap<&str, Option<u64>> = self
            .steps
            .iter()
            .map(|(name, series)| (name.as_str(), series.quantile(0.5)))
            .collect();
        map.serialize_entry("steps_p50_us", &steps)?;
        let slow: Option<BTreeMap<&str, u64>> = self.at_p99().map(|start| {
            let steps = start.steps.iter();
            let mut slow: BTreeMap<&str, u64> = steps
                .map(|(name, time)| (name.as_str(), in_micros(*time)))
                .collect();
            slow.extend(start.call().map(|call| ("first_call", in_micros(call))));
            slow
        });
        map.serialize_entry("steps_of_p99_us", &slow)?;
        map.end()
    }
}

/// One function's starts by each method.
#[derive(Debug, Default)]
pub struct FunctionFigures {
    pub name: String,
    pub image_bytes: u64,
    pub methods: BTreeMap<&'static str, Starts>,
}

impl Serialize for FunctionFigures {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", &self.name)?;
        let tenths = (self.image_bytes as f64 / f64::from(1 << 20) * 10.0).round() / 10.0;
        map.serialize_entry("image_mb", &tenths)?;
        map.serialize_entry("methods", &self.methods)?;
        map.end()
    }
}

/// Everything that one run measured.
#[derive(Debug, Default)]
pub struct Report {
    pub machine: Machine,
    pub seed: u64,
    /// How many there were before the starts.
    pub sandboxes: usize,
    pub functions: Vec<FunctionFigures>,
    /// Methods that could not be measured here, and why.
    pub unavailable: BTreeMap<&'static str, String>,
    /// Starts of another kind than was asked for; they are in no figure.
    pub otherwise: u64,
    /// Why starts failed, each reason once.
    pub failures: Vec<String>,
}

impl Report {
    pub fn record(&mut self, function: usize, row: &'static str, outcome: anyhow::Result<Start>) {
        let Some(function) = self.functions.get_mut(function) else {
            return;
        };
        let starts = function.methods.entry(row).or_default();
        match outcome {
            Ok(start) => starts.record(start),
            Err(err) => {
                starts.start.failed += 1;
                let line = format!("{} {row}: {err:#}", function.name);
                if !self.failures.contains(&line) {
                    self.failures.push(line);
                }
            }
        }
    }

    pub fn record_first_call(&mut self, function: usize, row: &'static str, faults: u64) {
        if let Some(function) = self.functions.get_mut(function) {
            let starts = function.methods.entry(row).or_default();
            starts.first_faults.push(faults);
        }
    }

    pub fn failed(&self) -> u64 {
        let all = self.functions.iter().flat_map(|f| f.methods.values());
        all.map(|starts| starts.start.failed).sum()
    }

    /// Each method over all functions.
    fn total(&self) -> BTreeMap<&'static str, Starts> {
        let mut total = BTreeMap::<&str, Starts>::new();
        for function in &self.functions {
            for (row, starts) in &function.methods {
                total.entry(row).or_default().add(starts);
            }
        }
        total
    }

    /// Where another start method is ahead of `template`, with what the starts of both consist of.
    fn behind(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for function in &self.functions {
            let Some(ours) = function.methods.get("template") else {
                continue;
            };
            for (row, theirs) in &function.methods {
                if *row == "template" || BESIDE.contains(row) {
                    continue;
                }
                let mut ahead = Vec::new();
                let mut profiles = String::new();
                for (word, quantile) in [("P50", 0.5), ("P99", 0.99)] {
                    let their = theirs.start.quantile(quantile);
                    let our = ours.start.quantile(quantile);
                    let (Some(their), Some(our)) = (their, our) else {
                        continue;
                    };
                    if their >= our {
                        continue;
                    }
                    ahead.push(format!("{word}, {} against {}", micros(their), micros(our)));
                    let (ours, theirs) = match word {
                        "P50" => (ours.usual(), theirs.usual()),
                        _ => (ours.slow(), theirs.slow()),
                    };
                    profiles +=
                        &format!("\n  {word} of template: {ours}\n  {word} of {row}: {theirs}");
                }
                if !ahead.is_empty() {
                    let ahead = ahead.join(", and at ");
                    let name = &function.name;
                    lines.push(format!(
                        "{name}: {row} is ahead of template at {ahead}{profiles}"
                    ));
                }
            }
        }
        lines
    }
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("machine", &self.machine)?;
        map.serialize_entry("seed", &self.seed)?;
        map.serialize_entry("sandboxes", &self.sandboxes)?;
        map.serialize_entry("functions", &self.functions)?;
        map.serialize_entry("methods", &self.total())?;
        map.serialize_entry("unavailable", &self.unavailable)?;
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
        let mut table = Table::new([
            "FUNCTION",
            "IMAGE",
            "METHOD",
            "P50",
            "P99",
            "FIRST CALL",
            "SECOND CALL",
            "PRIVATE",
            "SHARED",
            "FAULTS",
            "OF THE FIRST CALL",
            "N",
            "FAILED",
        ]);
        for function in &self.functions {
            let image = bytes(function.image_bytes);
            add_rows(&mut table, &function.name, &image, &function.methods);
        }
        if self.functions.len() > 1 {
            add_rows(&mut table, "all", "-", &self.total());
        }
        write!(f, "{table}")?;
        for line in self.behind() {
            writeln!(f, "\n{line}")?;
        }
        for (method, reason) in &self.unavailable {
            writeln!(f, "\nNot measured: {method}, since {reason}.")?;
        }
        if self.otherwise > 0 {
            writeln!(
                f,
                "\n{} starts were of another kind than was asked for; they are in no figure.",
                self.otherwise
            )?;
        }
        for failure in &self.failures {
            writeln!(f, "failed: {failure}")?;
        }
        Ok(())
    }
}

fn add_rows(table: &mut Table, name: &str, image: &str, methods: &BTreeMap<&'static str, Starts>) {
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    let kb = |value: Option<u64>| or_dash(value.map(|kb| bytes(kb << 10)));
    let count = |value: Option<u64>| or_dash(value.map(|count| count.to_string()));
    let time = |series: &Series, quantile| or_dash(series.quantile(quantile).map(micros));
    for row in ROWS {
        let Some(starts) = methods.get(row) else {
            continue;
        };
        table.row([
            name.to_owned(),
            image.to_owned(),
            row.to_owned(),
            time(&starts.start, 0.5),
            time(&starts.start, 0.99),
            time(&starts.first_call, 0.5),
            time(&starts.second_call, 0.5),
            kb(starts.median(|m| m.private_kb)),
            kb(starts.median(|m| m.shared_kb)),
            count(starts.median(|m| m.faults)),
            count(median(starts.first_faults.clone())),
            starts.start.count().to_string(),
            starts.start.failed.to_string(),
        ]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(first_byte: u64, second: u64, faults: u64) -> Start {
        Start {
            first_byte: Duration::from_micros(first_byte),
            steps: vec![
                ("restore".into(), Duration::from_micros(1000)),
                ("restore.clone".into(), Duration::from_micros(400)),
            ],
            second: Some(Duration::from_micros(second)),
            memory: Some(Memory {
                private_kb: 10,
                shared_kb: 20,
                faults,
            }),
        }
    }

    fn report() -> Report {
        let function = FunctionFigures {
            name: "f".into(),
            image_bytes: 7_500_000,
            ..FunctionFigures::default()
        };
        let mut report = Report {
            functions: vec![function],
            ..Report::default()
        };
        report.record(0, "template", Ok(start(1900, 500, 7)));
        report.record(0, "template", Ok(start(1900, 500, 9)));
        report.record_first_call(0, "template", 3);
        report.record(0, "copy", Ok(start(1500, 400, 1)));
        report.record(0, "copy", Err(anyhow::anyhow!("no reply")));
        report
    }

    #[test]
    fn a_report_has_the_documented_keys() {
        let report = report();
        let json = serde_json::to_value(&report).unwrap();
        let function = &json["functions"][0];
        assert_eq!(function["name"], "f");
        assert_eq!(function["image_mb"], 7.2);
        let template = &function["methods"]["template"];
        assert_eq!(template["n"], 2);
        assert_eq!(template["p50_us"], 1900);
        assert_eq!(template["p99_us"], 1900);
        // Without the whole steps; the part of one does not count twice.
        assert_eq!(template["first_call_us"], 900);
        assert_eq!(template["second_call_us"], 500);
        assert_eq!(template["private_kb"], 10);
        assert_eq!(template["shared_kb"], 20);
        assert_eq!(template["faults"], 7);
        assert_eq!(template["first_call_faults"], 3);
        assert!(function["methods"]["copy"]["first_call_faults"].is_null());
        assert_eq!(function["methods"]["copy"]["failed"], 1);
        assert_eq!(json["methods"]["copy"]["n"], 1);
        assert_eq!(report.failed(), 1);
    }

    #[test]
    fn a_slow_start_is_told_from_the_usual_one() {
        let mut report = report();
        let mut slow = start(9900, 500, 7);
        slow.steps[0].1 = Duration::from_micros(8000);
        report.record(0, "template", Ok(slow));
        let text = report.to_string();
        assert!(
            text.contains("P99 of template: restore 8.00 ms, then the call 1.90 ms"),
            "{text}"
        );
        assert!(text.contains("P50 of template: restore 1.00 ms"), "{text}");
        let json = serde_json::to_value(&report).unwrap();
        let slow = &json["functions"][0]["methods"]["template"]["steps_of_p99_us"];
        assert_eq!(slow["restore"], 8000);
        assert_eq!(slow["restore.clone"], 400);
        assert_eq!(slow["first_call"], 1900);
    }

    #[test]
    fn a_faster_method_is_named_with_the_profile() {
        let text = report().to_string();
        assert!(
            text.contains(
                "f: copy is ahead of template at P50, 1.50 ms against 1.90 ms, and at P99, 1.50 ms"
            ),
            "{text}"
        );
        assert!(text.contains("P50 of template: restore 1.00 ms, then the call 900 us"));
        assert!(text.contains("failed: f copy: no reply"));
    }
}
