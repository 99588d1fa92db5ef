//! `start`: prints the address of the shim that serves a container, and nothing else.
//!
//! Under the lock of the socket: an answering socket is joined; otherwise a stale one is removed, a
//! new one bound, and this binary run again as a daemon that inherits the listening socket. The
//! daemon says on a pipe when it serves. A file in the promise directory keeps a shim that is just
//! about to end alive until the promised container has been created.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;
use trenv_config::Config;

use crate::flags::Flags;
use crate::group::{Endpoint, Group};

/// Descriptor of the listening socket in the daemon.
pub const LISTENER_FD: i32 = 3;
/// Descriptor of the pipe on which the daemon says that it serves.
pub const READY_FD: i32 = 4;

/// How long a killed shim may take to end; containerd gives a cleanup five seconds.
const END_LIMIT: Duration = Duration::from_secs(3);
const READY_LIMIT: Duration = Duration::from_secs(10);

/// Runs `start` in the bundle, which is the current directory.
pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let config = Config::load()?;
    let bundle = std::env::current_dir().context("Failed to find the bundle directory")?;
    let group = Group::of_bundle(&bundle, &flags.id)?;
    let endpoint = group.endpoint(&config, &flags.address, &flags.namespace);
    let directory = endpoint.socket.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(directory)
        .with_context(|| format!("Failed to create {}", directory.display()))?;

    let lock = lock(&endpoint)?;
    if !serves(&endpoint) {
        launch(flags, &config, &endpoint)?;
    }
    let promises = endpoint.promises();
    std::fs::create_dir_all(&promises)
        .and_then(|()| std::fs::write(endpoint.promise(&flags.id), b""))
        .with_context(|| format!("Failed to note the container in {}", promises.display()))?;
    if group == Group::Sandboxes {
        let file = config.shim_address_file(&flags.namespace);
        replace(&file, &endpoint.address())?;
    }
    // containerd finds a living shim again by this file after its own restart.
    replace(&bundle.join("address"), &endpoint.address())?;
    drop(lock);

    let mut out = std::io::stdout();
    out.write_all(endpoint.address().as_bytes())
        .and_then(|()| out.flush())
        .context("Failed to print the address")?;
    Ok(())
}

/// Takes the endpoint's lock; it is released when the value is dropped.
pub fn lock(endpoint: &Endpoint) -> anyhow::Result<Flock<File>> {
    let path = endpoint.lock_file();
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("Failed to open the lock {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("Failed to lock {}", path.display()))
}

/// Whether a shim serves the endpoint. The sockets of one that was killed are closed one after the
/// other, the listening one not first: for some milliseconds it still takes connections. Its end is
/// waited for, since it holds its locks until then.
pub fn serves(endpoint: &Endpoint) -> bool {
    let Ok(stream) = UnixStream::connect(&endpoint.socket) else {
        return false;
    };
    let Ok(peer) = rustix::net::sockopt::socket_peercred(&stream) else {
        return false;
    };
    if !is_ending(peer.pid.as_raw_nonzero().get()) {
        return true;
    }
    if let Ok(pidfd) = rustix::process::pidfd_open(peer.pid, rustix::process::PidfdFlags::empty()) {
        let limit = PollTimeout::try_from(END_LIMIT).unwrap_or(PollTimeout::NONE);
        // Whether it has ended by then or not, it serves nobody any more.
        let _ = poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], limit);
    }
    false
}

/// Whether a process has ended or is doing so (proc_pid_stat(5), "flags").
fn is_ending(pid: i32) -> bool {
    const PF_EXITING: u64 = 0x4;
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return true;
    };
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let flags = after_name.split_whitespace().nth(6);
    flags
        .and_then(|flags| flags.parse::<u64>().ok())
        .is_none_or(|flags| flags & PF_EXITING != 0)
}

fn launch(flags: &Flags, config: &Config, endpoint: &Endpoint) -> anyhow::Result<()> {
    let socket = &endpoint.socket;
    match std::fs::remove_file(socket) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
            return Err(err).with_context(|| format!("Failed to remove {}", socket.display()));
        }
        _ => {}
    }
    // What a dead predecessor was promised is no promise to the new shim.
    let _ = std::fs::remove_dir_all(endpoint.promises());
    let listener = UnixListener::bind(socket)
        .with_context(|| format!("Failed to listen on {}", socket.display()))?;
    let (ready, ready_write) = std::io::pipe().context("Failed to make a pipe")?;
    let binary = std::env::current_exe().context("Failed to find the shim's own binary")?;
    let mut command = Command::new(binary);
    command
        .args(["-namespace", &flags.namespace])
        .args(["-address", &flags.address])
        .args(["-publish-binary", &flags.publish_binary])
        .args(["-id", &flags.id])
        .args(["-socket", &endpoint.address()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if flags.debug {
        command.arg("-debug");
    }
    let inherited = [OwnedFd::from(listener), OwnedFd::from(ready_write)];
    let raw = [inherited[0].as_raw_fd(), inherited[1].as_raw_fd()];
    // SAFETY: between fork and exec only async-signal-safe calls are made. Both descriptors are
    // first copied above the targets, so that neither target overwrites the other's source.
    unsafe {
        command.pre_exec(move || {
            let high = [
                libc::fcntl(raw[0], libc::F_DUPFD_CLOEXEC, 10),
                libc::fcntl(raw[1], libc::F_DUPFD_CLOEXEC, 10),
            ];
            if high[0] < 0
                || high[1] < 0
                || libc::dup2(high[0], LISTENER_FD) < 0
                || libc::dup2(high[1], READY_FD) < 0
                || libc::setsid() < 0
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child = command
        .spawn()
        .context("Failed to start the shim's daemon")?;
    drop(inherited);
    if let Err(err) = wait_ready(ready) {
        let _ = child.kill();
        let _ = child.wait();
        let _ = std::fs::remove_file(socket);
        let log = crate::logging::path(config, &flags.namespace);
        return Err(err.context(format!(
            "The shim's daemon did not come up; see {}",
            log.display()
        )));
    }
    Ok(())
}

fn wait_ready(mut ready: std::io::PipeReader) -> anyhow::Result<()> {
    let limit = PollTimeout::try_from(READY_LIMIT).unwrap_or(PollTimeout::NONE);
    let mut fds = [PollFd::new(ready.as_fd(), PollFlags::POLLIN)];
    if poll(&mut fds, limit).context("Failed to wait for the daemon")? == 0 {
        bail!("It did not answer within {READY_LIMIT:?}");
    }
    let mut byte = [0; 1];
    if ready
        .read(&mut byte)
        .context("Failed to read from the daemon")?
        == 0
    {
        bail!("It ended at once");
    }
    Ok(())
}

/// Writes a small file so that a reader sees the old or the new text, never a part.
fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    std::fs::write(&name, text)
        .and_then(|()| std::fs::rename(&name, path))
        .with_context(|| format!("Failed to write {}", path.display()))
}
