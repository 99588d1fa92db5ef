//! The machine's trenv configuration: one TOML file that every daemon and command reads.
//!
//! [`Config::load`] takes the file named by `TRENV_CONFIG`, else `/etc/trenv/trenv.toml`; a missing
//! default file means the defaults, a missing named file is an error. Unknown keys are errors, so
//! that a misspelt setting never passes silently. The shim inherits `TRENV_CONFIG` from containerd.
//!
//! Paths: `state_dir` survives a reboot (pool, provider's state, network records), `run_dir` need
//! not (sockets, staging mounts), `libexec_dir` holds the binaries that nobody starts by hand.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where the configuration is looked for when `TRENV_CONFIG` does not name a file.
pub const DEFAULT_PATH: &str = "/etc/trenv/trenv.toml";

/// The variable that names another configuration file.
pub const PATH_VARIABLE: &str = "TRENV_CONFIG";

/// The whole configuration of one machine.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Durable state: pool, provider's state, network records.
    pub state_dir: PathBuf,
    /// Volatile state: sockets, staging mounts.
    pub run_dir: PathBuf,
    /// `trenv-init`, `trenv-zygote`, `fwatchdog`.
    pub libexec_dir: PathBuf,
    pub containerd: Containerd,
    pub pool: Pool,
    pub network: Network,
    pub sandbox: Sandbox,
    pub template: Template,
    pub provider: Provider,
}

/// The containerd that runs the sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Containerd {
    /// Path of the gRPC socket.
    pub address: PathBuf,
    pub snapshotter: String,
}

/// Where templates are stored.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pool {
    /// `file`, `memfd` or `dax`.
    pub backend: String,
    /// The device-dax of a `dax` pool, e.g. `/dev/dax0.0`.
    pub device: Option<PathBuf>,
    /// Directory of the pool; `pool` in the state directory when absent.
    pub path: Option<PathBuf>,
    /// Bytes that the pool may hold; a device is taken whole.
    pub size: u64,
}

/// Addresses of sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// Name of the bridge, at most 15 bytes.
    pub bridge: String,
    /// IPv4 network of the sandboxes, e.g. `10.62.0.0/16`; its first address is the bridge's.
    pub subnet: String,
    /// Directory of the CNI plugins.
    pub plugin_dir: PathBuf,
    /// Network namespaces kept ready beyond those in use.
    pub spare: usize,
}

/// What the shim gives to sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sandbox {
    /// Parent of every cgroup of ours, relative to each hierarchy's root.
    pub cgroup_parent: String,
    /// Tenancy cgroups, with their agents, kept ready for each template.
    pub spare_agents: usize,
}

/// What the shim keeps of templates, to start functions from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Template {
    /// Bytes that the zygotes of a namespace, with what other start methods keep in memory, may take
    /// together; 0: as many as there are.
    pub memory_limit: u64,
    /// Bytes of memory that shall stay available on the machine; below them zygotes are evicted. 0:
    /// they never are for that reason.
    pub memory_floor: u64,
}

/// The REST service.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Provider {
    /// Address and port to listen on.
    pub listen: String,
    /// Directory with `basic-auth-user` and `basic-auth-password`; no authentication when absent.
    pub secrets_dir: Option<PathBuf>,
    /// containerd namespace for functions deployed without one.
    pub namespace: String,
    /// Idle sandboxes kept ready beyond those that serve.
    pub idle_sandboxes: usize,
    /// Sandboxes at most, serving and idle together.
    pub max_sandboxes: usize,
    /// Sandboxes that hold a parked instance at most: a function likely to be called next, restored
    /// ahead and stopped before its first instruction.
    pub parked_instances: usize,
    /// Seconds after which an idle instance gives up its sandbox; 0: only when another needs it.
    pub keep_alive_s: u64,
    /// Seconds that a function may take until it is ready.
    pub ready_timeout_s: u64,
    /// Seconds that one call may take.
    pub call_timeout_s: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/trenv".into(),
            run_dir: "/run/trenv".into(),
            libexec_dir: "/usr/local/libexec/trenv".into(),
            containerd: Containerd::default(),
            pool: Pool::default(),
            network: Network::default(),
            sandbox: Sandbox::default(),
            template: Template::default(),
            provider: Provider::default(),
        }
    }
}

impl Default for Containerd {
    fn default() -> Self {
        Self {
            address: "/run/containerd/containerd.sock".into(),
            snapshotter: "overlayfs".into(),
        }
    }
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            backend: "file".into(),
            device: None,
            path: None,
            size: 4 << 30,
        }
    }
}

impl Default for Network {
    fn default() -> Self {
        Self {
            bridge: "trenv0".into(),
            subnet: "10.62.0.0/16".into(),
            plugin_dir: "/usr/lib/cni".into(),
            spare: 2,
        }
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self {
            cgroup_parent: "trenv".into(),
            spare_agents: 2,
        }
    }
}

impl Default for Template {
    fn default() -> Self {
        Self {
            memory_limit: 0,
            memory_floor: 256 << 20,
        }
    }
}

impl Default for Provider {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8080".into(),
            secrets_dir: None,
            namespace: "openfaas-fn".into(),
            idle_sandboxes: 2,
            max_sandboxes: 100,
            parked_instances: 0,
            keep_alive_s: 0,
            ready_timeout_s: 60,
            call_timeout_s: 60,
        }
    }
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("Failed to read the configuration {path}; create it, or correct {PATH_VARIABLE}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("The configuration {path} is not valid; correct the line that the cause names")]
    Parse {
        path: PathBuf,
        source: toml::de::Error,
    },
    #[error("The configuration {path} sets {key} to {value:?}, but it must be {expected}")]
    Value {
        path: PathBuf,
        key: &'static str,
        value: String,
        expected: &'static str,
    },
}

impl Config {
    /// Loads the file named by `TRENV_CONFIG`, else the default file, else the defaults.
    ///
    /// # Errors
    /// When a named file cannot be read, or a file holds something that is not a configuration.
    pub fn load() -> Result<Self, ConfigError> {
        match std::env::var_os(PATH_VARIABLE) {
            Some(path) => Self::read(Path::new(&path)),
            None if Path::new(DEFAULT_PATH).exists() => Self::read(Path::new(DEFAULT_PATH)),
            None => Ok(Self::default()),
        }
    }

    /// Reads one file.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.into(),
            source,
        })?;
        let config: Self = toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.into(),
            source,
        })?;
        config.check(path)?;
        Ok(config)
    }

    /// Directory of the pool.
    #[must_use]
    pub fn pool_path(&self) -> PathBuf {
        self.pool
            .path
            .clone()
            .unwrap_or_else(|| self.state_dir.join("pool"))
    }

    /// File that holds the ttrpc address of the shim of a containerd namespace.
    #[must_use]
    pub fn shim_address_file(&self, namespace: &str) -> PathBuf {
        self.run_dir
            .join("shim")
            .join(format!("{namespace}.address"))
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let wrong = |key, value: &dyn std::fmt::Display, expected| ConfigError::Value {
            path: path.into(),
            key,
            value: value.to_string(),
            expected,
        };
        if !matches!(self.pool.backend.as_str(), "file" | "memfd" | "dax") {
            return Err(wrong(
                "pool.backend",
                &self.pool.backend,
                "\"file\", \"memfd\" or \"dax\"",
            ));
        }
        if self.pool.backend == "dax" && self.pool.device.is_none() {
            return Err(wrong(
                "pool.device",
                &"absent",
                "a device-dax such as \"/dev/dax0.0\" for a pool of backend \"dax\"",
            ));
        }
        if self.pool.size < 16 << 20 {
            return Err(wrong(
                "pool.size",
                &self.pool.size,
                "at least 16777216 bytes (16 MiB)",
            ));
        }
        if self.network.bridge.is_empty() || self.network.bridge.len() > 15 {
            return Err(wrong(
                "network.bridge",
                &self.network.bridge,
                "1 to 15 bytes long",
            ));
        }
        if self.provider.max_sandboxes == 0 {
            return Err(wrong("provider.max_sandboxes", &0, "at least 1"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::read(file.path())
    }

    #[test]
    fn empty_file_means_the_defaults() {
        assert_eq!(read("").unwrap(), Config::default());
    }

    #[test]
    fn a_key_replaces_its_default_only() {
        let config = read("[pool]\nsize = 33554432\n").unwrap();
        assert_eq!(config.pool.size, 32 << 20);
        assert_eq!(config.pool.backend, "file");
    }

    #[test]
    fn a_misspelt_key_is_an_error() {
        assert!(matches!(
            read("[pool]\nsise = 1\n"),
            Err(ConfigError::Parse { .. })
        ));
    }

    #[test]
    fn values_out_of_range_are_named() {
        let err = read("[pool]\nbackend = \"tape\"\n").unwrap_err();
        assert!(err.to_string().contains("pool.backend"), "{err}");
        let err = read("[pool]\nbackend = \"dax\"\n").unwrap_err();
        assert!(err.to_string().contains("pool.device"), "{err}");
        assert!(read("[pool]\nsize = 1\n").is_err());
        assert!(read("[network]\nbridge = \"a-name-that-is-too-long\"\n").is_err());
    }
}
