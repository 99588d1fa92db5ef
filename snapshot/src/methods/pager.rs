//! Serves the missing pages of one instance, from its start to its end, on a thread of its own.
//!
//! Faults are answered by the page that the skeleton would have there; pages that were never stored,
//! or were given back, are zero. The events of address spaces (fork, mremap, MADV_DONTNEED, munmap)
//! are followed. The kernel reports faults before events and refuses to fill pages while an event
//! waits to be read, so a fault that meets an event is answered after it, by what is true then.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::image::{Image, Mapped, Part};
use super::keeper::{self, Keeper};
use super::spans::Spans;
use super::uffd::{self, Event, Filled};
use super::work::Work;
use crate::manifest::PAGE;

/// How often is looked whether address spaces have ended, which nothing tells.
const LOOK: Duration = Duration::from_millis(500);
/// Pages brought in ahead between two looks at faults.
const BATCH: u64 = 32;

/// Pages of an instance in the order of their first use, by the skeleton's addresses.
#[derive(Debug, Default)]
pub struct Trace(Mutex<Vec<u64>>);

impl Trace {
    fn note(&self, at: u64) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(at);
    }

    pub fn pages(&self) -> Vec<u64> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// What an instance's pages come from.
#[derive(Debug)]
pub struct Supply {
    pub image: Arc<Image>,
    /// Pages to bring in while the tree runs, and the file that they are in.
    pub ahead: VecDeque<Part>,
    pub ahead_from: Option<Arc<Mapped>>,
    pub trace: Arc<Trace>,
    pub work: Arc<Work>,
    pub keeper: Arc<Keeper>,
}

/// An address space under watch.
#[derive(Debug)]
struct Space {
    watch: OwnedFd,
    spans: Spans,
    /// Faults that met an event.
    waiting: Vec<(u64, bool)>,
    dead: bool,
}

/// The instance; dropped before its end it is killed.
#[derive(Debug)]
struct Instance {
    spaces: Vec<Space>,
    init: OwnedFd,
    number: u64,
    keeper: Arc<Keeper>,
    ended: bool,
}

impl Drop for Instance {
    fn drop(&mut self) {
        if !self.ended && !keeper::kill(self.init.as_fd()) {
            // It must never see its userfaultfd closed.
            std::mem::forget(std::mem::take(&mut self.spaces));
            return;
        }
        self.spaces.clear();
        self.keeper.release(self.number);
    }
}

/// Serves the instance in the sandbox of `init`. Its anonymous pages missing by now are watched by
/// `watch`; nothing is watched at `unwatched`.
///
/// # Errors
/// When no thread can be made or the keeper is gone: the clone must not be started then.
pub fn serve(
    watch: OwnedFd,
    unwatched: u64,
    init: BorrowedFd<'_>,
    supply: Supply,
) -> io::Result<()> {
    let mut spans = Spans::default();
    for area in supply.image.areas.iter().filter(|area| area.anonymous) {
        spans.insert(area.at, area.length);
        // Where a program takes a guard away, zeroes are.
        for (start, end) in &area.guards {
            spans.forget(*start, *end);
        }
    }
    let number = supply.keeper.number();
    supply.keeper.hold(number, &[watch.as_fd(), init])?;
    let instance = Instance {
        init: init.try_clone_to_owned()?,
        spaces: vec![Space {
            watch,
            spans,
            waiting: Vec::new(),
            dead: false,
        }],
        number,
        keeper: Arc::clone(&supply.keeper),
        ended: false,
    };
    std::thread::Builder::new()
        .name("pager".into())
        .spawn(move || {
            let mut instance = instance;
            match run(&mut instance, supply, unwatched) {
                Ok(()) => instance.ended = true,
                Err(err) => tracing::error!(
                    "Failed to serve the pages of an instance, which is killed with its sandbox; the next call takes another: {err}"
                ),
            }
        })?;
    Ok(())
}

fn run(instance: &mut Instance, mut supply: Supply, unwatched: u64) -> io::Result<()> {
    let mut look = Instant::now() + LOOK;
    loop {
        let busy = !supply.ahead.is_empty()
            || instance
                .spaces
                .iter()
                .any(|space| !space.waiting.is_empty());
        let timeout = if busy {
            PollTimeout::ZERO
        } else {
            PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::MAX)
        };
        let spaces = instance.spaces.iter().map(|space| space.watch.as_fd());
        let others = [instance.init.as_fd(), supply.keeper.pidfd()];
        let mut poll: Vec<PollFd<'_>> = spaces
            .chain(others)
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        match nix::poll::poll(&mut poll, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let ready: Vec<bool> = poll
            .iter()
            .map(|one| one.any().unwrap_or_default())
            .collect();
        drop(poll);
        let count = instance.spaces.len();
        if ready.get(count).copied().unwrap_or_default() {
            // Everything in the sandbox has ended.
            return Ok(());
        }
        if ready.get(count + 1).copied().unwrap_or_default() {
            return Err(io::Error::other("the keeper of userfaultfds has ended"));
        }
        for (index, ready) in ready.iter().take(count).enumerate() {
            if *ready {
                events(instance, index, &supply)?;
            }
        }
        for space in &mut instance.spaces {
            for (at, write) in std::mem::take(&mut space.waiting) {
                answer(space, at, write, &supply)?;
            }
        }
        if instance
            .spaces
            .iter()
            .any(|space| !space.waiting.is_empty())
        {
            // Whoever changes the address space has to go on first.
            std::thread::yield_now();
        }
        bring_ahead(instance, &mut supply)?;
        if Instant::now() >= look || instance.spaces.iter().any(|space| space.dead) {
            look = Instant::now() + LOOK;
            for space in &mut instance.spaces {
                let probe = uffd::zero(space.watch.as_fd(), unwatched);
                space.dead |= matches!(probe, Ok(Filled::Dead));
            }
            // What lies ahead is brought into the tree's own, which is the first.
            if instance.spaces.first().is_some_and(|space| space.dead) {
                supply.ahead.clear();
            }
            instance.spaces.retain(|space| !space.dead);
            if instance.spaces.is_empty() {
                return Ok(());
            }
        }
    }
}

fn events(instance: &mut Instance, index: usize, supply: &Supply) -> io::Result<()> {
    let mut children = Vec::new();
    let number = instance.number;
    let Some(space) = instance.spaces.get_mut(index) else {
        return Ok(());
    };
    for event in uffd::read(space.watch.as_fd())? {
        match event {
            Event::Fault { at, write } => {
                supply.work.fault();
                if let Some(origin) = space.spans.origin(at) {
                    supply.trace.note(origin);
                }
                answer(space, at, write, supply)?;
            }
            Event::Fork(watch) => {
                supply.keeper.hold(number, &[watch.as_fd()])?;
                children.push(Space {
                    watch,
                    spans: space.spans.clone(),
                    waiting: Vec::new(),
                    dead: false,
                });
            }
            Event::Remap { from, to, length } => space.spans.remap(from, to, length),
            Event::Remove { start, end } => space.spans.forget(start, end),
        }
    }
    instance.spaces.extend(children);
    Ok(())
}

fn answer(space: &mut Space, at: u64, write: bool, supply: &Supply) -> io::Result<()> {
    let watch = space.watch.as_fd();
    let stored = space
        .spans
        .origin(at)
        .and_then(|origin| supply.image.offset(origin));
    let filled = match stored {
        Some(offset) => {
            let (read, filled) = uffd::copy(watch, at, supply.image.from(offset), PAGE)?;
            supply.work.read(read);
            filled
        }
        // A page of its own at once, where it would be copied next.
        None if write => uffd::copy(watch, at, ZEROES.0.as_ptr(), PAGE)?.1,
        None => uffd::zero(watch, at)?,
    };
    match filled {
        Filled::Done => {}
        Filled::There | Filled::Gone => uffd::wake(watch, at),
        Filled::Busy => space.waiting.push((at, write)),
        Filled::Dead => space.dead = true,
    }
    Ok(())
}

/// Brings one batch of what lies ahead into the tree's first address space.
fn bring_ahead(instance: &mut Instance, supply: &mut Supply) -> io::Result<()> {
    let (Some(space), Some(file)) = (instance.spaces.first_mut(), &supply.ahead_from) else {
        supply.ahead.clear();
        return Ok(());
    };
    let Some(part) = supply.ahead.pop_front() else {
        return Ok(());
    };
    let length = part.length.min(BATCH * PAGE);
    if part.length > length {
        supply.ahead.push_front(Part {
            at: part.at + length,
            length: part.length - length,
            offset: part.offset + length,
        });
    }
    let mut done = 0;
    while done < length {
        let at = part.at + done;
        // What was moved or given back is left to its faults.
        let same = |page: u64| space.spans.origin(page) == Some(page);
        let free = (0..(length - done) / PAGE).take_while(|page| same(at + page * PAGE));
        let pages = free.count() as u64;
        if pages == 0 {
            done += PAGE;
            continue;
        }
        let from = file.from(part.offset + done);
        let (copied, filled) = uffd::copy(space.watch.as_fd(), at, from, pages * PAGE)?;
        supply.work.prefetched(copied / PAGE);
        supply.work.read(copied);
        done += copied;
        match filled {
            Filled::Done => {}
            Filled::There | Filled::Gone => done += PAGE,
            Filled::Busy => {
                // After the event, by what is true then; whoever causes it has to go on first.
                std::thread::yield_now();
                supply.ahead.push_front(Part {
                    at: part.at + done,
                    length: length - done,
                    offset: part.offset + done,
                });
                return Ok(());
            }
            Filled::Dead => {
                space.dead = true;
                return Ok(());
            }
        }
    }
    Ok(())
}

#[repr(align(4096))]
struct Zeroes([u8; PAGE as usize]);
static ZEROES: Zeroes = Zeroes([0; PAGE as usize]);
