//! What survives the provider: one embedded database in the state directory.
//!
//! The database is opened exclusively, so a second provider on the same state is refused.

use std::path::Path;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use super::{Deployment, FunctionName, RevisionRecord, RevisionState};

const FUNCTIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("functions");

/// Why the state cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(
        "Another provider uses the state in {path}; stop it, or give this one another state_dir"
    )]
    InUse { path: String },
    #[error("Failed to open the state in {path}; check the directory's owner and free space")]
    Open {
        path: String,
        #[source]
        source: Box<redb::Error>,
    },
    #[error("Failed to {action} the stored functions; check the free space of the state directory")]
    Access {
        action: &'static str,
        #[source]
        source: Box<redb::Error>,
    },
    #[error("The stored function {name} cannot be read; remove the function and deploy it again")]
    Record {
        name: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("Failed to make the directory {path}; check its parent's owner")]
    Directory {
        path: String,
        #[source]
        source: std::io::Error,
    },
}

/// Everything stored of one function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionRecord {
    pub name: FunctionName,
    pub deployment: Deployment,
    pub created_at: u64,
    pub revision: RevisionRecord,
    pub state: RevisionState,
    /// An update that was accepted and is not in service yet.
    pub pending: Option<Deployment>,
    /// Why the last update failed.
    pub failure: Option<String>,
    pub replicas: Option<u32>,
}

/// The database of functions.
#[derive(Debug)]
pub struct Store {
    database: Database,
}

impl Store {
    /// Opens or makes the database in `directory`.
    ///
    /// # Errors
    /// When another provider has it open, or it cannot be read.
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        std::fs::create_dir_all(directory).map_err(|source| StoreError::Directory {
            path: directory.display().to_string(),
            source,
        })?;
        let path = directory.join("functions.redb");
        let shown = path.display().to_string();
        let database = match Database::create(&path) {
            Ok(database) => database,
            Err(redb::DatabaseError::DatabaseAlreadyOpen) => {
                return Err(StoreError::InUse { path: shown });
            }
            Err(err) => {
                return Err(StoreError::Open {
                    path: shown,
                    source: Box::new(err.into()),
                });
            }
        };
        let store = Self { database };
        store.write(|_| Ok(()), "prepare")?;
        Ok(store)
    }

    /// Every stored function.
    pub fn all(&self) -> Result<Vec<FunctionRecord>, StoreError> {
        let rows = self.rows().map_err(|source| StoreError::Access {
            action: "read",
            source: Box::new(source),
        })?;
        rows.into_iter()
            .map(|(name, bytes)| {
                serde_json::from_slice(&bytes).map_err(|source| StoreError::Record { name, source })
            })
            .collect()
    }

    /// Stores a function durably.
    pub fn put(&self, record: &FunctionRecord) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(record).map_err(|source| StoreError::Record {
            name: record.name.to_string(),
            source,
        })?;
        let key = row_key(&record.name);
        self.write(
            |table| table.insert(key.as_str(), bytes.as_slice()).map(|_| ()),
            "write",
        )
    }

    /// Forgets a function.
    pub fn remove(&self, name: &FunctionName) -> Result<(), StoreError> {
        let key = row_key(name);
        self.write(|table| table.remove(key.as_str()).map(|_| ()), "write")
    }

    fn rows(&self) -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
        let read = self.database.begin_read()?;
        let table = read.open_table(FUNCTIONS)?;
        let mut rows = Vec::new();
        for row in table.iter()? {
            let (key, value) = row?;
            rows.push((key.value().to_owned(), value.value().to_vec()));
        }
        Ok(rows)
    }

    fn write(
        &self,
        change: impl FnOnce(
            &mut redb::Table<'_, &'static str, &'static [u8]>,
        ) -> Result<(), redb::StorageError>,
        action: &'static str,
    ) -> Result<(), StoreError> {
        let run = || -> Result<(), redb::Error> {
            let write = self.database.begin_write()?;
            {
                let mut table = write.open_table(FUNCTIONS)?;
                change(&mut table)?;
            }
            write.commit()?;
            Ok(())
        };
        run().map_err(|source| StoreError::Access {
            action,
            source: Box::new(source),
        })
    }
}

fn row_key(name: &FunctionName) -> String {
    format!("{}/{}", name.namespace, name.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containerd::{ImageConfig, ResolvedImage};
    use crate::functions::{Limits, Process};

    fn record(name: &str) -> FunctionRecord {
        let name = FunctionName {
            namespace: "ns".into(),
            name: name.into(),
        };
        FunctionRecord {
            name: name.clone(),
            deployment: Deployment::default(),
            created_at: 1,
            revision: RevisionRecord {
                id: "r1".into(),
                function: name,
                image: ResolvedImage {
                    name: "i".into(),
                    digest: "d".into(),
                    target: "t".into(),
                    chain_id: "c".into(),
                    config: ImageConfig::default(),
                },
                process: Process::default(),
                limits: Limits::default(),
                read_only: false,
                secrets: vec![],
                ready_path: None,
                lease: "l".into(),
            },
            state: RevisionState::Cold("it holds a raw socket".into()),
            pending: None,
            failure: None,
            replicas: Some(3),
        }
    }

    #[test]
    fn functions_survive_a_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.put(&record("a")).unwrap();
        store.put(&record("b")).unwrap();
        store.remove(&record("b").name).unwrap();
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.all().unwrap(), [record("a")]);
    }

    #[test]
    fn a_second_provider_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Store::open(dir.path()).unwrap();
        let second = Store::open(dir.path());
        assert!(
            matches!(second, Err(StoreError::InUse { .. })),
            "{second:?}"
        );
    }
}
