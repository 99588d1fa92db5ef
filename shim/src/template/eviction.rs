//! Templates give their memory up when it is short, and are built again from the pool at their next
//! start.
//!
//! What goes is what was made for a template and start method: zygote, image, seats with the clones
//! that wait in them. The one that was started from longest ago goes first, and none while a start,
//! or anything else, uses it: whoever uses a [`Standing`] holds a reference that was taken under the
//! lock of the table of all, so that one which only the table holds is nobody's. Nor does a base go
//! before the templates whose zygotes were made from its own: they share its pages, so that none would
//! be free. Instances keep the pages that they share with a zygote, and go on.
//!
//! There is room to be made before a zygote is built ([`Templates::make_room`]) and whenever memory
//! gets short ([`guard_memory`]), looked at off the call's path.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use trenv_pool::{Source, TemplateReader};
use trenv_snapshot::methods::Method;

use super::pressure::{Stalls, available};
use super::standing::Standing;
use super::{Base, Templates, lock};
use crate::sandbox::Sandboxes;

/// How often what is available is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// While tasks wait for memory, this many times `template.memory_floor` shall be available: those of
/// a single cgroup wait as well when its own limit is reached, and no zygote is to blame then.
const STALLED: u64 = 4;

/// Keeps a template from being evicted.
pub struct Claim {
    _standing: Arc<Standing>,
}

impl Claim {
    pub fn of(standing: Arc<Standing>) -> Self {
        Self {
            _standing: standing,
        }
    }
}

/// Why a template is evicted.
pub enum Reason {
    Limit { needed: u64, limit: u64 },
    Floor { available: u64, floor: u64 },
    Stalled { available: u64 },
    Unbuilt,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: &u64| bytes >> 20;
        match self {
            Self::Limit { needed, limit } => write!(
                f,
                "templates need {} MiB, and template.memory_limit is {} MiB",
                mib(needed),
                mib(limit)
            ),
            Self::Floor { available, floor } => write!(
                f,
                "{} MiB of memory are available, and template.memory_floor is {} MiB",
                mib(available),
                mib(floor)
            ),
            Self::Stalled { available } => write!(
                f,
                "tasks of this machine wait for memory, of which {} MiB are available",
                mib(available)
            ),
            Self::Unbuilt => write!(f, "another zygote was killed while it was built"),
        }
    }
}

impl Templates {
    /// Evicts what must go so that there is memory for a zygote of this size, if one is to be built;
    /// `stalled` when tasks wait for memory.
    pub fn make_room(&self, coming: u64, stalled: bool) {
        // One at a time: who looks at all holds them, and nobody else could evict any.
        let _evicting = lock(&self.evicting);
        self.keep_limit(coming);
        self.keep_floor(coming, stalled);
    }

    /// Evicts until the templates that stand, and one to come, need no more than they may. The one
    /// used last stays unless another is to come: alone it cannot do with less.
    fn keep_limit(&self, coming: u64) {
        let limit = self.config.template.memory_limit;
        if limit == 0 {
            return;
        }
        loop {
            let all: Vec<Arc<Standing>> = lock(&self.standing).values().cloned().collect();
            let held: u64 = all.iter().map(|standing| standing.held_bytes()).sum();
            drop(all);
            let needed = held + coming;
            let spare_last = coming == 0;
            if needed <= limit || !self.evict(&Reason::Limit { needed, limit }, spare_last) {
                return;
            }
        }
    }

    /// Evicts until as much memory is available as shall be, beside that for one to come.
    fn keep_floor(&self, coming: u64, stalled: bool) {
        let floor = self.config.template.memory_floor;
        if floor == 0 {
            return;
        }
        let wanted = if stalled { floor * STALLED } else { floor };
        while let Some(available) = available().map(|bytes| bytes.saturating_sub(coming)) {
            let reason = match available {
                short if short < floor => Reason::Floor { available, floor },
                short if short < wanted => Reason::Stalled { available },
                _ => return,
            };
            if !self.evict(&reason, false) {
                return;
            }
        }
    }

    /// Evicts, of the templates that nothing needs, the one that was started from longest ago; `false`
    /// when there is none.
    pub fn evict(&self, reason: &Reason, spare_last: bool) -> bool {
        let (template, standing) = {
            let mut all = lock(&self.standing);
            let used = |standing: &Arc<Standing>| *lock(&standing.last_used);
            let last = all.values().map(used).max().filter(|_| spare_last);
            let bases: Vec<&Base> = all.values().filter_map(|one| one.base.as_ref()).collect();
            let unused = all.iter().filter(|(template, standing)| {
                Arc::strong_count(standing) == 1
                    && Some(used(standing)) != last
                    && !bases.iter().any(|base| base.is(template))
            });
            let oldest = unused.min_by_key(|(_, standing)| used(standing));
            let Some(oldest) = oldest.map(|(template, _)| *template) else {
                return false;
            };
            match all.remove(&oldest) {
                Some(standing) => (oldest, standing),
                None => return false,
            }
        };
        let held = standing.held_bytes();
        standing.end();
        standing.leave_instances();
        tracing::info!(
            "Evicted {}, {}, which held {} MiB and was started from {:.0?} ago: {reason}",
            template.id,
            template.method,
            held >> 20,
            Instant::now() - *lock(&standing.last_used)
        );
        true
    }
}

impl Standing {
    /// Agents in the seats of tenancies have the zygote's memory too.
    fn leave_instances(&self) {
        let made = std::mem::take(&mut *lock(&self.made));
        for seat in made.iter().filter_map(Weak::upgrade) {
            seat.leave_zygote();
        }
    }
}

/// Memory that a template's pages take in a zygote; none if it, or its clones, map the pool's device.
pub fn bytes_of(template: &TemplateReader, method: Method) -> u64 {
    let maps = matches!(method, Method::Template | Method::Attach | Method::Spice);
    if maps && template.templates().is_some() {
        return 0;
    }
    let extents = template.extents().iter();
    let stored = extents.filter(|extent| extent.source != Source::Zero);
    stored.map(|extent| extent.pages).sum::<u64>() * trenv_pool::PAGE_SIZE as u64
}

/// Evicts templates when memory gets short, for as long as the shim lives.
pub async fn guard_memory(all: Arc<Sandboxes>) {
    let stalls = Stalls::follow();
    loop {
        let stalled = stalls.within(LOOK_EVERY).await;
        let all = Arc::clone(&all);
        let looked = tokio::task::spawn_blocking(move || all.templates.make_room(0, stalled));
        if let Err(err) = looked.await {
            tracing::error!("The memory of templates could not be looked after: {err}");
        }
    }
}
