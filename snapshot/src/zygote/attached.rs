//! A zygote whose memory is the pool's device: a template of the driver (`/dev/pseudo_mm`) that has the
//! zygote's areas at the zygote's addresses, with the device's pages in them.
//!
//! The zygote maps each area from the template's descriptor while it is built, or, by the start method
//! `attach`, each clone attaches the template when it starts. What nobody writes takes no memory of the
//! machine, in the zygote and in all that are cloned from it; the areas are anonymous memory in everything
//! else.
//!
//! The pages stay the pool's: they must not go to another template while a process maps them, which
//! instances do for longer than the zygote lives. So a lease on them is kept until the driver tells that
//! nobody does.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::libc;
use pseudo_mm_uapi::{Device, Extent, Map, Template};

use trenv_pool::PageLease;

use super::{ZygoteError, ZygoteRequest, io_error, lock};
use crate::manifest::{Manifest, PAGE};
use crate::plan::Plan;
use crate::plan::skeleton::{Area, Fill};

/// How often it is looked whether processes still map the pages of zygotes that have ended.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What zygotes have left that have ended.
static LEFT: Mutex<Vec<Attached>> = Mutex::new(Vec::new());

/// A template of the driver, and the hold on its pages in the pool.
#[derive(Debug)]
pub struct Attached {
    pub template: Arc<Template>,
    _pages: PageLease,
}

impl Attached {
    fn of(device: &Device, areas: &[Area], request: &ZygoteRequest<'_>) -> io::Result<Self> {
        Ok(Self {
            template: Arc::new(template(device, areas)?),
            _pages: request.template.lease(),
        })
    }

    /// Lets nobody attach it any more, and gives the pages back once nobody maps them.
    pub fn leave(self) {
        if let Err(err) = self.template.delete() {
            tracing::warn!(%err, "Failed to delete a template of the pool's device");
        }
        if !self.is_mapped() {
            return;
        }
        let mut left = lock(&LEFT);
        left.push(self);
        if left.len() > 1 {
            return;
        }
        let looking = std::thread::Builder::new().name("pages".into());
        if let Err(err) = looking.spawn(look_after) {
            tracing::warn!(%err, "Pages of the pool's device are kept until this process ends");
        }
    }

    /// What cannot be known counts as mapped.
    fn is_mapped(&self) -> bool {
        self.template.stat().map_or(true, |stat| stat.mapped > 0)
    }
}

fn look_after() {
    loop {
        std::thread::sleep(LOOK_EVERY);
        let mut left = lock(&LEFT);
        left.retain(Attached::is_mapped);
        if left.is_empty() {
            return;
        }
    }
}

/// A plan for the zygote, and the template that its attachable areas are mapped from.
pub fn plan(
    request: &ZygoteRequest<'_>,
    manifest: &Manifest,
    fill: Fill,
) -> Result<(Plan, Option<Attached>), ZygoteError> {
    let extents = request.template.extents();
    if fill == Fill::Blank {
        let device = request.template.templates().ok_or(ZygoteError::NoDevice)?;
        let plan = Plan::of(manifest, extents, fill)?;
        let attached = Attached::of(device, &plan.areas, request).map_err(io_error(
            "making a template of the pool's device; are the limits max_templates or max_extents of the module pseudo_mm reached?",
        ))?;
        return Ok((plan, Some(attached)));
    }
    if fill == Fill::Pages
        && let Some(device) = request.template.templates()
    {
        let plan = Plan::of(manifest, extents, Fill::Attached)?;
        match Attached::of(device, &plan.areas, request) {
            Ok(attached) => return Ok((plan, Some(attached))),
            Err(err) => tracing::warn!(
                %err,
                "A zygote gets copies of its pages: the pool's device cannot be mapped for it; are the limits max_templates or max_extents of the module pseudo_mm reached?"
            ),
        }
    }
    Ok((Plan::of(manifest, extents, fill)?, None))
}

/// Makes the template.
fn template(device: &Device, areas: &[Area]) -> io::Result<Template> {
    let areas = areas.iter().filter(|area| area.attachable);
    let (mut maps, mut extents) = (Vec::new(), Vec::new());
    for area in areas {
        let protection = area.protection.cast_signed();
        let mut map = Map::private_anonymous(area.at, area.length, protection);
        if area.flags.no_reserve {
            map.flags |= libc::MAP_NORESERVE.cast_unsigned();
        }
        maps.push(map);
        for run in &area.runs {
            if let Some(offset) = run.offset {
                extents.push(Extent::of_device(run.at, run.length / PAGE, offset / PAGE));
            }
        }
    }
    let template = device.create()?;
    template.add(&maps, &extents)?;
    template.seal()?;
    Ok(template)
}
