//! Which containers share one shim process, and where its socket is.
//!
//! All sandboxes of a containerd namespace share one shim. Other containers group as containerd's
//! own runc shim groups them: by annotation, by CRI sandbox, or each alone.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use trenv_config::Config;

use crate::error::{Result, ShimError};

/// Annotation that makes a container a sandbox.
pub const SANDBOX: &str = "dev.trenv.sandbox";

/// Annotations by which containerd's runc shim groups, first match wins.
const RUNC_GROUPS: [&str; 2] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
];

/// Bytes of a socket's path that the kernel accepts, without the final zero.
const SOCKET_PATH_MAX: usize = 107;

/// A shim process, as `start` names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Group {
    /// All sandboxes of the namespace.
    Sandboxes,
    /// Containers run by runc that belong together.
    Runc(String),
}

/// Files of one shim process.
#[derive(Debug, Clone)]
pub struct Endpoint {
    pub socket: PathBuf,
}

#[derive(serde::Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: HashMap<String, String>,
}

impl Group {
    /// The group of the container whose bundle this is.
    pub fn of_bundle(bundle: &Path, id: &str) -> Result<Self> {
        let path = bundle.join("config.json");
        let text =
            std::fs::read(&path).map_err(ShimError::io(format!("read {}", path.display())))?;
        let spec: Annotated = serde_json::from_slice(&text).map_err(|err| {
            ShimError::InvalidArgument(format!("{} is not an OCI spec: {err}", path.display()))
        })?;
        Ok(Self::of_annotations(&spec.annotations, id))
    }

    fn of_annotations(annotations: &HashMap<String, String>, id: &str) -> Self {
        if annotations.contains_key(SANDBOX) {
            return Self::Sandboxes;
        }
        let named = RUNC_GROUPS.iter().find_map(|key| annotations.get(*key));
        Self::Runc(named.map_or(id, String::as_str).to_owned())
    }

    /// Where the group's shim listens; the same for the same containerd, namespace and group.
    pub fn endpoint(&self, config: &Config, containerd: &str, namespace: &str) -> Endpoint {
        let mut hash = Sha256::new();
        let (kind, name) = match self {
            Self::Sandboxes => ("sandboxes", ""),
            Self::Runc(name) => ("runc", name.as_str()),
        };
        for part in ["trenv.v2", containerd, namespace, kind, name] {
            hash.update(part.as_bytes());
            hash.update([0]);
        }
        let name: String = hash.finalize()[..16]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let own = config.run_dir.join("shim").join(format!("{name}.sock"));
        // A deep run directory must not make sockets impossible.
        let socket = if own.as_os_str().len() <= SOCKET_PATH_MAX {
            own
        } else {
            Path::new("/run/containerd/s").join(format!("{name}.sock"))
        };
        Endpoint { socket }
    }
}

impl Endpoint {
    /// The endpoint behind a `unix://` address.
    pub fn from_address(address: &str) -> Self {
        Self {
            socket: address.strip_prefix("unix://").unwrap_or(address).into(),
        }
    }

    /// The address as containerd expects it from `start`.
    pub fn address(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// Held while the socket is made, joined or removed.
    pub fn lock_file(&self) -> PathBuf {
        self.socket.with_extension("lock")
    }

    /// Directory with one file for each container that `start` has promised to this shim.
    pub fn promises(&self) -> PathBuf {
        self.socket.with_extension("promised")
    }

    /// The promise of one container; ids are containerd's and hold no slash.
    pub fn promise(&self, id: &str) -> PathBuf {
        self.promises()
            .join(OsStr::from_bytes(id.replace('/', "_").as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(pairs: &[(&str, &str)]) -> Group {
        let map = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        Group::of_annotations(&map, "id1")
    }

    #[test]
    fn sandboxes_share_and_others_group_as_runc_does() {
        assert_eq!(group(&[(SANDBOX, "idle")]), Group::Sandboxes);
        assert_eq!(group(&[]), Group::Runc("id1".into()));
        assert_eq!(
            group(&[("io.kubernetes.cri.sandbox-id", "pod")]),
            Group::Runc("pod".into())
        );
        assert_eq!(
            group(&[
                ("io.kubernetes.cri.sandbox-id", "pod"),
                ("io.containerd.runc.v2.group", "mine")
            ]),
            Group::Runc("mine".into())
        );
    }

    #[test]
    fn sockets_differ_by_containerd_namespace_and_group() {
        let config = Config::default();
        let of =
            |group: &Group, address, namespace| group.endpoint(&config, address, namespace).socket;
        let first = of(&Group::Sandboxes, "/a", "n");
        assert_eq!(first, of(&Group::Sandboxes, "/a", "n"));
        for other in [
            of(&Group::Sandboxes, "/b", "n"),
            of(&Group::Sandboxes, "/a", "m"),
            of(&Group::Runc(String::new()), "/a", "n"),
        ] {
            assert_ne!(first, other);
        }
    }

    #[test]
    fn a_deep_run_directory_still_gives_a_usable_socket() {
        let config = Config {
            run_dir: format!("/{}", "d".repeat(200)).into(),
            ..Config::default()
        };
        let socket = Group::Sandboxes.endpoint(&config, "/a", "n").socket;
        assert!(socket.as_os_str().len() <= SOCKET_PATH_MAX);
    }
}
