//! Crashes, and functions that are served after them.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::machine::Machine;
use crate::wait::until;

const PATIENCE: Duration = Duration::from_secs(30);

/// Kills processes at once.
pub fn crash(pids: &[i32]) {
    for pid in pids {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
}

impl Machine {
    /// What a sample function drew at random when it started first.
    ///
    /// # Errors
    /// When it does not answer with it.
    pub fn init_id(&self, name: &str) -> anyhow::Result<String> {
        let body = self.call(name)?.json()?;
        Ok(body["init_id"].as_str().unwrap_or("no init_id").to_owned())
    }

    /// Waits until a function is served again, from its template, with honest refusals at most
    /// meanwhile.
    ///
    /// # Errors
    /// When it is not.
    pub fn served_again(&self, name: &str, init_id: &str) -> anyhow::Result<()> {
        let mut last = String::new();
        let mut dishonest = None;
        let served = until("the function to be served again", PATIENCE, || {
            match self.call(name) {
                Ok(reply) if reply.status == 200 => {
                    last = reply.text();
                    true
                }
                Ok(reply) => {
                    last = format!("{} {}", reply.status, reply.text());
                    if !matches!(reply.status, 502..=504) {
                        dishonest = Some(last.clone());
                    }
                    dishonest.is_some()
                }
                Err(err) => {
                    last = err.to_string();
                    false
                }
            }
        });
        served.map_err(|err| err.context(last.clone()))?;
        anyhow::ensure!(dishonest.is_none(), "no refusal: {last}");
        anyhow::ensure!(last.contains(init_id), "not from its template: {last}");
        Ok(())
    }
}
