//! Making a template ready on the shim that runs now: its zygote, over a view of its layers.

use trenv_sandbox_proto as proto;

use super::{Host, StartError};
use crate::containerd::ContainerdError;
use crate::functions::Source;
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
    /// Makes a template ready for its start method on the shim that runs now, unless it is.
    ///
    /// # Errors
    /// When no shim runs, or it cannot make the template ready.
    pub async fn ensure_prepared(&self, source: &Source) -> Result<(), PrepareError> {
        let (revision, method) = (&source.owner, source.method);
        let shim = self.shim(&revision.function().namespace);
        if shim.epoch().await? == revision.methods.prepared(method) {
            return Ok(());
        }
        let _preparing = revision.preparing.lock().await;
        if shim.epoch().await? == revision.methods.prepared(method) {
            return Ok(());
        }
        self.prepare_template(source).await
    }

    /// Has the shim build the zygote of a template for its start method, over a read-only view of the
    /// function's layers.
    ///
    /// # Errors
    /// As [`Host::ensure_prepared`].
    pub async fn prepare_template(&self, source: &Source) -> Result<(), PrepareError> {
        let (revision, method) = (&source.owner, source.method);
        let shim = self.shim(&revision.function().namespace);
        let namespace = self.namespace(&revision.function().namespace)?;
        let template = &source.template;
        let mounts = namespace.snapshot_mounts(&template.view).await?;
        let mut request = proto::PrepareRequest::new();
        request.template_id = template.id.clone();
        request.generation = template.generation;
        request.rootfs = wire_mounts(&mounts);
        request.limits = Some(wire_limits(revision.record.limits)).into();
        request.method = method.name().to_owned();
        if let Some(base) = revision.base() {
            match namespace.snapshot_mounts(&base.template.view).await {
                Ok(mounts) => {
                    let mut wanted = proto::Base::new();
                    wanted.template_id = base.template.id.clone();
                    wanted.generation = base.template.generation;
                    wanted.rootfs = wire_mounts(&mounts);
                    request.base = Some(wanted).into();
                }
                // Removed meanwhile; the function's template is whole without it.
                Err(err) if err.is_not_found() => {}
                Err(err) => return Err(err.into()),
            }
        }
        let epoch = shim.epoch().await?;
        shim.prepare(request).await?;
        revision.methods.set_prepared(method, epoch);
        Ok(())
    }
}
