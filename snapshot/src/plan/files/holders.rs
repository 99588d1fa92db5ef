//! Which processes have which open files.

use std::collections::BTreeMap;

use crate::manifest::{Manifest, SignalTarget};

/// What a process, by its place in the manifest, has an open file as.
#[derive(Debug, Clone, Copy)]
pub struct Held {
    pub process: usize,
    /// Its lowest descriptor of the open file.
    pub number: i32,
}

/// Found out once, for both open files and descriptors may be many.
#[derive(Debug)]
pub struct Holders {
    /// For each open file, the first process that has it.
    first: Vec<Option<Held>>,
    /// The same for the process that is told of it by signals.
    owner: Vec<Option<Held>>,
}

impl Holders {
    pub fn of(manifest: &Manifest) -> Self {
        let mut threads = BTreeMap::new();
        for (index, process) in manifest.processes.iter().enumerate() {
            threads.extend(process.threads.iter().map(|thread| (thread.tid, index)));
        }
        let owners = manifest.objects.iter().map(|object| {
            // A process's main thread has its number.
            match object.owner?.target? {
                SignalTarget::Process(id) | SignalTarget::Thread(id) => threads.get(&id).copied(),
                SignalTarget::Group(_) => None,
            }
        });
        let owners: Vec<Option<usize>> = owners.collect();
        let mut holders = Self {
            first: vec![None; owners.len()],
            owner: vec![None; owners.len()],
        };
        for (process, its) in manifest.processes.iter().enumerate() {
            for descriptor in &its.descriptors {
                let (object, number) = (descriptor.object, descriptor.number);
                let held = Held { process, number };
                note(&mut holders.first[object], held);
                if owners[object] == Some(process) {
                    note(&mut holders.owner[object], held);
                }
            }
        }
        holders
    }

    pub fn first(&self, object: usize) -> Option<Held> {
        self.first.get(object).copied().flatten()
    }

    /// The owner, if it has the open file, or the first that has.
    pub fn owner_or_first(&self, object: usize) -> Option<Held> {
        let owner = self.owner.get(object).copied().flatten();
        owner.or_else(|| self.first(object))
    }
}

/// Descriptors come by process.
fn note(known: &mut Option<Held>, held: Held) {
    let known = known.get_or_insert(held);
    if known.process == held.process {
        known.number = known.number.min(held.number);
    }
}
