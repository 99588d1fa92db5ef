//! What holds for every start method, and what each promises of its own. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use harness::{Bed, Instance, TestResult};
use trenv_pool::TemplateId;
use trenv_snapshot::methods::{Method, StartMethod};

/// Those that bring pages in when they are touched.
fn watching() -> impl Iterator<Item = Method> {
    let spice = (!harness::attaches()).then_some(Method::Spice);
    [Method::Lazy, Method::Reap].into_iter().chain(spice)
}

fn template_of(bed: &Bed, name: &str) -> Result<TemplateId, Box<dyn std::error::Error>> {
    let program = bed.compile(name)?;
    let mut instance = bed.run(&[&program])?;
    // It answers once its memory is filled.
    instance.ask("ready");
    bed.dump(instance)
}

/// Counter and checksum of the heap.
fn count(instance: &mut Instance, line: &str) -> (String, String) {
    let answer = instance.ask(line);
    let mut fields = answer.split_whitespace().map(str::to_owned);
    (
        fields.next().unwrap_or_default(),
        fields.next().unwrap_or_default(),
    )
}

/// Before Linux 6.17 mremap(2) moves no range that has become several mappings, as `faasnap` makes them.
fn can_move(method: Method) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let numbers: Vec<u32> = release.split(['.', '-']).flat_map(str::parse).collect();
    method != Method::FaaSnap || numbers[..2] >= [6, 17][..]
}

/// Starts an instance, asks it, and lets the method learn from it.
fn tenancy(bed: &Bed, method: &dyn StartMethod, questions: &[&str]) -> TestResult {
    let mut instance = bed.start_with(method)?;
    for question in questions {
        assert_eq!(
            instance.ask(question),
            "ok",
            "{} {question}",
            method.method()
        );
    }
    method.learn(&instance.pids, "")?;
    Ok(())
}

#[test]
fn every_method_brings_the_same_program_back() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("counter")?;
    let mut first = bed.run(&[&program])?;
    count(&mut first, "count");
    let (_, heap) = count(&mut first, "count");
    let template = bed.dump(first)?;
    for method in harness::methods() {
        let prepared = bed.prepare(method, &template)?;
        let mut one = bed.start_with(prepared.as_ref())?;
        let mut other = bed.start_with(prepared.as_ref())?;
        let expected = ("2".to_owned(), heap.clone());
        assert_eq!(count(&mut one, "count"), expected, "{method}");
        // What one writes, neither the other nor a later one sees.
        assert_ne!(count(&mut one, "write").1, heap, "{method}");
        assert_eq!(count(&mut other, "count"), expected, "{method}");
        for turn in 0..20 {
            let mut next = bed.start_with(prepared.as_ref())?;
            assert_eq!(count(&mut next, "count"), expected, "{method}, {turn}");
            prepared.learn(&next.pids, "")?;
        }
        assert_ne!(count(&mut one, "count").1, heap, "{method}");
    }
    Ok(())
}

#[test]
fn memory_that_is_first_touched_late_is_right() -> TestResult {
    let bed = Bed::new()?;
    let template = template_of(&bed, "spread")?;
    let questions = [
        "all", "some", "fork", "move", "unmap", "read", "fork", "move", "unmap", "read", "whole",
    ];
    for method in harness::methods() {
        let prepared = bed.prepare(method, &template)?;
        let mut questions = questions.to_vec();
        questions.retain(|question| *question != "move" || can_move(method));
        for _ in 0..4 {
            tenancy(&bed, prepared.as_ref(), &questions)?;
        }
    }
    Ok(())
}

/// Anonymous memory that is given back reads as zeroes, with every method but that which maps the
/// snapshot's file.
#[test]
fn memory_that_is_given_back_is_zero_where_it_is_anonymous() -> TestResult {
    let bed = Bed::new()?;
    let template = template_of(&bed, "spread")?;
    for method in harness::methods() {
        let expected = match method {
            Method::FaaSnap => "ok",
            _ => "zero",
        };
        let prepared = bed.prepare(method, &template)?;
        for turn in 0..3 {
            let mut instance = bed.start_with(prepared.as_ref())?;
            assert_eq!(instance.ask("discard"), expected, "{method}, {turn}");
            assert_eq!(instance.ask("touched"), expected, "{method}, {turn}");
            assert_eq!(instance.ask("fork"), "ok", "{method}, {turn}");
            prepared.learn(&instance.pids, "")?;
        }
    }
    Ok(())
}

#[test]
fn allocators_and_stacks_find_what_they_rely_on() -> TestResult {
    let bed = Bed::new()?;
    let template = template_of(&bed, "memory")?;
    for method in harness::methods() {
        if method == Method::FaaSnap {
            // It gives the template's bytes back.
            continue;
        }
        let prepared = bed.prepare(method, &template)?;
        tenancy(&bed, prepared.as_ref(), &["check"; 10])?;
        tenancy(&bed, prepared.as_ref(), &["check"; 10])?;
    }
    Ok(())
}

/// What is recorded around guard pages is brought in without them.
#[test]
fn guard_pages_stay_where_pages_are_brought_in() -> TestResult {
    let bed = Bed::new()?;
    let template = template_of(&bed, "guards")?;
    for method in harness::methods() {
        let prepared = bed.prepare(method, &template)?;
        for _ in 0..4 {
            tenancy(&bed, prepared.as_ref(), &["check", "change", "check"])?;
        }
    }
    Ok(())
}

#[test]
fn advice_about_memory_stays_where_pages_are_brought_in() -> TestResult {
    let bed = Bed::new()?;
    let template = template_of(&bed, "advice")?;
    for method in harness::methods() {
        let prepared = bed.prepare(method, &template)?;
        for _ in 0..4 {
            tenancy(&bed, prepared.as_ref(), &["check"])?;
        }
    }
    Ok(())
}

#[test]
fn what_was_recorded_is_not_waited_for_again() -> TestResult {
    let bed = Bed::new()?;
    let template = template_of(&bed, "spread")?;
    for method in watching().filter(|method| *method != Method::Lazy) {
        let prepared = bed.prepare(method, &template)?;
        let mut faults = Vec::new();
        for _ in 0..3 {
            let mut instance = bed.start_with(prepared.as_ref())?;
            assert_eq!(instance.ask("all"), "ok");
            prepared.learn(&instance.pids, "")?;
            faults.push(instance.work.figures());
        }
        eprintln!("{method}: {faults:?}");
        assert!(faults[0].faults_served >= 1000, "{method}: {faults:?}");
        assert_eq!(faults[0].pages_prefetched, 0, "{method}");
        assert!(faults[2].faults_served < 100, "{method}: {faults:?}");
        // Between two batches the program may be faster.
        assert!(faults[2].pages_prefetched >= 900, "{method}: {faults:?}");
    }
    Ok(())
}

#[test]
fn each_method_counts_what_it_does() -> TestResult {
    let bed = Bed::new()?;
    let template = template_of(&bed, "spread")?;
    for method in harness::methods() {
        let prepared = bed.prepare(method, &template)?;
        tenancy(&bed, prepared.as_ref(), &["some"])?;
        let mut instance = bed.start_with(prepared.as_ref())?;
        assert_eq!(instance.ask("all"), "ok");
        let figures = instance.work.figures();
        eprintln!("{method}: {figures:?}");
        match method {
            Method::Attach => {
                assert!(figures.pages_copied > 0 && figures.pages_copied < 1000);
                assert_eq!(figures.faults_served, 0);
            }
            // 200 pages were written, of those that are read now.
            Method::Spice if harness::attaches() => {
                assert!(figures.pages_copied > 0 && figures.pages_copied < 1000);
                assert!((200..400).contains(&figures.pages_prefetched));
                assert_eq!(figures.faults_served, 0);
            }
            Method::Template => assert_eq!(figures, trenv_snapshot::methods::Figures::default()),
            Method::Copy => {
                assert!(figures.pages_copied >= 8192);
                assert_eq!(figures.faults_served, 0);
            }
            Method::Lazy => {
                assert!(figures.faults_served >= 1000 && figures.pages_copied < 1000);
                assert_eq!(figures.pages_prefetched, 0);
            }
            // 200 pages were recorded, and 800 are missed.
            Method::Reap | Method::Spice => {
                // The kernel may tell of a page twice.
                assert!((700..1200).contains(&figures.faults_served), "{figures:?}");
                assert!(
                    (200..400).contains(&figures.pages_prefetched),
                    "{figures:?}"
                );
            }
            Method::FaaSnap => {
                assert_eq!(figures.faults_served, 0);
                assert!(figures.pages_prefetched >= 200 && figures.pages_copied < 1000);
            }
            Method::Criu | Method::CriuLazy => unreachable!("{method} clones no zygote"),
        }
    }
    Ok(())
}

#[test]
fn attaching_is_refused_without_a_device() -> TestResult {
    if harness::methods().contains(&Method::Attach) {
        return Ok(());
    }
    let bed = Bed::new()?;
    let template = template_of(&bed, "counter")?;
    let refused = bed.prepare(Method::Attach, &template);
    let refused = refused.map_err(|err| err.to_string()).err();
    let refused = refused.ok_or("it is prepared")?;
    assert!(refused.contains("docs/dax.md"), "{refused}");
    Ok(())
}

/// With nobody left to serve pages the kernel would answer with zeroes.
#[test]
fn an_instance_dies_with_those_who_hold_its_missing_pages() -> TestResult {
    let bed = Bed::new()?;
    let template = template_of(&bed, "spread")?;
    for method in watching() {
        let prepared = bed.prepare(method, &template)?;
        let mut instance = bed.start_with(prepared.as_ref())?;
        assert_eq!(instance.ask("some"), "ok");
        let keeper = i32::try_from(prepared.helper().ok_or("no keeper")?)?;
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(keeper),
            nix::sys::signal::Signal::SIGKILL,
        )?;
        assert!(ends(instance.root), "{method}");
        // The next one has another keeper.
        tenancy(&bed, prepared.as_ref(), &["some", "whole"])?;
    }
    Ok(())
}

/// The part of the next test that is killed: it serves an instance, tells of it and waits.
#[test]
#[ignore = "started by the next test"]
fn serves_until_it_is_killed() -> TestResult {
    let method = Method::parse(&std::env::var("TRENV_TEST_METHOD")?)?;
    let bed = Bed::new()?;
    let template = template_of(&bed, "spread")?;
    let prepared = bed.prepare(method, &template)?;
    let mut instance = bed.start_with(prepared.as_ref())?;
    assert_eq!(instance.ask("some"), "ok");
    let holder = instance.keep_input_open()?;
    println!(
        "\nserving {} {} {}",
        instance.root,
        holder.id(),
        instance.sandbox.id()
    );
    std::thread::sleep(Duration::from_secs(60));
    Ok(())
}

#[test]
fn an_instance_dies_when_the_process_that_serves_it_is_killed() -> TestResult {
    for method in watching() {
        let mut server = Command::new(std::env::current_exe()?)
            .args([
                "--exact",
                "serves_until_it_is_killed",
                "--ignored",
                "--nocapture",
            ])
            .env("TRENV_TEST_METHOD", method.name())
            .env(harness::OUTLIVES, "1")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let output = BufReader::new(server.stdout.take().ok_or("no output")?);
        let mut serving = None;
        for line in output.lines() {
            if let Some(told) = line?.strip_prefix("serving ") {
                let pids: Result<Vec<i32>, _> = told.split(' ').map(str::parse).collect();
                serving = Some(pids?);
                break;
            }
        }
        let pids = serving.ok_or("nothing is served")?;
        assert!(!is_gone(pids[0]));
        server.kill()?;
        server.wait()?;
        let ended = ends(pids[0]);
        for pid in &pids[1..] {
            let pid = nix::unistd::Pid::from_raw(*pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        assert!(ended, "{method}");
    }
    Ok(())
}

#[test]
fn many_instances_are_started_and_served_at_once() -> TestResult {
    let bed = Bed::new()?;
    let template = template_of(&bed, "spread")?;
    for method in harness::methods() {
        let prepared = bed.prepare(method, &template)?;
        let one_after_another = |index: usize| {
            for _ in 0..3 {
                let mut instance = bed.start_with(prepared.as_ref()).unwrap();
                for question in ["fork", "some", "move", "fork", "read", "whole"] {
                    if question == "move" && !can_move(method) {
                        continue;
                    }
                    assert_eq!(instance.ask(question), "ok", "{method} {index} {question}");
                }
                prepared.learn(&instance.pids, "").unwrap();
            }
        };
        std::thread::scope(|scope| {
            for index in 0..6 {
                scope.spawn(move || one_after_another(index));
            }
        });
    }
    Ok(())
}

#[test]
fn an_instance_is_served_after_its_method_was_dropped() -> TestResult {
    let bed = Bed::new()?;
    let template = template_of(&bed, "spread")?;
    for method in harness::methods() {
        let prepared = bed.prepare(method, &template)?;
        let mut instance = bed.start_with(prepared.as_ref())?;
        drop(prepared);
        assert_eq!(instance.ask("whole"), "ok", "{method}");
    }
    Ok(())
}

/// Its memory is not whole without what serves it.
#[test]
fn an_instance_is_dumped_unless_its_pages_are_elsewhere() -> TestResult {
    let bed = Bed::new()?;
    let template = template_of(&bed, "spread")?;
    for method in harness::methods() {
        let prepared = bed.prepare(method, &template)?;
        let mut instance = bed.start_with(prepared.as_ref())?;
        assert_eq!(instance.ask("some"), "ok", "{method}");
        let dumped = bed.try_dump(&instance).map_err(|err| err.to_string());
        if watching().any(|watching| watching == method) {
            let refused = dumped.as_ref().err();
            assert!(
                refused.is_some_and(|err| err.contains("userfaultfd")),
                "{method}: {dumped:?}"
            );
        } else {
            // What maps a file without a name has its pages stored.
            let taken = dumped.as_ref().map_err(Clone::clone)?.template.id;
            let zygote = bed.zygote(&taken)?;
            let mut again = bed.start(&mut zygote.agent()?)?;
            assert_eq!(again.ask("whole"), "ok", "{method}");
        }
        if dumped.is_err() {
            assert_eq!(instance.ask("whole"), "ok", "{method} goes on");
        }
    }
    Ok(())
}

#[test]
fn what_served_an_instance_ends_with_it() -> TestResult {
    let bed = Bed::new()?;
    let template = template_of(&bed, "spread")?;
    let prepared = bed.prepare(Method::Lazy, &template)?;
    let threads = || std::fs::read_dir("/proc/self/task").map(Iterator::count);
    let before = threads()?;
    for _ in 0..5 {
        tenancy(&bed, prepared.as_ref(), &["fork", "all"])?;
    }
    let begun = Instant::now();
    while threads()? > before && begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(threads()? <= before);
    Ok(())
}

fn ends(pid: i32) -> bool {
    let begun = Instant::now();
    while !is_gone(pid) && begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(10));
    }
    is_gone(pid)
}

fn is_gone(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.chars().next());
    matches!(state, None | Some(Some('Z' | 'X')))
}
