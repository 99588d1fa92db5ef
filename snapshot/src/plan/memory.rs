//! The programs that fill address spaces: a zygote's from the pool, a small process's from its capsule.

use std::collections::BTreeMap;

use nix::libc;
use trenv_pool::{Extent, Source};
use trenv_restorer::wire::fd;

use super::base::Base;
use super::layout::{Placed, Placement, kernel_owned};
use super::region::{Program, Region};
use super::shared::When;
use super::skeleton::{Fill, is_attachable};
use super::{PlanError, build_fd, sysv};
use crate::manifest::{Manifest, Mapping, MappingFlags, MappingKind, PAGE, PageRun, Process};

const HUGE: u64 = 2 << 20;
/// Pages of a huge page that must be stored for it to be worth one.
const HUGE_WORTH: u64 = 448;
const MADV_COLLAPSE: u64 = 25;
const MAP_DROPPABLE: u64 = 8;
/// From kernel 6.13 on, of anonymous memory; of any from 6.15 on.
pub const MADV_GUARD_INSTALL: u64 = 102;
pub const MADV_GUARD_REMOVE: u64 = 103;
const PR_SET_MM_MAP: u64 = 14;
const READ_WRITE: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;

/// A part of a page run that lies in one extent.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    pub address: u64,
    pub length: u64,
    /// Offset in the pool; none for zero pages.
    pub offset: Option<u64>,
}

/// A piece, and the descriptor and offset that it is read from.
#[derive(Debug, Clone, Copy)]
pub struct Sourced {
    pub address: u64,
    pub length: u64,
    pub from: (u64, u64),
}

/// The pieces of each process's pages, and of each memory object's.
#[derive(Debug)]
pub struct Pieces {
    pub processes: Vec<Vec<Piece>>,
    pub objects: Vec<Vec<Piece>>,
}

pub fn pieces(manifest: &Manifest, extents: &[Extent]) -> Result<Pieces, PlanError> {
    let mut pages = Pages { extents, first: 0 };
    let processes = manifest.processes.iter();
    let processes = processes
        .map(|process| pages.of(&process.pages))
        .collect::<Result<_, _>>()?;
    let objects = manifest.memory.iter();
    let objects = objects
        .map(|object| pages.of(&object.pages))
        .collect::<Result<_, _>>()?;
    let pieces = Pieces { processes, objects };
    let end = extents.last();
    if pages.first != end.map_or(0, |extent| extent.first_page + extent.pages) {
        return Err(PlanError::Pages);
    }
    Ok(pieces)
}

/// Builds the zygote's program; notes, as offsets in it, the words that hold addresses in the block
/// of the vdso.
pub fn build(
    manifest: &Manifest,
    placement: &Placement,
    pieces: &Pieces,
    (control, fill, base): (u64, Fill, Option<Base<'_>>),
    region: &mut Region,
    vdso_words: &mut Vec<u64>,
) -> Result<Program, PlanError> {
    let heir = &manifest.processes[placement.heir];
    let mut program = Program::default();
    match base {
        Some(base) => base.take_over(manifest, placement, control, region, &mut program)?,
        None => move_vdso(heir, region, &mut program, vdso_words),
    }
    for place in &placement.placed {
        let process = &manifest.processes[place.process];
        let mapping = &process.mappings[place.mapping];
        if kernel_owned(mapping) || When::of(mapping, manifest) != When::Zygote {
            continue;
        }
        let anonymous = mapping.kind == MappingKind::Anonymous;
        let all = &pieces.processes[place.process];
        let stored: &[Piece] = if fill.has_pages() { all } else { &[] };
        if let Some(base) = base
            && base.bring_up(
                place,
                (process, heir),
                stored,
                control,
                region,
                &mut program,
            )?
        {
            continue;
        }
        let attached = is_attachable(mapping) && !inside_stored(mapping, all).is_empty();
        match fill {
            Fill::Attached if attached => {
                attach(place, mapping, process.pid, control, region, &mut program);
                continue;
            }
            Fill::Blank if attached => continue,
            _ => {}
        }
        let inside = inside(mapping, stored);
        let sourced = inside.filter_map(|piece| {
            let from = match piece.offset {
                Some(offset) => (control + build_fd::PAGES, offset),
                // Fresh anonymous memory is zero already.
                None if anonymous => return None,
                None => (control + build_fd::ZERO, 0),
            };
            Some(Sourced {
                address: piece.address,
                length: piece.length,
                from,
            })
        });
        let sourced: Vec<Sourced> = sourced.collect();
        map(
            place,
            mapping,
            process.pid,
            control,
            &sourced,
            region,
            &mut program,
        );
        if anonymous && !mapping.flags.no_huge {
            let stored = inside_stored(mapping, stored);
            for at in worth_huge_pages(place, mapping, &stored) {
                program
                    .call(libc::SYS_madvise, [at, HUGE, MADV_COLLAPSE])
                    .or_not();
            }
        }
        protect(place, mapping, &sourced, &mut program);
        guard(place.at, mapping, process.pid, region, &mut program);
    }
    if base.is_some_and(|base| base.has_exe(heir)) {
        describe_memory(heir, None, region, &mut program);
    } else {
        describe(heir, control + build_fd::EXE, region, &mut program);
    }
    let rest = u64::from(u32::MAX);
    program.call(libc::SYS_close_range, [control + build_fd::PAGES, rest, 0]);
    Ok(program)
}

/// Where the capsule of a process has its pages: what to copy there from the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copy {
    pub from: u64,
    pub to: u64,
    pub length: u64,
}

/// Builds the program by which a process fills its own memory from its capsule, which is open as
/// descriptor 0 and has its pages from `at` on. Notes what to copy there; returns where they end.
pub fn load(
    process: &Process,
    pieces: &[Piece],
    at: u64,
    (control, exe): (u64, u64),
    region: &mut Region,
    program: &mut Program,
    vdso_words: &mut Vec<u64>,
) -> (Vec<Copy>, u64) {
    move_vdso(process, region, program, vdso_words);
    let (mut copies, mut end) = (Vec::new(), at);
    for (index, mapping) in process.mappings.iter().enumerate() {
        if kernel_owned(mapping) {
            continue;
        }
        let mut sourced = Vec::new();
        for piece in inside(mapping, pieces) {
            match piece.offset {
                Some(from) => copies.push(Copy {
                    from,
                    to: end,
                    length: piece.length,
                }),
                None if mapping.kind == MappingKind::Anonymous => continue,
                // A hole of the capsule reads as zeroes.
                None => {}
            }
            sourced.push(Sourced {
                address: piece.address,
                length: piece.length,
                from: (0, end),
            });
            end += piece.length;
        }
        let place = Placed {
            process: 0,
            mapping: index,
            at: mapping.start,
            length: mapping.end - mapping.start,
        };
        map(
            &place,
            mapping,
            process.pid,
            control,
            &sourced,
            region,
            program,
        );
        protect(&place, mapping, &sourced, program);
        guard(place.at, mapping, process.pid, region, program);
    }
    describe(process, exe, region, program);
    program.call(libc::SYS_close, [0]);
    (copies, end)
}

/// Opens the executable as `number` for the description of a process's memory.
fn describe(process: &Process, number: u64, region: &mut Region, program: &mut Program) {
    program.about(region.sentence(format!("opening {}", process.exe)));
    open(&process.exe, region, program);
    program.call(libc::SYS_dup3, [0, number, 0]).from(0, 0);
    program.call(libc::SYS_close, [0]).from(0, 0);
    describe_memory(process, Some(number), region, program);
}

/// PR_SET_MM_MAP (prctl(2)): what the kernel knows of code, data, heap, stack and arguments.
pub fn describe_memory(
    process: &Process,
    exe: Option<u64>,
    region: &mut Region,
    program: &mut Program,
) {
    let layout = &process.layout;
    let auxv = region.put(&process.auxv, 8);
    let exe = exe.map_or(u64::from(u32::MAX), |fd| fd & 0xffff_ffff);
    let map = region.put_words(&[
        layout.start_code,
        layout.end_code,
        layout.start_data,
        layout.end_data,
        layout.start_brk,
        layout.brk,
        layout.start_stack,
        layout.arg_start,
        layout.arg_end,
        layout.env_start,
        layout.env_end,
        auxv,
        process.auxv.len() as u64 | exe << 32,
    ]);
    program.about(region.sentence(format!("describing the memory of process {}", process.pid)));
    let size = 13 * 8;
    program.call(
        libc::SYS_prctl,
        [libc::PR_SET_MM as u64, PR_SET_MM_MAP, map, size, 0],
    );
}

/// The pieces of a mapping; they are in address order.
pub fn inside<'a>(mapping: &Mapping, pieces: &'a [Piece]) -> impl Iterator<Item = &'a Piece> {
    let end = mapping.end;
    let first = pieces.partition_point(|piece| piece.address < mapping.start);
    let from = pieces.iter().skip(first);
    from.take_while(move |piece| piece.address < end)
}

fn inside_stored<'a>(mapping: &Mapping, pieces: &'a [Piece]) -> Vec<&'a Piece> {
    inside(mapping, pieces)
        .filter(|piece| piece.offset.is_some())
        .collect()
}

/// The vdso of a fresh address space goes to where the process knows it.
fn move_vdso(
    process: &Process,
    region: &mut Region,
    program: &mut Program,
    vdso_words: &mut Vec<u64>,
) {
    let mappings = &process.mappings;
    let Some(first) = mappings.iter().find(|mapping| kernel_owned(mapping)) else {
        return;
    };
    program.about(region.sentence("moving the vdso".into()));
    for mapping in mappings.iter().filter(|mapping| kernel_owned(mapping)) {
        let length = mapping.end - mapping.start;
        let how = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        // The first argument is completed by the restorer, once it knows where its vdso lies.
        vdso_words.push(program.next_argument());
        let from = mapping.start - first.start;
        program.call(libc::SYS_mremap, [from, length, length, how, mapping.start]);
        program.exactly(mapping.start);
    }
}

/// Maps a place from the template of the pool's device: its pages are there at once, and the kernel
/// copies those that are written.
fn attach(
    place: &Placed,
    mapping: &Mapping,
    pid: i32,
    control: u64,
    region: &mut Region,
    program: &mut Program,
) {
    program.about(region.sentence(format!(
        "attaching {:#x}-{:#x} of process {pid} from the pool's device",
        mapping.start, mapping.end
    )));
    let mut flags = (libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE) as u64;
    if mapping.flags.no_reserve {
        flags |= libc::MAP_NORESERVE as u64;
    }
    let protection = u64::from(mapping.protection);
    let template = control + build_fd::TEMPLATE;
    program.call(
        libc::SYS_mmap,
        [
            place.at,
            place.length,
            protection,
            flags,
            template,
            place.at,
        ],
    );
    program.exactly(place.at);
    advise(place.at, place.length, mapping.flags, program);
}

pub fn map(
    place: &Placed,
    mapping: &Mapping,
    pid: i32,
    control: u64,
    pieces: &[Sourced],
    region: &mut Region,
    program: &mut Program,
) {
    let wanted = format!(
        "mapping {:#x}-{:#x} of process {pid}",
        mapping.start, mapping.end
    );
    program.about(region.sentence(wanted));
    let protection = u64::from(mapping.protection);
    let first = if pieces.is_empty() {
        protection
    } else {
        READ_WRITE
    };
    let fixed = (libc::MAP_FIXED_NOREPLACE) as u64;
    match &mapping.kind {
        MappingKind::Anonymous => {
            let mut flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64 | fixed;
            if mapping.flags.grows_down {
                flags |= libc::MAP_GROWSDOWN as u64;
            }
            if mapping.flags.no_reserve {
                flags |= libc::MAP_NORESERVE as u64;
            }
            if mapping.flags.droppable {
                flags = flags & !0xf | MAP_DROPPABLE;
            }
            program.call(
                libc::SYS_mmap,
                [place.at, place.length, first, flags, u64::MAX, 0],
            );
            program.exactly(place.at);
        }
        MappingKind::File { path, offset } | MappingKind::SharedReadOnly { path, offset } => {
            let shared = matches!(mapping.kind, MappingKind::SharedReadOnly { .. });
            let how = if shared {
                libc::MAP_SHARED
            } else {
                libc::MAP_PRIVATE
            } as u64;
            program.about(region.sentence(format!("opening {path}")));
            open(path, region, program);
            program.about(region.sentence(format!("mapping {path}")));
            program.call(
                libc::SYS_mmap,
                [place.at, place.length, first, how | fixed, 0, *offset],
            );
            program.from(4, 0).exactly(place.at);
            program.call(libc::SYS_close, [0]).from(0, 0);
        }
        MappingKind::AtStart {
            path,
            offset,
            shared,
            writable,
        } => {
            let access = match shared & writable {
                true => libc::O_RDWR,
                false => libc::O_RDONLY,
            };
            program.about(region.sentence(format!("opening {path}")));
            open_for(path, access, region, program);
            program.about(region.sentence(format!("mapping {path}")));
            let how = sharing(*shared) | fixed;
            program.call(
                libc::SYS_mmap,
                [place.at, place.length, first, how, 0, *offset],
            );
            program.from(4, 0).exactly(place.at);
            program.call(libc::SYS_close, [0]).from(0, 0);
        }
        MappingKind::Object {
            object,
            offset,
            shared,
        } => {
            let (number, how) = (
                control + fd::MEMORY + *object as u64,
                sharing(*shared) | fixed,
            );
            program.call(
                libc::SYS_mmap,
                [place.at, place.length, first, how, number, *offset],
            );
            program.exactly(place.at);
        }
        MappingKind::Segment { id } => sysv::attach(*id, place.at, mapping, program),
        // Holds the place; the process maps the page of its sandbox over it.
        MappingKind::Generation => {
            let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64 | fixed;
            program.call(
                libc::SYS_mmap,
                [place.at, place.length, first, flags, u64::MAX, 0],
            );
            program.exactly(place.at);
        }
        MappingKind::Vdso | MappingKind::Vvar => return,
    }
    advise(place.at, place.length, mapping.flags, program);
    for piece in pieces {
        write(piece, place.at + (piece.address - mapping.start), program);
    }
}

pub fn advise(at: u64, length: u64, flags: MappingFlags, program: &mut Program) {
    for advice in advice(flags) {
        // It may be unknown to this kernel's configuration; it changes no meaning.
        program
            .call(libc::SYS_madvise, [at, length, advice as u64])
            .or_not();
    }
}

/// What madvise(2) is told about a mapping once it is made, and a clone inherits.
pub fn advice(flags: MappingFlags) -> impl Iterator<Item = i32> {
    let advice = [
        (flags.dont_dump, libc::MADV_DONTDUMP),
        (flags.huge, libc::MADV_HUGEPAGE),
        (flags.no_huge, libc::MADV_NOHUGEPAGE),
        (flags.mergeable, libc::MADV_MERGEABLE),
        (flags.sequential, libc::MADV_SEQUENTIAL),
        (flags.random, libc::MADV_RANDOM),
    ];
    let wanted = advice.into_iter().filter(|(wanted, _)| *wanted);
    wanted.map(|(_, advice)| advice)
}

/// Reads a piece to its place.
pub fn write(piece: &Sourced, at: u64, program: &mut Program) {
    let (descriptor, offset) = piece.from;
    // All at once costs less than a fault for each page. Unknown before Linux 5.14.
    let populate = libc::MADV_POPULATE_WRITE as u64;
    program
        .call(libc::SYS_madvise, [at, piece.length, populate])
        .or_not();
    program.call(libc::SYS_pread64, [descriptor, at, piece.length, offset]);
    program.exactly(piece.length);
}

/// A mapping that was filled gets its own protection.
pub fn protect(place: &Placed, mapping: &Mapping, pieces: &[Sourced], program: &mut Program) {
    let protection = u64::from(mapping.protection);
    if !pieces.is_empty() && protection != READ_WRITE {
        program.call(libc::SYS_mprotect, [place.at, place.length, protection]);
    }
}

/// Guard pages of a mapping that lies at `at`, once everything is written. A copy of the memory and a move
/// of it keep them.
pub fn guard(at: u64, mapping: &Mapping, pid: i32, region: &mut Region, program: &mut Program) {
    if mapping.guards.is_empty() {
        return;
    }
    program.about(region.sentence(format!(
        "making guard pages in {:#x}-{:#x} of process {pid} (MADV_GUARD_INSTALL, from kernel 6.13 on and for files from 6.15 on)",
        mapping.start, mapping.end
    )));
    for (start, end) in mapping.guards_at(at) {
        program.call(libc::SYS_madvise, [start, end - start, MADV_GUARD_INSTALL]);
    }
}

/// Ranges of 2 MiB that are nearly full: a clone copies one entry for each instead of 512. Looks at
/// what is stored only, since a mapping may be as large as the address space.
fn worth_huge_pages(place: &Placed, mapping: &Mapping, pieces: &[&Piece]) -> Vec<u64> {
    let mut stored: BTreeMap<u64, u64> = BTreeMap::new();
    for piece in pieces {
        let (mut at, end) = (
            piece.address - mapping.start + place.at,
            piece.address + piece.length - mapping.start + place.at,
        );
        while at < end {
            let next = (at - at % HUGE + HUGE).min(end);
            *stored.entry(at - at % HUGE).or_default() += (next - at) / PAGE;
            at = next;
        }
    }
    let inside = |at: u64| place.at <= at && at + HUGE <= place.at + place.length;
    let worth = stored.into_iter();
    let worth = worth.filter(|(at, pages)| inside(*at) && *pages >= HUGE_WORTH);
    worth.map(|(at, _)| at).collect()
}

/// Opens a file to read; the descriptor is in slot 0.
pub fn open(path: &str, region: &mut Region, program: &mut Program) {
    open_for(path, libc::O_RDONLY, region, program);
}

fn open_for(path: &str, access: i32, region: &mut Region, program: &mut Program) {
    let text = region.put_text(path);
    let here = libc::AT_FDCWD as u64;
    program
        .call(libc::SYS_openat, [here, text, access as u64, 0])
        .into(0);
}

fn sharing(shared: bool) -> u64 {
    match shared {
        true => libc::MAP_SHARED as u64,
        false => libc::MAP_PRIVATE as u64,
    }
}

/// Walks page runs and extents side by side.
struct Pages<'a> {
    extents: &'a [Extent],
    first: u64,
}

impl Pages<'_> {
    fn of(&mut self, runs: &[PageRun]) -> Result<Vec<Piece>, PlanError> {
        let mut pieces = Vec::new();
        for run in runs {
            let mut done = 0;
            while done < run.pages {
                let extent = self.extent().ok_or(PlanError::Pages)?;
                let skipped = self.first - extent.first_page;
                let pages = (extent.pages - skipped).min(run.pages - done);
                pieces.push(Piece {
                    address: run.start + done * PAGE,
                    length: pages * PAGE,
                    offset: match extent.source {
                        Source::Zero => None,
                        Source::Data { offset } => Some(offset + skipped * PAGE),
                    },
                });
                done += pages;
                self.first += pages;
            }
        }
        Ok(pieces)
    }

    fn extent(&self) -> Option<&Extent> {
        let after = self
            .extents
            .partition_point(|extent| extent.first_page <= self.first);
        let extent = self.extents.get(after.checked_sub(1)?)?;
        (self.first < extent.first_page + extent.pages).then_some(extent)
    }
}
