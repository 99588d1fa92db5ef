//! A place for sandboxes: a directory, a network namespace, images made of the host's /usr.

#![allow(dead_code)]

use std::{
    fs,
    io::Read,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use trenv_sandbox::{
    CreateRequest, Part, ProcessSpec, Rootfs, Sandbox,
    cgroup::{Limits, TenancyCgroup},
    process::Role,
    rootfs::{self, BindFlags, Mount},
};

/// Everything a test makes; dropping it removes all.
pub struct Place {
    pub dir: tempfile::TempDir,
    pub name: String,
    netns: PathBuf,
}

impl Place {
    pub fn new() -> Self {
        // SAFETY: geteuid takes nothing.
        assert_eq!(unsafe { libc::geteuid() }, 0, "these tests need root");
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("trenv-test-{}-{number}", std::process::id());
        let dir = tempfile::tempdir().unwrap();
        let netns = dir.path().join("netns");
        fs::write(&netns, "").unwrap();
        let target = netns.clone();
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let own = PathBuf::from(format!("/proc/self/task/{}/ns/net", nix::unistd::gettid()));
            let bind = nix::mount::MsFlags::MS_BIND;
            nix::mount::mount(Some(&own), &target, None::<&str>, bind, None::<&str>).unwrap();
            assert!(
                std::process::Command::new("ip")
                    .args(["link", "set", "lo", "up"])
                    .status()
                    .unwrap()
                    .success()
            );
        })
        .join()
        .unwrap();
        Self { dir, name, netns }
    }

    pub fn request(&self) -> CreateRequest {
        CreateRequest {
            id: "box".into(),
            netns: self.netns.clone(),
            init_binary: env!("CARGO_BIN_EXE_trenv-init").into(),
            hostname: "idle".into(),
            cgroup_parent: self.name.clone(),
        }
    }

    pub fn sandbox(&self) -> Sandbox {
        Sandbox::create(&self.request()).unwrap()
    }

    pub fn cgroup(&self, name: &str) -> TenancyCgroup {
        TenancyCgroup::create(&self.name, name, &Limits::default()).unwrap()
    }

    /// Runs something in the sandbox's network namespace, on a thread of its own.
    pub fn at_netns(&self, work: impl FnOnce() + Send) {
        let netns = fs::File::open(&self.netns).unwrap();
        std::thread::scope(|scope| {
            scope
                .spawn(move || {
                    nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                    work();
                })
                .join()
                .unwrap();
        });
    }

    /// The layer directories of a tenancy: lower, upper, work.
    pub fn layers(&self, tenancy: &str) -> [PathBuf; 3] {
        ["lower", "upper", "work"].map(|kind| {
            let dir = self.dir.path().join(format!("{tenancy}-{kind}"));
            fs::create_dir_all(&dir).unwrap();
            dir
        })
    }

    pub fn mounts(&self, tenancy: &str) -> Vec<Mount> {
        let [lower, upper, work] = self.layers(tenancy);
        for name in ["usr", "etc", "tmp", "root", "proc", "sys", "dev", "run"] {
            fs::create_dir_all(lower.join(name)).unwrap();
        }
        fs::write(lower.join("image"), tenancy).unwrap();
        for name in ["bin", "sbin", "lib", "lib64"] {
            let _ = std::os::unix::fs::symlink(format!("usr/{name}"), lower.join(name));
        }
        vec![Mount {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                "index=off".into(),
                format!("workdir={}", work.display()),
                format!("upperdir={}", upper.display()),
                format!("lowerdir={}", lower.display()),
            ],
        }]
    }

    /// A root with the host's /usr in it.
    pub fn rootfs(&self, tenancy: &str) -> Rootfs {
        let read_only = BindFlags {
            read_only: true,
            ..BindFlags::default()
        };
        Rootfs {
            overlay: rootfs::overlay_from_mounts(&self.mounts(tenancy)).unwrap(),
            parts: vec![Part::bind(Path::new("/usr"), Path::new("/usr"), read_only).unwrap()],
            read_only: false,
            hostname: tenancy.into(),
            masked_paths: vec![],
            readonly_paths: vec![],
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = trenv_sandbox::cgroup::sweep(&self.name);
        let _ = nix::mount::umount2(&self.netns, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// A process that runs a shell script.
pub fn shell(role: Role, script: &str) -> ProcessSpec {
    program(role, &["/bin/sh", "-c", script])
}

pub fn program(role: Role, args: &[&str]) -> ProcessSpec {
    ProcessSpec {
        role,
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        env: vec!["PATH=/usr/bin:/bin".into()],
        cwd: "/".into(),
        terminal: None,
        uid: 0,
        gid: 0,
        groups: vec![],
        umask: 0o022,
        capabilities: None,
        no_new_privileges: true,
        rlimits: vec![],
        oom_score_adj: None,
        seccomp: None,
    }
}

/// Three descriptors for a process, and the end that reads its output.
pub fn stdio() -> ([OwnedFd; 3], fs::File) {
    let (read, write) = std::io::pipe().unwrap();
    let null: OwnedFd = fs::File::open("/dev/null").unwrap().into();
    let write: OwnedFd = write.into();
    (
        [null, write.try_clone().unwrap(), write],
        OwnedFd::from(read).into(),
    )
}

/// Runs a script to its end in the sandbox; answers its output and exit code.
pub fn run(sandbox: &Sandbox, cgroup: &TenancyCgroup, script: &str) -> (String, i32) {
    run_spec(sandbox, cgroup, &shell(Role::Exec, script))
}

pub fn run_spec(sandbox: &Sandbox, cgroup: &TenancyCgroup, spec: &ProcessSpec) -> (String, i32) {
    let (stdio, mut output) = stdio();
    let spawned = sandbox.spawn(spec, stdio, cgroup).unwrap();
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    let exits = sandbox.exits().unwrap();
    loop {
        let exit = exits
            .next_within(std::time::Duration::from_secs(10))
            .unwrap()
            .expect("pid 1 lives");
        if exit.pid_in_sandbox == spawned.pid_in_sandbox {
            return (text, exit.status.code());
        }
    }
}

/// The inode that identifies a namespace of a process.
pub fn namespace(pid: i32, kind: &str) -> String {
    fs::read_link(format!("/proc/{pid}/ns/{kind}"))
        .unwrap()
        .display()
        .to_string()
}

pub fn is_closed(fd: &impl AsRawFd) -> bool {
    // SAFETY: fcntl takes no pointers here.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) < 0 }
}
