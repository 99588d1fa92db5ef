//! `attach`: each clone attaches the pages of the pool's device by itself, when it starts.
//!
//! `template` has the zygote attach them once, and clones inherit them by fork, ahead of the call. Here
//! zygote and clone lack these areas, and the clone's restorer asks the driver for all of them at once
//! (PSEUDO_MM_ATTACH) before it makes the tree's processes, as the published system does. What the device
//! cannot give (stacks, locked memory, pages of file mappings) is copied.

use super::skeleton::Skeleton;
use super::{Base, Method, StartMethod};
use crate::zygote::{PreparedClone, StartRequest, Started, ZygoteError, ZygoteRequest};

#[derive(Debug)]
pub struct Attach {
    skeleton: Skeleton,
}

impl Attach {
    pub fn prepare(request: ZygoteRequest<'_>) -> Result<Self, ZygoteError> {
        let (skeleton, _) = Skeleton::blank(request)?;
        Ok(Self { skeleton })
    }
}

impl StartMethod for Attach {
    fn method(&self) -> Method {
        Method::Attach
    }

    fn base(&self) -> Base<'_> {
        Base::Skeleton(&self.skeleton)
    }

    fn start(
        &self,
        clone: PreparedClone,
        request: &StartRequest<'_>,
    ) -> Result<Started, ZygoteError> {
        self.skeleton.start_blank(clone, request, &[])
    }

    fn held_bytes(&self) -> u64 {
        self.skeleton.image.mapped().length()
    }
}
