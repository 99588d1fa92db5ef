//! The same function started the ordinary way: containerd's stock runc shim in a network namespace
//! of its own, joined to a bridge by the CNI plugins.
//!
//! What is timed is everything that such a platform does when a call comes: make the namespace, run
//! the plugin, create and start the container, wait until it answers. The client and its clock are
//! those of every other kind of start.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use http::Method;
use trenv_config::Config;

use crate::gateway::Endpoint;

/// The range that is set aside for benchmarks of networks.
const SUBNET: &str = "198.18.77.0/24";
const BRIDGE: &str = "trenv-bench0";
const RUNTIME: &str = "io.containerd.runc.v2";
const PORT: u16 = 8080;

/// A function as runc runs it.
#[derive(Debug, Clone)]
pub struct RuncFunction {
    pub image: String,
    /// Variables beyond the image's own, as `NAME=VALUE`.
    pub environment: Vec<String>,
}

/// The bridge and the records of addresses; gone when dropped.
#[derive(Debug)]
pub struct Runc {
    containerd: PathBuf,
    namespace: String,
    snapshotter: String,
    plugins: PathBuf,
    records: PathBuf,
    forwarding: Option<String>,
    started: u64,
}

/// The kernel's switch that the bridge plugin turns on.
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

impl Runc {
    pub fn new(config: &Config, namespace: &str) -> anyhow::Result<Self> {
        let records = std::env::temp_dir().join(format!("trenv-bench-{}", std::process::id()));
        std::fs::create_dir_all(&records)
            .with_context(|| format!("Failed to create {}", records.display()))?;
        Ok(Self {
            containerd: config.containerd.address.clone(),
            namespace: namespace.to_owned(),
            snapshotter: config.containerd.snapshotter.clone(),
            plugins: config.network.plugin_dir.clone(),
            records,
            forwarding: std::fs::read_to_string(FORWARDING).ok(),
            started: 0,
        })
    }

    /// Starts the function, calls it once, takes it away again; the time to its reply's first byte.
    pub async fn start(
        &mut self,
        function: &RuncFunction,
        deadline: Duration,
    ) -> anyhow::Result<Duration> {
        self.started += 1;
        let id = format!("trenv-bench-{}-{}", std::process::id(), self.started);
        let begin = Instant::now();
        let answered = self.answer(&id, function, begin, deadline).await;
        let cleaned = self.clean(&id);
        let time = answered?;
        cleaned?;
        Ok(time)
    }

    async fn answer(
        &self,
        id: &str,
        function: &RuncFunction,
        begin: Instant,
        deadline: Duration,
    ) -> anyhow::Result<Duration> {
        command("ip", &["netns", "add", id])?;
        self.plugin("loopback", "lo", id, "ADD")?;
        let host = self.plugin("bridge", "eth0", id, "ADD")?;
        let path = format!("network:/run/netns/{id}");
        let mut arguments = vec!["run", "-d", "--null-io", "--runtime", RUNTIME];
        arguments.extend(["--snapshotter", &self.snapshotter, "--with-ns", &path]);
        for variable in &function.environment {
            arguments.extend(["--env", variable]);
        }
        arguments.extend([function.image.as_str(), id]);
        self.ctr(&arguments)?;
        let endpoint = Endpoint { host, port: PORT };
        loop {
            let request = endpoint.request(Method::GET, "/", "")?;
            let asked = begin.elapsed();
            let reason = match endpoint.measure(request).await {
                Ok(reply) if reply.status.is_success() => return Ok(asked + reply.first_byte),
                Ok(reply) => format!("it answers {}", reply.status),
                Err(err) => format!("{err:#}"),
            };
            if begin.elapsed() > deadline {
                bail!("No answer after {} s: {reason}", deadline.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Takes everything away that belongs to a container, whether it came to exist or not.
    fn clean(&self, id: &str) -> anyhow::Result<()> {
        let _ = self.ctr(&["task", "kill", "-s", "SIGKILL", id]);
        let _ = self.ctr(&["task", "delete", "-f", id]);
        let deleted = self.ctr(&["container", "delete", id]);
        let _ = self.plugin("bridge", "eth0", id, "DEL");
        command("ip", &["netns", "delete", id])?;
        deleted.map(drop)
    }

    fn ctr(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let address = self.containerd.to_string_lossy();
        let mut all = vec!["-a", &address, "-n", &self.namespace];
        all.extend(arguments);
        command("ctr", &all)
    }

    /// Runs a CNI plugin; the address that it gave.
    fn plugin(&self, kind: &str, link: &str, id: &str, verb: &str) -> anyhow::Result<String> {
        let network = serde_json::json!({
            "cniVersion": "0.4.0",
            "name": "trenv-bench",
            "type": kind,
            "bridge": BRIDGE,
            "isGateway": true,
            "ipam": { "type": "host-local", "subnet": SUBNET, "dataDir": self.records },
        });
        let mut child = Command::new(self.plugins.join(kind))
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", format!("/run/netns/{id}"))
            .env("CNI_IFNAME", link)
            .env("CNI_PATH", &self.plugins)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| {
                format!("Failed to run the CNI plugin {kind}; apt-get install containernetworking-plugins")
            })?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(network.to_string().as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!(
                "The CNI plugin {kind} failed: {}",
                String::from_utf8_lossy(&output.stdout)
            );
        }
        if verb != "ADD" {
            return Ok(String::new());
        }
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let address = answer["ips"][0]["address"].as_str().unwrap_or_default();
        match address.split_once('/') {
            Some((address, _)) => Ok(address.to_owned()),
            None => bail!("The CNI plugin {kind} gave no address"),
        }
    }
}

impl Drop for Runc {
    fn drop(&mut self) {
        if Path::new("/sys/class/net").join(BRIDGE).exists() {
            let _ = command("ip", &["link", "delete", BRIDGE]);
        }
        if let Some(before) = &self.forwarding
            && std::fs::read_to_string(FORWARDING).is_ok_and(|now| now != *before)
        {
            let _ = std::fs::write(FORWARDING, before);
        }
        let _ = std::fs::remove_dir_all(&self.records);
    }
}

/// Runs a program; its output, or an error with what it printed.
pub fn command(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("Failed to run {program}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {} failed: {}", arguments.join(" "), text.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
