//! A template that is prepared for starts, by whatever method.

use std::sync::Arc;

use super::{Criu, Method, StartMethod};
use crate::recording::Recorded;
use crate::zygote::{Zygote, ZygoteError};

/// Who makes the processes of a start.
#[derive(Debug, Clone)]
pub enum Prepared {
    /// A zygote's agents, as clones of it.
    Clones(Arc<dyn StartMethod>),
    /// CRIU. It learns nothing of calls.
    Criu(Arc<Criu>),
}

impl Prepared {
    #[must_use]
    pub fn method(&self) -> Method {
        match self {
            Self::Clones(method) => method.method(),
            Self::Criu(criu) => criu.method(),
        }
    }

    /// The zygote whose agents make clones, where there is one.
    #[must_use]
    pub fn zygote(&self) -> Option<&Zygote> {
        match self {
            Self::Clones(method) => Some(method.zygote()),
            Self::Criu(_) => None,
        }
    }

    /// Whether it is this and not one that was prepared later.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Clones(one), Self::Clones(other)) => Arc::ptr_eq(one, other),
            (Self::Criu(one), Self::Criu(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }

    /// As [`StartMethod::helper`].
    #[must_use]
    pub fn helper(&self) -> Option<u32> {
        match self {
            Self::Clones(method) => method.helper(),
            Self::Criu(_) => None,
        }
    }

    /// As [`StartMethod::learn`].
    ///
    /// # Errors
    /// As there.
    pub fn learn(&self, pids: &[i32], input: &str) -> Result<bool, ZygoteError> {
        match self {
            Self::Clones(method) => method.learn(pids, input),
            Self::Criu(_) => Ok(false),
        }
    }

    /// As [`StartMethod::recorded`].
    #[must_use]
    pub fn recorded(&self) -> Vec<Recorded> {
        match self {
            Self::Clones(method) => method.recorded(),
            Self::Criu(_) => Vec::new(),
        }
    }

    /// As [`StartMethod::recall`].
    ///
    /// # Errors
    /// As there.
    pub fn recall(&self, recorded: &[Recorded]) -> Result<(), ZygoteError> {
        match self {
            Self::Clones(method) => method.recall(recorded),
            Self::Criu(_) => Ok(()),
        }
    }

    /// As [`StartMethod::resident_bytes`]; of CRIU's image only the page cache has something.
    ///
    /// # Errors
    /// As there.
    pub fn resident_bytes(&self) -> Result<u64, ZygoteError> {
        match self {
            Self::Clones(method) => method.resident_bytes(),
            Self::Criu(_) => Ok(0),
        }
    }

    /// As [`StartMethod::held_bytes`].
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        match self {
            Self::Clones(method) => method.held_bytes(),
            Self::Criu(_) => 0,
        }
    }
}
