//! `faasnap`: the clone has parts of the snapshot file mapped, and faults are the kernel's to serve
//! (FaaSnap, EuroSys '22).
//!
//! The first start records: the snapshot file is put out of the page cache, and mincore(2) tells in
//! which order the instance and the kernel's read-ahead bring it back. These pages are the loading
//! set. They are written to a file of their own, group by group, which later clones have mapped in
//! place of the snapshot file, and which a loader reads while the function runs.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::image::{Image, Part, Store};
use super::skeleton::{Skeleton, failed, lock};
use super::work::Work;
use super::working_set_file::WorkingSetFile;
use super::{Base, Method, StartMethod};
use crate::manifest::PAGE;
use crate::plan::skeleton::{Area, MOST_MAPS, Map};
use crate::zygote::{PreparedClone, StartRequest, Started, ZygoteError, ZygoteRequest};

/// Pages of a group of first use.
const GROUP: u64 = 1024;
/// Pages between two regions of the loading set that make them one.
const GAP: u64 = 32;
/// How often the page cache is looked at.
const LOOK: Duration = Duration::from_millis(1);
/// A recording ends by itself after this.
const RECORDING: Duration = Duration::from_secs(60);
/// Bytes that the loader reads at once.
const STEP: u64 = 1 << 20;

#[derive(Debug)]
pub struct FaaSnap {
    skeleton: Skeleton,
    directory: PathBuf,
    /// Anonymous pages that cannot be mapped: of stacks, and of processes that move their memory.
    copied: Vec<Part>,
    stage: Mutex<Stage>,
}

#[derive(Debug)]
enum Stage {
    /// Nothing has been started.
    Fresh,
    Recording {
        recorder: Arc<Recorder>,
        root: i32,
    },
    Loaded(WorkingSetFile),
}

/// In which group each page of the image came into the page cache.
#[derive(Debug, Default)]
struct Recorder {
    groups: Mutex<Groups>,
    ended: AtomicBool,
}

#[derive(Debug, Default)]
struct Groups {
    of_page: HashMap<usize, u64>,
    in_group: u64,
    group: u64,
}

impl FaaSnap {
    pub fn prepare(request: ZygoteRequest<'_>, directory: &Path) -> Result<Self, ZygoteError> {
        let skeleton = Skeleton::build(request, Store::Directory(directory), false)?;
        let image = &skeleton.image;
        let mappable = image.areas.iter().filter(|area| area.mappable);
        let maps: Vec<Map> = mappable
            .flat_map(|area| {
                let parts = inside(area, &image.parts);
                parts.map(|part| map(area, *part, 0))
            })
            .collect();
        // What does not fit a program is copied.
        let mapped = &maps[..maps.len().min(MOST_MAPS)];
        skeleton.zygote.rework(mapped, &[image.fd()])?;
        let copied = image
            .parts
            .iter()
            .filter(|part| !mapped.iter().any(|map| map.at == part.at))
            .copied()
            .collect();
        Ok(Self {
            skeleton,
            directory: directory.into(),
            copied,
            stage: Mutex::new(Stage::Fresh),
        })
    }

    /// Makes the loading set's file and maps it in clones to come.
    fn load(&self, groups: &Groups) -> Result<WorkingSetFile, ZygoteError> {
        let image = &self.skeleton.image;
        let mut regions: Vec<(u64, &Area, u64, u64)> = Vec::new();
        for area in image.areas.iter().filter(|area| area.mappable) {
            let first = regions.len();
            let cached = inside(area, &image.parts)
                .filter(|part| !self.copied.contains(part))
                .flat_map(|part| (0..part.length / PAGE).map(move |page| (part, page * PAGE)));
            for (part, from) in cached {
                let page = ((part.offset + from) / PAGE) as usize;
                let Some(group) = groups.of_page.get(&page) else {
                    continue;
                };
                let at = part.at + from;
                match regions[first..].last_mut() {
                    Some((its, _, _, end)) if *end + GAP * PAGE >= at => {
                        *end = at + PAGE;
                        *its = (*its).min(*group);
                    }
                    _ => regions.push((*group, area, at, at + PAGE)),
                }
            }
        }
        regions.sort_by_key(|(group, _, at, _)| (*group, *at));
        regions.truncate(MOST_MAPS);
        let pages: Vec<u64> = regions
            .iter()
            .flat_map(|(_, _, start, end)| (*start..*end).step_by(PAGE as usize))
            .collect();
        let store = Store::Directory(&self.directory);
        let file = WorkingSetFile::write(image, &pages, store)
            .map_err(failed("writing the loading set"))?;
        let mut offset = 0;
        let mut maps = Vec::new();
        for (_, area, at, end) in regions {
            let part = Part {
                at,
                length: end - at,
                offset,
            };
            maps.push(map(area, part, 0));
            offset += end - at;
        }
        self.skeleton.zygote.rework(&maps, &[file.file.as_fd()])?;
        Ok(file)
    }
}

/// The parts of an area.
fn inside<'a>(area: &Area, parts: &'a [Part]) -> impl Iterator<Item = &'a Part> {
    let (start, end) = (area.at, area.at + area.length);
    parts
        .iter()
        .filter(move |part| start <= part.at && part.at < end)
}

fn map(area: &Area, part: Part, file: u64) -> Map {
    Map {
        at: part.at,
        length: part.length,
        protection: area.protection,
        file,
        offset: part.offset,
    }
}

impl Recorder {
    /// Watches the page cache until the tenancy has ended.
    fn start(image: Arc<Image>) -> std::io::Result<Arc<Self>> {
        let recorder = Arc::<Self>::default();
        let mine = Arc::clone(&recorder);
        let until = Instant::now() + RECORDING;
        std::thread::Builder::new()
            .name("recorder".into())
            .spawn(move || {
                while !mine.ended.load(Ordering::Relaxed) && Instant::now() < until {
                    mine.look(&image);
                    std::thread::sleep(LOOK);
                }
            })?;
        Ok(recorder)
    }

    fn look(&self, image: &Image) {
        let cached = image.mapped().cached();
        let mut groups = lock(&self.groups);
        let mut new = 0;
        for (page, _) in cached.iter().enumerate().filter(|(_, cached)| **cached) {
            let group = groups.group;
            groups.of_page.entry(page).or_insert_with(|| {
                new += 1;
                group
            });
        }
        groups.in_group += new;
        if groups.in_group >= GROUP {
            groups.in_group = 0;
            groups.group += 1;
        }
    }
}

impl StartMethod for FaaSnap {
    fn method(&self) -> Method {
        Method::FaaSnap
    }

    fn base(&self) -> Base<'_> {
        Base::Skeleton(&self.skeleton)
    }

    fn start(
        &self,
        clone: PreparedClone,
        request: &StartRequest<'_>,
    ) -> Result<Started, ZygoteError> {
        let begun = Instant::now();
        let work = Arc::new(Work::default());
        let image = &self.skeleton.image;
        self.skeleton.copy_own_pages(&clone, &work)?;
        let pages = image
            .write_parts(clone.pid(), &self.copied)
            .map_err(failed("writing the pages of stacks"))?;
        work.copied(pages);
        work.read(pages * PAGE);
        let mut stage = lock(&self.stage);
        let mut recorder = None;
        if let Stage::Recording { root, .. } = &*stage
            && *root != 0
            && !Path::new(&format!("/proc/{root}")).exists()
        {
            // It ended by itself; the next one is recorded.
            *stage = Stage::Fresh;
        }
        match &*stage {
            Stage::Fresh => {
                image.forget_cached();
                recorder = Some(
                    Recorder::start(Arc::clone(image)).map_err(failed("starting a recorder"))?,
                );
                // One instance at a time is recorded.
                if let Some(recorder) = &recorder {
                    *stage = Stage::Recording {
                        recorder: Arc::clone(recorder),
                        root: 0,
                    };
                }
            }
            Stage::Recording { .. } => {}
            Stage::Loaded(set) => load_ahead(set, &work).map_err(failed("starting a loader"))?,
        }
        drop(stage);
        let brought = begun.elapsed();
        let started = clone.start(request);
        if recorder.is_some() {
            let mut stage = lock(&self.stage);
            match (&started, &mut *stage) {
                (Ok(started), Stage::Recording { root, .. }) => {
                    *root = started.pids.first().copied().unwrap_or_default();
                }
                // The next one is recorded.
                _ => *stage = Stage::Fresh,
            }
        }
        let mut started = started?;
        started.steps.insert(0, ("pages", brought));
        started.work = work;
        Ok(started)
    }

    fn learn(&self, pids: &[i32], input: &str) -> Result<bool, ZygoteError> {
        let mut stage = lock(&self.stage);
        let mut changed = false;
        if let Stage::Recording { recorder, root } = &*stage
            && pids.first() == Some(root)
        {
            recorder.ended.store(true, Ordering::Relaxed);
            recorder.look(&self.skeleton.image);
            let set = self.load(&lock(&recorder.groups))?;
            *stage = Stage::Loaded(set);
            changed = true;
        }
        drop(stage);
        Ok(self.base().learn(pids, input)? || changed)
    }

    fn own_bytes(&self) -> u64 {
        match &*lock(&self.stage) {
            Stage::Loaded(set) => set.mapped.length(),
            _ => 0,
        }
    }
}

/// Reads the loading set into the page cache on a thread of its own.
fn load_ahead(set: &WorkingSetFile, work: &Arc<Work>) -> std::io::Result<()> {
    let (mapped, work) = (Arc::clone(&set.mapped), Arc::clone(work));
    std::thread::Builder::new()
        .name("loader".into())
        .spawn(move || {
            for from in (0..mapped.length()).step_by(STEP as usize) {
                let length = STEP.min(mapped.length() - from);
                mapped.read(from, length);
                work.prefetched(length / PAGE);
                work.read(length);
            }
        })
        .map(drop)
}
