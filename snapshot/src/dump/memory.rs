//! Pages of a stopped tree, into the pool.
//!
//! A page is stored when the process has a copy of its own: all pages of anonymous memory, which may be
//! mapped from the pool's device and count as a file's then, and those pages of a private file mapping
//! that it wrote. Memory is read through /proc/PID/mem, which reaches regions
//! without any access right too (V8's and Go's reservations hold data behind PROT_NONE).

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

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
        for mapping in &process.mappings {
            for run in own_pages(&map, mapping)? {
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
    let wanted = match mapping.kind {
        // These come back empty by their meaning: sibling clones must not share their bytes.
        _ if mapping.flags.droppable || mapping.flags.wipe_on_fork => return Ok(Vec::new()),
        MappingKind::Anonymous
        | MappingKind::File { .. }
        | MappingKind::Object { shared: false, .. }
        | MappingKind::AtStart { shared: false, .. } => mapping.start..mapping.end,
        MappingKind::Object { .. } | MappingKind::AtStart { .. } | MappingKind::Segment { .. } => {
            return Ok(Vec::new());
        }
        MappingKind::SharedReadOnly { .. }
        | MappingKind::Vdso
        | MappingKind::Vvar
        | MappingKind::Generation => {
            return Ok(Vec::new());
        }
    };
    let files = mapping.kind == MappingKind::Anonymous;
    match scan(map, wanted.clone(), files) {
        Ok(runs) => Ok(runs),
        Err(nix::errno::Errno::ENOTTY | nix::errno::Errno::EINVAL) => read_map(map, wanted, files),
        Err(errno) => Err(DumpError::errno("scanning the page map")(errno)),
    }
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

/// Present and swapped pages; those that count as a file's only with `files`.
fn scan(map: &File, range: std::ops::Range<u64>, files: bool) -> nix::Result<Vec<PageRun>> {
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
            category_any_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT,
            ..ScanArgs::default()
        };
        // SAFETY: the kernel writes at most `region_count` regions to the vector.
        let found = unsafe { pagemap_scan(map.as_raw_fd(), &raw mut args)? };
        for region in &regions[..usize::try_from(found).unwrap_or_default()] {
            append(&mut runs, region.start, (region.end - region.start) / PAGE);
        }
        if args.walk_end <= from {
            break;
        }
        from = args.walk_end;
    }
    Ok(runs)
}

/// The same by /proc/PID/pagemap (kernel: Documentation/admin-guide/mm/pagemap.rst).
fn read_map(
    map: &File,
    range: std::ops::Range<u64>,
    files: bool,
) -> Result<Vec<PageRun>, DumpError> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const FILE: u64 = 1 << 61;
    let mut runs = Vec::new();
    let mut entries = vec![0u8; 64 << 10];
    let mut at = range.start;
    while at < range.end {
        let pages = ((range.end - at) / PAGE).min(entries.len() as u64 / 8);
        let part = &mut entries[..pages as usize * 8];
        map.read_exact_at(part, at / PAGE * 8)
            .map_err(DumpError::io("reading the page map"))?;
        for (index, entry) in part.chunks_exact(8).enumerate() {
            let entry = u64::from_ne_bytes(entry.try_into().unwrap_or_default());
            if entry & (PRESENT | SWAPPED) != 0 && (files || entry & FILE == 0) {
                append(&mut runs, at + index as u64 * PAGE, 1);
            }
        }
        at += pages * PAGE;
    }
    Ok(runs)
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

    /// A mapping of four pages of which the second and third were written.
    fn written_in_the_middle() -> (Vec<PageRun>, Vec<PageRun>, u64) {
        let length = std::num::NonZeroUsize::new(4 * PAGE_SIZE).unwrap();
        // SAFETY: a fresh anonymous mapping, written inside its bounds.
        let start = unsafe {
            let at = nix::sys::mman::mmap_anonymous(
                None,
                length,
                nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE,
                nix::sys::mman::MapFlags::MAP_PRIVATE,
            )
            .unwrap();
            at.cast::<u8>()
                .as_ptr()
                .add(PAGE_SIZE)
                .write_bytes(7, 2 * PAGE_SIZE);
            at.as_ptr() as u64
        };
        let map = File::open("/proc/self/pagemap").unwrap();
        let range = start..start + 4 * PAGE;
        (
            scan(&map, range.clone(), false).unwrap_or_default(),
            read_map(&map, range, false).unwrap(),
            start,
        )
    }

    #[test]
    fn only_touched_pages_are_the_process_s_own() {
        let (scanned, read, start) = written_in_the_middle();
        let expected = vec![PageRun {
            start: start + PAGE,
            pages: 2,
        }];
        assert_eq!(read, expected);
        // PAGEMAP_SCAN needs kernel 6.7.
        assert!(scanned == expected || scanned.is_empty());
    }

    #[test]
    fn memory_that_must_come_back_empty_is_not_stored() {
        let map = File::open("/proc/self/pagemap").unwrap();
        let mapping = Mapping {
            start: PAGE,
            end: 2 * PAGE,
            protection: 3,
            kind: MappingKind::Anonymous,
            flags: MappingFlags {
                wipe_on_fork: true,
                ..MappingFlags::default()
            },
        };
        assert_eq!(own_pages(&map, &mapping).unwrap(), Vec::new());
    }
}
