//! Durable records of namespaces: what has one may exist, what has none does not.
//!
//! A record is a file that its owner keeps locked. The lock goes with the owner, however it ends,
//! and the file stays: that is how a sweep tells what was abandoned.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, RenameFlags, flock, renameat_with};
use serde::{Deserialize, Serialize};

use crate::NetworkError;

/// What a record holds; its file name says the same, so that a person finds it.
#[derive(Debug, Serialize, Deserialize)]
struct Content {
    netns: String,
    owner_pid: u32,
}

/// The directory of records.
#[derive(Debug)]
pub struct Records {
    dir: PathBuf,
}

/// One record, locked by us. Dropping it gives up the lock and leaves the file.
#[derive(Debug)]
pub struct Record {
    dir: PathBuf,
    path: PathBuf,
    _lock: File,
}

impl Records {
    pub fn open(dir: &Path) -> Result<Self, NetworkError> {
        fs::create_dir_all(dir).map_err(NetworkError::file("make the directory", dir))?;
        Ok(Self {
            dir: dir.to_owned(),
        })
    }

    /// Writes a record through to the disk, locked from its first moment on.
    pub fn add(&self, id: &str) -> Result<Record, NetworkError> {
        let ok = !id.is_empty()
            && id.len() < 200
            && !id.starts_with('.')
            && id
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if !ok {
            return Err(NetworkError::Name { id: id.to_owned() });
        }
        let path = self.dir.join(format!("{id}.json"));
        let draft = self.dir.join(format!(".{id}.{}.draft", std::process::id()));
        let content = Content {
            netns: id.to_owned(),
            owner_pid: std::process::id(),
        };
        let write = || -> io::Result<File> {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .open(&draft)?;
            flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            file.write_all(&serde_json::to_vec(&content)?)?;
            file.sync_all()?;
            Ok(file)
        };
        let lock = write().map_err(NetworkError::file("write the record", &draft))?;
        let cwd = rustix::fs::CWD;
        match renameat_with(cwd, &draft, cwd, &path, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(error) => {
                let _ = fs::remove_file(&draft);
                return Err(if error == rustix::io::Errno::EXIST {
                    NetworkError::Taken { id: id.to_owned() }
                } else {
                    NetworkError::file("write the record", path)(error.into())
                });
            }
        }
        sync(&self.dir)?;
        Ok(Record {
            dir: self.dir.clone(),
            path,
            _lock: lock,
        })
    }

    /// Records that nobody holds, now held by us; and drafts that nobody finished are removed.
    pub fn abandoned(&self) -> Result<Vec<(String, Record)>, NetworkError> {
        let mut found = Vec::new();
        for path in self.files()? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let Some(lock) = try_lock(&path)? else {
                continue;
            };
            if let Some(id) = name.strip_suffix(".json") {
                let record = Record {
                    dir: self.dir.clone(),
                    path: path.clone(),
                    _lock: lock,
                };
                found.push((id.to_owned(), record));
            } else if name.ends_with(".draft") {
                fs::remove_file(&path).map_err(NetworkError::file("remove", path.clone()))?;
            }
        }
        Ok(found)
    }

    pub fn count(&self) -> Result<usize, NetworkError> {
        let files = self.files()?;
        Ok(files
            .iter()
            .filter(|path| path.extension().is_some_and(|end| end == "json"))
            .count())
    }

    fn files(&self) -> Result<Vec<PathBuf>, NetworkError> {
        let list = || -> io::Result<Vec<PathBuf>> {
            let mut files = Vec::new();
            for entry in fs::read_dir(&self.dir)? {
                let entry = entry?;
                if entry.file_type()?.is_file() {
                    files.push(entry.path());
                }
            }
            Ok(files)
        };
        list().map_err(NetworkError::file("list", &self.dir))
    }
}

/// Locks a file unless someone holds it or it has just gone.
fn try_lock(path: &Path) -> Result<Option<File>, NetworkError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(NetworkError::file("open", path)(source)),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(NetworkError::file("lock", path)(error.into())),
    }
    // Its holder may have removed it, and another made a new one, between the two calls.
    let same = match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(there)) => ours.ino() == there.ino() && ours.dev() == there.dev(),
        _ => false,
    };
    Ok(same.then_some(file))
}

fn sync(dir: &Path) -> Result<(), NetworkError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(NetworkError::file("write through", dir))
}

impl Record {
    /// Removes the record, once what it names is gone.
    pub fn remove(self) -> Result<(), NetworkError> {
        match fs::remove_file(&self.path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(NetworkError::file("remove", self.path.clone())(source)),
        }
        sync(&self.dir)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_record_is_not_abandoned() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let record = records.add("a").unwrap();
        assert!(matches!(records.add("a"), Err(NetworkError::Taken { .. })));
        assert!(records.abandoned().unwrap().is_empty());
        drop(record);
        let mut abandoned = records.abandoned().unwrap();
        let (id, record) = abandoned.pop().unwrap();
        assert_eq!(id, "a");
        assert!(records.abandoned().unwrap().is_empty());
        record.remove().unwrap();
        assert_eq!(records.count().unwrap(), 0);
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        for id in ["", "..", "a/b", ".hidden", "a b"] {
            assert!(
                matches!(records.add(id), Err(NetworkError::Name { .. })),
                "{id}"
            );
        }
    }

    #[test]
    fn unfinished_drafts_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        fs::write(dir.path().join(".x.1.draft"), "").unwrap();
        assert!(records.abandoned().unwrap().is_empty());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
