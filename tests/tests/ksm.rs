//! KSM beside zygotes that are made from a base: what both find equal in ten functions of one runtime,
//! and what a write to a page then costs. `--nocapture` prints the figures.

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{PipeReader, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::libc;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use nix::sys::wait::waitpid;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{ForkResult, fork};
use serde_json::{Value, json};
use trenv_tests::{Machine, PAGE, Settings, crash, until_some};

const FUNCTIONS: u64 = 10;
/// Pages of the memory to which writes are timed.
const WRITTEN: usize = 10_240;
/// How many are timed together.
const PART: usize = 256;
/// Passes over all memory after which nothing new is found: a page is looked at, seen unchanged, and
/// merged.
const PASSES: u64 = 4;
const PATIENCE: Duration = Duration::from_secs(30);

/// The kernel's merging, which is as it was before once this is dropped.
struct Ksm {
    before: Vec<(PathBuf, String)>,
}

impl Ksm {
    /// Sets it up, not running; `None` where the kernel has none.
    fn take() -> anyhow::Result<Option<Self>> {
        // What this process starts from here on is merged too: the flag outlives fork and exec.
        // SAFETY: the call takes numbers.
        let allowed = unsafe { libc::prctl(libc::PR_SET_MEMORY_MERGE, 1, 0, 0, 0) } == 0;
        if !allowed || !file("run").exists() {
            return Ok(None);
        }
        let mut ksm = Self { before: Vec::new() };
        let settings = [
            ("run", "0"),
            ("pages_to_scan", "5000"),
            ("sleep_millisecs", "20"),
            ("smart_scan", "0"),
        ];
        for (name, value) in settings {
            if file(name).exists() {
                let before = fs::read_to_string(file(name))?;
                ksm.before.push((file(name), before));
                fs::write(file(name), value)?;
            }
        }
        Ok(Some(ksm))
    }

    fn run(&self, runs: bool) -> anyhow::Result<()> {
        Ok(fs::write(file("run"), u8::from(runs).to_string())?)
    }

    /// Merges what is equal now. Tells how long it took until almost all of these processes was
    /// merged, and the processor time of ksmd.
    fn merge(&self, pids: &[u32]) -> anyhow::Result<(Duration, Duration)> {
        let (begun, worked) = (Instant::now(), scanned()?);
        let last = number("full_scans")? + PASSES;
        self.run(true)?;
        let mut merged = Vec::new();
        while number("full_scans")? < last {
            ensure!(begun.elapsed() < Duration::from_secs(300), "ksmd is stuck");
            merged.push((begun.elapsed(), merged_pages(pids)?));
            std::thread::sleep(Duration::from_millis(50));
        }
        self.run(false)?;
        let most = merged_pages(pids)? * 95 / 100;
        let reached = merged.iter().find(|(_, pages)| *pages >= most);
        let took = reached.map_or(begun.elapsed(), |(at, _)| *at);
        Ok((took, scanned()? - worked))
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        for (file, before) in &self.before {
            let _ = fs::write(file, before.trim());
        }
        // SAFETY: the call takes numbers.
        unsafe { libc::prctl(libc::PR_SET_MEMORY_MERGE, 0, 0, 0, 0) };
    }
}

fn file(name: &str) -> PathBuf {
    PathBuf::from("/sys/kernel/mm/ksm").join(name)
}

fn number(name: &str) -> anyhow::Result<u64> {
    Ok(fs::read_to_string(file(name))?.trim().parse()?)
}

fn merged_pages(pids: &[u32]) -> anyhow::Result<u64> {
    let of = |pid: &u32| -> anyhow::Result<u64> {
        let text = fs::read_to_string(format!("/proc/{pid}/ksm_merging_pages"))?;
        Ok(text.trim().parse()?)
    };
    pids.iter().map(of).sum()
}

/// Processor time of ksmd.
fn scanned() -> anyhow::Result<Duration> {
    let is_ksmd = |pid: &String| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "ksmd")
    };
    let all = fs::read_dir("/proc")?.flatten();
    let mut pids = all.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let pid = pids.find(is_ksmd).context("no ksmd")?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let words: Vec<&str> = stat.split_whitespace().collect();
    let ticks: u64 = words[13].parse::<u64>()? + words[14].parse::<u64>()?;
    // USER_HZ is 100 everywhere.
    Ok(Duration::from_millis(ticks * 10))
}

/// KiB of the zygotes of functions, each page frame once.
fn memory(machine: &Machine, functions: &[Value]) -> anyhow::Result<u64> {
    let mut all = BTreeSet::new();
    for function in functions {
        all.extend(machine.zygote_frames(function)?);
    }
    Ok(all.len() as u64 * PAGE / 1024)
}

/// Prints what merging makes of the memory of zygotes; KiB before and after.
fn merge(
    ksm: &Ksm,
    machine: &Machine,
    functions: &[Value],
    what: &str,
) -> anyhow::Result<(u64, u64)> {
    let zygotes = functions.iter().map(|function| machine.zygote(function));
    let pids: Vec<u32> = zygotes
        .map(|pid| Ok(pid?.cast_unsigned()))
        .collect::<anyhow::Result<_>>()?;
    let before = memory(machine, functions)?;
    let (took, worked) = ksm.merge(&pids)?;
    let after = memory(machine, functions)?;
    println!(
        "{what}: {before} KiB, merged {after} KiB; almost all after {took:.1?}, ksmd worked {worked:.2?}"
    );
    Ok((before, after))
}

fn deploy(machine: &Machine, group: &str, base: Option<&str>) -> anyhow::Result<Vec<Value>> {
    let names = (0..FUNCTIONS).map(|number| format!("{group}{number}"));
    let deployed = names.map(|name| {
        let mut body = json!({ "service": name, "image": "docker.io/trenv/hello-python:latest" });
        if let Some(base) = base {
            body["annotations"] = json!({ "dev.trenv.base": base });
        }
        let function = machine.deploy_as(&body)?;
        ensure!(function["status"] == "ready", "{function:#}");
        Ok(function)
    });
    deployed.collect()
}

/// Each function in an instance that writes.
fn all_intact(machine: &Machine, group: &str) -> anyhow::Result<()> {
    for number in 0..FUNCTIONS {
        let name = format!("{group}{number}");
        // One whose shim has just died may refuse a call.
        let path = format!("/function/{name}?check=1");
        let served = || {
            machine
                .anonymous("GET", &path, &[])
                .ok()
                .filter(|r| r.status == 200)
        };
        let reply = until_some(&name, PATIENCE, served)?;
        ensure!(reply.json()?["intact"] == true, "{name}: {}", reply.text());
        machine.scale(&name, 0)?;
    }
    Ok(())
}

#[test]
fn ksm_finds_by_scanning_what_zygotes_of_a_base_share_from_the_start() -> anyhow::Result<()> {
    let Some(ksm) = Ksm::take()? else {
        eprintln!("SKIPPED: this kernel has no KSM for whole processes");
        return Ok(());
    };
    write_costs(&ksm)?;
    let machine = Machine::start_with(&Settings {
        pool_size: 2 << 30,
        ..Settings::default()
    })?;
    // Each was started by itself, with addresses of its own in its memory.
    let alone = deploy(&machine, "alone", None)?;
    let (whole, merged) = merge(&ksm, &machine, &alone, "by themselves")?;
    assert!(merged < whole);
    all_intact(&machine, "alone")?;
    for number in 0..FUNCTIONS {
        machine.remove(&format!("alone{number}"))?;
    }

    let base = machine.deploy("base-python")?;
    let family = deploy(&machine, "family", Some("base-python"))?;
    let tree = memory(&machine, &[std::slice::from_ref(&base), &family].concat())?;
    println!("from a base, with the base's: {tree} KiB");
    all_intact(&machine, "family")?;
    // The same functions, each with its memory for itself.
    machine.remove("base-python")?;
    crash(&machine.pids_of("containerd-shim-trenv-v2"));
    all_intact(&machine, "family")?;
    let (apart, merged) = merge(&ksm, &machine, &family, "from a base, each for itself")?;
    assert!(merged < apart && tree < apart);
    all_intact(&machine, "family")?;
    machine.stop()
}

/// Memory whose pages all differ from each other.
struct Pages(std::ptr::NonNull<libc::c_void>);

const LENGTH: usize = WRITTEN * PAGE as usize;

impl Pages {
    fn new() -> anyhow::Result<Self> {
        let length = LENGTH.try_into()?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: new mappings take no other's place; the advice and the writes stay within.
        let pages = unsafe {
            let at = mmap_anonymous(None, length, access, MapFlags::MAP_PRIVATE)?;
            madvise(at, LENGTH, MmapAdvise::MADV_NOHUGEPAGE)?;
            Self(at)
        };
        for page in 0..WRITTEN {
            pages.write(page, page as u64 + 1);
        }
        Ok(pages)
    }

    fn write(&self, page: usize, value: u64) {
        // SAFETY: the page is one of this mapping, and nobody else refers to it.
        unsafe {
            let at = self.0.as_ptr().cast::<u8>().add(page * PAGE as usize);
            at.cast::<u64>().write_volatile(value);
        }
    }

    /// Nanoseconds of processor time that a write to a page takes, in the middle one of many parts.
    fn time(&self) -> u64 {
        let now =
            || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Into::into);
        let mut parts = [0; WRITTEN / PART];
        for (number, part) in parts.iter_mut().enumerate() {
            let begun: Duration = now();
            for page in 0..PART {
                self.write(number * PART + page, 7);
            }
            *part = (now() - begun).subsec_nanos() as u64 / PART as u64;
        }
        parts.sort_unstable();
        parts[parts.len() / 2]
    }

    /// The same in a process that shares them, as a clone does.
    fn time_in_a_clone(&self) -> anyhow::Result<u64> {
        let (mut reader, mut writer): (PipeReader, _) = std::io::pipe()?;
        // SAFETY: the child writes to memory, to a pipe, and ends without running anything else.
        match unsafe { fork()? } {
            ForkResult::Child => {
                let told = writer.write_all(&self.time().to_ne_bytes()).is_ok();
                // SAFETY: ends the process.
                unsafe { libc::_exit(i32::from(!told)) }
            }
            ForkResult::Parent { child } => {
                drop(writer);
                let mut bytes = [0; 8];
                reader.read_exact(&mut bytes)?;
                waitpid(child, None)?;
                Ok(u64::from_ne_bytes(bytes))
            }
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's, and goes with it.
        let _ = unsafe { munmap(self.0, LENGTH) };
    }
}

fn write_costs(ksm: &Ksm) -> anyhow::Result<()> {
    let (one, two) = (Pages::new()?, Pages::new()?);
    let shared = one.time_in_a_clone()?;
    let own = [std::process::id()];
    ksm.merge(&own)?;
    let sharing = merged_pages(&own)?;
    ensure!(sharing >= WRITTEN as u64, "only {sharing} pages are merged");
    let merged = two.time();
    let again = two.time();
    println!(
        "a write to a page: shared with a zygote {shared} ns, merged {merged} ns, own {again} ns"
    );
    Ok(())
}
