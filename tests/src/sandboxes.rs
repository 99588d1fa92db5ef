//! Sandboxes as `trenv ps --json` lists them.

use std::path::PathBuf;

use serde::Deserialize;

/// One sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sandbox {
    pub id: String,
    pub state: String,
    pub tenancy: String,
    pub address: String,
    pub init_pid: i32,
    pub template: String,
}

impl Sandbox {
    /// The identity of one of its namespaces, e.g. `net`.
    #[must_use]
    pub fn namespace(&self, name: &str) -> Option<PathBuf> {
        std::fs::read_link(format!("/proc/{}/ns/{name}", self.init_pid)).ok()
    }
}
