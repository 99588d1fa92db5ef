//! `trenv-zygote`: takes its place in a function's file system, maps the restorer's region and
//! becomes the zygote. Started by the shim only; see `trenv_snapshot::zygote`.
//!
//! Arguments, in hexadecimal: base, length of the code, length, entry, stack and header of the
//! region, address of the ranges to keep; in decimal the control descriptor's number; then the
//! words that take the address of the vdso, and the cgroups to enter.

use std::arch::asm;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail};
use nix::libc;
use nix::sched::CloneFlags;
use trenv_restorer::wire::{Range, fd};
use trenv_snapshot::zygote::loader_fd;

fn main() {
    if let Err(err) = become_zygote() {
        eprintln!("trenv-zygote: {err:#}");
        std::process::exit(1);
    }
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
        keep,
        control,
        vdso_words,
        cgroups @ ..,
    ] = arguments.as_slice()
    else {
        bail!("This program is started by the shim; there is no other use for it");
    };
    let hex = |text: &String| u64::from_str_radix(text, 16).context("Failed to read an address");
    let (base, code, length) = (hex(base)?, hex(code)?, hex(length)?);
    let (entry, stack, header, keep) = (hex(entry)?, hex(stack)?, hex(header)?, hex(keep)?);
    let control: i32 = control
        .parse()
        .context("Failed to read the control descriptor")?;

    for cgroup in cgroups {
        std::fs::write(cgroup, "0").with_context(|| format!("Failed to enter {cgroup}"))?;
    }
    let kernel_mappings = kernel_mappings()?;
    let zero = File::open("/dev/zero").context("Failed to open /dev/zero")?;
    let home = rustix::process::pidfd_open(
        rustix::process::getpid(),
        rustix::process::PidfdFlags::empty(),
    )
    .context("Failed to open this process")?;
    enter_rootfs()?;

    map_region(base, code, length)?;
    let vdso_start = kernel_mappings.start;
    for word in vdso_words.split(',').filter(|word| !word.is_empty()) {
        let at = u64::from_str_radix(word, 16).context("Failed to read an address")?;
        // SAFETY: the planner gives addresses of words in the region's data, mapped above.
        unsafe { *(at as *mut u64) += vdso_start };
    }
    // SAFETY: as above; the header's first range to keep.
    unsafe { *(keep as *mut Range) = kernel_mappings };
    arrange_descriptors(control, &home, &zero)?;
    quiet_signals();
    // SAFETY: the region is complete; the restorer unmaps this program and never comes back.
    unsafe {
        asm!(
            "mov rsp, rsi",
            "jmp {entry}",
            entry = in(reg) entry,
            in("rdi") header,
            in("rsi") stack,
            options(noreturn),
        )
    }
}

/// The kernel's own mappings of this process: vvar and vdso, which follow each other.
fn kernel_mappings() -> Result<Range> {
    let maps =
        std::fs::read_to_string("/proc/self/maps").context("Failed to read /proc/self/maps")?;
    let mut found: Option<Range> = None;
    for line in maps
        .lines()
        .filter(|line| line.ends_with("[vdso]") || line.contains("[vvar"))
    {
        let range = line.split(' ').next().unwrap_or_default();
        let (start, end) = range
            .split_once('-')
            .context("Failed to read /proc/self/maps")?;
        let (start, end) = (
            u64::from_str_radix(start, 16)?,
            u64::from_str_radix(end, 16)?,
        );
        found = Some(match found {
            None => Range { start, end },
            Some(range) if range.end == start => Range { end, ..range },
            Some(_) => bail!("The kernel's mappings are not next to each other"),
        });
    }
    found.context("This process has no vdso")
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

/// Everything to its number above the control descriptor, and nothing else stays open.
fn arrange_descriptors(control: i32, home: &OwnedFd, zero: &File) -> Result<()> {
    // Above every number used, so that no source is overwritten.
    let spare = control + 32;
    let places = [
        (loader_fd::CONTROL, fd::CONTROL as i32),
        (home.as_raw_fd(), fd::HOME as i32),
        (loader_fd::PAGES, 2),
        (zero.as_raw_fd(), 3),
    ];
    for (index, (from, _)) in places.iter().enumerate() {
        // SAFETY: plain numbers; the process has no other user of these descriptors.
        if unsafe { libc::dup2(*from, spare + index as i32) } < 0 {
            return Err(std::io::Error::last_os_error()).context("Failed to arrange descriptors");
        }
    }
    for (index, (_, to)) in places.iter().enumerate() {
        // SAFETY: as above.
        if unsafe { libc::dup2(spare + index as i32, control + to) } < 0 {
            return Err(std::io::Error::last_os_error()).context("Failed to arrange descriptors");
        }
    }
    // SAFETY: closes descriptors of this process by number; their owners are never used again.
    unsafe {
        libc::syscall(libc::SYS_close_range, 0, control - 1, 0);
        libc::syscall(libc::SYS_close_range, control + 4, u32::MAX, 0);
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
