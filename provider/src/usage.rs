//! What functions use: memory now, and processor time since the last question.

use std::collections::HashMap;
use std::ops::AddAssign;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::containerd::TaskFigures;
use crate::functions::FunctionName;

/// Questions that come sooner get the last answer: the figure would be mostly noise.
const SHORTEST: Duration = Duration::from_millis(500);
/// Instances that nobody asked about for so long are forgotten.
const KEPT: Duration = Duration::from_secs(600);

/// What one or more instances use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Thousandths of a processor.
    pub cpu_millis: u64,
    pub memory_bytes: u64,
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.cpu_millis += other.cpu_millis;
        self.memory_bytes += other.memory_bytes;
    }
}

/// Remembers the last measurement of every instance.
#[derive(Debug, Default)]
pub struct Meter {
    samples: Mutex<HashMap<(FunctionName, String), Sample>>,
}

#[derive(Debug)]
struct Sample {
    at: Instant,
    cpu_ns: u64,
    cpu_millis: u64,
}

impl Meter {
    /// Takes a measurement of a function's instance; its first one knows no processor time yet.
    pub fn measure(&self, function: &FunctionName, sandbox: &str, now: TaskFigures) -> Usage {
        self.measure_at(Instant::now(), function, sandbox, now)
    }

    fn measure_at(
        &self,
        at: Instant,
        function: &FunctionName,
        sandbox: &str,
        now: TaskFigures,
    ) -> Usage {
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.retain(|_, sample| at.saturating_duration_since(sample.at) < KEPT);
        let sample = samples
            .entry((function.clone(), sandbox.to_owned()))
            .or_insert(Sample {
                at,
                cpu_ns: now.cpu_ns,
                cpu_millis: 0,
            });
        let past = at.saturating_duration_since(sample.at);
        if past >= SHORTEST {
            // A smaller figure is that of another tenancy, which began at zero.
            let used = now.cpu_ns.checked_sub(sample.cpu_ns).unwrap_or(now.cpu_ns);
            let past_us = u64::try_from(past.as_micros()).unwrap_or(u64::MAX);
            // Nanoseconds in microseconds are thousandths of one.
            *sample = Sample {
                at,
                cpu_ns: now.cpu_ns,
                cpu_millis: used / past_us,
            };
        }
        Usage {
            cpu_millis: sample.cpu_millis,
            memory_bytes: now.memory_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_that_since_the_last_question() {
        let (meter, begun) = (Meter::default(), Instant::now());
        let name = FunctionName {
            namespace: "n".into(),
            name: "f".into(),
        };
        let ask = |after_ms: u64, cpu_ms: u64| {
            let figures = TaskFigures {
                cpu_ns: cpu_ms * 1_000_000,
                memory_bytes: 5,
            };
            let at = begun + Duration::from_millis(after_ms);
            let usage = meter.measure_at(at, &name, "s", figures);
            assert_eq!(usage.memory_bytes, 5);
            usage.cpu_millis
        };
        assert_eq!(ask(0, 9_000), 0, "the first question");
        assert_eq!(ask(1_000, 9_250), 250);
        assert_eq!(ask(1_100, 9_350), 250, "too soon");
        assert_eq!(ask(2_000, 11_250), 2_000, "two processors");
        assert_eq!(ask(3_000, 100), 100, "a new tenancy");
        assert_eq!(ask(4_000, 100), 0);
        assert_eq!(ask(4_000 + 700_000, 800), 0, "forgotten meanwhile");
    }
}
