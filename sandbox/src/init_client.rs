//! The library's side of the talk with pid 1 and the joiner.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use crate::{
    CreateRequest, ProcessSpec, Rootfs, Sandbox, SandboxError, Spawned, Step,
    cgroup::{Limits, TenancyCgroup},
    protocol::{
        EnterRequest, JoinRequest, Joined, LaunchRequest, Launched, PartPlace, Reply, Request,
    },
    rootfs::{self, BindFlags, MASKED_PATHS, READONLY_PATHS},
    sys,
};

/// How long pid 1 or the joiner may take for an answer before it counts as gone.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// How long everything inside may take to die.
const END_LIMIT: Duration = Duration::from_secs(10);

pub(crate) fn create(request: &CreateRequest) -> Result<Sandbox, SandboxError> {
    let id = &request.id;
    let host = |doing| {
        move |source| SandboxError::Host {
            id: id.clone(),
            doing,
            source,
        }
    };
    let launch = |source| SandboxError::Launch {
        id: id.clone(),
        binary: request.init_binary.clone(),
        source,
    };
    let netns = File::open(&request.netns).map_err(host("open the network namespace"))?;
    let init_binary = readonly_binary(&request.init_binary).map_err(launch)?;
    let (control, init_control) = sys::packet_pair().map_err(host("open a socket"))?;
    let (exits, init_exits) = sys::packet_pair().map_err(host("open a socket"))?;
    let cgroup = TenancyCgroup::create(
        &request.cgroup_parent,
        &format!("{id}.init"),
        &Limits::default(),
    )
    .map_err(cgroup_error(id))?;

    let start = || -> Result<(OwnedFd, i32), SandboxError> {
        let launcher = helper(&init_binary, "launch")
            .stdin(Stdio::from(init_control))
            .stdout(Stdio::from(init_exits))
            .spawn()
            .map_err(launch)?;
        let launcher = Reaped(launcher);
        cgroup.add(launcher.pid()).map_err(cgroup_error(id))?;
        let order = LaunchRequest {
            hostname: request.hostname.clone(),
        };
        sys::send(control.as_fd(), &order, &[netns.as_fd()]).map_err(launch)?;
        let (answer, fds) = answer(control.as_fd()).map_err(launch)?;
        match (answer, fds.into_iter().next()) {
            (Launched::Started, Some(pidfd)) => {
                let pid = sys::pid_of(pidfd.as_fd()).map_err(launch)?;
                Ok((pidfd, pid))
            }
            (Launched::Failed(reason), _) => Err(launch(io::Error::other(reason))),
            (Launched::Started, None) => {
                Err(launch(io::Error::other("no pidfd came with the answer")))
            }
        }
    };
    let (init_pidfd, init_pid) = match start() {
        Ok(started) => started,
        Err(error) => {
            // The first error is the one to report.
            let _ = cgroup.kill_all().and_then(|()| cgroup.remove());
            return Err(error);
        }
    };
    let sandbox = Sandbox {
        id: id.clone(),
        init_binary,
        init_path: request.init_binary.clone(),
        init_pid,
        init_pidfd,
        control: Mutex::new(Some(control)),
        exits,
        cgroup,
    };
    if let Err(error) = sandbox.reply("make the parts of the first root") {
        let _ = sandbox.destroy();
        return Err(error);
    }
    Ok(sandbox)
}

/// The binary on a read-only mount of its own: what runs inside a sandbox could otherwise open
/// /proc/PID/exe of a joiner for writing and so change the binary on the host.
fn readonly_binary(path: &Path) -> io::Result<OwnedFd> {
    let flags = BindFlags {
        read_only: true,
        ..BindFlags::default()
    };
    match rootfs::bind(path, flags) {
        Ok((mount, false)) => Ok(mount),
        Ok((_, true)) => Err(io::ErrorKind::IsADirectory.into()),
        Err(rootfs::RootfsError::Mount { source, .. }) => Err(source),
        Err(error) => Err(io::Error::other(error)),
    }
}

fn helper(binary: &OwnedFd, role: &str) -> Command {
    let mut command = Command::new(format!("/proc/self/fd/{}", binary.as_raw_fd()));
    command
        .arg0("trenv-init")
        .arg(role)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// A helper process that is always waited for.
struct Reaped(Child);

impl Reaped {
    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        // It ends by itself once its socket is closed; killing covers a stuck one. Someone else
        // having reaped it is fine.
        let limit = std::time::Instant::now() + Duration::from_millis(200);
        while let Ok(None) = self.0.try_wait() {
            if std::time::Instant::now() > limit {
                let _ = self.0.kill();
                let _ = self.0.wait();
                return;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

fn answer<T: serde::de::DeserializeOwned>(socket: BorrowedFd<'_>) -> io::Result<(T, Vec<OwnedFd>)> {
    if !sys::wait_readable(socket, Some(ANSWER_LIMIT))? {
        return Err(io::ErrorKind::TimedOut.into());
    }
    sys::receive(socket)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

fn cgroup_error(id: &str) -> impl FnOnce(crate::cgroup::CgroupError) -> SandboxError {
    let id = id.to_owned();
    move |source| SandboxError::Cgroup { id, source }
}

impl Sandbox {
    fn gone(&self, doing: &'static str) -> impl Fn(io::Error) -> SandboxError {
        let id = self.id.clone();
        move |source| SandboxError::Gone {
            id: id.clone(),
            doing,
            source,
        }
    }

    fn reply(&self, doing: &'static str) -> Result<Vec<Step>, SandboxError> {
        let control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        self.reply_on(control.as_ref(), doing)
    }

    fn reply_on(
        &self,
        control: Option<&OwnedFd>,
        doing: &'static str,
    ) -> Result<Vec<Step>, SandboxError> {
        let control =
            control.ok_or_else(|| self.gone(doing)(io::ErrorKind::NotConnected.into()))?;
        match answer(control.as_fd()).map_err(self.gone(doing))?.0 {
            Reply::Done(steps) => Ok(steps
                .into_iter()
                .map(|(name, took)| Step {
                    name: name.as_str(),
                    took,
                })
                .collect()),
            Reply::Failed(reason) => Err(SandboxError::Init {
                id: self.id.clone(),
                doing,
                reason,
            }),
        }
    }

    fn ask(
        &self,
        doing: &'static str,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<Step>, SandboxError> {
        let control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(control) = control.as_ref() {
            sys::send(control.as_fd(), request, fds).map_err(self.gone(doing))?;
        }
        self.reply_on(control.as_ref(), doing)
    }
}

pub(crate) fn enter(sandbox: &Sandbox, root: &Rootfs) -> Result<Vec<Step>, SandboxError> {
    let beyond = |paths: &[String], known: &[&str]| {
        paths
            .iter()
            .filter(|path| !known.contains(&path.as_str()))
            .cloned()
            .collect()
    };
    let request = Request::Enter(EnterRequest {
        hostname: root.hostname.clone(),
        read_only: root.read_only,
        parts: root
            .parts
            .iter()
            .map(|part| PartPlace {
                destination: part.destination.display().to_string(),
                directory: part.directory,
            })
            .collect(),
        masked: beyond(&root.masked_paths, MASKED_PATHS),
        readonly: beyond(&root.readonly_paths, READONLY_PATHS),
    });
    let mut fds = vec![root.overlay.as_fd()];
    fds.extend(root.parts.iter().map(|part| part.mount.as_fd()));
    sandbox.ask("enter the root", &request, &fds)
}

pub(crate) fn purge(sandbox: &Sandbox) -> Result<Vec<Step>, SandboxError> {
    sandbox.ask("purge the last tenancy", &Request::Purge, &[])
}

pub(crate) fn spawn(
    sandbox: &Sandbox,
    process: &ProcessSpec,
    stdio: [OwnedFd; 3],
    cgroup: &TenancyCgroup,
) -> Result<Spawned, SandboxError> {
    let program = process.args.first().cloned().unwrap_or_default();
    let failed = |reason: String| SandboxError::Spawn {
        id: sandbox.id.clone(),
        program: program.clone(),
        reason,
    };
    let launch = |source| SandboxError::Launch {
        id: sandbox.id.clone(),
        binary: sandbox.init_path.clone(),
        source,
    };
    let (socket, joiner_socket) = sys::packet_pair().map_err(launch)?;
    let joiner = helper(&sandbox.init_binary, "join")
        .stdin(Stdio::from(joiner_socket))
        .spawn()
        .map_err(launch)?;
    let _joiner = {
        let joiner = Reaped(joiner);
        let into = cgroup.dir_fd();
        if into.is_none() {
            cgroup
                .add(joiner.pid())
                .map_err(cgroup_error(&sandbox.id))?;
        }
        let request = JoinRequest {
            process: process.clone(),
            into_cgroup: into.is_some(),
        };
        let mut fds = vec![sandbox.init_pidfd.as_fd()];
        fds.extend(stdio.iter().map(AsFd::as_fd));
        fds.extend(into);
        sys::send(socket.as_fd(), &request, &fds).map_err(launch)?;
        joiner
    };
    drop(stdio);
    let (answer, fds) = answer::<Joined>(socket.as_fd())
        .map_err(|error| failed(format!("the joiner ended without an answer ({error})")))?;
    match answer {
        Joined::Started { pid_in_sandbox } => {
            let mut fds = fds.into_iter();
            let pidfd = fds.next().ok_or_else(|| failed("no pidfd came".into()))?;
            // The joiner keeps the process from being reaped until the socket is closed, so the
            // pid is known even when the process has already ended.
            let pid = sys::pid_of(pidfd.as_fd()).map_err(|error| failed(error.to_string()))?;
            drop(socket);
            Ok(Spawned {
                pid,
                pid_in_sandbox,
                pidfd,
                terminal: fds.next(),
            })
        }
        Joined::Failed(reason) => Err(failed(reason)),
    }
}

pub(crate) fn destroy(sandbox: &Sandbox) -> Result<(), SandboxError> {
    drop(
        sandbox
            .control
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take(),
    );
    let host = |doing| {
        move |source| SandboxError::Host {
            id: sandbox.id.clone(),
            doing,
            source,
        }
    };
    match sys::pidfd_kill(sandbox.init_pidfd.as_fd(), libc::SIGKILL) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
        Err(source) => return Err(host("end pid 1")(source)),
    }
    // Readable once pid 1 and, before it, everything in its pid namespace is dead.
    match sys::wait_readable(sandbox.init_pidfd.as_fd(), Some(END_LIMIT)) {
        Ok(true) => {}
        Ok(false) => {
            return Err(host("wait for pid 1 to end")(
                io::ErrorKind::TimedOut.into(),
            ));
        }
        Err(source) => return Err(host("wait for pid 1 to end")(source)),
    }
    sys::reap(sandbox.init_pidfd.as_fd());
    sandbox.cgroup.remove().map_err(cgroup_error(&sandbox.id))
}
