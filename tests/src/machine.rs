//! One machine of the tests: its own containerd, provider, bridge, subnet, cgroups and pool.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use base64::Engine;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::containerd::{Containerd, ctr};
use crate::daemon::Daemon;
use crate::disk::Disk;
use crate::http::{self, Reply};
use crate::leftovers::{Leftovers, Marks};
use crate::sandboxes::Sandbox;
use crate::wait::{until, until_some};

const NAMESPACE: &str = "openfaas-fn";
const PASSWORD: &str = "test-password";
/// How long one call may take.
const CALL: Duration = Duration::from_secs(60);
/// How long a function may take until it is ready.
const DEPLOY: Duration = Duration::from_secs(120);

/// From the shim's answer to the provider's table.
const SETTLED: Duration = Duration::from_millis(50);
/// What differs between machines.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Sandboxes at most.
    pub max_sandboxes: usize,
    /// Idle sandboxes kept ready.
    pub idle_sandboxes: usize,
    /// Sandboxes that hold a parked instance, at most.
    pub parked_instances: usize,
    /// Bytes of the pool.
    pub pool_size: u64,
    /// Seconds until a function that is not ready is given up.
    pub ready_timeout_s: u64,
    /// Bytes of a file system of the machine's own for all of its state and containerd's.
    pub disk: Option<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_sandboxes: 8,
            idle_sandboxes: 1,
            parked_instances: 0,
            pool_size: 1 << 30,
            ready_timeout_s: 30,
            disk: None,
        }
    }
}

/// A running machine.
#[derive(Debug)]
pub struct Machine {
    containerd: Containerd,
    provider: Option<Daemon>,
    gateway: SocketAddr,
    binaries: PathBuf,
    marks: Marks,
    stopped: bool,
    // Last: what is in them belongs to the daemons.
    pub(crate) disk: Option<Disk>,
    directory: TempDir,
}

impl Machine {
    /// Starts a machine with the usual settings.
    ///
    /// # Errors
    /// When a daemon does not start.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_with(&Settings::default())
    }

    /// Starts a machine.
    ///
    /// # Errors
    /// When a daemon does not start.
    pub fn start_with(settings: &Settings) -> anyhow::Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("The end-to-end tests make namespaces and mounts; run them as root");
        }
        let directory = tempfile::Builder::new().prefix("trenv-e2e-").tempdir()?;
        let disk = settings
            .disk
            .map(|bytes| Disk::mount(directory.path(), bytes));
        let disk = disk.transpose()?;
        let binaries = binaries()?;
        let number = std::process::id() % 50_000 + next() * 50_000;
        let marks = Marks {
            directory: directory.path().into(),
            cgroup_parent: format!("trenv-e2e-{number}"),
            bridge: format!("te{number}"),
        };
        let gateway = free_port()?;
        write_config(directory.path(), &binaries, &marks, gateway, settings)?;
        let config = directory.path().join("trenv.toml");
        let containerd = Containerd::start(directory.path(), &binaries, &config, disk.is_some())?;
        let mut machine = Self {
            containerd,
            provider: None,
            gateway,
            binaries,
            marks,
            stopped: false,
            disk,
            directory,
        };
        machine.tool("trenv-pool", &["format"])?;
        machine.start_provider()?;
        Ok(machine)
    }

    fn config(&self) -> PathBuf {
        self.directory.path().join("trenv.toml")
    }

    /// A program of this build, to be run against the machine.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.binaries.join(program));
        command.env("TRENV_CONFIG", self.config());
        command
    }

    /// Runs a program of this build against the machine; its output.
    ///
    /// # Errors
    /// When it fails.
    pub fn tool(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self
            .command(program)
            .args(arguments)
            .output()
            .with_context(|| format!("Failed to run {program}"))?;
        if !output.status.success() {
            bail!(
                "{program} {} failed: {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts the provider and waits until it answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn start_provider(&mut self) -> anyhow::Result<()> {
        let mut command = Command::new(self.binaries.join("trenv-provider"));
        command.env("TRENV_CONFIG", self.config());
        let mut provider = Daemon::start("provider", &mut command, self.directory.path())?;
        let gateway = self.gateway;
        let answers = || {
            http::request(gateway, "GET", "/healthz", &[], &[], CALL)
                .is_ok_and(|reply| reply.status == 200)
        };
        let answered = until("the provider", Duration::from_secs(30), || {
            answers() || !provider.runs()
        });
        if answered.is_err() || !provider.runs() {
            bail!("The provider does not answer; {}", provider.last_words());
        }
        self.provider = Some(provider);
        Ok(())
    }

    /// Ends the provider as a crash would.
    pub fn kill_provider(&mut self) {
        if let Some(mut provider) = self.provider.take() {
            provider.kill();
        }
    }

    /// Ends the provider as its administrator would.
    pub fn stop_provider(&mut self) {
        if let Some(mut provider) = self.provider.take() {
            provider.stop();
        }
    }

    /// Ends containerd and starts it again.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restart_containerd(&mut self) -> anyhow::Result<()> {
        self.containerd.restart()
    }

    /// Its directory: configuration, state, logs.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Where the provider listens.
    #[must_use]
    pub fn gateway(&self) -> SocketAddr {
        self.gateway
    }

    /// The provider's process id; 0 while it does not run.
    #[must_use]
    pub fn provider_pid(&self) -> i32 {
        self.provider.as_ref().map_or(0, Daemon::pid)
    }

    /// The most memory that the provider has held so far, in KiB.
    ///
    /// # Errors
    /// When it does not run.
    pub fn provider_peak_kib(&self) -> anyhow::Result<u64> {
        let pid = self.provider_pid();
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        line.and_then(|text| text.trim().trim_end_matches(" kB").parse().ok())
            .context("The provider tells no VmHWM")
    }

    /// A request to a route of the gateway, with the credentials.
    ///
    /// # Errors
    /// When no complete reply comes.
    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<Reply> {
        let login = base64::engine::general_purpose::STANDARD.encode(format!("admin:{PASSWORD}"));
        let login = format!("Basic {login}");
        let headers = [
            ("Authorization", login.as_str()),
            ("Content-Type", "application/json"),
        ];
        let bytes = body.map(Value::to_string).unwrap_or_default();
        http::request(self.gateway, method, path, &headers, bytes.as_bytes(), CALL)
    }

    /// A request without credentials.
    ///
    /// # Errors
    /// When no complete reply comes.
    pub fn anonymous(&self, method: &str, path: &str, body: &[u8]) -> anyhow::Result<Reply> {
        http::request(self.gateway, method, path, &[], body, CALL)
    }

    /// Deploys an image as a function and returns at once.
    ///
    /// # Errors
    /// When the gateway does not accept it.
    pub fn deploy_only(&self, name: &str, image: &str) -> anyhow::Result<()> {
        let body = json!({ "service": name, "image": image });
        let reply = self.request("POST", "/system/functions", Some(&body))?;
        if !matches!(reply.status, 200 | 202) {
            bail!("{name} was not accepted: {} {}", reply.status, reply.text());
        }
        Ok(())
    }

    /// Deploys a sample function and waits until it is ready, with a template.
    ///
    /// # Errors
    /// When it does not get there.
    pub fn deploy(&self, name: &str) -> anyhow::Result<Value> {
        self.deploy_only(name, &format!("docker.io/trenv/{name}:latest"))?;
        let function = self.settled(name)?;
        if function["status"] != "ready" {
            bail!("{name} is not ready: {function:#}\n{}", self.last_words());
        }
        Ok(function)
    }

    /// Waits until a function is no longer being built.
    ///
    /// # Errors
    /// When that takes too long.
    pub fn settled(&self, name: &str) -> anyhow::Result<Value> {
        until_some(&format!("{name} to be built"), DEPLOY, || {
            let function = self.describe(name).ok()?;
            (function["status"] != "building").then_some(function)
        })
        .with_context(|| self.last_words())
    }

    /// What the gateway says about a function.
    ///
    /// # Errors
    /// When it does not know it.
    pub fn describe(&self, name: &str) -> anyhow::Result<Value> {
        let reply = self.request("GET", &format!("/system/function/{name}"), None)?;
        if reply.status != 200 {
            bail!(
                "{name} cannot be described: {} {}",
                reply.status,
                reply.text()
            );
        }
        reply.json()
    }

    /// Calls a function; any status is a reply.
    ///
    /// # Errors
    /// When no complete reply comes.
    pub fn call(&self, name: &str) -> anyhow::Result<Reply> {
        self.anonymous("GET", &format!("/function/{name}"), &[])
    }

    /// Sets the number of a function's instances and waits for it.
    ///
    /// # Errors
    /// When it does not get there.
    pub fn scale(&self, name: &str, replicas: u64) -> anyhow::Result<()> {
        let body = json!({ "serviceName": name, "replicas": replicas });
        let path = format!("/system/scale-function/{name}");
        let reply = self.request("POST", &path, Some(&body))?;
        if !matches!(reply.status, 200 | 202) {
            bail!("{name} was not scaled: {} {}", reply.status, reply.text());
        }
        until(&format!("{replicas} instances of {name}"), CALL, || {
            self.describe(name).is_ok_and(|function| {
                function["instances"].as_array().map_or(0, Vec::len) as u64 == replicas
            })
        })
    }

    /// Removes a function.
    ///
    /// # Errors
    /// When the gateway refuses.
    pub fn remove(&self, name: &str) -> anyhow::Result<()> {
        let body = json!({ "functionName": name });
        let reply = self.request("DELETE", "/system/functions", Some(&body))?;
        if !matches!(reply.status, 200 | 202) {
            bail!("{name} was not removed: {} {}", reply.status, reply.text());
        }
        Ok(())
    }

    /// The sandboxes that the shim lists.
    ///
    /// # Errors
    /// When the shim does not answer.
    pub fn sandboxes(&self) -> anyhow::Result<Vec<Sandbox>> {
        Ok(serde_json::from_str(
            &self.tool("trenv", &["ps", "--json"])?,
        )?)
    }

    /// The only sandbox that serves a function.
    ///
    /// # Errors
    /// When there is none, or several.
    pub fn serving(&self) -> anyhow::Result<Sandbox> {
        let mut ready: Vec<Sandbox> = self.sandboxes()?;
        ready.retain(|sandbox| sandbox.state == "ready");
        match ready.as_slice() {
            [one] => Ok(one.clone()),
            all => bail!("{} sandboxes serve, not one: {all:?}", all.len()),
        }
    }

    /// Waits until a sandbox is empty, and the provider knows.
    ///
    /// # Errors
    /// When it does not get there.
    pub fn idle(&self, id: &str) -> anyhow::Result<()> {
        until(&format!("{id} to be idle"), CALL, || {
            self.sandboxes().is_ok_and(|all| {
                all.iter()
                    .any(|sandbox| sandbox.id == id && sandbox.state == "idle")
            })
        })?;
        std::thread::sleep(SETTLED);
        Ok(())
    }

    /// `ctr` on this machine's containerd, in the functions' namespace.
    ///
    /// # Errors
    /// When it fails.
    pub fn ctr(&self, arguments: &[&str]) -> anyhow::Result<String> {
        ctr(&self.containerd.socket(), NAMESPACE, arguments)
    }

    /// Everything of this machine that exists now.
    #[must_use]
    pub fn leftovers(&self) -> Leftovers {
        Leftovers::find(&self.marks)
    }

    /// Waits until there is no more of anything than in `before`.
    ///
    /// # Errors
    /// When it does not get there.
    pub fn back_to(&self, before: &Leftovers) -> anyhow::Result<()> {
        until(
            "everything to be as before",
            Duration::from_secs(20),
            || self.leftovers().within(before),
        )
        .with_context(|| format!("Before:\n{before}\nNow:\n{}", self.leftovers()))
    }

    /// Process ids of a program of ours on this machine.
    #[must_use]
    pub fn pids_of(&self, program: &str) -> Vec<i32> {
        self.leftovers().pids_of(program)
    }

    /// The ends of the daemons' logs.
    #[must_use]
    pub fn last_words(&self) -> String {
        let provider = self.provider.as_ref().map(Daemon::last_words);
        let mut text = provider.unwrap_or_default();
        text.push('\n');
        text.push_str(&self.containerd.last_words());
        let log = self.directory.path().join("run/logs");
        for entry in fs::read_dir(log).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|end| end == "log") {
                let words = fs::read_to_string(entry.path()).unwrap_or_default();
                let from = words.len().saturating_sub(4000);
                let tail = words.get(from..).unwrap_or(&words);
                text.push_str(&format!("\n{}:\n{tail}", entry.path().display()));
            }
        }
        text
    }

    /// Ends the machine; an error when anything of it is left.
    ///
    /// # Errors
    /// As said.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.stopped = true;
        self.stop_provider();
        let removed = self.containerd.remove_containers(NAMESPACE);
        let only_shared = || {
            let left = self.leftovers();
            // The bridge, and one directory in each hierarchy.
            let network = left.count("network") <= 1 && left.count("addresses") == 0;
            let parent = format!("/{}", self.marks.cgroup_parent);
            let cgroups = left.cgroups().iter().all(|path| path.ends_with(&parent));
            // containerd itself still runs, and reads the directory.
            network && cgroups && left.count("mounts") == 0 && left.count("processes") <= 1
        };
        let gone = until(
            "everything of the machine to go",
            Duration::from_secs(20),
            only_shared,
        );
        let left = self.leftovers();
        let words = self.last_words();
        let clean = removed.is_ok() && gone.is_ok();
        self.containerd.stop(clean);
        self.sweep();
        removed.with_context(|| words.clone())?;
        gone.with_context(|| format!("Left:\n{left}\n{words}"))
    }

    /// Takes away what sandboxes share and, after a failed test, what else there is.
    fn sweep(&self) {
        for process in self.leftovers().pids() {
            let pid = nix::unistd::Pid::from_raw(process);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        let bridge = &self.marks.bridge;
        let _ = Command::new("ip").args(["link", "delete", bridge]).output();
        let table = format!("trenv_{bridge}");
        let _ = Command::new("nft")
            .args(["delete", "table", "ip", &table])
            .output();
        for mount in self.leftovers().mounts().iter().rev() {
            let _ = nix::mount::umount2(Path::new(mount), nix::mount::MntFlags::MNT_DETACH);
        }
        let removed = || {
            for group in self.leftovers().cgroups().iter().rev() {
                let _ = fs::remove_dir(group);
            }
            self.leftovers().cgroups().is_empty()
        };
        let _ = until("the cgroups to go", Duration::from_secs(3), removed);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.stopped {
            return;
        }
        eprintln!(
            "A test ended before its machine did.\n{}",
            self.last_words()
        );
        self.stop_provider();
        let _ = self.containerd.remove_containers(NAMESPACE);
        self.containerd.stop(false);
        self.sweep();
    }
}

/// The directory of this build's programs: tests lie one below.
fn binaries() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let directory = own
        .parent()
        .and_then(Path::parent)
        .context("The test lies nowhere")?;
    let needed = [
        "containerd-shim-trenv-v2",
        "trenv-init",
        "trenv-zygote",
        "trenv-pool",
        "trenv-provider",
        "fwatchdog",
        "trenv",
    ];
    for program in needed {
        if !directory.join(program).is_file() {
            bail!(
                "{} is not there; build everything first: cargo build --workspace",
                directory.join(program).display()
            );
        }
    }
    Ok(directory.to_path_buf())
}

/// A number that no other machine of this test has.
fn next() -> u32 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn free_port() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// A subnet of the benchmark range or beside it that no route of this machine covers.
fn free_subnet() -> anyhow::Result<String> {
    let routes = fs::read_to_string("/proc/net/route")?;
    let taken: Vec<u32> = routes
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(1))
        .filter_map(|hex| u32::from_str_radix(hex, 16).ok())
        .map(u32::from_be)
        .collect();
    let first = std::process::id() % 200;
    (0..200)
        .map(|offset| (first + offset) % 200)
        .find(|third| !taken.contains(&(10 << 24 | 213 << 16 | third << 8)))
        .map(|third| format!("10.213.{third}.0/24"))
        .context("No subnet of 10.213.0.0/16 is free")
}

fn write_config(
    directory: &Path,
    binaries: &Path,
    marks: &Marks,
    gateway: SocketAddr,
    settings: &Settings,
) -> anyhow::Result<()> {
    let secrets = directory.join("secrets");
    fs::create_dir_all(&secrets)?;
    fs::write(secrets.join("basic-auth-user"), "admin")?;
    fs::write(secrets.join("basic-auth-password"), PASSWORD)?;
    let text = format!(
        "state_dir = {:?}\nrun_dir = {:?}\nlibexec_dir = {binaries:?}\n\
         [containerd]\naddress = {:?}\n\
         [pool]\nsize = {}\n\
         [network]\nbridge = {:?}\nsubnet = {:?}\n\
         [sandbox]\ncgroup_parent = {:?}\n\
         [provider]\nlisten = \"{gateway}\"\nsecrets_dir = {secrets:?}\n\
         max_sandboxes = {}\nidle_sandboxes = {}\nparked_instances = {}\n\
         ready_timeout_s = {}\n",
        directory.join("state"),
        directory.join("run"),
        directory.join("c.sock"),
        settings.pool_size,
        marks.bridge,
        free_subnet()?,
        marks.cgroup_parent,
        settings.max_sandboxes,
        settings.idle_sandboxes,
        settings.parked_instances,
        settings.ready_timeout_s,
    );
    fs::create_dir_all(directory.join("state"))?;
    fs::create_dir_all(directory.join("run"))?;
    fs::write(directory.join("trenv.toml"), text)?;
    Ok(())
}
