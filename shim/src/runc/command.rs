//! Calls of the runc program.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::options::Options;
use crate::error::{Result, ShimError};
use crate::stdio::ProcessEnds;

/// Hooks may run for long; everything else is quick.
const CREATE_LIMIT: Duration = Duration::from_secs(120);
const CALL_LIMIT: Duration = Duration::from_secs(30);

/// runc, for one container.
#[derive(Debug, Clone)]
pub struct Runc {
    pub options: Options,
    pub id: String,
    log: PathBuf,
}

/// Where a new process's streams come from.
pub enum Io {
    Pipes(ProcessEnds),
    /// The socket on which runc hands the terminal over.
    Console(PathBuf),
}

#[derive(Deserialize)]
struct LogLine {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
}

impl Runc {
    pub fn new(options: Options, id: &str, bundle: &Path) -> Self {
        Self {
            options,
            id: id.to_owned(),
            log: bundle.join("log.json"),
        }
    }

    pub async fn create(&self, bundle: &Path, pid_file: &Path, io: Io) -> Result<()> {
        let mut command = self.command("create");
        command.arg("--bundle").arg(bundle);
        if self.options.no_pivot_root {
            command.arg("--no-pivot");
        }
        if self.options.no_new_keyring {
            command.arg("--no-new-keyring");
        }
        self.run_with_io("create", command, pid_file, io, None)
            .await
    }

    /// Runs a further process; `process` is a file with its OCI process.
    pub async fn exec(&self, process: &Path, pid_file: &Path, io: Io) -> Result<()> {
        let mut command = self.command("exec");
        command.arg("--detach").arg("--process").arg(process);
        self.run_with_io("exec", command, pid_file, io, Some(process))
            .await
    }

    pub async fn start(&self) -> Result<()> {
        self.call("start", &[], None, CREATE_LIMIT).await.map(drop)
    }

    pub async fn kill(&self, signal: u32, all: bool) -> Result<()> {
        let signal = signal.to_string();
        // runc wants the id between the flags and the signal.
        let mut command = self.command("kill");
        if all {
            command.arg("--all");
        }
        command.arg(&self.id).arg(signal);
        match self.finish("kill", command, None, CALL_LIMIT).await {
            Err(ShimError::Runc { message, .. }) if is_gone(&message) => Err(ShimError::NotFound {
                kind: "process of",
                id: self.id.clone(),
            }),
            other => other.map(drop),
        }
    }

    pub async fn delete(&self, force: bool) -> Result<()> {
        let flags: &[&str] = if force { &["--force"] } else { &[] };
        match self.call("delete", flags, None, CALL_LIMIT).await {
            // A container deleted before is deleted.
            Err(ShimError::Runc { message, .. }) if message.contains("does not exist") => Ok(()),
            other => other.map(drop),
        }
    }

    pub async fn pause(&self) -> Result<()> {
        self.call("pause", &[], None, CALL_LIMIT).await.map(drop)
    }

    pub async fn resume(&self) -> Result<()> {
        self.call("resume", &[], None, CALL_LIMIT).await.map(drop)
    }

    pub async fn update(&self, resources: Vec<u8>) -> Result<()> {
        self.call("update", &["--resources", "-"], Some(resources), CALL_LIMIT)
            .await
            .map(drop)
    }

    pub async fn pids(&self) -> Result<Vec<u32>> {
        let out = self
            .call("ps", &["--format", "json"], None, CALL_LIMIT)
            .await?;
        serde_json::from_slice(&out).map_err(|err| ShimError::Runc {
            command: "ps".into(),
            message: format!("the answer is not a list of pids: {err}"),
        })
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.options.binary);
        command.arg("--root").arg(&self.options.root);
        command
            .arg("--log")
            .arg(&self.log)
            .args(["--log-format", "json"]);
        if self.options.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.arg(verb).stdin(Stdio::null()).kill_on_drop(true);
        command
    }

    async fn call(
        &self,
        verb: &str,
        flags: &[&str],
        input: Option<Vec<u8>>,
        limit: Duration,
    ) -> Result<Vec<u8>> {
        let mut command = self.command(verb);
        command.args(flags).arg(&self.id);
        self.finish(verb, command, input, limit).await
    }

    async fn finish(
        &self,
        verb: &str,
        mut command: Command,
        input: Option<Vec<u8>>,
        limit: Duration,
    ) -> Result<Vec<u8>> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        if input.is_some() {
            command.stdin(Stdio::piped());
        }
        let action = || ShimError::io(format!("run {} {verb}", self.options.binary));
        let mut child = command.spawn().map_err(action())?;
        let work = async {
            if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
                stdin.write_all(&input).await?;
            }
            child.wait_with_output().await
        };
        let output = tokio::time::timeout(limit, work)
            .await
            .map_err(|_| ShimError::Timeout {
                what: format!("runc {verb} {}", self.id),
                limit,
            })?
            .map_err(action())?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let text = String::from_utf8_lossy(&output.stderr);
        Err(self.failure(verb, text.trim()))
    }

    /// A call whose streams belong to the container: runc's own complaints are in its log.
    async fn run_with_io(
        &self,
        verb: &str,
        mut command: Command,
        pid_file: &Path,
        io: Io,
        spec: Option<&Path>,
    ) -> Result<()> {
        command.arg("--pid-file").arg(pid_file);
        match io {
            Io::Pipes(ProcessEnds([stdin, stdout, stderr])) => {
                self.own(&[&stdin, &stdout, &stderr])?;
                command.stdin(stdin).stdout(stdout).stderr(stderr);
            }
            Io::Console(socket) => {
                if spec.is_some() {
                    command.arg("--tty");
                }
                command.arg("--console-socket").arg(socket);
                command.stdout(Stdio::null()).stderr(Stdio::null());
            }
        }
        command.arg(&self.id);
        let action = || ShimError::io(format!("run {} {verb}", self.options.binary));
        let mut child = command.spawn().map_err(action())?;
        // The command holds the container's ends of the pipes, which would never end then.
        drop(command);
        let status = tokio::time::timeout(CREATE_LIMIT, child.wait())
            .await
            .map_err(|_| ShimError::Timeout {
                what: format!("runc {verb} {}", self.id),
                limit: CREATE_LIMIT,
            })?
            .map_err(action())?;
        if status.success() {
            Ok(())
        } else {
            Err(self.failure(verb, &status.to_string()))
        }
    }

    fn own(&self, fds: &[&OwnedFd]) -> Result<()> {
        let (uid, gid) = (self.options.io_uid, self.options.io_gid);
        if uid == 0 && gid == 0 {
            return Ok(());
        }
        for fd in fds {
            nix::unistd::fchown(fd, Some(uid.into()), Some(gid.into()))
                .map_err(ShimError::io("give the streams to the container's user"))?;
        }
        Ok(())
    }

    fn failure(&self, verb: &str, otherwise: &str) -> ShimError {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let logged = log
            .lines()
            .rev()
            .filter_map(|line| serde_json::from_str::<LogLine>(line).ok())
            .find(|line| line.level == "error" || line.level == "fatal");
        ShimError::Runc {
            command: verb.to_owned(),
            message: logged.map_or_else(|| otherwise.to_owned(), |line| line.msg),
        }
    }
}

fn is_gone(message: &str) -> bool {
    [
        "process already finished",
        "container not running",
        "no such process",
        "does not exist",
    ]
    .iter()
    .any(|known| message.contains(known))
}

/// The pid that runc left in a file.
pub fn read_pid(path: &Path) -> Result<u32> {
    let action = || ShimError::io(format!("read the pid from {}", path.display()));
    let text = std::fs::read_to_string(path).map_err(action())?;
    text.trim().parse().map_err(|_| {
        action()(std::io::Error::new(
            std::io::ErrorKind::InvalidData,
            format!("{text:?} is no pid"),
        ))
    })
}
