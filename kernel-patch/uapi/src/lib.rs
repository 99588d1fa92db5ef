//! The interface of `/dev/pseudo_mm`.
//!
//! [`abi`] has the structures and command numbers as the C header
//! `driver/include/uapi/linux/pseudo_mm.h` defines them; that header also says what every call does
//! and which errors it gives. [`Device`] and [`Template`] are the calls themselves:
//!
//! ```no_run
//! use pseudo_mm_uapi::{Device, Extent, Map};
//! # fn main() -> std::io::Result<()> {
//! let dax = std::fs::File::options().read(true).write(true).open("/dev/dax0.0")?;
//! let device = Device::open()?;
//! let pages = device.register(&dax)?; // needs CAP_SYS_ADMIN
//!
//! let template = device.create()?;
//! let heap = Map::private_anonymous(0x7000_0000_0000, 64 << 12, libc::PROT_READ | libc::PROT_WRITE);
//! // Its first 16 pages are the pool's pages 100 to 115, the others start as zeroes.
//! template.add(&[heap], &[Extent::of_device(0x7000_0000_0000, 16, 100)])?;
//! template.seal()?;
//!
//! // Everything at its address, in this process:
//! template.attach().map_err(|refused| refused.error)?;
//! // Or a part of it, anywhere: mmap(addr, len, prot, MAP_PRIVATE, template, address in the template).
//! # Ok(())
//! # }
//! ```
//!
//! A descriptor of a template is all that another process needs to attach it.

pub mod abi;
pub mod rdma;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

pub use abi::{Extent, Info, Map, Stat};

/// Where the driver's device is.
pub const PATH: &str = "/dev/pseudo_mm";

/// Calls a command whose structure starts with its own size.
fn command<T: abi::SizeFirst>(
    fd: BorrowedFd<'_>,
    number: u32,
    argument: &mut T,
) -> io::Result<i32> {
    // SAFETY: `argument` is a structure of the interface, as `abi::SizeFirst` promises, with its size
    // set; the kernel reads and writes that many bytes of it, and the arrays that it names.
    let value = unsafe { libc::ioctl(fd.as_raw_fd(), number.into(), argument) };
    if value < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

fn length<T>(items: &[T]) -> io::Result<u32> {
    u32::try_from(items.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))
}

/// An open `/dev/pseudo_mm`, and the pool that was registered on it.
#[derive(Debug)]
pub struct Device {
    fd: OwnedFd,
}

impl Device {
    /// Opens [`PATH`]. `NotFound` says that the driver is not loaded.
    pub fn open() -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(PATH)?;
        Ok(Self { fd: file.into() })
    }

    /// What the driver can do, and its limits.
    pub fn info(&self) -> io::Result<Info> {
        let mut info = Info::new();
        command(self.fd.as_fd(), abi::INFO, &mut info)?;
        Ok(info)
    }

    /// Makes a device-dax the pool of the templates that are created from here on, and returns how
    /// many pages it has. One pool per `Device`.
    pub fn register(&self, dax: &impl AsFd) -> io::Result<u64> {
        let mut register = abi::Register::new();
        register.dax_fd = dax.as_fd().as_raw_fd();
        command(self.fd.as_fd(), abi::REGISTER, &mut register)?;
        Ok(register.device_pages)
    }

    /// Makes what `pool` reads the remote pool of the templates that are created from here on, and
    /// returns how many pages it has: a descriptor that a provider in the kernel serves, a block
    /// device, or a file that nobody can write to. Needs [`abi::FEATURE_REMOTE`].
    pub fn register_remote(&self, pool: &impl AsFd) -> io::Result<u64> {
        let mut register = abi::RegisterRemote::new();
        register.fd = pool.as_fd().as_raw_fd();
        command(self.fd.as_fd(), abi::REGISTER_REMOTE, &mut register)?;
        Ok(register.remote_pages)
    }

    /// Makes an empty template.
    pub fn create(&self) -> io::Result<Template> {
        let fd = command(self.fd.as_fd(), abi::CREATE, &mut abi::Create::new())?;
        // SAFETY: the call's value is a new descriptor, which nobody else knows.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Template { fd })
    }

    /// The templates of the machine, whoever made them.
    pub fn list(&self) -> io::Result<Vec<Stat>> {
        let mut room = 64;
        loop {
            let mut stats = vec![Stat::default(); room];
            let mut list = abi::List::new();
            list.entries = stats.as_mut_ptr() as u64;
            list.capacity = length(&stats)?;
            command(self.fd.as_fd(), abi::LIST, &mut list)?;
            let count = list.count as usize;
            if count <= room {
                stats.truncate(count);
                return Ok(stats);
            }
            room = count;
        }
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Why an attach was refused, and at which mapping.
#[derive(Debug)]
pub struct AttachError {
    pub error: io::Error,
    /// The start of the mapping that could not be made, if it was a mapping's fault.
    pub failed_at: Option<u64>,
}

/// A template's descriptor.
#[derive(Debug)]
pub struct Template {
    fd: OwnedFd,
}

impl Template {
    /// Adds mappings, and extents that lie inside of mappings; all of them or none. In any order.
    pub fn add(&self, maps: &[Map], extents: &[Extent]) -> io::Result<()> {
        let mut add = abi::Add::new();
        add.maps = maps.as_ptr() as u64;
        add.nr_maps = length(maps)?;
        add.extents = extents.as_ptr() as u64;
        add.nr_extents = length(extents)?;
        command(self.fd.as_fd(), abi::ADD, &mut add)?;
        Ok(())
    }

    /// Says that the template is complete: it can be attached, and no longer changed.
    pub fn seal(&self) -> io::Result<()> {
        command(self.fd.as_fd(), abi::SEAL, &mut abi::Flags::new())?;
        Ok(())
    }

    /// Makes all mappings in this process, at their addresses, or none of them.
    pub fn attach(&self) -> Result<(), AttachError> {
        self.attach_by(abi::Attach::new())
    }

    /// Makes them in the process of a pidfd, which the caller may trace. Needs
    /// [`abi::FEATURE_PROCESS`].
    pub fn attach_to(&self, process: BorrowedFd<'_>) -> Result<(), AttachError> {
        let mut attach = abi::Attach::new();
        attach.flags = abi::ATTACH_PIDFD;
        attach.pidfd = process.as_raw_fd();
        self.attach_by(attach)
    }

    fn attach_by(&self, mut attach: abi::Attach) -> Result<(), AttachError> {
        match command(self.fd.as_fd(), abi::ATTACH, &mut attach) {
            Ok(_) => Ok(()),
            Err(error) => Err(AttachError {
                error,
                failed_at: (attach.failed_at != 0).then_some(attach.failed_at),
            }),
        }
    }

    pub fn stat(&self) -> io::Result<Stat> {
        let mut stat = Stat::new();
        command(self.fd.as_fd(), abi::STAT, &mut stat)?;
        Ok(stat)
    }

    /// The mappings and extents, by address.
    pub fn query(&self) -> io::Result<(Vec<Map>, Vec<Extent>)> {
        let stat = self.stat()?;
        let mut maps = vec![Map::default(); room(stat.maps)?];
        let mut extents = vec![Extent::default(); room(stat.extents)?];
        let mut query = abi::Query::new();
        query.maps = maps.as_mut_ptr() as u64;
        query.nr_maps = length(&maps)?;
        query.extents = extents.as_mut_ptr() as u64;
        query.nr_extents = length(&extents)?;
        command(self.fd.as_fd(), abi::QUERY, &mut query)?;
        maps.truncate(query.nr_maps as usize);
        extents.truncate(query.nr_extents as usize);
        Ok((maps, extents))
    }

    /// Has the pages of a range in this machine's memory, once for all that attach the template from
    /// here on; returns how many of the range are. With `mapped`, processes that have it attached get
    /// them too, for which [`abi::FEATURE_PROMOTE_MAPPED`] is needed.
    pub fn promote(&self, start: u64, length: u64, mapped: bool) -> io::Result<u64> {
        let mut promote = abi::Promote::new();
        promote.flags = if mapped { abi::PROMOTE_MAPPED } else { 0 };
        promote.start = start;
        promote.length = length;
        command(self.fd.as_fd(), abi::PROMOTE, &mut promote)?;
        Ok(promote.pages)
    }

    /// Refuses attaches from here on; what is attached stays.
    pub fn delete(&self) -> io::Result<()> {
        command(self.fd.as_fd(), abi::DELETE, &mut abi::Flags::new())?;
        Ok(())
    }
}

impl AsFd for Template {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Template> for OwnedFd {
    fn from(template: Template) -> Self {
        template.fd
    }
}

/// A descriptor that another process passed on. The first call tells if it is no template
/// (`ENOTTY`).
impl From<OwnedFd> for Template {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

fn room(count: u64) -> io::Result<usize> {
    usize::try_from(count).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))
}
