//! Skeletons: zygotes that hold a tree's address space without its stored pages. Every start method
//! but `template` brings the pages in at each start, into a clone of such a zygote.

use nix::libc;
use trenv_restorer::wire::fd;

use super::layout::{Placement, kernel_owned};
use super::memory::{Piece, advice, advise, inside};
use super::region::{Program, Region};
use super::shared::When;
use crate::manifest::{Manifest, Mapping, MappingFlags, MappingKind};

/// Bytes in the region for the program of a rework.
pub const REWORK: u64 = 1 << 20;
/// Steps that one rework can take, with room for its end: no more than so many mappings.
const MOST_MAPS: usize = (REWORK as usize / size_of::<trenv_restorer::wire::Op>()) - 2;

/// What a zygote's address space holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// Everything that is stored.
    Pages,
    /// The same; [`Area::attachable`] ones are mapped from a template of the pool's device.
    Attached,
    /// The mappings alone. In a clone of a watched one userfaultfd(2) tells of missing pages.
    Skeleton { watched: bool },
    /// The same without the [`Area::attachable`] ones, which a clone attaches when it starts.
    Blank,
}

impl Fill {
    /// Whether a clone has the stored pages before it starts.
    pub fn has_pages(self) -> bool {
        matches!(self, Self::Pages | Self::Attached)
    }
}

/// A mapping that has stored pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Area {
    pub at: u64,
    /// Where its process has it.
    pub process: usize,
    pub start: u64,
    pub length: u64,
    /// PROT_READ, PROT_WRITE, PROT_EXEC.
    pub protection: u32,
    /// A private mapping of a file otherwise, of which the process has pages of its own.
    pub anonymous: bool,
    /// It lies where its process has it, and is nothing that must stay anonymous.
    pub mappable: bool,
    /// Its pages may be those of a device, mapped copy-on-write.
    pub attachable: bool,
    pub flags: MappingFlags,
    /// By address.
    pub runs: Vec<Run>,
    /// Start and end of what is guarded, by address.
    pub guards: Vec<(u64, u64)>,
}

impl Area {
    /// Whether a guard page lies in a range.
    pub fn has_guard(&self, start: u64, end: u64) -> bool {
        let next = self.guards.partition_point(|guard| guard.1 <= start);
        self.guards.get(next).is_some_and(|guard| guard.0 < end)
    }
}

/// A template of a device makes no stack, and what it makes can neither be locked in memory nor have
/// guard pages.
pub fn is_attachable(mapping: &Mapping) -> bool {
    let flags = &mapping.flags;
    let plain = !flags.grows_down && !flags.locked && mapping.guards.is_empty();
    mapping.kind == MappingKind::Anonymous && plain
}

/// Stored pages that are neighbours in the address space and in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub at: u64,
    pub length: u64,
    /// Offset in the pool; none for zero pages.
    pub offset: Option<u64>,
}

/// A part of a file that shall lie in the address space, in place of what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Map {
    pub at: u64,
    pub length: u64,
    pub protection: u32,
    pub flags: MappingFlags,
    /// Which of the files that come with the request, and the offset in it.
    pub file: u64,
    pub offset: u64,
}

/// The areas of everything that lies in the zygote.
pub fn areas(manifest: &Manifest, placement: &Placement, pieces: &[Vec<Piece>]) -> Vec<Area> {
    let mut areas = Vec::new();
    for place in &placement.placed {
        let mapping = &manifest.processes[place.process].mappings[place.mapping];
        // What each process maps for itself brings its pages along.
        if kernel_owned(mapping) || When::of(mapping, manifest) != When::Zygote {
            continue;
        }
        let anonymous = mapping.kind == MappingKind::Anonymous;
        let runs = inside(mapping, &pieces[place.process])
            .map(|piece| Run {
                at: place.at + (piece.address - mapping.start),
                length: piece.length,
                offset: piece.offset,
            })
            // Fresh anonymous memory is zero already.
            .filter(|run| !anonymous || run.offset.is_some())
            .collect::<Vec<_>>();
        if runs.is_empty() {
            continue;
        }
        areas.push(Area {
            at: place.at,
            process: place.process,
            start: mapping.start,
            length: place.length,
            protection: mapping.protection,
            anonymous,
            attachable: is_attachable(mapping),
            flags: mapping.flags,
            // A mapping of a file cannot grow downwards, and one that is moved must stay in one piece.
            mappable: anonymous && !mapping.flags.grows_down && place.at == mapping.start,
            runs,
            guards: mapping.guards_at(place.at).collect(),
        });
    }
    areas
}

/// Makes the clone's userfaultfd and leaves it where its owner takes it.
pub fn watch(control: u64, region: &mut Region, program: &mut Program) {
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    program.about(region.sentence(
        "making a userfaultfd; the start methods that load pages on demand need CAP_SYS_PTRACE and a kernel with CONFIG_USERFAULTFD".into(),
    ));
    program.call(libc::SYS_userfaultfd, [flags]).into(0);
    let close = libc::O_CLOEXEC as u64;
    program.call(libc::SYS_dup3, [0, control + fd::WATCH, close]);
    program.from(0, 0);
    program.call(libc::SYS_close, [0]).from(0, 0);
}

/// As many of them as fit a rework.
pub fn fitting(maps: &[Map]) -> &[Map] {
    let mut steps = 0;
    let mut fits = |map: &&Map| {
        steps += 1 + advice(map.flags).count();
        steps <= MOST_MAPS
    };
    let fitting = maps.iter().take_while(|map| fits(map)).count();
    &maps[..fitting]
}

/// The program of a rework.
pub fn rework(maps: &[Map], control: u64) -> Vec<u8> {
    let mut program = Program::default();
    program.about(10);
    for map in maps {
        let mut how = (libc::MAP_PRIVATE | libc::MAP_FIXED) as u64;
        if map.flags.no_reserve {
            how |= libc::MAP_NORESERVE as u64;
        }
        let file = control + fd::FILES + map.file;
        let protection = u64::from(map.protection);
        program.call(
            libc::SYS_mmap,
            [map.at, map.length, protection, how, file, map.offset],
        );
        program.exactly(map.at);
        advise(map.at, map.length, map.flags, &mut program);
    }
    program.bytes()
}
