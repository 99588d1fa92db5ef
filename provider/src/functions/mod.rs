//! Functions: what users have deployed, in which state it is, and how it gets there.
//!
//! A [`Function`] is a name with a current [`Revision`]. A revision is one immutable set of image,
//! process, limits and secrets; it is built once (run cold, dumped, its template made ready) and
//! from then on `Ready`, or serving cold with a reason, or failed with a reason. An update builds a
//! second revision beside the first, which serves until the new one can.

mod base;
mod build;
mod criu;
mod deployment;
mod device;
mod key;
mod process;
mod quantity;
mod recover;
mod registry;
mod revision;
mod start_method;
mod store;

pub use base::{Base, BaseTemplate, Source, Variables};
pub use deployment::{Deployment, Limits, check_name};
pub use key::{KeyParts, function_key, template_key};
pub use process::Process;
pub use recover::recover;
pub use registry::{Function, FunctionError, Functions};
pub use revision::{
    Revision, RevisionRecord, RevisionState, Spare, Template, next_tenancy, snapshot_of,
};
pub use start_method::{Methods, StartMethod};
pub use store::{Store, StoreError};

use serde::{Deserialize, Serialize};

/// A function's name within its namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FunctionName {
    pub namespace: String,
    pub name: String,
}

impl std::fmt::Display for FunctionName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.name, self.namespace)
    }
}
