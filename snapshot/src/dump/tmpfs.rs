//! Contents of the sandbox's tmpfs mounts: what a program put there while it started.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::memory_objects::MemoryObjects;
use super::{DumpError, proc_text};
use crate::generation;
use crate::manifest::{TmpfsEntry, TmpfsKind};

/// Bytes that the small files of all tmpfs mounts may have together.
const MOST_BYTES: u64 = 4 << 20;
/// Bytes from which on a file is large: it goes to the pool.
const LARGE: u64 = 256 << 10;
/// Blocks of 512 bytes that large files may have together: they are copied at each start.
const MOST_BLOCKS: u64 = (128 << 20) / 512;

/// Reads the tmpfs trees that the process sees; /dev itself is the sandbox's own, and so is the
/// generation page.
pub fn read(host: i32, memory: &mut MemoryObjects) -> Result<Vec<TmpfsEntry>, DumpError> {
    let mounts = proc_text(&format!("/proc/{host}/mountinfo"))?;
    let mut found = Found {
        entries: Vec::new(),
        bytes: 0,
        blocks: 0,
        host,
        memory,
    };
    for line in mounts.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let Some(point) = left.split(' ').nth(4) else {
            continue;
        };
        let own = point == "/dev" || point.starts_with("/proc") || point.starts_with("/sys");
        if right.starts_with("tmpfs ") && !own {
            let root = format!("/proc/{host}/root");
            found.walk(Path::new(&format!("{root}{point}")), &root)?;
        }
    }
    Ok(found.entries)
}

struct Found<'a> {
    entries: Vec<TmpfsEntry>,
    bytes: u64,
    blocks: u64,
    host: i32,
    memory: &'a mut MemoryObjects,
}

impl Found<'_> {
    fn walk(&mut self, directory: &Path, root: &str) -> Result<(), DumpError> {
        let doing = || format!("reading {}", directory.display());
        let list = match std::fs::read_dir(directory) {
            Ok(list) => list,
            // A single file may be mounted over by a masking tmpfs.
            Err(err) if err.kind() == std::io::ErrorKind::NotADirectory => return Ok(()),
            Err(source) => {
                return Err(DumpError::Io {
                    doing: doing(),
                    source,
                });
            }
        };
        for entry in list {
            let path = entry.map_err(DumpError::io(doing()))?.path();
            let meta = path.symlink_metadata().map_err(DumpError::io(doing()))?;
            let name = path.to_string_lossy();
            let inside = name.strip_prefix(root).unwrap_or(&name).to_owned();
            if inside == generation::DIRECTORY || inside == generation::PATH {
                continue;
            }
            let kind = if meta.is_dir() {
                TmpfsKind::Directory
            } else if meta.is_symlink() {
                let target = std::fs::read_link(&path).map_err(DumpError::io(doing()))?;
                TmpfsKind::Link(target.to_string_lossy().into_owned())
            } else if meta.is_file() && meta.len() >= LARGE && meta.nlink() == 1 {
                self.blocks += meta.blocks();
                if self.blocks > MOST_BLOCKS {
                    return Err(DumpError::Refused(format!(
                        "the large files in its tmpfs mounts hold more than {} MiB ({inside})",
                        MOST_BLOCKS >> 11
                    )));
                }
                let file = std::fs::File::open(&path).map_err(DumpError::io(doing()))?;
                self.memory.of_tmpfs(file, &inside, self.host)?;
                TmpfsKind::File(Vec::new())
            } else if meta.is_file() {
                self.bytes += meta.len();
                if self.bytes > MOST_BYTES {
                    return Err(DumpError::Refused(format!(
                        "its tmpfs mounts hold more than {} MiB ({inside})",
                        MOST_BYTES >> 20
                    )));
                }
                TmpfsKind::File(std::fs::read(&path).map_err(DumpError::io(doing()))?)
            } else if meta.file_type().is_fifo() {
                TmpfsKind::Fifo
            } else if meta.file_type().is_socket() {
                TmpfsKind::Socket
            } else {
                return Err(DumpError::Refused(format!(
                    "{inside} is a special file in a tmpfs"
                )));
            };
            let walk = kind == TmpfsKind::Directory;
            self.entries.push(TmpfsEntry {
                path: inside,
                mode: meta.mode() & 0o7777,
                uid: meta.uid(),
                gid: meta.gid(),
                kind,
            });
            if walk {
                self.walk(&path, root)?;
            }
        }
        Ok(())
    }
}
