//! Namespaces made ahead.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{Netns, Network, NetworkError};

/// Ready namespaces. All methods may be called from any thread.
#[derive(Debug)]
pub struct NetnsPool {
    network: Network,
    spare: usize,
    ready: Mutex<Vec<Netns>>,
    /// Held while refilling, so that two refills do not make twice as many.
    refilling: Mutex<()>,
    drained: AtomicBool,
}

impl NetnsPool {
    /// An empty pool that [`NetnsPool::refill`] fills up to `spare`.
    #[must_use]
    pub fn new(network: Network, spare: usize) -> Self {
        Self {
            network,
            spare,
            ready: Mutex::default(),
            refilling: Mutex::default(),
            drained: AtomicBool::new(false),
        }
    }

    #[must_use]
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// How many are ready.
    #[must_use]
    pub fn ready(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Netns>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A ready namespace, or one made now when none is. Call [`NetnsPool::refill`] afterwards, off
    /// the call's path.
    ///
    /// # Errors
    /// When one has to be made and cannot.
    pub fn take(&self) -> Result<Netns, NetworkError> {
        let ready = self.lock().pop();
        ready.map_or_else(|| self.network.create_unnamed(), Ok)
    }

    /// Keeps an unused namespace for the next taker. One that a function has run in is destroyed
    /// instead ([`Netns::destroy`]).
    pub fn give_back(&self, netns: Netns) {
        self.lock().push(netns);
    }

    /// Makes namespaces until the wanted number is ready; blocks meanwhile. Answers how many were
    /// made.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn refill(&self) -> Result<usize, NetworkError> {
        let _refilling = self
            .refilling
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut made = 0;
        while self.ready() < self.spare && !self.drained.load(Ordering::Acquire) {
            let netns = self.network.create_unnamed()?;
            self.lock().push(netns);
            made += 1;
        }
        Ok(made)
    }

    /// Destroys the ready namespaces, for good: what a refill is just making goes too, and no other
    /// refill makes any.
    ///
    /// # Errors
    /// When one cannot be destroyed; the others are still tried.
    pub fn drain(&self) -> Result<(), NetworkError> {
        self.drained.store(true, Ordering::Release);
        let _refilled = self
            .refilling
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let ready = std::mem::take(&mut *self.lock());
        let errors = ready.iter().filter_map(|netns| netns.destroy().err());
        errors.into_iter().next_back().map_or(Ok(()), Err)
    }
}
