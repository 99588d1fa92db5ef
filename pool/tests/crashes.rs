//! Processes that are killed at any point, and processes side by side.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use support::{page, read_all, store};
use trenv_pool::{Backend, PAGE_SIZE, Pool, PoolError, TemplateId};

const DIRECTORY: &str = "TRENV_TEST_POOL";
const SIZE: u64 = 16 << 20;

/// Starts this test program again, to run the role `name` on the pool.
fn start(name: &str, pool: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            name,
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(DIRECTORY, pool)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// The pool that this process was given; `None` when it was not started by a test.
fn given_pool() -> Option<Pool> {
    std::env::var_os(DIRECTORY).map(|path| Pool::open(path.as_ref()).unwrap())
}

/// The pages of the `round`th version of a template.
fn seeds(key: u32, round: u32) -> Vec<u32> {
    let pages = 20 + round * 37 % 300;
    (0..pages)
        .map(|i| {
            if i % 7 == 3 {
                0
            } else {
                1 + (key * 31 + round * 17 + i) % 50_000
            }
        })
        .collect()
}

/// Commits, replaces and deletes templates until it is killed, and says what it has finished.
#[test]
#[ignore = "a role in another test"]
fn role_writer() {
    let Some(pool) = given_pool() else { return };
    let first = pool
        .list()
        .unwrap()
        .iter()
        .map(|info| info.generation)
        .max()
        .unwrap_or(0) as u32;
    for round in first + 1.. {
        let key = round % 5;
        let name = format!("key {key}");
        if round % 11 == 0 {
            println!("@ deleting {key}");
            pool.delete(&TemplateId::of(&name)).unwrap();
        }
        let mut writer = pool.begin(&name).unwrap();
        // Some begin beside another key's newest version, and one beside its own.
        let beside = TemplateId::of(&format!("key {}", round / 2 % 5));
        if let (0, Ok(other)) = (round % 2, pool.template(&beside, None)) {
            writer.share_with(other).unwrap();
        }
        for seed in seeds(key, round) {
            writer.page(&page(seed)).unwrap();
        }
        if round % 13 == 0 {
            continue;
        }
        let info = writer.commit(format!("{key} {round}").as_bytes()).unwrap();
        println!("@ committed {key} {}", info.generation);
    }
}

/// Attaches to the template and stays.
#[test]
#[ignore = "a role in another test"]
fn role_reader() {
    let Some(pool) = given_pool() else { return };
    let _reader = pool.template(&TemplateId::of("key"), None).unwrap();
    println!("@ attached");
    std::thread::sleep(Duration::from_secs(60));
}

/// Begins a template and stays.
#[test]
#[ignore = "a role in another test"]
fn role_slow_writer() {
    let Some(pool) = given_pool() else { return };
    let mut writer = pool.begin("slow").unwrap();
    for seed in 1..1000 {
        writer.page(&page(seed)).unwrap();
    }
    println!("@ writing");
    std::thread::sleep(Duration::from_secs(60));
}

fn lines(child: &mut Child) -> impl Iterator<Item = String> + use<> {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // A killed writer's last line may be cut short.
    lines
        .map_while(Result::ok)
        .filter_map(|line| line.split_once("@ ").map(|(_, l)| l.to_owned()))
}

fn check(pool: &Pool) {
    let found = pool.verify(|_, _| {}).unwrap();
    assert!(found.faults.is_empty(), "{:?}", found.faults);
    for info in pool.list().unwrap() {
        let reader = pool.template(&info.id, None).unwrap();
        let manifest = std::str::from_utf8(reader.manifest()).unwrap();
        let (key, round) = manifest.split_once(' ').unwrap();
        let seeds = seeds(key.parse().unwrap(), round.parse().unwrap());
        let expected: Vec<u8> = seeds.into_iter().flat_map(page).collect();
        assert!(read_all(&reader) == expected, "{manifest}");
    }
    let stat = pool.stat().unwrap();
    assert_eq!(
        stat.free_bytes + stat.stored_bytes + trenv_pool::DATA_OFFSET,
        stat.size
    );
}

fn kill_writers(backend: Backend, times: u64) {
    let dir = tempfile::tempdir().unwrap();
    drop(Pool::format(dir.path(), backend, SIZE).unwrap());
    let mut committed = 0;
    // Later kills fall into rounds that begin with what earlier ones left.
    for attempt in 0..times {
        let mut child = start("role_writer", dir.path());
        let after = Duration::from_micros(12_000 + attempt * 7919 % 60_000);
        std::thread::sleep(after);
        child.kill().unwrap();
        child.wait().unwrap();
        let mut last = HashMap::new();
        for line in lines(&mut child) {
            let words: Vec<&str> = line.split(' ').collect();
            match words.as_slice() {
                ["committed", key, generation] => {
                    last.insert((*key).to_owned(), generation.parse::<u64>().unwrap());
                    committed += 1;
                }
                // From here on it may be there or not.
                ["deleting", key] => {
                    last.remove(*key);
                }
                _ => {}
            }
        }
        let pool = Pool::open(dir.path()).unwrap();
        check(&pool);
        for (key, generation) in last {
            let id = TemplateId::of(&format!("key {key}"));
            let reader = pool.template(&id, None).unwrap();
            assert!(reader.info().generation >= generation);
        }
    }
    assert!(committed > 0);
    drop(Pool::open(dir.path()).unwrap());
    Pool::destroy(dir.path()).unwrap();
}

#[test]
fn a_killed_writer_leaves_the_last_committed_state() {
    kill_writers(Backend::File, 40);
}

#[test]
fn a_killed_writer_leaves_the_last_committed_state_in_memory() {
    kill_writers(Backend::Memfd, 15);
}

#[test]
fn a_dead_reader_holds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::format(dir.path(), Backend::File, SIZE).unwrap();
    let info = store(&pool, "key", &[1, 2, 3]);
    let mut child = start("role_reader", dir.path());
    let mut said = lines(&mut child);
    assert_eq!(said.next().as_deref(), Some("attached"));
    let refused = pool
        .delete_within(&info.id, Duration::from_millis(50))
        .unwrap_err();
    let text = refused.to_string();
    assert!(text.contains(&format!("process {}", child.id())), "{text}");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(pool.delete(&info.id).unwrap());
}

#[test]
fn one_process_writes_at_a_time_and_a_dead_one_frees_its_pages() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::format(dir.path(), Backend::File, SIZE).unwrap();
    let free = pool.stat().unwrap().free_bytes;
    let mut child = start("role_slow_writer", dir.path());
    let mut said = lines(&mut child);
    assert_eq!(said.next().as_deref(), Some("writing"));
    // The catalogue stays usable meanwhile.
    assert!(pool.list().unwrap().is_empty());
    let waiting = {
        let pool = pool.clone();
        std::thread::spawn(move || store(&pool, "key", &[1, 2]))
    };
    std::thread::sleep(Duration::from_millis(100));
    assert!(!waiting.is_finished());
    child.kill().unwrap();
    child.wait().unwrap();
    let killed = Instant::now();
    let info = waiting.join().unwrap();
    assert!(killed.elapsed() < Duration::from_secs(5));
    pool.template(&info.id, None).unwrap().verify().unwrap();
    assert_eq!(pool.stat().unwrap().free_bytes, free - 2 * PAGE_SIZE as u64);
}

#[test]
fn readers_and_writers_of_several_processes_do_not_disturb_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::format(dir.path(), Backend::File, 64 << 20).unwrap();
    let mut child = start("role_writer", dir.path());
    let end = Instant::now() + Duration::from_secs(2);
    let mut read = 0;
    while Instant::now() < end {
        for key in 0..5 {
            let id = TemplateId::of(&format!("key {key}"));
            match pool.template(&id, None) {
                Ok(reader) => {
                    reader.verify().unwrap();
                    read += 1;
                }
                Err(PoolError::NoSuchTemplate { .. }) => {}
                Err(e) => panic!("{e}"),
            }
        }
        match pool.delete_within(&TemplateId::of("key 2"), Duration::ZERO) {
            Ok(_) | Err(PoolError::InUse { .. }) => {}
            Err(e) => panic!("{e}"),
        }
    }
    assert!(child.try_wait().unwrap().is_none(), "the writer failed");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(read > 10, "read {read}");
    let found = pool.verify(|_, _| {}).unwrap();
    assert!(found.faults.is_empty(), "{:?}", found.faults);
}
