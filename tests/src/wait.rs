//! Waiting for what takes its time.

use std::time::{Duration, Instant};

use anyhow::bail;

const PAUSE: Duration = Duration::from_millis(20);

/// Waits until `condition` holds; an error that names `what` when it does not in time.
pub fn until(
    what: &str,
    patience: Duration,
    mut condition: impl FnMut() -> bool,
) -> anyhow::Result<()> {
    until_some(what, patience, || condition().then_some(()))
}

/// Waits until `look` finds something.
pub fn until_some<T>(
    what: &str,
    patience: Duration,
    mut look: impl FnMut() -> Option<T>,
) -> anyhow::Result<T> {
    let end = Instant::now() + patience;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if Instant::now() > end {
            bail!("Waited {} s in vain for {what}", patience.as_secs());
        }
        std::thread::sleep(PAUSE);
    }
}
