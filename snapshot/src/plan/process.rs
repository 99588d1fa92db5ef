//! The programs of the tree's processes and threads.

mod barriers;
mod lock;

use nix::libc;
use pseudo_mm_uapi::abi;
use trenv_restorer::wire::{MOST_RANGES, THREAD_STACK, fd, verb};

use super::files::holders::Holders;
use super::layout::{Placement, Way, kernel_owned};
use super::region::{Program, Region};
use super::shared::{Shared, When};
use super::skeleton::{self, Fill};
use super::{PlanError, credentials, files, generation, lineage, memory, thread, timers};
use crate::clock;
use crate::lineage::{Lineage, Role, dies_alone};
use crate::manifest::{Manifest, PAGE, Process};

/// Marks in a report, after the agent's two: root runs, children forked, memory in place, files open.
pub mod mark {
    pub const RUNS: u64 = 2;
    pub const MEMORY: u64 = 3;
    pub const FILES: u64 = 4;
    pub const THREADS: u64 = 5;
}

const ARCH_SET_FS: u64 = 0x1002;

/// Where the programs of a tree are in the region.
#[derive(Debug)]
pub struct Programs {
    pub prepare: u64,
    /// 0 where a clone has all that it attaches.
    pub attach: u64,
    pub root: u64,
    pub root_stack: u64,
    /// Cleared when the root has left the address space, 0 if it stays.
    pub root_left: u64,
    /// Words that the kernel clears when the clone and its helper have left.
    pub clone_left: u64,
    pub helper_left: u64,
    /// For each process that is not loaded, its table of pages to copy ahead.
    pub tables: Vec<Option<u64>>,
}

/// What the programs of all processes are made from.
#[derive(Debug, Clone, Copy)]
pub struct Tree<'a> {
    pub manifest: &'a Manifest,
    pub placement: &'a Placement,
    pub shared: &'a Shared,
    /// Number of the control descriptor.
    pub control: u64,
    pub own: &'a Own,
    /// What a clone has when it is made.
    pub fill: Fill,
    /// For each process, the bounding capabilities that it or one that comes of it has.
    pub needed: &'a [u64],
    pub holders: &'a Holders,
}

/// [`Tree::needed`].
pub fn needed_bounding(manifest: &Manifest, lineage: &Lineage) -> Vec<u64> {
    let processes = manifest.processes.iter();
    let own: Vec<u64> = processes
        .map(|process| process.threads[0].credentials.bounding)
        .collect();
    let mut needed = own.clone();
    for (index, own) in own.into_iter().enumerate() {
        let mut at = lineage.maker_process(index);
        while let Some(maker) = at {
            needed[maker] |= own;
            at = lineage.maker_process(maker);
        }
    }
    needed
}

/// What a zygote inherits from this process.
#[derive(Debug)]
pub struct Own {
    limits: Vec<(u64, u64)>,
    core_filter: u32,
    capabilities: u64,
    /// Whether trees can have clocks of their own here.
    clocks: bool,
    /// Whether the numbers of POSIX timers can be chosen here.
    chosen_timers: bool,
}

impl Tree<'_> {
    pub fn way(&self, index: usize) -> Way {
        self.placement.ways[index]
    }

    fn process(&self, index: usize) -> &Process {
        &self.manifest.processes[index]
    }

    fn way_exists(&self, way: Way) -> bool {
        self.placement.ways.contains(&way)
    }

    /// Those that are made in the address space of `host` and leave it, by exec or at their end.
    fn passing_through(&self, host: Option<usize>) -> Vec<usize> {
        let kin = &self.placement.lineage.kin;
        (0..kin.len())
            .filter(|index| match kin[*index].role {
                Role::Process(process) => self.way(process) == Way::Loaded,
                Role::Zombie(zombie) => !dies_alone(&self.manifest.zombies[zombie]),
                Role::StandIn => true,
            })
            .filter(|index| self.placement.host(*index) == host)
            .collect()
    }

    /// Number of the descriptor that holds the capsule of a loaded process.
    fn capsule(&self, index: usize) -> u64 {
        let before = &self.placement.ways[..index];
        let loaded = before.iter().filter(|way| **way == Way::Loaded).count();
        self.control + fd::CAPSULES + loaded as u64
    }

    /// The capabilities that a process's bounding set still has where it is made.
    fn inherited_bounding(&self, index: usize) -> u64 {
        let lineage = &self.placement.lineage;
        let mut at = lineage.maker_process(index);
        while let Some(parent) = at {
            if self.way(parent) != Way::Loaded {
                return self.needed[parent];
            }
            // Its bounding set is cut after its exec, which would cut its capabilities too.
            at = lineage.maker_process(parent);
        }
        self.common_bounding()
    }

    /// The bounding capabilities that some process of the tree has.
    fn common_bounding(&self) -> u64 {
        self.needed.iter().fold(0, |all, needed| all | needed)
    }
}

/// Puts the programs that run in the zygote's clones into the region.
pub fn programs(tree: Tree<'_>, region: &mut Region) -> Result<Programs, PlanError> {
    let table = vec![0; 8 * (1 + 2 * MOST_RANGES)];
    let mut tables = Vec::new();
    let mut left = Vec::new();
    for way in &tree.placement.ways {
        tables.push((*way != Way::Loaded).then(|| region.put(&table, 8)));
    }
    for _ in &tree.placement.lineage.kin {
        left.push(region.put_words(&[1]));
    }
    let (clone_left, helper_left) = (region.put_words(&[1]), region.put_words(&[1]));
    let mut prepare = Program::default();
    if tree.fill == (Fill::Skeleton { watched: true }) {
        skeleton::watch(tree.control, region, &mut prepare);
    }
    credentials::bound_ahead(
        tree.common_bounding(),
        tree.own.capabilities,
        region,
        &mut prepare,
    );
    barriers::ahead(tree, region, &mut prepare);
    tree.shared.make_ahead(tree, region, &mut prepare);
    if tree.fill.has_pages() {
        lock::ahead(tree, region, &mut prepare);
    }
    if let Some(table) = tables[tree.placement.heir] {
        prepare.verb(verb::COPY_AHEAD, [table]);
    }
    if tree.way_exists(Way::Forked) {
        advise_heir(libc::MADV_DONTFORK, tree, &mut prepare);
    }
    let attach = match tree.fill {
        Fill::Blank => {
            let attach = attach(tree, tables[tree.placement.heir], region);
            region.put_program(&attach)
        }
        _ => 0,
    };
    let words = Words {
        left: &left,
        clones: [clone_left, helper_left],
        tables: &tables,
    };
    Ok(Programs {
        prepare: region.put_program(&prepare),
        attach,
        root: program_of(0, tree, &words, region)?,
        root_stack: region.put_stack(),
        root_left: match tree.way(0) {
            Way::Loaded => left[0],
            _ => 0,
        },
        clone_left,
        helper_left,
        tables,
    })
}

/// Attaches the template of the pool's device in a clone, all of it by one call, and brings in what the
/// heir's table says by then.
fn attach(tree: Tree<'_>, table: Option<u64>, region: &mut Region) -> Program {
    let mut program = Program::default();
    let template = tree.control + fd::TEMPLATE;
    program.about(region.sentence("attaching memory from the pool's device".into()));
    let size = size_of::<abi::Attach>() as u64;
    // Flags and process are 0: all of the template, here.
    let argument = region.put_words(&[size, 0, 0]);
    let attach = u64::from(abi::ATTACH);
    program.call(libc::SYS_ioctl, [template, attach, argument]);
    program.call(libc::SYS_close, [template]);
    for place in &tree.placement.placed {
        let mapping = &tree.process(place.process).mappings[place.mapping];
        if skeleton::is_attachable(mapping) {
            memory::advise(place.at, place.length, mapping.flags, &mut program);
        }
    }
    if tree.way_exists(Way::Forked) {
        // That which was given ahead met nothing there.
        advise_heir(libc::MADV_DONTFORK, tree, &mut program);
    }
    if let Some(table) = table {
        program.verb(verb::COPY_AHEAD, [table]);
    }
    program
}

/// Addresses of words in the region.
pub struct Words<'a> {
    /// For each of the kin: cleared when it has left the address space in which it was made.
    pub left: &'a [u64],
    /// The same for the clone and its helper.
    clones: [u64; 2],
    tables: &'a [Option<u64>],
}

/// The program of a process in the address space in which it is made; its address.
pub fn program_of(
    index: usize,
    tree: Tree<'_>,
    words: &Words<'_>,
    region: &mut Region,
) -> Result<u64, PlanError> {
    let process = tree.process(index);
    let mut program = Program::default();
    if index == 0 {
        program.verb(verb::MARK, [mark::RUNS]);
        if tree.own.clocks {
            let wanted = tree.manifest.clocks;
            program.verb(verb::MAKE_CLOCK, [wanted.monotonic, wanted.boottime]);
        }
        // Open files may lie there.
        files::fill_tmpfs(tree.manifest, region, &mut program);
        tree.shared.fill_tmpfs(tree, region, &mut program);
        tree.shared.make_unlinked(tree, region, &mut program);
        tree.shared.make_sysv(tree, region, &mut program);
        files::make(tree, region, &mut program)?;
        files::watch_files(tree.manifest, tree.control, region, &mut program);
    }
    let loaded = tree.way(index) == Way::Loaded;
    if !loaded {
        // First what no child needs, so that they need not drop it.
        let inherited = tree.inherited_bounding(index);
        credentials::bound(tree.needed[index], inherited, region, &mut program);
    }
    lineage::take_place(index, tree, words, region, &mut program)?;
    if !loaded {
        let own = process.threads[0].credentials.bounding;
        credentials::bound(own, tree.needed[index], region, &mut program);
    }
    match tree.way(index) {
        Way::Loaded => {
            program.about(region.sentence(format!("loading process {}", process.pid)));
            program.call(libc::SYS_dup3, [tree.capsule(index), 0, 0]);
            let (name, arguments) = (region.put_text(""), region.put_words(&[0]));
            let empty_path = libc::AT_EMPTY_PATH as u64;
            let loader = tree.control + fd::LOADER;
            program.call(
                libc::SYS_execveat,
                [loader, name, arguments, arguments, empty_path],
            );
        }
        Way::Heir => {
            let others = tree.passing_through(None).into_iter();
            let others = others.map(|other| words.left[other]);
            for word in words.clones.into_iter().chain(others) {
                program.verb(verb::WAIT_LEFT, [word]);
            }
            if tree.own.clocks {
                program.verb(verb::ENTER_CLOCK, []);
            }
            if tree.way_exists(Way::Forked) {
                advise_heir(libc::MADV_DOFORK, tree, &mut program);
            }
            move_memory(index, tree, region, &mut program);
            become_process(index, tree, region, &mut program);
        }
        Way::Forked => {
            for other in tree.passing_through(Some(index)) {
                program.verb(verb::WAIT_LEFT, [words.left[other]]);
            }
            move_memory(index, tree, region, &mut program);
            if let Some(table) = words.tables[index] {
                program.verb(verb::COPY_AHEAD, [table]);
            }
            become_process(index, tree, region, &mut program);
        }
    }
    Ok(region.put_program(&program))
}

/// The program of a loaded process in its own address space.
pub fn capsule_program(
    index: usize,
    tree: Tree<'_>,
    pieces: &[memory::Piece],
    region: &mut Region,
    vdso_words: &mut Vec<u64>,
) -> (Program, Vec<memory::Copy>, u64) {
    let process = tree.process(index);
    let mut program = Program::default();
    let own = process.threads[0].credentials.bounding;
    let inherited = tree.inherited_bounding(index);
    credentials::bound(own, inherited, region, &mut program);
    // Above everything that `files::make` has made.
    let exe = tree.control + fd::OBJECTS + tree.manifest.objects.len() as u64;
    let numbers = (tree.control, exe);
    let (copies, end) = memory::load(
        process,
        pieces,
        PAGE,
        numbers,
        region,
        &mut program,
        vdso_words,
    );
    become_process(index, tree, region, &mut program);
    (program, copies, end)
}

/// With the memory in place: descriptors, threads, credentials, and the return to where it was.
fn become_process(index: usize, tree: Tree<'_>, region: &mut Region, program: &mut Program) {
    let (process, manifest, control) = (tree.process(index), tree.manifest, tree.control);
    let pid = process.pid;
    lineage::settle(&tree.placement.lineage.kin[index], region, program);
    advise_about_forks(process, region, program);
    barriers::at_start(index, tree, region, program);
    lock::at_start(index, tree, region, program);
    generation::map(process, region, program);
    program.verb(verb::MARK, [mark::MEMORY]);
    files::install(index, tree, region, program);
    program.verb(verb::MARK, [mark::FILES]);
    adjust(index, tree, region, program);
    settle(process, &tree.own.limits, region, program);

    let shared = credentials::share_filters(&process.threads);
    let gate = region.put_words(&[0]);
    let mut ready = Vec::new();
    for thread in &process.threads[1..] {
        ready.push(region.put_words(&[0]));
        let words = (gate, ready.last().copied().filter(|_| shared));
        let its = thread::program(thread, process, manifest, words, region);
        let stack = region.put(&vec![0; THREAD_STACK as usize], 16);
        program.about(region.sentence(format!("making thread {} of process {pid}", thread.tid)));
        let args = [
            thread.tid as u64,
            its,
            stack + THREAD_STACK,
            thread.registers.fs_base,
        ];
        program.verb(verb::THREAD, args);
    }
    // A timer may be a thread's.
    timers::make(process, tree.own.chosen_timers, region, program);
    files::owners::set(index, tree, region, program);
    let main = &process.threads[0];
    program.about(region.sentence(format!("setting up the main thread of process {pid}")));
    program.call(libc::SYS_arch_prctl, [ARCH_SET_FS, main.registers.fs_base]);
    thread::state(main, process, region, program);
    thread::send_pending(&process.pending, None, pid, region, program);
    credentials::take(main, manifest, region, program);
    thread::state_after_credentials(main, program);
    take_habits(process, region, program);
    if shared {
        // A filter may forbid what the others still have to do.
        for word in ready {
            program.verb(verb::WAIT, [word]);
        }
    }
    credentials::take_filters(main, shared, manifest, region, program);
    program.about(region.sentence(format!("making process {pid} dumpable or not")));
    program.call(
        libc::SYS_prctl,
        [libc::PR_SET_DUMPABLE as u64, process.dumpable & 1, 0, 0, 0],
    );
    program.verb(verb::MARK, [mark::THREADS]);
    program.verb(verb::REPORT, [index as u64]);
    program.verb(verb::AWAIT_GO, []);
    program
        .call(libc::SYS_close, [control + fd::CONTROL])
        .or_not();
    program.verb(verb::RELEASE, [gate]);
    program.verb(verb::SIGRETURN, [thread::put_frame(main, region)]);
}

/// Unmaps what belongs to others and moves what was staged.
fn move_memory(index: usize, tree: Tree<'_>, region: &mut Region, program: &mut Program) {
    let (manifest, placement) = (tree.manifest, tree.placement);
    let process = tree.process(index);
    let how = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    program.about(region.sentence(format!("unmapping what process {} has not", process.pid)));
    for (start, end) in placement.foreign(index, manifest) {
        program.call(libc::SYS_munmap, [start, end - start]);
    }
    if index != placement.heir {
        // First of all, before anything is moved onto the place where the vdso lies now.
        program.about(region.sentence(format!("moving the vdso of process {}", process.pid)));
        let heir = &manifest.processes[placement.heir].mappings;
        let from = heir.iter().filter(|mapping| kernel_owned(mapping));
        let to = process
            .mappings
            .iter()
            .filter(|mapping| kernel_owned(mapping));
        for (from, to) in from.zip(to) {
            if from.start != to.start {
                let length = to.end - to.start;
                let args = [from.start, length, length, how, to.start];
                program.call(libc::SYS_mremap, args).exactly(to.start);
            }
        }
    }
    for place in placement.of_process(index) {
        let mapping = &process.mappings[place.mapping];
        let there = When::of(mapping, manifest) != When::Start;
        if there && place.at != mapping.start {
            program.about(region.sentence(format!(
                "moving mapping {:#x} of process {}",
                mapping.start, process.pid
            )));
            let args = [place.at, place.length, place.length, how, mapping.start];
            program.call(libc::SYS_mremap, args).exactly(mapping.start);
        }
    }
    tree.shared.map_at_start(index, tree, region, program);
    if index != placement.heir {
        let heir = &manifest.processes[placement.heir];
        let exe = (heir.exe != process.exe).then_some(tree.control + fd::OBJECTS - 1);
        if let Some(number) = exe {
            program.about(region.sentence(format!("opening {}", process.exe)));
            memory::open(&process.exe, region, program);
            program.call(libc::SYS_dup3, [0, number, 0]).from(0, 0);
            program.call(libc::SYS_close, [0]).from(0, 0);
        }
        memory::describe_memory(process, exe, region, program);
    }
}

/// Keeps what the heir alone needs from those that are forked, or ends that.
fn advise_heir(advice: i32, tree: Tree<'_>, program: &mut Program) {
    for (start, end) in tree.placement.of_heir_alone(tree.manifest) {
        // The whole range is advised, though the gaps in it make the call fail (madvise(2), ENOMEM).
        program
            .call(libc::SYS_madvise, [start, end - start, advice as u64])
            .or_not();
    }
}

/// Advice that would have kept the memory from a clone.
fn advise_about_forks(process: &Process, region: &mut Region, program: &mut Program) {
    for mapping in &process.mappings {
        if mapping.flags.droppable {
            // A fork has left its guard pages out.
            memory::guard(mapping.start, mapping, process.pid, region, program);
        }
        for (wanted, advice) in [
            (mapping.flags.dont_fork, libc::MADV_DONTFORK),
            (mapping.flags.wipe_on_fork, libc::MADV_WIPEONFORK),
        ] {
            if wanted && !kernel_owned(mapping) {
                program.about(region.sentence(format!("advising about {:#x}", mapping.start)));
                let length = mapping.end - mapping.start;
                program.call(libc::SYS_madvise, [mapping.start, length, advice as u64]);
            }
        }
    }
}

/// What a process tells the kernel through files of /proc.
fn adjust(index: usize, tree: Tree<'_>, region: &mut Region, program: &mut Program) {
    let (process, processes) = (tree.process(index), &tree.manifest.processes);
    let pid = process.pid;
    let mut write = |name: &str, text: String| {
        program.about(region.sentence(format!("setting {name} of process {pid}")));
        let path = region.put_text(&format!("/proc/self/{name}"));
        let (here, write_only) = (libc::AT_FDCWD as u64, libc::O_WRONLY as u64);
        program
            .call(libc::SYS_openat, [here, path, write_only, 0])
            .into(0);
        let (bytes, length) = (region.put(text.as_bytes(), 1), text.len() as u64);
        program
            .call(libc::SYS_write, [0, bytes, length])
            .from(0, 0)
            .exactly(length);
        program.call(libc::SYS_close, [0]).from(0, 0);
    };
    if process.core_filter != tree.own.core_filter {
        write("coredump_filter", format!("{:#x}", process.core_filter));
    }
    if process.oom_score_adj != lowest_oom_score_adj(tree.manifest) {
        write("oom_score_adj", process.oom_score_adj.to_string());
    }
    // One of a session speaks for all of it.
    let first = processes
        .iter()
        .position(|other| other.session == process.session);
    if process.autogroup != 0 && first == Some(index) {
        write("autogroup", process.autogroup.to_string());
    }
}

/// What everyone inherits: raising it takes no capability.
pub fn lowest_oom_score_adj(manifest: &Manifest) -> i32 {
    let processes = manifest.processes.iter();
    processes
        .map(|process| process.oom_score_adj)
        .min()
        .unwrap_or(0)
}

/// What a process has once: signal actions, timers, limits, working directory.
fn settle(
    process: &Process,
    own_limits: &[(u64, u64)],
    region: &mut Region,
    program: &mut Program,
) {
    let pid = process.pid;
    program.about(region.sentence(format!("setting signal actions of process {pid}")));
    // The zygote ignores SIGCHLD; every other signal has its default action there.
    if !process
        .actions
        .iter()
        .any(|action| action.signal == libc::SIGCHLD)
    {
        let default = region.put_words(&[0; 4]);
        program.call(
            libc::SYS_rt_sigaction,
            [libc::SIGCHLD as u64, default, 0, 8],
        );
    }
    for action in &process.actions {
        let words = [action.handler, action.flags, action.restorer, action.mask];
        let words = region.put_words(&words);
        program.call(libc::SYS_rt_sigaction, [action.signal as u64, words, 0, 8]);
    }
    for (which, timer) in process.timers.iter().enumerate() {
        if *timer != [0; 4] {
            let timer = region.put_words(timer);
            program.call(libc::SYS_setitimer, [which as u64, timer, 0]);
        }
    }
    program.call(libc::SYS_umask, [u64::from(process.umask)]);
    program.about(region.sentence(format!("entering {}", process.cwd)));
    let cwd = region.put_text(&process.cwd);
    program.call(libc::SYS_chdir, [cwd]);
    for (resource, limit) in process.limits.iter().enumerate() {
        // The zygote has raised its limit of open files, to have numbers above the tree's.
        let raised = resource == libc::RLIMIT_NOFILE as usize;
        if raised || own_limits.get(resource) != Some(limit) {
            program.about(region.sentence(format!("setting resource limit {resource}")));
            let limit = region.put_words(&[limit.0, limit.1]);
            program.call(libc::SYS_prlimit64, [0, resource as u64, limit, 0]);
        }
    }
    if process.subreaper != 0 {
        program.call(
            libc::SYS_prctl,
            [libc::PR_SET_CHILD_SUBREAPER as u64, 1, 0, 0, 0],
        );
    }
}

/// What prctl(2) sets for the whole process. It must not forbid what a start still has to do.
fn take_habits(process: &Process, region: &mut Region, program: &mut Program) {
    let habits = process.habits;
    program.about(region.sentence(format!("setting habits of process {}", process.pid)));
    let mut set = |option: i32, args: [u64; 2]| {
        let [first, second] = args;
        program.call(libc::SYS_prctl, [option as u64, first, second, 0, 0]);
    };
    if habits.memory_failure != libc::PR_MCE_KILL_DEFAULT as u64 {
        let one = libc::PR_MCE_KILL_SET as u64;
        set(libc::PR_MCE_KILL, [one, habits.memory_failure]);
    }
    if habits.no_huge_pages != 0 {
        set(libc::PR_SET_THP_DISABLE, [1, habits.no_huge_pages & !1]);
    }
    if habits.no_write_execute != 0 {
        set(libc::PR_SET_MDWE, [habits.no_write_execute, 0]);
    }
}

impl Own {
    /// What this process has.
    pub fn read() -> Result<Self, PlanError> {
        let capabilities = std::fs::read_to_string("/proc/self/status")
            .ok()
            .and_then(|status| {
                let line = status
                    .lines()
                    .find_map(|line| line.strip_prefix("CapPrm:"))?;
                u64::from_str_radix(line.trim(), 16).ok()
            })
            .ok_or_else(|| PlanError::Unsupported("/proc does not tell capabilities".into()))?;
        Ok(Self {
            limits: own_limits(),
            core_filter: std::fs::read_to_string("/proc/self/coredump_filter")
                .ok()
                .and_then(|text| u32::from_str_radix(text.trim(), 16).ok())
                .ok_or_else(|| PlanError::Unsupported("/proc tells no core dump filter".into()))?,
            capabilities,
            clocks: clock::own_clocks(),
            chosen_timers: crate::dump::timers::ids_can_be_chosen(),
        })
    }
}

fn own_limits() -> Vec<(u64, u64)> {
    (0..16)
        .map(|resource| {
            let mut limit = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            // SAFETY: reads a limit of this process into `limit`.
            unsafe { libc::getrlimit(resource, &raw mut limit) };
            (limit.rlim_cur, limit.rlim_max)
        })
        .collect()
}
