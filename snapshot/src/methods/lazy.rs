//! `lazy`: the tree runs at once and each missing page is served when it is touched, as vHive does
//! without REAP.

use super::skeleton::{Prefetch, Watched};
use super::{Method, StartMethod};
use crate::zygote::{PreparedClone, StartRequest, Started, Zygote, ZygoteError, ZygoteRequest};

#[derive(Debug)]
pub struct Lazy {
    watched: Watched,
}

impl Lazy {
    pub fn prepare(request: ZygoteRequest<'_>) -> Result<Self, ZygoteError> {
        let watched = Watched::build(request)?;
        watched.skeleton.image.mapped().read_all();
        Ok(Self { watched })
    }
}

impl StartMethod for Lazy {
    fn method(&self) -> Method {
        Method::Lazy
    }

    fn zygote(&self) -> &Zygote {
        &self.watched.skeleton.zygote
    }

    fn ready(&self, clone: &PreparedClone) -> Result<(), ZygoteError> {
        self.watched.skeleton.watch(clone)
    }

    fn start(
        &self,
        clone: PreparedClone,
        request: &StartRequest<'_>,
    ) -> Result<Started, ZygoteError> {
        self.watched
            .start(clone, request, Prefetch::default(), false)
    }

    fn learn(&self, pids: &[i32]) -> Result<bool, ZygoteError> {
        self.zygote().learn_files(pids)
    }

    fn helper(&self) -> Option<u32> {
        Some(self.watched.keeper_pid())
    }

    fn resident_bytes(&self) -> Result<u64, ZygoteError> {
        self.watched.skeleton.resident_bytes()
    }

    fn held_bytes(&self) -> u64 {
        self.watched.skeleton.image.mapped().length()
    }
}
