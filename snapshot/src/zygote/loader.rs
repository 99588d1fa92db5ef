//! Starting `trenv-zygote`: the restorer's region, the loader and the capsules as memfds, addresses as
//! arguments, descriptors at fixed numbers.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command};

use nix::libc;
use pseudo_mm_uapi::Template;

use super::{ZygoteError, ZygoteRequest, errno, io_error};
use crate::plan::skeleton::Area;
use crate::plan::{CapsulePlan, Copy, LOADER, Plan};

/// Hands the plan to `trenv-zygote`.
pub struct Loader {
    region: OwnedFd,
    loader: OwnedFd,
    content: OwnedFd,
    pages: OwnedFd,
    /// The template that zygotes map of the pool's device.
    template: Option<OwnedFd>,
    capsules: Vec<OwnedFd>,
    arguments: Vec<String>,
}

/// Descriptors that `trenv-zygote` begins with.
pub mod fd {
    pub const CONTROL: i32 = 3;
    pub const REGION: i32 = 4;
    pub const PAGES: i32 = 5;
    pub const ROOTFS: i32 = 6;
    pub const LOADER: i32 = 7;
    pub const CONTENT: i32 = 8;
    /// Only if the arguments say so.
    pub const TEMPLATE: i32 = 9;
    pub const CAPSULES: i32 = 10;
}

impl Loader {
    /// With the template from which the plan's attachable areas are mapped, if they are.
    pub fn of(
        plan: &Plan,
        template: Option<&Template>,
        request: &ZygoteRequest<'_>,
    ) -> Result<Self, ZygoteError> {
        let template = template.map(|template| template.as_fd().try_clone_to_owned());
        let template = template
            .transpose()
            .map_err(io_error("preparing the zygote's descriptors"))?;
        let region = memfd(RESTORER)?;
        region
            .write_all_at(&plan.bytes, 0)
            .and_then(|()| region.set_len(plan.length))
            .map_err(io_error("writing the restorer's region"))?;
        let capsules = plan.capsules.iter();
        let capsules: Vec<OwnedFd> = capsules
            .map(|capsule| fill_capsule(capsule, request))
            .collect::<Result<_, _>>()?;
        let content = memfd(RESTORER)?;
        copy_pages(&plan.content, &content, request)
            .map_err(io_error("copying the pages of shared memory"))?;
        let content = content.into();
        let pages = pages(&plan.areas, template.is_some(), request)?;
        let numbers = [
            plan.base,
            plan.code,
            plan.length,
            plan.entry,
            plan.stack,
            plan.header,
        ];
        let mut arguments: Vec<String> = numbers.iter().map(|n| format!("{n:x}")).collect();
        arguments.push(plan.control.to_string());
        arguments.push(capsules.len().to_string());
        arguments.push(u8::from(template.is_some()).to_string());
        arguments.extend(
            request
                .cgroups
                .iter()
                .map(|path| path.display().to_string()),
        );
        Ok(Self {
            region: region.into(),
            loader: executable()?,
            content,
            pages,
            template,
            capsules,
            arguments,
        })
    }

    pub fn region(&self) -> BorrowedFd<'_> {
        self.region.as_fd()
    }

    /// What a zygote's program reads stored pages from.
    pub fn pages(&self) -> BorrowedFd<'_> {
        self.pages.as_fd()
    }

    /// What it hands over besides: the loader, the file of pages that clones copy, the capsules.
    pub fn rest(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let fixed = [self.loader.as_fd(), self.content.as_fd()];
        fixed
            .into_iter()
            .chain(self.capsules.iter().map(AsFd::as_fd))
    }

    pub fn start(
        &mut self,
        binary: &Path,
        control: &OwnedFd,
        request: &ZygoteRequest<'_>,
    ) -> Result<Child, ZygoteError> {
        let mut handed = vec![
            (control.as_fd(), fd::CONTROL),
            (self.region.as_fd(), fd::REGION),
            (self.pages.as_fd(), fd::PAGES),
            (request.rootfs.as_fd(), fd::ROOTFS),
            (self.loader.as_fd(), fd::LOADER),
            (self.content.as_fd(), fd::CONTENT),
        ];
        handed.extend(
            self.template
                .as_ref()
                .map(|template| (template.as_fd(), fd::TEMPLATE)),
        );
        handed.extend(self.capsules.iter().map(AsFd::as_fd).zip(fd::CAPSULES..));
        let mut command = Command::new(binary);
        command
            .args(&self.arguments)
            .env_clear()
            .stdin(std::process::Stdio::null());
        // The kernel writes into a registered rseq area, and the zygote unmaps its own program.
        command.env("GLIBC_TUNABLES", "glibc.pthread.rseq=0");
        command.stdout(std::process::Stdio::null());
        hand_over(&mut command, &handed).map_err(io_error("preparing the zygote's descriptors"))?;
        command.spawn().map_err(|source| ZygoteError::Io {
            doing: format!("starting {}", binary.display()),
            source,
        })
    }
}

/// Has a program begin with these descriptors, at these numbers.
pub fn hand_over(command: &mut Command, descriptors: &[(BorrowedFd<'_>, i32)]) -> io::Result<()> {
    use std::os::unix::process::CommandExt;
    // Duplicates above the wanted numbers, so that none is overwritten before it is moved.
    let high = |(fd, number): &(BorrowedFd<'_>, i32)| {
        let high = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(64))?;
        // SAFETY: fcntl just made this descriptor, nobody else owns it.
        Ok((unsafe { OwnedFd::from_raw_fd(high) }, *number))
    };
    let handed = descriptors.iter().map(high);
    let handed: Vec<(OwnedFd, i32)> = handed.collect::<io::Result<_>>()?;
    // SAFETY: between fork and exec only dup2 is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            for (from, to) in &handed {
                if libc::dup2(from.as_raw_fd(), *to) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        })
    };
    Ok(())
}

/// The name by which a dump of a restored program knows the region again.
const RESTORER: &str = "trenv-restorer";
/// Bytes copied from the pool at once.
const PART: usize = 1 << 20;

fn memfd(name: &str) -> Result<File, ZygoteError> {
    nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
        .map(File::from)
        .map_err(errno("making the restorer's region"))
}

/// A capsule, with its pages from the pool.
fn fill_capsule(
    capsule: &CapsulePlan,
    request: &ZygoteRequest<'_>,
) -> Result<OwnedFd, ZygoteError> {
    let file = memfd(RESTORER)?;
    file.write_all_at(&capsule.head, 0)
        .and_then(|()| copy_pages(&capsule.pages, &file, request))
        .and_then(|()| file.write_all_at(&capsule.bytes, capsule.region))
        .map_err(io_error("filling the capsule of a small process"))?;
    Ok(file.into())
}

/// A file with the stored pages of the areas that are not attached, at their offsets in the pool: the
/// pool's own, or, since a device cannot be read by read(2), one that is there while the zygote is
/// built.
fn pages(
    areas: &[Area],
    attached: bool,
    request: &ZygoteRequest<'_>,
) -> Result<OwnedFd, ZygoteError> {
    if let Some(file) = request.template.file() {
        return file
            .try_clone_to_owned()
            .map_err(io_error("preparing the zygote's descriptors"));
    }
    let read = areas.iter().filter(|area| !(attached && area.attachable));
    let runs = read.flat_map(|area| &area.runs);
    let copies: Vec<Copy> = runs
        .filter_map(|run| {
            run.offset.map(|offset| Copy {
                from: offset,
                to: offset,
                length: run.length,
            })
        })
        .collect();
    let file = memfd("trenv-pages")?;
    copy_pages(&copies, &file, request).map_err(io_error("copying pages of the pool's device"))?;
    Ok(file.into())
}

/// Copies pages of the pool to their places in a file.
fn copy_pages(copies: &[Copy], file: &File, request: &ZygoteRequest<'_>) -> io::Result<()> {
    let mut part = vec![0; PART];
    for copy in copies {
        let mut done = 0;
        while done < copy.length {
            let length = (copy.length - done).min(PART as u64);
            let part = &mut part[..length as usize];
            let read = request.template.read_at(part, copy.from + done);
            read.map_err(io::Error::other)?;
            file.write_all_at(part, copy.to + done)?;
            done += length;
        }
    }
    Ok(())
}

/// The loader, open to be executed: nobody may have it open for writing then (execve(2), ETXTBSY).
fn executable() -> Result<OwnedFd, ZygoteError> {
    let doing = "making the loader; is vm.memfd_noexec set to 2?";
    let file = memfd("trenv-loader")?;
    file.write_all_at(LOADER, 0).map_err(io_error(doing))?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::open(path).map(OwnedFd::from).map_err(io_error(doing))
}
