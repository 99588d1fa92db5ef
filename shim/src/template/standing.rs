//! A template at work: its zygote, and what is kept ready for its starts.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};

use trenv_pool::TemplateReader;
use trenv_sandbox::cgroup::{Limits, TenancyCgroup};
use trenv_sandbox::rootfs::Mount;
use trenv_snapshot::methods::StartMethod;
use trenv_snapshot::recording::Recorded;

use super::lock;
use crate::reap::Unswept;
use crate::sandbox::Seat;

/// A template whose zygote stands.
pub struct Standing {
    /// What its start method needs once: its zygote above all.
    pub method: Arc<dyn StartMethod>,
    /// Its working sets, as they were kept last.
    pub recorded: Mutex<Vec<Recorded>>,
    pub zygote_cgroup: TenancyCgroup,
    pub limits: Mutex<Limits>,
    pub seats: Mutex<Vec<Arc<Seat>>>,
    /// Held while seats are made ready.
    pub filling: Mutex<()>,
    /// Roots mounted ahead, by the mounts they were made of.
    pub staged: Mutex<VecDeque<(Vec<Mount>, OwnedFd)>>,
    /// Seats to keep ready, with a clone each.
    pub wanted: AtomicUsize,
    /// The layers, for building the zygote anew.
    pub rootfs: Vec<Mount>,
    // Keeps the pages in the pool for as long as the zygote may be built again from them.
    pub _reader: TemplateReader,
    pub _unswept: Vec<Unswept>,
}

impl Standing {
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
            if seat.agent_lives() {
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

    /// Ends the zygote and its seats, whoever still holds this.
    pub fn end(&self) {
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
