//! What a start method's clones are made from.

use super::skeleton::{Skeleton, Watched};
use crate::zygote::{PreparedClone, Zygote, ZygoteError};

/// The three kinds there are.
#[derive(Debug, Clone, Copy)]
pub enum Base<'a> {
    /// With all pages.
    Zygote(&'a Zygote),
    /// Without the stored pages.
    Skeleton(&'a Skeleton),
    /// The same, and somebody serves the pages that clones miss.
    Watched(&'a Watched),
}

impl<'a> Base<'a> {
    pub(super) fn zygote(self) -> &'a Zygote {
        match self {
            Self::Zygote(zygote) => zygote,
            Self::Skeleton(skeleton) => &skeleton.zygote,
            Self::Watched(watched) => &watched.skeleton.zygote,
        }
    }

    pub(super) fn ready(self, clone: &PreparedClone) -> Result<(), ZygoteError> {
        match self {
            Self::Zygote(_) | Self::Skeleton(_) => Ok(()),
            Self::Watched(watched) => watched.skeleton.watch(clone),
        }
    }

    pub(super) fn learn(self, pids: &[i32], input: &str) -> Result<bool, ZygoteError> {
        match self {
            Self::Zygote(zygote) => zygote.learn(pids, input),
            other => other.zygote().learn_files(pids),
        }
    }

    pub(super) fn helper(self) -> Option<u32> {
        match self {
            Self::Zygote(_) | Self::Skeleton(_) => None,
            Self::Watched(watched) => Some(watched.keeper_pid()),
        }
    }

    pub(super) fn resident_bytes(self) -> Result<u64, ZygoteError> {
        match self {
            Self::Zygote(zygote) => zygote.resident_bytes(),
            Self::Skeleton(skeleton) => skeleton.resident_bytes(),
            Self::Watched(watched) => watched.skeleton.resident_bytes(),
        }
    }
}
