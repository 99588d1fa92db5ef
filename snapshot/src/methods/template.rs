//! `template`: a clone of a zygote that has all pages, shared until they are written.

use super::{Method, StartMethod};
use crate::zygote::{PreparedClone, StartRequest, Started, Zygote, ZygoteError, ZygoteRequest};

#[derive(Debug)]
pub struct Template {
    zygote: Zygote,
}

impl Template {
    pub fn prepare(request: ZygoteRequest<'_>) -> Result<Self, ZygoteError> {
        let zygote = Zygote::build(request)?;
        Ok(Self { zygote })
    }
}

impl StartMethod for Template {
    fn method(&self) -> Method {
        Method::Template
    }

    fn zygote(&self) -> &Zygote {
        &self.zygote
    }

    fn ready(&self, _: &PreparedClone) -> Result<(), ZygoteError> {
        Ok(())
    }

    fn start(
        &self,
        clone: PreparedClone,
        request: &StartRequest<'_>,
    ) -> Result<Started, ZygoteError> {
        clone.start(request)
    }

    fn learn(&self, pids: &[i32]) -> Result<bool, ZygoteError> {
        self.zygote.learn(pids)
    }

    fn resident_bytes(&self) -> Result<u64, ZygoteError> {
        self.zygote.resident_bytes()
    }
}
