//! The log of state changes behind `Watch`: a bounded ring with sequence numbers.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use trenv_sandbox_proto::{Event, SandboxInfo};

/// A watcher further behind than this lists the sandboxes again.
const KEPT: usize = 4096;

/// Longest long poll, whatever the caller asks for.
const POLL_MAX: Duration = Duration::from_secs(60);

/// The log.
#[derive(Debug)]
pub struct WatchLog {
    ring: Mutex<VecDeque<Event>>,
    last: watch::Sender<u64>,
}

impl WatchLog {
    pub fn new() -> Self {
        Self {
            ring: Mutex::default(),
            last: watch::Sender::new(0),
        }
    }

    /// Adds a change.
    pub fn add(&self, sandbox: SandboxInfo, reason: String) {
        let mut ring = self.lock();
        let sequence = *self.last.borrow() + 1;
        ring.push_back(Event {
            sequence,
            sandbox: Some(sandbox).into(),
            reason,
            ..Event::default()
        });
        if ring.len() > KEPT {
            ring.pop_front();
        }
        self.last.send_replace(sequence);
    }

    /// The changes after a sequence number, as soon as there is one or the time is over.
    pub async fn after(&self, after: u64, timeout: Duration) -> (Vec<Event>, u64) {
        let mut last = self.last.subscribe();
        let newer = last.wait_for(|last| *last > after);
        // A timeout is an answer too: no events.
        let _ = tokio::time::timeout(timeout.min(POLL_MAX), newer).await;
        let ring = self.lock();
        let events = ring
            .iter()
            .filter(|event| event.sequence > after)
            .cloned()
            .collect();
        (events, *self.last.borrow())
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Event>> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn info(id: &str) -> SandboxInfo {
        SandboxInfo {
            id: id.into(),
            ..SandboxInfo::default()
        }
    }

    #[tokio::test]
    async fn a_waiting_watcher_gets_the_next_change_at_once() {
        let log = Arc::new(WatchLog::new());
        let waiting = tokio::spawn({
            let log = Arc::clone(&log);
            async move { log.after(0, Duration::from_secs(30)).await }
        });
        tokio::task::yield_now().await;
        log.add(info("a"), "made".into());
        let (events, last) = tokio::time::timeout(Duration::from_secs(5), waiting)
            .await
            .unwrap()
            .unwrap();
        assert_eq!((events.len(), last), (1, 1));
        assert_eq!(events[0].sandbox.id, "a");
    }

    #[tokio::test]
    async fn without_a_change_the_time_ends_the_poll() {
        let log = WatchLog::new();
        log.add(info("a"), "made".into());
        let (events, last) = log.after(1, Duration::from_millis(10)).await;
        assert_eq!((events.len(), last), (0, 1));
    }
}
