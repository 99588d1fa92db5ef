//! What the rivals of `template` begin with: a skeleton, and the template's pages as an image.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::image::{Image, Mapped, Part, Store};
use super::keeper::Keeper;
use super::pager::{self, Supply, Trace};
use super::uffd::{self, Filled};
use super::work::Work;
use crate::manifest::PAGE;
use crate::plan::skeleton::{Area, Fill};
use crate::zygote::{
    Ahead, PreparedClone, StartRequest, Started, Zygote, ZygoteError, ZygoteRequest,
};

/// A skeleton and its image.
#[derive(Debug)]
pub struct Skeleton {
    pub zygote: Zygote,
    pub image: Arc<Image>,
}

impl Skeleton {
    /// In the clones of a watched one userfaultfd(2) tells of missing anonymous pages.
    pub fn build(
        request: ZygoteRequest<'_>,
        store: Store<'_>,
        watched: bool,
    ) -> Result<Self, ZygoteError> {
        let template = request.template;
        let (zygote, areas) = Zygote::fill(request, Fill::Skeleton { watched })?;
        let image = Arc::new(Image::of(template, areas, store)?);
        Ok(Self { zygote, image })
    }

    /// One whose clones attach what the pool's device has for them when they start; these areas are
    /// told. The image has the other pages.
    pub fn blank(request: ZygoteRequest<'_>) -> Result<(Self, Vec<Area>), ZygoteError> {
        let template = request.template;
        let (zygote, areas) = Zygote::fill(request, Fill::Blank)?;
        let (attached, areas) = areas.into_iter().partition(|area| area.attachable);
        let image = Arc::new(Image::of(template, areas, Store::Memory)?);
        image.mapped().read_all();
        Ok((Self { zygote, image }, attached))
    }

    /// Starts a clone of a blank one: it attaches what the device has, and brings in of that what
    /// `ahead` says for each process; the other pages are copied from here.
    pub(crate) fn start_blank(
        &self,
        clone: PreparedClone,
        request: &StartRequest<'_>,
        ahead: &[Ahead],
    ) -> Result<Started, ZygoteError> {
        let begun = Instant::now();
        let work = Arc::new(Work::default());
        self.copy_own_pages(&clone, &work)?;
        self.copy_parts(&clone, &self.image.parts, &work)?;
        clone.bring_ahead(ahead)?;
        let copied = ahead.iter().flat_map(|ahead| &ahead.copied);
        work.prefetched(copied.map(|(_, length)| length / PAGE).sum());
        let brought = begun.elapsed();
        let mut started = clone.start(request)?;
        started.steps.insert(0, ("pages", brought));
        started.work = work;
        Ok(started)
    }

    /// Watches the clone's anonymous areas that have stored pages. What other mappings miss is zero
    /// or of a file, as the kernel has it.
    pub fn watch(&self, clone: &PreparedClone) -> Result<(), ZygoteError> {
        let Some(watch) = clone.watch() else {
            return Err(ZygoteError::Gone);
        };
        let mut areas = self.image.areas.iter().filter(|area| area.anonymous);
        uffd::open(watch)
            .and_then(|()| areas.try_for_each(|area| uffd::register(watch, area.at, area.length)))
            .map_err(failed(
                "watching a clone's memory; the kernel must know userfaultfd's events (CONFIG_USERFAULTFD), and this process needs CAP_SYS_PTRACE",
            ))
    }

    /// Pages that no userfaultfd knows: those of file mappings.
    pub fn copy_own_pages(&self, clone: &PreparedClone, work: &Work) -> Result<(), ZygoteError> {
        let pages = self
            .image
            .write_own_pages(clone.pid())
            .map_err(failed("writing the pages of file mappings"))?;
        work.copied(pages);
        work.read(pages * PAGE);
        Ok(())
    }

    /// Pages of anonymous memory that is written like those, such as stacks.
    pub fn copy_parts(
        &self,
        clone: &PreparedClone,
        parts: &[Part],
        work: &Work,
    ) -> Result<(), ZygoteError> {
        let pages = self
            .image
            .write_parts(clone.pid(), parts)
            .map_err(failed("writing the pages of stacks"))?;
        work.copied(pages);
        work.read(pages * PAGE);
        Ok(())
    }

    pub fn resident_bytes(&self) -> Result<u64, ZygoteError> {
        Ok(self.zygote.resident_bytes()? + self.image.mapped().length())
    }
}

/// A watched skeleton, with the keeper of its clones' userfaultfds.
#[derive(Debug)]
pub struct Watched {
    pub skeleton: Skeleton,
    keeper: Mutex<Arc<Keeper>>,
    /// The program that becomes a keeper.
    binary: PathBuf,
    /// By the root's pid: what is missed, and the input whose pages it was given.
    traces: Mutex<HashMap<i32, (Arc<Trace>, String)>>,
}

/// What is brought into a clone beyond what faults ask for.
#[derive(Debug, Default)]
pub struct Prefetch {
    /// Before the tree runs, and while it runs.
    pub first: Vec<Part>,
    pub ahead: VecDeque<Part>,
    /// The file that these are in.
    pub from: Option<Arc<Mapped>>,
}

impl Watched {
    pub fn build(request: ZygoteRequest<'_>) -> Result<Self, ZygoteError> {
        let binary = request.binary.to_owned();
        let keeper = Mutex::new(Arc::new(Keeper::start(&binary)?));
        let skeleton = Skeleton::build(request, Store::Memory, true)?;
        Ok(Self {
            skeleton,
            keeper,
            binary,
            traces: Mutex::default(),
        })
    }

    /// The keeper; a new one where that which was there has ended.
    fn keeper(&self) -> Result<Arc<Keeper>, ZygoteError> {
        let mut keeper = lock(&self.keeper);
        if keeper.has_ended() {
            *keeper = Arc::new(Keeper::start(&self.binary)?);
        }
        Ok(Arc::clone(&keeper))
    }

    /// Host pid of the keeper.
    pub fn keeper_pid(&self) -> u32 {
        lock(&self.keeper).pid()
    }

    /// Starts a clone whose missing pages are served; first uses are noted.
    pub fn start(
        &self,
        mut clone: PreparedClone,
        request: &StartRequest<'_>,
        prefetch: Prefetch,
    ) -> Result<Started, ZygoteError> {
        let begun = Instant::now();
        let work = Arc::new(Work::default());
        self.skeleton.copy_own_pages(&clone, &work)?;
        let watch: OwnedFd = clone.take_watch().ok_or(ZygoteError::Gone)?;
        let trace = Arc::<Trace>::default();
        if let Some(from) = &prefetch.from {
            use std::os::fd::AsFd;
            let pages = install(watch.as_fd(), &prefetch.first, from)
                .map_err(failed("installing the working set"))?;
            work.prefetched(pages);
            work.read(pages * PAGE);
        }
        let supply = Supply {
            image: Arc::clone(&self.skeleton.image),
            ahead: prefetch.ahead,
            ahead_from: prefetch.from,
            trace: Arc::clone(&trace),
            work: Arc::clone(&work),
            keeper: self.keeper()?,
        };
        pager::serve(watch, clone.unwatched(), request.init, supply)
            .map_err(failed("serving a clone's pages"))?;
        let brought = begun.elapsed();
        let mut started = clone.start(request)?;
        started.steps.insert(0, ("pages", brought));
        started.work = work;
        if let Some(root) = started.pids.first() {
            lock(&self.traces).insert(*root, (trace, request.input.to_owned()));
        }
        Ok(started)
    }

    /// What was noted of an instance, once; none if it was given the pages of another input than it
    /// served.
    pub fn trace(&self, pids: &[i32], input: &str) -> Option<Vec<u64>> {
        let mut traces = lock(&self.traces);
        let (trace, given) = traces.remove(pids.first()?)?;
        // Of instances that ended by themselves nobody asks; they are not served any more.
        traces.retain(|_, (other, _)| Arc::strong_count(other) > 1);
        (given == input).then(|| trace.pages())
    }
}

/// Installs parts of a file in a clone that does not run yet; tells how many pages.
pub fn install(watch: BorrowedFd<'_>, parts: &[Part], from: &Mapped) -> io::Result<u64> {
    let mut pages = 0;
    for part in parts {
        let (done, filled) = uffd::copy(watch, part.at, from.from(part.offset), part.length)?;
        if filled != Filled::Done {
            let what = format!("the clone's memory at {:#x} is {filled:?}", part.at + done);
            return Err(io::Error::other(what));
        }
        pages += part.length / PAGE;
    }
    Ok(pages)
}

pub fn failed(doing: &'static str) -> impl FnOnce(io::Error) -> ZygoteError {
    move |source| ZygoteError::Io {
        doing: doing.into(),
        source,
    }
}

/// Locks; a panic elsewhere leaves what is locked as usable as it was.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
