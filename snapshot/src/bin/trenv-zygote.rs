//! `trenv-zygote`: takes its place in a function's file system, maps the restorer's region and
//! becomes the zygote. Started by the shim only; see `trenv_snapshot::zygote`.
//!
//! Arguments, in hexadecimal: base, length of the code, length, entry, stack and header of the
//! region; in decimal the control descriptor's number, the count of capsules, and 1 if there is a
//! template of the pool's device; then the cgroups to enter. With the one argument
//! [`methods::KEEPER`] it is the keeper of userfaultfds instead, and with [`methods::ENTER`] first it
//! runs CRIU in a sandbox.

use std::arch::asm;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail};
use nix::libc;
use nix::sched::CloneFlags;
use trenv_restorer::wire::fd;
use trenv_snapshot::methods;
use trenv_snapshot::zygote::{build_fd, loader_fd};

fn main() {
    let done = match std::env::args().nth(1).as_deref() {
        Some(methods::KEEPER) => methods::keep()
            .context("Failed to keep userfaultfds")
            .map(|()| 0),
        Some(methods::ENTER) => methods::enter(),
        _ => become_zygote().map(|()| 0),
    };
    let status = done.unwrap_or_else(|err| {
        eprintln!("trenv-zygote: {err:#}");
        1
    });
    std::process::exit(status);
}

fn become_zygote() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [
        base,
        code,
        length,
        entry,
        stack,
        header,
        control,
        capsules,
        template,
        cgroups @ ..,
    ] = arguments.as_slice()
    else {
        bail!("This program is started by the shim; there is no other use for it");
    };
    let hex = |text: &String| u64::from_str_radix(text, 16).context("Failed to read an address");
    let (base, code, length) = (hex(base)?, hex(code)?, hex(length)?);
    let (entry, stack, header) = (hex(entry)?, hex(stack)?, hex(header)?);
    let control: i32 = control
        .parse()
        .context("Failed to read the control descriptor")?;
    let capsules: i32 = capsules.parse().context("Failed to read a count")?;
    let has_template = template == "1";

    for cgroup in cgroups {
        std::fs::write(cgroup, "0").with_context(|| format!("Failed to enter {cgroup}"))?;
    }
    // SAFETY: reads the auxiliary vector.
    let vdso = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    if vdso == 0 {
        bail!("This process has no vdso");
    }
    let zero = File::open("/dev/zero").context("Failed to open /dev/zero")?;
    enter_rootfs()?;

    map_region(base, code, length)?;
    raise_descriptor_limit()?;
    arrange_descriptors(control, capsules, has_template, &zero)?;
    quiet_signals();
    // SAFETY: the region is complete; the restorer unmaps this program and never comes back.
    unsafe {
        asm!(
            "mov rsp, rsi",
            "jmp {entry}",
            entry = in(reg) entry,
            in("rdi") header,
            in("rsi") stack,
            in("rdx") vdso,
            options(noreturn),
        )
    }
}

/// A mount namespace of its own, with nothing but the function's layers in it.
fn enter_rootfs() -> Result<()> {
    use rustix::mount::{
        MountPropagationFlags, MoveMountFlags, UnmountFlags, mount_change, move_mount, unmount,
    };
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).context("Failed to make a mount namespace")?;
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .context("Failed to make mounts private")?;
    // SAFETY: the shim handed this descriptor over; nobody else uses it.
    let rootfs = unsafe { OwnedFd::from_raw_fd(loader_fd::ROOTFS) };
    // Any directory will do: what lies below it is not seen any more afterwards.
    move_mount(
        &rootfs,
        "",
        rustix::fs::CWD,
        "/proc",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .context("Failed to mount the function's layers")?;
    nix::unistd::chdir("/proc").context("Failed to enter the function's layers")?;
    nix::unistd::pivot_root(".", ".").context("Failed to change the root directory")?;
    unmount(".", UnmountFlags::DETACH).context("Failed to leave the machine's file systems")?;
    nix::unistd::chdir("/").context("Failed to enter the function's layers")?;
    Ok(())
}

fn map_region(base: u64, code: u64, length: u64) -> Result<()> {
    let map = |offset: u64, length: u64, access: i32| {
        // SAFETY: MAP_FIXED_NOREPLACE never replaces a mapping of this program.
        let at = unsafe {
            libc::mmap(
                (base + offset) as *mut libc::c_void,
                length as usize,
                access,
                libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE,
                loader_fd::REGION,
                offset as libc::off_t,
            )
        };
        if at as u64 == base + offset {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error())
        }
    };
    map(0, code, libc::PROT_READ | libc::PROT_EXEC).context("Failed to map the restorer's code")?;
    map(code, length - code, libc::PROT_READ | libc::PROT_WRITE)
        .context("Failed to map the restorer's data")
}

/// A start has descriptors above all that the tree uses; each process sets its own limit again.
fn raise_descriptor_limit() -> Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: reads and sets a limit of this process by a structure on this stack.
    let result = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit)
    };
    if result < 0 {
        return Err(std::io::Error::last_os_error())
            .context("Failed to raise the limit of open files");
    }
    Ok(())
}

/// Everything to its number from the control descriptor on, and nothing else stays open.
fn arrange_descriptors(control: i32, capsules: i32, has_template: bool, zero: &File) -> Result<()> {
    let to = |number: u64| control + number as i32;
    let mut places = vec![
        (loader_fd::CONTROL, to(fd::CONTROL)),
        (loader_fd::LOADER, to(fd::LOADER)),
        (loader_fd::CONTENT, to(fd::CONTENT)),
        (loader_fd::PAGES, to(build_fd::PAGES)),
        (zero.as_raw_fd(), to(build_fd::ZERO)),
    ];
    if has_template {
        places.push((loader_fd::TEMPLATE, to(build_fd::TEMPLATE)));
    }
    for capsule in 0..capsules {
        places.push((loader_fd::CAPSULES + capsule, to(fd::CAPSULES) + capsule));
    }
    // First above every number used, so that no source is overwritten.
    let spare = to(build_fd::TEMPLATE) + 1 + places.len() as i32 + loader_fd::CAPSULES + capsules;
    for (index, (from, _)) in places.iter().enumerate() {
        duplicate(*from, spare + index as i32)?;
    }
    // SAFETY: closes descriptors of this process by number; their owners are never used again.
    unsafe { libc::syscall(libc::SYS_close_range, 0, spare - 1, 0) };
    for (index, (_, to)) in places.iter().enumerate() {
        duplicate(spare + index as i32, *to)?;
    }
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_close_range, spare, u32::MAX, 0) };
    Ok(())
}

fn duplicate(from: i32, to: i32) -> Result<()> {
    // SAFETY: plain numbers; the process has no other user of these descriptors.
    if unsafe { libc::dup2(from, to) } < 0 {
        return Err(std::io::Error::last_os_error()).context("Failed to arrange descriptors");
    }
    Ok(())
}

/// All signals blocked, all at their default but SIGCHLD, so that agents that end are not kept.
fn quiet_signals() {
    // SAFETY: sets dispositions and the mask of this single thread.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        // glibc keeps its first two real-time signals to itself.
        let everything = u64::MAX;
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const everything,
            0,
            8,
        );
        // The restorer's addresses are its own: no rseq, robust list or TID word of this program
        // may be written by the kernel any more.
        libc::syscall(libc::SYS_set_robust_list, 0, 24);
        libc::syscall(libc::SYS_set_tid_address, 0);
    }
}
