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

use crate::manifest::Manifest;
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
        let root = process::programs(manifest, &placement, control, &mut region)?;
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
            agents: 1,
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
        })
    }
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
        agents,
        keep,
        helper_pid,
        marks,
    } = *header;
    let [first, second] = keep;
    let mut words = vec![
        magic, base, length, build, root, root_pid, stacks, control, agents,
    ];
    words.extend([first.start, first.end, second.start, second.end, helper_pid]);
    words.extend(marks);
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
