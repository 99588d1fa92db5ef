//! Writes the generation page of the tenancy to come.

use std::{
    os::fd::BorrowedFd,
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::fs::{Mode, OFlags, fchmod, mkdirat, openat};
use trenv_sandbox::generation::{PATH, page};

use crate::{
    failure::{Doing, Failure, check},
    parts,
};

/// Tenancies that a page was written for.
static COUNT: AtomicU64 = AtomicU64::new(0);

/// Puts the file on the /run that is mounted in `root`, where it can only be read.
pub fn write(root: BorrowedFd<'_>, run: BorrowedFd<'_>) -> Result<(), Failure> {
    let (directory, name) = ("trenv", "trenv/generation");
    mkdirat(run, directory, Mode::from_raw_mode(0o755))
        .doing_on("make the directory", "/run/trenv")?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = openat(run, name, flags, Mode::from_raw_mode(0o444)).doing_on("make", PATH)?;
    let count = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
    let page = page(fresh_identifier()?, count);
    let written = rustix::io::write(&file, &page).doing_on("write", PATH)?;
    if written != page.len() {
        return Err(Failure(format!("write {PATH}: only {written} bytes fit")));
    }
    fchmod(&file, Mode::from_raw_mode(0o444)).doing_on("set the mode of", PATH)?;
    drop(file);
    // Neither a function that is root nor one that tidies /run up takes it away.
    parts::make_readonly(root, "/run/trenv")
}

fn fresh_identifier() -> Result<[u8; 16], Failure> {
    let mut identifier = [0; 16];
    // SAFETY: the kernel writes at most the 16 bytes that are there; as few come whole.
    let got = unsafe { libc::getrandom(identifier.as_mut_ptr().cast(), identifier.len(), 0) };
    check(i32::try_from(got).unwrap_or(-1)).doing("draw an identifier")?;
    Ok(identifier)
}
