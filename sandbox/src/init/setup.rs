//! What the new process does to itself before it becomes its program, in runc's order.

use std::{
    ffi::{CString, OsStr},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use trenv_sandbox::{
    process::{CapabilitySets, ProcessSpec, Rlimit, Role, TerminalSize, seccomp},
    sys,
};

use crate::failure::{Doing, Failure, check};

/// A new pseudo terminal of the sandbox.
#[derive(Debug)]
pub struct Terminal {
    pub master: OwnedFd,
    slave: OwnedFd,
}

impl Terminal {
    pub fn open(size: TerminalSize, owner: u32) -> Result<Self, Failure> {
        let flags =
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let master = rustix::fs::open("/dev/ptmx", flags, rustix::fs::Mode::empty())
            .doing("open a terminal")?;
        let unlocked: libc::c_int = 0;
        let size = libc::winsize {
            ws_row: size.rows,
            ws_col: size.columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the first ioctl reads an int, the second a winsize; the third takes flags and
        // makes a descriptor that is ours.
        let slave = unsafe {
            check(libc::ioctl(
                master.as_raw_fd(),
                libc::TIOCSPTLCK,
                &raw const unlocked,
            ))
            .doing("unlock the terminal")?;
            check(libc::ioctl(
                master.as_raw_fd(),
                libc::TIOCSWINSZ,
                &raw const size,
            ))
            .doing("size the terminal")?;
            let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
            let slave = check(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags))
                .doing("open the terminal's other end")?;
            crate::launch::given(slave)
        };
        // SAFETY: fchown takes no pointers; -1 keeps the group.
        check(unsafe { libc::fchown(slave.as_raw_fd(), owner, u32::MAX) })
            .doing("give the terminal to the user")?;
        Ok(Self { master, slave })
    }
}

/// Sets this process up and runs the program; comes back only when that failed, and was reported.
pub fn become_process(
    process: &ProcessSpec,
    stdio: [OwnedFd; 3],
    terminal: Option<Terminal>,
    mut report: OwnedFd,
) {
    let failure = match prepare(process, stdio, terminal, &mut report) {
        // Closed by the kernel at the moment when the program takes over.
        Ok(program) => program.run(),
        Err(failure) => failure,
    };
    let _ = sys::send(report.as_fd(), &failure.0, &[]);
}

fn prepare(
    process: &ProcessSpec,
    stdio: [OwnedFd; 3],
    terminal: Option<Terminal>,
    report: &mut OwnedFd,
) -> Result<Program, Failure> {
    reset_signals();
    // SAFETY: setsid and umask take no pointers.
    unsafe {
        libc::setsid();
        libc::umask(process.umask);
    }
    set_stdio(process, stdio, terminal)?;
    // Nothing else of ours may be reachable from the working directory or the program.
    keep_only(report)?;
    new_session_keyring();
    if let Some(adjustment) = process.oom_score_adj {
        std::fs::write("/proc/self/oom_score_adj", adjustment.to_string())
            .doing_on("set oom_score_adj to", &adjustment.to_string())?;
    }
    for limit in &process.rlimits {
        set_limit(limit)?;
    }
    enter_cwd(process)?;
    let program = Program::find(process)?;
    if process.no_new_privileges {
        // SAFETY: prctl with plain numbers.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
            .doing("set no_new_privs")?;
    }
    install(&seccomp::always())?;
    let late = process
        .seccomp
        .as_ref()
        .filter(|_| process.no_new_privileges);
    if let (Some(filter), None) = (&process.seccomp, late) {
        // Without no_new_privs only a process with CAP_SYS_ADMIN may do it.
        install(filter)?;
    }
    drop_bounding(process.capabilities.unwrap_or_default().bounding)?;
    set_user(process)?;
    set_capabilities(process.capabilities.unwrap_or_default())?;
    if let Some(filter) = late {
        install(filter)?;
    }
    Ok(program)
}

/// Every signal as a new program expects it, whatever we inherited.
fn reset_signals() {
    /// As the kernel takes it: handler, flags, restorer, mask.
    const DEFAULT: [usize; 4] = [libc::SIG_DFL, 0, 0, 0];
    // SAFETY: default actions and an empty mask; the set is initialised by sigemptyset. The call is
    // made directly, since libc keeps two signals to itself that we may have inherited ignored.
    unsafe {
        for signal in 1..=64 {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT.as_ptr(),
                std::ptr::null_mut::<usize>(),
                size_of::<u64>(),
            );
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

fn set_stdio(
    process: &ProcessSpec,
    stdio: [OwnedFd; 3],
    terminal: Option<Terminal>,
) -> Result<(), Failure> {
    // Above 2, so that placing one never overwrites another that is still to be placed.
    let sources: Vec<OwnedFd> = match &terminal {
        Some(terminal) => vec![above_stdio(&terminal.slave)?],
        None => stdio.iter().map(above_stdio).collect::<Result<_, _>>()?,
    };
    // The given ones may have any number, 0 to 2 too: they are closed with all others later.
    std::mem::forget(stdio);
    for number in 0..3 {
        let source = sources.get(number).unwrap_or(&sources[0]);
        let number = RawFd::try_from(number).unwrap_or(0);
        // SAFETY: dup2 takes no pointers.
        check(unsafe { libc::dup2(source.as_raw_fd(), number) }).doing("place stdio")?;
        if process.uid != 0 {
            give_to_user(number, process.uid);
        }
    }
    if let Some(terminal) = terminal {
        // SAFETY: the ioctl takes a number.
        check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }).doing("take the terminal")?;
        std::mem::forget(terminal);
    }
    Ok(())
}

fn above_stdio(fd: &OwnedFd) -> Result<OwnedFd, Failure> {
    rustix::io::fcntl_dupfd_cloexec(fd, 3).doing("copy a descriptor of stdio")
}

/// Lets a program of another user open its own /dev/stdout again. Not possible for every kind of
/// file, and not needed for the null device.
fn give_to_user(number: RawFd, uid: u32) {
    // SAFETY: a zeroed stat is valid and outlives the call; fchown takes no pointers.
    unsafe {
        let mut status: libc::stat = std::mem::zeroed();
        let null =
            libc::fstat(number, &raw mut status) == 0 && status.st_rdev == libc::makedev(1, 3);
        if !null {
            libc::fchown(number, uid, u32::MAX);
        }
    }
}

/// Moves the report's socket to descriptor 3 and closes all that follow.
fn keep_only(report: &mut OwnedFd) -> Result<(), Failure> {
    if report.as_raw_fd() != 3 {
        // SAFETY: dup3 takes no pointers, and what was descriptor 3 is used no more.
        let kept = unsafe {
            check(libc::dup3(report.as_raw_fd(), 3, libc::O_CLOEXEC))
                .doing("keep the report's socket")?;
            crate::launch::given(3)
        };
        *report = kept;
    }
    // SAFETY: nobody uses the closed descriptors after this.
    unsafe { libc::close_range(4, libc::c_uint::MAX, 0) };
    Ok(())
}

/// A keyring of its own in place of the one that our parents share. Without key support in the
/// kernel there is nothing to replace.
fn new_session_keyring() {
    const JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: no name is given.
    unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            JOIN_SESSION_KEYRING,
            std::ptr::null::<libc::c_char>(),
        )
    };
}

fn set_limit(limit: &Rlimit) -> Result<(), Failure> {
    let value = libc::rlimit {
        rlim_cur: limit.soft,
        rlim_max: limit.hard,
    };
    // SAFETY: the limit outlives the call.
    check(unsafe { libc::setrlimit(limit.resource, &raw const value) }).doing_on(
        "set a resource limit:",
        &format!(
            "number {} to {} of {}",
            limit.resource, limit.soft, limit.hard
        ),
    )?;
    Ok(())
}

fn enter_cwd(process: &ProcessSpec) -> Result<(), Failure> {
    let cwd = Path::new(&process.cwd);
    if process.role == Role::Root && !cwd.exists() {
        // Where it cannot be made, going there gives the error.
        let _ = std::fs::create_dir_all(cwd);
    }
    std::env::set_current_dir(cwd).doing_on("go to the working directory", &process.cwd)?;
    // A directory outside the root has no path here.
    match std::env::current_dir() {
        Ok(path) if path.starts_with("/") => Ok(()),
        _ => Err(Failure(format!(
            "the working directory {} lies outside the sandbox",
            process.cwd
        ))),
    }
}

fn drop_bounding(keep: u64) -> Result<(), Failure> {
    for capability in 0..64 {
        if keep & 1 << capability != 0 {
            continue;
        }
        // SAFETY: prctl with plain numbers.
        match check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }) {
            Ok(_) => {}
            // Beyond the last capability that this kernel knows.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            Err(error) => return Err(error).doing("drop a capability"),
        }
    }
    Ok(())
}

fn set_user(process: &ProcessSpec) -> Result<(), Failure> {
    // SAFETY: the list of groups outlives the call; the others take numbers only.
    unsafe {
        check(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0)).doing("keep capabilities")?;
        check(libc::setgroups(
            process.groups.len(),
            process.groups.as_ptr(),
        ))
        .doing("set the groups")?;
        check(libc::setresgid(process.gid, process.gid, process.gid))
            .doing_on("become group", &process.gid.to_string())?;
        check(libc::setresuid(process.uid, process.uid, process.uid))
            .doing_on("become user", &process.uid.to_string())?;
        check(libc::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0)).doing("keep capabilities")?;
    }
    Ok(())
}

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn set_capabilities(sets: CapabilitySets) -> Result<(), Failure> {
    const VERSION_3: u32 = 0x2008_0522;
    const AMBIENT_RAISE: libc::c_ulong = 2;
    const AMBIENT_CLEAR: libc::c_ulong = 4;
    let header = CapabilityHeader {
        version: VERSION_3,
        pid: 0,
    };
    let half = |shift: u32| CapabilityData {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: header and data have the layout of version 3 and outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return Err(Failure(format!(
            "set the capabilities {:#x}, of which this host may lack some: {error}",
            sets.permitted
        )));
    }
    // SAFETY: prctl with plain numbers.
    unsafe {
        check(libc::prctl(libc::PR_CAP_AMBIENT, AMBIENT_CLEAR, 0, 0, 0))
            .doing("clear the ambient capabilities")?;
        for capability in 0..64_u64 {
            if sets.ambient & 1 << capability != 0 {
                check(libc::prctl(
                    libc::PR_CAP_AMBIENT,
                    AMBIENT_RAISE,
                    capability,
                    0,
                    0,
                ))
                .doing_on("raise the ambient capability", &capability.to_string())?;
            }
        }
    }
    Ok(())
}

fn install(program: &seccomp::Program) -> Result<(), Failure> {
    const SET_MODE_FILTER: libc::c_int = 1;
    let instructions: Vec<libc::sock_filter> = program
        .instructions
        .iter()
        .map(|(code, jt, jf, k)| libc::sock_filter {
            code: *code,
            jt: *jt,
            jf: *jf,
            k: *k,
        })
        .collect();
    let filter = libc::sock_fprog {
        len: u16::try_from(instructions.len()).unwrap_or(u16::MAX),
        filter: instructions.as_ptr().cast_mut(),
    };
    // SAFETY: the program outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            SET_MODE_FILTER,
            program.flags,
            &raw const filter,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error()).doing("install the seccomp filter");
    }
    Ok(())
}

/// A program found, with its arguments and environment as the kernel wants them.
struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// Looks a name without a slash up in the PATH of the new environment.
    fn find(process: &ProcessSpec) -> Result<Self, Failure> {
        let name = process.args.first().map_or("", String::as_str);
        let mut env = process.env.clone();
        if !env.iter().any(|entry| entry.starts_with("HOME=")) {
            env.push(format!("HOME={}", home(process.uid)));
        }
        let path = env
            .iter()
            .rev()
            .find_map(|entry| entry.strip_prefix("PATH="))
            .unwrap_or("");
        let found = if name.contains('/') {
            executable(Path::new(name))?;
            name.into()
        } else {
            path.split(':')
                .map(|dir| Path::new(if dir.is_empty() { "." } else { dir }).join(name))
                .find(|path| executable(path).is_ok())
                .ok_or_else(|| {
                    Failure(format!("there is no program of this name in PATH ({path})"))
                })?
                .into_os_string()
        };
        let strings = |list: &[String]| {
            list.iter()
                .map(|text| string(OsStr::new(text)))
                .collect::<Result<Vec<_>, _>>()
        };
        Ok(Self {
            path: string(&found)?,
            args: strings(&process.args)?,
            env: strings(&env)?,
        })
    }

    fn run(&self) -> Failure {
        let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
            list.iter()
                .map(|text| text.as_ptr())
                .chain([std::ptr::null()])
                .collect()
        };
        let (args, env) = (pointers(&self.args), pointers(&self.env));
        // SAFETY: both lists end with a null pointer and outlive the call.
        unsafe { libc::execve(self.path.as_ptr(), args.as_ptr(), env.as_ptr()) };
        let error = io::Error::last_os_error();
        Failure(match error.raw_os_error() {
            Some(libc::ENOENT) => {
                "the program or the interpreter that it names does not exist".into()
            }
            Some(libc::ENOEXEC) => "it is not a program for this machine".into(),
            _ => format!("run it: {error}"),
        })
    }
}

fn string(text: &OsStr) -> Result<CString, Failure> {
    CString::new(text.as_bytes()).map_err(|_| Failure("a string holds a zero byte".into()))
}

fn executable(path: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::PermissionsExt;
    let found = std::fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Failure("no such file".into()),
        _ => Failure(error.to_string()),
    })?;
    if found.is_dir() {
        return Err(Failure("it is a directory".into()));
    }
    if found.permissions().mode() & 0o111 == 0 {
        return Err(Failure("the file may not be executed".into()));
    }
    Ok(())
}

/// The home directory that the image's own /etc/passwd gives a user.
fn home(uid: u32) -> String {
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    users
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2).and_then(|id| id.parse().ok()) == Some(uid))
        .and_then(|fields| fields.get(5).map(|home| (*home).to_owned()))
        .filter(|home| !home.is_empty())
        .unwrap_or_else(|| "/".to_owned())
}
