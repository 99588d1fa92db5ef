//! Start methods: the ways in which an instance comes by its memory, all from the same snapshot.
//!
//! Every method makes processes the same way: a zygote's agents fork clones ahead of a call, and a
//! start gives a clone's address space to the tree. For [`Method::Template`] the zygote has the
//! stored pages; for every other it is a skeleton, which has the mappings alone, and the method
//! brings pages into the clone when it starts. `docs/start-methods.md` says what each is built
//! after and where it differs. [`Method::Criu`] and [`Method::CriuLazy`] are apart: CRIU makes the
//! processes, from an image of its own, and [`Prepared`] is either.
//!
//! Two things are the same for all others. Small processes beside a large one are loaded from capsules.
//! And pages of files that instances read are mapped in later clones (`working_set.rs`), as they are
//! a part of the memory of the virtual machines that most of these methods were made for.

mod attach;
mod base;
mod copy;
mod criu;
mod faasnap;
mod image;
mod keeper;
mod lazy;
mod pager;
mod prepared;
mod reap;
mod recorded_pages;
mod skeleton;
mod spans;
mod spice;
mod template;
mod uffd;
mod work;
mod working_set_file;

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use crate::recording::Recorded;
use crate::zygote::{PreparedClone, StartRequest, Started, Zygote, ZygoteError, ZygoteRequest};
pub use base::Base;
pub use criu::{
    Criu, CriuError, DumpRequest as CriuDumpRequest, ENTER, Image, Images, dump as criu_dump, enter,
};
pub use keeper::{ARGUMENT as KEEPER, keep};
pub use prepared::Prepared;
pub use work::{Figures, Work};

/// The start methods by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Method {
    /// A clone of a zygote that has all pages.
    #[default]
    Template,
    /// The pages of the pool's device, attached by each clone when it starts. Only where there is one.
    Attach,
    /// All pages copied before the tree runs (SnapFaaS).
    Copy,
    /// One page for each fault (vHive without REAP).
    Lazy,
    /// A recorded working set is read and installed before the tree runs (REAP).
    Reap,
    /// Regions of the snapshot file mapped, and a loader that reads ahead (FaaSnap).
    FaaSnap,
    /// Pages laid out and brought in by first use; from a device, attached, and copied ahead (Spice).
    Spice,
    /// CRIU restores the tree.
    Criu,
    /// The same, and CRIU's page server brings each page when it is touched.
    CriuLazy,
}

/// A name that is none of a start method.
#[derive(Debug, thiserror::Error)]
#[error("The start method {name:?} is not known; use one of {}", Method::names().join(", "))]
pub struct UnknownMethod {
    name: String,
}

impl Method {
    /// Those that start a tree by a clone of a zygote, on every machine.
    pub const ALL: [Self; 6] = [
        Self::Template,
        Self::Copy,
        Self::Lazy,
        Self::Reap,
        Self::FaaSnap,
        Self::Spice,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Template => "template",
            Self::Attach => "attach",
            Self::Copy => "copy",
            Self::Lazy => "lazy",
            Self::Reap => "reap",
            Self::FaaSnap => "faasnap",
            Self::Spice => "spice",
            Self::Criu => "criu",
            Self::CriuLazy => "criu-lazy",
        }
    }

    /// All there are.
    pub(crate) fn each() -> impl Iterator<Item = Self> {
        let not_everywhere = [Self::Attach, Self::Criu, Self::CriuLazy];
        Self::ALL.into_iter().chain(not_everywhere)
    }

    /// The names of all.
    #[must_use]
    pub fn names() -> Vec<&'static str> {
        Self::each().map(Self::name).collect()
    }

    /// Finds a method by its name; the empty name is the usual one's.
    ///
    /// # Errors
    /// When there is no such method; the error names all.
    pub fn parse(name: &str) -> Result<Self, UnknownMethod> {
        if name.is_empty() {
            return Ok(Self::default());
        }
        let found = Self::each().find(|method| method.name() == name);
        found.ok_or_else(|| UnknownMethod { name: name.into() })
    }

    /// Makes what starts by this method need once per template and host. It ends when it is dropped;
    /// instances live on.
    ///
    /// `directory` is where a method keeps files without names, which hold a copy of the template's
    /// pages and go with it; it lies on a disk. CRIU's images are in a folder there.
    ///
    /// # Errors
    /// As [`Zygote::build`], when there is no memory or disk space for the files, and when CRIU or
    /// its image of the template is not there, or the pool has no device to attach from.
    pub fn prepare(
        self,
        request: ZygoteRequest<'_>,
        directory: &Path,
    ) -> Result<Prepared, ZygoteError> {
        let by_criu = |mode| {
            let images = Images::in_state(directory);
            Criu::prepare(mode, request.template, request.binary, images)
        };
        let by_clones: Arc<dyn StartMethod> = match self {
            Self::Template => Arc::new(template::Template::prepare(request)?),
            Self::Attach => Arc::new(attach::Attach::prepare(request)?),
            Self::Copy => Arc::new(copy::Copy::prepare(request)?),
            Self::Lazy => Arc::new(lazy::Lazy::prepare(request)?),
            Self::Reap => Arc::new(reap::Reap::prepare(request, directory)?),
            Self::FaaSnap => Arc::new(faasnap::FaaSnap::prepare(request, directory)?),
            Self::Spice => spice::prepare(request)?,
            Self::Criu => return Ok(Prepared::Criu(Arc::new(by_criu(criu::Mode::Read)?))),
            Self::CriuLazy => return Ok(Prepared::Criu(Arc::new(by_criu(criu::Mode::Lazy)?))),
        };
        Ok(Prepared::Clones(by_clones))
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Method {
    type Err = UnknownMethod;

    fn from_str(name: &str) -> Result<Self, UnknownMethod> {
        Self::parse(name)
    }
}

/// One template, prepared for starts by one method.
///
/// Ahead of a call an agent of [`StartMethod::zygote`] makes a clone, which [`StartMethod::ready`]
/// makes ready; [`StartMethod::start`] uses it up. When the tenancy ends, and before its tree is
/// killed, [`StartMethod::learn`] is called with the pids of its start.
pub trait StartMethod: fmt::Debug + Send + Sync {
    fn method(&self) -> Method;

    /// What its clones are made from.
    fn base(&self) -> Base<'_>;

    /// Brings memory into a clone that is ready and gives it to the tree in a sandbox, as
    /// [`PreparedClone::start`].
    ///
    /// # Errors
    /// When a step failed: what was made of the tree must then be killed with its cgroup.
    fn start(
        &self,
        clone: PreparedClone,
        request: &StartRequest<'_>,
    ) -> Result<Started, ZygoteError>;

    /// Learns from a tenancy that is about to end, which served calls of this input; tells whether
    /// clones made before now lack something that later ones have.
    ///
    /// # Errors
    /// When the instance has ended by itself. Nothing changes then.
    fn learn(&self, pids: &[i32], input: &str) -> Result<bool, ZygoteError> {
        self.base().learn(pids, input)
    }

    /// The working sets learnt so far.
    fn recorded(&self) -> Vec<Recorded> {
        self.zygote().recorded()
    }

    /// Begins with the working sets that were learnt before, by the same method from the same
    /// template.
    ///
    /// # Errors
    /// When the zygote has ended, or there is no memory or disk space for them.
    fn recall(&self, recorded: &[Recorded]) -> Result<(), ZygoteError> {
        self.zygote().recall(recorded)
    }

    /// Bytes that it keeps beside its base.
    fn own_bytes(&self) -> u64 {
        0
    }

    /// The zygote or skeleton whose agents make clones for this method.
    fn zygote(&self) -> &Zygote {
        self.base().zygote()
    }

    /// Does ahead of the call what can be done for a clone of any call; once for each clone.
    ///
    /// # Errors
    /// When the clone has ended or the machine fails.
    fn ready(&self, clone: &PreparedClone) -> Result<(), ZygoteError> {
        self.base().ready(clone)
    }

    /// A process beside the zygote that belongs to this method, for the one who reaps children.
    fn helper(&self) -> Option<u32> {
        self.base().helper()
    }

    /// Memory and page cache that this method's preparations may take.
    ///
    /// # Errors
    /// When /proc cannot be read.
    fn resident_bytes(&self) -> Result<u64, ZygoteError> {
        Ok(self.base().resident_bytes()? + self.own_bytes())
    }

    /// The part of it that is neither a zygote's nor can be read from a disk again: it goes when
    /// this, and the instances that need it, have gone.
    fn held_bytes(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_found_by_name() {
        for method in Method::each() {
            assert_eq!(Method::parse(method.name()).ok(), Some(method));
        }
        assert_eq!(Method::parse("").ok(), Some(Method::Template));
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let text = Method::parse("warp").map_err(|err| err.to_string());
        assert_eq!(
            text,
            Err("The start method \"warp\" is not known; use one of template, copy, lazy, reap, faasnap, spice, attach, criu, criu-lazy".into())
        );
    }
}
