//! The program that fills a zygote's address space.

use nix::libc;
use trenv_pool::{Extent, Source};

use super::layout::{Placed, Placement, kernel_owned};
use super::region::{Program, Region};
use super::{PlanError, build_fd, process};
use crate::manifest::{Manifest, Mapping, MappingKind, PAGE, PageRun};

const HUGE: u64 = 2 << 20;
/// Pages of a huge page that must be stored for it to be worth one.
const HUGE_WORTH: u64 = 448;
const MADV_COLLAPSE: u64 = 25;
const MAP_DROPPABLE: u64 = 8;
const READ_WRITE: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;

/// A part of a page run that lies in one extent.
struct Piece {
    address: u64,
    length: u64,
    /// Offset in the pool; none for zero pages.
    offset: Option<u64>,
}

/// Builds the program; notes, as offsets in it, the words that hold addresses in the vdso block.
pub fn build(
    manifest: &Manifest,
    placement: &Placement,
    extents: &[Extent],
    control: u64,
    region: &mut Region,
    vdso_words: &mut Vec<u64>,
) -> Result<Program, PlanError> {
    let mut program = Program::default();
    move_vdso(manifest, placement, region, &mut program, vdso_words);
    let mut pages = Pages { extents, first: 0 };
    let pieces: Vec<Vec<Piece>> = manifest
        .processes
        .iter()
        .map(|process| pages.of(&process.pages))
        .collect::<Result<_, _>>()?;
    if pages.first
        != extents
            .last()
            .map_or(0, |extent| extent.first_page + extent.pages)
    {
        return Err(PlanError::Pages);
    }
    for place in &placement.placed {
        let process = &manifest.processes[place.process];
        let mapping = &process.mappings[place.mapping];
        if kernel_owned(mapping) {
            continue;
        }
        map(
            place,
            mapping,
            process.pid,
            &pieces[place.process],
            control,
            region,
            &mut program,
        );
    }
    let resident = &manifest.processes[placement.resident];
    program.about(region.sentence(format!("opening {}", resident.exe)));
    open(&resident.exe, region, &mut program);
    program
        .call(libc::SYS_dup3, [0, control + build_fd::EXE, 0])
        .from(0, 0);
    program.call(libc::SYS_close, [0]).from(0, 0);
    process::describe_memory(
        resident,
        Some(control + build_fd::EXE),
        region,
        &mut program,
    );
    let rest = u64::from(u32::MAX);
    program.call(libc::SYS_close_range, [control + build_fd::PAGES, rest, 0]);
    Ok(program)
}

/// The zygote's own vdso goes to where the resident process knows it.
fn move_vdso(
    manifest: &Manifest,
    placement: &Placement,
    region: &mut Region,
    program: &mut Program,
    vdso_words: &mut Vec<u64>,
) {
    let mappings = &manifest.processes[placement.resident].mappings;
    let Some(first) = mappings.iter().find(|mapping| kernel_owned(mapping)) else {
        return;
    };
    program.about(region.sentence("moving the vdso".into()));
    for mapping in mappings.iter().filter(|mapping| kernel_owned(mapping)) {
        let length = mapping.end - mapping.start;
        let how = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        // The first argument is completed by the loader, which knows where its own vdso lies.
        vdso_words.push(program.next_argument());
        let from = mapping.start - first.start;
        program.call(libc::SYS_mremap, [from, length, length, how, mapping.start]);
        program.exactly(mapping.start);
    }
}

fn map(
    place: &Placed,
    mapping: &Mapping,
    pid: i32,
    pieces: &[Piece],
    control: u64,
    region: &mut Region,
    program: &mut Program,
) {
    let wanted = format!(
        "mapping {:#x}-{:#x} of process {pid}",
        mapping.start, mapping.end
    );
    program.about(region.sentence(wanted));
    let inside: Vec<&Piece> = pieces
        .iter()
        .filter(|piece| mapping.start <= piece.address && piece.address < mapping.end)
        .collect();
    let protection = u64::from(mapping.protection);
    let first = if inside.is_empty() {
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
        MappingKind::Vdso | MappingKind::Vvar => return,
    }
    for (wanted, advice) in [
        (mapping.flags.dont_dump, libc::MADV_DONTDUMP),
        (mapping.flags.huge, libc::MADV_HUGEPAGE),
        (mapping.flags.no_huge, libc::MADV_NOHUGEPAGE),
        (mapping.flags.mergeable, libc::MADV_MERGEABLE),
    ] {
        if wanted {
            // Advice may be unknown to this kernel's configuration; it changes no meaning.
            program
                .call(libc::SYS_madvise, [place.at, place.length, advice as u64])
                .or_not();
        }
    }
    for piece in &inside {
        let at = place.at + (piece.address - mapping.start);
        let anonymous = mapping.kind == MappingKind::Anonymous;
        let (descriptor, offset) = match piece.offset {
            Some(offset) => (build_fd::PAGES, offset),
            // Fresh anonymous memory is zero already.
            None if anonymous => continue,
            None => (build_fd::ZERO, 0),
        };
        program.call(
            libc::SYS_pread64,
            [control + descriptor, at, piece.length, offset],
        );
        program.exactly(piece.length);
    }
    if mapping.kind == MappingKind::Anonymous && !mapping.flags.no_huge {
        for at in worth_huge_pages(place, mapping, &inside) {
            program
                .call(libc::SYS_madvise, [at, HUGE, MADV_COLLAPSE])
                .or_not();
        }
    }
    if first != protection {
        program.call(libc::SYS_mprotect, [place.at, place.length, protection]);
    }
}

/// Ranges of 2 MiB that are nearly full: a clone copies one entry for each instead of 512.
fn worth_huge_pages(place: &Placed, mapping: &Mapping, pieces: &[&Piece]) -> Vec<u64> {
    let mut found = Vec::new();
    let mut at = place.at.next_multiple_of(HUGE);
    while at + HUGE <= place.at + place.length {
        let (from, to) = (
            at - place.at + mapping.start,
            at - place.at + mapping.start + HUGE,
        );
        let stored: u64 = pieces
            .iter()
            .filter(|piece| piece.offset.is_some())
            .map(|piece| {
                (piece.address + piece.length)
                    .min(to)
                    .saturating_sub(piece.address.max(from))
                    / PAGE
            })
            .sum();
        if stored >= HUGE_WORTH {
            found.push(at);
        }
        at += HUGE;
    }
    found
}

/// Opens a file to read; the descriptor is in slot 0.
pub fn open(path: &str, region: &mut Region, program: &mut Program) {
    let text = region.put_text(path);
    let here = libc::AT_FDCWD as u64;
    program
        .call(libc::SYS_openat, [here, text, libc::O_RDONLY as u64, 0])
        .into(0);
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
