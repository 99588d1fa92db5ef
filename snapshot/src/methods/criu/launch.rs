//! Running CRIU inside of a sandbox, seen from outside: [`enter`](super::enter()) is the other half.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::enter::{ARGUMENT, fd};
use super::options::log_file;
use super::{CriuError, io_error};
use crate::zygote::hand_over;

/// Where CRIU may be beside the places of PATH, which a daemon's often lacks.
const PLACES: [&str; 2] = ["/usr/sbin", "/usr/local/sbin"];
/// The program that loads CRIU's libraries.
const INTERPRETER: &str = "/lib64/ld-linux-x86-64.so.2";
/// Where the libraries may be.
const LIBRARIES: [&str; 6] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
];
/// What the programs say beside CRIU's log.
const SAID: &str = "stderr";
/// Errors of a log that are told: the last is what CRIU gave up for, those before are its causes.
const ERRORS: usize = 3;

/// CRIU on this machine.
#[derive(Debug)]
pub struct Program {
    criu: PathBuf,
    interpreter: PathBuf,
}

impl Program {
    pub fn find() -> Result<Self, CriuError> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let places = std::env::split_paths(&path).chain(PLACES.map(PathBuf::from));
        let found = places
            .map(|place| place.join("criu"))
            .find_map(|place| place.canonicalize().ok());
        let interpreter = Path::new(INTERPRETER)
            .canonicalize()
            .map_err(io_error(format!("looking for {INTERPRETER}")))?;
        Ok(Self {
            criu: found.ok_or(CriuError::Absent)?,
            interpreter,
        })
    }

    /// CRIU, to be run on this machine.
    pub fn command(&self) -> Command {
        Command::new(&self.criu)
    }

    /// The program and its first arguments where this machine's root is the descriptor
    /// [`fd::HOST`] and not the root.
    fn seen_from_inside(&self) -> Vec<String> {
        let seen = |path: &Path| format!("/proc/self/fd/{}{}", fd::HOST, path.display());
        let libraries = LIBRARIES.map(|place| seen(Path::new(place)));
        vec![
            seen(&self.interpreter),
            "--inhibit-cache".into(),
            "--library-path".into(),
            libraries.join(":"),
            seen(&self.criu),
        ]
    }
}

/// One run of CRIU in a sandbox.
pub struct Launch<'a> {
    pub program: &'a Program,
    /// The program `trenv-zygote`.
    pub binary: &'a Path,
    /// pidfd of the sandbox's pid 1.
    pub init: BorrowedFd<'a>,
    /// Directories of the cgroups that CRIU goes to, and what it restores with it.
    pub cgroups: &'a [PathBuf],
    pub image: &'a Path,
    pub work: &'a Path,
    /// The streams that a restored tree gets.
    pub stdio: Option<[BorrowedFd<'a>; 3]>,
    /// The command, for errors and the log's name.
    pub doing: &'static str,
    pub deadline: Duration,
}

impl Launch<'_> {
    /// Runs it and waits for its end.
    pub fn run(&self, options: &[String]) -> Result<(), CriuError> {
        let open =
            |path: &Path| File::open(path).map_err(io_error(format!("opening {}", path.display())));
        let (host, image, work) = (open(Path::new("/"))?, open(self.image)?, open(self.work)?);
        let said = self.work.join(SAID);
        let said = File::create(&said).map_err(io_error(format!("making {}", said.display())))?;
        let mut command = Command::new(self.binary);
        command.arg(ARGUMENT);
        command.args(self.cgroups.iter().map(|dir| dir.join("cgroup.procs")));
        command.arg("--");
        command.args(self.program.seen_from_inside()).args(options);
        command.env_clear();
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(said);
        let mut handed = vec![
            (self.init, fd::INIT),
            (host.as_fd(), fd::HOST),
            (image.as_fd(), fd::IMAGE),
            (work.as_fd(), fd::WORK),
        ];
        handed.extend(self.stdio.into_iter().flatten().zip(fd::STDIO..));
        hand_over(&mut command, &handed)
            .map_err(io_error("preparing the descriptors that CRIU gets"))?;
        let child = command
            .spawn()
            .map_err(io_error(format!("starting {}", self.binary.display())))?;
        let status = self.wait(child)?;
        if status.success() {
            return Ok(());
        }
        Err(CriuError::Failed {
            doing: self.doing,
            reason: reason(self.work, self.doing)
                .unwrap_or_else(|| format!("it ended with {status} and left no log")),
        })
    }

    fn wait(&self, mut child: Child) -> Result<ExitStatus, CriuError> {
        let ended = within(&child, self.deadline);
        let ended = ended.map_err(io_error("waiting for CRIU"))?;
        if !ended {
            // CRIU ends with it.
            let _ = child.kill();
        }
        let status = child.wait().map_err(io_error("waiting for CRIU"))?;
        if ended {
            return Ok(status);
        }
        Err(CriuError::Deadline {
            doing: self.doing,
            limit: self.deadline,
        })
    }
}

/// Waits until a child has ended; `false` when it has not in this time.
fn within(child: &Child, limit: Duration) -> io::Result<bool> {
    let pid = rustix::process::Pid::from_child(child);
    let pidfd: OwnedFd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// What a run that failed says of it.
pub fn reason(work: &Path, command: &str) -> Option<String> {
    let log = std::fs::read_to_string(work.join(log_file(command))).unwrap_or_default();
    let said = std::fs::read_to_string(work.join(SAID)).unwrap_or_default();
    errors(&log).or_else(|| said.lines().last().map(str::to_owned))
}

fn errors(log: &str) -> Option<String> {
    let lines: Vec<&str> = log
        .lines()
        .filter_map(|line| line.split_once("Error (").map(|(_, error)| error))
        .filter_map(|error| error.split_once("): ").map(|(_, text)| text.trim()))
        .filter(|text| !text.ends_with("FAILED."))
        .collect();
    let last = lines.get(lines.len().saturating_sub(ERRORS)..)?;
    (!last.is_empty()).then(|| last.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_errors_of_a_log_are_the_reason() {
        let log = "(00.02) Error (criu/util.c:642): exited, status=1\n\
                   (00.39) Warn  (criu/x.c:1): not this\n\
                   (00.40) Error (criu/a.c:1): one\n\
                   (00.41) pie: 3: Error (criu/b.c:2): two\n\
                   (00.42) Error (criu/c.c:3): three\n\
                   (00.43) Error (criu/cr-dump.c:2053): Dumping FAILED.\n";
        assert_eq!(errors(log).as_deref(), Some("one; two; three"));
        assert_eq!(errors("(00.01) all is well\n"), None);
    }

    #[test]
    fn without_a_log_the_program_s_own_words_are_the_reason() {
        let work = tempfile::tempdir().unwrap();
        assert_eq!(reason(work.path(), "dump"), None);
        std::fs::write(work.path().join(SAID), "trenv-zygote: it is broken\n").unwrap();
        let told = reason(work.path(), "dump");
        assert_eq!(told.as_deref(), Some("trenv-zygote: it is broken"));
    }

    #[test]
    fn a_child_that_goes_on_is_not_waited_for_longer_than_said() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        assert!(!within(&child, Duration::from_millis(1)).unwrap());
        child.kill().unwrap();
        assert!(within(&child, Duration::from_secs(60)).unwrap());
        child.wait().unwrap();
    }
}
