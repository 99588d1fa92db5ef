//! The client of the shim's own service, `trenv.sandbox.v1`.
//!
//! There is one shim per containerd namespace. It writes its address to a file; a client reads the
//! file anew whenever its connection is gone, since a new shim has a new address.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;
use trenv_sandbox_proto as proto;
use ttrpc::context::Context;

use crate::containerd::Mount;
use crate::functions::Limits;

const QUICK: Duration = Duration::from_secs(5);
const SLOW: Duration = Duration::from_secs(120);

/// Why the shim did not do what was asked.
#[derive(Debug, thiserror::Error, Clone)]
pub enum ShimError {
    #[error(
        "No shim runs for the namespace {namespace} ({reason}); it starts with the next sandbox"
    )]
    Unreachable { namespace: String, reason: String },
    #[error("{message}")]
    Refused { code: ttrpc::Code, message: String },
}

impl ShimError {
    /// The status code of a refusal.
    pub fn code(&self) -> Option<ttrpc::Code> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            Self::Unreachable { .. } => None,
        }
    }
}

/// The result of a shim call.
pub type Result<T> = std::result::Result<T, ShimError>;

/// One timed step, in microseconds.
pub type Step = (String, u64);

/// What the end of a tenancy came to.
#[derive(Debug)]
pub struct Reset {
    pub steps: Vec<Step>,
    /// What is known of the pages that its input needs.
    pub learnt: Option<proto::WorkingSet>,
    /// Whether its root is ready for another tenancy.
    pub root_kept: bool,
}

/// A client of the shim of one namespace.
#[derive(Clone)]
pub struct ShimClient {
    namespace: String,
    address_file: PathBuf,
    connected: Arc<Mutex<Option<proto::SandboxClient>>>,
    /// Counts connections: a new one may be to a new shim, which has no template ready.
    epoch: Arc<AtomicU64>,
}

impl std::fmt::Debug for ShimClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShimClient")
            .field("namespace", &self.namespace)
            .field("address_file", &self.address_file)
            .finish_non_exhaustive()
    }
}

/// Asks, and asks a new connection once more when the old one turns out to be dead: for calls that
/// are not about a sandbox of the shim that died. (A macro, since a closure's future cannot be
/// said to be `Send`.)
macro_rules! twice {
    ($self:ident, $method:ident($($argument:expr),*)) => {{
        let first = $self.client().await?.$method($($argument),*).await;
        match $self.outcome(first).await {
            Err(ShimError::Unreachable { .. }) => {
                let second = $self.client().await?.$method($($argument),*).await;
                $self.outcome(second).await
            }
            other => other,
        }
    }};
}

impl ShimClient {
    /// A client that reads the shim's address from `address_file` when it needs it.
    pub fn new(namespace: &str, address_file: PathBuf) -> Self {
        Self {
            namespace: namespace.to_owned(),
            address_file,
            connected: Arc::default(),
            epoch: Arc::default(),
        }
    }

    /// The number of the connection that stands, from 1; a new one is made if none does.
    pub async fn epoch(&self) -> Result<u64> {
        self.client().await?;
        Ok(self.epoch.load(Ordering::Acquire))
    }

    /// The fingerprint of the machine, as the shim sees it.
    pub async fn fingerprint(&self) -> Result<String> {
        let request = proto::VersionRequest::new();
        Ok(twice!(self, version(context(QUICK), &request))?.fingerprint)
    }

    /// All sandboxes that the shim holds.
    pub async fn list(&self) -> Result<Vec<proto::SandboxInfo>> {
        let request = proto::ListRequest::new();
        Ok(twice!(self, list(context(QUICK), &request))?.sandboxes)
    }

    /// Ends the tenancy of a sandbox, which has served calls of an input, or none. `keep_root` asks that
    /// its root be ready for another tenancy.
    pub async fn reset(
        &self,
        sandbox: &str,
        served: Option<&str>,
        keep_root: bool,
    ) -> Result<Reset> {
        let mut request = proto::ResetRequest::new();
        request.unused = served.is_none();
        request.input = served.unwrap_or_default().to_owned();
        request.keep_root = keep_root;
        request.request_id = request_id();
        request.sandbox_id = sandbox.to_owned();
        let client = self.client().await?;
        let answer = client.reset(context(SLOW), &request).await;
        let answer = self.outcome(answer).await?;
        Ok(Reset {
            steps: steps(answer.steps),
            learnt: answer.working_set.into_option(),
            root_kept: answer.root_kept,
        })
    }

    /// Starts a tenancy from a template.
    pub async fn repurpose(&self, mut request: proto::RepurposeRequest) -> Result<Vec<Step>> {
        request.request_id = request_id();
        let client = self.client().await?;
        let answer = client.repurpose(context(SLOW), &request).await;
        Ok(steps(self.outcome(answer).await?.steps))
    }

    /// Lets a parked tenancy go on.
    pub async fn resume(&self, sandbox: &str, tenancy: &str) -> Result<Vec<Step>> {
        let mut request = proto::ResumeRequest::new();
        request.request_id = request_id();
        request.sandbox_id = sandbox.to_owned();
        request.tenancy = tenancy.to_owned();
        let client = self.client().await?;
        let answer = client.resume(context(SLOW), &request).await;
        Ok(steps(self.outcome(answer).await?.steps))
    }

    /// Dumps the function of a sandbox into the template `key`, by CRIU as well if `criu` is set.
    pub async fn snapshot(
        &self,
        sandbox: &str,
        key: &str,
        criu: bool,
    ) -> Result<proto::SnapshotResponse> {
        let mut request = proto::SnapshotRequest::new();
        request.request_id = request_id();
        request.sandbox_id = sandbox.to_owned();
        request.key = key.to_owned();
        request.criu = criu;
        let client = self.client().await?;
        let answer = client.snapshot(context(SLOW), &request).await;
        self.outcome(answer).await
    }

    /// Makes a template ready on this host.
    pub async fn prepare(&self, mut request: proto::PrepareRequest) -> Result<Vec<Step>> {
        request.request_id = request_id();
        let client = self.client().await?;
        let answer = client.prepare(context(SLOW), &request).await;
        Ok(steps(self.outcome(answer).await?.steps))
    }

    /// Mounts the root of a tenancy to come.
    pub async fn stage(&self, template: &str, generation: u64, rootfs: &[Mount]) -> Result<()> {
        let mut request = proto::StageRequest::new();
        request.request_id = request_id();
        request.template_id = template.to_owned();
        request.generation = generation;
        request.rootfs = wire_mounts(rootfs);
        let client = self.client().await?;
        let answer = client.stage(context(QUICK), &request).await;
        self.outcome(answer).await?;
        Ok(())
    }

    /// Deletes a template.
    pub async fn delete_template(&self, id: &str) -> Result<()> {
        let mut request = proto::DeleteTemplateRequest::new();
        request.request_id = request_id();
        request.template_id = id.to_owned();
        twice!(self, delete_template(context(SLOW), &request))?;
        Ok(())
    }

    async fn client(&self) -> Result<proto::SandboxClient> {
        let mut connected = self.connected.lock().await;
        if let Some(client) = &*connected {
            return Ok(client.clone());
        }
        let unreachable = |reason: String| ShimError::Unreachable {
            namespace: self.namespace.clone(),
            reason,
        };
        let address = tokio::fs::read_to_string(&self.address_file)
            .await
            .map_err(|err| unreachable(format!("{}: {err}", self.address_file.display())))?;
        let channel = proto::socket::connect(address.trim())
            .await
            .map_err(|err| unreachable(format!("{}: {err}", address.trim())))?;
        let client = proto::SandboxClient::new(channel);
        *connected = Some(client.clone());
        self.epoch.fetch_add(1, Ordering::AcqRel);
        Ok(client)
    }

    /// Sorts a failure; a broken connection is forgotten, so that the next call makes a new one.
    async fn outcome<T>(&self, answer: std::result::Result<T, ttrpc::Error>) -> Result<T> {
        match answer {
            Ok(answer) => Ok(answer),
            Err(ttrpc::Error::RpcStatus(status)) => Err(ShimError::Refused {
                code: status.code(),
                message: status.message().to_owned(),
            }),
            Err(err) => {
                *self.connected.lock().await = None;
                Err(ShimError::Unreachable {
                    namespace: self.namespace.clone(),
                    reason: err.to_string(),
                })
            }
        }
    }
}

/// A mount in the shim's terms.
pub fn wire_mounts(mounts: &[Mount]) -> Vec<proto::Mount> {
    mounts
        .iter()
        .map(|m| {
            let mut wire = proto::Mount::new();
            wire.type_ = m.kind.clone();
            wire.source = m.source.clone();
            wire.target = m.target.clone();
            wire.options = m.options.clone();
            wire
        })
        .collect()
}

/// Limits in the shim's terms.
pub fn wire_limits(limits: Limits) -> proto::Limits {
    let mut wire = proto::Limits::new();
    wire.memory_bytes = limits.memory_bytes;
    wire.cpu_millis = limits.cpu_millis;
    wire
}

/// Steps out of the shim's terms.
pub fn steps(wire: Vec<proto::Step>) -> Vec<Step> {
    wire.into_iter().map(|s| (s.name, s.microseconds)).collect()
}

fn request_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

fn context(timeout: Duration) -> Context {
    ttrpc::context::with_duration(timeout)
}
