//! `lazy`: the tree runs at once and each missing page is served when it is touched, as vHive does
//! without REAP.

use super::skeleton::{Prefetch, Watched};
use super::{Base, Method, StartMethod};
use crate::zygote::{PreparedClone, StartRequest, Started, ZygoteError, ZygoteRequest};

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

    fn base(&self) -> Base<'_> {
        Base::Watched(&self.watched)
    }

    fn start(
        &self,
        clone: PreparedClone,
        request: &StartRequest<'_>,
    ) -> Result<Started, ZygoteError> {
        self.watched.start(clone, request, Prefetch::default())
    }

    fn held_bytes(&self) -> u64 {
        self.watched.skeleton.image.mapped().length()
    }
}
