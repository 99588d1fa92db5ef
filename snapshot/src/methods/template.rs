//! `template`: a clone of a zygote that has all pages, shared until they are written.

use super::{Base, Method, StartMethod};
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

    fn base(&self) -> Base<'_> {
        Base::Zygote(&self.zygote)
    }

    fn start(
        &self,
        clone: PreparedClone,
        request: &StartRequest<'_>,
    ) -> Result<Started, ZygoteError> {
        clone.start(request)
    }
}
