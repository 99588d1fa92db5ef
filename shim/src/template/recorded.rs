//! What a template's starts need of its memory, learnt from tenancies and kept on disk.

use trenv_pool::TemplateId;
use trenv_snapshot::methods::Prepared;
use trenv_snapshot::recording::{self, Recorded};

use super::standing::Standing;
use super::{Templates, lock};
use crate::sandbox::{TemplateRef, Tenancy};

impl Templates {
    /// Lets the zygote learn from a tenancy that is about to end which pages its calls touched; what
    /// is known of the input that they had.
    pub fn learn(&self, tenancy: &Tenancy, input: &str) -> Option<Recorded> {
        let template = tenancy.seat.template?;
        let standing = lock(&self.standing).get(&template).cloned();
        // Pages of another zygote would all be others.
        let standing = standing.filter(|standing| standing.made_seat(&tenancy.seat))?;
        match standing.method.learn(&tenancy.restored, input) {
            Ok(false) => {}
            // Clones made before know less.
            Ok(true) => lock(&standing.seats)
                .iter()
                .for_each(|seat| seat.unprepare()),
            // The tree may have ended by itself; the next tenancy teaches as well.
            Err(err) => {
                tracing::debug!("Nothing was learnt from the tenancy {}: {err}", tenancy.id);
            }
        }
        let recorded = standing.method.recorded();
        recorded.into_iter().find(|one| one.input == input)
    }

    /// Keeps what was learnt, where it has changed.
    pub(super) fn keep_recorded(&self, template: TemplateRef, standing: &Standing) {
        let recorded = standing.method.recorded();
        let mut kept = lock(&standing.recorded);
        if *kept == recorded {
            return;
        }
        let TemplateRef {
            id,
            generation,
            method,
        } = template;
        let directory = recording::directory(&self.config.state_dir);
        match recording::save(&directory, &id, generation, method, &recorded) {
            Ok(()) => *kept = recorded,
            Err(err) => tracing::warn!(
                "The working sets of {id} are not kept in {}: {err}",
                directory.display()
            ),
        }
    }

    /// What an earlier zygote of the template has learnt.
    pub(super) fn recall(&self, template: TemplateRef, method: &Prepared) -> Vec<Recorded> {
        let TemplateRef {
            id,
            generation,
            method: name,
        } = template;
        let directory = recording::directory(&self.config.state_dir);
        let recalled = recording::load(&directory, &id, generation, name).and_then(|recorded| {
            method.recall(&recorded).map_err(std::io::Error::other)?;
            Ok(recorded)
        });
        recalled.unwrap_or_else(|err| {
            tracing::warn!("The working sets of {id} are recorded anew: {err}");
            Vec::new()
        })
    }

    pub(super) fn forget_recorded(&self, id: &TemplateId, before: Option<u64>) {
        let directory = recording::directory(&self.config.state_dir);
        if let Err(err) = recording::remove(&directory, id, before) {
            tracing::warn!(
                "Working sets of {id} stay in {}: {err}",
                directory.display()
            );
        }
    }
}
