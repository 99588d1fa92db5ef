//! Watches which pages of the snapshot an instance brings into the page cache, and when.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::super::image::{Image, Mapped, Part};
use super::super::skeleton::lock;
use super::super::working_set_file::WorkingSetFile;
use crate::manifest::PAGE;
use crate::working_set;

/// How often the page cache is looked at.
const LOOK: Duration = Duration::from_millis(1);
/// A recording ends by itself after this.
const LONGEST: Duration = Duration::from_secs(60);

/// The files that a clone's pages are in: the snapshot, and what is mapped over it.
#[derive(Debug, Clone)]
pub struct Files {
    pub image: Arc<Image>,
    pub loading_set: Option<WorkingSetFile>,
}

impl Files {
    /// Takes both out of the page cache, but for what other instances have mapped.
    fn forget_cached(&self) -> io::Result<()> {
        self.image.forget_cached();
        if let Some(set) = &self.loading_set {
            // Only what is on disk can be put out of it.
            set.file.sync_data()?;
            set.mapped.forget_cached(set.file.as_fd());
        }
        Ok(())
    }

    /// Addresses of the pages that are in the page cache.
    fn cached(&self) -> impl Iterator<Item = u64> {
        fn of(parts: &[Part], mapped: &Mapped) -> Vec<u64> {
            let cached = mapped.cached();
            let is_cached = |offset: &u64| cached.get((*offset / PAGE) as usize) == Some(&true);
            let parts = parts.iter().flat_map(|part| {
                let pages = (0..part.length).step_by(PAGE as usize);
                pages
                    .filter(move |from| is_cached(&(part.offset + from)))
                    .map(|from| part.at + from)
            });
            parts.collect()
        }
        let set = self.loading_set.as_ref();
        let set = set.map_or_else(Vec::new, |set| of(&set.parts, &set.mapped));
        let image = of(&self.image.parts, self.image.mapped());
        image.into_iter().chain(set)
    }
}

/// In which look each page was first seen.
#[derive(Debug)]
pub struct Recorder {
    files: Files,
    looks: Mutex<Looks>,
    ended: AtomicBool,
}

#[derive(Debug, Default)]
struct Looks {
    done: usize,
    of_page: HashMap<u64, usize>,
}

impl Recorder {
    /// Begins with an empty page cache, as far as it can be emptied.
    pub fn start(files: Files) -> io::Result<Arc<Self>> {
        files.forget_cached()?;
        let recorder = Arc::new(Self {
            files,
            looks: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        // What stays belongs to nobody yet.
        recorder.look();
        let mine = Arc::clone(&recorder);
        let until = Instant::now() + LONGEST;
        std::thread::Builder::new()
            .name("recorder".into())
            .spawn(move || {
                while mine.runs() && Instant::now() < until {
                    mine.look();
                    std::thread::sleep(LOOK);
                }
                mine.end();
            })?;
        Ok(recorder)
    }

    pub fn runs(&self) -> bool {
        !self.ended.load(Ordering::Relaxed)
    }

    fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    fn look(&self) {
        let cached = self.files.cached();
        let mut looks = lock(&self.looks);
        let now = looks.done;
        for at in cached {
            looks.of_page.entry(at).or_insert(now);
        }
        looks.done += 1;
    }

    /// Ends it; the pages in the order of their first use. Those that were in the page cache from the
    /// beginning belong to it where the instance has them mapped.
    pub fn pages(&self, pids: &[i32]) -> io::Result<Vec<u64>> {
        if self.runs() {
            self.look();
        }
        self.end();
        let maps = pids.iter().map(|pid| working_set::page_map(*pid));
        let maps: Vec<File> = maps.collect::<io::Result<_>>()?;
        let looks = lock(&self.looks);
        let mut pages: Vec<(usize, u64)> = Vec::new();
        for (at, look) in &looks.of_page {
            if *look > 0 || self.has(&maps, *at)? {
                pages.push((*look, *at));
            }
        }
        pages.sort_unstable();
        Ok(pages.into_iter().map(|(_, at)| at).collect())
    }

    fn has(&self, maps: &[File], at: u64) -> io::Result<bool> {
        let Some(area) = self.files.image.area(at) else {
            return Ok(false);
        };
        match maps.get(area.process) {
            Some(map) => working_set::is_present(map, area.start + (at - area.at)),
            None => Ok(false),
        }
    }
}
