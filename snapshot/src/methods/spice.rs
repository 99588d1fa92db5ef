//! `spice`: pages lie in a file in the order of their first use, which is traced until it is stable.
//! The first batch is in place before the tree runs, the others follow in that order while it runs,
//! and what was never traced is served by the base image or is zero (Spice).

use std::collections::HashSet;
use std::sync::Mutex;

use super::image::{Part, Store};
use super::skeleton::{Prefetch, Watched, failed, lock};
use super::working_set_file::WorkingSetFile;
use super::{Method, StartMethod};
use crate::manifest::PAGE;
use crate::zygote::{PreparedClone, StartRequest, Started, Zygote, ZygoteError, ZygoteRequest};

/// Pages in place before the tree runs.
const FIRST_BATCH: u64 = 256;
/// Within so many pages the order is by address, so that neighbours are installed by one call.
const GROUP: usize = 256;
/// Tenancies that are traced at most.
const ROUNDS: usize = 5;
/// The order is stable once a tenancy adds less than this part of the pages.
const STABLE: usize = 64;

#[derive(Debug)]
pub struct Spice {
    watched: Watched,
    layout: Mutex<Layout>,
}

/// What is known of first uses.
#[derive(Debug, Default)]
struct Layout {
    /// In the order of first use.
    pages: Vec<u64>,
    file: Option<WorkingSetFile>,
    rounds: usize,
    stable: bool,
}

impl Spice {
    pub fn prepare(request: ZygoteRequest<'_>) -> Result<Self, ZygoteError> {
        let watched = Watched::build(request)?;
        watched.skeleton.image.mapped().read_all();
        Ok(Self {
            watched,
            layout: Mutex::default(),
        })
    }
}

impl Layout {
    /// Adds a trace of what the layout lacked; `false` when nothing changes any more.
    fn add(&mut self, trace: &[u64]) -> bool {
        if self.stable {
            return false;
        }
        let mut known: HashSet<u64> = self.pages.iter().copied().collect();
        let before = self.pages.len();
        self.pages
            .extend(trace.iter().filter(|page| known.insert(**page)));
        let added = self.pages.len() - before;
        self.rounds += 1;
        self.stable = self.rounds >= ROUNDS || (before > 0 && added * STABLE < before);
        added > 0
    }

    /// The pages as they lie in the file.
    fn ordered(&self) -> Vec<u64> {
        let mut pages = self.pages.clone();
        pages.chunks_mut(GROUP).for_each(<[u64]>::sort_unstable);
        pages
    }
}

/// The first batch, and what follows.
fn batches(parts: &[Part]) -> (Vec<Part>, Vec<Part>) {
    let mut taken = 0;
    let first = parts
        .iter()
        .take_while(|part| {
            let more = taken < FIRST_BATCH;
            taken += part.length / PAGE;
            more
        })
        .count();
    let (first, rest) = parts.split_at(first);
    (first.to_vec(), rest.to_vec())
}

impl StartMethod for Spice {
    fn method(&self) -> Method {
        Method::Spice
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
            let layout = lock(&self.layout);
            (layout.file.clone(), !layout.stable)
        };
        let prefetch = file.map_or_else(Prefetch::default, |file| {
            let (first, ahead) = batches(&file.parts);
            Prefetch {
                first,
                ahead: ahead.into(),
                from: Some(file.mapped),
            }
        });
        self.watched.start(clone, request, prefetch, traced)
    }

    fn learn(&self, pids: &[i32]) -> Result<bool, ZygoteError> {
        if let Some(trace) = self.watched.trace(pids) {
            let mut layout = lock(&self.layout);
            if layout.add(&trace) {
                let image = &self.watched.skeleton.image;
                let file = WorkingSetFile::write(image, &layout.ordered(), Store::Memory)
                    .map_err(failed("writing the pages in the order of their first use"))?;
                file.mapped.read_all();
                layout.file = Some(file);
            }
        }
        self.zygote().learn_files(pids)
    }

    fn helper(&self) -> Option<u32> {
        Some(self.watched.keeper_pid())
    }

    fn resident_bytes(&self) -> Result<u64, ZygoteError> {
        let layout = lock(&self.layout);
        let file = layout.file.as_ref().map_or(0, |file| file.mapped.length());
        Ok(self.watched.skeleton.resident_bytes()? + file)
    }

    fn held_bytes(&self) -> u64 {
        let layout = lock(&self.layout);
        let file = layout.file.as_ref().map_or(0, |file| file.mapped.length());
        self.watched.skeleton.image.mapped().length() + file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tracing_ends_when_little_is_new() {
        let mut layout = Layout::default();
        let pages: Vec<u64> = (0..128).rev().map(|page| page * PAGE).collect();
        assert!(layout.add(&pages));
        assert!(!layout.stable);
        assert!(layout.add(&[1000 * PAGE, 1001 * PAGE]));
        assert!(!layout.stable, "two of 128 are too many");
        assert!(layout.add(&[2000 * PAGE]));
        assert!(layout.stable);
        assert!(!layout.add(&[3000 * PAGE]));
        assert_eq!(layout.pages[..2], [127 * PAGE, 126 * PAGE]);
    }

    #[test]
    fn the_first_batch_is_as_long_as_it_must_be() {
        let part = |at, pages| Part {
            at,
            length: pages * PAGE,
            offset: 0,
        };
        let parts = [part(0, 200), part(1 << 30, 100), part(1 << 31, 1)];
        let (first, rest) = batches(&parts);
        assert_eq!((first.len(), rest.len()), (2, 1));
    }
}
