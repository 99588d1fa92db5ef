//! A template at work: its zygote, and what is kept ready for its starts.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use trenv_pool::TemplateReader;
use trenv_sandbox::cgroup::{Limits, TenancyCgroup};
use trenv_sandbox::rootfs::{KeptRoot, Mount};
use trenv_snapshot::methods::Prepared;
use trenv_snapshot::recording::Recorded;

use super::{Base, lock};
use crate::reap::Unswept;
use crate::sandbox::Seat;

/// Roots kept mounted for tenancies to come, for each template.
const STAGED_MAX: usize = 8;
/// Times of clones that are kept until somebody asks.
const CLONE_TIMES: usize = 256;

/// A template whose zygote stands.
pub struct Standing {
    /// What its start method needs once: its zygote above all.
    pub method: Prepared,
    /// Its working sets, as they were kept last.
    pub recorded: Mutex<Vec<Recorded>>,
    pub zygote_cgroup: TenancyCgroup,
    pub limits: Mutex<Limits>,
    pub seats: Mutex<Vec<Arc<Seat>>>,
    /// All that were made, those of tenancies too.
    pub made: Mutex<Vec<Weak<Seat>>>,
    /// How long the clones took that were made lately, in order.
    pub clone_times: Mutex<VecDeque<Duration>>,
    /// When a start last began.
    pub last_used: Mutex<Instant>,
    /// Held while seats are made ready.
    pub filling: Mutex<()>,
    /// Roots mounted ahead.
    pub staged: Mutex<VecDeque<Staged>>,
    /// Seats to keep ready, with a clone each.
    pub wanted: AtomicUsize,
    /// The layers, for building the zygote anew.
    pub rootfs: Vec<Mount>,
    /// Whose zygote this one was made from, for the same.
    pub base: Option<Base>,
    // Keeps the pages in the pool for as long as the zygote may be built again from them.
    pub _reader: TemplateReader,
    pub _unswept: Vec<Unswept>,
}

/// A root mounted ahead of a tenancy.
pub struct Staged {
    /// What it was made of.
    pub mounts: Vec<Mount>,
    pub root: TenancyRoot,
}

/// The root of one tenancy.
#[derive(Debug)]
pub struct TenancyRoot {
    /// For the sandbox.
    pub mount: OwnedFd,
    /// By which another tenancy may have the root after this one.
    pub kept: Option<KeptRoot>,
}

impl Standing {
    /// Adds a root mounted ahead; of many that nobody asks for, the oldest goes.
    pub fn add_staged(&self, staged: Staged) {
        let mut all = lock(&self.staged);
        all.push_back(staged);
        if all.len() > STAGED_MAX {
            all.pop_front();
        }
    }

    /// Takes the root that was made ahead of these mounts.
    pub fn take_staged(&self, mounts: &[Mount]) -> Option<TenancyRoot> {
        let mut all = lock(&self.staged);
        let at = all.iter().position(|staged| staged.mounts == mounts)?;
        all.remove(at).map(|staged| staged.root)
    }

    /// A seat whose agent lives, one with a clone if there is one; `true` when it has one.
    pub fn take_living(&self) -> Option<(Arc<Seat>, bool)> {
        let prepared = {
            let mut seats = lock(&self.seats);
            let at = seats.iter().rposition(|seat| seat.is_prepared());
            at.map(|at| seats.remove(at))
        };
        match prepared {
            Some(seat) => Some((seat, true)),
            None => self.take_unprepared().map(|seat| (seat, false)),
        }
    }

    /// A seat without a clone whose agent lives.
    pub fn take_unprepared(&self) -> Option<Arc<Seat>> {
        loop {
            let seat = {
                let mut seats = lock(&self.seats);
                let at = seats.iter().rposition(|seat| !seat.is_prepared())?;
                seats.remove(at)
            };
            if seat.can_start() {
                return Some(seat);
            }
            if let Err(err) = seat.remove() {
                tracing::warn!("A spare cgroup stays until the next sweep: {}", err.chain());
            }
        }
    }

    /// Seats in which a clone waits.
    pub fn prepared(&self) -> usize {
        let seats = lock(&self.seats);
        seats.iter().filter(|seat| seat.is_prepared()).count()
    }

    /// Notes a new seat.
    pub fn note(&self, seat: &Arc<Seat>) {
        let mut made = lock(&self.made);
        made.retain(|seat| seat.strong_count() > 0);
        made.push(Arc::downgrade(seat));
    }

    /// Notes how long a clone took to be made.
    pub fn note_clone(&self, took: Duration) {
        let mut times = lock(&self.clone_times);
        if times.len() == CLONE_TIMES {
            times.pop_front();
        }
        times.push_back(took);
    }

    /// Whether a seat's clones come from this zygote, and not from one that stood here before.
    pub fn made_seat(&self, seat: &Seat) -> bool {
        seat.starts_by(&self.method)
    }

    /// Memory that goes when this ends; what instances share with the zygote stays theirs.
    pub fn held_bytes(&self) -> u64 {
        let charged = self.zygote_cgroup.stats().map(|stats| stats.memory_bytes);
        // Without a memory controller the kernel tells nothing of a group.
        let zygote = charged.ok().filter(|bytes| *bytes > 0);
        let zygote = zygote.or_else(|| self.method.zygote()?.resident_bytes().ok());
        zygote.unwrap_or(0) + self.method.held_bytes()
    }

    /// Ends the zygote and its seats, whoever still holds this.
    pub fn end(&self) {
        lock(&self.staged).clear();
        for seat in std::mem::take(&mut *lock(&self.seats)) {
            if let Err(err) = seat.remove() {
                tracing::warn!("A spare cgroup stays until the next sweep: {}", err.chain());
            }
        }
        let gone = self
            .zygote_cgroup
            .kill_all()
            .and_then(|()| self.zygote_cgroup.remove());
        if let Err(err) = gone {
            tracing::warn!("The cgroup of a zygote stays until the next sweep: {err}");
        }
    }
}
