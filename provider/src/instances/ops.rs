//! What the scheduler asks of the world, as a trait, so that it can be tested without one.

use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;

use crate::functions::{Revision, Template};
use crate::shim_client::Step;

/// A sandbox by name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SandboxRef {
    pub namespace: String,
    pub id: String,
}

/// What a cold start brought.
#[derive(Debug, Clone)]
pub struct ColdStart {
    pub address: SocketAddr,
    pub tenancy: String,
    pub steps: Vec<Step>,
}

/// A tenancy that waits before its first instruction.
#[derive(Debug)]
pub struct ParkedStart {
    pub tenancy: String,
    /// Its OCI spec.
    pub spec: Vec<u8>,
}

/// Why an instance could not be started.
#[derive(Debug, thiserror::Error, Clone)]
pub enum StartError {
    #[error("The function {function} failed to build: {reason}")]
    Failed { function: String, reason: String },
    #[error("The function {function} is still being built after {seconds} s; call it again")]
    Building { function: String, seconds: u64 },
    #[error(
        "All {limit} sandboxes are busy since {seconds} s; raise provider.max_sandboxes or call again"
    )]
    Busy { limit: usize, seconds: u64 },
    #[error("The function {function} did not start: {reason}")]
    Start { function: String, reason: String },
    #[error("The function {function} did not start, since its shim is gone: {reason}")]
    ShimGone { function: String, reason: String },
    #[error("The template of {function} is gone ({reason}); it is made anew, call again")]
    TemplateGone { function: String, reason: String },
    #[error("The function {function} was removed")]
    Removed { function: String },
    #[error("The provider is stopping; call again when it runs")]
    Stopping,
}

/// The operations on sandboxes.
///
/// Every operation either succeeds or leaves a sandbox that only [`destroy`](SandboxOps::destroy)
/// may follow. None is called twice at the same time for one sandbox.
#[async_trait]
pub trait SandboxOps: Send + Sync + std::fmt::Debug {
    /// Makes an empty sandbox and tells where its function will listen.
    async fn create_idle(&self, sandbox: &SandboxRef) -> Result<SocketAddr, StartError>;

    /// Makes a sandbox that runs the function's process, and waits until it is ready.
    async fn cold_start(
        &self,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
    ) -> Result<ColdStart, StartError>;

    /// Starts a tenancy in an idle sandbox, for a call of this input; returns its id and the steps
    /// taken.
    async fn repurpose(
        &self,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
        template: &Template,
        input: &str,
    ) -> Result<(String, Vec<Step>), StartError>;

    /// Starts a tenancy in an idle sandbox and stops it before its first instruction.
    async fn park(
        &self,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
        template: &Template,
    ) -> Result<ParkedStart, StartError>;

    /// Lets a parked tenancy go on.
    async fn resume(
        &self,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
        start: ParkedStart,
    ) -> Result<Vec<Step>, StartError>;

    /// Ends the tenancy `tenancy`, after which the sandbox is idle. It has served calls of an input,
    /// or none.
    async fn reset(
        &self,
        sandbox: &SandboxRef,
        tenancy: &str,
        served: Option<&str>,
    ) -> Result<Vec<Step>, StartError>;

    /// Ends a sandbox with whatever runs in it, and frees all of it. Can be repeated.
    async fn destroy(&self, sandbox: &SandboxRef, tenancy: Option<&str>);
}
