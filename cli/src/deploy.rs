//! `trenv deploy`: creates or updates functions and waits until they are ready.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use http::{Method, StatusCode};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::functions::{Function, find};
use crate::gateway::{Gateway, accept};
use crate::stack::{Deployment, Resources, Stack};

#[derive(Debug, clap::Args)]
pub struct DeployOptions {
    /// Stack file with the functions
    #[arg(
        long,
        short = 'f',
        default_value = "stack.yml",
        conflicts_with = "image"
    )]
    file: PathBuf,
    /// Functions of the stack file to deploy; all when absent
    #[arg(value_name = "FUNCTION")]
    only: Vec<String>,
    /// Image to deploy without a stack file
    #[arg(long, requires = "name")]
    image: Option<String>,
    /// Name of the function
    #[arg(long, requires = "image")]
    name: Option<String>,
    /// Namespace of the function
    #[arg(long, requires = "image")]
    namespace: Option<String>,
    /// Command that the watchdog runs
    #[arg(long, requires = "image")]
    fprocess: Option<String>,
    /// Variable of the function's environment, as NAME=VALUE
    #[arg(long = "env", short = 'e', requires = "image")]
    environment: Vec<String>,
    /// Secret that the function may read
    #[arg(long = "secret", requires = "image")]
    secrets: Vec<String>,
    /// Label, as NAME=VALUE
    #[arg(long = "label", short = 'l', requires = "image")]
    labels: Vec<String>,
    /// Annotation, as NAME=VALUE
    #[arg(long = "annotation", requires = "image")]
    annotations: Vec<String>,
    /// Memory that an instance may use, e.g. 128Mi
    #[arg(long, requires = "image")]
    memory_limit: Option<String>,
    /// CPU that an instance may use, e.g. 500m
    #[arg(long, requires = "image")]
    cpu_limit: Option<String>,
    /// Mount the root file system read-only
    #[arg(long, requires = "image")]
    readonly: bool,
    /// Return as soon as the gateway has accepted the functions
    #[arg(long)]
    no_wait: bool,
    /// Seconds to wait for each function
    #[arg(long, default_value_t = 180)]
    timeout: u64,
}

pub async fn run(gateway: &Gateway, options: &DeployOptions) -> anyhow::Result<()> {
    let deployments = match (&options.image, &options.name) {
        (Some(image), Some(name)) => vec![single(options, image, name)?],
        _ => {
            let stack = Stack::read(&options.file)?;
            let directory = options.file.parent().unwrap_or(std::path::Path::new("."));
            stack.deployments(directory, &options.only)?
        }
    };
    let wait = (!options.no_wait).then(|| Duration::from_secs(options.timeout));
    deploy_all(gateway, &deployments, wait).await
}

fn single(options: &DeployOptions, image: &str, name: &str) -> anyhow::Result<Deployment> {
    let limits = Resources {
        memory: options.memory_limit.clone(),
        cpu: options.cpu_limit.clone(),
    };
    Ok(Deployment {
        service: name.to_owned(),
        image: image.to_owned(),
        namespace: options.namespace.clone(),
        env_process: options.fprocess.clone(),
        env_vars: pairs(&options.environment)?,
        secrets: options.secrets.clone(),
        labels: pairs(&options.labels)?,
        annotations: pairs(&options.annotations)?,
        limits: (limits != Resources::default()).then_some(limits),
        read_only_root_filesystem: options.readonly,
        ..Deployment::default()
    })
}

fn pairs(given: &[String]) -> anyhow::Result<std::collections::BTreeMap<String, String>> {
    given
        .iter()
        .map(|pair| {
            let (name, value) = pair
                .split_once('=')
                .with_context(|| format!("{pair:?} is not of the form NAME=VALUE"))?;
            Ok((name.to_owned(), value.to_owned()))
        })
        .collect()
}

/// Deploys functions, all at once, and shows how each gets on.
pub async fn deploy_all(
    gateway: &Gateway,
    deployments: &[Deployment],
    wait: Option<Duration>,
) -> anyhow::Result<()> {
    let bars = MultiProgress::new();
    let running = deployments.iter().map(|deployment| {
        let bar = bars.add(spinner(&deployment.service));
        let gateway = gateway.clone();
        let deployment = deployment.clone();
        tokio::spawn(async move {
            let started = Instant::now();
            let done = deploy(&gateway, &deployment, wait, &bar).await;
            let text = match &done {
                Ok(text) => format!("{text} after {:.1} s", started.elapsed().as_secs_f64()),
                Err(err) => format!("failed: {err:#}"),
            };
            finish(&bar, &deployment.service, &text);
            done.map(drop)
        })
    });
    let running: Vec<_> = running.collect();
    let total = running.len();
    let mut failed = 0;
    for task in running {
        if task.await?.is_err() {
            failed += 1;
        }
    }
    if failed > 0 {
        bail!("{failed} of {total} functions could not be deployed");
    }
    Ok(())
}

async fn deploy(
    gateway: &Gateway,
    deployment: &Deployment,
    wait: Option<Duration>,
    bar: &ProgressBar,
) -> anyhow::Result<String> {
    bar.set_message("sending");
    let body = serde_json::to_value(deployment)?;
    let path = "/system/functions";
    let (mut status, mut answer) = gateway.system(Method::PUT, path, Some(&body)).await?;
    if status == StatusCode::NOT_FOUND {
        (status, answer) = gateway.system(Method::POST, path, Some(&body)).await?;
    }
    accept(status, &answer)?;
    let Some(wait) = wait else {
        return Ok("accepted".to_owned());
    };
    let function = ready(gateway, deployment, wait, bar).await?;
    Ok(match &function.reason {
        Some(reason) => format!("{} ({reason})", function.status()),
        None => function.status().to_owned(),
    })
}

async fn ready(
    gateway: &Gateway,
    deployment: &Deployment,
    wait: Duration,
    bar: &ProgressBar,
) -> anyhow::Result<Function> {
    let end = Instant::now() + wait;
    loop {
        let function = find(
            gateway,
            &deployment.service,
            deployment.namespace.as_deref(),
        )
        .await?;
        let Some(function) = function else {
            bail!("The gateway accepted the function, but does not know it any more");
        };
        match function.status() {
            "ready" | "serving-cold" => return Ok(function),
            "failed" => bail!(
                "{}",
                function
                    .reason
                    .as_deref()
                    .unwrap_or("The gateway names no reason")
            ),
            other => bar.set_message(other.to_owned()),
        }
        if Instant::now() > end {
            bail!(
                "It is still {} after {} s; `trenv logs {}` shows what it prints",
                function.status(),
                wait.as_secs(),
                deployment.service
            );
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn spinner(name: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_prefix(name.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix:<16} {msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// Ends a line of progress; where nobody looks at a terminal, as a plain line.
fn finish(bar: &ProgressBar, name: &str, text: &str) {
    if bar.is_hidden() {
        eprintln!("{name}: {text}");
        return;
    }
    if let Ok(style) = ProgressStyle::with_template("  {prefix:<16} {msg}") {
        bar.set_style(style);
    }
    bar.finish_with_message(text.to_owned());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_need_an_equals_sign_and_may_hold_more() {
        let map = pairs(&["a=b=c".into()]).unwrap();
        assert_eq!(map["a"], "b=c");
        assert!(pairs(&["a".into()]).is_err());
    }
}
