//! The table of sandboxes: one entry per sandbox, each in exactly one state.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use hyper::client::conn::http1::SendRequest;
use tokio_util::sync::CancellationToken;

use super::parking::Demand;
use super::{ParkedStart, SandboxRef};
use crate::functions::{FunctionName, Revision};

/// A connection to a function that may be used again, and since when it lies idle.
#[derive(Debug)]
pub struct Connection {
    pub sender: SendRequest<Body>,
    pub idle_since: Instant,
}

/// A function in a sandbox.
#[derive(Debug)]
pub(super) struct Instance {
    pub revision: Arc<Revision>,
    pub tenancy: String,
    pub in_flight: u32,
    pub last_used: Instant,
    /// Something went wrong in it: it takes no further call and its sandbox is not used again.
    pub broken: bool,
    pub connections: Vec<Connection>,
}

/// What a sandbox is doing.
#[derive(Debug)]
pub(super) enum State {
    /// Empty and clean.
    Idle {
        since: Instant,
    },
    /// Being made, restored, reset, dumped or destroyed: counted, of no use to anybody else.
    Busy,
    Serving(Instance),
    /// Holds a function that has been restored and waits before its first instruction.
    Parked(Parked),
}

/// A function that waits for its first call.
#[derive(Debug)]
pub(super) struct Parked {
    pub revision: Arc<Revision>,
    pub start: ParkedStart,
    pub connection: Option<SendRequest<Body>>,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub namespace: String,
    pub address: Option<SocketAddr>,
    pub state: State,
    /// The input that its instance has served calls of: the empty one for several.
    pub served: Option<String>,
    /// Cancelled when the sandbox is gone, so that open calls end at once.
    pub gone: CancellationToken,
}

/// An instance as answers show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceView {
    pub sandbox: String,
    pub address: Option<SocketAddr>,
    pub in_flight: u32,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    pub entries: HashMap<String, Entry>,
    /// Instances that a function keeps, by the user's wish.
    pub floors: HashMap<FunctionName, u32>,
    /// How often functions were started lately.
    pub demand: HashMap<FunctionName, Demand>,
    pub stopping: bool,
}

impl Table {
    /// Adds a sandbox that is about to be made.
    pub fn reserve(&mut self, namespace: &str) -> SandboxRef {
        let unique = uuid::Uuid::new_v4().simple().to_string();
        let id = format!("trenv-{}", &unique[..12]);
        self.entries.insert(
            id.clone(),
            Entry {
                namespace: namespace.to_owned(),
                address: None,
                state: State::Busy,
                served: None,
                gone: CancellationToken::new(),
            },
        );
        SandboxRef {
            namespace: namespace.to_owned(),
            id,
        }
    }

    /// Makes the sandbox busy if it is not, and returns its tenancy.
    pub fn take(&mut self, id: &str) -> Option<(SandboxRef, Option<String>)> {
        let entry = self.entries.get_mut(id)?;
        let tenancy = match std::mem::replace(&mut entry.state, State::Busy) {
            State::Serving(instance) => Some(instance.tenancy),
            State::Parked(parked) => Some(parked.start.tenancy),
            State::Idle { .. } | State::Busy => None,
        };
        let sandbox = SandboxRef {
            namespace: entry.namespace.clone(),
            id: id.to_owned(),
        };
        Some((sandbox, tenancy))
    }

    /// Makes a busy sandbox available; false when its end was seen meanwhile.
    pub fn set_idle(&mut self, id: &str) -> bool {
        match self.entries.get_mut(id) {
            Some(entry) if !entry.gone.is_cancelled() => {
                entry.state = State::Idle {
                    since: Instant::now(),
                };
                true
            }
            _ => false,
        }
    }

    /// Removes an entry; its open calls end.
    pub fn forget(&mut self, id: &str) -> bool {
        match self.entries.remove(id) {
            Some(entry) => {
                entry.gone.cancel();
                true
            }
            None => false,
        }
    }

    pub fn serving(&self) -> impl Iterator<Item = (&String, &Entry, &Instance)> {
        self.entries.iter().filter_map(|(id, e)| match &e.state {
            State::Serving(instance) => Some((id, e, instance)),
            _ => None,
        })
    }

    pub fn parked(&self) -> impl Iterator<Item = (&String, &Entry, &Parked)> {
        self.entries.iter().filter_map(|(id, e)| match &e.state {
            State::Parked(parked) => Some((id, e, parked)),
            _ => None,
        })
    }

    pub fn idle(&self) -> impl Iterator<Item = (&String, &Entry, Instant)> {
        self.entries.iter().filter_map(|(id, e)| match &e.state {
            State::Idle { since } => Some((id, e, *since)),
            _ => None,
        })
    }
}
