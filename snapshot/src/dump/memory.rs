//! Pages of a stopped tree, into the pool.
//!
//! A page is stored when the process has a copy of its own: all pages of anonymous memory, which may be
//! mapped from the pool's device and count as a file's then, and those pages of a private file mapping
//! that it wrote. Memory is read through /proc/PID/mem, which reaches regions
//! without any access right too (V8's and Go's reservations hold data behind PROT_NONE), but no guard
//! pages (MADV_GUARD_INSTALL): these are noted with their mappings.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use trenv_pool::{PAGE_SIZE, TemplateWriter};

use super::{DumpError, StoppedTree};
use crate::manifest::{Manifest, Mapping, MappingKind, PAGE, PageRun};

/// Pages read at once.
pub const BATCH: u64 = 256;

/// Writes every process's pages in the manifest's order and notes their runs there.
pub(super) fn store(
    tree: &StoppedTree,
    manifest: &mut Manifest,
    writer: &mut TemplateWriter,
) -> Result<u64, DumpError> {
    let hosts = super::process::host_pids(tree.threads.keys().copied(), manifest)?;
    let mut bytes = 0;
    let mut buffer = vec![0u8; BATCH as usize * PAGE_SIZE];
    for (process, host) in manifest.processes.iter_mut().zip(hosts) {
        let memory = open(host, "mem")?;
        let map = open(host, "pagemap")?;
        for mapping in &mut process.mappings {
            let held = look(&map, mapping)?;
            mapping.guards = held.guards;
            for run in held.own {
                let mut at = run.start;
                let end = run.start + run.pages * PAGE;
                while at < end {
                    let length = (end - at).min(BATCH * PAGE) as usize;
                    memory
                        .read_exact_at(&mut buffer[..length], at)
                        .map_err(DumpError::io(format!(
                            "reading memory at {at:#x} of process {}",
                            process.pid
                        )))?;
                    for page in buffer[..length].chunks_exact(PAGE_SIZE) {
                        writer.page(page)?;
                    }
                    at += length as u64;
                }
                bytes += run.pages * PAGE;
                process.pages.push(run);
            }
        }
    }
    Ok(bytes)
}

fn open(host: i32, name: &str) -> Result<File, DumpError> {
    let path = format!("/proc/{host}/{name}");
    File::open(&path).map_err(DumpError::io(format!("opening {path}")))
}

/// Runs of pages that the process has a copy of its own of.
pub fn own_pages(map: &File, mapping: &Mapping) -> Result<Vec<PageRun>, DumpError> {
    Ok(look(map, mapping)?.own)
}

/// What a process has in a mapping.
#[derive(Debug, Default, PartialEq, Eq)]
struct Held {
    /// Runs of pages that it has a copy of its own of.
    own: Vec<PageRun>,
    /// Runs of guard pages.
    guards: Vec<PageRun>,
}

fn look(map: &File, mapping: &Mapping) -> Result<Held, DumpError> {
    let stored = match mapping.kind {
        MappingKind::Vdso | MappingKind::Vvar | MappingKind::Generation => {
            return Ok(Held::default());
        }
        // These come back empty by their meaning: sibling clones must not share their bytes.
        _ if mapping.flags.droppable || mapping.flags.wipe_on_fork => false,
        MappingKind::Anonymous
        | MappingKind::File { .. }
        | MappingKind::Object { shared: false, .. }
        | MappingKind::AtStart { shared: false, .. } => true,
        MappingKind::Object { .. }
        | MappingKind::AtStart { .. }
        | MappingKind::Segment { .. }
        | MappingKind::SharedReadOnly { .. } => false,
    };
    let wanted = mapping.start..mapping.end;
    let files = mapping.kind == MappingKind::Anonymous;
    let categories = match stored {
        true => PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        false => PAGE_IS_SWAPPED,
    };
    let mut held = Held::default();
    match scan(map, wanted.clone(), categories, files) {
        Ok(found) => {
            for (run, swapped) in found {
                match swapped {
                    // Guards are among these, for kernels that tell them apart and for those that do not.
                    true => read_map(
                        map,
                        run.start..run.start + run.pages * PAGE,
                        files,
                        &mut held,
                    )?,
                    false => append(&mut held.own, run.start, run.pages),
                }
            }
        }
        // Before kernel 6.7, and so before there were guards.
        Err(Errno::ENOTTY | Errno::EINVAL) if stored => read_map(map, wanted, files, &mut held)?,
        Err(Errno::ENOTTY | Errno::EINVAL) => {}
        Err(errno) => return Err(DumpError::errno("scanning the page map")(errno)),
    }
    if !stored {
        held.own.clear();
    }
    Ok(held)
}

/// struct pm_scan_arg of PAGEMAP_SCAN (kernel: include/uapi/linux/fs.h, 6.7 and later).
#[repr(C)]
#[derive(Default)]
struct ScanArgs {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    region_count: u64,
    most_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_any_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
nix::ioctl_readwrite!(pagemap_scan, b'f', 16, ScanArgs);

/// Pages of any of these categories, and whether they are swapped; those that count as a file's only
/// with `files`.
fn scan(
    map: &File,
    range: std::ops::Range<u64>,
    categories: u64,
    files: bool,
) -> nix::Result<Vec<(PageRun, bool)>> {
    let not_of_file = if files { 0 } else { PAGE_IS_FILE };
    let mut runs = Vec::new();
    let mut regions = vec![Region::default(); 512];
    let mut from = range.start;
    while from < range.end {
        let mut args = ScanArgs {
            size: size_of::<ScanArgs>() as u64,
            start: from,
            end: range.end,
            regions: regions.as_mut_ptr() as u64,
            region_count: regions.len() as u64,
            category_inverted: not_of_file,
            category_mask: not_of_file,
            category_any_mask: categories,
            return_mask: PAGE_IS_SWAPPED,
            ..ScanArgs::default()
        };
        // SAFETY: the kernel writes at most `region_count` regions to the vector.
        let found = unsafe { pagemap_scan(map.as_raw_fd(), &raw mut args)? };
        for region in &regions[..usize::try_from(found).unwrap_or_default()] {
            let run = PageRun {
                start: region.start,
                pages: (region.end - region.start) / PAGE,
            };
            runs.push((run, region.categories & PAGE_IS_SWAPPED != 0));
        }
        if args.walk_end <= from {
            break;
        }
        from = args.walk_end;
    }
    Ok(runs)
}

/// Adds what /proc/PID/pagemap tells of (kernel: Documentation/admin-guide/mm/pagemap.rst).
fn read_map(
    map: &File,
    range: std::ops::Range<u64>,
    files: bool,
    held: &mut Held,
) -> Result<(), DumpError> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const FILE: u64 = 1 << 61;
    let mut entries = vec![0u8; 64 << 10];
    let mut at = range.start;
    while at < range.end {
        let pages = ((range.end - at) / PAGE).min(entries.len() as u64 / 8);
        let part = &mut entries[..pages as usize * 8];
        map.read_exact_at(part, at / PAGE * 8)
            .map_err(DumpError::io("reading the page map"))?;
        for (index, entry) in part.chunks_exact(8).enumerate() {
            let entry = u64::from_ne_bytes(entry.try_into().unwrap_or_default());
            let page = at + index as u64 * PAGE;
            if entry & SWAPPED != 0 && is_guard(entry) {
                append(&mut held.guards, page, 1);
            } else if entry & (PRESENT | SWAPPED) != 0 && (files || entry & FILE == 0) {
                append(&mut held.own, page, 1);
            }
        }
        at += pages * PAGE;
    }
    Ok(())
}

/// Whether the entry of a page that is not there is that of a guard. From kernel 6.15 on a bit says so;
/// from 6.13 on it is a marker among the swap entries (kernel: include/linux/swapops.h), and type and
/// offset tell.
fn is_guard(entry: u64) -> bool {
    const GUARD: u64 = 1 << 58;
    const TYPE: u64 = 0x1f;
    const OFFSET: u64 = (1 << 50) - 1;
    const MARKER: u64 = TYPE;
    const OF_GUARD: u64 = 1 << 2;
    entry & GUARD != 0 || entry & TYPE == MARKER && entry >> 5 & OFFSET == OF_GUARD
}

pub fn append(runs: &mut Vec<PageRun>, start: u64, pages: u64) {
    match runs.last_mut() {
        Some(last) if last.start + last.pages * PAGE == start => last.pages += pages,
        _ => runs.push(PageRun { start, pages }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::MappingFlags;

    /// Four pages of anonymous memory.
    fn four_pages() -> u64 {
        let length = std::num::NonZeroUsize::new(4 * PAGE_SIZE).unwrap();
        // SAFETY: a fresh anonymous mapping.
        let at = unsafe {
            nix::sys::mman::mmap_anonymous(
                None,
                length,
                nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE,
                nix::sys::mman::MapFlags::MAP_PRIVATE,
            )
        };
        at.unwrap().as_ptr() as u64
    }

    fn write(at: u64, pages: usize) {
        // SAFETY: the caller's mapping has these pages.
        unsafe { (at as *mut u8).write_bytes(7, pages * PAGE_SIZE) };
    }

    fn run(start: u64, pages: u64) -> PageRun {
        PageRun { start, pages }
    }

    fn mapping(start: u64, flags: MappingFlags) -> Mapping {
        Mapping {
            start,
            end: start + 4 * PAGE,
            protection: 3,
            kind: MappingKind::Anonymous,
            flags,
            guards: Vec::new(),
        }
    }

    fn both(start: u64) -> [Held; 2] {
        let map = File::open("/proc/self/pagemap").unwrap();
        let mut read = Held::default();
        read_map(&map, start..start + 4 * PAGE, true, &mut read).unwrap();
        let looked = look(&map, &mapping(start, MappingFlags::default())).unwrap();
        [looked, read]
    }

    #[test]
    fn only_touched_pages_are_the_process_s_own() {
        let start = four_pages();
        write(start + PAGE, 2);
        for held in both(start) {
            assert_eq!(held.own, [run(start + PAGE, 2)]);
            assert_eq!(held.guards, []);
        }
    }

    #[test]
    fn guards_are_no_pages_to_store() {
        let start = four_pages();
        write(start, 3);
        let install = crate::plan::memory::MADV_GUARD_INSTALL as i32;
        // SAFETY: pages of the mapping that was just made, which nobody else has.
        let made = unsafe {
            nix::libc::madvise((start + PAGE) as *mut nix::libc::c_void, PAGE_SIZE, install)
        };
        if made != 0 {
            eprintln!("This kernel has no guard pages: nothing is tested.");
            return;
        }
        for held in both(start) {
            assert_eq!(held.own, [run(start, 1), run(start + 2 * PAGE, 1)]);
            assert_eq!(held.guards, [run(start + PAGE, 1)]);
        }
        let map = File::open("/proc/self/pagemap").unwrap();
        let empty = MappingFlags {
            wipe_on_fork: true,
            ..MappingFlags::default()
        };
        let held = look(&map, &mapping(start, empty)).unwrap();
        assert_eq!(
            (held.own, held.guards),
            (vec![], vec![run(start + PAGE, 1)])
        );
    }

    #[test]
    fn a_guard_is_told_from_a_swapped_page() {
        const SWAPPED: u64 = 1 << 62;
        // As kernels 6.18 and 6.13 have one.
        assert!(is_guard(SWAPPED | 1 << 58 | 4 << 5 | 31));
        assert!(is_guard(SWAPPED | 4 << 5 | 31));
        for other in [4 << 5, 4 << 5 | 1, 2 << 5 | 31, 31] {
            assert!(!is_guard(SWAPPED | other), "{other:#x}");
        }
    }

    #[test]
    fn memory_that_must_come_back_empty_is_not_stored() {
        let start = four_pages();
        write(start, 4);
        let map = File::open("/proc/self/pagemap").unwrap();
        let flags = MappingFlags {
            wipe_on_fork: true,
            ..MappingFlags::default()
        };
        assert_eq!(own_pages(&map, &mapping(start, flags)).unwrap(), Vec::new());
    }
}
