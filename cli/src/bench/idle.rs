//! Idle sandboxes: waiting for them, and ending them, so that a call needs a new one.

use std::time::{Duration, Instant};

use anyhow::bail;
use http::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use trenv_config::Config;

use crate::functions::scale;
use crate::gateway::Gateway;
use crate::shim::sandboxes;

const PATIENCE: Duration = Duration::from_secs(60);
/// How long the provider is given to notice.
const NOTICED: Duration = Duration::from_millis(300);

/// Leaves as many idle sandboxes as are wanted and as the provider may have, by instances of a function
/// that has none; says how many sandboxes there are.
pub async fn make(
    gateway: &Gateway,
    config: &Config,
    function: &str,
    wanted: u64,
) -> anyhow::Result<usize> {
    let wanted = wanted.min(config.provider.max_sandboxes as u64);
    scale(gateway, function, None, wanted, PATIENCE).await?;
    scale(gateway, function, None, 0, PATIENCE).await?;
    Ok(sandboxes(config, &config.provider.namespace).await?.len())
}

/// Waits until only one instance is left and all other sandboxes, as many as the provider keeps,
/// are idle.
pub async fn wait_for_all_but_one(config: &Config) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let all = sandboxes(config, &config.provider.namespace).await?;
        let states: Vec<&str> = all.iter().map(crate::ps::state).collect();
        let idle = states.iter().filter(|state| **state == "idle").count();
        if idle >= config.provider.idle_sandboxes && idle + 1 == states.len() {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("Waited in vain until the other sandboxes are idle: {states:?}");
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Ends all idle sandboxes at once, and waits until the provider has none. It makes new ones then;
/// the call that follows comes first.
pub async fn end_all(gateway: &Gateway, config: &Config) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        let all = sandboxes(config, &config.provider.namespace).await?;
        for sandbox in all.iter().filter(|one| crate::ps::state(one) == "idle") {
            // By their pid 1: containerd's own way takes longer than a new sandbox does.
            let pid = Pid::from_raw(i32::try_from(sandbox.init_pid)?);
            let _ = kill(pid, Signal::SIGKILL);
        }
        let again = Instant::now() + NOTICED;
        while Instant::now() < again {
            let (_, text) = gateway.system(Method::GET, "/metrics", None).await?;
            let none = "trenv_sandboxes{state=\"idle\"} 0\n";
            if String::from_utf8_lossy(&text).contains(none) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    bail!("The provider always has an idle sandbox")
}
