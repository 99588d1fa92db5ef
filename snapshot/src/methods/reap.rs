//! `reap`: the first instance's faults are recorded; later ones get the recorded pages, from one
//! file read front to back, before they run, and every other page when it is touched (REAP,
//! ASPLOS '21). Where many pages are missed nevertheless, these are recorded as well.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::image::Store;
use super::skeleton::{Prefetch, Watched, failed, lock};
use super::working_set_file::WorkingSetFile;
use super::{Method, StartMethod};
use crate::zygote::{PreparedClone, StartRequest, Started, Zygote, ZygoteError, ZygoteRequest};

/// A tenancy that misses more than one page for so many of the set adds what it missed, as often as
/// this: the first may have seen no call.
const MISSES: usize = 2;
const RECORDINGS: usize = 5;

#[derive(Debug)]
pub struct Reap {
    watched: Watched,
    directory: PathBuf,
    set: Mutex<WorkingSet>,
}

#[derive(Debug, Default)]
struct WorkingSet {
    /// By address.
    pages: Vec<u64>,
    /// None until the first tenancy has ended.
    file: Option<WorkingSetFile>,
    recordings: usize,
}

impl WorkingSet {
    /// Adds the pages that a tenancy missed, if they are many.
    fn add(&mut self, missed: &[u64]) -> bool {
        if self.recordings >= RECORDINGS || missed.len() * MISSES <= self.pages.len() {
            return false;
        }
        self.pages.extend(missed);
        // Neighbours are installed by one call.
        self.pages.sort_unstable();
        self.pages.dedup();
        self.recordings += 1;
        true
    }
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
        let (file, traced) = {
            let set = lock(&self.set);
            (set.file.clone(), set.recordings < RECORDINGS)
        };
        let prefetch = file.map_or_else(Prefetch::default, |set| {
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
        if let Some(missed) = self.watched.trace(pids) {
            let mut set = lock(&self.set);
            if set.add(&missed) {
                let store = Store::Directory(&self.directory);
                let image = &self.watched.skeleton.image;
                let file = WorkingSetFile::write(image, &set.pages, store)
                    .map_err(failed("writing the working set's file"))?;
                set.file = Some(file);
            }
        }
        self.zygote().learn_files(pids)
    }

    fn helper(&self) -> Option<u32> {
        Some(self.watched.keeper_pid())
    }

    fn resident_bytes(&self) -> Result<u64, ZygoteError> {
        let set = lock(&self.set);
        let file = set.file.as_ref().map_or(0, |file| file.mapped.length());
        Ok(self.watched.skeleton.resident_bytes()? + file)
    }

    fn held_bytes(&self) -> u64 {
        self.watched.skeleton.image.mapped().length()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_that_misses_much_is_recorded_again() {
        let mut set = WorkingSet::default();
        assert!(!set.add(&[]), "nothing was touched");
        assert!(set.add(&[7, 3]));
        assert!(!set.add(&[5]), "one page of two is not much");
        assert!(set.add(&[1, 2, 3, 4]));
        assert_eq!(set.pages, [1, 2, 3, 4, 7]);
        set.recordings = RECORDINGS;
        assert!(!set.add(&[8; 100]));
    }
}
