//! Making a template ready on the shim that runs now: its zygote, over a view of its layers.

use trenv_sandbox_proto as proto;

use super::{Host, StartError};
use crate::containerd::ContainerdError;
use crate::functions::{Revision, StartMethod, Template};
use crate::shim_client::{ShimError, wire_limits, wire_mounts};

/// Why a template is not ready on the shim.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    #[error(transparent)]
    Shim(#[from] ShimError),
}

impl PrepareError {
    /// Whether the pool, or containerd, has lost what the template is made of.
    pub fn template_gone(&self) -> bool {
        match self {
            Self::Containerd(err) => err.is_not_found(),
            // The shim says NOT_FOUND of an unknown sandbox, too.
            Self::Shim(err) => match err.code() {
                Some(ttrpc::Code::DATA_LOSS) => true,
                Some(ttrpc::Code::NOT_FOUND) => err.to_string().to_lowercase().contains("template"),
                _ => false,
            },
        }
    }

    /// Whether the template, asked to be made ready, turned out to be of no use: it is gone, or
    /// it was made on another kernel or processor.
    pub fn template_useless(&self) -> bool {
        let precondition = Some(ttrpc::Code::FAILED_PRECONDITION);
        self.template_gone() || matches!(self, Self::Shim(err) if err.code() == precondition)
    }

    /// Whether no shim runs.
    pub fn unreachable(&self) -> bool {
        matches!(self, Self::Shim(ShimError::Unreachable { .. }))
    }

    pub(super) fn into_start(self, function: &str) -> StartError {
        let (function, reason) = (function.to_owned(), self.to_string());
        if self.template_gone() {
            StartError::TemplateGone { function, reason }
        } else if self.unreachable() {
            StartError::ShimGone { function, reason }
        } else {
            StartError::Start { function, reason }
        }
    }
}

impl Host {
    /// Has the shim build the template's zygote for `method`, over a read-only view of the
    /// function's layers.
    pub async fn prepare_template(
        &self,
        revision: &Revision,
        template: &Template,
        method: StartMethod,
    ) -> Result<(), PrepareError> {
        let namespace = &revision.function().namespace;
        let mounts = self
            .namespace(namespace)?
            .snapshot_mounts(&template.view)
            .await?;
        let mut request = proto::PrepareRequest::new();
        request.template_id = template.id.clone();
        request.generation = template.generation;
        request.rootfs = wire_mounts(&mounts);
        request.limits = Some(wire_limits(revision.record.limits)).into();
        request.method = method.name().to_owned();
        let shim = self.shim(namespace);
        let epoch = shim.epoch().await?;
        shim.prepare(request).await?;
        revision.methods.set_prepared(method, epoch);
        Ok(())
    }

    /// Makes the template ready for `method` on the shim that runs now, unless it is.
    ///
    /// # Errors
    /// When no shim runs, or it cannot make the template ready.
    pub async fn ensure_prepared(
        &self,
        revision: &Revision,
        template: &Template,
        method: StartMethod,
    ) -> Result<(), PrepareError> {
        let shim = self.shim(&revision.function().namespace);
        if shim.epoch().await? == revision.methods.prepared(method) {
            return Ok(());
        }
        let _preparing = revision.preparing.lock().await;
        if shim.epoch().await? == revision.methods.prepared(method) {
            return Ok(());
        }
        self.prepare_template(revision, template, method).await
    }
}
