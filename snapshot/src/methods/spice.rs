//! `spice`: pages lie in a file in the order of their first use, which is traced until it is stable.
//! The first batch is in place before the tree runs, the others follow in that order while it runs,
//! and what was never traced is served by the base image or is zero (Spice).
//!
//! That is by userfaultfd, for pools of every kind but those on a device: see [`attached`].

mod attached;

use std::sync::{Arc, Mutex};

use super::image::{Part, Store};
use super::recorded_pages::RecordedPages;
use super::skeleton::{Prefetch, Watched, failed, lock};
use super::working_set_file::WorkingSetFile;
use super::{Base, Method, StartMethod};
use crate::manifest::PAGE;
use crate::recording::{Inputs, Recorded};
use crate::zygote::{PreparedClone, StartRequest, Started, ZygoteError, ZygoteRequest};

/// Pages in place before the tree runs.
const FIRST_BATCH: u64 = 256;
/// Within so many pages the order is by address, so that neighbours are installed by one call.
const GROUP: usize = 256;
/// The order is stable once a tenancy adds at most this part of the pages.
const STABLE: usize = 64;

/// By the driver where the pool is on a device, by userfaultfd elsewhere and where the driver cannot.
pub fn prepare(request: ZygoteRequest<'_>) -> Result<Arc<dyn StartMethod>, ZygoteError> {
    if request.template.templates().is_none() {
        return Ok(Arc::new(Spice::prepare(request)?));
    }
    let rootfs = request.rootfs.try_clone();
    let otherwise = ZygoteRequest {
        rootfs: rootfs.map_err(failed(
            "duplicating the descriptor of the function's layers",
        ))?,
        cgroups: request.cgroups.clone(),
        ..request
    };
    match attached::Attached::prepare(request) {
        Ok(attached) => Ok(Arc::new(attached)),
        Err(err) => {
            tracing::warn!(%err, "Starts by spice get their pages by userfaultfd: the pool's device cannot be attached");
            Ok(Arc::new(Spice::prepare(otherwise)?))
        }
    }
}

#[derive(Debug)]
struct Spice {
    watched: Watched,
    layouts: Mutex<Inputs<RecordedPages>>,
}

impl Spice {
    fn prepare(request: ZygoteRequest<'_>) -> Result<Self, ZygoteError> {
        let watched = Watched::build(request)?;
        watched.skeleton.image.mapped().read_all();
        Ok(Self {
            watched,
            layouts: Mutex::default(),
        })
    }

    fn write(&self, layout: &mut RecordedPages) -> Result<(), ZygoteError> {
        let image = &self.watched.skeleton.image;
        let file = WorkingSetFile::write(image, &ordered(&layout.pages), Store::Memory)
            .map_err(failed("writing the pages in the order of their first use"))?;
        file.mapped.read_all();
        layout.file = Some(file);
        Ok(())
    }
}

/// Adds a trace of what the layout lacked; `false` when nothing changes.
fn add(layout: &mut RecordedPages, trace: &[u64]) -> bool {
    layout.note(trace, STABLE) && layout.add(trace)
}

/// The pages as they lie in the file.
fn ordered(pages: &[u64]) -> Vec<u64> {
    let mut pages = pages.to_vec();
    pages.chunks_mut(GROUP).for_each(<[u64]>::sort_unstable);
    pages
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

    fn base(&self) -> Base<'_> {
        Base::Watched(&self.watched)
    }

    fn start(
        &self,
        clone: PreparedClone,
        request: &StartRequest<'_>,
    ) -> Result<Started, ZygoteError> {
        let file = lock(&self.layouts)
            .get(request.input)
            .and_then(|layout| layout.file.clone());
        let prefetch = file.map_or_else(Prefetch::default, |file| {
            let (first, ahead) = batches(&file.parts);
            Prefetch {
                first,
                ahead: ahead.into(),
                from: Some(file.mapped),
            }
        });
        self.watched.start(clone, request, prefetch)
    }

    fn learn(&self, pids: &[i32], input: &str) -> Result<bool, ZygoteError> {
        if let Some(trace) = self.watched.trace(pids, input) {
            let mut layouts = lock(&self.layouts);
            let layout = layouts.entry(input);
            if add(layout, &trace) {
                self.write(layout)?;
            }
        }
        self.base().learn(pids, input)
    }

    fn recorded(&self) -> Vec<Recorded> {
        let image = &self.watched.skeleton.image;
        let layouts = lock(&self.layouts);
        let recorded = layouts
            .iter()
            .map(|(input, one)| one.recorded(input, image));
        recorded.collect()
    }

    fn recall(&self, recorded: &[Recorded]) -> Result<(), ZygoteError> {
        // What page maps told, when the pool was on a device, is another thing.
        for one in recorded.iter().filter(|one| one.first_use) {
            let mut layout = RecordedPages::of(one, &self.watched.skeleton.image);
            self.write(&mut layout)?;
            *lock(&self.layouts).entry(&one.input) = layout;
        }
        Ok(())
    }

    fn own_bytes(&self) -> u64 {
        let layouts = lock(&self.layouts);
        let files = layouts.values().filter_map(|one| one.file.as_ref());
        files.map(|file| file.mapped.length()).sum()
    }

    fn held_bytes(&self) -> u64 {
        self.watched.skeleton.image.mapped().length() + self.own_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_that_of_first_use_and_becomes_stable() {
        let mut layout = RecordedPages::default();
        let pages: Vec<u64> = (0..128).rev().map(|page| page * PAGE).collect();
        assert!(add(&mut layout, &pages));
        assert!(!layout.rounds.stable);
        assert!(add(
            &mut layout,
            &[1000, 1001, 1002].map(|page| page * PAGE)
        ));
        assert!(!layout.rounds.stable, "three of 128 are too many");
        assert!(add(&mut layout, &[2000 * PAGE]));
        assert!(layout.rounds.stable);
        assert!(!add(&mut layout, &[3000 * PAGE]));
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
