//! From a manifest to the programs that bring its tree back.
//!
//! Everything is decided here, once per zygote: the region, where each mapping lies, and for the
//! zygote and each process the list of system calls that the restorer makes. What differs from
//! start to start (streams, sandbox, cgroup) is a descriptor at a fixed number.

pub mod base;
mod credentials;
mod files;
mod frame;
mod generation;
#[cfg(test)]
mod hostile;
mod layout;
mod lineage;
pub mod memory;
mod process;
mod region;
mod shared;
pub mod skeleton;
mod sockets;
mod sysv;
#[cfg(test)]
mod tests;
mod thread;
mod timers;

use std::collections::BTreeSet;

use trenv_pool::Extent;
use trenv_restorer::wire::{Capsule, Header, MAGIC, MARKS, MAX_AGENTS, OWN_SENTENCES, STACK, fd};

use base::{Base, Ground};

use crate::lineage::Lineage;
use crate::manifest::{Manifest, MappingKind, ObjectKind, PAGE};
use files::holders::Holders;
use layout::{Placement, Way, kernel_owned};
pub use memory::Copy;
use process::Tree;
pub use region::LOADER;
use region::{Program, Region};
use shared::{Shared, When};
use skeleton::{Area, Fill};

/// Length that the region may have.
const REGION_LIMIT: u64 = 64 << 20;

/// Descriptors, from the control descriptor on, that a zygote has while it is built.
pub mod build_fd {
    use trenv_restorer::wire::fd;

    /// The pool's pages.
    pub const PAGES: u64 = fd::OBJECTS;
    /// /dev/zero.
    pub const ZERO: u64 = fd::OBJECTS + 1;
    /// The executable of the heir, for a moment.
    pub const EXE: u64 = fd::OBJECTS + 2;
    /// The function's layers, for a zygote that is made from its base's.
    pub const ROOTFS: u64 = fd::OBJECTS + 3;
    /// The template of the pool's device that holds what is attached.
    pub const TEMPLATE: u64 = fd::OBJECTS + 4;
}

/// What a zygote is made from.
#[derive(Debug)]
pub struct Plan {
    /// Address of the region.
    pub base: u64,
    /// Its bytes; the first `code` of them are executable.
    pub bytes: Vec<u8>,
    pub code: u64,
    /// Length with its stacks.
    pub length: u64,
    /// Entry point, header, end of the first stack.
    pub entry: u64,
    pub header: u64,
    pub stack: u64,
    /// Number of the control descriptor.
    pub control: u64,
    /// What each clone copies: a file of pages from the pool.
    pub content: Vec<Copy>,
    /// The processes that are loaded, in the manifest's order.
    pub capsules: Vec<CapsulePlan>,
    /// Sentences about steps, by number less the restorer's own.
    pub sentences: Vec<String>,
    pub processes: usize,
    /// Pid of the root in the sandbox.
    pub root_pid: i32,
    /// The lowest of the tree's processes, which inherit it from the clone.
    pub oom_score_adj: i32,
    /// Where the zygote holds the stored pages of each process.
    pub stored: Vec<Stored>,
    /// The same for private file mappings, all that lies around their guard pages.
    pub file_pages: Vec<Stored>,
    /// Per process, the table of ranges that a clone copies ahead of its writes.
    pub tables: Vec<Option<u64>>,
    /// Paths that a start opens in the new root.
    pub opened: Vec<String>,
    /// Where stored pages belong in the address space, by address.
    pub areas: Vec<Area>,
    /// Where it takes programs.
    pub rework: u64,
    /// What others may be made from.
    pub ground: Ground,
    /// Files that stay mapped as its base has them.
    pub kept_files: Vec<String>,
}

/// The file from which a process is loaded: its head, its pages, its region.
#[derive(Debug)]
pub struct CapsulePlan {
    pub head: Vec<u8>,
    pub pages: Vec<Copy>,
    /// Offset of the region in the file, and its bytes.
    pub region: u64,
    pub bytes: Vec<u8>,
}

/// Pages of a process: where it has them, and where the zygote holds them.
#[derive(Debug, Clone, Copy)]
pub struct Stored {
    pub process: usize,
    pub start: u64,
    pub at: u64,
    pub pages: u64,
}

/// Why a manifest cannot be turned into a zygote.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("The snapshot's address space leaves no room for the restorer; take it again")]
    NoRoom,
    #[error("The snapshot needs {length} bytes of programs, but {limit} are the limit")]
    TooLarge { length: u64, limit: u64 },
    #[error("The snapshot's pages and its description disagree; take it again")]
    Pages,
    #[error("The snapshot cannot be restored: {0}")]
    Unsupported(String),
    #[error("Failed to compare the snapshot with its base")]
    Base { source: std::io::Error },
}

impl Plan {
    /// Plans a zygote for `manifest`, whose pages lie in the pool as `extents` say.
    ///
    /// # Errors
    /// When the manifest cannot be laid out.
    pub fn of(manifest: &Manifest, extents: &[Extent], fill: Fill) -> Result<Self, PlanError> {
        Self::over(None, manifest, extents, fill)
    }

    /// The same, over what a base's zygote holds already.
    ///
    /// # Errors
    /// As there, and when the base cannot be compared with.
    pub fn over(
        base: Option<Base<'_>>,
        manifest: &Manifest,
        extents: &[Extent],
        fill: Fill,
    ) -> Result<Self, PlanError> {
        let mut lineage = Lineage::of(manifest).map_err(PlanError::Unsupported)?;
        let helper_pid = lineage::number_stand_ins(manifest, &mut lineage)?;
        let taken = base.map(|base| base.ground.taken()).unwrap_or_default();
        let placement = Placement::of(manifest, lineage, REGION_LIMIT, &taken, fill);
        let placement = placement.ok_or(PlanError::NoRoom)?;
        let pieces = memory::pieces(manifest, extents)?;
        let control = files::control_descriptor(manifest);
        let own = process::Own::read()?;
        let shared = Shared::of(manifest, &placement, &pieces, control);
        let needed = process::needed_bounding(manifest, &placement.lineage);
        let holders = Holders::of(manifest);
        let tree = Tree {
            needed: &needed,
            holders: &holders,
            manifest,
            placement: &placement,
            shared: &shared,
            control,
            own: &own,
            fill,
        };
        let mut region = Region::new(placement.region, REGION_LIMIT, OWN_SENTENCES);
        let header = region.put(&[0; size_of::<Header>()], 64);
        let mut words = Vec::new();
        let build = memory::build(
            manifest,
            &placement,
            &pieces,
            (control, fill, base),
            &mut region,
            &mut words,
        )?;
        let programs = process::programs(tree, &mut region)?;
        let frame = Frame::of(&build, &words, &mut region);
        let rework = match fill {
            Fill::Pages | Fill::Attached | Fill::Blank => base::ARRIVAL,
            Fill::Skeleton { .. } => skeleton::REWORK,
        };
        let stacks = region.reserve(2 * MAX_AGENTS * STACK + rework);
        let rework = stacks + 2 * MAX_AGENTS * STACK;
        let heir = &manifest.processes[placement.heir];
        let (vdso_length, vdso_offset) = kernel_block(heir);
        let content = Header {
            magic: MAGIC,
            base: placement.region,
            length: region.length(),
            build: frame.build,
            prepare: programs.prepare,
            attach: programs.attach,
            root: programs.root,
            root_pid: manifest.processes[0].pid as u64,
            root_stack: programs.root_stack,
            root_left: programs.root_left,
            stacks,
            control,
            vdso_length,
            vdso_offset,
            vdso_words: frame.vdso_words,
            helper_pid,
            clone_left: programs.clone_left,
            helper_left: programs.helper_left,
            rework,
            marks: [0; MARKS],
        };
        region.set(header, &header_bytes(&content));
        let mut next = region.next_sentence();
        let (entry, code, length) = (region.entry(), region.code_length(), region.length());
        let (bytes, mut sentences) = region.finish()?;
        let mut capsules = Vec::new();
        for (index, (way, pieces)) in placement.ways.iter().zip(&pieces.processes).enumerate() {
            if *way == Way::Loaded {
                let (capsule, its) = CapsulePlan::of(index, tree, pieces, next)?;
                next += its.len() as u32;
                sentences.extend(its);
                capsules.push(capsule);
            }
        }
        Ok(Self {
            base: placement.region,
            bytes,
            code,
            length,
            entry,
            header,
            stack: stacks + STACK,
            control,
            content: shared.content(),
            capsules,
            sentences,
            processes: manifest.processes.len(),
            root_pid: manifest.processes[0].pid,
            oom_score_adj: process::lowest_oom_score_adj(manifest),
            stored: stored(manifest, &placement),
            file_pages: file_pages(manifest, &placement),
            tables: programs.tables,
            opened: opened(manifest, &placement),
            areas: skeleton::areas(manifest, &placement, &pieces.processes),
            rework,
            ground: Ground::of(
                manifest,
                &placement,
                (placement.region, placement.region + length),
                (control, rework),
                fill == Fill::Attached || base.is_some_and(|base| base.ground.attached()),
            ),
            kept_files: base
                .map(|base| base::kept_files(manifest, &placement, base.ground))
                .unwrap_or_default(),
        })
    }
}

/// What the processes of a start look up in their root: working directories, open files, and what
/// those that are loaded map.
fn opened(manifest: &Manifest, placement: &Placement) -> Vec<String> {
    let mut paths = BTreeSet::new();
    for (process, way) in manifest.processes.iter().zip(&placement.ways) {
        paths.insert(&process.cwd);
        if *way == Way::Loaded {
            paths.insert(&process.exe);
            for mapping in &process.mappings {
                if let MappingKind::File { path, .. } | MappingKind::SharedReadOnly { path, .. } =
                    &mapping.kind
                {
                    paths.insert(path);
                }
            }
        }
    }
    for object in &manifest.objects {
        if let ObjectKind::Path { path, .. } = &object.kind {
            paths.insert(path);
        }
    }
    paths.into_iter().cloned().collect()
}

impl CapsulePlan {
    /// The capsule of a process, and the sentences about its steps.
    fn of(
        index: usize,
        tree: Tree<'_>,
        pieces: &[memory::Piece],
        first_sentence: u32,
    ) -> Result<(Self, Vec<String>), PlanError> {
        let base = tree.placement.region;
        let mut region = Region::new(base, REGION_LIMIT, first_sentence);
        let header = region.put(&[0; size_of::<Header>()], 64);
        let mut words = Vec::new();
        let (program, pages, end) =
            process::capsule_program(index, tree, pieces, &mut region, &mut words);
        let frame = Frame::of(&program, &words, &mut region);
        let stack = region.put_stack();
        let (vdso_length, vdso_offset) = kernel_block(&tree.manifest.processes[index]);
        let content = Header {
            magic: MAGIC,
            base,
            length: region.length(),
            build: frame.build,
            control: tree.control,
            vdso_length,
            vdso_offset,
            vdso_words: frame.vdso_words,
            ..Header::default()
        };
        region.set(header, &header_bytes(&content));
        let at = end.next_multiple_of(PAGE);
        let head = Capsule {
            base,
            code: region.code_length(),
            length: region.length(),
            region: at,
            entry: region.entry(),
            header,
            stack,
            control: tree.control + fd::CONTROL,
        };
        let Capsule {
            base,
            code,
            length,
            region: offset,
            entry,
            header,
            stack,
            control,
        } = head;
        let head = [base, code, length, offset, entry, header, stack, control];
        let head = head.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let (bytes, sentences) = region.finish()?;
        let capsule = Self {
            head,
            pages,
            region: at,
            bytes,
        };
        Ok((capsule, sentences))
    }
}

/// A program that fills an address space, with the table of its words about the vdso.
struct Frame {
    build: u64,
    vdso_words: u64,
}

impl Frame {
    fn of(program: &Program, words: &[u64], region: &mut Region) -> Self {
        let build = region.put_program(program);
        let mut table = vec![words.len() as u64];
        table.extend(words.iter().map(|offset| build + offset));
        Self {
            build,
            vdso_words: region.put_words(&table),
        }
    }
}

/// Length of the kernel's own mappings, and how much of it lies below the vdso.
fn kernel_block(process: &crate::manifest::Process) -> (u64, u64) {
    let own = || process.mappings.iter().filter(|one| kernel_owned(one));
    let length = own().map(|one| one.end - one.start).sum();
    let below = own().take_while(|one| one.kind != MappingKind::Vdso);
    (length, below.map(|one| one.end - one.start).sum())
}

fn stored(manifest: &Manifest, placement: &Placement) -> Vec<Stored> {
    let mut all = Vec::new();
    for place in &placement.placed {
        let process = &manifest.processes[place.process];
        let mapping = &process.mappings[place.mapping];
        if When::of(mapping, manifest) != When::Zygote {
            continue;
        }
        let first = process
            .pages
            .partition_point(|run| run.start < mapping.start);
        let runs = process.pages.iter().skip(first);
        for run in runs.take_while(|run| run.start < mapping.end) {
            all.push(Stored {
                process: place.process,
                start: run.start,
                at: place.at + (run.start - mapping.start),
                pages: run.pages,
            });
        }
    }
    all
}

fn file_pages(manifest: &Manifest, placement: &Placement) -> Vec<Stored> {
    let mut all = Vec::new();
    for place in &placement.placed {
        let mapping = &manifest.processes[place.process].mappings[place.mapping];
        if matches!(mapping.kind, MappingKind::File { .. }) && mapping.protection != 0 {
            let mut start = mapping.start;
            let end = start + place.length;
            for (guard, behind) in mapping.guards_at(start).chain([(end, end)]) {
                if start < guard {
                    all.push(Stored {
                        process: place.process,
                        start,
                        at: place.at + (start - mapping.start),
                        pages: (guard - start) / PAGE,
                    });
                }
                start = behind;
            }
        }
    }
    all
}

fn header_bytes(header: &Header) -> Vec<u8> {
    let Header {
        magic,
        base,
        length,
        build,
        prepare,
        attach,
        root,
        root_pid,
        root_stack,
        root_left,
        stacks,
        control,
        vdso_length,
        vdso_offset,
        vdso_words,
        helper_pid,
        clone_left,
        helper_left,
        rework,
        marks,
    } = *header;
    let mut words = vec![magic, base, length, build, prepare, attach, root, root_pid];
    words.extend([
        root_stack,
        root_left,
        stacks,
        control,
        vdso_length,
        vdso_offset,
        vdso_words,
    ]);
    words.extend([helper_pid, clone_left, helper_left, rework]);
    words.extend(marks);
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
