//! The choice: what a call gets, from the table as it is. Pure, so that every rule is testable.

use std::sync::Arc;
use std::time::Instant;

use super::SandboxRef;
use super::table::{Parked, State, Table};
use crate::functions::Revision;

/// What is to be done for a call.
#[derive(Debug)]
pub(super) enum Plan {
    /// This sandbox's instance serves; one call was added to it.
    Warm(String),
    /// The function that is parked in this sandbox goes on.
    Resume(SandboxRef, Parked),
    /// This idle sandbox takes the function.
    Repurpose(SandboxRef),
    /// This sandbox is reset, then takes the function.
    Evict(SandboxRef, String),
    /// A new sandbox is made.
    Create(SandboxRef),
    /// A sandbox that is of no use to this call makes room for a new one.
    Replace {
        old: SandboxRef,
        tenancy: Option<String>,
        new: SandboxRef,
    },
    /// Nothing can be had now.
    Wait,
}

impl Table {
    /// Chooses for a call of `revision`. Without a template only a new sandbox can take the
    /// function.
    pub fn plan(&mut self, revision: &Arc<Revision>, template: bool, limit: usize) -> Plan {
        if let Some(id) = self.warm(revision) {
            return Plan::Warm(id);
        }
        self.plan_start(revision, template, limit)
    }

    /// Chooses for one more instance, whatever instances there are.
    pub fn plan_start(&mut self, revision: &Arc<Revision>, template: bool, limit: usize) -> Plan {
        let namespace = &revision.function().namespace;
        if template {
            if let Some((sandbox, parked)) = self.take_parked(revision) {
                return Plan::Resume(sandbox, parked);
            }
            if let Some(id) = self.idle_in(namespace)
                && let Some((sandbox, _)) = self.take(&id)
            {
                return Plan::Repurpose(sandbox);
            }
            // What was only parked gives way before what has served.
            if let Some(id) = self.least_wanted(Some(namespace))
                && let Some((sandbox, Some(tenancy))) = self.take(&id)
            {
                return Plan::Evict(sandbox, tenancy);
            }
            // An instance that a user asked to keep gives way only when there is no room.
            let room = self.entries.len() < limit;
            if let Some(id) = self.victim(revision, Some(namespace), room)
                && let Some((sandbox, Some(tenancy))) = self.take(&id)
            {
                return Plan::Evict(sandbox, tenancy);
            }
        }
        self.plan_new(revision, limit)
    }

    /// Chooses for an instance that is nice to have: nobody gives way to it.
    pub fn plan_spare(&mut self, revision: &Arc<Revision>, template: bool, limit: usize) -> Plan {
        let namespace = &revision.function().namespace;
        if template
            && let Some(id) = self.idle_in(namespace)
            && let Some((sandbox, _)) = self.take(&id)
        {
            return Plan::Repurpose(sandbox);
        }
        match self.entries.len() < limit {
            true => Plan::Create(self.reserve(namespace)),
            false => Plan::Wait,
        }
    }

    /// Chooses for a start that needs a new sandbox.
    pub fn plan_new(&mut self, revision: &Arc<Revision>, limit: usize) -> Plan {
        let namespace = revision.function().namespace.clone();
        if self.entries.len() < limit {
            return Plan::Create(self.reserve(&namespace));
        }
        let surplus = self.idle().map(|(id, ..)| id.clone()).next();
        let surplus = surplus.or_else(|| self.least_wanted(None));
        let Some(id) = surplus.or_else(|| self.victim(revision, None, false)) else {
            return Plan::Wait;
        };
        let Some((old, tenancy)) = self.take(&id) else {
            return Plan::Wait;
        };
        Plan::Replace {
            old,
            tenancy,
            new: self.reserve(&namespace),
        }
    }

    /// The instance used last, since its memory is the warmest; a call is added to it.
    pub fn warm(&mut self, revision: &Arc<Revision>) -> Option<String> {
        let limit = revision.concurrency();
        let mut best: Option<(&String, &mut super::table::Instance)> = None;
        for (id, entry) in &mut self.entries {
            if let State::Serving(instance) = &mut entry.state
                && Arc::ptr_eq(&instance.revision, revision)
                && !instance.broken
                && instance.in_flight < limit
                && best
                    .as_ref()
                    .is_none_or(|(_, b)| instance.last_used > b.last_used)
            {
                best = Some((id, instance));
            }
        }
        let (id, instance) = best?;
        instance.in_flight += 1;
        instance.last_used = Instant::now();
        Some(id.clone())
    }

    fn idle_in(&self, namespace: &str) -> Option<String> {
        self.idle()
            .filter(|(_, e, _)| e.namespace == namespace)
            .max_by_key(|(_, _, since)| *since)
            .map(|(id, ..)| id.clone())
    }

    /// The idle instance of another function that was used least recently.
    fn victim(
        &self,
        revision: &Arc<Revision>,
        namespace: Option<&str>,
        spare_kept: bool,
    ) -> Option<String> {
        self.serving()
            .filter(|(_, e, i)| {
                i.in_flight == 0
                    && !i.broken
                    && !Arc::ptr_eq(&i.revision, revision)
                    && namespace.is_none_or(|n| n == e.namespace)
            })
            .map(|(id, _, i)| (self.is_kept(&i.revision), i.last_used, id))
            .filter(|(kept, ..)| !(spare_kept && *kept))
            .min()
            .map(|(_, _, id)| id.clone())
    }

    /// Whether the function has no more instances than its user wants kept.
    fn is_kept(&self, revision: &Arc<Revision>) -> bool {
        let Some(floor) = self.floors.get(revision.function()) else {
            return false;
        };
        let have = self
            .serving()
            .filter(|(_, _, i)| i.revision.function() == revision.function())
            .count();
        have <= *floor as usize
    }
}
