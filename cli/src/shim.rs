//! The client of the shim's own service, trenv.sandbox.v1.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use trenv_config::Config;
use trenv_sandbox_proto::{ListRequest, SandboxClient, SandboxInfo};

/// Long enough for a busy machine, short enough for somebody who waits.
const TIMEOUT: Duration = Duration::from_secs(10);

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
