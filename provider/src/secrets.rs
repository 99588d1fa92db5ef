//! Secrets: one file each, in a directory per namespace that only root can enter.
//!
//! A function sees its secrets by read-only bind mounts of these files.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// The largest secret.
pub const MAX_SECRET: usize = 1 << 20;

/// Why a secret cannot be kept.
#[derive(Debug, thiserror::Error)]
#[error("Failed to {action} the secret {name}; check the owner and free space of {directory}")]
pub struct SecretError {
    action: &'static str,
    name: String,
    directory: String,
    source: std::io::Error,
}

/// The secrets of all namespaces.
#[derive(Debug)]
pub struct Secrets {
    root: PathBuf,
}

impl Secrets {
    /// The secrets below `root`.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Where the secrets of a namespace lie.
    pub fn directory(&self, namespace: &str) -> PathBuf {
        self.root.join(namespace)
    }

    /// Names of the secrets of a namespace, in order.
    pub fn list(&self, namespace: &str) -> Result<Vec<String>, SecretError> {
        let directory = self.directory(namespace);
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(err) if err.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(self.failed("list", namespace, "*", source)),
        };
        let mut names: Vec<String> = entries
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            // A name that ends so is a write that did not finish.
            .filter(|name| !name.ends_with('~'))
            .collect();
        names.sort();
        Ok(names)
    }

    /// Whether the secret exists.
    pub fn exists(&self, namespace: &str, name: &str) -> bool {
        self.directory(namespace).join(name).is_file()
    }

    /// Writes a secret, whole or not at all.
    pub fn put(&self, namespace: &str, name: &str, value: &[u8]) -> Result<(), SecretError> {
        let directory = self.directory(namespace);
        let write = || -> std::io::Result<()> {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&directory)?;
            let partial = directory.join(format!("{name}~"));
            // Readable by all: a function's own user must read it, and nobody gets to it but
            // through the function's mount, since the directory is closed.
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o444)
                .open(&partial)?;
            file.write_all(value)?;
            file.sync_all()?;
            fs::rename(&partial, directory.join(name))
        };
        write().map_err(|source| self.failed("write", namespace, name, source))
    }

    /// Deletes a secret; false when there was none.
    pub fn remove(&self, namespace: &str, name: &str) -> Result<bool, SecretError> {
        match fs::remove_file(self.directory(namespace).join(name)) {
            Ok(()) => Ok(true),
            Err(err) if err.kind() == ErrorKind::NotFound => Ok(false),
            Err(source) => Err(self.failed("delete", namespace, name, source)),
        }
    }

    /// Digest of a secret's value; `None` when there is no such secret.
    pub fn digest(&self, namespace: &str, name: &str) -> Result<Option<String>, SecretError> {
        match fs::read(self.directory(namespace).join(name)) {
            Ok(bytes) => {
                let sum = Sha256::digest(&bytes);
                Ok(Some(sum.iter().map(|b| format!("{b:02x}")).collect()))
            }
            Err(err) if err.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.failed("read", namespace, name, source)),
        }
    }

    fn failed(
        &self,
        action: &'static str,
        namespace: &str,
        name: &str,
        source: std::io::Error,
    ) -> SecretError {
        SecretError {
            action,
            name: name.to_owned(),
            directory: Path::new(&self.root).join(namespace).display().to_string(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_written_listed_and_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let secrets = Secrets::new(dir.path().join("secrets"));
        assert!(secrets.list("ns").unwrap().is_empty());
        secrets.put("ns", "b", b"2").unwrap();
        secrets.put("ns", "a", b"1").unwrap();
        assert_eq!(secrets.list("ns").unwrap(), ["a", "b"]);
        let before = secrets.digest("ns", "a").unwrap();
        secrets.put("ns", "a", b"other").unwrap();
        assert_ne!(secrets.digest("ns", "a").unwrap(), before);
        assert!(secrets.remove("ns", "a").unwrap());
        assert!(!secrets.remove("ns", "a").unwrap());
        assert_eq!(secrets.digest("other", "b").unwrap(), None);
    }
}
