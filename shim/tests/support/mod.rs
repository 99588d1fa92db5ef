//! A containerd of the tests' own, with its own root, state, sockets and trenv configuration.

#![allow(dead_code)]

pub mod events;
pub mod service;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

pub const IMAGE: &str = "local/fn:latest";
pub const TRENV: &str = "io.containerd.trenv.v2";
pub const RUNC: &str = "io.containerd.runc.v2";

/// Programs of the machine that the test image holds.
const PROGRAMS: [&str; 13] = [
    "sh", "id", "cat", "sleep", "ls", "ps", "tty", "stty", "touch", "env", "hostname", "readlink",
    "perl",
];

/// A running containerd; dropping it ends everything that it started.
pub struct Containerd {
    pub directory: TempDir,
    pub name: String,
    process: Option<Child>,
}

/// `None`, with a loud line, where the machine cannot run these tests.
pub fn containerd(name: &str) -> Option<Containerd> {
    containerd_with(name, "")
}

/// The same, with more lines in trenv's configuration.
pub fn containerd_with(name: &str, settings: &str) -> Option<Containerd> {
    let missing = if !nix::unistd::geteuid().is_root() {
        Some("root")
    } else {
        ["containerd", "ctr", "runc", "umoci", "nft", "ldd"]
            .into_iter()
            .find(|tool| which(tool).is_none())
    };
    if let Some(missing) = missing {
        eprintln!("SKIPPED: {name} needs {missing}");
        return None;
    }
    Some(Containerd::start(name, settings))
}

/// Where the workspace's binaries are.
fn binaries() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_containerd-shim-trenv-v2"))
        .parent()
        .unwrap()
        .to_owned()
}

fn which(tool: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH")?;
    std::env::split_paths(&paths)
        .map(|dir| dir.join(tool))
        .find(|path| path.exists())
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

impl Containerd {
    fn start(name: &str, settings: &str) -> Self {
        let directory = TempDir::with_prefix("trenv-shim-").unwrap();
        let mut this = Self {
            directory,
            name: name.to_owned(),
            process: None,
        };
        std::fs::create_dir(this.path("bin")).unwrap();
        let shim = env!("CARGO_BIN_EXE_containerd-shim-trenv-v2");
        std::os::unix::fs::symlink(shim, this.path("bin/containerd-shim-trenv-v2")).unwrap();
        this.write_config(settings);
        this.build_image();
        this.launch();
        this.ctr(&[
            "image",
            "import",
            "--base-name",
            "local/fn",
            &this.text("image.tar"),
        ]);
        this
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// An id of this test's own: runc's state is shared by all containerds of the machine.
    pub fn unique(&self, id: &str) -> String {
        format!("{id}-{}-{}", self.name, std::process::id())
    }

    /// A number of this test's own, for names that the machine has only once.
    fn number(&self) -> u32 {
        std::process::id() % 199 + self.name.bytes().map(u32::from).sum::<u32>() % 50
    }

    pub fn cgroup_parent(&self) -> String {
        format!("trenv-test-{}-{}", self.name, std::process::id())
    }

    fn write_config(&self, settings: &str) {
        let trenv = format!(
            "state_dir = {:?}\nrun_dir = {:?}\nlibexec_dir = {:?}\n[pool]\nsize = 268435456\n\
             [network]\nbridge = \"trt{}\"\nsubnet = \"10.{}.0.0/16\"\nspare = 1\n\
             [sandbox]\ncgroup_parent = {:?}\n{settings}",
            self.path("trenv-state"),
            self.path("trenv-run"),
            binaries(),
            self.number(),
            self.number(),
            self.cgroup_parent(),
        );
        std::fs::write(self.path("trenv.toml"), trenv).unwrap();
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n",
            self.path("root"),
            self.path("state"),
            self.path("c.sock"),
            self.path("c.sock.ttrpc"),
        );
        std::fs::write(self.path("config.toml"), config).unwrap();
    }

    fn build_image(&self) {
        let root = self.path("rootfs");
        for name in ["bin", "etc", "tmp", "proc", "sys", "dev", "run"] {
            std::fs::create_dir_all(root.join(name)).unwrap();
        }
        std::fs::write(
            root.join("etc/passwd"),
            "root:x:0:0:root:/:/bin/sh\napp:x:1000:1000::/:/bin/sh\n",
        )
        .unwrap();
        std::fs::write(root.join("etc/group"), "root:x:0:\n").unwrap();
        for program in PROGRAMS {
            let from = std::fs::canonicalize(which(program).unwrap()).unwrap();
            std::fs::copy(&from, root.join("bin").join(program)).unwrap();
            let libraries = run(Command::new("ldd").arg(&from));
            for library in libraries
                .split_whitespace()
                .filter(|word| word.starts_with('/'))
            {
                let to = root.join(library.trim_start_matches('/'));
                std::fs::create_dir_all(to.parent().unwrap()).unwrap();
                std::fs::copy(library, to).unwrap();
            }
        }
        let umoci = |arguments: &[&str]| {
            run(Command::new("umoci")
                .args(arguments)
                .current_dir(self.directory.path()));
        };
        umoci(&["init", "--layout", "oci"]);
        umoci(&["new", "--image", "oci:latest"]);
        umoci(&["insert", "--image", "oci:latest", "rootfs", "/"]);
        umoci(&[
            "config",
            "--config.env",
            "PATH=/bin",
            "--config.cmd",
            "/bin/sh",
            "--image",
            "oci:latest",
        ]);
        run(Command::new("tar")
            .args(["-C", "oci", "-cf", "image.tar", "."])
            .current_dir(self.directory.path()));
    }

    /// Starts containerd, the first time or again.
    pub fn launch(&mut self) {
        let paths = format!("{}:{}", self.text("bin"), std::env::var("PATH").unwrap());
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("containerd.log"))
            .unwrap();
        let child = Command::new("containerd")
            .args(["-c", &self.text("config.toml")])
            .env("PATH", paths)
            .env("TRENV_CONFIG", self.path("trenv.toml"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.process = Some(child);
        self.until("containerd answers", || {
            self.try_ctr(&["version"]).status.success()
        });
    }

    /// Ends containerd only; shims go on.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["60", "ctr", "-a", &self.text("c.sock")])
            .args(arguments);
        command
    }

    pub fn try_ctr(&self, arguments: &[&str]) -> Output {
        self.command(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Runs ctr and returns its output; a failure ends the test.
    pub fn ctr(&self, arguments: &[&str]) -> String {
        let output = self.try_ctr(arguments);
        assert!(
            output.status.success(),
            "ctr {arguments:?}: {output:?}\n{}",
            self.logs()
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A function that runs cold in a sandbox.
    pub fn run_function(&self, id: &str, script: &str) {
        self.ctr(&[
            "run",
            "-d",
            "--runtime",
            TRENV,
            "--annotation",
            "dev.trenv.sandbox=function",
            IMAGE,
            id,
            "/bin/sh",
            "-c",
            script,
        ]);
    }

    /// An idle sandbox.
    pub fn run_idle(&self, id: &str) {
        self.ctr(&[
            "run",
            "-d",
            "--runtime",
            TRENV,
            "--annotation",
            "dev.trenv.sandbox=idle",
            IMAGE,
            id,
        ]);
    }

    /// Ends and removes a container.
    pub fn remove(&self, id: &str) {
        self.try_ctr(&["task", "kill", "-s", "9", id]);
        self.until("the task can be deleted", || {
            self.try_ctr(&["task", "rm", id]);
            !self
                .try_ctr(&["task", "ls", "-q"])
                .stdout
                .split(|byte| *byte == b'\n')
                .any(|line| line == id.as_bytes())
        });
        self.ctr(&["container", "rm", id]);
    }

    pub fn until(&self, what: &str, done: impl Fn() -> bool) {
        let begun = Instant::now();
        while !done() {
            assert!(
                begun.elapsed() < Duration::from_secs(30),
                "{what}: not within 30 s\n{}",
                self.logs()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn logs(&self) -> String {
        let shim = std::fs::read_to_string(self.path("trenv-run/logs/shim-default.log"));
        let containerd = std::fs::read_to_string(self.path("containerd.log")).unwrap_or_default();
        let tail: Vec<&str> = containerd.lines().rev().take(15).collect();
        format!(
            "--- shim\n{}\n--- containerd, last first\n{}",
            shim.unwrap_or_default(),
            tail.join("\n")
        )
    }

    /// Pids of the shims of this containerd.
    pub fn shims(&self) -> Vec<i32> {
        processes_with(&self.text("c.sock"), "containerd-shim-")
    }

    /// The address of the sandboxes' shim.
    pub fn shim_address(&self) -> String {
        std::fs::read_to_string(self.path("trenv-run/shim/default.address")).unwrap()
    }

    /// What sandboxes have left on the machine, by name.
    pub fn remains(&self) -> Vec<String> {
        let list = |path: PathBuf| -> Vec<String> {
            std::fs::read_dir(path)
                .map(|all| {
                    all.flatten()
                        .map(|one| one.path().display().to_string())
                        .collect()
                })
                .unwrap_or_default()
        };
        let mut remains = list(self.path("trenv-run/netns"));
        remains.extend(list(self.path("trenv-state/sandboxes/default")));
        remains.extend(
            list(self.path("trenv-state/network"))
                .into_iter()
                .filter(|name| name.ends_with(".json")),
        );
        for hierarchy in hierarchies() {
            remains.extend(list(hierarchy.join(self.cgroup_parent()).join("default")));
        }
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let own = self.directory.path().display().to_string();
        remains.extend(
            mounts
                .lines()
                .filter(|line| line.contains(&own))
                .map(String::from),
        );
        remains
    }

    /// Waits until nothing of any sandbox is left.
    pub fn assert_clean(&self) {
        let begun = Instant::now();
        while !(self.remains().is_empty() && self.shims().is_empty()) {
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "left: {:#?}, shims {:?}\n{}",
                self.remains(),
                self.shims(),
                self.logs()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Where cgroups may be: one directory for each hierarchy of version 1, and the root of version 2.
pub fn hierarchies() -> Vec<PathBuf> {
    let root = PathBuf::from("/sys/fs/cgroup");
    let below = std::fs::read_dir(&root).into_iter().flatten().flatten();
    let mut all: Vec<PathBuf> = below.map(|one| one.path()).collect();
    all.push(root);
    all
}

fn processes_with(argument: &str, name: &str) -> Vec<i32> {
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).into_owned();
            let mut arguments = line.split('\0');
            let ours = arguments.next()?.contains(name) && arguments.any(|one| one == argument);
            ours.then_some(pid)
        })
        .collect()
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if self.process.is_some() {
            let ids = String::from_utf8_lossy(&self.try_ctr(&["container", "ls", "-q"]).stdout)
                .into_owned();
            for id in ids.split_whitespace() {
                self.try_ctr(&["task", "kill", "-s", "9", id]);
                std::thread::sleep(Duration::from_millis(200));
                self.try_ctr(&["task", "rm", "-f", id]);
                self.try_ctr(&["container", "rm", id]);
            }
        }
        let begun = Instant::now();
        while !self.shims().is_empty() && begun.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(100));
        }
        for pid in self.shims() {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
        let number = self.number();
        let _ = Command::new("ip")
            .args(["link", "del", &format!("trt{number}")])
            .stderr(Stdio::null())
            .status();
        let table = format!("trenv_trt{number}");
        let _ = Command::new("nft")
            .args(["delete", "table", "ip", &table])
            .stderr(Stdio::null())
            .status();
        for hierarchy in hierarchies() {
            let parent = hierarchy.join(self.cgroup_parent());
            let _ = std::fs::remove_dir(parent.join("default"));
            let _ = std::fs::remove_dir(parent);
        }
    }
}
