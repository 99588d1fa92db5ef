//! Plans the calls, makes them, and files each under the start that its reply names.
//!
//! A start is forced by public means only. `warm`: the function has an idle instance. `repurposed`:
//! the function is scaled to zero, which leaves its sandboxes idle, and is called. `evicted`: the
//! function has no instance, and the others' instances fill every sandbox that the provider may
//! have. `cold`: no sandbox is there at all. A reply that names another start than was asked for
//! counts as what it is.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use http::{HeaderValue, Method};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use trenv_config::Config;
use trenv_sandbox_proto::State;

use super::figures::{Kind, Machine, Report};
use super::order::Order;
use super::runc::{Runc, RuncFunction, command};
use super::{idle, memory};
use crate::functions::{Function, find, request_scale, scale};
use crate::gateway::{Gateway, Reply};
use crate::shim::sandboxes;

#[derive(Debug, Clone, clap::Args)]
pub struct StartOptions {
    /// Functions to measure; they must be deployed
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "hello-python,hello-node,json-python,image-node"
    )]
    pub functions: Vec<String>,
    /// Repurposed starts, over all functions together
    #[arg(long, default_value_t = 200)]
    pub repurposed: u64,
    /// Warm calls
    #[arg(long, default_value_t = 200)]
    pub warm: u64,
    /// Evicted starts
    #[arg(long, default_value_t = 200)]
    pub evicted: u64,
    /// Starts in a new sandbox
    #[arg(long, default_value_t = 40)]
    pub cold: u64,
    /// Starts through stock runc
    #[arg(long, default_value_t = 40)]
    pub runc: u64,
    /// Sandboxes on which the repurposed starts happen
    #[arg(long, default_value_t = 10)]
    pub sandboxes: u64,
    /// Idle instances to weigh, of each function; 0 leaves it out
    #[arg(long, default_value_t = 20)]
    pub instances: u64,
    /// Deployed functions to weigh besides
    #[arg(long, value_delimiter = ',')]
    pub weigh: Vec<String>,
    /// Kind of input that the calls name, by which the pages that they need are recorded
    #[arg(long)]
    pub input: Option<HeaderValue>,
    /// Milliseconds between calls, in which the next start is prepared; 0: calls in a row
    #[arg(long, default_value_t = 100)]
    pub pause_ms: u64,
    /// Seed of the order of calls
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// How long scaling and one call may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long scaling is given until it is asked for again.
const FILLED: Duration = Duration::from_millis(300);
/// How long a function started through runc may take.
const RUNC_PATIENCE: Duration = Duration::from_secs(20);

/// Makes all calls of a plan; what failed is in the report.
pub async fn measure(
    gateway: &Gateway,
    config: &Config,
    options: &StartOptions,
) -> anyhow::Result<Report> {
    let mut bench = Bench::new(gateway, config, options).await?;
    bench.run().await?;
    Ok(bench.report)
}

struct Bench<'a> {
    gateway: &'a Gateway,
    config: &'a Config,
    options: &'a StartOptions,
    functions: Vec<Function>,
    order: Order,
    report: Report,
    bar: ProgressBar,
}

impl<'a> Bench<'a> {
    async fn new(
        gateway: &'a Gateway,
        config: &'a Config,
        options: &'a StartOptions,
    ) -> anyhow::Result<Self> {
        let mut functions = Vec::new();
        for name in &options.functions {
            let function = find(gateway, name, None).await?.with_context(|| {
                format!("There is no function {name}; `trenv deploy -f functions/stack.yml` deploys the samples")
            })?;
            if function.status() != "ready" {
                bail!("The function {name} is {}, not ready", function.status());
            }
            functions.push(function);
        }
        if functions.is_empty() {
            bail!("There is no function to measure; name some with --functions");
        }
        let calls = options.warm + options.repurposed + options.evicted + options.cold;
        for name in &options.weigh {
            find(gateway, name, None)
                .await?
                .with_context(|| format!("There is no function {name} to weigh; deploy it"))?;
        }
        let weighed = (functions.len() + options.weigh.len()) as u64;
        let weighs = options.instances.min(1) * weighed;
        let bar = ProgressBar::new(calls + options.runc + weighs);
        if let Ok(style) =
            ProgressStyle::with_template("{msg:<18} [{bar:30}] {pos}/{len} {elapsed} (left {eta})")
        {
            bar.set_style(style.progress_chars("=> "));
        }
        let report = Report {
            machine: machine(),
            seed: options.seed,
            images: image_sizes(config, &functions),
            ..Report::default()
        };
        Ok(Self {
            gateway,
            config,
            options,
            functions,
            order: Order::new(options.seed),
            report,
            bar,
        })
    }

    async fn run(&mut self) -> anyhow::Result<()> {
        self.repurposed_and_warm().await?;
        self.evicted().await?;
        self.cold().await?;
        self.runc().await?;
        self.memory().await?;
        self.bar.finish_and_clear();
        Ok(())
    }

    /// `count` calls spread evenly over the functions, in seeded order.
    fn spread(&mut self, kind: Kind, count: u64) -> Vec<(Kind, usize)> {
        let each = self.functions.len() as u64;
        let mut calls: Vec<(Kind, usize)> = (0..count)
            .map(|index| (kind, usize::try_from(index % each).unwrap_or(0)))
            .collect();
        self.order.shuffle(&mut calls);
        calls
    }

    async fn repurposed_and_warm(&mut self) -> anyhow::Result<()> {
        if self.options.repurposed + self.options.warm == 0 {
            return Ok(());
        }
        self.say("repurposed, warm");
        self.make_sandboxes().await?;
        let mut calls = self.spread(Kind::Repurposed, self.options.repurposed);
        calls.extend(self.spread(Kind::Warm, self.options.warm));
        self.order.shuffle(&mut calls);
        for (kind, index) in calls {
            let name = self.functions[index].name.clone();
            match kind {
                Kind::Warm => self.have_instance(&name).await?,
                _ => self.scale(&name, 0).await?,
            }
            self.call(&name, kind).await;
        }
        self.weigh_parked().await
    }

    /// What each parked instance has to itself, where the provider parks any.
    async fn weigh_parked(&mut self) -> anyhow::Result<()> {
        self.pause().await;
        let all = sandboxes(self.config, &self.config.provider.namespace).await?;
        for name in self.names() {
            let of_it = |tenancy: &str| tenancy.rsplitn(3, '-').nth(2) == Some(&name);
            let parked: Vec<i32> = all
                .iter()
                .filter(|one| one.state == State::PARKED.into() && of_it(&one.tenancy))
                .map(|one| one.init_pid.cast_signed())
                .collect();
            if !parked.is_empty() {
                let own = memory::weigh(&parked, &[], 0)?.private_kb_each;
                self.report.parked_kb.insert(name, own);
            }
        }
        Ok(())
    }

    /// Leaves as many idle sandboxes as the plan wants.
    async fn make_sandboxes(&mut self) -> anyhow::Result<()> {
        let names = self.names();
        for name in &names {
            self.scale(name, 0).await?;
        }
        self.report.sandboxes =
            idle::make(self.gateway, self.config, &names[0], self.options.sandboxes).await?;
        Ok(())
    }

    async fn evicted(&mut self) -> anyhow::Result<()> {
        if self.options.evicted == 0 {
            return Ok(());
        }
        self.say("evicted");
        let calls = self.spread(Kind::Evicted, self.options.evicted);
        let names = self.names();
        if names.len() < 2 {
            bail!("An evicted start needs two functions; name more with --functions");
        }
        let most = self.config.provider.max_sandboxes as u64;
        for (kind, index) in calls {
            let name = &names[index];
            let other = &names[(index + 1) % names.len()];
            self.scale(name, 0).await?;
            self.fill(other, most).await?;
            self.call(name, kind).await;
        }
        Ok(())
    }

    /// Scales a function until no sandbox is left that does not serve.
    async fn fill(&self, name: &str, most: u64) -> anyhow::Result<()> {
        let end = Instant::now() + PATIENCE;
        let mut asked: Option<Instant> = None;
        while Instant::now() < end {
            let mut serving = 0;
            for other in self.names() {
                serving += self.instances(&other).await?;
            }
            if serving >= most {
                return Ok(());
            }
            // A sandbox that is being reset when the scaling comes is left out: ask again for it.
            if asked.is_none_or(|asked| asked.elapsed() > FILLED) {
                let wanted = self.instances(name).await? + most - serving;
                request_scale(self.gateway, name, None, wanted).await?;
                asked = Some(Instant::now());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        bail!("The functions do not fill all {most} sandboxes")
    }

    async fn cold(&mut self) -> anyhow::Result<()> {
        if self.options.cold == 0 {
            return Ok(());
        }
        self.say("cold, trenv");
        let names = self.names();
        for (kind, index) in self.spread(Kind::ColdTrenv, self.options.cold) {
            for name in &names {
                self.scale(name, 0).await?;
            }
            // One instance of another function stays: without any sandbox the shim would end too.
            let other = &names[(index + 1) % names.len()];
            self.scale(other, 1).await?;
            idle::wait_for_all_but_one(self.config).await?;
            self.pause().await;
            idle::end_all(self.gateway, self.config).await?;
            // The provider makes new ones at once; the call comes first.
            self.call_now(&names[index], kind).await;
        }
        Ok(())
    }

    async fn runc(&mut self) -> anyhow::Result<()> {
        if self.options.runc == 0 {
            return Ok(());
        }
        self.say("cold, runc");
        let mut runc = Runc::new(self.config, &self.config.provider.namespace)?;
        for (kind, index) in self.spread(Kind::ColdRunc, self.options.runc) {
            let function = &self.functions[index];
            let name = function.name.clone();
            self.pause().await;
            let outcome = runc.start(&as_runc(function), RUNC_PATIENCE).await;
            self.report
                .record(&name, kind, outcome.map_err(|err| format!("{err:#}")));
            self.bar.inc(1);
        }
        Ok(())
    }

    async fn memory(&mut self) -> anyhow::Result<()> {
        if self.options.instances == 0 {
            return Ok(());
        }
        self.say("memory");
        let mut names = self.names();
        names.extend(self.options.weigh.iter().cloned());
        for name in &names {
            for other in &names {
                self.scale(other, 0).await?;
            }
            self.scale(name, self.options.instances).await?;
            let figures = weigh(self.config, name).await?;
            self.report.memory.insert(name.clone(), figures);
            self.scale(name, 0).await?;
            self.bar.inc(1);
        }
        Ok(())
    }

    /// Calls once, after the pause, and files the outcome.
    async fn call(&mut self, name: &str, wanted: Kind) {
        self.pause().await;
        self.call_now(name, wanted).await;
    }

    async fn call_now(&mut self, name: &str, wanted: Kind) {
        let reply = call(self.gateway, name, self.options.input.as_ref()).await;
        self.bar.inc(1);
        let reply = match reply {
            Ok(reply) => reply,
            Err(err) => return self.report.record(name, wanted, Err(format!("{err:#}"))),
        };
        let kind = Kind::of_header(reply.header("x-trenv-start")).unwrap_or(wanted);
        let was_parked = wanted == Kind::Repurposed && kind == Kind::Parked;
        if kind != wanted && !was_parked {
            self.report.otherwise += 1;
        }
        if kind == Kind::Repurposed {
            for (step, time) in steps(reply.header("x-trenv-steps")) {
                self.report.steps.entry(step).or_default().record(time);
            }
        }
        self.report.record(name, kind, Ok(reply.first_byte));
    }

    async fn pause(&self) {
        tokio::time::sleep(Duration::from_millis(self.options.pause_ms)).await;
    }

    async fn have_instance(&self, name: &str) -> anyhow::Result<()> {
        if self.instances(name).await? == 0 {
            call(self.gateway, name, self.options.input.as_ref()).await?;
        }
        Ok(())
    }

    async fn instances(&self, name: &str) -> anyhow::Result<u64> {
        Ok(find(self.gateway, name, None)
            .await?
            .map_or(0, |function| function.instances.len() as u64))
    }

    async fn scale(&self, name: &str, replicas: u64) -> anyhow::Result<()> {
        scale(self.gateway, name, None, replicas, PATIENCE).await
    }

    fn names(&self) -> Vec<String> {
        self.functions
            .iter()
            .map(|function| function.name.clone())
            .collect()
    }

    fn say(&self, what: &'static str) {
        self.bar.set_message(what);
        if self.bar.is_hidden() {
            eprintln!("bench: {what}");
        }
    }
}

/// Calls a function with a kind of input; any status but success is an error.
pub async fn call(
    gateway: &Gateway,
    name: &str,
    input: Option<&HeaderValue>,
) -> anyhow::Result<Reply> {
    let mut request = gateway.request(Method::GET, &format!("/function/{name}"), "")?;
    if let Some(input) = input {
        let headers = request.headers_mut();
        headers.insert("x-trenv-input", input.clone());
    }
    let reply = tokio::time::timeout(PATIENCE, gateway.measure(request))
        .await
        .with_context(|| format!("No reply after {} s", PATIENCE.as_secs()))??;
    if !reply.status.is_success() {
        let text = String::from_utf8_lossy(&reply.body);
        bail!("{}: {}", reply.status, text.trim());
    }
    Ok(reply)
}

/// Weighs the ready instances of the only function that has some.
async fn weigh(config: &Config, name: &str) -> anyhow::Result<memory::MemoryFigures> {
    let ready: Vec<_> = sandboxes(config, &config.provider.namespace)
        .await?
        .into_iter()
        .filter(|sandbox| crate::ps::state(sandbox) == "ready")
        .collect();
    let template = ready
        .iter()
        .map(|sandbox| sandbox.template_id.as_str())
        .find(|id| !id.is_empty())
        .with_context(|| format!("No instance of {name} was started from a template"))?;
    let pool = trenv_pool::Pool::open(&config.pool_path())?;
    let image_kb = pool
        .list()?
        .iter()
        .filter(|info| info.id.to_string() == template)
        .map(|info| info.stored_pages * trenv_pool::PAGE_SIZE as u64 / 1024)
        .max()
        .unwrap_or(0);
    let pids: Vec<i32> = ready
        .iter()
        .filter_map(|sandbox| i32::try_from(sandbox.init_pid).ok())
        .collect();
    memory::weigh(&pids, &memory::holders(template)?, image_kb)
}

/// Microseconds by step, as `X-Trenv-Steps` has them: a JSON object.
pub fn steps(header: &str) -> Vec<(String, Duration)> {
    let steps: serde_json::Map<String, Value> = serde_json::from_str(header).unwrap_or_default();
    steps
        .into_iter()
        .filter_map(|(name, time)| Some((name, Duration::from_micros(time.as_u64()?))))
        .collect()
}

/// The function's image, and what its deployment adds to it.
pub fn as_runc(function: &Function) -> RuncFunction {
    let mut environment = Vec::new();
    if let Some(process) = function.rest.get("envProcess").and_then(Value::as_str)
        && !process.is_empty()
    {
        environment.push(format!("fprocess={process}"));
    }
    if let Some(variables) = function.rest.get("envVars").and_then(Value::as_object) {
        for (name, value) in variables {
            environment.push(format!("{name}={}", value.as_str().unwrap_or_default()));
        }
    }
    RuncFunction {
        image: function.image.clone(),
        environment,
    }
}

/// `ctr` on this machine's containerd and namespace.
pub fn ctr(config: &Config, arguments: &[&str]) -> anyhow::Result<String> {
    let address = config.containerd.address.to_string_lossy();
    let mut all = vec!["-a", &address, "-n", &config.provider.namespace];
    all.extend(arguments);
    command("ctr", &all)
}

/// The packed size of each function's image, as `ctr` names it in bytes of its layers.
fn image_sizes(config: &Config, functions: &[Function]) -> std::collections::BTreeMap<String, u64> {
    let list = ctr(config, &["image", "ls"]).unwrap_or_default();
    functions
        .iter()
        .filter_map(|function| {
            let line = list
                .lines()
                .find(|line| line.split_whitespace().next() == Some(&function.image))?;
            Some((function.name.clone(), listed_size(line)?))
        })
        .collect()
}

/// The size in a line of `ctr image ls`: a number and its unit.
fn listed_size(line: &str) -> Option<u64> {
    let words: Vec<&str> = line.split_whitespace().collect();
    words.windows(2).find_map(|pair| {
        let [number, unit] = pair else { return None };
        let factor = match *unit {
            "B" => 1.0,
            "KiB" => 1024.0,
            "MiB" => 1024.0 * 1024.0,
            "GiB" => 1024.0 * 1024.0 * 1024.0,
            _ => return None,
        };
        Some((number.parse::<f64>().ok()? * factor) as u64)
    })
}

/// The machine on which this runs.
pub fn machine() -> Machine {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':'))
            .map(|(_, value)| value.trim().to_owned())
            .unwrap_or_default()
    };
    let cpu = read("/proc/cpuinfo");
    Machine {
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        cpu: field(&cpu, "model name"),
        cpus: cpu
            .lines()
            .filter(|line| line.starts_with("processor"))
            .count(),
        memory_kb: field(&read("/proc/meminfo"), "MemTotal")
            .split(' ')
            .next()
            .and_then(|number| number.parse().ok())
            .unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read_from_their_header() {
        assert_eq!(
            steps(r#"{"restore":1500,"rootfs":250}"#),
            [
                ("restore".to_owned(), Duration::from_micros(1500)),
                ("rootfs".to_owned(), Duration::from_micros(250)),
            ]
        );
        assert!(steps("").is_empty());
        assert!(steps(r#"{"x":-1}"#).is_empty());
    }

    #[test]
    fn an_image_size_is_read_from_ctr() {
        let line = "localhost/a:1 application/vnd.oci.image.manifest.v1+json sha256:0 38.5 MiB linux/amd64 -";
        assert_eq!(listed_size(line), Some(40_370_176));
        assert_eq!(listed_size("localhost/a:1 x"), None);
    }
}
