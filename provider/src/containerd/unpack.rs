//! Unpacking an image that containerd holds as content only.
//!
//! `ctr images import` and `pull` unpack by themselves; content imported with `--no-unpack`, or for
//! another snapshotter, is unpacked here, layer by layer, by containerd's own differ.

use std::collections::HashMap;

use containerd_client::services::v1::ApplyRequest;
use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::types::Descriptor;

use super::images::{ImageError, chain_id};
use super::snapshots::to_wire;
use super::{Namespaced, refused};

impl Namespaced {
    /// Makes sure that the layers of the image `name` exist as snapshots; new ones are held by
    /// `lease`.
    pub async fn unpack_image(&self, lease: &str, name: &str) -> Result<(), ImageError> {
        let image = self.read_image(name).await?;
        let chain = &image.resolved.chain_id;
        if self.snapshot_kind(chain).await?.is_some() {
            self.lease_snapshot(lease, chain).await?;
            // The layers may have gone between the two calls, before the lease held them.
            if self.snapshot_kind(chain).await?.is_some() {
                return Ok(());
            }
        }
        if image.manifest.layers.len() != image.diff_ids.len() {
            return Err(ImageError::Document {
                name: name.to_owned(),
                digest: image.resolved.digest,
                reason: "its layers and its configuration do not agree".to_owned(),
            });
        }
        for (n, layer) in image.manifest.layers.iter().enumerate() {
            let parent = if n == 0 {
                String::new()
            } else {
                chain_id(&image.diff_ids[..n])
            };
            let target = chain_id(&image.diff_ids[..=n]);
            if self.snapshot_kind(&target).await?.is_some() {
                self.lease_snapshot(lease, &target).await?;
                continue;
            }
            let key = format!("trenv-unpack-{}", uuid::Uuid::new_v4().simple());
            let mounts = self
                .prepare_snapshot(lease, &key, &parent, HashMap::new())
                .await?;
            let applied = DiffClient::new(self.channel.clone())
                .apply(self.request_leased(
                    lease,
                    ApplyRequest {
                        diff: Some(Descriptor {
                            media_type: layer.media_type.clone(),
                            digest: layer.digest.clone(),
                            size: layer.size,
                            ..Default::default()
                        }),
                        mounts: mounts.iter().map(to_wire).collect(),
                        ..Default::default()
                    },
                ))
                .await
                .map_err(refused(format!("unpack the layer {}", layer.digest)));
            let committed = match applied {
                Ok(_) => {
                    self.commit_snapshot(lease, &target, &key, HashMap::new())
                        .await
                }
                Err(err) => Err(err),
            };
            match committed {
                Ok(()) => {}
                Err(err) => {
                    self.remove_snapshot(&key).await?;
                    // Somebody else has unpacked the same layer meanwhile.
                    if !err.is_already_exists() {
                        return Err(err.into());
                    }
                    self.lease_snapshot(lease, &target).await?;
                }
            }
        }
        Ok(())
    }
}
