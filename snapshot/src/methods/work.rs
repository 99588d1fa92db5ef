//! What a start method did for one instance.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts that go on while the instance lives.
#[derive(Debug, Default)]
pub struct Work {
    copied: AtomicU64,
    prefetched: AtomicU64,
    faults: AtomicU64,
    read: AtomicU64,
}

/// The counts at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Pages copied before the tree ran, because all are or because no fault tells of them.
    pub pages_copied: u64,
    /// Pages of a recorded working set that were brought in ahead of their use.
    pub pages_prefetched: u64,
    /// Faults that waited for a page from this process.
    pub faults_served: u64,
    /// Bytes taken from the method's files.
    pub bytes_read: u64,
}

impl Work {
    #[must_use]
    pub fn figures(&self) -> Figures {
        Figures {
            pages_copied: self.copied.load(Ordering::Relaxed),
            pages_prefetched: self.prefetched.load(Ordering::Relaxed),
            faults_served: self.faults.load(Ordering::Relaxed),
            bytes_read: self.read.load(Ordering::Relaxed),
        }
    }

    pub(super) fn copied(&self, pages: u64) {
        self.copied.fetch_add(pages, Ordering::Relaxed);
    }

    pub(super) fn prefetched(&self, pages: u64) {
        self.prefetched.fetch_add(pages, Ordering::Relaxed);
    }

    pub(super) fn fault(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self, bytes: u64) {
        self.read.fetch_add(bytes, Ordering::Relaxed);
    }
}
