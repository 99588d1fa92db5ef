//! The clocks that a tree sees: CLOCK_MONOTONIC and CLOCK_BOOTTIME go on from the dump.
//!
//! Programs keep times of these clocks to wait for. On a clock that stands before them they would wait
//! for as long as the machine of the dump had been up; on one that stands behind, all are overdue at
//! once. So a tree has a time namespace of its own (time_namespaces(7)). Where none can be had, the
//! clocks are the machine's, and a tree for which they would go backwards is not started.

use std::io;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// What the clocks show, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    pub monotonic: u64,
    pub boottime: u64,
}

/// Why a tree's clocks cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ClockError {
    #[error(
        "The template's {clock} is {ahead:?} ahead of this machine's, as after a reboot, and what it waits for would come so much later; this kernel cannot give a function clocks of its own (Linux 6.2 and CONFIG_TIME_NS can): snapshot the function anew"
    )]
    Ahead {
        clock: &'static str,
        ahead: Duration,
    },
    #[error(
        "The template's clocks are ahead of this machine's, and no time namespace in which they go on can be made (is /proc/sys/user/max_time_namespaces reached?): snapshot the function anew"
    )]
    NoNamespace { source: io::Error },
}

impl Clocks {
    /// As this process sees them.
    ///
    /// # Errors
    /// When a clock cannot be read.
    pub fn now() -> io::Result<Self> {
        let read = |clock| -> io::Result<u64> {
            let now = clock_gettime(clock)?;
            Ok((now.tv_sec() * 1_000_000_000 + now.tv_nsec()).unsigned_abs())
        };
        Ok(Self {
            monotonic: read(ClockId::CLOCK_MONOTONIC)?,
            boottime: read(ClockId::CLOCK_BOOTTIME)?,
        })
    }

    /// As a process sees them whose `/proc/PID/timens_offsets` is this.
    #[must_use]
    pub fn offset(self, offsets: &str) -> Self {
        let of = |name: &str, now: u64| {
            let offset = offsets.lines().find_map(|line| {
                let mut words = line.strip_prefix(name)?.split_whitespace();
                let seconds: i64 = words.next()?.parse().ok()?;
                let nanoseconds: i64 = words.next()?.parse().ok()?;
                seconds.checked_mul(1_000_000_000)?.checked_add(nanoseconds)
            });
            now.saturating_add_signed(offset.unwrap_or(0))
        };
        Self {
            monotonic: of("monotonic", self.monotonic),
            boottime: of("boottime", self.boottime),
        }
    }

    /// Whether a tree with these clocks can go on at `now`.
    ///
    /// # Errors
    /// When they are ahead and trees have the machine's clocks.
    pub fn can_go_on(self, now: Self, own_clocks: bool) -> Result<(), ClockError> {
        for (clock, saved, now) in [
            ("CLOCK_MONOTONIC", self.monotonic, now.monotonic),
            ("CLOCK_BOOTTIME", self.boottime, now.boottime),
        ] {
            if saved > now && !own_clocks {
                return Err(ClockError::Ahead {
                    clock,
                    ahead: Duration::from_secs((saved - now).div_ceil(1_000_000_000)),
                });
            }
        }
        Ok(())
    }
}

/// Whether trees can have clocks of their own here. A process that shares memory with its parent enters
/// the time namespace which that has made when it executes a program (fs/exec.c, exec_task_namespaces;
/// from 6.2). Earlier kernels make no such process there: clone(2) ends with EINVAL.
#[must_use]
pub fn own_clocks() -> bool {
    let namespaces = std::path::Path::new("/proc/self/ns/time_for_children").exists();
    let release = nix::sys::utsname::uname();
    namespaces && release.is_ok_and(|names| is_from_6_2(&names.release().to_string_lossy()))
}

fn is_from_6_2(release: &str) -> bool {
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (6, 2),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000_000_000;

    #[test]
    fn a_tree_s_clocks_are_the_machine_s_with_its_offsets() {
        let now = Clocks {
            monotonic: 5 * HOUR,
            boottime: 6 * HOUR,
        };
        let text = "monotonic    -3600         0\nboottime      7200         1\n";
        let seen = Clocks {
            monotonic: 4 * HOUR,
            boottime: 8 * HOUR + 1,
        };
        assert_eq!(now.offset(text), seen);
        // A kernel without time namespaces has no such file.
        assert_eq!(now.offset(""), now);
    }

    #[test]
    fn clocks_that_would_go_backwards_are_refused_where_trees_have_the_machine_s() {
        let at = |monotonic, boottime| Clocks {
            monotonic,
            boottime,
        };
        let machine = at(5 * HOUR, 6 * HOUR);
        for clocks in [machine, at(1, 1)] {
            assert!(clocks.can_go_on(machine, false).is_ok());
        }
        for (clocks, name) in [
            (at(7 * HOUR, 6 * HOUR), "CLOCK_MONOTONIC is 7200s ahead"),
            (at(5 * HOUR, 8 * HOUR), "CLOCK_BOOTTIME is 7200s ahead"),
        ] {
            assert!(clocks.can_go_on(machine, true).is_ok());
            let err = clocks.can_go_on(machine, false).unwrap_err().to_string();
            assert!(err.contains(name), "{err}");
            assert!(err.ends_with("snapshot the function anew"), "{err}");
        }
    }

    #[test]
    fn trees_have_clocks_of_their_own_from_linux_6_2_on() {
        for old in ["5.15.0-91-generic", "6.1.0-18-amd64", "6.1", "x"] {
            assert!(!is_from_6_2(old), "{old}");
        }
        for new in ["6.2.0", "6.18.0-rc1", "7.0", "6.10.3"] {
            assert!(is_from_6_2(new), "{new}");
        }
    }
}
