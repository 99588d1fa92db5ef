//! CRIU's images of templates, for the start methods that need them.

use trenv_pool::TemplateId;
use trenv_sandbox::Sandbox;
use trenv_snapshot::methods::{CriuDumpRequest, CriuError, Image, Images, criu_dump};

use super::Templates;
use crate::error::{Result, ShimError};
use crate::sandbox::Tenancy;

impl Templates {
    /// Has CRIU write an image of a tenancy's tree, which goes on.
    pub(super) fn criu_image(&self, sandbox: &Sandbox, tenancy: &Tenancy) -> Result<Image> {
        let request = CriuDumpRequest {
            binary: &self.zygote_binary(),
            init: sandbox.init_pidfd(),
            root: tenancy.root.pid.cast_signed(),
            root_pid: tenancy.root.pid_in_sandbox,
        };
        criu_dump(&request, &self.criu_images()).map_err(criu_error)
    }

    pub(super) fn criu_images(&self) -> Images {
        Images::in_state(&self.config.state_dir)
    }

    /// Removes the images of a template, of generations before the given one; of all with none.
    pub(super) fn forget_criu_images(&self, id: &TemplateId, before: Option<u64>) {
        if let Err(err) = self.criu_images().remove(id, before) {
            tracing::warn!(
                "Images of {id} stay: {}",
                ShimError::engine("remove them")(err).chain()
            );
        }
    }
}

/// What CRIU did not do, in the caller's terms.
pub(super) fn criu_error(err: CriuError) -> ShimError {
    match err {
        // What was refused is told to people; the function serves on without it.
        CriuError::Absent | CriuError::Failed { doing: "dump", .. } => {
            ShimError::Unimplemented(err.to_string())
        }
        CriuError::NoImage { image } => ShimError::NotFound {
            kind: "CRIU image of the template",
            id: image,
        },
        CriuError::Deadline { doing, limit } => ShimError::Timeout {
            what: format!("CRIU's {doing}"),
            limit,
        },
        err => ShimError::engine("run CRIU")(err),
    }
}
