//! Counters of calls, in Prometheus's text format.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use http::{Method, StatusCode};

/// The Go client's default buckets, in seconds.
const BUCKETS: [f64; 11] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// Other methods are counted together, so that a caller cannot make series without end.
const METHODS: [&str; 9] = [
    "get", "post", "put", "delete", "head", "options", "patch", "connect", "trace",
];

#[derive(Debug, Default)]
struct Series {
    count: u64,
    seconds: f64,
    /// Calls in each bucket, not counting those in smaller ones.
    buckets: [u64; BUCKETS.len()],
}

/// Calls to the function: those under way, and those answered by status and method.
#[derive(Debug, Default)]
pub struct Metrics {
    in_flight: Cell<usize>,
    series: RefCell<BTreeMap<(u16, &'static str), Series>>,
}

impl Metrics {
    pub fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    pub fn begin(&self) {
        self.in_flight.set(self.in_flight.get() + 1);
    }

    pub fn end(&self, method: &Method, status: StatusCode, took: Duration) {
        self.in_flight.set(self.in_flight.get().saturating_sub(1));
        let method = METHODS
            .into_iter()
            .find(|name| name.eq_ignore_ascii_case(method.as_str()))
            .unwrap_or("unknown");
        let mut all = self.series.borrow_mut();
        let series = all.entry((status.as_u16(), method)).or_default();
        let seconds = took.as_secs_f64();
        series.count += 1;
        series.seconds += seconds;
        if let Some(bucket) = BUCKETS.iter().position(|limit| seconds <= *limit) {
            series.buckets[bucket] += 1;
        }
    }

    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let all = self.series.borrow();
        let head = |name: &str, help: &str, kind: &str, out: &mut String| {
            writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}")
        };
        let name = "http_request_duration_seconds";
        head(
            name,
            "Seconds spent serving HTTP requests.",
            "histogram",
            out,
        )?;
        for ((code, method), series) in all.iter() {
            let labels = format!("code=\"{code}\",method=\"{method}\"");
            let mut total = 0;
            for (limit, count) in BUCKETS.iter().zip(series.buckets) {
                total += count;
                writeln!(out, "{name}_bucket{{{labels},le=\"{limit}\"}} {total}")?;
            }
            let Series { count, seconds, .. } = series;
            writeln!(out, "{name}_bucket{{{labels},le=\"+Inf\"}} {count}")?;
            writeln!(out, "{name}_sum{{{labels}}} {seconds}")?;
            writeln!(out, "{name}_count{{{labels}}} {count}")?;
        }
        let name = "http_requests_in_flight";
        head(name, "total HTTP requests in-flight", "gauge", out)?;
        writeln!(out, "{name} {}", self.in_flight.get())?;
        let name = "http_requests_total";
        head(name, "total HTTP requests processed", "counter", out)?;
        for ((code, method), series) in all.iter() {
            let count = series.count;
            writeln!(out, "{name}{{code=\"{code}\",method=\"{method}\"}} {count}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_status_and_method() {
        let metrics = Metrics::default();
        metrics.begin();
        metrics.begin();
        metrics.end(&Method::GET, StatusCode::OK, Duration::from_millis(7));
        let text = metrics.text();
        for expected in [
            "http_requests_total{code=\"200\",method=\"get\"} 1\n",
            "http_requests_in_flight 1\n",
            "_bucket{code=\"200\",method=\"get\",le=\"0.005\"} 0\n",
            "_bucket{code=\"200\",method=\"get\",le=\"0.01\"} 1\n",
            "_bucket{code=\"200\",method=\"get\",le=\"+Inf\"} 1\n",
            "http_request_duration_seconds_count{code=\"200\",method=\"get\"} 1\n",
        ] {
            assert!(text.contains(expected), "{expected} not in {text}");
        }
    }
}
