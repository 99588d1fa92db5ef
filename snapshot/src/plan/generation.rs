//! Maps the new sandbox's generation page where the process had that of its first one.

use nix::libc;

use super::memory;
use super::region::{Program, Region};
use crate::generation::PATH;
use crate::manifest::{MappingKind, Process};

/// Before any thread of the process runs, so that none sees a page of another start.
pub fn map(process: &Process, region: &mut Region, program: &mut Program) {
    let mappings = process.mappings.iter();
    for mapping in mappings.filter(|mapping| mapping.kind == MappingKind::Generation) {
        program.about(region.sentence(format!("mapping {PATH} for process {}", process.pid)));
        memory::open(PATH, region, program);
        let length = mapping.end - mapping.start;
        let protection = u64::from(mapping.protection);
        let how = (libc::MAP_SHARED | libc::MAP_FIXED) as u64;
        program.call(
            libc::SYS_mmap,
            [mapping.start, length, protection, how, 0, 0],
        );
        program.from(4, 0).exactly(mapping.start);
        program.call(libc::SYS_close, [0]).from(0, 0);
    }
}
