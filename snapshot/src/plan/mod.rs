//! From a manifest to the programs that bring its tree back.
//!
//! Everything is decided here, once per zygote: the region, where each mapping lies, and for the
//! zygote and each process the list of system calls that the restorer makes. What differs from
//! start to start (streams, sandbox, cgroup) is a descriptor at a fixed number.

mod credentials;
mod files;
mod frame;
mod layout;
mod memory;
mod process;
mod region;

use trenv_pool::Extent;
use trenv_restorer::wire::{Header, MAGIC, MARKS, MAX_AGENTS, Range, STACK};

use crate::manifest::{Manifest, MappingKind, PAGE};
use layout::Placement;
use region::Region;

/// Length that the region may have.
const REGION_LIMIT: u64 = 64 << 20;

/// Descriptors, from the control descriptor on, that a zygote has while it is built.
pub mod build_fd {
    /// The pool's pages.
    pub const PAGES: u64 = 2;
    /// /dev/zero.
    pub const ZERO: u64 = 3;
    /// The executable of the resident process, for a moment.
    pub const EXE: u64 = 4;
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
    /// Entry point, header, top of the first stack.
    pub entry: u64,
    pub header: u64,
    pub stack: u64,
    /// Number of the control descriptor.
    pub control: u64,
    /// Addresses of words to which the address of the zygote's own vvar and vdso is added.
    pub vdso_words: Vec<u64>,
    /// Sentences about steps, by number less the restorer's own.
    pub sentences: Vec<String>,
    pub processes: usize,
    /// Where the zygote holds the stored pages of each process.
    pub stored: Vec<Stored>,
    /// The same for private file mappings, whole.
    pub file_pages: Vec<Stored>,
    /// Per process, the table of ranges that a clone copies ahead of its writes.
    pub tables: Vec<u64>,
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
    pub fn of(manifest: &Manifest, extents: &[Extent]) -> Result<Self, PlanError> {
        let placement = Placement::of(manifest, REGION_LIMIT).ok_or(PlanError::NoRoom)?;
        let mut region = Region::new(placement.region, REGION_LIMIT);
        let header = region.put(&[0; size_of::<Header>()], 64);
        let control = files::control_descriptor(manifest);
        let mut vdso_words = Vec::new();
        let build = memory::build(
            manifest,
            &placement,
            extents,
            control,
            &mut region,
            &mut vdso_words,
        )?;
        let (root, tables) = process::programs(manifest, &placement, control, &mut region)?;
        let build = region.put_program(&build);
        let stacks = region.reserve(2 * MAX_AGENTS * STACK);
        let pids: Vec<i32> = manifest
            .processes
            .iter()
            .flat_map(|p| &p.threads)
            .map(|thread| thread.tid)
            .collect();
        let helper = (300..32_000)
            .rev()
            .find(|pid| !pids.contains(pid))
            .ok_or(PlanError::NoRoom)?;
        let content = Header {
            magic: MAGIC,
            base: placement.region,
            length: region.length(),
            build,
            root,
            root_pid: manifest.processes[0].pid as u64,
            stacks,
            control,
            keep: [Range { start: 0, end: 0 }; 2],
            helper_pid: helper as u64,
            marks: [0; MARKS],
        };
        let words = header_words(&content);
        region.set(header, &words);
        let (entry, code, length) = (region.entry(), region.code_length(), region.length());
        let (bytes, sentences) = region.finish()?;
        Ok(Self {
            base: placement.region,
            bytes,
            code,
            length,
            entry,
            header,
            stack: stacks + STACK,
            control,
            vdso_words: vdso_words
                .into_iter()
                .map(|offset| build + offset)
                .collect(),
            sentences,
            processes: manifest.processes.len(),
            stored: stored(manifest, &placement),
            file_pages: file_pages(manifest, &placement),
            tables,
        })
    }
}

fn stored(manifest: &Manifest, placement: &Placement) -> Vec<Stored> {
    let mut all = Vec::new();
    for place in &placement.placed {
        let process = &manifest.processes[place.process];
        let mapping = &process.mappings[place.mapping];
        let runs = process.pages.iter();
        for run in runs.filter(|run| mapping.start <= run.start && run.start < mapping.end) {
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

/// Offset of [`Header::keep`] in the header: the zygote's loader fills it in.
pub const KEEP_OFFSET: u64 = std::mem::offset_of!(Header, keep) as u64;

fn header_words(header: &Header) -> Vec<u8> {
    let Header {
        magic,
        base,
        length,
        build,
        root,
        root_pid,
        stacks,
        control,
        keep,
        helper_pid,
        marks,
    } = *header;
    let [first, second] = keep;
    let mut words = vec![magic, base, length, build, root, root_pid, stacks, control];
    words.extend([first.start, first.end, second.start, second.end, helper_pid]);
    words.extend(marks);
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

#[cfg(test)]
mod tests {
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
            descriptors: vec![Descriptor {
                number: 3,
                object: 0,
                close_on_exec: true,
            }],
            actions: Vec::new(),
            timers: [[0; 4]; 3],
            limits: vec![(1, 2)],
            pending: vec![vec![0; 128]],
            dumpable: 1,
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
                credentials: Credentials::default(),
                no_new_privileges: true,
                filters: 1,
            }],
        }
    }

    fn sample() -> (Manifest, Vec<Extent>) {
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
                    ],
                ),
            ],
            objects: vec![Object {
                flags: 0,
                kind: ObjectKind::Path {
                    path: "/dev/null".into(),
                    position: 0,
                },
            }],
            tmpfs: Vec::new(),
            filters: vec![vec![6]],
        };
        let extents = vec![Extent {
            first_page: 0,
            pages: 2,
            source: Source::Data { offset: 0 },
        }];
        (manifest, extents)
    }

    #[test]
    fn mappings_in_the_way_of_the_resident_process_are_staged() {
        let (manifest, _) = sample();
        let placement = Placement::of(&manifest, REGION_LIMIT).unwrap();
        assert_eq!(
            placement.resident, 1,
            "the process with the most mappings lies in place"
        );
        let staged = placement.of_process(0).next().unwrap();
        assert_ne!(staged.at, 0x40_0000);
        assert_eq!(
            placement.foreign(0, &manifest),
            vec![(0x40_0000, 0x50_4000)]
        );
        assert_eq!(
            placement.foreign(1, &manifest),
            vec![(staged.at, staged.at + 4 * PAGE)]
        );
    }

    #[test]
    fn pages_that_do_not_match_the_manifest_are_an_error() {
        let (manifest, mut extents) = sample();
        assert!(Plan::of(&manifest, &extents).is_ok());
        extents[0].pages = 1;
        assert!(matches!(
            Plan::of(&manifest, &extents),
            Err(PlanError::Pages)
        ));
        extents[0].pages = 3;
        assert!(matches!(
            Plan::of(&manifest, &extents),
            Err(PlanError::Pages)
        ));
    }

    /// Damaged manifests are refused or planned, and never bring the program down.
    #[test]
    fn damaged_manifests_are_survived() {
        let (manifest, extents) = sample();
        let good = manifest.encode().unwrap();
        let mut state = 1u64;
        let mut random = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) as usize
        };
        let mut planned = 0;
        for _ in 0..20_000 {
            let mut bytes = good.clone();
            for _ in 0..=random() % 4 {
                let at = random() % bytes.len();
                bytes[at] = random() as u8;
            }
            if random() % 8 == 0 {
                bytes.truncate(random() % bytes.len());
            }
            if let Ok(manifest) = Manifest::decode(&bytes)
                && Plan::of(&manifest, &extents).is_ok()
            {
                planned += 1;
            }
        }
        assert!(planned > 0);
    }
}
