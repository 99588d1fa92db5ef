//! What containerd passes on for runc: its options, kept beside the bundle for `delete`.

use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci;
use serde::{Deserialize, Serialize};

use crate::error::{Result, ShimError};

const FILE: &str = "trenv-runc.json";
const RUNC_TYPE: &str = "containerd.runc.v1.Options";
/// What CRI passes for a runtime that has no options of its own.
const GENERIC_TYPE: &str = "runtimeoptions.v1.Options";

/// How runc is called for one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    pub binary: String,
    /// runc's own state, a directory per containerd namespace.
    pub root: PathBuf,
    pub systemd_cgroup: bool,
    pub no_pivot_root: bool,
    pub no_new_keyring: bool,
    pub io_uid: u32,
    pub io_gid: u32,
}

impl Options {
    /// Understands the options of a create request.
    pub fn of_request(any: Option<&Any>, namespace: &str) -> Result<Self> {
        let given = match any {
            Some(any) if any.type_url.ends_with(RUNC_TYPE) => {
                oci::Options::parse_from_bytes(&any.value).map_err(|err| {
                    ShimError::InvalidArgument(format!("The runtime options are damaged: {err}"))
                })?
            }
            Some(any) if !any.type_url.is_empty() && !any.type_url.ends_with(GENERIC_TYPE) => {
                return Err(ShimError::InvalidArgument(format!(
                    "Runtime options of type {} are not known; use {RUNC_TYPE}",
                    any.type_url
                )));
            }
            _ => oci::Options::default(),
        };
        let or = |value: String, default: &str| {
            if value.is_empty() {
                default.into()
            } else {
                value
            }
        };
        Ok(Self {
            binary: or(given.binary_name, "runc"),
            root: Path::new(&or(given.root, "/run/containerd/runc")).join(namespace),
            systemd_cgroup: given.systemd_cgroup,
            no_pivot_root: given.no_pivot_root,
            no_new_keyring: given.no_new_keyring,
            io_uid: given.io_uid,
            io_gid: given.io_gid,
        })
    }

    /// Keeps the options for a `delete` that runs when this shim is dead.
    pub fn store(&self, bundle: &Path) -> Result<()> {
        let path = bundle.join(FILE);
        let text = serde_json::to_vec(self)
            .map_err(|err| ShimError::Fault(format!("the options do not encode: {err}")))?;
        std::fs::write(&path, text).map_err(ShimError::io(format!("write {}", path.display())))
    }

    /// The options kept for a container, if it was run by runc.
    pub fn load(bundle: &Path) -> Option<Self> {
        let text = std::fs::read(bundle.join(FILE)).ok()?;
        serde_json::from_slice(&text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_those_of_containerds_own_shim() {
        let options = Options::of_request(None, "ns").unwrap();
        assert_eq!(options.binary, "runc");
        assert_eq!(options.root, Path::new("/run/containerd/runc/ns"));
    }

    #[test]
    fn unknown_options_are_refused_by_name() {
        let any = Any {
            type_url: "kata.Options".into(),
            ..Any::default()
        };
        let err = Options::of_request(Some(&any), "ns").unwrap_err();
        assert!(err.to_string().contains("kata.Options"), "{err}");
    }

    #[test]
    fn options_survive_the_shim() {
        let bundle = tempfile::tempdir().unwrap();
        let options = Options::of_request(None, "ns").unwrap();
        options.store(bundle.path()).unwrap();
        assert_eq!(Options::load(bundle.path()), Some(options));
    }
}
