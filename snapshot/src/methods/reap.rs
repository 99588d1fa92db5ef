//! `reap`: the first instance's faults are recorded; later ones get the recorded pages, from one
//! file read front to back, before they run, and every other page when it is touched (REAP,
//! ASPLOS '21). Where many pages are missed nevertheless, these are recorded as well.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::image::Store;
use super::recorded_pages::RecordedPages;
use super::skeleton::{Prefetch, Watched, failed, lock};
use super::working_set_file::WorkingSetFile;
use super::{Base, Method, StartMethod};
use crate::recording::{Inputs, Recorded};
use crate::zygote::{PreparedClone, StartRequest, Started, ZygoteError, ZygoteRequest};

/// A tenancy that misses more than one page for so many of the set adds what it missed: the first may
/// have seen no call.
const MISSES: usize = 2;

#[derive(Debug)]
pub struct Reap {
    watched: Watched,
    directory: PathBuf,
    sets: Mutex<Inputs<RecordedPages>>,
}

/// Adds the pages that a tenancy missed, if they are many.
fn add(set: &mut RecordedPages, missed: &[u64]) -> bool {
    set.note(missed, MISSES) && !set.rounds.stable && set.add(missed)
}

impl Reap {
    pub fn prepare(request: ZygoteRequest<'_>, directory: &Path) -> Result<Self, ZygoteError> {
        let watched = Watched::build(request)?;
        watched.skeleton.image.mapped().read_all();
        Ok(Self {
            watched,
            directory: directory.into(),
            sets: Mutex::default(),
        })
    }

    fn write(&self, set: &mut RecordedPages) -> Result<(), ZygoteError> {
        let mut pages = set.pages.clone();
        // Neighbours are installed by one call.
        pages.sort_unstable();
        let store = Store::Directory(&self.directory);
        let file = WorkingSetFile::write(&self.watched.skeleton.image, &pages, store)
            .map_err(failed("writing the working set's file"))?;
        set.file = Some(file);
        Ok(())
    }
}

impl StartMethod for Reap {
    fn method(&self) -> Method {
        Method::Reap
    }

    fn base(&self) -> Base<'_> {
        Base::Watched(&self.watched)
    }

    fn start(
        &self,
        clone: PreparedClone,
        request: &StartRequest<'_>,
    ) -> Result<Started, ZygoteError> {
        let file = lock(&self.sets)
            .get(request.input)
            .and_then(|set| set.file.clone());
        let prefetch = file.map_or_else(Prefetch::default, |set| {
            // One sequential read where the file is not in the page cache.
            set.mapped.read_all();
            Prefetch {
                first: set.parts,
                from: Some(set.mapped),
                ..Prefetch::default()
            }
        });
        self.watched.start(clone, request, prefetch)
    }

    fn learn(&self, pids: &[i32], input: &str) -> Result<bool, ZygoteError> {
        if let Some(missed) = self.watched.trace(pids, input) {
            let mut sets = lock(&self.sets);
            let set = sets.entry(input);
            if add(set, &missed) {
                self.write(set)?;
            }
        }
        self.base().learn(pids, input)
    }

    fn recorded(&self) -> Vec<Recorded> {
        let image = &self.watched.skeleton.image;
        let sets = lock(&self.sets);
        let recorded = sets.iter().map(|(input, set)| set.recorded(input, image));
        recorded.collect()
    }

    fn recall(&self, recorded: &[Recorded]) -> Result<(), ZygoteError> {
        for one in recorded {
            let mut set = RecordedPages::of(one, &self.watched.skeleton.image);
            self.write(&mut set)?;
            *lock(&self.sets).entry(&one.input) = set;
        }
        Ok(())
    }

    fn own_bytes(&self) -> u64 {
        let sets = lock(&self.sets);
        let files = sets.values().filter_map(|set| set.file.as_ref());
        files.map(|file| file.mapped.length()).sum()
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
        let mut set = RecordedPages::default();
        assert!(!add(&mut set, &[]), "nothing was touched");
        assert!(add(&mut set, &[7, 3]));
        assert!(!add(&mut set, &[5]), "one page of two is not much");
        assert!(add(&mut set, &[1, 2, 3, 4]));
        assert_eq!(set.pages, [7, 3, 1, 2, 4]);
    }
}
