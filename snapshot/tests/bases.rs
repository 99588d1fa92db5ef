//! Zygotes made from those of a base: what is equal stays the base's. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use harness::{Bed, Instance, TestResult};
use trenv_pool::TemplateId;
use trenv_snapshot::zygote::Zygote;

type Made<T> = Result<T, Box<dyn std::error::Error>>;

const PAGE: u64 = 4096;

/// A runtime without a function: its zygote, and its answer about its own table.
struct Base {
    zygote: Zygote,
    whole: String,
}

impl Base {
    fn of(bed: &Bed) -> Made<Self> {
        let program = format!("{}/tests/programs/base.py", env!("CARGO_MANIFEST_DIR"));
        let mut runtime = bed.run(&["/usr/bin/python3", &program])?;
        let whole = runtime.ask("whole").replacen("1 ", "", 1);
        assert!(whole.starts_with("True "), "{whole}");
        let zygote = bed.zygote(&bed.dump(runtime)?)?;
        Ok(Self { zygote, whole })
    }

    /// An instance of the runtime, with a function in it.
    fn load(&self, bed: &Bed, name: &str, source: &str) -> Made<Instance> {
        let mut instance = bed.start(&mut self.zygote.agent()?)?;
        let path = bed.directory().join(name);
        std::fs::write(&path, source)?;
        assert_eq!(
            instance.ask(&format!("load {}", path.display())),
            "2 loaded"
        );
        Ok(instance)
    }

    /// The template of a function that greets, and keeps 1 MB.
    fn function(&self, bed: &Bed) -> Made<TemplateId> {
        let source = "import os\nheap = os.urandom(1 << 20)\ncalls = []\n\
                      def greet(name):\n    calls.append(name)\n    \
                      return f'Hello {name} {len(calls)} {len(heap)} {sum(heap) % 997}'\n";
        let mut instance = self.load(bed, "greet.py", source)?;
        assert!(instance.ask("greet A").starts_with("3 Hello A 1 1048576 "));
        bed.dump(instance)
    }
}

/// Page frames of a process, by address; pages of files are left out.
fn frames(pid: i32) -> Made<BTreeMap<u64, u64>> {
    let map = File::open(format!("/proc/{pid}/pagemap"))?;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut frames = BTreeMap::new();
    for line in maps.lines().filter(|line| !line.contains("[vsyscall]")) {
        let (start, rest) = line.split_once('-').ok_or("no range")?;
        let end = rest.split(' ').next().ok_or("no end")?;
        let (start, end) = (
            u64::from_str_radix(start, 16)?,
            u64::from_str_radix(end, 16)?,
        );
        let mut entries = vec![0; ((end - start) / PAGE * 8) as usize];
        map.read_exact_at(&mut entries, start / PAGE * 8)?;
        for (page, entry) in entries.chunks_exact(8).enumerate() {
            let entry = u64::from_ne_bytes(entry.try_into()?);
            if entry >> 63 == 1 && entry >> 61 & 1 == 0 && !line.contains("trenv-restorer") {
                frames.insert(start + page as u64 * PAGE, entry & ((1 << 55) - 1));
            }
        }
    }
    Ok(frames)
}

#[test]
fn a_function_s_zygote_shares_the_pages_of_its_base() -> TestResult {
    let bed = Bed::new()?;
    let base = Base::of(&bed)?;
    let zygote = bed.derive(&base.zygote, &base.function(&bed)?)?;
    let (theirs, its) = (frames(base.zygote.pid())?, frames(zygote.pid())?);
    let shared = its
        .iter()
        .filter(|(at, frame)| theirs.get(at) == Some(frame));
    let (shared, all) = (shared.count(), its.len());
    eprintln!(
        "{shared} of {all} pages are the base's, which has {}",
        theirs.len()
    );
    // The heap of 1 MB is the function's.
    assert!(all - shared >= 256);
    assert!(
        shared * 10 >= theirs.len() * 6,
        "{shared} of {}",
        theirs.len()
    );
    Ok(())
}

#[test]
fn instances_of_a_function_from_a_base_answer_side_by_side() -> TestResult {
    let bed = Bed::new()?;
    let base = Base::of(&bed)?;
    let template = base.function(&bed)?;
    let alone = bed.zygote(&template)?;
    let zygote = bed.derive(&base.zygote, &template)?;
    let mut agent = zygote.agent()?;
    let mut instances = vec![
        bed.start(&mut alone.agent()?)?,
        bed.start(&mut agent)?,
        bed.start(&mut agent)?,
    ];
    for instance in &mut instances {
        assert_eq!(instance.ask("whole"), format!("4 {}", base.whole));
    }
    let answers: Vec<String> = instances
        .iter_mut()
        .map(|instance| instance.ask("greet B"))
        .collect();
    assert!(
        answers[0].starts_with("5 Hello B 2 1048576 "),
        "{answers:?}"
    );
    assert!(
        answers.iter().all(|answer| *answer == answers[0]),
        "{answers:?}"
    );
    // The base has nothing of it.
    let mut runtime = bed.start(&mut base.zygote.agent()?)?;
    assert_eq!(runtime.ask("whole"), format!("2 {}", base.whole));
    Ok(())
}

#[test]
fn a_function_outlives_the_zygote_of_its_base() -> TestResult {
    let bed = Bed::new()?;
    let base = Base::of(&bed)?;
    let zygote = bed.derive(&base.zygote, &base.function(&bed)?)?;
    let whole = base.whole.clone();
    drop(base);
    let mut instance = bed.start(&mut zygote.agent()?)?;
    assert_eq!(instance.ask("whole"), format!("4 {whole}"));
    assert!(instance.ask("greet C").starts_with("5 Hello C 2 "));
    // What is made from it is taken again, with the first for its base and without.
    let again = bed.dump(instance)?;
    for zygote in [bed.derive(&zygote, &again)?, bed.zygote(&again)?] {
        let mut instance = bed.start(&mut zygote.agent()?)?;
        assert!(instance.ask("greet D").starts_with("6 Hello D 3 "));
        assert_eq!(instance.ask("whole"), format!("7 {whole}"));
    }
    Ok(())
}

/// What the base had and the function has not: memory given back, mappings gone and grown.
#[test]
fn a_function_may_take_its_base_apart() -> TestResult {
    let bed = Bed::new()?;
    let base = Base::of(&bed)?;
    let source = "import mmap, __main__\n\
                  TABLE, ROOM = __main__.TABLE, __main__.ROOM\n\
                  big = mmap.mmap(-1, 3 << 20, flags=mmap.MAP_PRIVATE)\n\
                  big[1 << 20] = 9\n\
                  ROOM.madvise(mmap.MADV_DONTNEED, 0, 1 << 19)\n\
                  more = [bytes([number % 251]) * 5000 for number in range(400)]\n\
                  def sums(_):\n    return f'{big[1 << 20]} {sum(map(sum, more))} {len(TABLE)} {sum(ROOM[:])}'\n";
    let mut instance = base.load(&bed, "apart.py", source)?;
    assert_eq!(instance.ask("drop"), "3 dropped");
    let sums = instance.ask("sums").replacen("4 ", "", 1);
    assert!(sums.ends_with(&format!(" {}", 7 << 19)), "{sums}");
    let template = bed.dump(instance)?;
    let zygote = bed.derive(&base.zygote, &template)?;
    let mut agent = zygote.agent()?;
    for _ in 0..2 {
        let mut instance = bed.start(&mut agent)?;
        assert_eq!(instance.ask("sums"), format!("5 {sums}"));
    }
    Ok(())
}

#[test]
fn a_file_of_the_base_that_the_function_has_not_is_named() -> TestResult {
    let bed = Bed::new()?;
    let base = Base::of(&bed)?;
    let template = base.function(&bed)?;
    let layers = bed.directory().join("layers");
    std::fs::create_dir(&layers)?;
    let err = bed.derive_in(&base.zygote, &template, &layers);
    let err = err.err().ok_or("it was built")?.to_string();
    assert!(err.contains("has another file /"), "{err}");
    Ok(())
}

#[test]
fn a_function_of_another_runtime_is_refused() -> TestResult {
    let bed = Bed::new()?;
    let base = Base::of(&bed)?;
    let mut other = bed.run(&[
        "/usr/bin/python3",
        "-c",
        "while True: print(input(), flush=True)",
    ])?;
    assert_eq!(other.ask("x"), "x");
    let template = bed.dump(other)?;
    let err = bed
        .derive(&base.zygote, &template)
        .err()
        .ok_or("it was taken")?;
    assert!(
        err.to_string().contains("laid out") || err.to_string().contains("another file"),
        "{err}"
    );
    Ok(())
}

#[test]
fn a_function_guards_other_pages_than_its_base() -> TestResult {
    let bed = Bed::new()?;
    let mut first = bed.run(&[&bed.compile("guards")?])?;
    assert_eq!(first.ask("check"), "ok");
    let base = bed.zygote(&bed.dump(first)?)?;
    let mut function = bed.start(&mut base.agent()?)?;
    assert_eq!(function.ask("change"), "ok");
    let zygote = bed.derive(&base, &bed.dump(function)?)?;
    let mut agent = zygote.agent()?;
    for _ in 0..2 {
        assert_eq!(bed.start(&mut agent)?.ask("check"), "ok");
    }
    // The base has its own still.
    assert_eq!(bed.start(&mut base.agent()?)?.ask("check"), "ok");
    Ok(())
}
