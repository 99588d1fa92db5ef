//! Restores programs built during the test, in sandboxes made after the dump. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::{Bed, TestResult};
use trenv_snapshot::Fingerprint;
use trenv_snapshot::clock::Clocks;
use trenv_snapshot::methods::Method;
use trenv_snapshot::zygote::{Zygote, ZygoteError};

/// Counter, heap checksum, pid, sum over threads, a value kept in a vector register.
fn ask(instance: &mut harness::Instance, line: &str) -> Vec<String> {
    instance
        .ask(line)
        .split_whitespace()
        .map(str::to_owned)
        .collect()
}

/// A zygote of the counter, which has answered one question.
fn counted_once(bed: &Bed) -> Result<Zygote, Box<dyn std::error::Error>> {
    let program = bed.compile("counter")?;
    let mut first = bed.run(&[&program])?;
    ask(&mut first, "count");
    bed.zygote(&bed.dump(first)?)
}

#[test]
fn a_threaded_program_goes_on_where_it_was() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("counter")?;
    let mut first = bed.run(&[&program])?;
    for _ in 0..5 {
        ask(&mut first, "count");
    }
    let before = ask(&mut first, "count");
    assert_eq!(before[0], "5");

    let template = bed.dump(first)?;
    let zygote = bed.zygote(&template)?;
    let mut agent = zygote.agent()?;

    let mut instances = Vec::new();
    for _ in 0..2 {
        instances.push(bed.start(&mut agent)?);
    }
    for instance in &mut instances {
        let after = ask(instance, "count");
        assert_eq!(after[0], "6", "the counter goes on from the snapshot");
        assert_eq!(after[1..3], before[1..3], "heap and pid are the snapshot's");
        assert_eq!(after[3], "42", "every thread works");
        assert_eq!(after[4], "192", "so do vector registers");
    }
    // What one writes, the other and the template never see.
    let written = ask(&mut instances[0], "write");
    let untouched = ask(&mut instances[1], "count");
    assert_ne!(written[1], before[1]);
    assert_eq!(untouched[1], before[1]);
    let mut third = bed.start(&mut agent)?;
    assert_eq!(
        ask(&mut third, "count")[..2],
        ["6".to_owned(), before[1].clone()]
    );
    Ok(())
}

#[test]
fn a_parked_tree_waits_before_its_first_instruction() -> TestResult {
    let bed = Bed::new()?;
    let zygote = counted_once(&bed)?;
    let mut agent = zygote.agent()?;
    let (mut instance, parked) = bed.park(&mut agent)?;
    instance.tell("count");
    assert!(!instance.has_answered(), "it runs although nobody said so");
    parked.resume()?;
    assert!(instance.answer().starts_with("1 "), "the counter goes on");
    assert!(instance.ask("count").starts_with("2 "));
    Ok(())
}

#[test]
fn a_parked_tree_ends_when_nobody_can_resume_it() -> TestResult {
    let bed = Bed::new()?;
    let zygote = counted_once(&bed)?;
    let (instance, parked) = bed.park(&mut zygote.agent()?)?;
    drop(parked);
    let gone = || !std::path::Path::new(&format!("/proc/{}/exe", instance.root)).exists();
    let begun = std::time::Instant::now();
    while !gone() && begun.elapsed() < std::time::Duration::from_secs(5) {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(gone(), "it waits for ever");
    Ok(())
}

#[test]
fn memory_keeps_its_meaning() -> TestResult {
    memory_is_right(&[])
}

/// jemalloc gives memory back with MADV_DONTNEED and depends on zeroes coming back.
#[test]
fn memory_keeps_its_meaning_under_jemalloc() -> TestResult {
    memory_is_right(&[
        "env",
        "LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libjemalloc.so.2",
        "MALLOC_CONF=dirty_decay_ms:0,muzzy_decay_ms:0,retain:false",
    ])
}

fn memory_is_right(wrapper: &[&str]) -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("memory")?;
    let mut first = bed.run(&[wrapper, &[&program]].concat())?;
    assert_eq!(first.ask("check"), "ok", "before the snapshot");
    let template = bed.dump(first)?;
    let zygote = bed.zygote(&template)?;
    let mut agent = zygote.agent()?;
    for turn in 0..5 {
        let mut instance = bed.start(&mut agent)?;
        for _ in 0..20 {
            assert_eq!(instance.ask("check"), "ok", "instance {turn}");
        }
    }
    Ok(())
}

#[test]
fn a_restored_program_is_snapshotted_again() -> TestResult {
    let bed = Bed::new()?;
    let zygote = counted_once(&bed)?;
    let mut second = bed.start(&mut zygote.agent()?)?;
    let written = ask(&mut second, "write");
    let zygote = bed.zygote(&bed.dump(second)?)?;
    let mut third = bed.start(&mut zygote.agent()?)?;
    let after = ask(&mut third, "count");
    assert_eq!((after[0].as_str(), &after[1]), ("2", &written[1]));
    Ok(())
}

/// What not every machine can have.
const MAY_BE_MISSING: [&str; 8] = [
    "disk",
    "sealed",
    "key",
    "tiles",
    "core",
    "secret",
    "secret-file",
    "device",
];

#[test]
fn a_refused_dump_names_the_reason_and_leaves_the_program_alone() -> TestResult {
    let bed = Bed::new()?;
    for (state, reason) in [
        ("hard-link", "is a deleted file that has another name"),
        ("large", "is a deleted file of more than 64 MiB"),
        ("removed", "is marked to be removed (IPC_RMID)"),
        ("lease", "has a lock of the kind LEASE"),
        ("timer", "which goes by the CPU time of a process"),
        ("inotify", "is an inotify that watches inode"),
        ("executable", "refused (deleted), which has no path"),
        ("namespace", "made a uts namespace of its own"),
        ("root", "has changed its root directory"),
        ("policy", "has a NUMA memory policy"),
        ("terminal", "is a terminal (/dev/ptmx)"),
        ("missing", "cannot be captured (anon_inode:[userfaultfd])"),
        ("ring", "cannot be captured (anon_inode:[io_uring])"),
        ("pidfd", "is a pidfd of a process outside"),
        (
            "epoll",
            "an epoll watches descriptor 4, which is closed there",
        ),
        ("packets", "a pipe with packets (O_DIRECT)"),
        ("map", "cannot be captured (anon_inode:bpf-map)"),
        ("deadline", "has the scheduling policy SCHED_DEADLINE"),
        ("large-page", "uses huge TLB pages"),
        ("disk", "is a block device (/dev/"),
        ("sealed", "is sealed (mseal)"),
        ("key", "has a protection key (pkey_mprotect)"),
        ("tiles", "has asked for AMX"),
        ("ended", "the main thread of process"),
        ("core", "is a zombie that has left a core file"),
        ("end-signal", "is a zombie that tells its end by signal 23"),
        ("secret", "is secret memory (/secretmem"),
        ("secret-file", "is secret memory (/secretmem"),
        (
            "write-sealed",
            "is sealed against future writes, but written through a mapping (/memfd:written",
        ),
        (
            "small-files",
            "its tmpfs mounts hold more than 4 MiB (/dev/shm/small-",
        ),
        (
            "large-files",
            "the large files in its tmpfs mounts hold more than 128 MiB (/dev/shm/",
        ),
        ("node", "/dev/shm/node is a special file in a tmpfs"),
        ("device", "is a device with a state of its own (/dev/"),
        ("netlink", "is a socket of family 16"),
        ("packet", "is a socket of family 17"),
    ] {
        let program = bed.compile("refused")?;
        let mut instance = bed.run(&[&program, state])?;
        let answer = instance.ask("state");
        if MAY_BE_MISSING.contains(&state) && answer == "unknown" {
            eprintln!("This machine cannot have the state {state:?}: it is not tested.");
            continue;
        }
        assert_eq!(answer, state);
        bed.refuses(&mut instance, state, reason)?;
    }
    Ok(())
}

#[test]
fn a_child_that_has_left_the_cgroup_is_refused_by_name() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("refused")?;
    let mut instance = bed.run(&[&program, "child"])?;
    assert_eq!(instance.ask("state"), "child");
    let child = instance.children()[0];
    instance.group.leave(child)?;
    let err = bed.try_dump_of_group(&instance).err();
    let text = err.ok_or("it was dumped")?.to_string();
    let named = format!("process {} (refused), a child of process", inner(child)?);
    assert!(text.contains(&named), "{named}: {text}");
    assert!(text.contains("left the function's cgroup"), "{text}");
    assert_eq!(instance.ask("state"), "child", "it goes on");
    Ok(())
}

/// The pid of a process in its sandbox.
fn inner(host: i32) -> Result<String, Box<dyn std::error::Error>> {
    let status = std::fs::read_to_string(format!("/proc/{host}/status"))?;
    let line = status.lines().find(|line| line.starts_with("NSpid:"));
    let pid = line.and_then(|line| line.split_whitespace().last());
    Ok(pid.ok_or("no pid")?.to_owned())
}

#[test]
fn a_start_that_fails_says_at_which_step() -> TestResult {
    let bed = Bed::new()?;
    let zygote = counted_once(&bed)?;
    let mut agent = zygote.agent()?;
    let taken = bed.start(&mut agent)?;
    // The same sandbox once more: the root's pid is taken.
    let err = bed
        .start_beside(&mut agent, &taken)
        .err()
        .ok_or("two trees in one sandbox")?;
    assert!(
        err.to_string().contains("cloning the tree's root process"),
        "{err}"
    );
    // The agent still serves.
    let mut next = bed.start(&mut agent)?;
    assert_eq!(ask(&mut next, "count")[0], "1");
    Ok(())
}

#[test]
fn agents_that_end_make_room_for_others() -> TestResult {
    let bed = Bed::new()?;
    let zygote = counted_once(&bed)?;
    let mut agent = zygote.agent()?;
    for _ in 0..1500 {
        agent = zygote.agent()?;
    }
    assert_eq!(ask(&mut bed.start(&mut agent)?, "count")[0], "1");
    Ok(())
}

#[test]
fn what_calls_write_is_copied_ahead() -> TestResult {
    let bed = Bed::new()?;
    let zygote = counted_once(&bed)?;
    let mut agent = zygote.agent()?;
    let mut faults_of_a_call = || -> Result<u64, Box<dyn std::error::Error>> {
        let mut instance = bed.start(&mut agent)?;
        let before = instance.faults()?;
        // Writes a page of the heap and some of the stack and of the data segment.
        ask(&mut instance, "write");
        let faults = instance.faults()? - before;
        zygote.learn(&[instance.root], "")?;
        Ok(faults)
    };
    let untaught = faults_of_a_call()?;
    faults_of_a_call()?;
    let taught = faults_of_a_call()?;
    assert!(
        taught < untaught,
        "{taught} faults after learning, {untaught} before"
    );
    Ok(())
}

#[test]
fn a_hundred_starts_in_a_row() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("counter")?;
    let mut first = bed.run(&[&program])?;
    let before = ask(&mut first, "count");
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let mut agent = zygote.agent()?;
    for _ in 0..100 {
        let mut instance = bed.start(&mut agent)?;
        assert_eq!(
            ask(&mut instance, "count")[..2],
            ["1".to_owned(), before[1].clone()]
        );
    }
    Ok(())
}

/// CLOCK_MONOTONIC and CLOCK_BOOTTIME of a program, in nanoseconds.
fn clocks_of(instance: &mut harness::Instance) -> Result<[u64; 2], Box<dyn std::error::Error>> {
    let answer = instance.ask("time");
    let (monotonic, boottime) = answer.split_once(' ').ok_or("not two clocks")?;
    Ok([monotonic.parse()?, boottime.parse()?])
}

/// Absolute times that a program waits for are as near after a restore as before the dump, whether the
/// machine has been up for longer or, after a reboot, for less.
#[test]
fn clocks_go_on_from_the_dump() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("clock")?;
    for place in ["ahead", "behind"] {
        let begun = Clocks::now()?;
        let mut first = bed.run(&[&program, place])?;
        let before = clocks_of(&mut first)?;
        assert_eq!(before[0] > begun.monotonic, place == "ahead", "{before:?}");
        let zygote = bed.zygote(&bed.dump(first)?)?;
        let mut second = bed.start(&mut zygote.agent()?)?;
        let after = clocks_of(&mut second)?;
        // A dump of the restored program goes by its clocks, not by the machine's.
        let zygote = bed.zygote(&bed.dump(second)?)?;
        let mut third = bed.start(&mut zygote.agent()?)?;
        let later = clocks_of(&mut third)?;
        let passed = Clocks::now()?.monotonic - begun.monotonic;
        for clock in 0..2 {
            let [before, after, later] = [before[clock], after[clock], later[clock]];
            let most = before + passed;
            assert!(
                before <= after && after <= later && later <= most,
                "clock {clock}, {place}: {before}, then {after} and {later}, at most {most}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_start_whose_clocks_cannot_go_on_fails_and_says_so() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("counter")?;
    let template = bed.dump(bed.run(&[&program])?)?;
    // No time namespace goes so far (time_namespaces(7), ERANGE).
    let years = 200 * 365 * 86_400 * 1_000_000_000;
    let changes: [fn(&mut Clocks, u64); 2] = [
        |clocks, far| clocks.monotonic = far,
        |clocks, far| clocks.boottime = far,
    ];
    for change in changes {
        let far = bed.retold(&template, |manifest| change(&mut manifest.clocks, years))?;
        let zygote = bed.zygote(&far)?;
        let err = bed.start(&mut zygote.agent()?).err().ok_or("it started")?;
        assert!(
            matches!(err.downcast_ref(), Some(ZygoteError::Clock(_))),
            "{err}"
        );
        let text = err.to_string();
        assert!(text.contains("no time namespace"), "{text}");
        assert!(text.ends_with("snapshot the function anew"), "{text}");
    }
    Ok(())
}

#[test]
fn a_snapshot_of_another_machine_is_refused_and_both_are_named() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("counter")?;
    let template = bed.dump(bed.run(&[&program])?)?;
    let other = "6.1.0-other-0123456789abcdef";
    let foreign = bed.retold(&template, |manifest| manifest.fingerprint = other.into())?;
    let own = Fingerprint::of_this_machine()?;
    let wanted = format!(
        "The template was taken on {other}, but this machine is {own}; deploy the function again"
    );
    let err = bed.zygote(&foreign).err().ok_or("it was restored")?;
    assert_eq!(err.to_string(), wanted);
    for method in [Method::Copy, Method::Lazy] {
        let err = bed.prepare(method, &foreign).err();
        assert_eq!(err.ok_or("it was restored")?.to_string(), wanted);
    }
    Ok(())
}
