//! Whether a manifest can be meant: every index and range that later code relies on.

use std::collections::BTreeSet;

use nix::libc;

use super::{
    ADDRESS_END, MCL_FUTURE, MCL_ONFAULT, Manifest, ManifestError, Mapping, MappingKind,
    ObjectKind, PAGE, Process, REGISTRATIONS, file_lock, file_owner, interface, memory_object,
    message_queue, queued, socket_file,
};
use crate::lineage::Lineage;

/// At most: above these an encoded form is not ours.
const MOST_PROCESSES: usize = 256;
const MOST_THREADS: usize = 4096;
const MOST_MAPPINGS: usize = 65_536;
const MOST_OBJECTS: usize = 65_536;
/// Resource limits that exist (RLIM_NLIMITS).
const MOST_LIMITS: usize = 16;
/// Instructions of all seccomp filters together, 4 more for each, as the kernel counts them
/// (MAX_INSNS_PER_PATH).
const MOST_INSTRUCTIONS: usize = 32_768;
/// Above every pid of 64-bit Linux (PID_MAX_LIMIT).
const PID_END: i32 = 1 << 22;

impl Manifest {
    /// Checks everything that planning takes for granted.
    pub(super) fn check(&self) -> Result<(), ManifestError> {
        let wrong = |what: String| Err(ManifestError::Invalid { what });
        if self.processes.is_empty() || self.processes.len() > MOST_PROCESSES {
            return wrong(format!("it has {} processes", self.processes.len()));
        }
        self.check_shared()?;
        let mut tids = BTreeSet::new();
        for (index, process) in self.processes.iter().enumerate() {
            let pid = process.pid;
            match process.parent {
                None => {}
                Some(parent) if parent < index => {}
                _ => return wrong(format!("the parent of process {pid} is not before it")),
            }
            let (threads, mappings) = (process.threads.len(), process.mappings.len());
            if threads == 0 || threads > MOST_THREADS {
                return wrong(format!("process {pid} has {threads} threads"));
            }
            if mappings > MOST_MAPPINGS {
                return wrong(format!("process {pid} has {mappings} mappings"));
            }
            if process.limits.len() > MOST_LIMITS {
                return wrong(format!("the resource limits of process {pid}"));
            }
            if process.threads[0].tid != pid {
                return wrong(format!("process {pid} does not begin with its main thread"));
            }
            for tid in process.threads.iter().map(|thread| thread.tid) {
                if !(1..PID_END).contains(&tid) || !tids.insert(tid) {
                    return wrong(format!("thread {tid} of process {pid}"));
                }
            }
            check_memory(process)?;
            if process.habits.barriers & !REGISTRATIONS != 0 {
                return wrong(format!("the memory barriers of process {pid}"));
            }
            if ![0, MCL_FUTURE, MCL_FUTURE | MCL_ONFAULT].contains(&process.lock_future) {
                return wrong(format!("the memory locks of process {pid}"));
            }
            for descriptor in &process.descriptors {
                if descriptor.object >= self.objects.len()
                    || !(0..1 << 20).contains(&descriptor.number)
                {
                    return wrong(format!("descriptor {} of process {pid}", descriptor.number));
                }
            }
            if process
                .actions
                .iter()
                .any(|action| !(1..=64).contains(&action.signal))
            {
                return wrong(format!("a signal number of process {pid}"));
            }
            check_timers(process)?;
            for thread in &process.threads {
                if thread.filters.iter().any(|one| *one >= self.filters.len()) {
                    return wrong(format!("the filters of thread {}", thread.tid));
                }
                if thread.xstate.len() < 576 || thread.xstate.len() > 65_536 {
                    return wrong(format!("the vector registers of thread {}", thread.tid));
                }
            }
        }
        check_zombies(self)?;
        for object in &self.objects {
            if let ObjectKind::Inotify { watches } = &object.kind
                && watches.iter().any(|watch| watch.wd < 1)
            {
                return wrong("the number of an inotify's watch".into());
            }
        }
        memory_object::check(self)?;
        file_lock::check(self)?;
        file_owner::check(self)?;
        socket_file::check(self)?;
        interface::check(self)?;
        queued::check(self)?;
        message_queue::check(self)?;
        Lineage::of(self).map_err(|what| ManifestError::Invalid { what })?;
        Ok(())
    }

    /// Checks what the processes refer to.
    fn check_shared(&self) -> Result<(), ManifestError> {
        let wrong = |what: String| Err(ManifestError::Invalid { what });
        if self.objects.len() > MOST_OBJECTS {
            return wrong(format!("it has {} open files", self.objects.len()));
        }
        let instructions: usize = self.filters.iter().map(|filter| filter.len() + 4).sum();
        if instructions > MOST_INSTRUCTIONS {
            return wrong(format!("its {} seccomp filters", self.filters.len()));
        }
        for object in &self.objects {
            if let ObjectKind::Stdio(stream) = object.kind
                && stream > 2
            {
                return wrong(format!("there is no standard stream {stream}"));
            }
        }
        Ok(())
    }
}

fn check_timers(process: &Process) -> Result<(), ManifestError> {
    let mut next = 0;
    for timer in &process.posix_timers {
        let target = match timer.notify {
            libc::SIGEV_SIGNAL | libc::SIGEV_NONE => timer.target == 0,
            libc::SIGEV_THREAD_ID => process.threads.iter().any(|one| one.tid == timer.target),
            _ => false,
        };
        let times = timer.times[1] < 1_000_000_000 && timer.times[3] < 1_000_000_000;
        if timer.id < next || !target || !times || !(0..=64).contains(&timer.signal) {
            return Err(ManifestError::Invalid {
                what: format!("POSIX timer {} of process {}", timer.id, process.pid),
            });
        }
        next = timer.id.saturating_add(1);
    }
    Ok(())
}

fn check_zombies(manifest: &Manifest) -> Result<(), ManifestError> {
    if manifest.zombies.len() > MOST_PROCESSES {
        return Err(ManifestError::Invalid {
            what: format!("it has {} zombies", manifest.zombies.len()),
        });
    }
    for zombie in &manifest.zombies {
        let exited = zombie.status & !0xff00 == 0;
        let killed = (1..=64).contains(&zombie.status);
        if zombie.pid <= 1
            || zombie.parent >= manifest.processes.len()
            || !(exited || killed)
            || matches!(zombie.status, libc::SIGSTOP)
        {
            return Err(ManifestError::Invalid {
                what: format!("the zombie {}", zombie.pid),
            });
        }
    }
    Ok(())
}

fn check_memory(process: &Process) -> Result<(), ManifestError> {
    let pid = process.pid;
    let mut end = 0;
    for mapping in &process.mappings {
        let aligned = mapping.start % PAGE == 0 && mapping.end % PAGE == 0;
        if !aligned
            || mapping.start < end
            || mapping.end <= mapping.start
            || mapping.end > ADDRESS_END
        {
            return Err(ManifestError::Invalid {
                what: format!(
                    "mapping {:#x}-{:#x} of process {pid}",
                    mapping.start, mapping.end
                ),
            });
        }
        crate::generation::check(mapping, pid)?;
        check_guards(mapping, pid)?;
        end = mapping.end;
    }
    let mut mappings = process.mappings.iter().peekable();
    let mut from = 0;
    for run in &process.pages {
        let aligned = run.start % PAGE == 0 && run.start >= from;
        let Some(run_end) = run.end().filter(|_| aligned) else {
            return Err(ManifestError::Invalid {
                what: format!("the pages at {:#x} of process {pid}", run.start),
            });
        };
        while mappings
            .next_if(|mapping| mapping.end <= run.start)
            .is_some()
        {}
        let around = mappings.peek();
        let Some(mapping) = around.filter(|m| m.start <= run.start && run_end <= m.end) else {
            return Err(ManifestError::Invalid {
                what: format!(
                    "the pages at {:#x} of process {pid} lie in no mapping",
                    run.start
                ),
            });
        };
        let guards = &mapping.guards;
        let next = guards.partition_point(|guard| guard.end().is_none_or(|end| end <= run.start));
        if guards.get(next).is_some_and(|guard| guard.start < run_end) {
            return Err(ManifestError::Invalid {
                what: format!("the pages at {:#x} of process {pid} are guards", run.start),
            });
        }
        from = run_end;
    }
    Ok(())
}

fn check_guards(mapping: &Mapping, pid: i32) -> Result<(), ManifestError> {
    let kind = &mapping.kind;
    let can_have = !matches!(
        kind,
        MappingKind::Vdso | MappingKind::Vvar | MappingKind::Generation
    );
    let mut from = mapping.start;
    for guard in &mapping.guards {
        let end = guard.end().filter(|end| *end <= mapping.end);
        let aligned = guard.start % PAGE == 0 && guard.start >= from && guard.pages > 0;
        let Some(end) = end.filter(|_| aligned && can_have) else {
            return Err(ManifestError::Invalid {
                what: format!("the guard pages at {:#x} of process {pid}", guard.start),
            });
        };
        from = end;
    }
    Ok(())
}
