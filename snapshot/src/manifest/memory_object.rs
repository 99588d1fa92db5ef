//! Bytes that processes share and that no path leads to: shared anonymous memory, memfds, files that
//! were deleted while somebody had them.

use serde::{Deserialize, Serialize};

use super::{Manifest, ManifestError, MappingKind, ObjectKind, PAGE, PageRun};

/// Objects of one tree at most: a start holds each by a descriptor.
pub const MOST_MEMORY_OBJECTS: usize = trenv_restorer::wire::MAX_MEMORY_OBJECTS;
/// Above this no file system has a file (loff_t).
const MOST_BYTES: u64 = 1 << 62;
/// A segment is attached as a whole.
const MOST_SEGMENT: u64 = 1 << 40;

/// One such object, made anew for every instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryObject {
    pub size: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub kind: MemoryKind,
    /// Stored pages by their offsets in the object, in order; they follow those of the processes in
    /// the pool.
    pub pages: Vec<PageRun>,
}

/// Where the bytes are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryKind {
    /// In a memfd.
    Memory { name: String, seals: u32 },
    /// In a file of a tmpfs, which is there, empty.
    Tmpfs { path: String },
    /// In a SysV segment.
    Segment { id: i32, key: i32, locked: bool },
    /// In a file without a name, in the file system of a directory.
    Unlinked {
        directory: String,
        /// It may be given a name yet (O_TMPFILE of open(2)).
        nameable: bool,
    },
}

/// A set of SysV semaphores.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SemaphoreSet {
    pub id: i32,
    pub key: i32,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub values: Vec<u16>,
}

pub fn check(manifest: &Manifest) -> Result<(), ManifestError> {
    let wrong = |what: String| Err(ManifestError::Invalid { what });
    let count = manifest.memory.len();
    if count > MOST_MEMORY_OBJECTS {
        return wrong(format!("it has {count} memory objects"));
    }
    for (index, object) in manifest.memory.iter().enumerate() {
        let mut from = 0;
        let room = object.size.checked_next_multiple_of(PAGE);
        let most = match object.kind {
            MemoryKind::Segment { .. } => MOST_SEGMENT,
            _ => MOST_BYTES,
        };
        let Some(room) = room.filter(|room| *room <= most) else {
            return wrong(format!("the size of memory object {index}"));
        };
        for run in &object.pages {
            let bytes = run.pages.checked_mul(PAGE);
            let end = bytes.and_then(|bytes| run.start.checked_add(bytes));
            let Some(end) = end.filter(|end| {
                run.start % PAGE == 0 && run.pages > 0 && run.start >= from && *end <= room
            }) else {
                return wrong(format!("the pages of memory object {index}"));
            };
            from = end;
        }
    }
    for process in &manifest.processes {
        for mapping in &process.mappings {
            let fits = match mapping.kind {
                MappingKind::Object { object, offset, .. } => {
                    object < count && offset % PAGE == 0 && offset <= MOST_BYTES
                }
                MappingKind::Segment { id } => manifest.memory.iter().any(|object| {
                    matches!(object.kind, MemoryKind::Segment { id: other, .. } if other == id)
                }),
                MappingKind::AtStart { offset, .. } => offset % PAGE == 0,
                _ => true,
            };
            if !fits {
                let (pid, start) = (process.pid, mapping.start);
                return wrong(format!("what mapping {start:#x} of process {pid} maps"));
            }
        }
    }
    for set in &manifest.semaphores {
        if set.values.is_empty() || set.id < 0 {
            return wrong(format!("the SysV semaphores {}", set.id));
        }
    }
    for object in &manifest.objects {
        if let ObjectKind::Nameless { memory, .. } = object.kind
            && memory >= count
        {
            return wrong(format!("an open file of memory object {memory}"));
        }
    }
    Ok(())
}
