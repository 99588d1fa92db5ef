//! The machine's memory: how much is available, and whether tasks have to wait for it.
//!
//! The kernel tells of waiting tasks by a trigger in /proc/pressure/memory. Where it has none (before
//! 4.20, or started with psi=0) what is available must do.

use std::fs::File;
use std::io::Write;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const PRESSURE: &str = "/proc/pressure/memory";

/// Some task has waited for memory for a tenth of two seconds, in microseconds. Without
/// CAP_SYS_RESOURCE the kernel takes windows of whole multiples of two seconds only.
const TRIGGER: &[u8] = b"some 200000 2000000\0";

/// Bytes that can be had without swapping, as the kernel estimates them.
pub fn available() -> Option<u64> {
    available_in(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn available_in(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes << 10)
}

/// The kernel's word that tasks wait for memory.
pub struct Stalls(Option<AsyncFd<File>>);

impl Stalls {
    /// Asks for it; without it only what is available is looked at.
    pub fn follow() -> Self {
        let trigger = File::options()
            .read(true)
            .write(true)
            .open(PRESSURE)
            .and_then(|mut file| file.write_all(TRIGGER).map(|()| file));
        let followed = trigger.and_then(|file| {
            // SAFETY: a file stays the same one for as long as it lives.
            unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }
                .map_err(std::io::Error::from)
        });
        match followed {
            Ok(file) => Self(Some(file)),
            Err(err) => {
                tracing::info!(
                    "The kernel does not tell when tasks wait for memory ({PRESSURE}: {err}); \
                     what is available is looked at instead"
                );
                Self(None)
            }
        }
    }

    /// Waits until tasks have waited for memory, `pause` at most; tells whether they have.
    pub async fn within(&self, pause: Duration) -> bool {
        let Some(file) = &self.0 else {
            tokio::time::sleep(pause).await;
            return false;
        };
        match tokio::time::timeout(pause, file.ready(Interest::PRIORITY)).await {
            Ok(Ok(mut ready)) => {
                ready.clear_ready();
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_available_is_found_in_bytes() {
        let text = "MemTotal:       24683572 kB\nMemFree: 9 kB\nMemAvailable:       1024 kB\n";
        assert_eq!(available_in(text), Some(1 << 20));
        assert_eq!(available_in("MemTotal: 1 kB\n"), None);
        assert!(available().is_some_and(|bytes| bytes > 0));
    }
}
