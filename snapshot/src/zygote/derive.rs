//! A zygote made from that of its base: a copy of its process, in which only what differs is written.
//! `plan/base.rs` decides what stays.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Instant;

use trenv_pool::{PAGE_SIZE, TemplateReader};
use trenv_restorer::wire;

use super::channel::{receive, send, socket_pair};
use super::loader::Loader;
use super::{
    BUILD_DEADLINE, Zygote, ZygoteError, ZygoteRequest, io_error, lock, open_pidfd, receive_soon,
    usable, zygote_error,
};
use crate::dump::memory::own_pages;
use crate::manifest::{Mapping, MappingKind, PAGE, PageRun};
use crate::plan::Plan;
use crate::plan::base::{Base, BaseMemory, Differences, arrive};
use crate::plan::memory::Piece;
use crate::plan::skeleton::Fill;

impl Zygote {
    /// [`Zygote::build`] from this one.
    pub(super) fn derive(&self, request: ZygoteRequest<'_>) -> Result<Self, ZygoteError> {
        let manifest = usable(request.template)?;
        let memory = Memory::of(self.pid, request.template)?;
        let base = Base {
            ground: &self.ground,
            memory: &memory,
        };
        let extents = request.template.extents();
        let plan = Plan::over(Some(base), &manifest, extents, Fill::Pages)?;
        for path in &plan.kept_files {
            if !is_same_file(self.pid, request.rootfs.as_fd(), path)? {
                return Err(ZygoteError::OtherFile { path: path.clone() });
            }
        }
        let loader = Loader::of(&plan, None, &request)?;
        let program = arrive(&self.ground, &plan);
        let (ours, theirs) = socket_pair()?;
        let pid = {
            let control = lock(&self.control);
            send(control.as_fd(), wire::request::DERIVE, 0, &[theirs.as_fd()])?;
            drop(theirs);
            // Both answer that they wait for requests; a failure comes on this one's own socket.
            let (first, _) = receive_soon(&control)?;
            if first.kind == wire::report::FAILED {
                receive_soon(&control)?;
            }
            zygote_error(&first, &self.tree)?;
            let deadline = Instant::now() + BUILD_DEADLINE;
            receive(ours.as_fd(), deadline, BUILD_DEADLINE)?.1
        };
        let process = (pid, open_pidfd(pid)?);
        let (zygote, _) = Self::of_plan(plan, Fill::Pages, process, ours, None);
        for procs in &request.cgroups {
            std::fs::write(procs, pid.to_string())
                .map_err(io_error("moving a zygote into its cgroup"))?;
        }
        File::options()
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .and_then(|memory| memory.write_all_at(&program, self.ground.rework()))
            .map_err(io_error("writing a program into the copy of a zygote"))?;
        {
            let zero = File::open("/dev/zero").map_err(io_error("opening /dev/zero"))?;
            let (pages, rootfs) = (loader.pages(), request.rootfs.as_fd());
            let mut descriptors = vec![loader.region(), pages, zero.as_fd(), rootfs];
            descriptors.extend(loader.rest());
            let control = lock(&zygote.control);
            send(control.as_fd(), wire::request::REWORK, 0, &descriptors)?;
        }
        drop(request.rootfs);
        zygote.await_build(request.template)?;
        Ok(zygote)
    }
}

/// The memory of a base's zygote, which never changes, and the pages of the pool.
struct Memory<'a> {
    memory: File,
    map: File,
    template: &'a TemplateReader,
}

impl<'a> Memory<'a> {
    fn of(pid: i32, template: &'a TemplateReader) -> Result<Self, ZygoteError> {
        let doing = "reading the memory of the base's zygote";
        let open = |name: &str| File::open(format!("/proc/{pid}/{name}"));
        Ok(Self {
            memory: open("mem").map_err(io_error(doing))?,
            map: open("pagemap").map_err(io_error(doing))?,
            template,
        })
    }
}

impl BaseMemory for Memory<'_> {
    fn differences(&self, part: &Mapping, pieces: &[Piece]) -> io::Result<Differences> {
        let own = own_pages(&self.map, part).map_err(io::Error::other)?;
        let mut own: BTreeSet<u64> = own.iter().flat_map(pages_of).collect();
        let anonymous = part.kind == MappingKind::Anonymous;
        let mut differences = Differences::default();
        let (mut theirs, mut its) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        for (at, offset) in pieces.iter().flat_map(piece_pages) {
            let held = own.remove(&at);
            match offset {
                Some(offset) => {
                    let read = self.template.read_at(&mut its, offset);
                    read.map_err(io::Error::other)?;
                }
                None => its = [0; PAGE_SIZE],
            }
            match held {
                true => self.memory.read_exact_at(&mut theirs, at)?,
                // What no page is there for is zero, or the file's.
                false => theirs = [0; PAGE_SIZE],
            }
            if theirs == its && (held || anonymous) {
                continue;
            }
            if anonymous && offset.is_none() {
                own.insert(at);
                continue;
            }
            append(&mut differences.written, at, offset);
        }
        for at in own {
            match differences.fresh.last_mut() {
                Some((start, length)) if *start + *length == at => *length += PAGE,
                _ => differences.fresh.push((at, PAGE)),
            }
        }
        Ok(differences)
    }
}

fn pages_of(run: &PageRun) -> impl Iterator<Item = u64> + use<> {
    let start = run.start;
    (0..run.pages).map(move |page| start + page * PAGE)
}

/// Address and offset in the pool of each page.
fn piece_pages(piece: &Piece) -> impl Iterator<Item = (u64, Option<u64>)> + use<> {
    let piece = *piece;
    (0..piece.length / PAGE).map(move |page| {
        let skipped = page * PAGE;
        (
            piece.address + skipped,
            piece.offset.map(|offset| offset + skipped),
        )
    })
}

fn append(pieces: &mut Vec<Piece>, address: u64, offset: Option<u64>) {
    if let Some(last) = pieces.last_mut()
        && last.address + last.length == address
        && last.offset.map(|last_offset| last_offset + last.length) == offset
    {
        last.length += PAGE;
        return;
    }
    pieces.push(Piece {
        address,
        length: PAGE,
        offset,
    });
}

/// Whether a path is the same file in the layers of a base's zygote and in others.
fn is_same_file(zygote: i32, layers: BorrowedFd<'_>, path: &str) -> Result<bool, ZygoteError> {
    use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
    let doing = "comparing the function's files with its base's";
    let root = File::open(format!("/proc/{zygote}/root")).map_err(io_error(doing))?;
    let open = |root: BorrowedFd<'_>| {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        match openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
            Ok(file) => Ok(Some(File::from(file))),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
            Err(errno) => Err(io_error(doing)(errno.into())),
        }
    };
    let (Some(theirs), Some(its)) = (open(root.as_fd())?, open(layers)?) else {
        return Ok(false);
    };
    same_content(&theirs, &its).map_err(io_error(doing))
}

fn same_content(one: &File, other: &File) -> io::Result<bool> {
    let (first, second) = (one.metadata()?, other.metadata()?);
    if first.len() != second.len() {
        return Ok(false);
    }
    // Of one layer, below two overlays.
    let known = |meta: &std::fs::Metadata| (meta.ino(), meta.mtime(), meta.mtime_nsec());
    if known(&first) == known(&second) {
        return Ok(true);
    }
    let (mut left, mut right) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    for at in (0..first.len()).step_by(PAGE_SIZE) {
        let length = (first.len() - at).min(PAGE) as usize;
        one.read_exact_at(&mut left[..length], at)?;
        other.read_exact_at(&mut right[..length], at)?;
        if left[..length] != right[..length] {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_in_memory_and_pool_are_one_piece() {
        let mut pieces = Vec::new();
        for (page, offset) in [(1, Some(8)), (2, Some(9)), (3, Some(11)), (4, None)] {
            append(
                &mut pieces,
                page * PAGE,
                offset.map(|page: u64| page * PAGE),
            );
        }
        let lengths: Vec<u64> = pieces.iter().map(|piece| piece.length / PAGE).collect();
        assert_eq!(lengths, [2, 1, 1]);
    }

    #[test]
    fn a_file_is_known_by_its_content() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = directory.path().join(name);
            std::fs::write(&path, content).unwrap();
            File::open(path).unwrap()
        };
        let one = file("one", &[7; 9000]);
        assert!(same_content(&one, &file("same", &[7; 9000])).unwrap());
        assert!(!same_content(&one, &file("shorter", &[7; 8999])).unwrap());
        assert!(!same_content(&one, &file("other", &[8; 9000])).unwrap());
    }
}
