//! Zygotes whose memory is that of a device-dax, mapped by the driver. Run by `on-device.sh`.

#![allow(clippy::unwrap_used)]

mod harness;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use harness::{Bed, TestResult};
use trenv_pool::PoolError;
use trenv_snapshot::methods::{Method, StartMethod};
use trenv_snapshot::recording::Touch;
use trenv_snapshot::zygote::Zygote;

/// What of a process's memory is mapped from templates of the device.
#[derive(Debug, Default)]
struct Attached {
    /// Bytes that are there, and those of them that are copies in the machine's memory.
    present: u64,
    copied: u64,
}

impl Attached {
    fn of(pid: i32) -> Self {
        Self::fill(pid);
        let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
        let mut found = Self::default();
        let mut attached = false;
        for line in smaps.lines() {
            let value = |name| {
                let value: Option<&str> = line.strip_prefix(name);
                let value = value.map(|value| value.trim().trim_end_matches(" kB"));
                value.map_or(0, |value| value.parse::<u64>().unwrap() << 10)
            };
            if line.split(' ').next().unwrap().contains('-') {
                attached = line.contains("/pseudo_mm:");
            } else if attached {
                found.present += value("Rss:");
                found.copied += value("Anonymous:");
            }
        }
        found
    }

    /// Has page tables filled that are not yet, in a kernel that fills them at their first use: a look at
    /// pagemap is one.
    fn fill(pid: i32) {
        let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        for line in maps.lines().filter(|line| line.contains("/pseudo_mm:")) {
            let range = line.split(' ').next().unwrap().split_once('-').unwrap();
            let [start, end] = [range.0, range.1].map(|at| u64::from_str_radix(at, 16).unwrap());
            // 8 bytes for each page.
            let mut entries = vec![0; ((end - start) / 512) as usize];
            pagemap.read_exact_at(&mut entries, start / 512).unwrap();
        }
    }
}

/// A zygote of a program that has 8 MiB of its own, and how many pages are stored for it.
fn zygote(bed: &Bed) -> Result<(Zygote, u64), Box<dyn std::error::Error>> {
    let program = bed.compile("counter")?;
    let mut first = bed.run(&[&program])?;
    first.ask("count");
    let template = bed.dump(first)?;
    let stored = bed.pool.template(&template, None)?.info().stored_pages;
    Ok((bed.zygote(&template)?, stored))
}

#[test]
fn memory_is_the_device_s_until_it_is_written() -> TestResult {
    let bed = Bed::new()?;
    if !Path::new("/dev/pseudo_mm").exists() {
        return Err("load the module pseudo_mm".into());
    }
    let (zygote, stored) = zygote(&bed)?;
    let its = Attached::of(zygote.pid());
    assert!(its.present > 8 << 20, "{its:?} of {stored} pages");
    assert_eq!(its.copied, 0);
    assert!(
        zygote.resident_bytes()? < 4 << 20,
        "{:?}",
        zygote.resident_bytes()
    );

    let mut agent = zygote.agent()?;
    let mut instance = bed.start(&mut agent)?;
    let other = bed.start(&mut agent)?;
    instance.ask("write");
    let (its, others) = (Attached::of(instance.root), Attached::of(other.root));
    assert!(its.copied > 0 && its.copied < 1 << 20, "{its:?}");
    assert!(its.present > 8 << 20 && others.present > 8 << 20);
    assert!(others.copied < 1 << 20, "{others:?}");
    assert_eq!(Attached::of(zygote.pid()).copied, 0);
    Ok(())
}

#[test]
fn a_restored_function_s_second_dump_has_every_page() -> TestResult {
    let bed = Bed::new()?;
    let (zygote, stored) = zygote(&bed)?;
    let mut second = bed.start(&mut zygote.agent()?)?;
    let written = second.ask("write");
    assert!(Attached::of(second.root).present > 8 << 20);
    let template = bed.dump(second)?;
    let again = bed.pool.template(&template, None)?.info().stored_pages;
    assert!(again >= stored, "{again} pages of {stored}");
    drop(zygote);

    let zygote = bed.zygote(&template)?;
    let mut third = bed.start(&mut zygote.agent()?)?;
    let after = third.ask("count");
    let sum = |reply: &str| reply.split_whitespace().nth(1).map(str::to_owned);
    assert_eq!(sum(&after), sum(&written), "the sum over its memory");
    Ok(())
}

/// Of a clone that attaches by itself; those that wait have nothing of the device yet.
#[test]
fn a_clone_attaches_when_it_starts() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("counter")?;
    let mut first = bed.run(&[&program])?;
    let counted = first.ask("count");
    let template = bed.dump(first)?;
    let prepared = bed.prepare(Method::Attach, &template)?;
    let zygote = prepared.zygote();
    assert_eq!(Attached::of(zygote.pid()).present, 0);
    assert!(zygote.resident_bytes()? < 4 << 20);
    let mut instance = bed.start_with(prepared.as_ref())?;
    let other = bed.start_with(prepared.as_ref())?;
    assert_eq!(Attached::of(zygote.pid()).present, 0);
    let after = instance.ask("count");
    let sum = |reply: &str| reply.split_whitespace().nth(1).map(str::to_owned);
    assert_eq!(sum(&after), sum(&counted), "the sum over its memory");
    instance.ask("write");
    let (its, others) = (Attached::of(instance.root), Attached::of(other.root));
    assert!(its.copied > 0 && its.copied < 1 << 20, "{its:?}");
    assert!(its.present > 8 << 20 && others.present > 8 << 20);
    for pid in [instance.root, other.root] {
        for file in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
            let names = std::fs::read_link(file?.path())?;
            assert!(!names.to_string_lossy().contains("pseudo_mm"), "{names:?}");
        }
    }

    // Its pages stay its own while it lives.
    drop(prepared);
    let refused = bed.pool.delete_within(&template, Duration::ZERO);
    assert!(
        matches!(refused, Err(PoolError::InUse { .. })),
        "{refused:?}"
    );
    drop((instance, other));
    assert!(bed.pool.delete_within(&template, Duration::from_secs(60))?);
    Ok(())
}

fn spread(bed: &Bed) -> Result<Arc<dyn StartMethod>, Box<dyn std::error::Error>> {
    let program = bed.compile("spread")?;
    let mut first = bed.run(&[&program])?;
    // Its 32 MiB are filled when it answers.
    first.ask("ready");
    let template = bed.dump(first)?;
    bed.prepare(Method::Spice, &template)
}

#[test]
fn spice_copies_what_was_written_before_its_tree_runs() -> TestResult {
    let bed = Bed::new()?;
    let prepared = spread(&bed)?;
    assert!(prepared.helper().is_none(), "nobody serves pages");
    assert_eq!(Attached::of(prepared.zygote().pid()).present, 0);
    let (mut faults, mut copied, mut ahead) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..3 {
        let mut instance = bed.start_for(prepared.as_ref(), "writes")?;
        let before = instance.faults()?;
        // It writes 200 pages, each of them alone.
        assert_eq!(instance.ask("some"), "ok");
        faults.push(instance.faults()? - before);
        assert_eq!(instance.ask("whole"), "ok");
        prepared.learn(&instance.pids, "writes")?;
        ahead.push(instance.work.figures().pages_prefetched);
        let waiting = bed.start_for(prepared.as_ref(), "writes")?;
        let its = Attached::of(waiting.root);
        assert!(its.present > 32 << 20, "{its:?}");
        copied.push(its.copied >> 12);
    }
    eprintln!("faults {faults:?}, given {ahead:?}, private when the tree begins {copied:?}");
    assert!(faults[0] >= 200, "{faults:?}");
    assert!(faults[1] < 50 && faults[2] < 50, "{faults:?}");
    assert_eq!(ahead[0], 0);
    assert!((200..300).contains(&ahead[1]), "{ahead:?}");
    assert!(
        copied.iter().all(|pages| (200..300).contains(pages)),
        "{copied:?}"
    );

    // What one input writes is not copied for another, nor learnt of one that was given it.
    let other = bed.start_for(prepared.as_ref(), "reads")?;
    assert!(Attached::of(other.root).copied >> 12 < 50);
    prepared.learn(&other.pids, "reads")?;
    let given = bed.start_for(prepared.as_ref(), "writes")?;
    prepared.learn(&given.pids, "reads")?;
    let recorded = prepared.recorded();
    let reads = recorded.iter().find(|one| one.input == "reads");
    assert!(reads.is_none_or(|one| one.count() < 50), "{recorded:?}");
    let writes = recorded.iter().find(|one| one.input == "writes");
    assert!(writes.is_some_and(|one| one.stable && one.count() >= 200));
    Ok(())
}

/// Bytes of the pool that a process has in its page tables; none in a kernel that fills them when memory is
/// attached.
fn in_page_tables(pid: i32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssPool:"))?;
    let kilobytes = line.trim().trim_end_matches(" kB");
    Some(kilobytes.parse::<u64>().unwrap() << 10)
}

#[test]
fn spice_fills_page_tables_that_were_only_read_if_the_kernel_tells() -> TestResult {
    let bed = Bed::new()?;
    let prepared = spread(&bed)?;
    // It reads the second half of 32 MiB, or 8 page tables and part of another.
    let mut faults = Vec::new();
    let mut instance = bed.start_with(prepared.as_ref())?;
    let told = in_page_tables(instance.root);
    for _ in 0..2 {
        let before = instance.faults()?;
        assert_eq!(instance.ask("whole"), "ok");
        faults.push(instance.faults()? - before);
        prepared.learn(&instance.pids, "")?;
        instance = bed.start_with(prepared.as_ref())?;
    }
    let recorded = prepared.recorded();
    let ranges = recorded.iter().flat_map(|one| &one.ranges);
    let read = ranges.filter(|range| range.touch == Touch::Read);
    let read: u64 = read.map(|range| range.pages).sum();
    let now = in_page_tables(instance.root);
    eprintln!("faults {faults:?}, read {read}, in page tables {told:?} and {now:?}");
    let (Some(told), Some(now)) = (told, now) else {
        assert_eq!(read, 0);
        return Ok(());
    };
    assert!((8..13).contains(&read), "{recorded:?}");
    assert!(faults[0] >= 8 && faults[1] < 5, "{faults:?}");
    assert!(told < 12 << 20, "{told}");
    assert!((16 << 20..28 << 20).contains(&now), "{now}");
    Ok(())
}

#[test]
fn what_spice_copies_ahead_is_zero_when_it_is_given_back() -> TestResult {
    let bed = Bed::new()?;
    let prepared = spread(&bed)?;
    // Pages 1000 and 1001 are written by the kernel, and then known.
    let mut instance = bed.start_with(prepared.as_ref())?;
    assert_eq!(instance.ask("read"), "ok");
    prepared.learn(&instance.pids, "")?;
    let mut instance = bed.start_with(prepared.as_ref())?;
    assert!(instance.work.figures().pages_prefetched >= 2);
    assert_eq!(instance.ask("touched"), "zero");
    let mut instance = bed.start_with(prepared.as_ref())?;
    assert_eq!(instance.ask("discard"), "zero");
    for question in ["fork", "move", "unmap", "read", "whole", "some"] {
        assert_eq!(instance.ask(question), "ok", "{question}");
    }
    Ok(())
}

#[test]
fn spice_starts_and_learns_side_by_side() -> TestResult {
    let bed = Bed::new()?;
    let prepared = spread(&bed)?;
    let one_after_another = |input: &str| {
        for _ in 0..3 {
            let mut instance = bed.start_for(prepared.as_ref(), input).unwrap();
            for question in ["fork", "some", "read", "all", "move", "whole"] {
                assert_eq!(instance.ask(question), "ok", "{input} {question}");
            }
            prepared.learn(&instance.pids, input).unwrap();
        }
    };
    std::thread::scope(|scope| {
        for input in ["", "", "one", "one", "two", "two"] {
            scope.spawn(move || one_after_another(input));
        }
    });
    assert_eq!(prepared.recorded().len(), 3);
    Ok(())
}

#[test]
fn an_attach_that_fails_says_so() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("counter")?;
    let mut first = bed.run(&[&program])?;
    first.ask("count");
    let template = bed.dump(first)?;
    for method in [Method::Attach, Method::Spice] {
        let prepared = bed.prepare(method, &template)?;
        let started = bed.start_changed(prepared.as_ref(), "", |clone| {
            let pid = rustix::process::Pid::from_raw(clone.pid()).ok_or("no pid")?;
            let little = rustix::process::Rlimit {
                current: Some(1 << 20),
                maximum: Some(1 << 20),
            };
            rustix::process::prlimit(Some(pid), rustix::process::Resource::As, little)?;
            Ok(())
        });
        let refused = started.map_err(|err| err.to_string()).err();
        let refused = refused.ok_or("it is started")?;
        assert!(
            refused.contains("attaching memory from the pool's device"),
            "{method}: {refused}"
        );
        let mut next = bed.start_with(prepared.as_ref())?;
        assert!(next.ask("count").starts_with("1 "), "{method}");
    }
    Ok(())
}

/// Where no further template of the driver's can be made, pages come as on a machine without a device.
#[test]
fn spice_needs_no_template_of_the_driver() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("counter")?;
    let mut first = bed.run(&[&program])?;
    first.ask("count");
    let template = bed.dump(first)?;
    let files = rustix::process::Rlimit {
        current: Some(8192),
        maximum: Some(8192),
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, files)?;
    let driver = pseudo_mm_uapi::Device::open()?;
    driver.register(&File::options().read(true).write(true).open("/dev/dax0.0")?)?;
    let mut all = Vec::new();
    let full = loop {
        match driver.create() {
            Ok(another) => all.push(another),
            Err(full) => break full,
        }
    };
    assert_eq!(
        full.raw_os_error(),
        Some(rustix::io::Errno::NOSPC.raw_os_error())
    );
    let prepared = bed.prepare(Method::Spice, &template)?;
    let mut instance = bed.start_with(prepared.as_ref())?;
    assert!(instance.ask("count").starts_with("1 "));
    assert_eq!(Attached::of(instance.root).present, 0);
    Ok(())
}

#[test]
fn what_was_cloned_outlives_the_zygote_and_its_template() -> TestResult {
    let bed = Bed::new()?;
    let (zygote, _) = zygote(&bed)?;
    let mut instance = bed.start(&mut zygote.agent()?)?;
    drop(zygote);
    assert!(instance.ask("count").starts_with("1 "));
    assert!(Attached::of(instance.root).present > 8 << 20);

    // Nor does its memory become another template's.
    let id = bed.pool.list()?[0].id;
    let refused = bed.pool.delete_within(&id, Duration::ZERO);
    assert!(
        matches!(refused, Err(PoolError::InUse { .. })),
        "{refused:?}"
    );
    drop(instance);
    assert!(bed.pool.delete_within(&id, Duration::from_secs(60))?);
    Ok(())
}
