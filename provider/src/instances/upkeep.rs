//! What happens off the call's path: idle sandboxes are refilled and trimmed, instances that
//! nobody calls give up their sandboxes, functions get the instances that their users want kept.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::table::State;
use super::{HOUSEKEEPING_PAUSE, SandboxRef, Scheduler, StartError};
use crate::functions::{FunctionName, Revision};

const TICK: Duration = Duration::from_secs(1);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long a stop waits for sandboxes that are being made or reset.
const BUSY_PATIENCE: Duration = Duration::from_secs(3);
/// How long an idle sandbox beyond those wanted stays, since it is likely to be needed again.
const SURPLUS_AGE: Duration = Duration::from_secs(60);

impl Scheduler {
    /// Lets the upkeep hold idle sandboxes in `namespace`.
    pub fn serve_namespace(&self, namespace: &str) {
        self.namespaces
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .insert(namespace.to_owned());
        self.upkeep.notify_one();
    }

    /// Ends every sandbox of a namespace that has no functions any more.
    pub async fn leave_namespace(&self, namespace: &str) {
        self.namespaces
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .remove(namespace);
        let taken: Vec<(SandboxRef, Option<String>)> = {
            let mut table = self.table();
            let ids: Vec<String> = table
                .entries
                .iter()
                .filter(|(_, e)| e.namespace == namespace && !matches!(e.state, State::Busy))
                .map(|(id, _)| id.clone())
                .collect();
            ids.iter().filter_map(|id| table.take(id)).collect()
        };
        for (sandbox, tenancy) in taken {
            self.discard(&sandbox, tenancy.as_deref()).await;
        }
    }

    /// Runs the upkeep until the scheduler stops.
    pub async fn run_upkeep(self: Arc<Self>) {
        let mut pause = FIRST_PAUSE;
        let mut not_before = Instant::now();
        loop {
            let _ = tokio::time::timeout(TICK, self.upkeep.notified()).await;
            if self.table().idle().next().is_some() {
                tokio::time::sleep(HOUSEKEEPING_PAUSE).await;
            }
            if self.table().stopping {
                return;
            }
            self.expire();
            self.trim().await;
            if Instant::now() < not_before {
                continue;
            }
            match self.refill().await {
                true => {
                    pause = FIRST_PAUSE;
                    self.park().await;
                }
                false => {
                    not_before = Instant::now() + pause;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    /// Makes the idle sandboxes that are wanted; false when one could not be made.
    async fn refill(self: &Arc<Self>) -> bool {
        let namespaces: Vec<String> = self
            .namespaces
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .iter()
            .cloned()
            .collect();
        for namespace in namespaces {
            while let Some(sandbox) = self.reserve_idle(&namespace) {
                match self.ops.create_idle(&sandbox).await {
                    Ok(address) => {
                        self.set_address(&sandbox.id, address);
                        self.put_idle(&sandbox);
                    }
                    Err(err) => {
                        tracing::warn!(namespace, "No idle sandbox could be made: {err}");
                        self.discard(&sandbox, None).await;
                        return false;
                    }
                }
            }
        }
        true
    }

    fn reserve_idle(&self, namespace: &str) -> Option<SandboxRef> {
        let mut table = self.table();
        let idle = table
            .idle()
            .filter(|(_, e, _)| e.namespace == namespace)
            .count();
        let room = table.entries.len() < self.options.limit;
        (room && idle < self.options.idle && !table.stopping).then(|| table.reserve(namespace))
    }

    /// Ends instances that were not called for the time that they are kept.
    fn expire(self: &Arc<Self>) {
        let Some(keep_alive) = self.options.keep_alive else {
            return;
        };
        let mut table = self.table();
        let mut have = std::collections::HashMap::<FunctionName, u32>::new();
        for (_, _, instance) in table.serving() {
            *have
                .entry(instance.revision.function().clone())
                .or_default() += 1;
        }
        let expired: Vec<String> = table
            .serving()
            .filter(|(_, _, i)| i.in_flight == 0 && i.last_used.elapsed() >= keep_alive)
            .filter(|(_, _, i)| {
                let function = i.revision.function();
                let floor = table.floors.get(function).copied().unwrap_or(0);
                match have.get_mut(function) {
                    Some(count) if *count > floor => {
                        *count -= 1;
                        true
                    }
                    _ => false,
                }
            })
            .map(|(id, ..)| id.clone())
            .collect();
        for id in expired {
            self.spawn_reset(&mut table, &id);
        }
    }

    /// Removes idle sandboxes that have not been needed for a while.
    async fn trim(&self) {
        let surplus: Vec<(SandboxRef, Option<String>)> = {
            let mut table = self.table();
            let mut found = Vec::new();
            let namespaces: std::collections::HashSet<String> = table
                .entries
                .values()
                .map(|e| e.namespace.clone())
                .collect();
            for namespace in namespaces {
                let mut idle: Vec<(Instant, String)> = table
                    .idle()
                    .filter(|(_, e, _)| e.namespace == namespace)
                    .map(|(id, _, since)| (since, id.clone()))
                    .collect();
                idle.sort();
                let beyond = idle.len().saturating_sub(self.options.idle);
                for (since, id) in idle.into_iter().take(beyond) {
                    if since.elapsed() >= SURPLUS_AGE {
                        found.extend(table.take(&id));
                    }
                }
            }
            found
        };
        for (sandbox, tenancy) in surplus {
            self.discard(&sandbox, tenancy.as_deref()).await;
        }
    }

    /// Ends every instance of `revision` that serves no call now; those that do end with their
    /// call, since the revision is retired.
    pub fn end_instances(self: &Arc<Self>, revision: &Arc<Revision>) {
        let mut table = self.table();
        let serving = table
            .serving()
            .filter(|(_, _, i)| Arc::ptr_eq(&i.revision, revision) && i.in_flight == 0)
            .map(|(id, ..)| id.clone());
        let found: Vec<String> = serving.chain(table.parked_of(revision)).collect();
        for id in found {
            self.spawn_reset(&mut table, &id);
        }
    }

    /// How many sandboxes still serve `revision`.
    pub fn count_of(&self, revision: &Arc<Revision>) -> usize {
        let table = self.table();
        table
            .serving()
            .filter(|(_, _, i)| Arc::ptr_eq(&i.revision, revision))
            .count()
    }

    /// Sets how many instances a function keeps; `None` lets the policy decide.
    pub fn set_floor(&self, function: &FunctionName, floor: Option<u32>) {
        let mut table = self.table();
        match floor {
            Some(floor) => table.floors.insert(function.clone(), floor),
            None => table.floors.remove(function),
        };
    }

    /// Ends idle instances of `revision` beyond `wanted`.
    pub fn shrink(self: &Arc<Self>, revision: &Arc<Revision>, wanted: usize) {
        let mut table = self.table();
        let mut idle: Vec<(Instant, String)> = table
            .serving()
            .filter(|(_, _, i)| Arc::ptr_eq(&i.revision, revision) && i.in_flight == 0)
            .map(|(id, _, i)| (i.last_used, id.clone()))
            .collect();
        let all = table
            .serving()
            .filter(|(_, _, i)| Arc::ptr_eq(&i.revision, revision))
            .count();
        idle.sort();
        for (_, id) in idle.into_iter().take(all.saturating_sub(wanted)) {
            self.spawn_reset(&mut table, &id);
        }
    }

    /// Starts instances of `revision` until there are `wanted`, and leaves them idle.
    pub async fn grow(self: &Arc<Self>, revision: &Arc<Revision>, wanted: usize) {
        let _growing = self.growing.lock().await;
        while self.count_of(revision) < self.wanted(revision, wanted) && !revision.retired() {
            if let Err(err) = self.start_another(revision, true).await {
                tracing::warn!(
                    "{} has fewer instances than the {wanted} asked for: {err}",
                    revision.function()
                );
                return;
            }
        }
        let now = self.wanted(revision, wanted);
        if now < wanted {
            // The one that was just being started was not there to be ended.
            self.shrink(revision, now);
        }
    }

    /// How many instances a user still wants who once wanted `wanted`.
    fn wanted(&self, revision: &Arc<Revision>, wanted: usize) -> usize {
        let table = self.table();
        let floor = table.floors.get(revision.function());
        floor.map_or(wanted, |floor| wanted.min(*floor as usize))
    }

    /// Starts instances that a user wants kept and that have been lost, while there is room.
    pub async fn top_up(self: &Arc<Self>, revision: &Arc<Revision>, wanted: usize) {
        let Ok(_growing) = self.growing.try_lock() else {
            return;
        };
        while self.count_of(revision) < self.wanted(revision, wanted) && !revision.retired() {
            match self.start_another(revision, false).await {
                Ok(()) => {}
                Err(StartError::Busy { .. }) => return,
                Err(err) => {
                    tracing::warn!("An instance that is to be kept did not start: {err}");
                    return;
                }
            }
        }
    }

    /// Destroys every sandbox that still serves `revision`, whatever it does.
    pub async fn kill_instances(&self, revision: &Arc<Revision>) {
        let taken: Vec<(SandboxRef, Option<String>)> = {
            let mut table = self.table();
            let serving = table
                .serving()
                .filter(|(_, _, i)| Arc::ptr_eq(&i.revision, revision))
                .map(|(id, ..)| id.clone());
            let ids: Vec<String> = serving.chain(table.parked_of(revision)).collect();
            ids.iter().filter_map(|id| table.take(id)).collect()
        };
        for (sandbox, tenancy) in taken {
            self.discard(&sandbox, tenancy.as_deref()).await;
        }
    }

    pub(super) fn spawn_reset(self: &Arc<Self>, table: &mut super::table::Table, id: &str) {
        if let Some((sandbox, tenancy)) = table.take(id) {
            let this = Arc::clone(self);
            tokio::spawn(async move { this.reset_to_idle(&sandbox, tenancy.as_deref()).await });
        }
    }

    /// Refuses new starts and waits until open calls have ended, at most `patience`. Sandboxes in
    /// between get a moment only: the next provider finds and ends what is half done.
    pub async fn stop(&self, patience: Duration) {
        self.table().stopping = true;
        self.upkeep.notify_one();
        let begun = Instant::now();
        loop {
            let (open, busy) = {
                let table = self.table();
                let open = table.serving().any(|(_, _, i)| i.in_flight > 0);
                let busy = table
                    .entries
                    .values()
                    .any(|e| matches!(e.state, State::Busy));
                (open, busy)
            };
            let wait = open && begun.elapsed() < patience
                || busy && begun.elapsed() < patience.min(BUSY_PATIENCE);
            if !wait {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
