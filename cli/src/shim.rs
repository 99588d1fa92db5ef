//! The client of the shim's own service, trenv.sandbox.v1.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use trenv_config::Config;
use trenv_sandbox_proto as proto;
use trenv_sandbox_proto::{ListRequest, SandboxClient, SandboxInfo};

/// Long enough for a busy machine, short enough for somebody who waits.
const TIMEOUT: Duration = Duration::from_secs(10);

/// For a snapshot of a large program, or the first start from one.
const SLOW: Duration = Duration::from_secs(300);

/// The shim of one namespace.
pub struct Shim(SandboxClient);

impl Shim {
    pub async fn connect(config: &Config, namespace: &str) -> anyhow::Result<Self> {
        let file = config.shim_address_file(namespace);
        let address = std::fs::read_to_string(&file).with_context(|| {
            format!(
                "No trenv shim runs for the namespace {namespace}: {} cannot be read",
                file.display()
            )
        })?;
        let address = address.trim();
        let client = proto::socket::connect(address)
            .await
            .with_context(|| format!("Failed to connect to the shim at {address}"))?;
        Ok(Self(SandboxClient::new(client)))
    }

    pub async fn fingerprint(&self) -> anyhow::Result<String> {
        let context = ttrpc::context::with_duration(TIMEOUT);
        let answer = self.0.version(context, &proto::VersionRequest::new()).await;
        Ok(answer.map_err(said)?.fingerprint)
    }

    /// Dumps a sandbox's program into the template `key`. The program ends, or goes on where its files
    /// are to be copied to the layer `copy`.
    pub async fn snapshot(
        &self,
        id: &str,
        key: &str,
        copy: Vec<proto::Mount>,
    ) -> anyhow::Result<proto::SnapshotResponse> {
        let request = proto::SnapshotRequest {
            request_id: request_id(),
            sandbox_id: id.to_owned(),
            key: key.to_owned(),
            copy,
            ..proto::SnapshotRequest::default()
        };
        let context = ttrpc::context::with_duration(SLOW);
        self.0.snapshot(context, &request).await.map_err(said)
    }

    /// Starts a program from a template in an idle sandbox.
    pub async fn repurpose(&self, mut request: proto::RepurposeRequest) -> anyhow::Result<()> {
        request.request_id = request_id();
        let context = ttrpc::context::with_duration(SLOW);
        self.0.repurpose(context, &request).await.map_err(said)?;
        Ok(())
    }

    pub async fn delete_template(&self, id: &str) -> anyhow::Result<()> {
        let request = proto::DeleteTemplateRequest {
            request_id: request_id(),
            template_id: id.to_owned(),
            ..proto::DeleteTemplateRequest::default()
        };
        let context = ttrpc::context::with_duration(SLOW);
        self.0
            .delete_template(context, &request)
            .await
            .map_err(said)?;
        Ok(())
    }
}

/// Ids are the shim's for as long as it runs, so they name this process and the time.
fn request_id() -> String {
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let time = time.unwrap_or_default().as_nanos();
    format!("trenv-{}-{time}", std::process::id())
}

/// A refusal in the shim's own words.
fn said(err: ttrpc::Error) -> anyhow::Error {
    match err {
        ttrpc::Error::RpcStatus(status) => anyhow::anyhow!("{}", status.message()),
        err => anyhow::Error::new(err).context("The shim does not answer"),
    }
}

/// containerd namespaces in which a shim has published its address.
pub fn namespaces(config: &Config) -> Vec<String> {
    let directory = config.run_dir.join("shim");
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .map(|entries| {
            entries
                .flatten()
                .filter_map(|entry| {
                    let name = entry.file_name().into_string().ok()?;
                    Some(name.strip_suffix(".address")?.to_owned())
                })
                .collect()
        })
        .unwrap_or_default();
    names.sort();
    names
}

/// The sandboxes of one namespace. A shim that has ended, and so has no sandboxes, answers nothing.
pub async fn sandboxes(config: &Config, namespace: &str) -> anyhow::Result<Vec<SandboxInfo>> {
    let Some(client) = connect(&config.shim_address_file(namespace)).await? else {
        return Ok(Vec::new());
    };
    let answer = client
        .list(ttrpc::context::with_duration(TIMEOUT), &ListRequest::new())
        .await
        .with_context(|| format!("The shim of {namespace} did not list its sandboxes"))?;
    Ok(answer.sandboxes)
}

/// The shim that has published its address in `file`; none if it has ended.
pub async fn connect(file: &Path) -> anyhow::Result<Option<SandboxClient>> {
    let address = match std::fs::read_to_string(file) {
        Ok(text) => text.trim().to_owned(),
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(err) => {
            return Err(err).with_context(|| format!("Failed to read {}", file.display()));
        }
    };
    if let Some(path) = address.strip_prefix("unix://")
        && !listens(Path::new(path))
    {
        return Ok(None);
    }
    let client = trenv_sandbox_proto::socket::connect(&address)
        .await
        .with_context(|| format!("Failed to connect to the shim at {address}"))?;
    Ok(Some(SandboxClient::new(client)))
}

fn listens(path: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(path).is_ok()
}
