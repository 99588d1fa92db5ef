//! One call's hold on an instance: from the choice until the reply's last byte.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::scheduler::Scheduler;
use super::table::{Connection, State, Table};
use super::{SandboxRef, StartKind};
use crate::functions::Revision;
use crate::shim_client::Step;

/// A call's hold on an instance. Dropping it ends the hold.
#[derive(Debug)]
pub struct Guard {
    pub sandbox: SandboxRef,
    pub address: SocketAddr,
    pub kind: StartKind,
    pub steps: Vec<Step>,
    /// Cancelled when the sandbox is gone.
    pub gone: CancellationToken,
    pub(super) tenancy: String,
    pub(super) scheduler: Arc<Scheduler>,
    pub(super) broken: bool,
    pub(super) connection: Option<Connection>,
}

impl Guard {
    /// Says that the instance must not be used again.
    pub fn mark_broken(&mut self) {
        self.broken = true;
        self.connection = None;
    }

    /// Says that the function gets a call of this input to serve.
    pub fn mark_called(&self, input: &str) {
        if let Some(entry) = self.scheduler.table().entries.get_mut(&self.sandbox.id) {
            match &mut entry.served {
                Some(served) if served != input => served.clear(),
                Some(_) => {}
                None => entry.served = Some(input.to_owned()),
            }
        }
    }

    /// A connection that an earlier call left.
    pub fn take_connection(&mut self) -> Option<Connection> {
        self.connection.take()
    }

    /// Leaves a connection for the next call.
    pub fn keep_connection(&mut self, connection: Connection) {
        if !self.broken {
            self.connection = Some(connection);
        }
    }
}

impl Scheduler {
    /// Takes an instance of `revision` that runs and is free.
    pub(super) fn acquire_warm(self: &Arc<Self>, revision: &Arc<Revision>) -> Option<Guard> {
        let mut table = self.table();
        if table.stopping || revision.retired() {
            return None;
        }
        let id = table.warm(revision)?;
        self.warm_guard(&mut table, &id)
    }

    /// A hold on an instance to which a call was added.
    pub(super) fn warm_guard(self: &Arc<Self>, table: &mut Table, id: &str) -> Option<Guard> {
        let entry = table.entries.get_mut(id)?;
        let address = entry.address?;
        let State::Serving(instance) = &mut entry.state else {
            return None;
        };
        Some(Guard {
            sandbox: SandboxRef {
                namespace: entry.namespace.clone(),
                id: id.to_owned(),
            },
            address,
            kind: StartKind::Warm,
            steps: Vec::new(),
            gone: entry.gone.clone(),
            tenancy: instance.tenancy.clone(),
            scheduler: Arc::clone(self),
            broken: false,
            connection: instance.connections.pop(),
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.scheduler.release(
            &self.sandbox.id,
            &self.tenancy,
            self.broken,
            self.connection.take(),
        );
    }
}
