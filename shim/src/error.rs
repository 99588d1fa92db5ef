//! Failures of the shim, and the one place that maps them to ttrpc codes.

use std::error::Error as StdError;
use std::time::Duration;

use trenv_pool::PoolError;
use ttrpc::Code;

/// Anything that a call can fail with.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    #[error("The {kind} {id} does not exist in this shim")]
    NotFound { kind: &'static str, id: String },
    #[error("The {kind} {id} already exists")]
    AlreadyExists { kind: &'static str, id: String },
    #[error("{0}")]
    InvalidArgument(String),
    #[error("Cannot {action} {id}: it is {state}")]
    WrongState {
        action: &'static str,
        id: String,
        state: String,
    },
    #[error("{0}")]
    Unimplemented(String),
    #[error("{what} did not end within {limit:?}")]
    Timeout { what: String, limit: Duration },
    #[error("Failed to {action}")]
    Io {
        action: String,
        source: std::io::Error,
    },
    #[error("OCI runtime {command} failed: {message}")]
    Runc { command: String, message: String },
    #[error("{0}")]
    Exhausted(String),
    #[error("Failed to {action}")]
    Engine {
        action: &'static str,
        source: Box<dyn StdError + Send + Sync>,
    },
    /// Stored data is damaged, of no use to this machine any more, or others' data is where it was.
    #[error("Failed to {action}")]
    Lost {
        action: &'static str,
        source: Box<dyn StdError + Send + Sync>,
    },
    #[error("The call was ended by a fault inside the shim: {0}")]
    Fault(String),
}

/// Result of a call.
pub type Result<T> = std::result::Result<T, ShimError>;

impl ShimError {
    /// Wraps an I/O failure; `action` completes the sentence "Failed to ...".
    pub fn io<E: Into<std::io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> Self {
        let action = action.into();
        move |source| Self::Io {
            action,
            source: source.into(),
        }
    }

    /// Wraps a failure of one of trenv's own engines.
    pub fn engine<E>(action: &'static str) -> impl FnOnce(E) -> Self
    where
        E: StdError + Send + Sync + 'static,
    {
        move |source| Self::Engine {
            action,
            source: Box::new(source),
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } => Code::NOT_FOUND,
            Self::AlreadyExists { .. } => Code::ALREADY_EXISTS,
            Self::InvalidArgument(_) => Code::INVALID_ARGUMENT,
            Self::WrongState { .. } => Code::FAILED_PRECONDITION,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::Timeout { .. } => Code::DEADLINE_EXCEEDED,
            Self::Exhausted(_) => Code::RESOURCE_EXHAUSTED,
            Self::Lost { .. } => Code::DATA_LOSS,
            Self::Io { .. } | Self::Runc { .. } | Self::Engine { .. } | Self::Fault(_) => {
                Code::INTERNAL
            }
        }
    }

    /// The message with every cause behind it.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(err) = cause {
            text.push_str(": ");
            text.push_str(&err.to_string());
            cause = err.source();
        }
        text
    }
}

impl From<ShimError> for ttrpc::Error {
    fn from(err: ShimError) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(err.code(), err.chain()))
    }
}

/// A failure of the pool, in the caller's terms.
pub fn pool_error(action: &'static str) -> impl FnOnce(PoolError) -> ShimError {
    move |err| match err {
        PoolError::NoSuchTemplate { id } => ShimError::NotFound {
            kind: "template",
            id: id.to_string(),
        },
        PoolError::NoSuchGeneration { id, generation } => ShimError::NotFound {
            kind: "template",
            id: format!("{id} generation {generation}"),
        },
        PoolError::Full { .. } | PoolError::DiskFull { .. } => {
            ShimError::Exhausted(err.to_string())
        }
        // What the pool held cannot be had from it any more.
        PoolError::BadMagic { .. }
        | PoolError::OtherVersion { .. }
        | PoolError::BadSuperblock { .. }
        | PoolError::Truncated { .. }
        | PoolError::ForeignCatalogue { .. }
        | PoolError::CatalogueMissing { .. }
        | PoolError::CatalogueDamaged { .. }
        | PoolError::BadRecord { .. }
        | PoolError::CorruptPage { .. } => ShimError::Lost {
            action,
            source: Box::new(err),
        },
        err => ShimError::engine(action)(err),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_reach_the_caller() {
        let err = ShimError::io("open the fifo /x")(std::io::Error::from_raw_os_error(2));
        assert!(
            err.chain()
                .starts_with("Failed to open the fifo /x: No such file"),
            "{}",
            err.chain()
        );
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(err) else {
            panic!("a status is expected");
        };
        assert_eq!(status.code(), Code::INTERNAL);
    }
}
