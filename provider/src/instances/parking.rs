//! Parked instances: functions that are likely to be called next, restored ahead in sandboxes that
//! would otherwise be idle, and stopped before their first instruction. A call takes such an
//! instance without waiting for a restore; it costs the memory that the function's calls write,
//! which is copied already, and page tables.
//!
//! Who is parked follows from what was started lately: each start counts, and counts half after a
//! minute. The function with the most of it for each of its parked instances, one more included,
//! gets the next sandbox.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::table::{Connection, Parked, State, Table};
use super::{Guard, ParkedStart, SandboxRef, Scheduler, StartError, StartKind};
use crate::connection::connect;
use crate::functions::{FunctionName, Revision, Template};

/// After which a start counts half.
const HALF_LIFE: Duration = Duration::from_secs(60);
/// Below this, nobody expects a start.
const LEAST: f64 = 0.1;
/// How long a connection may take that is made ahead; a call makes its own otherwise.
const CONNECT_LIMIT: Duration = Duration::from_millis(50);
/// How much more another function must be wanted to take a parked one's place.
const ADVANTAGE: f64 = 2.0;

/// How often a function was started lately.
#[derive(Debug)]
pub(super) struct Demand {
    revision: Arc<Revision>,
    starts: f64,
    at: Instant,
}

impl Demand {
    fn now(&self) -> f64 {
        let age = self.at.elapsed().as_secs_f64() / HALF_LIFE.as_secs_f64();
        self.starts * (-age).exp2()
    }
}

impl Table {
    /// Counts a start of `revision`.
    pub fn note_start(&mut self, revision: &Arc<Revision>) {
        self.demand.retain(|_, demand| demand.now() >= LEAST);
        let before = self
            .demand
            .get(revision.function())
            .map_or(0.0, Demand::now);
        self.demand.insert(
            revision.function().clone(),
            Demand {
                revision: Arc::clone(revision),
                starts: before + 1.0,
                at: Instant::now(),
            },
        );
    }

    /// Takes an instance of `revision` that is parked.
    pub fn take_parked(&mut self, revision: &Arc<Revision>) -> Option<(SandboxRef, Parked)> {
        let found = self
            .parked()
            .find(|(_, _, parked)| Arc::ptr_eq(&parked.revision, revision));
        let id = found.map(|(id, ..)| id.clone())?;
        let entry = self.entries.get_mut(&id)?;
        let State::Parked(parked) = std::mem::replace(&mut entry.state, State::Busy) else {
            return None;
        };
        let namespace = entry.namespace.clone();
        Some((SandboxRef { namespace, id }, parked))
    }

    /// The parked instance that is the least likely to be called.
    pub fn least_wanted(&self, namespace: Option<&str>) -> Option<String> {
        self.parked()
            .filter(|(_, entry, _)| namespace.is_none_or(|wanted| wanted == entry.namespace))
            .map(|(id, _, parked)| (id, self.worth(parked.revision.function(), 0)))
            .min_by(|(_, one), (_, other)| one.total_cmp(other))
            .map(|(id, _)| id.clone())
    }

    /// Where a revision is parked.
    pub fn parked_of(&self, revision: &Arc<Revision>) -> impl Iterator<Item = String> {
        let of_it = |parked: &Parked| Arc::ptr_eq(&parked.revision, revision);
        self.parked()
            .filter(move |(_, _, parked)| of_it(parked))
            .map(|(id, ..)| id.clone())
    }

    /// Starts of a function for each of its parked instances, `more` included.
    fn worth(&self, function: &FunctionName, more: usize) -> f64 {
        let starts = self.demand.get(function).map_or(0.0, Demand::now);
        let parked = self
            .parked()
            .filter(|(_, _, parked)| parked.revision.function() == function)
            .count();
        starts / (parked + more).max(1) as f64
    }

    /// The function to park next, and what it is worth.
    fn most_wanted(&self) -> Option<(Arc<Revision>, Template, f64)> {
        let worth = |demand: &Demand| self.worth(demand.revision.function(), 1);
        self.demand
            .values()
            .filter(|demand| !demand.revision.retired() && demand.revision.methods.now().parks())
            .filter_map(|demand| Some((demand, demand.revision.template()?)))
            .map(|(demand, template)| (Arc::clone(&demand.revision), template, worth(demand)))
            .filter(|(_, _, worth)| *worth >= LEAST)
            .max_by(|(_, _, one), (_, _, other)| one.total_cmp(other))
    }
}

impl Scheduler {
    /// Parks instances in idle sandboxes, as many as there may be.
    pub(super) async fn park(self: &Arc<Self>) {
        while let Some((sandbox, revision, template)) = self.next_to_park() {
            match self.ops.park(&sandbox, &revision, &template).await {
                Ok(start) => self.put_parked(&sandbox, &revision, start).await,
                Err(err) => {
                    tracing::warn!("No instance was parked: {err}");
                    self.discard(&sandbox, None).await;
                    if let StartError::TemplateGone { .. } = err {
                        // Nobody listens any more only while the provider stops.
                        let _ = self.template_gone.send(Arc::clone(&revision));
                    }
                    return;
                }
            }
        }
    }

    /// An idle sandbox for the function that is the most likely to be called. The last ones stay
    /// idle, for functions that nobody expects.
    fn next_to_park(self: &Arc<Self>) -> Option<(SandboxRef, Arc<Revision>, Template)> {
        let mut table = self.table();
        let (revision, template, worth) = table.most_wanted()?;
        let namespace = &revision.function().namespace;
        if table.stopping {
            return None;
        }
        if table.parked().count() >= self.options.parked {
            let id = table.least_wanted(Some(namespace))?;
            let State::Parked(parked) = &table.entries.get(&id)?.state else {
                return None;
            };
            if worth > ADVANTAGE * table.worth(parked.revision.function(), 0) {
                self.spawn_reset(&mut table, &id);
            }
            return None;
        }
        let idle: Vec<&String> = table
            .idle()
            .filter(|(_, entry, _)| entry.namespace == *namespace)
            .map(|(id, ..)| id)
            .collect();
        let room = table.entries.len() < self.options.limit;
        let spare = idle.len() > self.options.idle || (room && !idle.is_empty());
        let id = idle.first().filter(|_| spare).map(|id| (*id).clone())?;
        let (sandbox, _) = table.take(&id)?;
        Some((sandbox, revision, template))
    }

    /// Ends the parked instances of `revision`, whose start method cannot park any more.
    pub fn end_parked(self: &Arc<Self>, revision: &Arc<Revision>) {
        let mut table = self.table();
        let parked: Vec<String> = table.parked_of(revision).collect();
        for id in parked {
            self.spawn_reset(&mut table, &id);
        }
    }

    #[cfg(test)]
    pub(super) fn parked_of(&self, revision: &Arc<Revision>) -> usize {
        self.table().parked_of(revision).count()
    }

    async fn put_parked(
        self: &Arc<Self>,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
        start: ParkedStart,
    ) {
        let there = {
            let table = self.table();
            let entry = table.entries.get(&sandbox.id);
            entry.and_then(|entry| Some((entry.address?, entry.gone.clone())))
        };
        // The kernel takes the connection; the function accepts it when it goes on.
        let connection = match there {
            Some((address, gone)) => {
                let connected = tokio::time::timeout(CONNECT_LIMIT, connect(address, &gone)).await;
                connected.ok().and_then(Result::ok)
            }
            None => None,
        };
        let tenancy = start.tenancy.clone();
        let kept = {
            let mut table = self.table();
            let wanted = !revision.retired() && revision.methods.now().parks();
            match table.entries.get_mut(&sandbox.id) {
                Some(entry) if !entry.gone.is_cancelled() && wanted => {
                    entry.served = None;
                    entry.state = State::Parked(Parked {
                        revision: Arc::clone(revision),
                        start,
                        connection,
                    });
                    true
                }
                _ => false,
            }
        };
        if kept {
            self.freed.notify_one();
        } else {
            self.discard(sandbox, Some(&tenancy)).await;
        }
    }

    /// Lets a parked instance go on, for a call.
    pub(super) async fn resume(
        self: &Arc<Self>,
        sandbox: SandboxRef,
        parked: Parked,
        begun: Instant,
    ) -> Result<Guard, StartError> {
        let Parked {
            revision,
            start,
            connection,
        } = parked;
        let function = revision.function().to_string();
        let tenancy = start.tenancy.clone();
        let resumed = self.ops.resume(&sandbox, &revision, start).await;
        let (steps, address) = match (resumed, self.address(&sandbox.id)) {
            (Ok(steps), Some(address)) => (steps, address),
            (resumed, _) => {
                self.discard(&sandbox, Some(&tenancy)).await;
                let reason = "its sandbox ended while it was parked".to_owned();
                return Err(resumed
                    .err()
                    .unwrap_or(StartError::Start { function, reason }));
            }
        };
        self.metrics
            .start(StartKind::Parked, begun.elapsed(), &steps);
        self.upkeep.notify_one();
        let kind = StartKind::Parked;
        let guard = self.put_serving(&sandbox, &revision, tenancy, address, kind, steps);
        let mut guard = guard.ok_or_else(|| StartError::Start {
            function,
            reason: "its sandbox ended while it started".to_owned(),
        })?;
        if let Some(sender) = connection {
            guard.keep_connection(Connection {
                sender,
                idle_since: Instant::now(),
            });
        }
        Ok(guard)
    }
}
