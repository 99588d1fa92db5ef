//! A snapshot's memory and description, as the pool has them.

use std::collections::HashSet;

use anyhow::{Context, bail};
use trenv_config::Config;
use trenv_pool::{PAGE_SIZE, Pool, Source, TemplateInfo, TemplateReader};
use trenv_snapshot::manifest::{Manifest, Mapping, MappingKind, PAGE, Process};

use super::saved::Saved;
use crate::containerd::Containerd;

/// An open snapshot.
#[derive(Debug)]
pub struct Stored {
    pub reader: TemplateReader,
    pub manifest: Manifest,
}

/// What a mapping is to its process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Heap,
    Stack,
    Anonymous,
    /// Private, with pages of its own where they were written.
    File,
    SharedFile,
    /// Without a path, and shared by processes of the tree.
    SharedMemory,
    Kernel,
}

impl Kind {
    pub const ALL: [Self; 7] = [
        Self::Heap,
        Self::Stack,
        Self::Anonymous,
        Self::File,
        Self::SharedFile,
        Self::SharedMemory,
        Self::Kernel,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Heap => "heap",
            Self::Stack => "stack",
            Self::Anonymous => "anonymous",
            Self::File => "file",
            Self::SharedFile => "shared file",
            Self::SharedMemory => "shared memory",
            Self::Kernel => "kernel",
        }
    }

    pub fn of(mapping: &Mapping, process: &Process) -> Self {
        let layout = &process.layout;
        let holds = |address: u64| mapping.start <= address && address < mapping.end;
        match &mapping.kind {
            MappingKind::Vdso | MappingKind::Vvar => Self::Kernel,
            MappingKind::SharedReadOnly { .. }
            | MappingKind::Generation
            | MappingKind::AtStart { shared: true, .. } => Self::SharedFile,
            MappingKind::File { .. } | MappingKind::AtStart { shared: false, .. } => Self::File,
            MappingKind::Object { shared: true, .. } | MappingKind::Segment { .. } => {
                Self::SharedMemory
            }
            _ if holds(layout.start_stack) => Self::Stack,
            _ if mapping.start < layout.brk && layout.start_brk < mapping.end => Self::Heap,
            _ => Self::Anonymous,
        }
    }
}

/// What people call a mapping.
pub fn name_of(mapping: &Mapping, process: &Process) -> String {
    match &mapping.kind {
        MappingKind::File { path, .. }
        | MappingKind::SharedReadOnly { path, .. }
        | MappingKind::AtStart { path, .. } => path.clone(),
        MappingKind::Generation => "[generation]".to_owned(),
        MappingKind::Vdso => "[vdso]".to_owned(),
        MappingKind::Vvar => "[vvar]".to_owned(),
        _ => format!("[{}]", Kind::of(mapping, process).name()),
    }
}

/// The pool's list, and the snapshots of a namespace.
pub async fn all(
    config: &Config,
    namespace: &str,
) -> anyhow::Result<(Pool, Vec<TemplateInfo>, Vec<Saved>)> {
    let pool = Pool::open(&config.pool_path())?;
    let templates = pool.list()?;
    // What lies in the pool can be looked at without containerd.
    let saved = match Containerd::connect(config, namespace).await {
        Ok(containerd) => Saved::all(&containerd).await?,
        Err(err) => {
            eprintln!("trenv: Snapshots have no names now: {err:#}");
            Vec::new()
        }
    };
    Ok((pool, templates, saved))
}

/// The template that a name or the beginning of an id means.
pub fn find<'a>(
    templates: &'a [TemplateInfo],
    saved: &[Saved],
    name: &str,
) -> anyhow::Result<&'a TemplateInfo> {
    let named = saved.iter().find(|one| one.name == name);
    let start = named.map_or(name, |one| one.template.as_str());
    let mut found = templates
        .iter()
        .filter(|info| info.id.to_string().starts_with(start));
    let first = found.next().with_context(|| match named {
        Some(_) => format!("The pool has lost the memory of the snapshot {name}; remove it"),
        None => format!("There is no snapshot {name}; `trenv snapshot list` shows them"),
    })?;
    if found.next().is_some() {
        bail!("{name} is the beginning of several ids; give more digits");
    }
    Ok(first)
}

impl Stored {
    pub fn open(pool: &Pool, info: &TemplateInfo) -> anyhow::Result<Self> {
        let reader = pool.template(&info.id, Some(info.generation))?;
        let manifest = Manifest::decode(reader.manifest())?;
        if manifest.pages() != info.pages {
            bail!(
                "The snapshot describes {} pages, but the pool has {}; take it again",
                manifest.pages(),
                info.pages
            );
        }
        Ok(Self { reader, manifest })
    }

    /// Stored pages of a process: address, number in the template, and place in the pool (none for
    /// zeros).
    pub fn pages(&self, index: usize) -> Vec<(u64, u64, Option<u64>)> {
        let before = self.manifest.processes[..index].iter();
        let before: u64 = before.flat_map(|p| &p.pages).map(|run| run.pages).sum();
        let addresses = self.manifest.processes[index]
            .pages
            .iter()
            .flat_map(|run| (0..run.pages).map(move |page| run.start + page * PAGE));
        let mut extents = self.reader.extents().iter().peekable();
        let place = |number: u64| {
            while extents
                .next_if(|extent| extent.first_page + extent.pages <= number)
                .is_some()
            {}
            match extents
                .peek()
                .map(|extent| (extent.source, extent.first_page))
            {
                Some((Source::Data { offset }, first)) => Some(offset + (number - first) * PAGE),
                _ => None,
            }
        };
        let numbered = addresses.zip(before..);
        let mut place = place;
        numbered
            .map(|(address, number)| (address, number, place(number)))
            .collect()
    }
}

/// Places in the pool of a template's pages.
pub fn places(reader: &TemplateReader) -> HashSet<u64> {
    let mut all = HashSet::new();
    for extent in reader.extents() {
        if let Source::Data { offset } = extent.source {
            all.extend((0..extent.pages).map(|page| offset + page * PAGE));
        }
    }
    all
}

/// Bytes of a template that no other has, and bytes that others have too.
pub fn unique_and_shared(own: &HashSet<u64>, others: &[&HashSet<u64>]) -> (u64, u64) {
    let shared = own
        .iter()
        .filter(|place| others.iter().any(|other| other.contains(place)))
        .count();
    let page = PAGE_SIZE as u64;
    ((own.len() - shared) as u64 * page, shared as u64 * page)
}
