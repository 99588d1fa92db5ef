//! Metrics under the names that OpenFaaS dashboards use, and those of starts.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use trenv_sandbox_proto::WorkingSet;

use crate::instances::StartKind;
use crate::shim_client::Step;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    function_name: String,
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FunctionLabels {
    function_name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InputLabels {
    function_name: String,
    input: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StepLabels {
    step: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

type HistogramFamily<L> = Family<L, Histogram, fn() -> Histogram>;

/// Every metric of the provider.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    calls: Family<CallLabels, Counter>,
    started: Family<FunctionLabels, Counter>,
    seconds: HistogramFamily<CallLabels>,
    replicas: Family<FunctionLabels, Gauge>,
    starts: HistogramFamily<KindLabels>,
    steps: HistogramFamily<StepLabels>,
    sandboxes: Family<StateLabels, Gauge>,
    drift: Family<InputLabels, Gauge<f64, AtomicU64>>,
    /// By function and input.
    working_sets: Mutex<BTreeMap<(String, String), WorkingSet>>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All metrics at zero.
    pub fn new() -> Self {
        fn call_buckets() -> Histogram {
            Histogram::new(exponential_buckets(0.0005, 2.0, 18))
        }
        fn start_buckets() -> Histogram {
            Histogram::new(exponential_buckets(0.00005, 2.0, 20))
        }
        let mut metrics = Self {
            registry: Registry::default(),
            calls: Family::default(),
            started: Family::default(),
            seconds: Family::new_with_constructor(call_buckets),
            replicas: Family::default(),
            starts: Family::new_with_constructor(start_buckets),
            steps: Family::new_with_constructor(start_buckets),
            sandboxes: Family::default(),
            drift: Family::default(),
            working_sets: Mutex::default(),
        };
        let registry = &mut metrics.registry;
        registry.register(
            "gateway_function_invocation",
            "Calls of functions, by status",
            metrics.calls.clone(),
        );
        registry.register(
            "gateway_function_invocation_started",
            "Calls of functions, when they begin",
            metrics.started.clone(),
        );
        registry.register(
            "gateway_functions_seconds",
            "Time of calls until the reply's head",
            metrics.seconds.clone(),
        );
        registry.register(
            "gateway_service_count",
            "Instances of a function",
            metrics.replicas.clone(),
        );
        registry.register(
            "trenv_start_seconds",
            "Time of starts, by kind",
            metrics.starts.clone(),
        );
        registry.register(
            "trenv_start_step_seconds",
            "Time of the steps of starts",
            metrics.steps.clone(),
        );
        registry.register(
            "trenv_sandboxes",
            "Sandboxes, by state",
            metrics.sandboxes.clone(),
        );
        registry.register(
            "trenv_working_set_drift",
            "Part of the pages touched by the instance looked at last that were not recorded",
            metrics.drift.clone(),
        );
        metrics
    }

    /// A call begins.
    pub fn call_started(&self, function: &str) {
        let labels = FunctionLabels {
            function_name: function.to_owned(),
        };
        self.started.get_or_create(&labels).inc();
    }

    /// A call has its status.
    pub fn call(&self, function: &str, code: u16, duration: Duration) {
        let labels = CallLabels {
            function_name: function.to_owned(),
            code: code.to_string(),
        };
        self.calls.get_or_create(&labels).inc();
        self.seconds
            .get_or_create(&labels)
            .observe(duration.as_secs_f64());
    }

    /// An instance was started.
    pub fn start(&self, kind: StartKind, duration: Duration, steps: &[Step]) {
        self.starts
            .get_or_create(&KindLabels { kind: kind.word() })
            .observe(duration.as_secs_f64());
        for (step, micros) in steps {
            self.steps
                .get_or_create(&StepLabels { step: step.clone() })
                .observe(Duration::from_micros(*micros).as_secs_f64());
        }
    }

    /// What is known of the pages that a function's calls of an input need.
    pub fn learnt(&self, function: &str, set: WorkingSet) {
        let key = (function.to_owned(), set.input.clone());
        self.working_sets().insert(key, set);
    }

    /// What is known of a function's inputs.
    pub fn working_sets_of(&self, function: &str) -> Vec<WorkingSet> {
        let sets = self.working_sets();
        let of_it = sets.iter().filter(|((name, _), _)| name == function);
        of_it.map(|(_, set)| set.clone()).collect()
    }

    fn working_sets(&self) -> MutexGuard<'_, BTreeMap<(String, String), WorkingSet>> {
        self.working_sets.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// All metrics as text; the gauges are given.
    pub fn render(
        &self,
        functions: &[(String, usize)],
        (idle, serving, all): (usize, usize, usize),
    ) -> Result<String, std::fmt::Error> {
        self.replicas.clear();
        for (function_name, count) in functions {
            let labels = FunctionLabels {
                function_name: function_name.clone(),
            };
            self.replicas.get_or_create(&labels).set(gauge(*count));
        }
        self.drift.clear();
        let mut sets = self.working_sets();
        sets.retain(|(name, _), _| functions.iter().any(|(there, _)| there == name));
        for ((function_name, input), set) in sets.iter() {
            let labels = InputLabels {
                function_name: function_name.clone(),
                input: input.clone(),
            };
            self.drift.get_or_create(&labels).set(share_outside(set));
        }
        drop(sets);
        let busy = all.saturating_sub(idle + serving);
        for (state, count) in [("idle", idle), ("serving", serving), ("busy", busy)] {
            self.sandboxes
                .get_or_create(&StateLabels { state })
                .set(gauge(count));
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// The part of the pages that an instance can have touched that was not recorded before.
pub fn share_outside(set: &WorkingSet) -> f64 {
    set.outside as f64 / (set.known + set.outside).max(1) as f64
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_have_the_names_that_dashboards_ask_for() {
        let metrics = Metrics::new();
        metrics.call_started("hello.ns");
        metrics.call("hello.ns", 200, Duration::from_millis(3));
        metrics.start(
            StartKind::Repurposed,
            Duration::from_millis(2),
            &[("restore".into(), 900)],
        );
        metrics.learnt(
            "hello.ns",
            WorkingSet {
                input: "big".into(),
                known: 60,
                outside: 20,
                ..WorkingSet::default()
            },
        );
        let text = metrics
            .render(&[("hello.ns".into(), 2)], (1, 2, 3))
            .unwrap();
        for line in [
            r#"gateway_function_invocation_total{function_name="hello.ns",code="200"} 1"#,
            r#"gateway_function_invocation_started_total{function_name="hello.ns"} 1"#,
            r#"gateway_service_count{function_name="hello.ns"} 2"#,
            r#"trenv_sandboxes{state="idle"} 1"#,
            r#"trenv_working_set_drift{function_name="hello.ns",input="big"} 0.25"#,
            r#"trenv_start_seconds_count{kind="repurposed"} 1"#,
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
    }
}
