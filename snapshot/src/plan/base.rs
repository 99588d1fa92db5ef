//! What of a base's zygote stays in the zygote that is made from it.
//!
//! A function that was started from its base's template and dumped has the base's layout, and most
//! of its memory is the base's still. So its zygote begins as a copy of the base's: mappings that lie
//! where the base has them stay, with every page that is equal; what differs is written over them,
//! and the rest is unmapped and mapped as in any zygote. Pages that nobody wrote are the base's own,
//! shared by all that come from it.

use std::collections::BTreeSet;
use std::io;

use nix::libc;
use trenv_restorer::wire::{fd, verb};

use super::layout::{Placed, Placement, kernel_owned};
use super::memory::{self, Piece, Sourced};
use super::region::{Program, Region};
use super::shared::When;
use super::skeleton::is_attachable;
use super::{Plan, PlanError, build_fd};
use crate::manifest::{Manifest, Mapping, MappingKind, Process};

/// Bytes in a region for the program by which a copy of its zygote goes on in another region.
pub const ARRIVAL: u64 = 4096;
/// The sentence about it.
const ARRIVING: u32 = 11;
const TASK_END: u64 = 0x7fff_ffff_f000;
const READ_WRITE: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
const MOVE_MOUNT_F_EMPTY_PATH: u64 = 4;

/// The address space of a zygote.
#[derive(Debug)]
pub struct Ground {
    /// By address.
    held: Vec<Held>,
    region: (u64, u64),
    /// The kernel's own mappings.
    kernel: Option<(u64, u64)>,
    /// Whether what it may map from the pool's device, it has mapped from there.
    attached: bool,
    exe: String,
    control: u64,
    rework: u64,
}

#[derive(Debug)]
struct Held {
    at: u64,
    end: u64,
    mapping: Mapping,
}

/// A base's zygote, to plan another over it.
#[derive(Clone, Copy)]
pub struct Base<'a> {
    pub ground: &'a Ground,
    pub memory: &'a dyn BaseMemory,
}

impl std::fmt::Debug for Base<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Base").field(&self.ground).finish()
    }
}

/// What the pages of a base's zygote hold.
pub trait BaseMemory {
    /// How a part of its memory differs from what is stored for it; `pieces` have the zygote's
    /// addresses.
    ///
    /// # Errors
    /// When the zygote has ended, or the pool cannot be read.
    fn differences(&self, part: &Mapping, pieces: &[Piece]) -> io::Result<Differences>;
}

/// What makes one memory of another.
#[derive(Debug, Default)]
pub struct Differences {
    /// Pages to write.
    pub written: Vec<Piece>,
    /// Start and length of what begins anew: as zeroes, or as the file has it.
    pub fresh: Vec<(u64, u64)>,
}

impl Held {
    /// Start and end of its guard pages in a range.
    fn guards(&self, from: u64, to: u64) -> impl Iterator<Item = (u64, u64)> {
        let guards = self.mapping.guards_at(self.at);
        let clipped = guards.map(move |(start, end)| (start.max(from), end.min(to)));
        clipped.filter(|(start, end)| start < end)
    }
}

impl Ground {
    pub fn of(
        manifest: &Manifest,
        placement: &Placement,
        region: (u64, u64),
        (control, rework): (u64, u64),
        attached: bool,
    ) -> Self {
        let heir = &manifest.processes[placement.heir];
        let held = placement.placed.iter().filter_map(|place| {
            let mapping = &manifest.processes[place.process].mappings[place.mapping];
            let there = !kernel_owned(mapping) && When::of(mapping, manifest) == When::Zygote;
            there.then(|| Held {
                at: place.at,
                end: place.at + place.length,
                mapping: mapping.clone(),
            })
        });
        Self {
            held: held.collect(),
            region,
            kernel: kernel_range(heir),
            attached,
            exe: heir.exe.clone(),
            control,
            rework,
        }
    }

    /// Where a region must not lie whose programs take this address space over.
    pub fn taken(&self) -> Vec<(u64, u64)> {
        let held = self.held.iter().map(|held| (held.at, held.end));
        held.chain([self.region]).collect()
    }

    /// Whether it lies on the pool's device.
    pub fn attached(&self) -> bool {
        self.attached
    }

    /// Where the owner of the zygote's copy writes the program that [`arrive`] makes.
    pub fn rework(&self) -> u64 {
        self.rework
    }

    /// The base's mapping of which a mapping of the function is the same, or a part.
    fn under(&self, place: &Placed, mapping: &Mapping, exe: &str) -> Option<&Held> {
        let after = self.held.partition_point(|held| held.at <= place.at);
        let held = self.held.get(after.checked_sub(1)?)?;
        let inside = place.at + place.length <= held.end;
        let skipped = place.at - held.at;
        let same = match (&held.mapping.kind, &mapping.kind) {
            (
                MappingKind::File { path, offset },
                MappingKind::File {
                    path: its,
                    offset: at,
                },
            )
            | (
                MappingKind::SharedReadOnly { path, offset },
                MappingKind::SharedReadOnly {
                    path: its,
                    offset: at,
                },
            ) => {
                // The kernel lets go of an executable only once nothing maps it.
                let stays = *path != self.exe || self.exe == exe;
                path == its && offset + skipped == *at && stays
            }
            (theirs, its) => theirs == its,
        };
        // The device's pages cannot be guarded.
        let guarded = !mapping.guards.is_empty();
        let can_be_guarded = !self.attached || !is_attachable(&held.mapping);
        let stays = same && held.mapping.flags == mapping.flags && (!guarded || can_be_guarded);
        (inside && stays).then_some(held)
    }
}

fn kernel_range(process: &Process) -> Option<(u64, u64)> {
    let own = process.mappings.iter().filter(|one| kernel_owned(one));
    let (starts, ends): (Vec<u64>, Vec<u64>) = own.map(|one| (one.start, one.end)).unzip();
    Some((starts.into_iter().min()?, ends.into_iter().max()?))
}

/// Files that stay mapped from the base's layers.
pub fn kept_files(manifest: &Manifest, placement: &Placement, ground: &Ground) -> Vec<String> {
    let exe = &manifest.processes[placement.heir].exe;
    let mut paths = BTreeSet::new();
    for place in &placement.placed {
        let mapping = &manifest.processes[place.process].mappings[place.mapping];
        if let MappingKind::File { path, .. } | MappingKind::SharedReadOnly { path, .. } =
            &mapping.kind
            && ground.under(place, mapping, exe).is_some()
        {
            paths.insert(path.clone());
        }
    }
    paths.into_iter().collect()
}

impl Base<'_> {
    /// The first steps in the copy: into the function's layers, and away with all that does not stay.
    pub fn take_over(
        self,
        manifest: &Manifest,
        placement: &Placement,
        control: u64,
        region: &mut Region,
        program: &mut Program,
    ) -> Result<(), PlanError> {
        let heir = &manifest.processes[placement.heir];
        let kernel = kernel_range(heir);
        if kernel != self.ground.kernel {
            let what = "it has not the layout of its base; start it from its base's template";
            return Err(PlanError::Unsupported(what.into()));
        }
        enter_layers(control + build_fd::ROOTFS, region, program);
        let mut stay: Vec<(u64, u64)> = kernel.into_iter().collect();
        // What the region will be in the end is not known yet.
        stay.push((placement.region, placement.region + super::REGION_LIMIT));
        for place in &placement.placed {
            let mapping = &manifest.processes[place.process].mappings[place.mapping];
            if self.ground.under(place, mapping, &heir.exe).is_some() {
                stay.push((place.at, place.at + place.length));
            }
        }
        stay.sort_unstable();
        program.about(region.sentence("unmapping what is the base's alone".into()));
        let mut from = 0;
        for (start, end) in stay.into_iter().chain([(TASK_END, TASK_END)]) {
            if from < start {
                program.call(libc::SYS_munmap, [from, start - from]);
            }
            from = end.max(from);
        }
        Ok(())
    }

    /// Makes a mapping that stays into the function's; `false` where none stays.
    pub fn bring_up(
        self,
        place: &Placed,
        (process, heir): (&Process, &Process),
        pieces: &[Piece],
        control: u64,
        region: &mut Region,
        program: &mut Program,
    ) -> Result<bool, PlanError> {
        let mapping = &process.mappings[place.mapping];
        let Some(theirs) = self.ground.under(place, mapping, &heir.exe) else {
            return Ok(false);
        };
        let pieces: Vec<Piece> = memory::inside(mapping, pieces)
            .map(|piece| Piece {
                address: place.at + (piece.address - mapping.start),
                ..*piece
            })
            .collect();
        let part = Mapping {
            start: place.at,
            end: place.at + place.length,
            ..mapping.clone()
        };
        let differences = self.memory.differences(&part, &pieces);
        let differences = differences.map_err(|source| PlanError::Base { source })?;
        program.about(region.sentence(format!(
            "bringing up {:#x}-{:#x} of process {} from its base",
            mapping.start, mapping.end, process.pid
        )));
        for (start, end) in theirs.guards(place.at, place.at + place.length) {
            let remove = memory::MADV_GUARD_REMOVE;
            program.call(libc::SYS_madvise, [start, end - start, remove]);
        }
        for (start, length) in differences.fresh {
            let anew = libc::MADV_DONTNEED as u64;
            program.call(libc::SYS_madvise, [start, length, anew]);
        }
        let protect = |protection: u64, program: &mut Program| {
            program.call(libc::SYS_mprotect, [place.at, place.length, protection]);
        };
        let mut has = u64::from(theirs.mapping.protection);
        let shall = u64::from(mapping.protection);
        if !differences.written.is_empty() && has & READ_WRITE != READ_WRITE {
            protect(READ_WRITE, program);
            has = READ_WRITE;
        }
        for piece in differences.written {
            let from = match piece.offset {
                Some(offset) => (control + build_fd::PAGES, offset),
                None => (control + build_fd::ZERO, 0),
            };
            memory::write(
                &Sourced {
                    address: piece.address,
                    length: piece.length,
                    from,
                },
                piece.address,
                program,
            );
        }
        if has != shall {
            protect(shall, program);
        }
        memory::guard(place.at, mapping, process.pid, region, program);
        Ok(true)
    }

    /// Whether the copy's executable is the function's.
    pub fn has_exe(self, process: &Process) -> bool {
        self.ground.exe == process.exe
    }
}

/// A mount namespace of its own, with nothing but the function's layers in it.
fn enter_layers(rootfs: u64, region: &mut Region, program: &mut Program) {
    program.about(region.sentence("entering the function's layers".into()));
    let text = |region: &mut Region, text: &str| region.put_text(text);
    let (root, here, nothing) = (text(region, "/"), text(region, "."), text(region, ""));
    // Any directory will do: what lies below it is not seen any more afterwards.
    let place = text(region, "/proc");
    program.call(libc::SYS_unshare, [libc::CLONE_NEWNS as u64]);
    let private = libc::MS_PRIVATE | libc::MS_REC;
    program.call(libc::SYS_mount, [0, root, 0, private, 0]);
    let at = libc::AT_FDCWD as u64;
    program.call(
        libc::SYS_move_mount,
        [rootfs, nothing, at, place, MOVE_MOUNT_F_EMPTY_PATH],
    );
    program.call(libc::SYS_chdir, [place]);
    program.call(libc::SYS_pivot_root, [here, here]);
    program.call(libc::SYS_umount2, [here, libc::MNT_DETACH as u64]);
    program.call(libc::SYS_chdir, [root]);
}

/// The program by which a copy of a zygote maps the region of `plan` and goes on there. What comes
/// with the request: the region, its pages, zeroes, layers, loader and content, then the capsules.
pub fn arrive(from: &Ground, plan: &Plan) -> Vec<u8> {
    let mut program = Program::default();
    program.about(ARRIVING);
    let come = |place: u64| from.control + fd::STDIO + place;
    let fixed = (libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE) as u64;
    let execute = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    let mut map = |offset: u64, length: u64, access: u64| {
        let at = plan.base + offset;
        program.call(libc::SYS_mmap, [at, length, access, fixed, come(0), offset]);
        program.exactly(at);
    };
    map(0, plan.code, execute);
    map(plan.code, plan.length - plan.code, READ_WRITE);
    let to = |number: u64| plan.control + number;
    let mut moves = vec![
        (from.control + fd::CONTROL, to(fd::CONTROL)),
        (come(1), to(build_fd::PAGES)),
        (come(2), to(build_fd::ZERO)),
        (come(3), to(build_fd::ROOTFS)),
        (come(4), to(fd::LOADER)),
        (come(5), to(fd::CONTENT)),
    ];
    for capsule in 0..plan.capsules.len() as u64 {
        moves.push((come(6 + capsule), to(fd::CAPSULES + capsule)));
    }
    // First above every number used, so that no source is overwritten.
    let spare = from.control.max(plan.control) + build_fd::ROOTFS + 1;
    for (index, (source, _)) in moves.iter().enumerate() {
        program.call(libc::SYS_dup3, [*source, spare + index as u64, 0]);
    }
    program.call(libc::SYS_close_range, [0, spare - 1, 0]);
    for (index, (_, target)) in moves.iter().enumerate() {
        program.call(libc::SYS_dup3, [spare + index as u64, *target, 0]);
    }
    program.call(libc::SYS_close_range, [spare, u64::from(u32::MAX), 0]);
    program.verb(verb::ENTER, [plan.entry, plan.header, plan.stack]);
    program.bytes()
}
