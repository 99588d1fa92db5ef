//! A small sandbox of the tests' own: namespaces by unshare(1), a freezer cgroup, streams.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use trenv_pool::{Backend, Pool, TemplateId};
use trenv_snapshot::TaskGroup;
use trenv_snapshot::dump::{DumpRequest, Dumped, dump, dump_and_go_on};
use trenv_snapshot::manifest::{Manifest, PAGE};
use trenv_snapshot::methods::{Method, Prepared, StartMethod, Work};
use trenv_snapshot::zygote::{
    Agent, Parked, PreparedClone, StartRequest, Started, Zygote, ZygoteRequest,
};

pub type TestResult = Result<(), Box<dyn std::error::Error>>;
type Made<T> = Result<T, Box<dyn std::error::Error>>;

/// Set where sandboxes shall outlive the process that made them.
pub const OUTLIVES: &str = "TRENV_TEST_SANDBOX_OUTLIVES";

/// Names a device-dax for the pool, whose bytes are lost.
pub const DEVICE: &str = "TRENV_TEST_DAX";

/// A pool and a place for programs.
pub struct Bed {
    directory: tempfile::TempDir,
    pub pool: Pool,
}

/// A program running in a sandbox of its own.
pub struct Instance {
    pub sandbox: Child,
    pub init: i32,
    pub root: i32,
    /// Host pids of a restored tree.
    pub pids: Vec<i32>,
    /// What its start method does for it.
    pub work: std::sync::Arc<Work>,
    /// How long the start took, from its request on.
    pub took: Duration,
    pub group: Freezer,
    input: File,
    output: BufReader<File>,
    stdio: [Option<(u64, u64)>; 3],
}

/// The start methods that this machine has for pools of a [`Bed`].
pub fn methods() -> Vec<Method> {
    let attach = attaches().then_some(Method::Attach);
    attach.into_iter().chain(Method::ALL).collect()
}

/// Whether pools of a [`Bed`] are on a device that the driver attaches.
pub fn attaches() -> bool {
    std::env::var_os(DEVICE).is_some() && Path::new("/dev/pseudo_mm").exists()
}

impl Bed {
    pub fn new() -> Made<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("pool");
        let pool = match std::env::var_os(DEVICE) {
            Some(device) => Pool::format_device(&path, Path::new(&device), true)?,
            None => Pool::format(&path, Backend::File, 1 << 30)?,
        };
        Ok(Self { directory, pool })
    }

    /// A directory of its own for what programs need.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Compiles a program of `tests/programs` with the machine's C compiler.
    pub fn compile(&self, name: &str) -> Made<String> {
        let source = format!("{}/tests/programs/{name}.c", env!("CARGO_MANIFEST_DIR"));
        let target = self.directory.path().join(name);
        let status = Command::new("cc")
            .args(["-O2", "-pthread", "-o"])
            .args([&target, Path::new(&source)])
            .status()?;
        assert!(status.success(), "{source} does not compile");
        Ok(target.display().to_string())
    }

    /// Builds a Go program without cgo.
    pub fn build_go(&self, directory: &str) -> Made<String> {
        let target = self.directory.path().join("server");
        let status = Command::new("go")
            .args(["build", "-o"])
            .arg(&target)
            .arg(".")
            .current_dir(directory)
            .env("CGO_ENABLED", "0")
            .env("GOFLAGS", "-buildvcs=false")
            .env("GOCACHE", std::env::temp_dir().join("trenv-test-go-cache"))
            .status()?;
        assert!(status.success(), "{directory} does not build");
        Ok(target.display().to_string())
    }

    /// Builds the module of Node functions as an image has it; its directory.
    pub fn node_module(&self) -> Made<String> {
        let source = format!("{}/../functions/modules/node", env!("CARGO_MANIFEST_DIR"));
        let target = self.directory.path().join("trenv-generation");
        std::fs::create_dir(&target)?;
        for name in ["index.js", "package.json"] {
            std::fs::copy(format!("{source}/{name}"), target.join(name))?;
        }
        let status = Command::new("cc")
            .args(["-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-o"])
            .args([target.join("page.node"), format!("{source}/page.c").into()])
            .status()?;
        assert!(status.success(), "{source} does not compile");
        Ok(target.display().to_string())
    }

    /// Starts a program in a new sandbox, as a session of its own.
    pub fn run(&self, command: &[&str]) -> Made<Instance> {
        let (sandbox, init) = sandbox()?;
        let group = Freezer::new()?;
        let (child_in, input) = pipe()?;
        let (output, child_out) = pipe()?;
        let stdio = [
            Some(identity(&child_in)?),
            Some(identity(&child_out)?),
            None,
        ];
        let mut joiner = Command::new("nsenter")
            .args([
                "-t",
                &init.to_string(),
                "-p",
                "-m",
                "-n",
                "-u",
                "-i",
                "setsid",
            ])
            .args(command)
            .stdin(child_in)
            .stdout(child_out)
            .stderr(if std::env::var_os("SHOW").is_some() {
                Stdio::inherit()
            } else {
                Stdio::null()
            })
            .spawn()?;
        let root = wait_for(|| {
            let children = children(joiner.id() as i32);
            children.first().copied().filter(|pid| {
                let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
                !["nsenter", "setsid", "env"]
                    .iter()
                    .any(|name| exe.ends_with(name))
            })
        })?;
        let mut tree = vec![root];
        while let Some(pid) = tree.pop() {
            group.add(pid)?;
            tree.extend(children(pid));
        }
        std::thread::spawn(move || joiner.wait());
        Ok(Instance {
            sandbox,
            init,
            root,
            pids: Vec::new(),
            work: std::sync::Arc::default(),
            took: Duration::ZERO,
            group,
            input: input.into(),
            output: BufReader::new(output.into()),
            stdio,
        })
    }

    /// Starts a program with an environment, and waits until it answers HTTP on port 8080.
    pub fn serve(&self, command: &[&str], environment: &[(&str, &str)]) -> Made<Instance> {
        let variables: Vec<String> = environment
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        let mut whole = vec!["env"];
        whole.extend(variables.iter().map(String::as_str));
        whole.extend(command);
        let instance = self.run(&whole)?;
        wait_for(|| {
            instance
                .get("/")
                .ok()
                .filter(|answer| answer.starts_with("HTTP/1.1 200"))
        })?;
        Ok(instance)
    }

    /// Dumps an instance, which ends; its sandbox goes too.
    pub fn dump(&self, instance: Instance) -> Made<TemplateId> {
        std::thread::sleep(Duration::from_millis(50));
        let dumped = self.try_dump(&instance)?;
        eprintln!("{dumped:?}");
        drop(instance);
        Ok(dumped.template.id)
    }

    /// Dumps an instance; where it is refused, the instance goes on.
    pub fn try_dump(&self, instance: &Instance) -> Made<Dumped> {
        Self::dump_to(&self.pool, instance)
    }

    /// A dump of an instance, which answers with the name of its state, is refused with the reason; the
    /// instance goes on.
    pub fn refuses(&self, instance: &mut Instance, state: &str, reason: &str) -> Made<()> {
        let err = self
            .try_dump(instance)
            .err()
            .ok_or(format!("{state} was not refused"))?;
        assert!(err.to_string().contains(reason), "{state}: {err}");
        assert_eq!(instance.ask("state"), state, "it goes on");
        Ok(())
    }

    /// Dumps an instance as far as its cgroup goes; where it is refused, the instance goes on.
    pub fn try_dump_of_group(&self, instance: &Instance) -> Made<Dumped> {
        let writer = self.pool.begin(&format!("test {}", instance.root))?;
        Ok(dump(&Self::request_of_group(instance), writer)?)
    }

    /// Dumps an instance, which goes on.
    pub fn dump_and_go_on(&self, instance: &Instance) -> Made<Dumped> {
        let writer = self.pool.begin(&format!("test {}", instance.root))?;
        let request = Self::request(instance);
        Ok(dump_and_go_on(&request, writer, &|| Ok(()))?)
    }

    /// Dumps an instance into a pool.
    pub fn dump_to(pool: &Pool, instance: &Instance) -> Made<Dumped> {
        let writer = pool.begin(&format!("test {}", instance.root))?;
        Ok(dump(&Self::request(instance), writer)?)
    }

    /// A template with the pages of another, whose manifest says something else.
    pub fn retold(
        &self,
        template: &TemplateId,
        change: impl FnOnce(&mut Manifest),
    ) -> Made<TemplateId> {
        let told = self.pool.template(template, None)?;
        let mut manifest = Manifest::decode(told.manifest())?;
        change(&mut manifest);
        let mut writer = self.pool.begin(&format!("retold {template}"))?;
        let mut page = [0; PAGE as usize];
        for number in 0..told.info().pages {
            told.read_pages(number, &mut page)?;
            writer.page(&page)?;
        }
        Ok(writer.commit(&manifest.encode()?)?.id)
    }

    fn request(instance: &Instance) -> DumpRequest<'_> {
        let mut tree = children(instance.root);
        tree.extend(children(instance.init));
        while let Some(pid) = tree.pop() {
            // A child that has ended in the meantime is in no cgroup.
            let _ = instance.group.add(pid);
            tree.extend(children(pid));
        }
        Self::request_of_group(instance)
    }

    fn request_of_group(instance: &Instance) -> DumpRequest<'_> {
        DumpRequest {
            group: &instance.group,
            init_pid: instance.init,
            root_pid: instance.root,
            stdio: instance.stdio,
        }
    }

    pub fn zygote(&self, template: &TemplateId) -> Made<Zygote> {
        self.with_request(template, |request| Ok(Zygote::build(request)?))
    }

    /// The zygote of what was started from a base's zygote.
    pub fn derive(&self, base: &Zygote, template: &TemplateId) -> Made<Zygote> {
        self.derive_in(base, template, Path::new("/"))
    }

    /// The same, with the function's layers in a directory.
    pub fn derive_in(&self, base: &Zygote, template: &TemplateId, root: &Path) -> Made<Zygote> {
        let rootfs = layers(root)?;
        self.with_request(template, |request| {
            let base = Some(base);
            let request = ZygoteRequest {
                base,
                rootfs,
                ..request
            };
            Ok(Zygote::build(request)?)
        })
    }

    fn with_request<T>(
        &self,
        template: &TemplateId,
        use_it: impl FnOnce(ZygoteRequest<'_>) -> Made<T>,
    ) -> Made<T> {
        let reader = self.pool.template(template, None)?;
        let rootfs = layers(Path::new("/"))?;
        let binary = PathBuf::from(env!("CARGO_BIN_EXE_trenv-zygote"));
        let request = ZygoteRequest {
            template: &reader,
            rootfs,
            binary: &binary,
            cgroups: Vec::new(),
            base: None,
        };
        use_it(request)
    }

    /// Clones the tree into a new sandbox.
    pub fn start(&self, agent: &mut Agent) -> Made<Instance> {
        let (sandbox, init) = sandbox()?;
        self.start_in(agent, sandbox, init)
    }

    /// The same, with something done to the sandbox before.
    pub fn start_prepared(
        &self,
        agent: &mut Agent,
        prepare: impl FnOnce(i32) -> TestResult,
    ) -> Made<Instance> {
        let (sandbox, init) = sandbox()?;
        prepare(init)?;
        self.start_in(agent, sandbox, init)
    }

    /// Clones the tree into a new sandbox, where it waits before its first instruction.
    pub fn park(&self, agent: &mut Agent) -> Made<(Instance, Parked)> {
        let (sandbox, init) = sandbox()?;
        let mut parked = None;
        let instance = self.start_by(sandbox, init, |group, request| {
            group.add(agent.pid())?;
            *group.guest.lock().unwrap() = Some(agent.pid());
            let (started, waits) = agent.make_clone(None)?.park(request)?;
            parked = Some(waits);
            Ok(started)
        })?;
        Ok((instance, parked.ok_or("nothing was parked")?))
    }

    /// Prepares a template for starts by a method.
    pub fn prepare(&self, method: Method, template: &TemplateId) -> Made<Arc<dyn StartMethod>> {
        let directory = self.directory.path();
        self.with_request(template, |request| {
            match method.prepare(request, directory)? {
                Prepared::Clones(method) => Ok(method),
                Prepared::Criu(_) => Err("CRIU needs an image of its own".into()),
            }
        })
    }

    /// Starts an instance by a method.
    pub fn start_with(&self, method: &dyn StartMethod) -> Made<Instance> {
        self.start_for(method, "")
    }

    /// Starts an instance for a call of an input.
    pub fn start_for(&self, method: &dyn StartMethod, input: &str) -> Made<Instance> {
        self.start_changed(method, input, |_| Ok(()))
    }

    /// The same, with something done to the clone before.
    pub fn start_changed(
        &self,
        method: &dyn StartMethod,
        input: &str,
        change: impl FnOnce(&PreparedClone) -> TestResult,
    ) -> Made<Instance> {
        let (sandbox, init) = sandbox()?;
        self.start_by(sandbox, init, |group, request| {
            let mut agent = method.zygote().agent()?;
            group.add(agent.pid())?;
            let clone = agent.make_clone(None)?;
            method.ready(&clone)?;
            change(&clone)?;
            let request = StartRequest { input, ..*request };
            Ok(method.start(clone, &request)?)
        })
    }

    /// Clones the tree into the sandbox of another instance.
    pub fn start_beside(&self, agent: &mut Agent, other: &Instance) -> Made<Instance> {
        self.start_in(agent, Command::new("true").spawn()?, other.init)
    }

    fn start_in(&self, agent: &mut Agent, sandbox: Child, init: i32) -> Made<Instance> {
        self.start_by(sandbox, init, |group, request| {
            group.add(agent.pid())?;
            *group.guest.lock().unwrap() = Some(agent.pid());
            Ok(agent.make_clone(None)?.start(request)?)
        })
    }

    fn start_by(
        &self,
        sandbox: Child,
        init: i32,
        start: impl FnOnce(&Freezer, &StartRequest<'_>) -> Made<Started>,
    ) -> Made<Instance> {
        let group = Freezer::new()?;
        let (child_in, input) = pipe()?;
        let (output, child_out) = pipe()?;
        let stdio = [
            Some(identity(&child_in)?),
            Some(identity(&child_out)?),
            None,
        ];
        let error = OwnedFd::from(File::options().write(true).open("/dev/null")?);
        let pidfd = rustix::process::pidfd_open(
            rustix::process::Pid::from_raw(init).ok_or("no pid")?,
            rustix::process::PidfdFlags::empty(),
        )?;
        let request = StartRequest {
            init: pidfd.as_fd(),
            stdio: [child_in.as_fd(), child_out.as_fd(), error.as_fd()],
            input: "",
            deadline: Duration::from_secs(10),
        };
        let started = start(&group, &request)?;
        eprintln!("{started:?}");
        Ok(Instance {
            sandbox,
            init,
            root: started.pids[0],
            pids: started.pids,
            took: started.steps.iter().map(|(_, took)| *took).sum(),
            work: started.work,
            group,
            input: input.into(),
            output: BufReader::new(output.into()),
            stdio,
        })
    }
}

impl Instance {
    pub fn ask(&mut self, line: &str) -> String {
        // One write: the program takes what a read gives it for a line.
        self.tell(line);
        self.answer()
    }
}

impl Instance {
    /// A process that keeps the instance's input open when this one has ended.
    pub fn keep_input_open(&self) -> Made<Child> {
        let mut sleep = Command::new("sleep");
        sleep.arg("60").stdin(Stdio::null()).stderr(Stdio::null());
        Ok(sleep.stdout(self.input.try_clone()?).spawn()?)
    }
}

impl Instance {
    /// Asks over HTTP, from inside the sandbox's network namespace.
    pub fn get(&self, path: &str) -> Made<String> {
        self.talk(&format!(
            "GET {path} HTTP/1.1\r\nHost: f\r\nConnection: close\r\n\r\n"
        ))
    }

    /// Writes to port 8080, from inside the sandbox's network namespace, and reads until the end.
    pub fn talk(&self, request: &str) -> Made<String> {
        let mut stream = self.connect()?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        std::io::Read::read_to_string(&mut stream, &mut answer)?;
        Ok(answer)
    }

    /// Connects to port 8080 from inside the sandbox's network namespace.
    pub fn connect(&self) -> Made<std::net::TcpStream> {
        in_network(self.init, || {
            let stream = std::net::TcpStream::connect("127.0.0.1:8080")?;
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            Ok(stream)
        })
    }
}

/// Does something in the network namespace of a process; sockets that are made there stay there.
fn in_network<T: Send + 'static>(
    pid: i32,
    act: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Made<T> {
    let done = std::thread::spawn(move || {
        let network = File::open(format!("/proc/{pid}/ns/net"))?;
        nix::sched::setns(&network, nix::sched::CloneFlags::CLONE_NEWNET)?;
        act()
    });
    Ok(done
        .join()
        .map_err(|_| "the thread in the network failed")??)
}

/// The network outside of sandboxes, in which a test has the address 10.62.0.1.
pub struct Outside {
    holder: Child,
}

impl Outside {
    pub fn new() -> Made<Self> {
        let begin = "ip link set lo up && ip addr add 10.62.0.1/32 dev lo && exec sleep 600";
        let holder = Command::new("unshare")
            .args(["-n", "sh", "-c", begin])
            .spawn()?;
        let outside = Self { holder };
        let exe = format!("/proc/{}/exe", outside.holder.id());
        wait_for(|| {
            std::fs::read_link(&exe)
                .ok()?
                .ends_with("sleep")
                .then_some(())
        })?;
        Ok(outside)
    }

    /// Gives a sandbox the interface eth0 with an address of 10.62.0.0/16.
    pub fn connect(&self, init: i32, address: &str) -> TestResult {
        let outside = self.holder.id();
        let script = format!(
            "nsenter -t {init} -n sh -ec '
               ip link add eth0 type veth peer name to{init} netns {outside}
               ip addr add {address}/16 dev eth0; ip link set eth0 up'
             nsenter -t {outside} -n sh -ec '
               ip link set to{init} up; ip route add {address}/32 dev to{init} src 10.62.0.1'"
        );
        let made = Command::new("sh").args(["-ec", &script]).status()?;
        made.success().then_some(()).ok_or("no network")?;
        Ok(())
    }

    /// Gives a sandbox's eth0 another address.
    pub fn add_address(init: i32, address: &str) -> TestResult {
        let made = Command::new("nsenter")
            .args(["-t", &init.to_string(), "-n"])
            .args(["ip", "addr", "add", address, "dev", "eth0"])
            // One of IPv6 is looked for at the link first.
            .args(address.contains(':').then_some("nodad"))
            .status()?;
        made.success().then_some(()).ok_or("no second address")?;
        Ok(())
    }

    /// Does something there.
    pub fn act<T: Send + 'static>(
        &self,
        act: impl FnOnce() -> std::io::Result<T> + Send + 'static,
    ) -> Made<T> {
        in_network(self.holder.id() as i32, act)
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

impl Instance {
    /// Whether an answer lies in its output.
    pub fn has_answered(&mut self) -> bool {
        let output = self.output.get_ref().as_fd();
        let mut poll = [nix::poll::PollFd::new(output, nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut poll, nix::poll::PollTimeout::from(200u8)).unwrap() > 0
    }

    /// Sends a line without waiting for its answer.
    pub fn tell(&mut self, line: &str) {
        self.input
            .write_all(format!("{line}\n").as_bytes())
            .unwrap();
    }

    /// The answer to a line that was sent.
    pub fn answer(&mut self) -> String {
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }

    /// Host pids of the root's children.
    pub fn children(&self) -> Vec<i32> {
        children(self.root)
    }

    /// Page faults of the root process so far that needed no input or output.
    pub fn faults(&self) -> Made<u64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.root))?;
        let fields = stat.rsplit_once(')').ok_or("no name in stat")?.1;
        Ok(fields
            .split_whitespace()
            .nth(7)
            .ok_or("stat is short")?
            .parse()?)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = self.sandbox.kill();
        let _ = self.sandbox.wait();
    }
}

/// A detached mount of a directory.
fn layers(root: &Path) -> Made<OwnedFd> {
    use rustix::mount::{OpenTreeFlags, open_tree};
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(open_tree(rustix::fs::CWD, root, flags)?)
}

/// pid 1 that sleeps in namespaces of its own; it ends with this test.
fn sandbox() -> Made<(Child, i32)> {
    let mut command = Command::new("unshare");
    command.args([
        "-p",
        "-m",
        "-n",
        "-u",
        "-i",
        "-f",
        "--kill-child",
        "--mount-proc",
    ]);
    // Instances side by side do not see each other's files there.
    let begin = "mount -t tmpfs tmpfs /dev/shm && exec sleep 600";
    command
        .args(["sh", "-c", begin])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let outlives = std::env::var_os(OUTLIVES).is_some();
    // SAFETY: prctl is async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            if outlives {
                return Ok(());
            }
            nix::libc::prctl(nix::libc::PR_SET_PDEATHSIG, nix::libc::SIGKILL);
            Ok(())
        })
    };
    let child = command.spawn()?;
    let init = wait_for(|| {
        children(child.id() as i32).first().copied().filter(|pid| {
            std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("sleep"))
        })
    })?;
    let init_pid = init.to_string();
    let up = ["-t", &init_pid, "-n", "ip", "link", "set", "lo", "up"];
    assert!(Command::new("nsenter").args(up).status()?.success());
    // What the sandbox's own pid 1 would do.
    let page = "mkdir -p /run/trenv && mount -t tmpfs trenv /run/trenv && cd /run/trenv && \
        (printf 'TRENVGEN\\1\\0\\0\\0\\0\\0\\0\\0' && head -c 16 /dev/urandom) >generation && \
        truncate -s 4096 generation && chmod 444 generation";
    let make = ["-t", &init_pid, "-m", "-u", "sh", "-c"];
    let hostname = format!("hostname sandbox-{init}; {page}");
    let made = Command::new("nsenter").args(make).arg(hostname).status()?;
    assert!(made.success(), "no generation page");
    Ok((child, init))
}

fn children(pid: i32) -> Vec<i32> {
    // Each thread has its own: those of Go's programs are made by any.
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
    let threads = threads.into_iter().flatten().flatten();
    let lists = threads.map(|thread| {
        let list = std::fs::read_to_string(thread.path().join("children"));
        list.unwrap_or_default()
    });
    lists
        .collect::<String>()
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

pub fn wait_for<T>(mut ready: impl FnMut() -> Option<T>) -> Made<T> {
    let begun = Instant::now();
    loop {
        if let Some(found) = ready() {
            return Ok(found);
        }
        if begun.elapsed() > Duration::from_secs(10) {
            return Err("what was waited for did not come".into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn pipe() -> Made<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
}

fn identity(fd: &OwnedFd) -> Made<(u64, u64)> {
    let meta = std::fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    Ok((meta.dev(), meta.ino()))
}

/// A cgroup with a freezer, v1 or v2.
pub struct Freezer {
    path: PathBuf,
    v1: bool,
    /// An agent that sits here and is not of the tree.
    guest: std::sync::Mutex<Option<i32>>,
}

impl Freezer {
    fn new() -> Made<Self> {
        let v1 = Path::new("/sys/fs/cgroup/freezer").exists();
        let root = if v1 {
            "/sys/fs/cgroup/freezer"
        } else {
            "/sys/fs/cgroup"
        };
        // A name of its own, whatever an earlier process of this number left behind.
        let path = tempfile::Builder::new()
            .prefix("trenv-snapshot-test-")
            .tempdir_in(root)?
            .keep();
        Ok(Self {
            path,
            v1,
            guest: std::sync::Mutex::new(None),
        })
    }

    fn add(&self, pid: i32) -> std::io::Result<()> {
        std::fs::write(self.path.join("cgroup.procs"), pid.to_string())
    }

    /// Moves a process to the cgroup above.
    pub fn leave(&self, pid: i32) -> std::io::Result<()> {
        std::fs::write(self.path.join("../cgroup.procs"), pid.to_string())
    }
}

impl TaskGroup for Freezer {
    fn pids(&self) -> std::io::Result<Vec<i32>> {
        let text = std::fs::read_to_string(self.path.join("cgroup.procs"))?;
        let guest = *self.guest.lock().unwrap();
        let pids = text.lines().filter_map(|pid| pid.parse().ok());
        Ok(pids.filter(|pid| Some(*pid) != guest).collect())
    }

    fn freeze(&self) -> std::io::Result<()> {
        let (file, value) = if self.v1 {
            ("freezer.state", "FROZEN")
        } else {
            ("cgroup.freeze", "1")
        };
        std::fs::write(self.path.join(file), value)
    }

    fn thaw(&self) -> std::io::Result<()> {
        let (file, value) = if self.v1 {
            ("freezer.state", "THAWED")
        } else {
            ("cgroup.freeze", "0")
        };
        std::fs::write(self.path.join(file), value)
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        if let Some(guest) = *self.guest.lock().unwrap() {
            let out = self.path.join("../cgroup.procs");
            let _ = std::fs::write(out, guest.to_string());
        }
        let begun = Instant::now();
        while std::fs::remove_dir(&self.path).is_err() && begun.elapsed() < Duration::from_secs(5) {
            for pid in self.pids().unwrap_or_default() {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
