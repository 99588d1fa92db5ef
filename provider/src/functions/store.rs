//! What survives the provider: one embedded database in the state directory.
//!
//! The database is opened exclusively, so a second provider on the same state is refused.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use super::{Deployment, FunctionName, RevisionRecord, RevisionState, Template};

const FUNCTIONS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("functions");
/// Templates that nobody wants any more, until a shim has deleted them: `NAMESPACE/ID`.
const UNWANTED: TableDefinition<'_, &str, ()> = TableDefinition::new("unwanted-templates");

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
    path: PathBuf,
    /// Absent after the disk refused something: redb then does nothing more with a database until
    /// it has been opened anew.
    database: Mutex<Option<Database>>,
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
        let database = open(&path)?;
        let store = Self {
            path,
            database: Mutex::new(Some(database)),
        };
        store.write("prepare", |_| Ok(()), &[])?;
        Ok(store)
    }

    /// Every stored function.
    pub fn all(&self) -> Result<Vec<FunctionRecord>, StoreError> {
        let rows = self.with("read", rows)?;
        rows.into_iter()
            .map(|(name, bytes)| {
                serde_json::from_slice(&bytes).map_err(|source| StoreError::Record { name, source })
            })
            .collect()
    }

    /// Stores a function durably.
    pub fn put(&self, record: &FunctionRecord) -> Result<(), StoreError> {
        self.replace(record, None)
    }

    /// Stores a function, and that the template which it had before is to be deleted.
    pub fn replace(
        &self,
        record: &FunctionRecord,
        old: Option<&Template>,
    ) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(record).map_err(|source| StoreError::Record {
            name: record.name.to_string(),
            source,
        })?;
        let key = row_key(&record.name);
        self.write(
            "write",
            |table| table.insert(key.as_str(), bytes.as_slice()).map(|_| ()),
            &unwanted_rows(&record.name.namespace, old),
        )
    }

    /// Forgets a function; its template is to be deleted.
    pub fn remove(&self, name: &FunctionName, old: Option<&Template>) -> Result<(), StoreError> {
        let key = row_key(name);
        self.write(
            "write",
            |table| table.remove(key.as_str()).map(|_| ()),
            &unwanted_rows(&name.namespace, old),
        )
    }

    /// Stores that a template is to be deleted.
    pub fn unwant(&self, namespace: &str, template: &Template) -> Result<(), StoreError> {
        let rows = unwanted_rows(namespace, Some(template));
        self.write("write", |_| Ok(()), &rows)
    }

    /// Templates that are still to be deleted: namespace and id.
    pub fn unwanted(&self) -> Result<Vec<(String, String)>, StoreError> {
        self.with("read", |database| {
            let read = database.begin_read()?;
            let table = read.open_table(UNWANTED)?;
            let mut found = Vec::new();
            for row in table.iter()? {
                let (key, _) = row?;
                if let Some((namespace, id)) = key.value().split_once('/') {
                    found.push((namespace.to_owned(), id.to_owned()));
                }
            }
            Ok(found)
        })
    }

    /// A template has been deleted.
    pub fn deleted(&self, namespace: &str, id: &str) -> Result<(), StoreError> {
        let key = format!("{namespace}/{id}");
        self.with("write", |database| {
            let write = database.begin_write()?;
            write.open_table(UNWANTED)?.remove(key.as_str())?;
            write.commit()?;
            Ok(())
        })
    }

    fn write(
        &self,
        action: &'static str,
        change: impl FnOnce(
            &mut redb::Table<'_, &'static str, &'static [u8]>,
        ) -> Result<(), redb::StorageError>,
        unwanted: &[String],
    ) -> Result<(), StoreError> {
        self.with(action, |database| {
            let write = database.begin_write()?;
            {
                let mut table = write.open_table(FUNCTIONS)?;
                change(&mut table)?;
                let mut table = write.open_table(UNWANTED)?;
                for key in unwanted {
                    table.insert(key.as_str(), ())?;
                }
            }
            write.commit()?;
            Ok(())
        })
    }

    /// Does something with the database, which is opened first if the last use failed.
    fn with<T>(
        &self,
        action: &'static str,
        run: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let mut kept = self.database.lock().unwrap_or_else(|e| e.into_inner());
        let database = match kept.take() {
            Some(database) => database,
            None => open(&self.path)?,
        };
        let done = run(&database);
        if !matches!(done, Err(redb::Error::Io(_) | redb::Error::PreviousIo)) {
            *kept = Some(database);
        }
        done.map_err(|source| StoreError::Access {
            action,
            source: Box::new(source),
        })
    }
}

fn open(path: &Path) -> Result<Database, StoreError> {
    let shown = path.display().to_string();
    match Database::create(path) {
        Ok(database) => Ok(database),
        Err(redb::DatabaseError::DatabaseAlreadyOpen) => Err(StoreError::InUse { path: shown }),
        Err(err) => Err(StoreError::Open {
            path: shown,
            source: Box::new(err.into()),
        }),
    }
}

fn rows(database: &Database) -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
    let read = database.begin_read()?;
    let table = read.open_table(FUNCTIONS)?;
    let mut rows = Vec::new();
    for row in table.iter()? {
        let (key, value) = row?;
        rows.push((key.value().to_owned(), value.value().to_vec()));
    }
    Ok(rows)
}

fn unwanted_rows(namespace: &str, template: Option<&Template>) -> Vec<String> {
    let id = template.map(|t| format!("{namespace}/{}", t.id));
    id.into_iter().collect()
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
                base: None,
                criu: false,
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
        let template = Template {
            id: "aa".into(),
            generation: 1,
            key: "k".into(),
            layer: "l".into(),
            view: "v".into(),
            image_bytes: 1,
            stored_bytes: 1,
            notes: vec![],
            base: None,
        };
        store.remove(&record("b").name, Some(&template)).unwrap();
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.all().unwrap(), [record("a")]);
        assert_eq!(
            store.unwanted().unwrap(),
            [("ns".to_owned(), "aa".to_owned())]
        );
        store.deleted("ns", "aa").unwrap();
        assert!(store.unwanted().unwrap().is_empty());
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
