//! What /proc and the process itself tell about it, descriptors and memory contents aside.

use std::collections::BTreeMap;

use nix::libc;

use super::caller::Caller;
use super::memory_objects::MemoryObjects;
use super::tracee::Tracee;
use super::{DumpError, mappings, proc_link, proc_text, timers};
use crate::manifest::{
    Credentials, Habits, Layout, Manifest, MappingKind, Process, REGISTRATIONS, Thread,
};

/// Which of the processor's states that are not everyone's a process may use (arch_prctl(2)).
const ARCH_GET_XCOMP_PERM: u64 = 0x1022;
const AMX_TILES: u64 = 1 << 18;
/// Known from kernel 6.3 on.
const MEMBARRIER_CMD_GET_REGISTRATIONS: u64 = 1 << 9;

/// Place of a process in the tree.
#[derive(Debug)]
pub struct Entry {
    pub host_pid: i32,
    /// Pid inside the sandbox.
    pub pid: i32,
    /// Index of the parent among the entries.
    pub parent: Option<usize>,
}

/// Thread ids of a process, the leader first.
pub fn threads(pid: i32) -> Result<Vec<i32>, DumpError> {
    let path = format!("/proc/{pid}/task");
    let mut tids = Vec::new();
    for entry in std::fs::read_dir(&path).map_err(DumpError::io(format!("reading {path}")))? {
        let entry = entry.map_err(DumpError::io(format!("reading {path}")))?;
        if let Some(tid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            tids.push(tid);
        }
    }
    tids.sort_unstable_by_key(|tid| (*tid != pid, *tid));
    Ok(tids)
}

/// Orders the processes so that each parent stands before its children.
pub fn parents_first(
    root: i32,
    init: i32,
    all: impl Iterator<Item = i32>,
) -> Result<Vec<Entry>, DumpError> {
    let mut parents = BTreeMap::new();
    for pid in all {
        parents.insert(pid, Status::read(pid, pid)?.number("PPid")?);
    }
    if parents.remove(&root).is_none() {
        return Err(DumpError::Refused(format!(
            "its root process {root} has ended"
        )));
    }
    let mut order = vec![Entry {
        host_pid: root,
        pid: Status::read(root, root)?.inner_pid()?,
        parent: None,
    }];
    // What pid 1 has besides the root are orphans of the tree: daemons that have forked twice.
    let orphans = parents.iter().filter(|(_, parent)| **parent == init);
    let mut orphans: Vec<i32> = orphans.map(|(pid, _)| *pid).collect();
    let mut at = 0;
    loop {
        if at == order.len() {
            let Some(orphan) = orphans.pop() else {
                break;
            };
            parents.remove(&orphan);
            order.push(Entry {
                host_pid: orphan,
                pid: Status::read(orphan, orphan)?.inner_pid()?,
                parent: None,
            });
        }
        let parent = order[at].host_pid;
        let children: Vec<i32> = parents
            .iter()
            .filter(|(_, of)| **of == parent)
            .map(|(pid, _)| *pid)
            .collect();
        for child in children {
            parents.remove(&child);
            let pid = Status::read(child, child)?.inner_pid()?;
            order.push(Entry {
                host_pid: child,
                pid,
                parent: Some(at),
            });
        }
        at += 1;
    }
    if let Some(pid) = parents.keys().next() {
        let name = proc_text(&format!("/proc/{pid}/comm")).unwrap_or_default();
        return Err(DumpError::Refused(format!(
            "process {} ({}) is not a descendant of its root process",
            Status::read(*pid, *pid)?.inner_pid()?,
            name.trim()
        )));
    }
    Ok(order)
}

/// Host pids of the manifest's processes, in its order.
pub fn host_pids(all: impl Iterator<Item = i32>, wanted: &Manifest) -> Result<Vec<i32>, DumpError> {
    let mut hosts = BTreeMap::new();
    for host in all {
        hosts.insert(Status::read(host, host)?.inner_pid()?, host);
    }
    let found = wanted
        .processes
        .iter()
        .map(|process| hosts.get(&process.pid).copied());
    found
        .collect::<Option<_>>()
        .ok_or_else(|| DumpError::Refused("a process ended while it was dumped".into()))
}

/// Everything about one process but its descriptors and pages.
pub fn capture(
    entry: &Entry,
    threads: &mut [Tracee],
    init: i32,
    manifest: &mut Manifest,
    memory: &mut MemoryObjects,
) -> Result<Process, DumpError> {
    let (host, pid) = (entry.host_pid, entry.pid);
    // /proc tells nothing of its memory then.
    if threads.first().is_none_or(|leader| leader.tid() != host) {
        return Err(DumpError::Refused(format!(
            "the main thread of process {pid} has ended"
        )));
    }
    let status = Status::read(host, host)?;
    let stat = Stat::read(host)?;
    let vmas = mappings::read(host, pid, memory)?;
    let Some(vdso) = vmas.iter().find(|vma| vma.kind == MappingKind::Vdso) else {
        return Err(DumpError::Refused(format!("process {pid} has no vdso")));
    };
    let gate = mappings::syscall_instruction(host, vdso)?;
    let Some((leader, _)) = threads.split_first_mut() else {
        return Err(DumpError::Refused(format!("process {pid} has no thread")));
    };
    check_roots(host, init, pid)?;

    let mut caller = Caller::new(leader, gate, host)?;
    let actions = caller.signal_actions()?;
    let lock_future = match vmas.iter().any(|vma| vma.flags.locked) {
        true => mappings::lock_of(host, caller.scratch)?,
        false => 0,
    };
    let mut timers = [[0; 4]; 3];
    for (which, timer) in timers.iter_mut().enumerate() {
        caller.call(
            libc::SYS_getitimer,
            [which as u64, caller.scratch, 0, 0, 0, 0],
        )?;
        *timer = caller.read()?;
        // ITIMER_REAL rests while its signal is pending, and looks as if it were not set.
        if timer[2..] == [0; 2] {
            timer.copy_within(..2, 2);
        }
    }
    let posix_timers = timers::read(&mut caller, host, pid)?;
    let brk = caller.call(libc::SYS_brk, [0; 6])? as u64;
    let dumpable = caller.prctl(libc::PR_GET_DUMPABLE)?;
    // The kernel writes an int.
    let subreaper = caller.prctl_out(libc::PR_GET_CHILD_SUBREAPER)? & 0xffff_ffff;
    let habits = habits(&mut caller, pid)?;
    let limits = limits(&mut caller)?;
    caller.finish()?;

    let pending = threads[0]
        .pending(true)
        .map_err(DumpError::io("reading pending signals"))?;
    let mut captured = Vec::new();
    for index in 0..threads.len() {
        let filters = &mut manifest.filters;
        captured.push(thread(threads, index, gate, host, init, filters)?);
    }
    Ok(Process {
        pid,
        parent: entry.parent,
        group: inner_id(host, "NSpgid")?,
        session: inner_id(host, "NSsid")?,
        exe: sandbox_path(&proc_link(&format!("/proc/{host}/exe"))?, "executable", pid)?,
        cwd: sandbox_path(
            &proc_link(&format!("/proc/{host}/cwd"))?,
            "working directory",
            pid,
        )?,
        umask: u32::from_str_radix(status.text("Umask")?, 8).unwrap_or(0o022),
        layout: stat.layout(brk),
        auxv: std::fs::read(format!("/proc/{host}/auxv"))
            .map_err(DumpError::io("reading the auxiliary vector"))?,
        mappings: vmas,
        lock_future,
        pages: Vec::new(),
        descriptors: Vec::new(),
        actions,
        timers,
        posix_timers,
        limits,
        pending,
        dumpable,
        habits,
        subreaper,
        oom_score_adj: proc_text(&format!("/proc/{host}/oom_score_adj"))?
            .trim()
            .parse()
            .unwrap_or(0),
        core_filter: core_filter(host)?,
        autogroup: autogroup(host),
        threads: captured,
    })
}

fn thread(
    threads: &mut [Tracee],
    index: usize,
    gate: u64,
    host: i32,
    init: i32,
    filters: &mut Vec<Vec<u64>>,
) -> Result<Thread, DumpError> {
    let tracee = &mut threads[index];
    let tid = tracee.tid();
    let status = Status::read(host, tid)?;
    let doing = |what: &str| DumpError::io(format!("reading {what} of thread {tid}"));
    let registers = tracee.registers();
    let xstate = tracee.xstate().map_err(doing("the vector registers"))?;
    let rseq = tracee.rseq().map_err(doing("the rseq area"))?;
    let own = tracee.filters().map_err(doing("the seccomp filters"))?;
    let mut in_force = Vec::new();
    for filter in own {
        let known = filters.iter().position(|other| *other == filter);
        in_force.push(known.unwrap_or(filters.len()));
        if known.is_none() {
            filters.push(filter);
        }
    }
    let pending = tracee
        .pending(false)
        .map_err(doing("the pending signals"))?;
    let blocked = tracee.blocked();
    let robust_list = robust_list(tid)?;

    let mut caller = Caller::new(tracee, gate, host)?;
    caller.call(libc::SYS_sigaltstack, [0, caller.scratch, 0, 0, 0, 0])?;
    let [pointer, flags, size] = caller.read()?;
    let clear_tid = caller.prctl_out(libc::PR_GET_TID_ADDRESS)?;
    let parent_death_signal = caller.prctl_out(libc::PR_GET_PDEATHSIG)? & 0xffff_ffff;
    let secure_bits = caller.prctl(libc::PR_GET_SECUREBITS)?;
    let timer_slack = caller.prctl(libc::PR_GET_TIMERSLACK)?;
    caller.finish()?;

    let scheduling = scheduling(tid)?;
    Ok(Thread {
        tid: status.inner_pid()?,
        name: proc_text(&format!("/proc/{host}/task/{tid}/comm"))?
            .trim_end()
            .to_owned(),
        registers,
        xstate,
        blocked,
        alternate_stack: (pointer, flags as u32, size),
        robust_list,
        clear_tid,
        rseq,
        pending,
        nice: nice(tid)?,
        scheduling,
        affinity: affinity(tid, init)?,
        parent_death_signal,
        timer_slack,
        io_priority: io_priority(tid)?,
        credentials: status.credentials(secure_bits)?,
        no_new_privileges: status.number("NoNewPrivs")? != 0,
        filters: in_force,
    })
}

/// /proc/PID/task/TID/status.
pub struct Status {
    text: String,
    path: String,
}

impl Status {
    pub fn read(pid: i32, tid: i32) -> Result<Self, DumpError> {
        let path = format!("/proc/{pid}/task/{tid}/status");
        Ok(Self {
            text: proc_text(&path)?,
            path,
        })
    }

    pub fn text(&self, key: &str) -> Result<&str, DumpError> {
        self.text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
            .map(str::trim)
            .ok_or_else(|| self.wrong(key))
    }

    fn wrong(&self, key: &str) -> DumpError {
        DumpError::Io {
            doing: format!("reading {key} in {}", self.path),
            source: std::io::ErrorKind::InvalidData.into(),
        }
    }

    pub fn number(&self, key: &str) -> Result<i32, DumpError> {
        self.text(key)?.parse().map_err(|_| self.wrong(key))
    }

    /// The last id of a line such as NSpid: the one inside the sandbox.
    pub fn inner(&self, key: &str) -> Result<i32, DumpError> {
        let last = self.text(key)?.split_whitespace().last();
        last.and_then(|id| id.parse().ok())
            .ok_or_else(|| self.wrong(key))
    }

    pub fn inner_pid(&self) -> Result<i32, DumpError> {
        self.inner("NSpid")
    }

    pub fn ids(&self, key: &str) -> Result<[u32; 4], DumpError> {
        let mut ids = [0; 4];
        let mut found = self.text(key)?.split_whitespace();
        for id in &mut ids {
            *id = found
                .next()
                .and_then(|id| id.parse().ok())
                .ok_or_else(|| self.wrong(key))?;
        }
        Ok(ids)
    }

    fn mask(&self, key: &str) -> Result<u64, DumpError> {
        u64::from_str_radix(self.text(key)?, 16).map_err(|_| self.wrong(key))
    }

    fn credentials(&self, secure_bits: u64) -> Result<Credentials, DumpError> {
        let groups = self.text("Groups")?.split_whitespace();
        Ok(Credentials {
            uid: self.ids("Uid")?,
            gid: self.ids("Gid")?,
            groups: groups
                .map(str::parse)
                .collect::<Result<_, _>>()
                .map_err(|_| self.wrong("Groups"))?,
            inheritable: self.mask("CapInh")?,
            permitted: self.mask("CapPrm")?,
            effective: self.mask("CapEff")?,
            bounding: self.mask("CapBnd")?,
            ambient: self.mask("CapAmb")?,
            secure_bits,
        })
    }
}

fn inner_id(pid: i32, key: &str) -> Result<i32, DumpError> {
    Status::read(pid, pid)?.inner(key)
}

/// The fields of /proc/PID/stat behind the command name, from the third on.
pub struct Stat(Vec<u64>);

impl Stat {
    pub fn read(pid: i32) -> Result<Self, DumpError> {
        let text = proc_text(&format!("/proc/{pid}/stat"))?;
        let rest = text.rsplit_once(')').map_or("", |(_, rest)| rest);
        Ok(Self(
            rest.split_whitespace()
                .map(|field| field.parse().unwrap_or(0))
                .collect(),
        ))
    }

    /// Field by its number in proc_pid_stat(5).
    pub fn field(&self, number: usize) -> u64 {
        self.0.get(number - 3).copied().unwrap_or(0)
    }

    fn layout(&self, brk: u64) -> Layout {
        Layout {
            start_code: self.field(26),
            end_code: self.field(27),
            start_stack: self.field(28),
            start_data: self.field(45),
            end_data: self.field(46),
            start_brk: self.field(47),
            brk,
            arg_start: self.field(48),
            arg_end: self.field(49),
            env_start: self.field(50),
            env_end: self.field(51),
        }
    }
}

/// Path inside the sandbox, or a refusal.
pub fn sandbox_path(link: &str, what: &str, pid: i32) -> Result<String, DumpError> {
    if link.starts_with('/') && !link.ends_with(" (deleted)") {
        return Ok(link.to_owned());
    }
    Err(DumpError::Refused(format!(
        "the {what} of process {pid} is {link}, which has no path"
    )))
}

/// The process must see the sandbox's own root and namespaces.
fn check_roots(host: i32, init: i32, pid: i32) -> Result<(), DumpError> {
    // The time namespace is the restorer's: a restored tree has one of its own.
    for name in ["mnt", "net", "uts", "ipc", "pid", "user", "cgroup"] {
        let of = |host: i32| proc_link(&format!("/proc/{host}/ns/{name}"));
        // A kernel without this kind of namespace has no link to compare.
        if let (Ok(own), Ok(sandbox)) = (of(host), of(init))
            && own != sandbox
        {
            return Err(DumpError::Refused(format!(
                "process {pid} made a {name} namespace of its own"
            )));
        }
    }
    let identity = |host: i32| {
        let path = format!("/proc/{host}/root/");
        std::fs::metadata(&path)
            .map(|meta| {
                use std::os::unix::fs::MetadataExt;
                (meta.dev(), meta.ino())
            })
            .map_err(DumpError::io(format!("reading {path}")))
    };
    if identity(host)? != identity(init)? {
        return Err(DumpError::Refused(format!(
            "process {pid} has changed its root directory"
        )));
    }
    Ok(())
}

/// Asked in the process's own name: of another user's it takes CAP_SYS_RESOURCE.
fn limits(caller: &mut Caller<'_>) -> Result<Vec<(u64, u64)>, DumpError> {
    let mut all = Vec::new();
    for resource in 0..16 {
        let args = [0, resource, 0, caller.scratch, 0, 0];
        caller.call(libc::SYS_prlimit64, args)?;
        let [soft, hard] = caller.read()?;
        all.push((soft, hard));
    }
    Ok(all)
}

/// None where this kernel does not know what was asked for: it is at its default then.
fn if_known<T>(asked: Result<T, DumpError>) -> Result<Option<T>, DumpError> {
    match asked {
        Err(DumpError::Io { source, .. })
            if matches!(source.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) =>
        {
            Ok(None)
        }
        asked => asked.map(Some),
    }
}

fn habits(caller: &mut Caller<'_>, pid: i32) -> Result<Habits, DumpError> {
    let mode = [caller.scratch, 0, 0, 0, 0, 0];
    if if_known(caller.call(libc::SYS_get_mempolicy, mode))?.is_some() {
        let [mode] = caller.read()?;
        if mode & 0xffff_ffff != 0 {
            return Err(DumpError::Refused(format!(
                "process {pid} has a NUMA memory policy (set_mempolicy)"
            )));
        }
    }
    let registered = [MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0, 0, 0, 0];
    let registered = if_known(caller.call(libc::SYS_membarrier, registered))?;
    let barriers = registered.unwrap_or(0).cast_unsigned();
    if barriers & !REGISTRATIONS != 0 {
        return Err(DumpError::Refused(format!(
            "process {pid} has registered for memory barriers of an unknown kind ({barriers:#x})"
        )));
    }
    // Its tiles come back only where a thread has been given room for them.
    let permitted = [ARCH_GET_XCOMP_PERM, caller.scratch, 0, 0, 0, 0];
    if if_known(caller.call(libc::SYS_arch_prctl, permitted))?.is_some() {
        let [permitted] = caller.read()?;
        check_states(permitted, pid)?;
    }
    let mut ask = |option: i32, default: u64| {
        if_known(caller.prctl(option)).map(|asked| asked.unwrap_or(default))
    };
    Ok(Habits {
        no_write_execute: ask(libc::PR_GET_MDWE, 0)?,
        no_huge_pages: ask(libc::PR_GET_THP_DISABLE, 0)?,
        memory_failure: ask(libc::PR_MCE_KILL_GET, libc::PR_MCE_KILL_DEFAULT as u64)?,
        barriers,
    })
}

fn check_states(permitted: u64, pid: i32) -> Result<(), DumpError> {
    if permitted & AMX_TILES == 0 {
        return Ok(());
    }
    Err(DumpError::Refused(format!(
        "process {pid} has asked for AMX (ARCH_REQ_XCOMP_PERM)"
    )))
}

fn core_filter(host: i32) -> Result<u32, DumpError> {
    let text = proc_text(&format!("/proc/{host}/coredump_filter"))?;
    u32::from_str_radix(text.trim(), 16).map_err(|_| DumpError::Io {
        doing: format!("reading /proc/{host}/coredump_filter"),
        source: std::io::ErrorKind::InvalidData.into(),
    })
}

/// The nice value of its session's autogroup; 0 where the kernel makes no such groups.
fn autogroup(host: i32) -> i32 {
    let text = proc_text(&format!("/proc/{host}/autogroup")).unwrap_or_default();
    let nice = text.rsplit_once("nice").map(|(_, nice)| nice.trim());
    nice.and_then(|nice| nice.parse().ok()).unwrap_or(0)
}

fn io_priority(tid: i32) -> Result<u32, DumpError> {
    const PROCESS: i32 = 1;
    const CLASS: u32 = 13;
    // SAFETY: takes numbers only.
    let found = unsafe { libc::syscall(libc::SYS_ioprio_get, PROCESS, tid) };
    let found = nix::errno::Errno::result(found).map_err(DumpError::errno(format!(
        "reading the input and output priority of thread {tid}"
    )))? as u32;
    Ok(if found >> CLASS == 0 { 0 } else { found })
}

fn robust_list(tid: i32) -> Result<(u64, u64), DumpError> {
    let (mut head, mut length) = (0u64, 0u64);
    // SAFETY: writes two words that outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_get_robust_list,
            tid,
            &raw mut head,
            &raw mut length,
        )
    };
    nix::errno::Errno::result(result).map_err(DumpError::errno(format!(
        "reading the robust futex list of thread {tid}"
    )))?;
    Ok((head, length))
}

fn nice(tid: i32) -> Result<i32, DumpError> {
    // The system call returns 20 - nice, so that no value looks like an error.
    // SAFETY: takes numbers only.
    let raw = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, tid) };
    let raw = nix::errno::Errno::result(raw).map_err(DumpError::errno(format!(
        "reading the priority of thread {tid}"
    )))?;
    Ok(20 - raw as i32)
}

fn scheduling(tid: i32) -> Result<(i32, i32), DumpError> {
    let mut parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: takes numbers only.
    let policy = unsafe { libc::syscall(libc::SYS_sched_getscheduler, tid) };
    // SAFETY: writes `parameter`.
    let got = unsafe { libc::syscall(libc::SYS_sched_getparam, tid, &raw mut parameter) };
    nix::errno::Errno::result(policy.min(got)).map_err(DumpError::errno(format!(
        "reading the scheduling of thread {tid}"
    )))?;
    if policy as i32 & !libc::SCHED_RESET_ON_FORK == libc::SCHED_DEADLINE {
        return Err(DumpError::Refused(format!(
            "thread {tid} has the scheduling policy SCHED_DEADLINE"
        )));
    }
    Ok((policy as i32, parameter.sched_priority))
}

fn affinity(tid: i32, init: i32) -> Result<Option<Vec<u8>>, DumpError> {
    let read = |tid: i32| {
        let mut mask = vec![0u8; 128];
        // SAFETY: writes at most 128 bytes to `mask`.
        let got = unsafe {
            libc::syscall(
                libc::SYS_sched_getaffinity,
                tid,
                mask.len(),
                mask.as_mut_ptr(),
            )
        };
        let length = nix::errno::Errno::result(got).map_err(DumpError::errno(format!(
            "reading the CPU affinity of thread {tid}"
        )))?;
        mask.truncate(usize::try_from(length).unwrap_or_default());
        Ok::<_, DumpError>(mask)
    };
    let own = read(tid)?;
    Ok((own != read(init)?).then_some(own))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permission_for_amx_is_refused() {
        // What everyone may use where there are tiles, and the same with these.
        assert!(check_states(0x2e7, 7).is_ok());
        let err = check_states(0x602e7, 7).unwrap_err().to_string();
        assert!(err.contains("process 7 has asked for AMX"), "{err}");
    }
}
