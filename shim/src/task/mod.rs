//! The tasks of this shim: one table, and what every container can do whatever runs it.

mod process;
mod service;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use containerd_shim_protos::protobuf::well_known_types::any::Any;

pub use process::{Phase, Process};
pub use service::TaskService;

use crate::error::{Result, ShimError};
use crate::reap::Exit;
use crate::stdio::Uris;

/// A container as the task service sees it. `exec_id` is empty for the container's first process.
///
/// The service calls `start` at most once at a time for a process and publishes the events. Every
/// method returns within a bounded time.
#[async_trait]
pub trait Container: Send + Sync {
    /// The directory that containerd made for the container.
    fn bundle(&self) -> &Path;

    /// The process behind an id.
    fn process(&self, exec_id: &str) -> Result<Arc<Process>>;

    /// Whether the container's processes are frozen.
    fn paused(&self) -> bool;

    /// Starts a created process and returns its pid.
    async fn start(&self, exec_id: &str) -> Result<u32>;

    /// Signals a process, or all processes of the container.
    async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<()>;

    /// Notes a further process; `start` runs it. `spec` is its OCI process as JSON.
    async fn exec(&self, exec_id: &str, uris: Uris, spec: Vec<u8>) -> Result<()>;

    /// All processes.
    async fn pids(&self) -> Result<Vec<u32>>;

    async fn pause(&self) -> Result<()>;

    async fn resume(&self) -> Result<()>;

    /// Changes limits; `resources` is OCI's `LinuxResources` as JSON.
    async fn update(&self, resources: Vec<u8>) -> Result<()>;

    /// Figures in containerd's metrics types.
    async fn stats(&self) -> Result<Any>;

    /// Frees an ended process, or the container with all that belongs to it. May be repeated after
    /// a failure.
    async fn delete(&self, exec_id: &str) -> Result<(u32, Exit)>;
}

/// The table of containers.
#[derive(Default)]
pub struct Tasks {
    slots: Mutex<HashMap<String, Slot>>,
}

enum Slot {
    /// `unwanted` when it was deleted before it was there.
    Creating {
        unwanted: bool,
    },
    Created(Arc<dyn Container>),
    /// Deleted before its creation was asked for, which may still come.
    GivenUp,
}

impl Tasks {
    /// Takes an id for a container about to be created; it is given back when the value is dropped.
    /// An id that was given up is taken only if it is `promised` again.
    pub fn reserve(&self, id: &str, promised: impl Fn() -> bool) -> Result<Reservation<'_>> {
        let mut slots = self.lock();
        match slots.get(id) {
            Some(Slot::GivenUp) if !promised() => {
                slots.remove(id);
                return Err(ShimError::NotFound {
                    kind: "task",
                    id: id.into(),
                });
            }
            None | Some(Slot::GivenUp) => {}
            Some(_) => {
                return Err(ShimError::AlreadyExists {
                    kind: "task",
                    id: id.into(),
                });
            }
        }
        slots.insert(id.to_owned(), Slot::Creating { unwanted: false });
        Ok(Reservation {
            tasks: self,
            id: id.to_owned(),
            kept: false,
        })
    }

    /// The container of an id.
    pub fn get(&self, id: &str) -> Result<Arc<dyn Container>> {
        match self.lock().get(id) {
            Some(Slot::Created(container)) => Ok(Arc::clone(container)),
            _ => Err(ShimError::NotFound {
                kind: "task",
                id: id.into(),
            }),
        }
    }

    /// Has a container that is being created deleted as soon as it is there; false when none is
    /// being created. containerd deletes so when its own client went away during the creation: of a
    /// container that is only `promised`, the request may come yet, or never.
    pub fn give_up(&self, id: &str, promised: bool) -> bool {
        let mut slots = self.lock();
        match slots.get_mut(id) {
            Some(Slot::Creating { unwanted }) => {
                *unwanted = true;
                true
            }
            None if promised => {
                slots.insert(id.to_owned(), Slot::GivenUp);
                false
            }
            _ => false,
        }
    }

    /// Forgets a container.
    pub fn remove(&self, id: &str) {
        self.lock().remove(id);
    }

    /// Whether there is no container, not even one being created.
    pub fn is_empty(&self) -> bool {
        let slots = self.lock();
        slots.values().all(|slot| matches!(slot, Slot::GivenUp))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An id taken for a container that is being created.
pub struct Reservation<'a> {
    tasks: &'a Tasks,
    id: String,
    kept: bool,
}

impl Reservation<'_> {
    /// Puts the created container into the table; gives it back when it is not wanted any more. The
    /// id stays taken then until the reservation is dropped.
    #[must_use]
    pub fn keep(&mut self, container: Arc<dyn Container>) -> Option<Arc<dyn Container>> {
        let mut slots = self.tasks.lock();
        if matches!(slots.get(&self.id), Some(Slot::Creating { unwanted: true })) {
            drop(slots);
            return Some(container);
        }
        slots.insert(self.id.clone(), Slot::Created(container));
        drop(slots);
        self.kept = true;
        None
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.tasks.remove(&self.id);
        }
    }
}
