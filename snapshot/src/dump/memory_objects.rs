//! Memory objects: which mappings and descriptors of the tree are of one, and what it holds.
//!
//! An object is known by device and inode of the file behind it. That of a mapping is reached
//! through /proc/PID/map_files, which leads to it whether it has a path or not.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::libc;
use nix::unistd::Whence;
use trenv_pool::{PAGE_SIZE, TemplateWriter};

use super::{DumpError, memory, sysv};
use crate::manifest::{
    MOST_MEMORY_OBJECTS, Mapping, MappingKind, MemoryKind, MemoryObject, PAGE, PageRun,
};

/// Bytes that one deleted file on a disk may hold: they are copied at each start.
const MOST_UNLINKED: u64 = 64 << 20;
/// Bytes of a memfd's name that are kept (memfd_create(2) takes 249).
const MOST_NAME: usize = 200;
const O_TMPFILE: u32 = (libc::O_TMPFILE & !libc::O_DIRECTORY) as u32;
const F_SEAL_FUTURE_WRITE: u32 = 0x10;

/// The objects found so far.
#[derive(Debug, Default)]
pub struct MemoryObjects {
    found: Vec<Found>,
    by_inode: BTreeMap<(u64, u64), usize>,
}

#[derive(Debug)]
struct Found {
    file: File,
    /// Link in /proc, and the root directory that it begins at.
    link: String,
    root: PathBuf,
    what: String,
    /// Nobody can write to it: it is only mapped privately.
    private: bool,
    nameable: bool,
    written_through_mapping: bool,
    segment: Option<sysv::Segment>,
    /// Its path, of a file in a tmpfs.
    tmpfs: Option<String>,
}

/// Another name that a deleted file has in the directory where it was: sem_open(3) makes a file
/// under a name of its own and links it to the wanted one.
pub fn other_name(file: &File, link: &str, host: i32) -> Option<String> {
    let meta = file.metadata().ok().filter(|meta| meta.nlink() > 0)?;
    let directory = Path::new(link).parent()?;
    let inside = directory.strip_prefix("/").ok()?;
    let list = std::fs::read_dir(Path::new(&format!("/proc/{host}/root")).join(inside)).ok()?;
    let same = list.flatten().find(|entry| {
        let other = entry.metadata();
        other.is_ok_and(|other| (other.dev(), other.ino()) == (meta.dev(), meta.ino()))
    })?;
    let name = directory.join(same.file_name());
    name.into_os_string().into_string().ok()
}

/// Opens what a mapping is of.
pub fn mapped_file(host: i32, start: u64, end: u64) -> std::io::Result<File> {
    File::open(format!("/proc/{host}/map_files/{start:x}-{end:x}"))
}

/// Nobody but those who have it mapped reads what is of memfd_secret(2), which cannot even be opened again.
fn check_readable(link: &str, what: &str) -> Result<(), DumpError> {
    match link.starts_with("/secretmem") {
        true => Err(DumpError::Refused(format!(
            "{what} is secret memory ({link})"
        ))),
        false => Ok(()),
    }
}

impl MemoryObjects {
    /// The object behind a mapping.
    pub fn of_mapping(
        &mut self,
        host: i32,
        link: &str,
        mapping: &Mapping,
        what: &str,
    ) -> Result<usize, DumpError> {
        let MappingKind::Object { shared, .. } = mapping.kind else {
            return Err(DumpError::Refused(format!("{what} is of an unknown kind")));
        };
        check_readable(link, what)?;
        let file = mapped_file(host, mapping.start, mapping.end).map_err(|_| {
            DumpError::Refused(format!("{what} maps a file that can no longer be read"))
        })?;
        let index = self.add(file, link, host, what)?;
        let found = &mut self.found[index];
        found.private &= !shared;
        found.written_through_mapping |= shared && mapping.protection & 2 != 0;
        Ok(index)
    }

    /// The object behind a descriptor.
    pub fn of_descriptor(
        &mut self,
        copy: &OwnedFd,
        flags: u32,
        link: &str,
        host: i32,
        what: &str,
    ) -> Result<usize, DumpError> {
        check_readable(link, what)?;
        // It may have been opened to be written only.
        let path = format!("/proc/self/fd/{}", copy.as_raw_fd());
        let file = File::open(&path).map_err(DumpError::io(format!("opening {what}")))?;
        let index = self.add(file, link, host, what)?;
        let found = &mut self.found[index];
        found.private = false;
        found.nameable |= flags & O_TMPFILE != 0;
        Ok(index)
    }

    /// SysV segments, whether they are attached or not.
    pub fn of_segments(&mut self, segments: Vec<sysv::Segment>) -> Result<(), DumpError> {
        for segment in segments {
            let what = format!("SysV shared memory {}", segment.id);
            let file = segment.file.try_clone();
            let file = file.map_err(DumpError::io(format!("looking at {what}")))?;
            let index = self.add(file, "", 0, &what)?;
            self.found[index].segment = Some(segment);
        }
        Ok(())
    }

    /// A large file of a tmpfs, by its path in the sandbox.
    pub fn of_tmpfs(&mut self, file: File, path: &str, host: i32) -> Result<(), DumpError> {
        let index = self.add(file, path, host, path)?;
        self.found[index].tmpfs = Some(path.to_owned());
        Ok(())
    }

    /// A segment can only be mapped as a whole.
    pub fn check_attached(&self, id: i32, mapping: &Mapping, what: &str) -> Result<(), DumpError> {
        let segments = self.found.iter().filter_map(|found| found.segment.as_ref());
        let mut segments = segments.filter(|segment| segment.id == id);
        let length = mapping.end - mapping.start;
        let whole = |segment: &sysv::Segment| segment.size.next_multiple_of(PAGE) == length;
        let access = mapping.protection & 1 != 0;
        if segments.next().is_some_and(whole) && access {
            return Ok(());
        }
        Err(DumpError::Refused(format!(
            "{what} is a part of SysV shared memory {id}"
        )))
    }

    fn add(&mut self, file: File, link: &str, host: i32, what: &str) -> Result<usize, DumpError> {
        let meta = file
            .metadata()
            .map_err(DumpError::io(format!("looking at {what}")))?;
        if !meta.is_file() {
            return Err(DumpError::Refused(format!(
                "{what} maps a deleted device ({link})"
            )));
        }
        if let Some(index) = self.by_inode.get(&(meta.dev(), meta.ino())) {
            return Ok(*index);
        }
        if self.found.len() >= MOST_MEMORY_OBJECTS {
            return Err(DumpError::Refused(format!(
                "it has more than {MOST_MEMORY_OBJECTS} shared memory objects and deleted files"
            )));
        }
        let index = self.found.len();
        self.by_inode.insert((meta.dev(), meta.ino()), index);
        self.found.push(Found {
            file,
            link: link.to_owned(),
            root: PathBuf::from(format!("/proc/{host}/root")),
            what: what.to_owned(),
            private: true,
            nameable: false,
            written_through_mapping: false,
            segment: None,
            tmpfs: None,
        });
        Ok(index)
    }

    /// Describes every object, after every process was looked at.
    pub fn describe(&self) -> Result<Vec<MemoryObject>, DumpError> {
        self.found.iter().map(Found::describe).collect()
    }

    /// Writes the objects' pages and notes their runs; returns their bytes.
    pub fn store(
        &self,
        described: &mut [MemoryObject],
        writer: &mut TemplateWriter,
    ) -> Result<u64, DumpError> {
        let mut bytes = 0;
        for (found, object) in self.found.iter().zip(described) {
            let doing = || format!("reading the bytes of {}", found.what);
            for run in found.data(object.size).map_err(DumpError::errno(doing()))? {
                let mut at = run.start;
                let end = run.start + run.pages * PAGE;
                let mut buffer = vec![0u8; memory::BATCH as usize * PAGE_SIZE];
                while at < end {
                    let length = (end - at).min(buffer.len() as u64) as usize;
                    let part = &mut buffer[..length];
                    part.fill(0);
                    read_to_end(&found.file, part, at).map_err(DumpError::io(doing()))?;
                    for page in part.chunks_exact(PAGE_SIZE) {
                        writer.page(page)?;
                    }
                    at += length as u64;
                }
                bytes += run.pages * PAGE;
                object.pages.push(run);
            }
        }
        Ok(bytes)
    }
}

impl Found {
    fn describe(&self) -> Result<MemoryObject, DumpError> {
        let what = &self.what;
        let refuse = |why: &str| Err(DumpError::Refused(format!("{what} {why} ({})", self.link)));
        let meta = self
            .file
            .metadata()
            .map_err(DumpError::io(format!("looking at {what}")))?;
        let kind = rustix::fs::fstatfs(&self.file)
            .map_err(|errno| DumpError::Io {
                doing: format!("looking at {what}"),
                source: errno.into(),
            })?
            .f_type;
        if kind == libc::HUGETLBFS_MAGIC {
            return refuse("uses huge TLB pages");
        }
        if let Some(segment) = &self.segment {
            return Ok(MemoryObject {
                size: segment.size,
                mode: segment.mode,
                uid: segment.uid,
                gid: segment.gid,
                kind: MemoryKind::Segment {
                    id: segment.id,
                    key: segment.key,
                    locked: segment.locked,
                },
                pages: Vec::new(),
            });
        }
        let named = meta.nlink() > 0 && self.tmpfs.is_none();
        if named && !self.private && !self.link.starts_with("/memfd:") {
            return refuse("is a deleted file that has another name");
        }
        if let Some(path) = &self.tmpfs {
            return Ok(MemoryObject {
                size: meta.size(),
                mode: meta.mode() & 0o7777,
                uid: meta.uid(),
                gid: meta.gid(),
                kind: MemoryKind::Tmpfs { path: path.clone() },
                pages: Vec::new(),
            });
        }
        let in_memory = kind == libc::TMPFS_MAGIC && !self.nameable;
        let kind = if in_memory || self.private {
            let seals = match in_memory {
                true => nix::fcntl::fcntl(self.file.as_fd(), nix::fcntl::FcntlArg::F_GET_SEALS)
                    .unwrap_or(0) as u32,
                false => 0,
            };
            if seals & F_SEAL_FUTURE_WRITE != 0 && self.written_through_mapping {
                return refuse("is sealed against future writes, but written through a mapping");
            }
            MemoryKind::Memory {
                name: self.name(),
                seals,
            }
        } else {
            if meta.size() > MOST_UNLINKED {
                return refuse(&format!(
                    "is a deleted file of more than {} MiB",
                    MOST_UNLINKED >> 20
                ));
            }
            MemoryKind::Unlinked {
                directory: self.directory(),
                nameable: self.nameable,
            }
        };
        Ok(MemoryObject {
            size: meta.size(),
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            kind,
            pages: Vec::new(),
        })
    }

    fn name(&self) -> String {
        let link = self.link.strip_suffix(" (deleted)").unwrap_or(&self.link);
        let name = match link.strip_prefix("/memfd:") {
            Some(name) => name,
            None => link.rsplit('/').next().unwrap_or(link),
        };
        let kept = name.char_indices().take_while(|(at, _)| *at < MOST_NAME);
        kept.map(|(_, letter)| letter).collect()
    }

    /// The directory that the file was in, or the nearest above it that is still there.
    fn directory(&self) -> String {
        let above = Path::new(&self.link).ancestors().skip(1);
        let mut there = above.filter(|directory| {
            let inside = directory.strip_prefix("/").unwrap_or(directory);
            self.root.join(inside).is_dir()
        });
        let directory = there.next().unwrap_or(Path::new("/"));
        directory.to_string_lossy().into_owned()
    }

    /// Runs of pages that are no holes (lseek(2), SEEK_DATA).
    fn data(&self, size: u64) -> nix::Result<Vec<PageRun>> {
        let mut runs: Vec<PageRun> = Vec::new();
        let mut at = 0;
        while at < size {
            let seek = |from: u64, how| nix::unistd::lseek(self.file.as_fd(), from as i64, how);
            let start = match seek(at, Whence::SeekData) {
                Ok(start) => start as u64,
                Err(nix::errno::Errno::ENXIO) => break,
                Err(errno) => return Err(errno),
            };
            let end = seek(start, Whence::SeekHole)? as u64;
            // A file system may count in smaller blocks than pages.
            let start = (start / PAGE * PAGE).max(at);
            let end = end.next_multiple_of(PAGE);
            memory::append(&mut runs, start, (end - start) / PAGE);
            at = end;
        }
        Ok(runs)
    }
}

fn read_to_end(file: &File, part: &mut [u8], at: u64) -> std::io::Result<()> {
    let mut done = 0;
    while done < part.len() {
        match file.read_at(&mut part[done..], at + done as u64)? {
            0 => break,
            got => done += got,
        }
    }
    Ok(())
}
