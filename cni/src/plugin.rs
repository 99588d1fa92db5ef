//! Running CNI plugins: `bridge` with `host-local` addresses.

use std::{
    io::Write,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use ipnetwork::Ipv4Network;
use serde::Deserialize;

use crate::{NetworkConfig, NetworkError};

const BRIDGE: &str = "bridge";
const HOST_LOCAL: &str = "host-local";
/// The name of the interface inside.
pub const INTERFACE: &str = "eth0";

/// What a namespace was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attachment {
    pub address: Ipv4Addr,
    pub gateway: Ipv4Addr,
    /// Link-layer address of the interface inside.
    pub link: [u8; 6],
}

/// The plugins with their configuration.
#[derive(Debug)]
pub struct Plugins {
    dir: PathBuf,
    config: String,
    /// Holds a file for every address that is given out.
    pub addresses: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Answer {
    #[serde(default)]
    ips: Vec<Ip>,
    #[serde(default)]
    interfaces: Vec<Interface>,
}

#[derive(Debug, Deserialize)]
struct Interface {
    mac: String,
    /// The network namespace; absent for interfaces of the host.
    sandbox: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Ip {
    address: String,
    gateway: Option<Ipv4Addr>,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    msg: String,
    #[serde(default)]
    details: String,
}

impl Plugins {
    pub fn new(
        config: &NetworkConfig,
        subnet: Ipv4Network,
        gateway: Ipv4Addr,
    ) -> Result<Self, NetworkError> {
        let dir = config.plugin_dir.clone();
        for name in [BRIDGE, HOST_LOCAL] {
            if !dir.join(name).is_file() {
                return Err(NetworkError::PluginMissing { name, dir });
            }
        }
        let addresses = config.state_dir.join("network").join("addresses");
        let text = serde_json::json!({
            "cniVersion": "0.4.0",
            "name": config.bridge,
            "type": BRIDGE,
            "bridge": config.bridge,
            "isDefaultGateway": true,
            // Masquerade is in our own nft table: the plugin would use iptables.
            "ipMasq": false,
            "ipam": {
                "type": HOST_LOCAL,
                "dataDir": addresses,
                "ranges": [[{ "subnet": subnet.to_string(), "gateway": gateway.to_string() }]],
            },
        });
        Ok(Self {
            dir,
            config: text.to_string(),
            addresses: addresses.join(&config.bridge),
        })
    }

    /// Gives a namespace an interface on the bridge, an address and a default route.
    pub fn attach(&self, id: &str, netns: &Path) -> Result<Attachment, NetworkError> {
        let text = self.run("ADD", id, Some(netns))?;
        let failed = |reason: String| NetworkError::Plugin {
            name: BRIDGE,
            command: "ADD",
            id: id.to_owned(),
            reason,
        };
        parse(&text).ok_or_else(|| {
            failed(format!(
                "its answer names no IPv4 address and interface: {text}"
            ))
        })
    }

    /// Takes interface and address back; what is not there is fine.
    pub fn detach(&self, id: &str, netns: &Path) -> Result<(), NetworkError> {
        // Without a namespace the plugin still gives the address back.
        let netns = netns.exists().then_some(netns);
        match self.run("DEL", id, netns) {
            // The file may be an empty one: the namespace's mount did not survive a reboot.
            Err(_) if netns.is_some() => self.run("DEL", id, None).map(drop),
            result => result.map(drop),
        }
    }

    fn run(
        &self,
        command: &'static str,
        id: &str,
        netns: Option<&Path>,
    ) -> Result<String, NetworkError> {
        let failed = |source| NetworkError::PluginRun {
            name: BRIDGE,
            source,
        };
        let mut plugin = Command::new(self.dir.join(BRIDGE))
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", netns.unwrap_or(Path::new("")))
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_PATH", &self.dir)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        if let Some(mut stdin) = plugin.stdin.take() {
            // When the plugin ends before reading all, its answer says why.
            let _ = stdin.write_all(self.config.as_bytes());
        }
        let output = plugin.wait_with_output().map_err(failed)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        let reason = match serde_json::from_str::<Refusal>(&text) {
            Ok(refusal) => format!("{} {}", refusal.msg, refusal.details)
                .trim()
                .to_owned(),
            Err(_) => format!(
                "{} {}",
                text.trim(),
                String::from_utf8_lossy(&output.stderr).trim()
            ),
        };
        Err(NetworkError::Plugin {
            name: BRIDGE,
            command,
            id: id.to_owned(),
            reason,
        })
    }
}

fn parse(text: &str) -> Option<Attachment> {
    let answer: Answer = serde_json::from_str(text).ok()?;
    let link = answer
        .interfaces
        .iter()
        .find(|interface| {
            interface
                .sandbox
                .as_ref()
                .is_some_and(|path| !path.is_empty())
        })
        .and_then(|interface| link_address(&interface.mac))?;
    answer.ips.iter().find_map(|ip| {
        let network: Ipv4Network = ip.address.parse().ok()?;
        Some(Attachment {
            address: network.ip(),
            gateway: ip.gateway?,
            link,
        })
    })
}

/// Six bytes in hexadecimal with colons between them.
fn link_address(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect();
    bytes?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_found_in_an_answer() {
        let text = r#"{"cniVersion":"0.4.0","interfaces":[{"name":"br","mac":"0a:00:00:00:00:01"},
            {"name":"eth0","mac":"0a:00:00:00:00:ff","sandbox":"/run/netns/x"}],
            "ips":[{"version":"4","interface":2,"address":"10.62.0.5/16","gateway":"10.62.0.1"}],
            "dns":{}}"#;
        let found = parse(text).unwrap();
        assert_eq!(found.address, Ipv4Addr::new(10, 62, 0, 5));
        assert_eq!(found.gateway, Ipv4Addr::new(10, 62, 0, 1));
        assert_eq!(found.link, [10, 0, 0, 0, 0, 255]);
        assert_eq!(parse("{}"), None);
        assert_eq!(parse("not json"), None);
    }
}
