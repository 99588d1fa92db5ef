//! A template's stored pages as one dense file, by address: what rivals of `template` load from.
//!
//! The file has no name and goes with the last who has it open: it is derived from the pool, whose
//! pages are checked when it is made, and is made again when it is needed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::libc;
use trenv_pool::TemplateReader;

use crate::manifest::PAGE;
use crate::plan::skeleton::Area;
use crate::zygote::ZygoteError;

/// Bytes copied at once.
const PART: usize = 1 << 20;

/// Where an image lies.
#[derive(Debug, Clone, Copy)]
pub enum Store<'a> {
    Memory,
    /// In a file system, where pages can be in the page cache or not.
    Directory(&'a Path),
}

/// Stored pages that are neighbours in the address space, and so in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub at: u64,
    pub length: u64,
    pub offset: u64,
}

/// The dense file, mapped here.
#[derive(Debug)]
pub struct Image {
    file: File,
    map: Mapped,
    pub areas: Vec<Area>,
    /// Pages of anonymous memory, by address.
    pub parts: Vec<Part>,
    /// Pages of file mappings that the process has of its own: userfaultfd(2) does not know these.
    pub own: Vec<Part>,
}

impl Image {
    /// The mapping that an address lies in.
    pub fn area(&self, at: u64) -> Option<&Area> {
        let after = self.areas.partition_point(|area| area.at <= at);
        let area = self.areas.get(after.checked_sub(1)?)?;
        (at < area.at + area.length).then_some(area)
    }

    pub fn of(
        template: &TemplateReader,
        areas: Vec<Area>,
        store: Store<'_>,
    ) -> Result<Self, ZygoteError> {
        let doing = "copying the template's pages from the pool; is memory or disk space wanting?";
        let failed = |source| ZygoteError::Io {
            doing: doing.into(),
            source,
        };
        let (file, parts, own) = fill(template, &areas, store).map_err(failed)?;
        let length = parts.iter().chain(&own).map(|part| part.length).sum();
        let map = Mapped::of(file.as_fd(), length).map_err(failed)?;
        Ok(Self {
            file,
            map,
            areas,
            parts,
            own,
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where the page at an address lies in the image; none if it was never stored.
    pub fn offset(&self, at: u64) -> Option<u64> {
        offset(&self.parts, at)
    }

    /// The bytes from an offset on.
    pub fn from(&self, offset: u64) -> *const u8 {
        self.map.from(offset)
    }

    pub fn mapped(&self) -> &Mapped {
        &self.map
    }

    /// Takes the file out of the page cache.
    pub fn forget_cached(&self) {
        self.map.forget_cached(self.file.as_fd());
    }

    /// Writes the pages of file mappings into a process. A process may not write to all of them, and
    /// some lie where it may not even read.
    pub fn write_own_pages(&self, pid: i32) -> io::Result<u64> {
        self.write_parts(pid, &self.own)
    }

    /// Writes parts into the memory of a process.
    pub fn write_parts(&self, pid: i32, parts: &[Part]) -> io::Result<u64> {
        if parts.is_empty() {
            return Ok(0);
        }
        let memory = File::options()
            .write(true)
            .open(format!("/proc/{pid}/mem"))?;
        for part in parts {
            memory.write_all_at(self.map.bytes(part.offset, part.length), part.at)?;
        }
        Ok(parts.iter().map(|part| part.length / PAGE).sum())
    }
}

/// Looks an address up in parts that are ordered by address.
pub fn offset(parts: &[Part], at: u64) -> Option<u64> {
    let after = parts.partition_point(|part| part.at <= at);
    let part = parts.get(after.checked_sub(1)?)?;
    (at < part.at + part.length).then(|| part.offset + (at - part.at))
}

/// A file without a name.
pub fn nameless(store: Store<'_>) -> io::Result<File> {
    match store {
        Store::Memory => {
            let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
            Ok(nix::sys::memfd::memfd_create("trenv-image", flags).map(File::from)?)
        }
        // Also where there is no O_TMPFILE: overlayfs has it since kernel 6.3.
        Store::Directory(path) => tempfile::tempfile_in(path),
    }
}

fn fill(
    template: &TemplateReader,
    areas: &[Area],
    store: Store<'_>,
) -> io::Result<(File, Vec<Part>, Vec<Part>)> {
    let file = nameless(store)?;
    let (mut parts, mut own): (Vec<Part>, Vec<Part>) = (Vec::new(), Vec::new());
    let mut buffer = vec![0; PART];
    let mut end = 0;
    for area in areas {
        let list = if area.anonymous { &mut parts } else { &mut own };
        let first = list.len();
        for run in &area.runs {
            let mut done = 0;
            while let Some(from) = run.offset.filter(|_| done < run.length) {
                let length = (run.length - done).min(PART as u64);
                let buffer = &mut buffer[..length as usize];
                let read = template.read_at(buffer, from + done);
                read.map_err(io::Error::other)?;
                file.write_all_at(buffer, end + done)?;
                done += length;
            }
            // Neighbours of one area make one part. A run without an offset is a hole: zeroes.
            match list[first..].last_mut() {
                Some(last) if last.at + last.length == run.at => last.length += run.length,
                _ => list.push(Part {
                    at: run.at,
                    length: run.length,
                    offset: end,
                }),
            }
            end += run.length;
        }
    }
    file.set_len(end)?;
    if matches!(store, Store::Directory(_)) {
        // Only what is on disk can be put out of the page cache.
        file.sync_data()?;
    }
    // The image has the pages now; a second copy in the page cache serves nobody.
    if let Some(pool) = template.file() {
        // SAFETY: advice about a descriptor; no memory is passed.
        unsafe { libc::posix_fadvise(pool.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }
    Ok((file, parts, own))
}

/// A file, mapped to be read.
#[derive(Debug)]
pub struct Mapped {
    at: *mut libc::c_void,
    length: usize,
}

// SAFETY: the mapping is read-only and stays where it is until it is dropped.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    pub fn of(file: BorrowedFd<'_>, length: u64) -> io::Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        // An empty image has nothing to map; a page of it is never looked at.
        let length = usize::try_from(length.max(PAGE)).unwrap_or(usize::MAX);
        // SAFETY: a new mapping at a place of the kernel's choice.
        let at = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ,
                MapFlags::SHARED,
                file,
                0,
            )
        }?;
        Ok(Self { at, length })
    }

    pub fn from(&self, offset: u64) -> *const u8 {
        // SAFETY: offsets come from parts, which lie inside of the mapping.
        unsafe { self.at.cast::<u8>().add(offset as usize) }
    }

    pub fn length(&self) -> u64 {
        self.length as u64
    }

    pub fn bytes(&self, offset: u64, length: u64) -> &[u8] {
        // SAFETY: offsets come from parts, which lie inside of the mapping; nobody writes to the
        // file once it is filled.
        unsafe { std::slice::from_raw_parts(self.from(offset), length as usize) }
    }

    /// Brings all of it into memory and into this process's page tables, front to back.
    pub fn read_all(&self) {
        self.read(0, self.length as u64);
    }

    pub fn read(&self, offset: u64, length: u64) {
        // SAFETY: fills page tables of a mapping that stays.
        unsafe {
            libc::madvise(
                self.from(offset) as *mut libc::c_void,
                length as usize,
                libc::MADV_POPULATE_READ,
            );
        }
    }

    /// Takes the file, which is what is mapped, out of the page cache, but for what others have mapped.
    pub fn forget_cached(&self, file: BorrowedFd<'_>) {
        // SAFETY: pages of a shared file mapping come back from the file; the second is advice about a
        // descriptor.
        unsafe {
            libc::madvise(self.at, self.length, libc::MADV_DONTNEED);
            libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED);
        }
    }

    /// For each page, whether it is in the page cache (mincore(2)).
    pub fn cached(&self) -> Vec<bool> {
        let mut pages = vec![0u8; self.length.div_ceil(PAGE as usize)];
        // SAFETY: one byte for each page of a mapping that stays.
        let told = unsafe { libc::mincore(self.at, self.length, pages.as_mut_ptr()) };
        let told = told == 0;
        pages.iter().map(|page| told && page & 1 != 0).collect()
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: nobody uses the mapping any more.
        unsafe { libc::munmap(self.at, self.length) };
    }
}
