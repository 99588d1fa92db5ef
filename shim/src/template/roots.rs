//! The roots of tenancies: mounted ahead, and kept where a tenancy wrote nothing to its own.

use std::os::fd::AsFd;
use std::sync::Arc;

use trenv_sandbox::rootfs::{Keeper, KeptRoot, Mount, RootfsError, look_up, overlay_from_mounts};

use super::standing::{Staged, Standing, TenancyRoot};
use super::{Templates, lock};
use crate::error::{Result, ShimError};
use crate::sandbox::TemplateRef;

impl Templates {
    /// Mounts a tenancy's root ahead of its start.
    pub fn stage(&self, template: TemplateRef, rootfs: Vec<Mount>) -> Result<()> {
        let standing = self.standing_by_any(template).next();
        let standing = standing.ok_or_else(|| ShimError::NotFound {
            kind: "prepared template",
            id: template.id.to_string(),
        })?;
        let mounting = ShimError::engine("mount the root of a tenancy to come");
        let root = self.keep(&rootfs).map_err(mounting)?;
        if let Some(zygote) = standing.method.zygote() {
            let opened = zygote.opened().iter().map(String::as_str);
            look_up(root.mount.as_fd(), opened);
        }
        standing.add_staged(Staged {
            mounts: rootfs,
            root,
        });
        Ok(())
    }

    /// A root that another tenancy may have after the first one.
    fn keep(&self, mounts: &[Mount]) -> std::result::Result<TenancyRoot, RootfsError> {
        let mount = overlay_from_mounts(mounts)?;
        let mut keeper = lock(&self.keeper);
        let keeper = match keeper.as_mut() {
            Some(keeper) => keeper,
            None => keeper.insert(Keeper::start()?),
        };
        let kept = keeper.keep(mounts, &mount)?;
        let mount = kept.as_ref().map_or(Ok(mount), KeptRoot::mount)?;
        Ok(TenancyRoot { mount, kept })
    }

    /// Makes the root of a tenancy that has ended the staged root of one to come, if nothing was
    /// written to it; answers whether that is so.
    pub fn stage_again(&self, template: TemplateRef, mounts: Vec<Mount>, kept: KeptRoot) -> bool {
        if !kept.is_untouched() {
            return false;
        }
        let Some(standing) = self.standing_by_any(template).next() else {
            return false;
        };
        match kept.mount() {
            Ok(mount) => {
                let kept = Some(kept);
                let root = TenancyRoot { mount, kept };
                standing.add_staged(Staged { mounts, root });
                true
            }
            Err(err) => {
                tracing::warn!("A root is not used again: {err}");
                false
            }
        }
    }

    /// The root of a tenancy: the one mounted ahead, or mounted now.
    pub fn root(&self, rootfs: &[Mount]) -> Result<TenancyRoot> {
        // It may be staged for another template than the one that is started: that of the base.
        let all: Vec<Arc<Standing>> = lock(&self.standing).values().cloned().collect();
        if let Some(staged) = all.iter().find_map(|standing| standing.take_staged(rootfs)) {
            return Ok(staged);
        }
        let mount =
            overlay_from_mounts(rootfs).map_err(ShimError::engine("mount the tenancy's root"))?;
        Ok(TenancyRoot { mount, kept: None })
    }
}

/// The read-only layers behind an active snapshot's mounts.
pub fn layers_only(active: &[Mount]) -> Vec<Mount> {
    active
        .iter()
        .map(|mount| {
            let mut layers = mount.clone();
            layers.options.retain(|option| {
                !option.starts_with("upperdir=") && !option.starts_with("workdir=")
            });
            if layers.options.len() == mount.options.len() {
                return layers;
            }
            let lower = layers
                .options
                .iter()
                .find_map(|option| option.strip_prefix("lowerdir="));
            match lower {
                // overlayfs wants two layers when there is no upper one.
                Some(lower) if !lower.contains(':') => Mount {
                    kind: "bind".into(),
                    source: lower.to_owned(),
                    options: vec!["rbind".into(), "ro".into()],
                },
                _ => layers,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay(options: &[&str]) -> Vec<Mount> {
        vec![Mount {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: options.iter().map(|text| (*text).to_owned()).collect(),
        }]
    }

    #[test]
    fn the_layers_of_an_active_snapshot_are_found() {
        let many = layers_only(&overlay(&[
            "index=off",
            "workdir=/w",
            "upperdir=/u",
            "lowerdir=/a:/b",
        ]));
        assert_eq!(many, overlay(&["index=off", "lowerdir=/a:/b"]));
        let one = layers_only(&overlay(&["workdir=/w", "upperdir=/u", "lowerdir=/a"]));
        assert_eq!(
            (one[0].kind.as_str(), one[0].source.as_str()),
            ("bind", "/a")
        );
        let view = overlay(&["lowerdir=/a:/b"]);
        assert_eq!(layers_only(&view), view);
    }
}
