//! `trenv bench methods`: the start methods on the same functions, by the same client.
//!
//! [`deployed`] changes a function's start method by its annotation and puts its own back,
//! [`figures`] holds what was measured, [`chart`] draws it. Starts come in blocks, since a change of
//! method is an update; the order of blocks is random with a seed.

mod chart;
mod deployed;
mod figures;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use http::HeaderValue;
use indicatif::{ProgressBar, ProgressStyle};
use trenv_config::Config;

use self::deployed::Deployed;
use self::figures::{BESIDE, FunctionFigures, Memory, ROWS, Report, Start};
use super::order::Order;
use super::restore::interrupted;
use super::runc::Runc;
use super::start::{as_runc, call, machine, steps};
use super::{idle, memory};
use crate::functions::scale;
use crate::gateway::{Gateway, Reply};
use crate::shim::sandboxes;

#[derive(Debug, Clone, clap::Args)]
pub struct MethodsOptions {
    /// Functions to measure; they must be deployed
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "hello-python,hello-node,json-python,image-node,numpy-python"
    )]
    pub functions: Vec<String>,
    /// Start methods to compare; copy-base is for functions that are made from a base
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "template,attach,copy,lazy,reap,faasnap,spice,criu,criu-lazy"
    )]
    pub methods: Vec<String>,
    /// Measured starts by each method, over all functions together
    #[arg(long, default_value_t = 200)]
    pub starts: u64,
    /// Measured starts in a row of one function by one method
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    pub block: u64,
    /// Starts of each function by each method before all measured ones, in which methods that
    /// record what calls touch do so
    #[arg(long, default_value_t = 5)]
    pub unmeasured: u64,
    /// Starts in a new sandbox
    #[arg(long, default_value_t = 40)]
    pub cold: u64,
    /// Starts through stock runc
    #[arg(long, default_value_t = 40)]
    pub runc: u64,
    /// Sandboxes on which the starts happen
    #[arg(long, default_value_t = 10)]
    pub sandboxes: u64,
    /// Kind of input that the calls name, by which the pages that they need are recorded
    #[arg(long)]
    pub input: Option<HeaderValue>,
    /// Milliseconds before each call, in which the next start is prepared; 0: calls in a row
    #[arg(long, default_value_t = 100)]
    pub pause_ms: u64,
    /// Seed of the order of blocks
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Draw a bar chart into this file
    #[arg(long, num_args = 0..=1, default_missing_value = "methods.svg", value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// How long scaling may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a function started through runc may take.
const RUNC_PATIENCE: Duration = Duration::from_secs(20);
const TEMPLATE: &str = "template";
/// The methods that not every machine has. For those of CRIU a function is built anew.
const NOT_EVERYWHERE: [&str; 3] = ["attach", "criu", "criu-lazy"];

/// Starts in a row of one function by one method.
#[derive(Debug, Clone, Copy)]
struct Block {
    function: usize,
    method: &'static str,
    starts: u64,
}

/// Makes all starts of a plan; what failed is in the report. The functions get their own start
/// methods back, also after an error or an interrupt.
pub async fn measure(
    gateway: &Gateway,
    config: &Config,
    options: &MethodsOptions,
) -> anyhow::Result<Report> {
    let methods = methods(&options.methods)?;
    let mut functions = Vec::new();
    for name in &options.functions {
        functions.push(Deployed::find(gateway, name).await?);
    }
    if functions.is_empty() {
        bail!("There is no function to measure; name some with --functions");
    }
    let mut bench = Bench::new(gateway, config, options, &functions);
    let outcome = tokio::select! {
        outcome = bench.run(&methods) => outcome,
        interrupted = interrupted() => Err(interrupted),
    };
    bench.bar.finish_and_clear();
    let report = bench.report;
    let mut back = Ok(());
    for function in &functions {
        // The others get theirs back all the same; the last error is told.
        if let Err(err) = function.put_back(gateway).await {
            back = Err(err);
        }
    }
    match (outcome, back) {
        (Ok(()), Ok(())) => {}
        (Ok(()), Err(left)) => return Err(left),
        (Err(failed), Ok(())) => return Err(failed),
        (Err(failed), Err(left)) => return Err(failed.context(format!("{left:#}"))),
    }
    if let Some(file) = &options.svg {
        let subtitle = format!(
            "{} CPUs ({}), Linux {}, {} starts by each method, seed {}",
            report.machine.cpus,
            report.machine.cpu,
            report.machine.kernel,
            options.starts,
            report.seed
        );
        std::fs::write(file, chart::svg(&report.functions, &subtitle))
            .with_context(|| format!("Failed to write the chart {}", file.display()))?;
    }
    Ok(report)
}

/// The rows of the methods that are asked for.
fn methods(names: &[String]) -> anyhow::Result<Vec<&'static str>> {
    let rows = ROWS.into_iter();
    let known: Vec<&str> = rows.filter(|row| !BESIDE.contains(row)).collect();
    names
        .iter()
        .map(|name| {
            let found = known.iter().find(|known| *known == name);
            found.copied().with_context(|| {
                format!(
                    "{name:?} is no start method; name some of {}",
                    known.join(", ")
                )
            })
        })
        .collect()
}

struct Bench<'a> {
    gateway: &'a Gateway,
    config: &'a Config,
    options: &'a MethodsOptions,
    functions: &'a [Deployed],
    order: Order,
    report: Report,
    bar: ProgressBar,
}

impl<'a> Bench<'a> {
    fn new(
        gateway: &'a Gateway,
        config: &'a Config,
        options: &'a MethodsOptions,
        functions: &'a [Deployed],
    ) -> Self {
        let bar = ProgressBar::new(0);
        if let Ok(style) =
            ProgressStyle::with_template("{msg:<10} [{bar:30}] {pos}/{len} {elapsed} (left {eta})")
        {
            bar.set_style(style.progress_chars("=> "));
        }
        let figures = functions.iter().map(|function| FunctionFigures {
            name: function.name.clone(),
            image_bytes: function.image_bytes,
            ..FunctionFigures::default()
        });
        let report = Report {
            machine: machine(),
            seed: options.seed,
            functions: figures.collect(),
            ..Report::default()
        };
        Self {
            gateway,
            config,
            options,
            functions,
            order: Order::new(options.seed),
            report,
            bar,
        }
    }

    async fn run(&mut self, methods: &[&'static str]) -> anyhow::Result<()> {
        let methods = &self.available(methods).await?[..];
        let count = methods.len() as u64;
        let each = self.functions.len() as u64 * self.options.unmeasured;
        let measured = self.options.starts * count + self.options.cold + self.options.runc;
        self.bar.set_length(measured + each * count);
        for function in self.functions {
            self.scale(&function.name, 0).await?;
        }
        self.say("sandboxes");
        let first = &self.functions[0].name;
        self.report.sandboxes =
            idle::make(self.gateway, self.config, first, self.options.sandboxes).await?;
        self.say("learning");
        for function in self.functions {
            for method in methods {
                function.use_method(self.gateway, method).await?;
                for _ in 0..self.options.unmeasured {
                    self.unmeasured(&function.name, method).await?;
                    self.bar.inc(1);
                }
            }
        }
        self.say("methods");
        for block in self.blocks(methods) {
            let function = &self.functions[block.function];
            function.use_method(self.gateway, block.method).await?;
            // What the update has caused is over then.
            self.first_call(block.function, block.method).await?;
            for _ in 0..block.starts {
                self.measured(block.function, block.method).await?;
            }
        }
        self.cold().await?;
        self.runc().await
    }

    /// The methods that this machine has for all functions; of the others the reason is told.
    async fn available(&mut self, methods: &[&'static str]) -> anyhow::Result<Vec<&'static str>> {
        let mut available = Vec::new();
        for method in methods {
            let mut refused = None;
            if NOT_EVERYWHERE.contains(method) {
                self.say("building");
                for function in self.functions {
                    refused = function.build_for(self.gateway, method).await?;
                    if refused.is_some() {
                        break;
                    }
                }
            }
            match refused {
                Some(reason) => drop(self.report.unavailable.insert(method, reason)),
                None => available.push(*method),
            }
        }
        Ok(available)
    }

    /// All measured starts, in seeded order.
    fn blocks(&mut self, methods: &[&'static str]) -> Vec<Block> {
        let mut blocks = Vec::new();
        let functions = self.functions.len() as u64;
        for method in methods {
            for function in 0..self.functions.len() {
                // The first ones take what does not divide.
                let odd = u64::from((function as u64) < self.options.starts % functions);
                let mut left = self.options.starts / functions + odd;
                while left > 0 {
                    let starts = left.min(self.options.block);
                    left -= starts;
                    blocks.push(Block {
                        function,
                        method,
                        starts,
                    });
                }
            }
        }
        self.order.shuffle(&mut blocks);
        blocks
    }

    async fn unmeasured(&self, name: &str, method: &str) -> anyhow::Result<()> {
        self.pause().await;
        call(self.gateway, name, self.options.input.as_ref())
            .await
            .with_context(|| format!("{name} does not start by {method}"))?;
        self.scale(name, 0).await
    }

    /// A start without a call, and the page faults of the first call after it.
    async fn first_call(&mut self, index: usize, method: &'static str) -> anyhow::Result<()> {
        let name = &self.functions[index].name;
        self.pause().await;
        let started = self.scale(name, 1).await;
        started.with_context(|| format!("{name} does not start by {method}"))?;
        let pid = self.instance(name).await?;
        let before = memory::faults(pid)?;
        call(self.gateway, name, self.options.input.as_ref())
            .await
            .with_context(|| format!("{name} does not answer, started by {method}"))?;
        let faults = memory::faults(pid)?.saturating_sub(before);
        self.report.record_first_call(index, method, faults);
        self.scale(name, 0).await
    }

    /// One start, all that is measured of it, and its end.
    async fn measured(&mut self, index: usize, method: &'static str) -> anyhow::Result<()> {
        let name = self.functions[index].name.clone();
        self.pause().await;
        let outcome = self.start(&name).await;
        self.file(index, method, outcome, &["repurposed"]);
        self.scale(&name, 0).await
    }

    /// Files a start by what its reply says of it.
    fn file(
        &mut self,
        index: usize,
        row: &'static str,
        outcome: anyhow::Result<(Start, String)>,
        wanted: &[&str],
    ) {
        self.bar.inc(1);
        match outcome {
            Ok((start, kind)) if wanted.contains(&kind.as_str()) => {
                self.report.record(index, row, Ok(start));
            }
            Ok((start, kind)) if kind == "parked" && row == TEMPLATE => {
                self.report.record(index, "parked", Ok(start));
            }
            Ok(_) => self.report.otherwise += 1,
            Err(err) => self.report.record(index, row, Err(err)),
        }
    }

    /// A start by a call, a second call, and the instance's memory then; with the kind of start.
    async fn start(&self, name: &str) -> anyhow::Result<(Start, String)> {
        let first = computed(call(self.gateway, name, self.options.input.as_ref()).await?)?;
        let kind = first.header("x-trenv-start").to_owned();
        self.pause().await;
        let second = computed(call(self.gateway, name, self.options.input.as_ref()).await?)?;
        if second.header("x-trenv-start") != "warm" {
            bail!("the second call met another instance");
        }
        let start = Start {
            first_byte: first.first_byte,
            steps: steps(first.header("x-trenv-steps")),
            second: Some(second.first_byte),
            memory: Some(self.memory(name).await?),
        };
        Ok((start, kind))
    }

    /// Pid 1 of the only instance of `name`.
    async fn instance(&self, name: &str) -> anyhow::Result<i32> {
        let all = sandboxes(self.config, &self.config.provider.namespace).await?;
        // A tenancy is NAME-REVISION-UNIQUE.
        let of_it = |tenancy: &str| tenancy.rsplitn(3, '-').nth(2) == Some(name);
        let found = all
            .iter()
            .find(|one| crate::ps::state(one) == "ready" && of_it(&one.tenancy))
            .with_context(|| format!("the shim knows no instance of {name}"))?;
        Ok(i32::try_from(found.init_pid)?)
    }

    /// The memory of the only instance of `name`.
    async fn memory(&self, name: &str) -> anyhow::Result<Memory> {
        let pid = self.instance(name).await?;
        let weight = memory::weigh(&[pid], &[], 0)?;
        Ok(Memory {
            private_kb: weight.private_kb_each,
            shared_kb: weight
                .resident_kb_each
                .saturating_sub(weight.private_kb_each),
            faults: memory::faults(pid)?,
        })
    }

    async fn cold(&mut self) -> anyhow::Result<()> {
        if self.options.cold == 0 {
            return Ok(());
        }
        if self.functions.len() < 2 {
            let reason = "another function's instance must keep the shim running meanwhile, and only one function is measured";
            self.report.unavailable.insert("cold", reason.to_owned());
            return Ok(());
        }
        self.say("cold");
        for function in self.functions {
            function.use_method(self.gateway, TEMPLATE).await?;
            self.unmeasured(&function.name, TEMPLATE).await?;
        }
        for index in self.spread(self.options.cold) {
            let name = self.functions[index].name.clone();
            // One instance of another function stays: without any sandbox the shim would end too.
            let other = self.functions[(index + 1) % self.functions.len()]
                .name
                .clone();
            self.scale(&other, 1).await?;
            idle::wait_for_all_but_one(self.config).await?;
            self.pause().await;
            idle::end_all(self.gateway, self.config).await?;
            // The provider makes new ones at once; the call comes first.
            let outcome = self.start(&name).await;
            self.file(index, "cold", outcome, &["cold"]);
            self.scale(&name, 0).await?;
            self.scale(&other, 0).await?;
        }
        Ok(())
    }

    async fn runc(&mut self) -> anyhow::Result<()> {
        if self.options.runc == 0 {
            return Ok(());
        }
        self.say("runc");
        let mut runc = Runc::new(self.config, &self.config.provider.namespace)?;
        for index in self.spread(self.options.runc) {
            self.pause().await;
            let function = as_runc(&self.functions[index].function);
            let first_byte = runc.start(&function, RUNC_PATIENCE).await;
            let outcome = first_byte.map(|first_byte| Start {
                first_byte,
                ..Start::default()
            });
            self.report.record(index, "runc", outcome);
            self.bar.inc(1);
        }
        Ok(())
    }

    /// `count` starts spread evenly over the functions, in seeded order.
    fn spread(&mut self, count: u64) -> Vec<usize> {
        let mut all: Vec<usize> = (0..self.functions.len())
            .cycle()
            .take(usize::try_from(count).unwrap_or(usize::MAX))
            .collect();
        self.order.shuffle(&mut all);
        all
    }

    async fn pause(&self) {
        tokio::time::sleep(Duration::from_millis(self.options.pause_ms)).await;
    }

    async fn scale(&self, name: &str, replicas: u64) -> anyhow::Result<()> {
        scale(self.gateway, name, None, replicas, PATIENCE).await
    }

    fn say(&self, what: &'static str) {
        self.bar.set_message(what);
        if self.bar.is_hidden() {
            eprintln!("bench: {what}");
        }
    }
}

/// A reply with a body, which only the function can have made.
fn computed(reply: Reply) -> anyhow::Result<Reply> {
    match reply.body.is_empty() {
        true => Err(anyhow!("the reply has no body")),
        false => Ok(reply),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_known_by_their_names() {
        let names = |text: &str| text.split(',').map(String::from).collect::<Vec<_>>();
        assert_eq!(
            methods(&names("spice,template")).unwrap(),
            ["spice", TEMPLATE]
        );
        let refused = methods(&names("quick")).unwrap_err().to_string();
        assert!(refused.contains("faasnap"), "{refused}");
    }
}
