//! One function's turn in a sandbox, as containerd's own tools and /proc show it.

use std::fs;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;
use trenv_config::Config;
use trenv_sandbox_proto::SandboxInfo;

use crate::bench::start::ctr;
use crate::gateway::Reply;
use crate::shim::sandboxes;
use crate::table::{Table, micros};

/// containerd's records follow a start within a second.
const SETTLED: Duration = Duration::from_secs(1);

/// What was seen of one turn.
#[derive(Debug, Clone, Serialize)]
pub struct Turn {
    pub function: String,
    pub sandbox: String,
    pub start: String,
    pub first_byte_us: u64,
    /// Inodes of the sandbox's namespaces.
    pub net_namespace: String,
    pub pid_namespace: String,
    /// `ctr task ls` lists it as running, with the sandbox's pid 1.
    pub task_listed: bool,
    /// Processes that `ctr task ps` lists.
    pub processes: usize,
    /// `ctr task metrics` answers.
    pub metrics: bool,
    /// The image that `ctr c info` names.
    pub image: String,
    /// The function's root file system is the snapshot that `ctr c info` names.
    pub own_rootfs: bool,
    /// `ctr task exec` ran a program beside the function.
    pub exec: bool,
}

impl Turn {
    pub fn good(&self) -> bool {
        self.task_listed && self.processes > 1 && self.metrics && self.own_rootfs && self.exec
    }

    pub fn same_sandbox(&self, other: &Self) -> bool {
        self.sandbox == other.sandbox
            && self.net_namespace == other.net_namespace
            && self.pid_namespace == other.pid_namespace
    }
}

/// Asks containerd about the sandbox that has just served a call.
pub fn look(
    config: &Config,
    function: &str,
    sandbox: &SandboxInfo,
    reply: &Reply,
) -> anyhow::Result<Turn> {
    let id = sandbox.id.as_str();
    let namespace = |name: &str| {
        fs::read_link(format!("/proc/{}/ns/{name}", sandbox.init_pid))
            .map(|link| link.to_string_lossy().into_owned())
            .unwrap_or_default()
    };
    let listed = ctr(config, &["task", "ls"])?;
    let pid = sandbox.init_pid.to_string();
    let processes = ctr(config, &["task", "ps", id]).unwrap_or_default();
    let pids: Vec<&str> = processes
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    let (image, own_rootfs) = settled(config, id, &pids, &pid)?;
    let exec = [
        "task",
        "exec",
        "--exec-id",
        &format!("demo-{function}"),
        id,
        "cat",
        "/proc/1/comm",
    ]
    .map(str::to_owned);
    let exec = ctr(config, &exec.each_ref().map(String::as_str));
    Ok(Turn {
        function: function.to_owned(),
        sandbox: id.to_owned(),
        start: reply.header("x-trenv-start").to_owned(),
        first_byte_us: u64::try_from(reply.first_byte.as_micros())?,
        net_namespace: namespace("net"),
        pid_namespace: namespace("pid"),
        task_listed: listed.lines().any(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words == [id, pid.as_str(), "RUNNING"]
        }),
        processes: pids.len(),
        metrics: ctr(config, &["task", "metrics", id]).is_ok_and(|text| !text.trim().is_empty()),
        image,
        own_rootfs,
        exec: exec.is_ok_and(|text| text.trim() == "trenv-init"),
    })
}

/// The image in containerd's record, once record and running root file system agree.
fn settled(config: &Config, id: &str, pids: &[&str], init: &str) -> anyhow::Result<(String, bool)> {
    let end = Instant::now() + SETTLED;
    loop {
        let info: Value = serde_json::from_str(&ctr(config, &["c", "info", id])?)?;
        let text = |key: &str| info[key].as_str().unwrap_or_default().to_owned();
        let mounts = ctr(
            config,
            &[
                "snapshots",
                "--snapshotter",
                &text("Snapshotter"),
                "mounts",
                "/x",
                &text("SnapshotKey"),
            ],
        )
        .unwrap_or_default();
        let own = pids
            .iter()
            .filter(|pid| **pid != init)
            .all(|pid| root_is(pid, &mounts));
        if own && pids.len() > 1 || Instant::now() > end {
            return Ok((text("Image"), own));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whether the root of a process is the overlay that a mount command of containerd describes.
fn root_is(pid: &str, mounts: &str) -> bool {
    let Some(upper) = upper_layer(mounts) else {
        return false;
    };
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    table
        .lines()
        .filter(|line| line.split(' ').nth(4) == Some("/"))
        .any(|line| upper_layer(line) == Some(upper))
}

fn upper_layer(options: &str) -> Option<&str> {
    let rest = options.split("upperdir=").nth(1)?;
    rest.split([',', ' ', '\n']).next()
}

/// Ends the function through containerd, as an administrator would; whether its task is gone then.
pub async fn kill(config: &Config, turn: Option<&Turn>) -> anyhow::Result<bool> {
    let Some(turn) = turn else {
        return Ok(true);
    };
    let namespace = &config.provider.namespace;
    let ready = sandboxes(config, namespace)
        .await?
        .into_iter()
        .find(|sandbox| crate::ps::state(sandbox) == "ready");
    let Some(ready) = ready else {
        eprintln!("No sandbox serves {} any more", turn.function);
        return Ok(false);
    };
    ctr(config, &["task", "kill", "-s", "SIGKILL", &ready.id])?;
    let end = Instant::now() + Duration::from_secs(10);
    while Instant::now() < end {
        let gone = sandboxes(config, namespace)
            .await?
            .iter()
            .all(|sandbox| sandbox.id != ready.id || crate::ps::state(sandbox) == "dead");
        if gone {
            return Ok(true);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(false)
}

/// All turns as a table.
pub fn table(turns: &[Turn]) -> Table {
    let mut table = Table::new([
        "IN ONE SANDBOX",
        "START",
        "FIRST BYTE",
        "TASK LS",
        "TASK PS",
        "METRICS",
        "EXEC",
        "OWN ROOTFS",
        "IMAGE IN C INFO",
        "NET NAMESPACE",
    ]);
    for turn in turns {
        table.row([
            turn.function.clone(),
            turn.start.clone(),
            micros(turn.first_byte_us),
            yes(turn.task_listed).into(),
            turn.processes.to_string(),
            yes(turn.metrics).into(),
            yes(turn.exec).into(),
            yes(turn.own_rootfs).into(),
            turn.image.clone(),
            turn.net_namespace.clone(),
        ]);
    }
    table
}

pub fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "NO" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_upper_layer_is_found_in_a_mount_command_and_in_mountinfo() {
        let command = "mount -t overlay overlay /x -o index=off,workdir=/s/5/work,upperdir=/s/5/fs,lowerdir=/s/1/fs\n";
        let line = "90 80 0:50 / / rw - overlay overlay rw,lowerdir=/s/1/fs,upperdir=/s/5/fs,workdir=/s/5/work";
        assert_eq!(upper_layer(command), Some("/s/5/fs"));
        assert_eq!(upper_layer(line), Some("/s/5/fs"));
        assert_eq!(upper_layer("ro,lowerdir=/a"), None);
    }
}
