//! One call's hold on an instance: from the choice until the reply's last byte.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::scheduler::Scheduler;
use super::table::Connection;
use super::{SandboxRef, StartKind};
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
