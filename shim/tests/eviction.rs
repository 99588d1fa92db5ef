//! Templates that give their memory up when it is short, and come back from the pool.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::service::{Service, Template, seated, start_request};
use support::{Containerd, TRENV, containerd_with, hierarchies};
use trenv_sandbox_proto as proto;

const NAMES: [&str; 3] = ["ann", "bob", "cid"];

/// Has 8 MiB of its own, and counts under its name.
fn counter(name: &str) -> String {
    format!(
        "x=x; n=0; while [ $n -lt 23 ]; do x=$x$x; n=$((n+1)); done
         i=0; while :; do i=$((i+1)); echo {name} $i ${{#x}}; sleep 0.1; done"
    )
}

fn log_of(containerd: &Containerd, sandbox: &str) -> PathBuf {
    containerd.path(&format!("{sandbox}.log"))
}

/// What a function has counted to, in a log that only it has written.
fn counted(log: &Path, name: &str) -> u32 {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let mut last = 0;
    for line in whole.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        assert_eq!((words[0], words[2]), (name, "8388608"), "{line}");
        last = words[1].parse().unwrap();
    }
    last
}

/// Pid 1 of a sandbox.
fn init_of(containerd: &Containerd, sandbox: &str) -> Pid {
    let list = containerd.ctr(&["task", "ls"]);
    let mut lines = list.lines().map(str::split_whitespace);
    let mut words = lines.find(|words| words.clone().next() == Some(sandbox));
    let pid = words.as_mut().and_then(|words| words.nth(1));
    Pid::from_raw(pid.unwrap().parse().unwrap())
}

/// Three functions as templates, and as many idle sandboxes.
struct Stage {
    containerd: Containerd,
    service: Service,
    templates: Vec<Template>,
}

impl Stage {
    fn new(name: &str, settings: &str) -> Option<Self> {
        let containerd = containerd_with(name, settings)?;
        for name in NAMES {
            let uri = format!("file://{}", log_of(&containerd, name).display());
            let script = counter(name);
            let first = ["run", "-d", "--log-uri", &uri, "--runtime", TRENV];
            let cold = ["--annotation", "dev.trenv.sandbox=function"];
            let program = [support::IMAGE, name, "/bin/sh", "-c", &script];
            containerd.ctr(&[&first[..], &cold, &program].concat());
        }
        let service = Service::connect(&containerd);
        let templates = NAMES.map(|name| {
            let log = log_of(&containerd, name);
            containerd.until("the function counts", || counted(&log, name) >= 3);
            service.snapshot(&containerd, name)
        });
        Some(Self {
            containerd,
            service,
            templates: templates.into(),
        })
    }

    /// Starts function `index` in its sandbox by a start method, and sees it count.
    fn start(&self, index: usize, tenancy: &str, method: &str) {
        let name = NAMES[index];
        let log = log_of(&self.containerd, name);
        std::fs::write(&log, "").unwrap();
        let mut request = start_request(&self.containerd, name, tenancy, &self.templates[index]);
        request.method = method.into();
        self.service
            .repurpose(&request)
            .unwrap_or_else(|err| panic!("{tenancy}: {err}\n{}", self.containerd.logs()));
        self.goes_on(index);
    }

    /// Sees that a function goes on counting.
    fn goes_on(&self, index: usize) {
        let log = log_of(&self.containerd, NAMES[index]);
        let before = counted(&log, NAMES[index]);
        self.containerd.until("the function counts", || {
            counted(&log, NAMES[index]) > before + 1
        });
    }

    fn reset(&self, index: usize, request: &str) {
        self.service
            .reset(NAMES[index], request)
            .unwrap_or_else(|err| panic!("{request}: {err}\n{}", self.containerd.logs()));
    }

    /// One tenancy of a function, from start to end.
    fn turn(&self, index: usize, tenancy: &str, method: &str) {
        self.start(index, tenancy, method);
        self.reset(index, tenancy);
    }

    /// The cgroup of all zygotes, where the kernel counts memory.
    fn zygotes_memory(&self) -> PathBuf {
        let group = format!("{}/default/zygotes", self.containerd.cgroup_parent());
        hierarchies()
            .into_iter()
            .map(|one| one.join(&group))
            .find(|group| group.join("memory.stat").exists())
            .unwrap()
    }

    /// Processes in the cgroups of tenancies that are in no sandbox: agents and waiting clones, all
    /// of which have a zygote's memory.
    fn outside_of_sandboxes(&self) -> Vec<i32> {
        let mut pids = seated(&self.containerd);
        pids.retain(|pid| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let inside = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
            inside.is_some_and(|pids| pids.split_whitespace().count() == 1)
        });
        pids
    }

    /// The functions whose zygotes stand, one for each zygote.
    fn standing(&self) -> Vec<&'static str> {
        let all: BTreeSet<String> = hierarchies()
            .into_iter()
            .map(|one| one.join(self.containerd.cgroup_parent()))
            .filter_map(|parent| std::fs::read_dir(parent.join("default/zygotes")).ok())
            .flat_map(|groups| groups.flatten())
            .filter(|group| group.path().is_dir())
            .map(|group| group.file_name().to_string_lossy().into_owned())
            .collect();
        let mut names: Vec<&str> = all
            .iter()
            .map(|group| {
                let of = |template: &Template| group.starts_with(&template.id[..16]);
                NAMES[self.templates.iter().position(of).unwrap()]
            })
            .collect();
        names.sort_unstable();
        names
    }

    fn end(self) {
        for name in NAMES {
            self.containerd.remove(name);
        }
        drop(self.service);
        self.containerd.assert_clean();
    }
}

#[test]
fn of_too_many_templates_those_unused_for_longest_go_and_come_back() {
    // Two have room.
    let Some(stage) = Stage::new("evictlimit", "[template]\nmemory_limit = 37748736\n") else {
        return;
    };
    for round in 0..3 {
        for (index, name) in NAMES.into_iter().enumerate() {
            stage.turn(index, &format!("{name}-{round}"), "");
            assert!(stage.standing().len() <= 2, "{:?}", stage.standing());
        }
    }
    assert_eq!(
        stage.standing(),
        ["bob", "cid"],
        "{}",
        stage.containerd.logs()
    );
    // The one used last stays, however often the other was used before.
    stage.turn(1, "bob-again", "");
    stage.turn(0, "ann-again", "");
    assert_eq!(stage.standing(), ["ann", "bob"]);

    // What was made for another start method is one more.
    stage.turn(0, "ann-copied", "copy");
    assert_eq!(stage.standing(), ["ann", "ann"]);
    stage.turn(1, "bob-paged", "lazy");
    stage.turn(2, "cid-last", "");
    assert_eq!(stage.standing(), ["bob", "cid"]);
    assert!(
        stage
            .containerd
            .logs()
            .contains("template.memory_limit is 36 MiB")
    );
    stage.end();
}

#[test]
fn without_memory_nothing_is_kept_and_every_start_is_right() {
    // More than any machine has available.
    let settings = format!("[template]\nmemory_floor = {}\n", 1u64 << 60);
    let Some(stage) = Stage::new("evictfloor", &settings) else {
        return;
    };
    // An instance goes on without its zygote, and so does one whose pages are served.
    stage.start(0, "ann-kept", "");
    stage.start(1, "bob-kept", "lazy");
    stage.start(2, "cid-kept", "copy");
    let none = || stage.standing().is_empty();
    stage.containerd.until("all are evicted", none);
    assert_eq!(stage.outside_of_sandboxes(), [0; 0]);
    for index in 0..3 {
        stage.goes_on(index);
        stage.reset(index, &format!("kept-{index}"));
    }
    // Starts at the same time, each of which makes room for its own zygote.
    std::thread::scope(|scope| {
        for (index, name) in NAMES.into_iter().enumerate() {
            let stage = &stage;
            scope.spawn(move || {
                for round in 0..4 {
                    stage.turn(index, &format!("{name}-{round}"), "");
                }
            });
        }
    });
    stage.containerd.until("all are evicted", none);
    let logs = stage.containerd.logs();
    assert!(logs.contains("MiB of memory are available"), "{logs}");
    stage.end();
}

#[test]
fn a_template_stays_while_a_start_from_it_is_under_way() {
    let settings = format!("[template]\nmemory_floor = {}\n", 1u64 << 60);
    let Some(stage) = Stage::new("evictuse", &settings) else {
        return;
    };
    let init = init_of(&stage.containerd, NAMES[0]);
    // The start waits for pid 1 once it has its seat, and before it needs a clone.
    kill(init, Signal::SIGSTOP).unwrap();
    std::thread::scope(|scope| {
        let start = scope.spawn(|| stage.start(0, "ann-held", ""));
        let stands = || stage.standing() == ["ann"];
        stage.containerd.until("the zygote is built", stands);
        // Meanwhile memory is looked at, and found wanting.
        stage.turn(1, "bob-passes", "");
        let bob_gone = || stage.standing() == ["ann"];
        stage.containerd.until("the other is evicted", bob_gone);
        kill(init, Signal::SIGCONT).unwrap();
        start.join().unwrap();
    });
    let none = || stage.standing().is_empty();
    stage.containerd.until("all are evicted", none);
    stage.goes_on(0);
    stage.end();
}

#[test]
fn a_base_is_evicted_after_the_templates_that_share_its_memory() {
    let settings = format!("[template]\nmemory_floor = {}\n", 1u64 << 60);
    let Some(stage) = Stage::new("evictbase", &settings) else {
        return;
    };
    stage.start(0, "ann-child", "");
    let base = &stage.templates[0];
    let child = stage
        .service
        .snapshot_as(&stage.containerd, NAMES[0], "child");
    let limits = proto::Limits::default();
    stage
        .service
        .prepare_from(&stage.containerd, &child, &limits, Some(base));
    // The base was made first and is used no more.
    let last = |template: &Template| {
        let logs = stage.containerd.logs();
        logs.rfind(&format!("Evicted {}", template.id))
    };
    stage
        .containerd
        .until("both are evicted, the base last", || {
            let (base, child) = (last(base), last(&child));
            child.is_some() && base > child
        });
    assert!(!stage.containerd.logs().contains("No memory is shared"));
    stage.end();
}

/// Bytes of memory that can be had.
fn available() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().nth(1));
    kilobytes.unwrap().parse::<u64>().unwrap() << 10
}

/// Programs that write more than fits into their memory, so that they wait until it is on the disk.
struct Waiting {
    group: PathBuf,
    files: tempfile::TempDir,
    writers: Vec<Child>,
}

impl Waiting {
    fn begin(parent: &Path) -> Self {
        let group = parent.join("trenv-waiting");
        std::fs::create_dir(&group).unwrap();
        // With version 2 of cgroups, those above `memory.high` wait.
        for (limit, bytes) in [
            ("memory.high", "8388608"),
            ("memory.max", "16777216"),
            ("memory.limit_in_bytes", "16777216"),
        ] {
            if group.join(limit).exists() {
                std::fs::write(group.join(limit), bytes).unwrap();
            }
        }
        let mut waiting = Self {
            group,
            files: tempfile::tempdir_in("/var/tmp").unwrap(),
            writers: Vec::new(),
        };
        for number in 0..4 {
            let script = r#"echo $$ > "$1/cgroup.procs"
                while :; do dd if=/dev/zero of="$2" bs=1M count=64 conv=notrunc 2>/dev/null; done"#;
            let mut writer = Command::new("/bin/sh");
            writer.args(["-c", script, "sh"]).arg(&waiting.group);
            let file = waiting.files.path().join(number.to_string());
            writer.arg(file).process_group(0);
            waiting.writers.push(writer.spawn().unwrap());
        }
        waiting
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        for writer in &mut self.writers {
            let group = Pid::from_raw(writer.id().cast_signed());
            let _ = nix::sys::signal::killpg(group, Signal::SIGKILL);
            let _ = writer.wait();
        }
        // The last program may still be on its way out.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.group).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

#[test]
fn templates_go_when_tasks_wait_for_memory() {
    if !Path::new("/proc/pressure/memory").exists() {
        eprintln!("SKIPPED: this kernel does not tell when tasks wait for memory");
        return;
    }
    // So that as much is available as shall be, and too little for tasks to wait.
    let settings = format!("[template]\nmemory_floor = {}\n", available() / 2);
    let Some(stage) = Stage::new("evictstall", &settings) else {
        return;
    };
    stage.turn(0, "ann-first", "");
    let waiting = Waiting::begin(stage.zygotes_memory().parent().unwrap());
    let none = || stage.standing().is_empty();
    stage.containerd.until("all are evicted", none);
    drop(waiting);
    let logs = stage.containerd.logs();
    assert!(logs.contains("wait for memory"), "{logs}");
    stage.turn(0, "ann-again", "");
    stage.end();
}

#[test]
fn zygotes_that_the_kernel_kills_for_memory_are_built_again() {
    let Some(stage) = Stage::new("evictoom", "") else {
        return;
    };
    stage.turn(0, "ann-first", "");
    // One zygote has room, another beside it has none.
    let group = stage.zygotes_memory();
    let read = |file: &str| std::fs::read_to_string(group.join(file)).unwrap_or_default();
    let (used, limit) = match group.join("memory.max").exists() {
        true => ("memory.current", "memory.max"),
        false => ("memory.usage_in_bytes", "memory.limit_in_bytes"),
    };
    let used: u64 = read(used).trim().parse().unwrap();
    std::fs::write(group.join(limit), (used + (2 << 20)).to_string()).unwrap();
    for round in 0..3 {
        for (index, name) in NAMES.into_iter().enumerate() {
            stage.turn(index, &format!("{name}-{round}"), "");
        }
    }
    let logs = stage.containerd.logs();
    assert!(logs.contains("was killed while it was built"), "{logs}");
    stage.end();
}
