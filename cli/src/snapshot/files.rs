//! The files of snapshots: layers of containerd's, whose digests were taken with the memory.

use std::collections::HashMap;

use anyhow::{Context, bail};
use trenv_pool::TemplateInfo;
use trenv_sandbox_proto::layer;
use trenv_snapshot::layer::{LayerMount, layer_digest};

use super::saved::Saved;
use crate::containerd::Containerd;

/// The layers of a namespace that have digests.
#[derive(Debug)]
pub struct Files {
    containerd: Containerd,
    /// Name and digest of the layer, by the template that it belongs to.
    layers: HashMap<String, (String, String)>,
}

impl Files {
    pub async fn all(containerd: Containerd) -> anyhow::Result<Self> {
        let mut layers = HashMap::new();
        for (name, mut labels) in containerd.layers_labelled(layer::FILES).await? {
            let digest = labels.remove(layer::FILES);
            let template = labels.remove(layer::TEMPLATE);
            if let Some((template, digest)) = template.zip(digest) {
                layers.insert(template, (name, digest));
            }
        }
        Ok(Self { containerd, layers })
    }

    /// Compares the files of a snapshot with their digest, which is the answer; none where it has no
    /// digest, or its layer is in another namespace.
    pub async fn verify(
        &self,
        info: &TemplateInfo,
        saved: Option<&Saved>,
    ) -> anyhow::Result<Option<String>> {
        let template = layer::template(&info.id.to_string(), info.generation);
        let known = self.layers.get(&template);
        let layer = match (saved, known) {
            (Some(saved), _) => &saved.record.snapshot_key,
            (None, Some((layer, _))) => layer,
            (None, None) => return Ok(None),
        };
        // Of a snapshot taken by hand also without a digest: containerd must have it still.
        let found = self.digest(layer).await.with_context(|| {
            format!(
                "Its files cannot be read; where their layer {layer} is gone, remove the snapshot and take it again"
            )
        })?;
        match known.map(|(_, digest)| digest) {
            Some(taken) if *taken != found => bail!(
                "Its files are not those that were taken: the layer {layer} of containerd has the digest {found}, not {taken}; remove the snapshot and take it again"
            ),
            Some(_) => Ok(Some(found)),
            None => Ok(None),
        }
    }

    async fn digest(&self, layer: &str) -> anyhow::Result<String> {
        let view = format!("{layer}-verify-{}", std::process::id());
        let mounts = self.containerd.view_layer(&view, layer).await?;
        let mounts: Vec<LayerMount> = mounts
            .into_iter()
            .map(|mount| LayerMount {
                kind: mount.r#type,
                source: mount.source,
                options: mount.options,
            })
            .collect();
        let digest = tokio::task::spawn_blocking(move || layer_digest(&mounts)).await;
        self.containerd.remove_layer(&view).await?;
        Ok(digest??)
    }
}
