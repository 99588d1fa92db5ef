//! One version of a function, and the state in which it is.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{Base, BaseTemplate, FunctionName, KeyParts, Limits, Methods, Process};
use crate::containerd::{Mount, ResolvedImage};
use crate::spec::PreparedSpec;

/// What is stored of a revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevisionRecord {
    pub id: String,
    pub function: FunctionName,
    pub image: ResolvedImage,
    pub process: Process,
    pub limits: Limits,
    pub read_only: bool,
    /// Name and digest of every secret, by name.
    pub secrets: Vec<(String, String)>,
    /// Path of the readiness check, when the function names one.
    pub ready_path: Option<String>,
    /// The function of the same namespace that it is made from.
    #[serde(default)]
    pub base: Option<String>,
    /// CRIU takes its image too, when the function is dumped.
    #[serde(default)]
    pub criu: bool,
    /// The containerd lease that holds its layers.
    pub lease: String,
}

/// What a start from memory needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    pub id: String,
    pub generation: u64,
    pub key: String,
    /// The committed snapshot over which every tenancy's writable one is made.
    pub layer: String,
    /// The read-only snapshot that the zygote sees.
    pub view: String,
    pub image_bytes: u64,
    pub stored_bytes: u64,
    pub notes: Vec<String>,
    /// The template that it was made from.
    #[serde(default)]
    pub base: Option<BaseTemplate>,
}

/// Where a revision stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RevisionState {
    /// Runs for the first time, or is being dumped; calls wait.
    Building,
    /// Starts from its template.
    Ready(Template),
    /// Serves, but every start is a cold one; the reason says why.
    Cold(String),
    /// Does not serve.
    Failed(String),
}

impl RevisionState {
    /// The word for it in answers.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Building => "building",
            Self::Ready(_) => "ready",
            Self::Cold(_) => "serving-cold",
            Self::Failed(_) => "failed",
        }
    }

    /// Why it is not `Ready`, where there is a reason.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Cold(reason) | Self::Failed(reason) => Some(reason),
            _ => None,
        }
    }
}

/// A writable snapshot made ahead of a tenancy, and the tenancy's spec. The snapshot's key is
/// [`snapshot_of`] the tenancy's id.
#[derive(Debug, Clone, PartialEq)]
pub struct Spare {
    pub tenancy: String,
    pub mounts: Vec<Mount>,
    pub spec: PreparedSpec,
}

/// A revision at work.
#[derive(Debug)]
pub struct Revision {
    pub record: RevisionRecord,
    pub binds: Vec<Mount>,
    state: watch::Sender<RevisionState>,
    concurrency: AtomicU32,
    retired: AtomicBool,
    /// How its starts come by their memory.
    pub methods: Methods,
    /// Held while the template is made ready.
    pub preparing: tokio::sync::Mutex<()>,
    spares: Mutex<Vec<Spare>>,
    base: Mutex<Option<Base>>,
}

impl Revision {
    /// A revision in `state`.
    pub fn new(
        record: RevisionRecord,
        binds: Vec<Mount>,
        concurrency: u32,
        state: RevisionState,
    ) -> Self {
        Self {
            record,
            binds,
            state: watch::Sender::new(state),
            concurrency: AtomicU32::new(concurrency),
            retired: AtomicBool::new(false),
            methods: Methods::default(),
            preparing: tokio::sync::Mutex::default(),
            spares: Mutex::new(Vec::new()),
            base: Mutex::default(),
        }
    }

    /// The function that this is a version of.
    pub fn function(&self) -> &FunctionName {
        &self.record.function
    }

    /// The state at this moment.
    pub fn state(&self) -> RevisionState {
        self.state.borrow().clone()
    }

    /// A receiver that sees every later state.
    pub fn watch(&self) -> watch::Receiver<RevisionState> {
        self.state.subscribe()
    }

    /// Moves to `state`.
    pub fn set_state(&self, state: RevisionState) {
        self.state.send_replace(state);
    }

    /// The template, when there is one.
    pub fn template(&self) -> Option<Template> {
        match &*self.state.borrow() {
            RevisionState::Ready(template) => Some(template.clone()),
            _ => None,
        }
    }

    /// How many calls an instance serves at once.
    pub fn concurrency(&self) -> u32 {
        self.concurrency.load(Ordering::Relaxed)
    }

    /// Changes how many calls an instance serves at once.
    pub fn set_concurrency(&self, concurrency: u32) {
        self.concurrency.store(concurrency, Ordering::Relaxed);
    }

    /// Whether a newer revision, or nothing, has taken its place.
    pub fn retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// Marks it as replaced: its instances end when their calls are done.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::Release);
    }

    /// Takes a snapshot made ahead.
    pub fn take_spare(&self) -> Option<Spare> {
        self.spares.lock().unwrap_or_else(|e| e.into_inner()).pop()
    }

    /// Adds a snapshot made ahead.
    pub fn add_spare(&self, spare: Spare) {
        self.spares
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .push(spare);
    }

    /// The base that its template was made from, while that is in service.
    pub fn base(&self) -> Option<Base> {
        let base = self.base.lock().unwrap_or_else(|e| e.into_inner());
        base.clone().filter(|base| !base.revision.retired())
    }

    /// Notes what its template was made from.
    pub fn set_base(&self, base: Option<Base>) {
        *self.base.lock().unwrap_or_else(|e| e.into_inner()) = base;
    }

    /// How many snapshots are ready.
    pub fn spares(&self) -> usize {
        self.spares.lock().unwrap_or_else(|e| e.into_inner()).len()
    }

    /// The id of a new tenancy in a snapshot of its own, which is the snapshot's key too. With the
    /// revision's id in it, it tells a later provider whose sandbox it finds.
    pub fn new_tenancy(&self) -> String {
        let unique = uuid::Uuid::new_v4().simple().to_string();
        format!("{}-{}", self.record.id, &unique[..12])
    }

    /// Whether `tenancy` is one of this revision.
    pub fn owns_tenancy(&self, tenancy: &str) -> bool {
        tenancy
            .strip_prefix(self.record.id.as_str())
            .is_some_and(|rest| rest.starts_with('-'))
    }

    /// What its template's key is made of.
    pub fn key_parts(&self) -> KeyParts<'_> {
        KeyParts {
            namespace: &self.record.function.namespace,
            function: &self.record.function.name,
            image: &self.record.image.digest,
            process: &self.record.process,
            limits: self.record.limits,
            read_only: self.record.read_only,
            secrets: &self.record.secrets,
            base: self.record.base.as_deref(),
        }
    }
}

/// The id of the tenancy that comes after `tenancy` in the same snapshot.
pub fn next_tenancy(tenancy: &str) -> String {
    let snapshot = snapshot_of(tenancy);
    let number = tenancy[snapshot.len()..].strip_prefix('.');
    let number = number
        .and_then(|number| number.parse().ok())
        .unwrap_or(0u64);
    format!("{snapshot}.{}", number + 1)
}

/// The key of the writable snapshot in which a tenancy lives, or lived.
pub fn snapshot_of(tenancy: &str) -> &str {
    // The names in front may have dots of their own.
    let unique = tenancy.rfind('-').unwrap_or(0);
    let end = tenancy[unique..].find('.');
    end.map_or(tenancy, |end| &tenancy[..unique + end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenancies_of_one_snapshot_have_ids_of_their_own() {
        let first = "some.function-0a1b2c-d3e4f5";
        assert_eq!(snapshot_of(first), first);
        let second = next_tenancy(first);
        let third = next_tenancy(&second);
        assert_eq!(second, "some.function-0a1b2c-d3e4f5.1");
        assert_eq!(third, "some.function-0a1b2c-d3e4f5.2");
        assert_eq!(snapshot_of(&third), first);
    }
}
