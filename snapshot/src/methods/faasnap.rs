//! `faasnap`: the clone has parts of the snapshot file mapped, and faults are the kernel's to serve
//! (FaaSnap, EuroSys '22).
//!
//! The first start of each input records: the page cache is emptied of the files that clones have
//! mapped, and mincore(2) tells in which order the instance and the kernel's read-ahead bring it back.
//! These pages are the input's loading set. Those of all inputs are written to one file, group by
//! group, which later clones have mapped in place of the snapshot file: a clone waits for a call whose
//! input is not known yet. A start then knows it, and a loader reads its input's part of the file while
//! the function runs.

mod recorder;

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::image::{self, Part, Store};
use super::recorded_pages::RecordedPages;
use super::skeleton::{Skeleton, failed, lock};
use super::work::Work;
use super::working_set_file::WorkingSetFile;
use super::{Base, Method, StartMethod};
use crate::manifest::PAGE;
use crate::plan::skeleton::{Area, Map, fitting};
use crate::recording::{Inputs, Recorded};
use crate::zygote::{PreparedClone, StartRequest, Started, ZygoteError, ZygoteRequest};
use recorder::{Files, Recorder};

/// Pages of a group of first use.
const GROUP: usize = 1024;
/// Pages between two regions of the loading set that make them one.
const GAP: u64 = 32;
/// Bytes that the loader reads at once.
const STEP: u64 = 1 << 20;

#[derive(Debug)]
pub struct FaaSnap {
    skeleton: Skeleton,
    directory: PathBuf,
    /// Anonymous pages that cannot be mapped: of stacks, and of processes that move their memory.
    copied: Vec<Part>,
    sets: Mutex<Sets>,
}

#[derive(Debug, Default)]
struct Sets {
    /// One instance at a time is recorded: the page cache is everybody's.
    recording: Option<Recording>,
    inputs: Inputs<LoadingSet>,
    /// What all inputs touch.
    file: Option<WorkingSetFile>,
}

#[derive(Debug)]
struct Recording {
    recorder: Arc<Recorder>,
    input: String,
    /// None until it has started.
    root: Option<i32>,
}

#[derive(Debug, Default)]
struct LoadingSet {
    pages: RecordedPages,
    /// Where they are in the file.
    parts: Arc<[Part]>,
}

/// Pages of the loading set that are brought in together.
#[derive(Debug, Clone, Copy)]
struct Region<'a> {
    group: usize,
    area: &'a Area,
    at: u64,
    end: u64,
}

impl Region<'_> {
    fn part(&self, offset: u64) -> Part {
        Part {
            at: self.at,
            length: self.end - self.at,
            offset,
        }
    }

    fn map(&self, offset: u64) -> Map {
        map(self.area, self.part(offset), 0)
    }
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
        let mapped = fitting(&maps);
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
            sets: Mutex::default(),
        })
    }

    /// Whether clones have a page mapped from the snapshot's file, or from that of the loading sets.
    fn is_mapped(&self, at: u64) -> bool {
        let stored = self.skeleton.image.offset(at).is_some();
        stored && image::offset(&self.copied, at).is_none()
    }

    /// Makes the file of all loading sets and maps it in clones to come.
    fn load(&self, sets: &mut Sets) -> Result<(), ZygoteError> {
        let image = &self.skeleton.image;
        let mut regions = self.regions(sets.inputs.values());
        let maps: Vec<Map> = regions.iter().map(|region| region.map(0)).collect();
        regions.truncate(fitting(&maps).len());
        let pages: Vec<u64> = regions
            .iter()
            .flat_map(|region| (region.at..region.end).step_by(PAGE as usize))
            .collect();
        let store = Store::Directory(&self.directory);
        let file = WorkingSetFile::write(image, &pages, store)
            .map_err(failed("writing the loading set"))?;
        let mut offset = 0;
        let mut parts = Vec::new();
        let mut maps = Vec::new();
        for region in regions {
            maps.push(region.map(offset));
            parts.push(region.part(offset));
            offset += region.end - region.at;
        }
        self.skeleton.zygote.rework(&maps, &[file.file.as_fd()])?;
        parts.sort_unstable_by_key(|part| part.at);
        for set in sets.inputs.values_mut() {
            let its = self.regions([&*set]).into_iter().filter_map(|region| {
                Some(Part {
                    at: region.at,
                    length: region.end - region.at,
                    offset: image::offset(&parts, region.at)?,
                })
            });
            let its = its.collect();
            set.parts = its;
        }
        sets.file = Some(file);
        Ok(())
    }

    /// What loading sets have, in the order of first use by any of them.
    fn regions<'a>(&self, sets: impl IntoIterator<Item = &'a LoadingSet>) -> Vec<Region<'_>> {
        let image = &self.skeleton.image;
        let mut groups: BTreeMap<u64, usize> = BTreeMap::new();
        for set in sets {
            for (index, at) in set.pages.pages.iter().enumerate() {
                let group = groups.entry(*at).or_insert(usize::MAX);
                *group = (*group).min(index / GROUP);
            }
        }
        let mut regions: Vec<Region<'_>> = Vec::new();
        for area in image.areas.iter().filter(|area| area.mappable) {
            let first = regions.len();
            for (&at, &group) in groups.range(area.at..area.at + area.length) {
                match regions[first..].last_mut() {
                    // A file that is mapped over a guard page would take its place.
                    Some(last) if last.end + GAP * PAGE >= at && !area.has_guard(last.end, at) => {
                        last.end = at + PAGE;
                        last.group = last.group.min(group);
                    }
                    _ => regions.push(Region {
                        group,
                        area,
                        at,
                        end: at + PAGE,
                    }),
                }
            }
        }
        regions.sort_by_key(|region| (region.group, region.at));
        regions
    }

    /// Begins to record the instance that is about to start, or tells what is to be loaded for it.
    fn begin(&self, input: &str) -> Result<Begun, ZygoteError> {
        let mut sets = lock(&self.sets);
        if sets.recording.as_ref().is_some_and(Recording::is_over) {
            sets.recording = None;
        }
        let under_way = sets.recording.as_ref();
        if let Some(set) = sets.inputs.get(input) {
            // What it loads would be taken for the other's.
            let quiet = under_way.is_some_and(|one| one.recorder.runs());
            let loaded = sets.file.clone().filter(|_| !quiet);
            return Ok(loaded.map_or(Begun::Unloaded, |file| {
                Begun::Loaded(file, Arc::clone(&set.parts))
            }));
        }
        if under_way.is_some() {
            return Ok(Begun::Unloaded);
        }
        let files = Files {
            image: Arc::clone(&self.skeleton.image),
            loading_set: sets.file.clone(),
        };
        let recorder = Recorder::start(files).map_err(failed("starting a recorder"))?;
        sets.recording = Some(Recording {
            recorder,
            input: input.to_owned(),
            root: None,
        });
        Ok(Begun::Recorded)
    }
}

/// How an instance begins.
enum Begun {
    /// It is recorded.
    Recorded,
    /// The loader brings in these parts of the file.
    Loaded(WorkingSetFile, Arc<[Part]>),
    /// Its input was not recorded yet, and another instance is.
    Unloaded,
}

impl Recording {
    /// Whether the instance ended by itself; the next one is recorded.
    fn is_over(&self) -> bool {
        let there = |root| Path::new(&format!("/proc/{root}")).exists();
        self.root.is_some_and(|root| !there(root))
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
        flags: area.flags,
        file,
        offset: part.offset,
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
        self.skeleton.copy_own_pages(&clone, &work)?;
        self.skeleton.copy_parts(&clone, &self.copied, &work)?;
        let begun_as = self.begin(request.input)?;
        if let Begun::Loaded(file, parts) = &begun_as {
            load_ahead(file, parts, &work).map_err(failed("starting a loader"))?;
        }
        let brought = begun.elapsed();
        let started = clone.start(request);
        if let Begun::Recorded = begun_as {
            let mut sets = lock(&self.sets);
            match (&started, &mut sets.recording) {
                (Ok(started), Some(recording)) => {
                    recording.root = started.pids.first().copied();
                }
                // The next one is recorded.
                (_, recording) => *recording = None,
            }
        }
        let mut started = started?;
        started.steps.insert(0, ("pages", brought));
        started.work = work;
        Ok(started)
    }

    fn learn(&self, pids: &[i32], input: &str) -> Result<bool, ZygoteError> {
        let mut sets = lock(&self.sets);
        let ends = |one: &Recording| one.root.is_some() && one.root == pids.first().copied();
        let recorded = sets.recording.take_if(|one| ends(one));
        // One that served another input than it was started for tells of neither.
        let recorded = recorded.filter(|one| one.input == input);
        if let Some(recorded) = &recorded {
            let pages = recorded.recorder.pages(pids);
            let mut pages =
                pages.map_err(failed("looking at the pages of the recorded instance"))?;
            pages.retain(|at| self.is_mapped(*at));
            let set = &mut sets.inputs.entry(input).pages;
            // One round, with which no other is compared.
            set.rounds.done = 1;
            set.add(&pages);
            self.load(&mut sets)?;
        }
        drop(sets);
        Ok(self.base().learn(pids, input)? || recorded.is_some())
    }

    fn recorded(&self) -> Vec<Recorded> {
        let sets = lock(&self.sets);
        let image = &self.skeleton.image;
        let recorded = sets
            .inputs
            .iter()
            .map(|(input, set)| set.pages.recorded(input, image));
        recorded.collect()
    }

    fn recall(&self, recorded: &[Recorded]) -> Result<(), ZygoteError> {
        let mut sets = lock(&self.sets);
        for one in recorded {
            let mut pages = RecordedPages::of(one, &self.skeleton.image);
            pages.pages.retain(|at| self.is_mapped(*at));
            sets.inputs.entry(&one.input).pages = pages;
        }
        match recorded.is_empty() {
            true => Ok(()),
            false => self.load(&mut sets),
        }
    }

    fn own_bytes(&self) -> u64 {
        let sets = lock(&self.sets);
        sets.file.as_ref().map_or(0, |file| file.mapped.length())
    }
}

/// Reads parts of the loading sets' file into the page cache on a thread of its own.
fn load_ahead(file: &WorkingSetFile, parts: &Arc<[Part]>, work: &Arc<Work>) -> std::io::Result<()> {
    let (mapped, parts, work) = (
        Arc::clone(&file.mapped),
        Arc::clone(parts),
        Arc::clone(work),
    );
    std::thread::Builder::new()
        .name("loader".into())
        .spawn(move || {
            for part in parts.iter() {
                for from in (0..part.length).step_by(STEP as usize) {
                    let length = STEP.min(part.length - from);
                    mapped.read(part.offset + from, length);
                    work.prefetched(length / PAGE);
                    work.read(length);
                }
            }
        })
        .map(drop)
}
