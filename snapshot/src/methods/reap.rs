//! `reap`: the first instance's faults are recorded; later ones get the recorded pages, from one
//! file read front to back, before they run, and every other page when it is touched (REAP,
//! ASPLOS '21).

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::image::Store;
use super::skeleton::{Prefetch, Watched, failed, lock};
use super::working_set_file::WorkingSetFile;
use super::{Method, StartMethod};
use crate::zygote::{PreparedClone, StartRequest, Started, Zygote, ZygoteError, ZygoteRequest};

#[derive(Debug)]
pub struct Reap {
    watched: Watched,
    directory: PathBuf,
    /// None until the first tenancy has ended.
    set: Mutex<Option<WorkingSetFile>>,
}

impl Reap {
    pub fn prepare(request: ZygoteRequest<'_>, directory: &Path) -> Result<Self, ZygoteError> {
        let watched = Watched::build(request)?;
        watched.skeleton.image.mapped().read_all();
        Ok(Self {
            watched,
            directory: directory.into(),
            set: Mutex::default(),
        })
    }
}

impl StartMethod for Reap {
    fn method(&self) -> Method {
        Method::Reap
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
        let set = lock(&self.set).clone();
        let traced = set.is_none();
        let prefetch = set.map_or_else(Prefetch::default, |set| {
            // One sequential read where the file is not in the page cache.
            set.mapped.read_all();
            Prefetch {
                first: set.parts,
                from: Some(set.mapped),
                ..Prefetch::default()
            }
        });
        self.watched.start(clone, request, prefetch, traced)
    }

    fn learn(&self, pids: &[i32]) -> Result<bool, ZygoteError> {
        let mut set = lock(&self.set);
        if let Some(mut pages) = self.watched.trace(pids).filter(|_| set.is_none()) {
            // Neighbours are installed by one call.
            pages.sort_unstable();
            pages.dedup();
            let store = Store::Directory(&self.directory);
            let written = WorkingSetFile::write(&self.watched.skeleton.image, &pages, store);
            *set = Some(written.map_err(failed("writing the working set's file"))?);
        }
        drop(set);
        self.zygote().learn_files(pids)
    }

    fn helper(&self) -> Option<u32> {
        Some(self.watched.keeper.pid())
    }

    fn resident_bytes(&self) -> Result<u64, ZygoteError> {
        let set = lock(&self.set)
            .as_ref()
            .map_or(0, |set| set.mapped.length());
        Ok(self.watched.skeleton.resident_bytes()? + set)
    }
}
