//! What a snapshot consists of besides its memory, as a container record without a task.
//!
//! containerd keeps image, spec and file system together, and from its garbage collection, for as
//! long as the record is there; labels name the template. So there is no second database.

use std::collections::HashMap;
use std::time::UNIX_EPOCH;

use anyhow::Context;

use crate::containerd::{Container, Containerd};

/// The name that its taker gave.
pub const NAME: &str = "dev.trenv.snapshot";
const TEMPLATE: &str = "dev.trenv.snapshot.template";
const GENERATION: &str = "dev.trenv.snapshot.generation";

/// A snapshot taken by hand.
#[derive(Debug, Clone)]
pub struct Saved {
    pub name: String,
    pub template: String,
    pub generation: u64,
    pub record: Container,
}

/// Id of the record of a snapshot.
pub fn record_id(name: &str) -> String {
    format!("snapshot-{name}")
}

/// Key of a new layer for a snapshot. Programs may still run on that of an earlier one of this name.
pub fn new_layer(name: &str) -> String {
    let time = UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
    format!("{}-{time}", record_id(name))
}

pub fn labels(name: &str, template: &str, generation: u64) -> HashMap<String, String> {
    [
        (NAME.to_owned(), name.to_owned()),
        (TEMPLATE.to_owned(), template.to_owned()),
        (GENERATION.to_owned(), generation.to_string()),
    ]
    .into()
}

impl Saved {
    fn of(record: Container) -> Option<Self> {
        Some(Self {
            name: record.labels.get(NAME)?.clone(),
            template: record.labels.get(TEMPLATE)?.clone(),
            generation: record.labels.get(GENERATION)?.parse().ok()?,
            record,
        })
    }

    pub async fn all(containerd: &Containerd) -> anyhow::Result<Vec<Self>> {
        let mut all: Vec<Self> = containerd
            .labelled(NAME)
            .await?
            .into_iter()
            .filter_map(Self::of)
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    pub async fn find(containerd: &Containerd, name: &str) -> anyhow::Result<Option<Self>> {
        let record = containerd.container(&record_id(name)).await?;
        Ok(record.and_then(Self::of))
    }

    pub async fn get(containerd: &Containerd, name: &str) -> anyhow::Result<Self> {
        Self::find(containerd, name).await?.with_context(|| {
            format!(
                "The namespace {} has no snapshot {name}; `trenv snapshot list` shows them",
                containerd.namespace
            )
        })
    }

    /// The program's OCI spec.
    pub fn spec(&self) -> anyhow::Result<serde_json::Value> {
        let spec = self.record.spec.as_ref().map(|any| &any.value[..]);
        serde_json::from_slice(spec.unwrap_or_default())
            .with_context(|| format!("The spec of the snapshot {} cannot be read", self.name))
    }
}
