//! Pid 1: one loop over requests and the ends of children.
//!
//! Every signal is blocked for good; the kernel ignores those that are sent from inside anyway.
//! When the library's socket closes, pid 1 ends, and the kernel ends everything inside with it.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    process::ExitCode,
    time::{Duration, Instant},
};

use trenv_sandbox::{
    protocol::{ExitReport, Reply, Request, StepName},
    sys,
};

use crate::{
    failure::{Doing, Failure, check},
    network, parts, purge, root,
};

/// Steps with their times, as they go to the library.
pub type Steps = Vec<(StepName, Duration)>;

/// Runs something and notes how long it took.
pub fn timed<T>(
    steps: &mut Steps,
    name: StepName,
    work: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let start = Instant::now();
    let result = work();
    steps.push((name, start.elapsed()));
    result
}

/// What pid 1 knows about its sandbox.
#[derive(Debug)]
pub struct State {
    /// The hostname while there is no tenancy.
    pub hostname: String,
    /// A procfs of this pid namespace that no tenancy sees.
    pub proc: OwnedFd,
    pub base: root::Base,
    pub parts: Stock,
    /// Addresses and routes as the sandbox got them.
    pub network: network::Baseline,
}

/// The parts of the next root.
#[derive(Debug)]
pub enum Stock {
    Ready(parts::Parts),
    /// A tenancy has them.
    Used,
    /// The last tenancy is over; they are made when pid 1 has nothing else to do.
    Due,
}

impl State {
    /// Makes the parts if they are due.
    pub fn restock(&mut self) -> Result<(), Failure> {
        if matches!(self.parts, Stock::Due) {
            self.parts = Stock::Ready(parts::make()?);
        }
        Ok(())
    }
}

pub fn run(control: &OwnedFd, exits: &OwnedFd, hostname: &str) -> ExitCode {
    let started = Instant::now();
    let mut steps = Steps::new();
    let signals = match prepare() {
        Ok(signals) => signals,
        Err(failure) => return refuse(control, failure),
    };
    let mut state = match State::first(hostname) {
        Ok(state) => state,
        Err(failure) => return refuse(control, failure),
    };
    steps.push((StepName::MakeParts, started.elapsed()));
    if sys::send(control.as_fd(), &Reply::Done(steps), &[]).is_err() {
        return ExitCode::SUCCESS;
    }
    let mut reports = VecDeque::new();
    loop {
        match wait(control, &signals, exits, !reports.is_empty()) {
            Ok(Woken { ended: true, .. }) | Err(_) => return ExitCode::SUCCESS,
            Ok(woken) => {
                if woken.child {
                    drain(&signals);
                    reap(&mut reports);
                }
                if send_reports(exits, &mut reports).is_err() {
                    return ExitCode::SUCCESS;
                }
                if woken.request && !serve(control, &mut state, &mut reports) {
                    return ExitCode::SUCCESS;
                }
            }
        }
    }
}

fn refuse(control: &OwnedFd, failure: Failure) -> ExitCode {
    let _ = sys::send(control.as_fd(), &Reply::Failed(failure.0), &[]);
    ExitCode::FAILURE
}

impl State {
    fn first(hostname: &str) -> Result<Self, Failure> {
        let proc = parts::private_proc()?;
        let base = root::Base::make()?;
        Ok(Self {
            hostname: hostname.to_owned(),
            base,
            parts: Stock::Ready(parts::make()?),
            network: network::Baseline::read()?,
            proc,
        })
    }
}

/// Makes an ordinary process into pid 1; answers the descriptor that tells of dead children.
fn prepare() -> Result<OwnedFd, Failure> {
    // SAFETY: plain calls on our own process; the sets are initialised by sigfillset/sigaddset
    // before use.
    unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, 1);
        libc::setsid();
        libc::umask(0);
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        let fd = check(libc::signalfd(
            -1,
            &raw const set,
            libc::SFD_CLOEXEC | libc::SFD_NONBLOCK,
        ))
        .doing("listen for dead children")?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

struct Woken {
    request: bool,
    child: bool,
    ended: bool,
}

fn wait(
    control: &OwnedFd,
    signals: &OwnedFd,
    exits: &OwnedFd,
    reports_wait: bool,
) -> io::Result<Woken> {
    let entry = |fd: &OwnedFd, events| libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    };
    let room = if reports_wait { libc::POLLOUT } else { 0 };
    let mut polled = [
        entry(control, libc::POLLIN),
        entry(signals, libc::POLLIN),
        entry(exits, room),
    ];
    // SAFETY: three valid entries.
    check(unsafe { libc::poll(polled.as_mut_ptr(), 3, -1) })?;
    let [control, signals, exits] = polled.map(|entry| entry.revents);
    Ok(Woken {
        request: control & libc::POLLIN != 0,
        child: signals & libc::POLLIN != 0,
        // A last request may be waiting beside the hang-up; nobody hears its answer.
        ended: (control | exits) & (libc::POLLHUP | libc::POLLERR) != 0,
    })
}

fn drain(signals: &OwnedFd) {
    let mut info = [0_u8; 128];
    while rustix::io::read(signals, &mut info).is_ok() {}
}

/// Reaps every dead child and queues its report.
pub fn reap(reports: &mut VecDeque<ExitReport>) {
    loop {
        let mut wait_status = 0;
        // SAFETY: the status outlives the call.
        let pid = unsafe { libc::waitpid(-1, &raw mut wait_status, libc::WNOHANG | libc::__WALL) };
        if pid <= 0 {
            return;
        }
        reports.push_back(ExitReport { pid, wait_status });
    }
}

/// Sends what the socket has room for; a slow reader never stops pid 1.
fn send_reports(exits: &OwnedFd, reports: &mut VecDeque<ExitReport>) -> io::Result<()> {
    while let Some(report) = reports.front() {
        match sys::send_now(exits.as_fd(), report) {
            Ok(()) => {
                reports.pop_front();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Answers one request; false when the library is gone.
fn serve(control: &OwnedFd, state: &mut State, reports: &mut VecDeque<ExitReport>) -> bool {
    let (request, fds) = match sys::receive::<Request>(control.as_fd()) {
        Ok(Some(request)) => request,
        Ok(None) => return false,
        Err(error) => {
            let reply = Reply::Failed(format!("the request cannot be read: {error}"));
            return sys::send(control.as_fd(), &reply, &[]).is_ok();
        }
    };
    let done = match request {
        Request::Enter(request) => root::enter(state, &request, fds),
        Request::Purge => purge::purge(state, reports),
    };
    let reply = match done {
        Ok(steps) => Reply::Done(steps),
        Err(failure) => Reply::Failed(failure.0),
    };
    let heard = sys::send(control.as_fd(), &reply, &[]).is_ok();
    // After the answer, so that nobody waits for it. If it fails the next request tries again and
    // reports it.
    let _ = state.restock();
    heard
}
