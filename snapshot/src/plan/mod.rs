//! From a manifest to the programs that bring its tree back.
//!
//! Everything is decided here, once per zygote: the region, where each mapping lies, and for the
//! zygote and each process the list of system calls that the restorer makes. What differs from
//! start to start (streams, sandbox, cgroup) is a descriptor at a fixed number.

mod credentials;
mod files;
mod frame;
mod generation;
#[cfg(test)]
mod hostile;
mod layout;
mod lineage;
mod memory;
mod process;
mod region;
mod shared;
pub mod skeleton;
mod sockets;
mod sysv;
mod thread;
mod timers;

use std::collections::BTreeSet;

use trenv_pool::Extent;
use trenv_restorer::wire::{Capsule, Header, MAGIC, MARKS, MAX_AGENTS, OWN_SENTENCES, STACK, fd};

use crate::lineage::Lineage;
use crate::manifest::{Manifest, MappingKind, ObjectKind, PAGE};
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
    /// The root's, which it inherits from the clone.
    pub oom_score_adj: i32,
    /// Where the zygote holds the stored pages of each process.
    pub stored: Vec<Stored>,
    /// The same for private file mappings, whole.
    pub file_pages: Vec<Stored>,
    /// Per process, the table of ranges that a clone copies ahead of its writes.
    pub tables: Vec<Option<u64>>,
    /// Paths that a start opens in the new root.
    pub opened: Vec<String>,
    /// Where stored pages belong in the address space, by address.
    pub areas: Vec<Area>,
    /// Where a skeleton takes programs.
    pub rework: u64,
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
}

impl Plan {
    /// Plans a zygote for `manifest`, whose pages lie in the pool as `extents` say.
    ///
    /// # Errors
    /// When the manifest cannot be laid out.
    pub fn of(manifest: &Manifest, extents: &[Extent], fill: Fill) -> Result<Self, PlanError> {
        let mut lineage = Lineage::of(manifest).map_err(PlanError::Unsupported)?;
        let helper_pid = lineage::number_stand_ins(manifest, &mut lineage)?;
        let placement = Placement::of(manifest, lineage, REGION_LIMIT).ok_or(PlanError::NoRoom)?;
        let pieces = memory::pieces(manifest, extents)?;
        let control = files::control_descriptor(manifest);
        let own = process::Own::read()?;
        let shared = Shared::of(manifest, &placement, &pieces, control);
        let tree = Tree {
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
            (control, fill),
            &mut region,
            &mut words,
        );
        let programs = process::programs(tree, &mut region)?;
        let frame = Frame::of(&build, &words, &mut region);
        let rework = match fill {
            Fill::Pages => 0,
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
            oom_score_adj: manifest.processes[0].oom_score_adj,
            stored: stored(manifest, &placement),
            file_pages: file_pages(manifest, &placement),
            tables: programs.tables,
            opened: opened(manifest, &placement),
            areas: skeleton::areas(manifest, &placement, &pieces.processes),
            rework,
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
            all.push(Stored {
                process: place.process,
                start: mapping.start,
                at: place.at,
                pages: place.length / PAGE,
            });
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
    let mut words = vec![magic, base, length, build, prepare, root, root_pid];
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

#[cfg(test)]
pub mod tests {
    use trenv_pool::Source;

    use super::*;
    use crate::manifest::{
        Credentials, Descriptor, Layout, Mapping, MappingFlags, Object, ObjectKind, PageRun,
        Process, Registers, Thread, VERSION,
    };

    fn mapping(start: u64, pages: u64, kind: MappingKind) -> Mapping {
        let flags = MappingFlags::default();
        Mapping {
            start,
            end: start + pages * PAGE,
            protection: 3,
            kind,
            flags,
        }
    }

    fn process(pid: i32, parent: Option<usize>, own: Vec<Mapping>) -> Process {
        let mut mappings = own;
        mappings.push(mapping(0x7ffd_0000_0000, 2, MappingKind::Vvar));
        mappings.push(mapping(0x7ffd_0000_2000, 2, MappingKind::Vdso));
        Process {
            pid,
            parent,
            group: 2,
            session: 2,
            exe: "/bin/x".into(),
            cwd: "/".into(),
            umask: 0o022,
            layout: Layout::default(),
            auxv: vec![0; 16],
            pages: vec![PageRun {
                start: mappings[0].start,
                pages: 1,
            }],
            mappings,
            lock_future: 0,
            descriptors: vec![Descriptor {
                number: 3,
                object: 0,
                close_on_exec: true,
            }],
            actions: Vec::new(),
            timers: [[0; 4]; 3],
            posix_timers: Vec::new(),
            limits: vec![(1, 2)],
            pending: vec![vec![0; 128]],
            dumpable: 1,
            habits: crate::manifest::Habits::default(),
            subreaper: 0,
            oom_score_adj: 0,
            threads: vec![Thread {
                tid: pid,
                name: "x".into(),
                registers: Registers::default(),
                xstate: vec![0; 2440],
                blocked: 0,
                alternate_stack: (0, 2, 0),
                robust_list: (0x1000, 24),
                clear_tid: 0x1000,
                rseq: None,
                pending: Vec::new(),
                nice: 0,
                scheduling: (0, 0),
                affinity: None,
                parent_death_signal: 0,
                timer_slack: 50_000,
                io_priority: 0,
                credentials: Credentials::default(),
                no_new_privileges: true,
                filters: vec![0],
            }],
        }
    }

    pub fn sample() -> (Manifest, Vec<Extent>) {
        let file = MappingKind::File {
            path: "/bin/x".into(),
            offset: 0,
        };
        let manifest = Manifest {
            version: VERSION,
            fingerprint: "f".into(),
            monotonic: 0,
            processes: vec![
                process(2, None, vec![mapping(0x40_0000, 4, MappingKind::Anonymous)]),
                process(
                    3,
                    Some(0),
                    vec![
                        mapping(0x40_0000, 4, MappingKind::Anonymous),
                        mapping(0x50_0000, 4, file),
                        mapping(0x60_0000, 2, shared::sample::of(0)),
                        mapping(0x70_0000, 1, shared::sample::of(1)),
                        mapping(0x80_0000, 2, MappingKind::Segment { id: 7 }),
                    ],
                ),
            ],
            zombies: Vec::new(),
            objects: vec![Object {
                flags: 0,
                kind: ObjectKind::Path {
                    path: "/dev/null".into(),
                    position: 0,
                },
            }],
            memory: shared::sample::objects(),
            locks: Vec::new(),
            semaphores: Vec::new(),
            tmpfs: Vec::new(),
            filters: vec![vec![6]],
        };
        let extents = vec![Extent {
            first_page: 0,
            pages: 6,
            source: Source::Data { offset: 0 },
        }];
        (manifest, extents)
    }

    fn ways(sizes: &[u64], parents: &[Option<usize>]) -> Vec<Way> {
        let (mut manifest, _) = sample();
        let template = manifest.processes.remove(0);
        manifest.processes = sizes
            .iter()
            .zip(parents)
            .enumerate()
            .map(|(index, (pages, parent))| Process {
                pid: 2 + index as i32,
                parent: *parent,
                pages: vec![PageRun {
                    start: template.mappings[0].start,
                    pages: *pages,
                }],
                ..template.clone()
            })
            .collect();
        let lineage = Lineage::of(&manifest).unwrap();
        Placement::of(&manifest, lineage, REGION_LIMIT)
            .unwrap()
            .ways
    }

    #[test]
    fn the_largest_process_below_small_ones_gets_the_memory() {
        use Way::{Forked, Heir, Loaded};
        assert_eq!(ways(&[5000], &[None]), [Heir]);
        let parents = [None, Some(0), Some(0)];
        assert_eq!(ways(&[50, 900, 800], &parents), [Loaded, Heir, Forked]);
        // A large parent cannot make room for its child.
        assert_eq!(ways(&[300, 9000, 10], &parents), [Heir, Forked, Loaded]);
        let line = [None, Some(0), Some(1)];
        assert_eq!(ways(&[50, 20, 900], &line), [Loaded, Loaded, Heir]);
    }

    #[test]
    fn processes_are_loaded_only_as_far_as_there_are_descriptors() {
        let count = trenv_restorer::wire::MAX_LOADED + 3;
        let mut parents = vec![Some(0); count];
        parents[0] = None;
        let mut sizes = vec![5; count];
        sizes[1] = 5000;
        let ways = ways(&sizes, &parents);
        let loaded = ways.iter().filter(|way| **way == Way::Loaded).count();
        assert_eq!(loaded, count - 3);
        assert_eq!((ways[0], ways[1]), (Way::Loaded, Way::Heir));
        assert_eq!(ways[count - 1], Way::Forked);
    }

    #[test]
    fn mappings_in_the_way_of_the_heir_are_staged() {
        let (mut manifest, _) = sample();
        for process in &mut manifest.processes {
            process.mappings[0].end = process.mappings[0].start + 300 * PAGE;
            process.pages[0].pages = 300;
        }
        manifest.processes[1].mappings[1].start += 300 * PAGE;
        manifest.processes[1].mappings[1].end += 300 * PAGE;
        let lineage = Lineage::of(&manifest).unwrap();
        let placement = Placement::of(&manifest, lineage, REGION_LIMIT).unwrap();
        assert_eq!(placement.ways, [Way::Heir, Way::Forked]);
        let staged = placement.of_process(1).next().unwrap();
        assert_ne!(staged.at, 0x40_0000);
        let unmapped = placement.foreign(1, &manifest);
        assert_eq!(unmapped, vec![(0x40_0000, 0x40_0000 + 300 * PAGE)]);
    }

    #[test]
    fn pages_that_do_not_match_the_manifest_are_an_error() {
        let (manifest, mut extents) = sample();
        assert!(Plan::of(&manifest, &extents, Fill::Pages).is_ok());
        extents[0].pages = 1;
        assert!(matches!(
            Plan::of(&manifest, &extents, Fill::Pages),
            Err(PlanError::Pages)
        ));
        extents[0].pages = 3;
        assert!(matches!(
            Plan::of(&manifest, &extents, Fill::Pages),
            Err(PlanError::Pages)
        ));
    }
}
