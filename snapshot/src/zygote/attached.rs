//! A zygote whose memory is the pool's device: a template of the driver (`/dev/pseudo_mm`) that has the
//! zygote's areas at the zygote's addresses, with the device's pages in them.
//!
//! The zygote maps each area from the template's descriptor while it is built. What nobody writes takes no
//! memory of the machine, in the zygote and in all that are cloned from it; the areas are anonymous memory
//! in everything else.

use std::io;

use pseudo_mm_uapi::{Device, Extent, Map, Template};

use super::{ZygoteError, ZygoteRequest};
use crate::manifest::{Manifest, PAGE};
use crate::plan::Plan;
use crate::plan::skeleton::{Area, Fill};

/// A plan for the zygote, and the template that it maps its attachable areas from.
pub fn plan(
    request: &ZygoteRequest<'_>,
    manifest: &Manifest,
    fill: Fill,
) -> Result<(Plan, Option<Template>), ZygoteError> {
    let extents = request.template.extents();
    if fill == Fill::Pages
        && let Some(device) = request.template.templates()
    {
        let plan = Plan::of(manifest, extents, Fill::Attached)?;
        match template(device, &plan.areas) {
            Ok(template) => return Ok((plan, Some(template))),
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
        maps.push(Map::private_anonymous(area.at, area.length, protection));
        for run in &area.runs {
            if let Some(offset) = run.offset {
                extents.push(Extent {
                    address: run.at,
                    pages: run.length / PAGE,
                    device_page: offset / PAGE,
                });
            }
        }
    }
    let template = device.create()?;
    template.add(&maps, &extents)?;
    template.seal()?;
    Ok(template)
}
