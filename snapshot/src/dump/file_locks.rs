//! Locks on open files: fdinfo names those of the open file and those of the process on its file.

use super::DumpError;
use crate::manifest::{FileLock, LockHolder};

/// Where a lock was found.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub object: usize,
    pub pid: i32,
    pub descriptor: i32,
    /// Access mode of the open file: O_RDONLY, O_WRONLY, O_RDWR.
    pub access: u32,
}

/// Locks in the text of a descriptor's fdinfo.
pub fn read(text: &str, place: Place) -> Result<Vec<FileLock>, DumpError> {
    let (pid, descriptor) = (place.pid, place.descriptor);
    let mut all = Vec::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("lock:")) {
        // Number, kind, "ADVISORY", access, pid, file, first and last byte (proc_locks(5)).
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, kind, _, access, _, _, first, last] = words[..] else {
            return Err(wrong(line));
        };
        let exclusive = access == "WRITE";
        let holder = match kind {
            "FLOCK" => LockHolder::Flock {
                object: place.object,
            },
            "OFDLCK" => LockHolder::OpenFile {
                object: place.object,
            },
            // Named with every descriptor of the file, those that could not have set it too.
            "POSIX" if place.access == 2 || place.access == u32::from(exclusive) => {
                LockHolder::Process { pid, descriptor }
            }
            "POSIX" => continue,
            _ => {
                return Err(DumpError::Refused(format!(
                    "descriptor {descriptor} of process {pid} has a lock of the kind {kind}"
                )));
            }
        };
        let start: u64 = first.parse().map_err(|_| wrong(line))?;
        let length = match last {
            "EOF" => None,
            last => {
                let last: u64 = last.parse().map_err(|_| wrong(line))?;
                Some(last.saturating_sub(start) + 1)
            }
        };
        all.push(FileLock {
            holder,
            exclusive,
            start,
            length,
        });
    }
    Ok(all)
}

fn wrong(line: &str) -> DumpError {
    DumpError::Io {
        doing: format!("reading the lock {line:?}"),
        source: std::io::ErrorKind::InvalidData.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(line: &str, access: u32) -> Result<Vec<FileLock>, DumpError> {
        let place = Place {
            object: 4,
            pid: 7,
            descriptor: 3,
            access,
        };
        read(&format!("pos:\t0\n{line}\nflags: 02\n"), place)
    }

    #[test]
    fn reads_a_record_lock_of_a_descriptor_that_can_have_it() {
        let line = "lock:\t1: POSIX  ADVISORY  WRITE 27400 fe:00:5997166 10 19";
        let lock = found(line, 2).unwrap()[0];
        let holder = LockHolder::Process {
            pid: 7,
            descriptor: 3,
        };
        assert_eq!((lock.holder, lock.exclusive), (holder, true));
        assert_eq!((lock.start, lock.length), (10, Some(10)));
        assert_eq!(found(line, 0).unwrap(), []);
        assert_eq!(found(line, 1).unwrap().len(), 1);
    }

    #[test]
    fn refuses_a_lease_by_name() {
        let line = "lock:\t1: LEASE  ACTIVE    READ 27400 fe:00:5997166 0 EOF";
        let err = found(line, 0).unwrap_err().to_string();
        assert!(err.contains("a lock of the kind LEASE"), "{err}");
    }
}
