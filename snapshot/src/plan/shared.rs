//! Memory that instances must not share with the zygote: memory objects, and mappings of what is
//! only there when an instance is.
//!
//! A memory object is made for each clone, ahead of its start, and mapped there; processes that are
//! loaded map it by its descriptor. A file of a file system of the sandbox is made or opened at the
//! start. What they hold at first is copied from one file of pages that all clones have open.

use std::collections::BTreeMap;

use nix::libc;
use trenv_restorer::wire::fd;

use super::layout::{Placed, Placement};
use super::memory::{self, Copy, Pieces, Sourced};
use super::process::Tree;
use super::region::{Program, Region};
use super::sysv;
use crate::manifest::{Manifest, Mapping, MappingKind, MemoryKind, MemoryObject};

/// Bytes that one sendfile(2) moves at most.
const PART: u64 = 1 << 30;
const O_TMPFILE: u32 = libc::O_TMPFILE as u32;
/// Flags by which a file was opened once, and cannot be by its link in /proc.
const NOT_AGAIN: u32 = O_TMPFILE | libc::O_NOFOLLOW as u32;

/// When a mapping is made, but for processes that are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// With the zygote, once for all.
    Zygote,
    /// When a clone is made.
    Clone,
    /// At the start, when its file is there.
    Start,
}

impl When {
    pub fn of(mapping: &Mapping, manifest: &Manifest) -> Self {
        match mapping.kind {
            MappingKind::AtStart { .. } | MappingKind::Segment { .. } => Self::Start,
            MappingKind::Object { object, .. } => match manifest.memory[object].kind {
                MemoryKind::Memory { .. } => Self::Clone,
                MemoryKind::Unlinked { .. }
                | MemoryKind::Segment { .. }
                | MemoryKind::Tmpfs { .. } => Self::Start,
            },
            _ => Self::Zygote,
        }
    }
}

/// What is to be copied, and where it is in the file of pages.
#[derive(Debug)]
pub struct Shared {
    copies: Vec<Copy>,
    end: u64,
    /// The pieces of each object, by their offsets in it.
    objects: Vec<Vec<Sourced>>,
    /// The own pages of private mappings, by process and mapping.
    own: BTreeMap<(usize, usize), Vec<Sourced>>,
}

impl Shared {
    pub fn of(manifest: &Manifest, placement: &Placement, pieces: &Pieces, control: u64) -> Self {
        let mut shared = Self {
            copies: Vec::new(),
            end: 0,
            objects: Vec::new(),
            own: BTreeMap::new(),
        };
        for pieces in &pieces.objects {
            // What is not written reads as zeroes.
            let stored = pieces.iter().filter(|piece| piece.offset.is_some());
            let sourced = stored.map(|piece| shared.take(piece, control)).collect();
            shared.objects.push(sourced);
        }
        for place in &placement.placed {
            let mapping = &manifest.processes[place.process].mappings[place.mapping];
            if When::of(mapping, manifest) != When::Zygote {
                let own = memory::inside(mapping, &pieces.processes[place.process]);
                let sourced = own.map(|piece| shared.take(piece, control)).collect();
                shared.own.insert((place.process, place.mapping), sourced);
            }
        }
        shared
    }

    /// Gives a piece its place in the file of pages; a hole there reads as zeroes.
    fn take(&mut self, piece: &memory::Piece, control: u64) -> Sourced {
        let at = self.end;
        self.end += piece.length;
        self.copies.extend(piece.offset.map(|from| Copy {
            from,
            to: at,
            length: piece.length,
        }));
        Sourced {
            address: piece.address,
            length: piece.length,
            from: (control + fd::CONTENT, at),
        }
    }

    /// What to copy from the pool into the file of pages.
    pub fn content(self) -> Vec<Copy> {
        self.copies
    }

    /// Steps of a clone, ahead of its start: its memory objects, and what maps them.
    pub fn make_ahead(&self, tree: Tree<'_>, region: &mut Region, program: &mut Program) {
        for (index, object) in tree.manifest.memory.iter().enumerate() {
            let MemoryKind::Memory { name, seals } = &object.kind else {
                continue;
            };
            program.about(region.sentence(format!("making the shared memory {name:?}")));
            let name = region.put_text(name);
            let how = u64::from(libc::MFD_ALLOW_SEALING);
            program.call(libc::SYS_memfd_create, [name, how]).into(0);
            self.fill(index, object, tree.control, region, program);
            let number = tree.control + fd::MEMORY + index as u64;
            if *seals != 0 {
                program.about(region.sentence("sealing shared memory".into()));
                let add = libc::F_ADD_SEALS as u64;
                program.call(libc::SYS_fcntl, [number, add, u64::from(*seals)]);
            }
        }
        for place in &tree.placement.placed {
            self.map(place, place.at, When::Clone, tree, region, program);
        }
    }

    /// Steps of the tree's root: files without a name in file systems of the sandbox.
    pub fn make_unlinked(&self, tree: Tree<'_>, region: &mut Region, program: &mut Program) {
        let here = libc::AT_FDCWD as u64;
        for (index, object) in tree.manifest.memory.iter().enumerate() {
            let MemoryKind::Unlinked {
                directory,
                nameable,
            } = &object.kind
            else {
                continue;
            };
            program.about(region.sentence(format!("making a deleted file of {directory}")));
            let access = libc::O_RDWR as u64;
            if *nameable {
                let path = region.put_text(directory);
                let how = access | u64::from(O_TMPFILE);
                program
                    .call(libc::SYS_openat, [here, path, how, 0o600])
                    .into(0);
            } else {
                let directory = directory.trim_end_matches('/');
                let path = region.put_text(&format!("{directory}/.trenv-deleted-{index}"));
                let how = access | (libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW) as u64;
                program
                    .call(libc::SYS_openat, [here, path, how, 0o600])
                    .into(0);
                program.call(libc::SYS_unlinkat, [here, path, 0]);
            }
            self.fill(index, object, tree.control, region, program);
        }
    }

    /// Steps of the tree's root: the bytes of large files in a tmpfs.
    pub fn fill_tmpfs(&self, tree: Tree<'_>, region: &mut Region, program: &mut Program) {
        for (index, object) in tree.manifest.memory.iter().enumerate() {
            if let MemoryKind::Tmpfs { path } = &object.kind {
                program.about(region.sentence(format!("filling {path}")));
                let path = region.put_text(path);
                let (here, how) = (libc::AT_FDCWD as u64, libc::O_RDWR | libc::O_NOFOLLOW);
                program
                    .call(libc::SYS_openat, [here, path, how as u64, 0])
                    .into(0);
                self.fill(index, object, tree.control, region, program);
            }
        }
    }

    /// Steps of the tree's root: SysV shared memory and semaphores.
    pub fn make_sysv(&self, tree: Tree<'_>, region: &mut Region, program: &mut Program) {
        let pieces = |index: usize| {
            let pieces = self.objects[index].iter();
            pieces
                .map(|piece| (piece.address, piece.from.1, piece.length))
                .collect()
        };
        sysv::make(tree, pieces, region, program);
    }

    /// Fills the file in slot 0 and puts it in its place.
    fn fill(
        &self,
        index: usize,
        object: &MemoryObject,
        control: u64,
        region: &mut Region,
        program: &mut Program,
    ) {
        let number = control + fd::MEMORY + index as u64;
        program.call(libc::SYS_dup3, [0, number, 0]).from(0, 0);
        program.call(libc::SYS_close, [0]).from(0, 0);
        for piece in &self.objects[index] {
            let (source, from) = piece.from;
            program.call(
                libc::SYS_lseek,
                [number, piece.address, libc::SEEK_SET as u64],
            );
            program.exactly(piece.address);
            let mut done = 0;
            while done < piece.length {
                let length = (piece.length - done).min(PART);
                let offset = region.put_words(&[from + done]);
                program.call(libc::SYS_sendfile, [number, source, offset, length]);
                program.exactly(length);
                done += length;
            }
        }
        // The last page may have been one in part.
        program.call(libc::SYS_ftruncate, [number, object.size]);
        let (uid, gid) = (u64::from(object.uid), u64::from(object.gid));
        if (uid, gid) != (0, 0) {
            program.call(libc::SYS_fchown, [number, uid, gid]);
        }
        program.call(libc::SYS_fchmod, [number, u64::from(object.mode)]);
    }

    /// Steps of a process that is not loaded, with the rest of its memory in place.
    pub fn map_at_start(
        &self,
        index: usize,
        tree: Tree<'_>,
        region: &mut Region,
        program: &mut Program,
    ) {
        for place in tree.placement.of_process(index) {
            let at = tree.manifest.processes[index].mappings[place.mapping].start;
            self.map(place, at, When::Start, tree, region, program);
        }
    }

    fn map(
        &self,
        place: &Placed,
        at: u64,
        when: When,
        tree: Tree<'_>,
        region: &mut Region,
        program: &mut Program,
    ) {
        let process = &tree.manifest.processes[place.process];
        let mapping = &process.mappings[place.mapping];
        if When::of(mapping, tree.manifest) != when {
            return;
        }
        let place = Placed { at, ..*place };
        let own = self.own.get(&(place.process, place.mapping));
        let own = own.map_or(&[][..], Vec::as_slice);
        memory::map(
            &place,
            mapping,
            process.pid,
            tree.control,
            own,
            region,
            program,
        );
        memory::protect(&place, mapping, own, program);
        memory::guard(place.at, mapping, process.pid, region, program);
    }
}

/// Opens a memory object once more, with the flags of an open file; the descriptor is in slot 0.
pub fn open(object: usize, flags: u32, control: u64, region: &mut Region, program: &mut Program) {
    let number = control + fd::MEMORY + object as u64;
    program.about(region.sentence("opening a memfd or a deleted file".into()));
    let path = region.put_text(&format!("/proc/self/fd/{number}"));
    let (here, flags) = (libc::AT_FDCWD as u64, u64::from(flags & !NOT_AGAIN));
    program
        .call(libc::SYS_openat, [here, path, flags, 0])
        .into(0);
}

#[cfg(test)]
pub mod sample {
    use super::*;
    use crate::manifest::{PAGE, PageRun};

    pub fn of(object: usize) -> MappingKind {
        MappingKind::Object {
            object,
            offset: 0,
            shared: true,
        }
    }

    pub fn objects() -> Vec<MemoryObject> {
        let memory = MemoryKind::Memory {
            name: "shared".into(),
            seals: 1,
        };
        let unlinked = MemoryKind::Unlinked {
            directory: "/tmp".into(),
            nameable: false,
        };
        let object = |kind| MemoryObject {
            size: 2 * PAGE,
            mode: 0o600,
            uid: 0,
            gid: 0,
            kind,
            pages: vec![PageRun {
                start: PAGE,
                pages: 1,
            }],
        };
        let segment = MemoryKind::Segment {
            id: 7,
            key: 0,
            locked: true,
        };
        let tmpfs = MemoryKind::Tmpfs {
            path: "/dev/shm/large".into(),
        };
        [memory, unlinked, segment, tmpfs].map(object).to_vec()
    }
}
